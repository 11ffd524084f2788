"""ClientData: what it holds, what it shares, what it refuses."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lamina.data.client_data import ClientData
from lamina.data.transform import Identity, Images
from lamina.errors import ConfigError, DataError


def make(*sizes: int) -> ClientData:
    """Clients "a", "b", ...: x counts the examples from 0, y = x modulo 3."""
    parts, begin = {}, 0
    for name, size in zip("abcdefgh", sizes, strict=False):
        at = torch.arange(begin, begin + size)
        parts[name] = (at.float()[:, None], at % 3)
        begin += size
    return ClientData.from_clients(parts)


class Pairs(Dataset):
    def __init__(self, *items: object):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.items[i]


def refused(code: str, *words: str):
    return pytest.raises(DataError, match=f"(?s)^{code}.*" + ".*".join(words))


# ---- what it holds


def test_clients_keep_their_order_and_examples():
    data = make(2, 3)
    assert len(data) == 2
    assert data.names == ("a", "b")
    assert data.sizes.tolist() == [2, 3]
    x, y = data.examples(data.indices_of(1))
    assert x.tolist() == [[2.0], [3.0], [4.0]]
    assert y.tolist() == [2, 0, 1]


def test_label_table_counts_labels_by_client():
    data = make(2, 4)
    assert data.classes == 3
    assert data.label_table().tolist() == [[1, 1, 0], [1, 1, 2]]


def test_classes_count_the_labels_of_the_test_set_too():
    x = torch.zeros(2, 1)
    data = ClientData.from_clients({"a": (x, torch.tensor([0, 1]))}, test=(x, torch.tensor([0, 6])))
    assert data.classes == 7
    assert data.label_table().shape == (1, 7)


def test_targets_that_are_no_labels_have_no_classes():
    data = ClientData.from_clients({"a": (torch.zeros(2, 1), torch.zeros(2))})
    assert data.classes is None
    assert data.label_table() is None


def test_entries_of_a_dict_travel_together():
    x = {"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}
    data = ClientData.from_clients({"a": (x, torch.arange(3)), "b": (x, torch.arange(3))})
    got, _ = data.examples(torch.tensor([4]))
    assert got["ids"].tolist() == [[2, 3]]
    assert data.x["mask"].shape == (6, 2)


def test_integer_labels_of_any_width_become_int64():
    data = ClientData.from_clients({"a": (np.zeros((2, 1)), np.array([0, 1], dtype=np.uint8))})
    assert data.y.dtype == torch.int64


def test_index_groups_keep_their_order_and_share_the_examples():
    x, y = torch.arange(5.0), torch.zeros(5)
    data = ClientData.from_index(x, y, {"late": [4, 0], "early": np.array([2])}, name="n", partition="natural")
    assert data.x.data_ptr() == x.data_ptr()
    assert data.examples(data.indices_of(0))[0].tolist() == [4.0, 0.0]
    assert (data.name, data.partition) == ("n", "natural")


def test_subset_shares_examples_and_keeps_the_tests_of_its_clients():
    data = make(2, 3, 1)
    pair = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    parts = {name: data.examples(data.indices_of(i)) for i, name in enumerate(data.names)}
    data = ClientData.from_clients(parts, test=pair, client_tests={"a": pair, "c": pair})
    part = data.subset([2, 1])
    assert part.names == ("c", "b")
    assert part.x is data.x
    assert part.test is data.test
    assert set(part.client_tests) == {"c"}
    assert part.indices.tolist() == [5, 2, 3, 4]


def test_pooled_is_one_client_with_every_held_example_once():
    x, y = torch.arange(6.0)[:, None], torch.arange(6) % 3
    pair = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    groups = {"a": [4, 1], "b": [1, 0, 5]}
    data = ClientData.from_index(x, y, groups, test=pair, client_tests={"a": pair}, name="six")
    pooled = data.pooled()
    assert (pooled.names, pooled.partition, pooled.name) == (("all",), "pooled", "six")
    assert pooled.indices.tolist() == [0, 1, 4, 5]
    assert pooled.x is data.x
    assert pooled.test is data.test
    assert pooled.transform is data.transform
    assert pooled.client_tests is None


def test_the_sum_of_the_pool_is_that_of_the_examples_and_not_of_the_split():
    x, y = torch.zeros(4, 1), torch.arange(4) % 2
    first = ClientData.from_index(x, y, {"a": [0, 1], "b": [2, 3]})
    second = ClientData.from_index(x, y, {"a": [3], "b": [2, 0], "c": [1]})
    assert first.pool_sha256 == second.pool_sha256 == first.pooled().pool_sha256
    assert first.split_sha256 != second.split_sha256
    others = [
        ClientData.from_index(x, y, {"a": [0, 1, 2]}),
        ClientData.from_index(x, 1 - y, {"a": [0, 1, 2, 3]}),
        ClientData.from_index(x, y, {"a": [0, 1, 2, 3]}, test=(x, y)),
        ClientData.from_index(x, y, {"a": [0, 1, 2, 3]}, name="other"),
    ]
    assert len({data.pool_sha256 for data in (first, *others)}) == 5


def test_it_survives_pickling():
    data = make(2, 3)
    again = pickle.loads(pickle.dumps(data))
    assert again.split_sha256 == data.split_sha256
    assert repr(again) == "ClientData(custom, given: 2 clients, 5 examples, 3 classes)"


# ---- names of the labels


def test_names_of_labels_go_with_the_data_and_change_no_sum():
    x, y = torch.zeros(10, 2), torch.arange(10) % 3
    bare = ClientData.from_dataset((x, y), clients=2)
    data = ClientData.from_dataset((x, y), clients=2, label_names=["no", "maybe", "yes", "never seen"])
    names = ("no", "maybe", "yes", "never seen")
    for made in (data, data.subset([1]), data.pooled(), data.held_out(0.2), data.among(["0", "1", "2"]),
                 replace(data, test=(x, y)), pickle.loads(pickle.dumps(data)),
                 ClientData.from_clients({"a": (x, y)}, label_names=names, test_share=0.2)):  # fmt: skip
        assert made.label_names == names
    assert data.classes == 3
    for sum_of in ("split_sha256", "pool_sha256", "fingerprint"):
        assert getattr(data, sum_of) == getattr(bare, sum_of)
    assert bare.label_names is None


def test_too_few_names_of_labels_are_refused():
    x, y = torch.zeros(4, 2), torch.arange(4)
    with pytest.raises(DataError, match=r"E224.*expected 4 names or more, as there are labels to 3, got 3"):
        ClientData.from_index(x, y, {"a": [0, 1, 2]}, label_names=["a", "b", "c"])
    with pytest.raises(ConfigError, match="label_names='abcd': expected a list of names"):
        ClientData.from_index(x, y, {"a": [0, 1, 2]}, label_names="abcd")


# ---- from a data set


def test_tensors_are_not_copied():
    x, y = torch.zeros(10, 2), torch.arange(10) % 2
    data = ClientData.from_dataset((x, y), (x, y), clients=2)
    assert data.x.data_ptr() == x.data_ptr()
    assert data.test[0].data_ptr() == x.data_ptr()
    assert ClientData.from_dataset(TensorDataset(x, y), clients=2).x.data_ptr() == x.data_ptr()
    assert data.names == ("0", "1")


def test_a_read_only_memory_map_backs_x_without_a_copy_or_a_warning(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.uint8).reshape(6, 2))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = ClientData.from_dataset((x, np.arange(6)), clients=2)
    assert data.x.data_ptr() == x.ctypes.data
    assert data.examples(torch.tensor([5]))[0].tolist() == [[10, 11]]


def test_arrays_of_foreign_byte_order_or_direction_are_read():
    x = np.arange(4, dtype=">f4")[::-1]
    data = ClientData.from_dataset((x, np.zeros(4)), clients=1)
    assert data.x.tolist() == [3.0, 2.0, 1.0, 0.0]


def test_a_dataset_is_read_item_by_item():
    data = ClientData.from_dataset(Pairs((1.5, 0), (np.float64(2.5), np.int32(1)), (3.5, True)), clients=1)
    assert data.x.dtype == torch.float32
    assert data.x.tolist() == [1.5, 2.5, 3.5]
    assert data.y.tolist() == [0, 1, 1]


def test_items_may_be_dicts():
    item = {"ids": torch.tensor([1, 2]), "mask": [1.0, 0.0]}
    data = ClientData.from_dataset([(item, 0), (item, 1)], clients=1)
    assert data.x["ids"].tolist() == [[1, 2], [1, 2]]
    assert data.x["mask"].dtype == torch.float32


def test_pillow_images_become_bytes_and_reach_the_model_channels_first():
    image = pytest.importorskip("PIL.Image")
    grey, colour = image.new("L", (4, 3), 51), image.new("RGB", (4, 3), (0, 51, 255))
    data = ClientData.from_dataset([(grey, 0)], clients=1)
    assert (data.x.dtype, tuple(data.x.shape)) == (torch.uint8, (1, 3, 4, 1))
    data = ClientData.from_dataset([(colour, 0)], clients=1)
    out = data.transform(data.x, None)
    assert out.shape == (1, 3, 3, 4)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0, 0.2, 1]))
    assert isinstance(ClientData.from_dataset([(colour, 0)], clients=1, transform=Identity()).transform, Identity)


def test_a_column_makes_one_client_of_each_value_in_order():
    x, y = torch.arange(5.0), torch.zeros(5)
    columns = {"ward": [10, 9, 10, 9, 9], "name": np.array(["b", "a", "b", "a", "c"])}
    data = ClientData.from_dataset((x, y), clients=None, partition="column:ward", columns=columns)
    assert data.names == ("9", "10")
    assert data.indices.tolist() == [1, 3, 4, 0, 2]
    data = ClientData.from_dataset((x, y), clients=3, partition="column:name", columns=columns)
    assert data.names == ("a", "b", "c")
    assert data.partition == "column:name"


def test_a_column_is_refused_where_it_does_not_fit():
    pair = (torch.zeros(3), torch.zeros(3))
    columns = {"a": [1, 1, 2], "short": [1], "gap": [1.0, math.nan, 2.0]}
    with pytest.raises(ConfigError, match="no column 'b': known are"):
        ClientData.from_dataset(pair, clients=None, partition="column:b", columns=columns)
    with pytest.raises(ConfigError, match="clients=5: the column has 2 values"):
        ClientData.from_dataset(pair, clients=5, partition="column:a", columns=columns)
    with refused("E212", "column:short"):
        ClientData.from_dataset(pair, clients=None, partition="column:short", columns=columns)
    with refused("E218", "the first is 1", "column:gap"):
        ClientData.from_dataset(pair, clients=None, partition="column:gap", columns=columns)


def test_a_number_of_clients_is_asked_for():
    with pytest.raises(ConfigError, match="clients=None"):
        ClientData.from_dataset((torch.zeros(3), torch.zeros(3)), clients=None)


# ---- identity of a split


def test_the_sum_of_a_split_covers_names_sizes_and_indices():
    x, y = torch.zeros(4), torch.zeros(4)
    groups = [
        {"a": [0, 1], "b": [2, 3]},
        {"a": [0, 1], "c": [2, 3]},
        {"a": [0], "b": [1, 2, 3]},
        {"a": [1, 0], "b": [2, 3]},
    ]
    sums = {ClientData.from_index(x, y, group).split_sha256 for group in groups}
    assert len(sums) == 4


def test_the_fingerprint_covers_the_form_of_the_examples():
    groups = {"a": [0, 1]}
    one = ClientData.from_index(torch.zeros(2, 3), torch.zeros(2), groups)
    two = ClientData.from_index(torch.zeros(2, 4), torch.zeros(2), groups)
    assert one.split_sha256 == two.split_sha256
    assert one.fingerprint != two.fingerprint


def test_the_same_seed_gives_the_same_split_in_another_process():
    program = (
        "import torch; from lamina.data.client_data import ClientData\n"
        "pair = (torch.zeros(500, 1), torch.arange(500) % 7)\n"
        "for rule in ('iid', 'dirichlet:0.3', 'dirichlet:0.3:balanced', 'pathological:2', 'quantity:0.5'):\n"
        "    print(ClientData.from_dataset(pair, clients=9, partition=rule, seed=3).split_sha256)\n"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    pair = (torch.zeros(500, 1), torch.arange(500) % 7)
    rules = ("iid", "dirichlet:0.3", "dirichlet:0.3:balanced", "pathological:2", "quantity:0.5")
    here = [ClientData.from_dataset(pair, clients=9, partition=rule, seed=3).split_sha256 for rule in rules]
    assert other.split() == here


# ---- what it refuses


def test_no_clients_are_refused():
    with refused("E210", "no clients"):
        ClientData.from_clients({})
    with refused("E210", "no clients"):
        make(2).subset([])


def test_clients_without_examples_are_listed():
    with refused("E211", "2 of 4 clients have no examples: 'b', 'd'", "leave them out"):
        make(1, 0, 2, 0)
    with refused("E211", "1 of 2 clients have no examples: 'b'"):
        ClientData.from_index(torch.zeros(2), torch.zeros(2), {"a": [0, 1], "b": []})


def test_x_and_y_of_different_lengths_are_refused():
    with refused("E212", "x: 2, y: 3", "client 'b'"):
        ClientData.from_clients({"a": (torch.zeros(1), torch.zeros(1)), "b": (torch.zeros(2), torch.zeros(3))})
    with refused("E212", "train"):
        ClientData.from_dataset((torch.zeros(2), torch.zeros(3)), clients=1)
    with refused("E212", "test"):
        ClientData.from_dataset((torch.zeros(2), torch.zeros(2)), (torch.zeros(2), torch.zeros(3)), clients=1)


def test_two_clients_of_one_name_are_refused():
    pair = (torch.zeros(1), torch.zeros(1))
    with refused("E213"):
        ClientData.from_clients({"1": pair, 1: pair})  # type: ignore[dict-item]
    with refused("E213", "client 'a'"):
        ClientData(*pair, ("a", "a"), torch.tensor([0, 1, 2]), torch.tensor([0, 0]))


def test_a_test_set_for_an_unknown_client_is_refused():
    pair = (torch.zeros(1), torch.zeros(1))
    with refused("E213", "'z'", "names are a"):
        ClientData.from_clients({"a": pair}, client_tests={"z": pair})


def test_numbers_that_are_not_finite_are_found_with_their_client():
    good, bad = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [1.0, math.inf], [math.nan, 0.0]])
    y = torch.zeros(3, dtype=torch.int64)
    with refused("E214", "x of example 4 is not finite", "client 'b', its example 1"):
        ClientData.from_clients({"a": (good, y), "b": (bad, y)})
    with refused("E214", "y of example 2", "client 'a', its example 2"):
        ClientData.from_clients({"a": (good, torch.tensor([0.0, 0.0, math.nan]))})
    with refused("E214", r"x\['v'\]", "test of client 'a'"):
        ClientData.from_clients({"a": ({"v": good}, y)}, client_tests={"a": ({"v": bad}, y)})


def test_the_search_for_such_numbers_reaches_every_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.data.client_data.CHUNK", 4)
    x = torch.zeros(9, 2)
    x[8, 1] = math.inf
    with refused("E214", "example 8", "held by no client"):
        ClientData.from_index(x, torch.zeros(9), {"a": [0]})


def test_a_client_of_another_shape_or_dtype_is_refused():
    y = torch.zeros(2, dtype=torch.int64)
    with refused("E215", r"\[3\], elsewhere torch.float32 \[2\]", "client 'b': x"):
        ClientData.from_clients({"a": (torch.zeros(2, 2), y), "b": (torch.zeros(2, 3), y)})
    with refused("E215", "client 'b': y"):
        ClientData.from_clients({"a": (torch.zeros(2, 2), y), "b": (torch.zeros(2, 2), y.float())})
    with refused("E215", "test: x"):
        ClientData.from_clients({"a": (torch.zeros(2, 2), y)}, test=(torch.zeros(2, 2, dtype=torch.uint8), y))
    with refused("E215", "item 1"):
        ClientData.from_dataset([(torch.zeros(2), 0), (torch.zeros(3), 0)], clients=1)


def test_negative_labels_are_refused():
    with refused("E216", "label -1 of example 1", "client 'a', its example 1"):
        ClientData.from_clients({"a": (torch.zeros(2), torch.tensor([0, -1]))})


def test_an_index_outside_the_examples_is_refused():
    with refused("E217", "index 2: expected 0 <= index < 2", "client 'b'"):
        ClientData.from_index(torch.zeros(2), torch.zeros(2), {"a": [0], "b": [1, 2]})
    with refused("E217", "not integers", "client 'a'"):
        ClientData.from_index(torch.zeros(2), torch.zeros(2), {"a": [0.5]})


@pytest.mark.parametrize("train", [iter([]), (torch.zeros(2),), [1, 2], [("text", 0)], (np.array(["a"]), np.zeros(1))])
def test_what_is_no_data_set_is_refused(train: object):
    with refused("E218"):
        ClientData.from_dataset(train, clients=1)


def test_the_transform_can_be_chosen():
    images = Images((0.5,), (0.5,))
    data = ClientData.from_dataset(
        (torch.zeros(4, 2, 2, 1, dtype=torch.uint8), torch.zeros(4)), clients=2, transform=images
    )
    assert data.transform is images
    assert isinstance(make(1).transform, Identity)
