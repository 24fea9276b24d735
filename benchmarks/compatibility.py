"""Can an index of the old model's vectors be kept? The answer for each artifact, in figures."""

from typing import Any

from benchmarks.labels import percent

KEPT = 0.98
"""Share of the old recall that counts as kept: what a user does not notice."""
USABLE = 0.9


def rows(artifacts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per artifact with accuracy figures but the old model itself.

    `recall`, `old_recall`: text-to-image R@10 of new and of old queries in the old index;
    `image_recall`, `overlap`, `drift` (one minus the mean cosine to the old picture); `answer`.
    """
    old = next((a for a in artifacts if (a["artifact"], a["target"]) == ("teacher", "torch")), None)
    if old is None or old["towers"]["image"].get("text_to_image_r10") is None:
        return []
    before = old["towers"]["image"]["text_to_image_r10"]
    found = []
    for artifact in artifacts:
        row = artifact["towers"]["image"]
        if artifact is old or row.get("text_to_image_r10") is None:
            continue
        cosine = row.get("teacher_image_cosine")
        recall = row.get("index_text_to_image_r10")
        found.append(
            {
                "artifact": artifact,
                "old": old["towers"]["image"],
                "recall": recall,
                "old_recall": before,
                "image_recall": row.get("index_image_to_text_r10"),
                "overlap": row.get("index_overlap10"),
                "drift": None if cosine is None else max(0.0, 1 - cosine),
                "answer": answer(recall, before),
            }
        )
    return found


def answer(recall: float | None, before: float) -> str:
    """In words: yes, yes at a price, or no."""
    if recall is None:
        return "no: the vectors have another length"
    if before == 0:
        return "not known: the old model finds nothing here"
    kept = recall / before
    if kept >= KEPT:
        return "yes"
    if kept >= USABLE:
        return f"yes, at {percent(1 - kept, 0)} of recall; embed anew when you can"
    return f"no: {percent(kept, 0)} of recall is left; embed anew"
