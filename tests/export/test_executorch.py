"""ExecuTorch programs: written-out norms, what XNNPACK runs of them, and the thread pool."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_clip
from torch import nn

from compress.clip import Clip, TorchEncoder
from compress.model import ClipModel
from compress.schedule import Reduction, Site
from export import Unavailable, _aten, _calibration, _delegates, _xnnpack
from export import onnx as portable

exporter = pytest.importorskip("export.executorch")


def test_written_out_norm_equals_torch() -> None:
    norm = nn.LayerNorm(24, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(3, 5, 24) * 4 + 2
    torch.testing.assert_close(_xnnpack.WrittenNorm(norm)(x), norm(x), rtol=0, atol=1e-5)


def test_every_norm_of_a_tower_is_written_out() -> None:
    tower = _xnnpack.write_out_(tiny_clip().model.image)
    kinds = [type(module) for module in tower.modules()]
    assert nn.LayerNorm not in kinds and kinds.count(_xnnpack.WrittenNorm) == 6


def test_slices_of_one_matrix_keep_their_own_values(tmp_path: Path) -> None:
    """Queries and keys of a site come from one weight; both were the queries' once."""
    pytest.importorskip("executorch")

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.both.weight.chunk(2)
            return nn.functional.linear(x, first) - 2 * nn.functional.linear(x, second)

    module, x = Halves().eval(), torch.randn(1, 5, 16)
    program = exporter.computed(_aten.graph(module, x, _aten.PORTABLE))
    file = tmp_path / "halves.pte"
    file.write_bytes(exporter.lower(program)[0])
    [found] = exporter._method(file).execute((x,))
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-5)


def test_nearly_all_is_delegated_in_few_pieces(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    exporter.write(tiny_clip(), exporter.Config(), tmp_path / "out")
    runtime = json.loads((tmp_path / "out" / "bundle.json").read_text())["runtime"]
    assert runtime["image"]["delegates"] <= 5
    assert runtime["image"]["delegated_share"] > 0.9
    assert runtime["text"]["delegates"] <= 4


def test_ranges_of_weights_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample more changes ranges of activations, and takes no weight again."""
    pytest.importorskip("executorch")
    from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver

    plain, seen = PerChannelMinMaxObserver.forward, list[int]()

    def counted(self: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        seen.append(id(self))
        return plain(self, weight)

    monkeypatch.setattr(PerChannelMinMaxObserver, "forward", counted)
    clip, cfg = tiny_clip(layers=1), exporter.Config(precision="int8-static")
    samples = _calibration.collect(clip, 3)
    found = exporter.trace(clip, "image", cfg, samples).module()(samples.image[:1])
    assert seen and len(seen) == len(set(seen))
    monkeypatch.setattr(exporter, "_keep_ranges_of_weights_", lambda prepared: None)
    again = exporter.trace(clip, "image", cfg, samples).module()(samples.image[:1])
    assert torch.equal(found, again)


@pytest.mark.parametrize("method", ["guarded", "tome"])
def test_token_reduced_towers_run(method: str, tmp_path: Path) -> None:
    """Weight slices left in their graph crash XNNPACK, or end in cyclic partitions."""
    pytest.importorskip("executorch")
    clip = reduced(method)
    content, about = exporter.lower(exporter.trace(clip, "image", exporter.Config(), None))
    assert about["delegated_share"] > 0.75
    (tmp_path / "image.pte").write_bytes(content)
    pixels = torch.randn(3, 3, 32, 32)
    found = exporter._run(exporter._method(tmp_path / "image.pte"), pixels.numpy())
    expected = TorchEncoder(clip).encode_image(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_constants_of_weights_are_made_without_a_word() -> None:
    """Torch warned of each of them that it wanted a gradient."""
    clip = reduced("guarded")
    example = portable.example(clip, "image", 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        program = _aten.graph(portable.unit(clip, "image"), example, _aten.PORTABLE)
        exporter.computed(program).module()
    assert not [str(word.message) for word in said if "requires gradient" in str(word.message)]


def reduced(method: str) -> Clip:
    """The tiny model of three layers with half of its tokens behind the first."""
    guard = 2 if method == "guarded" else 0
    reduction = Reduction(method=method, sites=(Site(layer=0, keep=8),), guard=guard)
    clip = tiny_clip(layers=3)
    vision = clip.model.config.vision.model_copy(update={"reduction": reduction})
    model = ClipModel(clip.model.config.model_copy(update={"vision": vision}))
    model.load_state_dict(clip.model.state_dict())
    return replace(clip, model=model.eval())


@pytest.mark.parametrize(
    ("backend", "words"), [("coreml", "Core ML predicts on macOS only"), ("qnn", "SDK is not inst")]
)
def test_a_backend_that_cannot_run_here_says_why(
    backend: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("executorch.runtime")
    registry = SimpleNamespace(is_available=lambda name: name == "XnnpackBackend")
    monkeypatch.setattr(runtime.Runtime, "get", lambda: SimpleNamespace(backend_registry=registry))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(Unavailable, match=words):
        exporter.write(tiny_clip(), exporter.Config(backend=backend), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _delegates.require("xnnpack")


def test_core_ml_takes_nearly_all_of_both_towers() -> None:
    """Lowering needs no Mac, running does."""
    pytest.importorskip("executorch.backends.apple.coreml.compiler")
    pytest.importorskip("coremltools")
    cfg = exporter.Config(backend="coreml")
    for tower in ("image", "text"):
        program = exporter.trace(tiny_clip(), tower, cfg, None)
        content, about = exporter.lower(program, "coreml")
        assert b"CoreMLBackend" in content and about["delegates"] <= 3
        assert about["delegated_share"] > 0.9


def test_other_backends_take_one_precision() -> None:
    with pytest.raises(ValueError, match="backend coreml takes precision fp32, not int8"):
        exporter.Config(backend="coreml", precision="int8")


def test_thread_pool_is_set_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    portable_lib = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    exporter.set_threads(1)
    assert portable_lib._threadpool_get_thread_count() == 1
    monkeypatch.setattr(portable_lib, "_threadpool_get_thread_count", lambda: 7)
    with pytest.raises(Unavailable, match="7 threads, 1 were asked for"):
        exporter.set_threads(1)
