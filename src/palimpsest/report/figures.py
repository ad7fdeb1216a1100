"""The figures' geometry: forgetting against damage (by plotly.js), dots with intervals, what layers tell, internals.

A colour is written `@name` and stands for the page's CSS variable `--name`, so that one figure serves light and dark.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from palimpsest.attacks.attack import ATTACKED
from palimpsest.audit.internals import DEPTH, DEPTH_BY_LAYER, RECOVERY, RECOVERY_BY_LAYER
from palimpsest.audit.layers import BY_LAYER
from palimpsest.audit.recovery import RELEARNED, TAUGHT
from palimpsest.audit.results import Audit, Audited
from palimpsest.metrics.scores import Measure, Score
from palimpsest.report.text import interval, number

Scores: TypeAlias = Mapping[str, Score]
"""A model's, by `Measure.key`."""

FORGETTING = "forget/answer_probability"
"""The trade-off's vertical axis, a `Measure.key`."""

DAMAGE = "retain_unseen/kl_from_original"
"""The trade-off's horizontal axis, a `Measure.key`."""

SYMBOLS = {
    "original": "circle",
    "gold": "diamond",
    "sham": "circle",
    "erased": "square",
    "suppressed": "triangle-up",
    "scrambled": "star",
    "broken": "x",
    "remembered": "triangle-down",
    "inconclusive": "square",
}
"""Marker by `kind`: an outcome can be told without its colour."""

_NO_PANEL = {BY_LAYER, DEPTH_BY_LAYER, RECOVERY, RECOVERY_BY_LAYER, ATTACKED, RELEARNED, TAUGHT}
"""Sets that are drawn layer by layer or in sections of their own, or that gold is no measure of."""

_SITES = {"coef": ("MLP coefficients", "patch_coefficients_lpr"), "attn": ("Attention outputs", "patch_attention_lpr")}
"""What the map of a site is called, and the measure of all its layers together."""

_HOLLOW = {"sham", "inconclusive"}

# Damage is linear below this many nats/token and logarithmic above, so that zero has a place on the axis.
_LINEAR_BELOW = 0.01
_DAMAGE_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Place:
    """Where a model stands in the trade-off."""

    model: Audited
    forgetting: Score
    damage: Score


@dataclass(frozen=True)
class Dot:
    """A model's score in a panel; x, low and high are shares of the panel's width."""

    name: str
    kind: str
    score: Score
    x: float
    low: float
    high: float
    beyond: bool
    """Whether the score lies off the panel's right edge."""


@dataclass(frozen=True)
class Panel:
    """One measure, a dot a model. Positions are shares of the panel's width."""

    measure: Measure
    dots: tuple[Dot, ...]
    ticks: tuple[tuple[float, str], ...]
    gold: float | None
    """Gold's value."""
    zone: tuple[float, float] | None
    """Gold's value plus and minus the margin of equivalence, clipped to the panel."""


@dataclass(frozen=True)
class LayerCurve:
    """A model's answer probability, layer by layer; places are shares of the chart's width and height, from above."""

    name: str
    kind: str
    places: tuple[tuple[float, float], ...]
    lows: tuple[tuple[float, float], ...]
    """The intervals' lower ends, layer by layer."""
    highs: tuple[tuple[float, float], ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class LayerChart:
    """One unlearned model among the controls; its own curve is the last."""

    model: Audited
    curves: tuple[LayerCurve, ...]
    layers: tuple[str, ...]
    """Names, from what the first block reads to the model itself."""


@dataclass(frozen=True)
class InsideRow:
    """One line of a map: a value for each layer, then one for all of them; None where there is none."""

    name: str
    values: tuple[float | None, ...]
    told: tuple[str, ...]
    """Each value in words, beside its control."""


@dataclass(frozen=True)
class InsideMap:
    """Where the original's activations bring one unlearned model's answers back, and where its states lost them."""

    model: Audited
    layers: tuple[str, ...]
    recovery: tuple[InsideRow, ...]
    """A row for each kind of site, the sham's recovery taken off."""
    depth: InsideRow | None
    """Each layer's share of gold's drop, and the unlearning depth; None without gold."""


def kind(model: Audited) -> str:
    """What a model is drawn as: its role for a control, its outcome for an unlearned model."""
    if model.role != "unlearned":
        return model.role
    return model.verdict.outcome if model.verdict else "inconclusive"


def places(audit: Audit) -> list[Place]:
    """The models that have both coordinates of the trade-off; the original's damage is zero by definition."""
    if DAMAGE not in [measure.key for measure in audit.measures]:
        return []
    found = []
    for model in audit.models:
        forgetting, harm = model.scores.get(FORGETTING), model.scores.get(DAMAGE)
        if forgetting and harm is None and model.role == "original":
            harm = Score(0.0, 0.0, 0.0, forgetting.n, forgetting.clusters)
        if forgetting and harm:
            found.append(Place(model, forgetting, harm))
    return found


def trade_off(spots: Sequence[Place]) -> dict[str, Any]:
    """A plotly figure (`data`, `layout`) with `labels` that the page places where they do not collide."""
    widest = max([spot.damage.high for spot in spots] + [point.retain_kl for s in spots for point in s.model.trace])
    highest = max([spot.forgetting.high for spot in spots] + [1.0])
    ticks = [tick for tick in _DAMAGE_TICKS if tick <= max(widest * 1.2, 0.1)]
    right = _damage(widest) + 0.45
    layout = {
        "xaxis": {
            "range": [-0.35, right],
            "tickvals": [_damage(tick) for tick in ticks],
            "ticktext": [f"{tick:g}" for tick in ticks],
            "gridcolor": "@hair",
            "zeroline": False,
        },
        "yaxis": {"range": [-0.06, highest + 0.06], "gridcolor": "@hair", "zeroline": False, "dtick": 0.2},
        "shapes": [],
        "font": {"color": "@muted", "size": 12},
        "hoverlabel": {
            "bgcolor": "@leaf",
            "bordercolor": "@rule",
            "font": {"color": "@ink", "size": 13},
            "align": "left",
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 36, "r": 12, "t": 8, "b": 28},
        "showlegend": False,
        "hovermode": "closest",
    }
    layout["shapes"] = [
        _dashed(spot.forgetting.value, right) for spot in spots if spot.model.role == "gold"
    ]  # gold's level, which a method should reach and not pass
    traces = [_path(spot) for spot in spots if spot.model.trace]
    return {
        "data": traces + [_point(spot) for spot in spots],
        "layout": layout,
        "labels": [
            {
                "x": _damage(spot.damage.value),
                "y": spot.forgetting.value,
                "reach": [
                    [_damage(max(spot.damage.low, 0.0)), _damage(spot.damage.high)],
                    [spot.forgetting.low, spot.forgetting.high],
                ],
                "text": html.escape(spot.model.name, quote=False),
                "color": f"@{kind(spot.model)}",
            }
            for spot in spots
        ],
    }


def panels(audit: Audit) -> list[Panel]:
    """One panel for each measure on the forget side that anything was scored on."""
    forget_side = [
        measure for measure in audit.measures if measure.on.startswith("forget") and measure.on not in _NO_PANEL
    ]
    return [panel for measure in forget_side if (panel := _panel(audit, measure)).dots]


def layer_charts(audit: Audit) -> list[LayerChart]:
    """One chart for each unlearned model whose layers were read."""
    keys = [measure.key for measure in audit.measures if measure.on == BY_LAYER]
    layers = (*(str(layer) for layer in range(len(keys) - 1)), "model")
    read = [model for model in audit.models if keys and all(key in model.scores for key in keys)]
    controls = [model for model in read if model.role != "unlearned"]
    return [
        LayerChart(model, tuple(_curve(each, keys) for each in (*controls, model)), layers)
        for model in read
        if model.role == "unlearned"
    ]


def inside_maps(audit: Audit) -> list[InsideMap]:
    """One map for each unlearned model whose internals were measured; without a sham nothing is taken off."""
    names = [measure.name.rsplit("_", 1) for measure in audit.measures if measure.on == RECOVERY_BY_LAYER]
    layers = tuple(dict.fromkeys(layer for _, layer in names))
    kinds = [site for site in _SITES if [site, "0"] in names]
    sham, gold = (next((m.scores for m in audit.models if m.role == role), None) for role in ("sham", "gold"))
    return [
        InsideMap(
            model,
            layers,
            tuple(_recovery_row(model.scores, sham, site, layers) for site in kinds),
            _depth_row(model.scores, gold, layers) if gold and DEPTH in model.scores else None,
        )
        for model in audit.models
        if model.role == "unlearned" and any(key.startswith(RECOVERY_BY_LAYER) for key in model.scores)
    ]


def _recovery_row(own: Scores, sham: Scores | None, site: str, layers: Sequence[str]) -> InsideRow:
    name, together = _SITES[site]
    keys = [*(f"{RECOVERY_BY_LAYER}/{site}_{layer}" for layer in layers), f"{RECOVERY}/{together}"]
    values, told = list[float | None](), []
    for key, layer in zip(keys, (*layers, "all"), strict=True):
        score, of_sham = own.get(key), sham.get(key) if sham else None
        values.append(score.value - (of_sham.value if of_sham else 0.0) if score else None)
        beside = f"sham {number(of_sham.value)}" if of_sham else "no sham: uncalibrated"
        told.append(f"{name}, {_place(layer)}: {number(score.value) if score else 'not measured'}, {beside}")
    return InsideRow(name, tuple(values), tuple(told))


def _depth_row(own: Scores, gold: Scores, layers: Sequence[str]) -> InsideRow:
    """A layer in which gold itself has lost nothing has no share."""
    keys = [f"{DEPTH_BY_LAYER}/layer_{layer}" for layer in layers]
    drops = [(own[key].value, gold[key].value) for key in keys]
    shares = [drop / of_gold if of_gold > 0 else None for drop, of_gold in drops]
    told = [
        f"Drop at layer {layer}: {number(drop)} nats/token, gold {number(of_gold)}"
        for layer, (drop, of_gold) in zip(layers, drops, strict=True)
    ]
    depth = own[DEPTH]
    return InsideRow(
        "Gone from the states",
        (*shares, depth.value),
        (*told, f"Unlearning depth: {number(depth.value)} ({interval(depth)}), gold {number(gold[DEPTH].value)}"),
    )


def _place(layer: str) -> str:
    return "all layers" if layer == "all" else f"layer {layer}"


def _curve(model: Audited, keys: Sequence[str]) -> LayerCurve:
    scores = tuple(model.scores[key] for key in keys)

    def places(heights: Iterable[float]) -> tuple[tuple[float, float], ...]:
        return tuple((layer / (len(keys) - 1), 1 - height) for layer, height in enumerate(heights))

    return LayerCurve(
        model.name,
        kind(model),
        places(score.value for score in scores),
        places(score.low for score in scores),
        places(score.high for score in scores),
        scores,
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between low and high, at most `most`, in steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * size for size in (1, 2, 5, 10, 20) if (high - low) / (power * size) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _damage(nats: float) -> float:
    return math.asinh(nats / _LINEAR_BELOW)


def _dashed(level: float, right: float) -> dict[str, Any]:
    line = {"color": "@gold", "width": 1.5, "dash": "dash"}
    return {"type": "line", "x0": -0.35, "x1": right, "y0": level, "y1": level, "line": line, "layer": "below"}


def _point(spot: Place) -> dict[str, Any]:
    look, forgetting, damage = kind(spot.model), spot.forgetting, spot.damage
    middle = _damage(damage.value)
    bar = {"type": "data", "symmetric": False, "color": f"@{look}", "thickness": 1.2, "width": 0}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [middle],
        "y": [forgetting.value],
        "error_x": {
            **bar,
            "array": [_damage(damage.high) - middle],
            "arrayminus": [middle - _damage(max(damage.low, 0.0))],
        },
        "error_y": {
            **bar,
            "array": [forgetting.high - forgetting.value],
            "arrayminus": [forgetting.value - forgetting.low],
        },
        "marker": {
            "size": 13,
            "symbol": SYMBOLS[look],
            "color": "@page" if look in _HOLLOW else f"@{look}",
            "line": {"width": 2 if look in _HOLLOW else 0, "color": f"@{look}"},
        },
        "hoverinfo": "text",
        "text": [
            f"<b>{html.escape(spot.model.name, quote=False)}</b> ({look})<br>"
            f"answer probability {number(forgetting.value)} ({interval(forgetting)})<br>"
            f"KL {number(damage.value)} nats/token ({interval(damage)})"
        ],
    }


def _path(spot: Place) -> dict[str, Any]:
    trace, look = spot.model.trace, kind(spot.model)
    name = html.escape(spot.model.name, quote=False)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [_damage(point.retain_kl) for point in trace],
        "y": [point.forget_probability for point in trace],
        "line": {"color": f"@{look}", "width": 1},
        "marker": {"size": 3, "color": f"@{look}"},
        "opacity": 0.55,
        "hoverinfo": "text",
        "text": [
            f"{name}, step {point.step}<br>answer probability {number(point.forget_probability)}<br>"
            f"KL {number(point.retain_kl)} nats/token"
            for point in trace
        ],
    }


def _panel(audit: Audit, measure: Measure) -> Panel:
    scored = [(model, model.scores[measure.key]) for model in audit.models if measure.key in model.scores]
    low, high = _range(measure, scored)

    def share(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0)

    gold = next((score for model, score in scored if model.role == "gold"), None)
    margin = next((m.against_gold[measure.key].margin for m in audit.models if measure.key in m.against_gold), None)
    zone = (share(gold.value - margin), share(gold.value + margin)) if gold and margin else None
    dots = [
        Dot(model.name, kind(model), score, share(score.value), share(score.low), share(score.high), score.value > high)
        for model, score in scored
    ]
    ticks = tuple((share(tick), f"{tick:.4g}".replace("-", "−")) for tick in nice_ticks(low, high))
    return Panel(measure, tuple(dots), ticks, share(gold.value) if gold else None, zone)


def _range(measure: Measure, scored: list[tuple[Audited, Score]]) -> tuple[float, float]:
    if measure.unit in ("probability", "share"):
        return 0.0, 1.0
    low, high = min([0.0] + [score.low for _, score in scored]), max([0.0] + [score.high for _, score in scored])
    # A ruined model's score can be a hundred times the controls': it must not press all others against the edge.
    controls = [score.high for model, score in scored if model.role != "unlearned"]
    if controls and max(controls) > 0:
        high = min(high, 3 * max(controls))
    return (low, high) if high > low else (low, low + 1.0)
