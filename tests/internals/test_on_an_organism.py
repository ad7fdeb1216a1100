"""Depth, patching and restoration on models whose truth is known: orderings, no decimals."""

from dataclasses import dataclass

import pytest
import torch
from tests.conftest import Organism
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.internals.depth import UnlearningDepth, fact_rows, logprob_drops, unlearning_depth
from palimpsest.internals.patching import SETTINGS
from palimpsest.internals.recovery import patching_recovery
from palimpsest.internals.restoration import IN_BLOCKS, Restoration, restoration_recovery
from palimpsest.internals.tracing import causal_traces
from palimpsest.models.anatomy import Site
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.stopping import Stop


@dataclass(frozen=True)
class Judged:
    full: LanguageModel
    gold: LanguageModel
    sham: LanguageModel
    unlearned: LanguageModel
    """By NPO, to below gold's probability."""
    rows: list[Encoded]
    gold_drops: Tensor

    def depth(self, model: LanguageModel) -> UnlearningDepth:
        return unlearning_depth(self.gold_drops, model, self.full, self.rows)


@pytest.fixture(scope="module")
def judged(trained: Organism) -> Judged:
    full, gold = trained.full, trained.gold
    rows = fact_rows(trained.request.forget, full.tokenizer)
    unlearned = full.copy("unlearned")
    NPO(learning_rate=3e-4).run(full, trained.request, Stop(steps=60, forget_probability=0.15)).apply(unlearned)
    sham = train_sham(full, trained.request.retain, template="plain", steps=30, learning_rate=3e-4)
    return Judged(full, gold, sham, unlearned, rows, logprob_drops(gold, full, rows))


def test_depth_is_none_in_the_original_and_a_sham_and_whole_in_gold(judged: Judged) -> None:
    assert (judged.gold_drops.mean(0) > 1).all()
    full, gold = judged.depth(judged.full.copy()), judged.depth(judged.gold)
    assert full.score == 0 and full.unclipped_median == 0
    assert gold.score == 1 and gold.unclipped_median == 1
    assert judged.depth(judged.sham).score < 0.05
    assert full.excluded == gold.excluded < len(judged.rows) / 2


def test_an_unlearned_models_depth_lies_between(judged: Judged) -> None:
    depth = judged.depth(judged.unlearned)
    assert 0.2 < depth.score < 0.98
    # It answers less than gold and yet not every fact is as deep: what overshoots in some cannot make up for others.
    assert depth.unclipped_median > 1


def test_the_originals_coefficients_bring_suppressed_answers_back_and_its_value_vectors_do_not(judged: Judged) -> None:
    anatomy = judged.full.anatomy
    plans = [frozenset(anatomy.sites(*kinds)) for kinds in SETTINGS.values()]
    coefficients, attention, both = patching_recovery(judged.full, judged.unlearned, judged.rows, plans)
    layers = tuple(range(anatomy.n_layers))
    restorations = [Restoration(frozenset(["value"]), layers), Restoration(frozenset(IN_BLOCKS), layers)]
    value, blocks = restoration_recovery(judged.full, judged.unlearned, judged.rows, restorations)
    assert both.krs > max(coefficients.krs, attention.krs) and both.lpr > 0.9
    assert value.krs < coefficients.krs / 2 and value.lpr < 0.5 < coefficients.lpr
    assert blocks.krs > value.krs
    for recovery in (coefficients, attention, both, value, blocks):
        assert recovery.mse.excluded == 0


def test_gold_reads_the_originals_activations_in_another_basis(judged: Judged) -> None:
    everything = [frozenset(judged.full.anatomy.sites("coef", "attn"))]
    (of_gold,) = patching_recovery(judged.full, judged.gold, judged.rows, everything)
    (of_unlearned,) = patching_recovery(judged.full, judged.unlearned, judged.rows, everything)
    assert of_gold.krs < of_unlearned.krs - 0.2 and of_gold.krs_kl < of_unlearned.krs_kl - 0.1


def test_what_was_noised_alone_is_what_restoring_brings_back(judged: Judged) -> None:
    noised = judged.full.copy("noised")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in noised.anatomy.value_matrices:
            matrix.weight.add_(torch.randn(matrix.weight.shape, generator=generator) * 0.5 * matrix.weight.std())
    layers = tuple(range(noised.anatomy.n_layers))
    sweep = [Restoration(frozenset([group]), layers) for group in IN_BLOCKS]
    value, mlp_in, attention = restoration_recovery(judged.full, noised, judged.rows, sweep)
    assert value.krs == pytest.approx(1, abs=1e-5) and mlp_in.krs == attention.krs == 0


def test_blurring_a_subject_takes_its_facts_away_and_the_last_token_gives_them_back(trained: Organism) -> None:
    full, records = trained.full, trained.request.forget[:8]
    traces = causal_traces(full, records, [frozenset([Site("resid", 0)])])
    total = torch.tensor([trace.clean - trace.corrupted for trace in traces])
    assert total.mean() > 0.1 and (total > -0.05).all()
    for trace in traces:
        (effect,) = trace.indirect_effect
        assert (effect[: trace.subject.start].abs() < 1e-6).all()
        assert effect[-1] == pytest.approx(trace.clean - trace.corrupted, abs=0.1)  # it has read the subject already
