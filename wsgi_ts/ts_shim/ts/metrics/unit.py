from wsgi_ts.handlers.metrics.metric import UNITS


class Units:
    """Units written out, by the short form that handlers give."""

    def __init__(self) -> None:
        self.units = dict(UNITS)
