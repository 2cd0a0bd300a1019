"""Does the head's influence say what really happens when a document is left out and the prototypes are fitted again?

    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python train.py --dataset=pydoc512 --out_dir=out-refit --n_layer=2 --n_head=2 --n_embd=64 --n_proto=128 --head_share=1
    python experiments/refit.py                                  its head has 8,192 numbers; fits take seconds to minutes
    python experiments/refit.py --out_dir=out --mu=10            the default preset: 197,000 numbers to fit, an hour or more

Gates and residuals are held at the checkpoint, so the loss is convex in the prototypes P. On the tokens of some training documents
P is fitted to convergence, F(P) = sum_s CE_s(P) + mu/2 ||P - P0||^2 (Newton steps by conjugate gradients), then again without each
document in turn. The real change of each query token's loss is compared with four predictions, all from the fit on everything: full
(joint Hessian), joined (exact blocks, joined by co-activation), block (exact diagonal blocks) and none (gradient product). Query tokens come from held-out documents.
Finished documents are kept in the result file, and a run that was stopped goes on.
"""
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from attribute import Curvature, Run, conjugate_gradients, curvature_product, joined_product, root, seen_windows  # noqa: E402
from prism import UserError, atomic, parse_config, run_main  # noqa: E402

KINDS = "full", "joined", "block", "none"
ROWS = 1024  # tokens at a time: their softmax stays in the cache


@dataclass
class RefitConfig:
    out_dir: str = "out-refit"                          # the run
    documents: int = 20                                 # left out in turn
    tokens: int = 100000                                # training tokens that P is fitted on, about
    queries: int = 256                                  # held-out tokens
    mu: float = 0.1                                     # damping, and the pull towards the checkpoint's prototypes
    tol: float = 1e-4                                   # a fit ends when the gradient is this share of a document's
    seed: int = 1                                       # of the choice of documents and queries
    out: str = "experiments/results/refit.json"         # the result


class Head:
    """The loss of N tokens as a function of the prototypes: gates (N, k), ids and residuals (N, d) are held."""

    def __init__(self, model, idx, y):
        self.W = model.transformer.wte.weight
        parts = []
        with torch.no_grad():
            for i in range(0, len(idx), 32):
                m = model.mixture(model.hidden(idx[i:i + 32]))
                parts.append((m.ids, m.gates, m.residual))
        self.ids, self.gates, self.r = (torch.cat(u) for u in zip(*parts))
        self.y = y.flatten()

    def take(self, keep):
        part = object.__new__(Head)
        part.W, part.ids, part.gates, part.r, part.y = self.W, self.ids[keep], self.gates[keep], self.r[keep], self.y[keep]
        return part

    def chunks(self, P):
        """-> (slice, softmax (n, V), loss (n,)) over chunks of tokens."""
        for i in range(0, len(self.y), ROWS):
            s = slice(i, i + ROWS)
            z = self.r[s] + F.embedding_bag(self.ids[s], P, per_sample_weights=self.gates[s], mode="sum")
            logp = (z @ self.W.T).log_softmax(1)
            yield s, logp.exp(), -logp.gather(1, self.y[s, None])[:, 0]

    def losses(self, P):
        return torch.cat([loss for _, _, loss in self.chunks(P)])

    def errors(self, P):
        """g (N, d) = W[y] - W^T pi."""
        return torch.cat([self.W[self.y[s]] - pi @ self.W for s, pi, _ in self.chunks(P)])

    def pull(self, P, weight=None):
        """sum_s a_s g_s (M, d): minus the gradient of the summed loss."""
        x = self.gates[:, :, None] * (self.errors(P) if weight is None else self.errors(P) * weight[:, None])[:, None]
        return torch.zeros_like(P).index_add_(0, self.ids.flatten(), x.flatten(0, 1))

    def product(self, P, mu):
        """v (Q, M, d) -> (H + mu I) v. The softmax (N, V) of all tokens is made once."""
        held = [(s, pi) for s, pi, _ in self.chunks(P)]

        def f(v):
            out = mu * v
            for s, pi in held:
                out += curvature_product(self.W, self.ids[s], self.gates[s], pi, v)
            return out
        return f

    def curvature(self, P):
        c = Curvature(self.W, len(P))
        for s, pi, _ in self.chunks(P):
            c.add(self.ids[s], self.gates[s], pi, pi @ self.W)
        return c


def fit(head, P, P0, mu, precondition, enough, log):
    """Newton steps from P until the gradient's norm is below `enough` -> the minimum of F."""
    for step in range(20):
        gradient = mu * (P - P0) - head.pull(P)
        size = gradient.norm().item()
        if size < enough:
            return P, step, size
        x, _, n = conjugate_gradients(head.product(P, mu), gradient[None], precondition, tol=max(0.02, min(0.3, enough / size)), max_iters=50)
        now = head.losses(P).double().sum() + mu / 2 * (P - P0).square().sum().double()
        length = 1.0
        while True:  # convex: a Newton step that is too long is halved
            new = P - length * x[0]
            then = head.losses(new).double().sum() + mu / 2 * (new - P0).square().sum().double()
            if then <= now + 1e-6 * abs(now) or length < 1e-3:
                break
            length /= 2
        P = new
        log(f"    step {step + 1}: gradient {size:.4f}, {n} products, length {length:g}, F {now:.4f} -> {then:.4f}")
    raise UserError(f"the fit did not converge: its gradient is {size:.2e}, expected below {enough:.2e}; raise --mu or --tol")


def pearson(a, b):
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def figures(result, cfg):
    """Pearson r of real and predicted changes over all pairs, and over the pairs of documents of at most 2% of the tokens."""
    docs = list(result["documents"].values())
    table = {n: np.array([u[n] for u in docs]) for n in ("real", *KINDS)}
    few = [i for i, u in enumerate(docs) if u["tokens"] <= 0.02 * cfg.tokens]
    result["pearson"] = {n: pearson(table["real"], table[n]) for n in KINDS}
    result["pearson_small_documents"] = {n: pearson(table["real"][few], table[n][few]) for n in KINDS} if few else None
    result["small_documents"] = len(few)
    with atomic(cfg.out, "w") as f:
        json.dump(result, f)
    for n, r in result["pearson"].items():
        print(f"{n:>6}: r {r:.4f} over all pairs" + (f", {result['pearson_small_documents'][n]:.4f} over the {len(few)} documents of at most 2% of the tokens" if few else ""))
    print(f"refit of {len(docs)} documents, {table['real'].shape[1]} query tokens: " + "r " + ", ".join(f"{n} {r:.4f}" for n, r in result["pearson"].items())
          + f"; off-diagonal share {result['off_diagonal_share']:.3f}")


def main(argv):
    cfg = parse_config(RefitConfig, argv)
    run, t0 = Run(cfg.out_dir, "cpu"), time.perf_counter()
    key = asdict(cfg) | dict(checkpoint=run.hash)
    try:
        result = json.loads(Path(cfg.out).read_text("utf-8"))
        result = result if result["options"] == key else None
    except (OSError, ValueError, KeyError):
        result = None
    result = result or dict(options=key, command="python experiments/refit.py " + " ".join(argv), torch=torch.__version__,
                            machine=f"{platform.machine()}, {torch.get_num_threads()} threads", documents={})

    def log(*a):
        print(*a, flush=True)
    # -- tokens: the windows that lie in a random stretch of the corpus; documents that lie wholly in it may be left out
    rng = np.random.default_rng(cfg.seed)
    starts = seen_windows(run.ckpt, len(run.tokens))
    n = min(len(starts), max(2, cfg.tokens // run.T))
    first = int(rng.integers(len(starts) - n + 1))
    starts = starts[first:first + n]
    head = Head(run.model, *run.windows(starts))
    doc = run.documents_of((starts[:, None] + 1 + np.arange(run.T)).ravel())
    whole = [d for d in np.unique(doc)[1:-1] if (doc == d).sum() >= 64]
    chosen = sorted(rng.permutation(whole)[:cfg.documents].tolist())
    v = np.sort(rng.permutation((len(run.val) - 1) // run.T)[:max(1, cfg.queries // 16)]) * run.T
    text = torch.from_numpy(np.stack([run.val[s:s + run.T + 1] for s in v]).astype(np.int64))
    query = Head(run.model, text[:, :-1], text[:, 1:])
    query = query.take(torch.from_numpy(np.sort(rng.permutation(len(query.y))[:cfg.queries])))
    log(f"{len(head.y):,} tokens of {len(np.unique(doc))} documents, {len(chosen)} left out in turn, {len(query.y)} query tokens")

    if all(str(d) in result["documents"] for d in chosen):
        figures(result, cfg)
        return

    # -- the fit on everything, its blocks, and predictions
    P0, M = run.model.prototypes.detach().clone(), run.model.config.n_proto

    def blocks(P):
        c = head.curvature(P)
        return torch.stack([torch.linalg.cholesky(c.block(i, cfg.mu).double()).float() for i in range(M)]), c

    def solver(L, c):
        """-> the blocks' inverse, and that of the blocks joined by co-activation, which needs far fewer passes as preconditioner."""
        def block(r):
            return torch.cholesky_solve(r.permute(1, 2, 0), L).permute(2, 0, 1)
        roots, R = root(L @ L.mT - cfg.mu * torch.eye(P0.size(1))), c.correlation()
        return block, lambda r: conjugate_gradients(lambda v: joined_product(L, roots, R, v), r, block, tol=1e-5, max_iters=300)[0]
    _, at_start = solver(*blocks(P0))
    weights = [torch.from_numpy((doc == d).astype(np.float32)) for d in chosen]
    enough = cfg.tol * min(head.pull(P0, w).norm().item() for w in weights)
    P, steps, size = fit(head, P0, P0, cfg.mu, at_start, enough, log)
    before, (factors, curvature) = query.losses(P), blocks(P)
    (block, joined), product, g = solver(factors, curvature), head.product(P, cfg.mu), query.errors(P)

    def change(x):
        """To first order, what leaving out a document with solution x (M, d) adds to each query token's loss."""
        return (F.embedding_bag(query.ids, x, per_sample_weights=query.gates, mode="sum") * g).sum(1)
    probe = torch.from_numpy(rng.choice([-1.0, 1.0], (16, M, P.size(1))).astype(np.float32))  # E |A v|^2 = |A|_F^2
    H = factors @ factors.mT
    off_square = (product(probe) - torch.einsum("iab,qib->qia", H, probe)).double().square().flatten(1).sum(1).mean().item()
    result["off_diagonal_share"] = off_square / (off_square + H.double().square().sum().item())
    result["fit_on_all"] = dict(steps=steps, gradient=size, loss_before=query.losses(P0).mean().item(), loss_after=before.mean().item())
    log(f"fitted on everything in {steps} steps; share of curvature off the diagonal blocks (squared Frobenius norm) {result['off_diagonal_share']:.3f}")

    # -- one document after the other: predicted, then really refitted
    for d, w in zip(chosen, weights):
        if str(d) in result["documents"]:
            continue
        pull = head.pull(P, w)
        x, residual, n = conjugate_gradients(product, pull[None], joined, tol=1e-3)
        rest = head.take(w == 0)
        new, steps, _ = fit(rest, P - x[0], P0, cfg.mu, joined, enough, lambda *a: None)
        real = query.losses(new) - before
        result["documents"][str(d)] = {n: u.tolist() for n, u in dict(real=real, full=change(x[0]), joined=change(joined(pull[None])[0]), block=change(block(pull[None])[0]),
                                                                      none=change(pull)).items()} | dict(title=run.titles[d], tokens=int(w.sum()))
        with atomic(cfg.out, "w") as f:
            json.dump(result, f)
        u = result["documents"][str(d)]
        log(f"  {run.titles[d]} ({int(w.sum())} tokens): {n} iterations, then {steps} Newton steps; r full {pearson(u['real'], u['full']):.4f}, "
            f"joined {pearson(u['real'], u['joined']):.3f}, block {pearson(u['real'], u['block']):.3f}, none {pearson(u['real'], u['none']):.3f}; {time.perf_counter() - t0:.0f} s")

    figures(result, cfg)


if __name__ == "__main__":
    run_main(main)
