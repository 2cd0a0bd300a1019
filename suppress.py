"""Change what a trained model writes, without finetuning: prototypes detect, one direction acts.

    python suppress.py find --behavior='>>>' --name=examples    proposes out/gains/examples.json
    python suppress.py find --source=tkinter --name=tkinter     all text of one source
    python suppress.py apply --gains=out/gains/examples.json    before and after, the same seeds
    python suppress.py sweep --gains=out/gains/examples.json    effect, price and random controls

An edit leaves the trunk alone, so hidden states are computed once. A behavior is an expression or
text: a source, or a file. Its targets are the tokens that hold the first character of a match, or
all tokens of the text.

    direction   z'_t = z_t + relu(sum_i w_i a_ti - c) u      w on the prototypes that detect best
    gains       z'_t = z_t + sum_i (g_i - 1) a_ti p_i        on the same ones
    effect      rise    of the loss of targets, in nats
                rate    mean_t sum_v b_v pi_tv, b_v = targets of token v / occurrences of v
    price       loss    of text without the behavior, rise in percent
                benign  of the tokens v with b_v > 0 there, rise in percent
                KL      (pi_t || pi'_t) on text with none of it within 32 tokens, in nats

`find` takes the strongest edit at a price on half the held-out text; `sweep` measures on the rest.
"""
import difflib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import (Run, load_documents, load_gains, parse_config, plain, reading, run_command,
                    run_main, write_json)
from prism import Edit, UserError, log_softmax_chunks

SIZES, LAMBDAS = (64, 256), (0.03, 0.1)                  # detectors, weights of the effect
STRENGTHS = 0.25, 0.5, 0.75, 1.0, 1.5, 2.0               # of sweep
LEAST = 20                                               # tokens that a figure needs
UNITS = {"rate": "", "rise": " nats", "loss": "%", "benign": "%", "kl": " nats"}


@dataclass
class FindConfig:
    out_dir: str = "out"      # the run
    behavior: str = ""        # a regular expression over text; or instead of it
    source: str = ""          # a source of the dataset: all its text
    texts: str = ""           # two files with a comma between: text with the behavior, and without
    name: str = "behavior"    # the edit is written to out_dir/gains/NAME.json
    mode: str = "direction"   # direction, or gains: the simplest edit
    size: int = 0             # prototypes that may detect; 0 tries 64 and 256
    price: float = 0.5        # most that loss and benign loss may rise, percent, on the tuning half
    kl: float = 0.02          # most nats of KL on unrelated text, on the tuning half
    tokens: int = 200000      # training tokens to learn from
    seed: int = 1             # of the choice of text, and of fitting
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class ApplyConfig:
    out_dir: str = "out"      # the run
    gains: str = ""           # a gains file, or several with commas between
    prompt: str = ""          # text to continue; empty: beginnings of held-out text
    num_samples: int = 3      # continuations shown
    max_new_tokens: int = 60  # length of each
    temperature: float = 0.8  # 0 is greedy
    seed: int = 1337          # one seed, one text
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class SweepConfig:
    out_dir: str = "out"       # the run
    gains: str = ""            # a file that find wrote
    seed: int = 2              # of controls and sampling
    device: str = "auto"       # auto, cpu, cuda or mps


# ------------------------------------------- a behavior in text
def compile_pattern(behavior):
    with reading(f"the pattern {behavior}", "expected a regular expression, as --behavior='>>>'"):
        return re.compile(behavior)


def token_bytes(tokenizer, vocab_size):
    """The bytes of each token, a list; a zero byte for the end of a text, which no word crosses."""
    pieces = [b""] * vocab_size
    for i in range(tokenizer.n_vocab):
        pieces[i] = tokenizer.decode_single_token_bytes(i)
    pieces[tokenizer.eot_token] = b"\0"
    return pieces


def marks(tokens, pattern, pieces):
    """tokens (N,) -> carried (N,), onset (N,): bools, whether a token overlaps a match of
    `pattern` in the text, and whether it holds the first character of one."""
    raw = [pieces[t] for t in tokens]
    owner = np.repeat(np.arange(len(raw)), [len(b) for b in raw])  # token of each byte
    text = b"".join(raw).decode("utf-8", "surrogateescape")
    sizes = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    first_byte = np.cumsum([0] + sizes)                            # of each character
    carried, onset = np.zeros((2, len(raw)), bool)
    for match in pattern.finditer(text):
        start, end = first_byte[list(match.span())]
        if end > start:
            onset[owner[start]] = True
            carried[owner[start]:owner[end - 1] + 1] = True
    return carried, onset


class Marked(NamedTuple):
    """N tokens: which belong to the behavior, and which are its targets."""
    tokens: torch.Tensor   # (N,)
    inside: torch.Tensor   # (N,) bool
    target: torch.Tensor   # (N,) bool


def of_source(run, name, split):
    """-> (N,) bool: the tokens of a split that are of this source"""
    if name not in run.sources:
        near = difflib.get_close_matches(name, run.sources.tolist(), n=1, cutoff=0.0)[0]
        raise UserError(f"source={name} is not in the training text; the nearest is {near}")
    n = len(run.train) if split == "train" else len(run.val)
    start, _, sources = load_documents(run.folder, split, n)
    return np.repeat(np.array(sources) == name, np.diff([*start, n]))


def of_files(run, texts, split):
    """Tokens of both files, first two thirds (train) or last third -> and whether of the first"""
    parts = []
    with reading(f"texts={texts}", "expected two files of text, as --texts=with.txt,without.txt"):
        first, second = texts.split(",")
        for name in (first, second):
            ids = run.tokenizer.encode_ordinary(Path(name).read_text("utf-8"))
            cut = 2 * len(ids) // 3
            parts.append(ids[:cut] if split == "train" else ids[cut:])
    tokens = np.array(parts[0] + parts[1])
    return tokens, np.arange(len(tokens)) < len(parts[0])


def mark(run, cfg, split):
    """The behavior of a FindConfig in the text of a split -> Marked, on the run's device"""
    text = run.train[:2 ** 22] if split == "train" else run.val[:2 ** 19]
    if cfg.behavior:
        pieces = token_bytes(run.tokenizer, run.model.config.vocab_size)
        inside, target = marks(text, compile_pattern(cfg.behavior), pieces)
    elif cfg.source:
        inside = target = of_source(run, cfg.source, split)[:len(text)]
    else:
        text, target = of_files(run, cfg.texts, split)
        inside = target
    arrays = text.astype(np.int64), inside, target
    return Marked(*(torch.from_numpy(u).to(run.device) for u in arrays))


# ------------------------------------------- cached hidden states
class States(NamedTuple):
    """Hidden states of N tokens, their gates, and the next token to be predicted from each."""
    z: torch.Tensor        # (N, d)
    ids: torch.Tensor      # (N, k)
    gates: torch.Tensor    # (N, k)
    y: torch.Tensor        # (N,) the next token
    target: torch.Tensor   # (N,) bool: y is a target of the behavior
    free: torch.Tensor     # (N,) bool: y is no part of it
    far: torch.Tensor      # (N,) bool: nor is any token within 32 of y

    def take(self, keep):
        return States(*(u[keep] for u in self))


@torch.no_grad()
def load_states(run, text, windows):
    """Marked text, numbers (n,) of its windows of block_size tokens -> States in order"""
    near = F.max_pool1d(text.inside.float()[None], 65, 1, 32)[0] > 0
    place = windows[:, None] * run.T + torch.arange(run.T)
    parts = []
    for some in place.to(run.device).split(32):
        z = run.model.hidden(text.tokens[some]).flatten(0, 1)
        m = run.model.mixture(z)
        y = some.flatten() + 1
        marked = text.tokens[y], text.target[y], ~text.inside[y], ~near[y]
        parts.append(States(z, m.ids, m.gates, *marked))
    return States(*(torch.cat(u) for u in zip(*parts)))


def draw_windows(text, T, n, balanced, seed, part=slice(None)):
    """n of the windows in a part of the text, drawn at random; balanced: half hold targets"""
    rng = torch.Generator().manual_seed(seed)
    windows = torch.arange((len(text.tokens) - 1) // T)[part]
    windows = windows[torch.randperm(len(windows), generator=rng)]
    if balanced:
        place = windows[:, None] * T + 1 + torch.arange(T)
        has = text.target.cpu()[place].any(1)
        with_targets = windows[has][:n // 2]
        windows = torch.cat((with_targets, windows[~has]))
    return windows[:n]


def behavior_states(run, cfg):
    """What a behavior is measured with -> b (V,), zeros for text, and States of training text, of
    the tuning half and of the test half of the held-out text (alternate windows)."""
    if [cfg.behavior, cfg.source, cfg.texts].count("") != 2:
        raise UserError("expected one of --behavior='>>>', --source=NAME and --texts=WITH,WITHOUT")
    text, val = mark(run, cfg, "train"), mark(run, cfg, "val")
    if len(val.tokens) <= 2 * run.T:
        raise UserError(f"{len(val.tokens)} held-out tokens, expected {2 * run.T + 1}: give more")
    b = torch.zeros(run.model.config.vocab_size, device=run.device)
    if cfg.behavior:                                              # b_v = targets / occurrences of v
        count = torch.bincount(text.tokens, minlength=len(b))
        begins = torch.bincount(text.tokens[text.target], minlength=len(b))
        b = begins / count.clamp(min=1)
    is_text = not cfg.behavior
    n = max(2, cfg.tokens // run.T)
    drawn = draw_windows(text, run.T, n, True, cfg.seed)
    train = load_states(run, text, drawn)
    even = draw_windows(val, run.T, 256, is_text, cfg.seed, slice(0, None, 2))
    odd = draw_windows(val, run.T, 256, is_text, cfg.seed, slice(1, None, 2))
    tune = load_states(run, val, even)
    test = load_states(run, val, odd)
    found = [int(s.target.sum()) for s in (train, tune, test)]
    least = LEAST if is_text else 1
    free = min(int(s.free.sum()) for s in (train, tune, test))
    if found[0] < LEAST or min(found) < least or free < LEAST:
        raise UserError(f"too little text: {found[0]} targets in training text and {found[1:]} in "
                        f"the halves of the held-out text, expected {LEAST} and {least} each, and "
                        f"{LEAST} tokens without; take a less rare behavior, or raise --tokens")
    return b, train, tune, test


# ------------------------------------------- what an edit does to cached states
def scaled(edit, strength):
    return edit._replace(g=1 + strength * (edit.g - 1), u=strength * edit.u)


def edited(model, edit, strength=1.0):
    """-> function of States: logits (N, V) with an Edit, gains and directions times a strength"""
    edit = scaled(edit, strength)

    def change(s):
        return edit.apply(s.z, s.ids, s.gates, model.prototypes) @ model.W.T
    return change


def figures(before, after, y, b):
    """log pi, log pi' (N, V) -> (3, N): loss, rate = sum_v b_v pi'_tv, KL(pi || pi'); in nats"""
    loss = -after.gather(1, y[:, None])[:, 0]
    kl = (before.exp() * (before - after)).sum(1)
    return torch.stack((loss, after.exp() @ b, kl))


@torch.no_grad()
def measure(model, s, b, change=None):
    """figures() of change, a function of States to logits (N, V); None: the model as it is"""
    parts = []
    for at, before in log_softmax_chunks(s.z, model.W):
        some = s.take(at)
        after = change(some).log_softmax(1) if change else before
        parts.append(figures(before, after, some.y, b))
    return torch.cat(parts, 1)


def interval(numerator, denominator, seed=0, draws=1000):
    """Two arrays (n,) -> the ratio of their sums, and its 95% interval by bootstrap of the units"""
    drawn = np.random.default_rng(seed).integers(0, len(numerator), (draws, len(numerator)))
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1).clip(1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return float(numerator.sum() / denominator.sum()), low, high


def effect(s, b, before, after, T):
    """Two results of measure() on whole windows -> {name: (value, low, high)} of those that there
    are: rate (a share of before), rise (nats), loss and benign (percent), kl (nats)."""
    one = torch.ones_like(before[0])
    rise = after[0] - before[0]
    percent = before[0] / 100
    quotients = {"rate": (after[1], before[1], before[1] > 0),
                 "rise": (rise, one, s.target),
                 "loss": (rise, percent, s.free),
                 "benign": (rise, percent, s.free & (b[s.y] > 0)),
                 "kl": (after[2], one, s.far)}
    found = {}
    for name, (numerator, denominator, keep) in quotients.items():
        if keep.sum() < LEAST:
            continue
        sums = torch.stack((numerator, denominator)).double() * keep
        per_window = sums.view(2, -1, T).sum(2)
        found[name] = interval(*per_window.cpu().numpy())
    return found


def shown(e):
    """effect() on one line"""
    parts = []
    for name, (value, low, high) in e.items():
        parts.append(f"{name} {value:.3g}{UNITS[name]} [{low:.3g}, {high:.3g}]")
    return "  ".join(parts)


# ------------------------------------------- find: which prototypes, and which edit
def mean_gates(s, keep, M, power=1):
    """-> (M,) mean over the tokens `keep` of a_ti ** power"""
    sums = s.z.new_zeros(M)
    values = s.gates[keep].flatten() ** power
    sums.index_add_(0, s.ids[keep].flatten(), values)
    return sums / keep.sum()


def rank_prototypes(s, M):
    """States -> (M,) how well each detects: (mean a at targets - elsewhere) / standard deviation"""
    on, off = mean_gates(s, s.target, M), mean_gates(s, ~s.target, M)
    square = mean_gates(s, s.target, M, 2) + mean_gates(s, ~s.target, M, 2)
    return (on - off) / (square - on ** 2 - off ** 2).clamp(min=1e-6).sqrt()


def objective(before, after, y, lam):
    """log pi, log pi' (N, V), next tokens y (n,) of the first n, which are the targets ->

        mean over other tokens of KL(pi_t || pi'_t)  +  lam * sum pi'_t[y_t] / sum pi_t[y_t]"""
    n = len(y)
    kl = (before[n:].exp() * (before[n:] - after[n:])).sum(1)
    left = after[:n].gather(1, y[:, None]).exp().sum()
    share = left / before[:n].gather(1, y[:, None]).exp().sum()
    return kl.mean() + lam * share


def descend(model, s, change, groups, lam, seed=0, steps=120, batch=1024):
    """Adam on objective() of softmax(change(States)); a quarter of each batch are targets."""
    optimizer = torch.optim.Adam(groups)
    rng = torch.Generator().manual_seed(seed)
    targets = s.target.nonzero()[:, 0]
    others = (~s.target).nonzero()[:, 0]
    n = batch // 4
    for step in range(steps):
        drawn = torch.randint(len(targets), (n,), generator=rng)
        more = torch.randint(len(others), (batch - n,), generator=rng)
        some = s.take(torch.cat((targets[drawn], others[more])))
        before = (some.z @ model.W.T).log_softmax(1)
        after = change(some).log_softmax(1)
        loss = objective(before, after, some.y[:n], lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fit(model, s, ids, mode, lam, seed=0):
    """States, prototypes ids (n,) -> the Edit of these that descend() finds"""
    M = len(model.prototypes)
    zeros = torch.zeros_like(model.prototypes[:, 0])
    on, off = mean_gates(s, s.target, M)[ids], mean_gates(s, ~s.target, M)[ids]
    gap = on - off
    w = gap / (gap @ on + 1e-9)                                   # w.a = 1 at the mean target
    c = (w @ off)[None]                                           # relu(w.a - c) = 0 elsewhere
    away = s.z[~s.target].mean(0) - s.z[s.target].mean(0)
    u = F.normalize(away, dim=0)
    theta = torch.zeros_like(w)                                   # g - 1
    if mode == "gains":
        w, u = torch.zeros_like(w), torch.zeros_like(u)
        groups = [{"params": [theta], "lr": 0.02}]
    else:
        groups = [{"params": [w, c], "lr": 0.02}, {"params": [u], "lr": 0.05}]
    for group in groups:
        for x in group["params"]:
            x.requires_grad_()

    def edit():
        g = 1 + zeros.index_add(0, ids, theta)
        return Edit(g, zeros.index_add(0, ids, w)[None], c, u[None])

    def change(some):
        return edited(model, edit())(some)
    descend(model, s, change, groups, lam, seed)
    return Edit(*(part.detach() for part in edit()))


def strongest(model, s, b, before, edit, cfg, T):
    """Bisection from 1/8 to 8 -> the largest strength at the allowed price, and its effect"""
    low, high, found = -3.0, 3.0, None
    for _ in range(6):
        middle = (low + high) / 2
        after = measure(model, s, b, edited(model, edit, 2 ** middle))
        e = effect(s, b, before, after, T)
        price = max(e[name][2] for name in ("loss", "benign") if name in e)
        kl = e["kl"][2] if "kl" in e else 0.0                     # upper ends of the intervals
        if price <= cfg.price and kl <= cfg.kl:
            low, found = middle, (2 ** middle, e)
        else:
            high = middle
    return found


def write_edit(path, run, edit, **facts):
    """A file that common.load_gains reads. The sweep of an older file of this name goes."""
    ids = (edit.g != 1).nonzero()[:, 0].tolist()
    gains = edit.g[ids].tolist()
    directions = []
    for w, c, u in zip(edit.w, edit.c.tolist(), edit.u):
        named = w.nonzero()[:, 0].tolist()
        if u.any():
            directions.append({"ids": named,
                               "weights": w[named].tolist(),
                               "threshold": c,
                               "direction": u.tolist()})
    path.with_suffix(".sweep.json").unlink(missing_ok=True)
    made = dict(checkpoint=run.hash, **facts)
    write_json(path, made | dict(ids=ids, gains=gains, directions=directions))


def find(argv):
    cfg = parse_config(FindConfig, argv)
    run = Run(cfg.out_dir, cfg.device)
    model = run.model
    if cfg.mode not in ("direction", "gains") or cfg.size < 0:
        raise UserError(f"mode={cfg.mode}, size={cfg.size}; expected direction or gains, 0 or more")
    b, train, tune, _ = behavior_states(run, cfg)
    print(f"{train.target.sum():,} targets in {len(train.y):,} training tokens")
    order = rank_prototypes(train, len(model.prototypes)).argsort(descending=True)
    before = measure(model, tune, b)
    best = None
    for size, lam in itertools.product([cfg.size] if cfg.size else SIZES, LAMBDAS):
        edit = fit(model, train, order[:size], cfg.mode, lam, cfg.seed)
        found = strongest(model, tune, b, before, edit, cfg, run.T)
        if found is None:
            print(f"{size:>3}, lambda {lam:<4}  too dear", flush=True)
            continue
        strength, e = found
        print(f"{size:>3}, lambda {lam:<4}  {shown(e)}", flush=True)
        left = e["rate"][0] if cfg.behavior else -e["rise"][0]
        if best is None or left < best[0]:
            best = left, scaled(edit, strength), e, lam
    if best is None:
        raise UserError(f"no edit at {cfg.price}% and {cfg.kl} nats; raise --price or --kl")
    _, edit, e, lam = best
    weight = edit.w[0] + edit.g - 1
    for i in weight.abs().argsort(descending=True)[:10].tolist():
        logits = model.W[:run.tokenizer.n_vocab] @ model.prototypes[i]
        raised = [run.decode([t]) for t in logits.argsort(descending=True)[:5]]
        print(f"prototype {i:>4}  weight {weight[i]:+.3f}  raises {raised}")
    path = run.out_dir / "gains" / f"{cfg.name}.json"
    write_edit(path, run, edit, find=asdict(cfg), lam=lam, tuning=e)
    print(f"{path}: {shown(e)}")


# ------------------------------------------- apply and sweep: before and after
def read_facts(path):
    """A gains file of find -> its FindConfig, and lambda."""
    with reading(f"gains file '{path}'", "expected one file that suppress.py find wrote"):
        facts = json.loads(Path(path).read_text("utf-8"))
        words = [f"--{key}={value}" for key, value in facts["find"].items()]
        return parse_config(FindConfig, words), float(facts["lam"])


def beginnings(run, n, seed):
    """-> (n, 16) tokens: beginnings of text from the test half of the held-out windows."""
    T = run.T
    rng = torch.Generator().manual_seed(seed)
    window = torch.randint(len(run.val) // (2 * T), (n, 1), generator=rng)
    offset = torch.randint(T // 2, (n, 1), generator=rng)
    place = (2 * window + 1) * T + offset + torch.arange(min(16, T // 2))
    tokens = run.val[place.numpy()].astype(np.int64)
    return torch.from_numpy(tokens).to(run.device)


def samples(run, idx, behavior, max_new_tokens, temperature, seed, gains=None):
    """Continues idx (n, L), yields n pairs (matches that begin in new tokens, the whole text)."""
    pieces = token_bytes(run.tokenizer, run.model.config.vocab_size)
    pattern = compile_pattern(behavior)
    rows = run.model.generate(idx, max_new_tokens, temperature, seed=seed, gains=gains,
                              n_vocab=run.tokenizer.n_vocab)
    for row in rows.tolist():
        _, onset = marks(row, pattern, pieces)
        matches = int(onset[idx.size(1):].sum())
        yield matches, run.decode(row)


def apply(argv):
    cfg = parse_config(ApplyConfig, argv)
    if cfg.num_samples < 1 or cfg.temperature < 0:
        raise UserError(f"num_samples={cfg.num_samples}, temperature={cfg.temperature}; "
                        "expected at least 1 and 0")
    run = Run(cfg.out_dir, cfg.device)
    gains = load_gains(cfg.gains, run.model)
    found, _ = read_facts(cfg.gains.split(",")[0])
    idx = beginnings(run, cfg.num_samples, cfg.seed)
    if cfg.prompt:
        ids = run.tokenizer.encode_ordinary(cfg.prompt)
        idx = torch.tensor([ids] * cfg.num_samples, device=run.device)
    options = found.behavior, cfg.max_new_tokens, cfg.temperature, cfg.seed
    before = samples(run, idx, *options)
    after = samples(run, idx, *options, gains)
    for old, new in zip(before, after):
        print(f"before, {old[0]} matches | {plain(old[1])}")
        print(f" after, {new[0]} matches | {plain(new[1])}")


def other_prototypes(edit, seed):
    """-> ids (n,) of a control: as many as the edit uses, drawn from those that it does not use"""
    used = edit.w.any(0) | (edit.g != 1)
    spare = (~used).nonzero()[:, 0]
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(spare), generator=rng)
    return spare[order[:used.sum()]]


def sweep(argv):
    cfg = parse_config(SweepConfig, argv)
    run = Run(cfg.out_dir, cfg.device)
    model, T = run.model, run.T
    edit = load_gains(cfg.gains, model)
    found, lam = read_facts(cfg.gains)
    b, train, _, test = behavior_states(run, found)
    others = other_prototypes(edit, cfg.seed)
    control = fit(model, train, others, found.mode, lam, cfg.seed)
    before = measure(model, test, b)
    rows = []
    for strength in STRENGTHS:
        row = dict(strength=strength)
        for name, e in (("edit", edit), ("control", control)):
            after = measure(model, test, b, edited(model, e, strength))
            row[name] = effect(test, b, before, after, T)
            print(f"{name:>7} x{strength:<4}  {shown(row[name])}", flush=True)
        rows.append(row)
    idx = beginnings(run, 64, cfg.seed)
    options = found.behavior, 100, 1.0, cfg.seed
    pairs = zip(samples(run, idx, *options), samples(run, idx, *options, edit))
    most = sorted(pairs, reverse=True)[:4]                        # texts with most matches before
    before, after = zip(*most)
    path = Path(cfg.gains).with_suffix(".sweep.json")
    name = found.behavior or found.source or found.texts
    write_json(path, dict(behavior=name, checkpoint=run.hash, price=found.price, kl=found.kl,
                          rows=rows, before=before, after=after))
    print(f"{path}: python report.py shows it")


def main(argv):
    run_command({"find": find, "apply": apply, "sweep": sweep}, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
