"""Stimulus-response alignment (Belrose et al. 2023, §4): does the lens foresee what a change at its layer does?

A stimulus is how the lens's prediction changes when a subspace of the states is resampled, the response how the model's
own does. Both are compared as compositions, in Aitchison's geometry (1982), which knows probabilities' ratios alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.intervention import resampled, streams
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import SAMPLED
from palimpsest.models.language_model import LanguageModel


def alignment(
    lens: Lens, model: LanguageModel, rows: Sequence[Encoded], layer: int, vectors: Tensor, *, seed: int = 0
) -> Tensor:
    """[N] cosine of stimulus and response at every token, from -1 to 1.

    Args:
        lens: for this model's readout.
        model: whose layer it is.
        rows: texts, other than those that the lens was fitted to.
        layer: where the states are resampled.
        vectors: [k, d] orthonormal directions that span the subspace, such as a causal basis.
        seed: of whose states each token gets.
    """
    readout, found = lens.readout(model), []
    for stream in streams(model, rows, layer):
        changed = resampled(stream.hidden, vectors.to(stream.hidden), seed)
        after = stream.after(changed)
        for some in torch.arange(len(changed), device=changed.device).split(SAMPLED):
            seen, moved = (lens.translate(states[some], layer) for states in (stream.hidden, changed))
            logits = [readout.logits(readout.z(states)) for states in (seen, moved, stream.last[some], after[some])]
            found.append(aitchison_cosine(logits[1] - logits[0], logits[3] - logits[2], logits[2].softmax(-1)))
    return torch.cat(found).cpu()


def aitchison_cosine(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """[N] cosine of two changes of logits [N, V], weighted by a distribution [N, V]; 0 where one does not change.

    Adding the same to all logits is no change.
    """
    left, right = (part - (weights * part).sum(-1, keepdim=True) for part in (left, right))
    norms = [(weights * part.square()).sum(-1).sqrt() for part in (left, right)]
    return (weights * left * right).sum(-1) / (norms[0] * norms[1]).clamp(min=1e-8)
