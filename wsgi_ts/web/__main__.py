"""`python -m wsgi_ts.web`: gunicorn on sockets that the supervisor has bound."""

import gc

if __name__ == "__main__":
    # What is imported stays: to look through it for garbage, now and at the end, is a fifth of what a start costs.
    gc.disable()
    from wsgi_ts.web.gunicorn_app import main

    gc.freeze()
    gc.enable()
    main()
