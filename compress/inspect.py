"""What a model is, in figures: parameters, multiply-adds, structure, contracts, licence.

Shapes: N tokens, D width, H heads, K head width, M MLP width, E embedding.
"""

from typing import Any

from rich.console import Group
from rich.table import Table

from compress.clip import Clip
from compress.model import ImageTower, TextTower, TowerConfig

BYTES_PER_FLOAT = 4


def describe(clip: Clip) -> dict[str, Any]:
    """The facts of a model, ready for JSON; sizes as float32, multiply-adds for one sample."""
    model = clip.model
    return {
        "name": clip.name,
        "license": clip.license,
        "embed_dim": model.config.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
        "num_params": sum(p.numel() for p in model.parameters()),
        "size_bytes": sum(p.numel() for p in model.parameters()) * BYTES_PER_FLOAT,
        "image": image_tower(model.image, model.config.embed_dim),
        "text": text_tower(model.text, model.config.embed_dim),
        "preprocess": clip.preprocess.model_dump(mode="json"),
        "tokenizer": clip.tokenizer.contract.model_dump(mode="json"),
        "provenance": list(clip.provenance),
    }


def image_tower(tower: ImageTower, embed_dim: int) -> dict[str, Any]:
    """The facts of an image tower."""
    config = tower.config
    patches = config.grid**2
    patch_macs = patches * 3 * config.patch_size**2 * config.width
    return {
        **_tower(tower, config, 0),
        "num_macs": patch_macs + _macs(config, config.num_tokens, embed_dim),
        "num_tokens": config.num_tokens,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "pooling": config.pooling,
    }


def text_tower(tower: TextTower, embed_dim: int) -> dict[str, Any]:
    """The facts of a text tower; looking a token up multiplies nothing."""
    config = tower.config
    return {
        **_tower(tower, config, tower.token.weight.numel()),
        "num_macs": _macs(config, config.context_length, embed_dim),
        "num_tokens": config.context_length,
        "vocab_size": config.vocab_size,
        "causal": config.causal,
        "pooling": config.pooling,
    }


def _tower(
    tower: ImageTower | TextTower, config: TowerConfig, num_embedding_params: int
) -> dict[str, Any]:
    num_params = sum(p.numel() for p in tower.parameters())
    return {
        "num_params": num_params,
        "num_embedding_params": num_embedding_params,
        "size_bytes": num_params * BYTES_PER_FLOAT,
        "layers": config.num_layers,
        "width": config.width,
        "head_width": config.head_width,
        "heads": list(config.heads),
        "mlp_width": list(config.mlp_width),
        "activation": config.activation,
    }


def _macs(config: TowerConfig, num_tokens: int, embed_dim: int) -> int:
    """Multiply-adds of the blocks and the projection for one sample of N tokens."""
    total = config.width * embed_dim
    for heads, mlp_width in zip(config.heads, config.mlp_width, strict=True):
        attention_width = heads * config.head_width
        projections = 4 * num_tokens * config.width * attention_width  # q, k, v, out
        mixing = 2 * num_tokens**2 * attention_width  # scores, weighted values
        total += projections + mixing + 2 * num_tokens * config.width * mlp_width
    return total


def render(facts: dict[str, Any]) -> Group:
    """The facts as tables for a terminal."""
    towers = Table("", "image", "text", box=None, pad_edge=False)
    image, text = facts["image"], facts["text"]
    for label, key in (
        ("parameters", "num_params"),
        ("of them token embedding", "num_embedding_params"),
        ("multiply-adds", "num_macs"),
    ):
        towers.add_row(label, _millions(image[key]), _millions(text[key]))
    towers.add_row("size as float32", *(f"{t['size_bytes'] / 1e6:.1f} MB" for t in (image, text)))
    for label in ("layers", "width", "heads", "mlp_width", "activation", "pooling"):
        towers.add_row(label.replace("_", " "), _short(image[label]), _short(text[label]))
    towers.add_row(
        "input",
        f"{image['image_size']} px, patch {image['patch_size']}, {image['num_tokens']} tokens",
        f"{text['num_tokens']} tokens of {text['vocab_size']}",
    )
    about = Table("", "", box=None, pad_edge=False, show_header=False)
    about.add_row("model", f"{facts['name']} ({_millions(facts['num_params'])} parameters)")
    about.add_row("licence", facts["license"])
    about.add_row("embedding", f"{facts['embed_dim']}, logit scale {facts['logit_scale']:.1f}")
    for part in ("preprocess", "tokenizer"):
        about.add_row(part, ", ".join(f"{k} {_short(v)}" for k, v in facts[part].items()))
    about.add_row("made by", " > ".join(str(step.get("step")) for step in facts["provenance"]))
    return Group(about, "", towers)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} G"


def _short(value: Any) -> str:
    """One value where all layers or channels agree, else all of them."""
    if not isinstance(value, list):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else " ".join(str(v) for v in value)
