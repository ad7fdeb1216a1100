"""Encoders (BERT and its like) for classification: a network and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palimpsest.errors import ModelError
from palimpsest.models.language_model import weights_hash


@dataclass(eq=False)
class Encoder:
    """A Hugging Face encoder without a head of its own."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "encoder"

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the parameters' names, types, shapes and bytes."""
        return weights_hash(self.network)


def load_encoder(path_or_id: str | Path, *, device: str | None = None) -> Encoder:
    """Load an encoder from a folder or a hub id; only safetensors weights are read, and no code of the folder's.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        network = AutoModel.from_pretrained(path_or_id, use_safetensors=True, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(path_or_id)
    except TypeError:  # a family without a pooler
        network = AutoModel.from_pretrained(path_or_id, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path_or_id)
    except Exception as error:  # transformers, tokenizers and safetensors raise exceptions of a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path_or_id}: cannot be loaded as an encoder: {reason}") from error
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return Encoder(network, tokenizer, Path(path_or_id).name)
