"""The page in a real browser: what it asks for, and that each control does what it says.

Needs Chromium (or Chrome) and chromedriver; one browser serves all tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import ActionChains, By, Keys, Page, launch, missing
from viewed import HOSTILE, small, trace_of, unfit

from lohan_fx.view import render


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if missing():
        pytest.skip(missing())
    started = launch(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Pages of a plan, of two plans, of a plan with its measured step, of none that fits."""
    folder = tmp_path_factory.mktemp("pages")
    plan, other = small(num_layers=8), small("lohan", num_layers=8)
    hostile = small(num_layers=2, model=HOSTILE, hardware=HOSTILE, rename={"bucket0": HOSTILE})
    written = {
        "one": render([("plan", plan)]),
        "two": render([("a", plan), ("b", other)]),
        "measured": render([("plan", plan)], trace_of(plan)),
        "hostile": render([(HOSTILE, hostile)], trace_of(hostile, device=HOSTILE)),
        "unfit": render([("plan", unfit())]),
    }
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text)
    return {name: Page(driver, folder / f"{name}.html") for name in written}


@pytest.fixture
def page(pages: dict[str, Page]) -> Page:
    return pages["one"].open()


@pytest.mark.parametrize("name", ["one", "two", "measured", "hostile", "unfit"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_loads_without_a_complaint_or_a_request(
    pages: dict[str, Page], name: str, scheme: str
) -> None:
    page = pages[name].open(scheme)
    page.frame()
    assert page.complaints == []
    assert page.requests == [page.path.as_uri()]
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_hostile_names_are_text(pages: dict[str, Page]) -> None:
    page = pages["hostile"].open()
    assert page.find("h1").text == HOSTILE
    assert HOSTILE in page.column(0)
    page.find(".data").click()
    page.frame()
    assert HOSTILE in page.find(".drawer").text
    assert page.js("return window.hit === undefined && document.images.length === 0")


def test_no_other_script_runs_in_the_page(page: Page) -> None:
    page.js(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
        "document.body.append(s)"
    )
    assert page.js("return window.hit") is None
    assert any("Content Security Policy" in words for words in page.complaints)


def test_columns_sort_up_down_and_back(page: Page) -> None:
    page.search("layer3")
    before = page.column(0)
    assert page.sort("bytes") == "descending"
    sizes = page.js(
        "return [...document.querySelectorAll('.data')]"
        ".map(r => parseInt(r.children[5].title.replace(/,/g, '')))"
    )
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    assert page.sort("bytes") == "ascending"
    assert page.sort("bytes") == "none"
    assert page.column(0) == before
    page.find("#search").send_keys(Keys.BACK_SPACE)
    assert page.sort("name") == "ascending"
    # Numbers in names count as numbers: 2 before 10.
    names = list(dict.fromkeys(page.column(0)))
    assert names == sorted(names, key=lambda n: int("".join(filter(str.isdigit, n.split(".")[0]))))


def test_the_table_is_filtered_by_place_and_class(page: Page) -> None:
    whole = page.count
    page.find("input[value='ssd']").click()
    assert page.count != whole and "of" in page.count
    assert "SSD" not in page.column(6)
    page.find("input[value='activation']").click()
    assert "activation" not in page.column(2)
    page.find("input[value='activation']").click()
    page.find("input[value='ssd']").click()
    assert page.count == whole


def test_the_table_is_searched_by_every_word(page: Page) -> None:
    page.search("layer3 MASTER")
    assert set(page.column(1)) == {"layer3"} and set(page.column(2)) == {"master32"}
    assert page.count.startswith("6 of")
    page.search("nothing is called this")
    assert page.column(0) == [] and page.count.startswith("0 of")


def test_only_lines_in_sight_are_in_the_document(page: Page) -> None:
    first = page.column(0)[0]
    assert len(page.all(".data")) < 60
    page.js("const s = document.querySelector('#grid'); s.scrollTop = s.scrollHeight")
    page.frame()
    assert page.column(0)[0] != first
    last = page.js(
        "return Math.max(...[...document.querySelectorAll('.data')].map(r => Number(r.ariaRowIndex)))"
    )
    assert last == page.js("return Number(document.querySelector('#grid').ariaRowCount)")


def test_hovering_a_span_says_what_it_is(page: Page) -> None:
    page.move("GPU", 0.25).perform()
    text = page.until(
        "const t = document.querySelector('.tip'); return t.hidden ? '' : t.textContent"
    )
    assert "GPU" in text and " s" in text
    ActionChains(page.driver).move_to_element(page.find("h1")).perform()
    assert page.tip == ""


def test_copies_say_their_bytes_and_why(page: Page) -> None:
    page.find("#lanes-canvas").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    said = page.find("#voice").get_attribute("textContent")
    assert "MB" in said and "/s" in said and "why:" in said


def test_the_wheel_zooms_and_dragging_pans(page: Page) -> None:
    assert page.stretch.startswith("the whole step")
    canvas = page.canvas_at("GPU", 0.5)[0]
    page.js(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -500, clientX:"
        " arguments[0].getBoundingClientRect().left + 300, clientY: 400, bubbles: true, cancelable: true}))",
        canvas,
    )
    zoomed = page.stretch
    assert " of " in zoomed
    page.move("GPU", 0.5).click_and_hold().move_by_offset(-200, 0).release().perform()
    assert page.stretch != zoomed and " of " in page.stretch
    assert page.js("return document.querySelector('.drawer').hidden")


def test_dragging_with_shift_zooms_into_a_stretch(page: Page) -> None:
    chain = page.move("GPU", 0.4).key_down(Keys.SHIFT).click_and_hold().move_by_offset(100, 0)
    chain.release().key_up(Keys.SHIFT).perform()
    start, _, rest = page.stretch.partition(" to ")
    assert rest and float(start.split()[0]) > 0


def test_memory_shows_the_same_stretch_as_the_lanes(page: Page) -> None:
    over = page.find(".tier .u-over")
    page.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", over)
    ActionChains(page.driver).move_to_element(over).perform()
    page.frame()
    assert "weights" in page.find(".tier .now").text
    ActionChains(page.driver).move_to_element(over).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()
    assert " of " in page.stretch
    page.find(".tier").send_keys("0")
    assert page.stretch.startswith("the whole step")


def test_a_line_stays_the_same_element_while_it_is_in_sight(page: Page) -> None:
    line = page.all(".data")[10]
    page.js("document.querySelector('#grid').scrollTop = 3")  # not as far as another line
    page.frame()
    assert line.is_displayed()
    page.js("document.querySelector('#grid').scrollTop = 400")
    page.frame()
    assert page.find(".data").get_attribute("data-position") != "0"


def test_a_tensor_is_shown_in_the_timeline_and_its_span_in_the_table(page: Page) -> None:
    page.search("layer0 gradient")  # updated in the step that made it
    line = page.find(".data")
    name = line.find_element(By.CSS_SELECTOR, "span").text
    line.click()
    page.frame()
    assert page.all(".data.on") and page.all("g.stage.on")
    drawer = page.find(".drawer")
    assert name.removesuffix(".weight") in drawer.text and "gradient, D2H copy" in drawer.text
    assert " of " in page.stretch  # zoomed in to where it is
    drawer.find_element(By.XPATH, ".//button[text()='clear']").click()
    page.frame()
    assert not page.all(".data.on") and not drawer.is_displayed()

    page.search(Keys.SPACE)
    canvas = page.find("#lanes-canvas")
    canvas.send_keys("0", Keys.END, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    page.frame()
    chosen = page.find(".drawer b").text.split()[-1]
    assert page.all(".data.on")
    assert any(chosen in name for name in page.column(0))
    inside = page.js(
        "const [a, b] = ['.data.on', '#grid'].map(s => document.querySelector(s).getBoundingClientRect());"
        "return a.top >= b.top && a.bottom <= b.bottom"
    )
    assert inside


def test_a_tensor_that_never_moves_says_so(page: Page) -> None:
    # What is recomputed is kept nowhere; what rests on the GPU moves nowhere.
    page.search("activation recompute")
    page.find(".data").click()
    page.frame()
    words = page.find(".drawer").text
    assert "backward makes it again" in words and "activation" in words
    assert page.stretch.startswith("the whole step")


def test_a_span_is_selected_by_a_click(page: Page) -> None:
    page.move("GPU", 0.25).click().perform()
    page.frame()
    assert page.find(".drawer").is_displayed()
    assert page.all(".data.on")


def test_a_stage_selects_the_tensors_of_its_layer(page: Page) -> None:
    node = page.find("[data-stage='5']")
    page.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node)
    node.click()
    page.frame()
    chosen = "return [...document.querySelectorAll('.data.on')].map(r => r.children[1].textContent)"
    assert set(page.js(chosen)) == {"layer5"}
    node.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    page.frame()
    assert set(page.js(chosen)) == {"layer6"}


def test_every_control_is_reached_by_the_keyboard(page: Page) -> None:
    page.clear()
    reached = set()
    for _ in range(60):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        element = page.driver.switch_to.active_element
        if element.tag_name == "body":
            break
        reached.add(element.get_attribute("id") or element.get_attribute("class") or element.text)
        ring = page.js(
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
        )
        assert element.tag_name == "g" or (ring.startswith("solid") and ring != "solid0px"), element
    assert {"skip", "lanes-canvas", "tier", "stage", "search", "grid"} <= reached


def test_keys_zoom_pan_and_walk_the_lanes(page: Page) -> None:
    canvas = page.find("#lanes-canvas")
    canvas.send_keys("+", "+")
    zoomed = page.stretch
    assert " of " in zoomed
    canvas.send_keys(Keys.SHIFT, Keys.ARROW_RIGHT)
    canvas.send_keys(Keys.NULL)
    assert page.stretch != zoomed
    canvas.send_keys("0")
    assert page.stretch.startswith("the whole step")
    said = set()
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN):
        canvas.send_keys(key)
        said.add(page.find("#voice").get_attribute("textContent"))
    assert len(said) == 5
    assert page.tip


def test_the_table_is_walked_and_chosen_from_by_keys(page: Page) -> None:
    grid = page.find("#grid")
    grid.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.PAGE_DOWN)
    active = grid.get_attribute("aria-activedescendant")
    assert int(active.removeprefix("line-")) > 10
    assert page.find(f"#{active}").is_displayed()
    grid.send_keys(Keys.ENTER)
    page.frame()
    assert page.find(".drawer").is_displayed()
    grid.send_keys(Keys.ESCAPE)
    assert not page.find(".drawer").is_displayed()


def test_rates_have_no_exponents(driver: Any, tmp_path: Path) -> None:
    plan = small(num_layers=8)
    assert plan.predicted is not None
    fast = plan.with_tokens(round(plan.predicted.step_s * 21_026.4))
    (tmp_path / "fast.html").write_text(render([("plan", fast)]))
    text = Page(driver, tmp_path / "fast.html").open().find("header .card").text
    assert "21,026" in text and "e+" not in text


def test_plans_are_compared(pages: dict[str, Page]) -> None:
    page = pages["two"].open()
    heads = [cell.text for cell in page.all("#difference-numbers thead th")]
    assert heads == ["figure", "A greedy", "B lohan"]
    assert len(page.all("header .card")) == 2
    step = page.js(
        "const all = [...document.querySelectorAll('#difference-numbers tbody tr')];"
        "const r = all.find(r => r.children[0].textContent === 'step');"
        "return [...r.children].map(c => c.textContent)"
    )
    assert "%" in step[2] or "same" in step[2]
    rows = page.all("#differences .jump")
    assert rows
    count = int(page.js("return arguments[0].closest('tr').children[3].textContent", rows[0]))
    rows[0].click()
    assert page.count.startswith(f"{count} of")
    chip = next(b for b in page.all(".filters button") if b.is_displayed())
    chip.click()
    assert " of " not in page.count


def test_a_measured_step_is_beside_its_prediction(pages: dict[str, Page]) -> None:
    page = pages["measured"].open()
    labels = page.find(".labels").text
    assert labels.count("predicted") == labels.count("measured") >= 6
    words = page.find("#agreement-words").text
    assert "more than predicted" in words and "furthest off" in words
    page.find("#agreement .jump").click()
    page.frame()
    text = page.find(".drawer").text
    assert "predicted" in text and "measured" in text


def test_the_scheme_follows_the_system_while_the_page_is_open(page: Page) -> None:
    # A swatch, a span and an area are painted by script; they must change too.
    painted = (
        "return [...document.querySelectorAll('.legend canvas, #lanes-canvas, .tier canvas')]"
        ".map(canvas => canvas.toDataURL())"
    )
    ground = "return getComputedStyle(document.body).backgroundColor"
    page.frame()
    light, paper = page.js(painted), page.js(ground)
    page.prefer("dark")
    # The browser learns of another scheme when it next looks, and the canvases a frame later.
    page.until(f"{ground} !== arguments[0]", paper)
    page.frame()
    assert page.js(ground) == "rgb(15, 19, 24)"
    dark = page.js(painted)
    assert page.js(painted.replace(".legend canvas, ", "")) != light
    page.prefer("light")
    page.until(f"{ground} === arguments[0]", paper)
    page.frame()
    assert page.js(painted) == light and dark != light


def test_a_narrow_window_does_not_scroll_sideways(page: Page) -> None:
    size = {"width": 420, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.frame()
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
