"""What the study of implicit inference measures of one seed: networks that do regression in context, and their oracles.

Two networks learn a pool of tasks mixed with any others, and are then fine-tuned on the pool alone. The others come at
several scales (`scaled`) or at one (`unit`): only the first has ever met prompts whose labels were scaled. Two more
learn one prior alone and are watched on their way: any tasks (`continuous`), and a pool that is larger (`pool`). Every
loss is the mean squared distance from the label without its noise, on prompts whose tasks are of unit scale.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.files import atomic_path, content_hash
from palimpsest.models.regression_transformer import (
    RegressionArchitecture,
    RegressionTransformer,
    predict_regression,
    train_regression,
)
from palimpsest.models.training import TrainingSettings
from palimpsest.progress import progress
from palimpsest.studies.cells import Cell, kept
from palimpsest.worlds.regression import (
    Discrete,
    Gaussian,
    Mixture,
    Prompts,
    ScaleMixture,
    TaskPrior,
    sample_prompts,
)
from palimpsest.worlds.regression_oracles import bayes
from palimpsest.worlds.task_inference import alpha_eff, g_hat

Mixed = Literal["scaled", "unit"]
MIXED: tuple[Mixed, ...] = ("scaled", "unit")
ALONE = ("continuous", "pool")
CELLS = (*MIXED, *ALONE)
"""What is measured, by the names of the files that keep it."""
BANDS = 5
"""Of prompts by how far their task is from the pool's nearest, each with as many."""
LOOKS = 16
"""How often a network that learns one prior alone is watched."""


@dataclass(frozen=True)
class Setting:
    """The sizes of a study."""

    architecture: RegressionArchitecture
    tasks: int
    """In the pool."""
    alone_tasks: int
    """In the larger pool, which one network learns alone."""
    noise: float
    pretraining: TrainingSettings
    alone: TrainingSettings
    """Of the networks that learn one prior."""
    finetuning: TrainingSettings
    checkpoints: tuple[int, ...]
    """Steps of fine-tuning after which a network is measured; the last is the end."""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0)
    alpha: float = 0.5
    """The pool's share in pretraining."""
    annealed: float = 0.25
    """The part of pretraining in which the pool's share falls from 1 to alpha: a pool teaches regression sooner."""
    gammas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    """By what labels are multiplied; 1 leaves the prompt as it is, and below 1 nothing is taken out of the pool's
    reach."""
    prompts: int = 1000
    """Of each kind that losses are taken over."""


def _training(steps: int, learning_rate: float, batch_size: int = 64) -> TrainingSettings:
    return TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup=200,
        schedule="cosine",
    )


def _finetuning(steps: int, learning_rate: float) -> TrainingSettings:
    return replace(_training(steps, learning_rate), warmup=0, schedule="constant")


SETTINGS: Mapping[str, Setting] = {
    "demo": Setting(
        architecture=RegressionArchitecture(dim=2, points=9, layers=3),
        tasks=4,
        alone_tasks=8,
        noise=0.25,
        pretraining=_training(2000, 1.5e-3),
        alone=_training(600, 1.5e-3),
        finetuning=_finetuning(400, 1e-4),
        checkpoints=(25, 100, 400),
    ),
    "paper": Setting(
        architecture=RegressionArchitecture(dim=20, points=41, layers=12, width=256, heads=8),
        tasks=64,
        alone_tasks=256,
        noise=1.0,
        pretraining=_training(50_000, 3e-4),
        alone=_training(20_000, 3e-4),
        finetuning=_finetuning(1600, 1e-4),
        checkpoints=(25, 100, 400, 1600),
    ),
}
"""`demo` is as small as shows the effect, for one core. `paper` has the paper's dimension, noise and pool and its 9.5 M
parameters, and is for a GPU; the paper does not tell its numbers of steps, so these are ours."""


class Bench:
    """Measures one seed's networks; what stands in its folder is not measured again.

    Args:
        setting: the sizes.
        seed: of the tasks, the prompts and the weights.
        folder: of this seed.
        device: where networks are, the GPU when there is one; oracles stay on the CPU.
    """

    def __init__(self, setting: Setting, seed: int, folder: Path, device: str | None = None) -> None:
        self.setting, self.seed, self.folder = setting, seed, folder
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def measure(self, wanted: Sequence[str]) -> dict[str, Cell]:
        """The cell of each network that is wanted."""
        work: dict[str, Callable[[], Cell]] = {
            **{name: partial(self._mixed, name) for name in MIXED},
            "continuous": partial(self._alone, "continuous", self.unit),
            "pool": partial(
                self._alone, "pool", Discrete.drawn(self.setting.alone_tasks, self.dim, self._seed("pool"))
            ),
        }
        return {
            name: kept(self.folder / f"{name}.json", f"seed {self.seed}: {name}", make)
            for name, make in work.items()
            if name in wanted
        }

    @property
    def dim(self) -> int:
        """Of x."""
        return self.setting.architecture.dim

    @cached_property
    def pool(self) -> Discrete:
        """The tasks that fine-tuning is about."""
        return Discrete.drawn(self.setting.tasks, self.dim, self._seed("pool"))

    @property
    def unit(self) -> Gaussian:
        """Any task at unit scale."""
        return Gaussian(self.dim)

    @cached_property
    def evaluated(self) -> dict[str, Prompts]:
        """Prompts that no training sees: of any tasks, and of the pool's."""
        return {
            name: self._prompts(prior, f"evaluated/{name}")
            for name, prior in (("continuous", self.unit), ("discrete", self.pool))
        }

    def _mixed(self, name: Mixed) -> Cell:
        continuous = ScaleMixture(self.dim, self.setting.scales) if name == "scaled" else self.unit
        prior = Mixture(self.pool, continuous, self.setting.alpha)
        base = self._pretrained(name, prior)
        tuned, checkpoints = copy.deepcopy(base), {"0": self._measured(base, prior)}

        def look(step: int) -> None:
            if step in self.setting.checkpoints:
                checkpoints[str(step)] = self._measured(tuned, prior)

        self._train(tuned, lambda _: self.pool, self.setting.finetuning, f"{name}, fine-tuned", look)
        return {"oracles": self._oracles(prior), "by_steps": checkpoints}

    def _pretrained(self, name: Mixed, prior: Mixture) -> RegressionTransformer:
        """From the folder, or trained now on a mixture whose pool has all the share at first."""
        settings, alpha = self.setting.pretraining, self.setting.alpha
        falling = self.setting.annealed * (settings.steps or 0)

        def prior_at(step: int) -> Mixture:
            return prior.at(max(alpha, 1 - (1 - alpha) * step / falling) if falling else alpha)

        network, path = self._new(), self.folder / f"{name}.safetensors"
        if path.exists():
            network.load_state_dict(load_file(path, device=self.device))
            return network.eval()
        self._train(network, prior_at, settings, f"{name}, pretrained", None)
        with atomic_path(path) as temporary:
            save_file(network.state_dict(), temporary)
        return network

    def _measured(self, network: RegressionTransformer, prior: Mixture) -> Cell:
        """Losses by what labels are multiplied by, and what the network seems to infer of unscaled prompts."""
        any_task, pools = self.evaluated["continuous"], self.evaluated["discrete"]
        scaled = {
            gamma: predict_regression(network, any_task.x, any_task.y, scale=gamma) for gamma in self.setting.gammas
        }
        of_pool = predict_regression(network, pools.x, pools.y)
        return {
            "continuous": {f"{gamma:g}": self._loss(any_task, predictions) for gamma, predictions in scaled.items()},
            "discrete": self._loss(pools, of_pool),
            "bands": self._by_distance(any_task, scaled[1.0]),
            "inferred": {
                "continuous": self._inferred(any_task, scaled[1.0], prior),
                "discrete": self._inferred(pools, of_pool, prior),
            },
        }

    def _loss(self, prompts: Prompts, predictions: Tensor) -> Cell:
        """The mean over all places, and over those that have seen as many pairs as a task has weights."""
        errors = prompts.squared_errors(predictions)
        return {"all": errors.mean().item(), "late": errors[:, self.dim :].mean().item()}

    def _by_distance(self, prompts: Prompts, predictions: Tensor) -> list[float]:
        """Late loss in bands, from the tasks nearest to one of the pool to those farthest."""
        order = torch.cdist(prompts.weights, self.pool.pool).min(1).values.argsort(stable=True)
        errors = prompts.squared_errors(predictions)[:, self.dim :].mean(1)
        return [band.mean().item() for band in errors[order].tensor_split(BANDS)]

    def _inferred(self, prompts: Prompts, predictions: Tensor, prior: Mixture) -> Cell:
        """Of late places: how discrete the predictions are, and the prior that explains them best."""
        told = (prompts.x, prompts.y, self.setting.noise)
        sides = (bayes(part, *told)[:, self.dim :] for part in (prior.discrete, prior.continuous))
        nearest = alpha_eff(predictions, prior, *told, first=self.dim)
        return {"g_hat": g_hat(predictions[:, self.dim :], *sides), **asdict(nearest)}

    def _oracles(self, prior: Mixture) -> Cell:
        """What the best predictors cost on the same prompts; the mixture's also where labels are scaled."""
        noise, told = self.setting.noise, {}
        oracles: dict[str, TaskPrior] = {"ridge": self.unit, "pool": self.pool, "mixture": prior}
        for name, prompts in self.evaluated.items():
            told[name] = {
                oracle: self._loss(prompts, bayes(of, prompts.x, prompts.y, noise)) for oracle, of in oracles.items()
            }
        any_task = self.evaluated["continuous"]
        told["scaled"] = {
            f"{gamma:g}": self._loss(any_task, bayes(prior, any_task.x, gamma * any_task.y, noise) / gamma)
            for gamma in self.setting.gammas
        }
        return told

    def _alone(self, name: str, prior: Discrete | Gaussian) -> Cell:
        """A network that learns one prior, watched on its way."""
        network, curve = self._new(), {}
        watched = {
            "continuous": (self.evaluated["continuous"], self.unit),
            "own": (self._prompts(prior, f"evaluated/{name}/own"), prior),
        }
        every = max(1, (self.setting.alone.steps or 0) // LOOKS)

        def look(step: int) -> None:
            if step % every == 0:
                curve[str(step)] = {
                    kind: self._loss(prompts, predict_regression(network, prompts.x, prompts.y))["all"]
                    for kind, (prompts, _) in watched.items()
                }

        self._train(network, lambda _: prior, self.setting.alone, f"{name} alone", look)
        oracles = {
            kind: self._loss(prompts, bayes(best, prompts.x, prompts.y, self.setting.noise))["all"]
            for kind, (prompts, best) in watched.items()
        }
        return {"curve": curve, "oracles": oracles}

    def _train(
        self,
        network: RegressionTransformer,
        prior_at: Callable[[int], TaskPrior],
        settings: TrainingSettings,
        what: str,
        look: Callable[[int], None] | None,
    ) -> None:
        """New prompts at every step, each drawn by seed, stage and step alone.

        A network that is watched on its way keeps no checkpoint: what was seen would be lost with the process.
        """
        points, noise = self.setting.architecture.points, self.setting.noise
        stage = self._seed(what)

        def batch_at(step: int) -> tuple[Tensor, Tensor]:
            drawn = sample_prompts(prior_at(step), settings.batch_size, points, noise, stage + step)
            return drawn.x, drawn.y

        with progress() as display:
            shown = display.add_task(f"seed {self.seed}: {what}", total=settings.steps, note="")
            train_regression(
                network,
                batch_at,
                settings,
                checkpoint=None if look else self.folder / f"{what}.checkpoint",
                identity=f"{self.seed}: {what}",
                report=lambda step, _, note: display.update(shown, completed=step, note=note),
                after_step=look,
            )

    def _new(self) -> RegressionTransformer:
        return RegressionTransformer(self.setting.architecture, self.seed).to(self.device)

    def _prompts(self, prior: TaskPrior, what: str) -> Prompts:
        setting = self.setting
        return sample_prompts(prior, setting.prompts, setting.architecture.points, setting.noise, self._seed(what))

    def _seed(self, what: str) -> int:
        """A seed for one purpose, so far from every other's that steps may be counted on from it."""
        return int(content_hash([self.seed, what])[:12], 16)
