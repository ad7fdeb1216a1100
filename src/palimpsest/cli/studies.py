"""`palimpsest studies run NAME`: a paper's claims, measured in worlds whose truth is known."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from palimpsest.cli.output import Json, print_json
from palimpsest.errors import SpecError
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.studies.claims import Claim

app = typer.Typer(help="Test papers' claims in worlds whose truth is known.", no_args_is_help=True)
studies = typer.Typer(
    help="Measure what is missing, then print every claim with its estimate, interval and verdict.",
    no_args_is_help=True,
)
app.add_typer(studies, name="run")

Seeds = Annotated[int, typer.Option(help="How many seeds, from the first on.", min=1)]
FirstSeed = Annotated[int, typer.Option(help="The first seed.", min=0)]
Out = Annotated[Path, typer.Option(help="Keeps what was measured; a study that was stopped goes on.")]


@studies.command("kfade")
def kfade(
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    regime: Annotated[
        list[str] | None,
        typer.Option(help="People, topic and tofu unless named; also people_apart, people_few, people_wide."),
    ] = None,
    cell: Annotated[list[str] | None, typer.Option(help="Measure only these models, e.g. kfade, npo.")] = None,
    trials: Annotated[int, typer.Option(help="Trials of each method's tuning.", min=1)] = 6,
    steps: Annotated[int, typer.Option(help="The most steps a first-order trial may take.", min=1)] = 300,
    data: Annotated[Path | None, typer.Option(help="The folder that holds tofu/ and wikitext2/.")] = None,
    out: Out = Path("runs/studies"),
    as_json: Json = False,
) -> None:
    """Does K-FADE forget as much at less harm than tuned first-order methods, and can it be reapplied?"""
    with console.status("loading torch and transformers"):
        from palimpsest.studies.kfade import CELLS, Plan, run
        from palimpsest.studies.regimes import MAIN, REGIMES
    _refuse_unknown("regime", regime, list(REGIMES))
    _refuse_unknown("cell", cell, CELLS)
    span = range(first_seed, first_seed + seeds)
    _tell(run(Plan(span, regime or MAIN, trials, steps, data, out / "kfade", cell or ())), as_json)


@studies.command("tuned_lens")
def tuned_lens(
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    regime: Annotated[list[str] | None, typer.Option(help="people, topic and injections unless named.")] = None,
    cell: Annotated[list[str] | None, typer.Option(help="Measure only these, e.g. tuned, upstream_sgd.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds wikitext2/.")] = None,
    out: Out = Path("runs/studies"),
    as_json: Json = False,
) -> None:
    """Is the tuned lens nearer to the model than the logit lens, and does it read what the model uses?"""
    with console.status("loading torch and transformers"):
        from palimpsest.studies.tuned_lens import BED, CELLS, MODELS, Plan, run
    known = (*MODELS, BED)
    _refuse_unknown("regime", regime, known)
    _refuse_unknown("cell", cell, CELLS)
    span = range(first_seed, first_seed + seeds)
    _tell(run(Plan(span, data, out / "tuned_lens", regime or known, cell or ())), as_json)


OF_MODELS = {
    "dissecting": "Does fine-tuning erase or only suppress, and which white-box measure would tell?",
    "concept_vectors": "Is a concept one vector, does the model use it, and does its fate tell what was erased?",
    "recovery": "Can someone get it back: by relearning, rounding, other prompts, projections; what tells beforehand?",
    "conjugate_prompting": "Does what was unlearned in one language come back in another, and was it one memory?",
}
"""The studies that measure `unlearned_models`, each by instruments of its own: the module's name and what it asks."""


def of_models(
    context: typer.Context,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    cell: Annotated[list[str] | None, typer.Option(help="Measure only these models, e.g. full, sham, npo.")] = None,
    out: Out = Path("runs/studies"),
    as_json: Json = False,
) -> None:
    """Measure and judge the study that the command is named after."""
    name = str(context.command.name)
    with console.status("loading torch and transformers"):
        study = import_module(f"palimpsest.studies.{name}")
    _refuse_unknown("cell", cell, study.CELLS)
    _tell(study.run(range(first_seed, first_seed + seeds), out / name, cell or study.CELLS), as_json)


for study_name, question in OF_MODELS.items():
    studies.command(study_name, help=question)(of_models)


@studies.command("task_forgetting")
def task_forgetting(
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    model: Annotated[str | None, typer.Option(help="A model folder or hub id, in place of the small one.")] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="With --model: a folder with one file of multiple-choice rows for each task.")
    ] = None,
    out: Out = Path("runs/studies"),
    as_json: Json = False,
) -> None:
    """Random labels for one task at a time: how far does forgetting reach, and what is still inside?"""
    if (model is None) != (tasks is None):
        raise SpecError("--model and --tasks go together: a model of yours and the folder of its tasks")
    with console.status("loading torch and transformers"):
        from palimpsest.studies.task_cells import given, toy
        from palimpsest.studies.task_forgetting import run
    span = range(first_seed, first_seed + seeds)
    setting = (lambda seed: given(model, tasks, seed)) if model and tasks else toy
    folder = out / "task_forgetting"
    claims = run(setting, span, folder)
    _tell(claims, as_json)
    console.print(f"matrices: {folder / 'matrix.html'}", highlight=False)


@studies.command("implicit_inference")
def implicit_inference(
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    setting: Annotated[
        str, typer.Option(help="demo takes minutes on one core; paper is the paper's size, for a GPU.")
    ] = ("demo"),
    cell: Annotated[list[str] | None, typer.Option(help="Measure only these networks, e.g. scaled, unit.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one.")] = None,
    out: Out = Path("runs/studies"),
    as_json: Json = False,
) -> None:
    """Is forgetting by fine-tuning a shift in which task is inferred, and do scaled prompts undo it?"""
    with console.status("loading torch and transformers"):
        import torch

        from palimpsest.studies.implicit_inference import Plan, run
        from palimpsest.studies.implicit_inference_cells import CELLS, SETTINGS
    _refuse_unknown("setting", [setting], list(SETTINGS))
    _refuse_unknown("cell", cell, CELLS)
    _refuse_unknown("device", [device] if device else None, ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    span, folder = range(first_seed, first_seed + seeds), out / "implicit_inference" / setting
    _tell(run(Plan(span, folder, SETTINGS[setting], cell or CELLS, device)), as_json)


def _refuse_unknown(option: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for wanted in given or ():
        if wanted not in known:
            raise SpecError(f"--{option} {wanted}: unknown; there are {', '.join(known)}")


def _tell(claims: "list[Claim]", as_json: bool) -> None:
    if as_json:
        print_json([asdict(claim) | {"verdict": claim.verdict} for claim in claims])
    else:
        show(claims)


def show(claims: "list[Claim]") -> None:
    """Claim by claim on standard output: the verdict, the statement, and the number that it rests on."""
    from rich.console import Console
    from rich.padding import Padding

    out = Console(highlight=False)
    for claim in claims:
        out.print(f"[bold]{escape(claim.id)}[/bold]  {claim.verdict}")
        for text in (claim.statement, f"{_number(claim)}: {claim.quantity}", claim.note):
            if text:
                out.print(Padding(escape(text), (0, 0, 0, 4)))


def _number(claim: "Claim") -> str:
    if claim.estimate is None:
        return "not measured"
    within = f" ({claim.low:.3g} to {claim.high:.3g})" if claim.low is not None and claim.high is not None else ""
    return f"{claim.estimate:.3g}{within}, {claim.seeds} {'seed' if claim.seeds == 1 else 'seeds'}"
