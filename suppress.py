"""Change what a trained model writes with one gain per prototype: no finetuning.

    python suppress.py find --behavior='>>>' --name=examples    proposes out/gains/examples.json
    python suppress.py apply --gains=out/gains/examples.json    before and after, the same seeds
    python suppress.py sweep --gains=out/gains/examples.json    effect, price and random controls

Gains g (M,) leave the trunk alone, so hidden states are computed once. A behavior is a regular
expression; its onsets are the tokens that hold the first character of a match.

    logits_t = W (r_t + sum_i g_i a_ti p_i)            ones change nothing, 0 suppresses
    w_v      = onsets of token v / occurrences of v    in the training text
    rate     = mean_t sum_v w_v pi_tv                  pi_t = softmax(logits_t), no sampling
    price    = rise of the loss of text without the behavior, in percent

`find` keeps the lowest rate at an allowed price on one half of the held-out text; `sweep` measures
on the other. Mode zero gives the prototypes of most merit one gain; mode fit gives each its own.
"""
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (Run, load_gains, parse_config, plain, reading, run_command, run_main,
                    write_json)
from prism import UserError, apply_gains, log_softmax_chunks

SIZES, GAINS = (1, 2, 4, 8, 16, 32), (0.0, -1.0)         # of mode zero
FITTED, LAMBDAS = (16, 64, 256), (0.1, 0.3, 1.0)         # of mode fit
COLUMNS = "mode", "size", "setting", "loss_percent", "rate", "control_loss_percent", "control_rate"


@dataclass
class FindConfig:
    out_dir: str = "out"      # the run
    behavior: str = ""        # a regular expression over text
    name: str = "behavior"    # the gains are written to out_dir/gains/NAME.json
    mode: str = "auto"        # zero, fit, or auto: the lowest rate of both
    price: float = 0.5        # largest rise of the loss in percent, on the tuning half
    tokens: int = 200000      # training tokens to learn from
    top: int = 10             # prototypes shown
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
    prompts: int = 256         # held-out beginnings that are continued
    max_new_tokens: int = 100  # length of each
    temperature: float = 1.0   # of the sampling
    tokens: int = 200000       # training tokens to learn from
    seed: int = 2              # of text, sampling and controls
    device: str = "auto"       # auto, cpu, cuda or mps


# ------------------------------------------- a behavior in text
def compile_pattern(behavior):
    with reading(f"behavior={behavior}", "expected a regular expression; for plain text put a "
                 "backslash before . * + ? ( ) [ ] { } ^ $ |"):
        return re.compile(behavior)


def token_bytes(tokenizer, vocab_size):
    """The bytes of every token, a list. The end of a text is a zero byte, so that no word runs
    over it; numbers that the tokenizer does not know are empty."""
    pieces = [b""] * vocab_size
    for i in range(min(vocab_size, tokenizer.n_vocab)):
        pieces[i] = b"\0" if i == tokenizer.eot_token else tokenizer.decode_single_token_bytes(i)
    return pieces


def marks(tokens, pattern, pieces):
    """tokens (N,) -> carried (N,), onset (N,): bools, whether a token overlaps a match of
    `pattern` in the text, and whether it holds the first character of one.

    Bytes that are no UTF-8 match only what excludes characters, as `.` and `[^a]` do.
    """
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


def mark_text(run, tokens, pattern):
    """-> tokens, carried, onset (N,) on the run's device."""
    pieces = token_bytes(run.tokenizer, run.model.config.vocab_size)
    arrays = tokens.astype(np.int64), *marks(tokens, pattern, pieces)
    return [torch.from_numpy(u).to(run.device) for u in arrays]


# ------------------------------------------- cached hidden states
class States(NamedTuple):
    """Hidden states of N tokens, their gates, and the next token to be predicted from each."""
    z: torch.Tensor        # (N, d)
    ids: torch.Tensor      # (N, k)
    gates: torch.Tensor    # (N, k)
    y: torch.Tensor        # (N,) the next token
    onset: torch.Tensor    # (N,) bool: y begins the behavior
    free: torch.Tensor     # (N,) bool: y is no part of it
    weight: torch.Tensor   # (N,) how many tokens this one stands for

    def take(self, keep):
        return States(*(u[keep] for u in self))


@torch.no_grad()
def load_states(run, text, windows):
    """text of mark_text(), numbers of its windows of block_size tokens -> States, in this order."""
    tokens, carried, onset = text
    place = torch.from_numpy(windows)[:, None] * run.T + torch.arange(run.T)
    parts = []
    for some in place.to(run.device).split(32):
        z = run.model.hidden(tokens[some]).flatten(0, 1)
        m = run.model.mixture(z)
        after = some.flatten() + 1
        ones = torch.ones_like(z[:, 0])
        parts.append(States(z, m.ids, m.gates, tokens[after], onset[after], ~carried[after], ones))
    return States(*(torch.cat(u) for u in zip(*parts)))


def behavior_states(run, behavior, n_tokens, seed):
    """What a behavior is measured with -> w (V,), and States of training text, of the tuning half
    and of the test half of the held-out text (alternate windows).

    Of the first 4 million training tokens about n_tokens are drawn, half of them in windows with
    onsets where there are so many; weights make up for that.
    """
    T = run.T
    pattern = compile_pattern(behavior)
    train = mark_text(run, run.train[:2 ** 22], pattern)
    tokens, _, onset = train
    if not onset.any():
        raise UserError(f"behavior={behavior} never occurs in {len(tokens):,} training tokens; "
                        "expected a pattern that does, as --behavior='>>>'")

    # w_v = onsets of token v / occurrences of v
    V = run.model.config.vocab_size
    count = torch.bincount(tokens, minlength=V)
    w = torch.bincount(tokens[onset], minlength=V) / count.clamp(min=1)

    last = (len(tokens) - 1) // T * T
    occurs = onset[1:last + 1].view(-1, T).any(1).cpu().numpy()
    rng = np.random.default_rng(seed)
    having = rng.permutation(np.flatnonzero(occurs))
    others = rng.permutation(np.flatnonzero(~occurs))
    room = max(2, n_tokens // T)
    n = min(len(having), max(room // 2, room - len(others)))
    m = min(len(others), room - n)
    drawn = np.concatenate((np.sort(having[:n]), np.sort(others[:m])))
    sample = load_states(run, train, drawn)
    sample.weight[:n * T] = len(having) / n
    sample.weight[n * T:] = len(others) / max(1, m)

    val = mark_text(run, run.val[:2 ** 16], pattern)
    windows = np.arange((len(val[0]) - 1) // T)
    tune = load_states(run, val, windows[0::2])
    test = load_states(run, val, windows[1::2])
    return w, sample, tune, test


# ------------------------------------------- what gains do to cached states
@torch.no_grad()
def measure(model, s, w, gains=None):
    """States, w (V,), gains (M,) or None -> (2, N): loss in nats, rate = sum_v w_v pi_tv"""
    z = s.z
    if gains is not None:
        z = apply_gains(z, s.ids, s.gates, gains, model.prototypes)
    result = z.new_empty(2, len(z))
    for at, logp in log_softmax_chunks(z, model.W):
        result[0, at] = -logp.gather(1, s.y[at, None])[:, 0]
        result[1, at] = logp.exp() @ w
    return result


def effect(s, before, after):
    """Two results of measure() -> rise of the loss of text without the behavior, in percent; the
    rate after, as a share of before."""
    loss_before = before[0, s.free].sum()
    loss_after = after[0, s.free].sum()
    rate = after[1].sum() / before[1].sum()
    return 100 * (loss_after / loss_before).item() - 100, rate.item()


def interval(numerator, denominator, seed=0, draws=1000):
    """Two arrays with a number per unit -> the ratio of their sums, its 2.5% and 97.5% quantiles
    when units are drawn anew (bootstrap)."""
    n = len(numerator)
    drawn = np.random.default_rng(seed).integers(0, n, (draws, n))
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1)
    return numerator.sum() / denominator.sum(), *np.quantile(ratios, [0.025, 0.975])


def loss_interval(s, before, after, T):
    """effect()'s rise of the loss of States of whole windows, and its interval over windows."""
    losses = torch.stack((after[0], before[0])).double() * s.free
    per_window = losses.view(2, -1, T).sum(2).cpu().numpy()
    return [100 * ratio - 100 for ratio in interval(*per_window)]


# ------------------------------------------- find: which prototypes, and which gains
@torch.no_grad()
def rank_prototypes(model, s):
    """States -> {name: (M,)}, for each prototype

        margin_i    sum over onsets of a_ti <W_y - mean W, p_i>, a share of <W_y - mean W, z_t>
        contrast_i  mean gate at onsets - mean gate in text without the behavior
        benefit_i   sum over onsets of -dCE / dg_i = a_ti <W_y - W^T pi_t, p_i>
        price_i     the same sum over text without the behavior
        merit_i     benefit_i / (|price_i| + mean |price|)
        fires_i     tokens at which its gate is above 0
    """
    W, P = model.W, model.prototypes
    onset = s.weight * s.onset                                    # (N,)
    free = s.weight * s.free
    centered = torch.empty_like(s.gates)                          # (N, k)
    error = torch.empty_like(s.gates)
    logit = 0.0
    for at, logp in log_softmax_chunks(s.z, W):
        wy = W[s.y[at]]
        margin = wy - W.mean(0)
        residual = wy - logp.exp() @ W                            # W_y - W^T pi_t
        centered[at] = s.gates[at] * (margin @ P.T).gather(1, s.ids[at])
        error[at] = s.gates[at] * (residual @ P.T).gather(1, s.ids[at])
        logit += (margin * s.z[at]).sum(1) @ onset[at]

    def total(values, weight):                                    # (N, k), (N,) -> (M,)
        weighted = values * weight[:, None]
        sums = torch.zeros_like(P[:, 0])
        return sums.index_add_(0, s.ids.flatten(), weighted.flatten())

    price = total(error, free).abs()
    gate_on = total(s.gates, onset) / onset.sum()
    gate_off = total(s.gates, free) / free.sum()
    return {"margin": total(centered, onset) / logit,
            "contrast": gate_on - gate_off,
            "merit": total(error, onset) / (price + price.mean() + 1e-12),
            "fires": total((s.gates > 0).float(), s.weight)}


def fit(model, s, w, rate, lam, ids, steps=60, batch=1024, lr=0.1, seed=0):
    """States, w (V,), the unchanged model's rate (N,) -> gains (M,), 1 but for prototypes `ids`

    minimises over theta = g - 1   mean_t [ KL(q_t || pi_t without onsets) + lam rate_t / rate_0 ]

    where q_t is the unchanged model's distribution without onsets, by Adam, its rate falling to 0
    in the second half of the steps. What is out of reach in them, |theta| above 0.75 lr steps, is
    part of the bargain, as early stopping is.
    """
    W, P = model.W, model.prototypes
    rng = torch.Generator().manual_seed(seed)
    rate_0 = (rate * s.weight).sum() / s.weight.sum()
    ones = torch.ones_like(P[:, 0])
    fires = torch.isin(s.ids, ids) & (s.gates > 0)
    s = s.take(fires.any(1))                                      # no other token changes
    theta = torch.zeros(len(ids), device=P.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr, betas=(0.9, 0.99))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(s.z), generator=rng)
        b = s.take(order[:batch].to(P.device))
        order = order[batch:]
        with torch.no_grad():                                     # q_v ~ pi_v (1 - w_v)
            q = (b.z @ W.T).softmax(1) * (1 - w)
            q /= q.sum(1, keepdim=True).clamp(min=1e-9)
        gains = ones.index_add(0, ids, theta)
        z = apply_gains(b.z, b.ids, b.gates, gains, P)
        logp = (z @ W.T).log_softmax(1)
        left = logp.exp() @ w                                     # rate_t
        # KL(q || pi (1 - w) / (1 - rate_t)), without the terms that do not depend on theta
        kl = (1 - left).clamp(min=1e-4).log() - (q * logp).sum(1)
        value = kl + lam * left / rate_0
        loss = (value * b.weight).sum() / b.weight.sum()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ones.index_add(0, ids, theta.detach())


def candidates(model, s, w, ranks, mode="auto", seed=0):
    """Training States, their rank_prototypes() -> yields (mode, size, setting, gains (M,))"""
    order = ranks["merit"].argsort(descending=True)
    ones = torch.ones_like(ranks["merit"])
    if mode in ("auto", "zero"):
        for size, gain in itertools.product(SIZES, GAINS):
            gains = ones.index_fill(0, order[:size], gain)
            yield "zero", size, f"gain {gain:+g}", gains
    if mode in ("auto", "fit"):
        _, rate = measure(model, s, w)
        for size, lam in itertools.product(FITTED, LAMBDAS):
            gains = fit(model, s, w, rate, lam, order[:size], seed=seed)
            gains[(gains - 1).abs() <= 0.02] = 1.0
            yield "fit", size, f"lambda {lam:g}", gains


def write_gains(path, run, gains, **facts):
    """A gains file that common.load_gains reads. The sweep of an older file of this name goes."""
    ids = (gains != 1).nonzero()[:, 0].tolist()
    values = [round(gain, 4) for gain in gains[ids].tolist()]
    path.with_suffix(".sweep.json").unlink(missing_ok=True)
    facts = dict(checkpoint=run.hash, **facts, ids=ids, gains=values)
    write_json(path, facts)


def open_run(cfg, **least):
    """-> Run, after a check of the options named in `least` against their smallest values."""
    for name, low in least.items():
        if not low <= getattr(cfg, name) < math.inf:
            raise UserError(f"{name} is {getattr(cfg, name)}, expected at least {low}")
    run = Run(cfg.out_dir, cfg.device)
    if len(run.val) < 4 * run.T:
        raise UserError(f"the held-out text has {len(run.val)} tokens, expected at least "
                        f"{4 * run.T}: prepare more text")
    return run


def show(*values):
    """Prints one row of a table."""
    for value in values:
        cell = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(cell.rjust(12), end=" ")
    print(flush=True)


def find(argv):
    cfg = parse_config(FindConfig, argv)
    run = open_run(cfg, tokens=1, top=1, price=0, seed=0)
    model = run.model
    w, train, tune, _ = behavior_states(run, cfg.behavior, cfg.tokens, cfg.seed)
    print(f"{int(train.onset.sum()):,} onsets in {len(train.z):,} training tokens")
    ranks = rank_prototypes(model, train)
    show("prototype", "margin", "contrast", "raises")
    for i in ranks["margin"].argsort(descending=True)[:cfg.top].tolist():
        logits = model.W[:run.tokenizer.n_vocab] @ model.prototypes[i]
        raised = [repr(run.decode([t])) for t in logits.argsort(descending=True)[:5]]
        margin = ranks["margin"][i].item()
        contrast = ranks["contrast"][i].item()
        show(i, margin, contrast, " ".join(raised))

    before = measure(model, tune, w)
    best, lowest = None, 1.0
    show(*COLUMNS[:5])
    for mode, size, setting, gains in candidates(model, train, w, ranks, cfg.mode, cfg.seed):
        after = measure(model, tune, w, gains)
        loss, rate = effect(tune, before, after)
        show(mode, size, setting, loss, rate)
        if loss <= cfg.price and rate < lowest:
            lowest, best = rate, gains
            found = dict(by=mode, size=size, setting=setting, tuning_loss_percent=loss,
                         tuning_rate=rate, **asdict(cfg))
    if best is None:
        raise UserError(f"nothing of mode {cfg.mode} lowers the rate at a price of at most "
                        f"{cfg.price}%; raise --price, or try --mode=auto, which is zero and fit")
    path = run.out_dir / "gains" / f"{cfg.name}.json"
    write_gains(path, run, best, behavior=cfg.behavior, found=found)
    print(f"{path}: {found['by']} {found['size']}, {found['setting']}. Next: "
          f"python suppress.py sweep --out_dir={cfg.out_dir} --gains={path}")


# ------------------------------------------- apply and sweep: before and after, and the price
def beginnings(run, n, seed):
    """-> (n, 16) tokens: beginnings of text from the test half of the held-out windows."""
    T = run.T
    rng = np.random.default_rng(seed)
    length = min(16, T // 2)
    window = 1 + 2 * rng.integers((len(run.val) - 1) // (2 * T), size=n)
    start = window * T + rng.integers(T - length, size=n)
    tokens = run.val[start[:, None] + np.arange(length)]
    return torch.from_numpy(tokens.astype(np.int64)).to(run.device)


def continuations(run, idx, max_new_tokens, temperature, seed, gains=None):
    """idx (n, L) -> (n, L + max_new_tokens), sampled. One seed gives the same draws."""
    parts = []
    for i, rows in enumerate(idx.split(64)):
        whole = run.model.generate(rows, max_new_tokens, temperature, seed=seed + 64 * i,
                                   gains=gains, n_vocab=run.tokenizer.n_vocab)
        parts.append(whole)
    return torch.cat(parts)


def count_matches(run, rows, pattern, start):
    """rows (n, L) -> matches (n,) that begin at token `start` or later."""
    pieces = token_bytes(run.tokenizer, run.model.config.vocab_size)
    counts = []
    for row in rows.tolist():
        _, onset = marks(row, pattern, pieces)
        counts.append(onset[start:].sum())
    return np.array(counts)


def shuffled(gains, fires, seed, width=16):
    """The control: the same gains (M,) on other prototypes that fire about as often -> (M,)

    Each goes to one of the `width` nearest in the order of firing whose own gain is 1.
    """
    rng = np.random.default_rng(seed)
    order = fires.argsort(stable=True)
    given = gains[order].cpu().numpy()
    placed = np.ones_like(given)
    free = np.arange(len(given))
    for place in np.flatnonzero(given != 1):
        distance = np.abs(free - place) + len(given) * (given[free] != 1)
        near = distance.argsort(kind="stable")[:width]
        j = rng.choice(near)
        placed[free[j]] = given[place]
        free = np.delete(free, j)
    control = torch.empty_like(gains)
    control[order] = torch.from_numpy(placed).to(gains)
    return control


def apply(argv):
    cfg = parse_config(ApplyConfig, argv)
    run = open_run(cfg, num_samples=1, max_new_tokens=1, temperature=0, seed=0)
    gains = load_gains(cfg.gains, run.model)
    idx = beginnings(run, cfg.num_samples, cfg.seed)
    if cfg.prompt:
        prompt = run.tokenizer.encode_ordinary(cfg.prompt)
        idx = torch.tensor([prompt] * cfg.num_samples, device=run.device)
    options = cfg.max_new_tokens, cfg.temperature, cfg.seed
    before = continuations(run, idx, *options)
    after = continuations(run, idx, *options, gains)
    for i in range(cfg.num_samples):
        print(f"--- {i + 1}: {plain(run.decode(idx[i]))}")
        for side, rows in ("before", before), (" after", after):
            new = rows[i, idx.size(1):]
            print(f"{side} | {plain(run.decode(new))}")


def sweep(argv):
    cfg = parse_config(SweepConfig, argv)
    run = open_run(cfg, prompts=2, max_new_tokens=1, temperature=0, tokens=1, seed=0)
    model, path = run.model, Path(cfg.gains)
    gains = load_gains(cfg.gains, model)
    with reading(f"gains file '{path}'", "sweep takes one file that suppress.py find wrote"):
        facts = json.loads(path.read_text("utf-8"))
        pattern = re.compile(facts["behavior"])
        price = float(facts["found"]["price"])
    w, train, _, test = behavior_states(run, facts["behavior"], cfg.tokens, cfg.seed)
    ranks = rank_prototypes(model, train)
    before = measure(model, test, w)

    # teacher-forced: each candidate, and the same gains on other prototypes
    proposed = candidates(model, train, w, ranks, seed=cfg.seed)
    chosen = "chosen", int((gains != 1).sum()), "", gains
    rows = []
    show(*COLUMNS[:5], "control loss", "control rate")
    for mode, size, setting, g in itertools.chain(proposed, [chosen]):
        control = shuffled(g, ranks["fires"], cfg.seed)
        after = measure(model, test, w, g)
        other = measure(model, test, w, control)
        row = [mode, size, setting]
        for measured in after, other:
            row += [round(x, 4) for x in effect(test, before, measured)]
        rows.append(dict(zip(COLUMNS, row)))
        show(*row)
    loss = loss_interval(test, before, after, run.T)              # of the chosen gains, the last

    # sampled: before, after, and with the control of the chosen gains
    idx = beginnings(run, cfg.prompts, cfg.seed)
    thousands = np.full(cfg.prompts, cfg.max_new_tokens / 1000)
    text, matches, per_1000 = {}, {}, {}
    summary = "matches per 1,000 tokens:"
    for side, g in ("before", None), ("after", gains), ("control", control):
        whole = continuations(run, idx, cfg.max_new_tokens, cfg.temperature, cfg.seed, g)
        count = count_matches(run, whole, pattern, idx.size(1))
        if side == "before":
            most = count.argsort()[-4:]
        text[side] = [run.decode(whole[i]) for i in most]
        matches[side] = int(count.sum())
        per_1000[side] = mean, low, high = interval(count, thousands)
        summary += f" {side} {mean:.2f} [{low:.2f}, {high:.2f}],"
    summary += f" loss {loss[0]:+.3f}% [{loss[1]:+.3f}, {loss[2]:+.3f}]"
    cut = control_cut = None
    if matches["before"]:
        cut = 1 - matches["after"] / matches["before"]
        control_cut = 1 - matches["control"] / matches["before"]
    result = dict(
        name=path.stem, behavior=facts["behavior"], checkpoint=run.hash, price=price,
        options=asdict(cfg), rows=rows, loss_percent=loss, per_1000_tokens=per_1000,
        matches=matches, cut=cut, control_cut=control_cut, summary=summary,
        before=text["before"], after=text["after"])
    path = path.with_suffix(".sweep.json")
    write_json(path, result)
    print(f"{path}: python report.py shows it")
    print(summary)


def main(argv):
    run_command({"find": find, "apply": apply, "sweep": sweep}, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
