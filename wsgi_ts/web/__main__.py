"""`python -m wsgi_ts.web`: gunicorn on sockets that the supervisor has bound."""

from wsgi_ts.web.gunicorn_app import main

if __name__ == "__main__":
    main()
