"""Where each family of Hugging Face causal language models keeps its parts. Adding a family is adding one row.

The paths were verified on transformers 5 with tiny random models of every family (tests/models/test_anatomy.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Dotted names: `blocks` and `final_norm` from the network, the other two from a block."""

    blocks: str
    value_matrix: str | None
    """The MLP's last linear map; None where fused experts have none."""
    attention_output: str
    final_norm: str


LLAMA = Family("model.layers", "mlp.down_proj", "self_attn.o_proj", "model.norm")
FUSED_EXPERTS = Family("model.layers", None, "self_attn.o_proj", "model.norm")
BLOOM = Family("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", "transformer.ln_f")

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "stablelm": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "phi3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "cohere": LLAMA,
    "phi": Family("model.layers", "mlp.fc2", "self_attn.dense", "model.final_layernorm"),
    "gpt2": Family("transformer.h", "mlp.c_proj", "attn.c_proj", "transformer.ln_f"),
    "gpt_neo": Family("transformer.h", "mlp.c_proj", "attn.attention.out_proj", "transformer.ln_f"),
    "gptj": Family("transformer.h", "mlp.fc_out", "attn.out_proj", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense", "gpt_neox.final_layer_norm"),
    "opt": Family("model.decoder.layers", "fc2", "self_attn.out_proj", "model.decoder.final_layer_norm"),
    "bloom": BLOOM,
    "falcon": BLOOM,
    "mixtral": FUSED_EXPERTS,
    "qwen3_moe": FUSED_EXPERTS,
    "olmoe": FUSED_EXPERTS,
}
"""By `config.model_type`."""
