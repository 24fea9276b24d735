"""Builds `recipes/emoji/data/`: emoji art with names, tags and labels as webdataset shards.

    pip install resvg_py==0.5.0 pillow tokenizers rich      (and npm on the PATH)
    python recipes/emoji/build_data.py                      about 2 minutes on one core

Fetches the packages named in emoji_art.py with `npm pack` into a temporary folder (or `--cache`),
draws one image per concept and style, and writes

    train-NNN.tar.xz          all styles but the held-out one
    val.tar.xz                held-out images: their concepts are in train, drawn in other styles
    unseen.tar.xz             96 concepts that are in no other shard of these styles
    held_out_style.tar.xz     EmojiOne: a vendor whose art is never trained on
    concepts.json             every concept: the zero-shot classes
    tokenizer.json, tokenizer_config.json    (build_tokenizer.py)
    SHA256SUMS

The same packages and library versions give the same bytes.
"""

import argparse
import hashlib
import io
import json
import lzma
import random
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import build_tokenizer
import emoji_art
from emoji_art import HELD_OUT_STYLE, LANGUAGES, STYLES, Style
from PIL import Image
from rich.progress import track

DATA = Path(__file__).parent / "data"
NUM_TRAIN_SHARDS = 4
NUM_UNSEEN = 96
NUM_VAL = 500
# A concept is held out only where enough drawings of it make that a fair test.
MIN_STYLES_UNSEEN = 4
MIN_STYLES_VAL = 3


@dataclass(frozen=True)
class Drawing:
    """One image of one concept."""

    concept: dict
    style: Style
    icon: str
    image: bytes

    @property
    def key(self) -> str:
        return f"{self.concept['concept']}_{self.style.name}"


def draw_all(concepts: list[dict], cache: Path) -> list[Drawing]:
    styles = (*STYLES, HELD_OUT_STYLE)
    icon_sets = {
        style.name: emoji_art.IconSet(emoji_art.unpack(style.package, cache))
        for style in styles
        if style.package.startswith("@iconify-json/")
    }
    known_names: dict[str, set[str]] = {}
    for icon_set in icon_sets.values():
        for code, names in icon_set.names_by_code().items():
            known_names.setdefault(code, set()).update(names)
    by_id = {entry["concept"]: entry for entry in concepts}
    drawings = []
    for style in styles:
        if style.name in icon_sets:
            icon_set = icon_sets[style.name]
            icons = emoji_art.match_icons(icon_set, concepts, known_names)
            for concept, icon in track(sorted(icons.items()), style.name):
                image = emoji_art.draw_svg(icon_set.svg(icon))
                drawings.append(Drawing(by_id[concept], style, icon, image))
        else:
            files = emoji_art.match_files(emoji_art.unpack(style.package, cache), concepts)
            for concept, path in track(sorted(files.items()), style.name):
                image = emoji_art.webp(Image.open(path))
                drawings.append(Drawing(by_id[concept], style, path.stem, image))
    return drawings


def lottery(*parts: str) -> str:
    """A place in a fixed random order that does not change when other things are added."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def split_drawings(drawings: list[Drawing]) -> dict[str, list[Drawing]]:
    copies = Counter((drawing.style.name, drawing.image) for drawing in drawings)
    # Some flags are drawn alike; a copy in train would give a held-out image away.
    twins = {d.concept["concept"] for d in drawings if copies[d.style.name, d.image] > 1}
    styles_of: dict[str, list[str]] = {}
    for drawing in drawings:
        if drawing.style is not HELD_OUT_STYLE:
            styles_of.setdefault(drawing.concept["concept"], []).append(drawing.style.name)
    fair = [concept for concept in styles_of if concept not in twins]
    unseen = [concept for concept in fair if len(styles_of[concept]) >= MIN_STYLES_UNSEEN]
    unseen = sorted(unseen, key=lambda concept: lottery("unseen", concept))[:NUM_UNSEEN]
    val = [
        concept
        for concept in fair
        if len(styles_of[concept]) >= MIN_STYLES_VAL and concept not in unseen
    ]
    val = sorted(val, key=lambda concept: lottery("val", concept))[:NUM_VAL]
    val_style = {
        concept: min(styles_of[concept], key=lambda style: lottery("val", concept, style))
        for concept in val
    }

    splits: dict[str, list[Drawing]] = {"train": [], "val": [], "unseen": [], "held_out_style": []}
    for drawing in drawings:
        concept = drawing.concept["concept"]
        if drawing.style is HELD_OUT_STYLE:
            splits["held_out_style"].append(drawing)
        elif concept in unseen:
            splits["unseen"].append(drawing)
        elif val_style.get(concept) == drawing.style.name:
            splits["val"].append(drawing)
        else:
            splits["train"].append(drawing)
    return splits


def captions(concept: dict, style: Style, key: str) -> list[str]:
    """The name first; then other ways to say it, with tags in an order of the image's own."""
    name = concept["name"]
    tags = [tag for tag in concept["tags"] if tag not in name.split()]
    random.Random(key).shuffle(tags)
    lines = [name, f"a {style.look} emoji of {name}"]
    if tags:
        lines.append(", ".join([name, *tags[:3]]))
        lines.append(", ".join(tags[:5]))
    if len(tags) > 5:
        lines.append(", ".join(tags[5:10]))
    lines += [short.replace("_", " ") for short in concept["shortcodes"]]
    return list(dict.fromkeys(lines))


def sample_json(drawing: Drawing) -> bytes:
    concept, style = drawing.concept, drawing.style
    sample = {
        "concept": concept["concept"],
        "name": concept["name"],
        "style": style.name,
        "tags": concept["tags"],
        "captions": captions(concept, style, drawing.key),
        "labels": concept["labels"],
        "license": style.license,
        "source": style.source(drawing.icon),
    }
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    """(key, image, json) triples -> tar.xz whose bytes depend on nothing but the samples."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, text in samples:
            for suffix, content in (("webp", image), ("json", text)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(lzma.compress(packed.getvalue(), preset=9))


def write_concepts(path: Path, concepts: list[dict]) -> None:
    keys = ("concept", "name", "tags", "group", "labels")
    rows = [json.dumps({k: entry[k] for k in keys}, ensure_ascii=False) for entry in concepts]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".xz", ".json"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def build(cache: Path, out: Path) -> None:
    concepts = emoji_art.read_concepts(cache)
    splits = split_drawings(draw_all(concepts, cache))
    for name, drawings in splits.items():
        drawings.sort(key=lambda drawing: drawing.key)
        samples = [(drawing.key, drawing.image, sample_json(drawing)) for drawing in drawings]
        if name == "train":
            size = -(-len(samples) // NUM_TRAIN_SHARDS)
            for number in range(NUM_TRAIN_SHARDS):
                part = samples[number * size : (number + 1) * size]
                write_shard(out / f"train-{number:03d}.tar.xz", part)
        else:
            write_shard(out / f"{name}.tar.xz", samples)
        num_concepts = len({drawing.concept["concept"] for drawing in drawings})
        print(f"{name}: {len(samples)} images, {num_concepts} concepts")
    write_concepts(out / "concepts.json", concepts)
    styles = (*STYLES, HELD_OUT_STYLE)
    corpus = [
        caption
        for concept in concepts
        for style in styles
        for caption in captions(concept, style, f"{concept['concept']}_{style.name}")
    ]
    build_tokenizer.write(out, corpus)
    write_checksums(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, labels in {len(LANGUAGES) + 1} languages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write")
    parser.add_argument("--cache", type=Path, help="keep the fetched packages in this folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, args.out)
