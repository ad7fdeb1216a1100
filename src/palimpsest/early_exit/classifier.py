"""A classifier that answers as soon as it can: heads at some layers of any model, a learned policy, one promise kept.

The order that works: heads on the frozen network, the policy on examples that the heads have not seen, the price on
examples that neither has seen. Each takes seconds once the network has gone over the examples; the network itself is
only trained where `fit_joint` is asked for.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.early_exit.calibration import OperatingPoint, calibrated, operating_points
from palimpsest.early_exit.classification import Classified, classify
from palimpsest.early_exit.encoder import Encoder
from palimpsest.early_exit.examples import Examples
from palimpsest.early_exit.exit_table import ExitTable, exit_states, tabulated
from palimpsest.early_exit.exits_folder import save_exits, saved_exits
from palimpsest.early_exit.heads import ClassHeads
from palimpsest.early_exit.policy import Policy, hardness_weights
from palimpsest.early_exit.policy_training import Observations, PolicySettings, fit_policy
from palimpsest.early_exit.rules import Learned, Rule
from palimpsest.early_exit.stack import Stack
from palimpsest.early_exit.training import ExitTraining, fit_heads_on_states, train_all_exits, train_taken_exits
from palimpsest.errors import SpecError
from palimpsest.lens.depth import DepthTable, depth_table
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Report

NAME = "exits"
"""Of its files."""

CONSISTENTEE = PolicySettings(estimator="reinforce", hardness="memorized", prices=(0.72, 0.72))
"""As in Zeng et al. 2024 (arXiv 2312.11882): one price (0.12 a layer of 6 in our measurements), sampled, and time free
of charge for what is memorised late."""


@dataclass(eq=False)
class ExitClassifier:
    """Exits of one model: what they say, whether to take them, and at which price of time."""

    model: LanguageModel | Encoder
    stack: Stack
    layers: tuple[int, ...]
    """After how many blocks each exit stands; the last is the whole network."""
    heads: ClassHeads
    classes: tuple[str, ...]
    policy: Policy | None = None
    settings: PolicySettings | None = None
    """What the policy was trained with."""
    times: Tensor | None = None
    """[E] until each exit, as a share of a whole pass; what the policy was trained with."""
    point: OperatingPoint | None = None
    """Where it was calibrated to run."""

    @staticmethod
    def of(
        model: LanguageModel | Encoder, classes: Sequence[str], layers: Sequence[int] | None = None, *, seed: int = 0
    ) -> "ExitClassifier":
        """Exits that have learned nothing yet.

        Args:
            model: a causal model, whose heads read the last token, or an encoder, whose heads read the first.
            classes: their names.
            layers: after how many blocks the exits stand; after each, when none are named. The last block always has
                one.
            seed: of the heads.

        Raises:
            ModelError: an architecture that early exit does not know.
            SpecError: a layer that the model does not have, or fewer than two classes.
        """
        stack = Stack.of(model.network)
        wanted = sorted({*(layers or range(1, stack.n_layers + 1)), stack.n_layers})
        if not 1 <= wanted[0] <= wanted[-1] == stack.n_layers:
            raise SpecError(f"early exit: exits after {wanted}; this model has blocks 1 to {stack.n_layers}")
        if len(classes) < 2:
            raise SpecError(f"early exit: {len(classes)} class; there must be two or more to tell apart")
        heads = ClassHeads(len(wanted), stack.d_model, len(classes), seed=seed).to(model.network.device)
        return ExitClassifier(model, stack, tuple(wanted), heads, tuple(classes))

    def fit_heads(
        self,
        examples: Examples,
        settings: ExitTraining | None = None,
        *,
        train_model: bool = False,
        report: Report | None = None,
    ) -> "ExitClassifier":
        """Train the heads; the network stays as it is, unless `train_model` lets the weighted sum train it too.

        Args:
            examples: labelled.
            settings: how.
            train_model: ConsistentEE's first stage: network and heads, later exits counting more. In place.
            report: told (done, of how many, a note).
        """
        settings = settings or ExitTraining()
        if train_model:
            train_all_exits(self.stack, self.layers, self.heads, examples, settings, report=report)
        else:
            states = exit_states(self.stack, self.layers, examples, report=report)
            fit_heads_on_states(states.to(self.model.network.device), examples.labels, self.heads, settings)
        self.policy = self.point = None
        return self

    def table(self, examples: Examples, *, batch_size: int = 64, report: Report | None = None) -> ExitTable:
        """What every exit says of every example."""
        states = exit_states(self.stack, self.layers, examples, batch_size=batch_size, report=report)
        return tabulated(self.layers, states, self.heads, examples.labels)

    def depth(self, examples: Examples) -> DepthTable:
        """How deep each example is decided, in blocks; see `lens/depth`."""
        table = self.table(examples)
        return depth_table(table.right, table.said == table.said[:, -1:], table.layers)

    def fit_policy(
        self,
        examples: Examples,
        settings: PolicySettings | None = None,
        *,
        times: Sequence[float] | None = None,
        report: Report | None = None,
    ) -> "ExitClassifier":
        """Train the policy, on what the exits say of these examples.

        Args:
            examples: labelled, and others than the heads were trained on.
            settings: how; `CONSISTENTEE` is the paper's way.
            times: [E] milliseconds until each exit (see `bench`), to let time cost what it does; layers when not given.
            report: told (done, of how many, a note).

        Raises:
            SpecError: the last block has the only exit, or times are not as many as the exits.
            TrainingError: a state or a loss that is not finite.
        """
        if len(self.layers) == 1:
            raise SpecError(
                f"early exit: the only exit is after all {self.layers[0]} blocks, so there is nothing to decide; name "
                "an earlier one too"
            )
        settings = settings or PolicySettings()
        table = self.table(examples)
        spent = torch.tensor([float(value) for value in times or self.layers])
        if len(spent) != len(self.layers):
            raise SpecError(f"early exit: {len(spent)} times for {len(self.layers)} exits; give one for each")
        self.times = spent / spent[-1]
        seen = Observations(table.states, table.losses, self.times, self._weights(table, settings))
        self.policy, self.settings = fit_policy(seen, settings, report=report), settings
        self.point = None
        return self

    def fit_joint(
        self, examples: Examples, settings: ExitTraining | None = None, *, report: Report | None = None
    ) -> "ExitClassifier":
        """ConsistentEE's third stage: network, heads and policy together, with the policy's settings. In place.

        Raises:
            SpecError: there is no policy yet.
        """
        policy, policy_settings, times = self._fitted()
        weights = self._weights(self.table(examples), policy_settings)
        settings = settings or ExitTraining(learning_rate=3e-5)
        train_taken_exits(
            self.stack, self.layers, self.heads, policy, examples, times, settings, policy_settings,
            hardness=weights, report=report,
        )  # fmt: skip
        self.point = None
        return self

    def operating_points(self, examples: Examples, n: int = 25) -> list[OperatingPoint]:
        """Accuracy and time at so many prices, on held-out examples.

        Raises:
            SpecError: there is no policy yet.
        """
        policy, settings, times = self._fitted()
        return operating_points(policy, self.table(examples), times, settings.prices, n)

    def calibrate(
        self,
        examples: Examples,
        *,
        max_drop: float | None = None,
        target_layers: float | None = None,
        target_time: float | None = None,
    ) -> OperatingPoint:
        """Choose the price to run at; see `calibration.calibrated` for the three promises and the errors.

        Args:
            examples: that neither heads nor policy were trained on.
            max_drop: accuracy that may be lost, with 95 % confidence.
            target_layers: blocks an example at most.
            target_time: share of a whole pass's time at most.
        """
        points = self.operating_points(examples)
        self.point = calibrated(points, max_drop=max_drop, target_layers=target_layers, target_time=target_time)
        return self.point

    @property
    def rule(self) -> Rule:
        """The policy at the price that it was calibrated to.

        Raises:
            SpecError: it is not calibrated.
        """
        policy, _, _ = self._fitted()
        if self.point is None:
            raise SpecError("early exit: no price is chosen yet; call calibrate with held-out examples first")
        return Learned(policy, self.point.price)

    def only_last(self) -> "ExitClassifier":
        """The same network and last head, with no other exit."""
        whole = ExitClassifier.of(self.model, self.classes, self.layers[-1:])
        whole.heads.norms[0], whole.heads.maps[0] = self.heads.norms[-1], self.heads.maps[-1]
        return whole

    def classify(
        self, rows: Sequence[Encoded], *, rule: Rule | None = None, batch_size: int = 16, compact: bool = True
    ) -> Classified:
        """Classify rows, each as deep as it needs; `Fixed()` is the rule that never leaves early.

        Args:
            rows: token rows; see `encode_texts`.
            rule: the calibrated policy unless another is given.
            batch_size: rows at a time; it does not change what is said.
            compact: let rows leave the batch.
        """
        rule = rule or self.rule
        return classify(self.stack, self.layers, self.heads, rule, rows, batch_size=batch_size, compact=compact)

    def save(self, folder: str | Path) -> Path:
        """Write heads, policy and operating point as safetensors and JSON, whole or not at all; the model is not in it.

        Raises:
            StorageError: the folder holds other files, or cannot be written.
        """
        tensors = {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        if self.policy is not None and self.times is not None:
            tensors |= {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
            tensors["times"] = self.times
        about: dict[str, Any] = {
            "layers": self.layers,
            "classes": self.classes,
            "settings": asdict(self.settings) if self.settings else None,
            "point": asdict(self.point) if self.point else None,
        }
        return save_exits(folder, NAME, self.model, about, tensors)

    @staticmethod
    def load(folder: str | Path, model: LanguageModel | Encoder) -> "ExitClassifier":
        """Read what `save` wrote, for the model that it was made for.

        Raises:
            ModelError: there is nothing of ours, it is damaged, or the model is another.
        """
        with saved_exits(folder, NAME, model, made_by="palimpsest exit fit") as (about, tensors):
            exits = ExitClassifier.of(model, about["classes"], about["layers"])
            exits.heads.load_state_dict(_under("heads.", tensors))
            if about["settings"]:
                settings = about["settings"] | {"prices": tuple(about["settings"]["prices"])}
                exits.settings, exits.times = PolicySettings(**settings), tensors["times"]
                exits.policy = Policy(len(exits.layers), exits.stack.d_model)
                exits.policy.load_state_dict(_under("policy.", tensors))
                exits.policy.requires_grad_(False).eval()
            exits.point = OperatingPoint(**about["point"]) if about["point"] else None
        return exits

    def _fitted(self) -> tuple[Policy, PolicySettings, Tensor]:
        if self.policy is None or self.settings is None or self.times is None:
            raise SpecError("early exit: there is no policy yet; call fit_policy first")
        return self.policy, self.settings, self.times

    def _weights(self, table: ExitTable, settings: PolicySettings) -> Tensor:
        depth = depth_table(table.right, table.said == table.said[:, -1:], table.layers)
        return hardness_weights(depth.memorised, table.right[:, -1], self.stack.n_layers, settings.hardness)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
