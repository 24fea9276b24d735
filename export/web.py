"""For browsers: transformers.js's folder, and a page that searches pictures by text, offline.

The same files open in transformers.js (`dtype: "q8"`) and in plain onnxruntime-web. The page needs
a server (`pocketclip serve FOLDER`, or any), not a network.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.clip import Clip
from compress.support import reason
from export import Unavailable, _bundle, _gallery, _npm
from export import onnx as portable
from export._browser import BrowserEncoder
from export._tokenizer import as_json, self_contained

VERSION = 2
REQUIRES = "web"

Dtype = Literal["fp32", "fp16", "q8", "q4"]
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "q8": 0.98, "q4": 0.9}
STEMS = {"image": "vision_model", "text": "text_model"}
NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}
DEMO = Path(__file__).with_name("demo")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


NOTES = """\

## In the browser

`pocketclip serve .`, or any server of static files (`python3 -m http.server`), shows `index.html`.
WebAssembly uses several threads only where the server sends `Cross-Origin-Opener-Policy:
same-origin` and `Cross-Origin-Embedder-Policy: require-corp`; `pocketclip serve` does.

transformers.js ({versions[@huggingface/transformers]}), with this folder at `models/mine`:

```js
import {{ AutoTokenizer, CLIPTextModelWithProjection, env }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "models/";
const tokenizer = await AutoTokenizer.from_pretrained("mine");
const model = await CLIPTextModelWithProjection.from_pretrained("mine", {{ dtype: "{dtype}" }});
const inputs = tokenizer(["a red apple"], {{ padding: {padding}, truncation: true }});
const {{ text_embeds }} = await model(inputs); // unit length
```

`CLIPVisionModelWithProjection` takes `pixel_values`. transformers.js cuts an over-long text with
its end mark, and resizes by the browser's own filter: `demo/tokens.mjs` and `demo/pixels.mjs` give
the ids and pixels of the contract.

onnxruntime-web ({versions[onnxruntime-web]}), with the page's modules:

```js
import * as ort from "./demo/ort.wasm.min.mjs";
import {{ openBundle }} from "./demo/clip.mjs";

ort.env.wasm.wasmPaths = new URL("./demo/", location.href).href;
const clip = await openBundle(ort, new URL("./", location.href));
const text = await clip.encodeText("a red apple");
const image = await clip.encodeImage(await (await fetch("golden/wide.png")).blob());
```
"""


class Config(BaseModel):
    """Settings of the files for browsers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Dtype = "q8"
    """transformers.js's name of the type: q8 (WebAssembly's default there, 8-bit weights and
    activations), q4 (matrices in 4 bits, a scale per 32 weights, the rest as in fp32), fp16 (half
    the size, meant for WebGPU), or fp32."""
    also: tuple[Dtype, ...] = ()
    """Further types that stand beside it in the same folder, each checked as well."""
    opset: int = Field(default=20, ge=20, le=23)
    """ONNX operator set."""
    full_range: bool = False
    """q8 with 8 bits instead of 7: closer, but overflows in native runtimes without VNNI."""
    page: bool = True
    """Whether the folder holds the demo page with its runtime (15 MB, fetched once by npm)."""
    emoji: bool = True
    """Whether the page brings the embedded held-out emoji to search in."""
    pictures: Path | None = None
    """A webdataset tar or a folder of pictures for the page to search in as well."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 fp32, 0.999 fp16, 0.98 q8,
    0.9 q4."""


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write the folder as a whole bundle.

    Raises GateFailed if a file disagrees with the torch model, Unavailable where the page is wanted
    and npm cannot fetch its runtime.
    """
    runtime = page_files() if cfg.page else {}
    tokenizer, settings = self_contained(clip)
    described = spec(cfg, cfg.precision)
    any_length = portable.any_length(clip)
    described.runtime["any_text_length"] = any_length
    versions = described.runtime["proved_with"]
    padding = "true" if any_length else '"max_length"'
    notes = NOTES.format(versions=versions, dtype=cfg.precision, padding=padding)
    about = _bundle.describe(clip, described)
    # Its first reader comes before bundle.json is written.
    described = replace(
        described, load=lambda folder: BrowserEncoder(folder, "wasm", 1, about), notes=notes
    )
    with _bundle.writing(clip, out, described) as folder:
        (folder / "onnx").mkdir()
        for tower in _bundle.TOWERS:
            _write_tower(clip, cfg, tower, folder)
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        for name, content in (
            ("config.json", config(clip)),
            ("preprocessor_config.json", image_processor(clip)),
            ("tokenizer_config.json", settings),
        ):
            (folder / name).write_text(as_json(content), encoding="utf-8")
        described.runtime["native"] = {
            dtype: _checked(clip, cfg, dtype, folder)
            for dtype in dict.fromkeys((cfg.precision, *cfg.also))
            if dtype != cfg.precision or described.few
        }
        for name, source in runtime.items():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
        if cfg.page:
            encoder = _native(cfg.precision, folder)
            _gallery.write(clip, encoder, folder / "demo", cfg.emoji, cfg.pictures)


def refuses(clip: Clip) -> str | None:
    """Why transformers.js could not read a model's tokenizer."""
    return reason(lambda: self_contained(clip))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> BrowserEncoder:
    """Open the files in onnxruntime-web inside a headless Chromium; `threads` None means 1.

    device: cpu for WebAssembly, webgpu. Raises Unavailable without browser, npm or adapter.
    """
    providers = {"cpu": "wasm", "webgpu": "webgpu"}
    if device not in providers:
        raise Unavailable(f"browsers have no {device}; there is cpu and webgpu")
    return BrowserEncoder(Path(folder), providers[device], threads or 1)


def spec(cfg: Config, dtype: str) -> _bundle.Spec:
    """What the bundle's pages say of the files of one type."""
    gate = MIN_COSINE[dtype] if cfg.min_cosine is None else cfg.min_cosine
    versions = {name: version for name, (version, _) in _npm.PACKAGES.items()}
    entries = {
        tower: {
            "file": _file(tower, dtype),
            "input": {"name": NAMES[tower][0]},
            "output": {"name": NAMES[tower][1]},
        }
        for tower in _bundle.TOWERS
    }
    entries["text"]["input"] = {"name": NAMES["text"][0], "dtype": "int64"}
    return _bundle.Spec(
        "web",
        dtype,
        "onnx",
        1,
        gate,
        load,
        portable.USAGE,
        {"opset": cfg.opset, "proved_with": versions},
        simulate=lambda folder: _native(dtype, folder),
        few=dtype != "q8" or not cfg.full_range,  # which may overflow natively
        entries=entries,
    )


def config(clip: Clip) -> dict[str, Any]:
    """config.json: what transformers.js reads of it."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.model.config.embed_dim,
        "logit_scale_init_value": clip.model.logit_scale.item(),
        "text_config": {"model_type": "clip_text_model"},
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": clip.preprocess.size[0],
        },
    }


def image_processor(clip: Clip) -> dict[str, Any]:
    """preprocessor_config.json. transformers.js resizes by the browser's own filter: the page here
    follows the contract instead."""
    from export import huggingface

    if clip.preprocess.resize_mode == "longest":
        return {"do_pad": True, "pad_size": dict(zip(("height", "width"), clip.preprocess.size))}
    names = {"feature_extractor_type": "CLIPFeatureExtractor", "processor_class": "CLIPProcessor"}
    return huggingface.image_processor(clip) | names


def page_files() -> dict[str, Path]:
    """Where each file of the page comes from: ours, and two packages of npm."""
    runtime = _npm.package("onnxruntime-web") / "dist"
    tokenizers = _npm.package("@huggingface/tokenizers") / "dist"
    own = [path for path in DEMO.iterdir() if path.stem not in ("index", "runner")]
    files = {f"demo/{path.name}": path for path in own}
    files |= {f"demo/{name}": runtime / name for name in RUNTIME}
    files["demo/tokenizers.min.mjs"] = tokenizers / "tokenizers.min.mjs"
    files["index.html"] = DEMO / "index.html"
    return files


def _write_tower(clip: Clip, cfg: Config, tower: str, folder: Path) -> None:
    graph = portable.open_graph(clip, tower, cfg.opset)
    names = dict(zip((_bundle.INPUTS[tower], _bundle.OUTPUTS[tower]), NAMES[tower]))
    portable.rename_(graph, names)
    for dtype in dict.fromkeys((cfg.precision, *cfg.also)):
        converted = _converted(copy.deepcopy(graph), dtype, cfg.full_range)
        portable.save(converted, folder / _file(tower, dtype))


def _converted(graph: Any, dtype: str, full_range: bool) -> Any:
    if dtype == "q8":
        from export import _int8

        return _int8.rewrite(graph, _int8.FULL_RANGE if full_range else _int8.REDUCED_RANGE)
    if dtype == "q4":
        from export import _narrow

        return _narrow.four_bits(graph)
    if dtype == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        from export import _narrow

        return convert_float_to_float16(_narrow.scale_keys(graph), keep_io_types=True)
    return graph


def _checked(clip: Clip, cfg: Config, dtype: str, folder: Path) -> dict[str, Any]:
    """The figures of the whole parity gate, natively: the arithmetic is the same, and WebAssembly
    is many times slower.
    """
    from export import _parity

    entry = spec(cfg, dtype)
    return _parity.check(clip, _native(dtype, folder), entry.min_cosine, f"web {dtype}")


def _native(dtype: str, folder: Path) -> portable.OrtEncoder:
    files = {tower: _file(tower, dtype) for tower in _bundle.TOWERS}
    return portable.OrtEncoder(folder, "cpu", None, files)


def _file(tower: str, dtype: str) -> str:
    return f"onnx/{STEMS[tower]}{SUFFIXES[dtype]}.onnx"
