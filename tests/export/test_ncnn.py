"""ncnn bundles against the torch model; the rewritten towers against the towers."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import END, PAD, START, tiny_clip
from torch import Tensor, nn

from compress.clip import Clip, TorchEncoder
from compress.schedule import Method, Reduction, Site
from compress.stages.exact import pooled_last
from compress.stages.prune_tokens import reduced
from export import Unavailable, _parity
from export import _ncnn_layers as layers
from export import ncnn as exporter
from export._verify import verify

pytest.importorskip("ncnn")
pytest.importorskip("pnnx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "ncnn"
    exporter.write(tiny_clip(), exporter.Config(), folder)
    return folder


def test_bundle_meets_its_goldens_and_holds_nothing_else(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999
    described = json.loads((bundle / "bundle.json").read_text())
    assert described["executed"] is True
    towers = {name for name in described["files"] if name.startswith(("image", "text"))}
    assert towers == {"image.param", "image.bin", "text.param", "text.bin"}


def test_both_towers_equal_torch(bundle: Path, clip: Clip) -> None:
    pixels, tokens = (rows[:12] for rows in _parity.probes(clip))
    wanted, found = TorchEncoder(clip), exporter.load(bundle, threads=1)
    torch.testing.assert_close(
        found.encode_image(pixels), wanted.encode_image(pixels), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        found.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=1e-4
    )


def test_repeated_calls_give_the_same_bits(bundle: Path, clip: Clip) -> None:
    pixels, _ = _parity.probes(clip)
    encoder = exporter.load(bundle, threads=1)
    first = encoder.encode_image(pixels[:6])
    for _ in range(3):
        assert torch.equal(encoder.encode_image(pixels[:6]), first)


@torch.no_grad()
def test_pooling_takes_the_first_end_mark() -> None:
    """Some tokenizers pad with the end mark."""
    ids = torch.full((1, 16), END)
    ids[0, :4] = torch.tensor([START, 5, 7, 9])
    pooling = layers._EndPooling(300, 16, END)
    x = torch.randn(1, 16, 8)
    torch.testing.assert_close(pooling(x, ids), x[:, 4])


@torch.no_grad()
def test_half_precision_changes_the_pooled_token_by_rounding_only(clip: Clip) -> None:
    tokens = clip.tokenizer(["a red square", "", "many words " * 9])
    unit = copy.deepcopy(layers.rewritten(clip, "text")).half()
    for row in tokens.split(1):
        torch.testing.assert_close(
            unit(row).float(), TorchEncoder(clip).encode_text(row), rtol=0, atol=4e-3
        )


@torch.no_grad()
def test_attention_over_a_map_is_rewritten_without_changing_it() -> None:
    fastvit = pytest.importorskip("timm.models.fastvit")
    attention = fastvit.Attention(32, head_dim=8).eval()
    x = torch.randn(1, 32, 3, 5)
    rewritten = layers._split()[fastvit.Attention](attention)
    torch.testing.assert_close(rewritten(x), attention(x), rtol=0, atol=1e-6)


def test_half_precision_files_are_half_as_large(bundle: Path, tmp_path: Path) -> None:
    exporter.write(tiny_clip(), exporter.Config(precision="fp16"), tmp_path / "out")
    for tower in ("image", "text"):
        half, whole = (folder / f"{tower}.bin" for folder in (tmp_path / "out", bundle))
        assert half.stat().st_size < 0.6 * whole.stat().st_size


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3


@pytest.mark.parametrize(("method", "guard"), [("guarded", 0), ("guarded", 4), ("cross", 0)])
def test_towers_that_choose_tokens_say_what_torch_says(
    method: Method, guard: int, tmp_path: Path
) -> None:
    """ncnn has neither TopK nor comparison nor gather."""
    sites = (Site(layer=0, keep=12), Site(layer=1, keep=8))
    clip = reduced(tiny_clip(layers=3), Reduction(method=method, sites=sites, guard=guard))
    clip = pooled_last(clip)
    assert clip.model.config.text.last_block == "pooled"
    exporter.write(clip, exporter.Config(), tmp_path / "bundle")  # or GateFailed
    pixels, tokens = (rows[:8] for rows in _parity.probes(clip))
    wanted, found = TorchEncoder(clip), exporter.load(tmp_path / "bundle", threads=1)
    for name, rows in (("encode_image", pixels), ("encode_text", tokens)):
        torch.testing.assert_close(
            getattr(found, name)(rows), getattr(wanted, name)(rows), rtol=0, atol=1e-4
        )
    assert clip.model.config.text.last_block == "pooled"  # the file alone computes all tokens


def test_a_layer_that_ncnn_lacks_is_named(tmp_path: Path) -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argsort(dim=-1).float()

    with pytest.raises(Unavailable, match="ncnn has no layer for the image tower's"):
        exporter.convert(Sorts(), torch.zeros(1, 4), tmp_path, "image", half=False)


def test_an_end_mark_that_is_not_the_highest_id_is_unavailable(clip: Clip, tmp_path: Path) -> None:
    contract = clip.tokenizer.contract.model_copy(update={"end_id": PAD})
    tokenizer = type(clip.tokenizer)(clip.tokenizer.tokenizer, contract)
    with pytest.raises(Unavailable, match="highest id, 299"):
        exporter.write(replace(clip, tokenizer=tokenizer), exporter.Config(), tmp_path / "bundle")


def test_another_device_is_unavailable(bundle: Path) -> None:
    with pytest.raises(Unavailable, match="not on cuda"):
        exporter.load(bundle, device="cuda")
