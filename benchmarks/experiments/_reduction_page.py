"""docs/reduction.md and its two pictures, from benchmarks/results/reduction.json.

python -m benchmarks.experiments._reduction_page
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.experiments import _reduction_accuracy as accuracy
from benchmarks.experiments import _reduction_latency as latency
from benchmarks.experiments import _reduction_tokens as token_costs
from benchmarks.experiments._reduction_pareto import pareto
from benchmarks.experiments._reduction_picture import survivors

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/reduction.json"
PAGE = ROOT / "docs/reduction.md"
PARETO, PICTURE = "reduction-pareto.svg", "reduction-survival.svg"
SIGNS = {"higher": "at least", "lower": "at most"}
INTRO = """# Doing less

Fewer tokens, fewer weights, nothing computed that nobody reads: what each costs and gains.
Written by `python -m benchmarks.experiments._reduction_page` from
`benchmarks/results/reduction.json`.

- **Exact passes** (stage `exact`) change no embedding: the last block for the pooled token alone,
  the text context of the longest prompt, prompts folded into a class matrix, unused tokens of the
  vocabulary. The last block needs neither keys nor values of all tokens: with one query, `(q W)
  x` is cheaper than `q (W x)`, so that the block all but vanishes.
- **Fewer tokens** (stage `prune_tokens`): a schedule in `model.json`, the same weights. Every
  method is a mixing matrix of static shape from TopK, Equal and MatMul, between attention and MLP
  of a block; scores come from the class token's query alone, so that fused attention stays fused.
- **Fewer weights** (stage `prune_structure`): heads, MLP channels, blocks and residual width of
  both towers, ranked together; distil afterwards.

What follows a paper's definition: `tome`, `evit` (its fused token normalised), `vision_zip`,
`fopru_rank` and `fopru_row` (known to us from the abstract), `feather` (a fixed number of tokens
in place of a union). `cross` and `selector` are our formulations after CrossGET and BUS. BUS
proper ranks patches by the text of the query: an image would have another embedding for each
query, and no index could hold it. `guarded` is ours: a fixed grid and the tokens the class token
attends to stay, and all others merge into the most similar of them.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page; a part that was not measured has no section."""
    rows, machine = result["rows"], result["machine"]
    lines = [INTRO, "## Claims", "", "| figure | goal | measured | |", "|---|---:|---:|---|"]
    for claim in result["claims"]:
        verdict = "" if claim["holds"] else "falls short"
        goal = f"{SIGNS[claim['better']]} {claim['goal']:g}"
        lines.append(f"| {claim['name']} | {goal} | {claim['value']:.3g} | {verdict} |")
    where = f"{machine['cores']} cores of {machine['cpu']}, torch {result['versions']['torch']}"
    lines += ["", f"`{result['command']}`, {result['date']}, {where}.", ""]
    for part in (_accuracy, _recovery, _latency, _tokens, _parity, _exact):
        lines += part(rows)
    return "\n".join(lines)


def _accuracy(rows: list[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["part"] == "accuracy"]
    if not own:
        return []
    lines = [
        "## Accuracy of the embedded teacher, no training",
        "",
        f"![Top-1 against cost]({PARETO})",
        "",
        "Top-1 over 1914 names. Lost regions: share of a picture's 2 x 2 patch regions of which no "
        "token holds anything, mean and worst over 128 pictures.",
        "",
        "| arm | multiply-adds | held-out style | val | lost regions | worst |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for row in own:
        by_arm.setdefault(row["arm"], {})[row["split"]] = row
    for name, found in by_arm.items():
        style, val = found["held_out_style"], found["val"]
        lost = style.get("mean_lost_regions", 0.0), style.get("worst_lost_regions", 0.0)
        lines.append(
            f"| {name} | {style['macs']:.2f} | {style['top1']:.1%} | {val['top1']:.1%} "
            f"| {lost[0]:.1%} | {lost[1]:.0%} |"
        )
    return [*lines, "", f"![What survives of six pictures]({PICTURE})", ""]


def _recovery(rows: list[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["part"] == "recovery"]
    if not own:
        return []
    lines = [
        "## After training",
        "",
        "`recipes/emoji/tokens_recovery.yaml`, and the same with methods that learn what to keep. "
        "Mean and range over seeds.",
        "",
        "| method | multiply-adds | seeds | held-out style | val |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in own):
        for artifact, said in (("start", "before"), ("student", "after")):
            found = [r for r in own if (r["arm"], r["artifact"]) == (arm, artifact)]
            if not found:
                continue
            cells = [
                _spread([r["top1"] for r in found if r["split"] == split])
                for split in accuracy.SPLITS
            ]
            seeds = len({row["seed"] for row in found})
            lines.append(
                f"| {arm}, {said} | {found[0]['macs']:.2f} | {seeds} | {' | '.join(cells)} |"
            )
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    """Mean, and the range where values differ."""
    mean = f"{sum(values) / len(values):.1%}"
    low, high = min(values), max(values)
    return mean if low == high else f"{mean} ({low:.1%} to {high:.1%})"


def _parity(rows: list[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["part"] == "parity"]
    if not own:
        return []
    lines = [
        "## Reduced models in each runtime",
        "",
        "Worst cosine between the image tower's file in its runtime and the torch model, where the "
        "exporter's own gate passed.",
        "",
        "| model | method | runtime | precision | worst cosine | |",
        "|---|---|---|---|---:|---|",
    ]
    for row in own:
        cosine = f"{row['worst_cosine']:.5f}" if row["passed"] else ""
        reason = "" if row["passed"] else f"{row['kind']}: {row['reason']}".replace("|", "/")
        precision = row["precision"] or ""
        lines.append(
            f"| {row['model']} | {row['method']} | {row['target']} | {precision} | {cosine} "
            f"| {reason} |"
        )
    return [*lines, ""]


def _latency(rows: list[dict[str, Any]]) -> list[str]:
    own = [r for r in rows if r["part"] == "latency" and r["model"] != latency.TEACHER]
    if not own:
        return []
    lines = [
        "## Latency, random weights, batch 1, one thread",
        "",
        "Processor time, median; files of a tower run in turns. Speed-up over ONNX Runtime's "
        "float32 file of the untouched tower.",
        "",
        "| tower | variant | multiply-adds | runtime | ms | speed-up | CPU |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    for row in own:
        [base] = [
            r["processor_p50_ms"]
            for r in own
            if (r["model"], r["variant"]) == (row["model"], "full")
            and (r["target"], r["precision"]) == ("onnxruntime", "fp32")
        ]
        ms = row["processor_p50_ms"]
        lines.append(
            f"| {row['model']} | {row['variant']} | {row['macs']:.2f} | {row['target']} "
            f"{row['precision']} | {ms:.1f} | {base / ms:.2f}x | {row['cpu']} |"
        )
    return [*lines, "", *_integers_alone(own)]


def _integers_alone(own: list[dict[str, Any]]) -> list[str]:
    """How much of a speed-up the processor's integers give, which no schedule can change."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in own:
        if (row["variant"], row["target"]) == ("full", "onnxruntime"):
            found = times.setdefault((row["model"], row["cpu"]), {})
            found[row["precision"]] = row["processor_p50_ms"]
    gains = [
        f"{found['fp32'] / found['int8']:.2f}x ({model}, {cpu})"
        for (model, cpu), found in times.items()
        if {"fp32", "int8"} <= set(found)
    ]
    if not gains:
        return []
    said = f"Integers alone, in ONNX Runtime's file of the untouched tower, give {', '.join(gains)}"
    return [f"{said}: without integer products (VNNI, AMX) a processor gains little by them.", ""]


def _tokens(rows: list[dict[str, Any]]) -> list[str]:
    own = [r for r in rows if r["part"] == "tokens"]
    if not own:
        return []
    time = {(r["target"], r["precision"], r["tokens"]): r["processor_p50_ms"] for r in own}
    kinds = list(dict.fromkeys(key[:2] for key in time))
    floors = token_costs.floors(rows)
    lines = [
        "## What a token costs",
        "",
        f"The products of {own[0]['layers']} layers of width {own[0]['width']} alone, batch 1, one "
        f"thread, {own[0]['cpu']}: processor time in ms by number of tokens. Weights are read once "
        "a picture, however few tokens there are; that is the floor of every schedule, and why "
        "integers, which compute faster than memory gives them weights, gain less than their "
        "multiply-adds fall. A token over a multiple of 16 costs a row of tiles where the CPU has "
        "matrix units.",
        "",
        f"| tokens | {' | '.join(map(' '.join, kinds))} |",
        f"|---|{'---:|' * len(kinds)}",
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in own):
        cells = [f"{time[*kind, tokens]:.2f}" for kind in kinds]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    shares = [f"{floors[kind]:.0%}" for kind in kinds]
    return [*lines, f"| 1, of the most | {' | '.join(shares)} |", ""]


def _exact(rows: list[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["part"] == "exact"]
    if not own:
        return []
    lines = [
        "## Exact passes",
        "",
        "| model | pass | largest change | image multiply-adds | text | bytes saved |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in own:
        saved = f"{row['saved_bytes'] / 1e6:.1f} MB" if "saved_bytes" in row else ""
        lines.append(
            f"| {row['model']} | {row['pass']} | {row['largest_change']:.1e} "
            f"| {row['image_macs']:.3f} | {row['text_macs']:.3f} | {saved} |"
        )
    return [*lines, ""]


def main() -> None:
    result = json.loads(RESULTS.read_text())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(result))
    (PAGE.parent / PARETO).write_text(pareto(result["rows"]))
    (PAGE.parent / PICTURE).write_text(survivors(accuracy.Tasks()))


if __name__ == "__main__":
    main()
