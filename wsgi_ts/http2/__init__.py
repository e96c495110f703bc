"""HTTP/2 of a server (RFC 9113): bytes in, events out, without a socket, a clock or a thread."""
