"""clip_benchmark's own code over a tiny data set in its layout, against our evaluation."""

import io
import json
import tarfile

import pytest
import torch
from tiny import tiny_clip, tiny_data

from benchmarks import standard
from compress.artifact import Artifact
from compress.clip import TorchEncoder
from compress.errors import PocketclipError
from compress.evaluate import Config, evaluate


@pytest.fixture(scope="module")
def artifact():
    clip = tiny_clip()
    return Artifact("tiny", TorchEncoder(clip), clip.preprocess, clip.tokenizer)


def as_webdataset(pictures, classes, folder):
    """The layout of clip_benchmark: class names, templates, numbered tars of png and cls."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(row["name"] for row in classes))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\na {c}")
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for n, row in enumerate(classes):
            for name, data in (
                (f"s{n:04d}.png", (pictures / f"{row['concept']}.png").read_bytes()),
                (f"s{n:04d}.cls", str(n).encode()),
            ):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))


def test_standard_evaluation_agrees_with_ours(artifact, tmp_path):
    pytest.importorskip("clip_benchmark")
    data = tiny_data(tmp_path)
    classes = json.loads((tmp_path / "classes.json").read_text())
    as_webdataset(tmp_path / "pictures", classes, tmp_path / "wds_tiny")
    theirs = standard.zero_shot(artifact, "wds/tiny", tmp_path, batch_size=4)
    ours = evaluate(artifact.encoder, artifact, data, "val", Config(), progress=False)
    assert theirs["acc1"] == pytest.approx(ours["top1"])
    assert theirs["acc5"] == pytest.approx(ours["top5"])


def test_missing_data_set_is_named(artifact, tmp_path):
    pytest.importorskip("clip_benchmark")
    with pytest.raises(PocketclipError, match="wds_cars: no such folder"):
        standard.zero_shot(artifact, "wds/cars", tmp_path)


def test_model_takes_what_their_code_hands_over(artifact):
    model, _, tokenize = standard.parts(artifact)
    one, two = tokenize("a red bar"), tokenize(["a red bar", "a"])
    assert torch.equal(one[0], two[0])
    assert model.encode_text(two.long()).shape == (2, 16)
