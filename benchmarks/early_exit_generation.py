"""Generation that stops at a block: a 12-layer Llama that is trained here, decoded in every way there is, in turn.

python benchmarks/early_exit_generation.py --json --data FOLDER [--trained exits|last] [--models FOLDER]
    [--size tiny|small] [--runs 5]

FOLDER holds wikitext2/{test,valid}.txt. The model reads the first, lens and policy learn from the first part of the
second, and the rest of it is held out. It is trained for its exits as well as its last block, or for its last block
alone and then read through a tuned lens; data, steps and optimiser are the same. What is fair was settled like this:

- Every side goes on from the same held-out prompts by as many tokens, a row at a time, and takes turns with the others;
  a side's ratio is the median over turns of the time of full depth in our own loop over its own. Full depth by
  transformers' `generate` is a side too, and says what our loop is worth.
- Seconds are this thread's processor time where torch has one thread, so other load on the machine moves them little;
  `threads` says how many it had.
- `quality` is what speed costs. `teacher_forced`: perplexity of held-out text that is fed token by token, exits taken
  by the policy, keys and values as exits leave them. `free_running`: perplexity that the whole network finds in what
  was generated; greedy text repeats itself, so it is held against the same of full depth.
- Generated text is easier than held-out text, so exits come earlier in it. The sides called `forced` decode held-out
  text itself, token by token, and are what goes with `teacher_forced`. `best_at_equal_perplexity` gives both, of the
  rules whose perplexity is within a hundredth of full depth's, and of full depth's of the model that was trained for
  its last block alone, so that nothing is won by a worse model. It is chosen on other held-out rows (`chosen_on`) than
  those that `quality` is measured on.
- `break_even` is what every exit could gain at most, measured in parts before any policy was trained. `predicted` is
  how well those parts foretell generation at fixed exits that were not timed, `predicted_policies` at those that
  policies take.
- Self-speculation says what full depth says (`agreement` counts the tokens that differ); the peer's is transformers'
  `assistant_early_exit`, at the same exit.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
import transformers
from harness import report
from torch import Tensor
from torch.nn.functional import cross_entropy

from palimpsest.data.batches import Encoded, batches, collate, encode
from palimpsest.data.packing import pack
from palimpsest.data.readers import read_records
from palimpsest.data.records import Passage, records_hash
from palimpsest.early_exit.cost import Parts, break_even, measure, predicted_and_measured
from palimpsest.early_exit.decoding import Decoding, Fill
from palimpsest.early_exit.generation import ConfidentExit, ExitRule, FixedExit, Heads, PolicyExit, generate, step
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.early_exit.self_speculation import speculate
from palimpsest.early_exit.stack import Stack
from palimpsest.early_exit.token_policy import copied_pass, fit_token_policy
from palimpsest.early_exit.token_training import train_token_exits
from palimpsest.early_exit.training import ExitTraining
from palimpsest.files import content_hash
from palimpsest.lens.fit import fit
from palimpsest.lens.lens import Lens
from palimpsest.metrics.likelihood import target_nll
from palimpsest.models.language_model import LanguageModel, evaluating, load
from palimpsest.models.organism import Architecture, cache_folder, new_model
from palimpsest.models.tokenizers import byte_pair_tokenizer
from palimpsest.progress import console


@dataclass(frozen=True)
class Size:
    """A Llama, how it is trained, and what is generated."""

    architecture: Architecture
    vocabulary: int
    training: ExitTraining
    exits: tuple[int, ...]
    prompts: int
    prompt: int
    """Tokens of each."""
    new: int
    """Tokens generated on each."""
    rows: int
    """That the policy learns from, at most."""


SIZES = {
    "tiny": Size(
        Architecture(layers=4, width=32, mlp_width=64, heads=2, context=64),
        400,
        ExitTraining(steps=30, batch_size=8, learning_rate=3e-3, muon_learning_rate=0.02, weight_decay=0.1),
        exits=(1, 2, 3),
        prompts=2,
        prompt=16,
        new=8,
        rows=40,
    ),
    "small": Size(
        Architecture(layers=12, width=256, mlp_width=688, heads=8, context=256),
        2048,
        ExitTraining(steps=500, batch_size=8, learning_rate=3e-3, muon_learning_rate=0.01, weight_decay=0.1),
        exits=(3, 6, 9),
        prompts=4,
        prompt=64,
        new=48,
        rows=160,
    ),
}
PRICES = (0.003, 1.0)
"""Of a whole pass, nats, that the policy is trained for."""
TRIED = (0.003, 0.01, 0.03, 0.05, 0.07, 0.1, 0.3)
SURE = (0.5, 0.9)
"""Thresholds of confidence, asked for after every block."""
JUDGED, PROMPTS = 64, 12
"""Held-out rows that quality is measured on (others, as many, choose among the rules), and prompts."""
Said = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens and exits."""
ALLOWED = 1.01
"""Held-out perplexity, as a multiple of full depth's."""


def main() -> None:
    """Train what is missing, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--data", type=Path, required=True, help="the folder with wikitext2/")
    parser.add_argument("--trained", choices=("exits", "last"), default="exits")
    parser.add_argument("--models", type=Path, help="where the trained models are kept")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    size = SIZES[arguments.size]
    folder = arguments.models or cache_folder() / "benchmarks" / "early-exit-generation"
    only_last = _trained(arguments.data, size, folder, "last")
    model, lens = only_last if arguments.trained == "last" else _trained(arguments.data, size, folder, "exits")
    learned, held_out = (
        pack(encode(texts, model.tokenizer, end=True), length=size.architecture.context)
        for texts in _halves(arguments.data)
    )
    side, plain = (_Side(one, its, Stack.of(one.network), size, held_out) for one, its in ((model, lens), only_last))
    context = size.prompt + size.new // 2
    parts = measure(model, context=min(context, size.architecture.context - 16), lens=lens, stack=side.stack)
    policy = fit_token_policy(
        model,
        learned[: size.rows],
        size.exits,
        parts.times(size.exits),
        PolicySettings(prices=PRICES),
        lens=lens,
        stack=side.stack,
        report=_told("policy"),
    )
    rules: dict[str, ExitRule] = {f"policy {price:g}": PolicyExit(size.exits, policy, price) for price in TRIED}
    everywhere = tuple(range(1, size.architecture.layers))
    rules |= {f"confidence {sure:g}": ConfidentExit(everywhere, sure) for sure in SURE}
    rules |= {f"fixed {blocks}": FixedExit(blocks) for blocks in size.exits}
    whole = FixedExit(size.architecture.layers)
    quality = {name: side.quality(rule) for name, rule in {"full": whole, **rules}.items()}
    sides: dict[str, Callable[[], list[Said]]] = {
        "full": lambda: side.ours(whole),
        "transformers": lambda: side.peers(),
        **{name: partial(side.ours, rule) for name, rule in rules.items()},
        **{
            f"fixed {blocks} {fill}": partial(side.ours, FixedExit(blocks), fill)
            for blocks in size.exits
            for fill in ("eager", "catch_up")
        },
        **{f"self-speculation {blocks}": partial(side.speculated, blocks) for blocks in size.exits},
        "assistant_early_exit": lambda: side.peers(assistant_early_exit=size.exits[0]),
    }
    forced = {f"{name}, forced": partial(side.forced, rule) for name, rule in {"full": whole, **rules}.items()}
    seconds, said = side.in_turn(sides | forced, arguments.runs)
    ratios = {
        name: _ratio(seconds["full, forced" if name in forced else "full"], took) for name, took in seconds.items()
    }
    lossless = ("transformers", "assistant_early_exit", *(name for name in sides if name.startswith("self-spec")))
    judging, choosing = held_out[:JUDGED], held_out[JUDGED : 2 * JUDGED]
    chosen_on = {name: side.perplexity(rule, choosing) for name, rule in {"full": whole, **rules}.items()}
    most = ALLOWED * min(chosen_on["full"], plain.perplexity(whole, choosing))
    kept = [name for name in rules if chosen_on[name] <= most]
    between = [blocks for blocks in everywhere if blocks not in parts.depths] or list(size.exits)
    report(
        f"{size.new} tokens on each of {size.prompts} prompts of {size.prompt} by a Llama of {whole.blocks} blocks of "
        f"width {size.architecture.width}, trained for its {'exits' if arguments.trained == 'exits' else 'last block'}",
        f"transformers {transformers.__version__} generate",
        seconds["full"],
        seconds["transformers"],
        max(_differing(said["full"], said[name]) for name in lossless),
        milliseconds_per_token={name: 1e3 * median(took) for name, took in seconds.items()},
        faster_than_full=ratios,
        quality=quality,
        trained_for_its_last_block=plain.perplexity(whole, judging),
        chosen_on=chosen_on,
        blocks_run={name: _mean_blocks(answers) for name, answers in said.items()},
        best_at_equal_perplexity={
            text: max(((ratios[name + suffix]["median"], name) for name in kept), default=None)
            for text, suffix in (("held out", ", forced"), ("generated", ""))
        },
        drafts_kept={
            name: _share_below(said[name], whole.blocks) for name in sides if name.startswith("self-speculation")
        },
        break_even=[asdict(line) for line in break_even(parts, size.exits)],
        parts=asdict(parts),
        predicted=[
            asdict(one) | {"error": one.error}
            for one in predicted_and_measured(model, parts, between, lens=lens, stack=side.stack)
        ],
        predicted_policies={
            name: _predicted(parts, size.exits, said[name], 1e3 * median(seconds[name]))
            for name in (*sides, *forced)
            if name.startswith("policy")
        },
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """What every side does: go on from the same prompts, a row at a time."""

    model: LanguageModel
    lens: Lens
    stack: Stack
    size: Size
    rows: Sequence[Encoded]
    """Held-out ones."""

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """How they begin."""
        return [row.ids[: self.size.prompt] for row in self.rows]

    def ours(self, rule: ExitRule, fill: Fill = "lazy", *, prompts: int | None = None) -> list[Said]:
        """The answers, tokens and exits."""
        asked = self.prompts[: prompts or self.size.prompts]
        said = generate(
            self.model, asked, rule, max_new_tokens=self.size.new, fill=fill, lens=self.lens, stack=self.stack
        )
        return [(one.tokens, one.exits) for one in said]

    def speculated(self, blocks: int) -> list[Said]:
        """The same by self-speculation."""
        asked = self.prompts[: self.size.prompts]
        said = speculate(
            self.model, asked, blocks=blocks, max_new_tokens=self.size.new, lens=self.lens, stack=self.stack
        )
        return [(one.tokens, one.exits) for one in said]

    def forced(self, rule: ExitRule) -> list[Said]:
        """The same loop, but fed with how the held-out rows do go on, whatever is said."""
        said, heads = [], Heads(self.model, self.lens)
        with evaluating(self.model):
            for row in self.rows[: self.size.prompts]:
                prompt = collate([Encoded(row.ids[: self.size.prompt], 1, self.size.prompt)], [0])
                decoding = Decoding(self.stack, prompt, self.size.new, "lazy")
                first = heads.tokens(heads.logits(decoding.prefill(), self.stack.n_layers))
                tokens, exits, going = [int(first)], [self.stack.n_layers], torch.ones(1, dtype=torch.bool)
                for fed in row.ids[self.size.prompt :][: self.size.new - 1]:
                    token, exit = step(decoding, rule, heads, torch.tensor([fed]), going)
                    tokens.append(int(token))
                    exits.append(int(exit))
                said.append((tuple(tokens), tuple(exits)))
        return said

    def peers(self, **how: Any) -> list[Said]:
        """The same by transformers' own `generate`."""
        end, found = self.model.tokenizer.eos_token_id, []
        for prompt in self.prompts[: self.size.prompts]:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                row = self.model.network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=self.size.new,
                    eos_token_id=end,
                    pad_token_id=end,
                    **how,
                )[0, len(prompt) :].tolist()
            tokens = tuple(row[: row.index(end)] if end in row else row)
            found.append((tokens, (self.stack.n_layers,) * len(tokens)))
        return found

    def in_turn(
        self, sides: dict[str, Callable[[], list[Said]]], runs: int
    ) -> tuple[dict[str, list[float]], dict[str, list[Said]]]:
        """Seconds a token of each run of each side, the prompts' pass taken off, and what each said."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        said: dict[str, list[Said]] = {}
        once = replace(self.size, new=1)
        for _ in range(runs):
            started = _now()
            replace(self, size=once).ours(FixedExit(self.stack.n_layers))
            prefill = _now() - started
            for name, run in sides.items():
                started = _now()
                said[name] = run()
                n_tokens = sum(max(len(tokens), 1) for tokens, _ in said[name])
                seconds[name].append((_now() - started - prefill) / max(1, n_tokens - len(said[name])))
            console.print(f"a turn took {_now() - started:.0f} s", highlight=False)
        return seconds, said

    def perplexity(self, rule: ExitRule, rows: Sequence[Encoded]) -> float:
        """Of held-out rows, with exits by the rule."""
        return math.exp(self._teacher_forced(rule, rows)[0])

    def quality(self, rule: ExitRule) -> dict[str, float]:
        """Perplexity of held-out rows with exits by the rule, of what is generated by it, and the blocks of each."""
        nll, exits = self._teacher_forced(rule, self.rows[:JUDGED])
        said = self.ours(rule, prompts=PROMPTS)
        asked = self.prompts[:PROMPTS]
        answered = [
            Encoded((*prompt, *tokens), len(prompt), len(prompt) + len(tokens))
            for prompt, (tokens, _) in zip(asked, said, strict=True)
            if tokens
        ]
        own = target_nll(self.model, answered)
        lengths = torch.tensor([float(row.n_targets) for row in answered])
        ran = [float(exit) for _, exits_of in said for exit in exits_of[1:]]
        return {
            "teacher_forced": math.exp(nll),
            "blocks": exits,
            "free_running": math.exp(float((own * lengths).sum() / lengths.sum())),
            "free_running_blocks": sum(ran) / max(1, len(ran)),
        }

    def _teacher_forced(self, rule: ExitRule, rows: Sequence[Encoded]) -> tuple[float, float]:
        """Mean nats a token and mean blocks a token."""
        places, heads, last = list(rule.exits), Heads(self.model, self.lens), self.stack.n_layers
        total, blocks_run, n = 0.0, 0, 0
        with evaluating(self.model):
            for batch in batches(rows, batch_size=8):
                exits, read = torch.full_like(batch.ids, last), torch.zeros(())

                def leaves(blocks: int, states: Tensor, exits: Tensor = exits) -> Tensor:
                    nonlocal read
                    if blocks not in places:
                        return torch.zeros_like(exits, dtype=torch.bool)
                    given = heads.logits(states, blocks) if rule.reads_logits else states
                    leaving = rule.leaves(places.index(blocks), given.flatten(0, 1)).view(exits.shape)
                    leaving = leaving & (exits == last)
                    exits[leaving] = blocks
                    read = torch.where(leaving[..., None], self.lens.translate(states, blocks), read)
                    return leaving

                states = copied_pass(self.stack, batch, leaves)
                states = torch.where((exits == last)[..., None], states, read)
                logits = heads.logits(states, last)[:, :-1]
                scored = batch.targets[:, 1:]
                nll = cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
                total += float(nll[scored.flatten()].sum())
                blocks_run += int(exits[:, :-1][scored].sum())
                n += int(scored.sum())
        return total / n, blocks_run / n


def _now() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _ratio(full: Sequence[float], side: Sequence[float]) -> dict[str, float]:
    ratios = [whole / own for whole, own in zip(full, side, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _differing(ours: Sequence[Said], others: Sequence[Said]) -> float:
    """The share of our tokens that another side does not say at the same place."""
    pairs = list(zip(ours, others, strict=True))
    same = sum(one == other for (own, _), (said, _) in pairs for one, other in zip(own, said, strict=False))
    return 1 - same / sum(max(len(own), len(said)) for (own, _), (said, _) in pairs)


def _predicted(parts: Parts, exits: Sequence[int], said: Sequence[Said], measured: float) -> dict[str, float]:
    """Milliseconds a token at the exits that a policy took."""
    predicted = mean(parts.policy(exit, exits) for _, exits_of in said for exit in exits_of[1:])
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def _mean_blocks(said: Sequence[Said]) -> float:
    exits = [exit for _, exits_of in said for exit in exits_of[1:]]
    return sum(exits) / max(1, len(exits))


def _share_below(said: Sequence[Said], last: int) -> float:
    exits = [exit for _, exits_of in said for exit in exits_of[1:]]
    return sum(exit < last for exit in exits) / max(1, len(exits))


def _trained(data: Path, size: Size, folder: Path, what: Literal["exits", "last"]) -> tuple[LanguageModel, Lens]:
    """A model, and what its exits are read through; what is not there is trained."""
    read, (learned, _) = _texts(data, "test"), _halves(data)
    about = [asdict(size), records_hash(read), records_hash(learned), torch.__version__]
    folder = folder / content_hash(about)[:12] / what
    if not (folder / "model").exists():
        tokenizer = byte_pair_tokenizer([text.text for text in read], vocab_size=size.vocabulary)
        tokenizer.model_max_length = size.architecture.context
        model = new_model(size.architecture, tokenizer, 0)
        rows = pack(encode(read, tokenizer, end=True), length=size.architecture.context)
        exits = size.exits if what == "exits" else (size.architecture.layers,)
        train_token_exits(model, rows, exits, size.training, report=_told(f"training ({what})"))
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "model")
    model = load(folder / "model", device="cpu", check=False)
    if what == "exits":
        return model, Lens.logit(model)
    if not (folder / "lens").exists():
        fit(model, learned, steps=40, tokens_per_step=1024, quiet=True).save(folder / "lens")
    return model, Lens.load(folder / "lens")


def _texts(data: Path, name: str) -> list[Passage]:
    records = read_records(data / "wikitext2" / f"{name}.txt")
    return [Passage(row.text) for row in records if isinstance(row, Passage)]


def _halves(data: Path) -> tuple[list[Passage], list[Passage]]:
    """What lens and policy learn from, and what is held out."""
    texts = _texts(data, "valid")
    n = round(0.6 * len(texts))
    return texts[:n], texts[n:]


def _told(what: str) -> Callable[[int, int, str], None]:
    last = [0.0]

    def told(done: int, of: int, note: str) -> None:
        if time.monotonic() - last[0] > 30 or done == of:
            last[0] = time.monotonic()
            console.print(f"{what}: {done} of {of}, {note}", highlight=False)

    return told


if __name__ == "__main__":
    main()
