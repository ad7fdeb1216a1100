"""`palimpsest lens`: fit a lens to a model, and look at what every layer believes."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.output import Json, print_json, warn
from palimpsest.errors import SpecError
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.data.records import Record
    from palimpsest.lens.card import LayerCard
    from palimpsest.lens.detection import Detected
    from palimpsest.lens.lens import Lens
    from palimpsest.metrics.auc import Auc
    from palimpsest.metrics.statistics import Floats

COLUMNS = {"kl": "KL", "cross_entropy": "cross-entropy", "entropy": "entropy", "agreement": "top-1", "bias": "bias"}
"""What a layer's card has, with headings."""
WIDTH_OF_TABLE = 140

app = typer.Typer(help="Fit a lens to a model, and see what every layer already believes.", no_args_is_help=True)


@app.command("fit")
def fit(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    texts: Annotated[str, typer.Argument(help="Retain or neutral rows, like what the lens will be read on.")],
    out: Annotated[Path, typer.Option(help="A new folder for the lens.")],
    forget: Annotated[str | None, typer.Option(help="Rows that must not be among the texts.")] = None,
    kind: Annotated[
        str, typer.Option(help="tuned; ridge, the closed form alone; or jacobian, the model's own derivative.")
    ] = "tuned",
    steps: Annotated[int, typer.Option(help="Steps down the KL, at most.", min=1)] = 160,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of each step.", min=1)] = 2048,
    seed: Annotated[int, typer.Option(help="Of the held-out rows and the batches.")] = 0,
    tuned_lens: Annotated[
        bool, typer.Option("--tuned-lens", help="Write it in the layout of the tuned-lens package.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit an affine map a layer, so that each can be read as though it were the last.

    The table is mean KL(model || lens) on held-out rows, nats a token.
    """
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import read_records
        from palimpsest.files import refuse_foreign_folder
        from palimpsest.lens import fit as fitting
        from palimpsest.lens.lens import DESCRIPTION
        from palimpsest.lens.others import CONFIG, write_tuned_lens
        from palimpsest.models.language_model import load

    refuse_foreign_folder(out, CONFIG if tuned_lens else DESCRIPTION)
    rows, secret = read_records(texts), read_records(forget) if forget else ()
    loaded = load(model)
    lens = fitting.fit(
        loaded,
        rows,
        kind=kind,  # type: ignore[arg-type]
        forget=secret,
        steps=steps,
        tokens_per_step=tokens_per_step,
        seed=seed,
        folder=out.with_name(f"{out.name}.unfinished"),
    )
    if tuned_lens:
        write_tuned_lens(lens, loaded, out)
    else:
        lens.save(out)
    if as_json:
        print_json({"lens": str(out)} | lens.provenance)
    else:
        _show_kls(lens)
        typer.echo(str(out))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    texts: Annotated[str, typer.Argument(help="Rows, other than those that the lens was fitted to.")],
    lens: Annotated[
        list[str] | None,
        typer.Option(help="A folder or resource id; several may be given. Always beside the logit lens."),
    ] = None,
    fitted_to: Annotated[str | None, typer.Option(help="The model that the lenses were fitted to, if another.")] = None,
    causal: Annotated[
        int, typer.Option(help="Rows for the causal calibration, which takes most of the time; 0 leaves it out.", min=0)
    ] = 8,
    directions: Annotated[int, typer.Option(help="Of the causal basis.", min=2)] = 10,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    as_json: Json = False,
) -> None:
    """The report card of a lens, layer by layer: is it near to the model, and does it read what the model uses?

    In nats a token: KL from the model, cross-entropy of what follows, entropy; how often its likeliest token is the
    model's; bias, the KL of its average prediction. "lens / model" is how much ablating the directions that it depends
    on most changes the lens, over how much that changes the model (1 is calibrated), "rank" their rank correlation.
    """
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import read_records
        from palimpsest.lens.card import report_card
        from palimpsest.lens.hidden import windows
        from palimpsest.lens.others import open_lens
        from palimpsest.models.language_model import load

    records, loaded = read_records(texts), load(model)
    owner = load(fitted_to) if fitted_to else loaded
    rows = windows(records, loaded)
    cards = {}
    for name in ("logit", *(lens or ())):
        with console.status(f"examining {name}"):
            cards[name] = report_card(
                open_lens(name, owner),
                loaded,
                rows,
                fitted_to=owner,
                causal=() if fitted_to else rows[:causal],
                directions=directions,
                seed=seed,
            )
    if as_json:
        print_json({name: [_plain(layer) for layer in found] for name, found in cards.items()})
    else:
        for name, found in cards.items():
            _show_card(name, found)


@app.command("show")
def show(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids.")],
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder, a resource id of the tuned-lens package, or `logit`. One is the first model's, and all are "
            "read with it; or one for each model, in their order. The logit lens of each by default."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="What to read.")] = None,
    rows: Annotated[str | None, typer.Option(help="Or rows to read, questions with their answers, say.")] = None,
    limit: Annotated[int, typer.Option(help="How many of the rows.", min=1)] = 3,
    top_k: Annotated[int, typer.Option(help="How many likeliest tokens a cell shows.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("lens.html"),
) -> None:
    """Draw what every layer of each model believes at every token, on one page to be opened in a browser."""
    if (text is None) == (rows is None):
        raise SpecError("give either --text or --rows, what is to be read")
    with console.status("loading torch and transformers"):
        from palimpsest.data.batches import encode
        from palimpsest.data.readers import read_records
        from palimpsest.data.records import QA, Passage
        from palimpsest.files import write_text
        from palimpsest.lens.others import open_lens
        from palimpsest.lens.trajectory import Trajectory, trajectories
        from palimpsest.models.language_model import load, refuse_other_tokenizer
        from palimpsest.report.lens_page import LensView, render_lens_page

    records: list[Record] = [Passage(text)] if text is not None else read_records(rows or "")[:limit]
    loaded = [load(model) for model in models]
    first = loaded[0]
    for other in loaded[1:]:
        refuse_other_tokenizer(first, other)
    names = lens or ["logit"] * len(loaded)
    if len(names) not in (1, len(loaded)):
        raise SpecError(f"--lens is given {len(names)} times for {len(loaded)} models; give one, or one for each")
    owners = loaded if len(names) == len(loaded) else [first] * len(loaded)
    lenses = [open_lens(name, owner) for name, owner in zip(names * (len(loaded) // len(names)), owners, strict=True)]
    encoded = encode(records, first.tokenizer)
    with console.status("reading every layer"):
        read = [
            trajectories(opened, model, encoded, fitted_to=owner, top_k=top_k)
            for opened, model, owner in zip(lenses, loaded, owners, strict=True)
        ]
    views = []
    for number, (record, row) in enumerate(zip(records, encoded, strict=True)):
        of_models: dict[str, Trajectory] = {
            _heading(model.name, name, number, len(records)): found[number]
            for model, name, found in zip(loaded, models, read, strict=True)
        }
        seen = {*row.ids, *(token for found in of_models.values() for token in found.top_ids.flatten().tolist())}
        answer = range(row.start, row.stop) if isinstance(record, QA) else range(0)
        written = {token: str(first.tokenizer.decode([token])) for token in seen}
        views.append(LensView([written[token] for token in row.ids], written, answer, of_models))
    kinds = dict.fromkeys(
        f"the {opened.kind} lens of {owner.name}" for opened, owner in zip(lenses, owners, strict=True)
    )
    title = "What the layers of " + ", ".join(model.name for model in loaded) + " believe"
    write_text(out, render_lens_page(title, f"Read with {', '.join(kinds)}.", views))
    typer.echo(str(out))


@app.command("detect")
def detect(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    normal: Annotated[str, typer.Option(help="Rows that are as they should be: half to fit to, half to compare with.")],
    suspects: Annotated[str, typer.Option(help="Rows of the same kind that may have been tampered with.")],
    lens: Annotated[str, typer.Option(help="A folder, a resource id of the tuned-lens package, or `logit`.")] = "logit",
    seed: Annotated[int, typer.Option(help="Of the halves, parted by subject, and of the isolation forest.")] = 0,
    as_json: Json = False,
) -> None:
    """Can suspects, prompts with an instruction injected say, be told from normal rows that no detector has seen?

    AUROC is 1 where every suspect looks less normal than every normal row, 0.5 where nothing tells them apart.
    isolation_forest and lof read what each layer believes: of the candidate answers of multiple choices and of
    questions with wrong answers (ranked: in the order in which the model believes them in the end), and else of what
    follows the prompt. mahalanobis and srm read hidden states, perplexity what the prompt costs. length counts its
    tokens: what it tells apart may be told by length alone. `--json` gives every row's scores.
    """
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import read_records
        from palimpsest.data.records import subject_of
        from palimpsest.lens import detection
        from palimpsest.lens.others import open_lens
        from palimpsest.models.language_model import load

    known, held_out = detection.split(read_records(normal), seed=seed)
    suspicious, loaded = read_records(suspects), load(model)
    opened = open_lens(lens, loaded)
    with console.status("reading every layer"):
        found = detection.detect(opened, loaded, known, held_out, suspicious, seed=seed)
    notes = _cautions(found["length"])
    if as_json:
        fitted = {subject_of(record) for record in known}
        print_json(
            {
                "lens": opened.kind,
                "fitted_to": len(known),
                "detectors": {
                    name: {"auroc": each.auc.value, "low": each.auc.low, "high": each.auc.high}
                    for name, each in found.items()
                },
                "held_out": _scored(held_out, {name: each.held_out for name, each in found.items()}, fitted),
                "suspects": _scored(suspicious, {name: each.suspects for name, each in found.items()}, fitted),
                "notes": notes,
            }
        )
    else:
        _show_aucs({name: each.auc for name, each in found.items()})
    for note in notes:
        warn(note)


def _scored(records: "list[Record]", scores: "dict[str, Floats]", fitted: set[str]) -> list[dict[str, Any]]:
    """Every row with its anomaly scores as JSON data."""
    from palimpsest.data.records import subject_of

    return [
        {
            "id": record.id,
            "subject": subject_of(record),
            "compared": subject_of(record) not in fitted,
            "scores": {name: float(values[place]) for name, values in scores.items()},
        }
        for place, record in enumerate(records)
    ]


def _cautions(length: "Detected") -> list[str]:
    """What is to be known before the detectors' numbers are read."""
    found, notes = length.auc, []
    if found.low > 0.5 or found.high < 0.5:
        than = "longer" if found.low > 0.5 else "shorter"
        notes.append(
            f"length alone has an AUROC of {found.value:.2f}: suspects are {than} than normal rows, and the other "
            "detectors may see no more than that; compare with harmless rows of the suspects' length"
        )
    if left_out := len(length.suspects) - found.nonmembers:
        notes.append(
            f"{left_out} of {len(length.suspects)} suspects are about subjects that the detectors were fitted to; they "
            "are scored, not compared"
        )
    return notes


def _show_aucs(aucs: "dict[str, Auc]") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column("detector")
    table.add_column("AUROC", justify="right", no_wrap=True)
    for name, found in aucs.items():
        table.add_row(name, f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})")
    Console().print(table)


def _plain(card: "LayerCard") -> dict[str, Any]:
    """A layer's card as JSON data."""
    scores = {name: asdict(getattr(card, name)) for name in COLUMNS}
    found = card.calibration
    if found is None:
        return {"layer": card.layer, **scores, "calibration": None}
    low, high = found.interval()
    calibration = {"ratio": found.ratio, "low": low, "high": high, "spearman": found.spearman}
    return {"layer": card.layer, **scores, "calibration": calibration}


def _show_card(name: str, cards: "list[LayerCard]") -> None:
    """A table of one lens on standard output; the last row is the model."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left", box=SIMPLE)
    for column in ("layer", *COLUMNS.values(), "lens / model", "rank"):
        table.add_column(column, justify="right", no_wrap=True)
    for card in cards:
        scores = [getattr(card, column) for column in COLUMNS]
        cells = [f"{score.value:.2g} ({score.low:.2g}-{score.high:.2g})" for score in scores]
        if card.calibration:
            low, high = card.calibration.interval()
            cells += [f"{card.calibration.ratio:.2f} ({low:.2f}-{high:.2f})", f"{card.calibration.spearman:.2f}"]
        else:
            cells += ["", ""]
        table.add_row("model" if card.layer == len(cards) - 1 else str(card.layer), *cells)
    Console(width=WIDTH_OF_TABLE).print(table)


def _heading(name: str, given: str, number: int, of: int) -> str:
    """A model's name above its table; with several rows, which row it is."""
    called = name if name != "model" else Path(given).name
    return called if of == 1 else f"{called}, row {number + 1}"


def _show_kls(lens: "Lens") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    kls: dict[str, list[float]] = lens.provenance["kl"]
    for name in ("layer", *kls):
        table.add_column(name, justify="right")
    for layer, row in enumerate(zip(*kls.values(), strict=True)):
        table.add_row(str(layer), *(f"{kl:.4f}" for kl in row))
    Console().print(table)
