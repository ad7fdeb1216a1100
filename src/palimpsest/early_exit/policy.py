"""Whether to exit, and what that is worth: a small gate at every exit, and the objective that trains all of them.

The gates of a row give every exit a probability, pi_t = p_t * prod_{s<t} (1 - p_s), the last exit being forced. What is
minimised is the expected cost over it, of the loss there and of the time that it took. ConsistentEE (Zeng et al. 2024,
arXiv 2312.11882) estimates that by sampling exits (REINFORCE); since one forward pass tells what every exit would have
cost, it can as well be summed up exactly, with the same gradient in expectation and no noise.

Shapes: N examples (rows, or tokens), E exits of which the last is the whole network, d the model's width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, logsigmoid

Hardness = Literal["none", "memorized", "solvable"]


class Policy(nn.Module):
    """A gate at every exit but the last: norm, d to 32, GELU, to one logit; it reads the price of time too.

    The price is one input, so a single policy serves every trade of accuracy for time.
    """

    def __init__(self, n_exits: int, width: int, *, hidden: int = 32, seed: int = 0) -> None:
        """A policy that has learned nothing: every exit is as likely as any other.

        With gates of one half, the last of 32 exits would be reached once in 2^31 rows, and would never be learned.

        Args:
            n_exits: E.
            width: d.
            hidden: width of the gate.
            seed: of the initialisation.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n_gates, n_inputs = n_exits - 1, width + 1
        self.inner = nn.Parameter(torch.randn(n_gates, hidden, n_inputs, generator=generator) * n_inputs**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(n_gates, hidden))
        self.outer = nn.Parameter(torch.zeros(n_gates, hidden))
        odds = 1 / torch.arange(n_exits - 1, 0, -1)
        self.outer_bias = nn.Parameter(odds.log())  # 1 of the exits that are left
        self.width = width

    @property
    def n_exits(self) -> int:
        """E."""
        return len(self.outer) + 1

    def forward(self, states: Tensor, log_price: Tensor) -> Tensor:
        """[N, E - 1] the logit of exiting at each exit, given that it was reached.

        Args:
            states: [N, E - 1, d] the hidden states there.
            log_price: [N] the logarithm of the price of a whole pass, in nats.
        """
        return self._gated(states, log_price, slice(None))

    def at(self, exit: int, states: Tensor, log_price: Tensor) -> Tensor:
        """[N] the same of one exit, counted from 0, from its states [N, d]."""
        return self._gated(states[:, None], log_price, slice(exit, exit + 1))[:, 0]

    def gates_at(self, price: float) -> "list[Gate]":
        """Every gate for one price of a whole pass, which is then a constant: asked in a few operations."""
        with torch.no_grad():
            biases = self.inner_bias + math.log(price) * self.inner[:, :, -1]
            inner = self.inner[:, :, :-1]
            return [
                Gate(inner[gate].contiguous(), biases[gate], self.outer[gate, None], self.outer_bias[gate, None])
                for gate in range(len(inner))
            ]

    def _gated(self, states: Tensor, log_price: Tensor, gates: slice) -> Tensor:
        normed = layer_norm(states.float(), (self.width,))
        prices = log_price[:, None, None].expand(-1, states.shape[1], 1)
        inner = (
            torch.einsum("ngi,ghi->ngh", torch.cat([normed, prices], -1), self.inner[gates]) + self.inner_bias[gates]
        )
        return (gelu(inner) * self.outer[gates]).sum(-1) + self.outer_bias[gates]


@dataclass(frozen=True, eq=False)
class Gate:
    """One exit's gate at one price; h its width."""

    inner: Tensor
    """[h, d]"""
    inner_bias: Tensor
    """[h]"""
    outer: Tensor
    """[1, h]"""
    outer_bias: Tensor
    """[1]"""

    def __call__(self, states: Tensor) -> Tensor:
        """[N] the logit of exiting, from states [N, d]."""
        normed = layer_norm(states.float(), (states.shape[-1],))
        return linear(gelu(linear(normed, self.inner, self.inner_bias)), self.outer, self.outer_bias)[:, 0]


def log_exit_probabilities(gates: Tensor) -> Tensor:
    """[N, E] log pi of every exit, from the gates' logits [N, E - 1]."""
    stay = logsigmoid(-gates).cumsum(1)
    reached = torch.cat([torch.zeros_like(stay[:, :1]), stay], 1)
    return reached + torch.cat([logsigmoid(gates), torch.zeros_like(stay[:, :1])], 1)


def priced(losses: Tensor, price: Tensor, times: Tensor, weights: Tensor | None = None) -> Tensor:
    """[N, E] what exiting anywhere costs: the loss there, and the time at its price.

    Args:
        losses: [N, E] nats.
        price: [N] of a whole pass, nats.
        times: [E] until each exit, as a share of a whole pass.
        weights: [N] how much an example's time counts, 1 unless given; see `hardness_weights`.
    """
    price = price if weights is None else price * weights
    return losses + price[:, None] * times


def exact_objective(gates: Tensor, costs: Tensor) -> Tensor:
    """The mean expected cost. Gradients flow to gates and costs: a head is trained as much as its exit is used.

    Args:
        gates: [N, E - 1] logits.
        costs: [N, E] of exiting at each exit.
    """
    return (log_exit_probabilities(gates).exp() * costs).sum(1).mean()


def reinforce_objective(gates: Tensor, costs: Tensor, generator: torch.Generator, *, samples: int = 8) -> Tensor:
    """A sampled surrogate whose mean gradient is that of `exact_objective` (ConsistentEE; Williams 1992).

    The baseline is the mean over an example's samples, which alone would make the gradient smaller by a factor of
    (samples - 1) / samples; that is put right.

    Args:
        gates: [N, E - 1] logits.
        costs: [N, E] of exiting at each exit.
        generator: draws the exits.
        samples: exits drawn for an example, two or more; they share its one forward pass.
    """
    log_pi = log_exit_probabilities(gates)
    exits = torch.multinomial(log_pi.detach().exp(), samples, replacement=True, generator=generator)
    taken = costs.gather(1, exits)
    advantage = (taken - taken.mean(1, keepdim=True)).detach() * samples / (samples - 1)
    return (advantage * log_pi.gather(1, exits)).mean() + taken.mean()


def hardness_weights(memorised: Tensor, solved: Tensor, n_layers: int, hardness: Hardness) -> Tensor:
    """[N] how much an example's time counts.

    - `none`: 1.
    - `memorized`: 1 - m / L, the paper's, with m = L where the last layer is wrong. What nothing solves has all the
      time it wants.
    - `solvable`: the same where the last layer is right, and 1 where it is wrong: no time is given to a lost cause.

    Args:
        memorised: [N] the layer from which on the label is predicted to the end, counted from 1; any where not solved.
        solved: [N] bool, whether the last layer predicts it.
        n_layers: L.
        hardness: which.
    """
    if hardness == "none":
        return torch.ones(len(memorised))
    weights = 1 - memorised.float() / n_layers
    return weights.where(solved, torch.tensor(0.0 if hardness == "memorized" else 1.0))
