"""`python -m wsgi_ts.supervisor`: the process that starts, watches and stops all others of an instance."""

import sys

from wsgi_ts.supervisor.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
