"""Where the `ts` import paths lie: `PYTHONPATH=$(python -m wsgi_ts.ts_path) pytest` for the tests of handlers.

Model workers have the folder on `sys.path` by themselves; elsewhere `ts` is importable only for who asks for it, so
that an installed TorchServe stays what `import ts` finds.
"""

from __future__ import annotations

from pathlib import Path


def shim_path() -> str:
    """Returns the folder that makes `import ts.…` work when it is on `sys.path`."""
    return str(Path(__file__).absolute().parent / "ts_shim")


if __name__ == "__main__":
    print(shim_path())
