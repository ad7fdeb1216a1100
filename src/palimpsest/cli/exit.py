"""`palimpsest exit ...`: answer as soon as the answer is there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from palimpsest.cli.output import Json, print_json
from palimpsest.errors import SpecError
from palimpsest.progress import console, progress

if TYPE_CHECKING:
    from palimpsest.early_exit.encoder import Encoder
    from palimpsest.models.language_model import LanguageModel

app = typer.Typer(help="Stop when the answer is there: exits fitted to a model, used and timed.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A model folder or hub id.")]
Rows = Annotated[Path, typer.Option(help="Rows with `text` and `label` (.jsonl, .json, .csv, .parquet).")]
ExitsArgument = Annotated[Path, typer.Argument(help="The folder that `palimpsest exit fit` wrote.")]
MaxLength = Annotated[int, typer.Option(help="Longer rows are cut at their end, in tokens.", min=2)]
IsEncoder = Annotated[bool, typer.Option("--encoder", help="The model is an encoder (BERT and its like).")]
BatchSize = Annotated[int, typer.Option(help="Rows at a time.", min=1)]


@app.command("fit")
def fit(
    model: Model,
    data: Rows,
    out: Annotated[Path, typer.Option(help="Where the exits are written.")] = Path("exits"),
    layer: Annotated[list[int] | None, typer.Option(help="After which blocks to have exits; all unless named.")] = None,
    preset: Annotated[Literal["default", "consistentee"], typer.Option(help="How the policy is trained.")] = "default",
    max_drop: Annotated[float, typer.Option(help="Accuracy that may be lost, at 95 % confidence.")] = 0.01,
    max_length: MaxLength = 512,
    encoder: IsEncoder = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="A policy for generation instead; rows have `text` alone.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the split, heads and policy.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit heads and a policy to a model that stays as it is, and choose how early it may answer.

    A third of the rows trains the heads, a third the policy, and a third, which neither has seen, tells how early.
    """
    with console.status("loading torch and transformers"):
        import torch

        from palimpsest.early_exit.classifier import CONSISTENTEE, ExitClassifier
        from palimpsest.early_exit.examples import encode_examples, read_examples
        from palimpsest.early_exit.policy_training import PolicySettings
    loaded = _load(model, encoder)
    if generation:
        _fit_generation(loaded, data, out, layer, max_length, seed)
        return
    texts, labels = read_examples(data)
    examples = encode_examples(texts, labels, loaded.tokenizer, max_length=max_length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    for_heads, for_policy, held_out = (examples.take(order[part::3]) for part in range(3))
    exits = ExitClassifier.of(loaded, examples.classes, layer, seed=seed)
    settings = CONSISTENTEE if preset == "consistentee" else PolicySettings(seed=seed)
    with progress() as display:
        task = display.add_task("heads", total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            display.update(task, completed=done, total=total, note=note)

        exits.fit_heads(for_heads, report=report)
        display.update(task, description="policy")
        exits.fit_policy(for_policy, settings, report=report)
    point = exits.calibrate(held_out, max_drop=max_drop)
    exits.save(out)
    if as_json:
        print_json({"out": str(out), "layers": exits.layers, "classes": exits.classes, "point": asdict(point)})
        return
    Console(highlight=False).print(
        f"{out}: {point.layers:.2f} of {exits.stack.n_layers} blocks a row, accuracy {point.accuracy:.3f} where all "
        f"blocks have {point.full_accuracy:.3f} (the drop is between {point.drop_low:+.3f} and {point.drop_high:+.3f} "
        f"with 95 % confidence, {point.n} held-out rows)"
    )


@app.command("classify")
def classify(
    exits: ExitsArgument,
    model: Model,
    data: Annotated[Path, typer.Option(help="Rows with `text` (.jsonl, .json, .csv, .parquet).")],
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    encoder: IsEncoder = False,
) -> None:
    """Label texts, each as deep as it needs: one JSON object a row, with its label and the blocks that it took."""
    with console.status("loading torch and transformers"):
        from palimpsest.early_exit.classifier import ExitClassifier
        from palimpsest.early_exit.examples import encode_texts, read_texts
    loaded = _load(model, encoder)
    fitted = ExitClassifier.load(exits, loaded)
    rows = encode_texts(read_texts(data), loaded.tokenizer, max_length=max_length)
    found = fitted.classify(rows, batch_size=batch_size)
    for label, layer in zip(found.labels.tolist(), found.layers.tolist(), strict=True):
        typer.echo(json.dumps({"label": fitted.classes[label], "blocks": layer}))


@app.command("generate")
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What the model goes on from; give it as often as you like.")],
    blocks: Annotated[
        int | None, typer.Option(help="Draft with so many blocks and let the whole model check: nothing changes.")
    ] = None,
    exits: Annotated[Path | None, typer.Option(help="What `exit fit --generation` wrote: stop early instead.")] = None,
    price: Annotated[float, typer.Option(help="With --exits: of a whole pass, in nats of divergence.")] = 0.3,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 64,
) -> None:
    """Go on greedily after prompts, by self-speculation or by a policy: one JSON object a prompt."""
    with console.status("loading torch and transformers"):
        from palimpsest.early_exit.generator import ExitGenerator
        from palimpsest.early_exit.self_speculation import speculate
        from palimpsest.models.language_model import load
    if (blocks is None) == (exits is None):
        raise SpecError("give --blocks, and the text is the whole model's, or --exits, and it may be another")
    loaded = load(model)
    prompts = [loaded.tokenizer(text)["input_ids"] for text in prompt]
    if exits:
        found = ExitGenerator.load(exits, loaded).generate(prompts, price=price, max_new_tokens=max_new_tokens)
    else:
        assert blocks is not None
        found = speculate(loaded, prompts, blocks=blocks, max_new_tokens=max_new_tokens)
    for text, said in zip(prompt, found, strict=True):
        continuation = str(loaded.tokenizer.decode(list(said.tokens), skip_special_tokens=True))
        typer.echo(json.dumps({"prompt": text, "continuation": continuation, "blocks": said.exits}, ensure_ascii=False))


@app.command("bench")
def bench(
    model: Model,
    data: Rows,
    exits: Annotated[Path | None, typer.Option(help="What `exit fit` wrote; without it, only the break-even.")] = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    encoder: IsEncoder = False,
    as_json: Json = False,
) -> None:
    """Time the parts, say where early exit begins to pay, and with --exits measure what it saves."""
    with console.status("loading torch and transformers"):
        from palimpsest.early_exit import bench as timing
        from palimpsest.early_exit.classifier import ExitClassifier
        from palimpsest.early_exit.examples import encode_examples, read_examples
    loaded = _load(model, encoder)
    texts, labels = read_examples(data)
    examples = encode_examples(texts, labels, loaded.tokenizer, max_length=max_length)
    fitted = ExitClassifier.load(exits, loaded) if exits else ExitClassifier.of(loaded, examples.classes)
    with console.status("timing the parts, and classifying in full and early" if exits else "timing the parts"):
        measured = timing.bench(fitted, examples.rows, batch_size=batch_size) if exits else None
        parts = measured.parts if measured else timing.costs(fitted, examples.rows, batch_size)
    table = timing.break_even(parts)
    if as_json:
        print_json({"costs": asdict(parts), "break_even": table, "measured": measured and asdict(measured)})
        return
    out = Console(highlight=False)
    out.print(f"{parts.rows[-1]} rows at a time take {parts.whole[-1]:.2f} ms through all blocks")
    for layer, ratio in table.items():
        out.print(f"  if all rows leave after {layer:>2} of {fitted.stack.n_layers} blocks: {ratio:.2f} x")
    if measured:
        low, high = measured.ratio[1:]
        out.print(
            f"measured: {measured.full_ms:.2f} ms a row in full, {measured.early_ms:.2f} early, "
            f"{measured.ratio[0]:.2f} x ({low:.2f} to {high:.2f}; {measured.predicted_ratio:.2f} predicted) at "
            f"{measured.layers:.2f} blocks a row; {measured.agreement:.1%} of the rows are told the same"
        )


@app.command("compare")
def compare(
    exits: ExitsArgument,
    model: Model,
    data: Rows,
    out: Annotated[Path, typer.Option(help="The page that is drawn.")] = Path("exits.html"),
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    encoder: IsEncoder = False,
    as_json: Json = False,
) -> None:
    """Draw accuracy against time: the policy beside confidence, patience, fixed exits and the oracle."""
    with console.status("loading torch and transformers"):
        from palimpsest.early_exit.classifier import ExitClassifier
        from palimpsest.early_exit.examples import encode_examples, read_examples
        from palimpsest.early_exit.frontier import frontier
        from palimpsest.files import atomic_path
        from palimpsest.report.exits_page import render_exits_page
    loaded = _load(model, encoder)
    fitted = ExitClassifier.load(exits, loaded)
    texts, labels = read_examples(data)
    examples = encode_examples(texts, labels, loaded.tokenizer, classes=fitted.classes, max_length=max_length)
    # The page's place is taken first, so that minutes of timing are not lost to a folder that cannot be written.
    with atomic_path(out) as page, console.status("timing the parts, and asking every exit"):
        found = frontier(fitted, examples, batch_size=batch_size)
        page.write_text(render_exits_page(f"Exits of {loaded.name}", found), encoding="utf-8")
    if as_json:
        print_json({"out": str(out)} | asdict(found))
        return
    best, whole = found.chosen or found.lines[0].fastest(found.whole.accuracy - 0.01), found.whole
    told = f"{whole.milliseconds / best.milliseconds:.2f} x at accuracy {best.accuracy:.3f}, " if best else ""
    Console(highlight=False).print(f"{out}: {told}all blocks {whole.milliseconds:.2f} ms a row, {whole.accuracy:.3f}")


def _fit_generation(
    model: "LanguageModel | Encoder", data: Path, out: Path, layer: list[int] | None, max_length: int, seed: int
) -> None:
    from palimpsest.early_exit.encoder import Encoder
    from palimpsest.early_exit.examples import encode_texts, read_texts
    from palimpsest.early_exit.generator import ExitGenerator
    from palimpsest.early_exit.policy_training import PolicySettings

    if isinstance(model, Encoder):
        raise SpecError("--generation and --encoder exclude each other: an encoder generates nothing")
    n_layers = model.anatomy.n_layers
    exits = layer or sorted({max(1, n_layers // 3), max(1, 2 * n_layers // 3)})
    rows = encode_texts(read_texts(data), model.tokenizer, max_length=max_length)
    with progress() as display:
        task = display.add_task("policy for tokens", total=None, note="")
        fitted = ExitGenerator.fit(
            model,
            rows,
            exits,
            PolicySettings(seed=seed),
            report=lambda done, total, note: display.update(task, completed=done, total=total, note=note),
        )
    fitted.save(out)
    Console(highlight=False).print(
        f"{out}: exits after {', '.join(map(str, exits))} of {n_layers} blocks, for prices of "
        f"{fitted.settings.prices[0]:g} to {fitted.settings.prices[1]:g} nats a token"
    )


def _load(model: str, encoder: bool) -> "LanguageModel | Encoder":
    if encoder:
        from palimpsest.early_exit.encoder import load_encoder

        return load_encoder(model)
    from palimpsest.models.language_model import load

    return load(model)
