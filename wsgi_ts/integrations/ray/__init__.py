"""Models as deployments of Ray Serve."""
