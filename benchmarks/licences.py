"""Under which licences the models of a run stand, as its folders and bundles carry them."""

import json
from pathlib import Path
from typing import Any

DESCRIPTIONS = ("*/model.json", "export/*/bundle.json", "teacher/*/bundle.json")


def licences(run_dir: Path) -> list[dict[str, Any]]:
    """Each licence once, with `research_only` where a source says so and the models under it."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(path for places in DESCRIPTIONS for path in run_dir.glob(places)):
        about = json.loads(path.read_text(encoding="utf-8"))
        steps = about.get("provenance", [])
        entry = found.setdefault(
            about["license"], {"license": about["license"], "research_only": False, "models": []}
        )
        entry["research_only"] |= any(step.get("research_only") for step in steps)
        name = about["model"]["name"] if path.name == "bundle.json" else about["name"]
        if name not in entry["models"]:
            entry["models"].append(name)
    return list(found.values())
