"""The web folder in the runtimes it is for: onnxruntime-web and transformers.js, in Chromium."""

import base64
import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from browsing import need_browser
from PIL import Image
from tiny import END, tiny_clip
from tokenizers import processors

from compress.clip import Clip
from compress.errors import GateFailed, PocketclipError
from compress.preprocess import Preprocess
from compress.sources._text_files import openai_tokenizer
from compress.tokenizer import Tokenizer
from export import Unavailable, _goldens, _npm, web
from export import onnx as portable
from export._browser import BrowserPage
from export._chromium import Chromium
from export._serve import Server
from export._tokenizer import self_contained
from export._verify import verify

TEXTS = [
    *_goldens.TEXTS,
    "  It's 2 o'clock, we'll say\tNOT'S  ",
    "İstanbul, ΟΔΟΣ, straße",
    "a\x1cb\x85c\ufeffd\u3000e",
    "日本語のテキスト",
    "ﬁne “quotes” ‘single’ ＦＵＬＬ",
    "e\u0301 vs é",
    "<|endoftext|> <start_of_text>",
]

TRANSFORMERS = """
<!doctype html><title>transformers.js</title><link rel="icon" href="data:,">
<script type="importmap">{"imports": {
  "@huggingface/transformers": "/transformers/transformers.web.min.js",
  "onnxruntime-web/webgpu": "/ort/ort.wasm.min.mjs",
  "onnxruntime-common": "/ort/ort.wasm.min.mjs"}}</script>
<script type="module">
import * as lib from "@huggingface/transformers";
lib.env.allowRemoteModels = false;
lib.env.allowLocalModels = true;
lib.env.localModelPath = "/models/";
lib.env.backends.onnx.wasm.wasmPaths = "/ort/";
lib.env.backends.onnx.wasm.numThreads = 1;
globalThis.embed = async (name, dtype, texts, pixels, shape) => {
  const options = { dtype, device: "wasm" };
  const tokenizer = await lib.AutoTokenizer.from_pretrained(name);
  const text = await lib.CLIPTextModelWithProjection.from_pretrained(name, options);
  const vision = await lib.CLIPVisionModelWithProjection.from_pretrained(name, options);
  const inputs = tokenizer(texts, { padding: true, truncation: true });
  const { text_embeds } = await text(inputs);
  const pixel_values = new lib.Tensor("float32", Float32Array.from(pixels), shape);
  const { image_embeds } = await vision({ pixel_values });
  return { ids: inputs.input_ids.tolist().map(row => row.map(Number)),
    texts: text_embeds.tolist(), images: image_embeds.tolist() };
};
globalThis.loaded = true;
</script>
"""


@pytest.fixture(scope="module", autouse=True)
def _trace_once() -> Iterator[None]:
    """Torch needs seconds to trace a tower; equal models are traced once for all tests here."""
    traced: dict[str, onnx.ModelProto] = {}
    trace = portable.open_graph

    def graph(clip: Clip, tower: str, opset: int) -> onnx.ModelProto:
        if tower not in traced:
            traced[tower] = trace(clip, tower, opset)
        return copy.deepcopy(traced[tower])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "open_graph", graph)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files without the page: only the browser is needed, and not even that to write them."""
    folder = tmp_path_factory.mktemp("export") / "web"
    web.write(tiny_clip(), web.Config(page=False, also=("fp32", "fp16", "q4")), folder)
    return folder


@pytest.fixture(scope="module")
def page(bundle: Path) -> Iterator[BrowserPage]:
    need_browser()
    page = BrowserPage(bundle)
    page.open(1)
    yield page
    assert page.chromium.problems == []
    page.close()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_layout_and_names_are_those_of_transformers_js(bundle: Path) -> None:
    assert {path.name for path in (bundle / "onnx").iterdir()} == {
        f"{tower}_model{suffix}.onnx"
        for tower in ("text", "vision")
        for suffix in ("", "_fp16", "_quantized", "_q4")
    }
    assert read(bundle / "config.json")["model_type"] == "clip"
    about = read(bundle / "bundle.json")
    assert about["image"]["file"] == "onnx/vision_model_quantized.onnx"
    assert about["text"]["input"] == {"name": "input_ids", "dtype": "int64", "shape": [1, 16]}
    assert about["executed"] or about["unavailable"]


@pytest.mark.parametrize(("suffix", "cosine"), [("", 0.99999), ("_fp16", 0.999)])
def test_any_batch_and_any_length_of_text(
    bundle: Path, clip: Clip, suffix: str, cosine: float
) -> None:
    run = {
        tower: onnxruntime.InferenceSession(bundle / f"onnx/{tower}_model{suffix}.onnx").run
        for tower in ("vision", "text")
    }
    pixels, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(["a", "red", "cat"])
    with torch.no_grad():
        images = F.normalize(clip.model.encode_image(pixels), dim=-1).numpy()
        texts = F.normalize(clip.model.encode_text(tokens), dim=-1).numpy()
    short = tokens[:, :6].long().numpy()  # all three end by then
    assert (run["vision"](None, {"pixel_values": pixels.numpy()})[0] * images).sum(1).min() > cosine
    assert (run["text"](None, {"input_ids": short})[0] * texts).sum(1).min() > cosine


def test_the_bundle_verifies_in_the_browser(bundle: Path) -> None:
    need_browser()
    assert min(verify(bundle).values()) > 0.99


def test_most_texts_of_a_call_come_without_padding(
    bundle: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_browser()
    encoder = web.load(bundle)
    lengths: list[int] = []
    call = encoder.page.call

    def counted(function: str, tower: str, row: str) -> str:
        lengths.append(len(base64.b64decode(row)) // 4)
        return call(function, tower, row)

    monkeypatch.setattr(encoder.page, "call", counted)
    tokens = clip.tokenizer([*("a red cat",) * 9, "", "many small birds " * 9])
    with torch.no_grad():
        wanted = F.normalize(clip.model.encode_text(tokens), dim=-1)
    assert (encoder.encode_text(tokens) * wanted).sum(1).min() > 0.99
    assert lengths[:8] == [16] * 8 and lengths[-2:] == [2, 16] and 2 < lengths[8] < 16
    encoder._about["runtime"]["any_text_length"] = False
    encoder.encode_text(tokens[:9])
    assert lengths[-1] == 16


def test_pixels_are_those_of_the_contract_within_one_step(page: BrowserPage, bundle: Path) -> None:
    """Opaque pictures to the bit; a canvas keeps transparent ones multiplied, rounded to 8 bits."""
    golden = read(bundle / "golden/golden.json")
    for entry in golden["images"]:
        found = unpacked(page.call("pixels", f"/bundle/golden/{entry['file']}"))
        wanted = np.load(bundle / "golden" / entry["pixels"]).ravel()
        steps = 0.01 if "alpha" not in entry["file"] else 1.01
        assert np.abs(found - wanted).max() * 255 * 0.5 < steps, entry["file"]
        assert np.abs(found - wanted).max() <= golden["max_pixel_error"]


def test_a_turned_photo_stands_upright(page: BrowserPage, clip: Clip) -> None:
    """JPEG with EXIF orientation 6; decoders may differ by two 8-bit steps."""
    picture, buffer = _goldens.drawing(9, (60, 40)).resize((240, 160)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(buffer, "JPEG", quality=97, subsampling=0, exif=exif)
    with Image.open(buffer) as photo:
        wanted = clip.preprocess(photo).numpy().ravel()
    address = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert np.abs(unpacked(page.call("pixels", address)) - wanted).max() * 255 * 0.5 < 2.01


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_resizing_equals_pillow(page: BrowserPage, mode: str, interpolation: str) -> None:
    size = (24, 40) if interpolation == "bicubic" else (32, 32)
    contract = Preprocess(size=size, resize_mode=mode, interpolation=interpolation)
    for seed, shape in enumerate([(131, 57), (33, 90), (20, 14)]):
        picture = _goldens.drawing(seed, shape)
        wanted = np.asarray(contract.resize(picture))
        found = page.chromium.evaluate(
            f"""import("/demo/pixels.mjs").then(m => Array.from(m.fit({{
              width: {shape[0]}, height: {shape[1]},
              data: Uint8Array.from({np.asarray(picture).ravel().tolist()}) }},
              {json.dumps(contract.bundle())}).data))"""
        )
        assert (np.array(found).reshape(wanted.shape) == wanted).all()


def own_marks() -> Tokenizer:
    """One whose file adds its end mark by itself, as SigLIP's does."""
    tiny = tiny_clip().tokenizer
    file = tokenizers.Tokenizer.from_str(tiny.tokenizer.to_str())
    file.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", END)])
    return Tokenizer(file, tiny.contract.model_copy(update={"start_id": None}))


TOKENIZERS = {
    "tiny": lambda: tiny_clip().tokenizer,
    "own marks": own_marks,
    "openai": openai_tokenizer,
}


@pytest.mark.parametrize("which", TOKENIZERS)
def test_ids_are_those_of_the_contract(page: BrowserPage, tmp_path: Path, which: str) -> None:
    tokenizer = TOKENIZERS[which]()
    tokenizer.save(tmp_path)
    spec = json.dumps(tokenizer.contract.model_dump(mode="json"))
    address = base64.b64encode((tmp_path / "tokenizer.json").read_bytes()).decode()
    found = page.chromium.evaluate(
        f"""import("/demo/tokens.mjs").then(m => m.openTokenizer({spec},
          "data:application/json;base64,{address}")).then(ids => {json.dumps(TEXTS)}.map(ids))"""
    )
    for text, row, wanted in zip(TEXTS, found, tokenizer(TEXTS).tolist()):
        assert row == wanted, text


@pytest.mark.parametrize(("dtype", "cosine"), [("q8", 0.99), ("q4", 0.9), ("fp32", 0.99999)])
def test_transformers_js_gives_our_embeddings(
    bundle: Path, clip: Clip, tmp_path: Path, dtype: str, cosine: float
) -> None:
    packages = ("onnxruntime-web", "@huggingface/transformers")
    need_browser(packages)
    (tmp_path / "index.html").write_text(TRANSFORMERS)
    texts, pixels = ["a red  square", "Cat", "x" * 10], torch.randn(2, 3, 32, 32)
    folders = {"": tmp_path, "models": bundle.parent}
    folders |= dict(zip(("ort", "transformers"), (_npm.package(n) / "dist" for n in packages)))
    with Server(folders) as server, Chromium() as chromium:
        chromium.open(f"{server.url}/index.html")
        arguments = [bundle.name, dtype, texts, pixels.flatten().tolist(), list(pixels.shape)]
        words = ", ".join(map(json.dumps, arguments))
        found = chromium.evaluate(f"embed({words})")
    tokens = clip.tokenizer(texts)
    for row, ours in zip(found["ids"], tokens.tolist()):
        end = ours.index(clip.tokenizer.contract.end_id) + 1
        assert row[:end] == ours[:end]
    with torch.no_grad():
        wanted = F.normalize(clip.model.encode_text(tokens), dim=-1)
        images = F.normalize(clip.model.encode_image(pixels), dim=-1)
    assert (torch.tensor(found["texts"]) * wanted).sum(1).min() > cosine
    assert (torch.tensor(found["images"]) * images).sum(1).min() > cosine


def test_a_file_with_its_own_marks_keeps_them(clip: Clip) -> None:
    marked = replace(clip, tokenizer=own_marks())
    text, settings = self_contained(marked)
    assert "bos_token" not in settings and settings["eos_token"] == "<end>"
    found = [tokenizers.Tokenizer.from_str(text).encode(t).ids for t in ("A  cat", "x" * 80)]
    for row, ours in zip(found, marked.tokenizer(["A  cat", "x" * 80]).tolist()):
        end = ours.index(END) + 1
        assert row[:end] == ours[:end] and len(row) == len(ours)


def test_every_type_is_judged_on_all_rows_natively_and_the_first_on_few_in_the_browser(
    bundle: Path,
) -> None:
    about = read(bundle / "bundle.json")
    native = about["runtime"]["native"]
    assert list(native) == ["q8", "fp32", "fp16", "q4"]
    assert {figures["image"]["num_rows"] for figures in native.values()} == {58}
    assert {figures["text"]["num_rows"] for figures in native.values()} == {97}
    assert (about["parity"]["image"]["num_rows"], about["parity"]["text"]["num_rows"]) == (18, 23)


def test_the_gate_holds_for_every_type(clip: Clip, tmp_path: Path) -> None:
    strict = web.Config(precision="fp32", also=("q8",), page=False, min_cosine=0.99999)
    with pytest.raises(GateFailed, match="web q8"):
        web.write(clip, strict, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_browser_the_files_are_simulated(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export._chromium.NAMES", ("no-such-browser",))
    monkeypatch.setattr(_npm, "package", lambda name: tmp_path)
    web.write(clip, web.Config(precision="fp32", page=False), tmp_path / "out")
    about = read(tmp_path / "out/bundle.json")
    assert not about["executed"] and "no browser here" in about["unavailable"]
    with pytest.raises(Unavailable, match="no browser here"):
        web.load(tmp_path / "out")


def test_a_package_of_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "false.tgz").write_bytes(b"false")
    monkeypatch.setattr(_npm, "_fetch", lambda name, folder: tmp_path / "false.tgz")
    with pytest.raises(PocketclipError, match="other bytes than those pinned"):
        _npm.package("onnxruntime-web", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_server_isolates_pages_and_stays_in_its_folders(tmp_path: Path) -> None:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/page.mjs").write_text("1")
    (tmp_path / "secret.txt").write_text("secret")
    with Server({"": tmp_path / "inside"}) as server:
        with urlopen(f"{server.url}/page.mjs") as answer:
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Content-Type"] == "text/javascript"
        for outside in ("../secret.txt", "%2e%2e/secret.txt", "/secret.txt"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"{server.url}/{outside}")
