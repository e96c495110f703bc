"""`GET /model-ready`: 200 when every model has a worker that takes requests, else 503."""

from wsgi_ts.plugins import endpoint


@endpoint("model-ready")
def model_ready(req, resp, ctx):
    waiting = [name for name, model in ctx.models.items() if not any(each.is_running for each in model.workers)]
    return (503, {"status": "not ready", "models": waiting}) if waiting else (200, {"status": "ready"})
