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
on the other. Mode shared gives the best prototypes one gain, 0 or -1; mode fit gives each its own.
"""
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (Run, load_gains, parse_config, plain, reading, run_command, run_main,
                    write_json)
from prism import UserError, apply_gains, log_softmax_chunks

SIZES, GAINS = (1, 2, 4, 8, 16, 32), (0.0, -1.0)         # of mode shared
FITTED, LAMBDAS = (16, 64, 256), (0.1, 0.3, 1.0)         # of mode fit


@dataclass
class FindConfig:
    out_dir: str = "out"      # the run
    behavior: str = ""        # a regular expression over text
    name: str = "behavior"    # the gains are written to out_dir/gains/NAME.json
    mode: str = "auto"        # shared, fit, or auto: the lowest rate of both
    price: float = 0.5        # largest rise of the loss in percent, on the tuning half
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
    tokens: int = 200000       # training tokens to learn from
    seed: int = 2              # of text, fitting, controls and sampling
    device: str = "auto"       # auto, cpu, cuda or mps


# ------------------------------------------- a behavior in text
def compile_pattern(behavior):
    with reading(f"behavior={behavior}", "expected a regular expression, as --behavior='>>>'"):
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

    def take(self, keep):
        return States(*(u[keep] for u in self))


@torch.no_grad()
def load_states(run, text, windows):
    """text of mark_text(), numbers (n,) of its windows of block_size tokens -> States in order"""
    tokens, carried, onset = text
    place = windows[:, None] * run.T + torch.arange(run.T)
    parts = []
    for some in place.to(run.device).split(32):
        z = run.model.hidden(tokens[some]).flatten(0, 1)
        m = run.model.mixture(z)
        after = some.flatten() + 1
        parts.append(States(z, m.ids, m.gates, tokens[after], onset[after], ~carried[after]))
    return States(*(torch.cat(u) for u in zip(*parts)))


def behavior_states(run, behavior, n_tokens, seed):
    """What a behavior is measured with -> w (V,), and States of n_tokens of training text, of the
    tuning half and of the test half of the held-out text (alternate windows)."""
    pattern = compile_pattern(behavior)
    text = mark_text(run, run.train[:2 ** 22], pattern)
    tokens, _, onset = text
    n_windows = (len(tokens) - 1) // run.T
    drawn = torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed))
    train = load_states(run, text, drawn[:max(1, n_tokens // run.T)])
    if not train.onset.any():
        raise UserError(f"behavior={behavior} never occurs in {len(train.y):,} training tokens; "
                        "expected a pattern that does, as --behavior='>>>'; or raise --tokens")
    # w_v = onsets of token v / occurrences of v
    V = run.model.config.vocab_size
    count = torch.bincount(tokens, minlength=V)
    w = torch.bincount(tokens[onset], minlength=V) / count.clamp(min=1)

    val = mark_text(run, run.val[:2 ** 16], pattern)
    windows = torch.arange((len(val[0]) - 1) // run.T)
    if len(windows) < 2:
        raise UserError(f"{len(val[0])} held-out tokens, expected {2 * run.T + 1}: prepare more")
    tune = load_states(run, val, windows[0::2])
    test = load_states(run, val, windows[1::2])
    return w, train, tune, test


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
    loss = after[0, s.free].sum() / before[0, s.free].sum()
    rate = after[1].sum() / before[1].sum()
    return 100 * (loss.item() - 1), rate.item()


def shuffled(gains, fires, seed):
    """The control: the same gains (M,) on other prototypes that fire about as often -> (M,)"""
    rng = torch.Generator().manual_seed(seed)
    control = gains.clone()
    for group in fires.argsort(stable=True).split(32):            # neighbors in order of firing
        group = group[torch.randperm(len(group), generator=rng)]
        is_one = (gains[group] == 1).int()
        group = group[is_one.argsort(stable=True)]                # gains other than 1 come first,
        control[group] = gains[group].flip(0)                     # and change places with ones
    return control


# ------------------------------------------- find: which prototypes, and which gains
def rank_prototypes(model, s):
    """States -> margin, merit, fires (the tokens with a gate above 0), each (M,)

        margin_i   sum over onsets of a_ti <W_y - mean W, p_i>, a share of <W_y - mean W, z_t>
        benefit_i  sum over onsets of -dCE / dg_i = a_ti <W_y - W^T pi_t, p_i>
        price_i    the same sum over text without the behavior
        merit_i    benefit_i / (|price_i| + mean |price|)
    """
    W, P = model.W, model.prototypes
    margin, error = torch.empty_like(s.gates), torch.empty_like(s.gates)   # (N, k)
    logit = 0.0
    for at, logp in log_softmax_chunks(s.z, W):
        b = s.take(at)
        centered = W[b.y] - W.mean(0)
        residual = W[b.y] - logp.exp() @ W
        margin[at] = b.gates * (centered @ P.T).gather(1, b.ids)
        error[at] = b.gates * (residual @ P.T).gather(1, b.ids)
        logit += (centered * b.z)[b.onset].sum()

    def total(values, keep):                                      # (N, k), (N,) -> (M,)
        sums = torch.zeros_like(P[:, 0])
        return sums.index_add_(0, s.ids[keep].flatten(), values[keep].flatten())

    price = total(error, s.free).abs()
    merit = total(error, s.onset) / (price + price.mean())
    fires = torch.bincount(s.ids[s.gates > 0], minlength=len(P))
    return total(margin, s.onset) / logit, merit, fires


def fit(model, s, w, rate_0, lam, ids, seed=0, steps=60, batch=1024, lr=0.1):
    """States, w (V,), the unchanged model's mean rate -> gains (M,), 1 but for prototypes `ids`

    minimizes over theta = g - 1   mean_t [ KL(q_t || pi_t without onsets) + lam rate_t / rate_0 ]

    in a few steps of Adam; q_t is the unchanged model's distribution without onsets.
    """
    W, P = model.W, model.prototypes
    rng = torch.Generator().manual_seed(seed)
    ones = torch.ones_like(P[:, 0])
    fires = torch.isin(s.ids, ids) & (s.gates > 0)
    s = s.take(fires.any(1))                                      # no other token changes
    theta = torch.zeros(len(ids), device=P.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr)
    for step in range(steps):
        drawn = torch.randint(len(s.z), (batch,), generator=rng)
        b = s.take(drawn.to(P.device))
        # q_v ~ pi_v (1 - w_v)
        q = (b.z @ W.T).softmax(1) * (1 - w)
        q /= q.sum(1, keepdim=True).clamp(min=1e-9)
        # KL(q || pi (1 - w) / (1 - rate_t)), without the terms that do not depend on theta
        gains = ones.index_add(0, ids, theta)
        z = apply_gains(b.z, b.ids, b.gates, gains, P)
        logp = (z @ W.T).log_softmax(1)
        rate = logp.exp() @ w
        kl = (1 - rate).clamp(min=1e-4).log() - (q * logp).sum(1)
        loss = (kl + lam * rate / rate_0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ones.index_add(0, ids, theta.detach())


def candidates(model, s, w, merit, mode="auto", seed=0):
    """States of training text -> yields (mode, size, setting, gains (M,))"""
    order = merit.argsort(descending=True)
    if mode in ("auto", "shared"):
        for size in SIZES:
            for gain in GAINS:
                gains = torch.ones_like(merit).index_fill(0, order[:size], gain)
                yield "shared", size, f"gain {gain:+g}", gains
    if mode in ("auto", "fit"):
        _, rate = measure(model, s, w)
        for size in FITTED:
            for lam in LAMBDAS:
                gains = fit(model, s, w, rate.mean(), lam, order[:size], seed)
                gains[(gains - 1).abs() <= 0.02] = 1.0
                yield "fit", size, f"lambda {lam:g}", gains


def write_gains(path, run, gains, **facts):
    """A gains file that common.load_gains reads. The sweep of an older file of this name goes."""
    ids = (gains != 1).nonzero()[:, 0].tolist()
    facts = dict(checkpoint=run.hash, **facts, ids=ids, gains=gains[ids].tolist())
    path.with_suffix(".sweep.json").unlink(missing_ok=True)
    write_json(path, facts)


def find(argv):
    cfg = parse_config(FindConfig, argv)
    run = Run(cfg.out_dir, cfg.device)
    model = run.model
    w, train, tune, _ = behavior_states(run, cfg.behavior, cfg.tokens, cfg.seed)
    print(f"{train.onset.sum():,} onsets in {len(train.y):,} training tokens")
    margin, merit, _ = rank_prototypes(model, train)
    for i in margin.argsort(descending=True)[:10].tolist():
        logits = model.W[:run.tokenizer.n_vocab] @ model.prototypes[i]
        raised = [run.decode([t]) for t in logits.argsort(descending=True)[:5]]
        print(f"prototype {i:>4}  margin {margin[i]:.3f}  raises {raised}")
    before = measure(model, tune, w)
    best, lowest = None, 1.0
    for mode, size, setting, gains in candidates(model, train, w, merit, cfg.mode, cfg.seed):
        loss, rate = effect(tune, before, measure(model, tune, w, gains))
        print(f"{mode} {size:>3}  {setting:<10}  loss {loss:+.3f}%  rate {rate:.4f}", flush=True)
        if loss <= cfg.price and rate < lowest:
            lowest, best = rate, gains
            found = dict(by=mode, size=size, setting=setting, tuning_loss_percent=loss,
                         tuning_rate=rate, **asdict(cfg))
    if best is None:
        raise UserError(f"mode {cfg.mode} (auto, shared, fit): none at {cfg.price}%; raise --price")
    path = run.out_dir / "gains" / f"{cfg.name}.json"
    write_gains(path, run, best, behavior=cfg.behavior, found=found)
    print(f"{path}: {found['by']}, loss {found['tuning_loss_percent']:+.2f}%, rate x {lowest:.3f}")


# ------------------------------------------- apply and sweep: before and after
def read_facts(path):
    """A gains file of find -> its behavior, and the price allowed."""
    with reading(f"gains file '{path}'", "expected one file that suppress.py find wrote"):
        facts = json.loads(Path(path).read_text("utf-8"))
        return facts["behavior"], float(facts["found"]["price"])


def beginnings(run, n, seed):
    """-> (n, 16) tokens: beginnings of text from the test half of the held-out windows."""
    T = run.T
    rng = torch.Generator().manual_seed(seed)
    window = torch.randint(len(run.val) // (2 * T), (n, 1), generator=rng)
    offset = torch.randint(T // 2, (n, 1), generator=rng)
    place = (2 * window + 1) * T + offset + torch.arange(min(16, T // 2))
    tokens = run.val[place.numpy()].astype(np.int64)
    return torch.from_numpy(tokens).to(run.device)


def samples(run, idx, pattern, max_new_tokens, temperature, seed, gains=None):
    """Continues idx (n, L) -> n pairs (matches that begin in the new tokens, the whole text)."""
    pieces = token_bytes(run.tokenizer, run.model.config.vocab_size)
    rows = run.model.generate(idx, max_new_tokens, temperature, seed=seed, gains=gains,
                              n_vocab=run.tokenizer.n_vocab)
    result = []
    for row in rows.tolist():
        _, onset = marks(row, pattern, pieces)
        result.append((int(onset[idx.size(1):].sum()), run.decode(row)))
    return result


def apply(argv):
    cfg = parse_config(ApplyConfig, argv)
    if cfg.num_samples < 1 or cfg.temperature < 0:
        raise UserError(f"num_samples={cfg.num_samples}, temperature={cfg.temperature}; "
                        "expected at least 1 and 0")
    run = Run(cfg.out_dir, cfg.device)
    gains = load_gains(cfg.gains, run.model)
    behavior, _ = read_facts(cfg.gains.split(",")[0])
    idx = beginnings(run, cfg.num_samples, cfg.seed)
    if cfg.prompt:
        ids = run.tokenizer.encode_ordinary(cfg.prompt)
        idx = torch.tensor([ids] * cfg.num_samples, device=run.device)
    options = compile_pattern(behavior), cfg.max_new_tokens, cfg.temperature, cfg.seed
    before = samples(run, idx, *options)
    after = samples(run, idx, *options, gains)
    for old, new in zip(before, after):
        print(f"before, {old[0]} matches | {plain(old[1])}")
        print(f" after, {new[0]} matches | {plain(new[1])}")


def sweep(argv):
    cfg = parse_config(SweepConfig, argv)
    run = Run(cfg.out_dir, cfg.device)
    model = run.model
    gains = load_gains(cfg.gains, model)
    behavior, price = read_facts(cfg.gains)
    w, train, _, test = behavior_states(run, behavior, cfg.tokens, cfg.seed)
    _, merit, fires = rank_prototypes(model, train)
    # teacher-forced: each candidate, and the same gains on other prototypes
    before = measure(model, test, w)
    proposed = candidates(model, train, w, merit, seed=cfg.seed)
    chosen = "chosen", int((gains != 1).sum()), "", gains
    rows = []
    for mode, size, setting, g in itertools.chain(proposed, [chosen]):
        loss, rate = effect(test, before, measure(model, test, w, g))
        control = shuffled(g, fires, cfg.seed)
        control_loss, control_rate = effect(test, before, measure(model, test, w, control))
        print(f"{mode:>6} {size:>3}  {setting:<10}  loss {loss:+.3f}%  rate {rate:.4f}"
              f"  control {control_loss:+.3f}% {control_rate:.4f}", flush=True)
        rows.append(dict(mode=mode, size=size, setting=setting, loss_percent=loss, rate=rate,
                         control_loss_percent=control_loss, control_rate=control_rate))

    # sampled: the texts with most matches before, and what becomes of them
    idx = beginnings(run, 64, cfg.seed)
    options = compile_pattern(behavior), 100, 1.0, cfg.seed
    pairs = zip(samples(run, idx, *options), samples(run, idx, *options, gains))
    before, after = zip(*sorted(pairs, reverse=True)[:4])
    path = Path(cfg.gains).with_suffix(".sweep.json")
    write_json(path, dict(behavior=behavior, checkpoint=run.hash, price=price, rows=rows,
                          before=before, after=after))
    print(f"{path}: python report.py shows it")


def main(argv):
    run_command({"find": find, "apply": apply, "sweep": sweep}, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
