"""What a model is, in figures: parameters, multiply-adds, structure, contracts, licence."""

from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.clip import Clip
from compress.model import ClipModel, num_embedding_params
from compress.structure import ClipConfig, TextConfig, TowerConfig, UpstreamConfig, VisionConfig
from compress.support import support
from compress.upstream import UpstreamTower, needs_folding

BYTES_PER_FLOAT = 4


def describe(clip: Clip) -> dict[str, Any]:
    """The facts of a model, ready for JSON; sizes as float32, multiply-adds for one sample."""
    model = clip.model
    macs = num_macs(model.config)
    return {
        "name": clip.name,
        "license": clip.license,
        "embed_dim": model.config.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
        "num_params": sum(p.numel() for p in model.parameters()),
        "size_bytes": sum(p.numel() for p in model.parameters()) * BYTES_PER_FLOAT,
        "image": image_tower(model) | {"num_macs": macs["image"]},
        "text": text_tower(model) | {"num_macs": macs["text"]},
        "preprocess": clip.preprocess.model_dump(mode="json"),
        "tokenizer": clip.tokenizer.contract.model_dump(mode="json"),
        "research_only": any(step.get("research_only") for step in clip.provenance),
        "provenance": list(clip.provenance),
        **support(clip),
    }


def num_macs(config: ClipConfig) -> dict[str, int]:
    """Multiply-adds of each tower for one sample; looking a token up multiplies nothing, and
    rounding changes nothing.
    """
    with torch.device("meta"):
        model = ClipModel(config.model_copy(update={"scheme": None})).eval()
        size = config.vision.image_size
        inputs = {
            "image": torch.zeros(1, 3, size, size),
            "text": torch.zeros(1, config.text.context_length, dtype=torch.int32),
        }
    found = {}
    for tower, example in inputs.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(model, tower)(example)
        found[tower] = counter.get_total_flops() // 2
    return found


def image_tower(model: ClipModel) -> dict[str, Any]:
    """The facts of an image tower; None for what the towers of other libraries don't have."""
    config = model.config.vision
    return {
        **_tower(model.image, config, 0),
        "num_tokens": config.num_tokens if isinstance(config, VisionConfig) else None,
        "image_size": config.image_size,
        "patch_size": config.patch_size if isinstance(config, VisionConfig) else None,
    }


def text_tower(model: ClipModel) -> dict[str, Any]:
    """The facts of a text tower."""
    config = model.config.text
    return {
        **_tower(model.text, config, num_embedding_params(model)),
        "num_tokens": config.context_length,
        "vocab_size": config.vocab_size,
        "causal": config.causal if isinstance(config, TextConfig) else None,
    }


def _tower(
    tower: nn.Module, config: TowerConfig | UpstreamConfig, num_embedding_params: int
) -> dict[str, Any]:
    num_params = sum(p.numel() for p in tower.parameters())
    shape: dict[str, Any] = {"kind": "transformer", "folded": None}
    if isinstance(config, UpstreamConfig):
        assert isinstance(tower, UpstreamTower)
        shape = {"kind": config.name, "folded": not needs_folding(tower)}
    keys = ("num_layers", "width", "head_width", "heads", "mlp_width", "activation", "pooling")
    for key in keys:
        value = getattr(config, key, None)
        shape[key.removeprefix("num_")] = list(value) if isinstance(value, tuple) else value
    return {
        **shape,
        "num_params": num_params,
        "num_embedding_params": num_embedding_params,
        "size_bytes": num_params * BYTES_PER_FLOAT,
    }


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
    for label in ("kind", "layers", "width", "heads", "mlp_width", "activation", "pooling"):
        towers.add_row(label.replace("_", " "), _short(image[label]), _short(text[label]))
    patches = f", patch {image['patch_size']}, {image['num_tokens']} tokens"
    towers.add_row(
        "input",
        f"{image['image_size']} px{patches if image['patch_size'] else ''}",
        f"{text['num_tokens']} tokens of {text['vocab_size']}",
    )
    about = Table("", "", box=None, pad_edge=False, show_header=False)
    about.add_row("model", f"{facts['name']} ({_millions(facts['num_params'])} parameters)")
    only = "; research only, in every bundle made from it" if facts["research_only"] else ""
    about.add_row("licence", f"{facts['license']}{only}")
    about.add_row("embedding", f"{facts['embed_dim']}, logit scale {facts['logit_scale']:.1f}")
    for part in ("preprocess", "tokenizer"):
        about.add_row(part, ", ".join(f"{k} {_short(v)}" for k, v in facts[part].items()))
    about.add_row("made by", " > ".join(str(step.get("step")) for step in facts["provenance"]))
    uses = Table("", "", box=None, pad_edge=False, show_header=False)
    for part in ("stages", "exports"):
        uses.add_row(part, ", ".join(name for name, said in facts[part].items() if said == "yes"))
        for name, said in facts[part].items():
            if said != "yes":
                uses.add_row("", escape(f"not {name}: {said}"))
    return Group(about, "", towers, "", uses)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} G"


def _short(value: Any) -> str:
    """One value where all layers or channels agree, else all of them."""
    if value is None:
        return "-"
    if not isinstance(value, list):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else " ".join(str(v) for v in value)
