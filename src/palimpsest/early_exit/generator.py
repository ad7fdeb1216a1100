"""A decoder that may stop at some of its blocks: the policy that says when, what it was trained for, and its files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from palimpsest.data.batches import Encoded
from palimpsest.early_exit.cost import measure
from palimpsest.early_exit.decoding import Fill
from palimpsest.early_exit.exits_folder import save_exits, saved_exits
from palimpsest.early_exit.generation import Generated, PolicyExit, generate
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.early_exit.stack import Stack
from palimpsest.early_exit.token_policy import fit_token_policy
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Report

CONTEXT = 128
"""Tokens that are seen where a token's time is measured, or half of the model's positions if those are fewer."""
NAME = "token_policy"
"""Of its files."""


@dataclass(frozen=True, eq=False)
class ExitGenerator:
    """Exits of one model for generation. They are read with the model's own norm and unembedding."""

    model: LanguageModel
    exits: tuple[int, ...]
    """After how many blocks they stand, the last block's apart."""
    policy: Policy
    settings: PolicySettings
    """What the policy was trained with; its prices are those that it can be asked at."""

    @staticmethod
    def fit(
        model: LanguageModel,
        texts: Sequence[Encoded],
        exits: Sequence[int],
        settings: PolicySettings | None = None,
        *,
        report: Report | None = None,
    ) -> "ExitGenerator":
        """Time the model's parts, then train a policy on texts; the model stays as it is.

        Args:
            model: a decoder.
            texts: rows of tokens like those that it will say.
            exits: after how many blocks.
            settings: how the policy is trained.
            report: told (done, of how many, a note).

        Raises:
            ModelError, SpecError, DataError: what cannot be decoded, or exits that are not there.
        """
        settings, stack = settings or PolicySettings(), Stack.of(model.network)
        positions = getattr(model.network.config, "max_position_embeddings", None) or 2 * CONTEXT
        times = measure(model, context=min(CONTEXT, positions // 2), stack=stack).times(exits)
        policy = fit_token_policy(model, texts, exits, times, settings, stack=stack, report=report)
        return ExitGenerator(model, tuple(exits), policy, settings)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, price: float, max_new_tokens: int, fill: Fill = "lazy"
    ) -> list[Generated]:
        """How the model goes on greedily after each prompt of token ids.

        Args:
            prompts: token ids.
            price: of a whole pass, nats: what it must lower a token's divergence from the whole model by.
            max_new_tokens: the longest answer.
            fill: what becomes of the keys and values that a token skipped.

        Raises:
            SpecError: a price that the policy was not trained for.
        """
        low, high = self.settings.prices
        if not low <= price <= high:
            raise SpecError(f"early exit: price {price:g}; this policy was trained for {low:g} to {high:g} nats")
        rule = PolicyExit(self.exits, self.policy, price)
        return generate(self.model, prompts, rule, max_new_tokens=max_new_tokens, fill=fill)

    def save(self, folder: str | Path) -> Path:
        """Write the policy as safetensors and JSON, whole or not at all; the model is not in it.

        Raises:
            StorageError: the folder holds other files, or cannot be written.
        """
        about = {"exits": self.exits, "settings": asdict(self.settings)}
        return save_exits(folder, NAME, self.model, about, self.policy.state_dict())

    @staticmethod
    def load(folder: str | Path, model: LanguageModel) -> "ExitGenerator":
        """Read what `save` wrote, for the model that it was made for.

        Raises:
            ModelError: there is nothing of ours, it is damaged, or the model is another.
        """
        with saved_exits(folder, NAME, model, made_by="palimpsest exit fit --generation") as (about, weights):
            policy = Policy(len(about["exits"]) + 1, weights["inner"].shape[-1] - 1)
            policy.load_state_dict(weights)
            settings = PolicySettings(**about["settings"] | {"prices": tuple(about["settings"]["prices"])})
        policy = policy.to(model.device).requires_grad_(False).eval()
        return ExitGenerator(model, tuple(about["exits"]), policy, settings)
