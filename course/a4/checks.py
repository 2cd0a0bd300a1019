"""What A4 asks of suppress.py: each check returns arrays."""
import re
from types import SimpleNamespace

import torch
from inputs import integers, model_of, normal


def states_of(m, rng):
    """192 tokens, a third of them targets, where gates are larger"""
    target = normal(rng, 192) > 0.5
    free = ~target & (normal(rng, 192) < 1)
    far = free & (normal(rng, 192) < 0.5)
    ids = normal(rng, 192, 8).argsort()[:, :3]
    gates = normal(rng, 192, 3).relu() + target[:, None]
    y = integers(rng, 11, 192)
    z = normal(rng, 192, 6)
    return m.suppress.States(z, ids, gates, y, target, free, far)


def onsets(m, rng):
    words = [b"a", b"ba", "ö".encode(), b"\xc3", b"\xb6", b"-"]       # ö in one token, or in two
    tokenizer = SimpleNamespace(n_vocab=6, eot_token=5)
    tokenizer.decode_single_token_bytes = words.__getitem__
    pieces = m.suppress.token_bytes(tokenizer, 7)
    pattern = re.compile("ab|ö.|\0|c*")                  # c* matches nothing, which does not count
    tokens = rng.integers(0, 7, 300)
    carried, onset = m.suppress.marks(tokens, pattern, pieces)
    return {"carried": carried, "onset": onset}


def windows(m, rng):
    target = normal(rng, 2000) > 1.3
    text = m.suppress.Marked(torch.arange(2000), target, target)
    seed = int(rng.integers(99))
    odd = slice(1, None, 2)
    half = m.suppress.draw_windows(text, 5, 61, True, seed, odd)
    every = m.suppress.draw_windows(text, 5, 999, False, seed)
    return {"half with targets": half, "all": every}


def ranking(m, rng):
    s = states_of(m, rng)
    cubes = m.suppress.mean_gates(s, s.free, 8, 3)
    rank = m.suppress.rank_prototypes(s, 8)
    return {"cubes": cubes, "rank": rank}


def strength(m, rng):
    g = normal(rng, 8)
    w = normal(rng, 2, 8)
    c = normal(rng, 2)
    u = normal(rng, 2, 6)
    edit = m.suppress.Edit(g, w, c, u)
    return m.suppress.scaled(edit, 0.3)._asdict()


def figures(m, rng):
    before, after = normal(rng, 2, 40, 11).log_softmax(2)
    b = normal(rng, 11).abs()
    y = integers(rng, 11, 40)
    loss, rate, kl = m.suppress.figures(before, after, y, b)
    return {"loss": loss, "rate": rate, "kl": kl}


def bootstrap(m, rng):
    a = rng.random(30) - 0.2
    b = rng.random(30)
    return {"default": m.suppress.interval(a, b),
            "300 draws": m.suppress.interval(a, b, 7, 300)}


def price(m, rng):
    s = states_of(m, rng)
    b = torch.arange(11) % 2 / 4
    before = 0.1 + normal(rng, 3, 192).abs()
    after = 0.1 + normal(rng, 3, 192).abs()
    return m.suppress.effect(s, b, before, after, 12)


def objective(m, rng):
    before, after = normal(rng, 2, 40, 11).log_softmax(2)
    after.requires_grad_()
    y = integers(rng, 11, 9)
    value = m.suppress.objective(before, after, y, 0.3)
    value.backward()
    return {"value": value, "gradient": after.grad}


def fit(m, rng):
    import prism                                         # that of the release
    model = model_of(prism, rng, n_proto=8).requires_grad_(False)
    s = states_of(m, rng)
    ids = torch.tensor([1, 6, 0, 3])

    def descend(model, s, change, groups, lam, seed=0):
        """Stands in for the real one: a step of plain descent on something else"""
        loss = lam * change(s)[:, seed].mean()
        loss.backward()
        torch.optim.SGD(groups).step()
    m.suppress.descend = descend
    direction = m.suppress.fit(model, s, ids, "direction", 0.3, 5)
    gains = m.suppress.fit(model, s, ids, "gains", 0.3, 5)
    states = gains.apply(s.z, s.ids, s.gates, model.prototypes)
    return direction._asdict() | {"states by gains": states}


def search(m, rng):
    def effect(s, b, slopes, strength, T):
        """Stands in for yours: an upper end is a strength times a slope, the value half of it"""
        found = {}
        for name, slope in slopes.items():
            end = slope * strength
            found[name] = end / 2, 0, end
        return found
    m.suppress.effect = effect
    m.suppress.edited = lambda model, edit, strength=1.0: strength
    m.suppress.measure = lambda model, s, b, change=None: change
    cfg = m.suppress.FindConfig(price=1.0, kl=1.0)
    strengths = {}
    for largest in "loss", "benign", "kl":
        slopes = dict.fromkeys(["loss", "benign", "kl"], 0.2 + rng.random())
        slopes[largest] *= 3
        strengths[largest], _ = m.suppress.strongest(None, None, None, slopes, None, cfg, 8)
    return strengths


def control(m, rng):
    used = rng.permutation(20)[:7]
    w = torch.zeros(1, 20)
    w[0, used[:4]] = -0.3
    g = torch.ones(20)
    g[used[4:]] = 0.5
    edit = m.suppress.Edit(g, w, torch.zeros(1), torch.ones(1, 6))
    ids = m.suppress.other_prototypes(edit, 2)
    return {"ids": ids.sort().values}
