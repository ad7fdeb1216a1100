"""One forward pass over a batch, kept so that others over the same batch can begin in its middle.

A change in layer l alters nothing below it, so of a sweep over all layers half of the work is done by the kept pass.
Shapes: B rows, T tokens, d the model's width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from palimpsest.data.batches import Batch
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.hooks import capturing
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import Predictions, predict


@dataclass(frozen=True, eq=False)
class Recording:
    """What a model predicted for a batch, and what was read on the way."""

    model: LanguageModel
    batch: Batch
    """On the model's device."""
    predictions: Predictions
    """Of the batch's targets."""
    activations: Mapping[Site, Tensor]
    """[B, T, d] or, of `coef`, [B, T, d_ff]; in inference mode, so not to be trained on."""
    besides: tuple[tuple[Any, ...] | None, ...]
    """What each block gives besides the residual stream; None where it gives the bare stream and no tuple."""

    @staticmethod
    def of(model: LanguageModel, batch: Batch, sites: Sequence[Site]) -> "Recording":
        """Run the model once, in eval mode.

        Args:
            model: on any device.
            batch: on any device.
            sites: what is read; to begin in the middle, `residual_stream` must be among them.

        Raises:
            ModelError: a site that this model does not have.
            DataError: a row is longer than the positions that the model was made for.
        """
        batch = batch.to(model.device)
        with evaluating(model) as network, _besides(model.anatomy) as besides:
            with capturing(model.anatomy, sites, batch.ids.shape) as activations:
                predictions = predict(network, batch)
        return Recording(model, batch, predictions, activations, tuple(besides))

    @contextmanager
    def resumed(self, layer: int, copies: int = 1) -> Iterator[None]:
        """Let every forward pass inside begin at block `layer`, with what that block read in this recording.

        The passes inside must be of this batch, repeated `copies` times. The blocks before are passed through; hooks
        on the one just before see its output as ever. The network is as before on leaving, whatever happened.

        Args:
            layer: from 0, where nothing is passed through, to the number of layers, where only the final norm is left.
            copies: how often the rows are repeated, one copy of the batch after another.
        """
        with ExitStack() as undo:
            if layer > 0:
                stream = self.activations[Site("resid", layer - 1)].repeat(copies, 1, 1)
                for block, besides in zip(self.model.anatomy.blocks[:layer], self.besides, strict=False):
                    undo.enter_context(_giving(block, stream if besides is None else (stream, *besides)))
            yield


def residual_stream(anatomy: Anatomy) -> list[Site]:
    """What each block gives to the next."""
    return anatomy.sites("resid")


@contextmanager
def _besides(anatomy: Anatomy) -> Iterator[list[tuple[Any, ...] | None]]:
    """Yield a list that a forward pass inside fills with what each block gives besides the residual stream."""
    found: list[tuple[Any, ...] | None] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found.append(output[1:] if isinstance(output, tuple) else None)

    with ExitStack() as handles:
        for block in anatomy.blocks:
            handles.enter_context(block.register_forward_hook(keep))
        yield found


@contextmanager
def _giving(block: nn.Module, output: Any) -> Iterator[None]:
    """Let a block give this whatever it is given. Its hooks run, because `forward` is only what they stand around."""
    own = vars(block).get("forward")  # others may have put one there, as accelerate does
    block.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
