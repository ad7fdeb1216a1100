"""Training a decoder so that it can be read at its exits: the next token is predicted at all of them at once.

ConsistentEE's first stage for generation (Zeng et al. 2024, arXiv 2312.11882), with the model's own norm and
unembedding at every exit in place of a head each, as LayerSkip has it (Elhoushi et al. 2024, arXiv 2404.16710).

Shapes: n targets of a batch, E exits of which the last is the whole network, V the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from palimpsest.data.batches import Batch, Encoded, batch_at
from palimpsest.early_exit.generation import refuse_unusable
from palimpsest.early_exit.stack import Stack
from palimpsest.early_exit.training import ExitTraining, Weights, exit_weights, optimise
from palimpsest.errors import DataError
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Report


def train_token_exits(
    model: LanguageModel,
    rows: Sequence[Encoded],
    exits: Sequence[int],
    settings: ExitTraining | None = None,
    *,
    weights: Weights = "linear",
    report: Report | None = None,
) -> None:
    """Train a model in place by the weighted sum of every exit's loss, nats per target token.

    Args:
        model: a decoder.
        rows: records or packed rows.
        exits: after how many blocks, ascending; the last block counts among them whether it is named or not.
        settings: how.
        weights: of the exits.
        report: told (steps done, of how many, the loss).

    Raises:
        ModelError, SpecError: what cannot be decoded, or exits that are not there.
        DataError: there are no rows.
        TrainingError: a loss or a gradient that is not finite.
    """
    if not rows:
        raise DataError("there is no text to train exits on; give at least one row")
    settings, stack = settings or ExitTraining(), Stack.of(model.network)
    refuse_unusable(stack, exits, None)
    every = sorted({*exits, stack.n_layers})
    shares = exit_weights(len(every), weights).to(model.device)

    def loss(step: int) -> Tensor:
        batch = batch_at(rows, step, batch_size=settings.batch_size, seed=settings.seed).to(model.device)
        return (exit_losses(model, stack, batch, every) * shares).sum()

    optimise([model.network], loss, settings, report, stack)


def exit_losses(model: LanguageModel, stack: Stack, batch: Batch, exits: Sequence[int]) -> Tensor:
    """[E] mean cross-entropy of a batch's targets after so many blocks, nats. Gradients flow if they are enabled."""
    hidden, given = stack.enter(batch)
    scored, losses = batch.targets[:, 1:], []
    labels = batch.ids[:, 1:][scored]
    for layer in range(max(exits)):
        hidden = stack.run(layer, hidden, given)
        if layer + 1 in exits:
            logits = model.anatomy.logits(hidden[:, :-1][scored])
            losses.append(cross_entropy(logits.float(), labels))
    return torch.stack(losses)
