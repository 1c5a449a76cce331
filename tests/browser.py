"""A real browser without a window, and what a person would do with a page in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install .[dev])")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,1000",
)


def missing() -> str:
    """What a browser's tests need and this machine lacks, in words; empty if nothing."""
    if any(map(shutil.which, _BROWSERS)) and shutil.which("chromedriver"):
        return ""
    return "needs a browser: install chromium and chromium-driver (or Chrome and its driver)"


def launch(profile: Path) -> Any:
    """A headless Chromium or Chrome, with a profile of its own; `quit()` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _BROWSERS)))
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )


class Page:
    """A page in the browser, and what a person would do with it."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver = driver
        self.path = path

    def open(self, scheme: str = "light") -> Page:
        self.prefer(scheme)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(self.path.as_uri())
        self.until("return performance.getEntriesByName('interactive').length")
        return self

    def prefer(self, scheme: str) -> None:
        """Have the system ask for light or dark, and for no animations."""
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        return WebDriverWait(self.driver, 20, 0.03).until(lambda _: self.js(script, *arguments))

    def find(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, css)
        return found

    def frame(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )

    @property
    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    @property
    def requests(self) -> list[str]:
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        here = self.path.as_uri()
        return [params["request"]["url"] for params in sent if params["documentURL"] == here]

    def column(self, number: int) -> list[str]:
        """The cells of a column, as far as they are in the document."""
        cells = f"return [...document.querySelectorAll('.data')].map(r => r.children[{number}].textContent)"
        found: list[str] = self.js(cells)
        return found

    def search(self, words: str) -> None:
        """Look for these words among the tensors, instead of what was looked for before."""
        field = self.find("#search")
        field.clear()
        field.send_keys(words)
        self.frame()

    def sort(self, column: str) -> str:
        self.find(f".titles [data-column='{column}']").click()
        self.frame()
        head = self.find(f".titles [data-column='{column}']")
        found: str = self.js("return arguments[0].parentElement.ariaSort", head)
        return found

    @property
    def count(self) -> str:
        text: str = self.find("#count").text
        return text

    @property
    def stretch(self) -> str:
        text: str = self.find("#range-text").text
        return text

    @property
    def tip(self) -> str:
        text: str = self.js(
            "const t = document.querySelector('.tip'); return t.hidden ? '' : t.textContent"
        )
        return text

    def clear(self) -> None:
        self.js("scrollTo(0, 0)")
        self.frame()

    def canvas_at(self, lane: str, share: float) -> tuple[Any, int, int]:
        """The lanes' canvas and the offsets from its middle of a moment in a lane's row."""
        canvas = self.find("#lanes-canvas")
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
        top = self.js(
            "const all = [...document.querySelectorAll('.labels div')];"
            "const l = all.find(d => d.textContent.startsWith(arguments[0]));"
            "return l.offsetTop + l.offsetHeight / 2",
            lane,
        )
        width, height = canvas.size["width"], canvas.size["height"]
        return canvas, int(width * (share - 0.5)), int(top - height / 2)

    def move(self, lane: str, share: float) -> ActionChains:
        return ActionChains(self.driver).move_to_element_with_offset(*self.canvas_at(lane, share))

    def shot(self) -> bytes:
        png: bytes = self.driver.get_screenshot_as_png()
        return png


__all__ = ["ActionChains", "By", "Keys", "Page", "launch", "missing"]
