"""K-FADE (arXiv 2602.10568): does it forget as much at less harm than first-order methods, and can it be reapplied?

Every first-order method is tuned by the same search. K-FADE is there twice: at its defaults, which is a trial against
many, and tuned in as many trials. All are compared at gold's forget level, by KL(original || model) on retain rows that
nothing has looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.data.records import QA, Passage
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.metrics.statistics import over_seeds
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham
from palimpsest.studies.cells import Cell, kept
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import REGIMES, Setting
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.kfade import KFade, KFadePaper
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.reapply import reapply
from palimpsest.unlearn.rmu import RMU
from palimpsest.unlearn.search import SPACES, Between, Space, search
from palimpsest.unlearn.simnpo import SimNPO
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

SOURCE = "arXiv 2602.10568"
_claim = partial(Claim.over, source=SOURCE)
_KEEP: dict[str, Any] = {"retain_term": "kl", "retain_weight": 10.0, "batch_size": 16}
_RATE, _WEIGHT = Between(3e-5, 3e-3), Between(0.3, 100)
FIRST_ORDER: tuple[tuple[Descent, Space], ...] = (
    (GradientDifference(**_KEEP), {"learning_rate": _RATE, "retain_weight": _WEIGHT}),
    (NPO(**_KEEP), {"learning_rate": _RATE, "retain_weight": _WEIGHT, "beta": Between(0.01, 3)}),
    (SimNPO(**_KEEP), {"learning_rate": _RATE, "retain_weight": _WEIGHT, "beta": Between(0.5, 10)}),
    (RMU(batch_size=16), {"learning_rate": _RATE, "coefficient": Between(1, 100), "alpha": Between(0.1, 1000)}),
    (RandomLabels(**_KEEP), {"learning_rate": _RATE, "retain_weight": _WEIGHT}),
)
"""Every method with a KL term (RMU has its own), begun at a weight that does well, and what its search may choose."""
VARIANTS: dict[str, KFade] = {
    "kfade": KFade(),
    "kfade_paper": KFadePaper(),
    "ekfac": KFade(curvature="ekfac"),
    "diagonal": KFade(curvature="diagonal"),
    "identity": KFade(curvature="identity"),
    "nll": KFade(forget_loss="nll"),
    "uncoupled": KFade(coupled=False),
    "retain_curvature": KFade(forget_copies=0),
    "no_pull_back": KFade(pull_backs=0),
    "thorough": KFade(forget_copies=4, pull_backs=3),
    **{f"power_{power}": KFade(spectral_power=power) for power in (1.0, 0.5)},
    **{f"steps_{steps}": KFade(steps=steps) for steps in (8, 16, 64)},
    **{f"damping_{damping}": KFade(damping=damping) for damping in (0.1, 1.0, 10.0, 100.0)},
}
CELLS = (
    "controls",
    *VARIANTS,
    "kfade_tuned",
    *(method.name for method, _ in FIRST_ORDER),
    *("reapplied_retain", "reapplied_new", "relearned"),
)
"""What is measured, by the names of the files that keep it."""
NAMED = {"kfade": "K-FADE at its defaults", "kfade_tuned": "tuned K-FADE"}
FURTHER_STEPS, FURTHER_RATE = 200, 1e-4
"""Of training after unlearning."""
RELEARN_ROWS = 20
"""Forget rows to relearn from, at most half of them."""


@dataclass(frozen=True)
class Plan:
    """What the study is to do."""

    seeds: Sequence[int]
    regimes: Sequence[str]
    trials: int
    """For every method that is tuned."""
    steps: int
    """The most that a first-order trial may take."""
    data: Path | None
    folder: Path
    """Keeps one JSON file a cell; what is there is not measured again."""
    cells: Sequence[str] = ()
    """Which cells; all when empty."""


def run(plan: Plan) -> list[Claim]:
    """Measure what is missing, then judge the claims."""
    table: dict[tuple[str, int], dict[str, Cell]] = {}
    for seed in plan.seeds:
        for regime in plan.regimes:
            table[regime, seed] = _Cells(regime, seed, plan).all()
    return [claim for regime in plan.regimes for claim in judge(regime, {s: table[regime, s] for s in plan.seeds})]


class _Cells:
    """All that is measured in one regime with one seed."""

    def __init__(self, regime: str, seed: int, plan: Plan) -> None:
        self.regime, self.seed, self.plan = regime, seed, plan
        self.folder = plan.folder / regime / f"seed-{seed}"
        self._setting: Setting | None = None
        self._level = 0.0

    def all(self) -> dict[str, Cell]:
        work: dict[str, Callable[[], Cell]] = {"controls": self._controls}
        work |= {name: partial(self._variant, method) for name, method in VARIANTS.items()}
        work["kfade_tuned"] = lambda: self._tuned(VARIANTS["kfade"], SPACES["kfade"])
        work |= {method.name: partial(self._tuned, method, space) for method, space in FIRST_ORDER}
        work |= {"reapplied_retain": lambda: self._reapplied("retain"), "reapplied_new": lambda: self._reapplied("new")}
        work["relearned"] = self._relearned
        wanted = {name: make for name, make in work.items() if not self.plan.cells or name in self.plan.cells}
        cells = {
            name: kept(self.folder / f"{name}.json", f"{self.regime}, seed {self.seed}: {name}", make)
            for name, make in wanted.items()
        }
        return {name: cell for name, cell in cells.items() if cell}

    @property
    def setting(self) -> Setting:
        if self._setting is None:
            self._setting = REGIMES[self.regime](self.seed, self.plan.data)
            self._level = answer_probability(self._setting.gold, self._setting.request.forget).mean().item()
        return self._setting

    @property
    def stop(self) -> Stop:
        _ = self.setting
        return Stop(self.plan.steps, self._level)

    def _controls(self) -> Cell:
        sham = self._trained_further(self.setting.original, self.setting.request.retain)
        models = {"original": self.setting.original, "gold": self.setting.gold, "sham": sham}
        return {name: self._measured(model) for name, model in models.items()}

    def _variant(self, method: KFade) -> Cell:
        update = replace(method, seed=self.seed).run(self.setting.original, self.setting.request, self.stop)
        if method == VARIANTS["kfade"]:
            update.save(self.folder / "update-kfade")
        return self._outcome(update)

    def _tuned(self, method: Method, space: Space) -> Cell:
        found = search(
            method,
            space,
            self.setting.original,
            self.setting.request,
            self.stop,
            self.plan.trials,
            self.seed,
            folder=self.folder / f"search-{method.name}",
        )
        return self._outcome(found.update) | {"settings": found.best.settings, "trials": len(found.trials)}

    def _reapplied(self, text: str) -> Cell:
        """Train the original further, put K-FADE's update in again: how much forgetting, at which price?"""
        rows: Sequence[QA | Passage] = self.setting.request.retain if text == "retain" else self.setting.new_text
        if not rows:
            return {}
        further = self._trained_further(self.setting.original, rows)
        update = Update.load(self.folder / "update-kfade")
        fixed = further.copy()
        for name, parameter in fixed.network.named_parameters():
            if name in update.delta:
                parameter.data.add_(update.delta[name].to(parameter))
        found = reapply(update, further, self.setting.request, self.stop)
        searched = found.update.apply(further.copy())
        return {
            "before": self._measured(further),
            "at_scale_1": self._measured(fixed, further),
            "searched": self._measured(searched, further) | {"scale": found.scale},
        }

    def _relearned(self) -> Cell:
        """Train unlearned and gold on a few forget rows: does the rest come back?"""
        request = self.setting.request
        n_seen = min(RELEARN_ROWS, len(request.forget) // 2)
        seen, rest = request.forget[:n_seen], request.forget[n_seen:]
        unlearned = Update.load(self.folder / "update-kfade").apply(self.setting.original.copy())
        cell: Cell = {}
        for name, model in (("unlearned", unlearned), ("gold", self.setting.gold)):
            after = self._trained_further(model, seen)
            cell[name] = {
                "before": answer_probability(model, rest).mean().item(),
                "after": answer_probability(after, rest).mean().item(),
            }
        return cell

    def _trained_further(self, model: LanguageModel, rows: Sequence[QA | Passage]) -> LanguageModel:
        return train_sham(
            model, rows, template="plain", steps=FURTHER_STEPS, learning_rate=FURTHER_RATE, seed=self.seed
        )

    def _outcome(self, update: Update) -> Cell:
        model = update.apply(self.setting.original.copy())
        made = update.provenance
        cell = self._measured(model)
        reached = cell["forget"] <= self._level + 1e-6
        path = [[at["step"], at["forget_probability"], at["retain_kl"]] for at in made["trace"]]
        return cell | {"reached": reached, "steps": path[-1][0], "seconds": made["seconds"], "path": path}

    def _measured(self, model: LanguageModel, reference: LanguageModel | None = None) -> Cell:
        request, original, gold = self.setting.request, reference or self.setting.original, self.setting.gold
        reworded = request.forget_reworded
        return {
            "forget": answer_probability(model, request.forget).mean().item(),
            "reworded": answer_probability(model, reworded).mean().item() if reworded else None,
            "unseen": answer_probability(model, request.retain_unseen).mean().item(),
            "kl_unseen": kl_per_item(original, model, request.retain_unseen).mean().item(),
            "kl_held_out": kl_per_item(original, model, request.retain_held_out).mean().item(),
            "gold_kl_forget": kl_per_item(gold, model, request.forget).mean().item(),
            "gold_kl_unseen": kl_per_item(gold, model, request.retain_unseen).mean().item(),
        }


def judge(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> list[Claim]:
    """The claims of one regime, from its cells by seed; claims whose cells are missing are left out."""
    return [
        *(_against_first_order(regime, cells, ours) for ours in ("kfade", "kfade_tuned")),
        *(_in_other_words(regime, cells, ours) for ours in ("kfade", "kfade_tuned")),
        _nearer_to_gold(regime, cells),
        *(_against_variant(regime, cells, name) for name in VARIANTS if name != "kfade"),
        *(_reapplies(regime, cells, text) for text in ("retain", "new")),
        _comes_back(regime, cells),
    ]


def best_first_order(cells: Mapping[str, Cell]) -> str | None:
    """The first-order method with the least KL on unseen retain rows among those that reached gold's level."""
    names = [method.name for method, _ in FIRST_ORDER if cells.get(method.name, {}).get("reached")]
    return min(names, key=lambda name: float(cells[name]["kl_unseen"])) if names else None


def _against_first_order(regime: str, cells: Mapping[int, Mapping[str, Cell]], ours: str) -> Claim:
    tuned = [seed for seed in cells.values() if _all_tried(seed, ours)]
    beside = [(seed, name) for seed in tuned if (name := best_first_order(seed))]
    short = len(tuned) - len(beside)
    best = [name for _, name in beside]
    ratios = [seed[ours]["kl_unseen"] / seed[name]["kl_unseen"] for seed, name in beside]
    note = "best: " + ", ".join(sorted(set(best))) if best else ""
    if short:
        note += f"; no first-order method reached the level in {short} seeds"
    return _claim(
        f"a/{regime}/{ours}",
        f"At gold's forget level, {NAMED[ours]} harms unseen retain rows less than the best tuned first-order method.",
        f"KL(original || model) on unseen retain rows, {NAMED[ours]} over the best first-order method",
        ratios,
        bound=1.0,
        below=True,
        ratio=True,
        note=note,
    )


def _all_tried(seed: Mapping[str, Cell], ours: str) -> bool:
    return all(method.name in seed for method, _ in FIRST_ORDER) and bool(seed.get(ours, {}).get("reached"))


def _in_other_words(regime: str, cells: Mapping[int, Mapping[str, Cell]], ours: str) -> Claim:
    ratios = [
        seed[ours]["reworded"] / seed[name]["reworded"]
        for seed in cells.values()
        if _all_tried(seed, ours) and (name := best_first_order(seed)) and seed[ours].get("reworded")
    ]
    return _claim(
        f"f/{regime}/{ours}",
        f"At gold's forget level, {NAMED[ours]} leaves less in other wordings than the best tuned first-order method.",
        f"answer probability in wordings never trained on, {NAMED[ours]} over the best first-order method",
        ratios,
        bound=1.0,
        below=True,
        ratio=True,
        note="ours: what the comparison at one forget level leaves out",
    )


def _nearer_to_gold(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> Claim:
    ratios = []
    for seed in cells.values():
        if "controls" in seed and "kfade" in seed:
            ratios.append(seed["kfade"]["gold_kl_forget"] / seed["controls"]["original"]["gold_kl_forget"])
    return _claim(
        f"b/{regime}",
        "K-FADE approximates, in output space, the results of retraining without the forget set.",
        "KL(gold || model) on forget answers, after K-FADE over before",
        ratios,
        bound=1.0,
        below=True,
        ratio=True,
    )


def _against_variant(regime: str, cells: Mapping[int, Mapping[str, Cell]], name: str) -> Claim:
    both = [seed for seed in cells.values() if "kfade" in seed and seed.get(name, {}).get("reached")]
    short = sum(name in seed and not seed[name]["reached"] for seed in cells.values())
    return _claim(
        f"d/{regime}/{name}",
        f"The default harms unseen retain rows less than the variant {name!r}.",
        f"KL(original || model) on unseen retain rows, default over {name}",
        [seed["kfade"]["kl_unseen"] / seed[name]["kl_unseen"] for seed in both],
        bound=1.0,
        below=True,
        ratio=True,
        note=f"{name} fell short of the level in {short} seeds" if short else "",
    )


def _reapplies(regime: str, cells: Mapping[int, Mapping[str, Cell]], text: str) -> Claim:
    shares, prices = [], []
    for seed in cells.values():
        if (cell := seed.get(f"reapplied_{text}")) and {"kfade", "controls"} <= seed.keys():
            first = seed["controls"]["original"]["forget"] - seed["kfade"]["forget"]
            shares.append((cell["before"]["forget"] - cell["searched"]["forget"]) / first)
            prices.append(cell["searched"]["kl_unseen"] / seed["kfade"]["kl_unseen"])
    price, _, dearest = over_seeds(prices, ratio=True)
    note = f"at {price:.2f} times the first unseen KL (up to {dearest:.2f})" if price and dearest else ""
    return _claim(
        f"c/{regime}/{text}",
        f"After {FURTHER_STEPS} further steps on {text} text, the stored update still forgets.",
        "drop of the forget probability by the reapplied update, over the first drop",
        shares,
        bound=0.9,
        below=False,
        note=note,
    )


def _comes_back(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> Claim:
    gains = []
    for seed in cells.values():
        if cell := seed.get("relearned"):
            gains.append(cell["unlearned"]["after"] - cell["gold"]["after"])
    return _claim(
        f"e/{regime}",
        "Relearning on a few forget rows brings the others back, more than in a model that never knew them.",
        "forget probability on the other rows after relearning, unlearned minus gold",
        gains,
        bound=0.0,
        below=False,
    )
