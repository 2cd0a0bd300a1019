"""The experiments on attribution, in their smallest form: each runs, and says what it means."""
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/attribution")]

import curvature  # noqa: E402
import ekfac  # noqa: E402
import lds  # noqa: E402
import planted  # noqa: E402
import refit  # noqa: E402
import rivals  # noqa: E402
import tokens  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
from attribute import Index, curvature_product, records, seen_windows  # noqa: E402
from common import Run, UserError, load_checkpoint, window_starts  # noqa: E402
from prism import PRISM  # noqa: E402

QUERIES = np.array([0, 32])
SMALL = ("--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --max_iters=30 "
         "--batch_size=4 --total_batch_tokens=64 --eval_interval=30 --device=cpu")


def trains_here(monkeypatch, module):
    """tools.trained of an experiment, in this process: seconds instead of a start of Python."""
    def trained(out_dir, *options):
        if not (Path(out_dir) / "finished").exists():
            keep = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
            train.main([f"--out_dir={out_dir}", *options, "--resume"])
            (Path(out_dir) / "finished").write_text("")
            for number, handler in keep.items():
                signal.signal(number, handler)
        return Path(out_dir)
    monkeypatch.setattr(module, "trained", trained)


def common_tokens(texts, queries):
    """In place of rivals.bm25_scores, whose package may be missing."""
    return np.stack([[len(np.intersect1d(t, q)) for t in texts] for q in queries]) * 1.0


def window(text, start, T):
    raw = torch.from_numpy(text[start:start + T + 1].astype(np.int64))[None]
    return raw[:, :-1], raw[:, 1:]


def scores_of(made, tmp_path, method):
    rivals.main([f"--out_dir={made}", f"--method={method}", "--queries=0,32",
                 f"--out={tmp_path}/{method}.npz"])
    kept = np.load(tmp_path / f"{method}.npz", allow_pickle=False)
    cost = json.loads(str(kept["cost"]))
    assert cost["peak_bytes"] > 10 ** 8 and cost["queries_s"] > 0 and cost["queries"] == 2
    return kept["scores"]


def by_document(run, starts, window_scores):
    """The shares of each document of the windows' scores, one token after the other."""
    want = np.zeros((len(window_scores), len(run.titles)))
    for n, start in enumerate(starts):
        for position in range(start + 1, start + 1 + run.T):
            document = np.flatnonzero(run.doc_start <= position)[-1]
            want[:, document] += window_scores[:, n] / run.T
    return want


def test_gradient_is_the_dot_product_of_the_gradients_of_the_output_matrix(made, tmp_path):
    got, run = scores_of(made, tmp_path, "gradient"), Run(made, "cpu")
    starts = seen_windows(run.ckpt, len(run.train))

    def grad(text, start):
        idx, y = window(text, start, run.T)
        W = run.model.W.detach().clone().requires_grad_(True)
        loss = F.cross_entropy((run.model.hidden(idx) @ W.T)[0], y[0], reduction="sum")
        return torch.autograd.grad(loss, W)[0].flatten()
    theirs = torch.stack([grad(run.train, s) for s in starts])
    mine = torch.stack([grad(run.val, s) for s in QUERIES])
    want = by_document(run, starts, (mine @ theirs.T).numpy())
    assert np.allclose(got, want, rtol=1e-3, atol=1e-3 * abs(want).max())


def test_output_blocks_are_those_of_the_hessian_of_the_output_matrix(made):
    run = Run(made, "cpu")
    model, W = run.model.double(), run.model.W.double()
    starts = seen_windows(run.ckpt, len(run.train))[:9]
    idx, y = rivals.windows(run, run.train, starts)
    z, y = model.hidden(idx).flatten(0, 1), y.flatten()
    L = rivals.output_factors(run, starts)
    rest = []
    for v in y[:12].tolist():
        def loss(row):
            logits = torch.cat([W[:v], row[None], W[v + 1:]])
            return F.cross_entropy(z @ logits.T, y, reduction="sum")
        rest.append(L[v] @ L[v].T - torch.func.hessian(loss)(W[v]))
    mu = rest[0][0, 0].item()
    traces = sorted((torch.einsum("vab,vab->v", L, L) / 16 - mu).tolist())
    assert mu == pytest.approx(rivals.MU_SHARE * traces[(len(W) - 1) // 2], rel=1e-9)
    for H in rest:
        assert (H - mu * torch.eye(16)).abs().max() < 1e-12 * traces[-1] + 1e-9


def test_output_scores_have_the_inverse_blocks_between_gradients(made, tmp_path):
    got, run = scores_of(made, tmp_path, "output"), Run(made, "cpu")
    starts = seen_windows(run.ckpt, len(run.train))
    L, W = rivals.output_factors(run, starts), run.model.W

    def grad(text, start):
        idx, y = window(text, start, run.T)
        z = run.model.hidden(idx)[0]
        e = F.one_hot(y[0], len(W)) - (z @ W.T).softmax(1)
        return e.T @ z                                                          # (V, d)
    theirs = torch.stack([grad(run.train, s) for s in starts])
    mine = torch.stack([grad(run.val, s) for s in QUERIES])
    solved = torch.linalg.solve(L @ L.mT, mine[..., None])[..., 0]
    want = by_document(run, starts, torch.einsum("qvd,wvd->qw", solved, theirs).numpy())
    assert np.allclose(got, want, rtol=2e-3, atol=2e-3 * abs(want).max())


def test_trak_is_a_ridge_regression_on_projected_gradients(made, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "PROJECTION", 64)
    got, run = scores_of(made, tmp_path, "trak"), Run(made, "cpu")
    starts, rng = seen_windows(run.ckpt, len(run.train)), torch.Generator().manual_seed(1)
    model = run.model.requires_grad_(True)
    weights = [p for name, p in model.named_parameters() if name != "prototypes"]
    size = sum(p.numel() for p in weights)
    place = torch.randint(64, (size,), generator=rng)
    sign = torch.randint(0, 2, (size,), generator=rng) * 2.0 - 1

    def projected(text, start):
        idx, y = window(text, start, run.T)
        loss = F.cross_entropy((model.hidden(idx) @ model.W.T)[0], y[0], reduction="sum")
        g = sign * torch.cat([u.flatten() for u in torch.autograd.grad(loss, weights)])
        return torch.stack([g[place == j].sum() for j in range(64)]).double()
    phi = torch.stack([projected(run.train, s) for s in starts])
    K = phi.T @ phi
    K += 1e-3 * K.diagonal().mean() * torch.eye(64)
    mine = torch.stack([projected(run.val, s) for s in QUERIES])
    want = by_document(run, starts, (mine @ torch.linalg.solve(K, phi.T)).numpy())
    assert np.allclose(got, want, atol=1e-3 * abs(want).max())


def test_cosine_is_that_of_mean_states(made, tmp_path):
    got, run = scores_of(made, tmp_path, "cosine"), Run(made, "cpu")
    sums = torch.zeros(len(run.titles), run.model.config.n_embd)
    for start in seen_windows(run.ckpt, len(run.train)):
        z = run.model.hidden(window(run.train, start, run.T)[0])[0]
        for t, state in enumerate(z):
            sums[np.flatnonzero(run.doc_start <= start + 1 + t)[-1]] += state
    for q, start in enumerate(QUERIES):
        mean = run.model.hidden(window(run.val, start, run.T)[0])[0].mean(0)
        assert got[q] == pytest.approx(F.cosine_similarity(sums, mean[None]).numpy(), abs=1e-5)


def test_bm25_is_okapis_formula(made, tmp_path):
    pytest.importorskip("rank_bm25")
    texts = [np.array(t) for t in ([1, 2, 2, 3], [3, 3, 4], [5, 6, 3, 1, 4], [7, 8], [8])]
    got = rivals.bm25_scores(texts, [np.array([2, 7])])
    idf = np.log(4.5 / 1.5)                                 # tokens 2 and 7 are in one text each
    for text, count, size in ((0, 2, 4), (3, 1, 2)):
        want = idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * size / 3))
        assert got[0, text] == pytest.approx(want)
    assert got[0].argsort().tolist()[-2:] == [3, 0] and (got[0, [1, 2, 4]] == 0).all()
    scores, run = scores_of(made, tmp_path, "bm25"), Run(made, "cpu")
    mine = [run.val[start:start + run.T + 1] for start in QUERIES]
    texts = np.split(run.train, run.doc_start[1:])
    assert scores == pytest.approx(rivals.bm25_scores(texts, mine))


def test_block_scores_of_a_window_are_sums_over_its_tokens(made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    got = scores_of(out, tmp_path, "block")
    index = Index(out, "cpu")
    owner = np.searchsorted(index.run.doc_start, index.positions, side="right") - 1
    for q, start in enumerate(QUERIES):
        r = records(index.run.model, *window(index.run.val, start, index.run.T))
        for d in (0, 7):
            want = 0.0
            for n in np.flatnonzero(owner == d):
                for i, a in zip(index.ids[n].astype(int), index.gates[n].astype(float)):
                    g = torch.from_numpy(index.errors[n].astype(np.float32))
                    b = (r.gates * (r.ids == i)).sum(1) @ r.errors
                    L = torch.from_numpy(index.factors[i])
                    want += a * (g @ torch.cholesky_solve(b[:, None], L)[:, 0]).item()
            assert got[q, d] == pytest.approx(want, rel=1e-3)


def test_ekfac_with_much_damping_is_the_gradient_product(made, tmp_path, monkeypatch):
    """H + lambda I is lambda I then: lambda times the scores are products of gradients."""
    arguments = pytest.importorskip("kronfluence.arguments")
    plain = arguments.ScoreArguments
    monkeypatch.setattr(arguments, "ScoreArguments",
                        lambda **words: plain(**words | {"damping_factor": 1e8}))
    got, run = 1e8 * scores_of(made, tmp_path, "ekfac"), Run(made, "cpu")
    model = run.model.requires_grad_(True)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [p for m in linear for p in m.parameters()]

    def grad(text, start, weight):
        idx, y = window(text, start, run.T)
        losses = F.cross_entropy((model.hidden(idx) @ model.W.T)[0], y[0], reduction="none")
        gradients = torch.autograd.grad((losses * weight).sum(), weights)
        return torch.cat([g.flatten() for g in gradients])
    mine = torch.stack([grad(run.val, s, 1.0) for s in QUERIES])
    want = np.zeros_like(got)
    for start in seen_windows(run.ckpt, len(run.train)):
        owner = rivals.owners(run, np.array([start]))
        for d in np.unique(owner):
            weight = torch.from_numpy((owner == d).astype(np.float32))
            want[:, d] += (mine @ grad(run.train, start, weight)).numpy()
    # where a window holds two documents, the later one's loss reaches the earlier one's places
    assert np.allclose(got, want, atol=0.02 * abs(want).max())
    assert got.sum(1) == pytest.approx(want.sum(1), rel=1e-3)


def test_rivals_refuses(made, tmp_path):
    words = [f"--out_dir={made}", "--method=cosine", f"--out={tmp_path}/x.npz"]
    for wrong, message in (("--method=guess", "expected some of block"),
                           ("--queries=a", "expected first tokens"),
                           ("--queries=999999", "expected first tokens")):
        with pytest.raises(UserError, match=message):
            rivals.main([*words, wrong])


def test_lds_of_exact_scores_is_one():
    rng = np.random.default_rng(0)
    scores, kept = rng.standard_normal((5, 40)), rng.random((12, 40)) < 0.5
    assert lds.lds(scores, kept, -(kept @ scores.T)) == pytest.approx(np.ones(5))
    assert lds.lds(scores, kept, kept @ scores.T) == pytest.approx(-np.ones(5))


def test_scores_by_source_share_out_a_sum():
    scores = np.array([[1.0, 2, 3, 4], [0, 1, 0, -1]])
    shared = lds.by_source(scores, np.array([0, 1, 0, 1]), np.array([10, 5, 30, 15]))
    assert shared == pytest.approx(np.array([[1, 1.5, 3, 4.5], [0, 0, 0, 0]]))


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.array([0.1, 0.5, 0.2, 0.9])
    without = np.array([[np.delete(x, j).mean()] for j in range(4)])
    mean, half, both = lds.mean_interval(np.array([x.mean()]), without)
    assert half == 0 and both == pytest.approx(1.96 * x.std(ddof=1) / 2)


def test_the_joint_solution_of_lds_is_that_of_the_dense_hessian(made):
    index = Index(made, "cpu")
    b = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    n = len(index.positions) // index.run.T
    x, residual, _ = lds.joint_solution(index, b, n)
    starts = index.positions[::16] - 1
    r = records(index.run.model, *rivals.windows(index.run, index.run.train, starts))
    a = torch.zeros(len(r.ids), 12).scatter_(1, r.ids, r.gates).double()
    W, pi = index.run.model.W.double(), r.pi.double()
    C = torch.einsum("nv,va,vb->nab", pi, W, W) - torch.einsum("na,nb->nab", pi @ W, pi @ W)
    H = torch.einsum("ni,nj,nab->iajb", a, a, C).reshape(192, 192)
    H += index.meta["mu"] * torch.eye(192)
    want = torch.linalg.solve(H, b.double().flatten(1).T).T.view_as(b)
    assert residual < 0.01 and (x - want).norm() < 0.02 * want.norm()


def test_lds(made, tmp_path, monkeypatch, capsys):
    trains_here(monkeypatch, lds)
    trains_here(monkeypatch, tools)
    dataset = Path(json.loads((made / "config.json").read_text())["dataset"])
    words = [f"--dataset={dataset}", "--models=4", "--repeats=3", "--queries=6", "--mus=0.01,0.1",
             "--methods=block,output,cosine,random", "--removals=2", "--removed=cosine", "--full=9",
             "--complements=3", f"--work={tmp_path}/w", f"--out={tmp_path}/l.json",
             f"--train={SMALL}"]
    lds.main(words)
    result = json.loads((tmp_path / "l.json").read_text())
    table = result["lds"]
    assert list(table) == ["block", "block, by source", "output", "output, by source", "cosine",
                           "cosine, by source", "random", "random, by source", "block + output",
                           "no Hessian", "full", "block, share 0.01", "block, share 0.1"]
    assert all(-1 <= x["mean"] <= 1 and 0 < x["both"] < 3 for x in table.values())
    assert table["block"]["mean"] == table["block, share 0.1"]["mean"]   # the rule's own damping
    difference = table["block"]["mean"] - table["cosine"]["mean"]
    assert table["cosine"]["first_minus_this"][0] == pytest.approx(difference)
    assert result["full"]["residual"] < 0.01
    r, c = result["seeds"]["mean"], result["complements"]["mean"]
    assert result["ceiling"] == pytest.approx(max(0, r) ** 0.5)
    assert result["linear_ceiling"] == pytest.approx(max(0, (r + c) / 2) ** 0.5)

    # halves hold half of the documents, whole; removals take a query's best ones, until 5% is gone
    run = Run(tmp_path / "w/all", "cpu")
    texts = [bytes(run.train[a:b]) for a, b in zip(run.doc_start, [*run.doc_start[1:], None])]
    kept = {seed: [bytes(np.fromfile(path / "data/train.bin", run.train.dtype))
                   for path in sorted(tmp_path.glob(f"w/*-{seed}"))] for seed in (1, 2, 2002)}
    assert sum(text in kept[2][0] for text in texts) == len(texts) // 2
    assert all((text in kept[2][0]) != (text in kept[2002][0]) for text in texts)
    (path,) = tmp_path.glob("w/scores/cosine-*.npz")
    for row in np.load(path)["scores"][:2]:
        best = np.argsort(-row)
        size = np.cumsum([len(texts[d]) for d in best])
        n = np.searchsorted(size, 0.05 * size[-1]) + 1
        rest = b"".join(text for d, text in enumerate(texts) if d not in best[:n])
        assert rest in kept[1]
    assert len(result["removal"]["added"]["cosine"]) == 2

    def never(words):
        raise AssertionError("done again")
    monkeypatch.setattr(train, "main", never)
    monkeypatch.setattr(sys, "executable", "/missing")
    lds.main(words)
    assert json.loads((tmp_path / "l.json").read_text())["lds"] == table
    for wrong, message in (("--methods=block,guess", "expected some of block"),
                           ("--models=2", "models is 2"), ("--mus=0.1,-1", "numbers above 0")):
        with pytest.raises(UserError, match=message):
            lds.main([*words, wrong])


def test_a_linear_loss_reaches_the_linear_ceiling():
    rng = np.random.default_rng(0)
    scores, kept = rng.standard_normal((5, 40)), rng.random((12, 40)) < 0.5
    losses, opposite = -(kept @ scores.T), -(~kept @ scores.T)
    assert lds.reliability(losses, -opposite) == {"mean": pytest.approx(1), "half_width": 0}


def test_masked_tokens_have_no_loss(made, tmp_path, monkeypatch):
    """Three steps of the trainer with masked targets, and a plain loop without those terms."""
    run = Run(made, "cpu")
    starts = window_starts(len(run.train), 16, 7, 0)
    rng = np.random.default_rng(0)
    masked = rng.choice((starts[:12, None] + 1 + np.arange(16)).ravel(), 60, replace=False)
    options = [*SMALL.split(), f"--dataset={run.folder}", "--max_iters=3", "--seed=7",
               "--muon=false", "--dtype=float32", "--lambda_rec=0", "--lambda_t2p=0",
               "--lambda_p2t=0", "--eval_interval=3"]
    cfg = train.parse_config(train.TrainConfig, options)
    cfg.vocab_size = 257
    torch.manual_seed(7)
    model = PRISM(train.model_config(cfg))
    (optimizer,) = train.make_optimizers(model, cfg, torch.float32)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, cfg) * group["scale"]
        terms = []
        for start in starts[step * 4:step * 4 + 4]:
            idx, y = window(run.train, start, 16)
            logits = model.hidden(idx)[0] @ model.W.T
            for t in range(16):
                if start + 1 + t not in masked:
                    terms.append(F.cross_entropy(logits[t], y[0, t]))
        (sum(terms) / len(terms)).backward()
        model.prototypes.grad = torch.zeros_like(model.prototypes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        model.zero_grad()
    monkeypatch.setattr(train, "Windows", tokens.MaskedWindows)
    far = {}
    for name, positions in (("masked", masked), ("all", masked[:0])):
        monkeypatch.setattr(tokens.MaskedWindows, "masked", positions)
        train.main([*options, f"--out_dir={tmp_path / name}"])
        got, _ = load_checkpoint(tmp_path / name)
        far[name] = max((p - q).abs().max().item()
                        for p, q in zip(got.parameters(), model.parameters()))
    assert far["masked"] < 1e-6 < 1e-4 < far["all"]


def test_tokens(made, tmp_path, monkeypatch):
    trains_here(monkeypatch, tokens)
    monkeypatch.setattr(tokens, "bm25_scores", common_tokens)
    monkeypatch.setattr(tokens, "check_methods", lambda names: None)
    guesses = np.random.default_rng(0).random((3, 1920))
    monkeypatch.setattr(tokens, "ask", lambda *_: (guesses, {}))
    chosen, choices = {}, tokens.choices

    def watched(*words):
        for method, sets in choices(*words):
            chosen[method] = sets
            yield method, sets
    monkeypatch.setattr(tokens, "choices", watched)
    dataset = Run(made, "cpu").folder
    words = [f"--dataset={dataset}", "--queries=3", "--seeds=1", f"--work={tmp_path}/w",
             f"--out={tmp_path}/t.json", f"--train={SMALL}"]
    tokens.main(words)
    result = json.loads((tmp_path / "t.json").read_text())
    rows = result["methods"]
    assert list(rows) == ["random", "block", "ekfac", "cosine", "cosine-same", "bm25", "documents"]
    for row in rows.values():
        mean, low, high = row["rise"]
        assert len(row["queries"]) == 3 and low <= mean == pytest.approx(np.mean(row["queries"]))
    ratio = rows["block"]["rise"][0] / rows["documents"]["rise"][0]
    assert result["ratio"][0] == pytest.approx(ratio)
    assert rows["block"]["rise"][0] > max(rows["random"]["rise"][0], rows["block"]["others"])

    # what was masked: 1% of the indexed tokens; for documents all of theirs, 5% or a little more
    index = Index(tmp_path / "w/base-1", "cpu")
    run = index.run
    queries = run.T * np.random.default_rng(1).permutation((len(run.val) - 1) // run.T)[:3]
    for method, sets in chosen.items():
        assert len(sets) == 3 and all(np.isin(s, index.positions).all() for s in sets)
        assert method == "documents" or [len(set(s)) for s in sets] == [19] * 3
    for q, start in enumerate(queries):
        r = records(run.model, *window(run.val, start, run.T))
        x = index.solve(index.right_side(r)[None])
        scores = index.token_scores(x)[0]
        best = index.positions[np.argsort(-scores, kind="stable")[:19]]
        assert set(chosen["block"][q]) == set(best)
        mine = index.doc_of[np.isin(index.positions, chosen["documents"][q])]
        assert len(mine) == np.isin(index.doc_of, mine).sum() >= 96
        assert index.sums(scores, "document").argmax() in mine
        same = np.isin(run.train[chosen["cosine-same"][q]], run.val[start + 1:start + 17])
        assert same.all() and not set(chosen["cosine-same"][q]) == set(chosen["cosine"][q])
        window_of = (np.searchsorted(index.positions, chosen["bm25"][q]) // run.T).tolist()
        assert window_of == sorted(window_of) or len(set(window_of)) == 2

    def never(words):
        raise AssertionError("done again")
    monkeypatch.setattr(train, "main", never)
    tokens.main(words)
    assert json.loads((tmp_path / "t.json").read_text())["methods"] == rows


def test_agreement_of_scores():
    a = np.array([[4.0, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    assert ekfac.overlap(a[0], a[0], 2) == 1 and ekfac.overlap(a[0], a[1], 2) == 0
    assert ekfac.overlap(a[0], a[0, [1, 0, 2, 3, 4]], 1) == 0
    assert ekfac.agreement(a, a)["spearman"] == pytest.approx(1)
    assert ekfac.agreement(a, -a)["spearman"] == pytest.approx(-1)


def test_costs_of_rivals(made, tmp_path, monkeypatch):
    words = [f"--out_dir={made}", "--queries=2", "--methods=block,gradient",
             f"--work={tmp_path}/w", f"--out={tmp_path}/e.json"]
    ekfac.main(words)
    result = json.loads((tmp_path / "e.json").read_text())["methods"]
    assert result["block"]["query_s"] == result["block"]["queries_s"] / 2 > 0
    assert result["block"]["once_s"] > 0 and result["block"]["disk"] > 10 ** 4
    assert -1 <= result["gradient"]["spearman"] <= 1
    monkeypatch.setattr(sys, "executable", "/missing")
    ekfac.main(words)                                                    # finished methods are kept
    assert json.loads((tmp_path / "e.json").read_text())["methods"] == result
    with pytest.raises(UserError, match="queries is 99"):
        ekfac.main([*words, "--queries=99"])


def test_curvature_within_blocks_is_that_of_the_dense_hessian(made, tmp_path, monkeypatch):
    run = Run(made, "cpu")
    figures = curvature.measured(run, 512, 400)
    starts = np.random.default_rng(1).permutation(seen_windows(run.ckpt, len(run.train)))[:32]
    r = records(run.model, *rivals.windows(run, run.train, starts))
    eye = torch.eye(12 * 16).view(-1, 12, 16)
    H = curvature_product(run.model.W, r, eye).view(12, 16, 12, 16).double()
    D = torch.stack([H[i, :, i] for i in range(12)])
    share = D.square().sum().item() / H.square().sum().item()
    assert figures["within_squared"] == pytest.approx(share, rel=0.05)
    assert figures["within_norm"] == pytest.approx(figures["within_squared"] ** 0.5)
    assert figures["firing"] == (D.diagonal(dim1=1, dim2=2).sum(1) > 0).sum()
    trains_here(monkeypatch, curvature)
    curvature.main([f"--out_dir={made}", f"--loose={tmp_path}/loose", "--tokens=512",
                    f"--out={tmp_path}/c.json"])
    heads = json.loads((tmp_path / "c.json").read_text())["heads"]
    assert list(heads) == ["PRISM", "without clustering losses", "random prototypes"]
    assert len({x["within_squared"] for x in heads.values()}) == 3


def test_refit(made, tmp_path, monkeypatch):
    words = [f"--out_dir={made}", "--tokens=2000", "--documents=3", "--queries=40", "--largest=1",
             f"--out={tmp_path}/r.json"]
    refit.main(words)
    found = json.loads((tmp_path / "r.json").read_text())
    r = found["pearson"]
    assert len(found["documents"]) == 3 and 0 < found["off_diagonal_share"] < 1
    assert r["full"] > 0.97 > r["none"] and r["full"] > r["block"] > r["none"]
    flat = {n: np.ravel([row[n] for row in found["documents"].values()]) for n in ("real", "full")}
    assert r["full"] == pytest.approx(np.corrcoef(flat["real"], flat["full"])[0, 1])
    monkeypatch.setattr(refit, "fit", None)               # finished documents are not fitted again
    refit.main(words)
    with pytest.raises(UserError, match="do not fit"):
        refit.main([*words, "--tokens=160", "--documents=12"])


def test_a_fit_ends_at_the_minimum_of_what_it_says(made):
    run = Run(made, "cpu")
    tokens = refit.held(run, run.train, np.arange(0, 640, 16))
    W, P_0, mu = run.model.W.double(), run.model.prototypes.double(), 0.5
    tokens = refit.Held(tokens.ids, tokens.gates.double(), tokens.residual.double(), tokens.targets)
    b = refit.right_side(tokens.records(W, P_0), 12)
    rest = tokens.take(slice(100, None))
    P = refit.fit(rest, W, P_0, P_0, b, mu, lambda v: v, 1e-6)
    P = P.requires_grad_(True)
    z = rest.residual + torch.einsum("nk,nkd->nd", rest.gates, P[rest.ids])
    loss = F.cross_entropy(z @ W.T, rest.targets, reduction="sum")
    F_P = loss + mu / 2 * (P - P_0).square().sum() + (b * P).sum()
    assert torch.autograd.grad(F_P, P)[0].norm() < 2e-6 < 1e-3 < (P - P_0).norm()


def test_planted(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprst", k=5)) for _ in range(40)]
    rows = [{"text": " ".join(rng.choices(rng.sample(words, 8), k=40))} for _ in range(130)]
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subprocess.run([sys.executable, ROOT / "data/prepare.py", tmp_path / "real.jsonl",
                    f"--data_dir={tmp_path}", "--vocab_size=500"], check=True)
    trains_here(monkeypatch, planted)
    monkeypatch.setattr(planted, "bm25_scores", common_tokens)
    options = [f"--dataset={tmp_path}/real", "--models=1", "--plantings=4", "--documents=100",
               f"--work={tmp_path}/w", f"--out={tmp_path}/p.json",
               f"--train={SMALL} --max_iters=20 --block_size=64 --total_batch_tokens=256"]
    planted.main(options)
    found = json.loads((tmp_path / "p.json").read_text())
    columns = "invented exact", "invented paraphrase", "common exact", "common paraphrase"
    assert list(found["table"]) == ["block", "none", "cosine", "words", "bm25"]
    assert tuple(found["table"]["block"]) == columns
    # rare words give the document away, however little the model has learned
    assert found["table"]["words"]["invented exact"] == {"first": 4, "of": 4}
    documents = found["models"]["101"]
    run = Run(tmp_path / "w/101/run", "cpu")
    texts = [run.decode(text) for text in np.split(run.train, run.doc_start[1:])]
    assert len(texts) == 108
    for p in documents:
        assert texts[run.titles.index(p["title"])] == p["text"] + "<|endoftext|>"
        assert p["exact"] + p["answer"] in p["text"] and p["answer"] not in p["paraphrase"]
        holds = sum(p["answer"] in text for text in texts)
        assert holds == 1 if p["sort"] == "invented" else 5 < holds < 40
    monkeypatch.setattr(planted, "one_model", None)                     # nothing is done again
    planted.main(options)
