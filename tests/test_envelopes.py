"""Signed letters and answers: keys, what a signature covers, and who is believed after which restart."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import network
from lamina import ConfigError, Federation, FedLAMA, StorageError, WireError, config, runs
from lamina.remote import Answer, AtNode, AtServer, DiskShelf, MemoryShelf, Node, opened, over, signing
from lamina.remote.envelope import Letter, expect_by, seal, unseal
from lamina.remote.keys import SERVER, Own, Shared, pair, secret
from lamina.remote.signing import Rejected, Signed
from lamina.runs import Run
from network import Streets

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from soak.envelopes import retitled

SECRET = "canary-7c1f9d2e-0b6a-4f58-a1d3-5e9b8c7a6f40"
KEYS = Shared(SECRET.encode())
SAID = Signed("exp-1", 3, 17, "ab" * 16, "cyd")
HOMES = ((0, 3), (1, 2, 4))


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


# ---- keys


def test_a_key_comes_from_the_environment_or_from_a_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMINA_KEY", f"{SECRET}\n")
    file = written(tmp_path / "key", f"{SECRET}\n")
    assert secret("env:LAMINA_KEY") == secret(f"file:{file}") == SECRET.encode()
    text = b"some text"
    assert opened("env:LAMINA_KEY").made(SERVER, text, opened(f"file:{file}").sign(text))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666, 0o610])
@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = written(tmp_path / "key", SECRET, mode)
    with pytest.raises(ConfigError, match="others can read it") as caught:
        opened(f"file:{file}")
    assert caught.value.code == "E124"
    assert caught.value.remedy == f"chmod 600 {file}"


@pytest.mark.parametrize("reference", [SECRET, f"env:{SECRET} x", "env:", "file:", "http://x", "env:A-B", ""])
def test_what_is_no_reference_may_be_a_key_and_is_not_repeated(reference: str) -> None:
    for use in (secret, lambda x: config.load("quickstart", [f"sign.key={x}"], {})):
        with pytest.raises(ConfigError) as caught:
            use(reference)
        assert caught.value.code == "E124"
        assert SECRET not in str(caught.value)


def test_a_key_that_is_a_number_in_toml_is_not_repeated_either() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("quickstart", ["sign.key=12345678901234567890"], {})
    assert "12345" not in str(caught.value)


def test_a_key_that_is_missing_short_or_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_KEY", raising=False)
    monkeypatch.setenv("SHORT", "0123456789")
    cases = {
        "env:LAMINA_KEY": "is not set",
        "env:SHORT": "10 characters, expected 32",
        f"file:{tmp_path / 'no'}": "No such file",
        f"file:{tmp_path}": "is no file",
        f"file:{written(tmp_path / 'empty', '')}": "is empty",
        f"file:{written(tmp_path / 'long', 'x' * 5000)}": "expected 32 to 4096",
    }
    for reference, why in cases.items():
        with pytest.raises(ConfigError, match=why) as caught:
            opened(reference)
        assert caught.value.code == "E124"
        assert "0123456789" not in str(caught.value)


def test_keys_do_not_show_themselves() -> None:
    pytest.importorskip("cryptography")
    assert SECRET not in repr(KEYS) + str(KEYS) + str([KEYS])
    assert repr(Own(b"q" * 32, None, {})) == "Own(***)"


class TestPairs:
    @pytest.fixture(autouse=True)
    def _needs_cryptography(self) -> None:
        pytest.importorskip("cryptography")

    def roster(self, folder: Path) -> tuple[Path, dict[str, Path]]:
        made = {name: pair() for name in ("server", "one", "two")}
        files = {name: written(folder / name, private) for name, (private, _) in made.items()}
        clients = {"ann": made["one"][1], "bob": made["one"][1], "cyd": made["two"][1]}
        path = folder / "roster.json"
        path.write_text(json.dumps({"server": made["server"][1], "clients": clients}))
        return path, files

    def test_nobody_can_speak_for_another(self, tmp_path: Path) -> None:
        path, files = self.roster(tmp_path)
        server, one, two = (opened(f"file:{files[name]}", path) for name in ("server", "one", "two"))
        text = b"an answer"
        assert server.made("ann", text, one.sign(text))
        assert server.made("cyd", text, two.sign(text))
        assert not server.made("cyd", text, one.sign(text))
        assert not server.made("ann", text, server.sign(text))
        assert not server.made("eve", text, one.sign(text))  # she is on no list
        assert one.made(SERVER, text, server.sign(text))
        assert not one.made(SERVER, text, two.sign(text))
        assert server.one(["ann", "bob"])
        assert not server.one(["ann", "cyd"])

    def test_a_roster_that_is_none_is_refused(self, tmp_path: Path) -> None:
        path, files = self.roster(tmp_path)
        key = f"file:{files['one']}"
        for text in (
            "",
            "[]",
            '{"server": 3}',
            '{"server": "ed25519:AAAA"}',
            '{"clients": {"a": "x"}}',
            '{"clients": 3}',
        ):
            path.write_text(text)
            with pytest.raises(ConfigError) as caught:
                opened(key, path)
            assert caught.value.code == "E124", text
        with pytest.raises(ConfigError, match="needs a roster"):
            opened(key)
        with pytest.raises(ConfigError, match="No such file"):
            opened(key, tmp_path / "no")
        with pytest.raises(ConfigError, match="needs no roster"):
            opened(f"file:{written(tmp_path / 'shared', SECRET)}", path)

    def test_a_private_key_that_is_none_is_refused_without_its_text(self, tmp_path: Path) -> None:
        path, _ = self.roster(tmp_path)
        file = written(tmp_path / "bad", f"ed25519:{SECRET}")
        with pytest.raises(ConfigError, match="the private key is none") as caught:
            opened(f"file:{file}", path)
        assert SECRET not in str(caught.value)


class TestKeysCommand:
    def test_it_makes_a_key_for_all_or_one_for_each(self, tmp_path: Path) -> None:
        pytest.importorskip("cryptography")
        from lamina.flower import keys

        keys.write(tmp_path / "a", ["localhost"], 2, sign="hmac")
        server = node = opened(f"file:{tmp_path / 'a' / 'sign.key'}")
        assert server.made("anybody", b"x", node.sign(b"x"))
        keys.write(tmp_path / "b", ["localhost"], 2, sign="ed25519", clients=["0-7", "8-9, x"])
        roster = tmp_path / "b" / "roster.json"
        ends = {name: opened(f"file:{tmp_path / 'b' / name}.key", roster) for name in ("sign-server", "sign-node-2")}
        assert ends["sign-server"].made("x", b"x", ends["sign-node-2"].sign(b"x"))
        assert not ends["sign-server"].made("7", b"x", ends["sign-node-2"].sign(b"x"))
        assert ends["sign-node-2"].made(SERVER, b"x", ends["sign-server"].sign(b"x"))
        for file in (*tmp_path.glob("*/*.key"), *tmp_path.glob("*/node-?")):
            assert file.stat().st_mode & 0o077 == 0, file
        made = [path.read_bytes() for path in sorted(tmp_path.glob("*/sign*.key"))]
        assert len({*made}) == len(made) == 4
        keys.write(tmp_path / "c", ["localhost"], 1)
        assert not list((tmp_path / "c").glob("sign*"))

    @pytest.mark.parametrize(
        ("sign", "clients", "why"),
        [("rsa", [], "expected hmac or ed25519"), ("ed25519", ["0-7"], "1 lists of clients for 2 nodes"),
         ("hmac", ["0", "1"], "2 lists"), ("ed25519", ["0-7", "7"], "of two nodes"),
         ("ed25519", ["0", ","], "expected names")],
    )  # fmt: skip
    def test_it_refuses_what_binds_no_key(self, sign: str, clients: list[str], why: str, tmp_path: Path) -> None:
        pytest.importorskip("cryptography")
        from lamina.flower import keys

        with pytest.raises(ConfigError, match=why):
            keys.write(tmp_path / "a", ["localhost"], 2, sign=sign, clients=clients)
        assert not (tmp_path / "a").exists()


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(ConfigError, match="cryptography") as caught:
        Own(b"q" * 32, None, {})
    assert caught.value.code == "E123"


# ---- what a signature covers


def letter(**changes: Any) -> bytes:
    made = Letter("round", 2, 3, "f" * 32, ("a",), {}, False, b"the frame", "t", SAID)
    return made._replace(**changes).packed(KEYS)


def judged(blob: bytes, who: str | None = SERVER) -> str:
    """The code with which it is refused; "" for none."""
    try:
        Letter.unpacked(blob)
        expect_by(who, blob, KEYS)
    except (WireError, Rejected) as error:
        return error.code
    return ""


def test_every_byte_of_a_signed_letter_is_covered() -> None:
    """Each of its bits flipped, and checksums made anew: nothing of it passes."""
    blob = letter()
    assert judged(blob) == ""
    codes = set()
    for at in range(len(blob)):
        changed = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
        codes.add(judged(changed))
        if at not in range(8, 16) and int.from_bytes(changed[4:8], "little") <= len(blob) - 16:
            codes.add(judged(retitled(changed, b"LML1")) if at >= 4 else "E341")
    assert "" not in codes


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "probe"}, {"client": 1}, {"round": 4}, {"fingerprint": "e" * 32}, {"mask": ()}, {"together": True},
        {"frame": b"the frame."}, {"terms": "u"}, {"signed": SAID._replace(run="exp-2")},
        {"signed": SAID._replace(round=4)}, {"signed": SAID._replace(number=18)},
        {"signed": SAID._replace(nonce="cd" * 16)}, {"signed": SAID._replace(name="dan")}, {"signed": None},
    ],
)  # fmt: skip
def test_a_signature_of_one_letter_is_none_of_another(changes: dict[str, Any]) -> None:
    """The head and frame of another, the signature of this one."""
    mac = bytes(letter()[16:].partition(signing._MAC)[2].partition(b'"')[0])
    other = letter(**changes)
    start, found, rest = other.partition(signing._MAC)
    swapped = retitled(start + found + mac + rest[len(mac) :], b"LML1")
    assert other != swapped
    assert judged(other) == ""
    assert judged(swapped) == "E334"


def test_a_letter_is_no_answer_and_a_mac_in_a_text_is_no_signature() -> None:
    """Who may choose a text of a head, such as a reason, cannot end the head early."""
    head, frame = unseal(b"LML1", letter())
    del head["mac"]
    assert judged(retitled(seal(b"LMA1", head, frame, keys=KEYS), b"LML1")) == "E334"
    why = 'x","mac":"' + "00" * 32 + '"}'
    blob = Answer("failed", 2, "", why, signed=SAID).packed(KEYS)
    expect_by("cyd", blob, KEYS)
    assert Answer.unpacked(blob).why == why
    with pytest.raises(Rejected, match="it is not signed"):
        expect_by("cyd", Answer("failed", 2, "", why, signed=SAID).packed(), KEYS)


@pytest.mark.parametrize("said", [3, [], [2, *SAID], [1, "r", 0, 0, "n"], [1, "r", True, 0, "n", "x"], {"v": 1}])
def test_what_is_said_to_be_signed_has_a_form(said: Any) -> None:
    with pytest.raises(WireError) as caught:
        Answer.unpacked(seal(b"LMA1", {"said": "failed", "client": 1, "plan": "", "why": "", "signed": said}))
    assert caught.value.code == ("E341" if said == [2, *SAID] else "E345")


# ---- which answers are due


def code_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except Rejected as error:
        return error.code
    return ""


def test_an_answer_counts_once_and_only_to_an_open_letter() -> None:
    at = AtServer(KEYS, "exp-1")
    at.begin()
    first, second = at.letter(0, "ann", 5), at.letter(1, "bob", 5)
    assert second.number == first.number + 1
    assert first.nonce != second.nonce
    assert code_of(lambda: at.take(0, None)) == "E334"
    assert code_of(lambda: at.take(0, first._replace(run="exp-2"))) == "E335"
    assert code_of(lambda: at.take(1, first)) == "E334"
    assert code_of(lambda: at.take(0, first._replace(nonce=second.nonce))) == "E334"
    assert code_of(lambda: at.take(0, second._replace(number=second.number + 1))) == "E334"
    at.take(0, first)
    assert code_of(lambda: at.take(0, first)) == "E331"
    at.begin()
    assert code_of(lambda: at.take(0, first)) == "E333"  # answered, a round ago
    assert code_of(lambda: at.take(1, second)) == "E332"  # never answered: late
    third = at.letter(1, "bob", 6)
    at.take(1, third)
    assert code_of(lambda: at.take(1, second)) == "E333"  # a later one has been


def test_numbers_grow_over_restarts_and_a_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "letters.json"
    numbers, sizes = [], set()
    for now in (2_000_000_000, 1_000_000_000, 1_000_000_000, 3_000_000_000):
        monkeypatch.setattr(signing.time, "time", lambda now=now: float(now))
        at = AtServer(KEYS, "exp-1", file)
        numbers += [at.letter(c, "x", 0).number for c in range(3)]
        sizes.add(file.stat().st_size)
        with pytest.raises(Rejected, match="E333"):
            at.take(0, SAID._replace(number=numbers[0] - 1))
    assert numbers == sorted({*numbers})
    assert len(sizes) == 1  # it does not grow
    file.unlink()
    monkeypatch.setattr(signing.time, "time", lambda: 3_000_000_002.0)
    assert AtServer(KEYS, "exp-1", file).letter(0, "x", 0).number > numbers[-1]  # lost: the clock goes on


def test_a_file_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "letters.json"
    AtServer(KEYS, "exp-1", file).letter(0, "x", 0)
    with pytest.raises(StorageError) as caught:
        AtServer(KEYS, "exp-2", file).letter(0, "x", 0)
    assert caught.value.code == "E405"
    for text in ("", "{}", "[]", '{"run": "exp-1"}'):
        file.write_text(text)
        with pytest.raises(StorageError) as caught:
            AtServer(KEYS, "exp-1", file).letter(0, "x", 0)
        assert caught.value.code == "E404"


# ---- whole federations


def make(**options: Any) -> Federation:
    import cases

    return cases.federation(FedLAMA(phi=2), cohort="all", **options)


def linked(
    keys: Any = KEYS, own: Any = KEYS, file: Path | None = None, nodes: list[Node] | None = None, **more: Any
) -> tuple[Federation, Streets]:
    """A server and nodes that sign."""
    data = network.shared()
    if nodes is None:
        nodes = []
        for home in HOMES:
            fed = make(examples=network.replace(data.subset(home), test=None, check=False).among(data.names))
            nodes.append(Node(fed, MemoryShelf(), signing=None if own is None else AtNode(own, "exp-1")))
    streets = Streets(nodes)
    at = None if keys is None else AtServer(keys, "exp-1", file)
    return over(make(examples=network.registry(data)), streets, signing=at, **more), streets


def codes(pairs: Any) -> list[str]:
    return [event["code"] for _, record in pairs for event in record.events]


def test_signing_changes_no_bit_and_no_byte_of_the_ledger() -> None:
    plain = list(linked(None, None)[0].run(3))
    signed = list(linked()[0].run(3))
    assert signed[-1][0].sha256() == plain[-1][0].sha256()
    assert [r.traffic for _, r in signed] == [r.traffic for _, r in plain]
    assert codes(signed) == []


@pytest.mark.parametrize(("keys", "own"), [(KEYS, None), (None, KEYS), (KEYS, Shared(b"another key" * 4))])
def test_ends_that_do_not_agree_exchange_nothing(keys: Any, own: Any) -> None:
    fed, streets = linked(keys, own)
    with pytest.raises(Exception, match="every message was refused") as caught:
        next(fed.run(1))
    assert getattr(caught.value, "code", "") == "E311"
    assert SECRET not in str(caught.value)
    if own is not None:
        assert all(streets.nodes[0].shelf.get(c) is None for c in HOMES[0])  # nothing was trained


def test_a_forged_answer_does_not_shut_out_the_right_one() -> None:
    """Before each right answer comes one of somebody who has no key: the model is the same."""
    plain = list(linked()[0].run(2))
    fed, streets = linked()
    streets.happens = lambda client, blob: [
        (client, Answer.unpacked(blob)._replace(why="mine").packed(Shared(b"another key" * 4))), (client, b"junk"),
        (client, blob),
    ]  # fmt: skip
    pairs = list(fed.run(2))
    assert pairs[-1][0].sha256() == plain[-1][0].sha256()
    assert {*codes(pairs)} == {"E334", "E340"}
    assert len(codes(pairs)) == 2 * 2 * 5


def test_answers_and_letters_from_before_a_restart_are_known(tmp_path: Path) -> None:
    """The server stops after two rounds and goes on from the first: round 1 is made again, with the same plan. What was
    answered to it before the restart is not taken, nor is a letter of before at a node; and the result is the same."""
    expected = list(linked()[0].run(3))[-1][0]
    file = tmp_path / "letters.json"
    fed, streets = linked(file=file)
    kept: list[tuple[int, bytes]] = []
    streets.happens = lambda client, blob: kept.append((client, blob)) or [(client, blob)]  # type: ignore[func-returns-value]
    letters: list[tuple[int, bytes]] = []
    send = streets.send
    streets.send = lambda sent, most: send(_noted(sent, letters), most)  # type: ignore[method-assign]
    run = fed.run(3)
    state = next(run)[0]
    next(run)
    again, streets = linked(file=file, nodes=streets.nodes)
    old = dict(kept[len(kept) // 2 :])  # to the plan that is asked for once more
    streets.happens = lambda client, blob: [(client, old[client]), (client, blob)]
    pairs = list(again.run(2, state))
    assert {*codes(pairs)} == {"E333"}
    assert len(codes(pairs)) == 2 * 5
    assert pairs[-1][0].sha256() == expected.sha256()
    before = [node.shelf.get(c).puts for node in streets.nodes for c in sorted(node.clients)]  # type: ignore[union-attr]
    for client, blob in letters:
        (node,) = [node for node in streets.nodes if client in node.clients]
        ((_, answer),) = node.answer([(client, blob)])
        assert Answer.unpacked(answer).why.startswith("E333")
    after = [node.shelf.get(c).puts for node in streets.nodes for c in sorted(node.clients)]  # type: ignore[union-attr]
    assert before == after


def _noted(letters: Any, into: list[tuple[int, bytes]]) -> Any:
    for client, blob in letters:
        into.append((client, bytes(blob)))
        yield client, blob


def test_a_node_that_starts_again_still_knows_which_letters_it_has_answered(tmp_path: Path) -> None:
    data = network.shared()

    def node() -> Node:
        fed = make(examples=network.replace(data, test=None, check=False).among(data.names))
        return Node(fed, DiskShelf(fed, tmp_path, "exp-1"), signing=AtNode(KEYS, "exp-1"))

    letters: list[tuple[int, bytes]] = []
    fed, streets = linked(nodes=[node()])
    send = streets.send
    streets.send = lambda sent, most: send(_noted(sent, letters), most)  # type: ignore[method-assign]
    next(fed.run(1))
    for client, answer in node().answer(letters):
        found = Answer.unpacked(answer)
        assert (found.said, found.why[:4]) == ("failed", "E333"), client


def test_what_a_node_sends_together_is_signed_too() -> None:
    plain = list(linked(None, None, together=True)[0].run(2))
    signed = list(linked(together=True)[0].run(2))
    assert signed[-1][0].sha256() == plain[-1][0].sha256()


def test_a_node_cannot_speak_for_clients_of_another_together() -> None:
    """With keys of their own: node 1 says that its message is client 3's as well, who is at node 0."""
    pytest.importorskip("cryptography")
    from lamina.remote.envelope import Member

    private = [bytes([i]) * 32 for i in range(3)]
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = [Ed25519PrivateKey.from_private_bytes(p).public_key().public_bytes_raw() for p in private]
    names = network.shared().names
    clients = {names[c]: public[home] for home, own in enumerate(HOMES) for c in own}
    server = Own(private[2], public[2], clients)
    own = [Own(private[home], public[2], {}) for home in (0, 1)]
    data = network.shared()
    nodes = []
    for home, keys in zip(HOMES, own, strict=True):
        fed = make(examples=network.replace(data.subset(home), test=None, check=False).among(data.names))
        nodes.append(Node(fed, MemoryShelf(), signing=AtNode(keys, "exp-1")))
    fed, streets = linked(server, nodes=nodes, together=True)

    def wider(client: int, blob: bytes) -> list[tuple[int, bytes]]:
        answer = Answer.unpacked(blob)
        if client not in HOMES[1] or not answer.members:
            return [(client, blob)]
        taken = (*answer.members, Member(3, 2, 0.5))
        return [(client, answer._replace(members=taken).packed(own[1])), (client, blob)]

    streets.happens = wider
    pairs = list(fed.run(1))
    assert codes(pairs) == ["E334"]
    assert pairs[0][0].sha256() == next(iter(linked(None, None, together=True)[0].run(1)))[0].sha256()


# ---- in a config


def test_the_variable_of_the_key_is_no_key_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = config.load("quickstart", ["sign.key=env:LAMINA_KEY"], {"LAMINA_KEY": SECRET})
    assert loaded.sign.key == "env:LAMINA_KEY"
    assert SECRET not in config.to_toml(loaded)
    assert config.load("quickstart", [], {}).sign.key is None
    assert loaded.sha256 == config.load("quickstart", [], {}).sha256  # it changes no result
    with pytest.raises(ConfigError, match=r"sign\.roster without"):
        config.load("quickstart", ["sign.roster=roster.json"], {})


def test_a_run_goes_on_with_another_key(tmp_path: Path) -> None:
    keys = ["engine=loop", "rounds=2", "model.widths=[64, 8, 10]", "sign.key=env:OLD_KEY"]
    made = config.load("quickstart", keys, {})
    runs.fit(config.build(made), 1, tmp_path / "run", config=made, progress=False)
    resumed = runs.resume(tmp_path / "run", 2, keys=["sign.key=env:NEW_KEY"], progress=False)
    assert resumed.info["rounds_done"] == 2
    assert 'key = "env:NEW_KEY"' in " ".join((tmp_path / "run" / "config.toml").read_text().split()).replace("  ", " ")
    assert Run.open(tmp_path / "run").info["status"] == "done"
