"""The page as a browser shows it, opened from disk."""

from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-quic",
]  # fmt: skip

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not CHROMIUM.exists():
    pytest.skip(f"there is no browser at {CHROMIUM}", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(audit, tmp_path_factory):
    return write_report(audit, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def without_picture(audit, tmp_path_factory):
    """A report that needs no plotly.js, so it loads in no time."""
    measures = tuple(measure for measure in audit.measures if measure.name != "kl_from_original")
    return write_report(replace(audit, measures=measures), tmp_path_factory.mktemp("report"))


@pytest.fixture
def visit(browser):
    """Open a report; at the end, fail on any console message, page error or request beyond the file itself."""
    contexts, complaints, requests = [], [], []

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) == len(contexts) and all(url.startswith("file:") for url in requests)


def width(page):
    return page.evaluate("document.documentElement.scrollWidth")


def rows(page):
    return page.locator("#fact-rows tr").count()


def test_the_figures_draw_and_tell_their_numbers(visit, report, audit):
    page = visit(report)
    marks = page.locator("#plot .scatterlayer .trace .points path")
    assert marks.count() == len(audit.models) + sum(len(model.trace) for model in audit.models)
    assert page.locator("#plot .scatterlayer .js-line").count() == 4
    assert page.locator("#plot .errorbars path").count() == 2 * len(audit.models)
    labels = page.locator("#plot .annotation-text").all_text_contents()
    assert sorted(labels) == sorted(model.name for model in audit.models)
    dots = page.locator(".panels .dot circle")
    assert dots.count() == 8 * len(audit.models) - 1 and all(dot.bounding_box()["width"] > 5 for dot in dots.all()[:7])

    arrow = page.locator(".panels .beyond")
    assert arrow.text_content() == "38.52"

    page.locator("#plot").scroll_into_view_if_needed()
    box = page.locator("#plot .scatterlayer .trace .points path").last.bounding_box()
    page.mouse.move(box["x"] - 30, box["y"] - 30)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.locator("#plot .hoverlayer .hovertext").wait_for()
    told = page.locator("#plot .hoverlayer").text_content()
    assert "random_labels" in told and "0.016" in told and "0.183" in told


def test_facts_can_be_searched_filtered_and_paged(visit, without_picture, audit):
    page = visit(without_picture)
    assert rows(page) == 10
    assert page.locator("#shown").inner_text().startswith("1–10 of 70 facts; grad_diff still says")
    first = page.locator("#fact-rows tr").first.inner_text()
    page.click("#next")
    assert page.locator("#fact-rows tr").first.inner_text() != first
    page.fill("#search", "和紙")
    assert rows(page) == sum("和紙" in "".join([e.question, e.answer, *e.said.values()]) for e in audit.examples) > 0
    page.fill("#search", "no such words")
    assert rows(page) == 0 and "No fact fits" in page.locator("#shown").inner_text()
    page.fill("#search", "")
    page.select_option("#on", "forget_reworded")
    page.select_option("#subject", "<b>Bobby</b> Tables")
    assert rows(page) == 2 and "<b>Bobby</b>" in page.locator("#fact-rows").inner_text()


def test_still_said_and_no_longer_said_follow_the_chosen_model(visit, without_picture):
    page = visit(without_picture)
    page.select_option("#on", "forget_reworded")
    page.select_option("#state", "said")
    said = page.locator("#fact-rows td[data-model=grad_diff]")
    assert 0 < said.count() == page.locator("#fact-rows td[data-model=grad_diff] .right").count()
    page.select_option("#state", "lost")
    lost = rows(page)
    assert lost > 0 and page.locator("#fact-rows td[data-model=grad_diff] .right").count() == 0
    assert page.locator("#fact-rows td[data-model=original] .right").count() == lost
    page.select_option("#after", "sham")
    page.select_option("#state", "said")
    assert page.locator("#fact-rows td[data-model=sham] .right").count() == rows(page) > 0


def test_it_fits_a_phone_and_wide_tables_scroll_in_their_box(visit, report):
    page = visit(report, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert width(page) <= 360
    assert page.evaluate("document.querySelector('#scores .scroll').scrollWidth") > 360
    assert rows(page) == 5
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert width(page) <= 360


def test_the_picture_follows_the_colour_scheme(visit, report):
    page = visit(report)
    mark = page.locator("#plot .scatterlayer .trace .points path").last
    fill = "getComputedStyle(document.querySelector('#plot .annotation-text')).fill"
    before, light = page.evaluate(fill), mark.evaluate("mark => mark.style.fill")
    page.emulate_media(color_scheme="dark")
    # A function, not an expression: the page's policy forbids eval even to its test.
    page.wait_for_function(f"() => {fill} !== '{before}'")
    assert mark.evaluate("mark => mark.style.fill") != light


def test_paper_shows_everything_and_no_controls(visit, report):
    page = visit(report, viewport={"width": 688, "height": 990}, color_scheme="dark")
    page.emulate_media(media="print")
    page.wait_for_function("() => document.querySelectorAll('details:not([open])').length === 0")
    assert width(page) <= 688
    assert not page.locator("#filters").is_visible() and not page.locator(".pager").is_visible()
    assert page.locator("#plot svg.main-svg").first.bounding_box()["width"] <= 688
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="screen")
    page.wait_for_function("() => document.querySelectorAll('details[open]').length === 0")


def test_a_measure_s_link_opens_its_explanation(visit, without_picture):
    page = visit(without_picture)
    page.click('.scores a[href="#forget/truth_ratio"]')
    page.wait_for_selector('details[id="forget/truth_ratio"][open] table')


def test_poor_and_crowded_audits_work_too(visit, audit, tmp_path):
    gold_less = tuple(replace(m, against_gold={}, trace=()) for m in audit.models if m.role not in ("gold", "sham"))
    crowd = tuple(replace(audit.models[3 + place % 4], name=f"method_{place}") for place in range(12))
    poor = visit(write_report(replace(audit, models=gold_less[:2], examples=()), tmp_path / "poor"))
    assert poor.locator("#plot .scatterlayer .points path").count() == 2
    crowded = visit(
        write_report(replace(audit, models=audit.models[:3] + crowd), tmp_path / "crowd"),
        viewport={"width": 360, "height": 740},
    )
    assert crowded.locator(".verdict").count() == 12 and width(crowded) <= 360
    boxes = [label.bounding_box() for label in crowded.locator("#plot .annotation-text").all()]
    for place, a in enumerate(boxes):
        for b in boxes[place + 1 :]:
            apart = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert apart or a["y"] + a["height"] <= b["y"] + 2 or b["y"] + b["height"] <= a["y"] + 2
