"""How large a plan's page is, how soon it can be used, and how smoothly it zooms, in a real browser.

    python benchmarks/page.py plan.json                          # as lohan_fx.plan --dump wrote it
    python benchmarks/page.py a.json b.json --shot shot.png --height 1500

Prints one JSON line: bytes of the page, seconds that Python takes to read and to write it, milliseconds from
navigation until the page can be used (the median of five loads), and milliseconds a frame while
zooming and panning through the timeline. Needs selenium, Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lohan_fx.plan import Plan
from lohan_fx.tracing import Trace
from lohan_fx.view import render, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from browser import Page, launch, missing

LOADS = 5
FRAMES = """
const done = arguments[0], canvas = document.querySelector('#lanes-canvas'), times = [];
const box = canvas.getBoundingClientRect();
const wheel = (deltaX, deltaY) => canvas.dispatchEvent(new WheelEvent('wheel', {
  deltaX, deltaY, clientX: box.left + box.width / 3, clientY: box.top + 60,
  bubbles: true, cancelable: true}));
let last = performance.now();
const next = () => {
  times.push(performance.now() - last);
  last = performance.now();
  if (times.length > 120) return done(times.slice(1));
  if (times.length < 60) wheel(0, -60); else if (times.length < 90) wheel(40, 0); else wheel(0, 120);
  requestAnimationFrame(next);
};
requestAnimationFrame(next);
"""


def shot(page: Page, path: Path, width: int, height: int) -> None:
    """A picture of the top of a page."""
    page.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.open()
    page.frame()
    picture = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    path.write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--shot", type=Path, help="write a picture of the page's top as PNG")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1000)
    args = parser.parse_args()
    if missing():
        sys.exit(missing())
    clock = time.perf_counter()
    plans = [(path.stem, Plan.from_json(path.read_text())) for path in args.plans]
    trace = None if args.measured is None else Trace.from_json(args.measured.read_text())
    read_s = time.perf_counter() - clock
    clock = time.perf_counter()
    text = render(plans, trace)
    render_s = time.perf_counter() - clock
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "page.html"
        write(path, text)
        driver = launch(Path(folder) / "profile")
        try:
            page = Page(driver, path)
            marks = "return performance.getEntriesByName('interactive')[0].startTime"
            ready = [page.open().js(marks) for _ in range(LOADS)]
            frames = sorted(driver.execute_async_script(FRAMES))
            if args.shot is not None:
                shot(page, args.shot, args.width, args.height)
        finally:
            driver.quit()
    print(
        json.dumps(
            {
                "model": plans[0][1].model,
                "tensors": sum(len(plan.tensors) for _, plan in plans),
                "page_bytes": len(text.encode()),
                "read_s": round(read_s, 2),
                "render_s": round(render_s, 2),
                "interactive_ms": round(statistics.median(ready)),
                "frame_ms_median": round(statistics.median(frames), 1),
                "frame_ms_worst": round(frames[-1], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
