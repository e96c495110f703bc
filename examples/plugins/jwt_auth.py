"""JSON web tokens (PyJWT): who has a valid one may do what its claims say.

    {"sub": "team-a", "exp": ..., "models": ["resnet"], "actions": ["predict", "explain"]}

`models` and `actions` may hold "*". The key is JWT_SECRET (HS256), or the PEM file that JWT_PUBLIC_KEY names (RS256);
JWT_AUDIENCE, if set, must be in the token. `/ping` and `/metrics` are everybody's.
"""

import os
from pathlib import Path

import jwt

from wsgi_ts.plugins import Principal, Refuse, plugin


@plugin("auth", name="jwt")
class JwtAuth:
    headers = ("authorization",)
    open_actions = ("ping", "metrics")

    def __init__(self):
        public = os.environ.get("JWT_PUBLIC_KEY")
        self._key = Path(public).read_text() if public else os.environ["JWT_SECRET"]
        self._algorithms = ["RS256"] if public else ["HS256"]
        self._audience = os.environ.get("JWT_AUDIENCE")

    def authenticate(self, head):
        scheme, _, token = head.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            claims = jwt.decode(
                token, self._key, self._algorithms, audience=self._audience, options={"require": ["exp", "sub"]}
            )
        except jwt.InvalidTokenError as error:
            return Refuse(401, f"The token is not accepted: {error}.")
        return Principal(claims["sub"], claims)

    def authorize(self, principal, action, model):
        return may(principal.claims, "actions", action) and may(principal.claims, "models", model)


def may(claims, name, wanted):
    allowed = claims.get(name, [])
    return "*" in allowed or wanted in allowed
