"""Does a learned reward hold for a fresh learner, what makes it fail, and what would have told beforehand?

After "On The Fragility of Learned Reward Functions" (McKinney et al. 2023, arXiv 2301.03652), of which we had the
abstract and others' summaries and not the text: what is tested is that such failures exist and what moves them, in grid
worlds of our own. Its numbers are not reproduced. A failure is a relearner below half of the way from the uniform to
the best policy though the sampler was above four fifths of it; where nothing else is said, the relearner is the exact
planner, since weaker ones do not find what is wrong.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import hypot
from pathlib import Path

from palimpsest.files import write_text
from palimpsest.metrics.auc import Auc, auc
from palimpsest.metrics.statistics import clustered_mean, over_seeds
from palimpsest.report.heat_map import Table
from palimpsest.report.rewards_page import RelearnPanel, render_rewards_page
from palimpsest.rewards.relearning import FAILED, Rate
from palimpsest.rewards.signals import ALARM, FAILS_WHEN, NEEDS_TRUTH
from palimpsest.studies.cells import Cell, joined, mean
from palimpsest.studies.claims import Claim
from palimpsest.studies.reward_relearning_cells import (
    ARMS,
    KINDS,
    REPAIRED,
    failures,
    measure,
    of_seeds,
    report,
    scores,
)

PAPER, SUMMARIES = "arXiv 2301.03652, abstract", "arXiv 2301.03652, as others summarise it"
PAGE = "reward_relearning.html"
MANY, FEW = 0.6, 0.15
"""Shares of failures that count as many and as few."""
FEWEST = 3
"""Relearners that failed, and that did not, which an arm needs for an AUC."""

Cells = Mapping[str, Sequence[Cell]]
"""By arm, its blocks of seeds."""


def run(seeds: Sequence[int], folder: Path, arms: Sequence[str] = ()) -> list[Claim]:
    """Measure what is missing of these arms, judge the claims, and draw the page.

    Args:
        seeds: one after another; arms whose differences are small take three times as many more, that follow them.
        folder: keeps one JSON file an arm and block; what is there is not measured again.
        arms: all when empty.
    """
    cells = {name: measure(name, seeds, folder) for name in arms or ARMS}
    claims = judge(cells)
    write_text(folder / PAGE, page(cells, claims))
    return claims


def judge(cells: Cells) -> list[Claim]:
    """Every claim; those whose arms are missing are left out."""
    parts = (_existence, _design, _composition, _length, _signals, _relearners, _repair, _elsewhere)
    found = [claim for part in parts for claim in part(cells)]
    return [claim for claim in found if claim.seeds]


def difference(first: Rate, second: Rate) -> tuple[float, float, float]:
    """How much larger the first rate is, with Newcombe's 95 % interval of two independent rates (1998, method 10)."""
    gap = first.value - second.value
    (low, high), (other_low, other_high) = first.interval, second.interval
    down = hypot(first.value - low, other_high - second.value)
    up = hypot(high - first.value, second.value - other_low)
    return gap, gap - down, gap + up


def _existence(cells: Cells) -> Iterable[Claim]:
    says = "Learned rewards from which the sampler does well fail learners that begin afresh"
    yield _rate(cells, "a/table", f"{says}: a table.", "table", bound=MANY, source=PAPER)
    yield _rate(cells, "a/mlp", f"{says}: a small network.", "mlp", bound=FEW, source=PAPER)


def _design(cells: Cells) -> Iterable[Claim]:
    for kind in KINDS:
        name = f"{kind}_l2_1e-3"
        yield _rate(cells, f"b/{name}", "L2 of 1e-3 mends it.", name, bound=FEW, below=True, source=PAPER)
        less = partial(_less, cells, than=kind, source=SUMMARIES)
        yield less(f"b/{kind}_mean", "An ensemble's mean mitigates failures.", f"{kind}_mean")
        name = f"{kind}_pessimism"
        yield _rate(cells, f"b/{name}", "An ensemble's mean less its deviation mends it.", name, bound=FEW, below=True)
    yield _less(
        cells, "b/table_begins_at_0", "A table that begins at 0 fails less often.", "table_begins_at_0", than="table"
    )


def _composition(cells: Cells) -> Iterable[Claim]:
    for kind in KINDS:
        for relearner in ("planner", "q_learner"):
            better, worse = (
                scores(cells.get(f"{kind}_offline_{source}", ()), relearner) for source in ("random", "expert")
            )
            yield Claim.over(
                f"c/expert/{kind}/{relearner}",
                "Comparisons of high returns alone make rewards worse for relearners than random ones do.",
                f"true return from random episodes less that from expert ones, {relearner}, {kind}",
                [better[seed] - worse[seed] for seed in better.keys() & worse.keys()],
                source=SUMMARIES,
                bound=0.0,
                note=f"random {_mean(better)}, expert {_mean(worse)}",
            )
        name = f"{kind}_offline_everywhere"
        yield _rate(
            cells, f"c/{name}", "Random episodes from any cell hold.", name, bound=FEW, below=True, source=PAPER
        )
        for name, what in (
            ("many", "Four times as many comparisons"),
            ("half_random", "Random episodes for half"),
            ("half_random_starts", "Random starts for half"),
        ):
            yield _less(cells, f"c/{kind}_{name}", f"{what} lower failures.", f"{kind}_{name}", than=kind, source=PAPER)


def _length(cells: Cells) -> Iterable[Claim]:
    more = partial(_more, cells)
    yield more(
        "d/longer",
        "Training the sampler longer makes the reward worse for relearners.",
        "rounds_90",
        than="rounds_10",
        source=SUMMARIES,
        note="the reward's steps grow with the sampler's rounds, 3760 beside 560",
    )
    yield more(
        "d/longer_matched",
        "It does at as many steps of the reward, too.",
        "rounds_90_matched",
        than="rounds_10_matched",
        source=SUMMARIES,
        note="1316 and 1358 steps of the reward",
    )
    yield more(
        "d/reward_steps",
        "More steps of the reward, beside a sampler of one length, make it worse.",
        "steps_111",
        than="steps_16",
        note="3774 beside 544 steps, 30 rounds",
    )


def _signals(cells: Cells) -> Iterable[Claim]:
    for signal, above, bound, says in (
        ("proxy_gap", True, 0.9, "What a fresh optimiser gains in the learned reward tells who fails, without truth."),
        ("rarely_compared", True, 0.9, "So does the share of its visits that go to cells rarely compared."),
        ("accuracy", False, 0.75, "The reward's accuracy on its comparisons tells hardly more than chance."),
        ("sampler_return", False, 0.75, "Nor does the sampler's true return."),
    ):
        value, low, high, n_arms = over_arms(cells, signal)
        seeds = {seed for name in within(cells, signal) for seed in scores(cells[name], "planner")}
        quantity, note = f"AUC within an arm, mean over {n_arms} arms", "the interval is over arms"
        yield Claim(f"e/{signal}", says, "ours", quantity, value, low, high, len(seeds), bound, not above, note)
    failed, held = (
        [
            (seed, gap > ALARM)
            for blocks in cells.values()
            for seed, gap in _by_outcome(blocks, "proxy_gap")[side].items()
        ]
        for side in (0, 1)
    )
    quantity = f"failures with a gap above {ALARM:g}, all arms together"
    yield _of_runs("e/alarm", "The alarm finds failures.", quantity, failed, bound=0.8)
    quantity = f"rewards that hold with a gap above {ALARM:g}, all arms together"
    yield _of_runs("e/false_alarm", "And leaves alone what holds.", quantity, held, bound=0.1, below=True)


def _relearners(cells: Cells) -> Iterable[Claim]:
    weak = "A relearner as strong as the sampler finds fewer than half of the planner's failures."
    strong = "One that explores more, with as many episodes, finds most."
    for name, below, says in (("q_learner", True, weak), ("strong_q_learner", False, strong)):
        found = [
            (seed, other[seed] < FAILED)
            for blocks in cells.values()
            for planned, other in [(scores(blocks, "planner"), scores(blocks, name))]
            for seed in planned.keys() & other.keys()
            if planned[seed] < FAILED
        ]
        quantity = "failures of the planner that fail it too, all arms together"
        yield _of_runs(f"f/{name}", says, quantity, found, bound=0.5, below=below)


def _repair(cells: Cells) -> Iterable[Claim]:
    for how, bound, below, says in (
        ("targeted", 0.5, False, "Comparing what a fresh optimiser does with what the sampler does mends rewards."),
        ("elsewhere", 0.2, True, "As many comparisons of what the sampler does do not."),
    ):
        for arm in REPAIRED:
            failed = [
                after >= FAILED
                for cell in cells.get(arm, ())
                for seed, before, after in zip(
                    cell["seeds"], cell["repaired"][how][0], cell["repaired"][how][-1], strict=True
                )
                if seed in cell["relearned"]["planner"]["seeds"] and before < FAILED
            ]
            rate = Rate(sum(failed), len(failed))
            yield _share(
                f"g/{how}/{arm}", says, "failures that hold after 8 rounds of 20", rate, bound=bound, below=below
            )


def _elsewhere(cells: Cells) -> Iterable[Claim]:
    for world in ("stay", "slope"):
        for kind in KINDS:
            name = f"{world}_{kind}"
            says = f"L2 mends it in the world {world}, too."
            yield _less(cells, f"h/{name}", says, f"{name}_l2", than=name)


def within(cells: Cells, signal: str) -> dict[str, Auc]:
    """By arm with enough failures and enough that hold: how well a signal ranks failures above the others."""
    found = {}
    for name, blocks in cells.items():
        failed, held = _by_outcome(blocks, signal)
        if min(len(failed), len(held)) >= FEWEST:
            found[name] = _auc(signal, failed.values(), held.values())
    return found


def over_arms(cells: Cells, signal: str) -> tuple[float | None, float | None, float | None, int]:
    """The mean of these areas, its 95 % t-interval over arms within [0, 1], and how many arms there are."""
    by_arm = within(cells, signal)
    value, low, high = over_seeds([each.value for each in by_arm.values()])
    if low is not None and high is not None:
        low, high = max(low, 0.0), min(high, 1.0)
    return value, low, high, len(by_arm)


def pooled(cells: Cells, signal: str) -> Auc | None:
    """The same over all arms, a seed being one subject whichever arms it stands in."""
    sides: tuple[list[float], list[float]] = ([], [])
    subjects: tuple[list[str], list[str]] = ([], [])
    for blocks in cells.values():
        for side, subject, values in zip(sides, subjects, _by_outcome(blocks, signal), strict=True):
            side += values.values()
            subject += map(str, values)
    return _auc(signal, *sides, *subjects) if all(sides) else None


def page(cells: Cells, claims: Sequence[Claim]) -> str:
    """Curves of the bases beside their mended twins, then every arm, every signal and every claim."""
    panels = [
        RelearnPanel(f"{arm.replace('_', ' ')}: {relearner.replace('_', ' ')}", found)
        for arm in ("table", "table_l2_1e-3", "mlp", "mlp_l2_1e-3")
        for relearner in ("q_learner", "strong_q_learner")
        if arm in cells and (found := report(cells[arm], relearner))
    ]
    tables = [_claims_table(claims), _arms_table(cells), _signals_table(cells)]
    headline = (
        "A reward is learned from comparisons beside a sampler, frozen, and given to learners that begin afresh. "
        "The sampler's own return says little about what they will do."
    )
    return render_rewards_page("Do learned rewards hold?", headline, panels, tables)


def _claims_table(claims: Sequence[Claim]) -> Table:
    rows = [
        [
            claim.id,
            claim.statement,
            joined(claim.quantity, claim.note),
            _ends(claim.estimate, claim.low, claim.high),
            f"{claim.verdict}: {'below' if claim.below else 'above'} {claim.bound:g}, n = {claim.seeds}",
            claim.source,
        ]
        for claim in claims
    ]
    lead = "A claim is reproduced or contradicted only where the whole 95 % interval lies on one side of its bound."
    return Table("Claims", lead, ("", "Claim", "What is estimated", "Estimate", "Verdict", "Source"), rows)


def _arms_table(cells: Cells) -> Table:
    kinds = {"q_learner": "Q-learner", "strong_q_learner": "Strong Q-learner", "planner": "Planner"}
    rows = []
    for name, blocks in cells.items():
        n, kept = sum(len(cell["seeds"]) for cell in blocks), scores(blocks, "planner")
        own = {seed: value for seed, value in of_seeds(blocks, "sampler_return").items() if seed in kept}
        good = n - sum(cell["relearned"]["planner"]["bad_samplers"] for cell in blocks)
        found = [scores(blocks, kind) for kind in kinds]
        rates = [str(failures(blocks, kind)) if each else "" for kind, each in zip(kinds, found, strict=True)]
        rows.append(
            [name, f"{good} of {n}" if blocks[0]["sampler"] else "offline", _mean(own), *map(_mean, found), *rates]
        )
    head = ("Arm", "Good samplers", "Sampler", *kinds.values(), *(f"{name} fails" for name in kinds.values()))
    lead = (
        "True returns at the sampler's own budget, 0 that of the uniform policy and 1 the best, means over the seeds "
        "that say something; failures with Wilson's 95 % intervals."
    )
    return Table("Every arm", lead, head, rows)


def _signals_table(cells: Cells) -> Table:
    rows = []
    for signal, direction in FAILS_WHEN.items():
        everywhere, (*inside, n_arms) = pooled(cells, signal), over_arms(cells, signal)
        rows.append(
            [
                signal.replace("_", " "),
                "yes" if signal in NEEDS_TRUTH else "no",
                "high" if direction > 0 else "low",
                _ends(everywhere.value, everywhere.low, everywhere.high) if everywhere else "",
                _ends(*inside),
                f"{n_arms}",
            ]
        )
    lead = (
        "How well each ranks rewards that fail the planner above those that hold, given a good sampler. The direction "
        "is fixed beforehand, so what tells the wrong way is below 1/2. Pooled intervals are clustered by seed."
    )
    head = ("Signal", "Needs truth", "Fails when", "AUC, all arms pooled", "AUC within an arm, mean over arms", "Arms")
    return Table("What would have told?", lead, head, rows)


def _by_outcome(blocks: Sequence[Cell], signal: str) -> tuple[dict[int, float], dict[int, float]]:
    """The signal by seed, of those that failed the planner and of those that hold."""
    values, found = of_seeds(blocks, signal), scores(blocks, "planner")
    failed, held = (
        {seed: values[seed] for seed, value in found.items() if seed in values and (value < FAILED) is side}
        for side in (True, False)
    )
    return failed, held


def _auc(
    signal: str,
    failed: Iterable[float],
    held: Iterable[float],
    failed_seeds: Sequence[str] | None = None,
    held_seeds: Sequence[str] | None = None,
) -> Auc:
    """`auc` counts who costs less: those that failed."""
    came, stayed = ([-FAILS_WHEN[signal] * value for value in side] for side in (failed, held))
    return auc(came, stayed, failed_seeds, held_seeds)


def _rate(
    cells: Cells, id: str, statement: str, arm: str, *, bound: float, below: bool = False, source: str = "ours"
) -> Claim:
    blocks = cells.get(arm, ())
    own = {
        seed: value for seed, value in of_seeds(blocks, "sampler_return").items() if seed in scores(blocks, "planner")
    }
    note = (
        joined(f"sampler {_mean(own)}" if own else "", f"planner {_mean(scores(blocks, 'planner'))}") if blocks else ""
    )
    quantity = f"planners that fail, {arm}"
    return _share(id, statement, quantity, failures(blocks), bound=bound, below=below, source=source, note=note)


def _share(
    id: str,
    statement: str,
    quantity: str,
    rate: Rate,
    *,
    bound: float,
    below: bool = False,
    source: str = "ours",
    note: str = "",
) -> Claim:
    """A claim on a share of seeds, with Wilson's interval."""
    note = joined(f"{rate.k} of {rate.n}", note)
    return Claim(id, statement, source, quantity, rate.value, *rate.interval, rate.n, bound, below, note)


def _of_runs(
    id: str,
    statement: str,
    quantity: str,
    runs: Sequence[tuple[int, bool]],
    *,
    bound: float,
    below: bool = False,
) -> Claim:
    """A claim on a share of runs of several arms, whose interval resamples seeds with all of their runs."""
    if not runs:
        return Claim(id, statement, "ours", quantity, None, None, None, 0, bound, below)
    found = clustered_mean([yes for _, yes in runs], [str(seed) for seed, _ in runs], seed=0)
    note = f"{sum(yes for _, yes in runs)} of {len(runs)} runs; the interval resamples seeds"
    return Claim(
        id, statement, "ours", quantity, found.value, found.low, found.high, found.clusters, bound, below, note
    )


def _more(
    cells: Cells,
    id: str,
    statement: str,
    arm: str,
    *,
    than: str,
    source: str = "ours",
    note: str = "",
    below: bool = False,
) -> Claim:
    """That one arm's relearners fail more often than another's."""
    ours, theirs = failures(cells.get(arm, ())), failures(cells.get(than, ()))
    fewest = min(ours.n, theirs.n)
    value, low, high = difference(ours, theirs) if fewest else (None, None, None)
    note = joined(f"{ours} beside {theirs}", note)
    quantity = f"planners that fail, {arm} less {than}"
    return Claim(id, statement, source, quantity, value, low, high, fewest, 0.0, below, note)


_less: Callable[..., Claim] = partial(_more, below=True)


def _mean(by_seed: Mapping[int, float]) -> str:
    return f"{mean([*by_seed.values()]):.2f}" if by_seed else ""


def _ends(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} ({low:.2f} to {high:.2f})" if low is not None and high is not None else f"{value:.2f}"
