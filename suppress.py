"""Change what a trained model does by turning its prototypes: no finetuning, one vector of gains.

    python suppress.py find --behavior='>>>' --name=examples       which prototypes carry it; proposes gains: out/gains/examples.json
    python suppress.py apply --gains=out/gains/examples.json       before and after, side by side, with the same seeds
    python suppress.py sweep --gains=out/gains/examples.json       effect against price over size and gain, with random controls
    python suppress.py calibrate --task=data/pydoc/cloze.jsonl     linear controllers that gain accuracy; out/gains/controller.json
    python prism.py --gains=out/gains/examples.json --prompt="..."  gains files work wherever text is sampled

The mathematics. Gains g (M,) enter as logits_t = W (r_t + sum_i g_i a_ti p_i); ones change nothing, 0 suppresses, above 1 amplifies, and a
negative gain pushes away what its prototype stands for, only where it fires. The trunk plays no part: hidden states z_t are cached once.

A behavior is a regular expression over text. Its onsets are the tokens that hold the first character of a match, and w_v is the share of
the occurrences of token v in the training text that are onsets. Its rate, without sampling, is the mean over tokens of sum_v w_v pi_tv.
Ways to turn it down, which `find` compares by rate and price on a tuning split:

    zero      the prototypes of the best ranking get one gain, 0 or below; the residual stays
    reselect  they leave the top-k search, so the state is expressed anew by what remains; the residual stays
    fit       each of them gets a gain of its own: g = 1 + theta goes down  mean_t KL(q_t || pi_t without onsets) + lam rate / rate_0,
              q_t the untouched model without onsets; the logits are linear in theta, so sixty steps on cached states take seconds
"""
import csv
import io
import base64
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from prism import (UserError, atomic, dataset_folder, fingerprint, load_checkpoint, load_dataset, load_gains, load_tokenizer, parse_config, pick_device,
                   plain, run_command, run_main)


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


@dataclass
class CalibrateConfig:
    out_dir: str = "out"      # the run
    task: str = ""            # items to test on, as data/prepare.py cloze writes them
    calibration: str = ""     # items to fit on (cloze --split=train); without it, those of `share` of the task's documents
    name: str = "controller"  # written: out_dir/gains/NAME.json
    score: str = "sum"        # of a choice: sum of its tokens' log-probabilities, or norm, that divided by its bytes
    folds: int = 3            # of the cross-validation that picks the penalties
    share: float = 0.5        # of the documents (of the items, where they name none); the others test
    trace: int = 5            # largest gains that are traced to training text
    seed: int = 1             # of splits and controls
    device: str = "auto"      # auto, cpu, cuda or mps


# ----------------------------------------------------------------------------- a behavior in text

def token_bytes(tokenizer, vocab_size):
    """The bytes of every token: a list of vocab_size. The end of a text is a zero, so that no word runs over it; numbers that the tokenizer
    does not know are empty."""
    return [b"\0" if i == tokenizer.eot_token else tokenizer.decode_single_token_bytes(i) if i < tokenizer.n_vocab else b"" for i in range(vocab_size)]


def marks(tokens, pattern, pieces):
    """tokens (N,) -> carried (N,) and onset (N,), bools: tokens that overlap a match of `pattern` in their text; that hold its first
    character. Bytes that are no UTF-8 (a text cut within a character) match only what excludes characters, as `.` and `[^a]` do."""
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

    def training_text(self, cfg):
        """-> tokens, carried, onset (N,), of the training text (its first 4 million tokens), or of the files of texts given, where every
        token of a positive text counts as an onset."""
        if cfg.behavior and (cfg.positive or cfg.negative) or not cfg.behavior and not (cfg.positive and cfg.negative):
            raise UserError("give --behavior=REGEX, or --positive and --negative, files of one text a line; not both")
        if cfg.behavior:
            tokens = np.asarray(self.train[:2 ** 22]).astype(np.int64)
            return tokens, *marks(tokens, compiled(cfg.behavior), self.pieces)
        parts = []
        for path, shows in ((cfg.positive, True), (cfg.negative, False)):
            try:
                texts = [t for t in Path(path).read_text("utf-8").splitlines() if t.strip()]
            except (OSError, ValueError) as e:
                raise UserError(f"{path} cannot be read ({e}); expected a file of texts, one a line") from None
            if not texts:
                raise UserError(f"{path} holds no text; expected one a line")
            ids = sum(([*self.tokenizer.encode_ordinary(t), self.tokenizer.eot_token] for t in texts), [])
            ids += [self.tokenizer.eot_token] * (-len(ids) % self.T)  # whole windows
            parts.append((np.array(ids, np.int64), np.array([shows and t != self.tokenizer.eot_token for t in ids])))
        tokens, shown = (np.concatenate((*u, u[1][-1:])) for u in zip(*parts))
        return tokens, shown, shown

    def look(self, cfg):
        """What a behavior is measured with: w (V,), and States of training text (a weighted sample of windows, half of them with onsets
        where there are so many), of the tuning half and of the test half of the held-out text (alternate windows)."""
        rng, T = np.random.default_rng(cfg.seed), self.T
        tokens, carried, onset = self.training_text(cfg)
        has = onset[1:(len(tokens) - 1) // T * T + 1].reshape(-1, T).any(1)
        if not has.any():
            raise UserError(f"behavior={cfg.behavior} never occurs in {len(tokens):,} tokens of training text; there is nothing to learn it from")
        count = np.bincount(tokens, minlength=len(self.W))
        w = torch.from_numpy(np.bincount(tokens[onset], minlength=len(self.W)) / np.maximum(count, 1)).float().to(self.device)
        room, sample = max(2, cfg.tokens // T), []
        some, rest = (rng.permutation(np.flatnonzero(u)) for u in (has, ~has))
        kept = some[:max(room // 2, room - len(rest))]
        for part, whole in ((kept, some), (rest[:room - len(kept)], rest)):
            if len(part):
                s = self.states(tokens, carried, onset, np.sort(part))
                sample.append(s._replace(weight=s.weight * (len(whole) / len(part))))
        val = np.asarray(self.val[:2 ** 16]).astype(np.int64)
        marked = marks(val, compiled(cfg.behavior), self.pieces) if cfg.behavior else [np.zeros(len(val), bool)] * 2
        windows = np.arange((len(val) - 1) // T)
        found = [States(*(torch.cat(u) for u in zip(*sample))), *(self.states(val, *marked, windows[half::2]) for half in (0, 1))]
        if not all(s.free.any() for s in found):
            raise UserError(f"behavior={cfg.behavior} covers all of the text; there is none without it to keep as it is: narrow the pattern")
        return w, *found

    def raised(self, i):
        """The tokens whose logits prototype i raises most."""
        logits = self.W[:self.tokenizer.n_vocab] @ self.P[i]
        return [self.tokenizer.decode([t]) for t in logits.topk(min(5, len(logits))).indices.tolist()]

    # -- what gains do to cached states

    def turned(self, s, gains):
        """States and gains (M,) -> hidden states (N, d) under them, before W."""
        if (gains == -math.inf).any():
            return self.model.under(s.z, gains)  # a new search
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
    price = sums["price"].abs()
    return {"margin": sums["margin"] / logit, "contrast": sums["on"] / onset.sum() - sums["off"] / free.sum(),
            "merit": sums["benefit"] / (price + price.mean() + 1e-12), "fires": sums["fires"]}


def fit(lab, s, w, rate, lam, ids, steps=60, batch=1024, lr=0.1, seed=0):
    """theta (M,), not zero for the prototypes `ids` alone, on the way to the minimum over States s of  mean KL(q || pi without onsets) + lam rate / rate_0;
    q is the untouched model's distribution without onsets. rate (N,): the untouched model's. Adam, half of the steps lowering its rate to 0: what can be
    reached in `steps`, |theta| below 0.75 lr steps, is part of the bargain, as early stopping is."""
    rng, rate0 = torch.Generator().manual_seed(seed), (rate * s.weight).sum() / s.weight.sum()
    theta, none = torch.zeros(len(ids), device=lab.device, requires_grad=True), torch.zeros(len(lab.P), device=lab.device)
    opt, order = torch.optim.Adam([theta], lr, betas=(0.9, 0.99)), torch.empty(0, dtype=torch.long)
    s = s.take((none.index_fill(0, ids, 1.0)[s.ids] * s.gates > 0).any(1))                     # theta changes no other token
    for step in range(steps if len(s.z) else 0):
        if len(order) < batch:
            order = torch.randperm(len(s.z), generator=rng)
        b, order = s.take(order[:batch].to(lab.device)), order[batch:]
        with torch.no_grad():
            q = (b.z @ lab.W.T).softmax(1) * (1 - w)
            q /= q.sum(1, keepdim=True).clamp(min=1e-9)
        logp = (lab.turned(b, 1 + none.index_copy(0, ids, theta)) @ lab.W.T).log_softmax(1)
        left = logp.exp() @ w                                                                  # (n,) sum_v w_v pi_v
        kl = (1 - left).clamp(min=1e-4).log() - (q * logp).sum(1)                              # without terms that theta does not move
        loss = ((kl + lam * left / rate0) * b.weight).sum() / b.weight.sum()
        opt.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return none.index_copy(0, ids, theta.detach())


SIZES, GAINS, FITTED, LAMBDAS = (1, 2, 4, 8, 16, 32), (0.0, -1.0), (16, 64, 256), (0.1, 0.3, 1.0)


def candidates(lab, s, w, ranks, mode="auto", seed=0):
    """Ways to turn a behavior down, from training States and their rank(): yields (mode, size of the group, setting, gains (M,))."""
    order, M = ranks["merit"].argsort(descending=True), len(lab.P)
    ones = torch.ones(M, device=lab.device)
    for size in SIZES:
        for gain in GAINS if mode in ("auto", "zero") and size <= M else ():
            yield "zero", size, f"gain {gain:+g}", ones.index_fill(0, order[:size], gain)
        if mode in ("auto", "reselect") and size <= M - lab.model.config.top_k:
            yield "reselect", size, "", ones.index_fill(0, order[:size], -math.inf)
    rate = lab.measure(s, w)[1] if mode in ("auto", "fit") else None
    for size in sorted({min(n, M) for n in FITTED}) if mode in ("auto", "fit") else ():
        for lam in LAMBDAS:
            theta = fit(lab, s, w, rate, lam, order[:size], seed=seed)
            yield "fit", size, f"lambda {lam:g}", 1 + torch.where(theta.abs() > 0.02, (theta * 1e4).round() / 1e4, 0.0)


def write_gains(path, lab, gains, **about):
    """A gains file that prism.load_gains reads, one number a line. What sweep made of an older one of this name goes."""
    ids = (gains != 1).nonzero()[:, 0].tolist()
    mode = "reselect" if (gains == -math.inf).any() else "zero"
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".png", ".sweep"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    with atomic(path, "w", encoding="utf-8") as f:
        json.dump(dict(checkpoint=fingerprint(lab.model.state_dict()), mode=mode, **about, ids=ids,
                       gains=[0.0 if mode == "reselect" else round(gains[i].item(), 4) for i in ids]), f, indent=1)


def checked_name(name):
    if not re.fullmatch(r"[\w-]{1,80}", name):
        raise UserError(f"name={name!r}, expected letters, digits, _ and -")
    return name


def find(argv):
    cfg = parse_config(FindConfig, argv)
    if cfg.mode not in ("auto", "zero", "reselect", "fit"):
        raise UserError(f"mode={cfg.mode}, expected auto, zero, reselect or fit")
    if cfg.tokens < 1 or cfg.top < 1 or not 0 <= cfg.price < math.inf:
        raise UserError(f"tokens is {cfg.tokens}, top {cfg.top}, price {cfg.price}; expected at least 1, 1 and 0")
    name, lab = checked_name(cfg.name), Lab(cfg.out_dir, cfg.device)
    w, train, tune, _ = lab.look(cfg)
    onsets = int(train.onset.sum())
    print(f"{onsets:,} onsets in {len(train.z):,} training tokens" + (": few; expect little" if onsets < 30 else "") + f"; {int(tune.onset.sum())} in {len(tune.z):,} tokens of the tuning split")
    ranks = rank(lab, train)
    print("prototype  margin share  gate contrast   raises")
    for i in ranks["margin"].argsort(descending=True)[:cfg.top].tolist():
        print(f"{i:>9}  {ranks['margin'][i]:>12.1%}  {ranks['contrast'][i]:>+13.3f}   " + " ".join(map(repr, lab.raised(i))))
    before, best = lab.measure(tune, w), None
    for mode, size, setting, gains in candidates(lab, train, w, ranks, cfg.mode, cfg.seed):
        loss, rate = effect(tune, before, lab.measure(tune, w, gains))
        print(f"{mode:>9} {size:>4} {setting:>10}: rate x {rate:.3f}, loss {loss:+.3f}%", flush=True)
        if loss <= cfg.price and rate < (best[0] if best else 1.0):
            best = rate, loss, mode, size, setting, gains
    if best is None:
        raise UserError(f"nothing that was tried lowers the rate and costs at most {cfg.price}% of loss; raise --price, or try another --mode")
    rate, loss, mode, size, setting, gains = best
    path = lab.out_dir / "gains" / f"{name}.json"
    write_gains(path, lab, gains, behavior=cfg.behavior or None, found=dict(by=mode, size=size, setting=setting, tuning_rate=round(rate, 4), tuning_loss_percent=round(loss, 4),
                price=cfg.price, seed=cfg.seed, tokens=cfg.tokens, positive=cfg.positive, negative=cfg.negative))
    print(f"{path}: {int((gains != 1).sum())} prototypes by {mode}{f' ({setting})' * bool(setting)}; on the tuning split, teacher-forced, rate x {rate:.3f}, loss {loss:+.3f}%. "
          f"Next: python suppress.py {'sweep' if cfg.behavior else 'apply'} --out_dir={cfg.out_dir} --gains={path}")


# ----------------------------------------------------------------------------- apply and sweep: before and after, and the price

def beginnings(lab, n, seed, length=16):
    """(n, length) tokens: beginnings of text from the test half of the held-out windows."""
    rng, T = np.random.default_rng(seed), lab.T
    length = min(length, T // 2)
    at = 2 * T * rng.integers((len(lab.val) - 1) // (2 * T), size=n) + T + rng.integers(T - length, size=n)
    return torch.from_numpy(lab.val[at[:, None] + np.arange(length)].astype(np.int64)).to(lab.device)


def continued(lab, idx, cfg, gains=None):
    """idx (n, L) -> the new tokens (n, max_new_tokens), sampled 64 rows at a time; the same cfg.seed gives the same draws."""
    top_p = getattr(cfg, "top_p", None)
    return np.concatenate([lab.model.generate(idx[i:i + 64], cfg.max_new_tokens, cfg.temperature, top_p=top_p, seed=cfg.seed + i, gains=gains,
                                              n_vocab=lab.tokenizer.n_vocab)[:, idx.size(1):].cpu().numpy() for i in range(0, len(idx), 64)])


def counted(lab, idx, new, pattern):
    """Matches (n,) that begin in the new tokens."""
    n = idx.size(1)
    return np.array([marks(np.concatenate((p, y)), pattern, lab.pieces)[1][n:].sum() for p, y in zip(idx.cpu().numpy(), new)])


def shuffled(gains, fires, seed, width=16):
    """The control: the same gains on random prototypes that fire about as often. A small group's go to other prototypes, each to one
    of the `width` nearest in the order of firing; those of most prototypes are shuffled among `width` neighbours. -> (M,)"""
    order, rng = fires.argsort(stable=True).tolist(), np.random.default_rng(seed)
    moved = (gains != 1).tolist()
    if 4 * sum(moved) > len(moved):
        source = [i for at in range(0, len(order), width) for i in rng.permutation(order[at:at + width]).tolist()]
        return torch.empty_like(gains).index_copy_(0, torch.tensor(order, device=gains.device), gains[source])
    out, free = torch.ones_like(gains), [(place, i) for place, i in enumerate(order) if not moved[i]]
    for place, i in enumerate(order):
        if moved[i]:
            near = sorted(range(len(free)), key=lambda j: abs(free[j][0] - place))[:width]
            out[free.pop(int(rng.choice(near)))[1]] = gains[i]
    return out


def about(path):
    """A gains file as a dict, of which load_gains has checked the numbers."""
    return json.loads(Path(path).read_text("utf-8"))


def need_gains(cfg):
    if not cfg.gains:
        raise UserError("no gains file; find some first: python suppress.py find --behavior='>>>' --name=examples, then --gains=out/gains/examples.json")


def apply(argv):
    cfg = parse_config(ApplyConfig, argv)
    need_gains(cfg)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1:
        raise UserError(f"num_samples is {cfg.num_samples}, max_new_tokens {cfg.max_new_tokens}; expected at least 1")
    lab = Lab(cfg.out_dir, cfg.device)
    gains = load_gains(cfg.gains, lab.model)
    named = [about(path).get("behavior") for path in cfg.gains.split(",")] if not Path(cfg.gains).exists() else [about(cfg.gains).get("behavior")]
    patterns = [compiled(p) for p in named if isinstance(p, str)]
    if cfg.prompt:
        ids = lab.tokenizer.encode_ordinary(cfg.prompt)
        idx = torch.tensor([ids] * cfg.num_samples, device=lab.device)
    else:
        idx = beginnings(lab, cfg.num_samples, cfg.seed)
    both = [continued(lab, idx, cfg, g) for g in (None, gains)]
    for i, rows in enumerate(zip(*both)):
        print(f"--- {i + 1}: {plain(lab.tokenizer.decode(idx[i].tolist()))}")
        for name, row in zip(("before", " after"), rows):
            print(f"{name} | " + plain(lab.tokenizer.decode(row.tolist()), keep="\n").replace("\n", "\n       | "))
    for pattern in patterns:
        n = [counted(lab, idx, new, pattern).sum() for new in both]
        print(f"{pattern.pattern!r}: {n[0]} matches before, {n[1]} after, in {both[0].size} tokens each")


def sweep(argv):
    cfg = parse_config(SweepConfig, argv)
    lab = Lab(cfg.out_dir, cfg.device)
    need_gains(cfg)
    if "," in cfg.gains:
        raise UserError(f"gains={cfg.gains}: sweep takes one file, that of find; apply shows several together")
    gains, made, path = load_gains(cfg.gains, lab.model), about(cfg.gains), Path(cfg.gains)
    if not isinstance(made.get("behavior"), str):
        raise UserError(f"{path} names no behavior to count; it was not made by find --behavior")
    if cfg.prompts < 2 or cfg.max_new_tokens < 1:
        raise UserError(f"prompts is {cfg.prompts}, max_new_tokens {cfg.max_new_tokens}; expected at least 2 and 1")
    pattern = compiled(made["behavior"])
    w, train, _, test = lab.look(FindConfig(behavior=made["behavior"], tokens=cfg.tokens, seed=cfg.seed))
    before, ranks, rows = lab.measure(test, w), rank(lab, train), []
    fires = ranks["fires"]
    for mode, size, setting, g in [*candidates(lab, train, w, ranks, seed=cfg.seed), ("chosen", int((gains != 1).sum()), "", gains)]:
        (loss, rate), (control_loss, control_rate) = (effect(test, before, lab.measure(test, w, u)) for u in (g, shuffled(g, fires, cfg.seed)))
        rows.append(dict(mode=mode, size=size, setting=setting, rate=round(rate, 4), loss_percent=round(loss, 4), control_rate=round(control_rate, 4), control_loss_percent=round(control_loss, 4)))
        print(f"{mode:>9} {size:>4} {setting:>10}: rate x {rate:.3f}, loss {loss:+.3f}%; the same gains on others: x {control_rate:.3f}, {control_loss:+.3f}%", flush=True)
    # sampled text: before, after, and the control
    idx = beginnings(lab, cfg.prompts, cfg.seed)
    text = {n: continued(lab, idx, cfg, g) for n, g in (("before", None), ("after", gains), ("control", shuffled(gains, fires, cfg.seed)))}
    count = {n: counted(lab, idx, new, pattern) for n, new in text.items()}
    per = {n: interval(1000.0 * c, np.full(len(c), float(cfg.max_new_tokens))) for n, c in count.items()}
    after = lab.measure(test, w, gains)[0]
    window = np.unique(test.window.cpu().numpy(), return_inverse=True)[1]
    loss, low, high = interval(*(np.bincount(window, (u * test.free).cpu()) for u in (after - before[0], before[0])))
    cut, control = (round(1 - count[n].sum() / count["before"].sum(), 4) if count["before"].sum() else None for n in ("after", "control"))
    result = dict(name=path.stem, behavior=made["behavior"], gains=str(path), options=asdict(cfg), rows=rows, per_1000_tokens={n: [round(x, 4) for x in v] for n, v in per.items()},
                  matches={n: int(c.sum()) for n, c in count.items()}, loss_percent=[round(100 * x, 4) for x in (loss, low, high)], cut=cut, control_cut=control)
    shown = np.argsort(-count["before"], kind="stable")[:4]
    for n in ("before", "after"):
        result[n] = [lab.tokenizer.decode([*idx[i].tolist(), *text[n][i].tolist()]) for i in shown]
    with atomic(path.with_suffix(".csv"), "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    said = ("matches per 1,000 tokens " + "; ".join(f"{n} {v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]" for n, v in per.items())
            + (": none before, so nothing to cut: raise --prompts" if cut is None else f": cut by {cut:.0%}, by random prototypes (one draw) {control:.0%}") + f"; loss {100 * loss:+.3f}% [{100 * low:+.3f}, {100 * high:+.3f}]")
    result["summary"], result["checkpoint"] = said, made["checkpoint"]
    price = made["found"].get("price") if isinstance(made.get("found"), dict) else None
    result["plot"] = picture(rows, made["behavior"], price if isinstance(price, (int, float)) else 0.0, path.with_suffix(".png"))
    with atomic(path.with_suffix(".sweep"), "w", encoding="utf-8") as f:
        json.dump(result, f)
    print(f"{path.with_suffix('')}.csv, .png, .sweep (python attribute.py report shows them)")
    print(said)


def picture(rows, behavior, price, path):
    """Effect against price, a color a mode, the random controls hollow, the chosen point a star, the allowed price dotted -> a data address of the PNG at path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for mode, color, marker in (("zero", "#0072B2", "o"), ("reselect", "#E69F00", "s"), ("fit", "#009E73", "^"), ("chosen", "#000000", "*")):
        mine = [r for r in rows if r["mode"] == mode]
        style = dict(color=color, marker=marker, linestyle="", markersize=12 if mode == "chosen" else 6)
        ax.plot([r["loss_percent"] for r in mine], [r["rate"] for r in mine], label=mode, **style)
        ax.plot([r["control_loss_percent"] for r in mine], [r["control_rate"] for r in mine], markerfacecolor="none", **style)
    ax.axvline(price, color="#999999", linestyle=":", label=f"price, {price:g}%")
    ax.set_xscale("symlog", linthresh=0.5, linscale=1.5)
    ax.set_xticks(ticks := [x for x in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if ax.get_xlim()[0] <= x <= ax.get_xlim()[1]], [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.set(xlabel="rise of the loss of text without it, %", ylabel="rate of the behavior, share of before", ylim=(0, None))
    ax.set_title(behavior[:60].replace("$", r"\$") + "   (hollow: the same gains on random prototypes)", fontsize=9)
    ax.legend()
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    plt.close(fig)
    with atomic(path) as f:
        f.write(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ----------------------------------------------------------------------------- calibrate: linear controllers

class Scored(NamedTuple):
    """The scored tokens of every choice of every item, and what they need: N tokens, C choices in all, of n items."""
    states: States         # N tokens
    choice: torch.Tensor   # (N,) which of the C choices
    item: np.ndarray       # (C,)
    size: torch.Tensor     # (C,) bytes scored
    label: np.ndarray      # (n,) the right choice, among the C


def read_items(lab, items):
    """Items -> Scored. A choice is read behind its context, or behind the end of a text where that is empty; the oldest tokens go
    where both are longer than the context holds."""
    states, choice, item, size, label, T = [], [], [], [], [], lab.T
    for n, x in enumerate(items):
        rows = []
        for j, c in enumerate(x["choices"]):
            given = x.get("given", [0] * len(x["choices"]))[j]
            whole = lab.tokenizer.encode_ordinary(x["context"] + c)
            head = lab.tokenizer.encode_ordinary(x["context"] + c[:given])
            # scored: from the first token that is not the context's; the tokenizer may join the context's end and the choice
            start = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), min(len(head), len(whole) - 1))
            if len(whole) - start > T:
                raise UserError(f"item {x.get('id', n + 1)}: choice {j} has {len(whole) - start} tokens, the context holds {T}")
            if start == 0:
                whole, start = [lab.tokenizer.eot_token, *whole], 1
            cut = max(0, len(whole) - T - 1)
            rows.append((whole[cut:], start - cut))
            size.append(len(c[given:].encode()))
        label.append(len(item) + x["label"])
        idx = torch.zeros(len(rows), max(len(r) for r, _ in rows), dtype=torch.long, device=lab.device)
        for row, (r, _) in zip(idx, rows):
            row[:len(r)] = torch.tensor(r)
        with torch.no_grad():
            z = lab.model.hidden(idx[:, :-1])
        for j, (r, start) in enumerate(rows):
            states.append((z[j, start - 1:len(r) - 1], idx[j, start:len(r)]))
            choice += [len(item) + j] * (len(r) - start)
        item += [n] * len(rows)
    z, y = (torch.cat(u) for u in zip(*states))
    m, ones = lab.model.mixture(z), torch.ones(len(z), device=lab.device)
    return Scored(States(z, m.ids, m.gates, y, ones > 1, ones > 0, ones, ones), torch.tensor(choice, device=lab.device), np.array(item),
                  torch.tensor(size, device=lab.device), np.array(label))


@torch.no_grad()
def choice_scores(lab, s, kind, gains=None, temperature=1.0, directions=None, slopes=False):
    """-> the scores (C,) of all choices; with `slopes` also their derivatives by the gains (C, M) at these gains, the sum over a choice's
    tokens of a_ti <W_y - W^T pi_t, p_i>. Other `directions` (M, d) may stand for the prototypes."""
    P, st = lab.P if directions is None else directions, s.states
    gains = torch.ones(len(P), device=lab.device) if gains is None else gains
    score, slope = torch.zeros(len(s.size), device=lab.device), torch.zeros(len(s.size) if slopes else 0, len(P), device=lab.device)
    for i in range(0, len(st.z), 2048):
        at = slice(i, i + 2048)
        z = st.z[at] + F.embedding_bag(st.ids[at], P, per_sample_weights=st.gates[at] * (gains - 1)[st.ids[at]], mode="sum")
        logp = (z @ lab.W.T / temperature).log_softmax(1)
        score.index_add_(0, s.choice[at], logp.gather(1, st.y[at, None])[:, 0])
        if slopes:
            error = lab.W[st.y[at]] - logp.exp() @ lab.W
            slices = (error @ P.T).gather(1, st.ids[at]) * st.gates[at]                         # (n, k)
            slope.view(-1).index_add_(0, (s.choice[at, None] * len(P) + st.ids[at]).flatten(), slices.flatten())
    if kind == "norm":
        score, slope = score / s.size, slope / s.size[:, None] if slopes else slope
    return (score, slope) if slopes else score


def right(scores, s, items):
    """scores (C,) -> whether each of `items` has its right choice on top (a tie is no success)."""
    scores, out = scores.cpu().numpy(), []
    for n in items:
        mine = np.flatnonzero(s.item == n)
        best = mine[scores[mine] == scores[mine].max()]
        out.append(len(best) == 1 and best[0] == s.label[n])
    return np.array(out)


def likelihood(scores, s, items):
    """Mean over `items` of -log softmax of the right choice's score among the item's."""
    n = len(s.label)
    item, scores = torch.from_numpy(s.item).to(scores.device), scores.double()
    top = torch.full((n,), -math.inf, dtype=scores.dtype, device=scores.device).scatter_reduce_(0, item, scores, "amax")
    total = torch.zeros_like(top).index_add_(0, item, (scores - top[item]).exp()).log() + top
    return (total - scores[torch.from_numpy(s.label).to(scores.device)])[torch.as_tensor(items, device=scores.device)].mean()


def controller(score, slope, s, items, l2, l1, steps=300):
    """theta (M,), the minimum of  likelihood(score + slope theta) + l2/2 |theta|^2 + l1 |theta|_1  over `items`: convex, by FISTA
    (Beck and Teboulle 2009) with a backtracked step."""
    theta = look = slope.new_zeros(slope.size(1))
    momentum, step = 1.0, 16.0

    def smooth(x, grad=False):
        v = (score + slope @ x).requires_grad_(grad)
        value = likelihood(v, s, items)
        return value + l2 / 2 * x.square().sum(), (slope.T @ torch.autograd.grad(value, v)[0] + l2 * x if grad else None)
    for _ in range(steps):
        value, grad = smooth(look, True)
        while True:
            new = look - step * grad
            new = new.sign() * (new.abs() - step * l1).clamp(min=0)
            move = new - look
            if smooth(new)[0] <= value + (grad * move).sum() + move.square().sum() / (2 * step) + 1e-9 or step < 1e-6:
                break
            step /= 2
        after = (1 + math.sqrt(1 + 4 * momentum ** 2)) / 2
        theta, look, momentum = new, new + (momentum - 1) / after * (new - theta), after
    return theta


def sharpness(score, s, items):
    """The factor b on the scores with the best likelihood of `items`. Sums of log-probabilities are far too sure; with b taken
    out, gains are fitted to tell choices apart and not to make all of them less sure."""
    return min(np.geomspace(0.01, 3, 60).tolist(), key=lambda b: likelihood(b * score, s, items).item())


PENALTIES = [(l2, l1) for l2 in (0.001, 0.0003, 0.0001) for l1 in (0.0, 0.0001)]
ROUNDS = 3


def calibrated(lab, s, kind, folds, directions=None):
    """Gains (M,) for the items of s: logits are linear in theta = g - 1, so scores are, to first order; the convex problem is solved
    where the last solution left it, ROUNDS times. The penalties (l2, l1) are those of the best likelihood in the first round over
    `folds` (a list of arrays of items); if none beats no controller at all, gains are ones. -> gains, penalties"""
    items, gains = np.concatenate(folds), torch.ones(len(lab.P), device=lab.device)
    for turn in range(ROUNDS):
        score, slope = choice_scores(lab, s, kind, gains, directions=directions, slopes=True)
        b = sharpness(score, s, items)
        score, slope = b * (score - slope @ (gains - 1)), b * slope                             # as functions of theta
        if not turn:
            losses = {p: sum(likelihood(score + slope @ controller(score, slope, s, np.setdiff1d(items, fold), *p, 150), s, fold).item() * len(fold) for fold in folds) / len(items)
                      for p in PENALTIES}
            best = min(losses, key=losses.get)
            if losses[best] >= likelihood(score, s, items).item():
                return gains, None
        gains = 1 + controller(score, slope, s, items, *best)
    return gains, best


def calibrate(argv):
    from data.tasks import load_items
    cfg = parse_config(CalibrateConfig, argv)
    if cfg.score not in ("sum", "norm") or cfg.folds < 2 or not 0 < cfg.share < 1 or cfg.trace < 0:
        raise UserError(f"score={cfg.score}, folds={cfg.folds}, share={cfg.share}, trace={cfg.trace}; expected sum or norm, at least 2, between 0 and 1, at least 0")
    if not cfg.task:
        raise UserError("no --task; make one: python data/prepare.py cloze --dataset=pydoc, then --task=data/pydoc/cloze.jsonl")
    name, items, rng = checked_name(cfg.name), load_items(cfg.task), np.random.default_rng(cfg.seed)

    def documents(rows):
        return np.unique([str(x.get("document", n)) for n, x in enumerate(rows)], return_inverse=True)[1]
    if cfg.calibration:
        fitted = load_items(cfg.calibration)
    else:
        owner = documents(items)
        mine = np.isin(owner, rng.permutation(owner.max() + 1)[:round(cfg.share * (owner.max() + 1))])
        fitted, items = ([x for x, u in zip(items, mine) if u == side] for side in (True, False))
    owner = documents(fitted) if fitted else np.zeros(0, int)
    parts = np.array_split(rng.permutation(owner.max() + 1 if len(owner) else 0), cfg.folds)  # no document is in two folds
    folds = [np.flatnonzero(np.isin(owner, part)) for part in parts]
    if min(map(len, folds)) < 1 or len(items) < 2:
        raise UserError(f"{len(fitted)} items to calibrate on, {len(items)} to test on, too few for {cfg.folds} folds of different documents; give more items or fewer --folds")
    seen = {(x["context"], *x["choices"]) for x in fitted}
    if any((x["context"], *x["choices"]) in seen for x in items):
        raise UserError(f"{cfg.calibration} holds items of {cfg.task}; calibrate on others: python data/prepare.py cloze --split=train")
    lab = Lab(cfg.out_dir, cfg.device)
    s, test = read_items(lab, fitted), read_items(lab, items)
    gains, penalties = calibrated(lab, s, cfg.score, folds)
    gains = torch.where((gains - 1).abs() > 1e-3, (gains * 1e4).round() / 1e4, 1.0)
    print(f"{len(fitted)} items calibrate in {cfg.folds} folds, {len(items)} test; " + (f"l2 {penalties[0]:g}, l1 {penalties[1]:g}: {int((gains != 1).sum())} gains"
          if penalties else "no penalty beats leaving all gains at 1"), flush=True)

    # -- the controls: one temperature; random directions with the prototypes' gates and lengths
    every, whole = np.arange(len(items)), np.arange(len(fitted))
    tau = max((0.5, 0.7, 1.0, 1.4, 2.0), key=lambda t: (right(choice_scores(lab, s, cfg.score, temperature=t), s, whole).mean(), -abs(math.log(t))))
    random = F.normalize(torch.randn(lab.P.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(lab.device), dim=1) * lab.P.norm(dim=1, keepdim=True)
    other, _ = calibrated(lab, s, cfg.score, folds, random)
    sides = {"uncalibrated": {}, "controller": dict(gains=gains), f"temperature {tau:g}": dict(temperature=tau), "random directions": dict(gains=other, directions=random)}
    owner, result, scores = documents(items), {}, {}

    def points_of(side, other):
        """Points of accuracy of one side over another, and their interval: documents are drawn again, with all their items."""
        return [100 * u for u in interval(np.bincount(owner, scores[side].astype(float) - scores[other]), np.bincount(owner).astype(float), cfg.seed)]
    for side, options in sides.items():
        scores[side] = right(choice_scores(lab, test, cfg.score, **options), test, every)
        points = points_of(side, "uncalibrated")
        fit_accuracy = float(right(choice_scores(lab, s, cfg.score, **options), s, whole).mean())
        result[side.split()[0]] = dict(accuracy=float(scores[side].mean()), points=points, calibration_accuracy=fit_accuracy)
        print(f"{side:>18}: accuracy {scores[side].mean():.1%}, {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}]; {fit_accuracy:.1%} where it was fitted", flush=True)

    over = points_of("controller", "random directions")
    print(f"controller against random directions: {over[0]:+.1f} points [{over[1]:+.1f}, {over[2]:+.1f}]")
    result["over_random"] = over

    # -- the largest gains, traced to training text and to the items that they turned
    traced = trace(lab, gains, test, items, scores["uncalibrated"], scores["controller"], cfg)
    path = lab.out_dir / "gains" / f"{name}.json"
    write_gains(path, lab, gains, task=cfg.task, found=dict(by="calibrate", penalties=penalties, calibration=cfg.calibration, score=cfg.score, folds=cfg.folds, share=cfg.share, seed=cfg.seed,
                result=result), traced=traced)
    points = result["controller"]["points"]
    print(f"{path}: accuracy {result['uncalibrated']['accuracy']:.1%} -> {result['controller']['accuracy']:.1%}, {points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}] on {len(items)} items")


def trace(lab, gains, s, items, was, now, cfg):
    """The largest gains: for each prototype the tokens that it raises, the training tokens where its gate is largest (of the first 131,072), and the test
    items that the controller turned and in which it did most. Printed, and returned as plain values."""
    theta, (before, slope), after = gains - 1, choice_scores(lab, s, cfg.score, slopes=True), choice_scores(lab, s, cfg.score, gains)
    turned = [(n, bool(now[n])) for n in np.flatnonzero(was != now)]
    print(f"{sum(up for _, up in turned)} test items turned right, {sum(not up for _, up in turned)} wrong")
    most = {}                                                                                  # item -> the prototype that did most, for the right choice or against
    for n, up in turned:
        mine = np.flatnonzero(s.item == n)
        rival = max((c for c in mine if c != s.label[n]), key=lambda c: float((before if up else after)[c]))
        most[n] = int(((slope[s.label[n]] - slope[rival]) * theta * (1 if up else -1)).argmax())
    tokens = np.asarray(lab.train[:2 ** 17]).astype(np.int64)
    none = np.zeros(len(tokens), bool)
    train, found = lab.states(tokens, none, none, np.arange((len(tokens) - 1) // lab.T)), []
    for i in theta.abs().argsort(descending=True)[:cfg.trace].tolist():
        if not theta[i]:
            break
        gate = (train.gates * (train.ids == i)).sum(1)
        near = []
        for at in [j for j in gate.topk(min(3, len(gate))).indices.tolist() if gate[j] > 0]:
            place = int(train.window[at]) * lab.T + at % lab.T + 1                            # of the token to be predicted
            near.append("".join((lab.tokenizer.decode(tokens[max(0, place - 12):place]), "«", lab.tokenizer.decode(tokens[place:place + 1]), "»")))
        mine = [n for n, _ in turned if most[n] == i]
        raised = lab.raised(i)
        found.append(dict(prototype=i, gain=round(1 + theta[i].item(), 4), raises=raised, training=near, turned=[str(items[n].get("id", n)) for n in mine]))
        print(f"prototype {i}, gain {1 + theta[i]:.2f}: raises {' '.join(map(repr, raised))}; did most in {len(mine)} turned items {' '.join(found[-1]['turned'][:3])}")
        for text in near:
            print(f"    {plain(text)!r}")
    return found


# ----------------------------------------------------------------------------- command line

COMMANDS = {"find": find, "apply": apply, "sweep": sweep, "calibrate": calibrate}


def main(argv):
    run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
