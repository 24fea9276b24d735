"""Towers that go on with fewer tokens: rebuilt from data, exported, and the same without sites."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import tiny_clip

import compress.clip
from compress.clip import Clip
from compress.model import ClipModel
from compress.schedule import Method, Reduction, Site
from compress.structure import VisionConfig
from export import _int8
from export import onnx as portable

METHODS = get_args(Method)


def reduced(clip: Clip, last_block: str = "all", **schedule: Any) -> Clip:
    """The same weights with a schedule; what it adds is left as the constructor made it."""
    config = clip.model.config
    vision = config.vision.model_dump() | {"last_block": last_block}
    if schedule:
        vision["reduction"] = {"guard": 2 if "guarded" in schedule.values() else 0} | schedule
    config = config.model_copy(update={"vision": VisionConfig.model_validate(vision)})
    model = ClipModel(config)
    model.load_state_dict(clip.model.state_dict(), strict=False)
    return replace(clip, model=model.eval())


def site(layer: int = 0, keep: int = 8) -> dict[str, int]:
    return {"layer": layer, "keep": keep}


def test_no_site_is_bit_identical(clip: Clip) -> None:
    pixels = torch.randn(4, 3, 32, 32)
    wanted = clip.model.encode_image(pixels)
    for sites in ([], [site(keep=16)]):
        same = reduced(clip, method="tome", sites=sites, proportional=True)
        assert torch.equal(same.model.encode_image(pixels), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_is_rebuilt_from_its_file(clip: Clip, method: str, tmp_path: Path) -> None:
    small = reduced(tiny_clip(layers=4), method=method, sites=[site(0, 12), site(2, 8)])
    compress.clip.save(small, tmp_path)
    again = compress.clip.load(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    assert again.model.config == small.model.config
    assert torch.equal(again.model.encode_image(pixels), small.model.encode_image(pixels))


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_graph_says_the_same_and_fuses_in_int8(clip: Clip, method: str) -> None:
    small = reduced(clip, method=method, sites=[site()], last_block="pooled")
    pixels = torch.randn(1, 3, 32, 32)
    wanted = F.normalize(small.model.encode_image(pixels), dim=-1).detach()
    graph = portable.graph(small, "image", 1, 20)
    torch.testing.assert_close(_run(graph, pixels), wanted, rtol=0, atol=1e-5)
    assert not {"ScatterElements", "ScatterND"} & {node.op_type for node in graph.graph.node}
    whole = _int8.rewrite(graph)
    assert Counter(node.op_type for node in whole.graph.node)["QAttention"] == 1
    # A near tie may fall to the other token in int8; 16 patches make that visible.
    assert float(F.cosine_similarity(_run(whole, pixels), wanted)) > 0.98


def test_attention_that_counts_patches_is_fused_in_int8(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = reduced(clip, method="guarded", sites=[site()], guard=2, proportional=True)
    graph = portable.graph(small, "image", 1, 20)
    pixels = torch.randn(1, 3, 32, 32)
    whole = _int8.rewrite(graph)
    found = Counter(node.op_type for node in whole.graph.node)
    blocks = small.model.config.vision.num_layers
    assert (found["QAttention"], found["MultiHeadAttention"]) == (1, blocks - 1)
    monkeypatch.setattr(_int8._attention, "find", lambda softmax: None)
    written_out = _int8.rewrite(graph)
    # The same integers in the same places: only the order of float sums differs.
    torch.testing.assert_close(_run(whole, pixels), _run(written_out, pixels), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["tome", "guarded"])
def test_proportional_attention_counts_a_merged_token_as_its_patches(clip: Clip, method: str):
    """Tokens that are exactly equal: merging them changes nothing (ToMe, 3.3)."""
    with torch.no_grad():
        clip.model.image.position[1:] = clip.model.image.position[1]
    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    wanted = clip.model.encode_image(pixels)
    schedule = {"method": method, "sites": [site()]}
    same = reduced(clip, **schedule, proportional=True).model.encode_image(pixels)
    torch.testing.assert_close(same, wanted, rtol=0, atol=1e-5)
    other = reduced(clip, **schedule, proportional=False).model.encode_image(pixels)
    assert (other - wanted).abs().max() > 1e-4


def test_mean_pooling_weights_a_merged_token_by_its_patches() -> None:
    mean = tiny_clip()
    vision = mean.model.config.vision.model_dump() | {"pooling": "mean", "class_token": False}
    config = mean.model.config.model_copy(update={"vision": VisionConfig.model_validate(vision)})
    model = ClipModel(config).eval()
    mean = replace(mean, model=model)
    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    same = reduced(mean, method="tome", sites=[site()], proportional=True)
    wanted = mean.model.encode_image(pixels)
    torch.testing.assert_close(same.model.encode_image(pixels), wanted, rtol=0, atol=1e-5)


def test_queries_start_without_effect_and_learn(clip: Clip) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    plain = reduced(clip, method="evit", sites=[site()])
    more = reduced(clip, method="evit", sites=[site()], queries=3)
    wanted = plain.model.encode_image(pixels)
    torch.testing.assert_close(more.model.encode_image(pixels), wanted, rtol=0, atol=1e-6)
    more.model.encode_image(pixels).square().sum().backward()
    assert more.model.image.abstraction.out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("method, name", [("cross", "offset"), ("selector", "score.1.weight")])
def test_learnt_choices_have_gradients(clip: Clip, method: str, name: str) -> None:
    model = reduced(clip, method=method, sites=[site()]).model
    model.encode_image(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gradient = dict(model.image.reducers[0].named_parameters())[name].grad
    assert gradient is not None and gradient.abs().max() > 0


def test_a_schedule_follows_training_at_another_resolution(clip: Clip) -> None:
    small = reduced(clip, method="guarded", sites=[site()])
    assert small.model.encode_image(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    keep = torch.tensor([[0, 3, 5, 9, 12]] * 2)
    assert small.model.image(torch.randn(2, 3, 32, 32), keep=keep).shape == (2, 16)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ({"method": "tome", "sites": [site(keep=4)]}, "merges at most half of 16 tokens"),
        ({"method": "topk", "sites": [site(layer=1)]}, "nothing would follow; the last is 0"),
        ({"method": "topk", "sites": [site(keep=24)]}, "keeps 24 of 16 tokens"),
        ({"method": "fopru_row", "sites": [site(keep=6)]}, "whole rows of 4, 6 isn't"),
        ({"method": "topk", "sites": [site(), site()]}, "ascending layers"),
        ({"method": "guarded", "sites": [site()], "guard": 8}, "leaves nothing to choose"),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    clip: Clip, schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        reduced(clip, **schedule)


@pytest.mark.parametrize("method", METHODS)
def test_what_litert_has_no_operator_for_is_not_traced(method: str) -> None:
    """torch.eye, and TopK whose indices nobody takes, which it turns into a sort."""
    small = reduced(tiny_clip(layers=4), method=method, sites=[site(0, 12), site(2, 8)])
    pixels = torch.randn(1, 3, 32, 32)
    graph = torch.export.export(small.model.image, (pixels,)).graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    assert not [node for node in called if "eye" in str(node.target)]
    sorts = [node for node in called if "topk" in str(node.target)]
    taken = [{user.args[1] for user in node.users if len(user.users)} for node in sorts]
    assert all(1 in parts for parts in taken)
    assert sorts or method in ("grid", "random")


def test_methods_that_rank_by_the_class_token_need_one(clip: Clip) -> None:
    vision = clip.model.config.vision.model_dump() | {"pooling": "mean", "class_token": False}
    vision["reduction"] = Reduction(method="evit", sites=(Site(layer=0, keep=8),)).model_dump()
    with pytest.raises(ValidationError, match="this tower has none: take tome"):
        VisionConfig.model_validate(vision)


def _run(graph: Any, pixels: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
