"""The page of a lens: what stands in its cells, and what its script does in a browser."""

import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from palimpsest.lens.trajectory import STATISTICS, Trajectory
from palimpsest.report.lens_page import LensView, render_lens_page

WORDS = {0: " a", 1: "<b>", 2: "\n", 3: ""}


def trajectory(tokens: int, layers: int = 2, seed: int = 0) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(layers + 1, tokens, 4, generator=generator).log_softmax(-1)
    top = logprobs.sort(-1, descending=True)
    ids = torch.randint(4, (tokens,), generator=generator)
    followed_by = ids.roll(-1)
    logprob = logprobs.gather(2, followed_by.expand(layers + 1, -1)[..., None])[..., 0]
    rank = (logprobs > logprob[..., None]).sum(-1) + 1
    logprob[:, -1], rank[:, -1] = torch.nan, 0
    statistics = {name: torch.rand(layers + 1, tokens, generator=generator) for name in STATISTICS}
    return Trajectory(ids, top.indices[..., :3], top.values[..., :3], statistics | {"logprob": logprob, "rank": rank})


def page(tokens: int = 5, layers: int = 2) -> tuple[Trajectory, str]:
    found = trajectory(tokens, layers)
    written = [WORDS[token] for token in found.ids.tolist()]
    view = LensView(written, WORDS, range(2, 4), {"model <1>": found})
    return found, render_lens_page("Layers & beliefs", "Read with a lens.", [view])


def test_cells_are_the_trajectorys_from_the_model_down() -> None:
    found, text = page()
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)
    assert [name for name, _ in rows] == ["model", "1", "0"]
    for (_, cells), layer in zip(rows, (2, 1, 0), strict=True):
        read = [json.loads(unescape(cell)) for cell in re.findall(r'data-cell="(.*?)"', cells)]
        looks = re.findall(r'<td tabindex="-1" class="(.*?)"', cells)
        for place, (cell, look) in enumerate(zip(read, looks, strict=True)):
            last = place == 4
            assert cell["top"] == pytest.approx(found.top_logprobs[layer, place, 0].exp().item(), abs=1e-4)
            assert [p for _, p in cell["likely"]] == pytest.approx(
                found.top_logprobs[layer, place].exp().tolist(), abs=1e-4
            )
            assert cell["next"] == (
                None if last else pytest.approx(math.exp(found.statistics["logprob"][layer, place]), abs=1e-4)
            )
            right = not last and found.top_ids[layer, place, 0] == found.ids[place + 1]
            assert ("right" in look.split()) == cell["right"] == right


def test_tokens_are_escaped_and_blanks_are_seen() -> None:
    _, text = page(12)
    assert "<b>" not in text.split("</style>")[1] and "·a" in text and "⏎" in text and "∅" in text
    assert "model &lt;1&gt;" in text and "Layers &amp; beliefs" in text
    assert text.count('class="answer"') == 2


def test_nothing_is_fetched_and_only_its_own_script_may_run() -> None:
    _, text = page()
    assert "default-src 'none'" in text and "script-src 'sha256-" in text
    assert "http" not in text.split("</style>")[1]


CHROMIUM = Path("/usr/bin/chromium")


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")
def test_twelve_layers_by_forty_tokens_in_a_browser(tmp_path: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    found, text = page(40, 12)
    (tmp_path / "lens.html").write_text(text)
    complaints: list[str] = []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page_ = browser.new_page(viewport={"width": 1280, "height": 900})
        page_.on("console", lambda message: complaints.append(message.text))
        page_.on("pageerror", lambda error: complaints.append(str(error)))
        page_.goto((tmp_path / "lens.html").as_uri())
        cells = page_.locator("td[data-cell]")
        assert cells.count() == 13 * 40
        sizes = cells.nth(3).evaluate("cell => [getComputedStyle(cell).fontSize, cell.offsetHeight, cell.offsetWidth]")
        assert float(sizes[0].removesuffix("px")) >= 11 and sizes[1] >= 20 and sizes[2] >= 60
        table = page_.locator("table.lens").bounding_box()
        assert table and table["height"] < 500  # every layer is seen at once
        cells.nth(5).hover()
        said = page_.locator("#cell").inner_text()
        assert "layer model" in said and f"{found.top_logprobs[12, 5, 0].exp():.3f}" in said
        cells.nth(5).click()
        page_.keyboard.press("ArrowDown")
        assert "layer 11" in page_.locator("#cell").inner_text()
        before = cells.nth(5).evaluate("cell => cell.style.getPropertyValue('--share')")
        page_.select_option("#shade", "entropy")
        after = cells.nth(5).evaluate("cell => cell.style.getPropertyValue('--share')")
        highest = max(json.loads(cell)["entropy"] for cell in cells.evaluate_all("all => all.map(c => c.dataset.cell)"))
        assert float(after) == pytest.approx(100 * found.statistics["entropy"][12, 5] / highest, abs=1)
        assert before != after
        browser.close()
    assert complaints == []
