"""`palimpsest audit MODEL`: is it forgotten? Every score beside its controls, and a verdict."""

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import CHECK_FAILED, Json, print_json, show_verdicts, verdicts_json
from palimpsest.cli.unlearn import Forget, Format, Retain, Seed, TemplateName
from palimpsest.progress import console


def audit(
    model: Annotated[str, typer.Argument(help="The model that unlearned: a folder or hub id, or an update's folder.")],
    original: Annotated[str, typer.Option(help="The model before unlearning.")],
    forget: Forget,
    retain: Retain,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    gold: Annotated[str | None, typer.Option(help="A model that never saw the forget set.")] = None,
    sham: Annotated[str | None, typer.Option(help="The original, trained further on retain rows alone.")] = None,
    format: Format = None,
    template: TemplateName = "plain",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest greedy answer, in tokens.")] = 48,
    lens: Annotated[
        str, typer.Option(help="With what the layers are read: tuned, ridge, jacobian, logit, or none.")
    ] = "tuned",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure a model beside its controls, write evidence and report, and exit with 1 unless it is erased."""
    with console.status("loading torch and transformers"):
        from palimpsest.run.pipeline import audit_candidates, load_candidates
        from palimpsest.run.sources import request_from_files
        from palimpsest.run.spec import check_lens, check_template

    asked = {
        "model": model,
        "original": original,
        "gold": gold,
        "sham": sham,
        "forget": str(forget),
        "retain": str(retain),
        "format": format,
        "template": template,
        "max_new_tokens": max_new_tokens,
        "lens": lens,
        "seed": seed,
    }
    kind = check_lens(lens)
    request = request_from_files(forget, retain, format=format, template=check_template(template), seed=seed)
    candidates = load_candidates(model, original=original, gold=gold, sham=sham)
    title = f"Audit of {candidates[-1].name}"
    found = audit_candidates(request, candidates, out, title=title, spec=asked, lens=kind)
    page = out / "report.html"
    if as_json:
        print_json({"report": str(page), **verdicts_json(found)})
    else:
        show_verdicts(found)
        typer.echo(f"Open the report: {page}")
        typer.echo(f"Check its evidence:  palimpsest verify {out}")
    verdict = found.models[-1].verdict
    if verdict is None or verdict.outcome != "erased":
        raise typer.Exit(CHECK_FAILED)
