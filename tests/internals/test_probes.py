"""Linear probes: what they read against the model's own logits, their controls, and orderings where truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Organism

from palimpsest.data.batches import collate, encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.internals import probes
from palimpsest.internals.probes import LayerProbe, half_flipped, probe_layers
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.organism import untrained_like
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.stopping import Stop


def probed(organism: Organism, name: str) -> list[LayerProbe]:
    model, request = getattr(organism, name), organism.request
    return probe_layers(model, untrained_like(model, 0), request.all_retain, request.forget)


def test_in_the_last_layer_a_probe_may_be_the_model_itself(trained: Organism) -> None:
    """Weighted by the final norm's gain over the state's length, the features add up to the answer's logit."""
    model, records = trained.full, list(trained.request.forget[:6])
    pairs = probes._pairs(records, 0)
    *_, features = probes._features(model, records, pairs, "plain")
    encoded = encode(records, model.tokenizer, template="plain")
    for pair, both in zip(pairs, features, strict=True):
        row = encoded[pair.record]
        with torch.no_grad():
            batch = collate([row], [0])
            state = capture(model, batch, model.anatomy.sites("resid"))[Site("resid", 1)][0, row.start - 1]
            out = model.network(batch.ids).logits[0, row.start - 1]
        norm = model.anatomy.final_norm
        weights = norm.weight.detach() / (state.square().mean() + norm.variance_epsilon).sqrt()
        for text, feature in zip(pair.candidates, both, strict=True):
            (answer,) = encode([replace(records[pair.record], answer=text)], model.tokenizer, template="plain")
            logits = out[list(answer.ids[answer.start : answer.stop])]
            assert float(torch.from_numpy(feature) @ weights) == pytest.approx(float(logits.mean()), abs=1e-3)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=60), st.integers(0, 9))
def test_of_shuffled_labels_half_are_wrong(labels: list[int], seed: int) -> None:
    flipped = half_flipped(np.array(labels), seed)
    assert (flipped != np.array(labels)).sum() == len(labels) // 2 and set(flipped) <= {0, 1}
    assert (half_flipped(np.array(labels), seed) == flipped).all()


def test_the_control_task_is_one_order_of_all_answers() -> None:
    """So it is the same for every subject, and knows nothing of which answer is true."""
    answers = ("Oslo", "Lima", "Perth", "Riga")
    records = [
        QA(f"Where was {who} born?", true, subject=who, wrong=tuple(a for a in answers if a != true), id=who)
        for who, true in zip(("Ada", "Bo", "Cy", "Di"), answers, strict=True)
    ]
    pairs = probes._pairs(records, 0)
    better = {
        (pair.candidates[chosen], pair.candidates[1 - chosen])
        for pair, chosen in zip(pairs, probes._preferred(pairs, 0), strict=True)
    }
    assert len(better) == 6  # of each two answers, one is always before the other
    wins = sorted(sum(answer == first for first, _ in better) for answer in answers)
    assert wins == [0, 1, 2, 3]
    assert all(pair.candidates[pair.right] == records[pair.record].answer for pair in pairs)
    assert {pair.right for pair in pairs} == {0, 1}


def test_a_probe_reads_what_a_model_knows_and_not_what_it_never_read(trained: Organism) -> None:
    full, gold = probed(trained, "full"), probed(trained, "gold")
    assert [probe.layer for probe in full] == list(range(trained.full.anatomy.n_layers))
    for knows, never in zip(full, gold, strict=True):
        assert knows.accuracy > 0.9 and never.accuracy < 0.75
        assert knows.selectivity > 0.2 and knows.lead > 0.15 and abs(knows.shuffled - 0.5) < 0.15
        assert never.lead < knows.lead - 0.2


def test_it_reads_more_than_an_unlearned_model_says(organism: Organism) -> None:
    full, request = organism.full, organism.request
    NPO(learning_rate=3e-4).run(full, request, Stop(steps=60, forget_probability=0.15)).apply(full)
    gold, unlearned = probed(organism, "gold"), probed(organism, "full")
    assert all(left.accuracy > never.accuracy + 0.1 for left, never in zip(unlearned, gold, strict=True))


def test_what_is_refused(organism: Organism) -> None:
    model, request = organism.full, organism.request
    with pytest.raises(DataError, match="is in both the probe's training and test questions; split them by subject"):
        probe_layers(model, model, request.forget, request.forget[:2])
    bare = [replace(record, wrong=()) for record in request.retain]
    with pytest.raises(DataError, match="has no wrong answer to tell the right one from; give its `wrong`"):
        probe_layers(model, model, bare, request.forget)
