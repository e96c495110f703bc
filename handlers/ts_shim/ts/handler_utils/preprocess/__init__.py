"""Preprocessing outside Python."""
