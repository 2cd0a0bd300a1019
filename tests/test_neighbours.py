"""The two neighbours, experiments/logit_rank.py and proto_lm.py, in their smallest form."""
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import logit_rank  # noqa: E402
import proto_lm  # noqa: E402


def plain(network, z):
    """Logits before each token of one sequence, loop by loop."""
    x, out = [1.0] + [0.0] * (network.B[0].shape[1] - 1), []
    for t, token in enumerate(z):
        l = [sum(b * u for b, u in zip(row, x)) for row in network.B[t]]
        out.append([u - sum(l) / len(l) for u in l])
        if t < len(network.A):
            x = [sum(a * u for a, u in zip(row, x)) for row in network.A[t][token]]
    return np.array(out)


def test_a_network_is_what_its_loop_says():
    rng = np.random.default_rng(0)
    network = logit_rank.random_network(3, 5, 4, rng)
    z = rng.integers(3, size=(6, 5))
    assert network.logits(z) == pytest.approx(np.stack([plain(network, row) for row in z]))
    drawn, total = network.sample(20000, rng)[:, :2], 0.0
    for a, b in itertools.product(range(3), repeat=2):
        l = torch.from_numpy(plain(network, [a, b, 0])).log_softmax(-1)
        p = float((l[0, a] + l[1, b]).exp())
        total += p
        assert (drawn == (a, b)).all(1).mean() == pytest.approx(p, abs=0.02)
    assert total == pytest.approx(1)


def test_a_noisy_parity_says_so():
    secret = np.array([True, False, True])
    network = logit_rank.noisy_parity(secret, 0.2)
    for bits in itertools.product((0, 1), repeat=3):
        p = torch.from_numpy(network.logits(np.array([[*bits, 0]]))[0]).softmax(-1).numpy()
        assert p[:3] == pytest.approx(np.full((3, 2), 0.5)) and p[3, (bits[0] + bits[2]) % 2] == pytest.approx(0.8)


@pytest.mark.parametrize("rank,V,N", [(1, 2, 4), (5, 3, 7), (32, 3, 9)])
def test_networks_are_recovered_from_their_logits_alone(rank, V, N):
    pytest.importorskip("scipy")
    rng = np.random.default_rng(rank)
    true = logit_rank.random_network(V, N, rank, rng)
    row = logit_rank.recovered("it", true, V, N, rank, logit_rank.RankConfig(), rng)
    assert row["error"] < 1e-6 and row["told"][-1]["error"] < 1e-8 and row["told"][-1]["queries"] == row["queries"]


def test_bounded_coefficients_keep_recovery_exact_and_the_program_steps_in_where_the_rank_is_too_small():
    rng = np.random.default_rng(1)
    true = logit_rank.random_network(3, 7, 6, rng)
    oracle = logit_rank.Oracle(lambda h: true.logits(np.concatenate([h, np.zeros((len(h), 1), int)], 1))[:, -1])
    learner, _ = logit_rank.learn(oracle, 3, 7, 6, 1e-8, 1.2, rng)
    assert logit_rank.worst(learner, true, rng.integers(3, size=(200, 7))) < 1e-6 and not learner.programs
    assert max(abs(A).max() for A in learner.network.A) <= 1.2 + 1e-9                            # by exchange alone
    pytest.importorskip("scipy")
    learner, _ = logit_rank.learn(oracle, 3, 7, 2, 1e-8, 1.0, rng, rounds=3)
    assert learner.programs and max(abs(A).max() for A in learner.network.A) <= 1 + 1e-9


def test_a_parity_is_recovered_with_fewer_queries_than_it_has_histories():
    secret = np.random.default_rng(3).random(12) < 0.5
    row = logit_rank.recovered("parity", logit_rank.noisy_parity(secret, 0.1), 2, 13, 2, logit_rank.RankConfig(), np.random.default_rng(0))
    assert row["error"] < 1e-6 and row["queries"] < 2 ** 12


def test_too_small_a_rank_is_not_exact():
    rng = np.random.default_rng(0)
    true = logit_rank.random_network(3, 6, 6, rng)
    assert logit_rank.recovered("it", true, 3, 6, 3, logit_rank.RankConfig(), rng)["error"] > 0.1


def test_the_linear_program_bounds_coefficients():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    Phi = rng.standard_normal((3, 9))
    assert logit_rank.bounded(Phi, np.array([0.5, -1, 0.25]) @ Phi, 1.0) == pytest.approx([0.5, -1, 0.25], abs=1e-6)
    c = logit_rank.bounded(Phi, np.array([3.0, 0, 0]) @ Phi, 1.0)
    assert abs(c).max() <= 1 + 1e-9
    error = abs(c @ Phi - 3 * Phi[0]).max()
    assert all(abs(u @ Phi - 3 * Phi[0]).max() >= error - 1e-9 for u in rng.uniform(-1, 1, (2000, 3)))


def test_exponents_and_ranks_of_a_known_matrix():
    i = np.arange(1, 65)
    assert logit_rank.exponent(7 * i ** -0.6, 4, 40) == pytest.approx(0.6)
    rng = np.random.default_rng(0)
    U, V = np.linalg.qr(rng.standard_normal((32, 32)))[0], np.linalg.qr(rng.standard_normal((80, 80)))[0][:, :32]
    X = torch.from_numpy(U * 30 * np.arange(1.0, 33) ** -0.7 @ V.T).float().view(32, 10, 8)
    x = logit_rank.spectrum(X, 5, (1, 31))
    values = np.linalg.svd(X.flatten(1).numpy(), compute_uv=False)
    assert x["values"] == pytest.approx(values, rel=1e-3) and x["alpha"] == pytest.approx(0.7, abs=1e-3)
    assert x["fewer"] == {}  # too few histories for half of them to be told
    assert x["kl"][1] > 100 * x["kl"][31]
    flat = X.flatten(1).double().numpy()

    def alpha(M):
        return logit_rank.exponent(np.linalg.svd(M, compute_uv=False), min(4, len(M) // 8), max(len(M) // 4, 3))
    histories = [alpha(np.delete(flat, np.arange(g, 32, 8), 0)) for g in range(8)]
    passages = [alpha(np.delete(flat.reshape(32, 5, 16), g, 1).reshape(32, -1)) for g in range(5)]
    error = 2.36 * np.sqrt(7 / 8 * ((np.array(histories) - np.mean(histories)) ** 2).sum() + 4 / 5 * ((np.array(passages) - np.mean(passages)) ** 2).sum())
    assert x["interval"] == pytest.approx([x["alpha"] - error, x["alpha"] + error], rel=1e-4)


def test_lingen_finds_a_target_among_its_basis():
    model = tiny(torch.float32, block_size=16)
    ask, rng = logit_rank.Ask(model, 9), np.random.default_rng(0)
    basis, cfg = torch.from_numpy(rng.integers(9, size=(6, 5))), logit_rank.RankConfig(steps=4, shorts="1,5", ridges="1e-9,1e3", seed=2)
    futures = torch.from_numpy(rng.integers(9, size=(2, 3)))
    l = ask(basis, 2)
    assert ask.count == 12 and l.mean(-1).abs().max() < 1e-5 and (l[:, 1] - (model(basis)[0][:, 0, :9] - model(basis)[0][:, 0, :9].mean(-1, keepdim=True))).abs().max() < 1e-5
    X = logit_rank.extended(ask, basis, futures)
    whole = torch.cat([basis[2], futures[1, :2]])[None]
    assert X.shape == (6, 6, 9) and (X[2, 4] - ask(whole)[0, 0]).abs().max() < 1e-5             # after two tokens of the second future
    targets = torch.from_numpy(rng.integers(9, size=(2, 5)))
    sums = logit_rank.lingen(ask, targets, basis, futures, cfg, {"Lingen": [1e-9], "one-token": [0.1]}, 3)
    Y, want, drawn, generator = logit_rank.extended(ask, targets, futures), {}, targets[:, :0], torch.Generator().manual_seed(2)
    c = {"Lingen": [torch.cat([u.flatten(1), v.flatten(1)], 1).double() for u, v in ((ask(basis), X), (ask(targets), Y))], "one-token": [ask(basis)[:, 0].double(), ask(targets)[:, 0].double()]}
    c = {n: v @ u.T @ torch.linalg.inv(u @ u.T + ridge * (u @ u.T).diagonal().mean() * torch.eye(6)) for (n, (u, v)), ridge in zip(c.items(), (1e-9, 0.1))}
    for _ in range(3):
        true = ask(torch.cat([targets, drawn], 1))[:, 0]
        for n in ("Lingen", "one-token", "short context"):
            for t in range(2):
                told = sum(c[n][t, i].float() * ask(torch.cat([basis[i], drawn[t]])[None])[0, 0] for i in range(6)) if n in c else ask(torch.cat([targets[t, -1:], drawn[t]])[None])[0, 0]
                want[n] = want.get(n, 0) + logit_rank.kl(true[t], told).item() / 2
        drawn = torch.cat([drawn, torch.multinomial(true.softmax(-1), 1, generator=generator)], 1)
    assert [sums["Lingen"][1e-9][-1], sums["one-token"][0.1][-1], sums["short context"][1][-1]] == pytest.approx(list(want.values()), rel=1e-2)
    assert sums["short context"][5][-1] < 1e-6
    found, best = logit_rank.continued(ask, targets, basis[1:3], basis, futures, cfg)
    assert found["Lingen"][-1] < 1e-4 < found["last 1 tokens"][-1] and found.keys() == {"Lingen", "one-token", "last 1 tokens", "last 5 tokens"} and best["Lingen"] == 1e-9
    p, q = torch.randn(2, 3, 5)
    assert logit_rank.kl(p, q)[1].item() == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p[1].softmax(0).tolist(), q[1].softmax(0).tolist())), abs=1e-5)


def test_logit_rank_in_its_smallest_form(made, tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy")
    words = [f"--out_dir={made}", f"--dense={made}", "--histories=16", "--length=4", "--futures=2", "--future=2", "--targets=2", "--basis=4", "--steps=3", "--shorts=2,4",
             "--ranks=2,8", "--horizons=4", "--alphabet=2", "--horizon=4", "--learned=1,8", f"--out={tmp_path}/l.json"]
    monkeypatch.setattr(logit_rank, "trained", lambda out, *options: out)
    logit_rank.main(words)
    result = json.loads((tmp_path / "l.json").read_text())
    assert result["spectrum"].keys() == {"PRISM", "dense", "untrained"} and (tmp_path / "l.png").exists()
    assert result["spectrum"]["PRISM"]["values"] == result["spectrum"]["dense"]["values"] and result["spectrum"]["PRISM"]["queries"] == 16 * 2 * 2
    best = result["real"][-1]                                                                      # 2 tokens, horizon 4: 8 states at most
    assert [r["name"] for r in result["synthetic"]] == ["random, rank 2, 12 tokens", "random, rank 8, 12 tokens", "random, rank 8, 4 tokens", "parity of 12 bits, noise 0.1"]
    assert best["kl"] == pytest.approx(0, abs=1e-3) and best["variation"] < 1e-2 and best["queries"] == 15
    assert capsys.readouterr().out.splitlines()[-1].startswith("alpha ")
    logit_rank.main([*words, "--parts=b"])
    assert json.loads((tmp_path / "l.json").read_text())["real"] == result["real"]                # what other parts found stays
    for wrong, message in (("--parts=x", "parts='x'"), ("--ranks=a", "whole numbers"), ("--ridges=nan", "numbers above 0"), ("--length=15", "do not fit the context of 16"), ("--histories=99", "lower --histories"),
                           ("--histories=3", "at least 16"), ("--shorts=9", "at most the length"), ("--bound=inf", "bound at least 1")):
        with pytest.raises(logit_rank.UserError, match=message):
            logit_rank.main([*words, wrong])


# ----------------------------------------------------------------------------- prototype classification

def a_classifier(prototypes=6, seed=0):
    torch.manual_seed(seed)
    clf = proto_lm.Classifier(5, 3, prototypes).double()
    for p in clf.parameters():
        torch.nn.init.normal_(p)
    h, mask = torch.randn(4, 7, 5, dtype=torch.double), torch.arange(7)[None] < torch.tensor([7, 3, 1, 5])[:, None]
    return clf, h, mask


def test_prototype_classifier_against_plain_loops():
    clf, h, mask = a_classifier()
    logits, s, alpha = clf(h, mask)
    weights, answer = clf.weights(h, mask)
    for b in range(4):
        n = int(mask[b].sum())
        score = torch.stack([clf.v(torch.tanh(clf.A(h[b, t])))[0] for t in range(n)])
        a = score.exp() / score.exp().sum()
        u = sum(a[t] * clf.V(h[b, t]) for t in range(n))
        want = [torch.dot(u, p) / u.norm() / p.norm() for p in clf.prototypes]
        assert (s[b] - torch.stack(want)).abs().max() < 1e-12 and (alpha[b, :n] - a).abs().max() < 1e-12 and not alpha[b, n:].any()
        out = torch.stack([clf.scale * sum(clf.last[c, k] * want[k] for k in range(6)) for c in range(3)])
        assert (logits[b] - out).abs().max() < 1e-9 and answer[b] == out.argmax()
        assert weights[b].sum().item() == pytest.approx((out.max() - out.mean()).item()) and not weights[b, n:].any()  # shares add up to the logit
    plain, _, _ = a_classifier(0)
    shares, c = plain.weights(h, mask)
    l = plain(h, mask)[0] - plain.linear.bias
    assert (shares.sum(1) - (l.gather(1, c[:, None])[:, 0] - l.mean(1))).abs().max() < 1e-12
    cfg, y = proto_lm.ProtoConfig(near=2, own="farthest", lambda0=0.5, lambda1=0.3, lambda2=0.2), torch.tensor([0, 2, 1, 2])
    pull = sum(sum(sorted(s[b, k].item() for k in range(6) if k % 3 == y[b])[:2]) / 2 for b in range(4)) / 4
    push = sum(sum(sorted((s[b, k].item() for k in range(6) if k % 3 != y[b]), reverse=True)[:2]) / 2 for b in range(4)) / 4
    ce = -sum(logits[b].log_softmax(0)[y[b]] for b in range(4)) / 4
    assert proto_lm.loss_of(clf, h, mask, y, cfg).item() == pytest.approx((0.5 * ce + 0.3 * (1 - pull) + 0.2 * push).item())


def test_projection_puts_prototypes_on_texts_of_their_class():
    clf, h, mask = a_classifier()
    texts = type("Texts", (), dict(y=torch.tensor([0, 0, 1, 2]), mask=mask))
    before = clf.prototypes.detach().clone()
    u = clf.pool(h, mask)[0]
    proto_lm.project(clf, texts, u)
    for n, e in enumerate(clf.example.tolist()):
        assert (clf.prototypes[n] == (u[e] if e >= 0 else before[n])).all() and (e < 0 or texts.y[e] == clf.owner[n])
    assert sorted(clf.example.tolist()) == [-1, -1, 0, 1, 2, 3]                                # class 0 has two texts, 1 and 2 have one each for two prototypes


def test_a_simulator_learns_what_it_can_see():
    bags = [[n % 2, 2 + n % 5] for n in range(60)]
    y = torch.tensor([n % 2 for n in range(60)])
    assert proto_lm.simulated((bags[:40], y[:40]), (bags[40:], y[40:]), 7, 0) == 1
    assert proto_lm.simulated(([b[1:] for b in bags[:40]], y[:40]), ([b[1:] for b in bags[40:]], y[40:]), 7, 0) < 0.8


def test_explanations_of_a_model_that_sees_one_token(made):
    """Class 1 where token 65 is in the text: it ranks first; without it the answer is gone, with it alone it stays."""
    model = logit_rank.load_checkpoint(made)[0]
    model.hidden = lambda idx: torch.stack([(idx == 65).float(), torch.ones_like(idx).float()], -1)
    clf = proto_lm.Classifier(2, 2)
    with torch.no_grad():
        clf.v.weight.zero_(), clf.linear.weight.copy_(torch.tensor([[0.0, 0.0], [90.0, 0.0]])), clf.linear.bias.copy_(torch.tensor([3.0, 0.0]))
    rng = np.random.default_rng(0)
    sequences = [np.insert(rng.integers(66, 90, 9), n, 65) for n in range(9)]
    texts = proto_lm.Texts(model, sequences, torch.ones(9, dtype=torch.long), 16)
    order, c = proto_lm.orders(clf, texts)
    assert [o[0] for o in order] == list(range(9)) and c.tolist() == [1] * 9
    x = proto_lm.faithful(model, clf, texts, order, (0.1, 0.5))
    assert min(x["comprehensiveness"]) > 0.9 and max(map(abs, x["sufficiency"])) < 0.1
    y = proto_lm.faithful(model, clf, texts, [o[::-1] for o in order], (0.1, 0.5))
    assert max(map(abs, y["comprehensiveness"])) < 0.1 and min(y["sufficiency"]) > 0.9
    assert [len(o) for o in proto_lm.orders(clf, texts, "attention")[0]] == [10] * 9
    V = 257
    mixed = [np.insert(q, 0, 65) if n % 2 else np.append(q[q != 65], 66) for n, q in enumerate(sequences * 6)]
    train, test = (proto_lm.Texts(model, part, torch.zeros(len(part), dtype=torch.long), 16) for part in (mixed[:36], mixed[36:]))
    seen = proto_lm.simulatability(clf, train, test, V, 0)
    assert seen["words"] == 1 and seen["random words"] < 1


def test_proto_lm_in_its_smallest_form(made, tmp_path, capsys):
    rng, words = np.random.default_rng(0), dict(a="the cat sat", b="a dog ran")
    for name, n in (("train", 40), ("test", 20)):
        rows = [dict(text=" ".join(rng.permutation((words["ab"[j % 2]] + " on <b>").split())), label="ab"[j % 2]) for j in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [f"--out_dir={made}", f"--train={tmp_path}/train.jsonl", f"--test={tmp_path}/test.jsonl", "--length=16", "--prototypes=4", "--epochs=6", "--tune_epochs=1", "--seeds=2",
               "--learning_rate=0.02", f"--keep={tmp_path}/keep", f"--out={tmp_path}/p.json"]
    proto_lm.main(options)
    result, last = json.loads((tmp_path / "p.json").read_text()), capsys.readouterr().out.splitlines()[-1]
    assert result["classes"] == ["a", "b"] and result["texts"] == [40, 20] and result["chance"] == 0.5 and (tmp_path / "p.png").exists()
    assert min(result["accuracy"]["prototypes, frozen"] + result["accuracy"]["prototypes, unfrozen"]) > 0.8 and len(result["accuracy"]) == 5 and last.startswith("prototypes ") and "2 seeds, 2 classes; " in last
    first = result["faithful"]["prototypes, share"][0]
    assert len(first["comprehensiveness"]) == len(first["sufficiency"]) == 4 and result["sweep"]["K"].keys() == {"1", "2", "4"}
    assert result["simulatability"].keys() == {f"{a}, {b}words" for a in ("prototypes", "plain") for b in ("", "random ")} and len(result["simulatability"]["plain, words"]) == 2
    proto_lm.main([f"--keep={tmp_path}/keep", "--explain=the <script> cat sat"])
    told, text = capsys.readouterr().out, (tmp_path / "keep/page.html").read_text()
    assert "read as 'a'" in told and "<script" not in text and "&lt;" in text and "Read as a" in text
    for wrong, message in (("--prototypes=3", "prototypes is 3"), ("--own=far", "nearest or farthest"), ("--near=9", "near 9"), ("--test=", "both --train and --test"), (f"--test={tmp_path}/none", "cannot be read"),
                           ("--train= ", "cannot be read")):
        with pytest.raises(proto_lm.UserError, match=message):
            proto_lm.main([*options, wrong])
    for weights in (torch.zeros(3), {"model": torch.zeros(3)}):
        torch.save(weights, tmp_path / "other.pt")
        (tmp_path / "foreign").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "other.pt", tmp_path / "foreign/classifier.pt")
        with pytest.raises(proto_lm.UserError, match="no classifier of proto_lm.py"):
            proto_lm.main([f"--keep={tmp_path}/foreign", "--explain=x"])
    kept = proto_lm.load_tensors(tmp_path / "keep/classifier.pt")
    torch.save(kept | dict(model="0"), tmp_path / "foreign/classifier.pt")
    with pytest.raises(proto_lm.UserError, match="other weights"):
        proto_lm.main([f"--keep={tmp_path}/foreign", "--explain=x"])
    with pytest.raises(proto_lm.UserError, match="the text is empty"):
        proto_lm.main([f"--keep={tmp_path}/keep", "--explain= "])
    odd = ['{"text": "a\u2028b", "label": 1}', "", '{"text": "c", "label": "d"}']
    (tmp_path / "odd.jsonl").write_text("\ufeff" + "\n".join(odd), "utf-8")
    assert proto_lm.labelled(tmp_path / "odd.jsonl") == [dict(text="a\u2028b", label="1"), dict(text="c", label="d")]
    for bad in ('{"text": "x", "label": null}', '{"text": "x", "label": [1]}', '{"text": "x", "label": "\\ud800"}', "[" * 100000, "5"):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(proto_lm.UserError, match="bad.jsonl:1: found"):
            proto_lm.labelled(tmp_path / "bad.jsonl")
    for wrong, message in (("--lambda1=nan", "must be finite"), ("--learning_rate=-1", "above 0")):
        with pytest.raises(proto_lm.UserError, match=message):
            proto_lm.main([*options, wrong])
    (tmp_path / "bad.jsonl").write_text("")
    with pytest.raises(proto_lm.UserError, match="holds no text"):
        proto_lm.main([*options, f"--test={tmp_path}/bad.jsonl"])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(proto_lm.UserError, match="bad.jsonl:1: found"):
        proto_lm.main([*options, f"--train={tmp_path}/bad.jsonl"])
    (tmp_path / "other.jsonl").write_text('{"text": "x", "label": "c"}\n')
    with pytest.raises(proto_lm.UserError, match="the class 'c' is not in"):
        proto_lm.main([*options, f"--test={tmp_path}/other.jsonl"])
    with pytest.raises(proto_lm.UserError, match="one class alone, c"):
        proto_lm.main([*options, f"--train={tmp_path}/other.jsonl"])
    with pytest.raises(proto_lm.UserError, match="sources have 20 passages"):
        proto_lm.main([f"--out_dir={made}"])
    with pytest.raises(proto_lm.UserError, match="run python experiments/proto_lm.py first"):
        proto_lm.main([f"--keep={tmp_path}/nothing", "--explain=x"])


def test_passages_of_sources_come_from_their_own_split(made, tmp_path):
    data = Path(shutil.copytree(json.loads((made / "config.json").read_text())["dataset"], tmp_path / "data"))
    rows = [x for x in json.loads((data / "docs.json").read_text()) if x["split"] == "train"]
    rows += [dict(split="val", source=f"source <{n}>", title="held out", start=100 * n, length=100) for n in range(2)]
    (data / "docs.json").write_text(json.dumps(rows))
    a, ya, b, yb, names = proto_lm.passages(data, proto_lm.ProtoConfig(length=10), np.random.default_rng(0))
    train, val = (bytes(np.fromfile(data / f"{n}.bin", np.uint16).astype(np.uint8)) for n in ("train", "val"))
    assert names == ["source <0>", "source <1>"] and len(a) == len(ya) > len(b) == len(yb) == 18
    owner = {train[at:at + 10]: set() for x in rows if x["split"] == "train" for at in range(x["start"], x["start"] + x["length"] - 10, 10)}
    for x in rows:
        for at in range(x["start"], x["start"] + x["length"] - 10, 10) if x["split"] == "train" else ():
            owner[train[at:at + 10]].add(x["source"])
    assert all(names[y] in owner[bytes(s.astype(np.uint8))] for s, y in zip(a, ya))
    assert all(bytes(s.astype(np.uint8)) in val[100 * y:100 * y + 100] for s, y in zip(b, yb))


@pytest.mark.parametrize("task,lines,want", [
    ("sst2", "sentence\tlabel\nit \"works\t1\n", [dict(text='it "works', label="1")]),
    ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", [dict(text="a\nb", label="entailment")]),
    ("qnli", "index\tquestion\tsentence\tlabel\n0\tq?\ts\tnot_entailment\n", [dict(text="q?\ns", label="not_entailment")]),
    ("mnli", "sentence1\tsentence2\tgold_label\na\tb\tneutral\na\tb\t-\n", [dict(text="a\nb", label="neutral")]),
    ("wnli", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n", [dict(text="a\nb", label="0")]),
    ("sst5", "(3 (2 It) (4 (3 really) (4 works)))\n", [dict(text="It really works", label="3")])])
def test_released_files_are_converted(tmp_path, task, lines, want):
    (tmp_path / "f").write_text(lines)
    proto_lm.main([f"--convert={task}", f"--files={tmp_path}/f", f"--to={tmp_path}/o.jsonl"])
    assert proto_lm.labelled(tmp_path / "o.jsonl") == want
    for wrong in (b"nothing\nof it\n", b"\xff\n"):
        (tmp_path / "f").write_bytes(wrong)
        with pytest.raises(proto_lm.UserError, match="expected"):
            proto_lm.converted(task, tmp_path / "f")


def test_imdb_is_converted(tmp_path):
    for label in ("pos", "neg"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0_1.txt").write_text(f"{label}<br />b")
    assert (proto_lm.converted("imdb", tmp_path)) == [dict(text="pos\nb", label="pos"), dict(text="neg\nb", label="neg")]
    for task, message in (("imdb", "expected the folders"), ("sst9", "convert=sst9")):
        with pytest.raises(proto_lm.UserError, match=message):
            (proto_lm.converted(task, tmp_path / "pos"))
