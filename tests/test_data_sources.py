"""Data of one's own: CSV, parquet, Hugging Face, folders, Datasets with a column; and what they refuse, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils.data import Dataset, Subset

from lamina.data import ClientData
from lamina.data.reading import Reading, TableArguments
from lamina.errors import ConfigError, DataError

ROWS = """site,age,dose,label
north,50,1.5,ill
south,40,0.5,well
north,30,2.5,well
south,20,3.5,ill
south,10,4.5,well
"""


def table(folder: Path, text: str = ROWS, name: str = "table.csv") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def refused(code: str, *words: str) -> Any:
    return pytest.raises(DataError, match=f"(?s)^{code}.*" + ".*".join(words))


def impossible(*words: str) -> Any:
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(words))


# ---- CSV


def test_a_csv_file_gives_a_client_for_every_value_of_a_column(tmp_path: Path) -> None:
    data = ClientData.from_csv(table(tmp_path), client="site", y="label")
    assert data.names == ("north", "south")
    assert data.sizes.tolist() == [2, 3]
    assert (data.name, data.partition, data.classes) == ("table", "column:site", 2)
    x, y = data.examples(data.indices_of(1))
    assert x.dtype == torch.float32
    assert x.tolist() == [[40, 0.5], [20, 3.5], [10, 4.5]]
    assert y.tolist() == [1, 0, 1]  # ill, well: sorted
    assert data.label_names == ("ill", "well")


def test_x_names_the_columns_and_their_order(tmp_path: Path) -> None:
    data = ClientData.from_csv(table(tmp_path), client="site", x=["dose", "age"], y="label")
    assert data.x[0].tolist() == [1.5, 50]
    assert ClientData.from_csv(table(tmp_path), client="site", x="age", y="label").x.shape == (5, 1)


def test_without_a_client_column_the_rows_are_split_by_a_rule(tmp_path: Path) -> None:
    file = table(tmp_path)
    data = ClientData.from_csv(file, x=["age"], y="label", clients=2, partition="pathological:1", seed=3)
    assert [len(set(data.y[data.indices_of(i)].tolist())) for i in range(2)] == [1, 1]
    with impossible("clients=10: expected 1 <= clients <= 5"):
        ClientData.from_csv(file, x=["age"], y="label")


def test_whole_numbers_are_sorted_as_numbers_and_texts_with_leading_zeros_stay_texts(tmp_path: Path) -> None:
    rows = "site,x,y\n10,1,7\n9,1,30\n2.0,1,7\n"
    data = ClientData.from_csv(table(tmp_path, rows), client="site", y="y")
    assert data.names == ("2", "9", "10")
    assert data.y.tolist() == [0, 1, 0]  # 7, 30
    data = ClientData.from_csv(table(tmp_path, "site,x,y\n07,1,0\n7,1,1\n"), client="site", y="y")
    assert data.names == ("07", "7")


def test_labels_have_names_where_these_are_not_their_places(tmp_path: Path) -> None:
    rows = "a,label\n1,{}\n2,{}\n3,{}\n"
    named = {
        (0, 2, 1): None,
        (3, 5, 3): ("3", "5"),
        (1, 0, 5): ("0", "1", "5"),
    }
    for labels, expected in named.items():
        data = ClientData.from_csv(table(tmp_path, rows.format(*labels)), y="label", clients=1)
        assert data.label_names == expected
    text = table(tmp_path, rows.format("b", "c", "b"))
    given = ClientData.from_csv(text, y="label", clients=1, classes=["c", "b", "a"])
    assert (given.label_names, given.y.tolist()) == (("c", "b", "a"), [1, 0, 1])
    numbers = table(tmp_path, rows.format(1, 0, 1))
    assert ClientData.from_csv(numbers, y="label", clients=1, classes=3).label_names is None
    assert ClientData.from_csv(numbers, y="label", clients=1, regression=True).label_names is None


def test_a_column_of_texts_becomes_a_column_for_every_text(tmp_path: Path) -> None:
    rows = "site,sex,age,y\na,f,3,0\nb,m,4,1\nb,f,5,1\n"
    data = ClientData.from_csv(table(tmp_path, rows), client="site", y="y", categorical=["sex"])
    assert data.x.tolist() == [[1, 0, 3], [0, 1, 4], [1, 0, 5]]
    test = table(tmp_path, "sex,age,y\nx,3,0\n", "test.csv")
    with refused("E224", "'sex' holds 'x': expected one of f, m", "test.csv:2"):
        ClientData.from_csv(table(tmp_path, rows), client="site", y="y", categorical=["sex"], test=test)


def test_standardised_columns_have_mean_0_and_deviation_1_over_the_training_examples(tmp_path: Path) -> None:
    """Training ages 0 and 10: mean 5, deviation 5; the test's 20 becomes 3. A constant column becomes 0."""
    file = table(tmp_path, "site,age,one,y\na,0,4,0\nb,10,4,1\n")
    test = table(tmp_path, "age,one,y\n20,4,1\n", "test.csv")
    data = ClientData.from_csv(file, client="site", y="y", standardise=True, test=test)
    assert data.x.tolist() == [[-1, 0], [1, 0]]
    assert data.test is not None
    assert data.test[0].tolist() == [[3, 0]]


def test_a_regression_has_a_column_of_numbers_for_every_target(tmp_path: Path) -> None:
    file = table(tmp_path, "site,a,b,c\nn,1,0.5,1\ns,2,1.5,2\n")
    assert ClientData.from_csv(file, client="site", y="b", regression=True).y.tolist() == [[0.5], [1.5]]
    both = ClientData.from_csv(file, client="site", y=["b", "c"], regression=True)
    assert both.y.tolist() == [[0.5, 1], [1.5, 2]]
    assert both.classes is None
    with refused("E224", "'b' holds 0.5, which is no label", "table.csv:2", "regression=True"):
        ClientData.from_csv(file, client="site", y="b")


def test_a_text_is_encoded_by_a_function_of_the_whole_column(tmp_path: Path) -> None:
    file = table(tmp_path, 'site,text,y\na,"one, two",0\nb,three,1\n')

    def lengths(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text)] for text in texts])

    data = ClientData.from_csv(file, client="site", x="text", y="y", encode=lengths)
    assert data.x.tolist() == [[8], [5]]
    assert data.x.dtype == torch.int64
    with refused("E212", r"encode= gave int64 \[1\] for 2 values"):
        ClientData.from_csv(file, client="site", x="text", y="y", encode=lambda _: np.array([1]))


def test_blocks_of_rows_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ClientData.from_csv(table(tmp_path), client="site", y="label")
    monkeypatch.setattr("lamina.data.csv_table.BLOCK", 2)
    data = ClientData.from_csv(table(tmp_path), client="site", y="label")
    assert data.x.equal(whole.x)
    assert data.split_sha256 == whole.split_sha256
    with refused("E223", "column 'age' holds 'old', expected a finite number", "table.csv:6"):
        ClientData.from_csv(table(tmp_path, ROWS.replace("10,4.5", "old,4.5")), client="site", y="label")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("40,0.5", ",0.5"), "E223", ("column 'age' is empty", "table.csv:3", "no value is guessed")),
        (("40,0.5", "nan,0.5"), "E223", ("column 'age' holds nan", "table.csv:3", "repair")),
        (("40,0.5", "1e39,0.5"), "E223", ("column 'age' holds '1e39'", "table.csv:3")),
        (("40,0.5", '"1,5",0.5'), "E223", ("column 'age' holds '1,5'", "table.csv:3", "like 3.5")),
        (("40,0.5,well", "40,0.5,"), "E223", ("column 'label' is empty", "table.csv:3")),
        (("south,40", ",40"), "E223", ("column 'site' is empty", "table.csv:3")),
        (("40,0.5,well", "40,0.5,wel"), "E224", ("label 'wel': expected one of well, ill", "table.csv:3", "classes=")),
        (("40,0.5", "40,0.5,7"), "E215", ("5 cells, the header has 4", "table.csv:3")),
        (("south,40", 'south,"4'), "E218", ("not CSV", "table.csv:")),
        (("age", "label"), "E222", ("names 'label' twice", "table.csv:1")),
        (("site,", "town,"), "E222", ("no column 'site'", "table.csv", "columns: town, age, dose, label")),
        (("label", "lable"), "E222", ("no column 'label'", "did you mean 'lable'?")),
        ((ROWS, ""), "E211", ("an empty file", "table.csv")),
        ((ROWS[20:], ""), "E211", ("no examples", "table.csv")),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_refused_with_its_line(
    tmp_path: Path, change: tuple[str, str], code: str, words: tuple[str, ...]
) -> None:
    file = table(tmp_path, ROWS.replace(*change))
    with refused(code, *words):
        ClientData.from_csv(file, client="site", y="label", classes=["well", "ill"])


def test_a_file_that_is_not_there_and_one_with_another_delimiter_say_what_to_do(tmp_path: Path) -> None:
    with refused("E221", "nowhere.csv: no such file", "relative to the current folder"):
        ClientData.from_csv(tmp_path / "nowhere.csv", y="y")
    semicolons = table(tmp_path, ROWS.replace(",", ";"))
    with refused("E222", "one column", "delimiter=';' seems to be meant"):
        ClientData.from_csv(semicolons, client="site", y="label")
    data = ClientData.from_csv(semicolons, client="site", y="label", delimiter=";")
    assert data.split_sha256 == ClientData.from_csv(table(tmp_path), client="site", y="label").split_sha256
    (tmp_path / "latin.csv").write_bytes("site,x,y\nköln,1,0\n".encode("latin-1"))
    with refused("E218", "not UTF-8", "save it as UTF-8"):
        ClientData.from_csv(tmp_path / "latin.csv", client="site", y="y")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"client": "site", "clients": 3}, ("clients=3: expected one of them",)),
        ({"client": "site", "partition": "iid"}, ("partition='iid': expected one of them",)),
        ({"client": "site", "test": "t.csv", "test_share": 0.2}, ("test_share=0.2: expected one of them",)),
        ({"client": "site", "test_share": 1.0}, ("test_share=1.0: expected 0 <= test_share < 1",)),
        ({"client": "site", "client_tests": True}, ("expected test= or test_share= too",)),
        ({"client": "site", "encode": len}, ("expected the name of one column",)),
        ({"client": "site", "categorical": "age"}, (r"categorical=\['age'\]",)),
        ({"client": "site", "categorical": ["size"]}, ("expected columns of x", "x is age, dose")),
        ({"client": "site", "regression": True, "classes": 2}, ("expected one of them",)),
        ({"client": "site", "x": ["age", "site"]}, ("'site': it is the label or the client already",)),
        ({"client": "site", "classes": "well"}, ("expected how many, or a list",)),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(
    tmp_path: Path, how: dict[str, Any], words: tuple[str, ...]
) -> None:
    with impossible(*words):
        ClientData.from_csv(table(tmp_path), y="label", **how)


def test_an_unknown_argument_is_a_type_error_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"from_csv\(\) got an unexpected keyword argument 'clinet'.*'client'"):
        ClientData.from_csv(table(tmp_path), y="label", clinet="site")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="needs y="):
        ClientData.from_csv(table(tmp_path), client="site")


def test_what_is_typed_is_what_is_taken() -> None:
    assert get_type_hints(TableArguments).keys() == get_type_hints(Reading).keys()


# ---- test sets


def long(n: int = 40) -> str:
    return "site,a,y\n" + "".join(f"{'ns'[i % 4 == 0]},{i},{i % 3}\n" for i in range(n))


def test_a_share_of_every_client_is_held_out_and_equal_seeds_draw_the_same(tmp_path: Path) -> None:
    """30 rows of n, 10 of s: a fifth is 6 and 2."""
    file = table(tmp_path, long())

    def made(**how: Any) -> ClientData:
        return ClientData.from_csv(file, client="site", y="y", test_share=0.2, **how)

    data = made()
    assert data.sizes.tolist() == [24, 8]
    assert data.test is not None
    held, kept = {*data.test[0].view(-1).tolist()}, {*data.x[data.indices].view(-1).tolist()}
    assert len(held) == 8
    assert held | kept == set(range(40))
    assert not held & kept
    assert data.client_tests is None
    assert made().split_sha256 == data.split_sha256 != made(seed=1).split_sha256


def test_the_held_out_examples_can_be_their_clients_own_tests(tmp_path: Path) -> None:
    data = ClientData.from_csv(table(tmp_path, long()), client="site", y="y", test_share=0.2, client_tests=True)
    assert data.client_tests is not None
    assert data.test is not None
    assert {name: len(y) for name, (_, y) in data.client_tests.items()} == {"n": 6, "s": 2}
    assert all(int(a) % 4 for a in data.client_tests["n"][0])
    assert torch.cat([x for x, _ in data.client_tests.values()]).equal(data.test[0])


def test_a_test_file_is_read_in_the_terms_of_the_training_file(tmp_path: Path) -> None:
    test = table(tmp_path, "label,dose,age,site\nwell,1,2,south\n", "test.csv")
    data = ClientData.from_csv(table(tmp_path), client="site", y="label", test=test, client_tests=True)
    assert data.test is not None
    assert (data.test[0].tolist(), data.test[1].tolist()) == ([[2, 1]], [1])
    assert list(data.client_tests or {}) == ["south"]
    with refused("E224", "label 'dead': expected one of ill, well", "test.csv:2"):
        ClientData.from_csv(
            table(tmp_path), client="site", y="label", test=table(tmp_path, "age,dose,label\n1,2,dead\n", "test.csv")
        )
    with refused("E224", "client 'west': expected one of north, south", "test.csv:2"):
        test = table(tmp_path, "age,dose,label,site\n1,2,ill,west\n", "test.csv")
        ClientData.from_csv(table(tmp_path), client="site", y="label", test=test, client_tests=True)


def test_held_out_works_on_data_from_anywhere_and_refuses_what_would_leak() -> None:
    """A client of one example keeps it; of ten, a fifth are two."""
    x = torch.arange(11.0)[:, None]
    data = ClientData.from_clients({"a": (x[:1], [0]), "b": (x[1:], [1] * 10)}, test_share=0.2)
    assert data.sizes.tolist() == [1, 8]
    assert data.test is not None
    assert len(data.test[1]) == 2
    with impossible("there is a test set already"):
        data.held_out(0.2)
    shared = ClientData.from_index(x, [0] * 11, {"a": [0, 1, 2], "b": [2, 3, 4]})
    with impossible("clients share examples"):
        shared.held_out(0.4)
    with impossible("no client has enough examples"):
        ClientData.from_clients({"a": (x[:2], [0, 0])}, test_share=0.1)


# ---- Datasets with a column


class Clinics(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self) -> None:
        self.hospital = ["b", "a", "b", "b"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(i)]), i % 2


def test_a_column_is_taken_from_the_dataset_itself() -> None:
    data = ClientData.from_dataset(Clinics(), partition="column:hospital")
    assert data.names == ("a", "b")
    assert data.sizes.tolist() == [1, 3]
    part = ClientData.from_dataset(Subset(Clinics(), [1, 2]), partition="column:hospital")
    assert part.sizes.tolist() == [1, 1]
    with impossible("no column 'town'", "or a Dataset with an attribute 'town'"):
        ClientData.from_dataset(Clinics(), partition="column:town")


def test_a_dataset_can_be_split_and_held_out_at_once() -> None:
    data = ClientData.from_dataset((torch.rand(20, 2), torch.arange(20) % 2), clients=2, test_share=0.3)
    assert data.sizes.tolist() == [7, 7]
    assert data.test is not None
    assert len(data.test[1]) == 6


# ---- folders


def arrays(folder: Path, **clients: int) -> Path:
    for name, n in clients.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        x = np.arange(n * 2, dtype=np.float64).reshape(n, 2)
        np.savez(folder / name / "part.npz", x=x, y=np.arange(n) % 2 + 5)
    return folder


def test_folders_are_clients_and_their_arrays_the_examples(tmp_path: Path) -> None:
    arrays(tmp_path / "data", north=3, south=2)
    (tmp_path / "data" / ".hidden").mkdir()
    (tmp_path / "data" / "north" / "notes.txt").write_text("of no matter")
    data = ClientData.from_folders(f"{tmp_path}/data/*/")
    assert (data.names, data.sizes.tolist()) == (("north", "south"), [3, 2])
    assert (data.name, data.partition) == ("data", "by folder")
    assert data.x.dtype == torch.float32
    assert data.y.tolist() == [0, 1, 0, 0, 1]  # 5, 6
    assert ClientData.from_folders(tmp_path / "data").split_sha256 == data.split_sha256


def test_safetensors_keep_their_dtype(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"x": np.ones((2, 3), np.int64), "y": np.zeros((2, 3), np.int64)}, tmp_path / name / "p.safetensors")
    data = ClientData.from_folders(tmp_path)
    assert (data.x.dtype, data.y.shape) == (torch.int64, (4, 3))  # a label for every token


def test_a_file_for_each_client_does_as_well(tmp_path: Path) -> None:
    for name in ("one", "two"):
        table(tmp_path, "a,y\n1,0\n2,1\n", f"{name}.csv")
    data = ClientData.from_folders(f"{tmp_path}/*.csv", y="y", test_share=0.5)
    assert (data.names, data.sizes.tolist()) == (("one", "two"), [1, 1])
    table(tmp_path, "b,y\n1,0\n", "two.csv")
    with refused("E222", "column 'a' is only in one of this and .*one.csv", "two.csv"):
        ClientData.from_folders(f"{tmp_path}/*.csv", y="y")
    table(tmp_path, "a,y\n1,0\n2,x\n3,inf\n", "two.csv")
    with refused("E224", "label 'x'", "two.csv:3"):
        ClientData.from_folders(f"{tmp_path}/*.csv", y="y", classes=2)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "bad.npz", x=np.array([{}, {}], dtype=object), y=np.array([0, 1]))
    with refused("E218", "bad.npz", "pickled objects are never loaded"):
        ClientData.from_folders(tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "code", "words"),
    [
        (np.ones((2, 1)), np.zeros(3), "E212", ("x: 2, y: 3", "a/p.npz")),
        (np.array([[1.0], [np.nan]]), np.zeros(2), "E223", ("'x' holds nan", "p.npz, example 1")),
        (np.array([[1.0], [-1e40]]), np.zeros(2), "E223", ("'x' holds -inf", "p.npz, example 1")),
        (np.ones((2, 1)), np.array([0.5, 1]), "E224", ("label '0.5': expected one of 0, 1, 2", "p.npz, example 0")),
        (np.ones((2, 1)), np.array([0, 9]), "E224", ("label '9': expected one of 0, 1, 2", "p.npz, example 1")),
    ],
)
def test_wrong_arrays_are_refused_with_file_and_example(
    tmp_path: Path, x: Any, y: Any, code: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "p.npz", x=x, y=y)
    with refused(code, *words):
        ClientData.from_folders(tmp_path, classes=3)


def test_folders_without_anything_to_read_say_what_is_expected(tmp_path: Path) -> None:
    with refused("E221", "no such folder"):
        ClientData.from_folders(tmp_path / "nowhere" / "*/")
    with refused("E210", "finds no folder or file"):
        ClientData.from_folders(f"{tmp_path}/*/")
    (tmp_path / "a").mkdir()
    with refused("E211", "nothing that can be read", ".npz"):
        ClientData.from_folders(tmp_path)
    arrays(tmp_path, a=2)
    table(tmp_path, name="b.csv")
    with refused("E218", "expected one kind"):
        ClientData.from_folders(tmp_path)
    with impossible("client='site': the folders are the clients"):
        ClientData.from_folders(tmp_path, client="site")


# ---- images


def pictures(folder: Path, mode: str = "L", size: tuple[int, int] = (4, 3)) -> Path:
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(("n/cat/1.png", "n/dog/1.png", "s/dog/1.png", "s/dog/deep/2.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.new(mode, size, color=i * 10).save(folder / name)
    return folder


def test_images_lie_in_a_folder_for_each_class(tmp_path: Path) -> None:
    data = ClientData.from_folders(f"{pictures(tmp_path)}/*/")
    assert data.x.shape == (4, 3, 4, 1)
    assert data.x.dtype == torch.uint8
    assert data.x[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.y.tolist() == [0, 1, 1, 1]
    assert data.label_names == ("cat", "dog")
    assert data.transform(data.x, None).shape == (4, 1, 3, 4)


def test_one_image_in_colour_makes_all_of_them_colour(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures(tmp_path)
    image.new("RGB", (4, 3), color=(1, 2, 3)).save(tmp_path / "s/dog/1.png")
    x = ClientData.from_folders(tmp_path).x
    assert x[:, 0, 0].tolist() == [[0, 0, 0], [10, 10, 10], [1, 2, 3], [30, 30, 30]]


def test_images_of_several_sizes_are_refused_or_scaled(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures(tmp_path)
    image.new("L", (8, 6)).save(tmp_path / "s/dog/1.png")
    with refused("E215", "6 x 8 pixels, the first has 3 x 4", "s/dog/1.png", r"size=\(3, 4\)"):
        ClientData.from_folders(tmp_path)
    assert ClientData.from_folders(tmp_path, size=(5, 5)).x.shape == (4, 5, 5, 1)


def test_a_test_folder_of_images_and_what_is_wrong_with_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures(tmp_path / "train")
    (tmp_path / "test" / "dog").mkdir(parents=True)
    image.new("RGB", (4, 3), color=(90, 90, 90)).save(tmp_path / "test" / "dog" / "a.jpg")
    data = ClientData.from_folders(tmp_path / "train", test=tmp_path / "test")
    assert data.test is not None
    assert (data.test[0].shape, data.test[1].tolist()) == ((1, 3, 4, 1), [1])  # grey, as the training images are
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cow")
    with refused("E224", "label 'cow': expected one of cat, dog", "a.jpg"):
        ClientData.from_folders(tmp_path / "train", test=tmp_path / "test")
    (tmp_path / "train/n/cat/1.png").write_bytes(b"no image")
    with refused("E218", "not to be read as an image", "n/cat/1.png"):
        ClientData.from_folders(tmp_path / "train")
    image.new("I;16", (4, 3)).save(tmp_path / "train/n/cat/1.png")
    with refused("E218", "expected 8 bits", "n/cat/1.png"):
        ClientData.from_folders(tmp_path / "train")
    for bad in (tmp_path / "train/n/cat", tmp_path / "train/n/dog"):
        (bad / "1.png").rename(tmp_path / "train/n" / f"{bad.name}.png")
    with refused("E218", "cat.png lies in no folder that says its class"):
        ClientData.from_folders(tmp_path / "train")
    with impossible("x='a': these folders hold images"):
        ClientData.from_folders(pictures(tmp_path / "other"), x="a")
    with impossible("standardise=True: x is uint8", "transform=Images"):
        ClientData.from_folders(tmp_path / "other", standardise=True)


# ---- parquet, Hugging Face


def test_the_same_rows_give_the_same_split_from_csv_and_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = "site,a,y\n10,1,2\n9,2,3\n10,3,2\n"
    numbers = {"site": [10, 9, 10], "a": [1.0, 2, 3], "y": [2, 3, 2]}
    file = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table(numbers), file)
    one = ClientData.from_csv(table(tmp_path, rows), client="site", y="y", test_share=0.5, seed=4)
    other = ClientData.from_parquet(file, client="site", x=["a"], y="y", test_share=0.5, seed=4)
    assert one.split_sha256 == other.split_sha256
    assert one.fingerprint == other.fingerprint
    assert one.x.equal(other.x)


def test_a_parquet_column_of_lists_and_what_parquet_refuses(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.parquet"

    def write(**columns: Any) -> None:
        parquet.write_table(pyarrow.table({"site": ["a", "b"], "y": [0, 1], **columns}), file)

    write(x=[[1.0, 2], [3, 4]])
    assert ClientData.from_parquet(file, client="site", x="x", y="y").x.tolist() == [[1, 2], [3, 4]]
    write(x=[[1.0, 2], [3]])
    with refused("E215", "lists of different lengths", "t.parquet"):
        ClientData.from_parquet(file, client="site", x="x", y="y")
    write(x=[1.0, None])
    with refused("E223", "'x' (is empty|holds nan)", "t.parquet, row 1"):
        ClientData.from_parquet(file, client="site", x="x", y="y")
    with refused("E222", "no column 'z'", "columns: site, y, x"):
        ClientData.from_parquet(file, client="site", x="z", y="y")
    file.write_text("no parquet")
    with refused("E218", "not a parquet file"):
        ClientData.from_parquet(file, client="site", x="x", y="y")
    with refused("E221", "no such file"):
        ClientData.from_parquet(tmp_path / "u.parquet", client="site", x="x", y="y")


def test_a_missing_extra_says_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with refused("E219", "pyarrow, which is not installed", r"pip install 'lamina\[parquet\]'"):
        ClientData.from_parquet(tmp_path / "t.parquet", y="y")
    with refused("E219", r"pip install 'lamina\[hf\]'"):
        ClientData.from_hf("somebody/something", y="y")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    return pytest.importorskip("datasets")


def test_a_hugging_face_data_set_keeps_the_places_of_its_class_names(hub: Any, tmp_path: Path) -> None:
    """Its labels are 0 and 2 of three: nothing is renumbered."""
    features = hub.Features(
        user_id=hub.Value("int64"), text=hub.Value("string"), label=hub.ClassLabel(names=["no", "maybe", "yes"])
    )
    rows = {"user_id": [10, 9, 10], "text": ["a", "bb", "ccc"], "label": [0, 2, 2]}
    both = hub.DatasetDict(
        train=hub.Dataset.from_dict(rows, features=features), validation=hub.Dataset.from_dict(rows, features=features)
    )

    def lengths(texts: list[str]) -> list[list[int]]:
        return [[len(text)] for text in texts]

    data = ClientData.from_hf(both, column="user_id", x="text", y="label", encode=lengths, test="validation")
    assert data.names == ("9", "10")
    assert (data.x.tolist(), data.y.tolist(), data.classes) == ([[1], [2], [3]], [0, 2, 2], 3)
    assert data.label_names == ("no", "maybe", "yes")
    assert data.test is not None
    both.save_to_disk(tmp_path / "saved")
    saved = ClientData.from_hf(str(tmp_path / "saved"), column="user_id", x="text", y="label", encode=lengths)
    assert saved.split_sha256 == data.split_sha256
    with impossible("split='valid': expected one of train, validation"):
        ClientData.from_hf(both, split="valid", column="user_id", x="text", y="label", encode=lengths)
    with refused("E221", "LAMINA_OFFLINE is set", "save_to_disk"):
        ClientData.from_hf("somebody/something", column="user_id", x="text", y="label")
    with refused("E223", "column 'text' holds 'a', expected a finite number", r"dataset\[train\], row 0"):
        ClientData.from_hf(both, column="user_id", x="text", y="label")
    with refused("E222", r"no column 'txt'  \[dataset\]", "did you mean 'text'"):
        ClientData.from_hf(both, column="user_id", x="txt", y="label")
    with refused("E218", "list: expected a Dataset"):
        ClientData.from_hf([1, 2], column="user_id", x="text", y="label")


def test_images_of_hugging_face_become_bytes(hub: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    shown = [image.new("RGB", (3, 2), color=(i, 0, 0)) for i in range(4)]
    rows = hub.Dataset.from_dict({"image": shown, "label": [0, 1, 0, 1]}, features=hub.Features(
        image=hub.Image(), label=hub.Value("int64")
    ))  # fmt: skip
    data = ClientData.from_hf(rows, x="image", y="label", clients=2, partition="iid")
    assert data.x.shape == (4, 2, 3, 3)
    assert data.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
