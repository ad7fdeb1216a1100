"""The tuned lens (arXiv 2303.08112): nearer to the model than the logit lens, and does it read what the model uses?

Measured on an organism of invented people and on a model that read WikiText (`regimes`), and, for the detection of
injected instructions, on a question answerer that obeys them (`injections`). Lenses are fitted to most of the neutral
text and judged on the rest; upstream's own recipe stands beside ours.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.data.records import Passage, Record
from palimpsest.lens.alignment import alignment
from palimpsest.lens.card import LayerCard, report_card
from palimpsest.lens.causal_basis import causal_basis
from palimpsest.lens.detection import detect, split
from palimpsest.lens.fit import fit
from palimpsest.lens.hidden import read_layers, windows
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import first_of_last_run, trajectories
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.organism import (
    Corpus,
    Recipe,
    new_model,
    train_controls,
    train_sham,
    training_examples,
)
from palimpsest.models.scoring import predict
from palimpsest.models.training import TrainingSettings, train
from palimpsest.studies.cells import Cell, kept
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import REGIMES, Setting
from palimpsest.studies.upstream_lens import Recipe as UpstreamRecipe
from palimpsest.studies.upstream_lens import fit_as_upstream
from palimpsest.unlearn.simnpo import SimNPO
from palimpsest.unlearn.stopping import Stop
from palimpsest.worlds.injections import InjectionsWorld

SOURCE = "arXiv 2303.08112"
MODELS = ("people", "topic")
"""The regimes whose models are looked into."""
BED = "injections"
TEXTS, JUDGED, CAUSAL = 1200, 60, 8
"""Neutral texts to fit to, texts to judge on, and those of the latter that are ablated."""
UPSTREAM_STEPS, TOKENS_PER_STEP = 400, 2048
LOOKS = 24
"""At a model while it is trained, at even ratios of steps."""
FURTHER_STEPS, FURTHER_RATE = 200, 1e-4
TRAJECTORY, BASELINES = ("isolation_forest", "lof"), ("mahalanobis", "srm", "perplexity")
"""Detectors, by what they look at: what the layers believe, or hidden states and the prompt's cost."""
RANKED = ("isolation_forest_ranked", "lof_ranked")
"""Ours: those on trajectories, with a row's candidates put in order."""

Fitter = Callable[[LanguageModel, Sequence[Record], int], Lens]


def _ours(model: LanguageModel, texts: Sequence[Record], seed: int, **settings: Any) -> Lens:
    return fit(model, texts, seed=seed, **settings)


def _upstream(model: LanguageModel, texts: Sequence[Record], seed: int, recipe: UpstreamRecipe) -> Lens:
    rows = windows(texts, model)
    rng = random.Random(f"upstream/{seed}")
    steps: list[list[Encoded]] = []
    for _ in range(UPSTREAM_STEPS):
        step: list[Encoded] = []
        while sum(len(row.ids) for row in step) < TOKENS_PER_STEP:
            step.append(rng.choice(rows))
        steps.append(step)
    return fit_as_upstream(model, steps, recipe)


LENSES: Mapping[str, Fitter] = {
    "logit": lambda model, _, __: Lens.logit(model),
    "ridge": partial(_ours, kind="ridge"),
    "tuned": _ours,
    "tuned_2": partial(_ours, damping=2.0),
    "tuned_20": partial(_ours, damping=20.0),
    "jacobian": partial(_ours, kind="jacobian"),
    "upstream_sgd": partial(_upstream, recipe=UpstreamRecipe()),
    "upstream_muon": partial(_upstream, recipe=UpstreamRecipe("muon", 0.03, weight_decay=1.0)),
}
"""How each lens is made of a model, texts and a seed: ours at its default damping of 5, at 2 and at 20."""
CELLS = (*LENSES, "aligned", "transferred", "learned", "detected")
"""What is measured, by the names of the files that keep it."""


@dataclass(frozen=True)
class Plan:
    """What the study is to do."""

    seeds: Sequence[int]
    data: Path | None
    """The folder that holds wikitext2/."""
    folder: Path
    """Keeps one JSON file a cell; what is there is not measured again."""
    regimes: Sequence[str] = (*MODELS, BED)
    cells: Sequence[str] = ()
    """Which cells; all when empty."""


def run(plan: Plan) -> list[Claim]:
    """Measure what is missing, then judge the claims."""
    claims = []
    for regime in plan.regimes:
        table = {}
        for seed in plan.seeds:
            work = {"detected": partial(_detected, seed)} if regime == BED else _Lenses(regime, seed, plan).work()
            table[seed] = {
                name: kept(
                    plan.folder / regime / f"seed-{seed}" / f"{name}.json", f"{regime}, seed {seed}: {name}", measure
                )
                for name, measure in work.items()
                if not plan.cells or name in plan.cells
            }
        claims += judge(regime, table)
    return claims


class _Lenses:
    """All that is measured of one regime's model with one seed."""

    def __init__(self, regime: str, seed: int, plan: Plan) -> None:
        self.regime, self.seed, self.plan = regime, seed, plan
        self._setting: Setting | None = None
        self._fitted: dict[str, Lens] = {}

    def work(self) -> dict[str, Callable[[], Cell]]:
        cards: dict[str, Callable[[], Cell]] = {name: partial(self._card, name) for name in LENSES}
        return cards | {"aligned": self._aligned, "transferred": self._transferred, "learned": self._learned}

    @property
    def setting(self) -> Setting:
        if self._setting is None:
            self._setting = REGIMES[self.regime](self.seed, self.plan.data)
        return self._setting

    def _texts(self) -> tuple[list[Passage], list[Passage]]:
        """To fit to, and to judge on."""
        shuffled = list(self.setting.neutral)
        random.Random(f"lens study/{self.seed}").shuffle(shuffled)
        return shuffled[JUDGED : JUDGED + TEXTS], shuffled[:JUDGED]

    def _lens(self, name: str) -> Lens:
        if name not in self._fitted:
            self._fitted[name] = LENSES[name](self.setting.original, self._texts()[0], self.seed)
        return self._fitted[name]

    def _rows(self) -> list[Encoded]:
        return windows(self._texts()[1], self.setting.original)

    def _card(self, name: str) -> Cell:
        lens, rows = self._lens(name), self._rows()
        cards = report_card(lens, self.setting.original, rows, causal=rows[:CAUSAL], seed=self.seed)
        return {"layers": [_layer(card) for card in cards[:-1]], "seconds": lens.provenance.get("seconds")}

    def _aligned(self) -> Cell:
        """Does each lens foresee what resampling the subspace that moves it most does to the model?"""
        model, rows = self.setting.original, self._rows()[:CAUSAL]
        hidden = torch.cat([read.layers for read in read_layers(model, rows)], 1)
        cell: Cell = {}
        for name in ("logit", "tuned"):
            lens = self._lens(name)
            cell[name] = []
            for layer in range(lens.n_layers):
                vectors = causal_basis(lens, lens.readout(model), hidden[layer], layer, seed=self.seed).vectors
                cell[name].append(alignment(lens, model, rows, layer, vectors, seed=self.seed).mean().item())
        return cell

    def _transferred(self) -> Cell:
        """The original's lens on models made of it, beside a lens of their own and their logit lens."""
        setting, (texts, _), rows = self.setting, self._texts(), self._rows()
        request, own = setting.request, self._lens("tuned")
        sham = train_sham(
            setting.original,
            request.retain,
            template="plain",
            steps=FURTHER_STEPS,
            learning_rate=FURTHER_RATE,
            seed=self.seed,
        )
        method = SimNPO(retain_term="kl", retain_weight=10.0, batch_size=16, learning_rate=3e-4, seed=self.seed)
        update = method.run(setting.original, request, Stop(100))
        models = {"trained_further": sham, "unlearned": update.apply(setting.original.copy("unlearned"))}
        cell: Cell = {}
        for name, model in models.items():
            lenses = {"logit": Lens.logit(model), "own": LENSES["tuned"](model, texts, self.seed)}
            kls = {each: _kls(report_card(lens, model, rows)) for each, lens in lenses.items()}
            kls["original's"] = _kls(report_card(own, model, rows, fitted_to=setting.original))
            cell[name] = kls
        return cell

    def _learned(self) -> Cell:
        """Train the model again and look on: does what is settled late in training settle late in the layers?"""
        setting, recipe = self.setting, self.setting.recipe
        texts = (*setting.corpus.forget, *setting.corpus.retain)
        examples = training_examples(texts, setting.original.tokenizer, recipe)
        model = new_model(recipe.architecture, setting.original.tokenizer, recipe.training.seed)
        n_steps, rows = recipe.training.n_steps(len(examples)), self._rows()
        looks = {round(step) for step in np.geomspace(n_steps / 100, n_steps, LOOKS)}
        seen: list[Tensor] = []

        def look(step: int) -> None:
            if step in looks:
                seen.append(_predicted(model, rows))

        train(model, examples, recipe.training, after_step=look)
        learned = first_of_last_run(torch.stack(seen) == seen[-1])
        cell: Cell = {"tokens": len(learned)}
        for name in ("logit", "tuned"):
            lens = LENSES[name](model, self._texts()[0], self.seed)
            read = trajectories(lens, model, rows, top_k=1)
            depth = torch.cat([trajectory.depth[:-1] for trajectory in read])
            cell[name] = _spearman(depth, learned)
        doubt = torch.cat([trajectory.statistics["entropy"][-1, :-1] for trajectory in read])
        return cell | {"entropy": _spearman(doubt, learned)}


def _detected(seed: int) -> Cell:
    """Injected instructions against harmless insertions of the same words, and against no insertion at all.

    In a model that obeys them, and in gold, which never read one: what tells them there are the words alone.
    """
    world = InjectionsWorld(seed=seed)
    training = TrainingSettings(batch_size=32, learning_rate=5e-3, muon_learning_rate=0.02, precision="auto", seed=seed)
    corpus = Corpus(tuple(world.insertions_read()), tuple(world.documents()), tuple(world.vocabulary_texts()))
    controls = train_controls(corpus, Recipe(pack=None, training=training))
    told = [trial.injected for trial in world.trials]
    cell: Cell = {}
    for model, name in product((controls.original, controls.gold), ("logit", "tuned")):
        lens = LENSES[name](model, world.documents()[:TEXTS], seed)
        for kind in ("benign", "clean"):
            normal = [getattr(trial, kind) for trial in world.trials]
            found = detect(lens, model, *split(normal, seed=seed), told, seed=seed)
            cell[f"{model.name}/{name}/{kind}"] = {detector: each.auc.value for detector, each in found.items()}
    return cell


def _predicted(model: LanguageModel, rows: Sequence[Encoded]) -> Tensor:
    """[N] the model's likeliest token after every token of every row but the last, row by row."""
    found: dict[int, Tensor] = {}
    with evaluating(model) as network:
        for batch in batches(rows, batch_size=16):
            predictions = predict(network, batch.to(model.device))
            likeliest = predictions.logits.argmax(-1).cpu()
            found |= {row: likeliest[predictions.row.cpu() == place] for place, row in enumerate(batch.rows)}
    return torch.cat([found[row] for row in range(len(rows))])


def _spearman(left: Tensor, right: Tensor) -> float:
    return float(spearmanr(left.numpy(), right.numpy()).statistic)


def _kls(cards: Sequence[LayerCard]) -> list[float]:
    return [card.kl.value for card in cards[:-1]]


def _layer(card: LayerCard) -> Cell:
    assert card.calibration is not None
    return {
        "kl": card.kl.value,
        "bias": card.bias.value,
        "agreement": card.agreement.value,
        "ratio": card.calibration.ratio,
        "spearman": card.calibration.spearman,
    }


def judge(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> list[Claim]:
    """The claims of one regime, from its cells by seed; claims whose cells are missing are left out."""
    if regime == BED:
        claims = [*(_tells(cells, detector) for detector in (*TRAJECTORY, *RANKED)), *_beat_baselines(cells)]
    else:
        claims = [
            *(_lower(regime, cells, quantity) for quantity in ("kl", "bias")),
            *(_frontier(regime, cells, other) for other in ("upstream_sgd", "upstream_muon")),
            _same_directions(regime, cells),
            _aligned(regime, cells),
            *(_transfers(regime, cells, model) for model in ("trained_further", "unlearned")),
            *(_deep_is_late(regime, cells, lens) for lens in ("tuned", "logit")),
        ]
    return [claim for claim in claims if claim.seeds]


def _lower(regime: str, cells: Mapping[int, Mapping[str, Cell]], quantity: str) -> Claim:
    """Judged at the layer where the tuned lens gains least."""
    ratios = [
        max(tuned[quantity] / logit[quantity] for tuned, logit in zip(*_layers(seed, "tuned", "logit"), strict=True))
        for seed in cells.values()
        if {"tuned", "logit"} <= seed.keys()
    ]
    named = {"kl": "KL(model || lens)", "bias": "bias (KL of the mean predictions)"}[quantity]
    return _claim(
        f"a/{regime}/{quantity}",
        f"The tuned lens has a lower {quantity} than the logit lens at every layer.",
        f"{named} on held-out text, tuned over logit, at the layer where that is largest",
        ratios,
        below=True,
    )


def _frontier(regime: str, cells: Mapping[int, Mapping[str, Cell]], other: str) -> Claim:
    """One number for both sides of the frontier: the worse of the two ratios."""
    worse, kls, overreads = [], [], []
    for seed in cells.values():
        if {"tuned", other} <= seed.keys():
            ours, theirs = _layers(seed, "tuned", other)
            kl, overread = (_total(ours, name) / _total(theirs, name) for name in ("kl", "ratio"))
            worse.append(max(kl, overread))
            kls.append(kl)
            overreads.append(overread)
    note = f"KL at {_mean(kls):.2f}, lens over model at {_mean(overreads):.2f} times {other}'s" if worse else ""
    return _claim(
        f"b/{regime}/{other}",
        f"Our fit is nearer to the model than {other} and reads less that the model does not use.",
        "the worse of two ratios, ours over theirs: KL, and influence in the lens over that in the model",
        worse,
        below=True,
        note=note,
    )


def _same_directions(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> Claim:
    return _claim(
        f"c/{regime}",
        "The directions that move the tuned lens more move the model more.",
        "Spearman of ten directions' influences in lens and model, mean over layers",
        [_total(seed["tuned"]["layers"], "spearman") for seed in cells.values() if "tuned" in seed],
        bound=0.0,
    )


def _aligned(regime: str, cells: Mapping[int, Mapping[str, Cell]]) -> Claim:
    gains = [
        min(tuned - logit for tuned, logit in zip(seed["aligned"]["tuned"], seed["aligned"]["logit"], strict=True))
        for seed in cells.values()
        if "aligned" in seed
    ]
    return _claim(
        f"d/{regime}",
        "Stimulus and response are aligned better for the tuned lens than for the logit lens at every layer.",
        "Aitchison cosine, tuned minus logit, at the layer where that is least",
        gains,
        bound=0.0,
    )


def _transfers(regime: str, cells: Mapping[int, Mapping[str, Cell]], model: str) -> Claim:
    found = [seed["transferred"][model] for seed in cells.values() if "transferred" in seed]
    costs = [sum(kls["original's"]) / sum(kls["own"]) for kls in found]
    return _claim(
        f"e/{regime}/{model}",
        f"The original's lens reads the model {model.replace('_', ' ')} better than that model's logit lens.",
        "KL(model || lens) summed over layers, the original's lens over the logit lens",
        [sum(kls["original's"]) / sum(kls["logit"]) for kls in found],
        below=True,
        note=f"{_mean(costs):.2f} times the KL of a lens fitted to it" if costs else "",
    )


def _deep_is_late(regime: str, cells: Mapping[int, Mapping[str, Cell]], lens: str) -> Claim:
    found = [seed["learned"] for seed in cells.values() if "learned" in seed]
    entropy = _mean([cell["entropy"] for cell in found]) if found else 0.0
    return _claim(
        f"f/{regime}/{lens}",
        f"By the {lens} lens, what is learned late is settled in late layers.",
        "Spearman of prediction depth and iteration learned over the tokens of held-out text",
        [cell[lens] for cell in found],
        bound=0.0,
        note=f"the model's own entropy: {entropy:.2f}" if found else "",
    )


def _tells(cells: Mapping[int, Mapping[str, Cell]], detector: str) -> Claim:
    found = [seed["detected"] for seed in cells.values() if "detected" in seed]
    in_gold = [cell["gold/tuned/benign"][detector] for cell in found]
    return _claim(
        f"g/{BED}/{detector}",
        f"Trajectories tell injected instructions from harmless insertions of the same words ({detector}).",
        "AUROC with the tuned lens on held-out people",
        [cell["original/tuned/benign"][detector] for cell in found],
        bound=0.5,
        note=f"in a model that never read an insertion: {_mean(in_gold):.2f}" if in_gold else "",
    )


def _beat_baselines(cells: Mapping[int, Mapping[str, Cell]]) -> list[Claim]:
    """On trajectories as the paper takes them, and with candidates in order."""
    found = [seed["detected"]["original/tuned/benign"] for seed in cells.values() if "detected" in seed]
    best = [max(BASELINES, key=cell.__getitem__) for cell in found]
    return [
        _claim(
            f"h/{BED}/{name}",
            f"The better detector on {what} tells them better than the best baseline on hidden states or cost.",
            "difference of AUROCs",
            [max(cell[each] for each in detectors) - cell[other] for cell, other in zip(found, best, strict=True)],
            bound=0.0,
            note="best baseline: " + ", ".join(sorted(set(best))) if best else "",
        )
        for name, what, detectors in (
            ("trajectories", "trajectories", TRAJECTORY),
            ("ranked", "trajectories with a row's candidates in order (ours)", RANKED),
        )
    ]


def _layers(seed: Mapping[str, Cell], *lenses: str) -> list[list[dict[str, float]]]:
    return [seed[lens]["layers"] for lens in lenses]


def _total(layers: Sequence[Mapping[str, float]], name: str) -> float:
    return _mean([layer[name] for layer in layers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _claim(
    name: str,
    statement: str,
    quantity: str,
    values: Sequence[float],
    *,
    bound: float = 1.0,
    below: bool = False,
    note: str = "",
) -> Claim:
    """A quantity that is to be below 1 is a ratio."""
    return Claim.over(
        name, statement, quantity, values, source=SOURCE, bound=bound, below=below, ratio=below, note=note
    )
