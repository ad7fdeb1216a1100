"""Who's Harry Potter: what training further raises belongs to the forget set; learn what would be said without it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from palimpsest.data.batches import collate
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import predict
from palimpsest.models.training import TrainingSettings, train
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, Sampler, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class WHP(Keeping):
    """Minimise NLL of the generic predictions at the forget answers' tokens, plus a retain term.

    The generic prediction is the likeliest token by z_start - alpha ReLU(z_reinforced - z_start), z_reinforced being
    the logits of the model trained further on the forget set. The paper also has a language model replace names in the
    forget text, which is left out; MUSE uses the formula at decoding, with both models in memory.
    """

    name: ClassVar[str] = "whp"
    source: ClassVar[str] = "Eldan & Russinovich 2023, arXiv 2310.02238, without replaced names"

    alpha: float = 5.0
    """How much of what reinforcement raised is taken off."""
    tuning_steps: int = 50
    """Steps of reinforcement."""
    tuning_rate: float = 3e-4
    """AdamW's rate there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("alpha", "tuning_steps", "tuning_rate")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """NLL(generic predictions), nats/token."""
        forget = sampler(self, model, request, request.forget)
        labels = self.generic_labels(model, forget)

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            wanted = torch.cat([labels[row] for row in batch.rows]).to(model.device)
            return nn.functional.cross_entropy(predict(model.network, batch).logits, wanted)

        return loss

    @property
    def _reinforcement(self) -> TrainingSettings:
        return TrainingSettings(
            steps=self.tuning_steps,
            batch_size=self.batch_size,
            learning_rate=self.tuning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            warmup=1,
            schedule="constant",
            clip=self.clip,
            seed=self.seed,
        )

    def generic_labels(self, model: LanguageModel, forget: Sampler) -> list[Tensor]:
        """Of each forget row, a token for each target: [n_targets] ids on the CPU."""
        start, reinforced = model.copy(), train(model.copy(), forget.encoded, self._reinforcement)
        labels = []
        for number, row in enumerate(forget.encoded):
            batch = collate([row], [number]).to(model.device)
            with evaluating(start) as before, evaluating(reinforced) as after:
                generic = generic_logits(predict(before, batch).logits, predict(after, batch).logits, self.alpha)
            labels.append(generic.argmax(-1).cpu())
        return labels


def generic_logits(start: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """[N, V] start - alpha ReLU(reinforced - start)."""
    return start - alpha * (reinforced - start).relu()
