"""One hidden state a record: the activation that `capture` shows there, whatever the batch."""

import pytest
import torch
from tests.conftest import Organism

from palimpsest.data.batches import collate, encode
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.states import hidden_states


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_is_what_its_own_row_alone_gives(trained: Organism, batch_size: int) -> None:
    records = (*trained.request.forget[:4], *trained.request.forget_reworded[:4])
    encoded, site = encode(records, trained.full.tokenizer), Site("resid", 0)
    places = [(row.start - 1, row.stop - 1)[number % 2] for number, row in enumerate(encoded)]
    states = hidden_states(trained.full, encoded, site, places, batch_size=batch_size)
    for number, (row, place) in enumerate(zip(encoded, places, strict=True)):
        alone = capture(trained.full, collate([row], [0]), [site])[site][0, place]
        torch.testing.assert_close(states[number], alone, rtol=1e-4, atol=1e-5)
