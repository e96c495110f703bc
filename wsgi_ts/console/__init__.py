"""The console: pages that show a running server in a browser. Sources in `src`, what is served in `*.html`."""
