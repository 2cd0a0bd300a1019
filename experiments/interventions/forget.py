"""Forgetting in closed form: the head without some text, beside a model retrained without it.

    python experiments/interventions/forget.py [--largest]
    python experiments/interventions/forget.py --out_dir=out-books \\
        --sources=melville-moby_dick,edgeworth-parents,austen-emma

A linear term makes the checkpoint P_0 the minimum of the loss (see refit.py). Token s adds -a_s g_s
to its gradient; without the tokens S it is b = sum_{s in S} a_s g_s, and Newton's step is

    P' = P_0 - H^-1 b,   H of the tokens that remain: the first of the steps to refit

Sides: blocks, H is its exact blocks; joint, the joint H by conjugate gradients; refit, P fitted
without S; retrain, a model trained without S with the default options. b is of all text of S, the
rest a sample of windows, b scaled to it. Change of loss, nats per token, on held-out text of the
source (siblings) and elsewhere; slope: real per predicted change, through the origin. Share:
refit's rise on siblings as a share of retrain's; what is missing the trunk still knows.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attribution"))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from refit import fit, held, right_side, solve_joint  # noqa: E402
from rivals import owners  # noqa: E402
from tools import interval, read_results, save_results, spearman, trained_on  # noqa: E402

from attribute import MU_SHARE, Curvature, seen_windows  # noqa: E402
from common import Run, parse_config, run_main  # noqa: E402
from suppress import FindConfig, chosen_documents, draw_windows, mark  # noqa: E402

TOLERANCE = 0.1  # of the norm of b; with 0.005 refit's changes of loss differ by 1%
QUERIES = 256    # held-out windows, at most half of them with siblings


@dataclass
class ForgetConfig:
    out_dir: str = "out"   # the run
    sources: str = "language reference,idlelib,tkinter"  # each is removed in turn
    largest: bool = False  # only the largest document of each is removed
    tokens: int = 32768    # training tokens that P is fitted on
    out: str = "experiments/results/forget.json"  # the result


def without(run, removed, n):
    """Documents (D,) bool -> Held, n windows without their text; b (M, d), to that scale."""
    W, P = run.model.W, run.model.prototypes
    starts = np.random.default_rng(1).permutation(seen_windows(run.ckpt, len(run.train)))
    theirs = removed[owners(run, starts)].reshape(-1, run.T)
    holds = theirs.any(1)
    b = torch.zeros_like(P)
    for start, tokens in zip(starts[holds], theirs[holds]):
        some = held(run, run.train, start[None]).take(torch.from_numpy(tokens))
        b += right_side(some.records(W, P), len(P))
    others = starts[~holds]
    rest = held(run, run.train, others[:n])
    return rest, b * min(n, len(others)) / len(others)


def forget(rest, b, W, P):
    """Tokens that remain, b and prototypes P (M, d) -> {side: P' (M, d)}."""
    M = len(P)
    r = rest.records(W, P)
    curvature = Curvature(W, M)
    curvature.add(r)
    mu = MU_SHARE * curvature.mean_eigenvalue()
    H = torch.stack([curvature.block(i, mu) for i in range(M)])
    L = torch.linalg.cholesky(H.double()).to(P.dtype)

    def blocks(v):                                        # (Q, M, d) -> H_i^-1 v_i
        return torch.cholesky_solve(v.permute(1, 2, 0), L).permute(2, 0, 1)
    joint = P - solve_joint(W, r, mu, b, blocks, TOLERANCE)
    tilt = b + right_side(r, M)                           # b is then F's gradient at P
    refit = fit(rest, W, P, joint, tilt, mu, blocks, TOLERANCE * b.norm())
    return {"blocks": P - blocks(b[None])[0],
            "joint": joint,
            "refit": refit}


def summary(siblings, changes):
    """Held-out tokens (n, T): siblings bool, {side: change of loss} -> figures for JSON."""
    found = {}
    for side, x in changes.items():
        for group, tokens in (("siblings", siblings), ("elsewhere", ~siblings)):
            found[f"{side}, {group}"] = interval((x * tokens).sum(1), tokens.sum(1))
        for real in ("refit", "retrain"):
            p, y = x.ravel(), changes[real].ravel()
            found[f"{side}, {real}"] = {
                "pearson": np.corrcoef(p, y)[0, 1].item(),
                "spearman": spearman(p[:, None], y[:, None]).item(),
                "slope": (p @ y / (p @ p)).item()}
    rise = {side: (x * siblings).sum(1) for side, x in changes.items()}
    found["share"] = interval(rise["refit"], rise["retrain"])
    return found


def measure(cfg, run, source, removed):
    """What happens without the documents (D,) of a source -> figures for JSON."""
    text = mark(run, FindConfig(source=source), "val")
    starts = run.T * draw_windows(text, run.T, QUERIES, True, seed=1)
    siblings = text.inside[starts[:, None] + 1 + torch.arange(run.T)].numpy()

    def loss(run, P):
        r = held(run, run.val, starts.numpy()).records(run.model.W, P)
        return r.loss.view(-1, run.T).numpy()
    W, P = run.model.W, run.model.prototypes
    before = loss(run, P)
    rest, b = without(run, removed, cfg.tokens // run.T)
    changes = {}
    for side, new in forget(rest, b, W, P).items():
        changes[side] = loss(run, new) - before
    twin = Run(trained_on(run, ~removed, "out-without", 1, []), "cpu")
    changes["retrain"] = loss(twin, twin.model.prototypes) - before
    return summary(siblings, changes)


def main(argv):
    cfg = parse_config(ForgetConfig, argv)
    run = Run(cfg.out_dir, "cpu")
    result = read_results(cfg.out)
    size = np.diff([*run.doc_start, len(run.train)])
    for source in cfg.sources.split(","):
        removed = chosen_documents(FindConfig(source=source), run.titles, run.source_of)
        name = source
        if cfg.largest:
            name = f"largest document of {source}"
            removed = np.arange(len(size)) == np.where(removed, size, 0).argmax()
        key = f"{cfg.out_dir} {run.hash[:8]}, {cfg.tokens} tokens: {name}"
        if key not in result:
            result[key] = measure(cfg, run, source, removed)
            save_results(cfg.out, result)
        share, low, high = result[key]["share"]
        print(f"{key}: the head reaches {share:.0%} [{low:.0%}, {high:.0%}] of the retrained "
              "model's rise on siblings; the trunk still knows the rest", flush=True)


if __name__ == "__main__":
    run_main(main)
