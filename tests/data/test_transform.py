"""Transforms: exact values against the plain pipeline, strides, and what a generator decides."""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina.data.transform import Identity, Images, Windows
from lamina.errors import ConfigError, DataError
from lamina.random import generator

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    shape = (batch, height, width, channels)
    return torch.randint(1, 256, shape, generator=generator(0, "pixels"), dtype=torch.uint8)  # 0 is padding alone


def raw(out: torch.Tensor) -> torch.Tensor:
    """Back from Images((0, ...), (1, ...)) to bytes [B, H, W, C]."""
    return out.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)


# ---- Identity


def test_identity_scales_images_and_leaves_everything_else():
    image = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(Identity()(image, None), torch.tensor([[[0, 0.2, 1]]]))
    for x in (torch.tensor([[7]], dtype=torch.uint8), torch.tensor([7]), torch.zeros(2, 3, 4, 4)):
        assert Identity()(x, generator(0, "t")) is x
    out = Identity()({"image": image, "ids": torch.tensor([3])}, None)
    assert out["image"].dtype == torch.float32
    assert out["ids"].tolist() == [3]


# ---- Images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_images_are_normalised_as_usual(channels: int, first: bool):
    x = pixels(5, 6, 7, channels)
    transform = Images(MEAN[:channels], STD[:channels], channels_first_input=first)
    out = transform(x.permute(0, 3, 1, 2).contiguous() if first else x, None)
    mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
    expected = ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)  # two roundings instead of four


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("training", [False, True])
def test_images_have_channels_last_strides_for_every_number_of_channels(channels: int, batch: int, training: bool):
    out = Images(MEAN[:channels], STD[:channels], crop=2, flip=True)(
        pixels(batch, 6, 7, channels), generator(0, "t") if training else None
    )
    assert out.shape == (batch, channels, 6, 7)
    assert out.stride() == (6 * 7 * channels, 1, 7 * channels, channels)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_does_not_augment():
    x = pixels(4, 5, 5, 3)
    torch.testing.assert_close(
        Images(MEAN, STD, crop=2, flip=True)(x, None), Images(MEAN, STD)(x, None), rtol=0, atol=0
    )


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_augmented_images_are_the_crops_and_mirrors_that_were_drawn(crop: int, flip: bool):
    batch, height, width = 64, 5, 6
    x = pixels(batch, height, width, 3)
    out = raw(Images((0, 0, 0), (1, 1, 1), crop=crop, flip=flip)(x, generator(0, "augment")))
    draws = generator(0, "augment")  # the documented order: rows, columns, mirrors
    down, right = torch.randint(2 * crop + 1, (2, batch), generator=draws) if crop else torch.zeros(2, batch).long()
    mirror = torch.randint(2, (batch,), generator=draws) if flip else torch.zeros(batch)
    padded = torch.nn.functional.pad(x, (0, 0, crop, crop, crop, crop))
    for i in range(batch):
        expected = padded[i, down[i] : down[i] + height, right[i] : right[i] + width]
        assert torch.equal(out[i], expected.flip(1) if mirror[i] else expected)


def test_padding_is_black_before_normalisation():
    x = torch.full((32, 4, 4, 1), 255, dtype=torch.uint8)
    out = Images((0.5,), (0.25,), crop=4)(x, generator(0, "t"))
    black = out < 0
    torch.testing.assert_close(out, torch.where(black, -2.0, 2.0))
    assert 0 < int(black.sum()) < out.numel()


def test_every_offset_and_both_mirrors_occur():
    x = torch.arange(1, 7, dtype=torch.uint8).view(1, 2, 3, 1).expand(3000, -1, -1, -1)
    out = raw(Images((0,), (1,), crop=1, flip=True)(x, generator(0, "t")))
    assert len({tuple(image.flatten().tolist()) for image in out}) == 3 * 3 * 2
    padded = torch.nn.functional.pad(x[0], (0, 0, 1, 1, 1, 1))
    seen = {tuple(image.flatten().tolist()) for image in out}
    for i, j, mirror in itertools.product(range(3), range(3), (False, True)):
        image = padded[i : i + 2, j : j + 3]
        assert tuple((image.flip(1) if mirror else image).flatten().tolist()) in seen


def test_augmentation_is_a_function_of_the_generator_and_leaves_the_store_alone():
    x = pixels(8, 5, 5, 3)
    before, transform = x.clone(), Images(MEAN, STD, crop=2, flip=True)
    one, same, other = (transform(x, generator(seed, "augment")) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4, 4, 3),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        {"a": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)},
    ],
)
def test_images_refuses_another_layout(x: object):
    with pytest.raises(DataError, match="E215"):
        Images(MEAN, STD)(x, None)


def test_images_refuses_impossible_numbers():
    for wrong in ({"mean": ()}, {"mean": (0.5,)}, {"std": (0.2, 0.0, 0.2)}, {"crop": -1}):
        with pytest.raises(ConfigError, match="Images"):
            Images(**{"mean": MEAN, "std": STD, **wrong})


# ---- Windows


def test_windows_are_cut_at_their_offsets():
    windows = Windows(torch.arange(10, dtype=torch.uint8), 3)
    out = windows(torch.tensor([0, 7]), None)
    assert out.dtype == torch.int64
    assert out.tolist() == [[0, 1, 2], [7, 8, 9]]
    with pytest.raises(IndexError):
        windows(torch.tensor([8]), None)


def test_windows_refuses_impossible_texts_and_lengths():
    text = torch.arange(10, dtype=torch.uint8)
    for wrong in ((text, 0), (text, 11), (text.view(2, 5), 2), (text.float(), 2)):
        with pytest.raises(ConfigError, match="Windows"):
            Windows(*wrong)
    with pytest.raises(DataError, match="E215"):
        Windows(text, 2)(torch.zeros(2), None)
