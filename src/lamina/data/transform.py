"""What happens to a batch inside the step: from the stored examples to what the model is given.

A transform is applied to the examples of one minibatch, on the device where they are. With a generator it may augment
(training); without one it must not (evaluation, probes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lamina.errors import DataError, expect

Batch = Tensor | dict[str, Tensor]


class Transform(Protocol):
    """A function of a batch; `generator` (on the CPU) is None in evaluation.

    One without random numbers may say so by an attribute `augments` that is False: then the examples of several clients
    are handed to it at once.
    """

    def __call__(self, x: Batch, generator: torch.Generator | None) -> Batch: ...


@dataclass(frozen=True)
class Identity:
    """Passes floats and integers as they are; uint8 of three or more dimensions becomes float32 in [0, 1].

    So images stored as bytes work without a word, while tokens and byte strings (uint8 [B] or [B, length]) stay what
    they are. A dict is treated entry by entry. The order of the axes is kept.
    """

    augments: ClassVar[bool] = False

    def __call__(self, x: Batch, generator: torch.Generator | None) -> Batch:
        if isinstance(x, dict):
            return {name: _unit(value) for name, value in x.items()}
        return _unit(x)


@dataclass(frozen=True)
class Images:
    """Normalises byte images and, in training, crops and mirrors them.

    uint8 [B, H, W, C] becomes float32 [B, C, H, W] = (x / 255 - mean) / std, a permuted view of [B, H, W, C] with the
    strides (H*W*C, 1, W*C, C) for every C, so that convolutions choose their channels-last kernel.

    With a generator: a crop at a uniform offset after padding by `crop` black pixels (0 before normalisation) on every
    side, then a mirror image with probability 1/2. Drawn for the whole batch, in this order: row offsets, column
    offsets (if crop > 0), mirrors (if flip).

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        crop: pixels of padding before the random crop back to H x W.
        flip: mirror left to right.
        channels_first_input: x comes as uint8 [B, C, H, W]; costs a copy per batch.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    channels_first_input: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        expect(
            len(self.mean) == len(self.std) > 0,
            f"mean has {len(self.mean)} channels, std {len(self.std)}: expected one number per channel in both",
            where="Images",
        )
        expect(min(self.std) > 0, f"std={self.std}: expected positive numbers", where="Images")
        expect(self.crop >= 0, f"crop={self.crop}: expected a number of pixels >= 0", where="Images")

    @property
    def augments(self) -> bool:
        return bool(self.crop or self.flip)

    def __call__(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """Raises DataError E215 unless x is a uint8 tensor of four dimensions with as many channels as mean."""
        if isinstance(x, dict):
            raise DataError("Images was given a dict: expected one uint8 tensor", code="E215", where="Images")
        axis = 1 if self.channels_first_input else 3
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[axis] != len(self.mean):
            layout = "B, C, H, W" if self.channels_first_input else "B, H, W, C"
            raise DataError(
                f"Images was given {_describe(x)}: expected torch.uint8 [{layout}] with C = {len(self.mean)}",
                code="E215",
                where="Images",
                remedy="store images as bytes in that layout, or set channels_first_input= and mean= to fit",
            )
        if self.channels_first_input:
            x = x.permute(0, 2, 3, 1)
        x = x.contiguous()
        if generator is not None and self.augments:
            x = self._augmented(x, generator)
        batch, height, width, channels = x.shape
        scale, shift = _affine(self.mean, self.std, height * width, x.device)
        pixels = x.view(batch, height * width * channels).to(torch.float32)
        torch.addcmul(shift, pixels, scale, out=pixels)
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:  # uint8 [B, H, W, C] -> the same
        batch, height, width, channels = x.shape
        pad, copies = self.crop, 2 if self.flip else 1
        row = (width + 2 * pad) * channels  # bytes of a padded row
        image = (height + 2 * pad) * row
        # All padded images one after the other, mirrored ones behind the others. An image to be cut out begins at some
        # pixel of this and takes `width` pixels of `height` successive rows: one index_select over overlapping windows.
        padded = x.new_zeros(copies, batch, height + 2 * pad, width + 2 * pad, channels)
        inner = padded[:, :, pad : pad + height, pad : pad + width]
        inner[0] = x
        if self.flip:
            inner[1] = x.flip(2)
        first = torch.arange(batch) * (image // channels)
        if pad:
            down, right = torch.randint(2 * pad + 1, (2, batch), generator=generator)
        else:
            down = right = torch.zeros(batch, dtype=torch.int64)
        if self.flip:
            mirror = torch.randint(2, (batch,), generator=generator)
            first += mirror * (batch * image // channels)
            right = torch.where(mirror.bool(), 2 * pad - right, right)  # crop first, mirror the crop
        first += down * (row // channels) + right
        starts = (copies * batch * image - (height - 1) * row - width * channels) // channels + 1
        windows = padded.as_strided((starts, height, width * channels), (channels, row, 1))
        return windows.index_select(0, first.to(x.device)).view(batch, height, width, channels)


@dataclass(frozen=True, eq=False)
class Windows:
    """Cuts windows out of one long text: int start offsets [B] become int64 [B, length].

    Args:
        text: uint8 [n], one entry per character (any integer type will do). It should lie on the device of the
            batches; elsewhere it is copied there at every call.
        length: characters per window.
    """

    augments: ClassVar[bool] = False
    text: Tensor
    length: int

    def __post_init__(self) -> None:
        expect(
            self.text.ndim == 1 and not self.text.is_floating_point(),
            f"text is {_describe(self.text)}: expected integers in one dimension",
            where="Windows",
        )
        expect(
            1 <= self.length <= len(self.text),
            f"length={self.length}: expected 1 <= length <= {len(self.text)}, the length of the text",
            where="Windows",
        )

    def __call__(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """Raises DataError E215 unless x is an integer vector; IndexError when a window ends behind the text."""
        if isinstance(x, dict) or x.ndim != 1 or x.is_floating_point():
            raise DataError("Windows was given something else than an integer vector", code="E215", where="Windows")
        at = x.to(torch.int64)[:, None] + torch.arange(self.length, device=x.device)  # [B, length]
        return self.text.to(x.device).index_select(0, at.view(-1)).view(at.shape).to(torch.int64)


def _unit(x: Tensor) -> Tensor:
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 and x.ndim >= 3 else x


@lru_cache(maxsize=32)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 [pixels * C] each, so that (x / 255 - mean) / std = x * scale + shift along whole rows.

    Written out per pixel because a broadcast over a last axis of 3 does not vectorise (4 times slower).
    """
    means, stds = torch.tensor([mean, std], dtype=torch.float64, device="cpu")
    scale = (1 / (255 * stds)).to(torch.float32).repeat(pixels)
    shift = (-means / stds).to(torch.float32).repeat(pixels)
    return scale.to(device), shift.to(device)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
