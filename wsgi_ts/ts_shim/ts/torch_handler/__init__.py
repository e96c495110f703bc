"""Handlers that models may name or derive from."""
