"""The arms of `models.py`: one small model through everything, one full model's parity."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import export
from benchmarks.experiments import apple_files
from benchmarks.experiments.model_families import Pair, open_pair
from benchmarks.hosts import local
from compress import clip as clips
from compress import plugin
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.fold import fold
from compress.model import ClipModel
from compress.work import Data, Work
from export import _goldens

GOLDEN = [
    "",
    "a photo of a cat",
    "word " * 100,
    "crème brûlée, naïve façade",
    "一只猫坐在垫子上",
    "👩‍🚀 🚀 ❤️‍🔥",
]
SIZES = ((150, 90), (97, 131), (70, 71))
REOPENED = ("open_clip", "huggingface")
ROUNDING = 1e-6


def small(family: str, folder: Path) -> dict[str, Any]:
    """Open, compare, distil, cut and quantize the family's small model."""
    pair = open_pair(family, folder / "source")
    row: dict[str, Any] = {"family": family, "config": "small", "name": pair.clip.name}
    row |= parity(pair)
    clips.save(pair.clip, folder / "ours")
    row["saves"] = opens_alike(pair.clip, clips.load(folder / "ours"))
    data = pictures(folder / "data", pair.clip.preprocess.size[0])
    row["distils"] = outcome(lambda: distil(pair.clip, data, folder / "distil"))
    row["prunes"] = outcome(lambda: prune(pair.clip, data, folder / "prune"))
    row["quantizes"] = outcome(lambda: quantized(fold(pair.clip), folder))
    shutil.rmtree(folder)
    return row | {"exports": {}, "reopened_difference": None}


def add_exports(
    row: dict[str, Any], folder: Path, targets: Sequence[str], keep: Callable[[], None]
) -> None:
    """Export a family's small model to those targets that its row lacks, in place.

    `keep` is called after each: a converter may crash.
    """
    clip = fold(open_pair(row["family"], folder / "source").clip)
    for target in targets:
        if target in row["exports"]:
            continue
        said = outcome(lambda: exported(clip, target, folder))  # noqa: B023
        if said == "yes" and target in REOPENED:
            apart = reopened(clip, target, folder)
            row["reopened_difference"] = max(apart, row["reopened_difference"] or 0.0)
        row["exports"][target] = said
        keep()
    shutil.rmtree(folder)


@torch.no_grad()
def parity(pair: Pair) -> dict[str, Any]:
    """Largest differences to the library's own module, tokenizer and transform."""
    clip = pair.clip
    height, width = clip.preprocess.size
    pixels, ids = torch.randn(2, 3, height, width), clip.tokenizer(GOLDEN)
    row: dict[str, Any] = {
        "image_difference": difference(clip.model.encode_image(pixels), pair.image(pixels)),
        "text_difference": difference(clip.model.encode_text(ids), pair.text(ids.long())),
    }
    if pair.tokenize:
        row["num_wrong_ids"] = int((ids != pair.tokenize(GOLDEN)).sum())
    if pair.preprocess:
        drawn = [_goldens.drawing(seed, size) for seed, size in enumerate(SIZES)]
        pairs = [(clip.preprocess(picture), pair.preprocess(picture)) for picture in drawn]
        row["pixel_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    return row


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference between rows at unit length."""
    return float((F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().max())


def outcome(action: Callable[[], Any]) -> str:
    """ "yes", or the reason that the code itself gives."""
    try:
        action()
    except (PocketclipError, export.Unavailable) as error:
        return str(error).splitlines()[0]
    return "yes"


@torch.no_grad()
def opens_alike(first: Clip, second: Clip) -> str:
    """Whether a saved model opens with the same weights and function.

    Embeddings may differ by rounding: tensors mapped from a file lie elsewhere in memory, and
    kernels sum in an order that depends on it.
    """
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[n], theirs[n]) for n in ours):
        return "other weights"
    height, width = first.preprocess.size
    pixels = torch.randn(1, 3, height, width)
    apart = difference(first.model.encode_image(pixels), second.model.encode_image(pixels))
    return "yes" if apart <= ROUNDING else f"embeddings differ by {apart:.1e}"


def pictures(folder: Path, side: int) -> Data:
    """Eight drawings with captions, and a file of classes."""
    train = folder / "pictures"
    train.mkdir(parents=True, exist_ok=True)
    classes = []
    for n in range(8):
        name = f"{_goldens.COLORS[n]} {_goldens.THINGS[n]}"
        _goldens.drawing(n, (side, side)).save(train / f"{n}.png")
        concept = {"concept": str(n), "name": name}
        about = {**concept, "captions": [name], "style": "flat"}
        (train / f"{n}.json").write_text(json.dumps(about))
        classes.append(concept)
    (folder / "classes.json").write_text(json.dumps(classes))
    return Data(
        train=(train,),
        evaluate={"val": (train,)},
        classes_file=folder / "classes.json",
        templates=("{}",),
        image_size=side,
    )


def distil(clip: Clip, data: Data, out: Path) -> None:
    """Two steps towards itself."""
    stage = plugin.find(plugin.STAGES, "distill")
    student = replace(clip, model=copy.deepcopy(clip.model))
    cfg = stage.Config(steps=2, batch_size=4, warmup_steps=0, checkpoint_every=50)
    stage.run(Work(clip=student, teacher=clip, data=data), cfg, out)


def prune(clip: Clip, data: Data, out: Path) -> None:
    """One layer less in each tower."""
    stage = plugin.find(plugin.STAGES, "inherit")
    cfg = stage.Config(vision={"layers": 1}, text={"layers": 1})
    cut = stage.run(Work(clip=clip, teacher=clip, data=data), cfg, out).clip
    cut.model.encode_text(cut.tokenizer(GOLDEN[:1]))


def exported(clip: Clip, target: str, folder: Path) -> None:
    """Write a bundle with the exporter's own settings and parity gate."""
    exporter = plugin.find(plugin.EXPORTERS, target)
    exporter.write(clip, exporter.Config(), folder / "export" / target)


def quantized(clip: Clip, folder: Path) -> None:
    """ONNX Runtime's int8 with its parity gate wide open: random weights show no accuracy."""
    exporter = plugin.find(plugin.EXPORTERS, "onnxruntime")
    cfg = exporter.Config(precision="int8", min_cosine=-1.0)
    exporter.write(clip, cfg, folder / "export" / "onnxruntime-int8")


@torch.no_grad()
def reopened(clip: Clip, target: str, folder: Path) -> float:
    """Embeddings of the folder exported in float32 and opened by its exporter, against ours."""
    exporter, out = plugin.find(plugin.EXPORTERS, target), folder / "export" / f"{target}-fp32"
    exporter.write(clip, exporter.Config(precision="fp32"), out)
    encoder = exporter.load(out)
    height, width = clip.preprocess.size
    pixels, ids = torch.randn(2, 3, height, width), clip.tokenizer(GOLDEN)
    return max(
        difference(encoder.encode_image(pixels), clip.model.encode_image(pixels)),
        difference(encoder.encode_text(ids), clip.model.encode_text(ids)),
    )


@torch.no_grad()
def full_open_clip(name: str) -> dict[str, Any]:
    """Parity of a named architecture with random weights; its tensors are shared, not copied."""
    import open_clip

    from compress.sources import _open_clip

    model_cfg = open_clip.get_model_config(name)
    theirs = open_clip.create_model(name).eval()
    ours = _open_clip.convert(model_cfg, theirs.state_dict(), name)
    config = ours.config
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    ids = torch.randint(3, config.text.vocab_size - 1, (3, config.text.context_length))
    ids[:, config.text.context_length // 2] = config.text.vocab_size - 1
    row = {
        "family": name,
        "config": "full",
        "name": name,
        "image_difference": difference(ours.encode_image(pixels), theirs.encode_image(pixels)),
        "text_difference": difference(ours.encode_text(ids), theirs.encode_text(ids)),
    }
    if not model_cfg["text_cfg"].get("hf_tokenizer_name"):
        tokenizer = _open_clip.tokenizer(model_cfg["text_cfg"], None, name)
        wrong = tokenizer(GOLDEN) != open_clip.get_tokenizer(name)(GOLDEN)
        row["num_wrong_ids"] = int(wrong.sum())
    return row


@torch.no_grad()
def full_transformers(name: str, folder: Path, model_name: str, **config: Any) -> dict[str, Any]:
    """Parity of a class of transformers in its default size, or the one given.

    Its weights are read from the file that it saves: names in memory may be others.
    """
    import transformers

    from compress.sources import _checkpoint, _hf_towers, huggingface

    model_class = getattr(transformers, model_name)
    theirs = model_class(model_class.config_class(**config)).eval()
    theirs.save_pretrained(folder)
    described = theirs.config.to_dict()
    structure = _hf_towers.structure(described, name)
    weights = _checkpoint.read(huggingface.weights_file(folder))
    ours: ClipModel = clips.build(
        structure, _hf_towers.renamed(described, structure, weights), name
    )
    shutil.rmtree(folder)
    pixels = torch.randn(1, 3, structure.vision.image_size, structure.vision.image_size)
    ids = torch.randint(3, structure.text.vocab_size - 1, (3, structure.text.context_length))
    end = described["text_config"].get("eos_token_id") or 2
    ids[:, 9] = end if end < structure.text.vocab_size else 2
    image = theirs.get_image_features(pixel_values=pixels)
    text = theirs.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
    pooled = [v if isinstance(v, Tensor) else v.pooler_output for v in (image, text)]
    return {
        "family": name,
        "config": "full",
        "name": name,
        "image_difference": difference(ours.encode_image(pixels), pooled[0]),
        "text_difference": difference(ours.encode_text(ids), pooled[1]),
    }


@torch.no_grad()
def full_apple(write: Callable[[Path], Any], name: str, folder: Path) -> dict[str, Any]:
    """Parity of a MobileCLIP opened from a file with Apple's names."""
    clip, image, text = write(folder)
    shutil.rmtree(folder)
    height, width = clip.preprocess.size
    pixels, ids = torch.randn(1, 3, height, width), clip.tokenizer(GOLDEN)
    return {
        "family": name,
        "config": "full",
        "name": name,
        "image_difference": difference(clip.model.encode_image(pixels), image(pixels)),
        "text_difference": difference(clip.model.encode_text(ids), text(ids.long())),
    }


ALT = {
    "text_config": {"vocab_size": 250002, "num_hidden_layers": 6, "project_dim": 768},
    "vision_config": {"num_hidden_layers": 12, "hidden_size": 768, "patch_size": 14},
}
FULL: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ViT-B-32": lambda _: full_open_clip("ViT-B-32"),
    "ViT-B-16-SigLIP": lambda _: full_open_clip("ViT-B-16-SigLIP"),
    "ViT-B-16-SigLIP2": lambda _: full_open_clip("ViT-B-16-SigLIP2"),
    "MobileCLIP2-S0": lambda _: full_open_clip("MobileCLIP2-S0"),
    "coca_ViT-B-32": lambda _: full_open_clip("coca_ViT-B-32"),
    "CLIPModel B/32": lambda folder: full_transformers(
        "transformers CLIPModel B/32", folder, "CLIPModel"
    ),
    "SiglipModel B/16": lambda folder: full_transformers(
        "transformers SiglipModel B/16", folder, "SiglipModel"
    ),
    "MobileCLIP-S0, Apple's file": lambda folder: full_apple(
        apple_files.s0, "MobileCLIP-S0, Apple's .pt", folder
    ),
    "MobileCLIP2-S0, Apple's file": lambda folder: full_apple(
        apple_files.second_s0, "MobileCLIP2-S0, Apple's .pt", folder
    ),
    "ViT-B-16": lambda _: full_open_clip("ViT-B-16"),
    "AltCLIP shape": lambda folder: full_transformers(
        "AltCLIP's shape", folder, "AltCLIPModel", **ALT
    ),
}


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of opening ViT-B/16 from safetensors, every page read, over the file's size."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).state_dict()
    path = folder / "weights.safetensors"
    save_file({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, path)
    code = "from benchmarks.experiments.model_arms import peak; import sys; peak(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    ratio = float(done.stdout.split()[-1]) / path.stat().st_size
    shutil.rmtree(folder)
    return {"name": "ViT-B-16", "config": "memory", "peak_over_weights": ratio}


def peak(path: str) -> None:
    """Print the bytes by which this process grew while it opened a ViT-B/16."""
    import open_clip.model
    import timm  # noqa: F401

    from compress.sources.open_clip import load

    assert open_clip.model is not None
    local.forget_peak()
    before = local.resident_bytes()
    model = load(f"ViT-B-16@{path}").model
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    print(local.peak_bytes() - before)
