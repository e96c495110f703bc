"""Serves one large language model without an archive."""

import sys

from wsgi_ts.llm_launcher import main

if __name__ == "__main__":
    sys.exit(main())
