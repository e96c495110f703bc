"""`python -m wsgi_ts.batcher.template`: the processes that model workers are forked from."""

import gc

if __name__ == "__main__":
    # What is imported stays: to look through it for garbage, now and at the end, is a fifth of what a start costs.
    gc.disable()
    from wsgi_ts.batcher.template.start import main

    gc.freeze()
    gc.enable()
    main()
