"""A network block by block is the network, for every family that is named; rows can be dropped on the way."""

import pytest
import torch
from tests.models.tiny_families import tiny
from transformers import AutoConfig, AutoModel, PreTrainedModel

from palimpsest.data.batches import Batch, Encoded, collate
from palimpsest.early_exit.stack import DECODERS, ENCODERS, Given, Stack
from palimpsest.errors import ModelError

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def encoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    distil = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24} if family == "distilbert" else {}
    config = AutoConfig.for_model(family, **({"vocab_size": 48} | distil if distil else SIZES), pad_token_id=0)
    return AutoModel.from_config(config).eval()


def padded(side: str = "right") -> Batch:
    rows = [Encoded(ids, 1, len(ids)) for ids in ((5, 6, 7, 8, 9), (10, 11), (12, 13, 14))]
    return collate(rows, range(3), side=side)  # type: ignore[arg-type]


def through(stack: Stack, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden, given = stack.enter(batch)
        for layer in range(stack.n_layers):
            hidden = stack.run(layer, hidden, given)
    return hidden


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_block_by_block_gives_its_logits(family: str, side: str) -> None:
    network, batch = tiny(family, **({"sliding_window": None} if family == "mistral" else {})), padded(side)
    stack = Stack.of(network)
    positions = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        own = network(input_ids=batch.ids, attention_mask=batch.attention.long(), position_ids=positions).logits
        norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
        ours = network.get_output_embeddings()(network.get_submodule(norm)(through(stack, batch)))
    torch.testing.assert_close(ours[batch.attention], own[batch.attention], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_block_by_block_gives_its_last_hidden_state(family: str) -> None:
    network, batch = encoder(family), padded()
    with torch.no_grad():
        own = network(input_ids=batch.ids, attention_mask=batch.attention.long()).last_hidden_state
    torch.testing.assert_close(through(Stack.of(network), batch)[batch.attention], own[batch.attention])


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_rows_that_stay_do_not_notice_that_others_leave(family: str) -> None:
    stack = Stack.of(encoder(family) if family in ENCODERS else tiny(family))
    batch, stay = padded("left"), torch.tensor([0, 2])
    with torch.no_grad():
        hidden, given = stack.enter(batch)
        hidden = stack.run(0, hidden, given)
        hidden, given = hidden[stay], given.take(stay, 3)
        for layer in range(1, stack.n_layers):
            hidden = stack.run(layer, hidden, given)
    attention = batch.attention[stay]
    torch.testing.assert_close(hidden[attention], through(stack, batch)[stay][attention], rtol=1e-5, atol=1e-5)


def test_a_family_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="does not know the architecture 'bloom'; it knows the decoders llama"):
        Stack.of(tiny("bloom"))


def test_blocks_that_do_not_make_up_the_network_are_refused() -> None:
    network = tiny("llama")
    network.model.layers[1].register_forward_pre_hook(
        lambda module, given, named: ((given[0] * (1 + network.model.embed_tokens.training),), named), with_kwargs=True
    )
    assert Stack.of(network).n_layers == 3
    calls = iter([1.0, 2.0])
    network.model.layers[1].register_forward_pre_hook(
        lambda module, given, named: ((given[0] * next(calls),), named), with_kwargs=True
    )
    with pytest.raises(ModelError, match="not the sum of its blocks"):
        Stack.of(network)


def test_what_is_one_line_for_all_rows_stays_one() -> None:
    mask, angles = torch.arange(6.0).reshape(3, 2), torch.zeros(1, 2)
    taken = Given((mask, None), {"both": (mask, angles), "counts": torch.arange(3)}).take(torch.tensor([2, 0]), 3)
    assert taken.positional[0].tolist() == [[4.0, 5.0], [0.0, 1.0]] and taken.positional[1] is None
    assert taken.named["both"][1] is angles and taken.named["counts"].tolist() == [0, 1, 2]
