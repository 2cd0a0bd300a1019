"""Change what a trained model does by turning its prototypes: no finetuning, one vector of gains.

    python suppress.py find --behavior='>>>' --name=examples       which prototypes carry it; proposes gains: out/gains/examples.json
    python suppress.py apply --gains=out/gains/examples.json       before and after, side by side, with the same seeds
    python suppress.py sweep --gains=out/gains/examples.json       effect against price over size and gain, with random controls
    python suppress.py calibrate --task=data/pydoc/cloze.jsonl     linear controllers that gain accuracy; out/gains/cloze.json
    python prism.py --gains=out/gains/examples.json --prompt="..."  gains files work wherever text is sampled

The mathematics. Gains g (M,) enter as logits_t = W (r_t + sum_i g_i a_ti p_i); ones change nothing, 0 suppresses, above 1 amplifies, and a
negative gain pushes away what its prototype stands for, only where it fires. The trunk plays no part: hidden states z_t are cached once.

A behavior is a regular expression over text. Its onsets are the tokens that hold the first character of a match, and w_v is the share of
the occurrences of token v in the training text that are onsets. Its rate, without sampling, is the mean over tokens of sum_v w_v pi_tv.
Ways to turn it down, which `find` compares by rate and price on a tuning split:

    zero      the prototypes of the best ranking get one gain, 0 or below; the residual stays
    reselect  they leave the top-k search, so the state is expressed anew by what remains; the residual stays
    fit       g = 1 + theta minimises  mean_t KL(q_t || pi_t without onsets) + lam rate / rate_0, q_t the untouched model without onsets:
              the logits are linear in theta, so a hundred steps on cached states take seconds
"""
import csv
import html
import io
import base64
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from prism import (UserError, atomic, dataset_folder, fingerprint, load_checkpoint, load_dataset, load_gains, load_tokenizer, parse_config, pick_device,
                   run_main)


# ----------------------------------------------------------------------------- configuration, a dataclass a subcommand

@dataclass
class FindConfig:
    out_dir: str = "out"      # the run
    behavior: str = ""        # a regular expression over text
    positive: str = ""        # or: a file of texts that show the behavior, one a line
    negative: str = ""        # and a file of texts that do not
    name: str = "behavior"    # written: out_dir/gains/NAME.json
    mode: str = "auto"        # zero, reselect or fit; auto takes the one with the lowest rate at an allowed price
    price: float = 0.5        # largest rise of the loss of text without the behavior, in percent, on the tuning split
    tokens: int = 200000      # training tokens looked at
    top: int = 10             # prototypes shown
    seed: int = 1             # of the choice of text, and of fitting
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class ApplyConfig:
    out_dir: str = "out"      # the run
    gains: str = ""           # a gains file, or several with commas between
    prompt: str = ""          # text to continue; without it, beginnings of held-out text
    num_samples: int = 3      # continuations shown
    max_new_tokens: int = 60  # length of each
    temperature: float = 0.8  # 0 is greedy
    top_p: float = 1.0        # keep the smallest set of tokens with this probability
    seed: int = 1337          # one seed, one text
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class SweepConfig:
    out_dir: str = "out"      # the run
    gains: str = ""           # a file that find wrote
    prompts: int = 256        # held-out beginnings that are continued, each side
    max_new_tokens: int = 100  # length of each
    temperature: float = 1.0  # of the sampling
    tokens: int = 200000      # training tokens looked at
    seed: int = 2             # of prompts, sampling and controls
    device: str = "auto"      # auto, cpu, cuda or mps


# ----------------------------------------------------------------------------- a behavior in text

def token_bytes(tokenizer, vocab_size):
    """The bytes of every token: a list of vocab_size; b"" for numbers that the tokenizer does not know."""
    known = set(range(tokenizer.n_vocab))
    return [tokenizer.decode_single_token_bytes(i) if i in known and i != tokenizer.eot_token else b"" for i in range(vocab_size)]


def marks(tokens, pattern, pieces):
    """tokens (N,) -> carried (N,) and onset (N,), bools: tokens that overlap a match of `pattern` in their text; that hold its first
    character. Bytes that are no UTF-8 (a text cut within a character) match nothing but `.`."""
    raw = [pieces[t] for t in tokens]
    ends = np.cumsum([len(b) for b in raw])
    text = b"".join(raw).decode("utf-8", "surrogateescape")
    sizes = np.array([1 if c < "\x80" or "\udc80" <= c <= "\udcff" else len(c.encode()) for c in text], np.int64)
    at = np.concatenate(([0], sizes.cumsum()))                                                 # byte of each character
    carried, onset = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)
    for m in pattern.finditer(text):
        if m.end() > m.start():
            first, last = np.searchsorted(ends, at[[m.start(), m.end()]] - [0, 1], side="right")
            carried[first:last + 1], onset[first] = True, True
    return carried, onset


def compiled(pattern):
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(f"behavior={pattern} is no regular expression ({e}); for plain text put a backslash before . * + ? ( ) [ ] {{ }} ^ $ |") from None


class States(NamedTuple):
    """Cached hidden states of N tokens in windows, and what is to be predicted from them."""
    z: torch.Tensor        # (N, d)
    ids: torch.Tensor      # (N, k)
    gates: torch.Tensor    # (N, k)
    y: torch.Tensor        # (N,) the next token
    onset: torch.Tensor    # (N,) bool: y begins the behavior
    free: torch.Tensor     # (N,) bool: y is no part of it
    window: torch.Tensor   # (N,) number of the window
    weight: torch.Tensor   # (N,) how many tokens this one stands for

    def take(self, keep):
        return States(*(u[keep] for u in self))


class Lab:
    """A run with the text that behaviors are looked for in: pattern -> states of training, tuning and test text."""

    def __init__(self, out_dir, device="auto"):
        self.out_dir, self.device = Path(out_dir), pick_device(device)
        self.model, self.ckpt = load_checkpoint(out_dir, self.device)
        self.model.requires_grad_(False).eval()
        c = self.model.config
        if not c.n_proto:
            raise UserError(f"{out_dir} holds a dense model (n_proto = 0); there are no prototypes to turn")
        if "train_config" not in self.ckpt:
            raise UserError(f"{out_dir}/ckpt.pt does not say what it was trained on; train it with train.py")
        self.tokenizer, self.T = load_tokenizer(out_dir), c.block_size
        self.train, self.val, self.meta = load_dataset(dataset_folder(self.ckpt["train_config"]["dataset"]))
        self.W, self.P = self.model.transformer.wte.weight, self.model.prototypes
        self.pieces = token_bytes(self.tokenizer, c.vocab_size)
        if len(self.val) < 4 * self.T:
            raise UserError(f"the held-out text has {len(self.val)} tokens, expected at least {4 * self.T}: prepare more text")

    def encode(self, texts):
        return np.array(sum(([*self.tokenizer.encode_ordinary(t), self.tokenizer.eot_token] for t in texts), []), np.int64)

    @torch.no_grad()
    def states(self, tokens, carried, onset, windows):
        """Windows (numbers, of block_size tokens) of `tokens` -> States, the hidden states on the device."""
        parts = []
        for i in range(0, len(windows), 32):
            at = windows[i:i + 32, None] * self.T + np.arange(self.T + 1)
            raw = torch.from_numpy(tokens[at].astype(np.int64)).to(self.device)
            z = self.model.hidden(raw[:, :-1]).flatten(0, 1)
            m, y = self.model.mixture(z), at[:, 1:].ravel()
            parts.append((z, m.ids, m.gates, raw[:, 1:].flatten(), *(torch.from_numpy(u).to(self.device) for u in (onset[y], ~carried[y], at[:, :1].repeat(self.T, 1).ravel() // self.T))))
        every = [torch.cat(u) for u in zip(*parts)]
        return States(*every, torch.ones(len(every[0]), device=self.device))

    def look(self, pattern, n_tokens, seed):
        """What find and sweep need of a behavior: w (V,), and States of training text (a weighted sample), of the tuning half and of
        the test half of the held-out text (alternate windows). Raises UserError where it never occurs."""
        rng, size = np.random.default_rng(seed), min(len(self.train), 2 ** 22)
        train = np.asarray(self.train[:size]).astype(np.int64)
        carried, onset = marks(train, pattern, self.pieces)
        if not onset.any():
            raise UserError(f"behavior={pattern.pattern} never occurs in {size:,} tokens of training text; there is nothing to learn it from")
        count = np.bincount(train, minlength=len(self.W))
        w = torch.from_numpy(np.bincount(train[onset], minlength=len(self.W)) / np.maximum(count, 1)).float().to(self.device)
        windows = np.arange((size - 1) // self.T)
        has = np.array([onset[i * self.T + 1:(i + 1) * self.T + 1].any() for i in windows])
        room = max(2, n_tokens // self.T)
        some, rest = (rng.permutation(windows[u]) for u in (has, ~has))
        some, rest = some[:max(room // 2, room - len(rest))], rest[:room - min(len(some), room // 2)]
        train_states = []
        for part, all_of in ((some, has.sum()), (rest, (~has).sum())):
            if len(part):
                s = self.states(train, carried, onset, np.sort(part))
                train_states.append(s._replace(weight=s.weight * (all_of / len(part))))
        val = np.asarray(self.val[:2 ** 20]).astype(np.int64)
        marked, windows = marks(val, pattern, self.pieces), np.arange((min(len(self.val), 2 ** 20) - 1) // self.T)
        tune, test = (self.states(val, *marked, windows[half::2]) for half in (0, 1))
        return w, States(*(torch.cat(u) for u in zip(*train_states))), tune, test

    # -- what gains do to cached states

    def turned(self, s, gains):
        """States and gains (M,) -> hidden states (N, d) under them, before W."""
        if (gains == -math.inf).any():
            m, gates = self.model.turned(s.z, gains)
            return m.residual + F.embedding_bag(m.ids, self.P, per_sample_weights=gates, mode="sum")
        return s.z + F.embedding_bag(s.ids, self.P, per_sample_weights=s.gates * (gains - 1)[s.ids], mode="sum")

    @torch.no_grad()
    def measure(self, s, w, gains=None, bias=0.0):
        """-> loss (N,) of each token, nats, and the behavior's rate there (N,) = sum_v w_v pi_v, with gains or an added bias of the logits."""
        z = s.z if gains is None else self.turned(s, gains)
        loss, rate = [], []
        for i in range(0, len(z), 2048):
            logp = (z[i:i + 2048] @ self.W.T + bias).log_softmax(1)
            loss.append(-logp.gather(1, s.y[i:i + 2048, None])[:, 0])
            rate.append(logp.exp() @ w)
        return torch.cat(loss), torch.cat(rate)


def effect(s, before, after):
    """before, after: (loss, rate) of measure() -> rise of the loss of text without the behavior, in percent; rate after as a share of before."""
    wt = s.weight * s.free
    return 100 * ((after[0] * wt).sum() / (before[0] * wt).sum()).item() - 100, ((after[1] * s.weight).sum() / (before[1] * s.weight).sum()).item()


def interval(numerator, denominator, seed=0, draws=1000):
    """Bootstrap over units: the ratio of sums, and its 2.5% and 97.5% quantiles."""
    n = len(numerator)
    at = np.random.default_rng(seed).integers(0, n, (draws, n))
    ratios = numerator[at].sum(1) / np.maximum(denominator[at].sum(1), 1e-12)
    return (numerator.sum() / max(denominator.sum(), 1e-12), *np.quantile(ratios, [0.025, 0.975]))


# ----------------------------------------------------------------------------- find: which prototypes, and by how much

@torch.no_grad()
def rank(lab, s):
    """States -> for each prototype (M,): its share of the behavior's logit margin at the onsets, the contrast of its mean gate there
    against elsewhere, the benefit of turning it off over its price, and how often it fires.

    margin share_i   sum over onsets of a_ti <W_y - mean W, p_i>, as a share of the sum of the centered logits
    benefit, price   -dCE / dg_i summed over onsets, and over text without the behavior: a_ti <W_y - W^T pi_t, p_i>
    """
    M = len(lab.P)
    sums = {n: torch.zeros(M, device=lab.device) for n in ("margin", "benefit", "price", "on", "off", "fires")}
    center, logit = lab.W.mean(0), 0.0
    onset, free = s.weight * s.onset, s.weight * s.free
    for i in range(0, len(s.z), 2048):
        at = slice(i, i + 2048)
        pi, wy, a, ids = (s.z[at] @ lab.W.T).softmax(1), lab.W[s.y[at]], s.gates[at], s.ids[at].flatten()
        centered, error = ((v @ lab.P.T).gather(1, s.ids[at]) * a for v in (wy - center, wy - pi @ lab.W))  # (n, k)
        for name, values, weight in (("margin", centered, onset), ("benefit", error, onset), ("price", error, free), ("on", a, onset), ("off", a, free),
                                     ("fires", (a > 0).float(), s.weight)):
            sums[name].index_add_(0, ids, (values * weight[at, None]).flatten())
        logit += (((wy - center) * s.z[at]).sum(1) * onset[at]).sum()
    merit = sums["benefit"] / (sums["price"].clamp(min=0) + 0.01 * sums["benefit"].clamp(min=0).sum() / onset.sum() * free.sum() / M + 1e-12)
    return {"margin": sums["margin"] / logit, "contrast": sums["on"] / onset.sum() - sums["off"] / free.sum(), "merit": merit * (sums["benefit"] > 0), "fires": sums["fires"]}


def fit(lab, s, w, rate, lam, steps=100, batch=2048, lr=0.1, seed=0):
    """theta (M,), the minimum over States s of  mean KL(q || pi without onsets) + lam rate / rate_0; q is the untouched model's
    distribution without onsets. rate (N,): the untouched model's. Adam on the prototypes alone; half of the steps lower its rate to 0."""
    theta = torch.zeros(len(lab.P), device=lab.device, requires_grad=True)
    opt = torch.optim.Adam([theta], lr, betas=(0.9, 0.99))
    rng, rate0 = torch.Generator().manual_seed(seed), (rate * s.weight).sum() / s.weight.sum()
    s, order = s._replace(weight=s.weight / s.weight.mean()), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(s.z), generator=rng)
        b, order = s.take(order[:batch].to(lab.device)), order[batch:]
        with torch.no_grad():
            q = (b.z @ lab.W.T).softmax(1) * (1 - w)
            q /= q.sum(1, keepdim=True)
        logp = (lab.turned(b, 1 + theta) @ lab.W.T).log_softmax(1)
        left = logp.exp() @ w                                                                  # (n,) sum_v w_v pi_v
        kl = (1 - left).clamp(min=1e-4).log() - (q * logp).sum(1)                              # without terms that theta does not move
        loss = ((kl + lam * left / rate0) * b.weight).mean()
        opt.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return theta.detach()
