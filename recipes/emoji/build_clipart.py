"""Builds `data/clipart.tar.xz`: public-domain clip art, for more variety in training.

    python recipes/emoji/build_clipart.py      on Debian, after build_data.py; about a minute

Takes Debian's openclipart-svg, keeps the drawings that say they are in the public domain and have
a title of their own, and crops each to what is drawn. Titles and keywords are their authors', so
these captions are noisier than those of the emoji, and no other split has such images.
"""

import argparse
import html
import io
import json
import re
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from build_data import DATA, write_checksums, write_shard
from emoji_art import RENDER_PX, slug, webp
from PIL import Image, ImageOps
from rich.progress import track

PACKAGE = "openclipart-svg=1:0.18+dfsg-19"
# Icon themes, logos, gradients and plain geometry say little in their titles.
SKIPPED_FOLDERS = {"buttons", "computer", "logos", "shapes", "special", "unsorted"}
SKIPPED_TAGS = {"", "hash", "unsorted", "clip_art", "menu", "signs_and_symbols"}
# Above these, a title names a collection and not a drawing, or an author wrote Italian.
MAX_SAME_TITLE = 6
SKIPPED_NAMES = re.compile("archit|nicubunu")
SKIPPED_TITLES = re.compile("clipart|element|icons|submission|collection|theme")
MAX_SVG_BYTES = 60_000
MAX_ASPECT = 3.0
MIN_SIDE_PX = 16
PURL = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Clipart:
    path: Path
    place: str
    title: str
    tags: list[str]


def unpack(cache: Path) -> Path:
    folder = cache / "openclipart"
    if not folder.exists():
        subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=cache, check=True)
        archive = next(cache.glob("openclipart-svg_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    return folder / "usr" / "share" / "openclipart" / "svg"


def words(text: str) -> str:
    """Lower case, underscores and dashes as spaces, no numbering at the end."""
    spaced = re.sub(r"[\s_\-]+", " ", html.unescape(text).lower())
    return re.sub(r"[\s0-9#.]*$", "", spaced).strip()


def read_clipart(path: Path, place: str) -> Clipart | None:
    """The drawing's own title and keywords; None where it names no public-domain licence."""
    try:
        nodes = list(ElementTree.parse(path).iter())
    except ElementTree.ParseError:
        return None
    licenses = [node.get(f"{RDF}resource", "") for node in nodes if node.tag.endswith("}license")]
    work = next((node for node in nodes if node.tag.endswith("}Work")), None)
    if work is None or not any("PublicDomain" in license for license in licenses):
        return None
    tags = [words(node.text or "") for node in work.iter(f"{RDF}li")]
    title = words(work.findtext(f"{PURL}title") or "")
    return Clipart(path, place, title, [tag for tag in dict.fromkeys(tags) if usable(tag)])


def usable(tag: str) -> bool:
    return tag not in SKIPPED_TAGS and len(tag) < 20


def choose(root: Path) -> list[Clipart]:
    found = []
    for path in sorted(root.rglob("*.svg")):
        place = path.relative_to(root)
        small = path.stat().st_size <= MAX_SVG_BYTES
        if small and place.parts[0] not in SKIPPED_FOLDERS and not SKIPPED_NAMES.search(path.stem):
            clipart = read_clipart(path, place.as_posix())
            found += [clipart] if clipart else []
    count = Counter(clipart.title for clipart in found)
    return [
        clipart
        for clipart in found
        if 2 < len(clipart.title) < 40
        and count[clipart.title] <= MAX_SAME_TITLE
        and not SKIPPED_TITLES.search(clipart.title)
    ]


def draw(path: Path) -> Image.Image | None:
    """The drawing, cropped to what is drawn, on a transparent square; None where hardly any is."""
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=path.read_text(encoding="utf-8", errors="replace"),
            width=2 * RENDER_PX,
            dpi=96,  # the package takes 0 by default, and drawings in mm then have no size
            skip_system_fonts=True,
        )
    except ValueError:
        return None
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE_PX:
        return None
    image = image.crop(box)
    if max(image.size) > MAX_ASPECT * min(image.size):
        return None
    return ImageOps.pad(image, (RENDER_PX, RENDER_PX), Image.Resampling.LANCZOS)


def sample_json(clipart: Clipart) -> bytes:
    tags = [tag for tag in clipart.tags if tag not in clipart.title.split()]
    captions = [clipart.title, f"clip art of {clipart.title}"]
    if tags:
        captions += [", ".join([clipart.title, *tags[:3]]), ", ".join(tags[:5])]
    sample = {
        "concept": f"clipart:{slug(clipart.title)}",
        "name": clipart.title,
        "style": "openclipart",
        "tags": clipart.tags,
        "captions": captions,
        "labels": {},
        "license": "CC-PDDC",
        "source": f"deb:{PACKAGE}#{clipart.place}",
    }
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()


def build(cache: Path, out: Path) -> None:
    samples, drawn = [], set()
    for clipart in track(choose(unpack(cache)), "openclipart"):
        image = draw(clipart.path)
        if image is None or image.tobytes() in drawn:
            continue
        drawn.add(image.tobytes())
        key = f"clipart-{len(samples):04d}"
        samples.append((key, webp(image), sample_json(clipart)))
    write_shard(out / "clipart.tar.xz", samples)
    write_checksums(out)
    size = (out / "clipart.tar.xz").stat().st_size
    print(f"clipart: {len(samples)} images, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write")
    parser.add_argument("--cache", type=Path, help="keep the fetched package in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, args.out)
