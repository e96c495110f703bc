"""The frames between server and worker."""
