"""Tiny real objects for tests: a CLIP of 2 layers, a class file, a folder of labelled pictures."""

import json
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers

from compress.clip import Clip
from compress.model import ClipConfig, ClipModel, TextConfig, VisionConfig, initialise_
from compress.preprocess import Preprocess
from compress.tokenizer import Tokenizer, TokenizerContract
from compress.work import Data, Work
from export import _saturation

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
SHAPES = {"square": (4, 4, 28, 28), "bar": (2, 12, 30, 20)}

START, END, PAD, VOCABULARY = 298, 299, 0, 300


EXACT_BITS = 7 if _saturation.here() else 8
"""Bits of weights whose products with 8-bit inputs this CPU adds without overflow."""


def tiny_tokenizer(context_length: int = 16) -> Tokenizer:
    """One id per byte (1..256), no merges; the end-of-text id is the highest, as CLIP's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, **{letter: n + 1 for n, letter in enumerate(letters)}}
    vocabulary |= {f"<unused{n}>": n for n in range(len(vocabulary), START)}
    vocabulary |= {"<start>": START, "<end>": END}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    contract = TokenizerContract(
        lowercase=True, context_length=context_length, start_id=START, end_id=END, pad_id=PAD
    )
    return Tokenizer(raw, contract)


def tiny_config(layers: int = 2, width: int = 32, embed_dim: int = 16) -> ClipConfig:
    """32-pixel images in 16 patches, 16 tokens of text."""
    shared = {"width": width, "head_width": 8, "heads": (width // 8,) * layers}
    shared["mlp_width"] = (2 * width,) * layers
    return ClipConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(image_size=32, patch_size=8, **shared),
        text=TextConfig(vocab_size=VOCABULARY, context_length=16, **shared),
    )


def tiny_clip(seed: int = 0, layers: int = 2, width: int = 32, embed_dim: int = 16) -> Clip:
    """A whole CLIP with random weights."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = ClipModel(tiny_config(layers, width, embed_dim))
    initialise_(model)
    torch.set_rng_state(generator_state)
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    return Clip(model.eval(), preprocess, tiny_tokenizer(), "tiny", "Apache-2.0")


def tiny_data(folder: Path) -> Data:
    """8 pictures (4 colours, 2 shapes) with 2 captions each; one split, `val`, has the same 8."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    classes = []
    for color, rgb in COLORS.items():
        for shape, box in SHAPES.items():
            image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
            image.paste((*rgb, 255), box)
            image.save(pictures / f"{color}-{shape}.png")
            name = {"concept": f"{color}-{shape}", "name": f"{color} {shape}"}
            about = {
                **name,
                "captions": [f"{color} {shape}", f"a {color} {shape}"],
                "style": "flat",
            }
            (pictures / f"{color}-{shape}.json").write_text(json.dumps(about))
            classes.append(name)
    (folder / "classes.json").write_text(json.dumps(classes))
    return Data(
        train=(pictures,),
        evaluate={"val": (pictures,)},
        classes_file=folder / "classes.json",
        templates=("{}", "a {}"),
        image_size=32,
    )


def tiny_work(folder: Path) -> Work:
    """A stage's input: a tiny model that is its own teacher, and tiny data."""
    clip = tiny_clip()
    return Work(clip=clip, teacher=clip, data=tiny_data(folder))
