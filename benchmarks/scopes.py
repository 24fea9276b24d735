"""What one timed query does: the model alone, from a file's bytes or a sentence, or a whole search.

Shapes: E embedding, S embeddings in the index.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.bundles import Bundle
from benchmarks.timing import Artifact
from compress.clip import Bound, Encoder
from export import _verify

NEAREST = 10
Query = Callable[[Any], Any]


def pipeline(artifact: Artifact, encoder: Encoder) -> tuple[Query, Query, list[Any]]:
    """What happens to an input before the clock starts, the function to time, and its inputs.

    Scope model: where the encoder can bind its tensors the input is filled in beforehand, and the
    runtime alone is timed; of others the call of the encoder.
    """
    encode = getattr(encoder, f"encode_{artifact.tower}")
    if artifact.scope == "model":
        rows = [torch.from_numpy(row[None].copy()) for row in artifact.inputs]
        if not hasattr(encoder, "bind"):
            return _unchanged, encode, rows
        bound: Bound = encoder.bind(artifact.tower)
        return bound.fill, lambda _: bound.run(), rows
    bundle = Bundle(artifact.folder, "", _verify.read(artifact.folder))
    prepare = _preparation(bundle, artifact.tower)
    inputs = raw_queries(artifact.folder, artifact.tower)
    if artifact.scope == "preprocess":
        return _unchanged, (lambda raw: encode(prepare(raw))), inputs
    index = _index(artifact.index_size, int(bundle.about["model"]["embed_dim"]))
    return _unchanged, (lambda raw: nearest(index, encode(prepare(raw)))), inputs


def _unchanged(query: Any) -> Any:
    return query


def beside(encoder: Any, inputs: list[Any]) -> list[Any]:
    """Tensors moved to where a torch model's weights are; other runtimes take them from the host.

    Bytes and sentences stay what they are: their way to the device belongs to the query.
    """
    model = getattr(encoder, "model", None)
    if not isinstance(model, torch.nn.Module):
        return inputs
    device = next(model.parameters()).device
    return [query.to(device) if isinstance(query, Tensor) else query for query in inputs]


def raw_queries(folder: Path, tower: str) -> list[Any]:
    """The goldens as an application meets them: bytes of PNG files, or sentences."""
    about = json.loads((folder / "golden" / "golden.json").read_text(encoding="utf-8"))
    if tower == "text":
        return [entry["text"] for entry in about["texts"]]
    return [(folder / "golden" / entry["file"]).read_bytes() for entry in about["images"]]


def nearest(index: Tensor, embedding: Tensor) -> Tensor:
    """index [S, E], embedding [1, E] -> places of the `NEAREST` largest products, best first."""
    return torch.topk(index @ embedding[0], NEAREST).indices


def _preparation(bundle: Bundle, tower: str) -> Callable[[Any], Tensor]:
    if tower == "text":
        tokenizer = bundle.tokenizer
        return lambda sentence: tokenizer([sentence])
    preprocess = bundle.preprocess

    def pixels(data: bytes) -> Tensor:
        with Image.open(io.BytesIO(data)) as picture:
            return preprocess(picture)[None]

    return pixels


def _index(size: int, embed_dim: int) -> Tensor:
    """Random unit vectors [S, E]: the time of an exhaustive search does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(size, embed_dim, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)
