"""Weights from files that others wrote: nothing but tensors is read, and nothing is executed."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import clip
from compress.errors import PocketclipError

PICKLES = (".pt", ".pth", ".bin")
# Where trainers put the weights among the other things that they save.
PLACES = ("state_dict", "model", "model_state_dict")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint as they are stored, mapped from the file rather than copied.

    A pickle that holds anything but tensors and plain values is refused, never run.
    """
    if path.suffix == ".safetensors":
        return clip.read_weights(path)
    if path.suffix not in PICKLES:
        raise PocketclipError(f"{path}: weights are .safetensors, .pt, .pth or .bin files")
    if not path.is_file():
        raise PocketclipError(f"{path}: no such file")
    data = _unpickled(path)
    for place in PLACES:
        if isinstance(data, dict) and isinstance(data.get(place), dict):
            data = data[place]
            break
    if not isinstance(data, dict) or not data or not _tensors_only(data):
        raise PocketclipError(f"{path}: holds no state dict, or one with more than tensors in it")
    return {str(name).removeprefix("module."): tensor for name, tensor in data.items()}


def _unpickled(path: Path) -> Any:
    # Only archives whose parts are stored as they are can be mapped, and none inflates in memory.
    mapped = zipfile.is_zipfile(path)
    if mapped:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise PocketclipError(
                    f"{path}: refused, as its parts are compressed; save it again"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise PocketclipError(
            f"{path}: refused, as it isn't a file of nothing but tensors ({reason}); "
            "use the model's .safetensors file"
        ) from None


def _tensors_only(state: dict[Any, Any]) -> bool:
    return all(isinstance(tensor, Tensor) for tensor in state.values())
