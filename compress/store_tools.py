"""What surrounds a reinforced data set: what it will cost, whether it is sound, and its images.

N images, A augmentations, S synthetic captions, E embedding.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from compress.data import datacompdr, name_bank, reinforced
from compress.data.datacompdr import Record, split_teachers
from compress.data.decode import DAMAGED, decode
from compress.data.shards import IMAGE_SUFFIXES
from compress.errors import PocketclipError

NORM_TOLERANCE = 0.02
"""bfloat16 keeps 8 bits: a unit vector's length may be off by about 1 %."""


@dataclass(frozen=True)
class Cost:
    """What reinforcing a data set takes."""

    bytes_per_sample: float
    terabytes: float
    teacher_hours: float
    """Hours of one device."""
    online_hours: float
    """What running the teachers during `epochs` would take instead."""
    pays_after_epochs: float
    """Epochs (of all students together) from which the store is the cheaper way."""


def plan(
    images: int,
    views: int,
    synthetic: int,
    widths: Sequence[int],
    value_bytes: int,
    images_per_second: float,
    texts_per_second: float,
    epochs: float,
) -> Cost:
    """Size and time of a store; the rates are of all teachers one after the other."""
    values = (views + 1 + synthetic) * sum(widths)
    store = images * (views / images_per_second + (1 + synthetic) / texts_per_second)
    epoch = images * (1 / images_per_second + 1 / texts_per_second)
    return Cost(
        bytes_per_sample=float(values * value_bytes),
        terabytes=images * values * value_bytes / 1e12,
        teacher_hours=store / 3600,
        online_hours=epoch * epochs / 3600,
        pays_after_epochs=store / epoch,
    )


@dataclass
class Health:
    """What a look at every sample found."""

    layout: str
    num_shards: int = 0
    num_samples: int = 0
    num_with_image: int = 0
    views: set[int] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    digest: str = ""
    problems: list[str] = field(default_factory=list)


def doctor(paths: Sequence[Path], widths: Sequence[int] = ()) -> Health:
    """Look at every vector and image of a store: our folder, or tars in Apple's layout.

    widths: of the teachers whose vectors stand side by side in Apple's layout; needed for norms.
    """
    if len(paths) == 1 and (paths[0] / reinforced.INDEX).exists():
        return _own(paths[0])
    health = Health("DataCompDR")
    for path in _tars(paths):
        health.num_shards += 1
        try:
            for key, members in datacompdr.read_members(path):
                _look(health, path, key, members, widths)
        except PocketclipError as error:
            health.problems.append(str(error))
    return health


def _look(
    health: Health, path: Path, key: str, members: dict[str, bytes], widths: Sequence[int]
) -> None:
    health.num_samples += 1
    try:
        record = datacompdr.parse(key, members)
    except PocketclipError as error:
        health.problems.append(f"{path}: {error}")
        return
    health.views.add(len(record.param_aug))
    health.widths.add(record.images.shape[1])
    if record.image is not None:
        health.num_with_image += 1
        try:
            decode(record.image)
        except DAMAGED as error:
            health.problems.append(f"{path}: {key}: image does not decode ({error})")
    for name, vectors in (
        ("image_emb", record.images),
        ("text_emb", record.texts),
        *record.synthetic.items(),
    ):
        parts = split_teachers(vectors, widths) if widths else [vectors]
        _check_vectors(health, f"{path}: {key}: {name}", parts, bool(widths))


def _check_vectors(health: Health, place: str, parts: Iterable[Tensor], unit: bool) -> None:
    for n, part in enumerate(parts):
        if not part.isfinite().all():
            health.problems.append(f"{place}: teacher {n}: not finite")
        elif unit and float((part.norm(dim=-1) - 1).abs().max()) > NORM_TOLERANCE:
            length = float(part.norm(dim=-1).max())
            health.problems.append(f"{place}: teacher {n}: length {length:.3f} in place of 1")


def _own(folder: Path) -> Health:
    identity = reinforced.read_identity(folder)
    health = Health("pocketclip", digest=identity.digest, views={identity.views})
    health.widths = {teacher.embed_dim for teacher in identity.teachers}
    for number in range(identity.num_shards):
        try:
            shard = reinforced.read_shard(folder, number, identity.digest)
            if shard is None:
                health.problems.append(f"{folder}: shard {number} is missing")
                continue
            health.num_shards += 1
            health.num_samples += len(shard.samples)
            _check_shard(health, shard, identity)
        except PocketclipError as error:
            health.problems.append(str(error))
    if (folder / name_bank.FILE).exists():
        _check_names(health, folder, identity)
    return health


def _check_names(health: Health, folder: Path, identity: reinforced.Identity) -> None:
    path = folder / name_bank.FILE
    try:
        digest, names, banks = name_bank.contents(folder)
    except PocketclipError as error:
        health.problems.append(str(error))
        return
    if digest != identity.digest:
        health.problems.append(f"{path}: belongs to another store")
    wanted = [(len(names), teacher.embed_dim) for teacher in identity.teachers]
    if [tuple(bank.shape) for bank in banks] != wanted:
        health.problems.append(f"{path}: not one vector of each teacher for each name")
    _check_vectors(health, str(path), banks, True)


def _check_shard(health: Health, shard: reinforced.Shard, identity: reinforced.Identity) -> None:
    num_texts = sum(sample.num_texts for sample in shard.samples)
    for k, teacher in enumerate(identity.teachers):
        wanted = {
            f"images.{k}": (len(shard.samples), identity.views, teacher.embed_dim),
            f"texts.{k}": (num_texts, teacher.embed_dim),
        }
        for name, shape in wanted.items():
            found = shard.tensors.get(name, torch.zeros(0))
            if tuple(found.shape) != shape:
                problem = f"{name} has shape {tuple(found.shape)}, {shape} is needed"
                health.problems.append(f"{shard.path}: {problem}")
            else:
                _check_vectors(health, f"{shard.path}: {name}", [found.float()], True)


def join(tars: Sequence[Path], images: Sequence[Path], out: Path) -> tuple[int, list[str]]:
    """Put downloaded images and captions into DataCompDR shards -> (samples written, what was left
    out and why).

    An image is found by its uid: the name of its file, or of its member in a tar. Where the shard
    says its sha256, another file is left out. Samples without an image are left out.
    """
    known = _downloads(images)
    left: list[str] = []
    written = 0
    for path in _tars(tars):
        records = _joined(path, known, left)
        written += datacompdr.write(out / path.name, records, bfloat16=_is_bfloat16(path))
    return written, left


def _is_bfloat16(path: Path) -> bool:
    _, members = next(iter(datacompdr.read_members(path)), ("", {}))
    return "pth.gz" in members and "npz" not in members


Downloads = dict[str, dict[str, bytes | Path]]


def _downloads(sources: Sequence[Path]) -> Downloads:
    """uid -> its members by suffix; files of folders are read when their turn comes."""
    found: Downloads = {}
    for source in sources:
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.is_file():
                    suffix = file.suffix.removeprefix(".").lower()
                    found.setdefault(file.stem, {})[suffix] = file
        else:
            for key, members in datacompdr.read_members(source):
                uid = Path(key).name
                found.setdefault(uid, {}).update(members)
    if not found:
        raise PocketclipError("no downloaded image found: name folders or tars that hold them")
    return found


def _joined(path: Path, known: Downloads, left: list[str]) -> Iterator[Record]:
    for record in datacompdr.read(path):
        uid = str(record.about.get("uid", record.key))
        members = known.get(uid) or known.get(record.key) or {}
        picture = next((members[s] for s in members if s in IMAGE_SUFFIXES), None)
        if picture is None:
            left.append(f"{uid}: no image")
            continue
        content = picture.read_bytes() if isinstance(picture, Path) else picture
        wanted = record.about.get("sha256")
        if wanted and hashlib.sha256(content).hexdigest() != wanted:
            left.append(f"{uid}: another image than the one that was reinforced (sha256)")
            continue
        caption = members.get("txt")
        if isinstance(caption, Path):
            caption = caption.read_bytes()
        text = record.caption if caption is None else caption.decode("utf-8", "replace").strip()
        yield replace(record, image=content, caption=text)


def _tars(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        found += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise PocketclipError(f"{missing[0] if missing else paths[0]}: no such shard (.tar)")
    return found
