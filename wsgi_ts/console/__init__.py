"""The console: one page on the management port that shows a running server, live."""
