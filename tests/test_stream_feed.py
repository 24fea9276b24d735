"""Streaming: order and resume, mixing, bad samples, remote shards, and what a batch holds."""

import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from compress.batches import embed_names
from compress.data import datacompdr, param_aug, stream
from compress.data.datacompdr import Record
from compress.data.stream import Source, TarIndex, expand_shards, fetch, index_tar
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.stages import distill
from compress.stream_feed import Stream, StreamedBatches, StreamSource, shares
from compress.work import Work

SHORT = {"batch_size": 4, "warmup_steps": 1, "precision": "fp32", "log_every": 1}


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), (shade, 90, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, num: int, word: str = "thing", bad: int | None = None) -> Path:
    """`num` pictures with captions; number `bad` is no picture."""
    with tarfile.open(path, "w") as tar:
        for n in range(num):
            image = b"no picture" if n == bad else picture(n * 20)
            for suffix, content in (("png", image), ("txt", f"{word} {n}".encode())):
                info = tarfile.TarInfo(f"{path.stem}-{n}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def streamed(work: Work, tmp_path: Path, stream: Stream, **settings: object) -> StreamedBatches:
    cfg = distill.Config(teacher="online", stream=stream, **{**SHORT, **settings})
    return StreamedBatches(work, cfg, stream)


def test_an_epoch_holds_every_sample_once_and_epochs_differ(tmp_path: Path) -> None:
    paths = [str(shard(tmp_path / f"{n}.tar", 3 + n)) for n in range(3)]
    source = Source(tuple(paths), seed=1)
    epochs = [[source.read(12 * e + n)[0] for n in range(12)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 12
    assert epochs[0] != epochs[1]
    again = Source(tuple(paths), seed=1)
    assert again.read(17)[0] == epochs[1][5]


def test_threads_count_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(shard(tmp_path / f"{n}.tar", 3 + n)) for n in range(3)]

    def slowly(path: Path) -> TarIndex:
        time.sleep(0.02)
        return index_tar(path)

    monkeypatch.setattr(stream, "index_tar", slowly)
    source = Source(tuple(paths), seed=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(source.counts()), range(8)))
    assert found == [[3, 4, 5]] * 8 and source.counts() == [3, 4, 5]


def test_what_is_read_is_what_tarfile_reads(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 4)
    found = dict(index_tar(path).read(n) for n in range(4))
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None and found[key][suffix] == file.read()


def test_shards_can_be_taken_as_of_one_size(tmp_path: Path) -> None:
    paths = [str(shard(tmp_path / f"{n}.tar", 2 + n)) for n in range(3)]
    source = Source(tuple(paths), seed=1, samples_per_shard=3)
    assert source.counts() == [3, 3, 3]
    read = [source.read(n)[0] for n in range(9)]
    each = [sorted(place for place in read if place.startswith(path)) for path in paths]
    assert [len(set(places)) for places in each] == [2, 3, 3]  # the first begins again
    with pytest.raises(PocketclipError, match=r"needs stream\.cache"):
        Source(("https://example.org/0.tar",), seed=1).read(0)


def test_sources_are_mixed_by_their_weights(work: Work, tmp_path: Path) -> None:
    assert shares(8, [3, 1]) == [6, 2]
    assert shares(7, [1, 1, 1]) == [3, 2, 2]
    one, two = shard(tmp_path / "a.tar", 8, "one"), shard(tmp_path / "b.tar", 8, "two")
    sources = (StreamSource(shards=(str(one),), weight=3), StreamSource(shards=(str(two),)))
    feed = streamed(work, tmp_path, Stream(sources=sources))
    words = [feed._sound(future).caption.split()[0] for future in feed._submit(5)]
    assert words == ["one"] * 3 + ["two"]


def test_bad_samples_are_replaced_within_their_budget(work: Work, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 4, bad=2)
    sources = (StreamSource(shards=(str(path),)),)
    feed = streamed(work, tmp_path, Stream(sources=sources, bad_samples=1), steps=1)
    assert len(feed.at(0).pixels) == 4 and len(feed.bad.skipped) == 1
    with pytest.raises(PocketclipError, match=r"not a whole image.*\n.*1 bad sample"):
        streamed(work, tmp_path, Stream(sources=sources)).at(0)


def test_bad_samples_count_in_the_order_of_the_batches(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads read the next step's samples meanwhile, and may be done with them first."""
    path = shard(tmp_path / "a.tar", 4, bad=2)
    read = Source.read

    def slowly(self: Source, position: int, ahead: int = 0) -> tuple[str, dict[str, bytes]]:
        time.sleep(0.2 if position < 4 else 0.0)
        return read(self, position, ahead)

    monkeypatch.setattr(Source, "read", slowly)
    stream = Stream(sources=(StreamSource(shards=(str(path),)),), bad_samples=1, threads=8)
    feed = streamed(work, tmp_path, stream)
    assert len(feed.at(0).pixels) == 4 and len(feed.bad.skipped) == 1
    with pytest.raises(PocketclipError, match=r"2 bad sample\(s\), 1 allowed"):
        feed.at(1)


def test_a_bank_in_a_stream_is_of_the_classes(work: Work, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 4)
    stream = Stream(sources=(StreamSource(shards=(str(path),)),))
    settings = {**SHORT, "affinity": 0.0, "bank": 1.0, "steps": 2}
    cfg = distill.Config(teacher="online", stream=stream, **settings)
    feed = StreamedBatches(work, cfg, stream)
    names = [name for _, name in work.data.classes]
    [bank] = feed.teacher_bank()
    torch.testing.assert_close(bank, embed_names(work.teacher, names, ["{}", "a {}"]))
    trained = distill.run(work, cfg, tmp_path / "out").clip.model.state_dict()
    before = work.clip.model.state_dict()
    assert not torch.equal(trained["image.patch.weight"], before["image.patch.weight"])
    classless = replace(work, data=replace(work.data, classes_file=None))
    with pytest.raises(PocketclipError, match="name a class file there, or set bank to 0"):
        distill.run(classless, cfg, tmp_path / "other")
    stored = stream.model_copy(update={"teacher_widths": (4, 3)})
    with pytest.raises(ValidationError, match="reinforce these pairs into a store of your own"):
        distill.Config(stream=stored, bank=1.0)


def test_an_online_teachers_bias_is_its_own(work: Work, tmp_path: Path) -> None:
    config = work.teacher.model.config.model_copy(update={"logit_bias": True})
    model = ClipModel(config)
    model.load_state_dict({**work.teacher.model.state_dict(), "logit_bias": torch.tensor(-3.0)})
    biased = replace(work, teacher=replace(work.teacher, model=model))
    path = shard(tmp_path / "a.tar", 4)
    feed = streamed(biased, tmp_path, Stream(sources=(StreamSource(shards=(str(path),)),)))
    assert feed.at(0).teachers[0].bias == -3.0


def test_remote_shards_are_copied_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 2)
    for url in (path.as_uri(), f"pipe:cat {path}"):
        copy = fetch(url, tmp_path / "cache")
        assert copy.read_bytes() == path.read_bytes()
        written = copy.stat().st_mtime_ns
        assert fetch(url, tmp_path / "cache").stat().st_mtime_ns == written
    with pytest.raises(PocketclipError, match="cannot be read"):
        fetch("pipe:false", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    ranges = expand_shards(["https://example.org/{00..02}.tar"])
    assert ranges == tuple(f"https://example.org/0{n}.tar" for n in range(3))


def test_teacher_and_student_see_the_same_view(work: Work, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 4)
    feed = streamed(work, tmp_path, Stream(sources=(StreamSource(shards=(str(path),)),)))
    batch = feed.at(2)
    with torch.no_grad():
        u = F.normalize(work.teacher.model.encode_image(batch.pixels), dim=-1)
    torch.testing.assert_close(batch.teachers[0].u, u, rtol=0, atol=1e-5)


def test_training_from_a_stream_resumes_exactly(work: Work, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 9)
    stream = Stream(sources=(StreamSource(shards=(str(path),)),))
    settings = {**SHORT, "stream": stream, "teacher": "online", "bank_every": 1}
    cfg = distill.Config(steps=5, checkpoint_every=2, **settings)
    whole = distill.run(work, cfg, tmp_path / "out").clip.model.state_dict()
    again = distill.run(work, cfg, tmp_path / "out").clip.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


ENTRIES = [[[n, 2, 20, 24], [[6, 0.27]]] for n in range(2)]


def reinforced_records() -> list[Record]:
    """Two views and two synthetic captions each, of two teachers."""

    def unit(num: int) -> torch.Tensor:
        parts = [F.normalize(torch.randn(num, width), dim=-1) for width in (4, 3)]
        return torch.cat(parts, dim=1)

    return [
        Record(
            f"u{n}", ENTRIES, unit(2), unit(1), {"syn_text": unit(2)},
            {"syn_text": ["first", "second"]}, image=picture(30 * n), caption=f"real {n}",
        )
        for n in range(6)
    ]  # fmt: skip


def test_mixed_captions_come_with_their_own_vectors(work: Work, tmp_path: Path) -> None:
    records = reinforced_records()
    records[0] = replace(records[0], synthetic={}, synthetic_texts={})
    datacompdr.write(tmp_path / "dr.tar", records, bfloat16=False)
    sources = (StreamSource(shards=(str(tmp_path / "dr.tar"),)),)
    stream = Stream(sources=sources, teacher_widths=(4, 3))
    known = [("real", record.texts[0]) for record in records]
    for record in records[1:]:
        known += zip(("first", "second"), record.synthetic["syn_text"], strict=True)
    feed, seen = streamed(work, tmp_path, stream, synthetic="mix", batch_size=6), set()
    for step in range(4):
        samples = [feed._sound(future) for future in feed._submit(step)]
        batch = feed.at(step)
        assert batch.synthetic is None and not batch.synthetic_teachers
        for row, sample in enumerate(samples):
            joined = torch.cat([teacher.v[row] for teacher in batch.teachers])
            [word] = [word for word, v in known if torch.allclose(v, joined, atol=1e-6)]
            assert word == sample.caption.split()[0]
            seen.add(word)
    assert seen == {"real", "first", "second"}
    both = streamed(work, tmp_path, stream, batch_size=6).at(0)
    assert [len(t.v) for t in both.synthetic_teachers] == [6, 6]  # one only has its real caption
    none = streamed(work, tmp_path, stream, synthetic="none", batch_size=6).at(0)
    assert none.synthetic is None and not none.synthetic_teachers


def test_shards_without_vectors_are_bad_where_they_are_needed(work: Work, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 4)
    sources = (StreamSource(shards=(str(path),)),)
    with pytest.raises(PocketclipError, match="no stored vectors"):
        streamed(work, tmp_path, Stream(sources=sources, teacher_widths=(4, 3))).at(0)


def test_datacompdr_shards_give_the_stored_vectors(work: Work, tmp_path: Path) -> None:
    entries, records = ENTRIES, reinforced_records()
    datacompdr.write(tmp_path / "dr.tar", records, bfloat16=False)
    stream = Stream(
        sources=(StreamSource(shards=(str(tmp_path / "dr.tar"),)),), teacher_widths=(4, 3)
    )
    feed = streamed(work, tmp_path, stream, teacher_scale=(70.0, 60.0))
    samples = [feed._sound(future) for future in feed._submit(1)]
    batch = feed.at(1)
    assert batch.synthetic is not None and [t.scale for t in batch.teachers] == [70.0, 60.0]
    for row, sample in enumerate(samples):
        record = records[int(sample.caption.split()[1])]
        view = entries.index(sample.entry)
        joined = torch.cat([teacher.u[row] for teacher in batch.teachers])
        torch.testing.assert_close(joined, record.images[view])
        which = ["first", "second"].index(str(sample.synthetic))
        joined = torch.cat([teacher.v[row] for teacher in batch.synthetic_teachers])
        torch.testing.assert_close(joined, record.synthetic["syn_text"][which])
        image = Image.open(io.BytesIO(record.image or b""))
        seen = param_aug.replay(image, entries[view], 32, "bicubic")
        torch.testing.assert_close(batch.pixels[row], work.clip.preprocess(seen))
    unjoined = [replace(record, image=None) for record in records]
    datacompdr.write(tmp_path / "bare.tar", unjoined, bfloat16=False)
    bare = Stream(
        sources=(StreamSource(shards=(str(tmp_path / "bare.tar"),)),), teacher_widths=(4, 3)
    )
    with pytest.raises(PocketclipError, match="join them with pocketclip store join"):
        streamed(work, tmp_path, bare).at(0)
