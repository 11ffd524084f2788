"""Certificates and keys for a deployment: who the server is, and which SuperNodes it lets in.

    ca.pem                    to everybody: --root-certificates at a node, --ssl-ca-certfile at the SuperLink
    server.pem  server.key    to the SuperLink alone: --ssl-certfile, --ssl-keyfile
    node-1  node-2  ...       each to its SuperNode alone: --auth-supernode-private-key
    node-1.pub  ...           to the SuperLink's list of nodes: `flwr supernode register node-1.pub`

With what letters and answers are signed (`sign.key` of the config, see `lamina.remote.keys`), by choice:

    sign.key                  one key for the server and all nodes
    sign-server.key  ...      or a key for each: of the server, sign-node-1.key, ...
    roster.json               and everybody's public ones (`sign.roster`), to all

The authority's own key is not kept: nothing else can be signed with it. Flower takes SuperNode keys in OpenSSH's form
only.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.errors import StorageError, expect, is_whole
from lamina.flower import missing
from lamina.remote.keys import pair
from lamina.store.files import storing

_DAYS = 365


def write(
    folder: Path, hosts: Sequence[str], nodes: int, days: int = _DAYS, sign: str | None = None,
    clients: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Makes them anew.

    Args:
        hosts: names and addresses by which the server is reached.
        nodes: how many SuperNode keys.
        days: for which the certificates hold.
        sign: "hmac", one key for all; "ed25519", a key for each; None: nothing is signed.
        clients: of each node the names of its clients, such as "0-7,x": what "ed25519" binds its key to.

    Raises:
        ConfigError: an impossible value, or cryptography is not installed.
        StorageError: E402 something of theirs is there already.
    """
    expect(bool(hosts), "hosts: expected at least one name or address of the server", where="hosts")
    for host in hosts:
        fine = re.fullmatch(r"[A-Za-z0-9:.*-]+", host) is not None
        expect(fine, f"host {host!r}: expected a name or an address, without a port", where="hosts")
    expect(is_whole(nodes, 0), f"nodes={nodes}: expected a whole number >= 0", where="nodes")
    expect(is_whole(days, 1), f"days={days}: expected a whole number >= 1", where="days")
    signing = _signing(sign, nodes, clients)
    made = _made(hosts, nodes, days) | signing
    there = [name for name in made if (folder / name).exists()]
    if there:
        remedy = "name another folder: a key that is replaced shuts its node out"
        raise StorageError(f"{folder / there[0]} is there already", code="E402", where=str(folder), remedy=remedy)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, blob in made.items():
            secret = name.endswith(".key") or re.fullmatch(r"node-\d+", name)
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
            with os.fdopen(handle, "wb") as file:
                file.write(blob)
    return [folder / name for name in made]


def _signing(sign: str | None, nodes: int, clients: Sequence[str]) -> dict[str, bytes]:
    kinds = (None, "hmac", "ed25519")
    expect(sign in kinds, f"sign={sign!r}: expected hmac or ed25519", where="--sign")
    each = sign == "ed25519"
    said = f"{len(clients)} lists of clients for {nodes} nodes"
    remedy = "--clients 0-7 --clients 8-15: once for each node, in order"
    expect(len(clients) == (nodes if each else 0), said, where="--clients", remedy=remedy if each else "leave it out")
    if sign == "hmac":
        return {"sign.key": f"{secrets.token_hex(32)}\n".encode()}
    if not each:
        return {}
    server, server_public = pair()
    made = {"sign-server.key": f"{server}\n".encode()}
    roster: dict[str, str] = {}
    for number, names in enumerate(clients, start=1):
        private, public = pair()
        made[f"sign-node-{number}.key"] = f"{private}\n".encode()
        own = _names(names)
        twice = sorted(own & roster.keys())
        expect(not twice, f"client {twice[:1]} is of two nodes", where="--clients")
        roster |= dict.fromkeys(sorted(own), public)
    text = json.dumps({"server": server_public, "clients": roster}, indent=1)
    return made | {"roster.json": f"{text}\n".encode()}


def _names(text: str) -> set[str]:
    """``"0-7,x"``."""
    names: set[str] = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", word)
        names |= {str(n) for n in range(int(span[1]), int(span[2]) + 1)} if span else {word}
    expect(bool(names), f"{text!r}: expected names of clients", where="--clients")
    return names


def _made(hosts: Sequence[str], nodes: int, days: int) -> dict[str, bytes]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ModuleNotFoundError as error:
        raise missing(error) from error

    def named(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def private(key: Any, form: Any) -> bytes:
        return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))

    now = datetime.datetime.now(datetime.UTC)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())

    def certificate(subject: str, key: Any, extensions: Sequence[tuple[Any, bool]]) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("lamina authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=days))
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        for extension, critical in ((identifier, False), (issuer, False), *extensions):
            builder = builder.add_extension(extension, critical)
        return bytes(builder.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))

    def usage(signs: bool) -> Any:
        return x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False)

    ours = [(x509.BasicConstraints(True, 0), True), (usage(True), True)]
    theirs = [
        (x509.BasicConstraints(False, None), True),
        (usage(False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_alternative(x509, host) for host in hosts]), False),
    ]
    made = {
        "ca.pem": certificate("lamina authority", authority, ours),
        "server.pem": certificate(hosts[0][:64], server, theirs),
        "server.key": private(server, serialization.PrivateFormat.PKCS8),
    }
    ssh, line = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    for number in range(1, nodes + 1):
        key = ec.generate_private_key(ec.SECP384R1())
        made[f"node-{number}"] = private(key, serialization.PrivateFormat.OpenSSH)
        made[f"node-{number}.pub"] = bytes(key.public_key().public_bytes(ssh, line)) + b"\n"
    return made


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
