"""What A2 asks of prism.py, train.py and common.py: each check returns arrays."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from inputs import integers, model_of, normal


def targets_of(rng, most, *shape):                       # a quarter of them is to be ignored
    return torch.where(normal(rng, *shape) < -0.7, -1, integers(rng, most, *shape))


def batch_of(m, rng, **sizes):
    """A model, three windows and their targets; autograd stands in for your LinearCrossEntropy"""
    def apply(z, w, y):
        return F.cross_entropy(z @ w.T, y, ignore_index=-1, reduction="sum")
    m.prism.LinearCrossEntropy = m.train.LinearCrossEntropy = SimpleNamespace(apply=apply)
    model = model_of(m.prism, rng, lambda_rec=0.7, lambda_t2p=0.3, lambda_p2t=0.2, **sizes)
    return model, integers(rng, 11, 3, 8), targets_of(rng, 11, 3, 8)


def by_hand(m, rng):
    z, w = normal(rng, 300, 3).requires_grad_(), normal(rng, 2 ** 13, 3).requires_grad_()
    y = targets_of(rng, 2 ** 13, 300)                    # chunks of 128, 128 and 44 tokens
    total = m.prism.LinearCrossEntropy.apply(z, w, y)
    dz, dw = torch.autograd.grad(3 * total, (z, w))
    return {"total": total, "dz": dz, "dw": torch.cat((dw[:64], dw[y[y >= 0]]))}


def losses(m, rng):
    found = {}
    for name, n_proto, g in ("training", 7, None), ("twin", 0, None), ("gains", 7, normal(rng, 7)):
        model, idx, y = batch_of(m, rng, n_proto=n_proto)
        loss, terms = model.train(name == "training")(idx, y, g, return_terms=True)
        found[name] = torch.cat((loss[None], terms))
        found[f"logits, {name}"], found[f"loss, {name}"] = model(idx, y, g)
        found[f"last logits, {name}"] = model(idx, gains=g)[0]
    return found


def loss_gradient(m, rng):
    model, idx, y = batch_of(m, rng)
    model.train()(idx, y, return_terms=True)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def reading(m, rng):
    tokens = integers(rng, 11, 30).numpy().astype("uint16")
    idx, targets = m.train.Windows(tokens, 4, 5, 11, "").read([0, 13, 25, 26, 28, 29])
    return {"idx": idx, "targets": targets}


def sequence(m, rng):
    windows, table = m.train.Windows(range(30), 4, 5, 11, ""), rng.permutation(60).reshape(10, 6)
    windows.starts = lambda epoch: table[epoch]
    windows.read = lambda starts: (torch.tensor([int(start) for start in starts]),) * 2
    return {f"from {first}": windows.train(first, 8)[0] for first in (0, 5, 17)}


def order(m, rng):
    seed, starts = int(rng.integers(2 ** 31)), m.common.window_starts
    found = {f"epoch {epoch}": starts(403, 8, seed, epoch) for epoch in (0, 1, 2, 7)}
    return found | {"two windows": starts(16, 8, seed, 0), "just whole": starts(400, 8, seed, 1)}


def evaluation(m, rng):
    idx, y, found = integers(rng, 11, 60, 8), targets_of(rng, 11, 60, 8), {}
    windows = SimpleNamespace(T=8, tokens=range(60), read=lambda at: (idx[[*at]], y[[*at]]))
    m.train.dist = SimpleNamespace(all_reduce=lambda sums: None)  # the other rank read nothing
    for n_proto, tokens, rank, ranks in (12, 0, 0, 1), (0, 20, 0, 1), (12, 0, 1, 2):
        model = batch_of(m, rng, n_proto=n_proto, top_k=12, dropout=0.2)[0].train()
        model.transformer.ln_f.weight.data *= 0.2        # then some prototypes never fire
        cfg = m.train.TrainConfig(batch_size=2, eval_tokens=tokens, n_proto=n_proto)
        device = torch.device("cpu"), torch.autocast("cpu", enabled=False)
        result = m.train.evaluate(model, windows, cfg, rank, ranks, *device)
        result["training"] = float(model.training)
        found |= {f"{name}, {n_proto}, {rank}": value for name, value in result.items()}
    return found


def orthogonal(m, rng):
    found = {s: m.train.orthogonal(normal(rng, s, 4), torch.float64) for s in (3, 4, 5)}
    return found | {"zero": m.train.orthogonal(0 * normal(rng, 3, 4), torch.float64)}


def muon(m, rng):
    m.train.orthogonal = lambda g, dtype: g.tanh()       # stands in for yours
    p, q = torch.nn.Parameter(normal(rng, 3, 5)), torch.nn.Parameter(normal(rng, 4, 2))
    groups = [dict(params=[p], lr=0.3, weight_decay=0.2),
              dict(params=[q], lr=0.1, weight_decay=0.7, momentum=0.8)]
    optimizer = m.train.Muon(groups, torch.float64)
    for _ in range(3):
        p.grad, q.grad = normal(rng, 3, 5), normal(rng, 4, 2)
        optimizer.step()
    return {"p": p, "q": q}


def optimizers(m, rng):
    names, found = ("weight_decay", "embed_lr_scale", "proto_lr_scale", "beta1", "beta2"), {}
    for muon, n_proto in (True, 7), (False, 7), (True, 0):
        model, values = model_of(m.prism, rng, n_proto=n_proto), dict(zip(names, rng.random(5)))
        cfg, rows = m.train.TrainConfig(n_proto=n_proto, muon=muon, **values), {}
        for optimizer in m.train.make_optimizers(model, cfg, torch.float64):
            for group in optimizer.param_groups:         # Muon's have no betas
                row = group["scale"], group["weight_decay"], *group.get("betas", (0, 0))
                rows |= dict.fromkeys(group["params"], row)
        found[f"{muon}, {n_proto}"] = [rows.get(p, [-1] * 4) for p in model.parameters()]
    return found


def schedule(m, rng):
    found = {}
    for warm, decay, most in (7, 0.6, 30), (0, 0.0, 9), (20, 0.9, 24), (4, 0.25, 18):
        cfg = m.train.TrainConfig(warmup_iters=warm, decay=decay, max_iters=most)
        cfg.learning_rate = 1 + rng.random()
        found[f"{most} steps"] = [m.train.learning_rate(step, cfg) for step in range(most)]
    return found
