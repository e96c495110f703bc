"""`python -m wsgi_ts.guard`: the process that a user starts."""

import sys

from wsgi_ts.guard.guard import main

if __name__ == "__main__":
    sys.exit(main())
