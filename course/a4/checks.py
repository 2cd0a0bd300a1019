"""What A4 asks of suppress.py: each check returns arrays."""
import re
from types import SimpleNamespace

import numpy as np
import torch
from inputs import integers, model_of, normal


def states_of(m, rng, N=192):
    """Prototypes 0 to 5 anywhere, 0 and 1 most at targets; 6 at all of them and nowhere else"""
    target, free, far = torch.from_numpy(rng.random((3, N)) < [[0.3], [0.8], [0.6]])
    ids = torch.from_numpy(np.argsort(rng.random((N, 6)), axis=1)[:, :3].copy())
    gates = normal(rng, N, 3).relu() * (1 + 3 * (target[:, None] & (ids < 2)))
    ids = torch.cat((ids, torch.full((N, 1), 6)), 1)
    gates = torch.cat((gates, 0.5 * target[:, None]), 1)
    z, free = normal(rng, N, 6) + target[:, None] * normal(rng, 6), free & ~target
    return m.suppress.States(z, ids, gates, integers(rng, 11, N), target, free, free & far)


def onsets(m, rng):
    words = [b"a", b"b", b"ca", b"bab", "ö".encode(), b"\xc3", b"\xb6", b"\xff", b"\0", b"-"]
    word, tokens = words.__getitem__, np.append(rng.integers(0, 10, 300), 9)
    tokenizer = SimpleNamespace(n_vocab=10, eot_token=3, decode_single_token_bytes=word)
    pieces = m.suppress.token_bytes(tokenizer, 12)
    found = {"lengths": [len(b) for b in pieces], "bytes": [*b"".join(pieces)]}
    for pattern in "ab+a?", "ö.|b*", "[^a]a.":                    # b* matches nothing, too
        pair = m.suppress.marks(tokens, re.compile(pattern), words)
        found[pattern] = np.stack(pair)                           # carried, onset
    return found


def windows(m, rng):
    target, seed = torch.from_numpy(rng.random(2000) < 0.1), int(rng.integers(99))
    text = m.suppress.Marked(torch.arange(2000), target, target)
    found = {"all": m.suppress.draw_windows(text, 5, 999, False, seed)}
    for n, balanced, first in (61, True, 0), (180, True, 1), (50, False, 1):
        part = slice(first, None, 2)
        found[f"{n}"] = m.suppress.draw_windows(text, 5, n, balanced, seed + n, part)
    return found


def ranking(m, rng):
    s = states_of(m, rng)
    order, cubes = m.suppress.rank_prototypes(s, 8), m.suppress.mean_gates(s, s.free, 8, 3)
    return {"cubes": cubes, "rank": order[[0, 1, 2, 3, 4, 5, 7]], "steady": order[6]}


def strength(m, rng):
    s, p, parts = states_of(m, rng), normal(rng, 8, 6), (8, (2, 8), 2, (2, 6))
    edit = m.suppress.Edit(*(normal(rng, *np.atleast_1d(shape)) for shape in parts))
    half, twice = m.suppress.scaled(edit, 0.5), m.suppress.scaled(edit, 2.0)
    return {f"{e is twice}": e.apply(s.z, s.ids, s.gates, p) for e in (half, twice)}


def figures(m, rng):
    (before, after), b = normal(rng, 2, 40, 11).log_softmax(2), normal(rng, 11).relu()
    loss, rate, kl = m.suppress.figures(before, after, integers(rng, 11, 40), b)
    return {"loss": loss, "rate": rate, "kl": kl}


def bootstrap(m, rng):
    a, b, rare, seed = rng.random(30), rng.random(30) + 0.2, np.arange(5) < 2, rng.integers(99)
    return {"plain": m.suppress.interval(a, b), "rare": m.suppress.interval(a[:5] * rare, 1 * rare),
            "signed": m.suppress.interval(a - 0.5, b, int(seed), 300)}


def price(m, rng):
    s, b, first = states_of(m, rng), torch.arange(11) % 2 / 4, torch.arange(192)
    before, change = normal(rng, 2, 3, 192).abs() + 0.1
    rare = s._replace(target=first < 20, far=first < 19)          # 20 are enough, 19 are not
    text = before * torch.tensor([[1.0], [0.0], [1.0]])           # no behavior: no rate
    found = m.suppress.effect(s, b, before, before + change, 12)
    more = m.suppress.effect(rare, 0 * b, text, text * change, 12)
    return found | {f"{name} of text": e for name, e in more.items()}


def objective(m, rng):
    before, after = normal(rng, 2, 40, 11).log_softmax(2)
    value = m.suppress.objective(before, after.requires_grad_(), integers(rng, 11, 9), 0.3)
    return {"value": value, "gradient": torch.autograd.grad(value, after)[0]}


def fit(m, rng):
    import prism
    model, s, found = model_of(prism, rng, n_proto=8).requires_grad_(False), states_of(m, rng), {}
    lam, seed, steps = float(rng.random()), int(rng.integers(11)), 0

    def descend(model, s, change, groups, lam, seed=0):
        """Plain descent on something else: the check of fit needs no objective"""
        optimizer = torch.optim.SGD(groups)
        for _ in range(steps):
            optimizer.zero_grad()
            (lam * change(s).log_softmax(1)[:, seed].mean()).backward()
            optimizer.step()
    m.suppress.descend = descend
    for mode, steps in ("direction", 0), ("direction", 3), ("gains", 3):
        edit = m.suppress.fit(model, s, torch.tensor([1, 6, 0, 3]), mode, lam, seed)
        found[f"{mode}, {steps} steps"] = edit.apply(s.z, s.ids, s.gates, model.prototypes)
        if mode == "direction":
            found |= {f"{name}, {steps}": part for name, part in edit._asdict().items()}
    return found


def search(m, rng):
    def effect(s, b, slopes, strength, T):
        """Upper ends that grow with the strength; the value is half of them"""
        return {name: strength * x / np.array([2, 9, 1]) for name, x in slopes.items()}
    m.suppress.edited = lambda model, edit, strength=1.0: strength
    m.suppress.measure = lambda model, s, b, change=None: change
    m.suppress.effect, found = effect, []
    cfg, none = m.suppress.FindConfig(price=1.0, kl=1.0), (0.0, {"loss": (0, 0, 0)})
    for row in (9, 1, 1), (1, 9, 1), (1, 1, 9), (9,), (1e9, 1, 1), (1e-9, 1e-9, 1e-9):
        slopes = dict(zip(("loss", "benign", "kl"), np.array(row) * (0.1 + rng.random())))
        strength, e = m.suppress.strongest(None, None, None, slopes, None, cfg, 8) or none
        found.append([strength, *e["loss"]])
    return {"strength": found}


def control(m, rng):
    used, w, g = rng.permutation(20)[:7], torch.zeros(2, 20), torch.ones(20)
    w[0, used[:2]], w[1, used[2:4]], g[used[4:]] = 0.3, -0.3, 0.5
    edit = m.suppress.Edit(g, w, torch.zeros(2), torch.ones(2, 6))
    return {f"{seed}": m.suppress.other_prototypes(edit, seed).sort().values for seed in (1, 2)}
