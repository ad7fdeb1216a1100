"""`palimpsest concepts`: where a model keeps a concept, what unlearning did to it there, and whether it matters."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.output import WIDTH_OF_FILES, Json, print_json, warn
from palimpsest.cli.unlearn import Format, TemplateName
from palimpsest.errors import SpecError
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.data.concept_vectors import Concept
    from palimpsest.internals.concept_ablation import AblationResult, Effect
    from palimpsest.internals.concept_traces import Change, TokenTrace, VectorTrace
    from palimpsest.metrics.concept_behaviour import Agreement
    from palimpsest.models.language_model import LanguageModel

app = typer.Typer(help="Find a concept's value vectors, trace them, ablate them.", no_args_is_help=True)

Words = Annotated[str | None, typer.Option(help="The concept's words, with commas between: Hogwarts,wand,Quidditch.")]


@app.command("find")
def find(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    tokens: Words = None,
    rows: Annotated[str | None, typer.Option(help="Or rows: the concept is the tokens of their answers.")] = None,
    others: Annotated[
        str | None, typer.Option(help="Rows about other subjects: random sets are drawn from their answers.")
    ] = None,
    sets: Annotated[int, typer.Option(help="Random sets of tokens to search for as well.", min=1)] = 99,
    top_k: Annotated[int, typer.Option(help="Top tokens of each vector to print.", min=1)] = 10,
    limit: Annotated[int, typer.Option(help="Vectors to print.", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file for all vectors that were found.")] = None,
    format: Format = None,
    template: TemplateName = "plain",
    seed: Annotated[int, typer.Option(help="Of the random sets.")] = 0,
    as_json: Json = False,
) -> None:
    """Find the MLP value vectors whose top tokens are a concept's, above what the same search finds for random tokens.

    precision is the share of the concept's T tokens among the T that a vector says most, z how many deviations above
    its other tokens they stand. Sign - is the bottom of its projection. Without --others the random tokens only look
    like the concept's, which any model that answers questions beats; with it they are answers too.
    """
    if (tokens is None) == (rows is None):
        raise SpecError("give either --tokens or --rows, what the concept is")
    with console.status("loading torch and transformers"):
        from palimpsest.data.readers import read_records
        from palimpsest.internals.concepts import answer_tokens, discover, random_sets
        from palimpsest.internals.value_vectors import top_tokens
        from palimpsest.internals.vectors_file import described, refuse_other_suffix, write_vectors
        from palimpsest.models.language_model import load
        from palimpsest.run.spec import check_template

    if out:
        refuse_other_suffix(out)
    asked = check_template(template)
    records = {file: read_records(file, format) for file in (rows, others) if file}  # type: ignore[arg-type]
    loaded = load(model)
    tokenizer = loaded.tokenizer
    answers = {file: answer_tokens(tokenizer, each, template=asked) for file, each in records.items()}
    concept = answers[rows] if rows else tuple(_tokens_of(loaded, tokens or ""))
    pool = answers[others] if others else None
    with console.status("searching every layer"):
        found = discover(loaded, concept, random_sets(tokenizer, concept, sets, seed=seed, pool=pool))
        shown = (found.best, *found.found)
        tops = top_tokens(loaded, [each.vector for each in shown], top_k)
    texts = [[str(tokenizer.decode([token])) for token in top.ids] for top in tops]
    if out:
        write_vectors(out, found.found, tops[1:], texts[1:])
    best, *above = [described(*each) for each in zip(shown, tops, texts, strict=True)]
    written = [str(tokenizer.decode([token])) for token in concept]
    null = {"sets": sets, "drawn_from": others, "precision": found.null_precision, "z": found.null_z}
    if as_json:
        vectors = {"found": len(above), "best": best, "vectors": above[:limit]}
        print_json({"tokens": written, "null": null, **vectors, "file": str(out) if out else None})
        return
    typer.echo(f"{len(concept)} tokens: {', '.join(text.strip() for text in written[:20])}")
    typer.echo(f"The best of {sets} random sets: precision {found.null_precision:.2f}, z {found.null_z:.2f}.")
    typer.echo(f"Above it: {len(above)}." if above else "No vector is above it. The best:")
    _show_vectors(above[:limit] or [best])
    if out:
        typer.echo(str(out))


@app.command("evaluate")
def evaluate(
    original: Annotated[str, typer.Argument(help="The model before unlearning: a folder or hub id.")],
    unlearned: Annotated[str, typer.Argument(help="What was made of it.")],
    vectors: Annotated[Path, typer.Option(help="What `concepts find --out` wrote, or rows of ConceptVectors.")],
    tokens: Words = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows of ConceptVectors: also ask both models about these concepts.")
    ] = None,
    translated: Annotated[
        Path | None,
        typer.Option(help="The rows' questions in another language: one JSON object, concept to questions."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 100,
    as_json: Json = False,
) -> None:
    """What an unlearned model still has of a concept's vectors, and what it still says.

    A cosine near 1 is geometry: any small step of the weights leaves it, after training on something else too. z says
    how many deviations a vector changed more than the other columns of its layer. Jaccard is of the top 200 tokens,
    read with the original's unembedding and with each model's own. Read all of it beside a sham. What the models say is
    compared with the original's words: 1 says that nothing changed.
    """
    if translated and not rows:
        raise SpecError("--translated has the questions of --rows in another language; give both")
    with console.status("loading torch and transformers"):
        from palimpsest.data.concept_vectors import read_concepts, read_translated_questions
        from palimpsest.internals.concept_traces import token_traces, vector_traces
        from palimpsest.internals.vectors_file import read_vectors
        from palimpsest.models.language_model import load

    concepts = read_concepts(rows) if rows else []
    german = read_translated_questions(translated) if translated else {}
    before, after = load(original), load(unlearned)
    traces = vector_traces(before, after, read_vectors(vectors, before))
    of_tokens = token_traces(before, after, list(_tokens_of(before, tokens))) if tokens is not None else []
    said = {concept.name: _agreement(before, after, concept, german, max_new_tokens) for concept in concepts}
    if as_json:
        print_json(
            {
                "vectors": [_plain_trace(trace) for trace in traces],
                "tokens": [
                    {"text": str(before.tokenizer.decode([trace.token])), **asdict(trace)} for trace in of_tokens
                ],
                "behaviour": {
                    name: {test: _plain_agreement(found) for test, found in tests.items()}
                    for name, tests in said.items()
                },
            }
        )
        return
    _show_traces(traces)
    if of_tokens:
        _show_token_traces(of_tokens, [str(before.tokenizer.decode([trace.token])) for trace in of_tokens])
    if said:
        _show_agreement(said)


@app.command("ablate")
def ablate(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    forget: Annotated[str, typer.Option(help="Rows about the concept.")],
    retain: Annotated[str, typer.Option(help="Rows about anything else.")],
    vectors: Annotated[
        Path | None, typer.Option(help="What `concepts find --out` wrote, or rows of ConceptVectors.")
    ] = None,
    attributed: Annotated[
        int | None, typer.Option(help="Or so many neurons, those that contribute most to the rows' answers.", min=1)
    ] = None,
    how: Annotated[str, typer.Option(help="zero, mean or noise.")] = "zero",
    noise: Annotated[float, typer.Option(help="Deviation of the noise, in those of a layer's value matrix.")] = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the zeroed vectors as an update (the method needle).")
    ] = None,
    format: Format = None,
    template: TemplateName = "plain",
    seed: Annotated[int, typer.Option(help="Of the random neurons, of the noise and of the intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """Ablate value vectors and see what that costs the concept's answers and others', beside two controls.

    In nats a token of the true answer; below 0 it became less likely. random: as many random neurons in each layer.
    selective: those whose writing grows most on the concept's rows, whatever they write. The model is left as it is.
    """
    if (vectors is None) == (attributed is None):
        raise SpecError("give either --vectors or --attributed, what is to be ablated")
    if out and how != "zero":
        raise SpecError("--out writes zeroed vectors; for noise use palimpsest unlearn --method needle")
    with console.status("loading torch and transformers"):
        from palimpsest.data.batches import encode
        from palimpsest.internals.attribution import attribution, most
        from palimpsest.internals.concept_ablation import ablate_concept, check_ablation
        from palimpsest.internals.vectors_file import read_vectors
        from palimpsest.models.language_model import load
        from palimpsest.run.places import require_place
        from palimpsest.run.sources import request_from_files
        from palimpsest.run.spec import check_template
        from palimpsest.unlearn.needle import Needle

    ablation = check_ablation(how)
    if out:
        require_place(out, "update.json")
    asked = check_template(template)
    request = request_from_files(forget, retain, format=format, template=asked, seed=seed)
    kept = [*request.retain, *request.retain_held_out, *request.retain_unseen]
    loaded = load(model)
    with console.status("ablating"):
        if vectors:
            chosen = read_vectors(vectors, loaded)
        else:
            encoded = encode(request.forget, loaded.tokenizer, template=asked)
            chosen = most(attribution(loaded, encoded), attributed or 1)
        found = ablate_concept(
            *(loaded, chosen, request.forget, kept), how=ablation, noise=noise, template=asked, seed=seed
        )
    if out:
        places = tuple((vector.layer, vector.column) for vector in found.concept.vectors)
        Needle(vectors=places, zero=True, seed=seed).run(loaded, request).save(out)
    if as_json:
        print_json({"how": how, **asdict(found), "update": str(out) if out else None})
    else:
        _show_ablation(found)
        if out:
            typer.echo(str(out))


def _tokens_of(model: "LanguageModel", given: str) -> dict[int, str]:
    """The tokens of words with commas between; those that have none are named in a warning."""
    from palimpsest.internals.concepts import word_tokens

    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise SpecError("--tokens is empty; give words with commas between")
    found = word_tokens(model.tokenizer, words)
    if left_out := [word for word in words if word not in found.values()]:
        warn(f"left out, since they are not one token of this vocabulary: {', '.join(left_out)}")
    return found


def _agreement(
    before: "LanguageModel",
    after: "LanguageModel",
    concept: "Concept",
    translated: dict[str, tuple[str, ...]],
    max_new_tokens: int,
) -> "dict[str, Agreement]":
    from palimpsest.metrics.concept_behaviour import agreement, concept_prompts, said

    prompts = concept_prompts(concept, translated=translated.get(concept.name, ()))
    with console.status(f"asking about {concept.name}"):
        answers, originals = (said(model, prompts, max_new_tokens=max_new_tokens) for model in (after, before))
    return agreement(answers, originals)


def _plain_trace(trace: "VectorTrace") -> dict[str, Any]:
    jaccards = {"jaccard_frozen": trace.jaccard_frozen, "jaccard_own": trace.jaccard_own}
    return asdict(trace.vector) | asdict(trace.change) | jaccards


def _plain_agreement(found: "Agreement") -> dict[str, float]:
    return {"bleu": found.bleu.mean().item(), "rouge_l": found.rouge_l.mean().item(), "n": len(found.bleu)}


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[str] = ()) -> None:
    """A table on standard output; columns of words are set flush left."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=heading not in words)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=WIDTH_OF_FILES).print(table)


def _end(sign: int) -> str:
    return "+" if sign > 0 else "-"


def _show_vectors(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            f"{each['layer']}",
            f"{each['column']}",
            _end(each["sign"]),
            f"{each['precision']:.2f}",
            f"{each['z']:.2f}",
            " ".join(token.strip() for token in each["tokens"]),
        ]
        for each in found
    ]
    _show(("layer", "column", "sign", "precision", "z", "top tokens"), rows, words=("top tokens",))


def _changes(change: "Change") -> list[str]:
    return [f"{change.cosine:.4f}", f"{change.relative_l2:.4f}", "" if change.z is None else f"{change.z:.2f}"]


def _show_traces(traces: "list[VectorTrace]") -> None:
    widest = max(traces[0].jaccard_frozen, default=0)
    rows = [
        [
            f"{trace.vector.layer}",
            f"{trace.vector.column}",
            _end(trace.vector.sign),
            *_changes(trace.change),
            *(f"{found[widest]:.2f}" if widest else "" for found in (trace.jaccard_frozen, trace.jaccard_own)),
        ]
        for trace in traces
    ]
    _show(("layer", "column", "sign", "cosine", "rel. L2", "z", f"Jaccard@{widest}", "own unembedding"), rows)


def _show_token_traces(traces: "list[TokenTrace]", texts: Sequence[str]) -> None:
    rows = [
        [text.strip(), where, *_changes(getattr(trace, where))]
        for text, trace in zip(texts, traces, strict=True)
        for where in ("embedding", "unembedding")
    ]
    _show(("token", "row of the", "cosine", "rel. L2", "z"), rows, words=("token", "row of the"))


def _show_agreement(said: "dict[str, dict[str, Agreement]]") -> None:
    """Means over concepts of each test's means."""
    tests = dict.fromkeys(test for found in said.values() for test in found)
    rows = []
    for test in tests:
        means = [_plain_agreement(found[test]) for found in said.values() if test in found]
        rows.append(
            [
                test,
                f"{len(means)}",
                *(f"{sum(mean[name] for mean in means) / len(means):.3f}" for name in ("bleu", "rouge_l")),
            ]
        )
    _show(("asked", "concepts", "BLEU", "ROUGE-L"), rows, words=("asked",))


def _show_ablation(found: "AblationResult") -> None:
    def cells(effect: "Effect") -> list[str]:
        change = effect.change
        return [f"{change.value:.3f} ({change.low:.3f} to {change.high:.3f})", f"{effect.said:.2f}"]

    rows = [
        [name, f"{len(each.vectors)}", *cells(each.own), *cells(each.unrelated)]
        for name, each in (("concept", found.concept), ("random", found.random), ("selective", found.selective))
    ]
    _show(("ablated", "n", "concept's answers", "said", "others' answers", "said"), rows, words=("ablated",))
    before = found.concept
    typer.echo(
        f"Said before: {before.own.said_before:.2f} of the concept's, {before.unrelated.said_before:.2f} of others'."
    )
