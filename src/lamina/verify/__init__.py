"""Whether a run folder says what happened.

`files` compares what is written with itself. `resend` makes rounds of the run once more, every frame through a socket,
and compares its bytes with the ledger; `replay` makes rounds of it once more and compares every bit that is written.
"""

from lamina.verify.again import AFRESH, Model
from lamina.verify.replay import Replayed, replay, replay_table
from lamina.verify.wire import PREFIX, Line, Resent, Share, Trip, layers_table, resend, wire_table
from lamina.verify.written import DIRECTIONS, Check, files, files_table

__all__ = [
    "AFRESH", "DIRECTIONS", "PREFIX", "Check", "Line", "Model", "Replayed", "Resent", "Share", "Trip", "files",
    "files_table", "layers_table", "replay", "replay_table", "resend", "wire_table",
]  # fmt: skip
