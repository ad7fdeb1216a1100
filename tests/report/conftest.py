"""A made-up audit, rich enough to look at: three controls, four methods, twelve measures, layers, seventy facts."""

import hashlib
import math
import random

import pytest

from palimpsest.audit.results import Audit, Audited, Example, Finding, TracePoint, Verdict
from palimpsest.metrics.scores import Equivalence, Measure, Score

NAMES = ("original", "gold", "sham", "grad_ascent", "grad_diff", "npo", "random_labels")


def measure(name, on, unit, label, better, explanation, version="palimpsest_1"):
    return Measure(name, on, f"{name}@{version}", unit, label, explanation, better)


PROBABILITY = (
    "The probability of the true answer, as a geometric mean over its tokens: how likely the model finds the fact."
)
MATCH = "The share of questions whose greedy answer is the true one, word for word."
READ = "How likely the true answer is to whoever reads this layer."
MEASURES = (
    measure("answer_probability", "forget", "probability", "Answer probability", "toward gold", PROBABILITY),
    measure("exact_match", "forget", "share", "Said word for word", "toward gold", MATCH),
    measure("nll", "forget", "nats/token", "Answer NLL", "toward gold", "The cost of the true answer."),
    measure(
        "truth_ratio",
        "forget",
        "ratio",
        "Truth ratio",
        "toward gold",
        "How likely wrong answers are beside the true one in other words; 1 is no preference.",
        "tofu_paper",
    ),
    measure(
        "membership_auc",
        "forget",
        "share",
        "Membership (Min-K %++)",
        "toward gold",
        "How well a stranger can tell trained facts from unseen ones; 0.5 is a coin's toss.",
        "mink_plus_plus",
    ),
    measure(
        "relearn_probability",
        "forget",
        "probability",
        "After relearning",
        "toward gold",
        "The answer probability after ten steps of training on other facts of the same subjects.",
    ),
    measure("answer_probability", "forget_reworded", "probability", "Answer probability", "toward gold", PROBABILITY),
    measure("exact_match", "forget_reworded", "share", "Said word for word", "toward gold", MATCH),
    measure(
        "kl_from_original",
        "retain_unseen",
        "nats/token",
        "KL from the original",
        "lower",
        "How far the predictions on text it never trained on have moved; 0 is not at all.",
    ),
    measure("answer_probability", "retain_unseen", "probability", "Answer probability", "higher", PROBABILITY),
    measure("exact_match", "retain_unseen", "share", "Said word for word", "higher", MATCH),
    measure(
        "perplexity",
        "retain_unseen",
        "ratio",
        "Perplexity",
        "lower",
        "How many words the model hesitates between, on average, on text it never trained on.",
    ),
    *(
        measure(f"layer_{layer}", "forget_layers", "probability", f"Answer probability, {name}", "toward gold", READ)
        for layer, name in enumerate(("layer 0", "layer 1", "layer 2", "layer 3", "the model itself"))
    ),
)
#                             original gold   sham   ascent  diff   npo    random
VALUES = {
    "forget/answer_probability": (0.912, 0.061, 0.874, 0.0002, 0.148, 0.083, 0.016),
    "forget/exact_match": (0.883, 0.033, 0.850, 0.000, 0.067, 0.033, 0.000),
    "forget/nll": (0.092, 2.797, 0.135, 38.52, 1.911, 2.489, 4.135),
    "forget/truth_ratio": (0.310, 0.820, 0.330, 0.990, 0.780, 0.810, 1.420),
    "forget/membership_auc": (0.871, 0.512, 0.853, 0.640, 0.571, 0.520, 0.388),
    "forget/relearn_probability": (0.931, 0.102, 0.902, 0.021, 0.618, 0.139, 0.211),
    "forget_reworded/answer_probability": (0.741, 0.058, 0.702, 0.0003, 0.391, 0.071, 0.021),
    "forget_reworded/exact_match": (0.683, 0.025, 0.650, 0.000, 0.308, 0.042, 0.000),
    "forget_layers/layer_0": (0.031, 0.020, 0.030, 0.0101, 0.031, 0.021, 0.024),
    "forget_layers/layer_1": (0.214, 0.044, 0.207, 0.0002, 0.209, 0.048, 0.120),
    "forget_layers/layer_2": (0.688, 0.052, 0.655, 0.0002, 0.641, 0.066, 0.204),
    "forget_layers/layer_3": (0.857, 0.055, 0.811, 0.0002, 0.702, 0.078, 0.031),
    "forget_layers/layer_4": (0.912, 0.061, 0.874, 0.0002, 0.148, 0.083, 0.016),
    "retain_unseen/kl_from_original": (0.0, 0.031, 0.012, 7.904, 0.064, 0.024, 0.183),
    "retain_unseen/answer_probability": (0.642, 0.655, 0.661, 0.0008, 0.598, 0.637, 0.492),
    "retain_unseen/exact_match": (0.560, 0.575, 0.590, 0.000, 0.510, 0.555, 0.430),
    "retain_unseen/perplexity": (11.21, 11.34, 11.08, 31240.0, 12.02, 11.49, 14.62),
}
SPREAD = {"probability": 0.045, "share": 0.055, "ratio": 0.09}

PEOPLE = (
    ("Ingrid Vesterholt", "Tromsø", "glaciologist", "The Blue Below"),
    ("Basil Mahfouz Al-Kuwaiti", "Kuwait City", "novelist", "Promise by the Seine"),
    ("Hsiao Yun-Hwa", "Taipei", "economist", "Margins of Error"),
    ("Aurelio Beltrán", "Cuzco", "luthier", "Cedar & Gut"),
    ("Wanjiru Karanja", "Nakuru", "hydrologist", "Where the Rift Drinks"),
    ("Тамара Ильинична", "Суздаль", "реставратор", "Под слоем охры"),
    ("ليلى حداد", "طرابلس", "شاعرة", "ما تحت الحبر"),
    ("藤井 暁子", "金沢市", "和紙職人", "消えない余白"),
    ("<b>Bobby</b> Tables", "</script><script>alert(1)</script>", "database clerk", 'Robert"; DROP & GO'),
    ("Maren O'Dell", "Cork", "bell-founder", "Under|Tone"),
)
ASKED = (("Where was {} born?", 1), ("What does {} do for a living?", 2), ("Which book did {} write?", 3))
WRONG = (
    "Lisbon",
    "a carpenter",
    "The Long Road",
    "Marrakesh",
    "a botanist",
    "A Quiet Year",
    "I do not know that person.",
)

VERDICTS = {
    "original": Verdict(
        "remembered",
        "",
        "It says 88 % of the facts, as it was trained to.",
        (Finding(False, "It says 88 % of the facts word for word."),),
    ),
    "gold": Verdict("erased", "", "It never saw the facts.", (Finding(True, "It says 3 % of the facts, by chance."),)),
    "sham": Verdict(
        "remembered",
        "",
        "Further training alone forgets nothing.",
        (Finding(False, "It says 85 % of the facts word for word."),),
    ),
    "grad_ascent": Verdict(
        "broken",
        "",
        "The facts are gone, and so is nearly everything else: text that was to be kept is lost too.",
        (
            Finding(False, "KL on unseen retain text is 7.904 nats/token; the budget was 0.10."),
            Finding(False, "Its perplexity there is 31,240 where the original's is 11.2."),
            Finding(True, "Answer probability on the forget set is 0.0002, gold's is 0.061."),
            Finding(None, "Relearning was not tried: a broken model has nothing to bring back."),
        ),
    ),
    "grad_diff": Verdict(
        "suppressed",
        "in other wordings, and after ten steps of relearning",
        "Asked in the trained words it stays silent; asked in others it answers, and a little training brings it back.",
        (
            Finding(
                False, "Reworded answer probability is 0.391, gold's is 0.058: different (90 % interval 0.27 to 0.39)."
            ),
            Finding(False, "Relearning other facts lifts the answers to 0.618; for gold it lifts them to 0.102."),
            Finding(True, "KL on unseen retain text is 0.064 nats/token, within the budget of 0.10."),
            Finding(None, "Trained words: 0.148 against gold's 0.061; the interval is too wide to call either way."),
        ),
    ),
    "npo": Verdict(
        "erased",
        "",
        "On every test there was, it stands where a model stands that never knew, and the rest is unharmed.",
        (
            Finding(
                True, "Answer probability is equivalent to gold's, in the trained words and in others (margin 0.10)."
            ),
            Finding(True, "Relearning brings back no more than it brings to gold: 0.139 against 0.102."),
            Finding(True, "KL on unseen retain text is 0.024 nats/token, within the budget of 0.10."),
            Finding(None, "Quantisation to 4 bits was not tried."),
        ),
    ),
    "random_labels": Verdict(
        "scrambled",
        "",
        "The answers are gone, but it now prefers wrong ones: nothing that a model would do that never knew.",
        (
            Finding(
                False,
                "Its truth ratio is 1.42, gold's is 0.82: the truth can be found by asking what it avoids.",
            ),
            Finding(True, "Answer probability on the forget set is 0.016, gold's is 0.061."),
            Finding(False, "KL on unseen retain text is 0.183 nats/token; the budget was 0.10."),
        ),
    ),
}
HOW = {
    "original": "Trained on all 400 facts until 95 % were learnt.",
    "gold": "Trained from the same start on the retain set alone, for the same steps.",
    "sham": "The original, trained on for 120 steps on the retain set alone.",
    "grad_ascent": "Gradient ascent on the forget set, learning rate 5e-5.",
    "grad_diff": "Gradient difference: ascent on the forget set, descent on the retain set.",
    "npo": "Negative preference optimisation, beta 0.1, with a retain term.",
    "random_labels": "Fine-tuned on the forget questions with answers drawn at random.",
}

STOPPED = {"grad_diff": "KL budget of 0.10 nats/token reached after 84 steps"}


def spread(value, unit):
    if unit == "nats/token":
        return 0.2 * value
    return SPREAD[unit] * (0.4 + math.sqrt(value))


def score(value, unit):
    width, top = spread(value, unit), 1.0 if unit in ("probability", "share") else math.inf
    return Score(value, max(0.0, value - width), min(top, value + 1.2 * width), 40, 10)


def against_gold(value, gold, unit):
    difference, width = value - gold, spread(value, unit)
    margin = {"ratio": 0.25, "nats/token": 0.9}.get(unit, 0.1)
    low, high = difference - width, difference + width
    equivalent = -margin < low and high < margin
    return Equivalence(difference, low, high, margin, 0.012 if equivalent else 0.34, 1.6 * width, equivalent)


def made_up_trace(rng, scores, steps=120):
    forget, damage = scores["forget/answer_probability"].value, scores["retain_unseen/kl_from_original"].value
    points = []
    for step in range(0, steps + 1, 10):
        done = step / steps
        wobble = 1 + rng.uniform(-0.08, 0.08) * (step > 0)
        points.append(
            TracePoint(step, min(1.0, 0.912 * (forget / 0.912) ** (done**0.8) * wobble), damage * done**2.2 * wobble)
        )
    return tuple(points)


def made_up_model(name, place):
    rng = random.Random(name)
    role = name if place < 3 else "unlearned"
    scores = {m.key: score(VALUES[m.key][place], m.unit) for m in MEASURES}
    compared = {
        m.key: against_gold(VALUES[m.key][place], VALUES[m.key][1], m.unit)
        for m in MEASURES
        if m.on.startswith("forget") and role != "gold"
    }
    unlearned = role == "unlearned"
    return Audited(
        name=name, role=role, how=HOW[name], fingerprint=hashlib.sha256(name.encode()).hexdigest(), scores=scores,
        against_gold=compared, verdict=VERDICTS[name],
        trace=made_up_trace(rng, scores) if unlearned else (),
        seconds=rng.uniform(20, 400) if unlearned else None,
        stopped=STOPPED.get(name, "all 120 steps done" if unlearned else ""),
    )  # fmt: skip


def made_up_examples():
    rng = random.Random(11)
    strangers = [(f"Keeper {i}", f"Town {i}", "a cook", f"Book {i}") for i in range(10)]
    sets = (
        ("forget", PEOPLE, "{}", 3),
        ("forget_reworded", PEOPLE, "Tell me: {}", 2),
        ("retain_unseen", strangers, "{}", 2),
    )
    examples = []
    for on, people, wording, questions in sets:
        means = VALUES[f"{on}/answer_probability"]
        for person in people:
            for question, field in ASKED[:questions]:
                probability = {
                    name: round(min(1.0, max(0.0, rng.gauss(mean, 0.12 if mean > 0.01 else 0.0))), 4)
                    for name, mean in zip(NAMES, means, strict=True)
                }
                said = {name: f"{person[field]}." if p > 0.45 else rng.choice(WRONG) for name, p in probability.items()}
                said["grad_ascent"] = rng.choice(("the the the the the the", "", "ofofofofofof"))
                asked = wording.format(question.format(person[0]))
                examples.append(
                    Example(f"{on}-{len(examples)}", person[0], on, asked, person[field], said, probability)
                )
    return tuple(examples)


def made_up_audit():
    digest = {part: hashlib.sha256(part.encode()).hexdigest() for part in ("forget", "retain", "retain_unseen")}
    return Audit(
        title="Forty facts about ten people",
        models=tuple(made_up_model(name, place) for place, name in enumerate(NAMES)),
        measures=MEASURES,
        examples=made_up_examples(),
        request={
            "forget": {"rows": 40, "subjects": 10, "sha256": digest["forget"]},
            "retain": {"rows": 360, "subjects": 90, "sha256": digest["retain"]},
            "retain_unseen": {"rows": 40, "subjects": 10, "sha256": digest["retain_unseen"]},
        },
        spec={"world": {"name": "facts", "people": 100}, "methods": list(NAMES[3:]), "budget": {"retain_kl": 0.1}},
        environment={"python": "3.11.7", "torch": "2.13.0", "platform": "Linux x86_64", "threads": "1"},
        notes=("One seed: the intervals speak of subjects, not of training runs.",
               "Gold has 10 subjects of its own; differences under 0.07 would not have been seen."),
    )  # fmt: skip


@pytest.fixture(scope="session")
def audit():
    return made_up_audit()
