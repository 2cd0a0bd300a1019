"""What A2 asks of prism.py, train.py and common.py: each check returns arrays."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from inputs import integers, model_of, normal


def targets_of(rng, most, *shape):
    y = integers(rng, most, *shape)
    y[normal(rng, *shape) < 0] = -1                      # half of them are to be ignored
    return y


def total_ce(z, w, y):                                   # stands in for your LinearCrossEntropy
    return F.cross_entropy(z @ w.T, y, ignore_index=-1, reduction="sum")


def batch_of(m, rng):
    """A model, three windows and their targets"""
    m.prism.LinearCrossEntropy = SimpleNamespace(apply=total_ce)
    idx = integers(rng, 11, 3, 8)
    return model_of(m.prism, rng), idx, targets_of(rng, 11, 3, 8)


def by_hand(m, rng):
    z = normal(rng, 300, 3).requires_grad_()             # chunks of 128, 128 and 44 tokens
    w = normal(rng, 8192, 3).requires_grad_()
    y = targets_of(rng, 64, 300)
    total = m.prism.LinearCrossEntropy.apply(z, w, y)
    (3 * total).backward()
    return {"total": total, "dz": z.grad, "dw": w.grad[:64]}


def losses(m, rng):
    model, idx, y = batch_of(m, rng)
    g = normal(rng, 7)
    logits, loss = model(idx, y, g)
    last, _ = model(idx, gains=g)
    _, terms = model(idx, y, return_terms=True)
    _, training = model.train()(idx, y, return_terms=True)
    return {"logits": logits,
            "loss": loss,
            "last logits": last,
            "terms": terms,
            "terms in training": training}


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
    train = m.train
    train.LinearCrossEntropy = SimpleNamespace(apply=total_ce)
    train.dist = SimpleNamespace(all_reduce=lambda sums: None)    # the other rank read nothing
    cfg = train.TrainConfig(batch_size=2)
    cpu = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    model = model_of(m.prism, rng, n_proto=30, dropout=0.2).train()
    found = train.evaluate(model, windows, cfg, 0, 1, *cpu)
    cfg.eval_tokens = 50
    twin = model_of(m.prism, rng, n_proto=0)
    part = train.evaluate(twin, windows, cfg, 1, 2, *cpu)
    return found | {"twin, second rank": part["val_ce"],
                    "in training mode": model.training}


def orthogonal(m, rng):
    return {f"{rows} x 4": m.train.orthogonal(normal(rng, rows, 4), torch.float64)
            for rows in (3, 5)}


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
    found = {}
    for muon in True, False:
        model = model_of(m.prism, rng)
        cfg = m.train.TrainConfig(muon=muon)
        cfg.embed_lr_scale = rng.random()
        cfg.proto_lr_scale = rng.random()
        rows = {}
        for optimizer in m.train.make_optimizers(model, cfg, torch.float64):
            for group in optimizer.param_groups:
                betas = group.get("betas", (0, 0))       # Muon has none
                row = [group["scale"], group["weight_decay"], *betas]
                rows |= dict.fromkeys(group["params"], row)
        found[f"muon {muon}"] = [rows[p] for p in model.parameters()]
    return found


def schedule(m, rng):
    found = {}
    for warmup, decay in (7, 0.6), (20, 0.9), (0, 0.0):
        cfg = m.train.TrainConfig(max_iters=24, warmup_iters=warmup, decay=decay)
        cfg.learning_rate = rng.random()
        found[f"warm-up {warmup}"] = [m.train.learning_rate(step, cfg) for step in range(24)]
    return found
