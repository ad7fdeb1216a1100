import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.metrics.rouge import rouge, rouge_definition

SENTENCES = st.lists(st.sampled_from("alpha beta gamma delta".split()), min_size=1, max_size=7)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


@given(SENTENCES, SENTENCES)
@settings(deadline=None, max_examples=60)
def test_rouge_is_its_definition(answer: list[str], reference: list[str]) -> None:
    found = rouge([" ".join(answer)], [" ".join(reference)], stem=False)
    common = longest_common_subsequence(answer, reference)
    recall, precision = common / len(reference), common / len(answer)
    assert found.rougeL_recall.item() == pytest.approx(recall)
    assert found.rougeL_f1.item() == pytest.approx(2 * recall * precision / (recall + precision) if common else 0)
    overlap = sum(min(answer.count(word), reference.count(word)) for word in set(reference))
    assert found.rouge1_recall.item() == pytest.approx(overlap / len(reference))


def test_the_stemmer_makes_a_difference_that_the_name_tells() -> None:
    answers, references = ["she writes novels", ""], ["she writing novel", "something"]
    assert rouge(answers, references).rougeL_recall.tolist() == [1.0, 0.0]
    assert rouge(answers, references, stem=False).rougeL_recall.tolist() == pytest.approx([1 / 3, 0.0])
    assert rouge_definition("rougeL_recall") == "rougeL_recall@stem"
    assert rouge_definition("rougeL_f1", stem=False) == "rougeL_f1@nostem"


def test_the_tofu_authors_own_values(tofu_logs: Path) -> None:
    log = json.loads((tofu_logs / "ft_epoch5_lr1e-05_llama2-7b_retain90_wd0.01.json").read_text())
    sub = log["eval_log_forget.json"]
    said = [sub["generated_text"][question][1:] for question in sub["rougeL_recall"]]
    found = rouge([generated for generated, _ in said], [gold for _, gold in said])
    assert found.rougeL_recall.tolist() == pytest.approx(list(sub["rougeL_recall"].values()))
    assert found.rouge1_recall.tolist() == pytest.approx(list(sub["rouge1_recall"].values()))


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        rouge(["a"], ["a", "b"])
