"""Which GPU a model worker gets: TorchServe's order, as pure functions and counters."""

from __future__ import annotations

from collections.abc import Sequence

from wsgi_ts.quick_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model may run.

    Attributes:
        device_type: `cpu` or `gpu`, as describe-model shows it.
        device_ids: the GPUs that the model asked for, None where it asked for none (or for wrong ones).
        usable_gpus: how many GPUs its workers are spread over; 0 on the CPU.
        parallel_level: GPUs of one worker; 0 for a worker that uses one.
        warnings: what was wrong with the request.
    """

    device_type: str
    device_ids: tuple[int, ...] | None
    usable_gpus: int
    parallel_level: int
    warnings: tuple[str, ...] = ()

    @property
    def worker_limit(self) -> int | None:
        """The most workers that fit, None where nothing limits them."""
        if self.parallel_level > 0 and self.usable_gpus > 0:
            return self.usable_gpus // self.parallel_level
        return None


def place(
    gpus: int, device_type: str | None = None, device_ids: Sequence[int] | None = None, parallel_level: int = 0
) -> Placement:
    """Reads what a model-config.yaml says of devices.

    Args:
        gpus: GPUs that this server uses.
        device_type: `cpu`, `gpu` or None; gpu without GPUs is the CPU.
        device_ids: the key deviceIds; the whole list is ignored where one of them does not exist.
        parallel_level: GPUs of one worker.
    """
    on_gpu = gpus > 0 and device_type != "cpu"
    ids = tuple(device_ids) if device_ids else None
    warnings: list[str] = []
    if ids is not None:
        wrong = [number for number in ids if not 0 <= number < gpus]
        if wrong:
            warnings.append(f"Invalid deviceId:{wrong[0]}, ignore deviceIds list")
            ids = None
    usable = 0 if not on_gpu else len(ids) if ids is not None else gpus
    return Placement("gpu" if on_gpu else "cpu", ids, usable, parallel_level, tuple(warnings))


class Assigner:
    """Hands out GPUs: one counter for the server, and one for each model that has its own list.

    The server's counter is incremented before it is used: of several GPUs the first worker gets number 1.
    """

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._last = 0

    def next(self, placement: Placement, nth_of_model: int) -> int | None:
        """The GPU of a new worker (of several: the first), after `nth_of_model` of its model; None on the CPU."""
        if placement.usable_gpus == 0:
            return None
        if placement.parallel_level > 0:
            return group_devices(placement, nth_of_model)[0]
        if placement.device_ids is not None:
            return placement.device_ids[nth_of_model % len(placement.device_ids)]
        self._last = (self._last + 1) % self._gpus
        return self._last


def group_devices(placement: Placement, nth_of_model: int) -> tuple[int, ...]:
    """The GPUs of a worker that spans several: the next ones of the model's list, from its start again at its end.

    `nth_of_model` workers of this model version were given GPUs before.
    """
    ids = placement.device_ids
    devices = ids if ids is not None else tuple(range(placement.usable_gpus))
    level = placement.parallel_level
    # What is left at the end of the list and is too little for a worker stays unused.
    start = nth_of_model % max(1, len(devices) // level) * level
    return devices[start : start + level]
