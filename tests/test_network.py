"""The virtual network's clock, worked out by hand; it changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina import config, runs
from lamina.network import Exchange, Link, Network
from lamina.units import RATES, SIZES, TIMES, quantity

NAMES = ("a", "b", "c")


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    """up 1 Mbit/s, down 4 Mbit/s, latency 50 ms, a step 10 ms. Client a: 0.1 + 8*250000/4e6 + 5*0.01 + 8*125000/1e6
    = 0.1 + 0.5 + 0.05 + 1.0 = 1.65 s. Client b: 0.1 + 0.5 + 0.5 + 0.01 = 1.11 s."""
    links = Network(up="1Mbit", down="4Mbit", latency="50ms", step="10ms").links(NAMES, 0)
    a, b = Exchange(0, 125_000, 250_000, 5), Exchange(1, 1_250, 250_000, 50)
    assert links.seconds([a]) == pytest.approx(1.65)
    assert links.seconds([b]) == pytest.approx(1.11)
    assert links.seconds([b, a]) == pytest.approx(1.65)
    assert links.seconds([]) == 0.0


def test_a_clients_own_link_is_drawn_once_between_the_ends() -> None:
    links = Network(up="1Mbit..20Mbit", down="5Mbit", latency=0.02).links([str(i) for i in range(200)], 3)
    drawn = [links.of(c).up for c in range(200)]
    assert drawn == [links.of(c).up for c in range(200)]
    assert min(drawn) >= 1e6
    assert max(drawn) <= 20e6
    assert len(set(drawn)) == 200
    below = sum(x < (1e6 * 20e6) ** 0.5 for x in drawn)  # evenly on a logarithmic scale
    assert 70 < below < 130
    assert {links.of(c).down for c in range(200)} == {5e6}


def test_a_file_says_some_clients_own_links(tmp_path: Path) -> None:
    file = tmp_path / "links.csv"
    file.write_text("client,up,step\nb,128kbit,\nc,,2s\n")
    links = Network(up="1Mbit", down="2Mbit", latency="0ms", clients=str(file)).links(NAMES, 0)
    assert links.of(0) == Link(1e6, 2e6, 0.0, 0.0)
    assert links.of(1) == Link(128e3, 2e6, 0.0, 0.0)
    assert links.of(2) == Link(1e6, 2e6, 0.0, 2.0)


@pytest.mark.parametrize(
    "text",
    ["client,speed\na,1\n", "client,up\nnobody,1Mbit\n", "client,up\na,fast\n", "up\n1Mbit\n"],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "links.csv"
    file.write_text(text)
    with pytest.raises(lamina.ConfigError, match="E103") as caught:
        Network(clients=str(file)).links(NAMES, 0)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"up": 0}, {"up": "0Mbit"}, {"down": "-1Mbit"}, {"up": "20Mbit..1Mbit"}, {"latency": "0ms..5ms"}, {"up": "5ms"},
     {"step": "soon"}, {"up": "1Mbit..2Mbit..3Mbit"}, {"latency": float("nan")}],
)  # fmt: skip
def test_an_impossible_link_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(lamina.ConfigError) as caught:
        Network(**values)  # type: ignore[arg-type]
    assert caught.value.where == f"network.{next(iter(values))}"


def test_units() -> None:
    assert quantity("5Mbit", RATES, "") == 5e6
    assert quantity("5 Mbit/s", RATES, "") == 5e6
    assert quantity("1MB/s", RATES, "") == 8e6
    assert quantity("40ms", TIMES, "") == 0.04
    assert quantity("1.5GB", SIZES, "") == 1.5e9
    assert quantity("2MiB", SIZES, "") == 2 * 1024**2
    assert quantity(7, SIZES, "") == 7.0


def test_the_clock_is_in_the_rows_and_changes_nothing_else(tmp_path: Path) -> None:
    keys = ["rounds=3", "cohort=2", "local.epochs=1", "engine=loop"]
    slow = [*keys, "network.up=1Mbit", "network.down=10Mbit", "network.latency=40ms"]
    made = {}
    for name, some in (("without", keys), ("with", slow)):
        loaded = config.load("quickstart", some)
        made[name] = runs.fit(config.build(loaded), loaded.rounds, tmp_path / name, config=loaded, progress=False)
    assert made["with"].info["final_sha256"] == made["without"].info["final_sha256"]
    assert [row.network_seconds for row in made["without"].records] == [None, None, None]
    row = made["with"].records[0]  # both clients are sent and send as much
    up, down = row.bytes_up / 2, row.bytes_down / 2
    each = 0.08 + 8 * down / 10e6 + 8 * up / 1e6
    assert row.network_seconds == pytest.approx(each)
    totals = [row.network_seconds for row in runs.Run.open(tmp_path / "with").records]
    assert totals == sorted(totals)
