"""Flower's serialisation of one message for benchmarks/wire.py: `python flower_arrays.py MESSAGE.npz`.

What a client app returns: a RecordDict with the tensors as an ArrayRecord, in the protobuf that Flower sends, without
the envelope around it. For every line of input one round trip: a line with its bytes, and the seconds to encode and to
decode.

Needs `pip install -c constraints.txt flwr torch` in an environment of its own.
"""

from __future__ import annotations

import os
import sys
import time

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # read when flwr is imported

import numpy as np
import torch

try:
    from flwr.app import ArrayRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
except ImportError as error:
    sys.exit(f"flower_arrays.py: {error}; pip install -c constraints.txt flwr torch")


def main() -> None:
    with np.load(sys.argv[1]) as file:
        tree = {name: torch.from_numpy(file[name]) for name in file.files}
    kind = type(recorddict_to_proto(RecordDict()))
    for _ in sys.stdin:
        began = time.perf_counter()
        blob = recorddict_to_proto(RecordDict({"arrays": ArrayRecord(tree)})).SerializeToString()
        encoded = time.perf_counter()
        back = recorddict_from_proto(kind.FromString(blob))["arrays"].to_torch_state_dict()
        decoded = time.perf_counter()
        if any(not torch.equal(x, back[name]) for name, x in tree.items()):
            sys.exit("flower_arrays.py: another message came back")
        print(len(blob), encoded - began, decoded - encoded, flush=True)


if __name__ == "__main__":
    main()
