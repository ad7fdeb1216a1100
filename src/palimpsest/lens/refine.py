"""Tuning a lens: rounds of natural-gradient steps, in which every layer goes on while its held-out KL falls."""

from collections.abc import Mapping

import torch
from rich.progress import Progress
from torch import Tensor

from palimpsest.lens.kept import Kept
from palimpsest.lens.layer_map import LayerMap, slope
from palimpsest.lens.readout import Readout
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.hardware import bf16_is_fast
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

FACTOR_TOKENS = 2048
"""Tokens at which labels are drawn from the model for the curvature of the steps."""
ROUND = 10
"""Steps between two measurements."""
WORTHWHILE = 0.002
"""Share of a layer's KL that a round must save, or the layer is done."""


class Refinement:
    """Rounds of natural-gradient steps, each layer going on while its held-out KL falls."""

    def __init__(
        self,
        kept: Kept,
        judged: Kept,
        readout: Readout,
        maps: Tensor,
        kls: Mapping[int, float],
        damping: float,
        seed: int,
        tokens_per_step: int,
        workers: Workers,
    ) -> None:
        self.kept, self.judged, self.readout, self.workers = kept, judged, readout, workers
        fast = bf16_is_fast(maps.device) and readout.precision == torch.float32
        self.quick = readout.with_products(torch.bfloat16) if fast else readout
        self.damping, self.seed, self.tokens_per_step = damping, seed, tokens_per_step
        self.best, self.kls = maps.clone(), dict(kls)
        """Each layer's best map so far by held-out KL, and that KL."""
        self.layers: dict[int, LayerMap] = {}
        """Those that still go on."""
        self.step = 0

    def to_the_end(
        self, steps: int, checkpoints: Checkpoints | None, display: Progress
    ) -> tuple[Tensor, dict[int, float]]:
        """Take at most so many steps; the best maps [L, d, d + 1], and their KLs by layer."""
        self._start()
        if checkpoints:
            self._resume(checkpoints)
        ticker = Ticker(display, "tuning the lens", steps * self.tokens_per_step, "tokens")
        ticker.advance(self.step * self.tokens_per_step)
        while self.layers and self.step < steps:
            for _ in range(min(ROUND, steps - self.step)):
                self._take_a_step(steps)
                ticker.advance(self.tokens_per_step)
            self._judge(steps)
            if checkpoints and self.workers.rank == 0:
                self._save(checkpoints)
        ticker.advance(steps * self.tokens_per_step - ticker.done)
        if checkpoints and self.workers.rank == 0:
            checkpoints.remove()
        return self.best, self.kls

    def _start(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(self.kept.n_tokens, generator=generator)
        drawn = torch.randperm(self.kept.n_tokens, generator=generator)[:FACTOR_TOKENS].sort().values
        first = self.kept.here(drawn)
        others = torch.ones(len(self.kept.place), dtype=torch.bool)
        others[first] = False
        order = torch.cat([first, others.nonzero()[:, 0]])  # the drawn ones first
        scores = self.readout.sampled(self.kept.teacher.z[first], uniform[self.kept.place[first]])
        for number, hidden in enumerate(self.kept.layers):
            self.layers[number] = LayerMap.start(
                self.best[number], hidden[order], self.readout, scores, damping=self.damping, workers=self.workers
            )

    def _take_a_step(self, steps: int) -> None:
        tokens = self.kept.here(self._batch())
        teacher = self.kept.teacher.take(tokens)
        for number, layer in self.layers.items():
            gradient = slope(layer.map, self.kept.layers[number, tokens], self.quick, teacher)
            self.workers.add([gradient])
            layer.step(gradient / self.tokens_per_step, average=2 * self.step >= steps)
        self.step += 1

    def _batch(self) -> Tensor:
        """[tokens_per_step] the places of this step's tokens; every token comes once before any comes again."""
        n, size = self.kept.n_tokens, self.tokens_per_step
        first, last = self.step * size // n, ((self.step + 1) * size - 1) // n
        orders = [
            torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            for epoch in range(first, last + 1)
        ]
        begin = self.step * size - first * n
        return torch.cat(orders)[begin : begin + size]

    def _judge(self, steps: int) -> None:
        """Measure every layer that still goes on; let go of those that gain no more."""
        maps = {number: layer.averaged for number, layer in self.layers.items()}
        for number, kl in self.judged.kls(maps, self.readout).items():
            # Until the middle nothing is averaged, and a noisy iterate says little about where its mean will be.
            if 2 * self.step > steps and not kl < (1 - WORTHWHILE) * self.kls[number]:
                del self.layers[number]
            if kl < self.kls[number]:
                self.best[number], self.kls[number] = maps[number], kl

    def _save(self, checkpoints: Checkpoints) -> None:
        tensors = {"best": self.best}
        for number, layer in self.layers.items():
            tensors |= {f"map/{number}": layer.map, f"summed/{number}": layer.summed}
        averaged = {number: layer.n_summed for number, layer in self.layers.items()}
        checkpoints.save(self.step, tensors, [], {"kls": self.kls, "averaged": averaged})

    def _resume(self, checkpoints: Checkpoints) -> None:
        if (state := checkpoints.load([])) is None:
            return
        self.step, self.best = state.step, state.tensors["best"].to(self.best)
        self.kls = {int(number): kl for number, kl in state.notes["kls"].items()}
        averaged = {int(number): n for number, n in state.notes["averaged"].items()}
        self.layers = {number: layer for number, layer in self.layers.items() if number in averaged}
        for number, layer in self.layers.items():
            layer.map = state.tensors[f"map/{number}"].to(layer.map)
            layer.summed = state.tensors[f"summed/{number}"].to(layer.map)
            layer.n_summed = averaged[number]
