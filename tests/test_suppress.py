"""Interventions: gains against plain loops, behaviors in text, gains files and the commands."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny, write_run

import common
import suppress
from prism import UserError
from suppress import behavior_states, compile_pattern, marks, measure


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a tiny run with held-out text of eight windows and more."""
    return write_run(tmp_path_factory.mktemp("suppress"), iters=135)


@pytest.fixture(scope="module")
def run(out):
    return common.Run(out, "cpu")


def lines(capsys):
    return capsys.readouterr().out.strip().splitlines()


# -- gains

def test_gains_files_compose_and_belong_to_one_checkpoint(tmp_path):
    model = tiny(n_proto=6, top_k=2)
    owner = common.fingerprint(model.state_dict())

    def file(name, **facts):
        (tmp_path / name).write_text(json.dumps(dict(checkpoint=owner) | facts))
        return str(tmp_path / name)

    a = file("a.json", ids=[1, 2], gains=[0.5, 3.0])
    b = file("b.json", ids=[2, 5], gains=[2.0, 0.0])
    assert common.load_gains(f"{a},{b}", model).tolist() == [1, 0.5, 6, 1, 1, 0]
    assert common.load_gains(f"{b},{a}", model).tolist() == [1, 0.5, 6, 1, 1, 0]
    with pytest.raises(UserError, match="another checkpoint"):
        common.load_gains(f"{a},{file('c.json', ids=[], gains=[], checkpoint='00')}", model)
    for ids, gains in (([1, 1], [0, 1]), ([0, 1], [1]), ([6], [0]), ([-1], [0])):
        with pytest.raises(UserError, match="expected finite gains and as many different ids"):
            common.load_gains(file("d.json", ids=ids, gains=gains), model)


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


def test_states_and_w_follow_from_the_text(run):
    w, s, tune, test = behavior_states(run, "cat", 200, seed=1)
    rows = run.train[:(len(run.train) - 1) // run.T * run.T].reshape(-1, run.T)
    windows = {tuple(row[1:].tolist()) for row in rows}
    drawn = [tuple(y[:-1].tolist()) for y in s.y.split(run.T)]
    assert len(drawn) == 12 and set(drawn) <= windows
    assert not torch.equal(s.y, behavior_states(run, "cat", 200, seed=2)[1].y)
    assert len(tune.z) + len(test.z) == (len(run.val) - 1) // run.T * run.T
    second = torch.from_numpy(run.val[run.T:2 * run.T + 1].astype(np.int64))
    assert torch.equal(test.y[:run.T], second[1:])
    torch.testing.assert_close(test.z[:run.T], run.model.hidden(second[None, :-1])[0])
    text = bytes(run.train.astype(np.uint8))
    assert w[ord("c")].item() == pytest.approx(text.count(b"cat") / text.count(b"c"))
    assert w.count_nonzero() == 1


# -- what gains do

def test_measure_is_the_model_with_gains(run):
    w, s, tune, _ = behavior_states(run, "cat", 200, seed=1)
    gains = torch.rand(12) * 2
    for g in (None, gains):
        loss, rate = measure(run.model, tune, w, g)
        logits = run.model.logits(tune.z, g)
        assert torch.allclose(loss, F.cross_entropy(logits, tune.y, reduction="none"), atol=1e-5)
        assert torch.allclose(rate, logits.softmax(-1) @ w, atol=1e-6)
    before, after = measure(run.model, tune, w), measure(run.model, tune, w, gains)
    assert suppress.effect(tune, before, before) == (0.0, 1.0)
    rise, share = suppress.effect(tune, before, after)
    kept = tune.free.numpy()
    (loss, rate), (new_loss, new_rate) = before.numpy(), after.numpy()
    assert rise == pytest.approx(100 * (new_loss[kept].mean() / loss[kept].mean() - 1), 1e-3)
    assert share == pytest.approx(new_rate.mean() / rate.mean(), 1e-4)


def test_rank_prototypes_against_plain_loops(run):
    s = behavior_states(run, "cat", 200, seed=1)[1]
    s = s.take(torch.arange(0, len(s.z), 3))
    got = suppress.rank_prototypes(run.model, s)
    W, P = run.model.W, run.model.prototypes
    margin, benefit, price, fires = np.zeros((4, len(P)))
    logit = 0.0
    for t in range(len(s.z)):
        pi = (W @ s.z[t]).softmax(0)
        for i, a in zip(s.ids[t].tolist(), s.gates[t].tolist()):
            error = a * float((W[s.y[t]] - pi @ W) @ P[i])
            fires[i] += a > 0
            if s.onset[t]:
                margin[i] += a * float((W[s.y[t]] - W.mean(0)) @ P[i])
                benefit[i] += error
            if s.free[t]:
                price[i] += error
        if s.onset[t]:
            logit += float((W[s.y[t]] - W.mean(0)) @ s.z[t])
    merit = benefit / (abs(price) + abs(price).mean())
    assert s.onset.sum() > 0 and (s.onset | s.free).sum() < len(s.z)
    for value, expected in zip(got, (margin / logit, merit, fires)):
        assert np.allclose(value, expected, rtol=1e-3, atol=1e-4)


def test_fitted_gains_lower_the_rate_and_lambda_trades(run):
    w, s, _, _ = behavior_states(run, "cat", 2000, seed=1)
    before = measure(run.model, s, w)
    effects = []
    for lam in (0.0, 0.3, 3.0):
        gains = suppress.fit(run.model, s, w, before[1].mean(), lam, torch.arange(12))
        effects.append(suppress.effect(s, before, measure(run.model, s, w, gains)))
    assert effects[0][1] > effects[1][1] > effects[2][1] and effects[2][1] < 0.8
    assert effects[0][0] < effects[2][0]
    few = torch.tensor([7, 2])
    theta = suppress.fit(run.model, s, w, before[1].mean(), 3.0, few) - 1
    assert theta[few].abs().min() > 0 and theta.count_nonzero() == 2


def test_fit_goes_down_its_objective(run):
    """The objective of the docstring, from whole distributions, on the way to the fit."""
    w, s, _, _ = behavior_states(run, "cat", 2000, seed=1)
    rate_0 = measure(run.model, s, w)[1].mean()
    keep = 1 - w

    def objective(gains):
        q = run.model.logits(s.z).softmax(1) * keep
        p = run.model.logits(s.z, gains).softmax(1)
        q, p_kept = q / q.sum(1, keepdim=True), p * keep / (p @ keep)[:, None]
        kl = (q * (q.clamp(min=1e-30) / p_kept.clamp(min=1e-30)).log()).sum(1)
        return (kl + 0.5 * (p @ w) / rate_0).mean().item()

    gains = suppress.fit(run.model, s, w, rate_0, 0.5, torch.arange(12))
    ones = torch.ones(12)
    middle = (ones + gains) / 2
    assert objective(gains) < objective(middle) < objective(ones) - 0.02


def test_the_control_uses_other_prototypes_that_fire_as_often():
    gains, fires = torch.ones(64), torch.arange(64.0).flip(0)
    gains[[3, 10, 40]] = torch.tensor([0.0, -1.0, 0.3])
    control = suppress.shuffled(gains, fires, 1)
    assert (control[[3, 10, 40]] == 1).all() and torch.equal(control.sort()[0], gains.sort()[0])
    for value in gains[[3, 10, 40]]:
        distance = (gains == value).nonzero() - (control == value).nonzero()
        assert abs(distance).item() < 32
    assert torch.equal(control, suppress.shuffled(gains, fires, 1))
    dense = torch.rand(64)
    control = suppress.shuffled(dense, fires, 1)
    assert torch.equal(control.sort()[0], dense.sort()[0]) and not torch.equal(control, dense)


# -- the commands

def test_find_apply_and_sweep(out, run, capsys):
    find = ["find", f"--out_dir={out}", "--behavior=h", "--name=cats", "--tokens=1500",
            "--price=1000"]
    suppress.main(find)
    path = out / "gains/cats.json"
    assert lines(capsys)[-1].startswith(str(path))
    written = path.read_text()
    found = json.loads(written)
    assert [*found] == ["checkpoint", "behavior", "found", "ids", "gains"]
    assert found["behavior"] == "h" and found["found"]["by"] in ("shared", "fit")
    gains = common.load_gains(path, run.model)
    assert (gains != 1).sum() == len(found["ids"]) > 0
    suppress.main(find)
    assert path.read_text() == written
    capsys.readouterr()

    suppress.main(["apply", f"--out_dir={out}", f"--gains={path},{path}", "--num_samples=2",
                   "--max_new_tokens=30", "--prompt=the hen"])
    idx = torch.tensor([[*b"the hen"]] * 2)
    whole = [run.decode(row) for row in run.model.generate(idx, 30, 0.8, seed=1337, n_vocab=257)]
    said = lines(capsys)
    assert [line.split(",")[0].strip() for line in said] == ["before", "after"] * 2
    for line, text in zip(said[::2], whole):
        assert line == f"before, {text.count('h') - 2} matches | {common.plain(text)}"

    suppress.main(["sweep", f"--out_dir={out}", f"--gains={path}", "--tokens=1500"])
    result = json.loads(path.with_suffix(".sweep.json").read_text())
    assert [*result] == ["behavior", "checkpoint", "price", "rows", "before", "after"]
    assert result["checkpoint"] == run.hash and result["price"] == 1000
    chosen = result["rows"][-1]
    assert chosen["mode"] == "chosen" and chosen["size"] == len(found["ids"])
    assert {row["mode"] for row in result["rows"]} == {"shared", "fit", "chosen"}
    w, _, _, test = behavior_states(run, "h", 1500, 2)
    before, after = (measure(run.model, test, w, g) for g in (None, gains))
    assert (chosen["loss_percent"], chosen["rate"]) == suppress.effect(test, before, after)
    assert len(result["before"]) == 4 == len(result["after"])
    for (n, old), (m, new) in zip(result["before"], result["after"]):
        assert old[:8] == new[:8] and n == old[8:].count("h") and m == new[8:].count("h")
    assert result["before"][0][0] >= result["before"][3][0] > 0
    suppress.main([*find, "--mode=shared"])
    assert not path.with_suffix(".sweep.json").exists()  # it was measured with other gains


def test_bad_input_is_refused(out, run, tmp_path, monkeypatch):
    nameless = tmp_path / "g.json"
    nameless.write_text(json.dumps(dict(checkpoint=run.hash, ids=[1], gains=[0.0])))
    foreign = tmp_path / "t.json"
    foreign.write_text("{\n")
    cat = ["find", "--behavior=cat"]
    for words, message in (
            (["find", "--behavior=zebra"], "never occurs in"),
            (["find"], "never occurs in"),
            (["find", "--behavior=("], "expected a regular expression"),
            (["find", "--behavior=(?s).", "--mode=shared"], "raise --price"),
            ([*cat, "--mode=half"], "mode half (auto, shared, fit)"),
            ([*cat, "--price=-99", "--mode=shared"], "raise --price"),
            (["apply", "--num_samples=0"], "num_samples=0"),
            (["apply", "--temperature=-1"], "temperature=-1"),
            (["apply"], "suppress.py find writes one"),
            (["apply", f"--gains={foreign}"], "JSONDecodeError"),
            (["apply", f"--gains={nameless}"], "that suppress.py find wrote"),
            (["sweep", f"--gains={nameless},{nameless}"], "expected one file"),
            (["sweep", f"--gains={nameless}"], "expected one file")):
        with pytest.raises(UserError, match=re.escape(message)) as e:
            suppress.main([*words, f"--out_dir={out}"])
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="find, apply, sweep"):
        suppress.main(["fnd"])
    monkeypatch.setattr(run, "val", run.val[:32])
    with pytest.raises(UserError, match="32 held-out tokens, expected 33"):
        behavior_states(run, "cat", 200, seed=1)
