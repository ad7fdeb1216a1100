"""A lens for a GPT-2 trained on WikiText-2: our fit against the training of the tuned-lens package.

python benchmarks/tuned_lens.py --data FOLDER --json [--size tiny|small] [--steps 100] [--tokens-per-step 2048]
    [--parity-steps 4] [--threads 1]

FOLDER holds wikitext2/ and gpt2_bpe_and_tinystories_sample/ (GPT-2's tokenizer, 50,257 entries). All is done with that
tokenizer, and again with one of 4,096 entries that is trained on the text. The models, which read one half of the text,
are trained once and kept in the cache. What is fair was settled like this:

- The peer is its own `Train(...).execute()` at its defaults (`tuned_lens_peer.py`): rows of the model's context, one
  at a time, bf16 autocast. It goes over as many rows as its steps take, once; our fit is given the same tokens in the
  same rows. Each side is a process of its own, with as many threads. `seconds` and `ratio` are of processor time.
- The peer's time and memory are counted from where it makes its lens, ours from the text, which it tokenises, to the
  finished lens: the model's passes, the closed form, the steps, and measuring on a tenth of the rows.
- A KL is the mean of KL(model || lens) over tokens that neither side nor model has read, in fp32, by one evaluator.
- `fits` are ours with ever more of the text and ever more steps, 0 being the closed form alone, each a whole fit.
  `to_mean` is the cheapest whose mean over the layers is at or below the peer's, `to_every_layer` the cheapest of which
  every layer is; null where none is. `all_text` are the same among those that are given all of the peer's tokens. The
  main `ratio` is that of `to_mean` with the larger vocabulary.
- `memory` is the peak above what the process held before, model and libraries, in MiB; `process` the whole peak.
- `tokens_per_cpu_second`: of the peer and of `recipe` (its recipe on our gradient, `studies/upstream_lens`) with the
  model's pass, the gradients of all layers and the optimiser; of `steps`, those of our fit, without the pass, because
  each token is read once before. `stages` are seconds of the processor; what is missing in their sum is tokenizing,
  hashing and solving.
- `parity` is the difference of the recipe's KL from the peer's, given the same batches: of the whole run, which with
  the peer is in bf16, and of a short one in which it is in fp32. `agreement` is the former's mean over the layers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
import transformers
from harness import peer_packages, report
from safetensors.torch import load_file
from small_gpt2 import SIZES, Size, halves, trained_model
from usage import Stopwatch, peak_memory

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.packing import pack
from palimpsest.data.readers import read_records
from palimpsest.data.records import Passage
from palimpsest.lens import fit as fitting
from palimpsest.lens.fit import fit
from palimpsest.lens.hidden import windows
from palimpsest.lens.kept import Kept
from palimpsest.lens.lens import Lens
from palimpsest.lens.others import read_tuned_lens
from palimpsest.lens.readout import Readout
from palimpsest.lens.refine import Refinement
from palimpsest.models.hardware import bf16_is_fast
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.workers import Workers
from palimpsest.progress import console
from palimpsest.studies.upstream_lens import fit_as_upstream

FITS = ((0.125, 0), (1, 0), (1, 1), (1, 2), (1, 5), (1, 10), (1, 20), (1, 40))
"""Share of the text and steps of ours; once all of the text reaches every layer, only `ENOUGH` is still tried."""
ENOUGH = 5
"""Steps to tell their rate by."""
JUDGED = 4096
"""Tokens that lenses are judged on."""
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("reading", fitting, "_gather"),
    ("starting", Refinement, "_start"),
    ("steps", Refinement, "_take_a_step"),
    ("measuring", Kept, "of"),
    ("measuring", Kept, "kls"),
)
"""Of our fit, and the functions that do them."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is to be measured."""

    data: Path
    size: Size
    steps: int
    tokens_per_step: int
    parity_steps: int
    threads: int

    @property
    def rows_per_step(self) -> int:
        """Rows of the model's context."""
        return self.tokens_per_step // self.size.context


def main() -> None:
    """Compare, or be one of the processes of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="WikiText-2 and GPT-2's tokenizer")
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--steps", type=int, default=100, help="of the peer, at most as many as the text has tokens for"
    )
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--parity-steps", type=int, default=4, help="of the short run in fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](**arguments.job)))
        return
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    settings = {name: getattr(arguments, name) for name in ("data", "steps", "tokens_per_step", "parity_steps")}
    compare(Run(size=SIZES[arguments.size], threads=arguments.threads, **settings))


def compare(run: Run) -> None:
    """Measure with every vocabulary, and print what was found."""
    found = {vocabulary: _compared(run, vocabulary) for vocabulary in run.size.vocabularies}
    vocabulary, first = next(iter(found.items()))
    report(
        f"a lens for a GPT-2 of {run.size.layers} layers of width {run.size.width} with {vocabulary} entries, as good "
        f"as after {first['peer']['steps']} of upstream's steps of {run.tokens_per_step} tokens",
        "tuned-lens 0.2.0",
        [(first["to_mean"] or first["fits"][-1])["cpu"]],
        [first["peer"]["cpu"]],
        abs(first["parity"]["run"]["mean"]),
        reached=first["to_mean"] is not None,
        vocabularies=found,
    )


def _compared(run: Run, vocabulary: int) -> Result:
    """All measurements with one vocabulary."""
    stored = trained_model(run.data, run.size, vocabulary)
    model = load(stored, check=False, device="cpu")
    texts, held_out = halves(run.data)[1]
    texts = _of_tokens(texts, model, run.steps * run.tokens_per_step)
    rows = windows([_joined(texts, model)], model)
    steps = min(run.steps, sum(len(row.ids) == run.size.context for row in rows) // run.rows_per_step)
    judge = Judge(model, pack(encode(held_out, model.tokenizer, end=True), length=run.size.context))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = [json.dumps({"text": text.text}) + "\n" for text in texts]
        (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
        bench = Bench(run, vocabulary, stored, model, folder, judge)
        peer = bench.peer("bf16", steps)
        _refuse_other_rows(folder / "bf16", rows, run.rows_per_step * steps)
        fits = bench.fits(peer)
        short, _ = bench.parity("fp32", bench.peer("fp32", min(run.parity_steps, steps)))
        whole, recipe = bench.parity("bf16", peer)
    rates = {side: found["tokens_per_cpu_second"] for side, found in (("peer", peer), ("recipe", recipe))}
    timed = next(one for one in fits if one["steps"] >= ENOUGH)
    rates["steps"] = timed["steps"] * run.tokens_per_step / timed["stages"]["steps"]
    return {
        "logit": judge.of(Lens.logit(model)),
        "peer": peer,
        "fits": fits,
        **_reached(fits, peer),
        "all_text": _reached([one for one in fits if one["share"] == 1], peer),
        "recipe": recipe,
        "tokens_per_cpu_second": rates,
        "parity": {"fp32": short, "run": whole},
    }


@dataclass(frozen=True)
class Bench:
    """Where both sides find what they work on, and leave what they made."""

    run: Run
    vocabulary: int
    stored: Path
    """The model's folder."""
    model: LanguageModel
    folder: Path
    """Holds `texts.jsonl`."""
    judge: "Judge"

    def peer(self, name: str, steps: int) -> Result:
        """The peer's training, in bf16 or fp32 as it is named; lens and batches go into the folder of that name."""
        (self.folder / name).mkdir()
        taken = _peer(self.run, self.stored, self.folder, name, steps)
        lens = read_tuned_lens(self.folder / name / "lens", self.model)
        return self._judged(f"{steps} steps of tuned-lens, {name}", {"steps": steps} | taken, lens)

    def fits(self, peer: Result) -> list[Result]:
        """Ours, ever more thorough."""
        found: list[Result] = []
        for share, steps in FITS:
            if steps != ENOUGH and any(one["share"] == 1 and _reaches(one, peer, "kl") for one in found):
                continue
            job = {"model": str(self.stored), "folder": str(self.folder), "share": share, "steps": steps}
            taken = _process(self.run, "ours", job | {"tokens_per_step": self.run.tokens_per_step})
            about, what = {"share": share, "steps": steps}, f"our fit, {share:.0%} of the text, {steps} steps"
            found.append(self._judged(what, about | taken, Lens.load(self.folder / "ours")))
        return found

    def parity(self, name: str, peer: Result) -> tuple[Result, Result]:
        """How far the peer's recipe on our gradient ends from the peer, given its batches; and what it took."""
        job = {"model": str(self.stored), "folder": str(self.folder / name), "products": name}
        taken = _process(self.run, "recipe", job | {"rows_per_step": self.run.rows_per_step})
        lens = Lens.load(self.folder / name / "ours")
        recipe = self._judged(f"{peer['steps']} steps of its recipe on our gradient, {name}", taken, lens)
        apart = [mine - theirs for mine, theirs in zip(recipe["kl"], peer["kl"], strict=True)]
        return {"steps": peer["steps"], "mean": mean(apart), "layers": apart}, recipe

    def _judged(self, what: str, taken: Result, lens: Lens) -> Result:
        result = taken | self.judge.of(lens)
        told = f"{self.vocabulary} entries, {what}: {taken['cpu']:.1f} s of the processor, KL {result['mean']:.4f}"
        console.print(told, highlight=False, soft_wrap=True)
        return result


class Judge:
    """Measures lenses on rows that nothing was fitted to."""

    def __init__(self, model: LanguageModel, rows: Sequence[Encoded]) -> None:
        self.readout = Readout.of(model)
        n = max(1, JUDGED // len(rows[0].ids))
        self.kept = Kept.of(model, rows[:n], self.readout, Workers())

    def of(self, lens: Lens) -> Result:
        """KL by layer, nats a token, and the mean over layers."""
        layers, d = self.kept.layers.shape[0], self.kept.layers.shape[-1]
        changes = torch.zeros(layers, d, d) if lens.changes is None else lens.changes
        biases = torch.zeros(layers, d) if lens.biases is None else lens.biases
        maps = torch.cat([changes, biases[..., None]], -1)
        found = list(self.kept.kls(dict(enumerate(maps)), self.readout).values())
        return {"kl": found, "mean": mean(found)}


def _reached(fits: Sequence[Result], peer: Result) -> Result:
    """The cheapest fits that are as good as the peer's lens, beside it."""
    found: Result = {}
    for name, what in (("to_mean", "mean"), ("to_every_layer", "kl")):
        enough = [one for one in fits if _reaches(one, peer, what)]
        mine = min(enough, key=lambda one: one["cpu"], default=None)
        found[name] = mine and {
            **{key: mine[key] for key in ("share", "steps", "cpu")},
            "cpu_ratio": peer["cpu"] / mine["cpu"],
            "memory_ratio": {of: mine["memory"][of] / peer["memory"][of] for of in mine["memory"]},
        }
    return found


def _reaches(mine: Result, peer: Result, what: str) -> bool:
    """Whether the mean over layers (`mean`), or every layer (`kl`), is at or below the peer's."""
    return bool((torch.tensor(mine[what]) <= torch.tensor(peer[what])).all())


# The processes.


def _process(run: Run, part: str, job: Result) -> Result:
    """One part of our side in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--part", part, "--job", json.dumps(job)]
    return _result([*command, "--threads", str(run.threads)], run, {})


def _peer(run: Run, model: Path, folder: Path, name: str, steps: int) -> Result:
    """The peer's training in a process that has its packages; lens and batches go into the folder of that name."""
    script = Path(__file__).with_name("tuned_lens_peer.py")
    # -P: this folder holds a tuned_lens of its own, which must not stand before the package.
    command = [sys.executable, "-P", "-W", "ignore", str(script), "--model", str(model), "--threads", str(run.threads)]
    command += ["--texts", str(folder / "texts.jsonl"), "--folder", str(folder / name), "--steps", str(steps)]
    command += ["--tokens-per-step", str(run.tokens_per_step), *(["--fp32"] if name == "fp32" else [])]
    packages = [str(peer_packages("tuned_lens-requirements.txt")), str(script.parent)]
    environment = {"PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(folder / "hub"), "TQDM_DISABLE": "1"}
    return _result(command, run, environment)


def _result(command: list[str], run: Run, environment: dict[str, str]) -> Result:
    """The JSON object that a process prints last."""
    threads = {"OMP_NUM_THREADS": str(run.threads)}
    done = subprocess.run(command, env=os.environ | threads | environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[3:6])}: ended with {done.returncode}; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def _ours(model: str, folder: str, share: float, steps: int, tokens_per_step: int) -> Result:
    """A whole fit, from a share of the text; the lens goes into the folder."""
    read, clock = load(model, check=False, device="cpu"), Stopwatch()
    text = _joined(read_records(Path(folder) / "texts.jsonl"), read).text
    fit(read, [Passage(text[:200]), Passage(text[200:400])], kind="ridge", quiet=True)  # to warm up
    given = Passage(text[: round(share * len(text))])
    with ExitStack() as timed:
        for stage, holder, name in STAGES:
            profiled = clock.profile(stage)(getattr(holder, name))
            timed.enter_context(patch.object(holder, name, staticmethod(profiled) if name == "of" else profiled))
        with peak_memory() as memory, clock.profile("fit"):
            kind: Any = "tuned" if steps else "ridge"
            lens = fit(read, [given], kind=kind, steps=max(1, steps), tokens_per_step=tokens_per_step, quiet=True)
    lens.save(Path(folder) / "ours")
    taken = {"seconds": clock.wall["fit"], "cpu": clock.cpu.pop("fit"), "memory": memory}
    return {"tokens": lens.provenance["tokens"]} | taken | {"stages": clock.cpu}


def _recipe(model: str, folder: str, rows_per_step: int, products: str) -> Result:
    """Upstream's recipe on our gradient, on the batches that the peer left in the folder; the lens goes there too."""
    read, clock = load(model, check=False, device="cpu"), Stopwatch()
    ids = load_file(Path(folder) / "batches.safetensors")["rows"].tolist()
    rows = [Encoded(tuple(row), 1, len(row)) for row in ids]
    batches = [rows[first : first + rows_per_step] for first in range(0, len(rows), rows_per_step)]
    fast = torch.bfloat16 if products == "bf16" and bf16_is_fast(read.device) else None
    fit_as_upstream(read, [batches[0][:1]], products=fast)  # to warm up
    with peak_memory() as memory, clock.profile("fit"):
        lens = fit_as_upstream(read, batches, products=fast)
    lens.save(Path(folder) / "ours")
    rate = lens.provenance["tokens"] / clock.cpu["fit"]
    return {"seconds": clock.wall["fit"], "cpu": clock.cpu["fit"], "memory": memory, "tokens_per_cpu_second": rate}


PARTS: dict[str, Callable[..., Result]] = {"ours": _ours, "recipe": _recipe}


# The texts.


def _of_tokens(texts: list[Passage], model: LanguageModel, tokens: int) -> list[Passage]:
    """As many of the first texts as have so many tokens."""
    total = 1
    for place, row in enumerate(encode(texts, model.tokenizer, end=True)):
        total += len(row.ids)
        if total > tokens:
            return texts[: place + 1]
    return texts


def _joined(texts: Sequence[Any], model: LanguageModel) -> Passage:
    """As upstream joins them: the end of text before each."""
    end = str(model.tokenizer.eos_token)
    return Passage(end.join(["", *(text.text for text in texts)]))


def _refuse_other_rows(folder: Path, rows: Sequence[Encoded], n: int) -> None:
    """Make sure that the peer went over the rows that our fit is given, each at most once."""
    theirs = {tuple(row) for row in load_file(folder / "batches.safetensors")["rows"].tolist()}
    if len(theirs) != n or not theirs <= {row.ids for row in rows}:
        sys.exit(f"the peer went over {len(theirs)} rows where {n} of ours were expected; is its data path another?")


if __name__ == "__main__":
    main()
