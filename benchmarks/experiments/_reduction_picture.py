"""What survives of pictures when towers drop tokens, drawn."""

import base64
import io

import torch
from PIL import Image

from benchmarks import survival
from benchmarks.experiments import _reduction_accuracy as accuracy
from compress.schedule import Method
from compress.stages.prune_tokens import Config, reduced, schedule
from compress.structure import plain_vision

SHOWN: tuple[Method, ...] = (
    "guarded",
    "tome",
    "evit",
    "feather",
    "vision_zip",
    "topk",
    "fopru_row",
    "grid",
    "random",
)
PICTURES, CELL = 6, 64


def survivors(tasks: accuracy.Tasks) -> str:
    """Six pictures by method at 0.6 of the multiply-adds: the darker a patch, the less is left."""
    pixels = tasks.splits["held_out_style"][0][: PICTURES * 40 : 40]
    vision = plain_vision(tasks.teacher.model.config, "reduction")
    wide, high = 110 + PICTURES * (CELL + 6), 10 + len(SHOWN) * (CELL + 6)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-size="13" '
        'font-family="sans-serif">'
        f'<rect width="{wide}" height="{high}" fill="#fff"/><defs>'
    ]
    for n, picture in enumerate(pixels):
        parts.append(
            f'<image id="p{n}" width="{CELL}" height="{CELL}" href="{_png(tasks, picture)}"/>'
        )
    parts.append("</defs>")
    for row, method in enumerate(SHOWN):
        torch.manual_seed(0)
        found = schedule(vision, Config(method=method, macs=0.6))
        weights = survival.surviving(reduced(tasks.teacher, found), pixels)
        top = 6 + row * (CELL + 6)
        parts.append(f'<text x="6" y="{top + CELL / 2}">{method}</text>')
        for n in range(len(pixels)):
            left = 106 + n * (CELL + 6)
            parts.append(f'<use href="#p{n}" x="{left}" y="{top}"/>')
            parts += _veil(weights[n], left, top, vision.grid)
    return "".join([*parts, "</svg>\n"])


def _veil(weights: torch.Tensor, left: float, top: float, grid: int) -> list[str]:
    side = CELL / grid
    found = []
    for place, weight in enumerate(weights.clamp(0, 1).tolist()):
        if weight < 0.995:
            y, x = divmod(place, grid)
            found.append(
                f'<rect x="{left + x * side:g}" y="{top + y * side:g}" width="{side:g}" '
                f'height="{side:g}" opacity="{0.85 * (1 - weight):.2f}"/>'
            )
    return found


def _png(tasks: accuracy.Tasks, picture: torch.Tensor) -> str:
    contract = tasks.teacher.preprocess
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (contract.mean, contract.std))
    bytes_ = ((picture * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(bytes_).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
