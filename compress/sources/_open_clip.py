"""open_clip's own format as ours: the config of a model, its weights, its tokenizer.

open_clip's modules are never built: structure comes from its JSON config, weights from its
checkpoint, and nothing but tensors is read from a file.
"""

import functools
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, normalizers
from torch import Tensor

from compress import clip
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.preprocess import Preprocess
from compress.structure import Activation, ClipConfig, TextConfig, VisionConfig
from compress.tokenizer import Tokenizer, TokenizerContract, byte_pairs, marks, read

# Scalars that OpenAI's files keep among the weights, and masks of early open_clip versions.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")

OUTSIDE_BLOCKS = {
    "visual.conv1.weight": "image.patch.weight",
    "visual.class_embedding": "image.class_token",
    "visual.positional_embedding": "image.position",
    "visual.ln_pre.weight": "image.norm_pre.weight",
    "visual.ln_pre.bias": "image.norm_pre.bias",
    "visual.ln_post.weight": "image.norm_post.weight",
    "visual.ln_post.bias": "image.norm_post.bias",
    "visual.proj": "image.projection.weight",
    "token_embedding.weight": "text.token.weight",
    "positional_embedding": "text.position",
    "ln_final.weight": "text.norm_final.weight",
    "ln_final.bias": "text.norm_final.bias",
    "text_projection": "text.projection.weight",
}
INSIDE_BLOCKS = {
    "ln_1": "norm1",
    "attn.in_proj": "attention.qkv",
    "attn.out_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
IN_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")

# Settings of either tower that make it another network, with the value that leaves it plain.
PLAIN = {
    "timm_model_name": None,
    "hf_model_name": None,
    "attentional_pool": False,
    "ls_init_value": None,
    "embed_cls": False,
    "proj_type": "linear",
    "proj_bias": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def convert(
    model_cfg: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path | str
) -> ClipModel:
    """open_clip's `model_cfg` and state dict -> our model; `source` names them in errors."""
    return clip.build(config(model_cfg, source), renamed(weights), source)


def config(model_cfg: Mapping[str, Any], source: Path | str) -> ClipConfig:
    """open_clip's `model_cfg` -> our structure; PocketclipError unless both towers are plain."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    quick_gelu = bool(model_cfg.get("quick_gelu"))
    try:
        embed_dim = model_cfg["embed_dim"]
        vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
        text = CLIPTextCfg(**model_cfg["text_cfg"])
    except (KeyError, TypeError) as error:
        raise PocketclipError(f"{source}: not an open_clip model_cfg: {error}") from None
    odd = [*_odd("vision_cfg", vision), *_odd("text_cfg", text)]
    if "multimodal_cfg" in model_cfg:
        odd.append("multimodal_cfg")
    if odd:
        raise PocketclipError(f"{source}: not supported yet: {', '.join(odd)}")
    return ClipConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(
            **_tower(vision, vision.width // vision.head_width, quick_gelu),
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            pooling="class" if vision.pool_type == "tok" else "mean",
            pre_norm=not vision.no_ln_pre,
        ),
        text=TextConfig(
            **_tower(text, text.heads, quick_gelu),
            vocab_size=text.vocab_size,
            context_length=text.context_length,
            pooling="argmax" if text.pool_type == "eos" else text.pool_type,
            causal=not text.no_causal_mask,
        ),
        logit_bias=model_cfg.get("init_logit_bias") is not None,
    )


def _tower(cfg: Any, heads: int, quick_gelu: bool) -> dict[str, Any]:
    """The settings that both towers share."""
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    if cfg.act_kwargs == {"approximate": "tanh"}:
        activation = "gelu_tanh"
    return {
        "width": cfg.width,
        "head_width": cfg.width // heads,
        "heads": (heads,) * cfg.layers,
        "mlp_width": (int(cfg.width * cfg.mlp_ratio),) * cfg.layers,
        "activation": activation,
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", 1e-5),
    }


def _odd(place: str, cfg: Any) -> list[str]:
    """The settings of a tower that our transformers don't have."""
    found = {key: getattr(cfg, key, plain) for key, plain in PLAIN.items()}
    odd = [f"{key} {value!r}" for key, value in found.items() if value != PLAIN[key]]
    if cfg.act_kwargs not in (None, {}, {"approximate": "tanh"}):
        odd.append(f"act_kwargs {cfg.act_kwargs}")
    if set(cfg.norm_kwargs or {}) - {"eps"}:
        odd.append(f"norm_kwargs {cfg.norm_kwargs}")
    if place == "vision_cfg":
        odd += [
            f"{key} {getattr(cfg, key)}"
            for key in ("layers", "image_size", "patch_size")
            if not isinstance(getattr(cfg, key), int)
        ]
        # After a mean the order of pooling and norm matters; after picking one token it doesn't.
        if cfg.pool_type == "avg" and cfg.final_ln_after_pool:
            odd.append("final_ln_after_pool with pool_type 'avg'")
        if cfg.pool_type not in ("tok", "avg"):
            odd.append(f"pool_type {cfg.pool_type!r}")
    # The end of text may be found by its id only if no other id is higher.
    elif cfg.pool_type == "eos" and cfg.eos_id != cfg.vocab_size - 1:
        odd.append(f"pool_type 'eos' with eos_id {cfg.eos_id} of {cfg.vocab_size}")
    elif cfg.pool_type not in ("argmax", "eos", "last", "first"):
        odd.append(f"pool_type {cfg.pool_type!r}")
    return [f"{place} {words}" for words in odd]


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict under our names and orientation; unknown names stay as they are."""
    ours = {}
    for name, tensor in weights.items():
        if name in NOT_WEIGHTS:
            continue
        if name in ("logit_scale", "logit_bias"):
            tensor = tensor.reshape(()) if tensor.numel() == 1 else tensor
        elif name in ("visual.proj", "text_projection", "text.text_projection"):
            tensor = tensor.T
        ours[_our_name(name)] = tensor
    return ours


def _our_name(name: str) -> str:
    """Our name of a weight; the text tower stands under `text.` or at the top."""
    name = name.removeprefix("text.")
    inside = IN_BLOCK.fullmatch(name)
    if inside is None or inside[3] not in INSIDE_BLOCKS:
        return OUTSIDE_BLOCKS.get(name, name)
    tower = "image" if inside[1] else "text"
    return f"{tower}.blocks.{inside[2]}.{INSIDE_BLOCKS[inside[3]]}.{inside[4]}"


def their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: our state dict under open_clip's names and in its orientation."""
    outside = {ours: theirs for theirs, ours in OUTSIDE_BLOCKS.items()}
    inside = {ours: theirs for theirs, ours in INSIDE_BLOCKS.items()}
    theirs = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[1] == "blocks":
            module, kind = ".".join(parts[3:-1]), parts[-1]
            prefix = "visual." if parts[0] == "image" else ""
            joint = "_" if module == "attention.qkv" else "."
            name = f"{prefix}transformer.resblocks.{parts[2]}.{inside[module]}{joint}{kind}"
        elif name.endswith("projection.weight"):
            name, tensor = outside[name], tensor.T
        else:
            name = outside.get(name, name)
        theirs[name] = tensor
    return theirs


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, as float32; a pickle that holds anything else is refused."""
    if path.suffix == ".safetensors":
        return clip.read_weights(path)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise PocketclipError(f"{path}: weights are .safetensors, .pt, .pth or .bin files")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise PocketclipError(
            f"{path}: refused, as it isn't a file of nothing but tensors ({reason}); "
            "use the model's .safetensors file"
        ) from None
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise PocketclipError(f"{path}: holds no state dict, or one with more than tensors in it")
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}


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
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = settings.pop("clean", "whitespace" if own else "lower")
    odd = [*settings, *(["tokenizer_mode"] if text_cfg.get("tokenizer_mode") else [])]
    if clean not in ("lower", "whitespace"):
        odd.append(f"clean {clean!r}")
    if own and folder is None:
        odd.append(f"the tokenizer {own}")
    if odd:
        raise PocketclipError(f"{source}: text_cfg not supported yet: {', '.join(odd)}")
    length = text_cfg.get("context_length", 77)
    if not own:
        return openai_tokenizer(length, lowercase=clean == "lower")
    assert folder is not None
    return _own_tokenizer(folder, length, lowercase=clean == "lower")


def openai_tokenizer(context_length: int = 77, lowercase: bool = True) -> Tokenizer:
    """The tokenizer of OpenAI's CLIP, from the merges that open_clip carries."""
    file, start_id, end_id = _openai_file()
    contract = TokenizerContract(
        lowercase=lowercase,
        context_length=context_length,
        start_id=start_id,
        end_id=end_id,
        pad_id=0,
    )
    return Tokenizer(file, contract)


@functools.cache
def _openai_file() -> tuple[tokenizers.Tokenizer, int, int]:
    """OpenAI's vocabulary as a tokenizer file, its start and its end id."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    special = [theirs.decoder[token] for token in theirs.all_special_ids]
    file = repairing(byte_pairs(theirs.encoder, merges, special))
    return file, theirs.sot_token_id, theirs.eot_token_id


def repairing(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer after those repairs of ftfy that work character by character.

    Ligatures, full-width forms, curly quotes, control characters and composed accents: what
    open_clip's cleanup changes in sound text, most of all in Chinese punctuation.
    """
    from ftfy import chardata

    spelled = {**chardata.LIGATURES, **chardata.WIDTH_MAP}
    controls = "".join(chr(code) for code in chardata.CONTROL_CHARS)
    steps = [normalizers.Replace(chr(code), str(text)) for code, text in spelled.items()]
    steps += [
        normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'"),
        normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'),
        normalizers.Replace(Regex(f"[{re.escape(controls)}]"), ""),
    ]
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.NFC(), *own])
    return tokenizer


def _own_tokenizer(folder: Path, context_length: int, lowercase: bool) -> Tokenizer:
    """tokenizer.json and the padding that tokenizer_config.json names."""
    file = repairing(read(folder / "tokenizer.json"))
    start_id, end_id = marks(file)
    if end_id is None:
        raise PocketclipError(f"{folder}: not supported yet: a tokenizer without an end mark")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    pad = settings.get("pad_token")
    pad_id = file.token_to_id(pad["content"] if isinstance(pad, dict) else str(pad))
    if pad_id is None:
        raise PocketclipError(f"{path}: pad_token {pad!r} is not in tokenizer.json")
    contract = TokenizerContract(
        lowercase=lowercase,
        context_length=context_length,
        start_id=start_id,
        end_id=end_id,
        pad_id=pad_id,
    )
    return Tokenizer(file, contract)
