"""Shards and folders are read as webdataset reads them, and damage is named, never passed over."""

import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from compress.data.decode import decode, fit_square
from compress.data.shards import BadSamples, count_samples, digest, read_samples
from compress.errors import PocketclipError


def png(color: int = 0, size: tuple[int, int] = (5, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (color, 2 * color, 90)).save(out, "PNG")
    return out.getvalue()


def shard(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def good_members(count: int = 3) -> list[tuple[str, bytes]]:
    members = []
    for n in range(count):
        about = {"captions": [f"number {n}", f"no. {n}"], "concept": f"c{n}", "unknown": 1}
        members += [(f"{n:03d}.png", png(n)), (f"{n:03d}.json", json.dumps(about).encode())]
    return members


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "good.tar"
    path.write_bytes(shard(good_members()))
    return path


def test_reads_what_webdataset_reads(tar: Path) -> None:
    mine = list(read_samples([tar]))
    theirs = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [sample.key for sample in mine] == [sample["__key__"] for sample in theirs]
    for sample, other in zip(mine, theirs, strict=True):
        reference = Image.open(io.BytesIO(other["png"])).convert("RGBA")
        assert sample.image.tobytes() == reference.tobytes()
        assert sample.captions == json.loads(other["json"])["captions"]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_packed_shard_holds_the_same_samples(tar: Path, suffix: str, compress) -> None:
    packed = tar.with_name(f"good.tar.{suffix}")
    packed.write_bytes(compress(tar.read_bytes()))
    plain, same = list(read_samples([tar])), list(read_samples([packed]))
    assert [(s.key, s.captions, s.concept) for s in same] == [
        (s.key, s.captions, s.concept) for s in plain
    ]
    assert count_samples([packed]) == 3


def test_reads_txt_lines_json_caption_and_loose_files(tmp_path: Path) -> None:
    (tmp_path / "photo.v2.png").write_bytes(png())
    (tmp_path / "photo.v2.txt").write_text("a photo\n\n second line \n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "other.PNG").write_bytes(png())
    (tmp_path / "below" / "other.json").write_text('{"caption": "another"}')
    (tmp_path / "notes.md").write_text("not a caption")
    samples = {sample.key: sample.captions for sample in read_samples([tmp_path])}
    assert samples == {"photo.v2": ["a photo", "second line"], "below/other": ["another"]}


def test_glob_finds_shards_in_order(tar: Path) -> None:
    for n in (1, 0):
        tar.with_name(f"part-{n}.tar").write_bytes(shard([(f"{n}.png", png()), (f"{n}.txt", b"x")]))
    assert [sample.key for sample in read_samples([str(tar.parent / "part-*.tar")])] == ["0", "1"]


@pytest.mark.parametrize("keep", [700, 1024, 1600, 3 * 1024])
def test_truncated_shard_is_named(tar: Path, keep: int) -> None:
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(PocketclipError, match=r"good\.tar: unreadable after .*truncated"):
        list(read_samples([tar]))


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_truncated_packed_shard_is_named(tar: Path, suffix: str, compress) -> None:
    content = compress(tar.read_bytes())
    path = tar.with_name(f"cut.tar.{suffix}")
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(PocketclipError, match=rf"cut\.tar\.{suffix}: unreadable"):
        list(read_samples([path]))


def test_damaged_header_in_the_middle_is_named(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    second_header = 1024
    content[second_header : second_header + 100] = b"\xff" * 100
    tar.write_bytes(bytes(content))
    with pytest.raises(PocketclipError, match=r"unreadable after 000\.png"):
        list(read_samples([tar]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png()[:40]), ("a.txt", b"x")], "a.png: not a whole image"),
        ([("a.png", b"hello"), ("a.txt", b"x")], "a.png: not a whole image"),
        ([("a.png", png())], "a.png: no caption beside it"),
        ([("a.png", png()), ("a.txt", b" \n")], "a.png: no caption beside it"),
        ([("a.txt", b"x")], "a: captions without an image"),
        ([("a.png", png()), ("a.json", b'{"caption": ')], "a.json: "),
        ([("a.png", png()), ("a.json", b'{"captions": 5}')], "a.json: captions: "),
    ],
)
def test_bad_sample_is_named_and_may_be_budgeted(tmp_path: Path, members, message: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(shard([*good_members(1), *members, ("z.png", png()), ("z.txt", b"last")]))
    with pytest.raises(PocketclipError, match=message):
        list(read_samples([path]))
    bad = BadSamples(budget=1)
    assert [sample.key for sample in read_samples([path], bad)] == ["000", "z"]
    assert message in bad.skipped[0] and "s.tar" in bad.skipped[0]


@pytest.mark.parametrize("name", ["missing.tar", "none-*.tar", "notes.md"])
def test_missing_or_foreign_path_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(PocketclipError, match=name.replace("*", r"\*")):
        list(read_samples([tmp_path / name]))


def test_digest_depends_on_content_and_not_on_place(tar: Path, tmp_path: Path) -> None:
    before = digest([tar])
    moved = tmp_path / "elsewhere" / tar.name
    moved.parent.mkdir()
    moved.write_bytes(tar.read_bytes())
    assert digest([moved]) == before
    moved.write_bytes(shard(good_members(2)))
    assert digest([moved]) != before


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def test_decode_scales_16_bit_grey_instead_of_clipping() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    image = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.asarray(image)[..., 0], np.arange(256).reshape(16, 16))


def test_decode_turns_image_upright_and_keeps_alpha() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image = Image.new("RGBA", (8, 4), (10, 20, 30, 40))
    turned = decode(encoded(image, "PNG", exif=exif))
    assert turned.size == (4, 8) and turned.getpixel((0, 0)) == (10, 20, 30, 40)


def test_decode_reads_cmyk_palette_and_grey() -> None:
    red = decode(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red.mode == "RGBA" and np.allclose(red.getpixel((1, 1)), (255, 0, 0, 255), atol=6)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 7, 8, 9])
    assert decode(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == (7, 8, 9, 0)
    assert decode(encoded(Image.new("L", (4, 4), 50), "PNG")).getpixel((0, 0)) == (50,) * 3 + (255,)


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_fit_square_keeps_the_centre(size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, "red")
    image.paste((0, 0, 255, 255), (size[0] // 2 - 15, size[1] // 2 - 15, size[0] // 2 + 15, 90))
    pixels = np.asarray(fit_square(image, 10))
    assert pixels.shape == (10, 10, 4) and (pixels[1:-1, 1:-1] == (0, 0, 255, 255)).all()
