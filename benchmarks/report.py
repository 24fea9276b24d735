"""report.html and report.md of a run folder: self-contained, offline, made from its files alone."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from benchmarks import (
    charts,
    compatibility,
    details,
    licences,
    model_card,
    raw,
    stages,
    story,
    tiles,
)
from benchmarks.labels import describe_metric, formats, name_of
from compress import atomic
from compress.errors import PocketclipError

TEMPLATES = {"report.html": "report.html.j2", "report.md": "report.md.j2"}


def write(run_dir: Path) -> None:
    """Write report.html and report.md from summary.json, bench.json, the manifest and the logs.

    Raises PocketclipError naming the file that is missing or damaged.
    """
    content = context(Path(run_dir))
    for name, template in TEMPLATES.items():
        environment = Environment(
            loader=PackageLoader("benchmarks"),
            autoescape=name.endswith(".html"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(formats())
        environment.globals.update(formats())  # plots are handed the format of their values
        environment.filters["embedded"] = details.embedded
        text = environment.get_template(template).render(content)
        atomic.write_text(Path(run_dir) / name, text)
    model_card.write(Path(run_dir), content)


def context(run_dir: Path) -> dict[str, Any]:
    """Everything the templates show."""
    summary, bench = _read(run_dir / "summary.json"), _read(run_dir / "bench.json")
    artifacts = group(summary["rows"])
    metric = next((m for m in ("top1", "image_to_text_r1") if _has(artifacts, m)), None)
    chosen, places = story.chosen(artifacts), raw.Places(bench)
    return {
        "summary": summary,
        "bench": bench,
        "artifacts": artifacts,
        "metric": metric,
        "metric_name": describe_metric(metric),
        "verdict": story.verdict(artifacts, chosen, metric),
        "tiles": tiles.tiles(artifacts, chosen, metric, places),
        "licences": licences.licences(run_dir),
        "warnings": story.warnings(bench, artifacts),
        "stages": stages.stages(run_dir, summary, bench, artifacts, metric, places),
        "raw": places,
        "explorer": details.explorer(artifacts),
        "precision_maps": details.precision_maps(bench, artifacts),
        "placements": details.placements(artifacts),
        "rooflines": details.rooflines(artifacts),
        "scatters": _scatters(artifacts, metric),
        "sizes": _sizes(artifacts, places),
        "latencies": _latencies(artifacts, places),
        "splits": _splits(artifacts),
        "compatibility": compatibility.rows(artifacts),
        "unavailable": [a for a in artifacts if a["unavailable"]],
        "files": _files(run_dir),
    }


def group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of summary.json by artifact: both towers together, at the first thread count.

    `color` numbers the artifacts, for the same colour in every plot; the original teacher's is 0.
    """
    artifacts: dict[tuple[str, str, str], dict[str, Any]] = {}
    others = 0
    for row in rows:
        key = (row["artifact"], row["target"], row["path"])
        if key not in artifacts:
            original = row["artifact"] == "teacher" and row["path"].startswith("teacher")
            others += not original
            artifacts[key] = {
                "name": name_of(row),
                "artifact": row["artifact"],
                "target": row["target"],
                "precision": row["precision"],
                "path": row["path"],
                "unavailable": row["unavailable"],
                "color": 0 if original else (others - 1) % 6 + 1,
                "rows": [],
                "towers": {},
            }
        artifacts[key]["rows"].append(row)
        towers = artifacts[key]["towers"]
        if row["tower"] not in towers or (_usual(row) and not _usual(towers[row["tower"]])):
            towers[row["tower"]] = row
    for artifact in artifacts.values():
        sizes = [row.get("size_bytes") for row in artifact["towers"].values()]
        artifact["size_bytes"] = sum(s for s in sizes if s) if all(sizes) else None
        params = [row.get("num_params") for row in artifact["towers"].values()]
        artifact["num_params"] = sum(p for p in params if p) if all(params) else None
    return list(artifacts.values())


def _usual(row: dict[str, Any]) -> bool:
    """Whether it is what the headline figures are: the model alone, on this machine."""
    return row.get("scope") in (None, "model") and row.get("host") in (None, "local")


def _has(artifacts: list[dict[str, Any]], metric: str) -> bool:
    return any(a["towers"]["image"].get(metric) is not None for a in artifacts)


def _scatters(artifacts: list[dict[str, Any]], metric: str | None) -> list[dict[str, Any]]:
    """Accuracy against latency, one plot per tower."""
    plots = []
    for tower in ("image", "text"):
        points = [
            {
                "label": a["name"],
                "color": a["color"],
                "x": a["towers"][tower]["p50_ms"],
                "x_ci": a["towers"][tower]["p50_ms_ci95"],
                "y": a["towers"][tower][metric],
                "y_ci": a["towers"][tower][f"{metric}_ci95"],
                "row": a["towers"][tower],
                "size_bytes": a["size_bytes"],
            }
            for a in artifacts
            if metric and a["towers"][tower]["p50_ms"] is not None
        ]
        if points:
            plots.append({"tower": tower, **charts.scatter(points)})
    return plots


def _sizes(artifacts: list[dict[str, Any]], places: raw.Places) -> dict[str, Any] | None:
    groups = [
        {
            "label": a["name"],
            "color": a["color"],
            "parts": [
                {
                    "name": tower,
                    "value": row["size_bytes"],
                    "place": places.artifact(row, "size_bytes"),
                }
                for tower, row in a["towers"].items()
            ],
        }
        for a in artifacts
        if a["size_bytes"] and a["target"] != "torch"
    ]
    return charts.bars(groups, stacked=True) if groups else None


def _latencies(artifacts: list[dict[str, Any]], places: raw.Places) -> dict[str, Any] | None:
    groups = [
        {
            "label": a["name"],
            "color": a["color"],
            "parts": [
                {
                    "name": tower,
                    "value": row["p50_ms"],
                    "ci": row["p50_ms_ci95"],
                    "place": places.timing(row),
                }
                for tower, row in a["towers"].items()
                if row["p50_ms"] is not None
            ],
        }
        for a in artifacts
    ]
    groups = [g for g in groups if g["parts"]]
    return charts.bars(groups) if groups else None


def _splits(artifacts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By split: the artifacts measured on it with their figures."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for artifact in artifacts:
        for name, figures in artifact["towers"]["image"]["splits"].items():
            splits.setdefault(name, []).append({**figures, "artifact": artifact})
    return splits


def _files(run_dir: Path) -> list[str]:
    """What a reader may want to open next, as paths relative to the report."""
    names = [
        "summary.json",
        "bench.json",
        "recipe.yaml",
        "manifest.json",
        "report.md",
        "MODEL_CARD.md",
    ]
    bundles = sorted(run_dir.glob("export/*/README.md"))
    has_card = any(run_dir.glob("export/*/bundle.json"))
    later = ("report.md", "MODEL_CARD.md") if has_card else ("report.md",)
    return [n for n in names if (run_dir / n).exists() or n in later] + [
        path.relative_to(run_dir).as_posix() for path in bundles
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file; run the recipe's bench first") from None
    except json.JSONDecodeError as error:
        raise PocketclipError(f"{path}: damaged ({error}); run the bench again") from None
    return content
