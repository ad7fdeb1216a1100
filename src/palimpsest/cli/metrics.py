"""`palimpsest metrics`: benchmark numbers from other tools' files, and membership inference on one model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import print_json, warn
from palimpsest.progress import console

app = typer.Typer(
    help="Benchmark numbers from other tools' files, and membership inference on one model.", no_args_is_help=True
)


@app.command("tofu-log")
def tofu_log(
    log: Annotated[Path, typer.Argument(help="The model's eval_log_aggregated.json.")],
    retain: Annotated[Path | None, typer.Option(help="The retain model's log, for Forget Quality.")] = None,
) -> None:
    """Print TOFU's Model Utility, truth ratio and Forget Quality as JSON."""
    with console.status("reading the logs"):
        from palimpsest.metrics.tofu_log import forget_questions, tofu_log_metrics

        metrics = tofu_log_metrics(log, retain)
        asked = forget_questions(log, retain) if retain else None
    if asked and asked.shared < asked.n_retain:
        warn(
            f"the logs share {asked.shared} forget questions of {asked.n} and {asked.n_retain}, "
            "so Forget Quality compares answers to different questions"
        )
    print_json(metrics)


@app.command("open-unlearning")
def open_unlearning(
    log: Annotated[Path, typer.Argument(help="The model's TOFU_EVAL.json or MUSE_EVAL.json.")],
    retain: Annotated[
        Path | None, typer.Option(help="The retain model's file, for Forget Quality and PrivLeak.")
    ] = None,
) -> None:
    """Print OpenUnlearning's numbers as JSON; with a retain model's file also what compares with it, recomputed."""
    with console.status("reading the logs"):
        from palimpsest.metrics.open_unlearning_log import (
            MIN_K,
            TRUTH_RATIO,
            logged_forget_quality,
            logged_privleak,
            read_open_unlearning_log,
        )

        ours = read_open_unlearning_log(log)
        theirs = read_open_unlearning_log(retain) if retain else None
        found: dict[str, object] = {name: metric.value for name, metric in ours.items()}
        if theirs and TRUTH_RATIO in ours:
            found["forget_quality (recomputed)"] = asdict(logged_forget_quality(ours, theirs))
        if theirs and MIN_K in ours:
            found["privleak (recomputed)"] = logged_privleak(ours, theirs)
    print_json(found)


@app.command("membership")
def membership(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    members: Annotated[str, typer.Argument(help="Rows it was trained on, or that were to be forgotten.")],
    nonmembers: Annotated[str, typer.Argument(help="Rows like them that no model was trained on.")],
    reference: Annotated[str | None, typer.Option(help="A model for the reference attack; gold is the best.")] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Measure gradient norms too; slow.")] = False,
    seed: Annotated[int, typer.Option(help="Of the split into calibration and test.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file for what every row costs by every attack.")] = None,
) -> None:
    """Can rows that were trained on be told from others? Every attack's AUC, and the best one tried on new rows."""
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import read_records
        from palimpsest.metrics.auc import auc
        from palimpsest.metrics.calibration import calibrate, halves, try_attack
        from palimpsest.metrics.membership import membership_scores, write_membership
        from palimpsest.models.language_model import load
    attacked, other = load(model), load(reference) if reference else None
    sides = [
        membership_scores(attacked, read_records(rows), reference=other, gradients=gradients)
        for rows in (members, nonmembers)
    ]
    if out:
        write_membership(out, *sides)
    inside, outside = sides
    found = {
        name: asdict(auc(inside.costs[name], outside.costs[name], inside.clusters, outside.clusters))
        for name in inside.costs
    }
    (inside_known, inside_new), (outside_known, outside_new) = (halves(side, seed=seed) for side in sides)
    attack = calibrate(inside_known, outside_known)
    tried = try_attack(attack, inside_new, outside_new)
    chosen = {
        "attack": attack.name,
        "inverted": attack.inverted,
        "auc": asdict(tried.auc),
        "true_positives": tried.true_positives,
        "false_positives": tried.false_positives,
    }
    print_json({"auc": found, "calibrated": chosen})
