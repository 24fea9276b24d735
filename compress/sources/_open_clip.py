"""open_clip's own format as ours: the config of a model, its weights, its tokenizer.

Structure comes from its JSON config, weights from its checkpoint, and nothing but tensors is read
from a file. Plain transformers become ours; other image towers stay open_clip's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import clip
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.preprocess import Preprocess
from compress.sources import _bert, _plain, _text_files, _timm_vit
from compress.structure import ClipConfig, TextConfig, UpstreamVision, VisionConfig
from compress.tokenizer import Tokenizer
from compress.upstream import build

POOLERS = {"mean_pooler": "mean", "cls_pooler": "first", "cls_last_hidden_state_pooler": "first"}
# CoCa's captioner is no encoder.
CAPTIONER = "text_decoder."


def convert(
    model_cfg: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path | str
) -> ClipModel:
    """open_clip's `model_cfg` and state dict -> our model; `source` names them in errors."""
    structure = config(model_cfg, source)
    return clip.build(structure, renamed(model_cfg, structure, weights, source), source)


def config(model_cfg: Mapping[str, Any], source: Path | str) -> ClipConfig:
    """open_clip's `model_cfg` -> our structure; PocketclipError for what no tower here can be."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    quick_gelu = bool(model_cfg.get("quick_gelu"))
    try:
        embed_dim = model_cfg["embed_dim"]
        vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
        text = CLIPTextCfg(**model_cfg["text_cfg"])
    except (KeyError, TypeError) as error:
        raise PocketclipError(f"{source}: not an open_clip model_cfg: {error}") from None
    plain = _image_tower(vision, embed_dim, quick_gelu, source)
    return ClipConfig(
        embed_dim=embed_dim,
        vision=plain or _upstream(model_cfg["vision_cfg"], vision, embed_dim, quick_gelu),
        text=_text_tower(text, embed_dim, quick_gelu, source),
        logit_bias=model_cfg.get("init_logit_bias") is not None,
    )


def _image_tower(
    cfg: Any, embed_dim: int, quick_gelu: bool, source: Path | str
) -> VisionConfig | None:
    """Our structure of an image tower, None for what stays open_clip's."""
    if cfg.timm_model_name:
        upstream = _upstream(vars(cfg), cfg, embed_dim, quick_gelu)
        with torch.device("meta"):
            return _timm_vit.config(build(upstream, embed_dim))
    if isinstance(cfg.layers, list | tuple):
        return None
    odd = _plain.odd_vision(cfg)
    if odd:
        raise PocketclipError(f"{source}: not supported yet: vision_cfg {', '.join(odd)}")
    return _plain.vision(cfg, embed_dim, quick_gelu)


def trunk(structure: ClipConfig, source: Path | str) -> torch.nn.Module:
    """timm's network of an image tower, without weights."""
    if not isinstance(structure.vision, UpstreamVision):
        raise PocketclipError(f"{source}: MobileCLIP's weights for another image tower")
    with torch.device("meta"):
        network = build(structure.vision, structure.embed_dim).trunk
    assert isinstance(network, torch.nn.Module)
    return network


def _upstream(
    vision_cfg: Mapping[str, Any], cfg: Any, embed_dim: int, quick_gelu: bool
) -> UpstreamVision:
    name = cfg.timm_model_name or f"ModifiedResNet-{'-'.join(map(str, cfg.layers))}"
    arguments: dict[str, Any] = {"vision_cfg": dict(vision_cfg)}
    if quick_gelu:
        arguments["quick_gelu"] = True
    size = cfg.image_size if isinstance(cfg.image_size, int) else cfg.image_size[0]
    return UpstreamVision(name=name, builder="open_clip", arguments=arguments, image_size=size)


def _text_tower(cfg: Any, embed_dim: int, quick_gelu: bool, source: Path | str) -> TextConfig:
    if cfg.hf_model_name:
        hf = _encoder(cfg.hf_model_name, source)
        pooling = POOLERS.get(cfg.hf_pooler_type)
        # BERT's own pooler adds a layer; NLLB has none and gives its first token.
        if pooling is None or (cfg.hf_pooler_type == "cls_pooler" and "d_model" not in hf):
            raise PocketclipError(
                f"{source}: not supported yet: text_cfg hf_pooler_type {cfg.hf_pooler_type!r}"
            )
        settings = _bert.config(hf, cfg.context_length, source)
        width = settings["width"]
        return TextConfig.model_validate(
            {
                **settings,
                "pooling": pooling,
                "projection": cfg.hf_proj_type if cfg.hf_proj_type else "none",
                "projection_width": (width + embed_dim) // 2 if cfg.hf_proj_type == "mlp" else 0,
            }
        )
    odd = _plain.odd_text(cfg)
    if odd:
        raise PocketclipError(f"{source}: not supported yet: text_cfg {', '.join(odd)}")
    return _plain.text(cfg, embed_dim, quick_gelu)


def _encoder(name: str, source: Path | str) -> dict[str, Any]:
    if name not in _bert.NAMED:
        known = ", ".join(_bert.NAMED)
        raise PocketclipError(
            f"{source}: the text encoder {name!r} is not supported; there are {known}"
        )
    return _bert.described(_bert.NAMED[name], source)


def renamed(
    model_cfg: Mapping[str, Any],
    structure: ClipConfig,
    weights: Mapping[str, Tensor],
    source: Path | str,
) -> dict[str, Tensor]:
    """open_clip's state dict under our names, tower by tower; unknown names stay as they are."""
    image, text, ours = {}, {}, {}
    timm = bool(model_cfg["vision_cfg"].get("timm_model_name"))
    encoder = model_cfg["text_cfg"].get("hf_model_name")
    for name, tensor in weights.items():
        if name in ("logit_scale", "logit_bias"):
            ours[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor
        elif name.startswith("visual."):
            image[name] = tensor
        elif not name.startswith(CAPTIONER):
            text[name] = tensor
    bare = {name.removeprefix("visual."): tensor for name, tensor in image.items()}
    if isinstance(structure.vision, UpstreamVision):
        ours |= {f"image.tower.{name}": tensor for name, tensor in bare.items()}
    elif timm:
        ours |= _timm_vit.renamed(bare)
    else:
        ours |= _plain.renamed(image, structure.vision.norm_after_pooling)
    if encoder:
        return ours | _encoder_weights(text, _encoder(encoder, source), structure.text)
    return ours | _plain.renamed(text)


def _encoder_weights(
    weights: Mapping[str, Tensor], hf: Mapping[str, Any], text: Any
) -> dict[str, Tensor]:
    """Weights of open_clip's HFTextEncoder: `text.transformer.` and the projection `text.proj`."""
    inside, ours = {}, {}
    for name, tensor in weights.items():
        short = name.removeprefix("text.")
        if short.startswith("proj."):
            ours[f"text.projection.{short.removeprefix('proj.')}"] = tensor
        else:
            inside[short.removeprefix("transformer.")] = tensor
    return ours | _bert.renamed(inside, hf, text.context_length)


def preprocess(preprocess_cfg: Mapping[str, Any], image_size: int) -> Preprocess:
    """open_clip's `preprocess_cfg`, over its defaults, as our contract."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = merge_preprocess_dict(PreprocessCfg(), dict(preprocess_cfg))
    mean, std = (c if isinstance(c, list | tuple) else (c,) * 3 for c in (cfg["mean"], cfg["std"]))
    return Preprocess(
        size=(image_size, image_size),
        resize_mode=cfg["resize_mode"],
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(mean),
        std=tuple(std),
        padding=(cfg["fill_color"],) * 3,
    )


def tokenizer(text_cfg: Mapping[str, Any], folder: Path | None, source: Path | str) -> Tokenizer:
    """The tokenizer of a model: the folder's tokenizer.json, or OpenAI's vocabulary.

    Raises PocketclipError for a tokenizer whose cleanup or marks the contract cannot state.
    """
    own = text_cfg.get("hf_tokenizer_name")
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace" if own else "lower")
    strip_end = options.pop("strip_sep_token", False)
    odd = [*options, *(["tokenizer_mode"] if text_cfg.get("tokenizer_mode") else [])]
    if clean not in ("lower", "whitespace", "canonicalize"):
        odd.append(f"clean {clean!r}")
    if odd:
        raise PocketclipError(f"{source}: text_cfg not supported yet: {', '.join(odd)}")
    length = text_cfg.get("context_length", 77)
    if not own:
        return _text_files.openai_tokenizer(length, lowercase=clean == "lower")
    if folder is None:
        raise PocketclipError(
            f"{source}: its tokenizer {own} is not in the file of weights; put tokenizer.json and "
            f"tokenizer_config.json of https://huggingface.co/{own} into the weights' folder"
        )
    file = _text_files.tokenizer_file(folder)
    if clean == "canonicalize":
        file = _text_files.canonical(file, underscore=" ")
    if strip_end:
        pad_id = _text_files.padding(folder, file, _text_files.settings(folder))
        file = _text_files.without_end_mark(file, pad_id)
    return _text_files.from_folder(
        folder, _text_files.repairing(file), length, lowercase=clean == "lower"
    )
