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
import functools
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
from suppress import descend, edited, effect, figures, measure, objective  # noqa: E402

EXPRESSIONS = {"pydoc": (">>>", "(?i)deprecat", "(?i)thread|process"),
               "books": (r"(?<!\w)'|'(?!\w)", "!", r"(?i)\b(sea|ship|boat|whale)s?\b")}
NEW = 64   # tokens of a continuation


@dataclass
class SuppressionConfig:
    corpus: str = "pydoc"      # pydoc or books
    out_dir: str = ""          # the run; empty: out for pydoc, out-books for the books
    only: str = ""             # one source or expression; empty: all six
    size: int = 256            # prototypes that may detect
    tokens: int = 200000       # training tokens to learn from
    texts: int = 512           # continuations per side
    finetune: int = 60         # steps of the finetuning rival; 0 leaves it out
    price: float = 0.3         # of sources, percent; expressions have 0.5
    train: str = ""            # options of train.py for the models trained without a source
    work: str = "out-without"  # these models
    out: str = "experiments/results/suppression-CORPUS.json"  # the result


def largest_sources(run, n=3):
    """Those with the most held-out text, of the ones that have training text."""
    start, _, sources = load_documents(run.folder, "val", len(run.val))
    size = {}
    lengths = np.diff([*start, len(run.val)])
    for name, length in zip(sources, lengths):
        size[name] = size.get(name, 0) + length
    order = sorted(size, key=size.get, reverse=True)
    return [x for x in order if x in run.sources][:n]


def drawn(rows, n, rng):
    return rows[torch.randint(len(rows), (n,), generator=rng)]


def places(windows, T, n):
    """Numbers of windows -> (windows, n) places of their first n tokens"""
    return windows[:, None] * T + torch.arange(n)


def log_pi(model, rows):
    """Windows (n, T + 1) -> (n T, V) log softmax of the logits"""
    z = model.hidden(rows[:, :-1]).flatten(0, 1)
    return (z @ model.W.T).log_softmax(1)


# ------------------------------------------- rivals: functions of States to logits, by strength
def constant_direction(model, s, lam):
    u = torch.zeros(model.W.size(1), requires_grad=True)

    def change(some, x=1.0):
        return (some.z + x * u) @ model.W.T
    descend(model, s, change, [{"params": [u], "lr": 0.05}], lam)
    return change


def constant_bias(model, s, lam):
    beta = torch.zeros(len(model.W), requires_grad=True)

    def change(some, x=1.0):
        return some.z @ model.W.T + x * beta
    descend(model, s, change, [{"params": [beta], "lr": 0.05}], lam)
    return change


def probe(model, s, lam):
    on = s.z[s.target].mean(0)
    off = s.z[~s.target].mean(0)
    gap = on - off
    q = gap / gap.square().sum()                                  # q.z differs by 1
    c = (q @ off)[None]
    u = F.normalize(off - on, dim=0)
    groups = []
    for x, lr in ((q, 1e-3), (c, 0.02), (u, 0.05)):
        groups.append({"params": [x.requires_grad_()], "lr": lr})

    def change(some, x=1.0):
        gate = (some.z @ q - c).relu()
        return (some.z + x * gate[:, None] * u) @ model.W.T
    descend(model, s, change, groups, lam)
    return change


def leace(model, s):
    """z - x A (z - mean): A is the oblique projection onto the whitened difference of means."""
    z = s.z.double()
    mean = z.mean(0)
    centered = z - mean
    covariance = centered.T @ centered / len(z)
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=1e-6 * values.max()).sqrt()
    delta = vectors.T @ (z[s.target].mean(0) - mean) / root
    delta = delta / delta.norm()
    A = (vectors * root) @ torch.outer(delta, delta) @ (vectors / root).T
    A, mean = A.float(), mean.float()

    def change(some, x=1.0):
        traced = (some.z - mean) @ A.T
        return (some.z - x * traced) @ model.W.T
    return change


def reached(e, is_text):
    return e["rise"][0] if is_text else -e["rate"][0]


def at_equal_effect(model, s, b, before, change, goal, T, is_text):
    """Bisection from 1/16 to 16 -> effect at the least strength that reaches the goal; where none
    does, at the last one that was tried"""
    low, high, least = -4.0, 4.0, None
    for _ in range(6):
        middle = (low + high) / 2
        after = measure(model, s, b, functools.partial(change, x=2 ** middle))
        e = effect(s, b, before, after, T)
        if reached(e, is_text) >= goal:
            high, least = middle, e
        else:
            low = middle
    return (least or e) | {"reached": least is not None}


# ------------------------------------------- whole models: finetuned, relearned
def windows_of(text, T, where):
    """Marked text -> the windows (n, T + 1) with targets (where) or without, as tokens."""
    n = (len(text.tokens) - 1) // T
    has = text.target[:n * T].view(n, T).any(1)
    chosen = (has == where).nonzero()[:, 0]
    return text.tokens[places(chosen, T, T + 1)]


def finetuned(run, text, lam, steps):
    """All weights, by the edit's objective on windows with and without targets -> model"""
    model = copy.deepcopy(run.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1)
    on = windows_of(text, run.T, True)
    off = windows_of(text, run.T, False)
    for step in range(steps):
        rows = torch.cat((drawn(on, 2, rng), drawn(off, 6, rng)))
        with torch.no_grad():
            before = log_pi(run.model, rows)
        after = log_pi(model, rows)
        loss = objective(before, after, rows[:2, 1:].flatten(), lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def window_loss(model, rows, gains=None):
    total = 0.0
    for some in rows.split(32):
        logits = model.logits(model.hidden(some[:, :-1]), gains)
        y = some[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), y)
        total += len(some) * loss.item()
    return total / len(rows)


def relearned(model, rows, held_out, goal, gains=None, most=100):
    """Steps of AdamW on windows of the source until the loss of held-out ones is the goal"""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1)
    for step in range(0, most, 5):
        if window_loss(model, held_out, gains) <= goal:
            return step
        for _ in range(5):
            x = drawn(rows, 8, rng)
            _, loss = model(x[:, :-1], x[:, 1:], gains)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return most


# ------------------------------------------- sampled text, and what the detectors are
def bayes(text, V):
    """Marked training text -> (V,) log odds of each token, source against other text"""
    logs = []
    for keep in (text.target, ~text.target):
        count = torch.bincount(text.tokens[keep], minlength=V) + 0.5
        logs.append((count / count.sum()).log())
    return logs[0] - logs[1]


def given_to_source(run, odds, idx, gains):
    """-> the share of the continuations of idx (n, L) whose tokens have log odds above 0"""
    hits = []
    for i, rows in enumerate(idx.split(128)):
        new = run.model.generate(rows, NEW, seed=i, gains=gains, n_vocab=run.tokenizer.n_vocab)
        new = new[:, rows.size(1):]
        hits.append(odds[new].sum(1) > 0)
    return torch.cat(hits).float().mean().item()


def sampled(cfg, run, find, edit, text, val):
    """-> {beginnings: [before, after]}: shares of a source; matches per 1,000 tokens"""
    windows = torch.arange((len(val.tokens) - 1) // run.T)[1::2]
    inside = val.target[places(windows, run.T, run.T)].float()
    has = inside.mean(1) > 0.5
    rng = torch.Generator().manual_seed(5)
    result = {}
    kinds = {"neutral": windows}
    if find.source:
        kinds = {"neutral": windows[~has], "own": windows[has]}
        odds = bayes(text, len(run.model.W))
        rows = val.tokens[places(windows, run.T, NEW)]
        guess = odds[rows].sum(1) > 0
        correct = (guess == has).float()
        result["classifier"] = correct.mean().item()
    for name, at in kinds.items():
        at = drawn(at, cfg.texts, rng)
        offset = torch.randint(run.T - 16, (cfg.texts, 1), generator=rng)
        idx = val.tokens[places(at, run.T, 16) + offset]
        if find.source:
            before = given_to_source(run, odds, idx, None)
            after = given_to_source(run, odds, idx, edit)
            result[name] = [before, after]
            continue
        result[name] = []
        for gains in (None, edit):
            found = suppress.samples(run, idx, find.behavior, NEW, 1.0, 1, gains)
            matches = sum(n for n, _ in found)
            per_thousand = 1000 / (cfg.texts * NEW)
            result[name].append(matches * per_thousand)
    return result


def explained(run, find, edit, text):
    """-> shares of the 16 largest detectors and of 64 random prototypes that show the behavior"""
    windows = suppress.draw_windows(text, run.T, 500, False, 3)
    s = suppress.load_states(run, text, windows)
    position = 1 + places(windows, run.T, run.T).flatten().numpy()
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
                n = min(5, len(counts))
                five = counts.topk(n).indices.tolist()
                shown.append(find.source in run.sources[five])
            else:
                far = s.far[gate.topk(6).indices]
                shown.append(not far.any().item())
        shares.append(float(np.mean(shown)))
    return shares


# ------------------------------------------- one behavior, all sides
@torch.no_grad()
def measure_model(run, other, b, text, windows):
    """suppress.measure() of another model's logits, on windows of Marked text -> (3, N)"""
    parts = []
    for at in windows.split(32):
        rows = text.tokens[places(at, run.T, run.T + 1)]
        y = rows[:, 1:].flatten()
        parts.append(figures(log_pi(run.model, rows), log_pi(other, rows), y, b))
    return torch.cat(parts, 1)


def rivals_of(model, s, lam, n):
    """-> {name: function of States and strength to logits}"""
    rng = torch.Generator().manual_seed(2)
    others = torch.randperm(len(model.prototypes), generator=rng)[:n]
    random = suppress.fit(model, s, others, "direction", lam)
    return {
        "random": lambda some, x: edited(model, random, x)(some),
        "probe": probe(model, s, lam),
        "direction": constant_direction(model, s, lam),
        "bias": constant_bias(model, s, lam),
        "LEACE": leace(model, s),
    }


def study(cfg, run, find):
    """A FindConfig -> the figures of all sides (dict)"""
    model, T, is_text = run.model, run.T, not find.behavior
    words = [f"--{name}={value}" for name, value in asdict(find).items()]
    suppress.find(words)
    path = run.out_dir / "gains" / f"{find.name}.json"
    facts, edit = read_results(path), load_gains(path, model)
    lam = facts["lam"]
    n = int(edit.w.any(0).sum())
    b, train, _, test = suppress.behavior_states(run, find)
    text = suppress.mark(run, find, "train")
    val = suppress.mark(run, find, "val")
    odd = slice(1, None, 2)
    windows = suppress.draw_windows(val, T, 256, is_text, find.seed, odd)
    before = measure(model, test, b)

    def judged(after):
        return effect(test, b, before, after, T)
    after = measure(model, test, b, edited(model, edit))
    sides = {"edit": judged(after)}
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
        out_dir = trained_on(run, keep, cfg.work, 1, cfg.train.split())
        without, _ = load_checkpoint(out_dir)
        without.requires_grad_(False)
        sides["retrained"] = judged(measure_model(run, without, b, val, windows))
        rows = windows_of(text, T, True)
        held_out = windows_of(val, T, True)[:64]
        untouched = window_loss(model, held_out)
        models = {"edit": (model, edit), "retrained": (without, None)}
        if cfg.finetune:
            models["finetune"] = (tuned, None)
        result["relearned"] = {name: relearned(m, rows, held_out, untouched, gains)
                               for name, (m, gains) in models.items()}
    else:
        def ban(some):
            return some.z @ model.W.T - 30.0 * (b >= 0.5)
        sides["ban"] = judged(measure(model, test, b, ban))
    result["sampled"] = sampled(cfg, run, find, edit, text, val)
    result["explained"] = explained(run, find, edit, text)
    print(result["sampled"], result["explained"])
    return result


def main(argv):
    cfg = parse_config(SuppressionConfig, argv)
    if cfg.corpus not in EXPRESSIONS:
        raise UserError(f"corpus={cfg.corpus}, expected pydoc or books")
    default = {"pydoc": "out", "books": "out-books"}[cfg.corpus]
    run = Run(cfg.out_dir or default, "cpu")
    out = cfg.out.replace("CORPUS", cfg.corpus)
    common = dict(out_dir=str(run.out_dir), tokens=cfg.tokens, size=cfg.size, device="cpu")
    found = read_results(out)
    kept = {}
    if found.get("checkpoint") == run.hash:
        kept = found["studies"]
    names = [*largest_sources(run), *EXPRESSIONS[cfg.corpus]]
    for i, name in enumerate(names):
        if name in kept or cfg.only not in ("", name):
            continue
        print(f"--- {name}", flush=True)
        is_text = name in run.sources
        what = dict(source=name, price=cfg.price) if is_text else dict(behavior=name)
        find = suppress.FindConfig(name=f"study-{i}", **what, **common)
        kept[name] = study(cfg, run, find)
        save_results(out, dict(options=asdict(cfg), checkpoint=run.hash, studies=kept))
    print(f"{out}: {len(kept)} behaviors")


if __name__ == "__main__":
    run_main(main)
