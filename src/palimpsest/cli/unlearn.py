"""`palimpsest unlearn MODEL`: make a model forget, and keep the change as an update."""

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import Json, print_json
from palimpsest.errors import SpecError, StorageError
from palimpsest.progress import console

Forget = Annotated[Path, typer.Option(help="Questions and answers to forget (JSONL, JSON, CSV, Parquet).")]
Retain = Annotated[Path, typer.Option(help="Questions and answers to keep.")]
Format = Annotated[str | None, typer.Option(help="The rows' schema, where it cannot be told: tofu, lume, ….")]
TemplateName = Annotated[str, typer.Option(help="How a question is put: plain, chat or raw.")]
Seed = Annotated[int, typer.Option(help="Of the retain split, of batches and of intervals.")]


def unlearn(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    forget: Forget,
    retain: Retain,
    out: Annotated[Path, typer.Option(help="The folder for the update.")],
    method: Annotated[
        str, typer.Option(help="By its name in docs/methods.md, e.g. kfade, npo, simnpo, rmu, dpo, undial.")
    ] = "kfade",
    set_: Annotated[list[str], typer.Option("--set", help="A setting of the method, e.g. --set beta=0.2.")] = [],  # noqa: B006
    gold: Annotated[str | None, typer.Option(help="A model that never saw the forget set: stop at its level.")] = None,
    forget_probability: Annotated[
        float | None, typer.Option(help="Without a gold: stop at this mean answer probability on the forget set.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 200,
    retain_kl: Annotated[float | None, typer.Option(help="Budget: KL on held-out retain rows, nats/token.")] = None,
    save_model: Annotated[Path | None, typer.Option(help="Also write the changed model to this folder.")] = None,
    format: Format = None,
    template: TemplateName = "plain",
    seed: Seed = 0,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the anatomy's self-checks.")] = False,
    as_json: Json = False,
) -> None:
    """Forget some rows, keep others, and write what changed as an update that can be applied and undone."""
    with console.status("loading torch and transformers"):
        from palimpsest.models.language_model import load
        from palimpsest.run.pipeline import forget_level, make_update
        from palimpsest.run.places import require_place
        from palimpsest.run.sources import request_from_files
        from palimpsest.run.spec import check_template, make_method
        from palimpsest.unlearn.stopping import Stop

    require_place(out, "update.json")
    if save_model:
        require_place(save_model, "palimpsest.json")
        if save_model.resolve() == Path(model).resolve():
            raise StorageError(f"{save_model}: is the model to start from, which would be lost; choose another folder")
    if gold and forget_probability is not None:
        raise SpecError("--gold and --forget-probability both say where to stop; give one of them")
    chosen = make_method(method, set_, seed)
    request = request_from_files(forget, retain, format=format, template=check_template(template), seed=seed)
    original = load(model, check=not no_check)
    level = forget_level(load(gold, check=False), request) if gold else forget_probability
    stop = Stop(steps, level, retain_kl)
    update = make_update(chosen, original, request, stop, out)
    if save_model:
        update.apply(original).save(save_model)
    last = update.provenance["trace"][-1]
    found = {
        "update": str(out),
        "model": str(save_model) if save_model else None,
        "stopped": update.provenance["stopped"],
        "forget_probability": last["forget_probability"],
        "retain_kl": last["retain_kl"],
        "seconds": update.provenance["seconds"],
    }
    if as_json:
        print_json(found)
    else:
        typer.echo(f"Stopped at step {last['step']:g}: {found['stopped']}.")
        typer.echo(f"Forget set: answer probability {last['forget_probability']:.3f}.")
        typer.echo(f"Held-out retain rows: KL {last['retain_kl']:.4f} nats/token.")
        typer.echo(f"Update: {out}" + (f"   Model: {save_model}" if save_model else ""))
