"""The same federation on a real network, carried by Flower: its SuperLink is the server, its SuperNodes are our nodes.

    lamina.remote                 here                                   Flower
    RemoteEngine -- letters --> GridPost: one message a node --> Grid --> SuperLink --> SuperNode --> ClientApp: Node
                 <-- answers --          one opaque array each way                                    DiskShelf

Nothing else in lamina imports flwr, and here only its public modules: flwr.app, flwr.serverapp, flwr.clientapp.

    lamina flower new exp.toml app        # an app that `flwr run` takes
    lamina flower rehearse exp.toml       # the whole of it on this machine, in processes of its own
    lamina parity exp.toml                # the simulator's model and ledger, to the bit
"""

from __future__ import annotations

import importlib
from typing import Any

from lamina.errors import ConfigError

_HOMES = {"client_app": "client", "server_app": "server", "GridPost": "post", "mod": "mod"}

__all__ = ["GridPost", "client_app", "mod", "server_app"]  # imported when first used


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        raise missing(error) from error
    return module if name == "mod" else getattr(module, name)


def missing(error: ModuleNotFoundError) -> Exception:
    """What to say instead of it, where it is Flower that is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in ("flwr", "cryptography"):
        return error
    remedy = "pip install 'lamina[flower]'"
    return ConfigError(f"{package} is not installed: deployment needs it", where="lamina.flower", remedy=remedy)
