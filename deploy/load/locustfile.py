"""Load for locust: users who wait for each answer before they ask again; see README.md for the command."""

from __future__ import annotations

import mimetypes
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, events, task


@events.init_command_line_parser.add_listener
def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="my_model", help="name, or name/version")
    parser.add_argument("--payload", help="file that is the body of each request; default: [1.0, 2.0, 3.0]")
    parser.add_argument("--content-type", help="default: by the suffix of --payload, else application/json")


class Client(FastHttpUser):
    """Asks one model again and again. A refusal (503, the queue is full) is shown apart from a failure."""

    wait_time = constant(0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self.environment.parsed_options
        self.path = f"/predictions/{options.model}"
        guessed = None
        self.body = b"[1.0, 2.0, 3.0]"
        if options.payload:
            self.body = Path(options.payload).read_bytes()
            guessed = mimetypes.guess_type(options.payload)[0] or "application/octet-stream"
        self.headers = {"Content-Type": options.content_type or guessed or "application/json"}

    @task
    def predict(self) -> None:
        """One prediction."""
        with self.client.post(self.path, data=self.body, headers=self.headers, catch_response=True) as response:
            if response.status_code == 503:
                response.failure(f"refused: {response.text}")
            elif response.status_code != 200:
                response.failure(f"{response.status_code} {response.text}")
