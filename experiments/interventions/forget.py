"""Forgetting in closed form: the head without some text, beside a model retrained without it.

    python experiments/interventions/forget.py
    python experiments/interventions/forget.py --out_dir=out-books \\
        --texts=melville-moby_dick,edgeworth-parents,austen-emma

A linear term makes the checkpoint P_0 the minimum of the loss (see refit.py). Token s adds -a_s g_s
to its gradient; without the tokens S it is b = sum_{s in S} a_s g_s, and Newton's step is

    P' = P_0 - H^-1 b,   H of the tokens that remain: the first of the steps to refit

Sides: blocks, H is its exact blocks; joint, the joint H; refit, P fitted without S; retrain, a new
model without S, by default options. b is of all S, the rest a sample of windows, b scaled to it.
Changes of loss: nats per token on held-out text of the source (siblings) and elsewhere. Slope: real
per predicted change, through the origin. Share: refit's rise in retrain's; the trunk knows the rest
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attribution"))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from refit import damped_blocks, fit, held, right_side, solve_joint  # noqa: E402
from rivals import owners  # noqa: E402
from tools import interval, read_results, save_results, spearman, trained_on  # noqa: E402

from attribute import seen_windows  # noqa: E402
from common import Run, UserError, load_documents, parse_config, run_main  # noqa: E402

TOLERANCE = 0.1  # of the norm of b; with 0.005 refit's changes of loss differ by 1%
WINDOWS = 600    # held-out windows, at most


@dataclass
class ForgetConfig:
    out_dir: str = "out"   # the run
    texts: str = ("language reference,language reference:topics/specialnames,idlelib,"
                  "idlelib:idlelib.config,tkinter,tkinter:tkinter")  # sources, source:document
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
    mu, blocks = damped_blocks(W, r, M)
    joint = P - solve_joint(W, r, mu, b, blocks, TOLERANCE)
    tilt = b + right_side(r, M)                           # b is then F's gradient at P
    refit = fit(rest, W, P, joint, tilt, mu, blocks, TOLERANCE * b.norm())
    alone = P - blocks(b[None])[0]
    return {"blocks": alone, "joint": joint, "refit": refit}


def summary(siblings, changes):
    """Held-out tokens (n, T): siblings bool, {side: change of loss} -> figures for JSON."""
    found = {}
    for side, x in changes.items():
        for group, tokens in (("siblings", siblings), ("elsewhere", ~siblings)):
            found[f"{side}, {group}"] = interval((x * tokens).sum(1), tokens.sum(1))
        for real in ("refit", "retrain"):
            p, y = x[siblings], changes[real][siblings]
            found[f"{side}, {real}"] = {
                "pearson": np.corrcoef(p, y)[0, 1].item(),
                "spearman": spearman(p[:, None], y[:, None]).item(),
                "slope": (p @ y / (p @ p)).item()}
    rise = [(changes[side] * siblings).sum(1) for side in ("refit", "retrain")]
    found["share"] = interval(*rise)
    return found


def measure(cfg, run, source, removed):
    """What happens without the documents (D,) of a source -> figures for JSON."""
    first, _, source_of = load_documents(run.folder, "val", len(run.val))
    n = (len(run.val) - 1) // run.T
    starts = run.T * np.arange(0, n, 1 + n // WINDOWS)
    inside = np.repeat(np.array(source_of) == source, np.diff([*first, len(run.val)]))
    siblings = inside[starts[:, None] + 1 + np.arange(run.T)]
    if not removed.any() or not siblings.any():
        raise UserError(f"texts: '{source}' is not in both training and held-out text, or has no "
                        f"such document; expected some of {', '.join(run.sources)}")

    def loss(run, P):
        r = held(run, run.val, starts).records(run.model.W, P)
        return r.loss.view(-1, run.T).numpy()
    P = run.model.prototypes
    before = loss(run, P)
    rest, b = without(run, removed, cfg.tokens // run.T)
    changes = {}
    for side, new in forget(rest, b, run.model.W, P).items():
        changes[side] = loss(run, new) - before
    twin = Run(trained_on(run, ~removed, "out-without", 1, []), "cpu")
    changes["retrain"] = loss(twin, twin.model.prototypes) - before
    return summary(siblings, changes)


def main(argv):
    cfg = parse_config(ForgetConfig, argv)
    run = Run(cfg.out_dir, "cpu")
    result = read_results(cfg.out)
    for name in cfg.texts.split(","):
        source, _, title = name.partition(":")
        removed = np.array(run.source_of) == source
        if title:
            removed &= np.array(run.titles) == title
        key = f"{cfg.out_dir} {run.hash[:8]}, {cfg.tokens} tokens: {name}"
        if key not in result:
            result[key] = measure(cfg, run, source, removed)
            save_results(cfg.out, result)
        share, low, high = result[key]["share"]
        print(f"{key}: the head reaches {share:.0%} [{low:.0%}, {high:.0%}] of the retrained "
              "model's rise on siblings; the trunk still knows the rest", flush=True)


if __name__ == "__main__":
    run_main(main)
