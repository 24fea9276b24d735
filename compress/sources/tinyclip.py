"""TinyCLIP's own checkpoints, manual and auto, from a file; shapes are read off the weights.

FILE                 TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt and its kin
quick_gelu@FILE      for weights trained with QuickGELU

Automatic inheritance leaves each layer with heads and an MLP of its own; that is data here, so the
model saves, trains and exports like any other. TinyCLIP on the hub is transformers' CLIPModel:
huggingface:wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import atomic, clip
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.preprocess import Preprocess
from compress.sources import _checkpoint, _licenses, _plain, _text_files
from compress.structure import Activation, ClipConfig, TextConfig, UpstreamVision, VisionConfig

LICENSE = "mit"
HEAD_WIDTH = 64
"""Width of a head in every TinyCLIP; pruning takes whole heads."""
PREFIXES = (
    "_image_encoder.",
    "_text_encoder.",
    "image_encoder_without_ddp.",
    "text_encoder_without_ddp.",
)
BRANCH = re.compile(r"(image|text)\.blocks\.\d+\.(norm1|norm2|attention|mlp)\..*")


def load(name: str) -> Clip:
    """Open a checkpoint (see the top of this file); PocketclipError if it isn't TinyCLIP's."""
    kind, at, file = name.partition("@")
    if at and kind not in ("quick_gelu", "gelu"):
        raise PocketclipError(f"tinyclip:{name}: activation {kind!r} is unknown: gelu, quick_gelu")
    activation: Activation = "quick_gelu" if kind == "quick_gelu" else "gelu"
    path = Path(file if at else name)
    weights = bare(_checkpoint.read(path))
    try:
        structure = config(weights, activation)
    except (KeyError, ValueError) as error:
        raise PocketclipError(f"{path}: not a checkpoint of TinyCLIP: {error} is missing") from None
    state = renamed(weights, structure)
    side = structure.vision.image_size
    step = {"step": "tinyclip", "name": path.name, "sha256": atomic.sha256(path)}
    return Clip(
        model=clip.build(structure, state, path),
        preprocess=Preprocess(size=(side, side)),
        tokenizer=_text_files.openai_tokenizer(structure.text.context_length),
        name=path.stem,
        license=LICENSE,
        provenance=({**step, **_licenses.flags(LICENSE)},),
    )


def bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under open_clip's names, without wrappers and the masks of its pruning."""
    found = {}
    for name, tensor in weights.items():
        if ".l0_module." in name or name.startswith("l0_module."):
            continue
        short = name.replace("module.", "").replace("_logit_scale.", "")
        for prefix in PREFIXES:
            short = short.removeprefix(prefix)
        found[short] = tensor
    return found


def config(weights: Mapping[str, Tensor], activation: Activation) -> ClipConfig:
    """The structure that the shapes of the weights tell."""
    text_width = weights["positional_embedding"].shape[1]
    text = TextConfig(
        **_tower(weights, "", text_width, activation),
        vocab_size=weights["token_embedding.weight"].shape[0],
        context_length=weights["positional_embedding"].shape[0],
    )
    embed_dim = weights["text_projection"].shape[1]
    return ClipConfig(embed_dim=embed_dim, vision=_vision(weights, activation), text=text)


def _vision(weights: Mapping[str, Tensor], activation: Activation) -> VisionConfig | UpstreamVision:
    if "visual.layer1.0.conv1.weight" in weights:
        return _resnet(weights)
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    grid = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return VisionConfig(
        **_tower(weights, "visual.", width, activation),
        image_size=grid * patch,
        patch_size=patch,
    )


def _resnet(weights: Mapping[str, Tensor]) -> UpstreamVision:
    """CLIP's ResNet with fewer channels."""
    places = {tuple(name.split(".")[1:3]) for name in weights if name.startswith("visual.layer")}
    layers = [sum(1 for stage, _ in places if stage == f"layer{n}") for n in (1, 2, 3, 4)]
    width = weights["visual.layer1.0.conv1.weight"].shape[0]
    side = 32 * round((weights["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    cfg: dict[str, Any] = {"layers": layers, "width": width, "image_size": side}
    name = f"ModifiedResNet-{'-'.join(map(str, layers))}"
    return UpstreamVision(
        name=name, builder="open_clip", arguments={"vision_cfg": cfg}, image_size=side
    )


def _tower(
    weights: Mapping[str, Tensor], prefix: str, width: int, activation: Activation
) -> dict[str, Any]:
    """Heads and MLP of each layer; a branch that pruning removed becomes one of zeros."""
    start = f"{prefix}transformer.resblocks."
    layers = 1 + max(
        int(name.removeprefix(start).split(".")[0]) for name in weights if name.startswith(start)
    )
    heads, mlp_width = [], []
    for layer in range(layers):
        qkv = weights.get(f"{start}{layer}.attn.in_proj_weight")
        up = weights.get(f"{start}{layer}.mlp.c_fc.weight")
        heads.append(1 if qkv is None else qkv.shape[0] // (3 * HEAD_WIDTH))
        mlp_width.append(HEAD_WIDTH if up is None else up.shape[0])
    return {
        "width": width,
        "head_width": HEAD_WIDTH,
        "heads": tuple(heads),
        "mlp_width": tuple(mlp_width),
        "activation": activation,
    }


def renamed(weights: Mapping[str, Tensor], structure: ClipConfig) -> dict[str, Tensor]:
    """The state dict under our names, with zeros for the branches that pruning removed."""
    if isinstance(structure.vision, UpstreamVision):
        image = {k: v for k, v in weights.items() if k.startswith("visual.")}
        text = {k: v for k, v in weights.items() if k not in image}
        towers = {f"image.tower.{k.removeprefix('visual.')}": v for k, v in image.items()}
        return towers | _plain.renamed(text)
    state = _plain.renamed(weights)
    with torch.device("meta"):
        wanted = ClipModel(structure).state_dict()
    for name, tensor in wanted.items():
        removed = BRANCH.fullmatch(name)
        if name not in state and removed:
            state[name] = torch.zeros(tensor.shape)
    return state
