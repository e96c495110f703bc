"""What means ill: handlers, clients, archives, callers of the management API.

docs/security.md says which test holds what.
"""
