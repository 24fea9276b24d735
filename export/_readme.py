"""The README of a bundle: what is inside, and code that runs it without this package."""

from collections.abc import Mapping
from typing import Any

PAGE = """\
# {name} for {target}, {precision}

Two encoders into one space of {embed_dim} dimensions: `{image}` for pictures, `{text}` for texts.
`bundle.json` says everything about inputs, outputs, preprocessing and tokenizer; `golden/` holds
pictures and texts with the pixels, ids and embeddings they must give.

| tower | input | output | worst cosine to the original |
|---|---|---|---|
{rows}
{simulated}
License: {license}. Input shapes are fixed, embeddings have length 1, so their product is the
cosine; times `logit_scale` ({logit_scale:.2f}){bias} it is the logit.

## Run it

Save as `example.py` beside this file; needs `pip install {requirements}`.

```python
import json

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer

{usage}

def read_pixels(path):
    \"\"\"Picture file -> {pixels_shape}.\"\"\"
    spec = bundle["preprocess"]
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16-bit: keep the high byte
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*spec["alpha"]["background"], 255))
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
{pixels}


def read_tokens(text):
    \"\"\"Text -> {tokens_shape}.\"\"\"
{tokens}


bundle = json.load(open("bundle.json", encoding="utf-8"))
tokenizer = Tokenizer.from_file(bundle["tokenizer"]["file"])
encode_image, encode_text = open_tower("image"), open_tower("text")

labels = ["a red apple", "a dog", "a house by the sea"]
image = encode_image(read_pixels("golden/wide.png"))
texts = np.stack([encode_text(read_tokens(label)) for label in labels])
logits = texts @ image * bundle["model"]["logit_scale"]
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for label, probability in zip(labels, probabilities):
    print(f"{{probability:6.1%}}  {{label}}")
```
"""

SIMULATED = """
The files did not run where they were written ({reason}): the cosines come from a simulation.
"""

PIXELS = """\
    height, width = spec["resize"]["size"]
    resample = Image.Resampling[spec["resize"]["interpolation"].upper()]
{resize}
    pixels = np.asarray(image, np.float32) * spec["rescale"]
    pixels = (pixels - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)"""
PICTURE = """\
    return np.asarray(image)"""
TOKENS = """\
    spec = bundle["tokenizer"]
    text = " ".join(text.split())
{tokenize}
    ids = ids + [spec["pad_id"]] * (spec["context_length"] - len(ids))
    return np.array(ids, dtype=np.int32)"""
STRING = """\
    return np.array([text], dtype=object)"""

RESIZE = {
    "squash": """\
    image = image.resize((width, height), resample)""",
    "shortest": """\
    scale = max(width / image.width, height / image.height)
    scaled = (int(image.width * scale + 1e-6), int(image.height * scale + 1e-6))
    image = image.resize(scaled, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))""",
    "longest": """\
    padding = tuple(spec["resize"]["background"])
    image = ImageOps.pad(image, (width, height), resample, color=padding)""",
}

LOWERCASE = """\
    text = text.lower()
"""
MARKS = """\
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: spec["context_length"] - 2]
    ids = [spec["start_id"], *ids, spec["end_id"]]"""
OWN_MARKS = """\
    ids = tokenizer.encode(text).ids[: spec["context_length"]]"""


def text(bundle: Mapping[str, Any], usage: str, requirements: str = "onnxruntime") -> str:
    """The page for one bundle; `usage` defines `open_tower`, `requirements` is what it imports."""
    model = bundle["model"]
    return PAGE.format(
        name=model["name"],
        target=bundle["target"],
        precision=bundle["precision"],
        embed_dim=model["embed_dim"],
        image=bundle["image"]["file"],
        text=bundle["text"]["file"],
        rows="\n".join(_row(bundle, tower) for tower in ("image", "text")),
        simulated="" if bundle["executed"] else SIMULATED.format(reason=bundle["unavailable"]),
        license=bundle["license"],
        logit_scale=model["logit_scale"],
        bias=""
        if model["logit_bias"] is None
        else f" plus `logit_bias` ({model['logit_bias']:.2f})",
        requirements=f"numpy pillow tokenizers {requirements}",
        usage=usage,
        **_reading(bundle),
    )


def _reading(bundle: Mapping[str, Any]) -> dict[str, str]:
    """Code that reads a picture and a text, as far as the files don't do it themselves."""
    contract, inside = bundle["tokenizer"], {}
    for tower in ("image", "text"):
        inside[tower] = bundle[tower]["input"].get("in_graph", [])
    resize = RESIZE[bundle["preprocess"]["resize"]["mode"]]
    tokenize = LOWERCASE if contract["lowercase"] else ""
    tokenize += OWN_MARKS if contract["start_id"] is None else MARKS
    whole = "resize" in inside["image"], "tokenizer" in inside["text"]
    return {
        "pixels": PICTURE if whole[0] else PIXELS.format(resize=resize),
        "pixels_shape": "uint8 [height, width, 3]" if whole[0] else "float32 [3, height, width]",
        "tokens": STRING if whole[1] else TOKENS.format(tokenize=tokenize),
        "tokens_shape": "one string [1]" if whole[1] else "int32 [context_length]",
    }


def _row(bundle: Mapping[str, Any], tower: str) -> str:
    entry = bundle[tower]
    sides = (
        f"`{entry[side]['name']}` {entry[side]['dtype']} {entry[side]['shape']}"
        for side in ("input", "output")
    )
    return f"| {tower} | {' | '.join(sides)} | {bundle['parity'][tower]['worst_cosine']:.5f} |"
