"""What a request went through: W3C trace context, spans, the last slow and failed requests, log lines as JSON."""
