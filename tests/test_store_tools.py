"""store plan, doctor and join."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from compress import store_tools
from compress.batches import Sampler
from compress.cli import app
from compress.data import datacompdr, name_bank
from compress.data.datacompdr import Record
from compress.errors import PocketclipError
from compress.stages import reinforce
from compress.work import Work

WIDTHS = (4, 3)


def jpeg(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(buffer, "JPEG")
    return buffer.getvalue()


def record(uid: str, color: str = "red") -> Record:
    unit = lambda num: torch.cat(  # noqa: E731
        [F.normalize(torch.randn(num, width), dim=-1) for width in WIDTHS], dim=1
    )
    about = {"uid": uid, "sha256": hashlib.sha256(jpeg(color)).hexdigest()}
    texts = {"syn_text": ["a", "b"]}
    entries = [[[0, 0, 5, 5], [[0, 0.0]]]] * 2
    return Record(uid, entries, unit(2), unit(1), {"syn_text": unit(2)}, texts, about=about)


def test_plan_gives_the_papers_size() -> None:
    """DataCompDR-1B: (10 + 1 + 5) x 1536 float32 are 98 kB a sample, as released."""
    cost = store_tools.plan(1_280_000_000, 10, 5, (768, 768), 4, 100, 1000, 20)
    assert cost.bytes_per_sample == 98_304
    assert cost.terabytes == pytest.approx(125.8, abs=0.1)
    assert cost.teacher_hours == pytest.approx(1.28e9 * (0.1 + 0.006) / 3600)
    # one epoch online costs one image and one text of each sample
    assert cost.pays_after_epochs == pytest.approx(0.106 / 0.011)


def test_join_finds_images_by_uid_and_refuses_changed_ones(tmp_path: Path) -> None:
    records = [record("u1"), record("u2", "blue"), record("u3"), record("u4")]
    datacompdr.write(tmp_path / "0.tar", records, bfloat16=True)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/u1.jpg").write_bytes(jpeg("red"))
    (tmp_path / "loose/u1.txt").write_text("a red thing\n")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, content in (("u2.jpg", jpeg("green")), ("u3.jpg", jpeg("red"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sources = [tmp_path / "loose", tmp_path / "images.tar"]
    written, left = store_tools.join([tmp_path / "0.tar"], sources, tmp_path / "out")
    assert written == 2 and left == [
        "u2: another image than the one that was reinforced (sha256)",
        "u4: no image",
    ]
    first, third = datacompdr.read(tmp_path / "out/0.tar")
    assert first.image == jpeg("red") and first.caption == "a red thing" and third.key == "u3"
    assert torch.equal(first.images, records[0].images.bfloat16().float())


def test_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    broken = record("u1")
    broken.images[1, 2] = float("nan")
    long = record("u2")
    long.synthetic["syn_text"][0, 4:] *= 2
    damaged = replace(record("u3"), image=b"no image")
    datacompdr.write(tmp_path / "0.tar", [record("u0"), broken, long, damaged], bfloat16=False)
    health = store_tools.doctor([tmp_path], WIDTHS)
    assert health.num_samples == 4 and health.views == {2} and health.widths == {7}
    found = "\n".join(health.problems)
    assert len(health.problems) == 3
    assert "u1: image_emb: teacher 0: not finite" in found
    assert "u2: syn_text: teacher 1: length 2.000 in place of 1" in found
    assert "u3: image does not decode" in found


def test_doctor_of_our_store_tells_its_digest(work: Work, tmp_path: Path) -> None:
    reinforce.run(work, reinforce.Config(views=1, shard_size=5), tmp_path)
    healthy = store_tools.doctor([tmp_path / "store"])
    assert healthy.num_samples == 8 and healthy.problems == [] and len(healthy.digest) == 64
    (tmp_path / "store/00001.json").unlink()
    [problem] = store_tools.doctor([tmp_path / "store"]).problems
    assert "shard 1 is missing" in problem


def test_doctor_looks_at_the_names_too(work: Work, tmp_path: Path) -> None:
    reinforce.run(work, reinforce.Config(views=1), tmp_path)
    store = tmp_path / "store"
    digest, names, [bank] = name_bank.contents(store)
    assert names == Sampler(work.data.pairs).names and bank.shape == (8, 16)
    bank[3] *= 2
    name_bank.write(store, digest, names, [bank])
    [problem] = store_tools.doctor([store]).problems
    assert "names.safetensors: teacher 0: length 2.000 in place of 1" in problem
    name_bank.write(store, "another", names[1:], [bank / bank.norm(dim=-1, keepdim=True)])
    first, second = store_tools.doctor([store]).problems
    assert "another store" in first and "not one vector of each teacher" in second


def test_the_verbs_print_and_fail(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["store", "plan", "12800000", "--views", "30", "--synthetic", "5"])
    assert done.exit_code == 0 and "1.416 TB" in done.stdout
    datacompdr.write(tmp_path / "0.tar", [record("u0")], bfloat16=False)
    done = runner.invoke(app, ["store", "doctor", str(tmp_path / "0.tar"), "--widths", "4,3"])
    assert done.exit_code == 0 and "no problems" in done.stdout
    with pytest.raises(PocketclipError, match="no such shard"):
        store_tools.doctor([tmp_path / "none.tar"])
