"""Images of files and data sets as one tensor of bytes, by Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_GREY = ("1", "L", "LA")


def is_picture(value: Any) -> bool:
    """Whether it is one of Pillow's images, or the file of one."""
    return isinstance(value, Path) or (hasattr(value, "getbands") and hasattr(value, "convert"))


def opened(path: Path) -> Any:
    """The image in a file, the way up that its camera says.

    Raises:
        DataError: E218 no image, E219 without Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(
            "images are read by Pillow, which is not installed",
            code="E219",
            where=str(path),
            remedy="pip install 'lamina[demo]', or store arrays x and y in .npz files",
        ) from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"not to be read as an image: {error}", code="E218", where=str(path)) from error


def stacked(
    pictures: Iterable[Any], n: int, place: Callable[[int], str], size: tuple[int, int] | None, grey: bool | None = None
) -> NDArray[np.uint8]:
    """uint8 [n, H, W, C].

    Args:
        size: (height, width) that all are scaled to; None: all have one.
        grey: one channel or three; None: one where all images are grey.

    Raises:
        DataError: E215 images of different sizes, E218 one that cannot be read or has more than 8 bits.
    """
    pixels: NDArray[np.uint8] | None = None
    coloured = None if grey is None else not grey
    for i, value in enumerate(pictures):
        picture = opened(value) if isinstance(value, Path) else value
        if picture.mode.startswith(("I", "F")):
            message = f"an image of mode {picture.mode}: expected 8 bits a channel"
            raise DataError(message, code="E218", where=place(i), remedy="convert it first")
        if grey is None and not coloured:
            coloured = picture.mode not in _GREY
        picture = picture.convert("RGB" if coloured else "L")
        if size is not None and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), resample=2)  # bilinear
        one = np.asarray(picture).reshape(picture.height, picture.width, -1)
        if pixels is None:
            pixels = np.empty((n, *one.shape), dtype=np.uint8)
        if pixels.shape[3] < one.shape[2]:
            pixels = pixels.repeat(3, axis=3)  # all before were grey
        if one.shape != pixels.shape[1:]:
            high, wide, _ = pixels.shape[1:]
            raise DataError(
                f"an image of {one.shape[0]} x {one.shape[1]} pixels, the first has {high} x {wide}",
                code="E215",
                where=place(i),
                remedy=f"size=({high}, {wide}) scales all images to that height and width",
            )
        pixels[i] = one
    assert pixels is not None  # nobody stacks nothing
    return pixels
