"""MODEL_CARD.md of a run: what the model is, where it comes from, what it can do and what not."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from benchmarks.labels import formats
from compress import atomic


def write(run_dir: Path, content: dict[str, Any]) -> None:
    """Write the card from what the report shows and from the bundles' own descriptions.

    Nothing is written for a run without bundles: there is no model to describe then.
    """
    bundles = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run_dir.glob("export/*/bundle.json"))
    ]
    if not bundles:
        return
    environment = Environment(
        loader=PackageLoader("benchmarks"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(formats())
    about = bundles[0]
    steps = [f"{step.get('step', 'step')}" for step in about.get("provenance", [])]
    card = environment.get_template("model_card.md.j2").render(
        {**content, "about": about, "bundles": bundles, "steps": steps}
    )
    atomic.write_text(run_dir / "MODEL_CARD.md", card)
