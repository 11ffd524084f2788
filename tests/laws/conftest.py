"""A law runs as many rounds as it needs, whatever the method plans for (LIPS says so in a warning)."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings(r"ignore:.* plans \d+ rounds, this run has \d+:UserWarning"))
