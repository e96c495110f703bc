"""What Kubernetes does to a server from its start to its end, for `bench_lifecycle.py` and for tests."""
