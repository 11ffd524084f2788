"""A budget of bytes: what is chosen for it, and that the run then keeps within it."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina import config, runs
from lamina.inspect import within
from lamina.inspect.spending import _density, _step

SMALL = ["rounds=6", "cohort=3", "local.epochs=1", "engine=loop", "evaluate_every=6"]


@pytest.mark.parametrize(
    ("keys", "key", "budget"),
    [
        (["uplink=topk", "uplink.density=0.5", "method=errorfeedback"], "uplink.density", 2000),
        (["method=ssfl"], "method.density", 15000),
        (["method=fedluar"], "method.recycle", 12000),
        (["method=[fedprox,randommask]"], "method.1.density", 3000),
    ],
)
def test_the_run_keeps_within_its_budget(tmp_path: Path, keys: list[str], key: str, budget: int) -> None:
    loaded = config.load("quickstart", [*SMALL, *keys, f"budget={budget}"])
    fitted = within(loaded)
    assert fitted.said.startswith(f"{key}=")
    assert fitted.config.origin(key) == f"budget={budget}"
    assert fitted.config.budget is None
    fed = config.build(fitted.config)
    run = runs.fit(fed, 6, tmp_path / "run", config=fitted.config, progress=False)
    each = run.info["bytes_up"] / 6 / 3
    assert each <= budget
    if not key.endswith("recycle"):
        assert each > 0.9 * budget
    assert f"budget={budget}" in (tmp_path / "run" / "config.toml").read_text()


def test_an_interval_is_the_shortest_that_fits() -> None:
    costs = {1: 100.0, 2: 60.0, 4: 40.0, 8: 45.0}
    assert _step(costs.__getitem__, (1, 2, 4, 8), 60) == (2, 60.0)
    assert _step(costs.__getitem__, (1, 2, 4, 8), 30) == (4, 40.0)


def test_a_density_is_found_to_two_per_cent() -> None:
    value, needed = _density(lambda d: 50 + 10_000 * d, 1234)
    assert 0.98 * 1234 < needed <= 1234
    assert value == pytest.approx((needed - 50) / 10_000)
    assert _density(lambda d: 10 * d, 1234) == (1.0, 10.0)


def test_a_budget_that_cannot_be_kept_is_refused_with_what_is_needed() -> None:
    with pytest.raises(lamina.ConfigError, match=r"E107.*nothing here") as caught:
        within(config.load("quickstart", [*SMALL, "budget=1kB"]))
    assert "ssfl" in str(caught.value)
    with pytest.raises(lamina.ConfigError, match=r"even method.phi=2 needs [\d,]+ bytes"):
        within(config.load("quickstart", [*SMALL, "method=fedlama", "budget=100"]))


def test_the_density_of_a_shock_keeps_within_no_budget() -> None:
    """LIPS prunes what a client starts from, and sends all of the update: density 1 would be no shock at all."""
    lips = ("method=lips", "method.rounds=6", "model.widths=[64, 12, 11, 10]")
    with pytest.raises(lamina.ConfigError, match=r"E107.*nothing here"):
        within(config.load("quickstart", [*SMALL, *lips, "budget=100kB"]))
    fitted = within(config.load("quickstart", [*SMALL, *lips, "uplink=topk:0.5", "budget=1kB"]))
    assert fitted.said.startswith("uplink.density=")
    assert fitted.config.method[0].arguments["density"] == 0.5


def test_a_federation_is_not_built_before_something_is_chosen() -> None:
    with pytest.raises(lamina.ConfigError, match="E107"):
        config.build(config.load("quickstart", ["method=ssfl", "budget=9kB"]))
