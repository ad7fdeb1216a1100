"""What the layers tell, in the audit: the controls apart, what the last layer hides found, every row in its place."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import Organism

from palimpsest.audit.audit import Candidate, audit
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.layers import BY_LAYER, Layers, Lenses
from palimpsest.audit.results import Audit
from palimpsest.audit.verify import verify
from palimpsest.lens.fit import fit
from palimpsest.lens.lens import Lens
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel


@pytest.fixture(scope="module")
def lenses(trained: Organism) -> Lenses:
    texts = trained.request.retain
    return Lenses(*(fit(model, texts, kind="ridge", quiet=True) for model in (trained.full, trained.gold)))


@pytest.fixture(scope="module")
def layers(trained: Organism, lenses: Lenses) -> Layers:
    return Layers(lenses, trained.request, trained.full, trained.gold)


def muted(model: LanguageModel) -> LanguageModel:
    """The model with a last layer that takes everything back: the answers stay legible below, and go unsaid."""
    quiet = model.copy("muted")
    with torch.no_grad():
        for name, weight in quiet.network.named_parameters():
            if ".0." not in name and any(part in name for part in ("o_proj", "down_proj")):
                weight.mul_(-2)
    return quiet


def means(layers: Layers, model: LanguageModel) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in layers.rows("model", model):
        found.setdefault(row.measure, []).append(row.value)
    return {measure: sum(values) / len(values) for measure, values in found.items()}


def test_the_controls_stand_at_the_ends_of_every_scale(layers: Layers, trained: Organism) -> None:
    original, gold = means(layers, trained.full), means(layers, trained.gold)
    assert (original["forget/erased_from_layers"], gold["forget/erased_from_layers"]) == (0, pytest.approx(1))
    for measure in ("forget/legible_probability", "forget/within_reach"):
        assert original[measure] > 0.9 and gold[measure] < original[measure] - 0.2
    assert set(original) == {measure.key for measure in layers.measures}


def test_the_last_layer_is_what_the_model_says(layers: Layers, trained: Organism) -> None:
    last = f"{BY_LAYER}/layer_{trained.full.anatomy.n_layers}"
    for model in (trained.full, trained.gold):
        said = answer_probability(model, trained.request.forget)
        own = [row.value for row in layers.rows("model", model) if row.measure == last]
        assert own == pytest.approx(said.tolist(), rel=1e-4)


def test_the_most_telling_layer_is_no_less_than_any(layers: Layers, trained: Organism) -> None:
    by_measure: dict[str, list[float]] = {}
    for row in layers.rows("model", muted(trained.full)):
        by_measure.setdefault(row.measure, []).append(row.value)
    one_by_one = [values for measure, values in by_measure.items() if measure.startswith(BY_LAYER)]
    assert len(one_by_one) == trained.full.anatomy.n_layers + 1
    assert by_measure["forget/legible_probability"] == [max(values) for values in zip(*one_by_one, strict=True)]


def test_where_an_answer_is_decided_counts_what_is_no_longer_said_too(layers: Layers, trained: Organism) -> None:
    original, gold, quiet = (means(layers, model) for model in (trained.full, trained.gold, muted(trained.full)))
    never = trained.full.anatomy.n_layers + 1
    assert original["forget/said_by_some_layer"] > 0.9 and original["forget/taken_back"] < 0.1
    assert original["forget/decided_at"] < gold["forget/decided_at"] <= never
    # Muting leaves the layer below as it was, and takes back at the end what it says.
    assert quiet["forget/taken_back"] > 0.2
    assert original["forget/decided_at"] < quiet["forget/decided_at"] <= never
    assert quiet["forget/said_by_some_layer"] >= quiet["forget/taken_back"]


def test_without_golds_lens_nothing_is_anchored(trained: Organism, lenses: Lenses) -> None:
    alone = Layers(Lenses(lenses.original), trained.request, trained.full, None)
    assert "forget/erased_from_layers" not in means(alone, trained.full)
    assert "erased_from_layers" not in {measure.name for measure in alone.measures}


@pytest.fixture(scope="module")
def found(trained: Organism, lenses: Lenses, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    candidates = [
        Candidate("original", "original", "", trained.full),
        Candidate("gold", "gold", "", trained.gold),
        Candidate("muted", "unlearned", "", muted(trained.full)),
    ]
    request = replace(trained.request, retain_unseen=trained.request.retain_unseen[:6])
    run = RunFolder(tmp_path_factory.mktemp("layers") / "run")
    found = audit(request, candidates, run, title="", spec={"seed": 0}, max_new_tokens=1, lenses=lenses)
    assert verify(run.path).ok
    return found


def test_an_audit_compares_every_layer_with_gold(found: Audit) -> None:
    own = {measure.key for measure in found.measures if measure.on == BY_LAYER}
    assert own and own < set(found.model("muted").against_gold)


def test_what_a_muted_model_no_longer_says_is_found_in_its_layers(found: Audit) -> None:
    scores = found.model("muted").scores
    assert scores["forget/answer_probability"].value < 0.5 < scores["forget/legible_probability"].value
    verdict = found.model("muted").verdict
    assert verdict is not None
    legible = next(each for each in verdict.findings if each.statement.startswith("Read at its most telling layer"))
    assert legible.passed is False


def test_a_logit_lens_will_do(trained: Organism) -> None:
    lenses = Lenses(Lens.logit(trained.full), Lens.logit(trained.gold))
    logit = Layers(lenses, trained.request, trained.full, trained.gold)
    assert means(logit, trained.full)["forget/within_reach"] > 0.9
    assert all("@logit" in measure.definition for measure in logit.measures)
