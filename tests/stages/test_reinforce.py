"""The reinforced store: what it holds, how it resumes, what it refuses, and training from it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip

import compress.clip
import compress.model
import compress.preprocess
from compress import losses
from compress.batches import Sampler, embed_names, embed_texts
from compress.data import augment, datacompdr, name_bank, param_aug, reinforced
from compress.data.captions import Captions
from compress.data.param_aug import Crops
from compress.errors import PocketclipError
from compress.reinforced_feed import ReinforcedBatches
from compress.stages import distill
from compress.stages.reinforce import FOLDER, Config, Worker, run
from compress.work import Work

OWN = Captions(source="own")
SMALL = {"views": 2, "shard_size": 3, "precision": "fp32"}
SHORT = {"batch_size": 8, "warmup_steps": 2, "lr": 3e-3, "precision": "fp32", "log_every": 1}


@pytest.fixture
def ensemble(work: Work, tmp_path: Path) -> tuple[Work, tuple[str, ...]]:
    """Two teachers in folders, of other widths and preprocessing, and a student."""
    names = []
    for n, (width, size) in enumerate(((16, 32), (24, 16))):
        clip = tiny_clip(seed=n + 5, embed_dim=width)
        if size != 32:
            vision = clip.model.config.vision.model_copy(update={"image_size": size})
            config = clip.model.config.model_copy(update={"vision": vision})
            model = compress.clip.ClipModel(config)
            compress.model.initialise_(model)
            contract = clip.preprocess.model_copy(update={"size": (size, size), "mean": (0.1,) * 3})
            clip = replace(clip, model=model, preprocess=contract)
        compress.clip.save(clip, tmp_path / f"teacher-{n}")
        names.append(str(tmp_path / f"teacher-{n}"))
    return replace(work, clip=tiny_clip(seed=1, width=16)), tuple(names)


def test_stored_vectors_are_each_teachers_own(
    ensemble: tuple[Work, tuple[str, ...]], tmp_path: Path
) -> None:
    work, names = ensemble
    run(work, Config(teachers=names, captions=OWN, **SMALL), tmp_path / "out")
    store, pairs = reinforced.open_store(tmp_path / "out" / FOLDER), work.data.pairs
    assert len(store.shards) == 3 and set(store.places) == set(pairs.keys)
    keys, views = [pairs.keys[n] for n in (0, 4, 7)], torch.tensor([1, 0, 1])
    parameters = store.parameters(keys, views)
    for k, name in enumerate(names):
        clip = compress.clip.load(Path(name))
        size = clip.model.config.vision.image_size
        pixels = augment.replay(pairs.images[[0, 4, 7]], parameters, size, clip.preprocess)
        words = [pairs.captions[n][1] for n in (0, 4, 7)]  # the first synthetic one
        with torch.no_grad():
            u = F.normalize(clip.model.encode_image(pixels), dim=-1)
            v = F.normalize(clip.model.encode_text(clip.tokenizer(words)), dim=-1)
        # bfloat16 keeps 8 bits of the mantissa
        torch.testing.assert_close(store.images(k, keys, views), u, rtol=0, atol=4e-3)
        torch.testing.assert_close(store.texts(k, keys, [1, 1, 1]), v, rtol=0, atol=4e-3)


def test_the_training_loss_is_mobileclips(
    ensemble: tuple[Work, tuple[str, ...]], tmp_path: Path
) -> None:
    work, names = ensemble
    run(work, Config(teachers=names, captions=OWN, **SMALL), tmp_path / "out")
    cfg = distill.Config(teacher="reinforced", teacher_scale=(70.0, 60.0), clip=0.25, **SHORT)
    work = replace(work, store=tmp_path / "out" / FOLDER)
    feed = ReinforcedBatches(work, cfg, Sampler(work.data.pairs))
    batch = feed.at(0)
    assert batch.synthetic is not None and not torch.equal(batch.synthetic, batch.tokens)
    learner = distill.Learner(work.clip, cfg, feed.widths, work.teacher.model.config)
    loss, _ = learner(batch, 0, torch.autocast("cpu", enabled=False))
    model, expected = work.clip.model, torch.zeros(())
    u = F.normalize(model.encode_image(batch.pixels), dim=-1)
    for tokens, teachers in (
        (batch.tokens, batch.teachers),
        (batch.synthetic, batch.synthetic_teachers),
    ):
        v = F.normalize(model.encode_text(tokens), dim=-1)
        expected = expected + 0.25 * losses.clip_info_nce(u, v, 50.0)
        for teacher, scale in zip(teachers, (70.0, 60.0), strict=True):
            one = losses.affinity_mimicking(u, v, teacher.u, teacher.v, 50.0, scale)
            expected = expected + one / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("synthetic", ["mix", "none"])
def test_captions_come_with_their_own_vectors(
    ensemble: tuple[Work, tuple[str, ...]], tmp_path: Path, synthetic: str
) -> None:
    work, names = ensemble
    run(work, Config(teachers=names, captions=OWN, **SMALL), tmp_path / "out")
    cfg = distill.Config(teacher="reinforced", synthetic=synthetic, **SHORT)
    work = replace(work, store=tmp_path / "out" / FOLDER)
    feed = ReinforcedBatches(work, cfg, Sampler(work.data.pairs))
    teacher, kinds = compress.clip.load(Path(names[0])), set()
    for step in range(2):
        batch = feed.at(step)
        assert batch.synthetic is None and batch.synthetic_teachers == ()
        v = embed_texts(teacher.model.text, batch.tokens)  # all have the same tokenizer
        torch.testing.assert_close(batch.teachers[0].v, v, rtol=0, atol=4e-3)
        first = [list(row) for row in work.clip.tokenizer([c[0] for c in work.data.pairs.captions])]
        kinds |= {list(row) in first for row in batch.tokens}
    assert kinds == ({True, False} if synthetic == "mix" else {True})


def test_a_student_learns_from_the_store_alone(
    ensemble: tuple[Work, tuple[str, ...]],
    tmp_path: Path,
    loss_at: Callable[[Path, int], float],
) -> None:
    work, names = ensemble
    run(work, Config(teachers=names, captions=OWN, **SMALL), tmp_path / "out")
    work = replace(work, store=tmp_path / "out" / FOLDER)
    cfg = distill.Config(teacher="reinforced", steps=30, **SHORT)
    distill.run(work, cfg, tmp_path / "student")
    assert loss_at(tmp_path / "student", 29) < loss_at(tmp_path / "student", 0) - 0.005


def test_the_bank_of_names_is_each_teachers_own(
    ensemble: tuple[Work, tuple[str, ...]], tmp_path: Path
) -> None:
    work, names = ensemble
    run(work, Config(teachers=names, **SMALL), tmp_path / "out")
    cfg = distill.Config(
        teacher="reinforced", affinity=0.0, bank=1.0, teacher_scale=(70.0, 60.0), **SHORT
    )
    work = replace(work, store=tmp_path / "out" / FOLDER)
    feed = ReinforcedBatches(work, cfg, Sampler(work.data.pairs))
    learner = distill.Learner(work.clip, cfg, feed.widths, work.teacher.model.config)
    banks = distill.Banks(learner, feed, work, cfg).at(0)
    assert banks is not None
    own, teachers = banks
    for name, bank in zip(names, teachers, strict=True):
        expected = embed_names(compress.clip.load(Path(name)), feed.names, ["{}", "a {}"])
        torch.testing.assert_close(bank, expected, rtol=0, atol=1e-5)
    batch = replace(feed.at(0), bank=banks)
    loss, _ = learner(batch, 0, torch.autocast("cpu", enabled=False))
    u = F.normalize(work.clip.model.encode_image(batch.pixels), dim=-1)
    each = [
        losses.bank_affinity(u, own, teacher.u, bank, 50.0, scale)
        for teacher, bank, scale in zip(batch.teachers, teachers, (70.0, 60.0), strict=True)
    ]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-5)


def test_a_bank_that_is_missing_or_anothers_is_named(work: Work, tmp_path: Path) -> None:
    run(work, Config(**SMALL), tmp_path / "out")
    folder = tmp_path / "out" / FOLDER
    cfg = distill.Config(teacher="reinforced", bank=1.0, steps=1, **SHORT)
    stored = replace(work, store=folder)
    content = (folder / name_bank.FILE).read_bytes()
    (folder / name_bank.FILE).write_bytes(content.replace(b"red bar", b"red pot"))
    with pytest.raises(PocketclipError, match="belongs to another store"):
        distill.run(stored, cfg, tmp_path / "a")
    (folder / name_bank.FILE).write_bytes(content[:9])
    with pytest.raises(PocketclipError, match=r"names\.safetensors: damaged"):
        distill.run(stored, cfg, tmp_path / "b")
    (folder / name_bank.FILE).unlink()
    with pytest.raises(PocketclipError, match="run the reinforce stage again"):
        distill.run(stored, cfg, tmp_path / "c")
    run(work, Config(**SMALL), tmp_path / "out")
    assert (folder / name_bank.FILE).read_bytes() == content


def test_a_stopped_run_goes_on_at_the_missing_shard(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config(**SMALL)
    run(work, cfg, tmp_path / "out")
    folder = tmp_path / "out" / FOLDER
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "00001.json").unlink()  # killed after the tensors, before the JSON
    made: list[int] = []
    make = Worker.make
    monkeypatch.setattr(Worker, "make", lambda self, n: (made.append(n), make(self, n)))
    run(work, cfg, tmp_path / "out")
    assert made == [1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_teacher_or_data_set_is_refused(work: Work, tmp_path: Path) -> None:
    cfg = Config(**SMALL)
    run(work, cfg, tmp_path / "out")
    with pytest.raises(PocketclipError, match="made with another teachers"):
        run(replace(work, teacher=tiny_clip(seed=9)), cfg, tmp_path / "out")
    settings = distill.Config(teacher="reinforced", steps=1, **SHORT)
    other = replace(work.data, templates=("{}",))
    wrong = replace(work, store=tmp_path / "out" / FOLDER, data=other)
    with pytest.raises(PocketclipError, match="made with another data"):
        distill.run(wrong, settings, tmp_path / "student")
    pinned = settings.model_copy(update={"store_digest": "0" * 64})
    with pytest.raises(PocketclipError, match="another digest"):
        distill.run(replace(wrong, data=work.data), pinned, tmp_path / "student")
    with pytest.raises(PocketclipError, match="put a reinforce stage before"):
        distill.run(work, settings, tmp_path / "student")


def test_a_flipped_bit_and_a_missing_shard_are_named(work: Work, tmp_path: Path) -> None:
    run(work, Config(**SMALL), tmp_path / "out")
    folder = tmp_path / "out" / FOLDER
    content = bytearray((folder / "00002.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "00002.safetensors").write_bytes(content)
    store = reinforced.open_store(folder)
    with pytest.raises(PocketclipError, match=r"00002\.safetensors: damaged"):
        store.images(0, [store.shards[2].samples[0].key], torch.tensor([0]))
    (folder / "00000.json").unlink()
    with pytest.raises(PocketclipError, match="1 of 3 shards are missing"):
        reinforced.open_store(folder)


def test_captions_from_a_file(work: Work, tmp_path: Path) -> None:
    keys = work.data.pairs.keys
    rewrites = {key: [f"rewritten {n}", "again"] for n, key in enumerate(keys)}
    (tmp_path / "rewrites.json").write_text(json.dumps(rewrites))
    cfg = Config(captions=Captions(source="file", file=tmp_path / "rewrites.json", num=1), **SMALL)
    run(work, cfg, tmp_path / "out")
    store = reinforced.open_store(tmp_path / "out" / FOLDER)
    assert store.sample(keys[3]).synthetic == ["rewritten 3"]
    assert store.sample(keys[3]).captions == work.data.pairs.captions[3]
    (tmp_path / "rewrites.json").write_text(json.dumps({**rewrites, keys[3]: ["changed"]}))
    with pytest.raises(PocketclipError, match="made with another captions"):
        run(work, cfg, tmp_path / "out")
    (tmp_path / "rewrites.json").write_text(json.dumps({keys[0]: ["alone"]}))
    with pytest.raises(PocketclipError, match=f"no captions for {keys[1]} and 1 more samples"):
        run(work, cfg, tmp_path / "fewer")
    (tmp_path / "rewrites.json").write_text("[]")
    with pytest.raises(PocketclipError, match="not a caption file"):
        run(work, cfg, tmp_path / "other")


def test_prompts_are_captions_too_where_both_stages_say_so(work: Work, tmp_path: Path) -> None:
    run(work, Config(template_captions=True, **SMALL), tmp_path / "out")
    store = reinforced.open_store(tmp_path / "out" / FOLDER)
    data = replace(work.data, templates=("{}", "a {}"))
    name = work.data.pairs.names[2]
    assert {name, f"a {name}"} <= set(store.sample(data.pairs.keys[2]).captions)
    stored = replace(work, store=tmp_path / "out" / FOLDER)
    settings = {"teacher": "reinforced", "steps": 1, **SHORT}
    distill.run(stored, distill.Config(template_captions=True, **settings), tmp_path / "a")
    with pytest.raises(PocketclipError, match="made with another data"):
        distill.run(stored, distill.Config(**settings), tmp_path / "b")


def test_crops_are_stored_replayed_and_written_as_apple_does(work: Work, tmp_path: Path) -> None:
    cfg = Config(crops=Crops(size=32), datacompdr="npz", captions=OWN, **SMALL)
    run(work, cfg, tmp_path / "out")
    store = reinforced.open_store(tmp_path / "out" / FOLDER)
    records = [
        r for n in range(3) for r in datacompdr.read(tmp_path / f"out/datacompdr/{n:05d}.tar")
    ]
    assert len(records) == 8
    record, pairs, teacher = records[4], work.data.pairs, work.teacher
    sample = store.sample(pairs.keys[4])
    assert (
        record.param_aug == sample.crops and record.synthetic_texts["syn_text"] == sample.synthetic
    )
    picture = compress.preprocess.flatten(pairs.image(4), (255, 255, 255))
    view = param_aug.replay(picture, record.param_aug[1], 32, "bicubic")
    with torch.no_grad():
        u = F.normalize(teacher.model.encode_image(teacher.preprocess(view)[None]), dim=-1)[0]
    torch.testing.assert_close(record.images[1], u, rtol=0, atol=4e-3)
    distill.run(
        replace(work, store=tmp_path / "out" / FOLDER),
        distill.Config(teacher="reinforced", steps=2, **SHORT),
        tmp_path / "student",
    )


def test_two_ray_workers_make_the_store_of_one_process(work: Work, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    run(work, Config(**SMALL), tmp_path / "one")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        run(work, Config(workers=2, **SMALL), tmp_path / "two")
    finally:
        ray.shutdown()
    one, two = (tmp_path / name / FOLDER for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert [path.name for path in sorted(two.iterdir())] == names and len(names) == 8
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
