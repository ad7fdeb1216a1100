"""RMU: the hidden states of what is to be forgotten are pushed to a random direction, those of the rest held still."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, batches
from palimpsest.errors import SpecError
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.hooks import capture
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.lora import frozen_start
from palimpsest.unlearn.losses import Objective, Sampler, sampler
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.weights import trainable


@dataclass(frozen=True, kw_only=True)
class RMU(Descent):
    """Minimise |h - c u|² on forget rows plus alpha * |h - h_start|² on retain rows, over every token of the rows.

    h is what a block gives, [d_model]; u is a unit vector drawn from the seed, its entries from [0, 1) before it is
    scaled. Only the MLP's value matrices (`down_proj`) of that block and the two before it change. The answer's
    probability is not in the loss: it comes down because later blocks cannot read what they are given, and need not
    reach a level that is asked for where alpha is large.

    The paper's c is a length (6.5 for Zephyr-7B, 300 for Yi-34B); that of another model's hidden states is another, so
    here it is given in theirs, as Huu-Tien et al. 2024 (arXiv 2408.06223) do. Its alpha, 1200 for Zephyr, goes with c.
    The squared distances are divided by d_model, both alike.
    """

    name: ClassVar[str] = "rmu"
    source: ClassVar[str] = "Li et al. 2024 (WMDP), arXiv 2403.03218, section 4"

    learning_rate: float = 1e-3
    """Higher than that of methods that move every weight."""
    layer: int | None = None
    """The block, counted from 0; a third of the way up when None (the paper's is 7 of Zephyr's 32)."""
    coefficient: float = 5.0
    """c, in median lengths of the start model's hidden states of the forget rows at that block."""
    alpha: float = 1.0
    """The weight of the retain rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("coefficient")

    def parameters(self, model: LanguageModel) -> dict[str, Tensor]:
        """The value matrices of the block and the two before it.

        Raises:
            SpecError: there is no such block, or its experts are fused.
        """
        layer, matrices = self._layer(model.anatomy), model.anatomy.value_matrices
        if not matrices:
            raise SpecError(
                f"{self.name}: the experts of a {model.anatomy.family} are fused and have no value matrix to change; "
                "choose another method"
            )
        changed = {id(matrix.weight) for matrix in matrices[max(0, layer - 2) : layer + 1]}
        return {name: value for name, value in trainable(model).items() if id(value) in changed}

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """The two squared distances, averaged over a row's tokens and then over rows."""
        site = Site("resid", self._layer(model.anatomy))
        forget = sampler(self, model, request, request.forget)
        target = self.coefficient * _usual_length(model, forget, site) * _direction(model, self.seed)
        hold = _hold(model, sampler(self, model, request, request.retain, salt=1), site) if self.alpha else None

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            push = distance(hidden_states(model, batch, site), target, batch)
            return push + self.alpha * hold(step) if hold else push

        return loss

    def _layer(self, anatomy: Anatomy) -> int:
        layer = anatomy.n_layers // 3 if self.layer is None else self.layer
        if not 0 <= layer < anatomy.n_layers:
            raise SpecError(f"{self.name}: layer is {layer}; this {anatomy.family} has 0 to {anatomy.n_layers - 1}")
        return layer


def hidden_states(model: LanguageModel, batch: Batch, site: Site) -> Tensor:
    """[B, T, d_model] in fp32, what a block gives for a batch; gradients flow if enabled, and no logits are made."""
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.anatomy.module(site).register_forward_hook(keep)
    try:
        model.network.base_model(**forward_inputs(model.network, batch))
    finally:
        handle.remove()
    return seen[0].float()


def distance(hidden: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """|hidden - target|² / d_model, averaged over each row's real tokens and then over rows.

    hidden is [B, T, d_model], target the same or one vector for all, [d_model].
    """
    squared = torch.where(batch.attention, (hidden - target).square().mean(-1), 0.0)
    return (squared.sum(1) / batch.attention.sum(1)).mean()


def _hold(model: LanguageModel, retain: Sampler, site: Site) -> Objective:
    """How far a retain batch has moved from where the start model has it."""
    start = frozen_start(model)

    def moved(step: int) -> Tensor:
        batch = retain.at(step)
        with start() as frozen:
            held = hidden_states(frozen, batch, site)
        return distance(hidden_states(model, batch, site), held, batch)

    return moved


def _usual_length(model: LanguageModel, forget: Sampler, site: Site) -> float:
    """The median, because the first token's hidden state is often many times as long as the others."""
    lengths = []
    for batch in batches(forget.encoded):
        batch = batch.to(model.device)
        lengths.append(capture(model, batch, [site])[site][batch.attention].float().norm(dim=-1))
    return torch.cat(lengths).median().item()


def _direction(model: LanguageModel, seed: int) -> Tensor:
    """[d_model] the unit vector of a seed; drawn on the CPU, so that it is the same on every device."""
    entries = torch.rand(model.anatomy.d_model, generator=torch.Generator().manual_seed(seed))
    return (entries / entries.norm()).to(model.device)
