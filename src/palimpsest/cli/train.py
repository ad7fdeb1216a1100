"""`palimpsest train`: the organism and its controls, as model folders."""

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import Json, print_json
from palimpsest.cli.run import DEMO
from palimpsest.progress import console


def train(
    out: Annotated[Path, typer.Argument(help="The folder for full, gold, sham, forget.jsonl and retain.jsonl.")],
    spec: Annotated[Path | None, typer.Option(help="A YAML specification; the demo's facts by default.")] = None,
    data: Annotated[str | None, typer.Option(help="In place of data.path: a folder or a hub id.")] = None,
    seed: Annotated[int, typer.Option(help="Of the demo's facts, models and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Train full (reads everything), gold (never reads the forget set) and sham (full, then retain rows alone).

    Beside them stand their rows and `train.json`, the specification they were made from.
    """
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import write_records
        from palimpsest.files import write_json
        from palimpsest.run.pipeline import controls_of
        from palimpsest.run.places import require_place
        from palimpsest.run.sources import open_source
        from palimpsest.run.spec import make_spec, read_spec

    read = read_spec(spec, data=data) if spec else make_spec(DEMO | {"seed": seed})
    require_place(out, "train.json")
    source = open_source(read)
    controls = controls_of(read, source)
    write_json(out / "train.json", read.resolved())
    paths = {}
    for name, control in controls.items():
        paths[name] = str(control.model.save(out / ("full" if name == "original" else name)))
    request = source.request
    for name, rows in {"forget": request.forget, "retain": request.all_retain}.items():
        path = out / f"{name}.jsonl"
        write_records(list(rows), path)
        paths[name] = str(path)
    if as_json:
        print_json(paths)
    else:
        for name, folder in paths.items():
            typer.echo(f"{name:10} {folder}")
