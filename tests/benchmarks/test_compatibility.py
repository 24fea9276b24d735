"""The answer to "can I keep my index?" for hand-made figures."""

import pytest

from benchmarks import compatibility


def artifact(name: str, target: str, **figures: float) -> dict:
    return {"artifact": name, "target": target, "towers": {"image": figures}}


def test_answers_follow_the_share_of_recall_that_is_left() -> None:
    old = artifact("teacher", "torch", text_to_image_r10=0.8)
    shares = {0.8: "yes", 0.75: "yes, at 6 % of recall", 0.4: "no: 50 % of recall is left"}
    found = compatibility.rows(
        [
            old,
            *(
                artifact(
                    "student",
                    "onnx",
                    text_to_image_r10=0.5,
                    index_text_to_image_r10=recall,
                    teacher_image_cosine=0.9,
                )
                for recall in shares
            ),
            artifact("student", "ncnn", text_to_image_r10=0.5),
        ]
    )
    assert len(found) == 4
    for row, words in zip(found, shares.values()):
        assert row["answer"].startswith(words)
        assert row["drift"] == pytest.approx(0.1) and row["old_recall"] == 0.8
    assert found[3]["answer"] == "no: the vectors have another length"


def test_the_same_vectors_do_not_drift_below_nothing() -> None:
    figures = {"text_to_image_r10": 0.8, "teacher_image_cosine": 1.0000001}
    [row] = compatibility.rows(
        [artifact("teacher", "torch", **figures), artifact("teacher", "onnx", **figures)]
    )
    assert row["drift"] == 0.0


def test_without_accuracy_there_is_no_answer() -> None:
    assert compatibility.rows([artifact("teacher", "torch"), artifact("student", "onnx")]) == []
