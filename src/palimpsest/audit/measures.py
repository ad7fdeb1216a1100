"""What an audit measures: every number's rows, definition and direction, in the order of the report."""

from collections.abc import Container

from palimpsest.metrics import multiple_choice
from palimpsest.metrics.rouge import rouge_definition
from palimpsest.metrics.scores import Better, Measure

What = tuple[str, str, str, str, str]
"""Name, definition, unit, label and explanation of a measure, whatever rows it is taken on."""

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
MEMORIZED = (
    "exact_memorization",
    "exact_memorization@teacher_forced: share of the tokens that are the most likely one",
    "share",
    "Exact memorisation",
    "How many of the true tokens the model would choose itself. Guessable words keep it far above 0.",
)
EXTRACTABLE = (
    "extraction_strength",
    "extraction_strength@no_floor: 1 - k/L, k the shortest beginning after which every token is the most likely one",
    "share",
    "Extraction strength",
    "How much of the end comes by itself once the beginning is given.",
)
ENTITY = (
    "entity_probability",
    "entity@span: exp(-mean NLL of the tokens that carry the fact)",
    "probability",
    "Probability of the fact itself",
    "The same for the part of the answer that carries the fact, without the words that anyone would guess.",
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


PASSAGE_PROBABILITY = (
    "answer_probability",
    "answer_probability@passage: exp(-mean NLL of the passage's tokens)",
    "probability",
    "Passage probability",
    "How likely the text is, as a geometric mean per token (teacher-forced).",
)
PASSAGE_NLL = (
    "nll",
    "nll@passage: mean negative log-likelihood of the passage's tokens",
    "nats/token",
    "Passage NLL",
    "The cost of the text. Far above gold's, it is a trace of unlearning by itself.",
)
PASSAGE_KL_GOLD = (
    "kl_from_gold",
    "kl@passage_tokens: KL(gold || model)",
    "nats/token",
    "KL from gold",
    "How far the predictions on the forgotten text are from those of a model that never read it.",
)
PASSAGE_KL_ORIGINAL = (
    "kl_from_original",
    "kl@passage_tokens: KL(original || model)",
    "nats/token",
    "KL from the original",
    "How far the predictions moved on retain text that nothing looked at before: the damage.",
)
ACCURACY = (
    "accuracy",
    f"{multiple_choice.DEFINITION}: the right letter is the likeliest",
    "share",
    "Multiple-choice accuracy",
    "The share of questions answered rightly. One in the number of choices is what guessing gives.",
)
CHOICE_PROBABILITY = (
    "choice_probability",
    f"{multiple_choice.DEFINITION}: the right letter's share of the letters' probability",
    "probability",
    "Right choice's probability",
    "How sure the model is of the right letter among those offered.",
)
UTILITY_PROBABILITY = (
    "utility_probability",
    "utility_probability@tofu_paper: exp(-mean NLL), off TOFU the answer's share of all answers offered",
    "probability",
    "Probability (TOFU)",
    "The first third of TOFU's Model Utility on these rows.",
)
UTILITY_ROUGE = (
    "rougeL_recall",
    rouge_definition("rougeL_recall"),
    "share",
    "ROUGE-L recall (TOFU)",
    "The second third of TOFU's Model Utility on these rows.",
)
UTILITY_TRUTH_RATIO = (
    "utility_truth_ratio",
    "utility_truth_ratio@tofu_paper: max(0, 1 - R)",
    "ratio",
    "Truth ratio, max(0, 1 − R) (TOFU)",
    "The last third of TOFU's Model Utility on these rows: 1 when only the truth is likely.",
)
MODEL_UTILITY = (
    "model_utility",
    "model_utility@tofu_paper: harmonic mean of the nine means on retain rows, real authors and world facts",
    "share",
    "Model Utility (TOFU)",
    "What is left of everything else, in one number without an interval; one ruined part ruins it.",
)
FORGET_QUALITY = (
    "forget_quality",
    "forget_quality@tofu_paper: p of the two-sample KS test of forget truth ratios against gold's",
    "p-value",
    "Forget Quality (TOFU)",
    "High when the truth ratios could be gold's. It rises as questions get fewer, and gold's own is 1.",
)

OF_PASSAGES = {
    PROBABILITY: PASSAGE_PROBABILITY,
    NLL: PASSAGE_NLL,
    KL_GOLD: PASSAGE_KL_GOLD,
    KL_ORIGINAL: PASSAGE_KL_ORIGINAL,
}
"""What is measured on passages in a question's place. All else needs a question."""
TOFU_SETS = ("tofu_retain", "tofu_real_authors", "tofu_world_facts")
"""TOFU's utility sets; a probability on all but the first is a share of the answers offered."""


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


def measures(
    *,
    gold: bool,
    rewordings: bool,
    truth_ratio: str | None,
    entities: bool = False,
    passages: Container[str] = (),
    choices: Container[str] = (),
    tofu: bool = False,
) -> tuple[Measure, ...]:
    """All that can be measured with what there is.

    Args:
        gold: whether there is a gold model.
        rewordings: whether the forget rows have held-out wordings.
        truth_ratio: the truth ratio's definition, None where the forget rows have no wrong answers.
        entities: whether every forget row marks the part of its answer that carries the fact.
        passages: the sets, of `forget` and `retain_unseen`, that hold passages.
        choices: the sets of multiple-choice questions, of `forget_choices` and `utility_choices`, that there are.
        tofu: whether TOFU's own metrics are wanted.
    """

    def on(rows: str, better: Better, *what: What) -> list[Measure]:
        taken = [OF_PASSAGES[each] for each in what if each in OF_PASSAGES] if rows in passages else what
        return [_measure(rows, each, better) for each in taken]

    return (
        *on("forget", "toward gold", PROBABILITY, EXACT, MEMORIZED, EXTRACTABLE, NLL, ROUGE_RECALL, ROUGE_F1),
        *(on("forget", "toward gold", ENTITY) if entities else []),
        *([truth_ratio_measure(truth_ratio)] if truth_ratio else []),
        *(on("forget", "lower", KL_GOLD) if gold else []),
        *(on("forget_reworded", "toward gold", PROBABILITY, EXACT, NLL, ROUGE_RECALL) if rewordings else []),
        *(on("forget_choices", "toward gold", ACCURACY, CHOICE_PROBABILITY) if "forget_choices" in choices else []),
        *on("retain_unseen", "higher", PROBABILITY, EXACT, ROUGE_RECALL),
        *on("retain_unseen", "lower", NLL, KL_ORIGINAL),
        *(on("utility_choices", "higher", ACCURACY, CHOICE_PROBABILITY) if "utility_choices" in choices else []),
        *(_tofu(quality=gold and truth_ratio is not None) if tofu else []),
    )


def _tofu(*, quality: bool) -> list[Measure]:
    thirds = (UTILITY_PROBABILITY, UTILITY_ROUGE, UTILITY_TRUTH_RATIO)
    return [
        *(_measure(on, each, "higher") for on in TOFU_SETS for each in thirds),
        *(_measure("tofu", each, "higher") for each in (MODEL_UTILITY, FORGET_QUALITY)[: 1 + quality]),
    ]


def _measure(on: str, what: What, better: Better) -> Measure:
    name, definition, unit, label, explanation = what
    return Measure(name, on, definition, unit, label, explanation, better)
