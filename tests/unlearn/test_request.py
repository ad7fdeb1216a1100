import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_request import toy_records, toy_request

from palimpsest.data.records import QA, Choice, Passage
from palimpsest.errors import DataError
from palimpsest.unlearn.request import Request

FORGET = toy_records(4, "forget")


def rows_about(subjects):
    return [QA(f"q{n}", f"a{n}", subject=subject, id=f"id{n}") for n, subject in enumerate(subjects)]


def parts(request):
    return request.retain, request.retain_held_out, request.retain_unseen


def subjects(rows):
    return {row.subject or row.id for row in rows}


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcdefghij")), min_size=3, max_size=40), st.integers(0, 5))
@settings(deadline=None, max_examples=150)
def test_split_parts_the_rows_by_subject(about, seed):
    rows = rows_about(about)
    n = len(subjects(rows))
    if n < 3:
        with pytest.raises(DataError):
            Request.split(FORGET, rows, seed=seed)
        return
    request = Request.split(FORGET, rows, seed=seed)
    train, held_out, unseen = parts(request)
    assert sorted(row.id for row in request.all_retain) == sorted(row.id for row in rows)
    assert len(subjects(train)) + len(subjects(held_out)) + len(subjects(unseen)) == n
    assert request.forget == tuple(FORGET)
    for part in (train, held_out, unseen):
        assert part and [row.id for row in part] == [row.id for row in rows if row in part]  # in the rows' order
    shuffled = random.Random(seed).sample(rows, len(rows))
    for part, other in zip(parts(request), parts(Request.split(FORGET, shuffled, seed=seed)), strict=True):
        assert set(part) == set(other)


@pytest.mark.parametrize(
    ("n", "sizes"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (6, (3, 1, 2)), (7, (4, 1, 2)), (60, (30, 10, 20))]
)
def test_half_is_trained_on_a_sixth_held_out_and_a_third_unseen(n, sizes):
    request = Request.split(FORGET, rows_about([f"s{number % n}" for number in range(3 * n)]))
    assert tuple(len(subjects(part)) for part in parts(request)) == sizes
    assert tuple(len(part) for part in parts(request)) == tuple(3 * size for size in sizes)


def test_the_seed_decides_the_split():
    rows = rows_about([f"s{number % 12}" for number in range(24)])
    assert Request.split(FORGET, rows, seed=3) == Request.split(FORGET, rows, seed=3)
    assert len({Request.split(FORGET, rows, seed=seed).retain_unseen for seed in range(5)}) > 1


def test_rows_without_subject_stand_alone():
    request = Request.split(FORGET, rows_about([None] * 12))
    assert [len(part) for part in parts(request)] == [6, 2, 4]
    nameless = [QA(f"q{number % 6}", f"a{number}") for number in range(12)]  # two answers a question
    train, held_out, unseen = parts(Request.split(FORGET, nameless))
    assert [len(part) for part in (train, held_out, unseen)] == [6, 2, 4]
    assert not {row.question for row in train} & {row.question for row in (*held_out, *unseen)}


@pytest.mark.parametrize(
    ("about", "found"),
    [([], "0 subjects"), (["a"] * 9, "1 subject;"), (["a", "b"] * 4, "2 subjects"), (["a", None, "a"], "2 subjects")],
)
def test_fewer_than_three_subjects_are_refused(about, found):
    with pytest.raises(DataError, match=f"the retain set has {found}.* at least 3") as error:
        Request.split(FORGET, rows_about(about))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["forget", "retain", "retain_held_out", "retain_unseen"])
def test_an_empty_set_is_refused_by_name(name):
    with pytest.raises(DataError, match=f"{name} set is empty"):
        replace(toy_request(), **{name: ()})
    with pytest.raises(DataError, match="forget set is empty"):
        Request.split([], rows_about("abcdef"))


def test_the_hash_follows_every_row_its_place_and_the_template():
    request = toy_request()
    variants = [
        replace(request, template="raw"),
        replace(request, forget=request.forget[::-1]),
        replace(request, forget=(replace(request.forget[0], answer="w1 w1 w1"), *request.forget[1:])),
        replace(request, retain=request.retain[1:]),
        replace(request, retain=request.retain_unseen, retain_unseen=request.retain),
        replace(request, retain_unseen=(replace(request.retain_unseen[0], wrong=("w3",)), *request.retain_unseen[1:])),
    ]
    assert toy_request().hash == request.hash
    assert len({request.hash, *(variant.hash for variant in variants)}) == 7


def test_reworded_rows_are_the_forget_sets_only():
    request = toy_request()
    asked = replace(request.forget[0], paraphrases=("w1 w2", "w3"))
    retained = replace(request.retain[0], paraphrases=("w9",))
    changed = replace(request, forget=(asked, *request.forget[1:]), retain=(retained,))
    assert request.forget_reworded == ()
    assert [(row.question, row.answer) for row in changed.forget_reworded] == [
        ("w1 w2", asked.answer),
        ("w3", asked.answer),
    ]


def test_the_summary_counts_rows_and_subjects():
    summary = toy_request().summary()
    assert summary["template"] == "plain"
    assert [(summary[name]["rows"], summary[name]["subjects"]) for name in ("forget", "retain", "retain_unseen")] == [
        (7, 4),
        (7, 4),
        (4, 2),
    ]
    assert len({part["sha256"] for part in summary.values() if isinstance(part, dict)}) == 4


def test_the_organisms_request_keeps_everyone_in_one_part(trained):
    train, held_out, unseen = map(subjects, parts(trained.request))
    assert not (train & held_out or train & unseen or held_out & unseen)
    assert not subjects(trained.request.forget) & (train | held_out | unseen)
    assert (len(train), len(held_out), len(unseen)) == (7, 2, 4)


# Passages and multiple-choice questions.

QUIZ = (Choice("q", ("a", "b"), 1, "biology", "c1"), Choice("r", ("a", "b", "c"), 0, "biology", "c2"))


def test_passages_are_split_by_subject_as_questions_are():
    texts = [Passage(f"text {n}", subject=f"s{n // 3}", id=f"p{n}") for n in range(18)]
    request = Request.split([Passage("gone", id="f")], texts)
    assert sorted(row.id for row in request.all_retain) == sorted(row.id for row in texts)
    assert [len(subjects(part)) for part in parts(request)] == [3, 1, 2]
    nameless = Request.split(FORGET, [Passage(f"text {n}") for n in range(6)])
    assert [len(part) for part in parts(nameless)] == [3, 1, 2]


def test_sets_may_differ_in_kind_and_only_questions_are_reworded():
    asked = replace(toy_request().forget[0], paraphrases=("w1 w2",))
    mixed = replace(toy_request(), forget=(Passage("w1 w2"), asked), retain=(Passage("w3 w4 w5"),))
    assert [row.question for row in mixed.forget_reworded] == ["w1 w2"]
    assert mixed.summary()["forget"]["rows"] == 2 and mixed.summary()["retain"]["subjects"] == 1


def test_a_request_without_choices_has_the_hash_it_always_had():
    assert toy_request().hash == "444f55de12438e2b4254e16d018756d2736cc168e5c1b01bb152dc7fce94a168"
    assert set(toy_request().summary()) == {"forget", "retain", "retain_held_out", "retain_unseen", "template"}


def test_choices_are_in_hash_and_summary():
    plain = toy_request()
    asked = [
        replace(plain, choices=QUIZ),
        replace(plain, utility=QUIZ),
        replace(plain, choices=QUIZ[:1], utility=QUIZ[1:]),
        replace(plain, choices=QUIZ[::-1]),
        replace(plain, choices=(replace(QUIZ[0], answer=0), QUIZ[1])),
    ]
    assert len({plain.hash, *(request.hash for request in asked)}) == 6
    assert asked[2].summary()["choices"]["rows"] == asked[2].summary()["utility"]["rows"] == 1
    assert asked[2].all_retain == plain.all_retain and asked[2].forget == plain.forget
