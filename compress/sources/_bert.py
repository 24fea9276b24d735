"""Text towers of BERT's shape (BERT, DistilBERT, RoBERTa, XLM-R) and NLLB's encoder as ours.

Three things are constant for padded texts and become part of the position table or the token
table: the offset of RoBERTa's positions, the embedding of the one token type, NLLB's scale and
sinusoids.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import PocketclipError
from compress.structure import Activation

# What the configs of transformers leave out when it has its default value.
_BERT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "vocab_size": 30522,
}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_DISTIL = {
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
    "max_position_embeddings": 512,
    "activation": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "vocab_size": 30522,
}
# What all published checkpoints of RoBERTa have instead.
_PUBLISHED = {"layer_norm_eps": 1e-5, "max_position_embeddings": 514}
_M2M = {
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "activation_function": "relu",
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "pad_token_id": 1,
    "vocab_size": 128112,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "chinese_clip_text_model": _BERT,
    "distilbert": _DISTIL,
    "roberta": {**_ROBERTA, "vocab_size": 50265},
    "xlm-roberta": {**_ROBERTA, "vocab_size": 30522},
    "altclip_text_model": {
        **_ROBERTA,
        **_PUBLISHED,
        "vocab_size": 250002,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "m2m_100": _M2M,
}
# Shapes of the encoders that open_clip and M-CLIP know by the name of their repository.
_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
NAMED: dict[str, dict[str, Any]] = {
    "roberta-base": {"model_type": "roberta", **_PUBLISHED},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **_PUBLISHED},
    "xlm-roberta-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        **_PUBLISHED,
        **_LARGE,
    },
    "sentence-transformers/LaBSE": {"model_type": "bert", "vocab_size": 501153},
    "facebook/nllb-200-distilled-600M": {"model_type": "m2m_100", "vocab_size": 256206},
    "facebook/nllb-200-distilled-1.3B": {
        "model_type": "m2m_100",
        "vocab_size": 256206,
        "encoder_layers": 24,
        "encoder_ffn_dim": 8192,
    },
}
# Where a config keeps width, layers, heads, width of the MLP, and activation.
BERT_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
)
KEYS = {
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "activation"),
    "m2m_100": (
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "activation_function",
    ),
}
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token.weight",
    "embeddings.LayerNorm.weight": "norm_embedding.weight",
    "embeddings.LayerNorm.bias": "norm_embedding.bias",
    "embed_tokens.weight": "token.weight",
    "layer_norm.weight": "norm_final.weight",
    "layer_norm.bias": "norm_final.bias",
}
BLOCK = re.compile(r"(?:(?:encoder|transformer)\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
INSIDE = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "norm2",
    "attention.out_lin": "attention.out",
    "sa_layer_norm": "norm1",
    "ffn.lin1": "mlp.up",
    "ffn.lin2": "mlp.down",
    "output_layer_norm": "norm2",
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "norm1",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "final_layer_norm": "norm2",
}
QKV = {
    "attention.self.query": 0,
    "attention.self.key": 1,
    "attention.self.value": 2,
    "attention.q_lin": 0,
    "attention.k_lin": 1,
    "attention.v_lin": 2,
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 1,
    "self_attn.v_proj": 2,
}
# Kept by transformers beside the weights of an encoder, and not used for embedding texts.
UNUSED = ("embeddings.position_ids", "embeddings.token_type_ids", "embed_positions.weights")


def described(hf: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """A config of transformers, as found in config.json, with its defaults filled in."""
    kind = str(hf.get("model_type"))
    if kind not in DEFAULTS:
        raise PocketclipError(
            f"{source}: text encoder {kind!r} is not supported; there are {', '.join(DEFAULTS)}"
        )
    found = {**DEFAULTS[kind], **{key: value for key, value in hf.items() if value is not None}}
    if found.get("position_embedding_type", "absolute") != "absolute":
        raise PocketclipError(f"{source}: {found['position_embedding_type']} positions")
    return found


def config(hf: Mapping[str, Any], context_length: int, source: Path | str) -> dict[str, Any]:
    """Settings of our text tower but its pooling and projection, from a filled-in config."""
    translator = hf["model_type"] == "m2m_100"
    *sizes, activation_key = KEYS.get(hf["model_type"], BERT_KEYS)
    width, layers, heads, mlp_width = (hf[key] for key in sizes)
    activation = ACTIVATIONS.get(hf[activation_key])
    if activation is None:
        raise PocketclipError(f"{source}: an activation that our text tower doesn't have")
    limit = hf["max_position_embeddings"] - (0 if translator else offset(hf))
    if context_length > limit:
        raise PocketclipError(f"{source}: {context_length} tokens, the encoder has {limit}")
    return {
        "width": width,
        "head_width": width // heads,
        "heads": (heads,) * layers,
        "mlp_width": (mlp_width,) * layers,
        "activation": activation,
        "layer_norm_eps": 1e-5 if translator else hf["layer_norm_eps"],
        "vocab_size": hf["vocab_size"],
        "context_length": context_length,
        "causal": False,
        "pad_id": hf["pad_token_id"],
        "post_norm": not translator,
        "embedding_norm": not translator,
        "final_norm": translator,
    }


def offset(hf: Mapping[str, Any]) -> int:
    """Position of the first token: RoBERTa counts from behind its padding id."""
    counts_from_zero = DEFAULTS[hf["model_type"]] in (_BERT, _DISTIL)
    return 0 if counts_from_zero else hf["pad_token_id"] + 1


def renamed(
    weights: Mapping[str, Tensor], hf: Mapping[str, Any], context_length: int
) -> dict[str, Tensor]:
    """An encoder's state dict under our names; unknown names stay as they are."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        block = BLOCK.fullmatch(name)
        if name in EMBEDDINGS:
            ours[f"text.{EMBEDDINGS[name]}"] = tensor
        elif block and block[2] in INSIDE:
            ours[f"text.blocks.{block[1]}.{INSIDE[block[2]]}.{block[3]}"] = tensor
        elif block and block[2] in QKV:
            whole = f"text.blocks.{block[1]}.attention.qkv.{block[3]}"
            parts.setdefault(whole, {})[QKV[block[2]]] = tensor
        elif name not in (*UNUSED, *_TABLES) and not name.startswith("pooler."):
            ours[f"text.{name}"] = tensor
    for name, three in parts.items():
        ours[name] = torch.cat([three[i] for i in sorted(three)])
    positions = _positions(weights, hf, context_length)
    if positions is not None:
        ours["text.position"] = positions
    if hf.get("scale_embedding") and "text.token.weight" in ours:
        ours["text.token.weight"] = ours["text.token.weight"].float() * math.sqrt(hf["d_model"])
    return ours


_TABLES = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")


def _positions(
    weights: Mapping[str, Tensor], hf: Mapping[str, Any], context_length: int
) -> Tensor | None:
    """The position table [L, D] of texts padded at the end; None where the weights lack it."""
    first = offset(hf)
    if hf["model_type"] == "m2m_100":
        return sinusoids(first, context_length, hf["d_model"])
    if _TABLES[0] not in weights:
        return None
    table = weights[_TABLES[0]].float()[first : first + context_length]
    return table + weights[_TABLES[1]].float()[0] if _TABLES[1] in weights else table


def sinusoids(first: int, num: int, width: int) -> Tensor:
    """Positions `first`... as sines, then cosines [num, width], of frequencies from 1 to 1e-4.

    Vaswani et al. 2017, section 3.5, in the arrangement of fairseq.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(first, first + num).float().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
