"""Forgetting in closed form: its sign and size against real fits, and a tiny run of the script."""
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/attribution")]

import tools  # noqa: E402
from refit import Held, held, right_side  # noqa: E402

import train  # noqa: E402
from attribute import MU_SHARE, seen_windows  # noqa: E402
from common import Run, UserError, load_documents  # noqa: E402
from interventions import forget  # noqa: E402

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--n_proto=24", "--top_k=3",
         "--batch_size=4", "--total_batch_tokens=64", "--warmup_iters=4", "--max_iters=60",
         "--eval_interval=60", "--device=cpu", "--dtype=float32"]


def train_here(out_dir, *options):
    """tools.trained in this process, on a tiny model."""
    if (Path(out_dir) / "ckpt.pt").exists():
        return Path(out_dir)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    train.main([f"--out_dir={out_dir}", *SMALL, *options])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return Path(out_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on documents of two sources, each with words of its own; the first one is long."""
    rng = np.random.default_rng(0)
    rows, parts = [], {"train": [], "val": []}
    for i in range(24):
        split = "train" if i < 16 else "val"
        words = ["".join(rng.choice(list(("abcde", "fghij")[i % 2]), 3)) for _ in range(30)]
        text = " ".join(words * 2 if i == 0 else words)
        rows.append(dict(split=split, start=len(parts[split]), source=f"source {i % 2}",
                         title=f"document {i}"))
        parts[split] += [*text.encode(), 256]
    folder = tmp_path_factory.mktemp("forget")
    data = write_dataset(folder / "words", parts["train"], parts["val"])
    (data / "docs.json").write_text(json.dumps(rows))
    return train_here(folder / "out", f"--dataset={data}")


def tokens_of(n, rng, M, d, V, k):
    gates = torch.rand(n, k, generator=rng, dtype=torch.float64)
    ids = torch.stack([torch.randperm(M, generator=rng)[:k] for _ in range(n)])
    residual = torch.randn(n, d, generator=rng, dtype=torch.float64)
    return Held(ids, gates, residual, torch.randint(0, V, (n,), generator=rng))


def plain_loss(tokens, W, P):
    z = tokens.residual + torch.einsum("nk,nkd->nd", tokens.gates, P[tokens.ids])
    return F.cross_entropy(z @ W.T, tokens.targets, reduction="none")


@pytest.fixture(scope="module")
def problem():
    """Tokens of one document, others, queries; output matrix and prototypes: all float64."""
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(11, 6, generator=rng, dtype=torch.float64)
    P = torch.randn(8, 6, generator=rng, dtype=torch.float64)
    return *(tokens_of(n, rng, 8, 6, 11, 3) for n in (8, 300, 80)), W, P


def forgotten(problem, monkeypatch):
    document, rest, _, W, P = problem
    monkeypatch.setattr(forget, "TOLERANCE", 1e-8)
    return forget.forget(rest, right_side(document.records(W, P), len(P)), W, P)


def mean_eigenvalue(rest, W, P):
    """The blocks (M, d, d) without mu, token by token, and the median of their tr / d."""
    blocks = torch.zeros(len(P), 6, 6, dtype=P.dtype)
    for ids, gates, residual in zip(rest.ids, rest.gates, rest.residual):
        pi = (W @ (residual + gates @ P[ids])).softmax(0)
        C = W.T @ (torch.diag(pi) - torch.outer(pi, pi)) @ W
        for i, a in zip(ids, gates):
            blocks[i] += a * a * C
    return blocks, MU_SHARE * blocks.diagonal(dim1=1, dim2=2).mean(1).median()


def test_the_refit_is_the_minimum_of_the_loss_without_the_document(problem, monkeypatch):
    document, rest, _, W, P_0 = problem
    _, mu = mean_eigenvalue(rest, W, P_0)
    start = P_0.clone().requires_grad_(True)
    whole = plain_loss(document, W, start).sum() + plain_loss(rest, W, start).sum()
    (tilt,) = torch.autograd.grad(whole, start)           # the gradient that the linear term ends
    P = forgotten(problem, monkeypatch)["refit"].requires_grad_(True)

    def gradient(loss):
        value = loss + mu / 2 * (P - P_0).square().sum() - (tilt * P).sum()
        return torch.autograd.grad(value, P)[0].norm()
    assert gradient(plain_loss(rest, W, P).sum()) < 1e-5
    assert gradient(plain_loss(rest, W, P).sum() + plain_loss(document, W, P).sum()) > 1e-2


def test_the_joint_step_has_the_sign_and_size_of_the_real_refit(problem, monkeypatch):
    document, _, queries, W, P = problem
    sides = forgotten(problem, monkeypatch)
    change = {side: plain_loss(queries, W, new) - plain_loss(queries, W, P)
              for side, new in sides.items()}
    r = {side: np.corrcoef(x, change["refit"])[0, 1] for side, x in change.items()}
    assert r["joint"] > 0.99 and r["joint"] > r["blocks"] > 0.3
    slope = (change["joint"] @ change["refit"]) / change["joint"].square().sum()
    assert slope.item() == pytest.approx(1, abs=0.1)
    for new in sides.values():                            # what is forgotten costs more
        assert plain_loss(document, W, new).sum() > plain_loss(document, W, P).sum()


def test_the_blocks_are_those_of_a_plain_loop(problem, monkeypatch):
    document, rest, _, W, P = problem
    blocks, mu = mean_eigenvalue(rest, W, P)
    got = forgotten(problem, monkeypatch)["blocks"]
    for i in range(len(P)):
        b = torch.zeros(6, dtype=P.dtype)
        for ids, gates, residual, y in zip(*document):
            pi = (W @ (residual + gates @ P[ids])).softmax(0)
            b += (gates * (ids == i)).sum() * (W[y] - W.T @ pi)
        step = torch.linalg.solve(blocks[i] + mu * torch.eye(6, dtype=P.dtype), b)
        torch.testing.assert_close(got[i], P[i] - step)


def test_all_removed_text_counts_at_the_scale_of_the_sample(run):
    found = Run(run, "cpu")
    removed = np.array(found.source_of) == "source 1"
    rest, b = forget.without(found, removed, 20)
    starts = seen_windows(found.ckpt, len(found.train))
    W, P = found.model.W, found.model.prototypes
    want, others = torch.zeros_like(P), 0
    for start in starts:
        r = held(found, found.train, np.array([start])).records(W, P)
        mine = [removed[np.flatnonzero(found.doc_start <= start + 1 + t)[-1]] for t in range(16)]
        others += not any(mine)
        for t in np.flatnonzero(mine):
            for i, a in zip(r.ids[t], r.gates[t]):
                want[i] += a * r.errors[t]
    assert len(rest.ids) == 20 * 16 and others > 20
    torch.testing.assert_close(b, want * 20 / others, rtol=1e-4, atol=1e-5)
    letters = set(found.decode(rest.targets).replace("<|endoftext|>", "").replace(" ", ""))
    assert letters <= set("abcde") and len(letters) > 2


def test_a_tiny_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tools, "trained", train_here)
    monkeypatch.setattr(forget, "WINDOWS", 1000)
    words = [f"--out_dir={run}", "--texts=source 0:document 0,source 1", "--tokens=640"]
    forget.main([*words, "--out=f.json"])
    result = json.loads(Path("f.json").read_text())
    keys = [key for key in result if key.startswith(str(run))]
    assert [key.partition("tokens: ")[2] for key in keys] == ["source 0:document 0", "source 1"]
    assert capsys.readouterr().out.count("of the retrained model's rise on siblings") == 2
    sides = "blocks", "joint", "refit", "retrain"
    figures = "siblings", "elsewhere", "refit", "retrain"
    assert set(result[keys[0]]) == {"share", *(f"{s}, {f}" for s in sides for f in figures)}

    # the second removal, from the two models
    found = result[keys[1]]
    old = Run(run, "cpu")
    start, _, source_of = load_documents(old.folder, "val", len(old.val))
    removed = np.array(old.source_of) == "source 1"
    new = Run(tools.trained_on(old, ~removed, "out-without", 1, []), "cpu")
    assert new.sources.tolist() == ["source 0"]
    at = 16 * np.arange((len(old.val) - 1) // 16)[:, None] + np.arange(17)
    rows = torch.from_numpy(old.val[at].astype(np.int64))
    sibling = np.array(source_of)[np.searchsorted(start, at[:, 1:], side="right") - 1] == "source 1"
    loss = []
    for model in (old.model, new.model):
        logits = model.logits(model.hidden(rows[:, :-1])).flatten(0, 1)
        loss.append(F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none").view(-1, 16))
    change = (loss[1] - loss[0]).numpy()
    for group, tokens in (("siblings", sibling), ("elsewhere", ~sibling)):
        mean, low, high = found[f"retrain, {group}"]
        assert mean == pytest.approx(change[tokens].mean(), abs=1e-4) and low < mean < high
    rise = found["retrain, siblings"][0]
    assert rise > found["retrain, elsewhere"][0] and rise > 0.1
    assert found["share"][0] == pytest.approx(found["refit, siblings"][0] / rise)
    assert found["joint, refit"]["pearson"] > 0.8
    monkeypatch.setattr(forget, "measure", None)          # what is finished is not done again
    forget.main([*words, "--out=f.json"])


def test_agreement_is_slope_through_the_origin_and_both_correlations():
    rng = np.random.default_rng(0)
    siblings = rng.random((6, 4)) < 0.5
    x = rng.normal(size=(6, 4))
    changes = {"joint": x, "refit": 2 * x, "retrain": np.exp(x)}
    found = forget.summary(siblings, changes)
    assert found["joint, refit"] == pytest.approx(dict(pearson=1, spearman=1, slope=2))
    assert found["joint, retrain"]["spearman"] == pytest.approx(1)
    p = x[siblings]
    pearson = np.corrcoef(p, np.exp(p))[0, 1]
    assert found["joint, retrain"]["pearson"] == pytest.approx(pearson) and pearson < 0.99
    assert found["joint, retrain"]["slope"] == pytest.approx((p * np.exp(p)).sum() / (p * p).sum())
    assert found["refit, elsewhere"][0] == pytest.approx(2 * x[~siblings].mean())


def test_mistakes_are_told_on_one_line(run, tmp_path):
    for texts in ("sauce 1", "source 1:document 0"):
        with pytest.raises(UserError, match="texts: '.*1' is not in both .* some of source 0"):
            forget.main([f"--out_dir={run}", f"--texts={texts}"])
    dense = train_here(tmp_path / "dense", f"--dataset={run.parent / 'words'}", "--n_proto=0",
                       "--max_iters=2", "--eval_interval=2")
    with pytest.raises(UserError, match="holds a dense model"):
        forget.main([f"--out_dir={dense}"])
