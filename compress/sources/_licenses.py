"""Licences of published weights by their tag, as the models' pages state them; 2025.

Terms change: the page counts, not this table. Tags that aren't here stay unknown.
"""

import re
from pathlib import Path
from typing import Any

UNKNOWN = "unknown: see the model's page"
RESEARCH = "apple-amlr (Apple Machine Learning Research Model License): research purposes only"
NON_COMMERCIAL = "cc-by-nc-4.0: no commercial use"

# The first pattern that a tag matches decides.
TAGS = (
    (r"openai", "mit"),
    (r"dfndr|datacompdr|dfn", RESEARCH),
    (r"metaclip|worldwide", NON_COMMERCIAL),
    (r"laion|datacomp|commonpool|mscoco_finetuned|frozen_", "mit"),
    (r"webli", "apache-2.0"),
    (r"merged2b", "mit"),
)
RESTRICTED = re.compile(r"research|non-?commercial|cc-by-nc|\bamlr\b|apple-ascl", re.IGNORECASE)


def of_tag(tag: str) -> str:
    """Licence of the weights that open_clip publishes under a tag."""
    return next((name for pattern, name in TAGS if re.search(pattern, tag)), UNKNOWN)


def of_card(folder: Path) -> str:
    """The `license:` line at the head of a folder's model card."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8").split("---")[1:2] if card.is_file() else []
    lines = [line for text in head for line in text.splitlines() if line.startswith("license:")]
    return lines[0].partition(":")[2].strip() if lines else UNKNOWN


def restricted(license: str) -> bool:
    """Whether a licence forbids what a product does: research only, or not commercial."""
    return RESTRICTED.search(license) is not None


def flags(license: str) -> dict[str, Any]:
    """What provenance says of a licence, so that it travels through each stage into the bundle."""
    return {"license": license, "research_only": restricted(license)}
