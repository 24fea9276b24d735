"""Contrastive pretraining on tiny real data."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from compress import losses
from compress.errors import PocketclipError
from compress.phases import Phase
from compress.stages.pretrain import Config, Pretraining, run
from compress.work import Work

SHORT = {
    "batch_size": 8,
    "warmup_steps": 2,
    "lr": 3e-3,
    "log_every": 1,
    "bank_every": 5,
    "checkpoint_every": 5,
}


def test_it_learns_the_names_of_eight_pictures(
    work: Work, tmp_path: Path, loss_at: Callable[[Path, int], float]
) -> None:
    phases = (Phase(until=0.3, image_size=16), Phase(until=0.6, image_size=32, keep=0.5))
    cfg = Config(steps=60, phases=phases, drop_path=0.1, optimizer="muon", **SHORT)
    result = run(work, cfg, tmp_path)
    assert loss_at(tmp_path, 59) < 0.8 * loss_at(tmp_path, 0)
    assert result.clip.provenance[-1]["step"] == "pretrain"


def test_the_loss_is_contrastive_plus_that_of_the_bank(work: Work) -> None:
    cfg = Config(bank_weight=0.5, bank_smoothing=0.2, max_scale=30.0, **SHORT)
    model = work.clip.model
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    pixels, tokens = torch.randn(4, 3, 32, 32), work.clip.tokenizer(["a", "bc", "def", "g"])
    bank, groups = F.normalize(torch.randn(6, 16), dim=-1), torch.tensor([3, 0, 5, 1])
    loss, figures = Pretraining(model, cfg)(pixels, None, tokens, bank, groups, nullcontext())
    u = F.normalize(model.encode_image(pixels), dim=-1)
    v = F.normalize(model.encode_text(tokens), dim=-1)
    logits = 30.0 * u @ bank.T
    right, others = logits.log_softmax(1)[range(4), groups], logits.log_softmax(1).mean(1)
    expected = losses.clip_info_nce(u, v, 30.0) - 0.5 * (0.8 * right + 0.2 * others).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert figures["bank_top1"] == float((logits.argmax(1) == groups).float().mean())


def test_smaller_passes_change_nothing_but_memory(work: Work, tmp_path: Path) -> None:
    found = [
        run(work, Config(steps=2, precision="fp32", micro_batch_size=n, **SHORT), tmp_path / str(n))
        for n in (None, 3)
    ]
    one, two = (result.clip.model.state_dict() for result in found)
    for name, value in one.items():
        # AdamW divides by small second moments: rounding grows to a part of the rate
        torch.testing.assert_close(two[name], value, rtol=0, atol=3e-4, msg=name)


def test_a_phase_that_does_not_fit_the_patches_is_refused(work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=2, phases=(Phase(until=1, image_size=20),), **SHORT)
    with pytest.raises(PocketclipError, match=r"phases\[0\].image_size: 20 is no multiple"):
        run(work, cfg, tmp_path)


def test_resume_gives_the_unbroken_runs_weights(work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=8, drop_path=0.2, **SHORT)
    whole = {k: v.clone() for k, v in run(work, cfg, tmp_path).clip.model.state_dict().items()}
    resumed = run(work, cfg, tmp_path).clip.model.state_dict()  # goes on from step 5
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
