"""A model worker that runs the functions of a workflow: any number of them in one process."""

from __future__ import annotations

import time

from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.batcher.shm.worker_layout import Tally
from wsgi_ts.batcher.worker.worker import ModelWorker, metrics_sink
from wsgi_ts.handlers.serving.functions import FunctionHost
from wsgi_ts.handlers.serving.service import Service


class FunctionWorker(ModelWorker):
    """Serves the batches of one mailbox, each request with the function that it asks for.

    What it is given at a time is no batch for a function: each request is begun and answered by itself, or with as many
    of its neighbours as the workflow allows.
    """

    _host: FunctionHost

    @property
    def must_restart(self) -> bool:
        """True once the device of a function is broken."""
        return self._host.must_restart

    def load(self, gpu_id: int | None) -> None:
        """Imports the handler file and loads all functions (see `FunctionHost.load` for what it raises)."""
        self._host = FunctionHost.load(self._spec, gpu_id, self._send_chunk, metrics_sink=metrics_sink())
        self._service = next(iter(self._host.services.values()))

    def close(self) -> None:
        """Ends what the services keep."""
        self._host.close()

    def _run_batch(self, service: Service, entries: list[int]) -> None:
        refs, requests = self._slots.accept(entries, 0)
        if len(refs) < len(entries):
            self._slots.ring_owners(entries)  # what was not accepted is answered
        for number, batch in enumerate(self._host.batches(requests)):
            if number:  # `responseTimeout` is the limit of one call
                self._mailbox.begin_step(time.monotonic_ns())
            left = []
            for place in batch:
                ref = refs[place]
                if ref.is_cancelled:
                    self._slots.count(Tally.CANCELLED)
                    ref.segment.fail_cancelled(ref.slot)
                else:
                    ref.set_state(SlotState.RUNNING)
                    left.append(place)
            if left:
                self._started_ns = time.monotonic_ns()
                own = self._host.services[requests[left[0]].function]
                self._predict(own, [refs[place] for place in left], [requests[place] for place in left])
            self._slots.ring_owners([refs[place].entry for place in batch])
        service.must_restart = self._host.must_restart
