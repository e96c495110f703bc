"""`python -m wsgi_ts.batcher.template`: the warm process that model workers are forked from."""

from wsgi_ts.batcher.template.template import main

if __name__ == "__main__":
    main()
