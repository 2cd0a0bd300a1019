"""Suppression by gains against what a user would do otherwise: ban tokens, bias logits, finetune; at equal rate of the behavior.

    python experiments/interventions.py --gains=out/gains/examples.json       a file that suppress.py find wrote; about 5 minutes

All sides are measured on the test half of the held-out text: the rise of the loss of text without the behavior, with its interval; and on
the same sampled beginnings: matches per 1,000 tokens, distinct bigrams as a share of all, and the seconds that it took to make the side.
ban takes away the tokens that begin the behavior at least half of the times that they occur; bias subtracts c w_v from each logit v, c chosen so
that the teacher-forced rate is that of the gains; finetune trains all weights on training windows without the behavior until that rate or
--steps are reached.
"""
import copy
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import suppress  # noqa: E402
from prism import UserError, atomic, load_gains, parse_config, run_main  # noqa: E402


@dataclass
class RivalsConfig:
    out_dir: str = "out"        # the run
    gains: str = ""             # a file that suppress.py find --behavior wrote
    prompts: int = 128          # held-out beginnings that are continued, each side
    max_new_tokens: int = 100   # length of each
    temperature: float = 1.0    # of the sampling
    steps: int = 100            # of finetuning, at most
    learning_rate: float = 3e-4  # of finetuning
    tokens: int = 60000         # training tokens looked at
    seed: int = 3               # of prompts and sampling
    out: str = ""               # the result; default experiments/results/interventions-NAME.json


def biased(lab, bias):
    """-> a Lab whose model's logits get a constant vector added."""
    other = copy.copy(lab)
    other.model = copy.copy(lab.model)
    other.model.logits = lambda z, gains=None: lab.model.logits(z, gains) + bias
    return other


def finetuned(lab, cfg, carried, tokens, target, w, test):
    """-> a Lab whose model was trained on windows without the behavior until its rate is `target`; the steps that took."""
    other = copy.copy(lab)
    other.model = copy.deepcopy(lab.model).requires_grad_(True)
    other.W, other.P = other.model.transformer.wte.weight, other.model.prototypes
    T, rng = lab.T, np.random.default_rng(cfg.seed)
    clean = np.flatnonzero(~carried[:(len(tokens) - 1) // T * T].reshape(-1, T).any(1))
    opt = torch.optim.AdamW(other.model.parameters(), cfg.learning_rate, weight_decay=0.0)
    for step in range(cfg.steps + 1):
        if step % 20 == 0:
            other.model.eval()
            if other.measure(test._replace(z=hidden(other, test)), w)[1].mean().item() <= target or step == cfg.steps:
                return other, step
        at = rng.choice(clean, 16)[:, None] * T + np.arange(T + 1)
        raw = torch.from_numpy(tokens[at].astype(np.int64)).to(lab.device)
        opt.zero_grad()
        other.model.train()(raw[:, :-1], raw[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        opt.step()


@torch.no_grad()
def hidden(lab, s):
    """The states (N, d) of the test windows under lab's own model."""
    windows = s.window.cpu().numpy()[::lab.T]
    val = np.asarray(lab.val[:2 ** 16]).astype(np.int64)
    parts = [lab.model.hidden(torch.from_numpy(val[w * lab.T:(w + 1) * lab.T][None]).to(lab.device))[0] for w in windows]
    return torch.cat(parts)


def main(argv):
    cfg = parse_config(RivalsConfig, argv)
    if not cfg.gains:
        raise UserError("no gains file; run: python suppress.py find --behavior='>>>' --name=examples")
    lab = suppress.Lab(cfg.out_dir, "cpu")
    gains, made = load_gains(cfg.gains, lab.model), suppress.about(cfg.gains)
    look = suppress.FindConfig(behavior=made["behavior"], tokens=cfg.tokens, seed=cfg.seed)
    pattern, (w, _, _, test) = suppress.compiled(made["behavior"]), lab.look(look)
    tokens, carried, _ = lab.training_text(look)
    before = lab.measure(test, w)
    target = lab.measure(test, w, gains)[1].mean().item()
    idx, sides = suppress.beginnings(lab, cfg.prompts, cfg.seed), {}

    def side(name, who, seconds, measured, use=None):
        new = suppress.continued(who, idx, cfg, use)
        free = test.free.cpu()
        change = [100 * u for u in suppress.interval(*(np.bincount(test.window.cpu(), (u.cpu() * free).numpy()) for u in (measured[0] - before[0], before[0])))]
        pairs = [tuple(p) for row in new for p in zip(row[:-1].tolist(), row[1:].tolist())]
        sides[name] = dict(rate=(measured[1].mean() / before[1].mean()).item(), loss_percent=change, matches_per_1000=1000 * float(suppress.counted(lab, idx, new, pattern).sum()) / new.size,
                           distinct_2=len(set(pairs)) / len(pairs), seconds=seconds)
        x = sides[name]
        print(f"{name:>9}: teacher-forced rate x {x['rate']:.3f}, loss {change[0]:+.3f}% [{change[1]:+.3f}, {change[2]:+.3f}], {x['matches_per_1000']:.2f} matches per 1,000 tokens, "
              f"distinct-2 {x['distinct_2']:.3f}, {seconds:.0f} s", flush=True)
    side("before", lab, 0.0, before)
    t0 = time.perf_counter()
    size = made["found"]["size"]
    if made["found"]["by"] == "fit":
        s = lab.look(look)[1]
        suppress.fit(lab, s, w, lab.measure(s, w)[1], size, seed=cfg.seed)  # made again for its time alone
    side("gains", lab, time.perf_counter() - t0, lab.measure(test, w, gains), gains)
    ban = torch.zeros(len(w)).masked_fill(w >= 0.5, -1e4)
    side("ban", biased(lab, ban), 0.0, lab.measure(test, w, bias=ban))
    t0, low, high = time.perf_counter(), 0.0, 30.0
    for _ in range(12):
        c = (low + high) / 2
        low, high = (c, high) if lab.measure(test, w, bias=-c * w)[1].mean().item() > target else (low, c)
    side("bias", biased(lab, -high * w), time.perf_counter() - t0, lab.measure(test, w, bias=-high * w))
    t0 = time.perf_counter()
    tuned, steps = finetuned(lab, cfg, carried, tokens, target, w, test)
    side("finetune", tuned, time.perf_counter() - t0, tuned.measure(test._replace(z=hidden(tuned, test)), w))
    result = dict(options=asdict(cfg), behavior=made["behavior"], bias=high, steps=steps, sides=sides, torch=torch.__version__, machine=f"{platform.machine()}, {os.cpu_count()} cores")
    with atomic(cfg.out or f"experiments/results/interventions-{Path(cfg.gains).stem}.json", "w") as f:
        json.dump(result, f, indent=1)
    print(f"{made['behavior']!r}: loss at equal rate: " + ", ".join(f"{n} {x['loss_percent'][0]:+.3f}%" for n, x in sides.items() if n != "before"))


if __name__ == "__main__":
    run_main(main)
