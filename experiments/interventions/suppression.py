"""Sources and expressions suppressed, chosen by rule: how far, at what price, against rivals.

    python experiments/interventions/suppression.py --corpus=pydoc       # an hour each on one core
    python experiments/interventions/suppression.py --corpus=books

Sources: the three of each corpus with the most held-out text of those with training text; a model
is really trained without each. Expressions: three of each corpus. suppress.py finds the edit on
training text and one half of the held-out text; all sides are compared on the other half. Rivals
have the edit's data, objective, steps and lambda, and are read at the strength of equal effect:

    probe      z + relu(q.z - c) u       the same direction, gated by a linear probe
    direction  z + u                     constant
    bias       logits + beta             constant
    ban        no token v with b_v >= 0.5
    LEACE      z without the linear trace of the behavior (arXiv 2306.03819)
    random     the edit on random prototypes, the same number
    finetune   all weights, windows of the same text

relearned: steps of AdamW on the source's text until its held-out loss is what it was. sampled: the
share of continuations that naive Bayes over tokens gives to the source, matches of an expression.
explained: the share of the 16 largest detectors among whose five commonest sources is the source,
or whose six strongest tokens have a match within 32 tokens; and of random prototypes.
"""
import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tools import read_results, save_results, trained_on  # noqa: E402

import suppress  # noqa: E402
from common import Run, load_checkpoint, load_documents, load_gains  # noqa: E402
from common import parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402
from suppress import descend, edited, effect, measure  # noqa: E402

EXPRESSIONS = {"pydoc": (">>>", "(?i)deprecat", "(?i)thread|process"),
               "books": (r"(?<!\w)'|'(?!\w)", "!", r"(?i)\b(sea|ship|boat|whale)s?\b")}
TEXTS, NEW = 512, 64   # continuations, and tokens of each


@dataclass
class SuppressionConfig:
    corpus: str = "pydoc"      # pydoc or books
    out_dir: str = ""          # the run; empty: out for pydoc, out-books for the books
    only: str = ""             # one source or expression; empty: all six
    size: int = 256            # prototypes that may detect
    tokens: int = 200000       # training tokens to learn from
    texts: int = TEXTS         # continuations per side
    finetune: int = 60         # steps of the finetuning rival; 0 leaves it out
    price: float = 0.3         # of sources, percent; expressions have 0.5
    work: str = "out-without"  # models trained without a source
    out: str = ""              # the result; empty: results/suppression-CORPUS.json


def largest_sources(run, n=3):
    """Those with the most held-out text, of the ones that have training text."""
    start, _, sources = load_documents(run.folder, "val", len(run.val))
    size = {}
    for name, length in zip(sources, np.diff([*start, len(run.val)])):
        size[name] = size.get(name, 0) + length
    return [x for x in sorted(size, key=lambda x: -size[x]) if x in run.sources][:n]


# ------------------------------------------- rivals: functions of States to logits, by strength
def constant(model, s, lam, kind):
    W = model.W
    v = torch.zeros(len(W) if kind == "bias" else W.size(1), requires_grad=True)

    def change(some, x=1.0):
        return some.z @ W.T + x * v if kind == "bias" else (some.z + x * v) @ W.T
    descend(model, s, change, [{"params": [v], "lr": 0.05}], lam)
    return change


def probe(model, s, lam):
    on, off = s.z[s.target].mean(0), s.z[~s.target].mean(0)
    q = (on - off) / (on - off).square().sum()                    # q.z differs by 1
    c = (q @ off)[None]
    u = F.normalize(off - on, dim=0)
    groups = [{"params": [x.requires_grad_()], "lr": lr} for x, lr in ((q, 1e-3), (c, 0.02), (u, 0.05))]

    def change(some, x=1.0):
        return (some.z + x * (some.z @ q - c).relu()[:, None] * u) @ model.W.T
    descend(model, s, change, groups, lam)
    return change


def leace(model, s):
    """z - x A (z - mean): A is the oblique projection onto the whitened difference of means."""
    z = s.z.double()
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    root = values.clamp(min=1e-6 * values.max()).sqrt()
    delta = vectors.T @ (z[s.target].mean(0) - mean) / root
    delta = delta / delta.norm()
    A = (vectors * root) @ torch.outer(delta, delta) @ (vectors / root).T

    def change(some, x=1.0):
        return (some.z - x * (some.z - mean.float()) @ A.T.float()) @ model.W.T
    return change


def reached(e, is_text):
    return e["rise"][0] if is_text else -e["rate"][0]


def at_equal_effect(model, s, b, before, change, goal, T, is_text):
    """Bisection from 1/16 to 16 -> effect at the least strength that reaches the goal, or at most"""
    low, high, best = -4.0, 4.0, None
    for _ in range(6):
        middle = (low + high) / 2
        x = 2 ** middle
        e = effect(s, b, before, measure(model, s, b, lambda some: change(some, x)), T)
        if reached(e, is_text) >= goal:
            high, best = middle, e | {"reached": True}
        else:
            low = middle
            best = best or e | {"reached": False}
            best = best if best["reached"] else e | {"reached": False}
    return best


# ------------------------------------------- whole models: finetuned, relearned
def windows_of(text, T, where):
    """Marked text -> the windows (n, T + 1) with targets (where) or without, as tokens."""
    n = (len(text.tokens) - 1) // T
    has = text.target[:n * T].view(n, T).any(1)
    at = (has if where else ~has).nonzero() * T + torch.arange(T + 1)
    return text.tokens[at]


def finetuned(run, text, lam, steps):
    """All weights, by the edit's objective on windows with and without targets -> model"""
    model = copy.deepcopy(run.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1)
    on, off = windows_of(text, run.T, True), windows_of(text, run.T, False)
    for step in range(steps):
        rows = torch.cat((on[torch.randint(len(on), (2,), generator=rng)],
                          off[torch.randint(len(off), (6,), generator=rng)]))
        with torch.no_grad():
            before = (run.model.hidden(rows[:, :-1]) @ run.model.W.T).log_softmax(-1)
        after = (model.hidden(rows[:, :-1]) @ model.W.T).log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)[2:].mean()
        y = rows[:2, 1:, None]
        share = after[:2].gather(2, y).exp().sum() / before[:2].gather(2, y).exp().sum()
        optimizer.zero_grad()
        (kl + lam * share).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def window_loss(model, rows, gains=None):
    parts = [F.cross_entropy(model.logits(model.hidden(x[:, :-1]), gains).flatten(0, 1),
                             x[:, 1:].flatten()) * len(x) for x in rows.split(32)]
    return (sum(parts) / len(rows)).item()


def relearned(model, rows, held_out, goal, gains=None, most=100):
    """Steps of AdamW on windows of the source until the loss of held-out ones is the goal"""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1)
    for step in range(0, most, 5):
        if window_loss(model, held_out, gains) <= goal:
            return step
        for _ in range(5):
            x = rows[torch.randint(len(rows), (8,), generator=rng)]
            _, loss = model(x[:, :-1], x[:, 1:], gains)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return most


# ------------------------------------------- sampled text, and what the detectors are
def bayes(text, V):
    """Marked training text -> (V,) log odds of each token, source against other text"""
    counts = [torch.bincount(text.tokens[keep], minlength=V) + 0.5
              for keep in (text.target, ~text.target)]
    return (counts[0] / counts[0].sum()).log() - (counts[1] / counts[1].sum()).log()


def given_to_source(run, odds, idx, gains):
    """-> the share of the continuations of idx (n, L) whose tokens have log odds above 0"""
    hits = []
    for i, rows in enumerate(idx.split(128)):
        new = run.model.generate(rows, NEW, seed=i, gains=gains, n_vocab=run.tokenizer.n_vocab)
        hits.append(odds[new[:, rows.size(1):]].sum(1) > 0)
    return torch.cat(hits).float().mean().item()


def sampled(cfg, run, find, edit, text, val):
    """-> {beginnings: [before, after]}: shares of a source; matches per 1,000 tokens"""
    windows = torch.arange((len(val.tokens) - 1) // run.T)[1::2]
    has = val.target[windows[:, None] * run.T + torch.arange(run.T)].float().mean(1) > 0.5
    rng, result = torch.Generator().manual_seed(5), {}
    places = {"neutral": windows[~has] if find.source else windows}
    if find.source:
        places["own"] = windows[has]
        odds = bayes(text, len(run.model.W))
        rows = val.tokens[windows[:, None] * run.T + torch.arange(NEW)]
        result["classifier"] = ((odds[rows].sum(1) > 0) == has).float().mean().item()
    for name, at in places.items():
        drawn = at[torch.randint(len(at), (cfg.texts,), generator=rng)]
        offset = torch.randint(run.T - 16, (cfg.texts, 1), generator=rng)
        idx = val.tokens[drawn[:, None] * run.T + offset + torch.arange(16)]
        if find.source:
            result[name] = [given_to_source(run, odds, idx, g) for g in (None, edit)]
            continue
        result[name] = []
        for gains in (None, edit):
            found = suppress.samples(run, idx, find.behavior, NEW, 1.0, 1, gains)
            result[name].append(1000 * sum(n for n, _ in found) / (cfg.texts * NEW))
    return result


def explained(run, find, edit, text):
    """-> shares of the 16 largest detectors and of 64 random prototypes that show the behavior"""
    windows = suppress.draw_windows(text, run.T, 500, False, 3)
    s = suppress.load_states(run, text, windows)
    position = (windows[:, None] * run.T + 1 + torch.arange(run.T)).flatten().numpy()
    document = np.searchsorted(run.doc_start, position, side="right") - 1
    source = torch.from_numpy(run.doc_source[document])
    rng = torch.Generator().manual_seed(7)
    order = edit.w.sum(0).argsort(descending=True)[:16]
    others = torch.randperm(len(run.model.prototypes), generator=rng)[:64]
    shares = []
    for chosen in (order, others):
        shown = []
        for i in chosen.tolist():
            gate = (s.gates * (s.ids == i)).sum(1)
            if find.source:
                counts = torch.bincount(source[gate > 0], minlength=len(run.sources))
                five = counts.topk(min(5, len(counts))).indices.tolist()
                shown.append(find.source in run.sources[five])
            else:
                shown.append(bool((~s.far[gate.topk(6).indices]).all()))
        shares.append(float(np.mean(shown)))
    return shares


# ------------------------------------------- one behavior, all sides
@torch.no_grad()
def measure_model(run, other, b, text, windows):
    """suppress.measure() of another model's logits, on windows of Marked text -> (3, N)"""
    parts = []
    for at in windows.split(32):
        rows = text.tokens[at[:, None] * run.T + torch.arange(run.T + 1)]
        before, after = [(m.hidden(rows[:, :-1]) @ m.W.T).log_softmax(-1).flatten(0, 1)
                         for m in (run.model, other)]
        loss = -after.gather(1, rows[:, 1:].reshape(-1, 1))[:, 0]
        kl = (before.exp() * (before - after)).sum(1)
        parts.append(torch.stack((loss, after.exp() @ b, kl)))
    return torch.cat(parts, 1)


def rivals_of(model, s, lam, n):
    """-> {name: function of States and strength to logits}"""
    rng = torch.Generator().manual_seed(2)
    others = torch.randperm(len(model.prototypes), generator=rng)[:n]
    random = suppress.fit(model, s, others, "direction", lam)
    return {"random": lambda some, x: edited(model, random, x)(some),
            "probe": probe(model, s, lam),
            "direction": constant(model, s, lam, "direction"),
            "bias": constant(model, s, lam, "bias"),
            "LEACE": leace(model, s)}


def study(cfg, run, find):
    """A FindConfig -> the figures of all sides (dict)"""
    model, T, is_text = run.model, run.T, not find.behavior
    suppress.find([f"--{name}={value}" for name, value in asdict(find).items()])
    path = run.out_dir / "gains" / f"{find.name}.json"
    facts, edit = read_results(path), load_gains(path, model)
    lam, n = facts["lam"], int(edit.w.any(0).sum())
    b, train, _, test = suppress.behavior_states(run, find)
    text, val = suppress.mark(run, find, "train"), suppress.mark(run, find, "val")
    windows = suppress.draw_windows(val, T, 256, is_text, find.seed, slice(1, None, 2))
    before = measure(model, test, b)

    def judged(after):
        return effect(test, b, before, after, T)
    sides = {"edit": judged(measure(model, test, b, edited(model, edit)))}
    print(f"edit: {suppress.shown(sides['edit'])}", flush=True)
    goal = reached(sides["edit"], is_text)
    for name, change in rivals_of(model, train, lam, n).items():
        sides[name] = at_equal_effect(model, test, b, before, change, goal, T, is_text)
        print(f"{name}: {sides[name]}", flush=True)
    result = dict(sides=sides, prototypes=n, lam=lam, tuning=facts["tuning"])
    if cfg.finetune:
        tuned = finetuned(run, text, lam, cfg.finetune)
        sides["finetune"] = judged(measure_model(run, tuned, b, val, windows))
    if is_text:
        keep = np.array(run.source_of) != find.source
        without, _ = load_checkpoint(trained_on(run, keep, cfg.work, 1, []))
        without.requires_grad_(False)
        sides["retrained"] = judged(measure_model(run, without, b, val, windows))
        rows, held_out = windows_of(text, T, True), windows_of(val, T, True)[:64]
        untouched = window_loss(model, held_out)
        models = {"edit": (model, edit), "retrained": (without, None)}
        if cfg.finetune:
            models["finetune"] = (tuned, None)
        result["relearned"] = {name: relearned(m, rows, held_out, untouched, gains)
                               for name, (m, gains) in models.items()}
    else:
        ban = measure(model, test, b, lambda some: some.z @ model.W.T - 30.0 * (b >= 0.5))
        sides["ban"] = judged(ban)
    result["sampled"] = sampled(cfg, run, find, edit, text, val)
    result["explained"] = explained(run, find, edit, text)
    print({key: result[key] for key in ("relearned", "sampled", "explained") if key in result})
    return result


def main(argv):
    cfg = parse_config(SuppressionConfig, argv)
    if cfg.corpus not in EXPRESSIONS:
        raise UserError(f"corpus={cfg.corpus}, expected pydoc or books")
    run = Run(cfg.out_dir or {"pydoc": "out", "books": "out-books"}[cfg.corpus], "cpu")
    out = cfg.out or f"experiments/results/suppression-{cfg.corpus}.json"
    common = dict(out_dir=str(run.out_dir), tokens=cfg.tokens, size=cfg.size, device="cpu")
    found = read_results(out)
    kept = found.get("studies", {}) if found.get("checkpoint") == run.hash else {}
    for i, name in enumerate([*largest_sources(run), *EXPRESSIONS[cfg.corpus]]):
        if name in kept or cfg.only not in ("", name):
            continue
        print(f"--- {name}", flush=True)
        is_text = name in run.sources
        what = dict(source=name, price=cfg.price) if is_text else dict(behavior=name)
        kept[name] = study(cfg, run, suppress.FindConfig(name=f"study-{i}", **what, **common))
        save_results(out, dict(options=asdict(cfg), checkpoint=run.hash, studies=kept))
    print(f"{out}: {len(kept)} behaviors")


if __name__ == "__main__":
    run_main(main)
