"""Does the head's influence say what really happens when a document is left out and the prototypes are fitted again?

    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python train.py --dataset=pydoc512 --out_dir=out-refit --n_layer=2 --n_head=2 --n_embd=64 --n_proto=256 --top_k=4 --head_share=1
    python experiments/refit.py                                  its head has 16,384 numbers, whose joint Hessian is held whole; 5 minutes
    python experiments/refit.py --largest=1 --out=big.json       documents of any size

Gates and residuals are held at the checkpoint, so the loss is convex in the prototypes P. Prototypes are not trained on the
cross-entropy, so the checkpoint is no minimum of it: a linear term makes it one (the proximal Bregman objective of Bae et al. 2022,
arXiv 2209.05364), or with --fitted=true P is fitted on everything first. Then each document is left out in turn and P is really fitted to
convergence by Newton steps. The real change of each query token's loss is compared with four predictions: full (joint Hessian), joined (exact
blocks, joined by co-activation), block (exact diagonal blocks) and none (gradient product). Query tokens come from held-out documents.
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

from attribute import MU_SHARE, Curvature, Run, conjugate_gradients, curvature_product, joined_product, root, seen_windows  # noqa: E402
from prism import UserError, atomic, parse_config, run_main  # noqa: E402

KINDS = "full", "joined", "block", "none"
ROWS = 1024  # tokens at a time: their softmax stays in the cache


@dataclass
class RefitConfig:
    out_dir: str = "out-refit"                          # the run
    documents: int = 20                                 # left out in turn
    tokens: int = 131072                                # training tokens that P is fitted on, about
    largest: float = 0.02                               # documents of at most this share of them are left out: influence is first order
    queries: int = 256                                  # held-out tokens
    mu: float = 0.0                                     # damping, the pull towards the checkpoint's prototypes; 0: by attribute.py's rule
    fitted: bool = False                                # fit P on everything first, instead of tilting the loss
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

    def pull(self, P):
        """sum_s a_s g_s (M, d): minus the gradient of the summed loss."""
        x = self.gates[:, :, None] * self.errors(P)[:, None]
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

    def joint(self, P, mu):
        """The Cholesky factor (M d, M d) of the joint Hessian: the block of i and j is sum_s a_si a_sj C_s, and mu I is added."""
        (M, d), W = P.shape, self.W
        H, WW = torch.zeros(M * M, d * d), (W[:, :, None] * W[:, None]).flatten(1)             # (V, d d)
        for s, pi, _ in self.chunks(P):
            m, ids, a = pi @ W, self.ids[s], self.gates[s]
            C = pi @ WW - (m[:, :, None] * m[:, None]).flatten(1)                               # (n, d d)
            for i in range(ids.size(1)):
                for j in range(ids.size(1)):
                    H.index_add_(0, ids[:, i] * M + ids[:, j], (a[:, i] * a[:, j])[:, None] * C)
        H = H.view(M, M, d, d).transpose(1, 2).reshape(M * d, M * d)
        H.diagonal().add_(mu)
        return torch.linalg.cholesky(H)

    def curvature(self, P):
        c = Curvature(self.W, len(P))
        for s, pi, _ in self.chunks(P):
            c.add(self.ids[s], self.gates[s], pi, pi @ self.W)
        return c


def fit(head, P, P0, mu, tilt, precondition, enough, log):
    """Newton steps from P until the gradient's norm is below `enough` -> the minimum of F(P) = sum_s CE_s(P) + mu/2 ||P - P0||^2 + <tilt, P>."""
    def value(P):
        return head.losses(P).double().sum() + mu / 2 * (P - P0).square().sum().double() + (tilt * P).sum().double()
    for step in range(20):
        gradient = mu * (P - P0) - head.pull(P) + tilt
        size = gradient.norm().item()
        if size < enough:
            return P, step, size
        x, _, n = conjugate_gradients(head.product(P, mu), gradient[None], precondition, tol=max(0.02, min(0.3, enough / size)), max_iters=50)
        now, length = value(P), 1.0
        while True:  # convex: a Newton step that is too long is halved
            new = P - length * x[0]
            then = value(new)
            if then <= now + 1e-6 * abs(now) or length < 1e-3:
                break
            length /= 2
        P = new
        log(f"    step {step + 1}: gradient {size:.4f}, {n} products, length {length:g}, F {now:.4f} -> {then:.4f}")
    raise UserError(f"the fit did not converge: its gradient is {size:.2e}, expected below {enough:.2e}; raise --mu or --tol")


def pearson(a, b):
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def figures(result, cfg):
    """Pearson r of real and predicted changes over all pairs of document and query token."""
    docs = list(result["documents"].values())
    table = {n: np.array([u[n] for u in docs]) for n in ("real", *KINDS)}
    result["pearson"] = {n: pearson(table["real"], table[n]) for n in KINDS}
    with atomic(cfg.out, "w") as f:
        json.dump(result, f)
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
    # -- documents to leave out, drawn at random; tokens: the windows that hold them, and others drawn at random
    rng = np.random.default_rng(cfg.seed)
    starts = seen_windows(run.ckpt, len(run.tokens))
    n = min(len(starts), max(2, cfg.tokens // run.T))
    doc = run.documents_of(starts[:, None] + 1 + np.arange(run.T))                                # (windows, T)
    size = np.bincount(doc.ravel(), minlength=len(run.titles))
    chosen = np.sort(rng.permutation(np.flatnonzero((size >= 64) & (size <= cfg.largest * n * run.T)))[:cfg.documents])
    if not len(chosen):
        raise UserError(f"no document has 64 to {cfg.largest * n * run.T:.0f} tokens; raise --tokens or --largest")
    order = np.argsort(~np.isin(doc, chosen).any(1) + rng.random(len(starts)) / 2)
    kept = np.sort(order[:n])
    starts, doc = starts[kept], doc[kept].ravel()
    if any((doc == d).sum() < size[d] for d in chosen):
        raise UserError(f"{len(chosen)} documents take more than {n * run.T:,} tokens; raise --tokens or leave out fewer --documents")
    head = Head(run.model, *run.windows(starts))
    v = np.sort(rng.permutation((len(run.val) - 1) // run.T)[:max(1, cfg.queries // 16)]) * run.T
    text = torch.from_numpy(np.stack([run.val[s:s + run.T + 1] for s in v]).astype(np.int64))
    query = Head(run.model, text[:, :-1], text[:, 1:])
    query = query.take(torch.from_numpy(np.sort(rng.permutation(len(query.y))[:cfg.queries])))
    log(f"{len(head.y):,} tokens of {len(np.unique(doc))} documents, {len(chosen)} left out in turn, {len(query.y)} query tokens")

    if all(str(d) in result["documents"] for d in chosen):
        figures(result, cfg)
        return

    # -- the minimum on everything, the factors there, and predictions
    P0, M = run.model.prototypes.detach().clone(), run.model.config.n_proto
    if P0.numel() > 40000:
        raise UserError(f"{cfg.out_dir} has {P0.numel():,} numbers in its prototypes; the joint Hessian is held whole, for at most 40,000; train a smaller one as --help says")

    def solver(L):
        return lambda r: torch.cholesky_solve(r.flatten(1).T, L).T.reshape(r.shape)
    cfg.mu = cfg.mu or MU_SHARE * head.curvature(P0).size()
    weights = [torch.from_numpy(doc == d) for d in chosen]
    enough = cfg.tol * min(head.take(w).pull(P0).norm().item() for w in weights)
    tilt, P, steps, size = head.pull(P0), P0, 0, 0.0  # with this linear term the checkpoint is the minimum
    if cfg.fitted:
        tilt = torch.zeros_like(P0)
        P, steps, size = fit(head, P0, P0, cfg.mu, tilt, solver(head.joint(P0, cfg.mu)), enough, log)
    before, curvature, product, g, full = query.losses(P), head.curvature(P), head.product(P, cfg.mu), query.errors(P), solver(head.joint(P, cfg.mu))
    factors = torch.stack([torch.linalg.cholesky(curvature.block(i, cfg.mu).double()).float() for i in range(M)])
    roots, R = root(factors @ factors.mT - cfg.mu * torch.eye(P0.size(1))), curvature.correlation()

    def block(r):
        return torch.cholesky_solve(r.permute(1, 2, 0), factors).permute(2, 0, 1)

    def joined(r):
        return conjugate_gradients(lambda v: joined_product(factors, roots, R, v), r, block, tol=1e-3, max_iters=300)[0]

    def change(x):
        """To first order, what leaving out a document with solution x (M, d) adds to each query token's loss."""
        return (F.embedding_bag(query.ids, x, per_sample_weights=query.gates, mode="sum") * g).sum(1)
    probe = torch.from_numpy(rng.choice([-1.0, 1.0], (16, M, P.size(1))).astype(np.float32))  # E |A v|^2 = |A|_F^2
    H = factors @ factors.mT
    off_square = (product(probe) - torch.einsum("iab,qib->qia", H, probe)).double().square().flatten(1).sum(1).mean().item()
    result["mu"] = cfg.mu
    result["off_diagonal_share"] = off_square / (off_square + H.double().square().sum().item())
    result["fit_on_all"] = dict(steps=steps, gradient=size, loss_before=query.losses(P0).mean().item(), loss_after=before.mean().item())
    log((f"fitted on everything in {steps} steps; " if cfg.fitted else "") + f"share of curvature off the diagonal blocks (squared Frobenius norm) {result['off_diagonal_share']:.3f}; mu {cfg.mu:.3g}")

    # -- one document after the other: predicted, then really refitted
    for d, w in zip(chosen, weights):
        if str(d) in result["documents"]:
            continue
        pull = head.take(w).pull(P)
        x, residual, n = conjugate_gradients(product, pull[None], full, tol=1e-4, max_iters=10)
        rest = head.take(~w)
        new, steps, _ = fit(rest, P - x[0], P0, cfg.mu, tilt, full, enough, lambda *a: None)
        real = query.losses(new) - before
        result["documents"][str(d)] = {n: u.tolist() for n, u in dict(real=real, full=change(x[0]), joined=change(joined(pull[None])[0]), block=change(block(pull[None])[0]),
                                                                      none=change(pull)).items()} | dict(title=run.titles[d], tokens=int(w.sum()))
        with atomic(cfg.out, "w") as f:
            json.dump(result, f)
        u = result["documents"][str(d)]
        log(f"  {run.titles[d]} ({int(w.sum())} tokens): residual {residual:.0e}; {steps} Newton steps; r full {pearson(u['real'], u['full']):.4f}, "
            f"joined {pearson(u['real'], u['joined']):.3f}, block {pearson(u['real'], u['block']):.3f}, none {pearson(u['real'], u['none']):.3f}; {time.perf_counter() - t0:.0f} s")

    figures(result, cfg)


if __name__ == "__main__":
    run_main(main)
