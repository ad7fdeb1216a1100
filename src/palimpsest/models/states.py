"""One hidden state a record, at a place of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capturing
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import predict


def hidden_states(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    site: Site,
    positions: Sequence[int],
    *,
    batch_size: int = 64,
) -> Tensor:
    """[n, d] the site's activation at one token of each record, in fp32 on the CPU, in the records' order.

    Args:
        model: whose activations.
        encoded: n records.
        site: where in the network; `resid` of layer l is what block l gives to the next, before any final norm.
        positions: [n] the token of each record, counted from 0.
        batch_size: rows at a time; it changes nothing.

    Raises:
        ModelError: a site that this model does not have.
    """
    found: list[tuple[list[int], Tensor]] = []
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            batch, rows = batch.to(model.device), list(batch.rows)
            with capturing(model.anatomy, [site], batch.ids.shape) as store:
                predict(network, batch)
            places = torch.tensor([positions[row] for row in rows], device=model.device)
            found.append((rows, store[site][torch.arange(len(rows)), places].float().cpu()))
    states = torch.empty(len(encoded), found[0][1].shape[1])
    for rows, values in found:
        states[rows] = values
    return states
