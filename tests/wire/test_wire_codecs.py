"""What each codec and each coding does to a tree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.wire import (
    CODECS,
    Codec,
    Context,
    Dense,
    RandomK,
    Size,
    TopK,
    WireError,
    decode,
    encode,
    parse,
    schema_of,
    sized,
    transmit,
)
from lamina.wire.index import draw
from lamina.wire.sparse import above, largest

NAN, INF = math.nan, math.inf


def kept(x, codec, **known):
    return transmit({"x": torch.as_tensor(x)}, codec, **known)[0]["x"].tolist()


def test_top_k_keeps_the_largest_magnitudes_with_their_signs():
    assert kept([0.1, -3.0, 2.0, 0.5], TopK(0.5)) == [0, -3, 2, 0]


def test_ties_keep_the_lower_index():
    assert kept([1.0, -1.0, 1.0, 1.0], TopK(0.5)) == [1, -1, 0, 0]


def test_top_k_keeps_at_least_one_entry_per_tensor():
    assert kept([1.0, 2.0, 3.0], TopK(0.01)) == [0, 0, 3]


def test_k_is_rounded_half_to_even():
    assert sum(x != 0 for x in kept([1.0, 2, 3, 4, 5], TopK(0.5))) == 2
    assert sum(x != 0 for x in kept([1.0, 2, 3, 4, 5, 6, 7], TopK(0.5))) == 4


def test_global_scope_ranks_all_tensors_together():
    tree = {"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([5.0, 6.0])}
    received, _ = transmit(tree, TopK(0.5, scope="global"))
    assert received["small"].tolist() == [0, 0]
    assert received["large"].tolist() == [5, 6]


def test_released_keeps_one_more_and_drops_ties_at_the_threshold():
    assert kept([1.0, 2, 3, 4, 5, 6], TopK(1 / 3, keep="released")) == [0, 0, 0, 4, 5, 6]  # round(2) + 1
    assert kept([1.0, 3, 3, 3, 5, 6], TopK(1 / 3, keep="released")) == [0, 0, 0, 0, 5, 6]  # the 4th largest is a 3
    assert kept([0.0] * 6, TopK(1 / 3, keep="released")) == [0] * 6


def test_released_keeps_a_tensor_that_has_no_more_entries():
    assert kept([7.0, 8, 9], TopK(2 / 3, keep="released")) == [7, 8, 9]  # 3 entries, 3 wanted
    assert kept([7.0, 8, 9, 9.5], TopK(2 / 3 - 0.1, keep="released")) == [0, 8, 9, 9.5]  # 4 entries, 3 wanted


def test_densities_count_kept_entries_under_a_mask():
    x = [9.0, 1.0, 8.0, 2.0, 3.0]
    mask = {"x": torch.tensor([False, True, False, True, True])}
    assert kept(x, TopK(1 / 3), mask=mask) == [0, 0, 0, 0, 3]
    assert kept(x, Dense("fp32"), mask=mask) == [0, 1, 0, 2, 3]
    assert kept(x, Dense("sign"), mask=mask) == [0, 2, 0, 2, 2]
    assert sum(v != 0 for v in kept(x, RandomK(2 / 3), mask=mask)) == 2


def test_a_magnitude_that_is_not_finite_is_always_sent():
    x = torch.ones(1000)
    x[500], x[700] = NAN, -INF
    received = torch.tensor(kept(x, TopK(0.002)))
    assert received[500].isnan()
    assert received[700] == -INF


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8", "sign", "lossless", "fp32"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_so(values, bad):
    x = torch.linspace(-1, 1, 600)
    x[300] = bad
    for codec in (Dense(values), TopK(0.1, values=values)):
        blob = encode({"x": x}, codec)
        assert not decode(blob, {"x": x})["x"][300].isfinite()
        received, size = transmit({"x": x}, codec)
        assert not received["x"][300].isfinite()
        assert size.total == len(blob)


def test_int8_error_is_at_most_half_a_step_of_its_block():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    error = (torch.tensor(kept(x, Dense("int8"))) - x).abs()
    for block, wrong in zip(x.split(256), error.split(256), strict=True):
        assert wrong.max() <= block.abs().max() / 127 * 0.5001


@pytest.mark.parametrize("tiny", [1e-45, 1e-44, 1e-40, 1e-38, 3e38])
def test_int8_of_extreme_values_stays_finite(tiny):
    assert np.isfinite(kept([tiny, -tiny, 0.0], Dense("int8"))).all()


def test_int8_blocks_and_sign_scales_do_not_cross_tensors():
    tree = {"a": torch.tensor([1000.0]), "b": torch.tensor([0.01, -0.02])}
    assert transmit(tree, Dense("int8"))[0]["b"].tolist() == pytest.approx([0.01, -0.02], rel=0.01)
    assert transmit(tree, Dense("sign"))[0]["b"].tolist() == pytest.approx([0.015, -0.015])


def test_sign_scale_is_the_mean_of_the_kept_entries():
    assert kept([1.0, -3.0, 5.0, 0.0], TopK(0.5, values="sign")) == [0, -4, 4, 0]


def test_casts_are_those_of_torch():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert kept(x, Dense("fp16")) == x.half().float().tolist()
    assert kept(x, Dense("bf16")) == x.bfloat16().float().tolist()


def test_every_position_is_drawn_equally_often():
    counts = np.zeros(10)
    for seed in range(2000):
        counts[draw(10, 3, seed)] += 1
    assert abs(counts / 2000 - 0.3).max() < 0.05
    assert [len(draw(10, k, 1)) for k in range(11)] == list(range(11))


def test_random_positions_follow_from_the_address():
    x = {"x": torch.ones(1000)}

    def positions(**address):
        return tuple(transmit(x, RandomK(0.1), context=Context(schema_of(x), **address))[0]["x"].nonzero().flatten())

    assert positions(seed=1) == positions(seed=1)
    assert len({positions(), positions(seed=1), positions(round=1), positions(client=1), positions(purpose="a")}) == 5
    assert all(len(positions(seed=s)) == 100 for s in range(5))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_selection_agrees_with_a_sort(numbers, data):
    x = np.array(numbers, np.float32)
    order = np.argsort(-np.abs(x), kind="stable")
    k = data.draw(st.integers(1, len(x) - 1))
    assert largest(x.view(np.int32), k).tolist() == sorted(order[:k].tolist())
    assert above(x.view(np.int32), k).tolist() == np.flatnonzero(np.abs(x) > np.abs(x[order[k - 1]])).tolist()


@pytest.mark.parametrize("k", [1, 50, 1000, 20_000])
def test_sampled_selection_agrees_with_a_sort(k):
    g = np.random.default_rng(0)
    layouts = [
        g.standard_normal(100_000),
        np.round(g.standard_normal(100_000), 1),  # ties
        np.zeros(100_000),
        np.where(np.arange(100_000) % 3, 1e-3, g.standard_normal(100_000)),  # every third, as the sample steps
    ]
    for x in layouts:
        x = x.astype(np.float32)
        order = np.argsort(-np.abs(x), kind="stable")
        assert largest(x.view(np.int32), k).tolist() == sorted(order[:k].tolist())


def test_trees_of_any_dtype_travel_under_dense_fp32():
    tree = {
        "rank0": torch.tensor(7),
        "none": torch.empty(3, 0, 2),
        "count": torch.arange(-3, 3),
        "flag": torch.tensor([[True, False, True]] * 3),
        "moment": torch.tensor([math.pi], dtype=torch.float64),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, NAN], dtype=torch.bfloat16),
        "byte": torch.tensor([0, 255], dtype=torch.uint8),
        "int": torch.tensor([[1], [-1]], dtype=torch.int32),
        "float": torch.randn(3, 2),
    }
    decoded = decode(encode(tree, Dense("fp32")), tree)
    for name, x in tree.items():
        assert decoded[name].dtype == x.dtype
        assert decoded[name].shape == x.shape
        assert torch.equal(decoded[name].nan_to_num(), x.nan_to_num())
    assert len(encode({"flag": torch.ones(17, dtype=torch.bool)}, Dense("fp32"))) == 24 + 3


def test_float64_models_stay_exact():
    x = {"x": torch.randn(50, dtype=torch.float64)}
    for codec in (Dense("fp32"), Dense("lossless"), TopK(1.0)):
        assert torch.equal(decode(encode(x, codec), x)["x"], x["x"])
    received = decode(encode(x, TopK(0.1)), x)["x"]
    assert torch.equal(received[received != 0], x["x"][received != 0])


def test_what_cannot_be_coded_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"cannot code torch\.int64"):
        encode({"x": torch.arange(3)}, Dense("int8"))
    with pytest.raises(ConfigError, match=r"cannot rank torch\.int64"):
        encode({"x": torch.arange(3)}, TopK(0.4))
    with pytest.raises(WireError, match="does not travel"):
        encode({"x": torch.zeros(3, dtype=torch.complex64)}, Dense())


def test_senders_are_held_to_the_schema():
    schema = schema_of({"x": torch.zeros(2, 3)})
    for tree in ({"x": torch.zeros(3, 2)}, {"x": torch.zeros(2, 3).double()}, {"y": torch.zeros(2, 3)}):
        for act in (encode, transmit):
            with pytest.raises(WireError) as caught:
                act(tree, Dense(), context=Context(schema))
            assert caught.value.code == "E342"
    for mask in (torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(WireError) as caught:
            encode({"x": torch.zeros(2, 3)}, Dense(), mask={"x": mask})
        assert caught.value.code == "E346"


def test_gradients_do_not_travel():
    x = {"x": torch.ones(3, requires_grad=True)}
    for codec in (Dense(), Dense("int8"), TopK(0.5)):
        assert not transmit(x, codec)[0]["x"].requires_grad
        assert encode(x, codec)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 30, NAN, True, "0.1", None])
def test_densities_are_shares(density):
    for make in (TopK, RandomK):
        with pytest.raises(ConfigError, match=r"density=.*: expected 0 < density <= 1 \(a share, not a percentage\)"):
            make(density)


def test_impossible_options_are_refused_at_construction():
    for make in (lambda: Dense("fp8"), lambda: TopK(0.1, scope="row"), lambda: TopK(0.1, keep="most")):
        with pytest.raises(ConfigError, match="expected"):
            make()


def test_config_values_name_codecs():
    assert [parse(v) for v in ("fp32", "int8", "dense", "dense:sign")] == [
        Dense(),
        Dense("int8"),
        Dense(),
        Dense("sign"),
    ]
    assert parse("topk:0.01") == TopK(0.01)
    assert parse("topk:0.01:global") == TopK(0.01, scope="global")
    assert parse("topk:0.01:sign:released") == TopK(0.01, values="sign", keep="released")
    assert parse("randomk:0.1") == RandomK(0.1)
    assert parse({"name": "topk", "density": 0.01, "values": "sign"}) == TopK(0.01, values="sign")
    assert parse({"name": "topk:0.01", "values": "int8"}) == TopK(0.01, values="int8")
    assert parse({"name": "bf16"}) == Dense("bf16")
    assert parse(TopK(0.1)) == TopK(0.1)
    assert list(CODECS) == ["dense", "topk", "randomk"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tokp:0.1", "did you mean 'topk'"),
        ("fp23", "did you mean 'fp32'"),
        ("topk:0.1:globl", "did you mean 'global'"),
        ("topk", "density is missing"),
        ("topk:30", "not a percentage"),
        ("topk:0.1:0.2", "twice"),
        ({"name": "topk", "densty": 0.1}, "did you mean 'density'"),
        ({"density": 0.1}, "expected a name"),
        ("dense:0.1", "unknown key 'density'"),
        ("", "unknown codec"),
    ],
)
def test_config_errors_suggest_the_remedy(spec, said):
    with pytest.raises(ConfigError) as caught:
        parse(spec)
    assert said in str(caught.value)


class Doubled(Codec):
    """A user's codec of two methods."""

    lossless = True

    def encode(self, tree, context):
        return Dense().encode(tree, context) * 2

    def decode(self, blob, context):
        return Dense().decode(blob[: len(blob) // 2], context)


def test_a_codec_of_ones_own_needs_encode_and_decode_only():
    tree = {"x": torch.ones(3), "y": torch.ones(1)}
    received, size = transmit(tree, Doubled())
    assert torch.equal(received["x"], tree["x"])
    assert size[:2] == ({"x": 60, "y": 20}, 0)
    assert Doubled().size(tree, Context(schema_of(tree))) is None


def test_a_blob_says_what_transmit_says_whatever_its_format():
    tree = {"x": torch.ones(3), "y": torch.ones(1)}
    context = Context(schema_of(tree))
    for codec in (Doubled(), Dense(), TopK(0.5), Dense("lossless")):
        assert codec.layout(codec.encode(tree, context), context) == codec.transmit(tree, context)[1]


def test_a_codec_that_is_derived_from_nothing_has_sizes_too():
    class Plain:
        lossless = True
        encode, decode = Doubled.encode, Doubled.decode

    tree = {"x": torch.ones(3), "y": torch.ones(1)}
    context = Context(schema_of(tree))
    for codec, of in ((Plain(), Doubled()), (Dense("int8"), Dense("int8"))):
        assert sized(codec, of.encode(tree, context), context) == of.transmit(tree, context)[1]


def test_rows_are_own_bytes_and_shares_by_entries():
    tree = {"a": torch.randn(300), "b": torch.randn(100)}
    assert transmit(tree, Dense("int8"))[1][:2] == ({"a": 2 * 4 + 300, "b": 4 + 100}, 24 + 1)
    assert transmit(tree, Dense("sign"))[1][:2] == ({"a": 4 + 37, "b": 4 + 12}, 24 + 1)  # 50 bytes of bits
    assert transmit(tree, Dense("fp16"))[1][:2] == ({"a": 600, "b": 200}, 24 + 2)
    bitmap = 2 + 50  # uv 200, 400 bits: 39 and 13 of the 52 bytes
    size = transmit(tree, TopK(0.5))[1]
    assert bitmap == 52
    assert size == Size({"a": 39 + 4 * 150, "b": 13 + 4 * 50}, 24, {"a": 150, "b": 50})
