"""Clients that are elsewhere: the same federation, methods, codecs and server loop, and only bytes travel.

    server                                                            node: one client, or many
    Federation --> RemoteEngine --letters--> Post ------------------> Node.answer --> reading.read: Plan
        ^               |                                               client_round, in this machine's engine
        '--- Reply <-- message.read <--answers-- Post <---------------- Shelf: what its clients hold now

What carries the bytes is a `Post`; nothing here knows of a network. The numbers of clients follow from all nodes' rolls
(`Roll`, `register`), and what a client remembers is on its node's shelf.

    sizes = register(rolls)
    fed = over(Federation(model, ClientData.registry(sizes, test=...), ...), post)      # at the server
    node = Node(Federation(model, data.among([*sizes]), ...), DiskShelf(...))           # at every node

Many clients at one node cost little more than one: `bundled` has the plan that they are sent once, they are trained
by the engine of their machine, and with `over(..., together=True)` they send one message.

Where `secure` is set, four letters take the place of one, and no message in the clear is ever sent: `summing` is the
server's side of it, `masking` the nodes', `vault` where their secrets are meanwhile.

With `signing=AtServer(opened("env:NAME"), run)` at the server and `AtNode` at the nodes all of it is signed: see
`signing`, and `keys` for who signs.

A server trusts no client's bytes: see `message`. A client believes its server, but takes no plan that is not the one
the server meant: letters carry a fingerprint, and who reads another plan says so and is sent the whole of it.
"""

from __future__ import annotations

from lamina.remote.asked import Lost, Post
from lamina.remote.bundle import bundled, unbundled
from lamina.remote.envelope import Answer, Letter, fingerprint
from lamina.remote.keys import opened
from lamina.remote.node import Node
from lamina.remote.roll import Roll, register
from lamina.remote.server import RemoteEngine, over
from lamina.remote.shelf import DiskShelf, Holding, MemoryShelf, Shelf
from lamina.remote.signing import AtNode, AtServer
from lamina.remote.vault import FileVault, MemoryVault, Vault

__all__ = [
    "Answer", "AtNode", "AtServer", "DiskShelf", "FileVault", "Holding", "Letter", "Lost", "MemoryShelf", "MemoryVault",
    "Node", "Post", "RemoteEngine", "Roll", "Shelf", "Vault", "bundled", "fingerprint", "opened", "over", "register",
    "unbundled",
]  # fmt: skip
