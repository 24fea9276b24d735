"""open_clip's own local folder: config, safetensors and tokenizer, for its loaders and trainers.

Opens with `open_clip.create_model_and_transforms("local-dir:FOLDER")`. Only shapes that open_clip
can state are written: the same width of head, number of heads and MLP in every layer of its own
transformers, timm's networks by their names (SigLIP), and towers that it built itself.
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
from compress.structure import ClipConfig, TextConfig, VisionConfig, plain_text
from compress.support import reason
from export import Unavailable, _bundle, _open_clip_image

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
    return reason(lambda: (open_clip_config(clip), marked_tokenizer(clip)))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> TorchEncoder:
    """Open the folder through the same door as anybody's checkpoint, on the CPU or a GPU."""
    from compress.sources.open_clip import load as load_source

    if device not in ("cpu", "cuda"):
        raise Unavailable(f"open_clip folders are opened on cpu or cuda, not on {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("no CUDA device, or a torch without CUDA")
    if threads is not None:
        torch.set_num_threads(threads)
    encoder = TorchEncoder(load_source(f"local-dir:{folder}"))
    encoder.model.to(device)
    return encoder


def open_clip_config(clip: Clip) -> dict[str, Any]:
    """open_clip_config.json as data: `model_cfg`, `preprocess_cfg`, and the licence beside them."""
    config, contract = clip.model.config, clip.tokenizer.contract
    text = plain_text(config, "open_clip")
    odd = _unlike_open_clip(text, config)
    if odd:
        raise PocketclipError(
            f"open_clip: its config has no word for {'; '.join(odd)}; use the folder of the stage "
            "itself"
        )
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": _open_clip_image.described(config),
        "text_cfg": {
            **_open_clip_image.tower("text", text),
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

    weights = clip.model.state_dict()
    image = {name: w for name, w in weights.items() if name.startswith("image.")}
    others = {name: w for name, w in weights.items() if name not in image}
    return _open_clip_image.state(clip.model.config, image) | their_names(others)


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
    names = {role: vocabulary.id_to_token(i) for role, i in ids.items() if i is not None}
    missing = [f"{role} {ids[role]}" for role, name in names.items() if name is None]
    if missing:
        raise PocketclipError(
            f"open_clip: tokenizer.json has no token for {', '.join(missing)}; open_clip's "
            "tokenizers know their marks by name"
        )
    start, end = names.get("bos_token"), names["eos_token"]
    marked = tokenizers.Tokenizer.from_str(vocabulary.to_str())
    marked.no_truncation()
    if contract.start_id is not None:
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


def _unlike_open_clip(text: TextConfig, config: ClipConfig) -> list[str]:
    """What of a structure open_clip's config cannot state, but for the image tower."""
    vision = config.vision
    checks = {
        "blocks that normalise their sums": text.post_norm,
        "a text tower of BERT's shape": text.embedding_norm or not text.final_norm,
        "padding that nobody attends to": text.pad_id is not None,
        "a mean over text tokens": text.pooling == "mean",
        "a class token of the text tower": text.class_token,
        "convolutions in the text tower": text.mixer_kernel > 0,
        "a text projection of two layers": text.projection == "mlp",
        "relu": text.activation == "relu",
        "quick_gelu in one tower alone": isinstance(vision, VisionConfig)
        and vision.pooling != "attention"
        and (vision.activation == "quick_gelu") != (text.activation == "quick_gelu"),
    }
    return [words for words, found in checks.items() if found]
