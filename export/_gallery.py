"""The pictures that the demo page searches at once: small files with their embeddings.

`gallery.json` names them, `gallery.bin` holds the files one after the other, `gallery.f32` the
embeddings [N, E] as little-endian float32.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from compress import atomic
from compress.clip import Clip, Encoder
from compress.data.shards import read_samples
from compress.errors import PocketclipError

EMOJI = Path(__file__).parents[1] / "recipes/emoji/data/held_out_style.tar.xz"
CREDIT = (
    "Emoji One 2.3 by Emoji One, CC BY 4.0 (github.com/EmojiTwo/emojitwo), drawn at 64 x 64 pixels"
)
SIDE = 96
"""Longest side in pixels of what the page shows of a picture."""
CHUNK = 64


def write(clip: Clip, encoder: Encoder, folder: Path, emoji: bool, extra: Path | None) -> None:
    """Write the three files; without pictures they are empty."""
    credits = [CREDIT] if emoji and EMOJI.exists() else []
    paths = [EMOJI] if credits else []
    if extra is not None:
        if not extra.exists():
            raise PocketclipError(f"pictures: {extra}: no such file or folder")
        paths.append(extra)
    entries, thumbnails, rows = [], io.BytesIO(), []
    batch: list[torch.Tensor] = []
    for name, image, content in _pictures(paths):
        entries.append({"name": name, "at": thumbnails.tell(), "size": len(content)})
        thumbnails.write(content)
        batch.append(clip.preprocess(image))
        if len(batch) == CHUNK:
            rows.append(encoder.encode_image(torch.stack(batch)))
            batch = []
    if batch:
        rows.append(encoder.encode_image(torch.stack(batch)))
    width = clip.model.config.embed_dim
    embeddings = torch.cat(rows).numpy() if rows else np.zeros((0, width), np.float32)
    (folder / "gallery.bin").write_bytes(thumbnails.getvalue())
    (folder / "gallery.f32").write_bytes(embeddings.astype("<f4").tobytes())
    about: dict[str, Any] = {"width": width, "credits": credits, "pictures": entries}
    atomic.write_json(folder / "gallery.json", about)


def _pictures(paths: list[Path]) -> Iterator[tuple[str, Image.Image, bytes]]:
    """Name, picture and small file of each sample."""
    for sample in read_samples(paths, needs_caption=False) if paths else ():
        see_through = "A" in sample.image.getbands() or "transparency" in sample.image.info
        small = sample.image.convert("RGBA" if see_through else "RGB")
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        yield sample.name, sample.image, buffer.getvalue()
