"""The page in a real browser, clicked through as a user would: hovering, keys, toggles, sliders, screens, themes."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from dora_dist.report import page as html
from dora_dist.report import reading
from tests import report_runs
from tests.browser import Scheme, chromium, opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    one, two = (
        reading.read(report_runs.write(found / name, report_runs.history(slower=slower)))
        for name, slower in (("one", 1.0), ("two", 1.2))
    )
    (found / "one.html").write_text(html.of_run(one, now=time.time()))
    (found / "both.html").write_text(html.of_runs([one, two], now=time.time()))
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    with opened(browser, folder / "one.html") as shown:
        yield shown


def chart(page: Page, name: str) -> Locator:
    return page.locator(f'[data-chart="{name}"]')


def paths(found: Locator) -> list[str | None]:
    return [path.get_attribute("d") for path in found.locator("path.curve").all()]


def test_pointing_reads_the_curves_and_moves_the_cursor_of_all_charts(page: Page) -> None:
    plot = chart(page, "loss").locator(".plot")
    plot.hover(position={"x": 300, "y": 100})
    readout = chart(page, "loss").locator(".readout")
    expect(readout).to_be_visible()
    expect(readout).to_have_text(re.compile(r"^step \d+[\d.]+training[\d.]+evaluation$"))
    assert page.locator("line.cursor").count() == page.locator("[data-chart]").count()
    page.locator("h1").hover()
    expect(readout).to_be_hidden()
    assert page.locator("line.cursor").count() == 0


def test_keys_read_the_curves_step_by_step(page: Page) -> None:
    plot = chart(page, "loss").locator(".plot")
    plot.focus()
    for key, expected in {
        "End": "step 120: training 0.5714, evaluation 0.6",
        "ArrowLeft": "step 118: training 0.7797, evaluation 0.75",
        "Home": "step 2: training 3.836",
    }.items():
        page.keyboard.press(key)
        expect(plot).to_have_attribute("aria-valuetext", expected)
    page.keyboard.press("Escape")
    assert page.locator("line.cursor").count() == 0


def test_toggles_change_what_is_drawn(page: Page) -> None:
    loss = chart(page, "loss")
    before = paths(loss)
    assert len(before) == 3  # raw, smoothed, evaluation
    legend = loss.get_by_role("group", name="Curves of Loss")
    legend.get_by_role("button", name="evaluation").click()
    assert len(paths(loss)) == 2
    legend.get_by_role("button", name="evaluation").click()
    loss.get_by_role("button", name="Logarithmic axis of Loss").click()
    logarithmic = paths(loss)
    assert logarithmic[0] != before[0]
    page.get_by_label("Smoothing").fill("0")
    assert len(paths(loss)) == 2
    page.get_by_label("Logarithmic", exact=True).check()
    expect(chart(page, "gradient").get_by_role("button")).to_have_attribute("aria-pressed", "true")
    loss.get_by_text("Numbers").click()
    expect(loss.get_by_role("row").nth(1)).to_contain_text("3.8364")


def test_all_curves_can_be_off_under_a_logarithmic_axis(page: Page) -> None:
    loss = chart(page, "loss")
    loss.get_by_role("button", name="Logarithmic axis of Loss").click()
    legend = loss.get_by_role("group", name="Curves of Loss")
    for name in ("training", "evaluation"):
        legend.get_by_role("button", name=name).click()
    assert paths(loss) == []
    legend.get_by_role("button", name="training").click()
    assert len(paths(loss)) == 2


def test_maps_show_any_recorded_step(page: Page) -> None:
    ranks = page.locator('[data-map="ranks"]')
    assert ranks.locator("tbody td").all_inner_texts() == ["2", "1"] * 3
    ranks.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert ranks.locator("tbody td").all_inner_texts() == ["5", "4"] * 3
    expect(ranks.locator("output")).to_have_text("30")
    expect(ranks.locator("tbody td").first).to_have_class("h10")


def test_answers_are_text_whatever_they_say(page: Page) -> None:
    sample = page.locator("article.sample").first
    sample.get_by_text("Earlier answers (3)").click()
    assert sample.locator("pre").filter(has_text=report_runs.HOSTILE).count() == 4
    assert page.title() == "Finished · one"
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1600, "dark")])
def test_fits_narrow_and_wide_screens_and_can_be_read_in_both_themes(
    browser: Browser, folder: Path, width: int, scheme: Scheme
) -> None:
    for name in ("one", "both"):
        with opened(browser, folder / f"{name}.html", width=width, scheme=scheme) as shown:
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            low = shown.evaluate(CONTRASTS)
            assert low == []


def test_comparing_hides_and_shows_runs(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "both.html") as shown:
        loss = chart(shown, "loss-loss")
        loss.locator(".plot").hover(position={"x": 200, "y": 80})
        expect(loss.locator(".readout")).to_contain_text("one")
        expect(loss.locator(".readout")).to_contain_text("two")
        loss.get_by_role("button", name="two").click()
        loss.locator(".plot").hover(position={"x": 220, "y": 80})
        expect(loss.locator(".readout")).not_to_contain_text("two")


def test_a_running_page_reads_itself_again_and_keeps_what_was_chosen(browser: Browser, tmp_path: Path) -> None:
    run = report_runs.write(tmp_path / "run", report_runs.history(100, ended=False))
    file = run / "report.html"
    file.write_text(html.of_run(reading.read(run), now=time.time(), reload_s=1))
    with opened(browser, file) as shown:
        expect(shown.get_by_role("status").first).to_contain_text("Training step 100 of 120")
        shown.get_by_label("Smoothing").fill("0.9")
        loss, memory, ranks = chart(shown, "loss"), chart(shown, "memory"), shown.locator('[data-map="ranks"]')
        off, log = (loss.get_by_role("button", name=name) for name in ("evaluation", "Logarithmic axis of Loss"))
        for clicked in (off, log, memory.get_by_text("Numbers")):
            clicked.dispatch_event("click")  # a pointer would hold the page for some seconds
        ranks.get_by_role("slider").fill("1")
        one_chart_more = {"filled": 0.9}  # before memory's
        line = {"event": "log", "step": 102, "time": time.time(), "loss": 0.5, **one_chart_more}
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
        file.write_text(html.of_run(reading.read(run), now=time.time(), reload_s=1))
        expect(shown.get_by_role("status").first).to_contain_text("Training step 102 of 120")
        assert shown.get_by_label("Smoothing").input_value() == "0.9"
        expect(off).to_have_attribute("aria-pressed", "false")
        expect(log).to_have_attribute("aria-pressed", "true")
        assert memory.locator("details[open]").count() == shown.locator("details[open]").count() == 1
        expect(ranks.locator("output")).to_have_text("60")
        assert ranks.locator("tbody td").all_inner_texts() == ["4", "3"] * 3
        shown.get_by_role("button", name="Pause").click()
        expect(shown.locator(".age")).to_contain_text("Does not update itself now.")


CONTRASTS = """() => {
  // Texts whose contrast with what is behind them is below 4.5 to 1, as WCAG counts it.
  const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue;
    if (!node.checkVisibility() || node.closest("svg, script, noscript, .hidden, .skip")) continue;
    const [one, two] = [light(parsed(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const name = node.className || node.tagName;
    if (ratio < 4.5) found.push(`${name}: ${node.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""
