"""The two neighbours, experiments/logit_rank.py and proto_lm.py, in their smallest form."""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import logit_rank  # noqa: E402


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
    rng = np.random.default_rng(rank)
    true = logit_rank.random_network(V, N, rank, rng)
    row = logit_rank.recovered("it", true, V, N, rank, logit_rank.RankConfig(), rng)
    assert row["error"] < 1e-6 and row["states"] <= rank and row["queries"] <= sum(V ** t for t in range(N))


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
    x = logit_rank.spectrum(X, (1, 31))
    values = np.linalg.svd(X.flatten(1).numpy(), compute_uv=False)
    assert x["values"] == pytest.approx(values, rel=1e-3) and x["interval"][0] < x["alpha"] < x["interval"][1] and x["alpha"] == pytest.approx(0.7, abs=1e-3)
    assert x["kl"][1] > 100 * x["kl"][31]


def test_lingen_finds_a_target_among_its_basis():
    model = tiny(torch.float32, block_size=16)
    ask, rng = logit_rank.Ask(model, 9), np.random.default_rng(0)
    basis, cfg = torch.from_numpy(rng.integers(9, size=(6, 5))), logit_rank.RankConfig(steps=4, short=1, ridge=1e-9)
    futures = torch.from_numpy(rng.integers(9, size=(2, 3)))
    l = ask(basis, 2)
    assert ask.count == 12 and l.mean(-1).abs().max() < 1e-5 and (l[:, 1] - (model(basis)[0][:, 0, :9] - model(basis)[0][:, 0, :9].mean(-1, keepdim=True))).abs().max() < 1e-5
    X = logit_rank.extended(ask, basis, futures)
    whole = torch.cat([basis[2], futures[1, :2]])[None]
    assert X.shape == (6, 6, 9) and (X[2, 4] - ask(whole)[0, 0]).abs().max() < 1e-5             # after two tokens of the second future
    sums = logit_rank.lingen(ask, basis[1:3], basis, futures, cfg)
    assert sums["Lingen"][-1] < 1e-4 < sums["short context"][-1] and sums.keys() == {"Lingen", "one-token", "short context"}
    p, q = torch.randn(2, 3, 5)
    assert logit_rank.kl(p, q)[1].item() == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p[1].softmax(0).tolist(), q[1].softmax(0).tolist())), abs=1e-5)


def test_logit_rank_in_its_smallest_form(made, tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy")
    words = [f"--out_dir={made}", f"--dense={made}", "--histories=16", "--length=4", "--futures=2", "--future=2", "--targets=2", "--basis=4", "--steps=3", "--short=2",
             "--ranks=2", "--alphabet=2", "--horizon=4", "--learned=1,8", f"--out={tmp_path}/l.json"]
    monkeypatch.setattr(logit_rank, "trained", lambda out, *options: out)
    logit_rank.main(words)
    result = json.loads((tmp_path / "l.json").read_text())
    assert result["spectrum"].keys() == {"PRISM", "dense", "untrained"} and (tmp_path / "l.png").exists()
    assert result["spectrum"]["PRISM"]["values"] == result["spectrum"]["dense"]["values"] and result["spectrum"]["PRISM"]["queries"] == 16 * 2 * 2
    best = result["real"][-1]                                                                      # 2 tokens, horizon 4: 8 states at most
    assert best["kl"] == pytest.approx(0, abs=1e-3) and best["variation"] < 1e-2 and best["queries"] <= 15
    assert capsys.readouterr().out.splitlines()[-1].startswith("alpha ")
    for wrong, message in (("--parts=x", "parts='x'"), ("--ranks=a", "ranks=a"), ("--length=15", "do not fit the context of 16"), ("--histories=99", "lower --histories"), ("--histories=3", "at least 16")):
        with pytest.raises(logit_rank.UserError, match=message):
            logit_rank.main([*words, wrong])
