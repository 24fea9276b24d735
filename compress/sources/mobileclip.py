"""Apple's MobileCLIP by its own names, with weights from Apple's .pt files.

S0@mobileclip_s0.pt     S0, S1, S2, B with weights in a file, as the model's page offers them
S0/random               random weights

MobileCLIP2 is among open_clip's architectures: open_clip:MobileCLIP2-S0@FILE. The weights may be
used for research only, which is written into every bundle made from them.
"""

from pathlib import Path
from typing import Any

from compress import atomic, clip
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.preprocess import Preprocess
from compress.sources import _checkpoint, _licenses, _mobileclip, _open_clip, _text_files
from compress.sources.open_clip import architecture_cfg
from compress.structure import ClipConfig, TextConfig

NAMES = {"S0": "MobileCLIP2-S0", "S1": "MobileCLIP-S1", "S2": "MobileCLIP-S2", "B": "MobileCLIP-B"}
"""open_clip's architecture with the same image tower."""
S0_TEXT = TextConfig(
    width=512,
    head_width=64,
    heads=(8,) * 4,
    mlp_width=(2048,) * 4,
    vocab_size=49408,
    context_length=77,
    causal=False,
    mixer_kernel=11,
)


def load(name: str) -> Clip:
    """Open a model by name (see the top of this file)."""
    size, at, file = name.partition("@")
    size = size.removesuffix("/random").removeprefix("MobileCLIP-").upper()
    if size not in NAMES or (at and not Path(file).is_file()):
        raise PocketclipError(
            f"mobileclip:{name}: no such model or file; name one of {', '.join(NAMES)} and "
            "its weights: mobileclip:S0@mobileclip_s0.pt, or mobileclip:S0/random"
        )
    if not at and not name.endswith("/random"):
        raise PocketclipError(
            f"mobileclip:{name}: weights are not fetched; take mobileclip_{size.lower()}.pt from "
            f"https://huggingface.co/apple/MobileCLIP-{size} and name mobileclip:{size}@FILE"
        )
    structure = config(size)
    license = _licenses.RESEARCH if at else "none: random weights"
    step: dict[str, Any] = {"step": "mobileclip", "name": size, **_licenses.flags(license)}
    if at:
        model = clip.build(structure, _weights(size, structure, Path(file)), Path(file))
        step["sha256"] = atomic.sha256(Path(file))
    else:
        model = ClipModel(structure)
        initialise_(model)
    side = structure.vision.image_size
    return Clip(
        model=model.eval(),
        preprocess=Preprocess(
            size=(side, side), interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
        ),
        tokenizer=_text_files.openai_tokenizer(),
        name=f"MobileCLIP-{size}",
        license=license,
        provenance=(step,),
    )


def config(size: str) -> ClipConfig:
    """Structure of S0, S1, S2 or B; only S0's text tower is no plain transformer."""
    found = _open_clip.config(architecture_cfg(NAMES[size]), f"mobileclip:{size}")
    return found.model_copy(update={"text": S0_TEXT}) if size == "S0" else found


def _weights(size: str, structure: ClipConfig, path: Path) -> dict[str, Any]:
    """A checkpoint with Apple's names or open_clip's, under our names."""
    weights = _checkpoint.read(path)
    mixers = {}
    if _mobileclip.is_apples(weights):
        mixers = _mobileclip.mixers(weights) if size == "S0" else {}
        trunk = _open_clip.trunk(structure, path)
        # A block of convolutions stands before the transformer blocks, which count from it.
        weights = _mobileclip.renamed(weights, trunk, first_block=1 if mixers else 0)
    return _open_clip.renamed(architecture_cfg(NAMES[size]), structure, weights, path) | mixers
