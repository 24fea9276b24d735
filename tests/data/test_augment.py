"""Augmentation: what is drawn is what is applied, however often."""

import torch

from compress.data import augment
from compress.data.augment import NUM_PARAMETERS, Augment, plain, replay
from compress.preprocess import Preprocess

PLAIN = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
OFF = Augment(**dict.fromkeys(Augment.model_fields, 0.0))


def pictures(num: int = 3, side: int = 32) -> torch.Tensor:
    """Opaque noise, smooth enough that resampling by nothing changes nothing."""
    return torch.randint(0, 256, (num, 4, side, side), dtype=torch.uint8)


def test_nothing_drawn_changes_nothing() -> None:
    images = pictures()
    images[:, 3] = 255
    parameters = OFF.draw(3, torch.Generator().manual_seed(0))
    pixels = replay(images, parameters, 32, PLAIN)
    expected = (images[:, :3].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


def test_transparent_pixels_show_the_background() -> None:
    images = pictures()
    images[:, 3] = 0
    parameters = OFF.draw(3, torch.Generator().manual_seed(0))
    white = torch.full((3, 3, 32, 32), (1 - 0.5) / 0.25)
    torch.testing.assert_close(replay(images, parameters, 32, PLAIN), white, rtol=0, atol=1e-4)


def test_replay_is_exact_and_independent_of_the_batch() -> None:
    images, strong = pictures(5), Augment(erase=1.0, edges=1.0, blur=1.0)
    parameters = strong.draw(5, torch.Generator().manual_seed(3))
    assert parameters.shape == (5, NUM_PARAMETERS)
    together = replay(images, parameters, 16, PLAIN)
    alone = torch.cat(
        [replay(images[i : i + 1], parameters[i : i + 1], 16, PLAIN) for i in range(5)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together.shape == (5, 3, 16, 16)


def test_each_part_does_something() -> None:
    images = pictures(64)
    base = replay(images, OFF.draw(64, torch.Generator().manual_seed(0)), 32, PLAIN)
    for name in Augment.model_fields:
        value = 20.0 if name == "rotate" else 0.5
        one = OFF.model_copy(update={name: value})
        pixels = replay(images, one.draw(64, torch.Generator().manual_seed(0)), 32, PLAIN)
        assert (pixels - base).abs().mean() > 1e-3, name


def test_plain_equals_the_preprocess_contract(  # no resize: the two agree to a rounding step
) -> None:
    from PIL import Image

    images = pictures(1)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(plain(images, 32, PLAIN)[0], PLAIN(picture), rtol=0, atol=0.02)


def test_outlines_fade_what_is_flat_and_leave_images_of_amount_0() -> None:
    flat = torch.full((3, 3, 8, 8), 0.4)
    drawn = augment._outlined(flat, torch.tensor([[0.0], [0.5], [1.0]]))
    assert torch.equal(drawn[0], flat[0])
    assert torch.allclose(drawn[1], flat[1])  # no edge to darken, and fading begins above 0.5
    assert torch.allclose(drawn[2], torch.ones(3, 8, 8))


def test_blur_spreads_a_dot_as_two_boxes_do() -> None:
    dot = torch.zeros(2, 3, 9, 9)
    dot[:, :, 4, 4] = 1.0
    soft = augment._blurred(dot, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(soft[0], dot[0])
    assert torch.allclose(soft[1, 0, 4, 2:7], torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]) * 3 / 81)
