"""How a handler tells the server how full its KV cache is, for those who decide where the next request goes."""

from __future__ import annotations

from wsgi_ts.handlers.serving.context import Context


def report_kv_cache_usage(context: Context, usage: float) -> None:
    """Tells how full this worker's KV cache is; that counts until the handler tells otherwise, or its worker ends.

    It costs about as much as storing a number, and may be called at any time and from any thread. Where no server
    shows it (in a handler's own tests, in a rank behind the first, in a function of a workflow) nothing happens.

    Args:
        context: the handler's context, that of `initialize` or of a request.
        usage: from 0 (empty) to 1 (full).

    Raises:
        ValueError: the usage is no such number.
    """
    number = float(usage)  # of a tensor, or of another library's number, too
    if not 0 <= number <= 1:
        raise ValueError(f"The usage of a KV cache is a number from 0 (empty) to 1 (full), not {usage!r}")
    if context._kv_cache_sink is not None:
        context._kv_cache_sink(number)
