"""Does the head's influence say what really happens when a document is left out of the head's fit?

    python train.py --dataset=pydoc512 --out_dir=out-refit --n_layer=2 --n_head=2 --n_embd=64 \\
        --n_proto=256 --top_k=4 --head_share=1
    python experiments/attribution/refit.py

Gates and residuals are held, so the loss is convex in the prototypes P. The checkpoint P_0 is no
minimum of it; a linear term makes it one (Bae et al. 2022, arXiv 2209.05364):

    F(P) = sum_s CE_s(P) + mu/2 |P - P_0|^2 - <P, sum_s dCE_s/dP (P_0)>

Each document is left out in turn and P is fitted to convergence. The real change of each query
token's loss is compared with three predictions, sum_i a_ti g_t . x_i with b_i the document's
sum_s a_si g_s: full, x = H^-1 b of the joint Hessian; block, x_i = H_i^-1 b_i; none, x = b.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from curvature import measured  # noqa: E402
from rivals import owners, windows  # noqa: E402
from tools import read_results, save_results  # noqa: E402

from attribute import MU_SHARE, Curvature, Records, conjugate_gradients  # noqa: E402
from attribute import curvature_product, seen_windows, spread  # noqa: E402
from common import Run, UserError, parse_config, run_main  # noqa: E402
from prism import log_softmax_chunks, mix  # noqa: E402


@dataclass
class RefitConfig:
    out_dir: str = "out-refit"    # the run
    documents: int = 20           # left out in turn
    tokens: int = 131072          # training tokens that P is fitted on, about
    largest: float = 0.02         # documents hold at most this share of them
    queries: int = 256            # held-out tokens
    seed: int = 1                 # of documents, windows and queries
    out: str = "experiments/results/refit.json"  # the result


class Held(NamedTuple):
    """What is held of N tokens while P changes."""
    ids: torch.Tensor        # (N, k)
    gates: torch.Tensor      # (N, k)
    residual: torch.Tensor   # (N, d)
    targets: torch.Tensor    # (N,)

    def take(self, tokens):
        return Held(*(u[tokens] for u in self))

    def records(self, W, P):
        """Records of the tokens with prototypes P (M, d)."""
        z = self.residual + mix(self.ids, self.gates, P)
        logp = torch.cat([logp for _, logp in log_softmax_chunks(z, W)])
        loss = -logp.gather(1, self.targets[:, None])[:, 0]
        pi = logp.exp_()
        m = pi @ W
        return Records(self.ids, self.gates, W[self.targets] - m, pi, m, loss)


def held(run, text, starts):
    idx, targets = windows(run, text, starts)
    parts = []
    for part in idx.split(32):
        m = run.model.mixture(run.model.hidden(part))
        parts.append((m.ids, m.gates, m.residual))
    return Held(*(torch.cat(u) for u in zip(*parts)), targets.flatten())


def right_side(r, M):
    """b (M, d), b_i = sum_s a_si g_s: minus the gradient of the summed loss."""
    return spread(r, r.errors, M)


def damped_blocks(W, r, M):
    """Records r -> mu, and the function v (Q, M, d) -> H_i^-1 v_i of their exact blocks."""
    curvature = Curvature(W, M)
    curvature.add(r)
    mu = MU_SHARE * curvature.mean_eigenvalue()
    H = torch.stack([curvature.block(i, mu) for i in range(M)])
    L = torch.linalg.cholesky(H.double()).to(W.dtype)

    def blocks(v):
        return torch.cholesky_solve(v.permute(1, 2, 0), L).permute(2, 0, 1)
    return mu, blocks


def solve_joint(W, r, mu, b, blocks, tol):
    """H^-1 b (M, d) of the joint Hessian of records r, preconditioned with its blocks."""
    parts = [Records(*part) for part in zip(*(u.split(1024) for u in r))]

    def product(v):
        return mu * v + sum(curvature_product(W, part, v) for part in parts)
    x, _, _ = conjugate_gradients(product, b[None], blocks, tol, max_iters=300)
    return x[0]


def fit(tokens, W, P_0, P, tilt, mu, blocks, enough):
    """Newton steps from P until the gradient of F is below `enough` -> P."""
    for _ in range(20):
        r = tokens.records(W, P)
        gradient = mu * (P - P_0) - right_side(r, len(P)) + tilt
        if gradient.norm() < enough:
            return P
        P = P - solve_joint(W, r, mu, gradient, blocks, tol=0.02)
    raise UserError(f"a fit ended at a gradient of {gradient.norm():.2e}, expected {enough:.2e}")


def choose(run, cfg, rng):
    """-> documents to leave out, windows that hold them and others, the document of each token."""
    starts = rng.permutation(seen_windows(run.ckpt, len(run.train)))
    owner = owners(run, starts).reshape(-1, run.T)
    size = np.bincount(owner.ravel(), minlength=len(run.titles))
    n = cfg.tokens // run.T
    fits = (size >= 64) & (size <= cfg.largest * n * run.T)
    chosen = rng.permutation(np.flatnonzero(fits))[:cfg.documents]
    with_them = np.isin(owner, chosen).any(1)
    taken = np.argsort(~with_them, kind="stable")[:n]
    if not 0 < with_them.sum() < n:
        raise UserError(f"{len(chosen)} documents do not fit into {n} windows; raise --tokens")
    return chosen, starts[taken], owner[taken].ravel()


def main(argv):
    cfg = parse_config(RefitConfig, argv)
    run = Run(cfg.out_dir, "cpu")
    W, P_0 = run.model.W, run.model.prototypes
    M = len(P_0)
    options = asdict(cfg) | {"checkpoint": run.hash}
    result = read_results(cfg.out)
    if result.get("options") != options:
        share = measured(run, cfg.tokens)["within_squared"]
        result = dict(options=options, documents={}, off_diagonal_share=1 - share)
    done = result["documents"]
    rng = np.random.default_rng(cfg.seed)
    chosen, starts, owner = choose(run, cfg, rng)
    tokens = held(run, run.train, starts)
    starts = run.T * rng.permutation((len(run.val) - 1) // run.T)[:16]
    queries = held(run, run.val, starts)
    queries = queries.take(rng.permutation(len(queries.targets))[:cfg.queries])
    r, q = tokens.records(W, P_0), queries.records(W, P_0)
    mu, blocks = damped_blocks(W, r, M)
    tilt = right_side(r, M)

    def change(x):                                        # of each query token's loss
        return (mix(q.ids, q.gates, x) * q.errors).sum(1).tolist()
    for document in chosen.tolist():
        if str(document) in done:
            continue
        left_out = owner == document
        b = right_side(tokens.take(left_out).records(W, P_0), M)
        x = solve_joint(W, r, mu, b, blocks, tol=1e-3)
        P = fit(tokens.take(~left_out), W, P_0, P_0 - x, tilt, mu, blocks, 1e-4 * b.norm())
        real = queries.records(W, P).loss - q.loss
        done[str(document)] = dict(
            real=real.tolist(),
            full=change(x),
            block=change(blocks(b[None])[0]),
            none=change(b),
            title=run.titles[document])
        result["pearson"] = {}
        for kind in ("full", "block", "none"):
            pairs = [np.ravel([row[n] for row in done.values()]) for n in ("real", kind)]
            result["pearson"][kind] = np.corrcoef(*pairs)[0, 1].item()
        save_results(cfg.out, result)
        print(f"{len(done)} documents: {result['pearson']}", flush=True)


if __name__ == "__main__":
    run_main(main)
