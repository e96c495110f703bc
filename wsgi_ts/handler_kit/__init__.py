"""For authors of handlers: a handler's skeleton, and a handler run, checked and replayed without a server."""
