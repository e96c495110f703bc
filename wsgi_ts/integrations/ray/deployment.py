"""`deployment("model.mar")`: a model archive as a deployment of Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from wsgi_ts.integrations.ray.replica import ModelReplica

#: Of one replica at a time: Ray's own default, 5, is less than most batches. More than this wait at Ray's.
MAX_ONGOING_REQUESTS = 100


def deployment(
    archive: str | Path,
    *,
    model_name: str | None = None,
    workers: int = 1,
    batch_size: int | None = None,
    max_batch_delay: int | None = None,
    response_timeout: int | None = None,
    settings: dict[str, object] | None = None,
    **options: Any,
) -> serve.Deployment:
    """Makes a deployment of a model; `.bind()` makes an application of it.

    Args:
        archive: a model archive, or a folder with what is in one, where each replica finds it: on a disk that all nodes
            have, in the image, in the `working_dir` of `runtime_env`; or an address that it is fetched from. A path is
            looked for where the replica runs, then where this was called.
        model_name: name of the model; the archive's own by default.
        workers: model workers of each replica.
        batch_size: most requests of one call of the handler; by default what the archive says.
        max_batch_delay: longest wait for a batch to fill, in milliseconds; likewise.
        response_timeout: longest run of the handler, in seconds; likewise.
        settings: keys of config.properties for the replicas.
        **options: those of `serve.deployment`: `name`, `num_replicas`, `ray_actor_options`, …
    """
    numbers = {"batch_size": batch_size, "max_batch_delay": max_batch_delay, "response_timeout": response_timeout}
    given = {"model_name": model_name, "initial_workers": workers, **numbers}
    arguments = {name: value for name, value in given.items() if value is not None}
    options.setdefault("name", model_name or Path(archive).stem)
    options.setdefault("max_ongoing_requests", MAX_ONGOING_REQUESTS)
    return serve.deployment(**options)(_bound(str(archive), Path.cwd(), arguments, settings or {}))


def app(args: dict[str, Any]) -> serve.Application:
    """Builds an application of one model for `serve run` and Serve's configuration files.

    Args:
        args: those of `deployment`; numbers may be texts, as a command line has them.
    """
    read: dict[str, Any] = {
        name: int(text) if isinstance(text, str) and text.isdecimal() else text for name, text in args.items()
    }
    return deployment(**read).bind()


def _bound(archive: str, made_in: Path, arguments: dict[str, Any], settings: dict[str, object]) -> type[ModelReplica]:
    """Returns the class of the replicas of one deployment, which takes no arguments."""

    class Replica(ModelReplica):
        def __init__(self) -> None:
            # A replica that was given no directory to work in runs in one of Ray's.
            is_here = "://" in archive or Path(archive).exists()
            super().__init__(archive if is_here else str(made_in / archive), arguments, settings)

    return Replica
