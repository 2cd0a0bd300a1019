"""What A3 asks of attribute.py and refit.py: each check returns arrays."""
import numpy as np
import torch
from inputs import integers, model_of, normal


def records_of(m, rng):
    """W, and Records of 30 tokens; of seven prototypes the last never fires"""
    W = 0.4 * normal(rng, 11, 6)
    ids = normal(rng, 30, 6).argsort()[:, :3]
    gates = normal(rng, 30, 3).relu()
    errors = normal(rng, 30, 6)
    pi = normal(rng, 30, 11).softmax(1)
    loss = normal(rng, 30)
    return W, m.attribute.Records(ids, gates, errors, pi, pi @ W, loss)


def held_of(m, rng):
    """W, and 30 tokens whose gates and residuals are held"""
    W, r = records_of(m, rng)
    residual = normal(rng, 30, 6)
    targets = integers(rng, 11, 30)
    return W, m.refit.Held(r.ids, r.gates, residual, targets)


def hessian(W, r):
    """Autograd's, of the summed loss in P (M, d, M, d), at P = 0, where the softmax is r.pi"""
    def loss(P):
        states = torch.einsum("sk,skd->sd", r.gates, P[r.ids])
        logits = r.pi.log() + states @ W.T
        return logits.logsumexp(1).sum()                 # a target's logit is linear in P
    return torch.func.hessian(loss)(W.new_zeros(7, 6))


def index_of(m):
    """An Index without its files"""
    index = m.attribute.Index.__new__(m.attribute.Index)
    index.factors = np.zeros((7, 6, 6))
    return index


def records(m, rng):
    import prism                                         # that of the release
    V = 2 ** 14                                          # log softmax comes in two chunks
    model = model_of(prism, rng, vocab_size=V)
    idx, y = integers(rng, V, 2, 10, 8)
    r = m.attribute.records(model, idx, y)
    return r._replace(pi=r.pi[:, ::512])._asdict()


def curvature(m, rng):
    W, r = records_of(m, rng)
    c = m.attribute.Curvature(W, 7)
    c.add(r)
    c.add(r)
    return {"D": c.D, "S": c.S}


def oracle_blocks(m, rng):
    W, r = records_of(m, rng)
    c = m.attribute.Curvature(W, 7)
    c.add(r)
    mine = c.block(0, 0.5)
    right = hessian(W, r)[0, :, 0] + 0.5 * torch.eye(6)
    return {"block": torch.stack((mine, right))}


def blocks(m, rng):
    return {"block": oracle_blocks(m, rng)["block"][0]}


def oracle_product(m, rng):
    W, r = records_of(m, rng)
    v = normal(rng, 2, 7, 6)
    mine = m.attribute.curvature_product(W, r, v)
    right = torch.einsum("iajb,qjb->qia", hessian(W, r), v)
    return {"Hv": torch.stack((mine, right))}


def product(m, rng):
    return {"Hv": oracle_product(m, rng)["Hv"][0]}


def spreading(m, rng):
    _, r = records_of(m, rng)
    sums = m.attribute.spread(r, r.pi, 7)
    return {"sums": sums, "b": index_of(m).right_side(r)}


def solver(m, rng):
    A = 0.3 * normal(rng, 12, 12)
    A = A @ A.T + torch.eye(12)
    t = 1 + normal(rng, 12, 1).abs()
    b = normal(rng, 3, 12, 2)
    b[2] = 0
    solve = m.attribute.conjugate_gradients
    x, residual, steps = solve(lambda v: A @ v, b, lambda v: t * v)
    return {"x": x, "residual": residual, "steps": steps}


def block_solver(m, rng):
    index = index_of(m)
    L = normal(rng, 7, 6, 6).tril(-1) + 3 * torch.eye(6)
    index.factors = L.numpy()
    b = normal(rng, 2, 7, 6)
    b[:, 3] = 0
    return {"x": index.solve_blocks(b)}


def scores(m, rng):
    index = index_of(m)
    _, r = records_of(m, rng)
    index.positions = np.arange(30)
    index.ids = r.ids.numpy()
    index.gates = np.float16(r.gates)
    index.errors = np.float16(r.errors)
    places = index.ids.ravel()
    index.order = places.argsort()
    index.start = np.searchsorted(np.sort(places), range(8))
    found = index.token_scores(normal(rng, 2, 7, 6).float())
    return {"scores": np.float32(found)}                 # to be compared as such


def sums(m, rng):
    index = index_of(m)
    index.unit_of = {"document": rng.integers(1, 6, 40)}
    index.names = {"document": list("abcdefgh")}         # a, g and h have no tokens
    return {"sums": index.sums(rng.random(40), "document")}


def held(m, rng):
    W, tokens = held_of(m, rng)
    return tokens.records(W, normal(rng, 7, 6))._asdict()


def fit(m, rng):
    W, tokens = held_of(m, rng)
    P_0, P, tilt = normal(rng, 3, 7, 6)
    found = m.refit.fit(tokens, W, P_0, P, tilt, 10.0, lambda v: v / 10, 1e-11)
    return {"P": found}
