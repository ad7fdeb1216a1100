"""TOFU's perturbed answers: row_logprobs against lm-eval's HFLM.loglikelihood.

python benchmarks/scoring.py --data FOLDER --json [--file forget10_perturbed.json] [--size llama|gpt2] [--questions 100]
    [--runs 5] [--threads 1]

FOLDER holds TOFU's JSON files. A question has an answer, a paraphrase and five wrong answers; of real authors and world
facts it has an answer and three or four wrong ones. The weights are random, the tokenizer is trained on TOFU's full
set. What is fair was settled like this:

- Both sides are given the same network in fp32, the same tokenizer and the same texts, and tokenize them in the time
  that is taken.
- Each side has the batch size with which it is fastest on a tenth of the questions; `tuning` has the processor time of
  each. HFLM's default is one row at a time; its `auto` looks for the largest batch that fits, which is for a GPU.
- `agreement` is the largest difference of an answer's log-likelihood, nats/token; `total` that of a whole answer, nats,
  which HFLM sums in fp32.
- `read` are the tokens that went into the network and `unembedded` those whose logits were computed, padding included.
  Matrix products at one speed on both sides, and nothing else, would make the ratio of these that of the times.
- `cpu` is the ratio of processor times, which other work on the machine disturbs less.
"""

import argparse
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
import transformers
from harness import in_turn, peer_packages, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palimpsest.data.batches import encode
from palimpsest.data.prompts import render
from palimpsest.data.readers import read_records
from palimpsest.data.records import QA
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import row_logprobs
from palimpsest.models.tokenizers import byte_pair_tokenizer

BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="TOFU's JSON files")
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--file", default="forget10_perturbed.json")
    parser.add_argument("--size", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    questions = read_records(arguments.data / arguments.file)
    asked = random.Random(0).sample(questions, min(arguments.questions, len(questions)))
    texts = [f"{row.question} {row.answer}" for row in read_records(arguments.data / "full.json")]
    model = _model(arguments.size, byte_pair_tokenizer(texts, vocab_size=16384))
    sides = Side(_ours, model), Side(_lm_eval, model)
    for side in sides:
        side.tune(_answers(asked[: max(1, len(asked) // 10)]))
    answers = _answers(asked)
    ours, theirs = sides
    seconds, peers, _ = in_turn(lambda: ours.run(answers), lambda: theirs.run(answers), runs=arguments.runs)
    n_tokens = torch.tensor([row.n_targets for row in encode(answers, model.tokenizer)])
    apart = (ours.found - theirs.found).abs()
    parameters = sum(value.numel() for value in model.network.parameters()) / 1e6
    report(
        f"log-likelihoods of {len(answers)} answers to {len(asked)} questions of TOFU's {arguments.file}, "
        f"a {type(model.network).__name__} of {parameters:.0f} M parameters, fp32",
        "lm-eval 0.4.13, HFLM.loglikelihood",
        seconds,
        peers,
        (apart / n_tokens).max().item(),
        total=apart.max().item(),
        cpu=median(other / mine for mine, other in zip(ours.cpu, theirs.cpu, strict=True)),
        batch_size={"ours": ours.batch_size, "peer": theirs.batch_size},
        tuning={"ours": ours.tuning, "peer": theirs.tuning},
        **{what: {"ours": ours.work[what], "peer": theirs.work[what]} for what in ("read", "unembedded")},
    )


Score = Callable[[LanguageModel, list[QA], int], Tensor]
"""The model, answers and a batch size to [answers] log-likelihoods, nats."""


@dataclass
class Side:
    """One side of the comparison, with what it took."""

    score: Score
    model: LanguageModel
    batch_size: int = 1
    tuning: dict[int, float] = field(default_factory=dict)
    found: Tensor = field(default_factory=lambda: torch.empty(0))
    cpu: list[float] = field(default_factory=list)
    work: Counter[str] = field(default_factory=Counter)

    def tune(self, answers: list[QA]) -> None:
        """Take the batch size that is the fastest on these answers."""
        self.score(self.model, answers, self.batch_size)
        for batch_size in BATCH_SIZES:
            started = time.process_time()
            self.score(self.model, answers, batch_size)
            self.tuning[batch_size] = round(time.process_time() - started, 2)
        self.batch_size = min(self.tuning, key=lambda size: self.tuning[size])

    def run(self, answers: list[QA]) -> float:
        """Score the answers, and give their log-likelihood in all."""
        work: Counter[str] = Counter()
        network = self.model.network
        handles = [
            network.get_input_embeddings().register_forward_hook(
                lambda _, ids, __: work.update(read=ids[0].numel()),
            ),
            network.get_output_embeddings().register_forward_hook(
                lambda _, __, logits: work.update(unembedded=logits[..., 0].numel()),
            ),
        ]
        started = time.process_time()
        self.found = self.score(self.model, answers, self.batch_size)
        self.cpu.append(time.process_time() - started)
        for handle in handles:
            handle.remove()
        self.work = work
        return self.found.sum().item()


def _ours(model: LanguageModel, answers: list[QA], batch_size: int) -> Tensor:
    return row_logprobs(model, encode(answers, model.tokenizer), batch_size=batch_size)


def _lm_eval(model: LanguageModel, answers: list[QA], batch_size: int) -> Tensor:
    folder = str(peer_packages("scoring-requirements.txt"))
    if folder not in sys.path:
        sys.path.append(folder)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch_size)
    requests = [Instance("loglikelihood", {}, render(answer, model.tokenizer), 0) for answer in answers]
    return torch.tensor([found for found, _ in peer.loglikelihood(requests, disable_tqdm=True)])


def _answers(questions: list[QA]) -> list[QA]:
    """Every question with each of its answers."""
    return [
        replace(row, answer=answer)
        for row in questions
        for answer in (row.answer, *filter(None, [row.paraphrased_answer]), *row.wrong)
    ]


def _model(size: str, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    torch.manual_seed(0)
    if size == "gpt2":
        network = GPT2LMHeadModel(GPT2Config()).eval()
    else:
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=512,
                intermediate_size=1408,
                num_hidden_layers=6,
                num_attention_heads=8,
                max_position_embeddings=512,
            )
        ).eval()
    return LanguageModel(network, tokenizer, Anatomy.of(network))


if __name__ == "__main__":
    main()
