"""wsgi-ts inside other systems."""
