"""A tiny random model of every family, shared by the tests of this room."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from palimpsest.data.batches import Batch, Encoded, collate
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

torch.set_num_threads(1)

VOCABULARY, WIDTH, INNER, LAYERS = 48, 16, 24, 3

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {"intermediate_size": INNER, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}

DENSE = {
    "llama": GATED,
    "mistral": GATED | {"sliding_window": 4},
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 8},
    "smollm3": GATED,
    "granite": GATED | {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "stablelm": GATED,
    "olmo": GATED,
    "olmo2": GATED,
    "olmo3": GATED | {"sliding_window": 4},
    "phi3": GATED,
    "gemma": GATED | {"head_dim": 8},
    "gemma2": GATED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": GATED | {"head_dim": 8, "sliding_window": 4},
    "cohere": GATED | {"logit_scale": 0.25},
    "phi": {"intermediate_size": INNER},
    "gpt2": {"n_inner": INNER},
    "gpt_neo": {"intermediate_size": INNER, "attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    "gptj": {"n_inner": INNER, "rotary_dim": 4},
    "gpt_neox": {"intermediate_size": INNER},
    "opt": {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
    "bloom": {},
    "falcon": {"ffn_hidden_size": INNER},
}
EXPERT = {
    "mixtral": GATED | EXPERTS,
    "qwen3_moe": GATED | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1},
    "olmoe": GATED | EXPERTS,
}
FAMILIES = [*DENSE, *EXPERT]


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model with every parameter drawn anew: no bias is zero and no norm is one, so that nothing cancels by luck."""
    config = AutoConfig.for_model(family, **(SIZES | (DENSE | EXPERT)[family] | changes))
    network = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            is_matrix = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
            for parameter in module.parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise * (0.3 if is_matrix or parameter.dim() > 1 else 0.2) + (0.0 if is_matrix else 0.5)
                )
    return network


def tiny_tokenizer(first_word: str = "w4") -> PreTrainedTokenizerFast:
    """A word a token: w4, w5, ... w47."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", first_word, *(f"w{number}" for number in range(5, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def tiny_model(family: str, **changes: object) -> LanguageModel:
    network = tiny(family, **changes)
    return LanguageModel(network, tiny_tokenizer(), Anatomy.of(network))


def tiny_rows(*lengths: int, seed: int = 1) -> list[Encoded]:
    """Random rows of these lengths; their second halves are targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()), length // 2, length)
        for length in lengths
    ]


def tiny_batch(*lengths: int, seed: int = 1, side: str = "right") -> Batch:
    return collate(tiny_rows(*lengths, seed=seed), range(len(lengths)), side=side)


def n_hooks(network: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
