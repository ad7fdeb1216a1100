"""A network gone through block by block, so that one can stop at any of them and let rows leave on the way.

The network's own forward pass is begun and left where its first block is called; what that block was given besides the
hidden states (mask, positions, rotary angles) is what every block is given. So no family's embedding, mask or position
code is written again here. Families whose blocks are given different things are refused.

Shapes: B rows, T tokens, d the model's width, L blocks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palimpsest.data.batches import Batch, Encoded, collate
from palimpsest.errors import ModelError
from palimpsest.models.families import FAMILIES
from palimpsest.models.inputs import forward_inputs

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
"""Those of `FAMILIES` that every block of is given the same, with a cache that is updated before attention."""
ENCODERS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "electra": "encoder.layer",
    "distilbert": "transformer.layer",
}
"""Where an encoder's blocks are, seen from its base model."""


class _FirstBlockReached(Exception):
    """Carries what the first block was given out of the network's forward pass."""

    def __init__(self, hidden: Tensor, given: "Given") -> None:
        super().__init__()
        self.hidden, self.given = hidden, given


@dataclass(frozen=True, eq=False)
class Given:
    """What every block is given besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def take(self, rows: Tensor, n_rows: int) -> "Given":
        """The same for some of the rows.

        Args:
            rows: [R] which.
            n_rows: how many there were. What is one line for all rows stays one.
        """

        def taken(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(taken(part) for part in value)
            of_rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == n_rows > 1
            return value[rows] if of_rows else value

        return Given(taken(self.positional), {name: taken(value) for name, value in self.named.items()})

    def span(self, start: int, stop: int, n_columns: int) -> "Given":
        """The same for some of the tokens.

        Args:
            start: the first.
            stop: the one after the last.
            n_columns: how many there were. What is not of that length in its second dimension stays as it is.
        """

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            of_columns = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == n_columns
            return value[:, start:stop] if of_columns else value

        return Given(cut(self.positional), {name: cut(value) for name, value in self.named.items()})

    def swap(self, old: object, new: object) -> "Given":
        """The same with one object in place of another, wherever it stands."""
        return Given(
            tuple(new if value is old else value for value in self.positional),
            {name: new if value is old else value for name, value in self.named.items()},
        )

    def named_as(self, **named: Any) -> "Given":
        """The same with other values under some of the names; a name that was not given is left out."""
        return replace(self, named=self.named | {name: value for name, value in named.items() if name in self.named})


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of a network, and the way to the first of them."""

    network: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    is_decoder: bool

    @staticmethod
    def of(network: PreTrainedModel) -> "Stack":
        """The blocks by the network's family; a tiny pass checks that block by block it is the network.

        Raises:
            ModelError: a family that is not known here, or blocks that do not make up the network.
        """
        family, base = network.config.model_type, network.base_model
        is_decoder = family in DECODERS
        if not is_decoder and family not in ENCODERS:
            raise ModelError(
                f"early exit does not know the architecture {family!r}; it knows the decoders {', '.join(DECODERS)} "
                f"and the encoders {', '.join(ENCODERS)}"
            )
        where = network.get_submodule(FAMILIES[family].blocks) if is_decoder else base.get_submodule(ENCODERS[family])
        stack = Stack(network, tuple(where.children()), is_decoder)
        stack._check()
        return stack

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """D."""
        width: int = self.network.config.hidden_size
        return width

    def enter(self, batch: Batch, **inputs: Any) -> tuple[Tensor, Given]:
        """Up to the first block: the hidden states [B, T, d] that it reads, and what else every block is given.

        Args:
            batch: on the network's device.
            inputs: more arguments of the network's forward pass, or others than a batch's own.

        Raises:
            DataError: a row is longer than the positions that the model was made for.
        """

        def leave(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if positional:
                raise _FirstBlockReached(positional[0], Given(positional[1:], named))
            besides = {name: value for name, value in named.items() if name != "hidden_states"}
            raise _FirstBlockReached(named["hidden_states"], Given((), besides))

        given = forward_inputs(self.network, batch)
        if not self.is_decoder:
            # Encoders count positions in ways of their own and keep no cache.
            given = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
        handle = self.blocks[0].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self.network(**given | inputs)
        except _FirstBlockReached as reached:
            return reached.hidden, reached.given
        finally:
            handle.remove()
        raise ModelError(f"{type(self.network).__name__}: its forward pass does not call its first block")

    def run(self, layer: int, hidden: Tensor, given: Given) -> Tensor:
        """[B, T, d] what block `layer`, counted from 0, makes of the hidden states."""
        output = self.blocks[layer](hidden, *given.positional, **given.named)
        return output[0] if isinstance(output, tuple) else output

    def _check(self) -> None:
        """Block by block, a padded batch must give the last block's output in the network's own pass."""
        vocabulary, device = self.network.config.vocab_size, self.network.device
        lines = [[token % vocabulary for token in line] for line in ((5, 7, 11, 13, 17), (19, 23, 29))]
        rows = [Encoded(tuple(line), 1, len(line)) for line in lines]
        batch = collate(rows, range(2)).to(device)
        seen: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        was_training = self.network.training
        self.network.eval()
        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            with torch.no_grad():
                own = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
                self.network(**forward_inputs(self.network, batch) if self.is_decoder else own)
                hidden, given = self.enter(batch)
                for layer in range(self.n_layers):
                    hidden = self.run(layer, hidden, given)
        finally:
            handle.remove()
            self.network.train(was_training)
        own_states, ours = seen[0][batch.attention].float(), hidden[batch.attention].float()
        difference = float((own_states - ours).abs().max() / own_states.abs().max())
        if not difference < 1e-3:  # NaN fails too
            raise ModelError(
                f"this {self.network.config.model_type} is not the sum of its blocks (relative difference "
                f"{difference:.2g}): its blocks are given different things, so early exit cannot run it"
            )
