"""The teachers' embeddings of all names, beside the shards of a reinforced store.

    STORE/names.safetensors  teacher.K [C, E_K] float32 for each teacher K; its metadata is JSON of
                             the names and the digest of the store's identity

Shapes: C names, E embedding.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from compress import atomic
from compress.errors import PocketclipError

FILE = "names.safetensors"


def write(folder: Path, digest: str, names: Sequence[str], teachers: Sequence[Tensor]) -> None:
    """Write the bank of a store whose identity has this digest; teachers: [C, E] each."""
    tensors = {f"teacher.{k}": bank.contiguous() for k, bank in enumerate(teachers)}
    # One key: safetensors writes several in any order, and equal stores are to be equal files.
    about = json.dumps({"identity": digest, "names": list(names)})
    atomic.write_bytes(folder / FILE, serialise(tensors, {"about": about}))


def read(folder: Path, digest: str, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Each teacher's embeddings of `names` [C, E]; PocketclipError where they are of others."""
    path = folder / FILE
    if not path.exists():
        raise PocketclipError(
            f"distill.bank: {path} is missing: run the reinforce stage again, which adds it where "
            "every training pair has a concept, or set bank to 0"
        )
    identity, known, banks = contents(folder)
    if identity != digest or known != list(names):
        raise PocketclipError(f"{path}: belongs to another store; remove it, and reinforce again")
    return banks


def contents(folder: Path) -> tuple[str, list[str], tuple[Tensor, ...]]:
    """What the file says of itself: identity, names, and each teacher's embeddings [C, E]."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        banks = tuple(tensors[f"teacher.{k}"] for k in range(len(tensors)))
        return about["identity"], about["names"], banks
    except (SafetensorError, KeyError, ValueError) as error:
        remedy = "remove it, and reinforce again"
        raise PocketclipError(f"{path}: damaged ({error}); {remedy}") from None
