"""How far an unlearning reaches: what it does to activations on rows that it was not about.

Hong et al. 2024 (arXiv 2410.06606) find that what lowers the forgotten answers also changes how the model reads
everything else. How much is told by the change of coefficients and of attention's outputs on rows outside the forget
set, beside the change on the forget rows, and beside that in a sham: any training moves activations everywhere.

Shapes: B rows of T tokens, n rows in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.internals.patching import refuse_unlike
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel

TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Shift:
    """How a site's activations moved in n rows, each row's tokens taken together as one long vector."""

    relative_l2: Tensor
    """[n] the difference's length over that of the original's activations."""
    cosine: Tensor
    """[n] 1 the same direction."""


@dataclass(frozen=True, eq=False)
class SideEffect:
    """One site's shift where it was meant to be and where it was not, by unlearning and by a sham."""

    site: Site
    forget: Shift
    outside: Shift
    sham_forget: Shift
    sham_outside: Shift

    @property
    def spill(self) -> float:
        """Mean relative shift outside over that on the forget rows: 0 where it stays inside, 1 where it has no bounds.

        NaN where nothing moved at all.
        """
        return float(self.outside.relative_l2.mean() / self.forget.relative_l2.mean())

    @property
    def sham_spill(self) -> float:
        """The same of a sham, which knows of no forget set."""
        return float(self.sham_outside.relative_l2.mean() / self.sham_forget.relative_l2.mean())

    @property
    def over_sham(self) -> float:
        """Mean relative shift outside, over a sham's: 1 is what training on retain rows does anyway."""
        return float(self.outside.relative_l2.mean() / self.sham_outside.relative_l2.mean())


def side_effects(
    original: LanguageModel,
    unlearned: LanguageModel,
    sham: LanguageModel,
    forget: Sequence[Encoded],
    outside: Sequence[Encoded],
    *,
    batch_size: int = 16,
) -> list[SideEffect]:
    """What unlearning did to coefficients and attention outputs, layer by layer: coefficients first.

    Args:
        original: what both others were made of.
        unlearned: the model that is judged.
        sham: the original trained on retain rows alone.
        forget: rows of the forget set.
        outside: rows of what neither was trained on.
        batch_size: rows at a time; it changes nothing.

    Raises:
        ModelError: the models are not built alike, or have no coefficients.
    """
    sites = [*original.anatomy.sites("coef"), *original.anatomy.sites("attn")]
    shifts = [
        activation_shifts(original, model, rows, sites, batch_size=batch_size)
        for model in (unlearned, sham)
        for rows in (forget, outside)
    ]
    return [SideEffect(site, *of_site) for site, *of_site in zip(sites, *shifts, strict=True)]


def activation_shifts(
    original: LanguageModel,
    changed: LanguageModel,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    *,
    batch_size: int = 16,
) -> list[Shift]:
    """How far each site's activations are from the original's on n rows, padding left out; fp32 on the CPU.

    Args:
        original: the model before.
        changed: the model after.
        rows: n rows, read to their end.
        sites: where.
        batch_size: rows at a time; it changes nothing.

    Raises:
        ModelError: the models are not built alike, or have no such site.
    """
    refuse_unlike(original, changed)
    found = torch.empty(len(sites), 2, len(rows))
    for batch in batches(rows, batch_size=batch_size):
        before, after = (capture(model, batch.to(model.device), sites) for model in (original, changed))
        for place, site in enumerate(sites):
            found[place, :, list(batch.rows)] = _shift(before[site].cpu(), after[site].cpu(), batch.attention)
    return [Shift(*shift) for shift in found]


def _shift(before: Tensor, after: Tensor, attention: Tensor) -> Tensor:
    """[2, B] relative L2 and cosine of activations [B, T, d], over the tokens that are no padding [B, T]."""
    old, new = (part.double().where(attention[..., None], 0.0).flatten(1) for part in (before, after))
    length = old.norm(dim=1).clamp(min=TINY)
    return torch.stack([(new - old).norm(dim=1) / length, torch.cosine_similarity(old, new, dim=1, eps=TINY)]).float()
