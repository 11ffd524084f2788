"""Certificates and keys for a deployment: who the server is, and which SuperNodes it lets in.

    ca.pem                    to everybody: --root-certificates at a node, --ssl-ca-certfile at the SuperLink
    server.pem  server.key    to the SuperLink alone: --ssl-certfile, --ssl-keyfile
    node-1  node-2  ...       each to its SuperNode alone: --auth-supernode-private-key
    node-1.pub  ...           to the SuperLink's list of nodes: `flwr supernode register node-1.pub`

The authority's own key is not kept: nothing else can be signed with it. Flower takes SuperNode keys in OpenSSH's form
only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.errors import StorageError, expect, is_whole
from lamina.flower import missing
from lamina.store.files import storing

_DAYS = 365


def write(folder: Path, hosts: Sequence[str], nodes: int, days: int = _DAYS) -> list[Path]:
    """Makes them anew.

    Args:
        hosts: names and addresses by which the server is reached.
        nodes: how many SuperNode keys.
        days: for which the certificates hold.

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
    made = _made(hosts, nodes, days)
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
