"""Weight inheritance by least squares."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipConfig, ClipModel, initialise_
from compress.principal import fit_tower_, least_squares, principal_basis
from compress.stages.inherit import Config, Shape, VisionShape, inherit, run, shape
from compress.work import Work


def _likeness(student: ClipModel, teacher: ClipModel, tower: str, inputs: Tensor) -> float:
    """Mean cosine of both models' embeddings, each centred: how alike they order inputs."""
    with torch.no_grad():
        found, wanted = (getattr(model, f"encode_{tower}")(inputs) for model in (student, teacher))
    centred = [x - x.mean(dim=0) for x in (found, wanted)]
    return float(F.cosine_similarity(*centred).mean())


def _drawn(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels and tokens: pictures of smooth noise, texts of random words and an end."""
    generator = torch.Generator().manual_seed(seed)
    pixels = F.interpolate(torch.randn(num, 3, 4, 4, generator=generator), (32, 32))
    tokens = torch.zeros(num, 12, dtype=torch.long)
    for row in tokens:
        length = int(torch.randint(2, 11, (), generator=generator))
        row[:length] = torch.randint(1, 50, (length,), generator=generator)
        row[length] = 63
    return pixels, tokens


def _teacher() -> ClipModel:
    """Random weights, with norms and biases that do something."""
    tower = {"width": 32, "head_width": 8, "heads": (4, 4), "mlp_width": (64, 64)}
    config = {"embed_dim": 16, "vision": {"image_size": 32, "patch_size": 8, **tower}}
    config["text"] = {"vocab_size": 64, "context_length": 12, **tower}
    torch.manual_seed(0)
    model = ClipModel(ClipConfig.model_validate(config))
    initialise_(model)
    for name, value in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            value.data += 0.2 * torch.randn_like(value)
    return model.eval()


def _student(teacher: ClipModel, cfg: Config, fitted: bool = True) -> ClipModel:
    student = inherit(teacher, shape(teacher.config, cfg)).eval()
    if fitted:
        layers = [round(n) for n in torch.linspace(0, 1, student.config.text.num_layers).tolist()]
        for tower, inputs in zip(("image", "text"), _drawn(512, seed=1)):
            fit_tower_(getattr(student, tower), getattr(teacher, tower), layers, inputs)
    return student


def test_basis_keeps_the_directions_that_vary_and_adds_up_to_nothing() -> None:
    torch.manual_seed(0)
    varying = torch.linalg.qr(torch.randn(16, 3))[0]
    varying = torch.linalg.qr(varying - varying.mean(dim=0))[0]
    stream = torch.randn(200, 3) @ varying.T
    basis = principal_basis([stream], 4)  # [4, 16], rank 3
    torch.testing.assert_close(basis.sum(dim=0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.T @ basis, varying @ varying.T, atol=1e-4, rtol=0)


def test_least_squares_finds_the_map_that_made_the_data() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(4000, 8) + 3
    found_weight, found_bias = least_squares(x, x @ weight.T + bias)
    torch.testing.assert_close(found_weight, weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found_bias, bias, atol=5e-2, rtol=1e-2)


def test_a_student_of_the_teachers_size_computes_the_same() -> None:
    teacher = _teacher()
    student = _student(teacher, Config())
    for tower, inputs in zip(("image", "text"), _drawn(64, seed=2)):
        assert _likeness(student, teacher, tower, inputs) > 0.98, tower


def test_a_narrow_student_is_nearer_to_its_teacher_than_slices_are() -> None:
    teacher = _teacher()
    cfg = Config(vision=VisionShape(width=16, heads=2), text=Shape(width=16, heads=2))
    fitted, slices = _student(teacher, cfg), _student(teacher, cfg, fitted=False)
    for tower, inputs in zip(("image", "text"), _drawn(256, seed=2)):
        near, far = (_likeness(s, teacher, tower, inputs) for s in (fitted, slices))
        assert near > far + 0.2, (tower, near, far)


def test_stage_fits_the_towers_that_became_smaller(work: Work, tmp_path: Path) -> None:
    cfg = Config(weights="principal", vision=VisionShape(width=16), num_samples=8)
    student, teacher = run(work, cfg, tmp_path).clip.model, work.clip.model
    slices = run(work, cfg.model_copy(update={"weights": "leading"}), tmp_path).clip.model
    assert not torch.equal(student.image.patch.weight, slices.image.patch.weight)
    for name, value in teacher.text.state_dict().items():
        assert torch.equal(student.text.state_dict()[name], value), name


def test_another_image_size_is_refused(work: Work, tmp_path: Path) -> None:
    cfg = Config(weights="principal", vision=VisionShape(width=16, image_size=16))
    with pytest.raises(PocketclipError, match=r"cannot change vision\.image_size"):
        run(work, cfg, tmp_path)


def test_a_tower_with_other_parts_is_refused_with_the_remedy(work: Work, tmp_path: Path) -> None:
    model = work.clip.model
    vision = model.config.vision.model_copy(update={"pooling": "class", "norm_after_pooling": True})
    torch.manual_seed(0)
    other = ClipModel(model.config.model_copy(update={"vision": vision}))
    clip: Clip = replace(work.clip, model=other.eval())
    cfg = Config(weights="principal", vision=VisionShape(width=16))
    with pytest.raises(PocketclipError, match=r"a norm after pooling .*image.*use leading"):
        run(replace(work, clip=clip), cfg, tmp_path)
