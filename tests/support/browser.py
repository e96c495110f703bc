"""Chromium, as people's browsers are: and everything that it complains about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from support import debian

#: How long a browser may take for one step, in milliseconds: nothing but a page that never does it takes so long.
_LIMIT_MS = 60_000
expect.set_options(timeout=_LIMIT_MS)

#: Controls and pictures without a name for those who do not see them.
NAMELESS = """() => [...document.querySelectorAll("a, button, input, select, textarea, [role=img], [role=meter]")]
  .filter((each) => !(each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.length || each.title))
  .map((each) => each.outerHTML.slice(0, 120))"""
#: Texts whose contrast with what lies behind them is below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (color, over) => {
    canvas.fillStyle = over; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = (parts) => {
    const [r, g, b] = parts.map((part) => part / 255).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (color && !color.includes("rgba") && color !== "transparent" && !color.includes("/ 0")) return color;
    }
    return "white";
  };
  const found = new Set();
  for (const element of document.querySelectorAll("main *, nav *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg, [disabled], option, select")) continue;
    const back = behind(element);
    const one = light(rgb(getComputedStyle(element).color, back));
    const other = light(rgb(back, back));
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found.add(`${contrast.toFixed(2)} ${element.className} ${element.textContent.slice(0, 30)}`);
  }
  return [...found];
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=debian.program("chromium"),
            env=debian.environment(),
            args=["--no-sandbox"],
            timeout=3 * _LIMIT_MS,
        )
        yield browser
        browser.close()


class Watched:
    """A page whose complaints are kept: errors, warnings and broken policies.

    Attributes:
        page: the page.
        complaints: what it has said.
    """

    def __init__(self, browser: Browser, *, width: int = 1440, theme: str = "dark") -> None:
        self.complaints: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if theme == "dark" else "light",
            reduced_motion="reduce",
        )
        self.page: Page = context.new_page()
        self.page.set_default_timeout(_LIMIT_MS)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text} ({message.location.get('url')})")
