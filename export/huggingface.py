"""Hugging Face's CLIPModel folder: config, safetensors, tokenizer and image processor.

Opens with `CLIPModel.from_pretrained(FOLDER)` and `AutoProcessor.from_pretrained(FOLDER)`. Only
shapes that CLIPModel has are written: a class token, a layer norm before the blocks, a causal text
tower that ends at the end mark, and one number of heads and one MLP width for all layers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as serialise
from torch import Tensor

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.preprocess import FILTERS
from compress.structure import ClipConfig, TextConfig, TowerConfig, UpstreamConfig, VisionConfig
from compress.support import reason
from export import Unavailable, _bundle
from export._tokenizer import as_json, self_contained

REQUIRES = "huggingface"
VERSION = 1
WEIGHTS = "model.safetensors"
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

OUTSIDE_BLOCKS = {
    "image.patch.weight": "vision_model.embeddings.patch_embedding.weight",
    "image.class_token": "vision_model.embeddings.class_embedding",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.norm_pre": "vision_model.pre_layrnorm",  # their spelling
    "image.norm_post": "vision_model.post_layernorm",
    "image.projection": "visual_projection",
    "text.token": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding.weight",
    "text.norm_final": "text_model.final_layer_norm",
    "text.projection": "text_projection",
}
INSIDE_BLOCKS = {
    "norm1": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}

# What CLIPModel always is, setting by setting.
PLAIN_TOWER = {"post_norm": False, "projection": "linear", "projection_bias": False}
PLAIN_VISION = {
    "pooling": "class",
    "class_token": True,
    "pre_norm": True,
    "patch_bias": False,
    "norm_before_pooling": True,
    "norm_after_pooling": False,
    "reduction": None,
}
PLAIN_TEXT = {
    "pooling": "argmax",
    "causal": True,
    "pad_id": None,
    "embedding_norm": False,
    "final_norm": True,
    "class_token": False,
    "mixer_kernel": 0,
}

USAGE = """\
import torch
from transformers import CLIPModel

model = CLIPModel.from_pretrained(".").eval()
parts = {
    "image": (model.vision_model, model.visual_projection),
    "text": (model.text_model, model.text_projection),
}


@torch.no_grad()
def embed(tower, array):
    encoder, projection = parts[tower]
    row = projection(encoder(torch.from_numpy(array)[None]).pooler_output)[0]
    return (row / row.norm()).numpy()


def open_tower(tower):
    return lambda array: embed(tower, array)

"""


class Config(BaseModel):
    """Settings of the CLIPModel folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp16", "fp32"] = "fp32"
    """Type of the stored weights."""
    min_cosine: float = Field(default=0.999, ge=-1, le=1)
    """Parity gate: the worst cosine to the torch model that either tower may show."""


class HuggingFaceEncoder:
    """Both towers of a CLIPModel, in float32."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().float()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        pooled = self.model.vision_model(pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        pooled = self.model.text_model(tokens.long()).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write the folder with a bundle's contracts and goldens beside transformers' files.

    Raises PocketclipError for a shape or preprocessing that CLIPModel doesn't have, Unavailable
    without transformers.
    """
    _transformers()
    description, processor = config(clip), image_processor(clip)
    tokenizer, settings = self_contained(clip)
    dtype = torch.float16 if cfg.precision == "fp16" else torch.float32
    with _bundle.writing(clip, out, spec(cfg)) as folder:
        weights = {name: value.to(dtype).contiguous() for name, value in state(clip)}
        (folder / WEIGHTS).write_bytes(serialise(weights, metadata={"format": "pt"}))
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        for name, content in (
            ("config.json", description | {"dtype": str(dtype).removeprefix("torch.")}),
            ("preprocessor_config.json", processor),
            ("tokenizer_config.json", settings),
        ):
            (folder / name).write_text(as_json(content), encoding="utf-8")


def refuses(clip: Clip) -> str | None:
    """Why a model isn't a CLIPModel."""
    return reason(lambda: (config(clip), image_processor(clip)))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> HuggingFaceEncoder:
    """Open the folder in transformers."""
    if device != "cpu":
        raise Unavailable(f"CLIPModel folders are checked on the CPU, not on {device}")
    if threads is not None:
        torch.set_num_threads(threads)
    model = _transformers().CLIPModel.from_pretrained(str(folder), local_files_only=True)
    return HuggingFaceEncoder(model)


def spec(cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    return _bundle.Spec(
        "huggingface",
        cfg.precision,
        "safetensors",
        1,
        cfg.min_cosine,
        load,
        USAGE,
        {"proved_with": {"transformers": _transformers().__version__}},
        file=WEIGHTS,
        requirements="torch transformers",
    )


def config(clip: Clip) -> dict[str, Any]:
    """config.json as data; PocketclipError naming everything that CLIPModel doesn't have."""
    model, contract = clip.model.config, clip.tokenizer.contract
    highest = max(clip.tokenizer.tokenizer.get_vocab(with_added_tokens=True).values())
    odd = list(_unlike_clip_model(model))
    if contract.end_id < highest:
        odd.append(f"the end mark {contract.end_id} isn't the tokenizer's highest id, {highest}")
    if odd:
        raise PocketclipError(f"huggingface: not the shape of a CLIPModel: {'; '.join(odd)}")
    vision, text = model.vision, model.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": clip.model.logit_scale.item(),
        "vision_config": {
            **_tower(vision),
            "projection_dim": model.embed_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            **_tower(text),
            "projection_dim": model.embed_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": contract.start_id,
            "eos_token_id": contract.end_id,
            "pad_token_id": contract.pad_id,
        },
    }


def image_processor(clip: Clip) -> dict[str, Any]:
    """preprocessor_config.json as data; it shows what lies under transparent pixels, not white."""
    ours = clip.preprocess
    if ours.resize_mode == "longest":
        raise PocketclipError("huggingface: CLIPImageProcessor cannot pad (resize_mode longest)")
    height, width = ours.size
    crop = ours.resize_mode == "shortest"
    whole = {"height": height, "width": width}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(ours.size)} if crop else whole,
        "resample": int(FILTERS[ours.interpolation]),
        "do_center_crop": crop,
        "crop_size": whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(ours.mean),
        "image_std": list(ours.std),
    }


def state(clip: Clip) -> Iterator[tuple[str, Tensor]]:
    """The weights under CLIPModel's names; q, k and v apart."""
    for name, value in clip.model.state_dict().items():
        parts = name.split(".")
        if parts[1:2] != ["blocks"]:
            stem, _, kind = name.rpartition(".")
            theirs = OUTSIDE_BLOCKS.get(name) or f"{OUTSIDE_BLOCKS[stem]}.{kind}" if stem else name
            yield theirs, value
            continue
        tower = "vision_model" if parts[0] == "image" else "text_model"
        layer, module, kind = f"{tower}.encoder.layers.{parts[2]}", ".".join(parts[3:-1]), parts[-1]
        if module == "attention.qkv":
            for letter, part in zip("qkv", value.chunk(3)):
                yield f"{layer}.self_attn.{letter}_proj.{kind}", part
        else:
            yield f"{layer}.{INSIDE_BLOCKS[module]}.{kind}", value


def _tower(tower: TowerConfig) -> dict[str, Any]:
    """The settings that both towers share."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width[0],
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.heads[0],
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.layer_norm_eps,
    }


def _unlike_clip_model(model: ClipConfig) -> Iterator[str]:
    """What of a structure CLIPModel cannot hold."""
    for name, tower, plain in (
        ("vision", model.vision, PLAIN_VISION),
        ("text", model.text, PLAIN_TEXT),
    ):
        if isinstance(tower, UpstreamConfig):
            yield f"the {name} tower is {tower.name}"
            continue
        if len(set(tower.heads)) > 1 or len(set(tower.mlp_width)) > 1:
            yield f"the {name} tower's layers differ in heads or MLP width"
        elif tower.heads[0] * tower.head_width != tower.width:
            yield (
                f"the {name} tower has {tower.heads[0]} heads of {tower.head_width} in a width of "
                f"{tower.width}"
            )
        for key, value in (PLAIN_TOWER | plain).items():
            found = getattr(tower, key, value)
            if found != value:
                yield f"the {name} tower has {key} {found}, not {value}"
    if model.logit_bias:
        yield "there is a logit bias"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise Unavailable(
            "transformers isn't installed: pip install 'pocketclip[huggingface]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
