"""What `pocketclip inspect` says of a model that an exporter cannot take."""

from dataclasses import replace

import pytest
from tiny import tiny_clip

from compress import plugin
from compress.clip import Clip
from compress.schedule import Reduction, Site
from compress.support import support


def changed(tower: str, **settings: object) -> Clip:
    """The tiny model with another structure in a tower; nothing here computes with it."""
    clip = tiny_clip()
    config = clip.model.config
    inner = getattr(config, tower).model_copy(update=settings)
    clip.model.config = config.model_copy(update={tower: inner})
    return clip


REDUCED = Reduction(method="guarded", sites=(Site(layer=0, keep=8),), guard=2)


def test_a_plain_model_goes_everywhere() -> None:
    assert set(support(tiny_clip())["exports"].values()) == {"yes"}


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (changed("vision", reduction=REDUCED), None),
        (changed("text", pad_id=0), "no comparison: the text tower masks"),
        (changed("text", last_block="pooled"), None),
    ],
)
def test_ncnn_names_the_layer_that_it_lacks(clip: Clip, words: str | None) -> None:
    said = plugin.find(plugin.EXPORTERS, "ncnn").refuses(clip)
    assert said is None if words is None else words in said


def test_contracts_that_readers_cannot_follow_are_refused() -> None:
    clip = tiny_clip()
    padded = replace(clip, preprocess=clip.preprocess.model_copy(update={"resize_mode": "longest"}))
    exports = support(padded)["exports"]
    assert "cropping or squashing" in exports["immich"] and "cannot pad" in exports["huggingface"]
    assert exports["web"] == exports["onnx"] == "yes"
