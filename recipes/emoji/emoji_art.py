"""Emoji art and names out of the npm packages: the concepts, and how each style draws them.

A concept is an emoji of emojibase that is not a component; its id is its code points without FE0F
("1f44b", "1f468-200d-2695").
"""

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

RENDER_PX = 128
IMAGE_PX = 64
LANGUAGES = ["de", "es", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "uk", "vi", "zh"]
NAMES_PACKAGE = "emojibase-data@17.0.0"
GROUP_COMPONENT = 2
# Sets without code points are older than the insect: their "cricket" is the game.
OLDER_MEANING = {"cricket": "1f3cf"}


@dataclass(frozen=True)
class Style:
    """One vendor's drawings: the package, and the words a caption has for the look."""

    name: str
    package: str
    license: str
    author: str
    look: str

    def source(self, icon: str) -> str:
        return f"npm:{self.package}#{icon}"


STYLES = (
    Style("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter", "flat"),
    Style("noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Google Inc", "shaded cartoon"),
    Style("noto-v1", "@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Google Inc", "blob style"),
    Style(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "MIT",
        "Microsoft Corporation",
        "bold flat",
    ),
    Style(
        "fluent-3d", "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "Microsoft Corporation", "glossy 3d"
    ),
)
HELD_OUT_STYLE = Style(
    "emojione", "@iconify-json/emojione@1.2.3", "CC-BY-4.0", "Emoji One", "clean flat"
)


def unpack(package: str, cache: Path) -> Path:
    """Fetches an npm package into `cache` unless it is there, and returns its unpacked folder."""
    folder = cache / re.sub(r"[^a-z0-9.]+", "-", package.lower()).strip("-")
    if not folder.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True
        )
        archive = cache / packed.stdout.decode().split()[-1]
        partial = folder.with_name(folder.name + ".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(folder)
    return folder / "package"


def concept_id(hexcode: str) -> str:
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def slug(label: str) -> str:
    """The name iconify gives an icon with this label."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def read_concepts(cache: Path) -> list[dict]:
    """All emoji of emojibase but its components, with names, tags and labels in LANGUAGES."""
    folder = unpack(NAMES_PACKAGE, cache)
    read = lambda path: json.loads((folder / path).read_text())  # noqa: E731
    groups = read("meta/groups.json")["groups"]
    shortcodes = read("en/shortcodes/github.json") | {}
    labels = {
        language: {emoji["hexcode"]: emoji["label"] for emoji in read(f"{language}/data.json")}
        for language in LANGUAGES
    }
    concepts = []
    for emoji in read("en/data.json"):
        if emoji.get("group", GROUP_COMPONENT) == GROUP_COMPONENT:
            continue
        code = emoji["hexcode"]
        short = shortcodes.get(code, [])
        concepts.append(
            {
                "concept": concept_id(code),
                "name": emoji["label"].lower(),
                "tags": [str(tag).lower() for tag in emoji.get("tags", [])],
                "shortcodes": [short] if isinstance(short, str) else short,
                "group": groups[str(emoji["group"])],
                "labels": {
                    language: labels[language][code]
                    for language in LANGUAGES
                    if code in labels[language]
                },
                "toned": [concept_id(skin["hexcode"]) for skin in emoji.get("skins", [])],
            }
        )
    return concepts


class IconSet:
    """An iconify package: finds the icon of a concept and draws it."""

    def __init__(self, folder: Path) -> None:
        self.icons = json.loads((folder / "icons.json").read_text())
        self.aliases = self.icons.get("aliases", {})
        characters = json.loads((folder / "chars.json").read_text())
        self.by_code = {concept_id(code): name for code, name in characters.items()}

    def names(self) -> set[str]:
        return set(self.icons["icons"]) | set(self.aliases)

    def names_by_code(self) -> dict[str, set[str]]:
        """Code points -> the icon's name and the plain aliases (no flip or turn) of that name."""
        plain: dict[str, set[str]] = {}
        for alias, entry in self.aliases.items():
            if set(entry) == {"parent"}:
                plain.setdefault(entry["parent"], set()).add(alias)
        return {code: {name} | plain.get(name, set()) for code, name in self.by_code.items()}

    def original(self, name: str) -> str:
        """The icon that an untransformed alias stands for."""
        while name in self.aliases and set(self.aliases[name]) == {"parent"}:
            name = self.aliases[name]["parent"]
        return name

    def svg(self, name: str) -> str:
        turn: dict = {}
        while name in self.aliases:
            turn |= {key: value for key, value in self.aliases[name].items() if key != "parent"}
            name = self.aliases[name]["parent"]
        icon = self.icons | self.icons["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", 16), icon.get("height", 16)
        body = icon["body"]
        if turn.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        if turn.get("vFlip"):
            body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
        if turn.get("rotate"):
            middle = f"{left + width / 2} {top + height / 2}"
            body = f'<g transform="rotate({90 * turn["rotate"]} {middle})">{body}</g>'
        box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f"<svg {spaces} {box}>{body}</svg>"


def match_icons(
    icon_set: IconSet, concepts: list[dict], known_names: dict[str, set[str]]
) -> dict[str, str]:
    """Concept id -> icon name, each icon at most once.

    In this order: by code points, by the label's slug, by a name that another set has for these
    code points (older sets keep older names), by code points with a skin tone.
    """
    names, taken, found = icon_set.names(), set(), {}

    def take(concept: str, candidates: list[str]) -> None:
        for name in candidates:
            drawing = icon_set.original(name)
            if concept not in found and name in names and drawing not in taken:
                found[concept] = name
                taken.add(drawing)

    for entry in concepts:
        take(entry["concept"], [icon_set.by_code.get(entry["concept"], "")])
    if not icon_set.by_code:
        for name, concept in OLDER_MEANING.items():
            take(concept, [name])
    for entry in concepts:
        take(entry["concept"], [slug(entry["name"])])
    for entry in concepts:
        take(entry["concept"], sorted(known_names.get(entry["concept"], ())))
    for entry in concepts:
        take(entry["concept"], [icon_set.by_code.get(code, "") for code in entry["toned"]])
    return found


def webp(image: Image.Image) -> bytes:
    """IMAGE_PX WebP with its alpha; Pillow resizes RGBA premultiplied, so edges stay clean.

    Alpha at quality 70 is off by 0.6 of 255 on average and saves a quarter of the file.
    """
    small = image.convert("RGBA").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=78, alpha_quality=70, method=4)
    return out.getvalue()


def draw_svg(svg: str) -> bytes:
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=RENDER_PX, height=RENDER_PX, skip_system_fonts=True
    )
    return webp(Image.open(io.BytesIO(bytes(png))))


def match_files(folder: Path, concepts: list[dict]) -> dict[str, Path]:
    """Concept id -> image file named by code points, with a skin tone where only that exists."""
    files = {concept_id(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
    found = {}
    for entry in concepts:
        codes = [code for code in (entry["concept"], *entry["toned"]) if code in files]
        if codes:
            found[entry["concept"]] = files[codes[0]]
    return found
