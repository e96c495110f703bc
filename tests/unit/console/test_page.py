"""The pages as they are served: made of the sources that are there, small, and closed to everything from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wsgi_ts.console.page import FOLDER, Page, policy, sources_sum

PAGES = ("console", "docs")
#: What a page may weigh on the way to the browser.
MOST_BYTES = 100_000


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_of_the_present_sources(name: str) -> None:
    assert Page.load(name).sources == sources_sum(), "the sources have changed since: make console"


@pytest.mark.slow
def test_the_sources_make_exactly_these_pages(tmp_path: Path) -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "esbuild").is_dir():
        pytest.skip("what makes the pages is not installed: make console")
    subprocess.run(["node", FOLDER / "build.mjs", tmp_path], check=True, timeout=120)
    for name in PAGES:
        assert (tmp_path / f"{name}.html").read_bytes() == Page.load(name).html


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_small_and_loads_nothing(name: str) -> None:
    page = Page.load(name)
    assert len(page.packed) <= MOST_BYTES
    text = page.html.decode()
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=.([^'\" >]*)", text)
    assert [each for each in loaded if not each.startswith("data:")] == []
    assert re.findall(r"@import|url\(\s*['\"]?(?!data:)", text) == []
    assert "style=" not in re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_allows_the_page_itself_alone(name: str) -> None:
    rules = dict(rule.partition(" ")[::2] for rule in Page.load(name).headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["style-src"])
    assert not any("unsafe" in value for value in rules.values())


def test_a_changed_script_has_another_sum() -> None:
    html = Page.load("docs").html
    assert policy(html) != policy(html.replace(b"</script>", b" </script>"))


def test_a_page_of_unknown_making_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "console.html").write_text("<html></html>")
    monkeypatch.setattr("wsgi_ts.console.page.FOLDER", tmp_path)
    with pytest.raises(ValueError, match="make console"):
        Page.load("console")


def test_the_licences_of_what_is_in_the_pages_are_there() -> None:
    notice = (FOLDER / "NOTICE").read_text()
    assert "Preact" in notice
    assert "uPlot" in notice
    assert "MIT License" in notice
