"""What A2 asks of prism.py, train.py and common.py: each check returns arrays."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from inputs import integers, model_of, normal


def targets_of(rng, most, *shape):
    """Tokens below most; a quarter of them is -1, to be ignored"""
    return torch.where(normal(rng, *shape) < -0.7, -1, integers(rng, most, *shape))


def total_ce(z, w, y):
    """Stands in for your LinearCrossEntropy"""
    return F.cross_entropy(z @ w.T, y, ignore_index=-1, reduction="sum")


def batch_of(m, rng, n_proto=7):
    """A model, three windows and their targets"""
    m.prism.LinearCrossEntropy = SimpleNamespace(apply=total_ce)
    lambdas = dict(lambda_rec=0.7, lambda_t2p=0.3, lambda_p2t=0.2)
    model = model_of(m.prism, rng, n_proto=n_proto, **lambdas)
    return model, integers(rng, 11, 3, 8), targets_of(rng, 11, 3, 8)


def by_hand(m, rng):
    z = normal(rng, 300, 3).requires_grad_()             # chunks of 128, 128 and 44 tokens
    w = normal(rng, 2 ** 13, 3).requires_grad_()
    y = targets_of(rng, 64, 300)
    total = m.prism.LinearCrossEntropy.apply(z, w, y)
    (3 * total).backward()
    return {"total": total, "dz": z.grad, "dw": w.grad[:64]}


def losses(m, rng):
    model, idx, y = batch_of(m, rng)
    g = normal(rng, 7)
    found = {}
    found["logits"], found["loss with gains"] = model(idx, y, g)
    found["last logits"], _ = model(idx, gains=g)
    _, found["terms"] = model(idx, y, return_terms=True)
    model.train()
    found["loss in training"], found["terms in training"] = model(idx, y, return_terms=True)
    twin, idx, y = batch_of(m, rng, n_proto=0)
    _, found["terms of the twin"] = twin(idx, y, return_terms=True)
    return found


def loss_gradient(m, rng):
    model, idx, y = batch_of(m, rng)
    _, loss = model.train()(idx, y)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def reading(m, rng):
    tokens = rng.integers(0, 11, 30, dtype="uint16")
    windows = m.train.Windows(tokens, 4, 5, 11, "")
    idx, targets = windows.read([0, 13, 25, 26, 28])
    return {"idx": idx, "targets": targets}


def sequence(m, rng):
    windows = m.train.Windows(range(30), 4, 5, 11, "")
    table = rng.permutation(60).reshape(10, 6)
    windows.starts = lambda epoch: table[epoch]
    windows.read = lambda starts: (list(starts), None)
    return {"starts": windows.train(4, 20)[0]}


def order(m, rng):
    seed = int(rng.integers(2 ** 31))
    starts = m.common.window_starts
    return {f"epoch {epoch}": starts(1603, 32, seed, epoch) for epoch in (0, 1, 7)}


def evaluation(m, rng):
    idx = integers(rng, 11, 60, 8)
    y = targets_of(rng, 11, 60, 8)
    windows = SimpleNamespace(T=8, tokens=range(60))
    windows.read = lambda starts: (idx[list(starts)], y[list(starts)])
    m.train.LinearCrossEntropy = SimpleNamespace(apply=total_ce)
    m.train.dist = SimpleNamespace(all_reduce=lambda sums: None)  # the other rank read nothing
    cfg = m.train.TrainConfig(batch_size=2, eval_tokens=50)
    autocast = torch.autocast("cpu", enabled=False)
    found = {}
    for n_proto, rank, ranks in (30, 1, 2), (0, 0, 1):
        model = model_of(m.prism, rng, n_proto=n_proto, dropout=0.2).train()
        result = m.train.evaluate(model, windows, cfg, rank, ranks, torch.device("cpu"), autocast)
        for name, value in result.items():
            found[f"{name}, {n_proto} prototypes"] = value
        found[f"training, {n_proto} prototypes"] = model.training
    return found


def orthogonal(m, rng):
    wide = m.train.orthogonal(normal(rng, 3, 4), torch.float64)
    tall = m.train.orthogonal(normal(rng, 5, 4), torch.float64)
    return {"wide": wide, "tall": tall}


def muon(m, rng):
    m.train.orthogonal = lambda g, dtype: g.tanh()       # stands in for yours
    p = torch.nn.Parameter(normal(rng, 3, 5))
    group = dict(params=[p], lr=0.3, weight_decay=0.2, momentum=0.8)
    optimizer = m.train.Muon([group], torch.float64)
    for _ in range(3):
        p.grad = normal(rng, 3, 5)
        optimizer.step()
    return {"p": p}


def optimizers(m, rng):
    names = "weight_decay", "embed_lr_scale", "proto_lr_scale"
    values = dict(zip(names, rng.random(3)))
    found = {}
    for muon in True, False:
        model = model_of(m.prism, rng)
        cfg = m.train.TrainConfig(n_proto=7, muon=muon, **values)
        rows = {}
        for optimizer in m.train.make_optimizers(model, cfg, torch.float64):
            for group in optimizer.param_groups:         # Muon's have no betas
                row = group["scale"], group["weight_decay"], *group.get("betas", (0, 0))
                rows |= dict.fromkeys(group["params"], row)
        found[f"muon {muon}"] = [rows[p] for p in model.parameters()]
    return found


def schedule(m, rng):
    cfg = m.train.TrainConfig(max_iters=24, learning_rate=rng.random())
    found = {}
    for cfg.warmup_iters, cfg.decay in (7, 0.6), (20, 0.9), (0, 0.0):
        rates = [m.train.learning_rate(step, cfg) for step in range(24)]
        found[f"{cfg.warmup_iters}, {cfg.decay}"] = rates
    return found
