"""Files that are replaced in one step: whole, private, and as they were where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsgi_ts.whole_files import replace_file


@pytest.mark.parametrize("to_disk", [False, True])
def test_another_file_takes_the_place(tmp_path: Path, to_disk: bool) -> None:
    file = tmp_path / "state"
    replace_file(file, "old", to_disk=to_disk)
    with file.open() as reader:
        replace_file(file, "new \u00e9", to_disk=to_disk)
        assert reader.read() == "old"
    assert file.read_text(encoding="utf-8") == "new \u00e9"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_replaced_stays_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(folder, "new")
    with pytest.raises(UnicodeEncodeError):
        replace_file(tmp_path / "other", "\ud800")
    assert list(tmp_path.iterdir()) == [folder]


def test_nothing_is_written_through_a_link_that_somebody_has_put_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".new-state").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(tmp_path / "state", "new")
    assert not target.exists()
