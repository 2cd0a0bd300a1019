"""What A3 asks of attribute.py and refit.py: each check returns arrays."""
import numpy as np
import torch
from inputs import integers, model_of, normal
from torch.nn.functional import cross_entropy


def problem(m, rng, N=30):
    """Held tokens, W, P, their Records, and autograd's Hessian of the summed loss (M, d, M, d).
    Gates are often 0, and prototype 6 never fires."""
    W, P, residual = 0.4 * normal(rng, 11, 6), normal(rng, 7, 6), normal(rng, N, 6)
    ids = torch.from_numpy(rng.random((N, 6)).argsort(1)[:, :3].copy())
    gates, y = normal(rng, N, 3).relu(), integers(rng, 11, N)

    def logits(P):
        return (residual + (gates[..., None] * P[ids]).sum(1)) @ W.T
    H = torch.func.hessian(lambda P: cross_entropy(logits(P), y, reduction="sum"))(P)
    pi, loss = logits(P).softmax(1), cross_entropy(logits(P), y, reduction="none")
    r = m.attribute.Records(ids, gates, W[y] - pi @ W, pi, pi @ W, loss)
    return m.refit.Held(ids, gates, residual, y), W, P, r, H


def summed(m, W, r):
    """A Curvature that was given the tokens in three batches"""
    c = m.attribute.Curvature(W, 7)
    for at in slice(17), slice(17, 29), slice(29, 30):
        c.add(m.attribute.Records(*(u[at] for u in r)))
    return c


def index_of(m, **attributes):
    index = m.attribute.Index.__new__(m.attribute.Index)          # without its files
    vars(index).update(attributes)
    return index


def records(m, rng):
    import prism                                                  # that of the release
    V = 2 ** 14                                                   # log softmax comes in two chunks
    idx, y = integers(rng, V, 10, 8), integers(rng, V, 10, 8)
    r = m.attribute.records(model_of(prism, rng, vocab_size=V), idx, y)
    return r._replace(pi=r.pi[:, ::512])._asdict()


def curvature(m, rng):
    _, W, _, r, _ = problem(m, rng)
    c = summed(m, W, r)
    return {"D": c.D, "S": c.S}


def oracle_blocks(m, rng):
    _, W, _, r, H = problem(m, rng)
    c, some, mu = summed(m, W, r), (0, 0, 5, 6), 0.5 * torch.eye(6, dtype=W.dtype)
    found = torch.stack([c.block(i, 0.5) for i in some])
    return {"blocks": torch.stack((found, torch.stack([H[i, :, i] + mu for i in some])))}


def blocks(m, rng):
    return {"blocks": oracle_blocks(m, rng)["blocks"][0]}


def oracle_product(m, rng):
    _, W, _, r, H = problem(m, rng)
    v = normal(rng, 2, 7, 6)
    Hv = torch.einsum("iajb,qjb->qia", H, v)
    return {"Hv": torch.stack((m.attribute.curvature_product(W, r, v), Hv))}


def product(m, rng):
    return {"Hv": oracle_product(m, rng)["Hv"][0]}


def spreading(m, rng):
    r, index = problem(m, rng)[3], index_of(m, factors=np.zeros((7, 6, 6)))
    target = m.attribute.Records(*(u[:8] for u in r))
    return {"sums": m.attribute.spread(r, normal(rng, 30, 4), 7), "b": index.right_side(target)}


def solver(m, rng):
    A, t, b = normal(rng, 12, 12), 0.2 + normal(rng, 4, 3).abs(), normal(rng, 3, 4, 3)
    A = A @ A.T / 12 + 0.1 * torch.eye(12, dtype=A.dtype)
    b[1], b[2] = 100 * b[1], 0 * b[2]
    found = {}
    for name, options in ("third", {"tol": 1e-9, "max_iters": 3}), ("last", {}):
        x, residual, steps = m.attribute.conjugate_gradients(
            lambda v: (v.flatten(1) @ A).view_as(v), b, lambda v: t * v, **options)
        found |= {f"{name} x of b {q}": x[q] for q in range(3)}
        found |= {f"{name} residual": residual, f"{name} step": steps}
    return found


def block_solver(m, rng):
    L = normal(rng, 7, 6, 6).tril(-1) + 3 * torch.eye(6, dtype=torch.float64)
    index, b = index_of(m, factors=L.numpy()), normal(rng, 3, 7, 6)
    b[:, 1] = b[0, 2] = 0
    return {"x": index.solve_blocks(b), "nothing": index.solve_blocks(0 * b)}


def scores(m, rng, N=60):
    """All inputs are multiples of 1/8, so that sums in float32 are exact."""
    ids = rng.random((N, 7)).argsort(1)[:, :3].astype(np.uint8)
    gates = (rng.integers(0, 9, (N, 3)) / 8).astype(np.float16)
    errors = (rng.integers(-30, 31, (N, 6)) / 8).astype(np.float16)
    x = torch.from_numpy(rng.integers(-30, 31, (2, 7, 6)) / 8).float()
    x[:, 3] = x[0, 4] = 0
    index = index_of(m, ids=ids, gates=gates, errors=errors, positions=np.arange(N) + 5)
    index.factors = np.zeros((7, 6, 6), np.float32)
    index.order = np.argsort(ids, axis=None, kind="stable")
    index.start = np.append(0, np.bincount(ids.ravel(), minlength=7).cumsum())
    return {"scores": index.token_scores(x)}


def sums(m, rng):
    index, s = index_of(m), rng.standard_normal(40)
    index.unit_of = {"token": np.arange(40), "document": np.sort(rng.integers(1, 6, 40))}
    index.names = {"token": np.arange(40), "document": list("abcdefgh")}  # a, g, h: no tokens
    return {level: index.sums(s, level) for level in index.names}


def held(m, rng):
    tokens, W, P, _, _ = problem(m, rng)
    return tokens.records(W, P + normal(rng, 7, 6))._asdict()


def fit(m, rng):
    tokens, W, P, _, _ = problem(m, rng)
    tilt = m.refit.right_side(tokens.records(W, P), 7) + 0.3 * normal(rng, 7, 6)
    start, tokens = P + 0.05 * normal(rng, 7, 6), tokens.take(slice(24))
    rest = W, P, start, tilt, 4.0, lambda v: v / 4
    return {"minimum": m.refit.fit(tokens, *rest, 1e-11),
            "start": m.refit.fit(tokens, *rest, 1e3)}             # its gradient is small enough
