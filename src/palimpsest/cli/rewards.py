"""`palimpsest rewards`: learn a reward from preferences, freeze it, and see whether it holds for a fresh learner."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.output import CHECK_FAILED, WIDTH_OF_FILES, Json, print_json, warn
from palimpsest.errors import SpecError
from palimpsest.progress import console, progress

if TYPE_CHECKING:
    from palimpsest.relearning.judgement import RelearnReport
    from palimpsest.rewards.preference_loop import LearnedReward
    from palimpsest.rewards.relearning import Relearned

PAGE = "relearning.html"
HEAD = ("learner", "seeds", "learned", "floor", "ceiling", "fails", "verdict")

app = typer.Typer(
    help="Learn a reward from preferences, freeze it, and see whether it holds for a fresh learner.",
    no_args_is_help=True,
)


@app.command("run")
def run(
    out: Annotated[Path, typer.Option(help="A new folder for the frozen reward.")],
    world: Annotated[str, typer.Option(help="near, stay or slope.")] = "near",
    horizon: Annotated[int, typer.Option(help="Steps of every episode.", min=1)] = 30,
    kind: Annotated[str, typer.Option(help="table, one number a cell; or mlp, a small network.")] = "table",
    members: Annotated[int, typer.Option(help="Of an ensemble.", min=1)] = 1,
    pessimism: Annotated[float, typer.Option(help="Deviations among members taken off their mean.", min=0)] = 0.0,
    l2: Annotated[float, typer.Option(help="Weight of the squared parameters in the loss.", min=0)] = 0.0,
    rounds: Annotated[int, typer.Option(help="Of 64 episodes of the sampler.", min=1)] = 30,
    comparisons: Annotated[int, typer.Option(help="In all rounds together.", min=1)] = 600,
    temperature: Annotated[float, typer.Option(help="Of the judge: the higher, the more it errs.", min=0)] = 1.0,
    seeds: Annotated[int, typer.Option(help="Runs, from the first seed on.", min=1)] = 20,
    first_seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Learn a reward from comparisons beside a sampler that learns from it, and freeze it.

    The sampler's return, 0 that of the uniform policy and 1 the best there is, is what is usually shown for a reward;
    `palimpsest rewards relearn` asks a fresh learner.
    """
    with console.status("loading numpy"):
        from palimpsest.files import refuse_foreign_folder
        from palimpsest.rewards.gridworlds import WORLDS
        from palimpsest.rewards.preference_loop import PreferenceSettings, learn_reward
        from palimpsest.rewards.relearning import GOOD
        from palimpsest.rewards.reward_folder import DESCRIPTION, write_reward
        from palimpsest.rewards.reward_models import RewardSettings

    if world not in WORLDS:
        raise SpecError(f"--world {world}: unknown; there are {', '.join(WORLDS)}")
    refuse_foreign_folder(out, DESCRIPTION)
    settings = PreferenceSettings(
        reward=RewardSettings(kind=kind, members=members, pessimism=pessimism, l2=l2),  # type: ignore[arg-type]
        rounds=rounds,
        comparisons=comparisons,
        temperature=temperature,
    )
    with progress() as display:
        task = display.add_task("learning", total=rounds, note="")
        learned = learn_reward(
            WORLDS[world](horizon),
            settings,
            range(first_seed, first_seed + seeds),
            report=lambda done, total, note: display.update(task, completed=done, total=total, note=note),
        )
    write_reward(learned, out)
    scores = learned.sampler_score
    good = int((scores >= GOOD).sum())
    if as_json:
        print_json({"reward": str(out), "sampler": scores.tolist(), "good": good})
    else:
        typer.echo(f"The sampler's true return is {scores.mean():.2f}; {good} of {seeds} are {GOOD:g} or more.")
        typer.echo(str(out))


@app.command("relearn")
def relearn(
    reward: Annotated[Path, typer.Argument(help="A folder that `palimpsest rewards run` wrote.")],
    learner: Annotated[
        list[str] | None, typer.Option(help="q_learner, strong_q_learner and planner unless some are named.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a frozen reward to learners that begin afresh, and say whether it holds.

    Beside each learner stand the same learner on a constant reward (floor) and on the true one (ceiling). Seeds whose
    sampler did badly, or whose learner cannot learn the true reward, are set aside and counted. The exit code is 1
    where the reward fails.
    """
    with console.status("loading numpy"):
        from palimpsest.files import write_text
        from palimpsest.relearning.judgement import worst_case
        from palimpsest.report.rewards_page import RelearnPanel, render_rewards_page
        from palimpsest.rewards.relearning import RELEARNERS, relearn_reward
        from palimpsest.rewards.reward_folder import read_reward

    for name in learner or ():
        if name not in RELEARNERS:
            raise SpecError(f"--learner {name}: unknown; there are {', '.join(RELEARNERS)}")
    learned = read_reward(reward)
    found = {}
    for name in learner or RELEARNERS:
        with console.status(f"{name} learns"):
            found[name] = relearn_reward(learned, RELEARNERS[name])
    reports = {name: each.report for name, each in found.items() if each.report}
    worst = worst_case(reports) if reports else None
    signals = _signals(learned)
    page = reward / PAGE
    panels = [RelearnPanel(name.replace("_", " "), report) for name, report in reports.items()]
    told = _verdict(reports[worst], worst) if worst else "No seed says anything: no sampler did well."
    tables = [_table(found)]
    title = f"A reward learned in the world {learned.world.name}"
    write_text(page, render_rewards_page(title, told, panels, tables))
    if as_json:
        verdict = reports[worst].verdict if worst else "INCONCLUSIVE"
        relearned = {name: each.to_json() for name, each in found.items()}
        print_json(
            {"verdict": verdict, "learner": worst, "report": str(page), "signals": signals, "learners": relearned}
        )
    else:
        _show(found, told, signals)
        typer.echo(f"\nOpen the report: {page}")
    if worst is None:
        warn("no sampler did well, so there is nothing that a relearner could fail to reach")
    elif reports[worst].verdict == "FAIL":
        raise typer.Exit(CHECK_FAILED)


def _rows(found: "dict[str, Relearned]") -> list[list[str]]:
    """A row a learner, at the sampler's own budget."""
    rows = []
    for name, each in found.items():
        report = each.report
        if report is None:
            rows.append([name, "0", "", "", "", "", "no seed says anything"])
            continue
        point = report.points[min(1, len(report.points) - 1)]
        values = [f"{value:.2f}" for value in (point.artefact, point.floor, point.ceiling)]
        verdict = f"{report.verdict} {report.reason}".strip()
        rows.append([name, f"{len(each.seeds)}", *values, str(each.failures), verdict])
    return rows


def _table(found: "dict[str, Relearned]") -> Any:
    from palimpsest.report.heat_map import Table

    lead = "True returns at the sampler's own budget, means over the seeds that say something."
    return Table("Every learner", lead, HEAD, _rows(found))


def _signals(learned: "LearnedReward") -> dict[str, float]:
    """What is known without the truth, means over seeds."""
    from palimpsest.rewards.signals import ALARM, NEEDS_TRUTH, signals

    found = signals(learned)
    means = {name: float(values.mean()) for name, values in found.items() if name not in NEEDS_TRUTH}
    return means | {"alarms": float((found["proxy_gap"] > ALARM).mean())}


def _verdict(report: "RelearnReport", learner: str) -> str:
    return f"{report.verdict}, {learner}: {report.summary}."


def _show(found: "dict[str, Relearned]", told: str, signals: dict[str, float]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    for heading in HEAD:
        table.add_column(heading, justify="left" if heading in ("learner", "verdict") else "right", no_wrap=True)
    for row in _rows(found):
        table.add_row(*map(escape, row))
    Console(width=WIDTH_OF_FILES).print(table)
    typer.echo(told)
    bad = next(iter(found.values())).bad_samplers
    if bad:
        typer.echo(f"Set aside, since the sampler itself did badly: {len(bad)} of the seeds.")
    typer.echo(
        f"Without the truth: proxy gap {signals['proxy_gap']:.2f}, an alarm in {signals['alarms']:.0%} of all seeds; "
        f"{signals['rarely_compared']:.0%} of the planner's visits go to cells rarely compared; "
        f"accuracy {signals['accuracy']:.2f}."
    )
