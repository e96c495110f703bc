"""`wsgi-ts doctor --k8s`: what a pod needs besides what every server needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

from wsgi_ts.batcher.shm.shared_memory import SHM_DIRECTORY
from wsgi_ts.cgroup import is_killed_as_one, memory_limit, usable_cores
from wsgi_ts.checks.machine import Finding
from wsgi_ts.metrics.reported import PROMETHEUS_MODE
from wsgi_ts.settings.config import Config

#: What a pod gets to end where its manifest does not say otherwise, in seconds.
_GRACE_S = 30
#: What ending takes besides the drain, in seconds.
_MARGIN_S = 5


def check_kubernetes(config: Config) -> Iterator[Finding]:
    """Addresses, ending, limits and user of a pod, as far as they can be seen from here."""
    yield from _check_addresses(config)
    yield from _check_end(config)
    yield from _check_limits()
    yield from _check_user()


def _check_addresses(config: Config) -> Iterator[Finding]:
    if config.inference_address.is_local:
        text = f"{config.inference_address} is out of reach for the service and for probes"
        yield Finding("FAIL", "inference", f"{text}; set inference_address=http://0.0.0.0:8080")
    else:
        yield Finding("OK", "inference", f"{config.inference_address}, probes /livez, /readyz, /startupz")
    if not config.management_address.is_local and not config.token_authorization:
        text = f"{config.management_address} lets every pod of the cluster run code here"
        yield Finding("WARN", "management", f"{text}; bind it to 127.0.0.1, or set disable_token_authorization=false")
    if config.enable_metrics_api and config.metrics_address.is_local:
        text = f"{config.metrics_address} is out of reach for Prometheus"
        yield Finding("WARN", "metrics", f"{text}; set metrics_address=http://0.0.0.0:8082")
    if config.metrics_mode != PROMETHEUS_MODE:
        yield Finding("WARN", "metrics", f"/metrics is empty; set metrics_mode={PROMETHEUS_MODE}")


def _check_end(config: Config) -> Iterator[Finding]:
    if not config.drain_delay:
        text = "requests that are still sent here after SIGTERM are refused"
        yield Finding("WARN", "end", f"{text}; set drain_delay=15")
    needed = config.drain_delay + config.graceful_timeout + _MARGIN_S
    if needed > _GRACE_S:
        yield Finding("WARN", "end", f"it may take {needed} s; set terminationGracePeriodSeconds: {needed} or more")
    else:
        yield Finding("OK", "end", f"within {needed} s, terminationGracePeriodSeconds is {_GRACE_S} by default")


def _check_limits() -> Iterator[Finding]:
    memory = memory_limit()
    shown = "no limit" if memory is None else f"{memory >> 20} MiB, /dev/shm included"
    yield Finding("OK", "limits", f"{usable_cores()} cores; memory: {shown}")
    shared = os.statvfs(SHM_DIRECTORY)
    total = shared.f_frsize * shared.f_blocks
    if memory is not None and total > memory:
        text = f"{total >> 20} MiB of /dev/shm cannot be filled within {memory >> 20} MiB"
        yield Finding("WARN", "limits", f"{text}; give its emptyDir a sizeLimit")
    if memory is not None and is_killed_as_one():
        text = "when one model worker runs out of memory, the kernel ends the whole container"
        yield Finding("WARN", "limits", f"{text}; set the kubelet's singleProcessOOMKill, or leave memory to spare")


def _check_user() -> Iterator[Finding]:
    if os.getuid() == 0:
        yield Finding("WARN", "user", "root; set runAsNonRoot: true and runAsUser: 1000")
    else:
        yield Finding("OK", "user", f"uid {os.getuid()}")
