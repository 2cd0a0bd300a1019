"""What A1 asks of prism.py and sample.py: each check returns arrays."""
import numpy as np
import torch
from inputs import integers, model_of, normal


def edit_of(m, rng, M=7, d=6, E=2):
    """Gains around 1, and E directions of which some fire and some do not"""
    w = normal(rng, E, M)
    return m.prism.Edit(1 + normal(rng, M), w, 0.2 * normal(rng, E) - 0.3, normal(rng, E, d))


def gates_of(rng, N=40, k=3, M=7):
    ids = np.argsort(rng.random((N, M)), axis=1)[:, :k].copy()
    return torch.from_numpy(ids), normal(rng, N, k).relu()


def mixing(m, rng):
    ids, gates = gates_of(rng)
    prototypes = normal(rng, 7, 6)
    return {"sum": m.prism.mix(ids, gates, prototypes)}


def head(m, rng):
    z, p = normal(rng, 20, 6), normal(rng, 7, 6)
    found = m.prism.prototype_head(z, p, 4)
    order = found.ids.argsort(1)                         # equal gates of 0 may come in any order
    return {"ids": found.ids.gather(1, order), "gates": found.gates.gather(1, order),
            "reconstruction": found.reconstruction, "residual": found.residual,
            "nearest_token": found.nearest_token, "nearest_proto": found.nearest_proto}


def head_gradient(m, rng):
    z, p = normal(rng, 20, 6).requires_grad_(), normal(rng, 7, 6).requires_grad_()
    found = m.prism.prototype_head(z, p, 3)
    weights = normal(rng, 20, 6), normal(rng, 20, 3), normal(rng, 7), normal(rng, 20)
    parts = found.residual, found.gates, found.nearest_token, found.nearest_proto
    loss = sum((weight * part).sum() for weight, part in zip(weights, parts))
    dz, dp = torch.autograd.grad(loss, (z, p))
    return {"dz": dz, "dp": dp}


def firing(m, rng):
    ids, gates = gates_of(rng)
    return {"fire": edit_of(m, rng).fire(ids, gates)}


def editing(m, rng):
    ids, gates = gates_of(rng)
    return {"states": edit_of(m, rng).apply(normal(rng, 40, 6), ids, gates, normal(rng, 7, 6))}


def ledger(m, rng):
    model, idx = model_of(m.prism, rng), integers(rng, 11, 2, 8)
    e = model.explain(idx, integers(rng, 11, 2, 8))
    order = e.prototypes.argsort(-1)
    return {"logit": e.logit, "residual": e.residual, "edits": e.edits,
            "gates": e.gates.gather(-1, order), "slices": e.contributions.gather(-1, order),
            "likeliest": model.explain(idx).targets}


def edited_ledger(m, rng):
    model, idx, y = model_of(m.prism, rng), integers(rng, 11, 2, 8), integers(rng, 11, 2, 8)
    found = {}
    for name, gains in ("gains", 1 + normal(rng, 7)), ("edit", edit_of(m, rng)):
        e = model.explain(idx, y, gains)
        found[name] = torch.stack((e.logit, e.contributions.sum(-1), e.residual, e.edits))
    return found


def gate_parts(m, rng):
    model = model_of(m.prism, rng, n_layer=2)
    idx, i = integers(rng, 11, 8), torch.tensor([0, 4, 5])
    parts, writes = m.sample.gate_ledger(model, idx, i)
    found = {f"part {name}": part for name, part in parts.items()}
    return found | {f"write {name}": write for name, write in writes.items()}


def oracle_slices_add_up(m, rng):
    e = model_of(m.prism, rng).explain(integers(rng, 11, 2, 8), gains=1 + normal(rng, 7))
    return {"logit": torch.stack((e.contributions.sum(-1) + e.residual + e.edits, e.logit))}


def oracle_finite_differences(m, rng):
    z, p, step = normal(rng, 20, 6), normal(rng, 7, 6).requires_grad_(), 1e-6 * normal(rng, 7, 6)

    def length(p):
        return m.prism.prototype_head(z, p, 3).residual.square().sum()
    slope = (torch.autograd.grad(length(p), p)[0] * step).sum()
    rise = (length(p + step) - length(p - step)).detach() / 2
    return {"slope": torch.stack((slope, rise)).float()}          # differences are not exact
