import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import DENSE, EXPERT, FAMILIES, INNER, LAYERS, WIDTH, n_hooks, tiny_batch, tiny_model
from torch.nn import functional as F

from palimpsest.errors import ModelError
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import Patch, capture, capturing, patched, stacked
from palimpsest.models.inputs import forward_inputs

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ["resid", "attn", "mlp", "coef"]


def logits_of(model, batch):
    with torch.no_grad():
        return model.network(**forward_inputs(model.network, batch)).logits


def everywhere(batch):
    return torch.ones_like(batch.attention)


def kinds_of(family):
    return KINDS if family in DENSE else KINDS[:2]


FAMILIES_AND_KINDS = [(family, kind) for family in FAMILIES for kind in kinds_of(family)]


# What the sites are, from the networks' own arithmetic.


@pytest.mark.parametrize("family", DENSE)
def test_attention_and_mlp_are_what_a_block_adds_to_the_residual_stream(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    store = capture(model, batch, model.anatomy.sites())
    block = model.anatomy.blocks[1]
    attn, mlp = store[Site("attn", 1)], store[Site("mlp", 1)]
    if family in ("olmo2", "olmo3", "gemma2", "gemma3_text"):
        attn, mlp = block.post_attention_layernorm(attn), block.post_feedforward_layernorm(mlp)
    scale = 0.5 if family == "granite" else 1.0
    expected = store[Site("resid", 0)] + scale * (attn + mlp)
    torch.testing.assert_close(store[Site("resid", 1)], expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_is_read_before_the_final_norm(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    last = Site("resid", LAYERS - 1)
    store = capture(model, batch, [last])
    torch.testing.assert_close(model.anatomy.logits(store[last]), logits_of(model, batch), **CLOSE)
    with torch.no_grad():
        output = model.network(**forward_inputs(model.network, batch), output_hidden_states=True)
    assert not torch.allclose(output.hidden_states[-1], store[last], rtol=0.05)


def test_coefficients_of_a_gated_mlp_are_activation_times_up():
    model, batch = tiny_model("llama"), tiny_batch(6, 6)
    store = capture(model, batch, model.anatomy.sites())
    block = model.anatomy.blocks[1]
    read = block.post_attention_layernorm(store[Site("resid", 0)] + store[Site("attn", 1)])
    expected = F.silu(F.linear(read, block.mlp.gate_proj.weight)) * F.linear(read, block.mlp.up_proj.weight)
    torch.testing.assert_close(store[Site("coef", 1)], expected, **CLOSE)


def test_coefficients_of_opt_are_relu_of_its_first_layer_with_rows_and_tokens_apart():
    model, batch = tiny_model("opt"), tiny_batch(5, 5, 5)
    store = capture(model, batch, model.anatomy.sites())
    block = model.anatomy.blocks[1]
    read = block.final_layer_norm(store[Site("resid", 0)] + store[Site("attn", 1)])
    torch.testing.assert_close(store[Site("coef", 1)], F.relu(block.fc1(read)), **CLOSE)


# Capturing.


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_independence_of_captures(family):
    model, batch = tiny_model(family), tiny_batch(7, 4)
    sites = model.anatomy.sites()
    store = capture(model, batch, sites)
    assert list(sorted(store, key=sites.index)) == sites
    for site, activation in store.items():
        inner = 4 * WIDTH if family == "bloom" else INNER
        assert activation.shape == (2, 7, inner if site.kind == "coef" else WIDTH)
        assert not activation.requires_grad and not activation.is_inference()
    again = capture(model, batch, sites)
    storages = [activation.untyped_storage().data_ptr() for activation in [*store.values(), *again.values()]]
    assert len(set(storages)) == len(storages)
    for activation in store.values():
        activation.zero_()
    assert all(torch.equal(again[site], value) for site, value in capture(model, batch, sites).items())
    assert n_hooks(model.network) == 0


def test_capture_never_asks_for_hidden_states():
    model, asked = tiny_model("llama"), []
    handle = model.network.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    capture(model, tiny_batch(4), model.anatomy.sites())
    handle.remove()
    assert [sorted(kwargs) for kwargs in asked] == [["attention_mask", "input_ids", "position_ids", "use_cache"]]
    assert not model.network.config.output_hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_computes_no_logits_and_leaves_the_head_as_it_was(family):
    model, batch = tiny_model(family), tiny_batch(4, 6)
    before, widths = logits_of(model, batch), []
    handle = model.anatomy.unembedding.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    capture(model, batch, model.anatomy.sites())
    handle.remove()
    assert widths == [0]
    assert torch.equal(logits_of(model, batch), before)


def test_capture_is_in_eval_mode_and_puts_training_mode_back():
    model, batch = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), tiny_batch(5)
    site = Site("resid", 2)
    expected = capture(model, batch, [site])[site]
    model.network.train()
    assert torch.equal(capture(model, batch, [site])[site], expected)
    assert model.network.training


def test_captures_can_be_trained_on_even_when_taken_in_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        value = capture(model, tiny_batch(4), [Site("resid", 1)])[Site("resid", 1)]
    weight = torch.ones(WIDTH, requires_grad=True)
    (value * weight).sum().backward()
    torch.testing.assert_close(weight.grad, value.sum((0, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_moves_no_activation(family):
    model = tiny_model(family)
    right, left = tiny_batch(7, 4, side="right"), tiny_batch(7, 4, side="left")
    sites = model.anatomy.sites()
    for_right, for_left = capture(model, right, sites), capture(model, left, sites)
    for site in sites:
        torch.testing.assert_close(for_right[site][right.attention], for_left[site][left.attention], **CLOSE)


# Patching.


@pytest.mark.parametrize(("family", "kind"), FAMILIES_AND_KINDS)
def test_only_the_asked_positions_are_replaced(family, kind):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    site, after = Site(kind, 1), Site("resid", 1)
    before = capture(model, batch, [site, after])
    plain = logits_of(model, batch)
    donor = before[site].flip(0).clone()
    positions = torch.zeros_like(batch.attention)
    positions[0, 2] = positions[1, 4] = True
    with patched(model.anatomy, {site: Patch.of(donor, positions)}):
        seen = capture(model, batch, [site, after])
        changed = logits_of(model, batch)
    mask = positions.unsqueeze(-1)
    assert torch.equal(seen[site], torch.where(mask, donor, before[site]))
    # A block works on each position by itself after attention; a causal model sees nothing that comes later.
    torch.testing.assert_close(seen[after][~positions], before[after][~positions], **CLOSE)
    assert not torch.allclose(seen[after][positions], before[after][positions], **CLOSE)
    torch.testing.assert_close(changed[0, :2], plain[0, :2], **CLOSE)
    torch.testing.assert_close(changed[1, :4], plain[1, :4], **CLOSE)
    assert not torch.allclose(changed[0, 2:], plain[0, 2:], **CLOSE)
    assert not torch.allclose(changed[1, 4:], plain[1, 4:], **CLOSE)
    assert torch.equal(donor, before[site].flip(0))
    assert torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_in_place_of_a_part_are_what_a_zeroed_weight_gives(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    for kind in kinds_of(family)[1:3]:
        site = Site(kind, 1)
        zeros = torch.zeros(2, 6, WIDTH)
        with patched(model.anatomy, {site: Patch.of(zeros, everywhere(batch))}):
            found = logits_of(model, batch)
        twin = model.copy()
        for parameter in twin.anatomy.module(site).parameters():
            parameter.data.zero_()
        torch.testing.assert_close(found, logits_of(twin, batch), **CLOSE)


@pytest.mark.parametrize("family", DENSE)
def test_a_coefficient_of_zero_is_what_a_value_vector_of_zero_gives(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    site = Site("coef", 1)
    coefficients = capture(model, batch, [site])[site]
    coefficients[..., 5] = 0.0
    with patched(model.anatomy, {site: Patch.of(coefficients, everywhere(batch))}):
        found = logits_of(model, batch)
    twin = model.copy()
    twin.anatomy.value_vectors(1).data[5] = 0.0
    expected = logits_of(twin, batch)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(expected, logits_of(model, batch), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_last_block_alone_decides_the_logits(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    residual = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(3))
    with patched(model.anatomy, {Site("resid", LAYERS - 1): Patch.of(residual, everywhere(batch))}):
        found = logits_of(model, batch)
    torch.testing.assert_close(found, model.anatomy.logits(residual), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "opt", "falcon"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_in_place(family, kind):
    model, batch, given = tiny_model(family), tiny_batch(6, 6), []

    def keep(module, inputs, output=None):
        tensor = inputs[0] if output is None else output[0] if isinstance(output, tuple) else output
        given.append((tensor, tensor.clone()))

    module = model.anatomy.module(Site(kind, 1))
    watch = module.register_forward_pre_hook if kind == "coef" else module.register_forward_hook
    width = INNER if kind == "coef" else WIDTH
    with watch(keep), patched(model.anatomy, {Site(kind, 1): Patch.of(torch.ones(2, 6, width), everywhere(batch))}):
        logits_of(model, batch)
    (held, as_given), *others = given
    assert not others and torch.equal(held, as_given) and not (held == 1).all()


def test_gradients_flow_into_the_values_and_around_the_patch():
    model, batch = tiny_model("llama"), tiny_batch(6)
    batch.ids[0] = torch.arange(4, 10)
    positions = torch.zeros_like(batch.attention)
    positions[0, 5] = True
    values = torch.zeros(1, WIDTH, requires_grad=True)
    with patched(model.anatomy, {Site("resid", 0): Patch(positions, values)}):
        model.network(**forward_inputs(model.network, batch)).logits[0, 5].sum().backward()
    assert values.grad is not None and values.grad.abs().sum() > 0
    by_token = model.anatomy.embedding.weight.grad[batch.ids[0]].abs().sum(-1)
    assert by_token[5] == 0  # what it gave was replaced
    assert (by_token[:5] > 0).all()


@settings(deadline=None, max_examples=12)
@given(
    family=st.sampled_from(["llama", "opt", "falcon", "gpt2", "olmoe"]),
    choices=st.lists(
        st.dictionaries(
            st.tuples(st.sampled_from(KINDS), st.integers(0, LAYERS - 1)), st.integers(0, 2**9 - 1), max_size=4
        ),
        min_size=1,
        max_size=4,
    ).filter(any),
)
def test_stacked_plans_give_what_each_gives_alone(family, choices):
    model, batch = tiny_model(family), tiny_batch(3, 3, 3)
    generator = torch.Generator().manual_seed(5)
    plans = []
    for choice in choices:
        plan = {}
        for (kind, layer), bits in choice.items():
            site = Site(kind if kind in model.anatomy.kinds else "attn", layer)
            positions = torch.tensor([bits >> place & 1 for place in range(9)], dtype=torch.bool).reshape(3, 3)
            width = model.anatomy.d_ff if site.kind == "coef" else WIDTH
            plan[site] = Patch(positions, torch.randn(int(positions.sum()), width, generator=generator))
        plans.append(plan)
    tiled = {**forward_inputs(model.network, batch)}
    tiled = {name: v.repeat(len(plans), 1) if isinstance(v, torch.Tensor) else v for name, v in tiled.items()}
    with torch.no_grad(), patched(model.anatomy, stacked(plans)):
        together = model.network(**tiled).logits.chunk(len(plans))
    for plan, result in zip(plans, together, strict=True):
        with patched(model.anatomy, plan):
            torch.testing.assert_close(result, logits_of(model, batch), rtol=1e-4, atol=1e-4)


# Hooks never outlive their context.


def first_patch(model, batch):
    return {
        site: Patch.of(torch.zeros(2, 6, WIDTH), everywhere(batch)) for site in model.anatomy.sites("attn", "resid")
    }


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "opt", "olmoe"])
def test_an_exception_inside_leaves_no_hook(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    plain = logits_of(model, batch)
    with pytest.raises(ZeroDivisionError), patched(model.anatomy, first_patch(model, batch)):
        assert n_hooks(model.network) == 2 * LAYERS
        _ = 1 / 0
    assert n_hooks(model.network) == 0
    with pytest.raises(ZeroDivisionError), capturing(model.anatomy, model.anatomy.sites(), (2, 6)):
        assert n_hooks(model.network) > 0
        _ = 1 / 0
    assert n_hooks(model.network) == 0
    assert torch.equal(logits_of(model, batch), plain)


def test_an_exception_in_the_forward_pass_leaves_no_hook():
    model, batch = tiny_model("llama"), tiny_batch(6, 6)
    with pytest.raises(RuntimeError), patched(model.anatomy, first_patch(model, batch)):
        logits_of(model, tiny_batch(5, 5))  # of another shape than the patches
    assert n_hooks(model.network) == 0
    model.network.train()
    outside = tiny_batch(4)
    outside.ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        capture(model, outside, model.anatomy.sites())
    assert n_hooks(model.network) == 0 and model.network.training


@pytest.mark.parametrize("family", EXPERT)
def test_a_site_that_is_not_there_is_refused_before_any_hook_is_set(family):
    model, batch = tiny_model(family), tiny_batch(4)
    for kind in ("mlp", "coef"):
        with pytest.raises(ModelError, match="fused"):
            capture(model, batch, [Site("resid", 0), Site(kind, 1)])
        assert n_hooks(model.network) == 0
    with (
        pytest.raises(ModelError, match="layers 0 to 2"),
        patched(
            model.anatomy,
            {Site("attn", layer): Patch.of(torch.zeros(1, 4, WIDTH), everywhere(batch)) for layer in (0, 7)},
        ),
    ):
        pytest.fail("the context was entered")
    assert n_hooks(model.network) == 0


# Before the first block.


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_first_block_reads_is_read_and_patched(family):
    model, batch = tiny_model(family), tiny_batch(6, 6)
    first, second = Site("resid", -1), Site("resid", 0)
    store = capture(model, batch, [first, second])
    same = Patch.of(store[first], everywhere(batch))
    other = Patch.of(store[first].flip(0), everywhere(batch))
    with patched(model.anatomy, {first: same}):
        torch.testing.assert_close(capture(model, batch, [second])[second], store[second])
    with patched(model.anatomy, {first: other}):
        swapped = capture(model, batch, [first, second])
    torch.testing.assert_close(swapped[first], store[first].flip(0))
    torch.testing.assert_close(swapped[second], store[second].flip(0), **CLOSE)


def test_only_the_residual_stream_stands_before_the_first_block():
    with pytest.raises(ModelError, match="has layers 0 to 2"):
        capture(tiny_model("llama"), tiny_batch(3), [Site("attn", -1)])
