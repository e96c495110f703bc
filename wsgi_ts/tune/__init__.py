"""`wsgi-ts tune`: finds the settings of a model that serve most within a latency goal, on the running server."""
