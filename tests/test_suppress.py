"""Interventions: gains against plain loops, behaviors in text, gains files, and what the commands say and write."""
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import tiny, write_run

import prism
import suppress
from prism import UserError
from suppress import Lab, compiled, marks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with held-out text of eight windows and more."""
    return write_run(tmp_path_factory.mktemp("suppress"), iters=135)


def lines(capsys):
    return capsys.readouterr().out.strip().splitlines()


# -- the model under gains

def test_reselection_expresses_the_state_anew_and_keeps_the_residual():
    """gains of -inf against plain loops: the k most similar of those that remain, the residual of the full mixture."""
    model = tiny(n_proto=12, top_k=3).double()
    idx = torch.randint(0, model.config.vocab_size, (2, 5))
    gains = torch.ones(12, dtype=torch.float64)
    gains[[0, 4, 7]], gains[2] = -math.inf, 1.7
    z = model.hidden(idx)
    W, P, k = model.transformer.wte.weight, model.prototypes, 3
    got = model.logits(z, gains)
    for b in range(2):
        for t in range(5):
            v = z[b, t]
            s = [float(v @ p / v.norm() / p.norm()) for p in P]
            full = sorted(range(12), key=lambda i: -s[i])[:k]
            rest = sorted((i for i in range(12) if gains[i] > -math.inf), key=lambda i: -s[i])[:k]
            residual = v - sum(max(0.0, s[i]) * P[i] for i in full)
            want = W @ (residual + sum(gains[i] * max(0.0, s[i]) * P[i] for i in rest))
            torch.testing.assert_close(got[b, t], want)
    e = model.explain(idx, gains=gains)
    torch.testing.assert_close(e.contributions.sum(-1) + e.residual, e.logit)
    assert not set(e.prototypes.flatten().tolist()) & {0, 4, 7}
    greedy = [model.generate(idx, 6, 0, gains=gains, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)
    with pytest.raises(UserError, match="gains leave 2 prototypes in the search, expected at least top_k = 3"):
        model.logits(z, torch.tensor([-math.inf] * 10 + [1.0] * 2))


def test_gains_commute_and_files_compose(tmp_path):
    model = tiny(n_proto=6, top_k=2)
    owner = prism.fingerprint(model.state_dict())

    def file(name, **about):
        (tmp_path / name).write_text(json.dumps(dict(checkpoint=owner) | about))
        return str(tmp_path / name)
    a, b = file("a.json", ids=[1, 2], gains=[0.5, 3.0]), file("b.json", ids=[2, 5], gains=[2.0, 0.0])
    c = file("c.json", ids=[1, 3], gains=[0.0, 0.0], mode="reselect")
    both = prism.load_gains(f"{a},{b}", model)
    assert both.tolist() == [1, 0.5, 6, 1, 1, 0] and torch.equal(both, prism.load_gains(f"{b},{a}", model))
    assert prism.load_gains(f"{a},{c}", model).tolist() == [1, -math.inf, 3, -math.inf, 1, 1] == prism.load_gains(f"{c},{a}", model).tolist()
    with pytest.raises(UserError, match="mode is 'half', expected zero or reselect"):
        prism.load_gains(file("d.json", ids=[], gains=[], mode="half"), model)
    with pytest.raises(UserError, match="different ids"):
        prism.load_gains(file("e.json", ids=[1, 1], gains=[0, 1]), model)
    with pytest.raises(UserError, match="no gains file|as many"):
        prism.load_gains(file("n.json", ids=[0, 1], gains=[[1], [2]]), model)
    with pytest.raises(UserError, match="not finite"):
        prism.load_gains(",".join(file(f"{n}.json", ids=[0], gains=[1e30]) for n in "xy"), model)
    with pytest.raises(UserError, match="another checkpoint"):
        prism.load_gains(f"{a},{file('f.json', ids=[], gains=[], checkpoint='00')}", model)


# -- behaviors in text

def test_marks_against_characters(run):
    """Tokens that overlap a match, and those that hold its first character; characters of many bytes, and bytes that are no text."""
    pieces = [bytes([i]) for i in range(256)] + [b""]
    text = "naïve «xx» öx\n".encode() + b"\xff" + b"x"
    carried, onset = marks(np.array([*text, 256]), compiled("x+"), pieces)
    assert np.flatnonzero(onset).tolist() == [i for i in range(len(text)) if text[i:i + 1] == b"x" and text[i - 1:i] != b"x"]
    assert np.flatnonzero(carried).tolist() == [i for i in range(len(text)) if text[i:i + 1] == b"x"]
    wide = [b"ab", b"cd", b"ef", "ö".encode()]
    carried, onset = marks(np.array([0, 1, 2, 3, 3]), compiled("bcde|ö"), wide)
    assert carried.tolist() == [True] * 5 and onset.tolist() == [True, False, False, True, True]
    assert not marks(np.array([0, 1]), compiled("z*"), wide)[0].any()  # empty matches are none


def test_rank_against_plain_loops(run):
    lab = Lab(run, "cpu")
    w, s, _, _ = lab.look(suppress.FindConfig(behavior="cat", tokens=200))
    s = s.take(torch.arange(0, len(s.z), 3))
    got = suppress.rank(lab, s)
    W, P = lab.W, lab.P
    margin, gate_on, gate_off, benefit, price, logit, on, off = *(np.zeros(len(P)) for _ in range(5)), 0.0, 0.0, 0.0
    for t in range(len(s.z)):
        wt = s.weight[t].item()
        pi = (W @ s.z[t]).softmax(0)
        for i, a in zip(s.ids[t].tolist(), s.gates[t].tolist()):
            center = float((W[s.y[t]] - W.mean(0)) @ P[i]) * a
            error = float((W[s.y[t]] - pi @ W) @ P[i]) * a
            if s.onset[t]:
                margin[i], benefit[i], gate_on[i] = margin[i] + wt * center, benefit[i] + wt * error, gate_on[i] + wt * a
            if s.free[t]:
                price[i], gate_off[i] = price[i] + wt * error, gate_off[i] + wt * a
        if s.onset[t]:
            logit, on = logit + wt * float((W[s.y[t]] - W.mean(0)) @ s.z[t]), on + wt
        off += wt * bool(s.free[t])
    assert s.onset.any() and np.allclose(got["margin"], margin / logit, atol=1e-5)
    assert np.allclose(got["contrast"], gate_on / on - gate_off / off, atol=1e-5)
    assert np.allclose(got["merit"], benefit / (abs(price) + abs(price).mean()), rtol=1e-3, atol=1e-4)


def test_measure_is_the_model_under_gains(run):
    lab = Lab(run, "cpu")
    w, s, tune, _ = lab.look(suppress.FindConfig(behavior="cat", tokens=200))
    gains = torch.rand(len(lab.P)) * 2
    for g in (None, gains, gains.masked_fill(gains < 0.4, -math.inf)):
        loss, rate = lab.measure(tune, w, g)
        logits = lab.model.logits(tune.z, g)
        assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, tune.y, reduction="none"), atol=1e-5)
        assert torch.allclose(rate, logits.softmax(-1) @ w, atol=1e-6)
    assert suppress.effect(tune, lab.measure(tune, w), lab.measure(tune, w, torch.ones(len(lab.P)))) == (0.0, 1.0)


def test_fitted_gains_lower_the_rate_and_lambda_trades(run):
    lab = Lab(run, "cpu")
    w, s, _, _ = lab.look(suppress.FindConfig(behavior="cat", tokens=2000))
    before = lab.measure(s, w)
    every = torch.arange(len(lab.P))
    effects = [suppress.effect(s, before, lab.measure(s, w, 1 + suppress.fit(lab, s, w, before[1], lam, every))) for lam in (0.0, 0.3, 3.0)]
    assert effects[0][1] > effects[1][1] > effects[2][1] and effects[2][1] < 0.8
    assert effects[0][0] < effects[2][0]
    few = torch.tensor([7, 2])
    theta = suppress.fit(lab, s, w, before[1], 3.0, few)
    assert theta[few].abs().min() > 0 and theta.count_nonzero() == 2
    never = torch.tensor([i for i in range(len(lab.P)) if not ((s.ids == i) & (s.gates > 0)).any()])[:1]
    assert not suppress.fit(lab, s, w, before[1], 3.0, never).any()


def test_the_control_turns_other_prototypes_that_fire_as_often():
    gains, fires = torch.ones(64), torch.arange(64.0).flip(0)
    gains[[3, 10, 40]] = torch.tensor([0.0, -1.0, -math.inf])
    other = suppress.shuffled(gains, fires, 1)
    assert sorted(other[other != 1].tolist()) == [-math.inf, -1, 0] and (other[[3, 10, 40]] == 1).all()
    for value in (0.0, -1.0, -math.inf):
        assert abs((gains == value).nonzero() - (other == value).nonzero()).item() <= 20
    dense = torch.rand(64)
    assert sorted(suppress.shuffled(dense, fires, 1).tolist()) == sorted(dense.tolist()) and not torch.equal(suppress.shuffled(dense, fires, 1), dense)


# -- controllers

ITEMS = [dict(context="the cat sat on the", choices=[" mat", " dog ran"], label=0, document="a"), dict(context="", choices=["a dog", "a hen", "cat"], label=2, document="b"),
         dict(context="my ", choices=["hen is in", "hen ran"], label=1, given=[3, 3], document="c")] * 4
ITEMS = [x | {"context": x["context"] + " the" * (n // 3)} for n, x in enumerate(ITEMS)]  # all different


def test_a_choice_that_the_tokenizer_joins_to_its_context_is_scored_whole(run, monkeypatch):
    lab = Lab(run, "cpu")

    class Joining:  # " n" is one token, 255; all else is bytes
        n_vocab, eot_token = 257, 256

        def encode_ordinary(self, text):
            return [255 if piece == " n" else ord(piece) for piece in re.findall(" n|.", text)]
    lab.tokenizer = Joining()
    s = suppress.read_items(lab, [dict(context="of ", choices=["now", "then"], label=0)])
    assert s.states.y.tolist() == [255, *b"ow", *b"then"] and s.choice.tolist() == [0] * 3 + [1] * 4


def test_choice_scores_and_slopes_against_plain_loops(run):
    lab = Lab(run, "cpu")
    s = suppress.read_items(lab, ITEMS[:3])
    tokenizer, model = lab.tokenizer, lab.model
    want, sizes = [], []
    for x in ITEMS[:3]:
        for j, c in enumerate(x["choices"]):
            given = x.get("given", [0] * 9)[j]
            head, whole = tokenizer.encode_ordinary(x["context"] + c[:given]), tokenizer.encode_ordinary(x["context"] + c)
            if not head:
                head, whole = [tokenizer.eot_token], [tokenizer.eot_token, *whole]
            n = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), len(head))
            cut = max(0, len(whole) - lab.T - 1)
            logp = model.logits(model.hidden(torch.tensor([whole[cut:-1]])))[0].log_softmax(-1)
            want.append(sum(logp[t - 1 - cut, whole[t]].item() for t in range(n, len(whole))))
            sizes.append(len(c[given:].encode()))
    score, slope = suppress.choice_scores(lab, s, "sum", slopes=True)
    assert score.tolist() == pytest.approx(want, rel=1e-4)
    assert suppress.choice_scores(lab, s, "norm").tolist() == pytest.approx([a / b for a, b in zip(want, sizes)], rel=1e-4)
    for i in range(0, len(lab.P), 3):  # the slope by a central difference
        up, down = (suppress.choice_scores(lab, s, "sum", torch.ones(len(lab.P)).index_fill_(0, torch.tensor([i]), 1 + e)) for e in (1e-2, -1e-2))
        assert torch.allclose((up - down) / 2e-2, slope[:, i], atol=2e-3)


def test_a_controller_is_the_minimum_of_its_convex_problem(run):
    """FISTA against torch's own minimiser, in float64, with the smooth penalty alone; with l1 some gains stay at exactly one."""
    rng = torch.Generator().manual_seed(0)
    s = suppress.Scored(None, None, np.repeat(np.arange(30), 3), None, np.arange(30) * 3 + 1)
    score, slope = torch.randn(90, generator=rng).double(), torch.randn(90, 8, generator=rng).double()
    items = np.arange(30)

    def value(x):
        return suppress.likelihood(score + slope @ x, s, items) + 0.05 * x.square().sum()
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = value(x)
        loss.backward()
        return loss
    opt.step(closure)
    theta = suppress.controller(score, slope, s, items, 0.1, 0.0)
    assert value(theta).item() == pytest.approx(value(x).item(), rel=1e-6)
    plain = -np.mean([float((score[3 * n:3 * n + 3]).log_softmax(0)[1]) for n in range(30)])
    assert suppress.likelihood(score, s, items).item() == pytest.approx(plain)
    sparse = suppress.controller(score, slope, s, items, 0.1, 0.05)
    assert 0 < (sparse == 0).sum() < 8
    assert suppress.right(torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 1.0]), suppress.Scored(None, None, np.array([0, 0, 0, 1, 1, 1]), None, np.array([0, 4])), [0, 1]).tolist() == [False, True]


# -- the commands

def test_find_apply_sweep_and_calibrate(run, tmp_path, capsys):
    suppress.main(["find", f"--out_dir={run}", "--behavior=h", "--name=cats", "--tokens=1500", "--price=1000"])
    said = lines(capsys)
    path = run / "gains/cats.json"
    made = json.loads(path.read_text())
    model, _ = prism.load_checkpoint(run)
    assert made["behavior"] == "h" and made["found"]["by"] in ("zero", "reselect", "fit") and said[-1].startswith(str(path))
    assert (prism.load_gains(path, model) != 1).sum() == len(made["ids"]) > 0
    suppress.main(["apply", f"--out_dir={run}", f"--gains={path}", "--num_samples=2", "--max_new_tokens=30"])
    said = lines(capsys)
    assert sum(x.startswith("before |") for x in said) == 2 == sum(x.startswith(" after |") for x in said)
    before, after = map(int, re.fullmatch(r"'h': (\d+) matches before, (\d+) after, in 60 tokens each", said[-1]).groups())
    suppress.main(["sweep", f"--out_dir={run}", f"--gains={path}", "--tokens=1500", "--prompts=40", "--max_new_tokens=20"])
    said = lines(capsys)
    result = json.loads(path.with_suffix(".sweep").read_text())
    assert result["matches"]["before"] > result["matches"]["after"] and path.with_suffix(".png").stat().st_size > 1000
    rows = path.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == len(result["rows"]) + 1 and said[-1].startswith("matches per 1,000 tokens before")
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(x | {"document": str(n)}) + "\n" for n, x in enumerate(ITEMS)))
    suppress.main(["calibrate", f"--out_dir={run}", f"--task={task}", "--folds=2", "--name=c"])
    assert lines(capsys)[-1].startswith(f"{run}/gains/c.json: accuracy ")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(x | {"context": "my " + x["context"], "document": str(n)}) + "\n" for n, x in enumerate(ITEMS)))
    suppress.main(["calibrate", f"--out_dir={run}", f"--task={task}", f"--calibration={other}", "--folds=2", "--name=c", "--score=norm"])
    with pytest.raises(UserError, match="holds items of"):
        suppress.main(["calibrate", f"--out_dir={run}", f"--task={task}", f"--calibration={task}", "--folds=2"])
    found = json.loads((run / "gains/c.json").read_text())
    assert set(found["found"]["result"]) == {"uncalibrated", "controller", "temperature", "random", "over_random"} and prism.load_gains(run / "gains/c.json", model).shape == (12,)
    (tmp_path / "yes.txt").write_text("the cat sat\na cat\n")
    (tmp_path / "no.txt").write_text("the dog ran\na hen\n")
    suppress.main(["find", f"--out_dir={run}", f"--positive={tmp_path}/yes.txt", f"--negative={tmp_path}/no.txt", "--name=texts", "--mode=zero", "--price=1000"])
    assert json.loads((run / "gains/texts.json").read_text())["found"]["by"] == "zero"


def test_bad_input_is_refused(run, tmp_path):
    task = tmp_path / "t.jsonl"
    task.write_text("".join(json.dumps(x) + "\n" for x in ITEMS[:2]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ITEMS[0]) + "\n{\n")
    far = tmp_path / "far.jsonl"
    far.write_text(json.dumps(ITEMS[0] | {"label": 2}) + "\n")
    for words, message in ((["find", "--behavior=zebra"], "never occurs in"), (["find", "--behavior=("], "is no regular expression"), (["find"], "give --behavior=REGEX"), (["find", "--behavior=(?s)."], "covers all of the text"),
                           (["find", "--behavior=cat", "--positive=x"], "not both"), (["find", "--behavior=cat", "--seed=-1"], "seed is -1"), (["sweep", "--gains=a,b"], "sweep takes one file"),
                           (["find", "--behavior=cat", "--mode=half"], "mode=half"), (["find", "--behavior=cat", "--name=../x"], "name='../x'"),
                           (["find", "--behavior=cat", "--price=-1"], "price -1"), (["apply"], "no gains file"), (["sweep"], "no gains file"),
                           (["calibrate"], "no --task"), (["calibrate", f"--task={task}"], "too few for 3 folds"), (["calibrate", f"--task={broken}"], "broken.jsonl:2"),
                           (["calibrate", f"--task={far}"], "label is 2"), (["calibrate", f"--task={task}", "--score=best"], "score=best"),
                           (["calibrate", f"--task={tmp_path}/none"], "No such file"), (["find", f"--positive={tmp_path}/none", "--negative=x"], "cannot be read"), (["fnd"], "'fnd'")):
        with pytest.raises(UserError, match=re.escape(message)):
            suppress.main([*words, f"--out_dir={run}"] if words != ["fnd"] else words)
    gains = tmp_path / "g.json"
    gains.write_text(json.dumps(dict(checkpoint=prism.fingerprint(prism.load_checkpoint(run)[0].state_dict()), ids=[1], gains=[0.0])))
    with pytest.raises(UserError, match="names no behavior to count"):
        suppress.main(["sweep", f"--out_dir={run}", f"--gains={gains}"])
    with pytest.raises(UserError, match="no gains file"):
        suppress.main(["apply", f"--out_dir={run}", f"--gains={task}"])
