"""Random-label forgetting (Zhang, Choshen & Andreas 2024, arXiv 2409.02228): how far does it reach, and into what?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from palimpsest.files import write_text
from palimpsest.report.heat_map import HeatMap, Table, render_heat_maps
from palimpsest.studies.claims import Claim
from palimpsest.studies.forget_matrix import (
    Floats,
    clustered_order,
    forget_ratio,
    rank_correlation,
    spearman,
    variance_shares,
)
from palimpsest.studies.task_cells import Cell, Kind, Measured, Seed, Setting

SOURCE = "arXiv 2409.02228"
_claim = partial(Claim.over, source=SOURCE)
FEWEST_DATED = 100
"""Examples that were both learned and forgotten within sight; a task with fewer says nothing about their order."""
READABLE = 0.1
"""By how much a probe must beat its best control before forgetting, or there is nothing that it could go on reading."""
CONTROLS = ("untrained", "words", "shuffled")


def run(setting: Callable[[int], Setting], seeds: Sequence[int], folder: Path) -> list[Claim]:
    """Measure what is missing, judge the claims, and draw the matrices into `matrix.html`.

    Args:
        setting: what a seed starts from.
        seeds: which seeds.
        folder: keeps one JSON file a model; what is there is not measured again.
    """
    measured = {seed: Seed(setting(seed), seed, folder / f"seed-{seed}").measure() for seed in seeds}
    claims = judge(measured)
    write_text(folder / "matrix.html", page(measured, claims))
    return claims


def judge(seeds: Mapping[int, Measured]) -> list[Claim]:
    """Every claim, from what was measured of each seed."""
    all_ = list(seeds.values())
    return [
        _claim(
            "a",
            "How far forgetting generalises to new rows of the forgotten task differs wildly between tasks.",
            "standard deviation over tasks of the forget ratio on test rows, binomial noise taken off",
            [_spread(seed) for seed in all_],
            bound=0.1,
            below=False,
            note=_range(all_),
        ),
        _claim(
            "b",
            "New rows of the forgotten task keep more than the rows whose labels were taken away.",
            "true-label accuracy after forgetting, test rows less forget rows, mean over tasks",
            [_test_gap(seed) for seed in all_],
            bound=0.0,
            below=False,
        ),
        *(
            _claim(
                f"c/{kind}",
                "Which task is evaluated decides more of the forgetting than which task was forgotten.",
                f"share of off-diagonal variance ({kind} labels), evaluated task less forgotten task",
                [_lead(seed, kind) for seed in all_],
                bound=0.0,
                below=False,
                note=_mean_shares(all_, kind),
            )
            for kind in ("random", "flipped")
        ),
        *(
            _claim(
                f"d/{name}",
                f"Tasks of which the model has little {name} are forgotten further.",
                f"Spearman correlation over tasks of the own forget ratio with {name}",
                [spearman(_learned(seed, name), own_ratios(seed)) for seed in all_],
                bound=0.0,
                below=True,
                note=_permuted(all_, name),
            )
            for name in ("confidence", "variance")
        ),
        _claim(
            "e/behaviour",
            "A linear probe reads what behaviour has lost.",
            "accuracy after forgetting, probe less behaviour, mean over tasks that a probe could read before",
            _readings(all_, lambda cell, probes: cell["probe"] - _own(cell)),
            bound=0.0,
            below=False,
            note=_readable_tasks(all_),
        ),
        _claim(
            "e/kept",
            "The probe reads as well after forgetting as before.",
            "probe's lead over its best control, after over before, mean over the same tasks",
            _readings(all_, lambda cell, p: (cell["probe"] - _control(p)) / (p["learned"] - _control(p))),
            bound=0.9,
            below=False,
        ),
        _claim(
            "f",
            "What was learned first is forgotten last.",
            "Spearman correlation over examples of the steps at which each was learned and forgotten, mean over tasks",
            [value for seed in all_ if (value := _order(seed)) is not None],
            bound=0.0,
            below=True,
        ),
        _claim(
            "g",
            "A hundred rows forget as far as a thousand.",
            "own forget ratio on test rows, a thousand rows less a hundred, mean over tasks",
            [_size(seed) for seed in all_],
            bound=0.1,
            below=True,
            note=_size_agreement(all_),
        ),
    ]


def page(seeds: Mapping[int, Measured], claims: Sequence[Claim]) -> str:
    """The matrices averaged over seeds, the claims, and every task's numbers."""
    all_ = list(seeds.values())
    tasks = _common(all_)
    maps = []
    for kind, title in (("random", "Random labels"), ("flipped", "Flipped labels")):
        mean = np.mean([_among(seed, matrix(seed, kind), tasks) for seed in all_], axis=0)  # type: ignore[arg-type]
        rows, columns = clustered_order(mean), clustered_order(mean.T)
        maps.append(
            HeatMap(
                title,
                "How much of the task in the column is gone, in percent of what was learned of it, after the task in "
                "the row was forgotten. Means over seeds; rows and columns in the order of their UPGMA trees.",
                [tasks[place] for place in rows],
                [tasks[place] for place in columns],
                mean[np.ix_(rows, columns)].tolist(),
            )
        )
    judged = [
        [claim.statement, _interval(claim), claim.verdict, "; ".join(filter(None, (claim.quantity, claim.note)))]
        for claim in claims
    ]
    head = ("claim", "estimate and 95 % interval", "verdict", "what is measured")
    n = f"{len(all_)} seeds" if len(all_) > 1 else "One seed"
    return render_heat_maps(
        "How far random labels make a model forget",
        f"{n}, {len(tasks)} tasks that were learned in all of them.",
        maps,
        [
            Table("The claims", f"Of {SOURCE}; the interval is over seeds.", head, judged),
            Table("The tasks", "Means over seeds, of test rows where nothing else is said.", *_task_table(all_, tasks)),
        ],
    )


def _task_table(seeds: Sequence[Measured], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, Callable[[Measured, str], float]] = {
        "learned": lambda seed, task: seed.learned["accuracy"][task],
        "confidence": lambda seed, task: seed.learned["confidence"][task],
        "variance": lambda seed, task: seed.learned["variance"][task],
        "after random labels": lambda seed, task: _own(seed.forgotten["random"][task]),
        "on the forget rows": lambda seed, task: seed.forgotten["random"][task]["train_accuracy"],
        "random labels learned": lambda seed, task: seed.forgotten["random"][task]["label_fit"],
        "after a hundred": lambda seed, task: _own(seed.forgotten["few"][task]),
        "after flipped": lambda seed, task: _own(seed.forgotten["flipped"][task]),
        "probe before": lambda seed, task: seed.learned["probes"][task]["learned"],
        "probe after": lambda seed, task: seed.forgotten["random"][task]["probe"],
        "best control": lambda seed, task: _control(seed.learned["probes"][task]),
    }
    rows = [
        [task, *(f"{np.mean([number(seed, task) for seed in seeds]):.2f}" for number in columns.values())]
        for task in tasks
    ]
    return ["task", *columns], rows


def _interval(claim: Claim) -> str:
    if claim.estimate is None:
        return ""
    interval = f" ({claim.low:.2f} to {claim.high:.2f})" if claim.low is not None else ""
    return f"{claim.estimate:.2f}{interval}"


def _common(seeds: Sequence[Measured]) -> list[str]:
    """The tasks that were learned in every seed."""
    return [task for task in seeds[0].tasks if all(task in seed.tasks for seed in seeds)]


def _among(seed: Measured, values: Floats, tasks: Sequence[str]) -> Floats:
    places = [seed.tasks.index(task) for task in tasks]
    return values[np.ix_(places, places)]


def matrix(seed: Measured, kind: Kind = "random") -> Floats:
    """[n, n] forget ratios of the learned tasks: forgotten in rows, evaluated in columns."""
    cells = seed.forgotten[kind]
    after = [[cells[task]["accuracy"][other] for other in seed.tasks] for task in seed.tasks]
    return forget_ratio(_learned(seed, "accuracy"), after, flipped=kind == "flipped")


def own_ratios(seed: Measured, kind: Kind = "random") -> list[float]:
    """The forget ratio of each learned task on its own test rows."""
    return [
        float(forget_ratio(seed.learned["accuracy"][task], seed.forgotten[kind][task]["accuracy"][task]))
        for task in seed.tasks
    ]


def _learned(seed: Measured, name: str) -> list[float]:
    return [seed.learned[name][task] for task in seed.tasks]


def _own(cell: Cell) -> float:
    return float(cell["accuracy"][cell["task"]])


def _spread(seed: Measured) -> float:
    ratios = np.array(own_ratios(seed))
    noise = []
    for task in seed.tasks:
        before, cell = seed.learned["accuracy"][task], seed.forgotten["random"][task]
        after, n = _own(cell), seed.learned["rows"][task]
        noise.append((after * (1 - after) / n + before * (1 - before) / n) / (before - 0.5) ** 2)
    return float(np.sqrt(max(0.0, ratios.var(ddof=1) - np.mean(noise))))


def _range(seeds: Sequence[Measured]) -> str:
    ratios = [ratio for seed in seeds for ratio in own_ratios(seed)]
    return f"from {min(ratios):.2f} to {max(ratios):.2f}, mean {np.mean(ratios):.2f}" if ratios else ""


def _test_gap(seed: Measured) -> float:
    return float(np.mean([_own(cell) - cell["train_accuracy"] for cell in seed.forgotten["random"].values()]))


def _lead(seed: Measured, kind: Kind) -> float:
    shares = variance_shares(matrix(seed, kind))
    return shares.evaluated - shares.forgotten


def _mean_shares(seeds: Sequence[Measured], kind: Kind) -> str:
    shares = [variance_shares(matrix(seed, kind)) for seed in seeds]
    evaluated, forgotten = (np.mean([getattr(share, side) for share in shares]) for side in ("evaluated", "forgotten"))
    return f"evaluated {evaluated:.2f}, forgotten {forgotten:.2f}"


def _permuted(seeds: Sequence[Measured], name: str) -> str:
    """Seeds share their tasks: permutation of the tasks' means over them, where all learned the same ones."""
    common = _common(seeds)
    ratios = [dict(zip(seed.tasks, own_ratios(seed), strict=True)) for seed in seeds]
    rho, p = rank_correlation(
        [float(np.mean([seed.learned[name][task] for seed in seeds])) for task in common],
        [float(np.mean([ratio[task] for ratio in ratios])) for task in common],
    )
    return f"of the tasks' means over seeds {rho:.2f}, permutation p = {p:.2g}, {len(common)} tasks"


def _control(probes: Mapping[str, float]) -> float:
    return max(probes[name] for name in CONTROLS)


def _readable(seed: Measured) -> list[str]:
    probes = seed.learned["probes"]
    return [task for task in seed.tasks if probes[task]["learned"] - _control(probes[task]) >= READABLE]


def _readings(seeds: Sequence[Measured], quantity: Callable[[Cell, Mapping[str, float]], float]) -> list[float]:
    """By seed, the quantity's mean over the tasks that a probe could read; seeds without such a task are left out."""
    found = []
    for seed in seeds:
        values = [quantity(seed.forgotten["random"][task], seed.learned["probes"][task]) for task in _readable(seed)]
        if values:
            found.append(float(np.mean(values)))
    return found


def _readable_tasks(seeds: Sequence[Measured]) -> str:
    readable, learned = sum(len(_readable(seed)) for seed in seeds), sum(len(seed.tasks) for seed in seeds)
    if not readable:
        return f"of {learned} tasks a probe could read none before"
    quantities: tuple[Callable[[Cell, Mapping[str, float]], float], ...] = (
        lambda cell, probes: probes["learned"],
        lambda cell, probes: cell["probe"],
        lambda cell, probes: _control(probes),
        lambda cell, probes: _own(cell),
    )
    means = [np.mean(_readings(seeds, quantity)) for quantity in quantities]
    return (
        f"{readable} of {learned} tasks; probe {means[0]:.2f} before and {means[1]:.2f} after, best control "
        f"{means[2]:.2f}, behaviour after {means[3]:.2f}"
    )


def _order(seed: Measured) -> float | None:
    found = []
    for task in seed.tasks:
        steps = zip(seed.learned["learned_at"][task], seed.forgotten["random"][task]["forgotten_at"], strict=True)
        dated = [(learned, forgotten) for learned, forgotten in steps if learned and forgotten]
        if len(dated) >= FEWEST_DATED:
            found.append(spearman([learned for learned, _ in dated], [forgotten for _, forgotten in dated]))
    return float(np.mean(found)) if found else None


def _size(seed: Measured) -> float:
    return float(np.mean(np.array(own_ratios(seed)) - np.array(own_ratios(seed, "few"))))


def _size_agreement(seeds: Sequence[Measured]) -> str:
    rhos = [spearman(own_ratios(seed), own_ratios(seed, "few")) for seed in seeds]
    return f"the tasks' order agrees by Spearman {np.mean(rhos):.2f}"
