"""Activation patching against one plan at a time with plain hooks, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.internals.pairs import SOME, hooks_and_forwards, pair
from tests.models.tiny_families import EXPERT, FAMILIES, LAYERS, tiny, tiny_batch, tiny_model, tiny_rows, tiny_tokenizer
from torch import Tensor

from palimpsest.data.batches import Batch, collate
from palimpsest.errors import DataError, ModelError
from palimpsest.internals.patching import (
    SETTINGS,
    Plan,
    first_block,
    layer_windows,
    paper_width,
    patched_predictions,
    refuse_unlike,
    window_plans,
)
from palimpsest.internals.recording import Recording, residual_stream
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.hooks import Patch, capture, patched
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating

KINDS = ("resid", "attn", "mlp", "coef")


def recordings(donor: LanguageModel, recipient: LanguageModel, batch: Batch) -> tuple[Recording, Recording]:
    return (
        Recording.of(donor, batch, donor.anatomy.sites()),
        Recording.of(recipient, batch, residual_stream(recipient.anatomy)),
    )


def one_by_one(donor: LanguageModel, recipient: LanguageModel, batch: Batch, plan: Plan, where: Tensor) -> Tensor:
    """[N, V] by hooks alone: every block computed, every logit too, and those before a target then chosen."""
    store = capture(donor, batch, list(plan))
    with evaluating(recipient) as network:
        with patched(recipient.anatomy, {site: Patch.of(store[site], where) for site in plan}):
            logits = network(**forward_inputs(network, batch)).logits
    return logits[:, :-1][batch.targets[:, 1:]]


def before_targets(batch: Batch) -> Tensor:
    return torch.cat([batch.targets[:, 1:], torch.zeros_like(batch.targets[:, :1])], 1)


def some_plans(anatomy: Anatomy) -> list[Plan]:
    """Every site alone, windows, what nothing shares a start with, and all at once."""
    singles = [frozenset([site]) for site in anatomy.sites()]
    windows = window_plans(anatomy, anatomy.kinds[-2:], 2)
    mixed = [frozenset([Site("attn", 2), Site("resid", 0)]), frozenset(anatomy.sites())]
    return [*singles, *windows, *mixed]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "predicting"])
def test_many_plans_from_their_first_block_on_are_one_by_one_with_hooks(family: str, positions: str) -> None:
    donor, recipient = pair(family)
    batch = tiny_batch(7, 4, 6, side="left")
    plans = some_plans(recipient.anatomy)
    where = batch.attention if positions == "all" else before_targets(batch)
    together = dict(patched_predictions(*recordings(donor, recipient, batch), plans, positions=positions))
    assert sorted(together) == list(range(len(plans)))
    plain = Recording.of(recipient, batch, []).predictions
    for place, plan in enumerate(plans):
        expected, found = one_by_one(donor, recipient, batch, plan, where), together[place]
        if family in EXPERT:  # an expert's product has as many rows as are routed to it, from all plans
            torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found.logits, expected), plan
        assert torch.equal(found.targets, plain.targets) and torch.equal(found.row, plain.row)
        assert not torch.allclose(found.logits, plain.logits, rtol=1e-3)


@pytest.mark.parametrize("family", EXPERT)
def test_plans_of_a_mixture_that_are_run_alone_are_exact_too(family: str) -> None:
    donor, recipient = pair(family)
    batch = tiny_batch(7, 4, 6)
    plans = some_plans(recipient.anatomy)
    alone = dict(patched_predictions(*recordings(donor, recipient, batch), plans, memory=0))
    for place, plan in enumerate(plans):
        assert torch.equal(alone[place].logits, one_by_one(donor, recipient, batch, plan, batch.attention))


def test_wide_models_are_exact_too() -> None:
    donor, recipient = pair("llama", hidden_size=192, intermediate_size=544, num_attention_heads=4)
    batch = tiny_batch(30, 30, 12)
    plans = window_plans(recipient.anatomy, ("coef",), 1) + window_plans(recipient.anatomy, ("attn", "coef"), 3)
    together = dict(patched_predictions(*recordings(donor, recipient, batch), plans))
    for place, plan in enumerate(plans):
        assert torch.equal(together[place].logits, one_by_one(donor, recipient, batch, plan, batch.attention))


@settings(deadline=None, max_examples=15)
@given(
    family=st.sampled_from(SOME),
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    chosen=st.lists(
        st.sets(st.tuples(st.sampled_from(KINDS), st.integers(0, LAYERS - 1)), min_size=1), min_size=1, max_size=4
    ),
    positions=st.sampled_from(["all", "predicting"]),
    memory=st.sampled_from([0, 20_000, 2**30]),
)
def test_neither_padding_nor_batches_nor_memory_move_a_prediction(
    family: str, lengths: list[int], chosen: list[set[tuple[str, int]]], positions: str, memory: int
) -> None:
    donor, recipient = pair(family)
    plans = [frozenset(Site(*site) for site in plan) for plan in chosen]
    rows = tiny_rows(*lengths)
    whole = [
        dict(
            patched_predictions(
                *recordings(donor, recipient, tiny_batch(*lengths, side=side)),
                plans,
                positions=positions,
                memory=memory,
            )
        )
        for side in ("right", "left")
    ]
    for place in range(len(plans)):
        torch.testing.assert_close(whole[0][place].logits, whole[1][place].logits, rtol=1e-4, atol=1e-4)
    for line, row in enumerate(rows):
        alone = dict(
            patched_predictions(*recordings(donor, recipient, collate([row], [0])), plans, positions=positions)
        )
        for place, predictions in alone.items():
            of_row = whole[0][place].logits[whole[0][place].row == line]
            torch.testing.assert_close(predictions.logits, of_row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_a_models_own_activations_change_nothing(family: str) -> None:
    model, _ = pair(family)
    batch = tiny_batch(6, 5)
    recorded = Recording.of(model, batch, model.anatomy.sites())
    for _, predictions in patched_predictions(recorded, recorded, some_plans(model.anatomy)):
        assert torch.equal(predictions.logits, recorded.predictions.logits)


@pytest.mark.parametrize("family", SOME)
def test_the_donors_last_residual_gives_its_logits_by_the_recipients_readout(family: str) -> None:
    donor, recipient = pair(family)
    batch = tiny_batch(6, 5)
    given, own = recordings(donor, recipient, batch)
    last = Site("resid", LAYERS - 1)
    ((_, predictions),) = patched_predictions(given, own, [frozenset([last])], positions="predicting")
    with torch.no_grad():
        expected = recipient.anatomy.logits(given.activations[last][before_targets(batch)])
        recipient.anatomy.final_norm.load_state_dict(donor.anatomy.final_norm.state_dict())
        recipient.anatomy.unembedding.load_state_dict(donor.anatomy.unembedding.state_dict())
    torch.testing.assert_close(predictions.logits, expected, rtol=1e-4, atol=1e-5)
    # With the donor's readout it is the donor.
    ((_, predictions),) = patched_predictions(given, own, [frozenset([last])], positions="predicting")
    torch.testing.assert_close(predictions.logits, given.predictions.logits, rtol=1e-5, atol=1e-5)


# What is passed through, and how it is undone.


def test_blocks_before_a_plan_are_not_computed_and_those_after_are() -> None:
    donor, recipient = pair("llama")
    given, own = recordings(donor, recipient, tiny_batch(6, 5))
    computed: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: computed.append(layer))
        for layer, block in enumerate(recipient.anatomy.blocks)
    ]
    for kind, expected in [("attn", [0, 1, 2, 1, 2, 2]), ("coef", [0, 1, 2, 1, 2, 2]), ("resid", [1, 2, 2])]:
        computed.clear()
        list(patched_predictions(given, own, window_plans(recipient.anatomy, (kind,), 1)))
        assert computed == expected
    for handle in handles:
        handle.remove()


def test_plans_that_begin_together_share_a_pass_where_memory_allows() -> None:
    donor, recipient = pair("llama")
    given, own = recordings(donor, recipient, tiny_batch(6, 5))
    plans = [frozenset([Site(kind, 1)]) for kind in ("attn", "mlp", "coef")] + [frozenset([Site("resid", 0)])]
    passes: list[int] = []
    handle = recipient.anatomy.final_norm.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    list(patched_predictions(given, own, plans))
    list(patched_predictions(given, own, plans, memory=0))
    handle.remove()
    assert passes == [8, 2, 2, 2, 2]


@pytest.mark.parametrize("family", SOME)
def test_everything_is_undone_even_when_a_pass_fails(family: str) -> None:
    model, _ = pair(family)
    batch = tiny_batch(6, 5)
    before = hooks_and_forwards(model)
    recorded = Recording.of(model, batch, model.anatomy.sites())
    with pytest.raises(ZeroDivisionError), recorded.resumed(2, 3):
        assert hooks_and_forwards(model) != before
        _ = 1 / 0
    assert hooks_and_forwards(model) == before
    broken = model.anatomy.unembedding.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(patched_predictions(recorded, recorded, [frozenset([Site("attn", 2)])]))
    broken.remove()
    assert hooks_and_forwards(model) == before
    assert torch.equal(Recording.of(model, batch, []).predictions.logits, recorded.predictions.logits)


def test_a_forward_that_somebody_put_into_a_block_is_put_back() -> None:
    model, _ = pair("llama")
    recorded = Recording.of(model, tiny_batch(4), residual_stream(model.anatomy))
    block = model.anatomy.blocks[0]
    own = block.forward
    block.forward = lambda *given, **named: own(*given, **named)
    put = block.forward
    with recorded.resumed(1):
        assert block.forward is not put
    assert block.forward is put


def test_abandoning_a_sweep_leaves_neither_hooks_nor_inference_mode() -> None:
    donor, recipient = pair("llama")
    before = hooks_and_forwards(recipient)
    for _ in patched_predictions(*recordings(donor, recipient, tiny_batch(5)), some_plans(recipient.anatomy)):
        assert not torch.is_inference_mode_enabled()
        break
    assert hooks_and_forwards(recipient) == before


# Windows.


def test_windows_are_clipped_at_the_ends() -> None:
    assert layer_windows(4, 1) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    assert layer_windows(6, 5) == [range(0, 3), range(0, 4), range(0, 5), range(1, 6), range(2, 6), range(3, 6)]
    assert layer_windows(3, 2) == [range(0, 1), range(0, 2), range(1, 3)]


@pytest.mark.parametrize(("layers", "width"), [(2, 1), (4, 1), (12, 1), (16, 3), (24, 3), (32, 5), (48, 7), (80, 13)])
def test_the_papers_window_is_five_of_thirty_two_layers(layers: int, width: int) -> None:
    assert paper_width(layers) == width
    assert width == 1 or abs(width - 5 * layers / 32) <= 1


def test_the_papers_settings_at_its_depth() -> None:
    anatomy = tiny_model("llama", num_hidden_layers=32).anatomy
    plans = window_plans(anatomy, SETTINGS["coefficients and attention"], paper_width(32))
    assert len(plans) == 32
    assert plans[10] == {Site(kind, layer) for kind in ("coef", "attn") for layer in range(8, 13)}
    assert plans[31] == {Site(kind, layer) for kind in ("coef", "attn") for layer in (29, 30, 31)}


def test_a_plan_begins_where_it_first_changes_a_block() -> None:
    assert first_block({Site("coef", 2), Site("attn", 1)}) == 1
    assert first_block({Site("resid", 2), Site("attn", 3)}) == 3
    assert first_block({Site("resid", -1)}) == 0


# What is refused.


@pytest.mark.parametrize("family", EXPERT)
def test_coefficients_of_a_mixture_are_refused(family: str) -> None:
    donor, recipient = pair(family)
    given, own = recordings(donor, recipient, tiny_batch(4))
    with pytest.raises(ModelError, match=r"experts of a \w+ are fused and have no value matrix"):
        next(patched_predictions(given, own, [frozenset([Site("attn", 0)]), frozenset([Site("coef", 1)])]))


def test_a_plan_without_sites_or_with_a_layer_too_many_is_refused() -> None:
    given, own = recordings(*pair("llama"), tiny_batch(4))
    with pytest.raises(ModelError, match="has no sites"):
        next(patched_predictions(given, own, [frozenset()]))
    with pytest.raises(ModelError, match="layers 0 to 2"):
        next(patched_predictions(given, own, [frozenset([Site("attn", 3)])]))


def test_a_row_longer_than_the_context_is_refused() -> None:
    model, _ = pair("llama")
    with pytest.raises(DataError, match="65 tokens, but the model has 64 positions"):
        Recording.of(model, tiny_batch(65), [])


def test_models_that_are_not_built_alike_are_refused() -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    with pytest.raises(ModelError, match="its architecture is gpt2 in one and llama in the other"):
        refuse_unlike(gpt2, llama)
    wide = tiny_model("llama", intermediate_size=32)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight is \[16, 32\] in one and \[16, 24\]"):
        refuse_unlike(wide, llama)
    deep = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"layers\.3\.input_layernorm\.weight is \[16\] in one and missing"):
        refuse_unlike(deep, llama)
    network = tiny("llama")
    other_words = LanguageModel(network, tiny_tokenizer("another"), Anatomy.of(network))
    with pytest.raises(ModelError, match="compare models that share one"):
        refuse_unlike(other_words, llama)
    refuse_unlike(tiny_model("llama"), llama)
