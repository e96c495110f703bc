"""`python -m wsgi_ts.batcher.template`: the processes that model workers are forked from."""

from wsgi_ts.batcher.template.start import main

if __name__ == "__main__":
    main()
