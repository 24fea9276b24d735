"""open_clip's own local folder: config, safetensors and tokenizer, for its loaders and trainers.

Opens with `open_clip.create_model_and_transforms("local-dir:FOLDER")`. Only shapes that open_clip
can state are written: the same width of head, number of heads and MLP in every layer.
"""

import json
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as serialise
from tokenizers import processors

from compress.clip import Clip, TorchEncoder
from compress.errors import PocketclipError
from compress.structure import TextConfig, TowerConfig, VisionConfig, plain_text, plain_vision
from compress.support import reason
from export import Unavailable, _bundle

REQUIRES = ""
VERSION = 1
WEIGHTS = "open_clip_model.safetensors"

USAGE = """\
import open_clip
import torch

model, _, _ = open_clip.create_model_and_transforms("local-dir:.")
model.eval()


@torch.no_grad()
def embed(tower, array):
    encode = {"image": model.encode_image, "text": model.encode_text}[tower]
    return encode(torch.from_numpy(array)[None], normalize=True)[0].numpy()


def open_tower(tower):
    return lambda array: embed(tower, array)

"""


class Config(BaseModel):
    """Settings of open_clip's format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp16", "fp32"] = "fp16"
    """Type of the stored weights; open_clip computes in fp32 unless told."""
    min_cosine: float = Field(default=0.999, ge=-1, le=1)
    """Parity gate: the worst cosine to the torch model that either tower may show."""


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write the folder with a bundle's contracts and goldens beside open_clip's files.

    Raises PocketclipError for a shape or preprocessing that open_clip cannot state.
    """
    description = open_clip_config(clip)
    spec = _bundle.Spec(
        "open_clip",
        cfg.precision,
        "safetensors",
        1,
        cfg.min_cosine,
        load,
        USAGE,
        file=WEIGHTS,
        requirements="open_clip_torch",
    )
    dtype = torch.float16 if cfg.precision == "fp16" else torch.float32
    with _bundle.writing(clip, out, spec) as folder:
        tensors = {name: value.to(dtype).contiguous() for name, value in state(clip).items()}
        (folder / WEIGHTS).write_bytes(serialise(tensors))
        (folder / "open_clip_config.json").write_text(json.dumps(description, indent=1) + "\n")
        tokenizer, settings = marked_tokenizer(clip)
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def refuses(clip: Clip) -> str | None:
    """Why open_clip's config cannot state a model."""
    return reason(lambda: open_clip_config(clip))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> TorchEncoder:
    """Open the folder through the same door as anybody's checkpoint."""
    from compress.sources.open_clip import load as load_source

    if device != "cpu":
        raise Unavailable(f"open_clip folders are checked on the CPU, not on {device}")
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEncoder(load_source(f"local-dir:{folder}"))


def open_clip_config(clip: Clip) -> dict[str, Any]:
    """open_clip_config.json as data: `model_cfg`, `preprocess_cfg`, and the licence beside them."""
    config, contract = clip.model.config, clip.tokenizer.contract
    vision, text = plain_vision(config, "open_clip"), plain_text(config, "open_clip")
    odd = _unlike_open_clip(vision, text)
    if odd:
        raise PocketclipError(
            f"open_clip: its config has no word for {'; '.join(odd)}; use the folder of the stage "
            "itself"
        )
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            **_tower("vision", vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.head_width,
            "pool_type": "tok" if vision.pooling == "class" else "avg",
            "no_ln_pre": not vision.pre_norm,
            "final_ln_after_pool": vision.norm_after_pooling,
        },
        "text_cfg": {
            **_tower("text", text),
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": "lower" if contract.lowercase else "whitespace"},
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "heads": text.heads[0],
            "pool_type": "eos" if text.pooling == "end" else text.pooling,
            "eos_id": text.end_id,
            "no_causal_mask": not text.causal,
            "proj_type": text.projection,
            "proj_bias": text.projection_bias,
        },
    }
    if config.logit_bias:
        model["init_logit_bias"] = -10.0
    preprocess = {
        "mean": list(clip.preprocess.mean),
        "std": list(clip.preprocess.std),
        "interpolation": clip.preprocess.interpolation,
        "resize_mode": clip.preprocess.resize_mode,
        "fill_color": clip.preprocess.padding[0],
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess, "license": clip.license}


def state(clip: Clip) -> dict[str, torch.Tensor]:
    """The weights under open_clip's names and in its orientation."""
    from compress.sources._plain import their_names

    return their_names(clip.model.state_dict())


def marked_tokenizer(clip: Clip) -> tuple[str, dict[str, Any]]:
    """tokenizer.json that adds the marks by itself, as transformers needs it, and its settings.

    Texts of a causal tower are padded with the end mark: a pad token of its own would be cut out of
    a text that spells it, and no token before the end can see it.
    """
    contract, vocabulary = clip.tokenizer.contract, clip.tokenizer.tokenizer
    causal = plain_text(clip.model.config, "open_clip").causal
    ids = {
        "bos_token": contract.start_id,
        "eos_token": contract.end_id,
        "pad_token": contract.end_id if causal else contract.pad_id,
    }
    names = {role: None if i is None else vocabulary.id_to_token(i) for role, i in ids.items()}
    missing = [f"{role} {ids[role]}" for role, name in names.items() if name is None]
    if missing:
        raise PocketclipError(
            f"open_clip: tokenizer.json has no token for {', '.join(missing)}; open_clip's "
            "tokenizers know their marks by name"
        )
    start, end = names["bos_token"], names["eos_token"]
    marked = tokenizers.Tokenizer.from_str(vocabulary.to_str())
    marked.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, contract.start_id), (end, contract.end_id)],
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": contract.context_length,
        "clean_up_tokenization_spaces": False,
    }
    return marked.to_str(pretty=True), settings


def _unlike_open_clip(vision: VisionConfig, text: TextConfig) -> list[str]:
    """What of a structure open_clip's config cannot state."""
    one_norm = vision.norm_before_pooling != vision.norm_after_pooling
    checks = {
        "attention pooling": vision.pooling == "attention",
        "an image tower without a class token": not vision.class_token,
        "a bias of the patches": vision.patch_bias,
        "two norms around the pooling, or none": not one_norm,
        "an image tower without a plain projection": vision.projection != "linear"
        or vision.projection_bias,
        "fewer image tokens on the way": vision.reduction is not None,
        "blocks that normalise their sums": vision.post_norm or text.post_norm,
        "a text tower of BERT's shape": text.embedding_norm or not text.final_norm,
        "padding that nobody attends to": text.pad_id is not None,
        "a mean over text tokens": text.pooling == "mean",
        "a class token of the text tower": text.class_token,
        "convolutions in the text tower": text.mixer_kernel > 0,
        "a text projection of two layers": text.projection == "mlp",
        "relu": "relu" in (vision.activation, text.activation),
        "quick_gelu in one tower alone": (vision.activation == "quick_gelu")
        != (text.activation == "quick_gelu"),
    }
    return [words for words, found in checks.items() if found]


def _tower(name: str, config: TowerConfig) -> dict[str, Any]:
    """The settings that both towers share; shapes that differ by layer are refused."""
    if len(set(config.heads)) > 1 or len(set(config.mlp_width)) > 1:
        raise PocketclipError(
            f"open_clip: the {name} tower's layers differ in heads or MLP width; open_clip's "
            "config has one number for all, use the folder of the stage itself"
        )
    if config.heads[0] * config.head_width != config.width:
        raise PocketclipError(
            f"open_clip: the {name} tower has {config.heads[0]} heads of {config.head_width} in a "
            f"width of {config.width}; open_clip's heads fill the width"
        )
    return {
        "width": config.width,
        "layers": config.num_layers,
        "mlp_ratio": config.mlp_width[0] / config.width,
        "act_kwargs": {"approximate": "tanh"} if config.activation == "gelu_tanh" else None,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }
