"""SSFL by hand, what it sends, and against a plain loop."""

import math

import pytest
import torch
from from_scratch.ssfl import ssfl
from parity import PAIRS, compare, examples, small_cnn, small_mlp
from torch import nn
from torch.func import functional_call

import cases
import lamina
from lamina import SSFL, wire
from lamina import engine as engines
from lamina.layers import layer_table
from lamina.methods.masking import prunable
from lamina.methods.ssfl import salient
from lamina.random import generator


def linear(start, clients, method, **settings):
    """One weight row under a loss that is linear in it: a client's gradient is its example, so many times over."""
    model = nn.Linear(len(start), 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([start], dtype=torch.float64)
    held = {
        str(i): (torch.tensor([g] * n, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64))
        for i, (g, n) in enumerate(clients)
    }
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(held),
        method=method,
        loss=lambda output, target: output.mean(),
        engine="loop",
        **{"local": lamina.LocalSGD(lr=0.1, batch_size=None)} | settings,
    )


def kept(fed):
    """The mask as 0 and 1, from the weights after a round without movement outside of it."""
    state, _ = next(fed.run(1))
    return [int(w != 0) for w in state.params["weight"].reshape(-1).tolist()]


W = (0.5, -0.2, 0.1, 0.4)
THREE = [((0.2, 1, -3, 0.1), 100), ((-0.4, 0.5, 1, 2), 300), ((0.1, -0.1, 0.2, -0.5), 600)]


def test_the_mean_of_the_clients_saliencies_is_weighted():
    """w = (.5, -.2, .1, .4), two of four are kept; |g * w| of the three clients:

    (.10 .20 .30 .04), (.20 .10 .10 .80), (.05 .02 .02 .20).
    uniform:         (.35 .32 .42 1.04) / 3       -> entries 3 and 4.
    .1, .3, .6:      (.10 .062 .072 .364)         -> entries 1 and 4.
    |mean g * w|, which is not meant: (.05 .28 .18 .64) / 3 -> entries 2 and 4.
    """
    assert kept(linear(W, THREE, SSFL(0.5), weights="uniform")) == [0, 0, 1, 1]
    assert kept(linear(W, THREE, SSFL(0.5), weights="examples")) == [1, 0, 0, 1]


def test_entries_that_tie_with_the_threshold_are_all_kept():
    """Saliencies (1 4 .5 2) and (3 0 1.5 2): mean (2 2 1 2). Half of four is two; the second largest is 2: three."""
    clients = [((1, 4, 0.5, 2), 3), ((3, 0, 1.5, 2), 3)]
    assert kept(linear((1, 1, 1, 1), clients, SSFL(0.5))) == [1, 1, 0, 1]


def test_saliency_is_not_normalised_so_a_client_with_large_gradients_decides():
    alone = kept(linear(W, THREE[:1], SSFL(0.5)))
    loud = [((0.2e6, 1e6, -3e6, 0.1e6), 100), *THREE[1:]]
    assert kept(linear(W, loud, SSFL(0.5))) == alone == [0, 1, 1, 0]


def test_the_count_is_rounded_down_and_ties_add_to_it():
    """floor(.5 * 7) = 3; the third largest of (5 4 3 3 3 1 0) is 3: five."""
    assert int(salient({"a": torch.tensor([7.0, 6, 5, 4, 3, 2, 1])}, 3)["a"].sum()) == 3
    assert salient({"a": torch.tensor([5.0, 4, 3, 3]), "b": torch.tensor([3.0, 1, 0])}, 3)["b"].tolist() == [1, 0, 0]


def test_the_mask_follows_a_permutation_of_the_entries():
    scores = torch.rand(50, generator=generator(0, "scores"))
    order = torch.randperm(50, generator=generator(0, "order"))
    assert torch.equal(salient({"a": scores[order]}, 20)["a"], salient({"a": scores}, 20)["a"][order])


def one_client(method, dtype=torch.float64):
    model = small_mlp(dtype)
    data = lamina.ClientData.from_clients({"a": examples(dtype)[3]})
    return model, lamina.Federation(model, data, method=method, local=lamina.LocalSGD(batch_size=None), engine="loop")


def test_one_client_and_one_batch_give_the_mask_of_snip():
    """SNIP: dL(w * c)/dc at c = 1, normalised to sum 1."""
    model, fed = one_client(SSFL(0.4))
    x, y = examples(torch.float64)[3]
    gates = {n: torch.ones_like(w, requires_grad=True) for n, w in model.named_parameters() if w.ndim > 1}
    weights = {n: w.detach() * gates[n] if n in gates else w.detach() for n, w in model.named_parameters()}
    nn.functional.cross_entropy(functional_call(model, weights, (x,)), y).backward()
    flat = torch.cat([c.grad.abs().flatten() for c in gates.values()])
    keep = math.floor(0.4 * len(flat))
    largest = set((flat / flat.sum()).argsort(descending=True)[:keep].tolist())
    state, _ = next(fed.run(1))
    ours = torch.cat([state.server.mask[n].flatten() for n in gates])
    assert set(ours.nonzero().flatten().tolist()) == largest


def test_equal_sizes_make_both_kinds_of_weights_agree():
    clients = [(g, 20) for g, _ in THREE]
    for density in (0.25, 0.5, 0.75):
        masks = [kept(linear(W, clients, SSFL(density), weights=w)) for w in ("uniform", "examples")]
        assert masks[0] == masks[1]


def test_a_density_of_1_trains_the_model_of_fedavg_and_costs_the_probe():
    """By saliency: the clients are asked, everything is kept, and no mask is sent."""
    plain, records = cases.finish(cases.federation(), 3)
    state, own = cases.finish(cases.federation(SSFL(density=1.0)), 3)
    assert cases.bits(state.params) == cases.bits(plain.params)
    assert state.server.mask == {}
    assert own[1].bytes_up == records[1].bytes_up
    probe = [t for t in own[0].traffic if t.phase == "probe"]
    assert own[0].bytes_up == records[0].bytes_up + sum(t.bytes for t in probe if t.direction == "up")
    assert not any(t.layer == "_mask" for record in own for t in record.traffic)


# ---- under the mask


class Watch(lamina.FedAvg):
    """Sees the weights before every local step."""

    def __init__(self):
        object.__setattr__(self, "steps", [])

    def correct(self, client, plan, step, params, grads):
        self.steps.append(all(not params[name][~m].any() for name, m in plan.mask.items()))
        self.steps.append(all(not grads[name][~m].any() for name, m in plan.mask.items()))
        return grads


@pytest.mark.parametrize("after", [(), (lamina.FedAdam(lr=0.1),), (lamina.FedAvgM(),), (lamina.FedLAMA(phi=2),)])
def test_weights_outside_the_mask_are_zero_at_every_step(after):
    watch = Watch()
    local = lamina.LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.05, clip=0.5, batch_size=8, epochs=2)
    fed = cases.federation(lamina.Chain(SSFL(0.3), watch, *after), local=local)
    moved = False
    for state, _ in fed.run(4):
        mask = state.server[0].mask
        assert all(not state.params[name][~m].any() for name, m in mask.items())
        moved |= any(not torch.equal(state.params[n][m], fed.initial.params[n][m]) for n, m in mask.items())
    assert moved
    assert all(watch.steps)
    assert len(watch.steps) > 30


def test_biases_norm_parameters_and_embeddings_are_never_masked():
    class Every(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.conv1 = nn.Conv1d(4, 4, 3)
            self.conv2 = nn.Conv2d(1, 2, 3)
            self.norm = nn.BatchNorm2d(2)
            self.attention = nn.MultiheadAttention(4, 2)
            self.lstm = nn.LSTM(4, 3)
            self.gru = nn.GRU(3, 3)
            self.own = nn.Parameter(torch.zeros(3, 3))
            self.head = nn.Linear(3, 5)

    assert [layer.name for layer in prunable(layer_table(Every()))] == [
        "conv1.weight", "conv2.weight", "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0",
        "lstm.weight_hh_l0", "gru.weight_ih_l0", "gru.weight_hh_l0", "head.weight",
    ]  # fmt: skip


def test_a_weight_tied_to_an_embedding_is_an_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    assert prunable(layer_table(Tied())) == ()


# ---- what travels


def rows(record, phase, direction):
    return {t.layer: t.bytes for t in record.traffic if (t.phase, t.direction) == (phase, direction)}


def test_bytes_against_a_run_without_mask_to_the_byte():
    """Five clients, all in every round, a model of 503 weights and 16 biases, 251 weights kept: floor(503 / 2).

    Before round 0, once: 4 * 519 down and 4 * 503 up, each way for all five, with the headers of one tree.
    Round 0 down: the mask, one bit per entry, and no values: they follow from the initial model.
    Later rounds, both ways: 4 * 252 bytes less than without a mask, and the 8 of the mask's id.
    """
    settings = {"model": "small", "cohort": "all", "diagnostics": False}
    _, plain = cases.finish(cases.federation(**settings), 4)
    fed = cases.federation(SSFL(0.5), **settings)
    state, own = cases.finish(fed, 4)
    assert {name: m.numel() for name, m in state.server.mask.items()} == {
        "fc1.weight": 448, "fc2.weight": 35, "fc3.weight": 20,
    }  # fmt: skip
    stay = {name: int(m.sum()) for name, m in state.server.mask.items()}
    assert sum(stay.values()) == 251

    saliency = {name: fed.initial.params[name] for name in stay}
    up = rows(own[0], "probe", "up")
    assert up["_saliency"] == 5 * len(wire.encode(saliency, wire.Dense()))
    assert sum(n for layer, n in rows(own[0], "probe", "down").items() if layer != "_shared") == 5 * 4 * 519
    assert not any(t.phase == "probe" for record in own[1:] for t in record.traffic)

    down = rows(own[0], "round", "down")
    assert down["_mask"] == 5 * len(wire.encode(state.server.mask, wire.Dense()))
    assert len(wire.encode(state.server.mask, wire.Dense())) - len(wire.encode({}, wire.Dense())) == 56 + 5 + 3
    assert not any(down.get(name) for name in fed.initial.params)

    for t in range(4):
        each = {name: 4 * stay.get(name, x.numel()) for name, x in state.params.items()}
        assert {n: b for n, b in rows(own[t], "round", "up").items() if n in each} == {
            n: 5 * b for n, b in each.items()
        }
        ours = sum(rows(own[t], "round", "up").values())
        assert sum(rows(plain[t], "round", "up").values()) - ours == 5 * (4 * 252 - 8)
    for t in range(1, 4):
        assert "_mask" not in rows(own[t], "round", "down")
        assert plain[t].bytes_down - own[t].bytes_down == 5 * (4 * 252 - 8)


def test_a_client_is_sent_the_mask_once_with_its_first_plan():
    fed = cases.federation(SSFL(0.5), model="small", cohort=2)
    state, records = cases.finish(fed, 6)
    size, seen = len(wire.encode(state.server.mask, wire.Dense())), set()
    for record in records:
        new = set(record.cohort) - seen
        assert rows(record, "round", "down").get("_mask", 0) == size * len(new)
        seen |= new
    assert len(seen) > 2


def test_what_is_packed_is_what_is_kept():
    mask = {"a": torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)}
    tree = {"a": torch.arange(1.0, 7).reshape(2, 3)}
    blob = wire.encode(tree, wire.Dense(), mask=mask)
    assert len(blob) == len(wire.encode({"a": torch.zeros(3)}, wire.Dense())) + 8
    assert wire.decode(blob, tree, mask=mask)["a"].tolist() == [[1, 0, 3], [0, 0, 6]]


class Announced(SSFL):
    """The same training with the whole tensors on the wire: the mask is a tree like any other."""

    def plan(self, server, plan):
        return plan.share(kept=server.mask)

    def correct(self, client, plan, step, params, grads):
        return {name: g * plan.shared["kept"][name] if name in plan.shared["kept"] else g for name, g in grads.items()}


def test_values_only_and_whole_tensors_train_the_same_model():
    for options in ({}, {"model": "double"}, {"local": lamina.LocalSGD(lr=0.05, momentum=0.9, batch_size=8)}):
        ours = cases.states(cases.federation(SSFL(0.4), **options), 3)
        whole = cases.states(cases.federation(Announced(0.4), **options), 3)
        for a, b in zip(ours, whole, strict=True):
            assert all(torch.equal(x, b.params[name]) for name, x in a.params.items())
        assert ours[-1].bytes_up < whole[-1].bytes_up


# ---- random masks


@pytest.mark.parametrize("score", ["random", "random_layerwise"])
def test_random_masks_ask_the_clients_nothing(score):
    method = SSFL(0.3, score=score)
    assert not method.has("probe")
    assert not lamina.Chain(method, lamina.FedAvgM()).has("probe")
    assert SSFL().has("probe")
    _, (record,) = cases.finish(cases.federation(method), 1)
    assert {t.phase for t in record.traffic} == {"round"}


class Asking(lamina.FedAvg):
    def probe(self, params, grads):
        return {"norm": {"all": sum(g.square().sum() for g in grads.values())}}


def test_beside_a_method_that_probes_a_random_mask_still_sends_nothing():
    chain = lamina.Chain(SSFL(score="random"), Asking())
    assert chain.has("probe")
    _, (record,) = cases.finish(cases.federation(chain), 1)
    assert set(rows(record, "probe", "up")) == {"_norm", "_shared"}


def test_random_masks_have_the_same_count_and_depend_on_the_seed_alone():
    def mask(score, seed, **options):
        (state,) = cases.states(cases.federation(SSFL(0.3, score=score), model="small", seed=seed, **options), 1)
        return state.server.mask

    for seed in (1, 2):
        whole = mask("random", seed)
        assert sum(int(m.sum()) for m in whole.values()) == math.floor(0.3 * 503)
        layers = {name: int(m.sum()) for name, m in mask("random_layerwise", seed).items()}
        assert layers == {"fc1.weight": 134, "fc2.weight": 10, "fc3.weight": 6}
        assert cases.bits(mask("random", seed, cohort=1)) == cases.bits(whole)
    assert cases.bits(mask("random", 1)) != cases.bits(mask("random", 2))


# ---- what is refused


def two(scale):
    """A Linear whose saliency is `scale` times smaller than that of the one after it, roughly."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for w in model.parameters():
            w.fill_(0.5)
        model[1].weight[0] = -0.5
        model[0].weight.mul_(scale)
    return model


def federation_of(model, method, n=6):
    x = torch.arange(float(4 * n)).reshape(n, 4) / 10
    data = lamina.ClientData.from_clients({"a": (x, torch.arange(n) % 2)}, test=(x, torch.arange(n) % 2))
    return lamina.Federation(model, data, method=method, local=lamina.LocalSGD(batch_size=None), engine="loop")


def test_a_mask_that_empties_a_layer_is_refused_before_anything_trains():
    """Weights of the first layer are a millionth of the others: 6 of 18 kept are all of the second layer."""
    with pytest.raises(lamina.ConfigError) as refused:
        next(federation_of(two(1e-6), SSFL(0.334)).run(1))
    assert "0.weight (12 entries)" in refused.value.message
    assert "1.weight" not in refused.value.message
    assert "allow_empty=True" in refused.value.remedy


def test_an_empty_layer_may_be_allowed():
    state, _ = next(federation_of(two(1e-6), SSFL(0.334, allow_empty=True)).run(1))
    assert not state.params["0.weight"].any()
    assert state.params["1.weight"].all()


def test_a_random_mask_that_empties_a_layer_is_refused_too():
    """floor(.1 * 12) = 1, floor(.1 * 6) = 0."""
    with pytest.raises(lamina.ConfigError, match=r"1\.weight \(6 entries\)"):
        next(federation_of(two(1.0), SSFL(0.1, score="random_layerwise")).run(1))


def test_a_threshold_of_zero_is_refused_with_the_density_that_would_do():
    """Weights (1 0 0 2): saliency of two of four is 0, so that three would be four."""
    with pytest.raises(lamina.ConfigError) as refused:
        kept(linear((1, 0, 0, 2), [((1, 1, 1, 1), 2)], SSFL(0.75)))
    assert "keep 3 of 4" in refused.value.message
    assert "only 2 have more" in refused.value.message
    assert "density of at most 0.5" in refused.value.remedy
    assert kept(linear((1, 0, 0, 2), [((1, 1, 1, 1), 2)], SSFL(0.5))) == [1, 0, 0, 1]
    assert kept(linear((1, 0, 0, 2), [((1, 1, 1, 1), 2)], SSFL(1.0))) == [1, 1, 1, 1]  # trained from 0


def test_a_model_without_weights_to_mask_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(lamina.ConfigError, match="Linear and recurrent layers: the model has none") as refused:
        federation_of(Scale(), SSFL())
    assert refused.value.code == "E117"


def test_a_density_that_keeps_nothing_is_refused():
    with pytest.raises(lamina.ConfigError, match="keeps none of the model's 18 maskable weights"):
        federation_of(two(1.0), SSFL(0.05))


@pytest.mark.parametrize("density", [0, -0.1, 1.1, 50, float("nan"), "half", True, None])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(lamina.ConfigError, match="expected 0 < density <= 1"):
        SSFL(density=density)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(lamina.ConfigError, match="score='snip': expected one of saliency, random, random_layerwise"):
        SSFL(score="snip")
    with pytest.raises(lamina.ConfigError, match="allow_empty='yes'"):
        SSFL(allow_empty="yes")


def test_two_masks_are_refused():
    with pytest.raises(lamina.ConfigError, match="both set the mask"):
        lamina.Chain(SSFL(), lamina.RandomMask())


# ---- against a plain loop


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort):
    compare(SSFL(density=0.3), ssfl, small_mlp(dtype), examples(dtype), dtype, mine={"density": 0.3},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS[:2])
def test_parity_with_convolutions_and_decay(dtype, weights, momentum, cohort):
    """Without BatchNorm, whose statistics the plain loop does not keep."""
    cnn = small_cnn(dtype)
    model = nn.Sequential(cnn[0], *cnn[2:])
    compare(SSFL(density=0.5), ssfl, model, examples(dtype, (1, 5, 5)), dtype, mine={"density": 0.5}, lr=0.03,
            weight_decay=0.05, weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("score", ["random", "random_layerwise"])
def test_parity_of_random_masks(score):
    compare(SSFL(0.4, score=score), ssfl, small_mlp(torch.float64), examples(torch.float64), torch.float64,
            mine={"density": 0.4, "score": score}, cohort=3, momentum=0.9)  # fmt: skip


@pytest.mark.parametrize("downlink", ["fp32", "fp16", "int8"])
def test_nobody_is_said_to_hold_what_the_mask_alone_does_not_make(downlink):
    """Every client keeps what it decoded and cuts it with the mask: that is the model it is said to train from, also
    in round 0, where int8 blocks over kept entries give other values than those of the probe's dense model."""
    fed = cases.federation(SSFL(density=0.4), "small", cohort="all", downlink=wire.Dense(downlink))
    seen = []
    broadcast = fed._broadcast

    def watched(plan, *more):
        made = broadcast(plan, *more)
        seen.append(made)
        return made

    fed._broadcast = watched
    pairs = list(fed.run(3))
    probe, rounds = seen[0], [b for b in seen[1:] if b.plan.mask]
    mask = rounds[0].plan.mask
    store = fed.start(engines.make("loop", 1, "", fed._trainer, fed._setup))[0].clients
    first = rounds[0]
    for client in store:
        missing = first.lacking(store.get(client).held)
        for name, x in first.plan.params.items():
            cut = torch.where(mask[name], probe.plan.params[name], 0) if name in mask else probe.plan.params[name]
            assert f"params/{name}" in missing or torch.equal(x, cut)
    dense = any(f"params/{name}" in first.lacking(store.get(0).held) for name in mask)
    assert dense == (downlink == "int8")
    assert len(pairs) == 3
