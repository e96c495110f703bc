"""The workflows of `make bench-workflows`, their handlers, and what is measured with each."""
