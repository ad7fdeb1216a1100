"""Our training loop against transformers' Trainer: same model, same rows, same AdamW, same number of steps.

python benchmarks/training_loop.py --json
"""

import argparse
import logging
import tempfile

import torch
import transformers
from harness import in_turn, report

from palimpsest.data.batches import Encoded, epoch_order
from palimpsest.metrics.likelihood import target_nll
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, Recipe, new_model, training_examples
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.models.training import TrainingSettings, train
from palimpsest.worlds.facts import FactsWorld

STEPS, BATCH = 60, 8


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    world = FactsWorld(exposures=6)
    tokenizer = word_tokenizer(world.vocabulary_texts())
    examples = training_examples(world.documents(world.subjects), tokenizer, Recipe())
    full_rows = [row for row in examples if len(row.ids) == 64]
    settings = TrainingSettings(steps=STEPS, batch_size=BATCH, warmup=0, schedule="constant", weight_decay=0.0)

    def fresh() -> LanguageModel:
        return new_model(Architecture(), tokenizer, 0)

    def ours() -> float:
        return _loss(train(fresh(), full_rows, settings), full_rows)

    def trainers() -> float:
        return _loss(_with_trainer(fresh(), full_rows, settings), full_rows)

    seconds, theirs, agreement = in_turn(ours, trainers)
    tokens = STEPS * BATCH * 64
    report(
        f"training a 1.2 M parameter Llama for {STEPS} steps of {BATCH} x 64 tokens, fp32",
        f"transformers.Trainer {transformers.__version__}",
        seconds,
        theirs,
        agreement,
        tokens_per_second=round(tokens / sorted(seconds)[len(seconds) // 2]),
    )


def _with_trainer(model: LanguageModel, rows: list[Encoded], settings: TrainingSettings) -> LanguageModel:
    """The same batches in the same order through Trainer."""
    order = epoch_order(len(rows), 0, settings.seed)[: STEPS * BATCH]
    dataset = [{"input_ids": list(rows[place].ids), "labels": list(rows[place].ids)} for place in order]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            weight_decay=0.0,
            max_grad_norm=settings.clip,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
        )
        trainer = _InOrder(model=model.network, args=arguments, train_dataset=dataset)
        trainer.train()
    model.network.eval()
    return model


class _InOrder(transformers.Trainer):
    """Trainer without shuffling, so that both sides see the same batches."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:  # type: ignore[type-arg]
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _loss(model: LanguageModel, rows: list[Encoded]) -> float:
    return target_nll(model, rows[:64]).mean().item()


if __name__ == "__main__":
    main()
