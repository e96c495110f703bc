"""Helpers of the tests: archives, a real server, ways to break it, and waiting with a limit."""
