"""A teacher's embeddings of a training set, computed once: augmented images and all captions.

Shapes: N pairs, V views, P augmentation parameters, E embedding, T different captions.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from compress import atomic, parallel
from compress.batches import embed_images, embed_texts
from compress.clip import Clip
from compress.data.augment import Augment, replay
from compress.errors import PocketclipError
from compress.precision import autocast
from compress.progress import tracked
from compress.work import Work

FILE = "store.safetensors"
CHUNK = 256


@dataclass(frozen=True)
class EmbeddingStore:
    """What a student needs of its teacher."""

    parameters: Tensor
    """Augmentation parameters [N, V, P], float32; drawn again from the seed, not stored."""
    images: Tensor
    """Unit embeddings of the augmented images [N, V, E], bfloat16."""
    texts: Tensor
    """Unit embeddings of the different captions [T, E], bfloat16."""
    rows: dict[str, int]
    """Caption -> its row in `texts`."""


def open_store(folder: Path, work: Work, augment: Augment, views: int) -> EmbeddingStore:
    """Load the store in `folder`, or compute it there; one of other inputs is refused."""
    pairs = work.data.pairs
    captions = dict.fromkeys(text for texts in pairs.captions for text in texts)
    rows = {text: row for row, text in enumerate(captions)}
    parameters = augment.draw(len(pairs) * views, torch.Generator().manual_seed(work.seed))
    parameters = parameters.view(len(pairs), views, -1)
    identity = {
        "teacher": fingerprint(work.teacher),
        "data": work.data.digest,
        "augment": augment.model_dump(mode="json"),
        "views": views,
        "seed": work.seed,
    }
    path = folder / FILE

    def make() -> None:
        if not path.exists():
            tensors = _embed(work, parameters, list(rows))
            atomic.write_bytes(path, serialise(tensors, {"identity": json.dumps(identity)}))

    parallel.once(make)
    tensors = _read(path, identity)
    return EmbeddingStore(parameters, tensors["images"], tensors["texts"], rows)


def fingerprint(clip: Clip) -> str:
    """sha256 over a model's weights and preprocessing: whose embeddings these are."""
    digest = hashlib.sha256(clip.preprocess.model_dump_json().encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Tensor]:
    data = path.read_bytes()
    try:
        tensors = deserialise(data)
        size = int.from_bytes(data[:8], "little")
        found = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["identity"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise PocketclipError(f"{path}: damaged store ({error}); remove it to rebuild") from None
    if found != identity:
        different = ", ".join(key for key in identity if identity[key] != found.get(key))
        raise PocketclipError(
            f"{path} was made with another {different}; remove it to have it made again"
        )
    return tensors


@torch.no_grad()
def _embed(work: Work, parameters: Tensor, captions: list[str]) -> dict[str, Tensor]:
    teacher, pairs = work.teacher, work.data.pairs
    size = teacher.model.config.vision.image_size
    num, views = parameters.shape[:2]
    flat = parameters.view(num * views, -1)
    images = []
    starts = range(0, num * views, CHUNK)
    with autocast("auto", work.device):
        for first in tracked(starts, "teacher embeds images"):
            which = torch.arange(first, min(first + CHUNK, num * views))
            chosen = pairs.images[which // views].to(work.device)
            pixels = replay(chosen, flat[which].to(work.device), size, teacher.preprocess)
            images.append(embed_images(teacher.model.image, pixels).bfloat16().cpu())
        texts = []
        for first in tracked(range(0, len(captions), CHUNK), "teacher embeds texts"):
            tokens = teacher.tokenizer(captions[first : first + CHUNK]).to(work.device)
            texts.append(embed_texts(teacher.model.text, tokens).bfloat16().cpu())
    return {"images": torch.cat(images).view(num, views, -1), "texts": torch.cat(texts)}
