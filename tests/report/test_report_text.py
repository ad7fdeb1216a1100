from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.audit.results import Verdict
from palimpsest.metrics.scores import Equivalence
from palimpsest.metrics.statistics import equivalence
from palimpsest.report import text


def judged(audit, name, verdict):
    return replace(audit, models=tuple(replace(m, verdict=verdict) if m.name == name else m for m in audit.models))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0616, "0.062"), (-0.5, "−0.500"), (0.0002, "0.0002"), (0.00003, "3×10⁻⁵"), (-2e-12, "−2×10⁻¹²"),
     (11.214, "11.21"), (412.25, "412.2"), (31240.4, "31,240")],
)  # fmt: skip
def test_numbers_keep_the_digits_that_matter(value, shown):
    assert text.number(value) == shown


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-9))
def test_a_number_reads_back_as_nearly_itself(value):
    shown = text.number(value).replace("−", "-").replace(",", "")
    if "×10" in shown:
        mantissa, raised = shown.split("×10")
        shown = mantissa + "e" + raised.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(shown) == pytest.approx(value, rel=0.55, abs=5e-5 if abs(value) >= 5e-5 else 0)
    assert (float(shown) == 0) == (value == 0)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (84, "1 min 24 s"), (7322, "2 h 2 min")]
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("said", "answer", "found"),
    [
        ("It is PARIS.", "Paris", True),
        ("Parisian", "Paris", False),
        ("born in 1912", "12", False),
        ("The blue, below!", "the Blue Below", True),
        ("Below Blue The", "The Blue Below", False),
        ("答えは金沢市です。", "金沢市", True),
        ("金沢", "金沢市", False),
        ("في طرابلس.", "طرابلس", True),
        ("Cafe\u0301", "café", True),
        ("", "Paris", False),
        ("...", "?!", False),
    ],
)
def test_says_finds_the_answer_word_for_word(said, answer, found):
    assert text.says(said, answer) is found


@settings(deadline=None, max_examples=100)
@given(
    st.text(), st.text(alphabet="abcdefg XYZ'-9", min_size=1).filter(lambda s: any(c.isalnum() for c in s)), st.text()
)
def test_says_finds_any_answer_between_other_words(before, answer, after):
    assert text.says(f"{before} {answer.upper()}. {after}", answer)


def difference(low, high, equivalent=False):
    return Equivalence((low + high) / 2, low, high, 0.1, 0.01, 0.08, equivalent)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (difference(0.01, 0.09, equivalent=True), "equivalent"),
        (difference(0.11, 0.3), "different"),
        (difference(-0.3, -0.11), "different"),
        (difference(0.05, 0.3), "cannot tell"),
        (difference(-0.05, 0.3), "cannot tell"),
        (equivalence([0.9, 0.8], [0.1, 0.1], ["one", "one"], margin=0.1), "cannot tell"),
    ],
)
def test_likeness_to_gold(found, verdict):
    assert text.likeness(found) == verdict


def test_a_comparison_names_its_test_and_what_it_could_have_seen():
    sentence = text.comparison(difference(-0.30, -0.15))
    for part in ("0.225 below gold", "−0.300 to −0.150", "±0.100", "p = 0.010", "different", "0.080"):
        assert part in sentence


def test_one_subject_alone_shows_nothing():
    alone = equivalence([0.9, 0.8], [0.1, 0.1], ["one", "one"], margin=0.1)
    assert text.smallest_visible(alone) == "none: too few subjects"
    assert text.comparison(alone).endswith(
        "cannot tell. Smallest difference that could have been seen: none: too few subjects."
    )


def test_headline_counts_the_outcomes(audit):
    assert text.headline(audit) == (
        "Of four methods, one erased the facts, one only suppressed them, one scrambled them and one broke the model."
    )


def test_headline_of_one_of_many_alike_and_of_none(audit):
    one = replace(audit, models=(*audit.models[:3], audit.model("npo")))
    assert text.headline(one) == "One method was audited: it erased the facts."
    alike = replace(audit, models=tuple(replace(audit.model("grad_ascent"), name=str(i)) for i in range(13)))
    assert text.headline(alike) == "13 methods were audited: all broke the model."
    assert text.headline(replace(audit, models=audit.models[:3])) == "No method was audited."


def test_headline_says_what_was_suppressed_when_nothing_was_erased(audit):
    rest = replace(audit, models=tuple(m for m in audit.models if m.name != "npo"))
    assert text.headline(rest).startswith("Of three methods, one only suppressed the facts, one scrambled them")


def test_calibration_knows_a_rule_that_fails_on_a_control(audit):
    assert all(check.as_expected for check in text.calibration(audit))
    fooled = judged(audit, "sham", Verdict("erased", "", "", ()))
    assert [check.as_expected for check in text.calibration(fooled)] == [True, True, False]
    # A rule that looks at behaviour alone can at best find nothing against gold.
    careful = judged(audit, "gold", Verdict("inconclusive", "", "", ()))
    assert all(check.as_expected for check in text.calibration(careful))
    unjudged = judged(audit, "gold", None)
    assert [check.as_expected for check in text.calibration(unjudged)] == [True, False, True]


def test_a_missing_control_is_a_caveat_once(audit):
    bare = replace(audit, models=audit.models[3:], notes=())
    assert [note.split(":")[0] for note in text.caveats(bare)] == ["no gold", "no sham"]
    told = replace(bare, notes=("No gold: uncalibrated", "No sham was asked for"))
    assert text.caveats(told) == list(told.notes)
    assert text.caveats(audit) == list(audit.notes)
