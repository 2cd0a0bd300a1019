"""The neighbours, logit_rank.py and proto_lm.py: references of their formulas, smallest runs."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/neighbours")]
import logit_rank  # noqa: E402
import proto_lm  # noqa: E402

from common import Run, UserError  # noqa: E402


# ------------------------------------------- logit rank

def test_alpha_and_its_interval_of_a_known_matrix():
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    V = np.linalg.qr(rng.standard_normal((80, 80)))[0][:, :64]
    flat = U * 30 * np.arange(1.0, 65) ** -0.7 @ V.T
    x = logit_rank.spectrum(torch.from_numpy(flat).view(64, 10, 8), 5)
    assert x["values"] == pytest.approx(30 * np.arange(1.0, 65) ** -0.7)
    assert x["alpha"] == pytest.approx(0.7)

    def alpha(M):
        i = np.arange(4, len(M) // 4 + 1)
        values = np.linalg.svd(M, compute_uv=False)
        return -np.polyfit(np.log(i), np.log(values[i - 1]), 1)[0]

    def variance(estimates):
        n = len(estimates)
        return (n - 1) / n * sum((u - np.mean(estimates)) ** 2 for u in estimates)

    histories = [alpha(np.delete(flat, np.arange(g, 64, 8), 0)) for g in range(8)]
    parts = flat.reshape(64, 5, 16)
    passages = [alpha(np.delete(parts, g, 1).reshape(64, -1)) for g in range(5)]
    error = 2.36 * np.sqrt(variance(histories) + variance(passages))
    assert x["interval"] == pytest.approx([x["alpha"] - error, x["alpha"] + error])
    assert x["fewer"] == {32: pytest.approx(alpha(flat[:32]))}


def test_extended_logits_are_those_after_history_and_future():
    model = tiny(torch.float32, block_size=16)
    rng = np.random.default_rng(0)
    histories = torch.from_numpy(rng.integers(11, size=(6, 5)))
    futures = torch.from_numpy(rng.integers(11, size=(2, 3)))
    L = logit_rank.extended(model, histories, futures)
    assert L.shape == (6, 7, 11) and L.mean(-1).abs().max() < 1e-5
    for row, tokens in ((0, histories[2]), (5, torch.cat([histories[2], futures[1, :2]]))):
        logits = model(tokens[None])[0][0, 0]
        assert (L[2, row] - (logits - logits.mean())).abs().max() < 1e-5


def test_lingen_is_the_ridge_regression_of_prompts_it_says():
    model = tiny(torch.float32, block_size=40)
    rng = np.random.default_rng(0)
    basis = torch.from_numpy(rng.integers(11, size=(6, 9)))
    targets = torch.from_numpy(rng.integers(11, size=(2, 9)))
    futures = torch.from_numpy(rng.integers(11, size=(2, 3)))
    found = logit_rank.lingen(model, targets, basis, futures, 3, seed=2)

    X = logit_rank.extended(model, basis, futures).double()
    Y = logit_rank.extended(model, targets, futures).double()
    c = {}
    for method, ridge, n in (("Lingen", 1e-6, 7), ("one-token", 1e-2, 1)):
        x, y = X[:, :n].flatten(1), Y[:, :n].flatten(1)
        G = x @ x.T
        c[method] = y @ x.T @ torch.linalg.inv(G + ridge * G.trace() / 6 * torch.eye(6))
    want = dict.fromkeys((*c, "last 4 tokens"), 0.0)
    generator = torch.Generator().manual_seed(2)
    y = targets[:, :0]
    for _ in range(3):
        true = logit_rank.ask(model, torch.cat([targets, y], 1))[:, 0]
        for t in range(2):
            told = {}
            for method in c:
                rows = [logit_rank.ask(model, torch.cat([b, y[t]])[None])[0, 0] for b in basis]
                told[method] = sum(c[method][t, i].item() * rows[i] for i in range(6))
            short = torch.cat([targets[t, -4:], y[t]])
            told["last 4 tokens"] = logit_rank.ask(model, short[None])[0, 0]
            for method, logits in told.items():
                p, q = true[t].softmax(0), logits.softmax(0)
                want[method] += sum(p * (p / q).log()).item() / 2
        new = torch.multinomial(true.softmax(1), 1, generator=generator)
        y = torch.cat([y, new], 1)
    for method, value in want.items():
        assert found[method][-1] == pytest.approx(value, rel=1e-2)
    assert found["last 16 tokens"][-1] < 1e-6                     # the whole target

    found = logit_rank.lingen(model, basis[1:3], basis, futures, 3, seed=2)
    assert found["Lingen"][-1] < 1e-4 < found["last 4 tokens"][-1]


def test_network_logits_against_plain_loops():
    rng = np.random.default_rng(0)
    A = [rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 5, 2))]
    B = [rng.standard_normal((3, r)) for r in (4, 2, 5)]
    z = torch.tensor([[0, 2], [1, 1]])
    found = logit_rank.network_logits([*map(torch.tensor, A)], [*map(torch.tensor, B)], z)
    for n in range(2):
        x = np.array([1.0, 0, 0, 0])
        for t in range(3):
            assert found[n, t].numpy() == pytest.approx(B[t] @ x)
            if t < 2:
                x = A[t][z[n, t]] @ x


@pytest.mark.parametrize("states,V,N", [(1, 2, 4), (5, 3, 7), (12, 3, 7)])
def test_networks_are_recovered_from_their_logits(states, V, N):
    answer = logit_rank.random_answer(V, N, states, seed=0)
    asked = set()

    def counted(histories):
        asked.update(map(tuple, histories.tolist()))
        return answer(histories)

    A, B, queries = logit_rank.learn(counted, V, N, states, torch.Generator().manual_seed(0))
    assert queries == len(asked) and max(len(c[0]) for c in A) <= states
    row = logit_rank.recover(answer, V, N, states, seed=0)
    assert row["error"] < 1e-9 and row["kl"] < 1e-9 and row["rank"] == states


def test_too_few_states_are_not_exact():
    row = logit_rank.recover(logit_rank.random_answer(3, 6, 6, seed=0), 3, 6, 3, seed=0)
    assert row["error"] > 0.1 and row["kl"] > 0.01


def test_logit_rank_in_its_smallest_form(made, tmp_path, monkeypatch):
    monkeypatch.setattr(logit_rank, "trained", lambda out_dir, *options: out_dir)
    words = [f"--out_dir={made}", f"--dense={made}", "--histories=32", "--length=4", "--futures=2",
             "--targets=2", "--basis=4", "--steps=3", "--states=2,3", f"--out={tmp_path}/l.json"]
    logit_rank.main(words)
    result = json.loads((tmp_path / "l.json").read_text())
    spectrum = result["spectrum"]
    assert spectrum["PRISM"]["values"] == spectrum["dense"]["values"] and "untrained" in spectrum
    assert result["lingen"]["same text"].keys() >= {"Lingen", "one-token", "last 4 tokens"}
    names = [row["name"] for row in result["synthetic"]]
    assert names == ["rank 2, 12 tokens", "rank 3, 12 tokens"]
    assert max(row["error"] for row in result["synthetic"]) < 1e-6
    assert [row["rank"] for row in result["real"]] == [2, 3] and (tmp_path / "l.png").exists()
    with pytest.raises(UserError, match="at least 32"):
        logit_rank.main([*words, "--histories=31"])


# ------------------------------------------- prototype classification

def a_classifier(per_class=2):
    torch.manual_seed(0)
    clf = proto_lm.Classifier(5, 3, per_class).double()
    for p in clf.parameters():
        torch.nn.init.normal_(p)
    return clf, torch.randn(4, 7, 5, dtype=torch.double)


def test_prototype_classifier_against_plain_loops():
    clf, h = a_classifier()
    u, alpha = clf.pool(h)
    logits, s = clf.logits(u), clf.similarity(u)
    shares, classes = clf.shares(h)
    for b in range(4):
        score = torch.stack([clf.v(torch.tanh(clf.A(h[b, t])))[0] for t in range(7)])
        a = score.exp() / score.exp().sum()
        pooled = sum(a[t] * clf.V(h[b, t]) for t in range(7))
        want = [torch.dot(pooled, p) / pooled.norm() / p.norm() for p in clf.prototypes]
        assert (s[b] - torch.stack(want)).abs().max() < 1e-12
        assert (alpha[b] - a).abs().max() < 1e-12
        for c in range(3):
            logit = clf.scale * sum(clf.last[c, k] * want[k] for k in range(6))
            assert (logits[b, c] - logit).abs() < 1e-9
        assert classes[b] == logits[b].argmax()
        above = logits[b].max() - logits[b].mean()
        assert shares[b].sum().item() == pytest.approx(above.item())      # shares add up

    y, loss = torch.tensor([0, 2, 1, 2]), 0.0
    for b in range(4):
        own = max(s[b, k].item() for k in range(6) if k % 3 == y[b])
        other = max(s[b, k].item() for k in range(6) if k % 3 != y[b])
        loss += (-logits[b].log_softmax(0)[y[b]].item() + 0.3 * (1 - own) + 0.2 * other) / 4
    cfg = proto_lm.ProtoConfig(lambda1=0.3, lambda2=0.2)
    assert proto_lm.loss_of(clf, h, y, cfg).item() == pytest.approx(loss)


def test_shares_of_the_linear_layer_add_up_without_its_bias():
    clf, h = a_classifier(per_class=0)
    shares, c = clf.shares(h)
    logits = clf.logits(clf.pool(h)[0]) - clf.linear.bias
    above = logits.gather(1, c[:, None])[:, 0] - logits.mean(1)
    assert (shares.sum(1) - above).abs().max() < 1e-12


def test_projection_puts_prototypes_on_passages_of_their_class():
    clf, h = a_classifier()
    u = torch.randn(9, 5, dtype=torch.double)
    y = torch.arange(9) % 3
    proto_lm.project(clf, u, y)
    assert (clf.prototypes == u[clf.example]).all() and len(clf.example.unique()) == 6
    assert (y[clf.example] == clf.owner).all()


def test_explanations_of_a_model_that_sees_one_token(made):
    """Class 1 where token 65 is: it ranks first; without it the answer goes, with it it stays."""
    run = Run(made, "cpu")
    run.model.hidden = lambda idx: torch.stack([(idx == 65).float(), torch.ones(idx.shape)], -1)
    clf = proto_lm.Classifier(2, 2)
    with torch.no_grad():
        clf.v.weight.zero_()
        clf.linear.weight.copy_(torch.tensor([[0.0, 0.0], [90.0, 0.0]]))
        clf.linear.bias.copy_(torch.tensor([3.0, 0.0]))
    rng = np.random.default_rng(0)
    rows = [np.insert(rng.integers(66, 90, 9), n, 65) for n in range(9)]
    idx = torch.from_numpy(np.stack(rows))
    shares, c = clf.shares(run.model.hidden(idx))
    order = shares.argsort(1, descending=True)
    assert order[:, 0].tolist() == list(range(9)) and c.tolist() == [1] * 9
    x = proto_lm.faithful(run.model, clf, idx, order)
    assert min(x["comprehensiveness"]) > 0.9 and max(map(abs, x["sufficiency"])) < 0.1
    x = proto_lm.faithful(run.model, clf, idx, order.flip(1))
    assert max(map(abs, x["comprehensiveness"])) < 0.1 and min(x["sufficiency"]) > 0.9


def test_proto_lm_in_its_smallest_form(made, tmp_path, monkeypatch):
    real = proto_lm.load_documents

    def two_held_out(folder, split, n_tokens):
        if split == "train":
            return real(folder, split, n_tokens)
        return np.array([0, n_tokens // 2]), ["", ""], ["source <0>", "source <1>"]

    words = [f"--out_dir={made}", "--length=10", "--most=30", "--per_class=2", "--epochs=2",
             "--seeds=2", f"--out={tmp_path}/p.json"]
    with pytest.raises(UserError, match="sources with 20 training and 5 test passages"):
        proto_lm.main(words)
    monkeypatch.setattr(proto_lm, "load_documents", two_held_out)
    run = Run(made, "cpu")
    idx, y, test_idx, test_y, names = proto_lm.load_passages(run, 10, 30)
    assert idx.shape == (60, 10) and len(test_y) == 20 and names == ["source <0>", "source <1>"]
    for tokens, c in zip(idx, y):
        at = bytes(run.train.astype(np.uint8)).find(bytes(tokens.to(torch.uint8).numpy()))
        assert at >= 0
    half = bytes(run.val[:len(run.val) // 2].astype(np.uint8))
    assert all(bytes(t.to(torch.uint8).numpy()) in half for t in test_idx[test_y == 0])

    proto_lm.main(words)
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["texts"] == [60, 20] and (tmp_path / "p.png").exists()
    assert result["accuracy"].keys() == {"linear on attention, frozen", "prototypes, frozen"}
    kinds = {f"{a}, {b}" for a in ("prototypes", "plain") for b in ("share", "attention", "random")}
    assert result["faithful"].keys() == kinds
    first = result["faithful"]["prototypes, share"][0]
    assert len(first["comprehensiveness"]) == len(first["sufficiency"]) == 4
    assert len(result["faithful"]["plain, random"]) == 2
    told = result["explanations"][0]
    text = run.decode(run.train)
    assert told["read_as"] in names and len(told["tokens"]) == 5
    assert all(because["text"] in text for because in told["because"])
