"""The older place of the streaming call."""
