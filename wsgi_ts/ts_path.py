"""Where the `ts` import paths lie.

Model workers have the folder at the head of `sys.path`. Every other program of the environment has it at the end
(setup.py: `InstallTsPath`), so that an installed TorchServe stays what `import ts` finds; to have it found before that:
`PYTHONPATH=$(python -m wsgi_ts.ts_path)`.
"""

from __future__ import annotations

from pathlib import Path


def shim_path() -> str:
    """Returns the folder that makes `import ts.…` work when it is on `sys.path`."""
    return str(Path(__file__).absolute().parent / "ts_shim")


if __name__ == "__main__":
    print(shim_path())
