"""What each exit would say: a norm and a linear map to the classes, from one token's hidden state.

Shapes: N rows, E exits, d the model's width, C classes.
"""

import torch
from torch import Tensor, nn


class ClassHeads(nn.Module):
    """One head an exit. They have a norm of their own, because the residual stream grows from block to block."""

    def __init__(self, n_exits: int, width: int, n_classes: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(n_exits, n_classes, width, generator=generator) * width**-0.5
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_exits))
        self.maps = nn.ModuleList(nn.Linear(width, n_classes) for _ in range(n_exits))
        with torch.no_grad():
            for one, weight in zip(self.maps, drawn, strict=True):
                one.get_parameter("weight").copy_(weight)
                one.get_parameter("bias").zero_()

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.maps[0].get_parameter("bias"))

    def at(self, exit: int, states: Tensor) -> Tensor:
        """[N, C] logits of one exit, counted from 0, from its states [N, d]; in fp32."""
        logits: Tensor = self.maps[exit](self.norms[exit](states.float()))
        return logits

    def forward(self, states: Tensor) -> Tensor:
        """[N, E, C] logits of every exit from the states [N, E, d]."""
        return torch.stack([self.at(exit, states[:, exit]) for exit in range(len(self.maps))], 1)


def read_at(attention: Tensor, is_decoder: bool) -> Tensor:
    """[B] the token that a head reads: a decoder's last real one, which has seen all, an encoder's first.

    Args:
        attention: [B, T] bool, False at padding, on either side.
        is_decoder: which it is.
    """
    real = attention.long()
    return (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1) if is_decoder else real.argmax(1)


def pooled(hidden: Tensor, places: Tensor) -> Tensor:
    """[B, d] the hidden states [B, T, d] at one token [B] a row."""
    return hidden[torch.arange(len(hidden), device=hidden.device), places]
