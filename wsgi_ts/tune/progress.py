"""How far a tuning has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_RENEWED_S = 0.5


class Progress:
    """Shows the time that has gone of the seconds that there are; a context manager."""

    def __init__(self, total_s: float, stream: TextIO) -> None:
        self._begun = time.monotonic()
        self._total_s = total_s
        self._stream = stream
        self._bar: tqdm | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            shape = "{desc}: {bar} {n:.0f} of {total:.0f} s"
            self._bar = tqdm(total=self._total_s, bar_format=shape, file=self._stream, leave=False)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._bar is not None:
            self._thread.join()
            self._bar.close()

    def stage(self, text: str) -> None:
        """Another part begins."""
        if self._bar is not None:
            self._bar.set_description_str(text)
        else:
            self.tell(f"{text} …")

    def tell(self, text: str) -> None:
        """Something was found out."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _renew(self) -> None:
        assert self._bar is not None
        while not self._stop.wait(_RENEWED_S):
            self._bar.n = min(self._total_s, time.monotonic() - self._begun)
            self._bar.refresh()
