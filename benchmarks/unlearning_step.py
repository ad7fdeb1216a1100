"""A step of unlearning on TOFU: our descent against a transformers Trainer that goes down the same loss.

python benchmarks/unlearning_step.py --data FOLDER --json [--method npo|grad_diff] [--runs 5] [--threads 1]

FOLDER holds TOFU's JSON files. The model is a Llama of Pythia-70M's size and vocabulary with random weights, in fp32.
Most of our advantage is the unembedding's, so it shrinks where that is a smaller share of the model than here. What is
fair was settled like this:

- The Trainer is the usual one for unlearning: an item is a forget row with a retain row, each side of a batch is padded
  to its longest, losses are read from full logits, and NPO runs the reference model in every step. All else is as
  Trainer's defaults are.
- The losses are the same by definition: NPO (arXiv 2404.05868, equation 3) over whole answers, gradient difference
  (arXiv 2401.06121, section 3) over the mean of a batch's answer tokens, both with that mean on retain rows beside.
- Both sides read the same token ids in the same batches, with the same AdamW, rate and bound on the gradient.
- A step lasts from one loss to the next. `cpu` is the ratio of processor time, which other load on the machine moves
  less. `whole_run` is all of a run: with Trainer its making; with us the start model's log-probabilities, the weights'
  hashes and two measurements of forgetting and damage, which Trainer does without.
- `agreement` is the largest difference of a step's two losses, relative to the loss where that is above one nat: the
  terms of gradient difference cancel in the beginning.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from harness import in_turn, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from palimpsest.data.batches import Encoded
from palimpsest.data.readers import read_records
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.tokenizers import byte_pair_tokenizer
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.losses import Objective, Sampler, sampler
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop

VOCABULARY, RETAIN_ROWS, STEPS = 50_304, 200, 12
METHODS: dict[str, Descent] = {
    "npo": NPO(batch_size=8, learning_rate=1e-5),
    "grad_diff": GradientDifference(batch_size=8, learning_rate=1e-5),
}
IGNORED = -100
"""The label of a token that no loss counts."""


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="TOFU's JSON files")
    parser.add_argument("--method", choices=METHODS, default="npo")
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    method = METHODS[arguments.method]
    forget, retain = (read_records(arguments.data / f"{name}.json") for name in ("forget01", "retain99"))
    request = Request.split(forget, retain[:RETAIN_ROWS])
    model = _model([f"{row.question} {row.answer}" for row in forget + retain])
    ours: list[Clock] = []
    theirs: list[Clock] = []

    def descend() -> float:
        ours.append(Clock())
        _timed(method, ours[-1]).run(model, request, Stop(STEPS, measure_every=STEPS))
        return ours[-1].losses[-1]

    def train() -> float:
        theirs.append(Clock())
        _with_trainer(method, model, request, theirs[-1])
        return theirs[-1].losses[-1]

    our_runs, their_runs, _ = in_turn(descend, train, runs=arguments.runs)
    size = sum(value.numel() for value in model.network.parameters()) / 1e6
    pairs = list(zip(ours, theirs, strict=True))
    report(
        f"a step of {method.name} on TOFU, {method.batch_size} forget and {method.batch_size} retain rows, "
        f"a Llama of {size:.0f} M parameters, fp32",
        f"transformers.Trainer {transformers.__version__}",
        [clock.step("wall") for clock in ours],
        [clock.step("wall") for clock in theirs],
        max(_apart(mine, other) for mine, other in pairs),
        cpu=median(other.step("cpu") / mine.step("cpu") for mine, other in pairs),
        whole_run={"steps": STEPS, "ours": median(our_runs), "peer": median(their_runs)},
    )


class Clock:
    """The losses of a run's steps, and when each was known on the clock (`wall`) and by processor time (`cpu`)."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: dict[str, list[float]] = {"wall": [], "cpu": []}

    def note(self, loss: Tensor) -> Tensor:
        """Take down a step's loss, and give it back."""
        self.losses.append(loss.item())
        self.times["wall"].append(time.perf_counter())
        self.times["cpu"].append(time.process_time())
        return loss

    def step(self, which: str) -> float:
        """Seconds a step, the median; the first is left out, in which AdamW's moments are made."""
        return median(after - before for before, after in pairwise(self.times[which][1:]))


def _apart(ours: Clock, theirs: Clock) -> float:
    steps = zip(ours.losses, theirs.losses, strict=True)
    return max(abs(mine - other) / max(1.0, abs(other)) for mine, other in steps)


def _timed(method: Descent, clock: Clock) -> Descent:
    """The method, whose losses the clock takes down."""

    class Timed(type(method)):  # type: ignore[misc]
        def objective(self, model: LanguageModel, request: Request) -> Objective:
            loss = super().objective(model, request)
            return lambda step: clock.note(loss(step))

    return Timed(**asdict(method))


def _model(texts: Sequence[str]) -> LanguageModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config).eval()
    return LanguageModel(network, byte_pair_tokenizer(texts, vocab_size=VOCABULARY), Anatomy.of(network))


# The other side


def _with_trainer(method: Descent, model: LanguageModel, request: Request, clock: Clock) -> None:
    """The same batches in the same order, down the same loss."""
    forget = _in_order(sampler(method, model, request, request.forget))
    retain = _in_order(sampler(method, model, request, request.retain, salt=1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=method.batch_size,
            learning_rate=method.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=method.clip,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = TRAINERS[method.name](
            model.copy().network, arguments, _padded, train_dataset=list(zip(forget, retain, strict=True))
        )
        trainer.clock, trainer.method, trainer.reference = clock, method, model.network
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def _in_order(rows: Sampler) -> list[Encoded]:
    return [rows.encoded[row] for step in range(STEPS) for row in rows.at(step).rows]


def _padded(pairs: Sequence[tuple[Encoded, Encoded]]) -> dict[str, dict[str, Tensor]]:
    """Each side as a model's inputs [B, T]; the labels of prompts and padding are ignored."""
    forget, retain = zip(*pairs, strict=True)
    return {"forget": _inputs(forget), "retain": _inputs(retain)}


def _inputs(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [
        line.masked_fill(torch.arange(len(line)) < row.start, IGNORED) for row, line in zip(rows, ids, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(line) for line in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


class UnlearningTrainer(Trainer):
    """Trainer on pairs of forget and retain rows, without shuffling, so that both sides see the same batches."""

    clock: Clock
    method: Any
    reference: PreTrainedModel

    def forget_loss(self, model: nn.Module, forget: dict[str, Tensor]) -> Tensor:
        """The loss on forget rows [B, T]."""
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, inputs: dict[str, dict[str, Tensor]], *_: object, **__: object) -> Tensor:
        """The forget loss and the retain rows' NLL, nats/token."""
        return self.clock.note(self.forget_loss(model, inputs["forget"]) + model(**inputs["retain"]).loss)

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:  # type: ignore[type-arg]
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class NPOTrainer(UnlearningTrainer):
    """NPO with the reference model beside."""

    def forget_loss(self, model: nn.Module, forget: dict[str, Tensor]) -> Tensor:
        """-(2/beta) * mean log sigmoid(-beta * log(p / p_reference)) over rows."""
        beta = self.method.beta
        with torch.no_grad():
            before = _answer_logprobs(self.reference, **forget)
        return -2 / beta * logsigmoid(-beta * (_answer_logprobs(model, **forget) - before)).mean()


class GradientDifferenceTrainer(UnlearningTrainer):
    """Gradient ascent on the forget rows."""

    def forget_loss(self, model: nn.Module, forget: dict[str, Tensor]) -> Tensor:
        """-NLL, nats/token."""
        return -model(**forget).loss


TRAINERS = {"npo": NPOTrainer, "grad_diff": GradientDifferenceTrainer}


def _answer_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """[B] log-probability of each row's whole answer, nats."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape).sum(1)


if __name__ == "__main__":
    main()
