"""The oldest handler classes."""
