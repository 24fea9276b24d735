"""How much the model suffers from one layer's rounding, measured on calibration pairs.

Shapes: N pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.batches import embed_images, embed_texts
from compress.calibrate import Calibration, embed
from compress.model import ClipModel
from compress.progress import tracked
from compress.ptq import Quantized


@torch.no_grad()
def logits(model: ClipModel, calibration: Calibration) -> Tensor:
    """Image-to-text similarities times the model's scale: [N, N]."""
    u, v = embed(model, calibration)
    return model.logit_scale.exp() * u @ v.T


def divergence(wanted: Tensor, found: Tensor) -> float:
    """KL divergence from the float to the rounded distribution, both directions averaged."""
    both = ((wanted, found), (wanted.T, found.T))
    parts = [
        F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
        for a, b in both
    ]
    return float(sum(parts) / 2)


@torch.no_grad()
def kl(quantized: Quantized, names: list[str], calibration: Calibration) -> dict[str, float]:
    """Divergence with only the named layer rounded, the rest of the folded model in float."""
    model = quantized.folded
    u, v = embed(model, calibration)
    wanted = model.logit_scale.exp() * u @ v.T
    found = {}
    scheme = quantized.model.config.scheme
    assert scheme is not None
    for name in tracked([n for n in names if n in scheme.layers], "rounding one layer alone"):
        parent, _, last = name.rpartition(".")
        plain = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, quantized.model.get_submodule(name))
        found[name] = divergence(wanted, _half(model, name, calibration, u, v))
        setattr(model.get_submodule(parent), last, plain)
    return found


def _half(model: ClipModel, name: str, calibration: Calibration, u: Tensor, v: Tensor) -> Tensor:
    """Similarities where only the tower of `name` runs again."""
    if name.startswith("image."):
        u = embed_images(model.image, calibration.pixels)
    else:
        v = embed_texts(model.text, calibration.tokens)
    return model.logit_scale.exp() * u @ v.T
