"""The errors that decide what a whole batch, or the start of a model, is answered with."""

from __future__ import annotations


class PredictionException(Exception):
    """Raised by a handler to answer the whole batch with a message and status of its own.

    Args:
        message: text of the answer's `message` field.
        error_code: HTTP status, 200 to 999; any other is answered as 500.
    """

    def __init__(self, message: str, error_code: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = error_code

    def __str__(self) -> str:
        return f"{self.message} : {self.error_code}"


class UnreadableRows(PredictionException):
    """Some rows of a batch cannot be read, and the handler has seen none of it yet.

    Args:
        errors: what is wrong with them, by row.
    """

    def __init__(self, errors: dict[int, PredictionException]) -> None:
        first = next(iter(errors.values()))
        super().__init__(first.message, first.error_code)
        self.errors = errors


class BatchFailure(Exception):
    """What the handler returned fails the whole batch with status 503, as in TorchServe.

    Args:
        message: TorchServe's text, for the clients.
        reason: what was wrong, for the log.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(reason)
        self.message = message


class LoadError(Exception):
    """The model could not be loaded, and TorchServe has a status for it.

    Args:
        status: 507 when memory ran out, 500 for another RuntimeError of the handler.
        message: TorchServe's text.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
