"""Batching rules against each other, simulated and real (`make bench-batching`)."""
