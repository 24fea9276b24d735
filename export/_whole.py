"""Files that take pictures and texts themselves: made, proved on the goldens, opened as towers."""

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from compress.clip import Clip
from compress.errors import GateFailed
from compress.preprocess import FILTERS, Preprocess, flatten
from export import Unavailable, _bundle, _goldens, _graph, _parity, _picture, _strings
from export._reference import Reference

MAX_LEVELS = 2
"""Grey levels of 255 by which a picture may differ after its resize."""

USAGE = '''\
import onnxruntime


def open_tower(tower):
    """A function from a picture or a text, or an array, to its embedding."""
    entry, options = bundle[tower], onnxruntime.SessionOptions()
    if entry["input"]["dtype"] == "string":
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = onnxruntime.InferenceSession(entry["file"], options)

    def run(array):
        if "in_graph" not in entry["input"]:
            array = array[None].astype(entry["input"]["dtype"])
        return session.run(None, {entry["input"]["name"]: array})[0][0]

    return run
'''


def attach_(graph: Any, clip: Clip, tower: str) -> None:
    """Put the contract's steps before a tower of batch 1, in place.

    Raises PocketclipError for a contract that the graph cannot follow.
    """
    if tower == "image":
        _picture.attach_(graph, clip.preprocess, _bundle.INPUTS[tower])
    else:
        require()
        _strings.attach_(graph, clip.tokenizer, _bundle.INPUTS[tower])


def entries(towers: Sequence[str]) -> dict[str, Any]:
    """What bundle.json says of the inputs of such towers."""
    steps = ["resize", "crop", "rescale", "mean", "std"]
    picture = {"dtype": "uint8", "shape": [None, None, 3], "color": "RGB", "in_graph": steps}
    text = {"dtype": "string", "shape": [1], "in_graph": ["tokenizer"]}
    found = {
        "image": {"input": {"name": _picture.NAME, **picture}},
        "text": {"input": {"name": _strings.NAME, **text}},
    }
    return {tower: found[tower] for tower in towers}


def detached(path: Path, tower: str, shape: Sequence[int]) -> bytes:
    """The tower alone of such a file, as the bytes of a graph; `shape` is that of its input."""
    import onnx

    prefixes = (_picture.PREFIX, _strings.PREFIX)
    bare = _graph.detach(onnx.load(path), prefixes, _bundle.INPUTS[tower], shape)
    return bytes(bare.SerializeToString())


def shapes(bundle: Mapping[str, Any]) -> dict[str, list[int]]:
    """Input shapes of the towers alone, for those that a bundle says are whole."""
    sizes = {
        "image": [1, 3, *bundle["preprocess"]["resize"]["size"]],
        "text": [1, bundle["tokenizer"]["context_length"]],
    }
    return {tower: sizes[tower] for tower in sizes if "in_graph" in bundle[tower]["input"]}


def prove(clip: Clip, folder: Path, towers: Sequence[str], min_cosine: float) -> dict[str, Any]:
    """Run whole files on the goldens -> how far they are from the contract.

    Raises GateFailed where a picture differs by more than `MAX_LEVELS`, ids differ, or embeddings
    fall short of `min_cosine`.
    """
    found: dict[str, Any] = {}
    model = Reference(clip)
    for tower in towers:
        fed, inside = _fed(clip, tower)
        wanted = model.encode_image(inside) if tower == "image" else model.encode_text(inside)
        session = _probe(folder / f"{tower}.onnx", tower)
        outputs = [session.run(None, {session.get_inputs()[0].name: one}) for one in fed]
        embeddings = torch.from_numpy(np.concatenate([embedding for embedding, _ in outputs]))
        seen = torch.from_numpy(np.concatenate([values for _, values in outputs]))
        found[tower] = _compared(clip, tower, inside, seen)
        cosine = _parity.agreement(wanted, embeddings, 1.0)["worst_cosine"]
        if not cosine >= min_cosine:
            raise GateFailed(f"whole {tower} file: worst cosine {cosine:.5f}, below {min_cosine}")
        found[tower]["worst_cosine"] = cosine
    return found


def _fed(clip: Clip, tower: str) -> tuple[list[np.ndarray], torch.Tensor]:
    """What whole files are run on, and the same as the contract makes it."""
    if tower == "text":
        texts = [*_goldens.TEXTS, *_goldens.captions()]
        return [np.array([text], dtype=object) for text in texts], clip.tokenizer(texts)
    pictures = [
        flatten(picture, clip.preprocess.background)
        for picture in _goldens.pictures(clip.preprocess.size).values()
    ]
    pixels = [columns_first(clip.preprocess, picture) for picture in pictures]
    return [np.asarray(picture) for picture in pictures], torch.stack(pixels)


def columns_first(preprocess: Preprocess, picture: Image.Image) -> torch.Tensor:
    """The contract with the width resized before the height.

    All versions of Pillow do so but 13, which turns the passes round for pictures that lose much
    more height than width: squashed ones, where the two differ by some levels at sharp edges.
    """
    if preprocess.resize_mode == "squash":
        size = (preprocess.size[1], picture.height)
        picture = picture.resize(size, FILTERS[preprocess.interpolation])
    return preprocess(picture)


def _compared(clip: Clip, tower: str, wanted: torch.Tensor, seen: torch.Tensor) -> dict[str, Any]:
    """Pixels in grey levels, ids one by one."""
    if tower == "text":
        wrong = (wanted != seen).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            text = [*_goldens.TEXTS, *_goldens.captions()][wrong[0]]
            raise GateFailed(
                f"takes_texts: onnxruntime-extensions gives other ids for {len(wrong)} of "
                f"{len(wanted)} texts, such as {text[:30]!r}; leave the tokenizer outside"
            )
        return {"requires": f"onnxruntime-extensions {metadata.version('onnxruntime-extensions')}"}
    std = torch.tensor(clip.preprocess.std).view(3, 1, 1)
    levels = (wanted - seen).abs() * std * 255
    if levels.max() > MAX_LEVELS + 1e-3:
        raise GateFailed(f"takes_pictures: {levels.max():.1f} grey levels from the contract")
    return {
        "largest_difference_levels": round(levels.max().item(), 3),
        "share_of_values_that_differ": round((levels > 0.5).float().mean().item(), 6),
    }


def _probe(path: Path, tower: str) -> Any:
    """A session that gives the tower's own input beside the embedding."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    kind = onnx.TensorProto.FLOAT if tower == "image" else onnx.TensorProto.INT32
    model.graph.output.append(onnx.helper.make_tensor_value_info(_bundle.INPUTS[tower], kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if tower == "text":
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def require() -> None:
    """Raise Unavailable without onnxruntime-extensions."""
    if importlib.util.find_spec("onnxruntime_extensions") is None:
        raise Unavailable(
            "onnxruntime-extensions is not installed: pip install 'pocketclip[onnxruntime]'"
        )
