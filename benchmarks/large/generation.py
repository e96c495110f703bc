"""Token generation: requests that join a batch between two steps, against batches that run to their longest request.

Clients ask one after another for 8 to 128 tokens, the same lengths for either way, and read them as they come. Tokens
per second are those that reach clients while the run lasts; the time to the first token counts from the request.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from archive_server import ArchiveServer, archive
from reports import markdown, say
from servers import BenchmarkError

from large.measuring import FOLDER, Effort, Figures, quantile

DECODERS = {"gpt": "small GPT", "fixed": "simulated steps"}
MODES = ("static", "continuous")
CLIENTS = (1, 8, 32)
TITLE = "Token generation: requests that join between two steps, against batches that run to their end"
SHORTEST, LONGEST = 8, 128
BATCH_SIZE = 16
_WARM_UP_S = 1.0
#: What is under way when a run ends must be over after so many seconds.
_LIMIT_S = 60.0
_END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Run:
    """What one run has seen.

    Attributes:
        begins: monotonic time from which on it counts.
        ends: and until when; requests begun before are still read to their end.
        tokens: tokens that came within that time.
        first_token_s: of each request begun within it, how long its first token took.
    """

    begins: float
    ends: float
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)


def make_archives() -> None:
    """A model for each decoder and way."""
    for decoder in DECODERS:
        for mode in MODES:
            config = {
                "minWorkers": 1, "maxWorkers": 1, "batchSize": BATCH_SIZE, "maxBatchDelay": 5,
                "continuousBatching": mode == "continuous",
                "handler": {"decoder": decoder, "longest": LONGEST},
            }  # fmt: skip
            handler = FOLDER / "generation_handler.py"
            archive(_model(decoder, mode), handler, config=config, extra_files=[FOLDER / "decoders.py"])


def _model(decoder: str, mode: str) -> str:
    return f"generation-{decoder}-{mode}"


def measure(server: ArchiveServer, effort: Effort) -> Figures:
    """One round: tokens per second, and milliseconds to the first token."""
    figures: Figures = {}
    for decoder in DECODERS:
        models = [_model(decoder, mode) for mode in MODES]
        with server.registered(*models):
            for clients in CLIENTS:
                for mode, model in zip(MODES, models, strict=True):
                    run = asyncio.run(_run(server, model, clients, effort.seconds))
                    key = f"{decoder}_{mode}_{clients}"
                    figures[f"{key}_per_s"] = run.tokens / effort.seconds
                    figures[f"{key}_p50_ms"] = quantile(run.first_token_s, 0.5) * 1e3
                    figures[f"{key}_p99_ms"] = quantile(run.first_token_s, 0.99) * 1e3
                    say(f"{decoder}, {mode}, {clients} clients: {figures[f'{key}_per_s']:,.0f} tokens/s, "
                        f"first token p50 {figures[f'{key}_p50_ms']:.1f} ms")  # fmt: skip
    return figures


async def _run(server: ArchiveServer, model: str, clients: int, seconds: float) -> Run:
    begins = time.monotonic() + _WARM_UP_S
    run = Run(begins, begins + seconds)
    # Each client has its own lengths, and the same ones in each run.
    asking = asyncio.gather(*(_client(server, model, random.Random(number), run) for number in range(clients)))
    try:
        await asyncio.wait_for(asking, _WARM_UP_S + seconds + _LIMIT_S)
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
        raise BenchmarkError(f"{model} left {clients} clients without an answer: {error!r}") from error
    return run


async def _client(server: ArchiveServer, model: str, lengths: random.Random, run: Run) -> None:
    """Asks and reads until the run ends.

    Raises:
        BenchmarkError: an answer is no stream with status 200, or has another number of tokens than asked for.
    """
    address = urlsplit(server.inference)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        while time.monotonic() < run.ends:
            wanted = lengths.randint(SHORTEST, LONGEST)
            body = str(wanted).encode()
            began = time.monotonic()
            writer.write(
                b"POST /predictions/%b HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/octet-stream\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (model.encode(), len(body), body)
            )
            got = await _read_stream(reader, began, run)
            if got != wanted:
                raise BenchmarkError(f"{model} sent {got} tokens instead of {wanted}")
    finally:
        writer.close()
        await writer.wait_closed()


async def _read_stream(reader: asyncio.StreamReader, began: float, run: Run) -> int:
    """Reads one answer and notes its tokens; how many it had.

    A token ends with a space, and the framing of chunks has none.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or b"chunked" not in head.lower():
        raise BenchmarkError(f"an answer is no stream of tokens: {head.decode(errors='replace')}")
    count, end = 0, b""
    while end != _END_OF_CHUNKS:
        data = await reader.read(65536)
        if not data:
            raise BenchmarkError("an answer broke off")
        now = time.monotonic()
        tokens = data.count(b" ")
        if tokens and not count and run.begins <= began < run.ends:
            run.first_token_s.append(now - began)
        if run.begins <= now < run.ends:
            run.tokens += tokens
        count += tokens
        end = (end + data)[-len(_END_OF_CHUNKS) :]
    return count


def table(figures: Figures) -> str:
    """The figures of a round, or their medians, in Markdown."""

    def cell(key: str) -> str:
        per_s, p50, p99 = (figures[f"{key}_{name}"] for name in ("per_s", "p50_ms", "p99_ms"))
        return f"{per_s:,.0f} tokens/s, first one p50 {p50:,.1f} ms, p99 {p99:,.1f} ms"

    return markdown(
        ("clients", *(f"{mode} batches" for mode in MODES)),
        *(
            (f"{clients}, {title}", *(cell(f"{decoder}_{mode}_{clients}") for mode in MODES))
            for decoder, title in DECODERS.items()
            for clients in CLIENTS
        ),
    )
