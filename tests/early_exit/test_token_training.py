"""A decoder trained for its exits: the loss is transformers' own at every depth, and the exits learn what it asks."""

import pytest
import torch
from tests.early_exit.decoders import LAYERS, decoder
from tests.models.tiny_families import tiny_batch, tiny_rows
from torch.nn.functional import cross_entropy

from palimpsest.early_exit.stack import DECODERS, Stack
from palimpsest.early_exit.token_training import exit_losses, train_token_exits
from palimpsest.early_exit.training import ExitTraining
from palimpsest.errors import DataError, SpecError

FEW = ExitTraining(steps=40, batch_size=4, learning_rate=3e-3)


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_of_an_exit_is_that_of_the_hidden_state_there(family: str) -> None:
    model, batch = decoder(family), tiny_batch(12, 9, 5)
    with torch.no_grad():
        found = exit_losses(model, Stack.of(model.network), batch, [1, 3, LAYERS])
        output = model.network(
            batch.ids, attention_mask=batch.attention.long(), output_hidden_states=True, use_cache=False
        )
        # Transformers' last hidden state has gone through the final norm already; its logits are those at the end.
        early = [model.anatomy.logits(output.hidden_states[blocks]) for blocks in (1, 3)]
    scored = batch.targets[:, 1:]
    for place, logits in enumerate([*early, output.logits]):
        own = cross_entropy(logits[:, :-1][scored], batch.ids[:, 1:][scored])
        torch.testing.assert_close(found[place], own, atol=1e-5, rtol=1e-5)


def test_an_exit_that_is_trained_says_more_than_one_that_is_not() -> None:
    rows, batch = tiny_rows(12, 12, 12, 12), tiny_batch(12, 12, 12, 12)
    losses = {}
    for exits in ((1,), (LAYERS,)):
        model = decoder("llama")
        train_token_exits(model, rows, exits, FEW)
        with torch.no_grad():
            losses[exits] = exit_losses(model, Stack.of(model.network), batch, [1, LAYERS])
    assert losses[1,][0] < 0.8 * losses[LAYERS,][0]
    assert losses[1,][1] < 2.0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        train_token_exits(decoder("llama"), [], [1])
    with pytest.raises(SpecError, match="name numbers of blocks run"):
        train_token_exits(decoder("llama"), tiny_rows(5), [LAYERS + 1])
