"""Which column of a table is what: the arguments that all readers of tables share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from lamina.data.tables import Header, listed, no_column
from lamina.data.transform import Transform
from lamina.errors import DataError, expect, is_number, meant


class TableArguments(TypedDict, total=False):
    """By name, as documented at `ClientData.from_csv`."""

    x: str | Sequence[str] | None
    y: str | Sequence[str]
    client: str | None
    clients: int | None
    partition: str
    seed: int
    classes: int | Sequence[str | int] | None
    regression: bool
    categorical: Sequence[str]
    standardise: bool
    encode: Callable[[list[Any]], Any] | None
    size: tuple[int, int] | None
    test: Any
    test_share: float
    client_tests: bool
    transform: Transform | None
    name: str | None


@dataclass(frozen=True)
class Reading:
    """`TableArguments` with their defaults, checked."""

    y: str | Sequence[str]
    x: str | Sequence[str] | None = None
    client: str | None = None
    clients: int | None = None
    partition: str | None = None
    seed: int = 0
    classes: int | Sequence[str | int] | None = None
    regression: bool = False
    categorical: Sequence[str] = ()
    standardise: bool = False
    encode: Callable[[list[Any]], Any] | None = None
    size: tuple[int, int] | None = None
    test: Any = None
    test_share: float = 0.0
    client_tests: bool = False
    transform: Transform | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for key in ("clients", "partition"):
            expect(
                self.client is None or getattr(self, key) is None,
                f"client={self.client!r} and {key}={getattr(self, key)!r}: expected one of them",
                remedy="client= makes a client of every value of a column; without it, clients=10, partition='iid'",
            )
        expect(
            is_number(self.test_share, 0, 1),
            f"test_share={self.test_share!r}: expected 0 <= test_share < 1",
            remedy="0.2 holds out a fifth of every client's examples",
        )
        expect(
            self.test is None or not self.test_share,
            f"test={self.test!r} and test_share={self.test_share}: expected one of them",
        )
        expect(
            not self.client_tests or self.test is not None or self.test_share > 0,
            "client_tests=True: expected test= or test_share= too",
        )
        expect(
            self.encode is None or isinstance(self.x, str),
            f"encode= with x={self.x!r}: expected the name of one column in x=",
            remedy="encode is called with the list of that column's values, and gives an array of as many rows",
        )
        expect(self.encode is None or not self.categorical, "encode= and categorical=: expected one of them")
        expect(
            not isinstance(self.categorical, str),
            f"categorical={self.categorical!r}: expected a list of columns",
            remedy=f"categorical=[{self.categorical!r}]",
        )
        expect(not self.regression or self.classes is None, "classes= and regression=True: expected one of them")
        expect(
            self.regression or isinstance(self.y, str),
            f"y={self.y!r}: expected the name of one column, of labels",
            remedy="several columns are the targets of a regression=True",
        )
        expect(
            self.classes is None or not isinstance(self.classes, str),
            f"classes={self.classes!r}: expected how many, or a list of all labels",
        )

    @property
    def targets(self) -> list[str]:
        return [self.y] if isinstance(self.y, str) else list(self.y)

    def inputs(self, header: Header) -> list[str]:
        if self.x is None:
            return [name for name in header if name not in (*self.targets, self.client)]
        return [self.x] if isinstance(self.x, str) else list(self.x)

    def choose(self, header: Header, source: str, tested: bool = False) -> Mapping[str, bool]:
        """Of every column that is wanted, whether it holds numbers.

        Args:
            tested: of a test set, which needs no column of clients.
        """
        inputs, targets = self.inputs(header), self.targets
        client = [] if self.client is None or (tested and self.client not in header) else [self.client]
        for name in (*inputs, *targets, *client):
            if name not in header:
                raise no_column(name, header, source)
        if not inputs:
            raise DataError("no column is left for x", code="E222", where=source, remedy=f"columns: {listed(header)}")
        both = sorted({*inputs} & {*targets, self.client})
        expect(not both, f"x={', '.join(map(repr, both))}: it is the label or the client already", where=source)
        strangers = sorted({*self.categorical} - {*inputs})
        expect(not strangers, f"categorical={strangers}: expected columns of x", remedy=f"x is {listed(inputs)}")
        texts = inputs if self.encode else self.categorical
        return {
            **{name: name not in texts for name in inputs},
            **dict.fromkeys(targets, self.regression),
            **dict.fromkeys(client, False),
        }


def reading(who: str, how: Mapping[str, Any]) -> Reading:
    """Raises TypeError for an argument that is missing or that no reader takes, as a plain call would."""
    known = [field.name for field in fields(Reading)]
    for key in how:
        if key not in known:
            raise TypeError(f"{who}() got an unexpected keyword argument {key!r}.  {meant(key, known)}".rstrip(". "))
    if how.get("y") is None:
        raise TypeError(f"{who}() needs y=, the column of the labels")
    return Reading(**how)
