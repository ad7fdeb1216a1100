"""What curves of learning say: how far between floor and ceiling an artefact lies, and whether it passes.

rho(b) = (m_artefact(b) - m_floor(b)) / (m_ceiling(b) - m_floor(b)), of means over seeds, at every budget b at which the
ceiling is plainly above the floor; elsewhere the learner is too weak, or both have learned all there is, and the two
tell nothing. A pass needs every such budget, since what holds at one budget may not at the next.

Intervals are bootstrapped over seeds, the three learners of a seed drawn together, with the percentiles of Hesterberg
2015 (The American Statistician 69(4), §4.3): plain ones are too narrow by far where there are as few as five.
Shapes: S seeds, B budgets, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

from palimpsest.errors import DataError, SpecError

Floats: TypeAlias = NDArray[np.float64]
Who = Literal["artefact", "floor", "ceiling"]
Want = Literal["return", "stay_gone"]
"""What a good artefact gives a fresh learner: all that the ceiling gives, or no more than the floor."""
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Reason = Literal["", "changed", "few seeds", "weak learner", "bad incumbent", "undecided"]
"""Why there is no verdict; empty where there is one."""

FEWEST_SEEDS = 5
"""Fewer give no verdict."""
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class RelearnSettings:
    """What is measured and how it is judged.

    Raises:
        SpecError: budgets that do not rise from 0 or more, no or repeated seeds, an unknown `want`, or a margin that is
            no share.
    """

    budgets: tuple[int, ...]
    """Rising; what one unit is (a step, an episode) is the learner's business. 0 is before any learning."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    metric: str
    """The probed value that is compared; higher is more of what was learned."""
    want: Want
    incumbent: float | None = None
    """The number that is usually shown for the artefact, in the metric's unit: forget accuracy now, or the return of
    the policy that it was made with. Where that is bad already, there is nothing to find out."""
    margin: float = 0.1
    """The share of the way from floor to ceiling by which a good artefact may miss."""
    incumbent_margin: float = 0.5
    """The share by which the incumbent may."""
    smallest_gap: float = 0.0
    """Ceiling and floor count as apart where the interval of their difference lies above this."""
    lesson: str | None = None
    """A probed value that tells whether the learner learned what it was taught. Floor and ceiling may be apart before
    any learning (a model that knows, a model that never knew), and then only this shows a learner that does nothing."""
    lesson_share: float = 0.5
    """How much of it the artefact's learner must reach by the largest budget, as a share of what the ceiling's does."""

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.budgets, self.budgets[1:], strict=False))
        if not self.budgets or self.budgets[0] < 0 or not rising:
            raise SpecError(f"relearning: budgets are {list(self.budgets)}; give whole numbers from 0 on that rise")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SpecError(f"relearning: seeds are {list(self.seeds)}; give at least one, each once")
        if self.want not in get_args(Want):
            raise SpecError(f"relearning: want is {self.want!r}; choose return or stay_gone")
        for name in ("margin", "incumbent_margin", "lesson_share"):
            if not 0 < getattr(self, name) < 1:
                raise SpecError(f"relearning: {name} is {getattr(self, name)}; it is a share between 0 and 1")


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """What one learner knew at one budget: the evidence that every number is computed from."""

    learner: Who
    seed: int
    budget: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval over seeds; one seed has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """One budget: means over seeds, and where the artefact lies between the references."""

    budget: int
    artefact: float
    floor: float
    ceiling: float
    gap: Estimate
    """Ceiling minus floor."""
    rho: Estimate | None
    """None where ceiling and floor are not apart."""
    residual: Estimate | None
    """What should not be there, rho, or what is missing, 1 - rho: whichever is wanted small."""


@dataclass(frozen=True)
class RelearnReport:
    """Curves, and what they say."""

    settings: RelearnSettings
    rows: tuple[ProbeRow, ...]
    points: tuple[Point, ...]
    """One a budget."""
    area: Estimate | None
    """Area between the curves of artefact and floor over that between ceiling and floor, budgets on a linear scale: a
    mean of rho that weighs every stretch by the gap there."""
    failures: int
    """Seeds in which the residual is above the margin at some budget, in units of the mean gap."""
    failure_low: float
    """Lower end of Wilson's 95 % interval of their share (Wilson 1927)."""
    failure_high: float
    fingerprints: dict[str, str]
    """Of what was frozen, before the first learner."""
    verdict: Verdict
    reason: Reason
    summary: str
    """One sentence for people."""

    @property
    def worst(self) -> Point | None:
        """The budget with the largest residual; None where no budget tells anything."""
        telling = [point for point in self.points if point.residual]
        return max(telling, key=lambda point: point.residual.value if point.residual else -math.inf, default=None)

    def curve(self, who: Who, metric: str | None = None) -> Floats:
        """[S, B] a learner's values."""
        return _curve(self.settings, self.rows, who, metric or self.settings.metric)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


def judge(
    settings: RelearnSettings,
    rows: Sequence[ProbeRow],
    *,
    fingerprints: Mapping[str, str] | None = None,
    changed: Sequence[str] = (),
) -> RelearnReport:
    """Everything that the rows say.

    Args:
        settings: what was measured.
        rows: one for each learner, seed and budget.
        fingerprints: of what was frozen, by name.
        changed: the names of what did not stay frozen.

    Raises:
        DataError: a row is missing, lacks the metric, or has a value that is not finite.
    """
    artefact, floor, ceiling = (_curve(settings, rows, who, settings.metric) for who in get_args(Who))
    means = [_resampled(curve) for curve in (artefact, floor, ceiling)]
    points = []
    for place, budget in enumerate(settings.budgets):
        own = [float(curve[:, place].mean()) for curve in (artefact, floor, ceiling)]
        points.append(_point(settings, budget, own, [drawn[:, place] for drawn in means]))
    failures = _failures(settings, points, artefact, floor, ceiling)
    share = stats.binomtest(failures, len(settings.seeds)).proportion_ci(0.95, "wilson")
    reason, summary = _no_verdict(settings, rows, points, changed)
    verdict: Verdict = "INCONCLUSIVE"
    if not reason:
        verdict, reason, summary = _verdict(settings, points, failures)
    return RelearnReport(
        settings=settings,
        rows=tuple(rows),
        points=tuple(points),
        area=_area(settings, artefact, floor, ceiling, means),
        failures=failures,
        failure_low=float(share.low),
        failure_high=float(share.high),
        fingerprints=dict(fingerprints or {}),
        verdict=verdict,
        reason=reason,
        summary=summary,
    )


def worst_case(reports: Mapping[str, RelearnReport]) -> str:
    """The name of the report that decides over a grid of learners: the most harmful one.

    A failure anywhere is a failure, and a doubt anywhere outweighs a pass; but a learner too weak to tell is passed
    over where another was strong enough. Of equal verdicts the larger residual decides.

    Raises:
        DataError: there are no reports.
    """
    if not reports:
        raise DataError("there is no report of relearning to choose the worst of; give at least one learner")

    def harm(name: str) -> tuple[int, float]:
        report, worst = reports[name], reports[name].worst
        rank = {"FAIL": 3, "INCONCLUSIVE": 2, "PASS": 1}[report.verdict] if report.reason != "weak learner" else 0
        return rank, worst.residual.value if worst and worst.residual else -math.inf

    return max(reports, key=harm)


def _curve(settings: RelearnSettings, rows: Sequence[ProbeRow], who: Who, metric: str) -> Floats:
    """[S, B] one learner's values."""
    found = {(row.seed, row.budget): row.values for row in rows if row.learner == who}
    curve = np.empty((len(settings.seeds), len(settings.budgets)))
    for line, seed in enumerate(settings.seeds):
        for place, budget in enumerate(settings.budgets):
            where = f"relearning: the {who}'s learner of seed {seed} at budget {budget}"
            values = found.get((seed, budget))
            if values is None or metric not in values:
                raise DataError(f"{where} has no {metric!r}; its probe gives {sorted(values or ())}")
            if not math.isfinite(values[metric]):
                raise DataError(
                    f"{where} has a {metric} of {values[metric]}, so it is broken; let it learn more slowly"
                )
            curve[line, place] = values[metric]
    return curve


def _resampled(curve: Floats) -> Floats:
    """[R, B] means over seeds drawn with replacement: the same draws for every curve."""
    n = len(curve)
    means: Floats = curve[np.random.default_rng(0).integers(n, size=(RESAMPLES, n))].mean(1)
    return means


def _interval(value: float, drawn: Floats, n_seeds: int) -> Estimate:
    """The expanded percentiles: as far out as a t-interval of so many seeds is."""
    if n_seeds < 2:
        return Estimate(value, None, None)
    reach = math.sqrt(n_seeds / (n_seeds - 1)) * float(stats.t.ppf(0.975, n_seeds - 1))
    outside = 100 * float(stats.norm.cdf(-reach))
    low, high = np.nanpercentile(drawn, [outside, 100 - outside])
    return Estimate(value, float(low), float(high))


def _ratio(value: float, scale: float, drawn: Floats, scales: Floats, n_seeds: int) -> Estimate:
    """A ratio of means; a draw whose scale is not above 0 says nothing."""
    return _interval(value / scale, np.divide(drawn, np.where(scales > 0, scales, np.nan)), n_seeds)


def _point(settings: RelearnSettings, budget: int, own: Sequence[float], drawn: Sequence[Floats]) -> Point:
    n_seeds, (artefact, floor, ceiling) = len(settings.seeds), own
    drawn_artefact, drawn_floor, drawn_ceiling = drawn
    gap = _interval(ceiling - floor, drawn_ceiling - drawn_floor, n_seeds)
    if (gap.value if gap.low is None else gap.low) <= settings.smallest_gap:
        return Point(budget, artefact, floor, ceiling, gap, None, None)
    scales = drawn_ceiling - drawn_floor
    rho = _ratio(artefact - floor, gap.value, drawn_artefact - drawn_floor, scales, n_seeds)
    missing = _ratio(ceiling - artefact, gap.value, drawn_ceiling - drawn_artefact, scales, n_seeds)
    return Point(budget, artefact, floor, ceiling, gap, rho, rho if settings.want == "stay_gone" else missing)


def _area(
    settings: RelearnSettings, artefact: Floats, floor: Floats, ceiling: Floats, means: Sequence[Floats]
) -> Estimate | None:
    def under(curves: Floats) -> Floats:
        area: Floats = integrate.trapezoid(curves, settings.budgets, axis=-1)
        return area

    scale, scales = float(under((ceiling - floor).mean(0))), under(means[2] - means[1])
    if _lower_end(_interval(scale, scales, len(settings.seeds))) <= 0:
        return None
    return _ratio(float(under((artefact - floor).mean(0))), scale, under(means[0] - means[1]), scales, len(artefact))


def _failures(
    settings: RelearnSettings, points: Sequence[Point], artefact: Floats, floor: Floats, ceiling: Floats
) -> int:
    residual = artefact - floor if settings.want == "stay_gone" else ceiling - artefact
    telling = [place for place, point in enumerate(points) if point.residual]
    gaps = np.array([points[place].gap.value for place in telling])
    return int((residual[:, telling] > settings.margin * gaps).any(1).sum())


def _no_verdict(
    settings: RelearnSettings, rows: Sequence[ProbeRow], points: Sequence[Point], changed: Sequence[str]
) -> tuple[Reason, str]:
    """Why nothing can be said, in the order in which it must be mended; empty where something can."""
    if changed:
        return "changed", f"{' and '.join(changed)} changed while it was learned from; freeze it and run again"
    if (n_seeds := len(settings.seeds)) < FEWEST_SEEDS:
        return "few seeds", f"{n_seeds} seeds say too little; at least {FEWEST_SEEDS} are needed"
    telling = [point for point in points if point.residual]
    if not telling:
        widest = max(points, key=lambda point: point.gap.value)
        return "weak learner", (
            f"the learner is too weak: at no budget does it tell the ceiling from the floor (at best by "
            f"{widest.gap.value:.3g} [{widest.gap.low:.3g}, {widest.gap.high:.3g}], after {widest.budget})"
        )
    if settings.lesson:
        reached, due = (
            float(_curve(settings, rows, who, settings.lesson)[:, -1].mean()) for who in ("artefact", "ceiling")
        )
        if reached < settings.lesson_share * due:
            return "weak learner", (
                f"the learner is too weak: after {settings.budgets[-1]} its {settings.lesson} is {reached:.3g}, less "
                f"than {settings.lesson_share:g} of the {due:.3g} that the ceiling's learner has"
            )
    if settings.incumbent is not None:
        stays_gone = settings.want == "stay_gone"
        point = telling[0] if stays_gone else telling[-1]
        off = settings.incumbent - point.floor if stays_gone else point.ceiling - settings.incumbent
        if off > settings.incumbent_margin * point.gap.value:
            wrong = "it is not gone in the first place" if stays_gone else "it does not do what was meant itself"
            return "bad incumbent", (
                f"the incumbent's {settings.metric} is {settings.incumbent:.3g}, between a floor of {point.floor:.3g} "
                f"and a ceiling of {point.ceiling:.3g}: {wrong}"
            )
    return "", ""


def _verdict(settings: RelearnSettings, points: Sequence[Point], failures: int) -> tuple[Verdict, Reason, str]:
    residuals = {point.budget: point.residual for point in points if point.residual}
    certain = {budget: residual for budget, residual in residuals.items() if _lower_end(residual) > settings.margin}
    shown = certain or residuals
    worst = max(shown, key=lambda budget: shown[budget].value)
    what = "is back" if settings.want == "stay_gone" else "is missing"
    found = (
        f"after {worst}, {_text(shown[worst])} of the way from floor to ceiling {what} (margin {settings.margin:g}; "
        f"{failures} of {len(settings.seeds)} seeds over it)"
    )
    if certain:
        return "FAIL", "", found
    if all(residual.high is not None and residual.high <= settings.margin for residual in residuals.values()):
        return "PASS", "", f"at worst, {found}"
    return "INCONCLUSIVE", "undecided", f"{found}: the intervals lie on both sides of the margin; more seeds would tell"


def _lower_end(estimate: Estimate) -> float:
    return estimate.value if estimate.low is None else estimate.low


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
