"""An audit as one self-contained HTML page: style, script, figures and plotly.js inside, no request to anywhere."""

import base64
import hashlib
from importlib import resources
from itertools import groupby
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from palimpsest.audit.results import Audit
from palimpsest.metrics.scores import Measure
from palimpsest.report import figures, recovery, text

_UNDERWRITING = 2600
"""Characters of the forget set that show faintly under the title."""


def render_html(audit: Audit) -> str:
    """The page, about 5 MB, nearly all of it plotly.js. The same audit gives the same bytes.

    Everything that comes from the audit is escaped, and the page's own policy lets no script run but the ones written
    here (by hash) and nothing be fetched.
    """
    spots = figures.places(audit)
    script = part("script.js")
    plotly = _harmless(get_plotlyjs()) if spots else ""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            audit=audit,
            methods=text.methods(audit),
            controls=text.controls(audit),
            headline=text.headline(audit),
            calibration=text.calibration(audit),
            caveats=text.caveats(audit),
            meaning=text.MEANING,
            signs=text.SIGNS,
            underwriting=_underwriting(audit),
            places=spots,
            trade_off=figures.trade_off(spots) if spots else None,
            panels=figures.panels(audit),
            layer_charts=figures.layer_charts(audit),
            inside_maps=figures.inside_maps(audit),
            attack_rows=recovery.attack_rows(audit),
            foretellings=recovery.foretellings(audit),
            relearn_charts=recovery.relearn_charts(audit),
            has_sham=any(model.role == "sham" for model in audit.models),
            sets=by_set(audit),
            compared={m.key: [model for model in audit.models if m.key in model.against_gold] for m in audit.measures},
            facts=facts(audit) if audit.examples else None,
            spec=yaml.safe_dump(audit.spec, sort_keys=False, allow_unicode=True) if audit.spec else "",
            style=Markup(part("style.css")),
            script=Markup(script),
            plotly=Markup(plotly),
            script_hashes=[source_hash(source) for source in (plotly, script) if source],
        )
    )


def by_set(audit: Audit) -> list[tuple[str, list[Measure]]]:
    """The measures grouped by the rows they are taken on, in the audit's order."""
    order = list(dict.fromkeys(measure.on for measure in audit.measures))
    grouped = groupby(
        sorted(audit.measures, key=lambda measure: order.index(measure.on)), key=lambda measure: measure.on
    )
    return [(on, list(measures)) for on, measures in grouped]


def facts(audit: Audit) -> dict[str, Any]:
    """The examples as the script reads them.

    Each row has, by model: what it said and how probable the truth was to it (None where not known), and whether it
    said the truth.
    """
    names = [model.name for model in audit.models]
    return {
        "models": names,
        "before": next((model.name for model in audit.models if model.role == "original"), None),
        "gold": next((model.name for model in audit.models if model.role == "gold"), None),
        "methods": [model.name for model in text.methods(audit)],
        "first": _first_shown(audit),
        "others": [model.name for model in audit.models if model.role == "sham"],
        "sets": {on: text.set_name(on) for on in dict.fromkeys(example.on for example in audit.examples)},
        "subjects": sorted({example.subject for example in audit.examples if example.subject}),
        "rows": [
            {
                "on": example.on,
                "subject": example.subject,
                "question": example.question,
                "answer": example.answer,
                "said": [example.said.get(name) for name in names],
                "probability": [example.probability.get(name) for name in names],
                "right": [text.says(example.said.get(name, ""), example.answer) for name in names],
            }
            for example in audit.examples
        ],
    }


def _first_shown(audit: Audit) -> str | None:
    # What a broken model says is gibberish: it shows least.
    unlearned = text.methods(audit)
    whole = [model for model in unlearned if figures.kind(model) != "broken"]
    return next((model.name for model in whole or unlearned), None)


def environment() -> Environment:
    """Where the pages' templates are, with the filters they share."""
    environment = Environment(
        loader=PackageLoader("palimpsest.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "number": text.number,
        "interval": text.interval,
        "duration": text.duration,
        "set_name": text.set_name,
        "direction": text.direction,
        "likeness": text.likeness,
        "comparison": text.comparison,
        "smallest_visible": text.smallest_visible,
        "kind": figures.kind,
        "shade": shade,
        "attack_name": recovery.attack_name,
    }
    return environment


def _underwriting(audit: Audit) -> str:
    told = " · ".join(f"{example.question} {example.answer}" for example in audit.examples if example.on == "forget")
    told = told or audit.title
    return " · ".join([told] * (_UNDERWRITING // (len(told) + 3) + 1))[:_UNDERWRITING]


def part(name: str) -> str:
    """The text of a file beside the templates."""
    return resources.files("palimpsest.report").joinpath(name).read_text(encoding="utf-8")


def _harmless(script: str) -> str:
    return script.replace("</script", "<\\/script")


def shade(value: float) -> int:
    """Percent of ink for a share: 0 is blank, 1 is full ink; what lies beyond is shown by its number alone."""
    return round(100 * min(max(value, 0.0), 1.0))


def source_hash(script: str) -> str:
    """By which a page's policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
