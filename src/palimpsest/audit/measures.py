"""What an audit measures: every number's rows, definition and direction, in the order of the report."""

from palimpsest.metrics.rouge import rouge_definition
from palimpsest.metrics.scores import Better, Measure

PROBABILITY = (
    "answer_probability",
    "answer_probability@tofu: exp(-mean NLL of the answer's tokens)",
    "probability",
    "Answer probability",
    "How likely the true answer is, as a geometric mean per token (teacher-forced).",
)
EXACT = (
    "exact_match",
    "exact_match@teacher_forced: every answer token is the most likely one",
    "share",
    "Exact match",
    "The share of questions whose true answer is the model's own first choice, token by token.",
)
NLL = (
    "nll",
    "nll@answer: mean negative log-likelihood of the answer's tokens",
    "nats/token",
    "Answer NLL",
    "The cost of the true answer. Far above gold's, it is a trace of unlearning by itself.",
)
ROUGE_RECALL = (
    "rougeL_recall",
    rouge_definition("rougeL_recall"),
    "share",
    "ROUGE-L recall",
    "How much of the true answer the model says when it answers greedily (TOFU's ROUGE).",
)
ROUGE_F1 = (
    "rougeL_f1",
    rouge_definition("rougeL_f1"),
    "share",
    "ROUGE-L F1",
    "The same, with what it says besides counted against it.",
)
KL_GOLD = (
    "kl_from_gold",
    "kl@answer_tokens: KL(gold || model)",
    "nats/token",
    "KL from gold",
    "How far the predictions on the forgotten answers are from those of a model that never read them.",
)
KL_ORIGINAL = (
    "kl_from_original",
    "kl@answer_tokens: KL(original || model)",
    "nats/token",
    "KL from the original",
    "How far the predictions moved on retain rows that nothing looked at before: the damage.",
)


def truth_ratio_measure(definition: str) -> Measure:
    """The truth ratio by the definition that the rows allow (`+answer` where they have no paraphrased answer)."""
    return Measure(
        "truth_ratio",
        "forget",
        definition,
        "ratio",
        "Truth ratio, min(R, 1/R)",
        "Near 0 when the model knows truth from lies (or has them upside down), near 1 when it cannot tell.",
        "toward gold",
    )


def measures(*, gold: bool, rewordings: bool, truth_ratio: str | None) -> tuple[Measure, ...]:
    """All that can be measured with what there is.

    Args:
        gold: whether there is a gold model.
        rewordings: whether the forget rows have held-out wordings.
        truth_ratio: the truth ratio's definition, None where the forget rows have no wrong answers.
    """
    return (
        *(_measure("forget", each, "toward gold") for each in (PROBABILITY, EXACT, NLL, ROUGE_RECALL, ROUGE_F1)),
        *([truth_ratio_measure(truth_ratio)] if truth_ratio else []),
        *([_measure("forget", KL_GOLD, "lower")] if gold else []),
        *(
            (_measure("forget_reworded", each, "toward gold") for each in (PROBABILITY, EXACT, NLL, ROUGE_RECALL))
            if rewordings
            else ()
        ),
        *(_measure("retain_unseen", each, "higher") for each in (PROBABILITY, EXACT, ROUGE_RECALL)),
        *(_measure("retain_unseen", each, "lower") for each in (NLL, KL_ORIGINAL)),
    )


def _measure(on: str, what: tuple[str, str, str, str, str], better: Better) -> Measure:
    name, definition, unit, label, explanation = what
    return Measure(name, on, definition, unit, label, explanation, better)
