from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from palimpsest.report import render_markdown
from palimpsest.report.markdown import SHOWN, escape, table

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def plain(source):
    """The text that a reader sees, and the kinds of token that carried it."""
    tokens = MARKDOWN.parse(source)
    inner = [child for token in tokens if token.type == "inline" for child in token.children]
    return "".join(child.content if child.type != "softbreak" else " " for child in inner), {
        child.type for child in inner
    }


def test_sections_come_in_the_page_s_order(audit):
    headings = [line[3:] for line in render_markdown(audit).splitlines() if line.startswith("## ")]
    assert headings == ["Verdict", "Scores", "Compared with gold", "Fact by fact", "How it was made"]


def test_verdicts_tell_outcome_place_and_what_has_no_evidence(audit):
    report = render_markdown(audit)
    assert "### grad\\_diff: suppressed (in other wordings, and after ten steps of relearning)" in report
    assert "- _no evidence_: Quantisation to 4 bits was not tried." in report
    assert "- pass: gold is erased, as it should be" in report


def test_tables_have_a_cell_for_every_model(audit):
    tokens = MARKDOWN.parse(render_markdown(audit))
    rows, cells = [], 0
    for token in tokens:
        cells += token.type in ("th_open", "td_open")
        if token.type == "tr_close":
            rows.append(cells)
            cells = 0
    assert rows == [8] * 18 + [9] * (SHOWN + 1) + [5] * 8


def test_scores_carry_interval_and_sign(audit):
    row = next(
        line for line in render_markdown(audit).splitlines() if line.startswith("| Answer probability, forget set ")
    )
    assert row.startswith("| Answer probability, forget set | 0.912 ≠ (0.851 to 0.985) | 0.061 (0.032 to 0.096) |")


def test_hostile_text_stays_text(audit):
    attack = "</script><script>alert(1)</script> | [x](javascript:y) `z` ![i](http://e.x/i.png)\n# not a heading"
    example = replace(audit.examples[0], question=attack, said={"original": attack})
    hostile = replace(audit, title=attack, examples=(example,), notes=(attack,), spec={"name": attack})
    html = MARKDOWN.render(render_markdown(hostile))
    assert "<script" not in html and "<img" not in html and "<a " not in html
    assert html.count("<h1") == 1 and "not a heading</h1>" in html
    assert "alert(1)" in html


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_escaped_text_reads_back_as_itself(text):
    # In a line of its own, where lists, headings and rules begin.
    seen, kinds = plain(escape(text))
    assert seen == " ".join(text.split())
    assert kinds <= {"text"}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="ab|\\`*_<>&[]()!#-~ \n", max_size=8), min_size=1, max_size=4))
def test_cells_stay_in_their_columns(cells):
    tokens = MARKDOWN.parse(table(["h"] * len(cells), [[escape(cell) for cell in cells]]))
    assert [token.type for token in tokens].count("td_open") == len(cells)


@pytest.mark.parametrize("missing", ["examples", "measures", "models", "notes"])
def test_renders_without(audit, missing):
    report = render_markdown(replace(audit, **{missing: ()}))
    assert report.startswith("# Forty facts about ten people\n") and "None" not in report


def test_without_gold_it_says_uncalibrated(audit):
    models = tuple(replace(m, against_gold={}) for m in audit.models if m.role != "gold")
    report = render_markdown(replace(audit, models=models))
    assert "- no gold: uncalibrated." in report and "Compared with gold" not in report
