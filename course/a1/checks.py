"""What A1 asks of prism.py and sample.py: each check returns arrays."""
import torch
from inputs import integers, model_of, normal


def gates_of(rng):
    """For each of 40 tokens the ids and gates of three of seven prototypes"""
    values, ids = normal(rng, 40, 7).topk(3)
    return ids, values.relu()


def edit_of(m, rng):
    """Gains around 1, and five directions, of which most fire"""
    g = 1 + normal(rng, 7)
    w = normal(rng, 5, 7)
    c = 0.1 * normal(rng, 5) - 1
    u = normal(rng, 5, 6)
    return m.prism.Edit(g, w, c, u)


def mixing(m, rng):
    ids, gates = gates_of(rng)
    return {"sum": m.prism.mix(ids, gates, normal(rng, 7, 6))}


def head(m, rng):
    found = m.prism.prototype_head(normal(rng, 20, 6), normal(rng, 7, 6), 4)
    return {"ids": found.ids.sort().values,              # the order of equal gates is free
            "gates": found.gates,
            "reconstruction": found.reconstruction,
            "residual": found.residual,
            "nearest_token": found.nearest_token,
            "nearest_proto": found.nearest_proto}


def head_gradient(m, rng):
    z = normal(rng, 20, 6).requires_grad_()
    p = normal(rng, 7, 6).requires_grad_()
    _, *parts = m.prism.prototype_head(z, p, 3)          # all but the ids
    sum(part.square().sum() for part in parts).backward()
    return {"dz": z.grad, "dp": p.grad}


def firing(m, rng):
    ids, gates = gates_of(rng)
    return {"fire": edit_of(m, rng).fire(ids, gates)}


def editing(m, rng):
    ids, gates = gates_of(rng)
    z = normal(rng, 40, 6)
    p = normal(rng, 7, 6)
    return {"states": edit_of(m, rng).apply(z, ids, gates, p)}


def ledger(m, rng):
    model = model_of(m.prism, rng)
    idx = integers(rng, 11, 2, 8)
    y = integers(rng, 11, 2, 8)
    e = model.explain(idx, y)
    order = e.prototypes.argsort()                       # the order of equal gates is free
    return {"logit": e.logit,
            "gates": e.gates,
            "slices": e.contributions.gather(2, order),
            "residual": e.residual,
            "edits": e.edits,
            "likeliest": model.explain(idx).targets}


def edited_ledger(m, rng):
    model = model_of(m.prism, rng)
    idx = integers(rng, 11, 2, 8)
    y = integers(rng, 11, 2, 8)
    edit = edit_of(m, rng)
    e = model.explain(idx, y, edit)
    return {"logit": e.logit,
            "slices": e.contributions.sum(2),
            "residual": e.residual,
            "edits": e.edits,
            "slices, gains alone": model.explain(idx, y, edit.g).contributions.sum(2)}


def gate_parts(m, rng):
    model = model_of(m.prism, rng, n_layer=2)
    idx = integers(rng, 11, 8)
    parts, writes = m.sample.gate_ledger(model, idx, torch.tensor([0, 4, 5]))
    return parts | {f"write {name}": write for name, write in writes.items()}


def oracle_slices_add_up(m, rng):
    gains = normal(rng, 7)
    e = model_of(m.prism, rng).explain(integers(rng, 11, 2, 8), gains=gains)
    total = e.contributions.sum(2) + e.residual + e.edits
    return {"logit": torch.stack((total, e.logit))}


def oracle_finite_differences(m, rng):
    z = normal(rng, 20, 6)
    p = normal(rng, 7, 6).requires_grad_()
    step = 1e-6 * normal(rng, 7, 6)

    def length(p):
        return m.prism.prototype_head(z, p, 3).residual.square().sum()
    length(p).backward()
    slope = (p.grad * step).sum()
    rise = (length(p + step) - length(p - step)) / 2
    return {"slope": torch.stack((slope, rise)).float()}          # differences are not exact
