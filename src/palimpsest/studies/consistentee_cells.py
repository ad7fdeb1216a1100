"""What the study of ConsistentEE measures of one seed: networks trained in stages, and every rule's way through each.

A decoder of six blocks learns the world of hops, at first one hop a block, as a pretrained network would bring along.
Then every head is trained at once (the paper's first stage). From there, networks go on for equally many steps: all
heads still at once ("matched"), or each only where the policy leaves, exactly or as the paper does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from palimpsest.early_exit.calibration import operating_points
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.encoder import Encoder
from palimpsest.early_exit.examples import Examples, encode_examples
from palimpsest.early_exit.exit_table import ExitTable
from palimpsest.early_exit.policy import Hardness, Policy
from palimpsest.early_exit.policy_training import Estimator, PolicySettings
from palimpsest.early_exit.rules import Confident, Fixed, Learned, Patience, Rule, exits_by, oracle, thresholds
from palimpsest.early_exit.training import ExitTraining, train_all_exits
from palimpsest.files import atomic_path
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.progress import console
from palimpsest.studies.cells import Cell, kept
from palimpsest.worlds.hops import NOISE, PLACES, Hop, HopsWorld

CELLS = ("matched", "exact", "consistentee")
WORLD = HopsWorld()
LAYERS = 6
SCALE = 0.3
"""Of the embeddings at first."""
BUDGETS = (1.5, 2.0, 2.5, 3.0)
"""Blocks an example, on average."""
PRICES = (0.06, 3.0)
"""Of a whole pass, nats: 0.01 to 0.5 a block."""
HOPS = ExitTraining(steps=1500, batch_size=128, learning_rate=1e-3, muon_learning_rate=0.02)
STAGE = ExitTraining(steps=250, batch_size=128, learning_rate=5e-4, muon_learning_rate=0.005)
WAYS: Mapping[str, tuple[Estimator, Hardness]] = {
    "exact": ("exact", "none"),
    "reinforce": ("reinforce", "none"),
    "memorized": ("exact", "memorized"),
    "solvable": ("exact", "solvable"),
}
"""How a policy is trained after the fact."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    pool: int = 40_000
    """Questions that networks are trained on."""
    policy: int = 12_000
    """Others, that policies are."""
    held_out: int = 4096
    """Others, that thresholds and prices are chosen on; as many tell how well those do."""
    policy_steps: int = 600
    width: int = 128
    hops: ExitTraining = HOPS
    """One hop a block."""
    all_exits: ExitTraining = STAGE
    """The paper's first stage."""
    further: ExitTraining = STAGE
    """What every network gets after that."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions, as the network reads them."""

    questions: list[Hop]
    examples: Examples


class Networks:
    """One seed's networks; what stands in the folder is not trained or measured again."""

    def __init__(self, seed: int, folder: Path, sizes: Sizes) -> None:
        self.seed, self.folder, self.sizes = seed, folder, sizes
        self.tokenizer = word_tokenizer(WORLD.vocabulary_texts())

    def measure(self, wanted: Sequence[str]) -> dict[str, Cell]:
        """The cell of each network that is wanted."""
        made: Mapping[str, Callable[[], Cell]] = {
            "matched": self._matched,
            "exact": lambda: self._joint("exact", "none"),
            "consistentee": lambda: self._joint("reinforce", "memorized"),
        }
        return {
            name: kept(self.folder / f"{name}.json", f"seed {self.seed}: {name}", make)
            for name, make in made.items()
            if name in wanted
        }

    @cached_property
    def pool(self) -> Asked:
        """What networks are trained on."""
        return self._asked(self.sizes.pool, "pool")

    @cached_property
    def for_policies(self) -> Asked:
        """What policies are trained on."""
        return self._asked(self.sizes.policy, "policy")

    @cached_property
    def held_out(self) -> tuple[Asked, Asked]:
        """To choose on, and to tell."""
        return self._asked(self.sizes.held_out, "choose"), self._asked(self.sizes.held_out, "tell")

    def first_stage(self) -> ExitClassifier:
        """A fresh copy of the network after the paper's first stage."""
        exits, path = self._new(), self.folder / "first_stage.safetensors"
        if not path.exists():
            console.print(f"seed {self.seed}: first stage", highlight=False)
            training = replace(self.sizes.hops, seed=self.seed)
            targets = _hop_by_hop(self.pool.questions)
            train_all_exits(
                exits.stack, exits.layers, exits.heads, self.pool.examples, training, weights="uniform", targets=targets
            )
            exits.fit_heads(self.pool.examples, replace(self.sizes.all_exits, seed=self.seed + 1000), train_model=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(_weights(exits), temporary)
        weights = load_file(path)
        exits.model.network.load_state_dict(_under("network.", weights), strict=False)
        exits.heads.load_state_dict(_under("heads.", weights))
        return exits

    def _new(self) -> ExitClassifier:
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.sizes.width,
            intermediate_size=2 * self.sizes.width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},  # where an edge stands tells nothing
        )
        network = LlamaForCausalLM(config)
        self._compose(network)
        encoder = Encoder(network, self.tokenizer, f"hops-{self.seed}")
        return ExitClassifier.of(encoder, tuple(PLACES), seed=self.seed)

    def _compose(self, network: LlamaForCausalLM) -> None:
        """Let each word's embedding begin as the sum of its letters', so that what they mean need not be learned."""
        generator = torch.Generator().manual_seed(self.seed)
        width, letters = self.sizes.width, f"{PLACES}{NOISE}{''.join(map(str, range(WORLD.most + 1)))}"
        first, second = (
            {letter: SCALE * torch.randn(width, generator=generator) for letter in letters} for _ in range(2)
        )
        embedding = network.get_input_embeddings().get_parameter("weight")
        with torch.no_grad():
            for word, token in self.tokenizer.get_vocab().items():
                if len(word := word.strip()) == 2:
                    embedding[token] = first[word[0]] + second[word[1]]

    def _matched(self) -> Cell:
        exits = self.first_stage()
        exits.fit_heads(self.pool.examples, replace(self.sizes.further, seed=self.seed + 2000), train_model=True)
        choose, tell = self._tables(exits)
        cell: Cell = {"full": tell.accuracy(exits_by(Fixed(), tell)), "by_exit": tell.right.float().mean(0).tolist()}
        for name in ("entropy", "max_probability", "margin"):
            rules = [Confident(name, threshold) for threshold in thresholds(name, choose)]  # type: ignore[arg-type]
            cell[name] = self._frontier(rules, choose, tell)
        cell["patience"] = self._frontier([Patience(times) for times in range(1, LAYERS)], choose, tell)
        cell["fixed"] = self._frontier([Fixed(exit) for exit in range(LAYERS)], choose, tell)
        for name, (estimator, hardness) in WAYS.items():
            exits.fit_policy(self.for_policies.examples, self._policy_settings(estimator, hardness))
            assert exits.policy is not None
            cell[name] = self._priced(exits.policy, choose, tell)
        lucky = oracle(tell)
        cell["oracle"] = {"layers": tell.mean_layers(lucky), "accuracy": tell.accuracy(lucky)}
        return cell

    def _joint(self, estimator: Estimator, hardness: Hardness) -> Cell:
        exits = self.first_stage()
        exits.fit_policy(self.for_policies.examples, self._policy_settings(estimator, hardness))
        exits.fit_joint(self.pool.examples, replace(self.sizes.further, seed=self.seed + 2000))
        choose, tell = self._tables(exits)
        assert exits.policy is not None
        rules = [Confident("entropy", threshold) for threshold in thresholds("entropy", choose)]
        return {
            "full": tell.accuracy(exits_by(Fixed(), tell)),
            "by_exit": tell.right.float().mean(0).tolist(),
            "policy": self._priced(exits.policy, choose, tell),
            "entropy": self._frontier(rules, choose, tell),
        }

    def _policy_settings(self, estimator: Estimator, hardness: Hardness) -> PolicySettings:
        return PolicySettings(
            estimator, hardness=hardness, prices=PRICES, steps=self.sizes.policy_steps, seed=self.seed
        )

    def _tables(self, exits: ExitClassifier) -> tuple[ExitTable, ExitTable]:
        choose, tell = (exits.table(asked.examples, batch_size=512) for asked in self.held_out)
        return choose, tell

    def _priced(self, policy: Policy, choose: ExitTable, tell: ExitTable) -> Cell:
        times = torch.arange(1, LAYERS + 1) / LAYERS
        points = operating_points(policy, choose, times, PRICES, 40)
        return self._frontier([Learned(policy, point.price) for point in points], choose, tell)

    def _frontier(self, rules: Sequence[Rule], choose: ExitTable, tell: ExitTable) -> Cell:
        """At each budget, and at one point below full accuracy, the rule that does best where it is chosen."""
        tried = [(rule, *_went(exits_by(rule, choose), choose)) for rule in rules]
        full = choose.accuracy(exits_by(Fixed(), choose))
        cell: Cell = {}
        for budget in BUDGETS:
            within = [(accuracy, rule) for rule, layers, accuracy in tried if layers <= budget]
            if within:
                cell[f"{budget:g}"] = self._told(max(within, key=lambda one: one[0])[1], tell)
        nearly = [(layers, rule) for rule, layers, accuracy in tried if accuracy >= full - 0.01]
        if nearly:
            cell["nearly full"] = self._told(min(nearly, key=lambda one: one[0])[1], tell)
        return cell

    def _told(self, rule: Rule, tell: ExitTable) -> Cell:
        exits = exits_by(rule, tell)
        layers, accuracy = _went(exits, tell)
        kinds = [question.hops for question in self.held_out[1].questions]
        by_kind = {}
        for kind in (*range(WORLD.most + 1), None):
            of_kind = torch.tensor([one == kind for one in kinds])
            by_kind["noise" if kind is None else f"{kind} hops"] = tell.mean_layers(exits[of_kind])
        return {"layers": layers, "accuracy": accuracy, "layers_by_kind": by_kind}

    def _asked(self, n: int, part: str) -> Asked:
        parts = ("pool", "policy", "choose", "tell")
        questions = WORLD.questions(n, self.seed * len(parts) + parts.index(part))
        texts, answers = [question.text for question in questions], [question.answer for question in questions]
        return Asked(questions, encode_examples(texts, answers, self.tokenizer, classes=tuple(PLACES)))


def _went(exits: Tensor, table: ExitTable) -> tuple[float, float]:
    return table.mean_layers(exits), table.accuracy(exits)


def _hop_by_hop(questions: Sequence[Hop]) -> Tensor:
    """[N, L] where as many hops lead as there are blocks before an exit, or all hops where those are fewer."""
    targets = []
    for question in questions:
        way = question.way or (question.answer,)
        targets.append([PLACES.index(way[min(exit, len(way) - 1)]) for exit in range(LAYERS)])
    return torch.tensor(targets)


def _weights(exits: ExitClassifier) -> dict[str, Tensor]:
    network = {f"network.{name}": value.detach().clone() for name, value in exits.model.network.named_parameters()}
    return network | {f"heads.{name}": value.detach().clone() for name, value in exits.heads.state_dict().items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
