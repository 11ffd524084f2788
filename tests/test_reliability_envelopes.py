"""Row S1 of the reliability table, in short: wrong letters and answers among right ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from soak import envelopes


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_s1_wrong_envelopes_are_rejected_and_leave_no_trace(kind: str) -> None:
    if kind == "ed25519":
        pytest.importorskip("cryptography")
    result = envelopes.envelopes(kind, short=True)
    assert result.met, result
