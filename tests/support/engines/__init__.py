"""Stand-ins for engines that cannot run on a machine without a GPU: their public names over a small model of torch.

A test puts them into the model's archive (`engine_files`), where the handler imports them in place of the packages.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def engine_files(package: str) -> dict[str, str]:
    """The files of the stand-in for a package ("vllm", "tensorrt_llm"), by their names in an archive."""
    files = {str(path.relative_to(_HERE)): path.read_text() for path in (_HERE / package).rglob("*.py")}
    return files | {"letters.py": (_HERE / "letters.py").read_text()}
