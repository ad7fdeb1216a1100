import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from palimpsest.audit.results import Audit, Finding, Verdict
from palimpsest.errors import StorageError
from palimpsest.report import render_html, write_report
from palimpsest.report.html import by_set, facts

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "br", "input", "path", "line", "circle", "rect"}


class Page(HTMLParser):
    """The elements in order, each with its attributes and the text inside it, and a list of tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.unbalanced = [], [], []
        self.feed(html)
        self.close()
        self.unbalanced += [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **{name: value or "" for name, value in attributes}}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if self.open and self.open[-1]["tag"] == tag:
            self.open.pop()
        elif tag not in VOID:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and all(value in element.get(name.rstrip("_"), "").split() for name, value in attributes.items())
        ]

    def data(self, id):
        return json.loads(self.all("script", id=id)[0]["text"])


@pytest.fixture(scope="module")
def html(audit):
    return render_html(audit)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_tag_closes_and_ids_are_unique(page):
    assert page.unbalanced == []
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len(set(ids))


def test_sections_come_in_the_story_s_order(page):
    assert [heading["text"] for heading in page.all("h2")] == [
        "Verdict", "Forgetting and damage", "Layer by layer", "Fact by fact", "Scores", "How it was made"
    ]  # fmt: skip
    assert len(page.all("h1")) == 1
    targets = {link["href"][1:] for link in page.all("a")}
    assert targets <= {element.get("id") for element in page.elements}


def test_a_card_a_method_tells_outcome_place_and_findings(page, audit):
    cards = page.all("article", class_="verdict")
    assert [card["aria-label"] for card in cards] == ["grad_ascent", "grad_diff", "npo", "random_labels"]
    for card, model in zip(cards, audit.models[3:], strict=True):
        assert model.verdict.outcome in card["text"] and model.verdict.summary in card["text"]
        assert all(finding.statement in card["text"] for finding in model.verdict.findings)
    assert "in other wordings, and after ten steps of relearning" in cards[1]["text"]


def test_no_evidence_is_not_shown_as_a_pass(audit):
    nothing = Verdict("inconclusive", "", "Nothing was tried.", (Finding(None, "No test was run."),))
    unsure = replace(audit, models=(*audit.models[:3], replace(audit.model("npo"), verdict=nothing)))
    page = Page(render_html(unsure))
    (finding,) = [item for item in page.all("li", class_="none") if "No test was run" in item["text"]]
    assert "no evidence" in finding["text"] and "pass" not in finding["text"]
    card = page.all("article", class_="verdict")[0]
    assert card["class"] == "verdict is-inconclusive"


def test_every_score_stands_in_the_table_beside_the_controls(page, audit):
    text = page.all("table", class_="scores")[0]["text"]
    assert text.index("original") < text.index("gold") < text.index("sham") < text.index("grad_ascent")
    assert "0.912" in text and "0.851 to 0.985" in text
    signs = [sign for sign in page.all("span", class_="sign") if "title" in sign]
    assert len(signs) == sum(len(model.against_gold) for model in audit.models)
    assert any("90 % interval" in sign["title"] and "could have been seen" in sign["title"] for sign in signs)


def test_table_headers_say_what_they_head(page):
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in page.all("th"))


def test_each_measure_explains_itself_without_hover(page, audit):
    for measure in audit.measures:
        (details,) = page.all("details", id=measure.key)
        assert measure.explanation in details["text"] and measure.definition in details["text"]
        compared = [model for model in audit.models if measure.key in model.against_gold]
        assert details["text"].count("±") == len(compared) == (6 if measure.on.startswith("forget") else 0)


def test_how_it_was_made(page, audit):
    making = page.all("section", id="making")[0]["text"]
    for model in audit.models:
        assert model.how in making and model.stopped in making and model.fingerprint in making
    for said in ("360", audit.request["forget"]["sha256"], "palimpsest verify .", "retain_kl: 0.1", "2.13.0"):
        assert said in making


def test_notes_and_calibration_are_on_the_page(page, audit):
    verdict = page.all("section", id="verdict")[0]["text"]
    assert all(note in verdict for note in audit.notes)
    assert "It calls sham remembered, as it should." in verdict


def test_nothing_is_fetched_and_only_the_page_s_own_scripts_may_run(html, page):
    assert not [e for e in page.elements if "src" in e or e["tag"] in ("link", "iframe", "object", "base")]
    assert all(link["href"].startswith("#") for link in page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    scripts = [script["text"] for script in page.all("script") if "type" not in script]
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and re.findall(r"'(sha256-[^']+)'", policy) == hashes
    assert "url(" not in page.all("style")[0]["text"] and "@import" not in page.all("style")[0]["text"]


def test_plotly_is_inlined_once_and_the_rest_is_small(html):
    assert html.count("plotly.js v") == 1
    assert len(html.encode()) < 6_000_000
    assert (
        len(html.encode()) - max(len(script) for script in re.findall(r"<script>(.*?)</script>", html, re.S)) < 250_000
    )


def hostile(audit):
    """The audit with every text of it replaced or preceded by an attack."""

    def spoil(value):
        if isinstance(value, dict):
            return {(key if key in kept else f"{HOSTILE}{key}"): spoil(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [spoil(inner) for inner in value]
        return f"{HOSTILE}{value}" if isinstance(value, str) and value not in kept else value

    data = audit.to_json()
    roles = {"original", "gold", "sham", "unlearned"}
    outcomes = {"erased", "suppressed", "scrambled", "broken", "remembered", "inconclusive"}
    on = {"forget", "forget_reworded", "retain_unseen", "answer_probability", "kl_from_original"}
    fields = {name for model in data["models"] for name in model} | {"outcome", "where", "summary", "findings"}
    fields |= {
        "passed",
        "statement",
        "value",
        "low",
        "high",
        "n",
        "clusters",
        "step",
        "forget_probability",
        "retain_kl",
    }
    fields |= {field for group in ("measures", "examples") for row in data[group] for field in row} | set(data)
    fields |= set(data["models"][0]["against_gold"]["forget/truth_ratio"]) | set(data["models"][0]["scores"])
    kept = roles | outcomes | on | fields | {"toward gold", "lower", "higher", "probability", "nats/token", "subject"}
    return Audit.from_json(spoil(data))


def test_no_text_of_the_audit_becomes_markup(audit):
    clean, spoiled = Page(render_html(audit)), Page(render_html(hostile(audit)))
    assert spoiled.unbalanced == []
    assert len(spoiled.all("script")) == len(clean.all("script")) == 4
    assert not spoiled.all("img") and not [e for e in spoiled.elements if any(name.startswith("on") for name in e)]
    assert HOSTILE in spoiled.data("facts-data")["rows"][0]["question"]
    assert HOSTILE in spoiled.all("h1")[0]["text"]


def test_facts_keep_every_language_and_mark_the_right_answers(page, audit):
    table = page.data("facts-data")
    assert table == json.loads(json.dumps(facts(audit)))
    assert (table["before"], table["gold"], table["first"]) == ("original", "gold", "grad_diff")
    assert {"藤井 暁子", "ليلى حداد", "Тамара Ильинична"} <= set(table["subjects"])
    right = {name: sum(row["right"][place] for row in table["rows"]) for place, name in enumerate(table["models"])}
    assert right["original"] > right["grad_diff"] > right["grad_ascent"] == 0


def test_a_model_that_was_not_asked_is_not_wrong_but_absent(audit):
    quiet = replace(audit.examples[0], said={"original": "x"}, probability={})
    row = facts(replace(audit, examples=(quiet,)))["rows"][0]
    assert row["said"] == ["x"] + [None] * 6 and row["probability"] == [None] * 7


def test_measures_are_grouped_by_set_in_the_audit_s_order(audit):
    backwards = replace(audit, measures=audit.measures[::-1])
    assert [on for on, _ in by_set(backwards)] == [
        "forget_layers", "retain_unseen", "forget_reworded", "forget"
    ]  # fmt: skip
    assert sum(len(measures) for _, measures in by_set(backwards)) == len(audit.measures)


def test_without_gold_the_page_says_uncalibrated(audit):
    models = tuple(replace(m, against_gold={}) for m in audit.models if m.role != "gold")
    page = Page(render_html(replace(audit, models=models)))
    assert "no gold: uncalibrated" in page.all("section", id="verdict")[0]["text"]
    assert "There is no comparison with gold" in page.all("section", id="scores")[0]["text"]
    assert not page.all("span", class_="sign")
    assert "dashed line" not in page.all("section", id="trade-off")[0]["text"]


def test_a_bare_audit_still_makes_a_page(audit):
    npo = replace(audit.model("npo"), against_gold={}, trace=(), seconds=None, stopped="", verdict=None)
    bare = replace(audit, models=(npo,), examples=(), spec={}, environment={}, request={}, notes=())
    page = Page(render_html(bare))
    assert page.unbalanced == []
    assert [heading["text"] for heading in page.all("h2")] == [
        "Verdict", "Forgetting and damage", "Layer by layer", "Scores", "How it was made"
    ]  # fmt: skip
    assert "not judged" in page.all("article", class_="verdict")[0]["text"]


def test_without_a_picture_plotly_stays_out(audit):
    measures = tuple(measure for measure in audit.measures if measure.name != "kl_from_original")
    html = render_html(replace(audit, measures=measures))
    assert "plotly.js v" not in html and 'id="plot"' not in html and len(html) < 250_000


def test_the_same_audit_gives_the_same_bytes(audit, html):
    assert render_html(Audit.from_json(json.loads(json.dumps(audit.to_json())))) == html


def test_write_report_writes_page_and_markdown(audit, html, tmp_path):
    page = write_report(audit, tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    assert page.read_text(encoding="utf-8") == html
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.md"]


def test_write_report_into_a_file_says_so(audit, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="run"):
        write_report(audit, tmp_path / "run")


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_ink_is_legible_on_the_page(page, scheme):
    # WCAG 2.2, 1.4.3: text needs a contrast of 4.5.
    block = re.findall(r":root \{(.*?)\}", page.all("style")[0]["text"], re.S)[scheme]
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block))
    inks = set(colours) - {"page", "leaf", "rule", "hair"}
    assert len(inks) == 12
    for name in inks:
        for ground in ("page", "leaf"):
            dark, light = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
