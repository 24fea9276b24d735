"""Folders of transformers, CLIPModel or SiglipModel: config, weights, tokenizer, image processor.

Opens with `AutoModel.from_pretrained(FOLDER)` and `AutoProcessor.from_pretrained(FOLDER)`. Only
shapes that these classes have are written, with one number of heads and one MLP width for all
layers. CLIPModel: a class token, a layer norm before the blocks, a causal text tower that ends at
the end mark. SiglipModel, for models with a logit bias: attention pooling, a text tower that sees
all tokens and ends at the last.
"""

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
from compress.support import reason
from export import Unavailable, _bundle
from export._hf_shapes import CLASSES, config, kind, state
from export._tokenizer import as_json, self_contained

REQUIRES = "huggingface"
VERSION = 1
WEIGHTS = "model.safetensors"

USAGE = """\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()


@torch.no_grad()
def embed(tower, array):
    encoder = {"image": model.vision_model, "text": model.text_model}[tower]
    row = encoder(torch.from_numpy(array)[None]).pooler_output
    projection = {"image": "visual_projection", "text": "text_projection"}[tower]
    row = getattr(model, projection)(row)[0] if hasattr(model, projection) else row[0]
    return (row / row.norm()).numpy()


def open_tower(tower):
    return lambda array: embed(tower, array)

"""


class Config(BaseModel):
    """Settings of the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp16", "fp32"] = "fp32"
    """Type of the stored weights."""
    min_cosine: float = Field(default=0.999, ge=-1, le=1)
    """Parity gate: the worst cosine to the torch model that either tower may show."""


class HuggingFaceEncoder:
    """Both towers of a CLIPModel or SiglipModel, in float32."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().float()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return self._unit(self.model.vision_model(pixels).pooler_output, "visual_projection")

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return self._unit(self.model.text_model(tokens.long()).pooler_output, "text_projection")

    def _unit(self, pooled: Tensor, projection: str) -> Tensor:
        """SiglipModel's towers end in their projections."""
        layer = getattr(self.model, projection, None)
        return F.normalize(pooled if layer is None else layer(pooled), dim=-1)


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write the folder with a bundle's contracts and goldens beside transformers' files.

    Raises PocketclipError for a shape or preprocessing that transformers' class doesn't have,
    Unavailable without transformers.
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
    """Why a model is neither a CLIPModel nor a SiglipModel."""
    return reason(lambda: (config(clip), image_processor(clip), self_contained(clip)))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> HuggingFaceEncoder:
    """Open the folder in transformers."""
    if device != "cpu":
        raise Unavailable(f"folders of transformers are checked on the CPU, not on {device}")
    if threads is not None:
        torch.set_num_threads(threads)
    model = _transformers().AutoModel.from_pretrained(str(folder), local_files_only=True)
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


def image_processor(clip: Clip) -> dict[str, Any]:
    """preprocessor_config.json as data; it shows what lies under transparent pixels, not white."""
    ours = clip.preprocess
    if ours.resize_mode == "longest":
        raise PocketclipError("huggingface: CLIPImageProcessor cannot pad (resize_mode longest)")
    height, width = ours.size
    crop = ours.resize_mode == "shortest"
    whole = {"height": height, "width": width}
    processor = CLASSES[kind(clip.model.config)].replace("Model", "Processor")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": processor,
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


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise Unavailable(
            "transformers isn't installed: pip install 'pocketclip[huggingface]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
