"""Core ML packages: what the converted program computes, and what its weights are."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip

from compress.clip import Clip, TorchEncoder
from compress.schedule import Reduction, Site
from compress.stages.prune_tokens import reduced
from export import Unavailable, _bundle, _mil, _parity
from export._mil_operators import OPERATORS
from export._verify import check_files, read

pytest.importorskip("coremltools")
from export import coreml as exporter

MAC = platform.system() == "Darwin"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "coreml"
    exporter.write(tiny_clip(), exporter.Config(), folder)
    return folder


@pytest.fixture(scope="module")
def programs(bundle: Path) -> dict[str, _mil.Program]:
    return {tower: _mil.Program(bundle / f"{tower}.mlpackage") for tower in _bundle.TOWERS}


def test_bundle_says_that_it_was_simulated(bundle: Path) -> None:
    described = read(bundle)
    check_files(bundle, described["files"])
    assert described["executed"] is MAC
    assert MAC or described["unavailable"] == "Core ML predicts on macOS only"
    for tower in ("image", "text"):
        assert described["parity"][tower]["worst_cosine"] > 0.999
        assert _bundle.digest(described["files"], described[tower]["file"])


def test_the_image_tower_takes_pictures_and_the_text_tower_int32(
    programs: dict[str, _mil.Program], bundle: Path
) -> None:
    [picture], [tokens] = (programs[tower].spec.description.input for tower in ("image", "text"))
    kind = picture.type.imageType
    assert (picture.name, kind.width, kind.height) == ("pixels", 32, 32)
    assert type(kind).ColorSpace.Name(kind.colorSpace) == "RGB"
    ids = tokens.type.multiArrayType
    assert (tokens.name, list(ids.shape)) == ("tokens", [1, 16])
    assert type(ids).ArrayDataType.Name(ids.dataType) == "INT32"
    described = json.loads((bundle / "bundle.json").read_text())
    assert described["image"]["input"]["in_graph"] == ["rescale", "mean", "std"]


def test_outputs_are_float32_and_nothing_is_infinite(programs: dict[str, _mil.Program]) -> None:
    for tower, program in programs.items():
        [output] = program.spec.description.output
        kind = output.type.multiArrayType
        assert output.name == f"{tower}_embedding"
        assert type(kind).ArrayDataType.Name(kind.dataType) == "FLOAT32"
        for value in program.constants.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert torch.isfinite(value).all()


def test_the_program_holds_the_model_s_weights(
    programs: dict[str, _mil.Program], clip: Clip
) -> None:
    """Each matrix of the torch model is there, to half precision, whatever its layout."""
    for tower in ("image", "text"):
        constants = [
            value for value in programs[tower].constants.values() if isinstance(value, torch.Tensor)
        ]
        for name, weight in getattr(clip.model, tower).named_parameters():
            if weight.dim() == 2 and "position" not in name:
                wanted = weight.detach().half().float()
                assert any(torch.equal(found, wanted) for found in constants), name


def test_standard_deviations_that_differ_are_folded_exactly(clip: Clip) -> None:
    """Within 0.3 %: one step of the last bit of pixels in half precision."""
    preprocess = clip.preprocess.model_copy(
        update={"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.2, 0.35)}
    )
    pixels, _ = _parity.probes(clip)
    wanted = clip.model.image(pixels[:4])
    tower = tiny_clip().model.image
    assert exporter.fold_std_(tower, preprocess) is None
    mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
    centred = _mil.raw(pixels[:4], preprocess) / 255 - mean
    torch.testing.assert_close(tower(centred), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "least"), [("w8", 0.998), ("w4", 0.8)])
def test_compressed_weights_are_those_that_the_cosine_is_of(
    bundle: Path,
    programs: dict[str, _mil.Program],
    clip: Clip,
    tmp_path: Path,
    precision: str,
    least: float,
) -> None:
    """On the image tower alone; coremltools leaves matrices of up to 2048 weights whole."""
    import coremltools as ct

    cfg = exporter.Config(precision=precision)
    whole = ct.models.MLModel(str(bundle / "image.mlpackage"), skip_model_load=True)
    exporter.compressed(whole, cfg).save(str(tmp_path / "image.mlpackage"))
    program = _mil.Program(tmp_path / "image.mlpackage")
    kinds = {op.type for op in operations(program)}
    assert any(kind.startswith("constexpr_") for kind in kinds)
    pixels = _parity.probes(clip)[0][:6]
    rows = _mil.raw(pixels, clip.preprocess).split(1)
    found, in_half = (
        torch.cat([p.run(pixels=row)["image_embedding"] for row in rows])
        for p in (program, programs["image"])
    )
    assert F.cosine_similarity(found, TorchEncoder(clip).encode_image(pixels)).min() > least
    assert (found - in_half).abs().max() > 1e-4


def operations(program: _mil.Program) -> list:
    main = program.spec.mlProgram.functions["main"]
    return list(main.block_specializations[main.opset].operations)


def test_readme_code_is_python(bundle: Path) -> None:
    """It needs a Mac to run."""
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "example.py", "exec")
    assert "MLModel" in code


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        package = tmp_path / name
        package.mkdir()
        random = np.random.default_rng().integers(1 << 30)
        items = {f"ID{random}": {"path": "model"}, f"ID{random + 1}": {"path": "weights"}}
        manifest = {"itemInfoEntries": items, "rootModelIdentifier": f"ID{random}"}
        (package / "Manifest.json").write_text(json.dumps(manifest))
        exporter.name_by_content_(package)
    one, other = ((tmp_path / name / "Manifest.json").read_text() for name in ("one", "other"))
    assert one == other
    about = json.loads(one)
    assert about["itemInfoEntries"][about["rootModelIdentifier"]]["path"] == "model"


@pytest.mark.skipif(MAC, reason="Core ML predicts here")
def test_prediction_away_from_macos_is_unavailable(bundle: Path) -> None:
    with pytest.raises(Unavailable, match="Core ML predicts on macOS only"):
        exporter.load(bundle)


@pytest.mark.skipif(not MAC, reason="Core ML predicts on macOS only")
def test_core_ml_says_what_the_simulation_says(bundle: Path, clip: Clip) -> None:
    pixels, tokens = (rows[:6] for rows in _parity.probes(clip))
    ours = _mil.SimulatedEncoder(bundle, clip.preprocess)
    theirs = exporter.load(bundle, device="cpu")
    image = F.cosine_similarity(ours.encode_image(pixels), theirs.encode_image(pixels))
    text = F.cosine_similarity(ours.encode_text(tokens), theirs.encode_text(tokens))
    assert min(image.min(), text.min()) > 0.999


def test_operators_equal_torch() -> None:
    x = torch.randn(2, 6, 4)
    slice_, gather = OPERATORS["slice_by_index"], OPERATORS["gather"]
    begin, end = torch.tensor([0, 1, 0]), torch.tensor([2, 5, 0])
    masks = {"end_mask": torch.tensor([False, False, True])}
    alone = {"squeeze_mask": torch.tensor([True, False, False])}
    torch.testing.assert_close(slice_(x, begin, end, **masks), x[:, 1:5])
    torch.testing.assert_close(slice_(x, begin, end, **masks, **alone), x[0, 1:5])
    picked = torch.tensor([[2, 0], [1, 1]])
    torch.testing.assert_close(gather(x, picked, axis=1), x[:, picked])
    torch.testing.assert_close(
        OPERATORS["one_hot"](torch.tensor([2, 0]), 3), torch.tensor([[0, 0, 1], [1, 0, 0]])
    )
    assert torch.equal(OPERATORS["fill_like"](x, 2), torch.full((2, 6, 4), 2))
    assert torch.equal(OPERATORS["fill"](torch.tensor([3, 1]), 0.5), torch.full((3, 1), 0.5))
    weight, bias = torch.randn(5, 3, 2, 2), torch.randn(5)
    image = torch.randn(1, 3, 8, 8)
    found = OPERATORS["conv"](
        image, weight, bias, torch.tensor([2, 2]), "custom", torch.tensor([1, 0, 0, 1])
    )
    wanted = F.conv2d(F.pad(image, (0, 1, 1, 0)), weight, bias, 2)
    torch.testing.assert_close(found, wanted)


def test_a_token_reduced_tower_agrees(tmp_path: Path) -> None:
    sites = (Site(layer=0, keep=12), Site(layer=1, keep=8))
    clip = reduced(
        tiny_clip(layers=3), Reduction(method="guarded", sites=sites, guard=4, proportional=True)
    )
    # Of a narrow random tower, where a near tie may fall to the other token in half precision.
    exporter.write(clip, exporter.Config(min_cosine=0.99), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert about["parity"]["image"]["worst_cosine"] > 0.99
