"""An audit as Markdown: the page's story without its pictures, readable as plain text."""

import re
from collections.abc import Iterable, Sequence

import yaml

from palimpsest.audit.results import Audit, Audited, Example
from palimpsest.metrics.scores import Measure
from palimpsest.report import recovery, text

SHOWN = 20
"""Examples in the Markdown; the page has them all."""

_MARKS = {True: "pass", False: "**fail**", None: "_no evidence_"}


def render_markdown(audit: Audit) -> str:
    """The audit in the page's order: verdicts, recovery, scores, examples, making. Text from the audit is escaped."""
    sections = [
        [f"# {escape(audit.title)}", text.headline(audit)],
        _verdicts(audit),
        _recovery(audit),
        _scores(audit),
        _against_gold(audit),
        _examples(audit),
        _making(audit),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def escape(value: object) -> str:
    """Text on one line in which Markdown and HTML read nothing but text."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    # A line that opens like a list item would become one.
    return re.sub(r"^(\d+)([.)])|^([-+=])", r"\1\\\2\3", line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table of cells that are already escaped."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdicts(audit: Audit) -> list[str]:
    blocks = ["## Verdict"]
    for model in text.methods(audit):
        verdict = model.verdict
        if verdict is None:
            blocks.append(f"### {escape(model.name)}: not judged")
            continue
        where = f" ({escape(verdict.where)})" if verdict.where else ""
        blocks += [f"### {escape(model.name)}: {verdict.outcome}{where}", escape(verdict.summary)]
        if verdict.findings:
            blocks.append(
                "\n".join(f"- {_MARKS[found.passed]}: {escape(found.statement)}" for found in verdict.findings)
            )
    checks = [_control_line(check) for check in text.calibration(audit)]
    blocks += ["### The controls under the same rule", "\n".join(checks) or "There are none: uncalibrated."]
    if notes := text.caveats(audit):
        blocks += ["### Keep in mind", "\n".join(f"- {escape(note)}" for note in notes)]
    return blocks


def _control_line(check: text.ControlCheck) -> str:
    if check.outcome is None:
        return f"- {_MARKS[None]}: {escape(check.name)} was not judged; it should be {check.should_be}"
    judged = "as it should be" if check.as_expected else f"but should be {check.should_be}"
    return f"- {_MARKS[check.as_expected]}: {escape(check.name)} is {check.outcome}, {judged}"


def _recovery(audit: Audit) -> list[str]:
    rows = recovery.attack_rows(audit)
    if not rows:
        return []
    blocks = ["## Can it come back?"]
    if charts := recovery.relearn_charts(audit):
        head = ["Relearning", "Steps", "Original", "Gold", "Model", "Share of the way that is back"]
        blocks.append(
            "Answer probability after a little fine-tuning on other forgotten subjects, by the rate that speaks most "
            "against the model; shares with 95 % intervals over seeds."
        )
        blocks.append(table(head, [line for chart in charts for line in _relearned(chart)]))
        told = [(f"{chart.model.name}, {chart.lesson}", recovery.told(chart.report), *chart.others) for chart in charts]
        blocks.append("\n".join(f"- {escape(name)}: {escape('. '.join(lines))}." for name, *lines in told))
    blocks.append(
        "Answer probability under attack, then the share of the way from gold to the original that comes back (95 % "
        "interval over subjects); * marks the attack that brings a model's answers back most surely."
    )
    head = ["Attack", *(escape(model.name) for model in audit.models)]
    return [*blocks, table(head, [_attacked(row, audit) for row in rows]), *_foretold(audit)]


def _foretold(audit: Audit) -> list[str]:
    models, rows = recovery.foretellings(audit)
    if not rows:
        return []
    cells = [
        [
            escape(row.measure.label),
            *(f"{text.number(auc.value)} ({text.interval(auc)})" if auc else "–" for auc in row.aucs),
        ]
        for row in rows
    ]
    return [
        "How often a score ranks a fact that the marked attack brings more than half of the way back above one that it "
        "does not (AUC, 95 % interval over subjects): 0.5 tells nothing.",
        table(["Score", *(escape(model.name) for model in models)], cells),
    ]


def _relearned(chart: recovery.RelearnChart) -> list[list[str]]:
    lines = []
    for point in chart.report.points:
        share = point.residual
        ends = (
            f" ({text.number(share.low)} to {text.number(share.high)})"
            if share and share.low is not None and share.high is not None
            else ""
        )
        told = f"{text.number(share.value)}{ends}" if share else "–"
        values = (point.ceiling, point.floor, point.artefact)
        lines.append([escape(chart.model.name), str(point.budget), *map(text.number, values), told])
    return lines


def _attacked(row: recovery.AttackRow, audit: Audit) -> list[str]:
    cells = []
    for model, value, share in zip(audit.models, row.values, row.shares, strict=True):
        mark = "\\*" if model.name in row.worst_of else ""
        back = f"; {text.number(share.value)}{mark} ({text.interval(share)})" if share and model.role != "gold" else ""
        cells.append(f"{text.number(value.value)}{back}" if value else "–")
    name = escape(recovery.attack_name(row.measure))
    return [name if row.tells else f"{name} (says nothing here)", *cells]


def _scores(audit: Audit) -> list[str]:
    if not audit.measures:
        return []
    head = ["Measure", *(escape(model.name) for model in audit.models)]
    rows = [[f"{escape(measure.label)}, {_on(measure)}", *_cells(audit, measure)] for measure in audit.measures]
    meanings = [
        f"- **{escape(measure.label)}, {_on(measure)}** ({_code(measure.definition)}, {escape(measure.unit)}; "
        f"{text.direction(measure)}): {escape(measure.explanation)}"
        for measure in audit.measures
    ]
    signs = "Means with 95 % intervals. Beside gold: = equivalent, ≠ different, ? cannot tell."
    return ["## Scores", signs, table(head, rows), "\n".join(meanings)]


def _cells(audit: Audit, measure: Measure) -> list[str]:
    return [_cell(model, measure) for model in audit.models]


def _cell(model: Audited, measure: Measure) -> str:
    score, found = model.scores.get(measure.key), model.against_gold.get(measure.key)
    if score is None:
        return "–"
    sign = f" {text.SIGNS[text.likeness(found)]}" if found else ""
    return f"{text.number(score.value)}{sign} ({text.interval(score)})"


def _against_gold(audit: Audit) -> list[str]:
    lines = [
        f"- {escape(model.name)}, {escape(measure.label)}, {_on(measure)}: {text.comparison(found)}"
        for measure in audit.measures
        for model in audit.models
        if (found := model.against_gold.get(measure.key))
    ]
    return ["## Compared with gold", "\n".join(lines)] if lines else []


def _examples(audit: Audit) -> list[str]:
    if not audit.examples:
        return []
    shown = audit.examples[:SHOWN]
    head = ["Question", "True answer", *(escape(model.name) for model in audit.models)]
    rows = [
        [escape(example.question), escape(example.answer), *(_told(example, model.name) for model in audit.models)]
        for example in shown
    ]
    note = (
        f"{len(shown)} of {len(audit.examples)}; ✓ where the true answer stands in what was said, with its probability."
    )
    return ["## Fact by fact", note, table(head, rows)]


def _told(example: Example, name: str) -> str:
    said, probability = example.said.get(name), example.probability.get(name)
    right = "✓ " if said is not None and text.says(said, example.answer) else ""
    told = "–" if said is None else escape(said) or "(nothing)"
    return f"{right}{told}" + (f" ({text.number(probability)})" if probability is not None else "")


def _making(audit: Audit) -> list[str]:
    rows = [
        [
            escape(model.name),
            escape(model.how),
            escape(model.stopped) or "–",
            "–" if model.seconds is None else text.duration(model.seconds),
            _code(model.fingerprint),
        ]
        for model in audit.models
    ]
    blocks = ["## How it was made", table(["Model", "How", "Why it stopped", "Time", "Fingerprint"], rows)]
    parts = [("Request", audit.request), ("Specification", audit.spec), ("Environment", audit.environment)]
    for title, value in parts:
        if value:
            blocks += [f"### {title}", _indented(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))]
    return [*blocks, "### Check it yourself", "In the folder that holds this report:", _indented("palimpsest verify .")]


def _indented(block: str) -> str:
    # An indented block cannot be closed from inside, as a fence could.
    return "\n".join(f"    {line}" for line in block.rstrip().splitlines())


def _code(value: str) -> str:
    inside = " ".join(value.split()).replace("`", "'").replace("|", "\\|")
    return f"`{inside}`" if inside else "–"


def _on(measure: Measure) -> str:
    return escape(text.set_name(measure.on).lower())
