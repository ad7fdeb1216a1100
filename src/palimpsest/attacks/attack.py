"""What an attack is, and what several models answer under several attacks.

An attack shows something only beside the models whose truth is known: what it brings out of gold was never forgotten,
and what it takes from the original it breaks (Feng et al. 2025, arXiv 2506.00688). So all of them are attacked alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, subject_of
from palimpsest.errors import DataError, ModelError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.metrics.scores import Row
from palimpsest.models.language_model import LanguageModel

ATTACKED = "forget_attacked"
"""The set under which attacked answers stand."""


@dataclass(frozen=True)
class Attack:
    """A try to bring out what a model does not say: another model, or another way to ask."""

    name: str
    budget: str
    """What the attacker spends or tells the model, for people."""
    on_model: Callable[[LanguageModel], AbstractContextManager[LanguageModel]] = nullcontext
    """Gives the model to be asked, inside; on leaving, the one it was made from is as before."""
    on_rows: Callable[[Sequence[QA]], Sequence[QA]] = tuple
    """The questions as they are asked; a record may be asked in several ways, or in none."""

    @staticmethod
    def by_copy(name: str, budget: str, make: Callable[[LanguageModel], LanguageModel]) -> "Attack":
        """An attack that makes another model of the one it is given."""
        return Attack(name, budget, lambda model: nullcontext(make(model)))

    @property
    def measure(self) -> str:
        """The `Measure.key` of its rows."""
        return f"{ATTACKED}/{self.name}"


def attacked(
    attacks: Sequence[Attack],
    models: Mapping[str, LanguageModel],
    records: Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Iterator[Row]:
    """Each answer's probability (geometric mean per token) under each attack on each model, with ids and subjects kept.

    Args:
        attacks: with names that differ.
        models: by name, gold and original among them.
        records: the forgotten facts.
        template: how they are asked.
        batch_size: rows at a time; it changes nothing.

    Raises:
        DataError: two attacks of one name, or an attack that asks nothing.
        ModelError: an attack changed the weights of the model that it was given.
    """
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise DataError(f"two attacks share a name: {', '.join(names)}; give each its own")
    asked = {attack.name: list(attack.on_rows(records)) for attack in attacks}
    for name, rows in asked.items():
        if not rows:
            raise DataError(f"attack {name!r} asks nothing of these {len(records)} records; leave it out")
    for model_name, model in models.items():
        before = model.weights_hash()
        for attack in attacks:
            with attack.on_model(model) as target:
                values = answer_probability(target, asked[attack.name], template=template, batch_size=batch_size)
            for row, value in zip(asked[attack.name], values.tolist(), strict=True):
                yield Row(model_name, attack.measure, row.id, subject_of(row), value)
        if model.weights_hash() != before:
            raise ModelError(f"{model_name}: its weights are no longer those that it came with; an attack changed them")


def with_other_matrices(model: LanguageModel, name: str, change: Callable[[Tensor], Tensor]) -> LanguageModel:
    """A copy of the model in which every linear map inside the blocks is another one.

    Embeddings, unembedding, norms, biases and the routers of a mixture of experts stay as they are; its fused experts
    are changed one by one.

    Args:
        model: left as it is.
        name: of the copy.
        change: from a matrix [out, in] in fp32 to another; called in the order in which the modules stand.
    """
    copy = model.copy(name)
    with torch.no_grad():
        for matrix in linear_maps(copy):
            matrix.copy_(change(matrix.detach().float()))
    return copy


def linear_maps(model: LanguageModel) -> list[Tensor]:
    """The linear maps inside the blocks as matrices [out, in], views of the weights, in the modules' order."""
    found: dict[int, list[Tensor]] = {}
    for block in model.anatomy.blocks:
        for module in block.modules():
            for weight in module.parameters(recurse=False):
                if weight.ndim == 3:  # fused experts
                    found[id(weight)] = list(weight.detach())
                elif weight.ndim == 2 and isinstance(module, nn.Linear | Conv1D):
                    # GPT-2's Conv1D stores [in, out].
                    found[id(weight)] = [weight.detach().T if isinstance(module, Conv1D) else weight.detach()]
    return [matrix for matrices in found.values() for matrix in matrices]
