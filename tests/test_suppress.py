"""Edits of behaviors: text, states, effect and price against plain loops, and the commands."""
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, tiny, write_dataset, write_run

import common
import suppress
from prism import Edit, UserError
from suppress import (FindConfig, Marked, States, behavior_states, compile_pattern, draw_windows,
                      edited, effect, fit, load_states, mark, marks, measure, scaled)

FREE = "--price=1000", "--kl=100"                        # nothing is too dear


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a tiny run with eight held-out documents of two sources."""
    out = write_run(tmp_path_factory.mktemp("suppress"), iters=135)
    folder, rng = out.parent / "tiny", np.random.default_rng(1)
    docs = json.loads((folder / "docs.json").read_text())[:-1]
    train, val = np.fromfile(folder / "train.bin", np.uint16), b""
    for i in range(8):
        docs.append(dict(split="val", start=len(val), title=str(i), source=f"source <{i % 2}>"))
        val += "".join(SENTENCES[j] for j in rng.integers(0, 4, 9)).encode()
    write_dataset(folder, train, list(val))
    (folder / "docs.json").write_text(json.dumps(docs))
    return out


@pytest.fixture(scope="module")
def run(out):
    return common.Run(out, "cpu")


@pytest.fixture(scope="module")
def cat(run):
    """b and the States of the behavior "cat": training text, tuning half, test half."""
    return behavior_states(run, FindConfig(behavior="cat", tokens=1500))


@pytest.fixture(scope="module")
def model():
    """Twelve prototypes in float64, four of them active at a token."""
    return tiny(n_proto=12, top_k=4).requires_grad_(False)


def some_states(model, n=64, seed=1):
    """States of n tokens whose hidden states differ at targets."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % 4 == 1
    z = torch.randn(n, 6, generator=rng, dtype=torch.float64)
    z[target] += 2 * torch.tensor([1, -1, 0, 1, 0, 0])
    m = model.mixture(z)
    y = torch.randint(11, (n,), generator=rng)
    y[target] = 3
    free = ~target & (torch.arange(n) % 3 > 0)
    return States(z, m.ids, m.gates, y, target, free, free & (torch.arange(n) >= n // 4))


def some_edit(model, E=2, seed=2):
    rng = torch.Generator().manual_seed(seed)
    M, d = model.prototypes.shape
    shapes = (M,), (E, M), (E,), (E, d)
    g, w, c, u = (torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)
    return Edit(1 + 0.3 * g, w, 0.2 * c, u)


def measured(model, s, b, edit, strength=1.0):
    return measure(model, s, b, edited(model, edit, strength))


def log_softmax(values):
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


def lines(capsys):
    return capsys.readouterr().out.strip().splitlines()


def refusal(call, *args, match=""):
    """The message of the UserError that call raises: one line without control characters."""
    with pytest.raises(UserError, match=re.escape(match)) as e:
        call(*args)
    assert str(e.value).isprintable()
    return str(e.value)


# -- behaviors in text

def test_marks_against_characters():
    """Characters of many bytes, and bytes that are no text."""
    pieces = [bytes([i]) for i in range(256)] + [b""]
    text = "naïve «xx» öx\n".encode() + b"\xff" + b"x"
    carried, onset = marks(np.array([*text, 256]), compile_pattern("x+"), pieces)
    x = [i for i, byte in enumerate(text) if byte == ord("x")]
    assert np.flatnonzero(carried).tolist() == x
    assert np.flatnonzero(onset).tolist() == [i for i in x if i - 1 not in x]
    wide = [b"ab", b"cd", b"ef", "ö".encode()]
    carried, onset = marks(np.array([0, 1, 2, 3, 3]), compile_pattern("bcde|ö"), wide)
    assert carried.tolist() == [True] * 5
    assert onset.tolist() == [True, False, False, True, True]
    assert not marks(np.array([0, 1]), compile_pattern("z*"), wide)[0].any()  # no empty matches


def test_the_text_of_a_behavior(run, tmp_path):
    for split, tokens in (("train", run.train), ("val", run.val)):
        text = mark(run, FindConfig(behavior="cat|hen"), split)
        raw = bytes(tokens.astype(np.uint8))
        starts = [m.start() for m in re.finditer(b"cat|hen", raw)]
        assert text.target.nonzero()[:, 0].tolist() == starts
        assert text.inside.sum() == 3 * len(starts) and len(text.tokens) == len(raw)
        text = mark(run, FindConfig(source="source <1>"), split)
        start, _, sources = common.load_documents(run.folder, split, len(tokens))
        want = torch.zeros(len(tokens), dtype=torch.bool)
        for a, b, source in zip(start, [*start[1:], len(tokens)], sources):
            want[a:b] = source == "source <1>"
        assert 0 < want.sum() < len(want)
        assert torch.equal(text.target, want) and torch.equal(text.inside, want)
    (tmp_path / "with").write_text("a" * 30)
    (tmp_path / "without").write_text("b" * 9)
    files = FindConfig(texts=f"{tmp_path}/with,{tmp_path}/without")
    for split, a, b in (("train", 20, 6), ("val", 10, 3)):
        text = mark(run, files, split)
        assert bytes(text.tokens.tolist()) == b"a" * a + b"b" * b
        assert text.target.tolist() == [True] * a + [False] * b
        assert torch.equal(text.target, text.inside)


# -- states

def test_states_of_windows_against_loops(run):
    rng, n = torch.Generator().manual_seed(3), 400
    tokens = torch.randint(256, (n,), generator=rng)
    inside, target = torch.zeros(2, n, dtype=torch.bool)
    inside[[60, 61, 215]] = True                                  # 215 is within 32 of 183
    target[[60, 215]] = True
    text = Marked(tokens, inside, target)
    windows = torch.tensor([20, 3, 11])
    s = load_states(run, text, windows)
    places = [w * 16 + t + 1 for w in windows.tolist() for t in range(16)]
    assert s.y.tolist() == tokens[places].tolist()
    assert s.target.tolist() == text.target[places].tolist()
    assert s.free.tolist() == (~inside[places]).tolist()
    for place, far in zip(places, s.far.tolist()):
        assert far == (not inside[max(0, place - 32):place + 33].any())
    assert 0 < s.far.sum() < s.free.sum() < len(s.y)
    for i, w in enumerate(windows.tolist()):
        z = run.model.hidden(tokens[None, 16 * w:16 * w + 16])[0]
        m, at = run.model.mixture(z), slice(16 * i, 16 * i + 16)
        torch.testing.assert_close(s.z[at], z)
        assert torch.equal(s.ids[at], m.ids)
        torch.testing.assert_close(s.gates[at], m.gates)


def test_half_of_balanced_windows_hold_targets():
    n, T = 1000, 10
    target = torch.zeros(n, dtype=torch.bool)
    target[[0, *range(1, 300, 7)]] = True                         # the first windows, dense
    text = Marked(torch.arange(n), target, target)

    def has(windows):
        return [bool(target[w * T + 1:w * T + T + 1].any()) for w in windows.tolist()]
    drawn = draw_windows(text, T, 20, True, 0)
    assert sum(has(drawn)) == 10 and len(set(drawn.tolist())) == 20
    assert torch.equal(drawn, draw_windows(text, T, 20, True, 0))
    assert not torch.equal(drawn, draw_windows(text, T, 20, True, 1))
    drawn = draw_windows(text, T, 80, True, 0)                    # all 30 that hold one, 40 else
    assert sum(has(drawn)) == 30 and len(drawn) == 80
    odd = draw_windows(text, T, 1000, False, 0, slice(1, None, 2))
    assert sorted(odd.tolist()) == list(range(1, 99, 2))          # the last has no next token
    some = draw_windows(text, T, 30, False, 0, slice(0, None, 2))
    assert len(set(some.tolist())) == 30 and not any(w % 2 for w in some.tolist())


def test_states_and_b_follow_from_the_text(run, cat):
    b, train, tune, test = cat
    text = bytes(run.train.astype(np.uint8))
    assert b[ord("c")].item() == pytest.approx(text.count(b"cat") / text.count(b"c"))
    assert b.count_nonzero() == 1
    assert len(train.y) == 1500 // 16 * 16
    assert (train.y[train.target] == ord("c")).all() and train.target.sum() >= 20
    windows = [train.target.view(-1, 16).any(1).sum(), len(train.y) // 16]
    assert windows[0] / windows[1] < 0.6
    halves = []
    for states in (tune, test):
        halves.append({tuple(y.tolist()) for y in states.y.split(16)})
    for i, row in enumerate(run.val[1:len(run.val) // 16 * 16 - 15].reshape(-1, 16).tolist()):
        assert tuple(row) in halves[i % 2]
    assert len(tune.y) + len(test.y) == (len(run.val) - 1) // 16 * 16
    b, train, tune, test = behavior_states(run, FindConfig(source="source <1>", tokens=800))
    assert not b.any() and 0 < train.target.sum() < len(train.y) == 800
    assert torch.equal(tune.free, ~tune.target)


# -- effect and price

def test_measure_against_plain_loops(model):
    s, edit = some_states(model), some_edit(model)
    b = torch.zeros(11, dtype=torch.float64)
    b[[3, 7]] = torch.tensor([0.75, 0.2], dtype=torch.float64)
    z = edit.apply(s.z, s.ids, s.gates, model.prototypes)
    loss, rate, kl = [], [], []
    for t in range(len(z)):
        old = log_softmax((model.W @ s.z[t]).tolist())
        new = log_softmax((model.W @ z[t]).tolist())
        loss.append(-new[s.y[t]])
        rate.append(sum(p * math.exp(v) for p, v in zip(b.tolist(), new)))
        kl.append(sum(math.exp(u) * (u - v) for u, v in zip(old, new)))
    got = measured(model, s, b, edit)
    torch.testing.assert_close(got, torch.tensor([loss, rate, kl], dtype=torch.float64))
    assert got[2].max() > 0.01
    plain = measure(model, s, b)
    ce = F.cross_entropy(model.logits(s.z), s.y, reduction="none")
    torch.testing.assert_close(plain[0], ce)
    assert plain[2].abs().max() < 1e-12


def test_an_interval_is_that_of_resampled_units():
    rng = np.random.default_rng(3)
    a, b = rng.random(30), rng.random(30) + 0.5
    value, low, high = suppress.interval(a, b, seed=5, draws=200)
    drawn, ratios = np.random.default_rng(5), []
    for units in drawn.integers(0, 30, (200, 30)):
        ratios.append(sum(a[i] for i in units) / sum(b[i] for i in units))
    assert value == pytest.approx(sum(a) / sum(b))
    assert [low, high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist())
    assert low < value < high
    assert suppress.interval(2 * b, b) == pytest.approx((2.0, 2.0, 2.0))


def test_effect_and_price_against_plain_loops(model):
    s, n = some_states(model, 160), 160
    b = torch.zeros(11, dtype=torch.float64)
    b[[3, 7, 8]] = torch.tensor([0.75, 0.2, 0.1], dtype=torch.float64)
    s.y[s.free.nonzero()[::2]] = 7                                # enough benign ones
    before, after = measure(model, s, b), measured(model, s, b, some_edit(model))
    found = effect(s, b, before, after, 16)
    names = "rate", "rate 0", "rise", "loss", "loss 0", "benign", "benign 0", "kl"
    sums = dict.fromkeys(names, 0.0)
    for t in range(n):
        (loss, rate, _), (loss_0, rate_0, _) = after[:, t].tolist(), before[:, t].tolist()
        sums["rate"] += rate
        sums["rate 0"] += rate_0
        if s.target[t]:
            sums["rise"] += loss - loss_0
        if s.free[t]:
            sums["loss"] += loss
            sums["loss 0"] += loss_0
            if b[s.y[t]] > 0:
                sums["benign"] += loss
                sums["benign 0"] += loss_0
        if s.far[t]:
            sums["kl"] += after[2, t].item()
    want = dict(rate=sums["rate"] / sums["rate 0"], rise=sums["rise"] / s.target.sum().item(),
                loss=100 * (sums["loss"] / sums["loss 0"] - 1),
                benign=100 * (sums["benign"] / sums["benign 0"] - 1),
                kl=sums["kl"] / s.far.sum().item())
    assert {name: value for name, (value, *_) in found.items()} == pytest.approx(want)
    assert all(low < value < high for value, low, high in found.values())
    assert [*found] == [*want]
    nothing = effect(s, b, before, before, 16)
    assert {name: value for name, (value, *_) in nothing.items()} == pytest.approx(
        dict(rate=1, rise=0, loss=0, benign=0, kl=0), abs=1e-12)
    line = suppress.shown(dict(rate=(0.5, 0.25, 0.75), kl=(0.125, 0.1, 0.2)))
    assert re.findall(r"[\d.]*\d", line) == ["0.5", "0.25", "0.75", "0.125", "0.1", "0.2"]


def test_what_is_too_rare_to_be_measured_is_left_out(model):
    s, b = some_states(model, 160), torch.zeros(11, dtype=torch.float64)
    before = measure(model, s, b)
    assert [*effect(s, b, before, before, 16)] == ["rise", "loss", "kl"]  # text: no rate
    few = torch.arange(160) < 19
    s = s._replace(target=few, far=few)
    assert [*effect(s, b, before, before, 16)] == ["loss"]


# -- find

def test_rank_prototypes_against_plain_loops(model):
    s, M = some_states(model), 12
    got = suppress.rank_prototypes(s, M)
    a = np.zeros((len(s.y), M))
    for t in range(len(s.y)):
        for i, gate in zip(s.ids[t].tolist(), s.gates[t].tolist()):
            a[t, i] = gate
    on, off = a[s.target.numpy()], a[~s.target.numpy()]
    want = (on.mean(0) - off.mean(0)) / np.sqrt((on.var(0) + off.var(0)).clip(1e-6))
    assert got.tolist() == pytest.approx(want.tolist())
    assert max(want) > 0.5 and min(want) < -0.1


def objective(model, s, lam, edit):
    """The objective of fit's docstring, from whole distributions over all tokens."""
    before = model.logits(s.z).log_softmax(1)
    z = edit.apply(s.z, s.ids, s.gates, model.prototypes)
    after = model.logits(z).log_softmax(1)
    kl = (before.exp() * (before - after)).sum(1)[~s.target].mean()
    y = s.y[s.target, None]
    share = after[s.target].gather(1, y).exp().sum() / before[s.target].gather(1, y).exp().sum()
    return kl + lam * share


@pytest.mark.parametrize("mode", ["direction", "gains"])
def test_fit_goes_down_its_objective_with_the_given_prototypes(model, mode, monkeypatch):
    s, descend, values = some_states(model, 400), suppress.descend, []
    ids = suppress.rank_prototypes(s, 12).argsort(descending=True)[:4]
    for steps in (0, 30, 120):
        monkeypatch.setattr(suppress, "descend", partial(descend, steps=steps))
        edit = fit(model, s, ids, mode, 0.3)
        values.append(objective(model, s, 0.3, edit).item())
    assert values[0] - 0.01 > values[1] > values[2]
    assert values[2] < 0.3 - 0.01                                 # that of no edit
    twice = fit(model, s, ids, mode, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(twice, edit))
    # lambda trades effect for price
    strong = fit(model, s, ids, mode, 3.0)
    zero, one = (objective(model, s, lam, edit).item() for lam in (0, 1))
    zero_strong, one_strong = (objective(model, s, lam, strong).item() for lam in (0, 1))
    assert zero < zero_strong and one - zero > one_strong - zero_strong
    # only these prototypes detect, only these change
    others = torch.ones(12, dtype=torch.bool)
    others[ids] = False
    assert edit.w.shape == (1, 12) and not any(part.requires_grad for part in edit)
    assert not edit.w[0, others].any() and (edit.g[others] == 1).all()
    moved = edit.g[ids] if mode == "gains" else edit.w[0, ids]
    assert (moved != 1).all() and moved.all()
    assert edit.u.any() == (mode == "direction") and (edit.g == 1).all() == (mode == "direction")
    gates = torch.where(others[s.ids], 0.7, s.gates)              # what else fires is no matter
    assert torch.equal(edit.fire(s.ids, gates), edit.fire(s.ids, s.gates))


def test_a_step_goes_down_the_gradient_of_the_objective(model, monkeypatch):
    """One step of plain descent; with one target and one other token a batch holds both."""
    s, edit = some_states(model).take(torch.tensor([1, 2])), some_edit(model)
    assert s.target.tolist() == [True, False]
    g = edit.g.clone().requires_grad_()
    want, = torch.autograd.grad(objective(model, s, 0.7, edit._replace(g=g)), g)
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    groups = [{"params": [g], "lr": 0.1}]
    suppress.descend(model, s, lambda some: edited(model, edit._replace(g=g))(some), groups, 0.7,
                     steps=1)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(g.detach(), edit.g - 0.1 * want)


def test_a_direction_starts_at_the_difference_of_means(model, monkeypatch):
    monkeypatch.setattr(suppress, "descend", lambda *args: None)
    s = some_states(model, 400)
    ids = torch.tensor([3, 0, 7])
    edit = fit(model, s, ids, "direction", 0.3)
    on, off = suppress.mean_gates(s, s.target, 12), suppress.mean_gates(s, ~s.target, 12)
    difference = (on - off)[ids]
    torch.testing.assert_close(F.normalize(edit.w[0, ids], dim=0), F.normalize(difference, dim=0))
    assert (edit.w[0] @ off - edit.c[0]).item() == pytest.approx(0, abs=1e-12)
    assert edit.u.norm().item() == pytest.approx(1)
    away = s.z[~s.target].mean(0) - s.z[s.target].mean(0)
    assert F.cosine_similarity(edit.u[0], away, dim=0).item() == pytest.approx(1)


def test_strength_scales_the_change(model):
    s, edit, P = some_states(model), some_edit(model), model.prototypes
    change = edit.apply(s.z, s.ids, s.gates, P) - s.z
    for strength in (0.0, 0.25, 2.0):
        got = scaled(edit, strength).apply(s.z, s.ids, s.gates, P) - s.z
        torch.testing.assert_close(got, strength * change)


def test_the_strongest_edit_at_the_price(run, cat):
    b, train, tune, _ = cat
    model, T = run.model, 16
    edit = fit(model, train, torch.arange(12), "direction", 0.3)
    before = measure(model, tune, b)

    def effect_at(strength):
        return effect(tune, b, before, measured(model, tune, b, edit, strength), T)

    def too_dear(e, cfg):                                         # by the intervals' upper ends
        price = max(e[name][2] for name in ("loss", "benign") if name in e)
        return price > cfg.price or e["kl"][2] > cfg.kl
    for cfg in (FindConfig(price=1.0, kl=99), FindConfig(price=999, kl=0.001)):
        strength, e = suppress.strongest(model, tune, b, before, edit, cfg, T)
        assert 1 / 8 < strength < 4
        assert e == effect_at(strength) and not too_dear(e, cfg)
        assert too_dear(effect_at(strength * 2 ** (6 / 64)), cfg)  # the next one tried
    dear = FindConfig(price=1e9, kl=1e9)
    strength, _ = suppress.strongest(model, tune, b, before, edit, dear, T)
    assert strength == 2 ** (3 - 6 / 64)
    assert suppress.strongest(model, tune, b, before, edit, FindConfig(price=-99), T) is None


def test_a_written_edit_is_read_as_it_was(run, tmp_path):
    rng, M = torch.Generator().manual_seed(4), 12
    g = 2 * torch.rand(M, generator=rng)
    g[::2] = 1.0
    edit = Edit(g, torch.randn(2, M, generator=rng), torch.randn(2, generator=rng),
                torch.randn(2, 16, generator=rng))
    edit.w[0, 3:] = 0.0
    path = tmp_path / "e.json"
    (tmp_path / "e.sweep.json").write_text("{}")
    suppress.write_edit(path, run, edit, lam=0.1, find=dict(behavior="x"))
    assert not (tmp_path / "e.sweep.json").exists()               # it was measured with another
    loaded = common.load_gains(path, run.model)
    assert torch.equal(loaded.g, edit.g) and not loaded.w[0].any() and not loaded.u[0].any()
    for name in ("w", "c", "u"):
        assert torch.equal(getattr(loaded, name)[1:], getattr(edit, name))
    content = json.loads(path.read_text())
    assert content["ids"] == [1, 3, 5, 7, 9, 11] and content["lam"] == 0.1
    assert content["directions"][0]["ids"] == [0, 1, 2]
    assert suppress.read_facts(path) == (FindConfig(behavior="x"), 0.1)
    states = torch.randn(9, 16, generator=rng)
    torch.testing.assert_close(run.model.logits(states, loaded), run.model.logits(states, edit))


# -- the commands

def write_texts(folder):
    """Two files: sentences about a cat, and others -> the value of --texts"""
    rng = np.random.default_rng(2)
    for name, choice in (("with.txt", SENTENCES[:1]), ("without.txt", SENTENCES[1:])):
        text = "".join(choice[j % len(choice)] for j in rng.integers(0, 60, 40))
        (folder / name).write_text(text)
    return f"{folder}/with.txt,{folder}/without.txt"


@pytest.mark.parametrize("option,mode", [("behavior", "direction"), ("behavior", "gains"),
                                         ("source", "direction"), ("texts", "direction")])
def test_find_apply_and_sweep(option, mode, out, run, capsys, tmp_path):
    value = dict(behavior="the", source="source <1>", texts=write_texts(tmp_path))[option]
    name = f"{option}.{mode}"
    suppress.main(["find", f"--out_dir={out}", f"--{option}={value}", f"--name={name}",
                   f"--mode={mode}", "--tokens=1500", "--size=5", *FREE])
    path, said = out / f"gains/{name}.json", lines(capsys)
    facts = json.loads(path.read_text())
    assert [*facts] == ["checkpoint", "find", "lam", "tuning", "ids", "gains", "directions"]
    assert re.match(r"[\d,]+ targets in [\d,]+ training tokens", said[0])
    tried = [re.findall(r"-?[\d.]+", line) for line in said if "5, lambda" in line]
    assert [words[:2] for words in tried] == [["5", f"{lam}"] for lam in suppress.LAMBDAS]
    best = min if option == "behavior" else max                   # rate, or rise
    value_of_best = [*facts["tuning"].values()][0][0]
    assert best(float(words[2]) for words in tried) == pytest.approx(value_of_best, rel=0.01)
    assert said[-1] == f"{path}: {suppress.shown(facts['tuning'])}"
    edit = common.load_gains(path, run.model)
    detect = (edit.g != 1) if mode == "gains" else edit.w.any(0)
    assert detect.sum() == 5 and edit.u.any() == (mode == "direction")
    if mode == "gains":
        assert sorted(facts["ids"]) == detect.nonzero()[:, 0].tolist()

    # what was written is the best on the tuning half
    cfg, lam = suppress.read_facts(path)
    assert getattr(cfg, option) == value and lam in suppress.LAMBDAS
    b, train, tune, test = behavior_states(run, cfg)
    before = measure(run.model, tune, b)
    e = effect(tune, b, before, measured(run.model, tune, b, edit), 16)
    order = suppress.rank_prototypes(train, 12).argsort(descending=True)
    assert set(detect.nonzero()[:, 0].tolist()) == set(order[:5].tolist())
    for key, numbers in facts["tuning"].items():
        assert numbers == pytest.approx(e[key], rel=1e-3, abs=1e-4)
    if option == "behavior":
        assert e["rate"][0] < 0.95 and "benign" in e
    else:
        assert e["rise"][0] > 0.02 and "rate" not in e

    if mode == "direction":
        suppress.main(["sweep", f"--out_dir={out}", f"--gains={path}"])
        said = lines(capsys)
        swept = json.loads(path.with_suffix(".sweep.json").read_text(), parse_constant=pytest.fail)
        assert [*swept] == ["behavior", "checkpoint", "price", "kl", "rows", "before", "after"]
        assert swept["behavior"] == value and swept["checkpoint"] == run.hash
        assert [row["strength"] for row in swept["rows"]] == list(suppress.STRENGTHS)
        assert len(said) == 13 and said[-1].startswith(str(path.with_suffix(".sweep.json")))
        before = measure(run.model, test, b)
        for row in swept["rows"]:
            assert said.pop(0).endswith(suppress.shown(row["edit"]))
            assert said.pop(0).endswith(suppress.shown(row["control"]))
            after = measured(run.model, test, b, edit, row["strength"])
            want = json.loads(json.dumps(effect(test, b, before, after, 16)))
            assert row["edit"] == want and [*row["control"]] == [*want]
            assert row["control"] != want
        assert len(swept["before"]) == 4 == len(swept["after"])
        for (n, old), (m, new) in zip(swept["before"], swept["after"]):
            assert old[:8] == new[:8]
            if option == "behavior":
                assert (n, m) == tuple(len(re.findall("the", x[8:])) for x in (old, new))
        found = [n for n, _ in swept["before"]]
        assert found == sorted(found, reverse=True)


def test_apply_shows_the_same_seeds_before_and_after(out, run, capsys):
    path, away = out / "gains/h.json", -3 * run.model.W[ord("h")]
    always = Edit(torch.ones(12), torch.zeros(1, 12), -torch.ones(1), away[None])
    suppress.write_edit(path, run, always, find=dict(behavior="h"), lam=0.1)
    edit = common.load_gains(f"{path},{path}", run.model)
    suppress.main(["apply", f"--out_dir={out}", f"--gains={path},{path}", "--num_samples=2",
                   "--max_new_tokens=30", "--prompt=the hen"])
    said, idx = lines(capsys), torch.tensor([[*b"the hen"]] * 2)
    for first, gains in ((0, None), (1, edit)):
        rows = run.model.generate(idx, 30, 0.8, seed=1337, gains=gains, n_vocab=257)
        for line, row in zip(said[first::2], rows):
            text, when = run.decode(row), ("before", " after")[first].strip()
            assert line.strip() == f"{when}, {text[7:].count('h')} matches | {common.plain(text)}"
    assert said[0].split("|")[1] != said[1].split("|")[1]
    suppress.main(["apply", f"--out_dir={out}", f"--gains={path}", "--num_samples=3",
                   "--max_new_tokens=4"])
    held_out, said = bytes(run.val.astype(np.uint8)).decode(), lines(capsys)
    beginnings = [line.split(" | ", 1)[1][:8] for line in said]
    assert len(said) == 6 and all(text in held_out for text in beginnings)
    assert beginnings[::2] == beginnings[1::2]


# -- bad input

def test_bad_input_is_refused(out, run, tmp_path):
    facts = dict(checkpoint=run.hash, ids=[1], gains=[0.0], directions=[])
    names = []
    for name, changes in (("nameless", {}), ("foreign", dict(checkpoint="ff")),
                          ("odd", dict(find={"colour": 1}, lam=0.1)),
                          ("lam", dict(find={"behavior": "a"}, lam="much"))):
        names.append(tmp_path / f"{name}.json")
        names[-1].write_text(json.dumps(facts | changes))
    nameless, foreign, odd, lam = names
    texts = write_texts(tmp_path)
    (tmp_path / "short").write_text("few")
    short, binary = f"{tmp_path}/short", tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    cat, one = ["find", "--behavior=cat"], "expected one of --behavior='>>>', --source=NAME and"
    for words, message in (
            (["find", "--behavior=zebra"], "too little text: 0 targets in training text"),
            (["find", "--behavior=cat.*cat.*cat.*cat.*cat.*cat.*cat"], "too little text: "),
            (["find", r"--behavior=(?s)."], "too little text"),
            (["find"], one), ([*cat, "--source=source <0>"], one),
            ([*cat, f"--texts={texts}"], one),
            (["find", "--source=source <0>", f"--texts={texts}"], one),
            ([*cat, "--source=source <0>", f"--texts={texts}"], one),
            (["find", "--behavior=("], "expected a regular expression"),
            (["find", "--source=source <2>"], "source=source <2> is not in the training text; the "
             "nearest is source <"),
            (["find", "--source=zz"], "the nearest is source <"),
            (["find", f"--texts={tmp_path}/with.txt"], "expected two files of text"),
            (["find", f"--texts={texts},{texts}"], "expected two files of text"),
            (["find", f"--texts={tmp_path}/with.txt,{tmp_path}/nowhere"], "FileNotFoundError"),
            (["find", f"--texts={tmp_path}/with.txt,{binary}"], "UnicodeDecodeError"),
            (["find", f"--texts={short},{short}"], "2 held-out tokens, expected 33"),
            ([*cat, "--mode=half"], "mode=half"),
            ([*cat, "--price=-99", "--size=3"], "raise --price or --kl"),
            ([*cat, "--kl=-1", "--size=3"], "raise --price or --kl"),
            (["apply", "--num_samples=0"], "num_samples=0"),
            (["apply", "--temperature=-1"], "temperature=-1"),
            (["apply"], "suppress.py find writes one"),
            (["apply", f"--gains={foreign}"], "made for another checkpoint"),
            (["sweep", f"--gains={foreign}"], "made for another checkpoint"),
            (["apply", f"--gains={nameless},{foreign}"], "made for another checkpoint"),
            (["apply", f"--gains={nameless}"], "expected one file that suppress.py find wrote"),
            (["sweep", f"--gains={nameless},{nameless}"], "expected one file"),
            (["sweep", f"--gains={nameless}"], "expected one file"),
            (["sweep", f"--gains={odd}"], "colour"),
            (["sweep", f"--gains={lam}"], "expected one file")):
        refusal(suppress.main, [*words, f"--out_dir={out}"], match=message)
    refusal(suppress.main, ["fnd"], match="find, apply, sweep")


# -- what was measured too little, and files that are not find's

def test_too_little_of_either_text_is_refused(out, tmp_path):
    (tmp_path / "with").write_text("the cat sat on. " * 4)        # 16 targets in the tuning half
    (tmp_path / "without").write_text("a dog ran to the log. " * 60)
    for words in ([f"--texts={tmp_path}/with,{tmp_path}/without"], ["--behavior=(?s)..."]):
        refusal(suppress.main, ["find", f"--out_dir={out}", *words, "--size=3", *FREE],
                match="too little text")
    refusal(suppress.main, ["find", f"--out_dir={out}", "--behavior=cat", "--size=-3"],
            match="size=-3")


def test_a_detector_of_dead_prototypes_is_no_nan(model):
    s = some_states(model)
    s = s._replace(gates=torch.where(s.ids == 5, 0.0, s.gates))
    edit = fit(model, s, torch.tensor([5]), "direction", 0.3)
    assert not any(part.isnan().any() for part in edit)


def test_facts_of_others_are_checked(out, run, tmp_path):
    facts = dict(checkpoint=run.hash, ids=[], gains=[], directions=[], lam=0.1)
    for key, value in (("tokens", "many"), ("seed", 1.5), ("seed", [1]), ("tokens", 10 ** 40)):
        path = tmp_path / "f.json"
        path.write_text(json.dumps(facts | dict(find={"behavior": "cat", key: value})))
        refusal(suppress.main, ["sweep", f"--out_dir={out}", f"--gains={path}"], match=f"{key}")


def test_the_control_uses_other_prototypes(out, run, monkeypatch, capsys):
    edit = Edit(torch.ones(12), torch.zeros(1, 12), torch.zeros(1), torch.ones(1, 16))
    edit.w[0, [1, 4, 7, 9, 11]] = 1.0
    path, drawn = out / "gains/control.json", []
    suppress.write_edit(path, run, edit, find=dict(behavior="the", tokens=1500), lam=0.1)

    def fit(model, s, ids, *args):
        drawn.append(ids.tolist())
        return edit
    monkeypatch.setattr(suppress, "fit", fit)
    suppress.main(["sweep", f"--out_dir={out}", f"--gains={path}"])
    assert len(set(drawn[0])) == 5 and not set(drawn[0]) & {1, 4, 7, 9, 11}
