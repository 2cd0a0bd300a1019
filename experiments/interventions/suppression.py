"""Six behaviors suppressed, chosen before any result was seen: how far, and at what price.

    python experiments/interventions/suppression.py    # a quarter of an hour each
    python experiments/interventions/suppression.py --only=shout --behavior='!!' --out_dir=out-mine

suppress.py finds gains on one half of the held-out text. On the other they are compared with

    control   the same gains on other prototypes that fire as often, three draws
    ban       no tokens v that begin the behavior in half their uses, w_v >= 0.5
    bias      logits - c w, at the teacher-forced rate that the gains reach
    finetune  all weights, on training windows without the behavior, until that rate

by the rise of the loss of text without the behavior in percent (of a ban: of what it leaves
possible) and by matches per 1,000 sampled tokens.
"""
import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tools import interval, read_results, save_results  # noqa: E402

import suppress  # noqa: E402
from common import Run, load_gains, parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402
from suppress import load_states, mark_text, measure  # noqa: E402

BEHAVIORS = {  # run, pattern, beginnings: of each corpus a frequent, a rare and a topical one
    "examples": ("out", ">>>", 512),
    "deprecated": ("out", "(?i)deprecat", 2048),
    "threads": ("out", "(?i)thread|process", 512),
    "quotes": ("out-books", r"(?<!\w)'|'(?!\w)", 512),
    "exclamation": ("out-books", "!", 512),
    "sea": ("out-books", r"(?i)\b(sea|ship|boat|whale)s?\b", 512)}


@dataclass
class SuppressionConfig:
    only: str = ""             # one name; empty: all six
    behavior: str = ""         # a pattern of your own; --only is its name
    out_dir: str = ""          # the run; empty: out for pydoc's behaviors, out-books for the books'
    price: float = 0.5         # of suppress.py find
    prompts: int = 0           # beginnings that are continued; 0: as the behavior needs
    max_new_tokens: int = 100  # length of a continuation
    steps: int = 100           # of finetuning, at most
    tokens: int = 200000       # training tokens to learn from
    seed: int = 3              # of text, sampling, controls and finetuning
    out: str = "experiments/results"  # folder of the results, or the file of one


def with_bias(model, bias):
    """-> the model with logits W z + bias (V,)"""
    other = copy.copy(model)
    other.logits = lambda z, gains: z @ model.W.T + bias
    return other


def measure_bias(model, s, w, bias):
    """measure() of logits W z + bias: one more column of W, and ones behind z."""
    W = torch.cat((model.W, bias[:, None]), 1)
    z = torch.cat((s.z, torch.ones_like(s.z[:, :1])), 1)
    return measure(SimpleNamespace(W=W), s._replace(z=z), w)


def loss_interval(s, before, after, T):
    """The rise of the loss of States of whole windows in percent, and its interval over windows."""
    losses = torch.stack((after[0], before[0])).double() * s.free
    per_window = losses.view(2, -1, T).sum(2).cpu().numpy()
    return [100 * ratio - 100 for ratio in interval(*per_window)]


def count_matches(cfg, run, idx, pattern, gains):
    """-> matches (n,) in the continuations of idx (n, L)"""
    counts, seed = [], cfg.seed
    for rows in idx.split(64):
        found = suppress.samples(run, rows, pattern, cfg.max_new_tokens, 1.0, seed, gains)
        counts += [matches for matches, _ in found]
        seed += 64
    return np.array(counts)


def finetune(cfg, run, pattern, w, target):
    """Trains until the rate in the test half is `target` -> model, its measure(), steps."""
    tokens, carried, _ = mark_text(run, run.train[:2 ** 22], pattern)
    last = (len(tokens) - 1) // run.T * run.T
    clean = (~carried[:last].view(-1, run.T).any(1)).nonzero()[:, 0].cpu().numpy()
    val = mark_text(run, run.val[:2 ** 16], pattern)
    test_windows = torch.arange((len(val[0]) - 1) // run.T)[1::2]
    other = copy.copy(run)
    other.model = model = copy.deepcopy(run.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0)
    rng = np.random.default_rng(cfg.seed)
    for step in range(0, cfg.steps + 1, 20):
        after = measure(model.eval(), load_states(other, val, test_windows), w)
        if after[1].mean() <= target or step + 20 > cfg.steps:
            return model, after, step
        for start in rng.choice(clean, (20, 16, 1)) * run.T:
            rows = tokens[torch.from_numpy(start + np.arange(run.T + 1))]
            _, loss = model.train()(rows[:, :-1], rows[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compare(cfg, run, behavior, gains, n_prompts):
    """Gains and rivals -> {"sides": figures of each, "bias": c, "steps": of finetuning}"""
    pattern = suppress.compile_pattern(behavior)
    model = run.model
    w, train, _, test = suppress.behavior_states(run, behavior, cfg.tokens, cfg.seed)
    before = measure(model, test, w)
    after = measure(model, test, w, gains)
    idx = suppress.beginnings(run, n_prompts, cfg.seed)
    thousands = np.full(n_prompts, cfg.max_new_tokens / 1000)
    sides = {}

    def add(side, model, after, gains=None, states=test):
        other = copy.copy(run)
        other.model = model
        count = count_matches(cfg, other, idx, pattern, gains)
        rate = (after[1].mean() / before[1].mean()).item()
        sides[side] = dict(rate=rate, matches_per_1000=interval(count, thousands),
                           loss_percent=loss_interval(states, before, after, run.T))
        print(f"{side}: {sides[side]}", flush=True)

    add("before", model, before)
    add("gains", model, after, gains)
    _, _, fires = suppress.rank_prototypes(model, train)
    for draw in range(3):
        control = suppress.shuffled(gains, fires, cfg.seed + draw)
        add(f"control {draw + 1}", model, measure(model, test, w, control), control)

    ban = -1e4 * (w >= 0.5)
    possible = test._replace(free=test.free & (ban[test.y] == 0))
    add("ban", with_bias(model, ban), measure_bias(model, test, w, ban), states=possible)
    sides["ban"]["impossible_percent"] = 100 - 100 * (possible.free.sum() / test.free.sum()).item()
    target = after[1].mean()
    low, high = 0.0, 30.0
    for _ in range(12):                                           # bisection of c
        c = (low + high) / 2
        enough = measure_bias(model, test, w, -c * w)[1].mean() <= target
        if enough:
            high = c
        else:
            low = c
    add("bias", with_bias(model, -high * w), measure_bias(model, test, w, -high * w))
    tuned, tuned_after, steps = finetune(cfg, run, pattern, w, target)
    add("finetune", tuned, tuned_after)
    return dict(sides=sides, bias=high, steps=steps)


def main(argv):
    cfg = parse_config(SuppressionConfig, argv)
    studies = BEHAVIORS
    if cfg.behavior:
        studies = {cfg.only or "own": ("out", cfg.behavior, 512)}
    if cfg.only not in ("", *studies):
        raise UserError(f"only={cfg.only}, expected {', '.join(studies)}, or --behavior as well")
    for name in [cfg.only] if cfg.only else studies:
        out_dir, behavior, n_prompts = studies[name]
        run = Run(cfg.out_dir or out_dir)
        print(f"--- {name}: {behavior}", flush=True)
        suppress.find([f"--out_dir={run.out_dir}", f"--behavior={behavior}", f"--name={name}",
                       f"--price={cfg.price}", f"--tokens={cfg.tokens}"])
        path = run.out_dir / "gains" / f"{name}.json"
        facts = read_results(path)
        gains = load_gains(path, run.model)
        result = compare(cfg, run, behavior, gains, cfg.prompts or n_prompts)
        result["found"] = facts["found"] | dict(prototypes=len(facts["ids"]))
        result.update(behavior=behavior, options=asdict(cfg))
        folder = cfg.out.removesuffix(f"/suppression-{name}.json")
        save_results(f"{folder}/suppression-{name}.json", result)


if __name__ == "__main__":
    run_main(main)
