"""What one head and one MLP channel cost, as multiply-adds or as measured time."""

import json
from pathlib import Path

import torch
from torch import Tensor

from compress import atomic, plugin
from compress.clip import Clip
from compress.importance import Gates, Place
from compress.structure import plain_text, plain_vision

HALF = {"heads": 2, "mlp": 2}


def by_macs(clip: Clip, gates: Gates, out: Path) -> dict[Place, float]:
    """Multiply-adds of one head or one channel, for one image and one text."""
    vision = plain_vision(clip.model.config, "prune_structure")
    text = plain_text(clip.model.config, "prune_structure")
    patches, first = vision.grid**2, int(vision.class_token)
    pairs = [(patches, patches)] * vision.num_layers
    if vision.reduction is not None:
        pairs = vision.reduction.num_tokens(patches, vision.num_layers)
    found = {}
    for place in gates.values:
        config = vision if place.tower == "image" else text
        seen, fed = (
            (n + first for n in pairs[place.layer])
            if config is vision
            else (
                text.num_tokens,
                text.num_tokens,
            )
        )
        if place.kind == "heads":
            found[place] = (4 * seen * config.width + 2 * seen * seen) * config.head_width
        else:
            found[place] = 2 * fed * config.width
    return {place: float(cost) for place, cost in found.items()}


def by_latency(clip: Clip, gates: Gates, out: Path) -> dict[Place, float]:
    """Milliseconds of one head or one channel in ONNX Runtime, one thread.

    Each tower is timed whole, with half of its heads and with half of its channels, in turns; the
    difference is shared out as multiply-adds are. Kept in out/costs.json.
    """
    macs = by_macs(clip, gates, out)
    seconds = _measured(clip, out)
    found = {}
    for kind in HALF:
        for tower in ("image", "text"):
            own = [p for p in gates.values if p.kind == kind and p.tower == tower]
            total = sum(macs[p] * len(gates.values[p]) for p in own)
            for place in own:
                found[place] = max(seconds[f"{tower} {kind}"], 1e-6) * macs[place] / total
    return found


def _measured(clip: Clip, out: Path) -> dict[str, float]:
    """Milliseconds of all heads and of all channels of each tower."""
    from compress.stages._schedule_latency import interleaved
    from compress.stages.prune_structure import cut

    path = out / "costs.json"
    if path.exists():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    exporter = plugin.find(plugin.EXPORTERS, "onnxruntime")
    variants = {"whole": clip}
    for kind in HALF:
        variants[kind] = cut(clip, _halves(clip, kind))
    encoders = []
    for name, variant in variants.items():
        folder = out / "costs" / name
        if not (folder / "bundle.json").exists():
            exporter.write(variant, exporter.Config(), folder)
        encoders.append(exporter.load(folder, threads=1))
    config = clip.model.config
    size = plain_vision(config, "prune_structure").image_size
    length = config.text.context_length
    inputs: dict[str, Tensor] = {
        "image": torch.zeros(1, 3, size, size),
        "text": torch.zeros(1, length, dtype=torch.int32),
    }
    found = {}
    for tower, example in inputs.items():
        whole, *fewer = interleaved([getattr(e, f"encode_{tower}") for e in encoders], example)
        for kind, milliseconds in zip(HALF, fewer, strict=True):
            found[f"{tower} {kind}"] = HALF[kind] * (whole - milliseconds)
    atomic.write_json(path, found)
    return found


def _halves(clip: Clip, kind: str) -> dict[Place, list[int]]:
    """The first half of each block's heads or channels."""
    found = {}
    for tower, config in (("image", clip.model.config.vision), ("text", clip.model.config.text)):
        sizes = getattr(config, "heads" if kind == "heads" else "mlp_width")
        for layer, size in enumerate(sizes):
            found[Place(tower, layer, kind)] = list(range(max(1, size // HALF[kind])))
    return found
