"""The least that a Falcon app can do with a body: what HTTP alone costs, without a model server behind it."""

import falcon


class Echo:
    """Answers every request with its own body."""

    def on_post(self, request, response):
        """The body, as it came."""
        response.content_type = "application/octet-stream"
        response.data = request.bounded_stream.read()


app = falcon.App()
app.add_route("/echo", Echo())
