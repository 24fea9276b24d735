"""A model that doesn't exist yet: random weights in the structure that a JSON file describes.

The file is a model.json without weights beside it:
{"model": {...}, "preprocess": {...}, "tokenizer": {"file": "tokenizer.json", ...},
"license": "Apache-2.0"}
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.preprocess import Preprocess
from compress.sources._fit import fitting
from compress.structure import ClipConfig
from compress.tokenizer import Tokenizer, TokenizerContract


class TokenizerFile(TokenizerContract):
    """The tokenizer's contract and its file."""

    file: str
    """tokenizer.json, relative to the description."""


class Description(BaseModel):
    """What a new model is to be."""

    # A finished model's model.json serves too: its name and provenance are another model's.
    model_config = ConfigDict(frozen=True, extra="ignore")

    model: ClipConfig
    """Structure of both towers."""
    preprocess: Preprocess
    """How pictures become pixels."""
    tokenizer: TokenizerFile
    """How texts become tokens."""
    license: str = "unknown"
    """Licence of the weights that will be trained."""


def load(name: str | Path) -> Clip:
    """A model with random weights, drawn from torch's global generator.

    Raises PocketclipError if the description or its tokenizer is missing or wrong.
    """
    path = Path(name)
    try:
        described = Description.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise PocketclipError(f"{path}: no such file; new: names a model description") from None
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise PocketclipError(f"{path}: not a model description: {'; '.join(mistakes)}") from None
    contract = described.tokenizer.model_dump(exclude={"file"})
    model = ClipModel(described.model)
    initialise_(model)
    clip = Clip(
        model=model.eval(),
        preprocess=described.preprocess,
        tokenizer=Tokenizer.load(
            path.parent / described.tokenizer.file, TokenizerContract(**contract)
        ),
        name=path.stem,
        license=described.license,
        provenance=({"step": "new", "name": path.name},),
    )
    return fitting(clip)
