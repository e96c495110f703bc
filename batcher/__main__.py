"""`python -m wsgi_ts.batcher`: a batcher, started by the supervisor."""

import gc
import sys

if __name__ == "__main__":
    # What is imported stays: to look through it for garbage, now and at the end, is a fifth of what a start costs.
    gc.disable()
    from wsgi_ts.batcher.main import main

    gc.freeze()
    gc.enable()
    sys.exit(main())
