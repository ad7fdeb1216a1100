"""Two tiny random models of one family, shared by the tests of this room."""

from tests.models.tiny_families import tiny, tiny_model

from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

SOME = ["llama", "gpt2", "gpt_neo", "gpt_neox", "opt", "falcon", "phi3", "gemma2", "cohere", "olmo2"]
"""Families that differ in what matters here: tuples, fused or transposed matrices, flat MLPs, ties, post-norms."""


def pair(family: str, **changes: object) -> tuple[LanguageModel, LanguageModel]:
    """Two models that share nothing but their architecture and tokenizer."""
    one = tiny_model(family, **changes)
    network = tiny(family, seed=3, **changes)
    one.name = "one"
    return one, LanguageModel(network, one.tokenizer, Anatomy.of(network), "other")


def hooks_and_forwards(model: LanguageModel) -> list[tuple[int, int, bool]]:
    """What patching might leave behind in a network."""
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for module in model.network.modules()
    ]
