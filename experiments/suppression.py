"""Turning behaviors down: six of them, chosen before any result was seen; how far, at what price, and against what a user would do otherwise.

    python experiments/suppression.py                       all six; pydoc's in out/, the books' in out-books/; 10 to 15 minutes each
    python experiments/suppression.py --only=examples       one of them
    python experiments/suppression.py --only=shouting --behavior='!!' --out_dir=out-mine      one of your own

For each: `suppress.py find` on the tuning half of the held-out text, `suppress.py sweep` on the test half, and then, at the teacher-forced rate
that the gains reach, on other sampled beginnings, the sides: before, gains, control (the same gains on other prototypes that fire as often,
mean of three draws), ban, bias, finetune. A side is measured by the rise of the loss of held-out text without the behavior, with its interval
over windows; matches per 1,000 sampled tokens, with theirs over beginnings; distinct bigrams as a share of all; and the seconds to make it, for fitted
gains those of one fit, once the setting is known.
ban takes away the tokens that begin the behavior at least half of the times that they occur; of the text without the behavior that makes some tokens
impossible: their share is given, and the loss of the others; bias subtracts c w_v from each logit v, c chosen
so that the teacher-forced rate is that of the gains; finetune trains all weights on training windows without the behavior until that rate or
--steps are reached. What is done is kept, in experiments/results/suppression-NAME.json, while the checkpoint is the same.
"""
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import kept, machine, save  # noqa: E402

import suppress  # noqa: E402
from prism import UserError, fingerprint, load_checkpoint, load_gains, parse_config, run_main  # noqa: E402


BEHAVIORS = {  # name: corpus, pattern, sampled beginnings. One frequent, one rare, one topical of each corpus
    "examples": ("pydoc", ">>>", 512), "deprecated": ("pydoc", "(?i)deprecat", 2048), "threads": ("pydoc", "(?i)thread|process", 512),
    "quotes": ("books", r"(?<!\w)'|'(?!\w)", 512), "exclamation": ("books", "!", 512), "sea": ("books", r"(?i)\b(sea|ship|boat|whale)s?\b", 512)}


@dataclass
class SuppressionConfig:
    only: str = ""              # names with commas between; empty: all six
    behavior: str = ""          # one of your own: its pattern; --only is then its name
    out_dir: str = "out"        # and its run
    pydoc: str = "out"          # the run for pydoc's behaviors
    books: str = "out-books"    # the run for the books'
    mode: str = "auto"          # of find: zero, reselect, fit or auto
    price: float = 0.5          # of find: largest rise of the loss, in percent, on the tuning split
    prompts: int = 0            # held-out beginnings that are continued, each side; 0: as the behavior needs
    max_new_tokens: int = 100   # length of each
    temperature: float = 1.0    # of the sampling
    steps: int = 100            # of finetuning, at most
    learning_rate: float = 3e-4  # of finetuning
    tokens: int = 200000        # training tokens looked at
    seed: int = 3               # of prompts, sampling and controls
    out: str = "experiments/results"  # folder of the results


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
    if not len(clean := np.flatnonzero(~carried[:(len(tokens) - 1) // T * T].reshape(-1, T).any(1))):
        raise UserError("no window of training text is without the behavior, so nothing to finetune on; narrow the pattern")
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


def rivals(cfg, out_dir, path, prompts):
    """-> sides, each a dict; bias; steps of finetuning."""
    lab = suppress.Lab(out_dir, "cpu")
    gains, made = load_gains(path, lab.model), suppress.about(path)
    look = suppress.FindConfig(behavior=made["behavior"], tokens=cfg.tokens, seed=cfg.seed)
    pattern, (w, train, _, test) = suppress.compiled(made["behavior"]), lab.look(look)
    tokens, carried, _ = lab.training_text(look)
    ranks, before = suppress.rank(lab, train), lab.measure(test, w)
    target = lab.measure(test, w, gains)[1].mean().item()
    idx, sides, free = suppress.beginnings(lab, prompts, cfg.seed), {}, test.free.cpu()
    window = np.unique(test.window.cpu().numpy(), return_inverse=True)[1]

    def side(name, who, seconds, measured, use=None, counted=free):
        new = suppress.continued(who, idx, cfg, use)
        change = [100 * u for u in suppress.interval(*(np.bincount(window, (u.cpu() * counted).numpy()) for u in (measured[0] - before[0], before[0])))]
        matches = suppress.interval(1000.0 * suppress.counted(lab, idx, new, pattern), np.full(len(new), float(new.shape[1])))
        pairs = [tuple(p) for row in new for p in zip(row[:-1].tolist(), row[1:].tolist())]
        sides[name] = x = dict(rate=(measured[1].mean() / before[1].mean()).item(), loss_percent=change, matches_per_1000=matches, distinct_2=len(set(pairs)) / len(pairs), seconds=seconds)
        print(f"{name:>9}: teacher-forced rate x {x['rate']:.3f}, loss {change[0]:+.3f}% [{change[1]:+.3f}, {change[2]:+.3f}], {matches[0]:.2f} matches per 1,000 tokens "
              f"[{matches[1]:.2f}, {matches[2]:.2f}], distinct-2 {x['distinct_2']:.3f}, {seconds:.0f} s", flush=True)
    side("before", lab, 0.0, before)
    t0 = time.perf_counter()
    if made["found"]["by"] == "fit":  # made again for its time alone
        order = suppress.rank(lab, train)["merit"].argsort(descending=True)
        suppress.fit(lab, train, w, lab.measure(train, w)[1], float(made["found"]["setting"].split()[1]), order[:made["found"]["size"]])
    side("gains", lab, time.perf_counter() - t0, lab.measure(test, w, gains), gains)
    for draw in range(3):
        other = suppress.shuffled(gains, ranks["fires"], cfg.seed + draw)
        side(f"control {draw + 1}", lab, 0.0, lab.measure(test, w, other), other)
    ban = torch.zeros(len(w)).masked_fill(w >= 0.5, -1e4)
    possible = free & (ban[test.y] == 0).cpu()
    side("ban", biased(lab, ban), 0.0, lab.measure(test, w, bias=ban), counted=possible)
    sides["ban"]["impossible_percent"] = 100 * (1 - (possible.sum() / free.sum()).item())
    t0, low, high = time.perf_counter(), 0.0, 30.0
    for _ in range(12):
        c = (low + high) / 2
        low, high = (c, high) if lab.measure(test, w, bias=-c * w)[1].mean().item() > target else (low, c)
    side("bias", biased(lab, -high * w), time.perf_counter() - t0, lab.measure(test, w, bias=-high * w))
    t0 = time.perf_counter()
    tuned, steps = finetuned(lab, cfg, carried, tokens, target, w, test)
    side("finetune", tuned, time.perf_counter() - t0, tuned.measure(test._replace(z=hidden(tuned, test)), w))
    return sides, high, steps


def study(cfg, name):
    """Finds, sweeps and compares one behavior; what is there already, of the same checkpoint and options, is left."""
    corpus, pattern, prompts = ("out_dir", cfg.behavior, 512) if cfg.behavior else BEHAVIORS[name]
    out_dir, path, prompts = getattr(cfg, corpus), Path(cfg.out) / f"suppression-{name}.json", cfg.prompts or prompts
    gains = Path(out_dir) / "gains" / f"{name}.json"
    options = {k: v for k, v in asdict(cfg).items() if k not in ("only", "out", "pydoc", "books", "behavior")} | dict(out_dir=out_dir, pattern=pattern, prompts=prompts)
    key = dict(options=options, checkpoint=fingerprint(load_checkpoint(out_dir, "cpu")[0].state_dict()))
    result = kept(path)
    if {k: result.get(k) for k in key} != key:
        result = key | dict(behavior=pattern, machine=machine())

    def keep(**piece):
        result.update(piece)
        save(path, result)
    common = [f"--out_dir={out_dir}", f"--tokens={cfg.tokens}"]
    print(f"--- {name}: {pattern}", flush=True)
    made = suppress.about(gains) if gains.exists() else {}
    if "found" not in result or made.get("behavior") != pattern or made.get("found") != {k: v for k, v in result["found"].items() if k != "prototypes"}:
        suppress.find([*common, f"--behavior={pattern}", f"--name={name}", f"--mode={cfg.mode}", f"--price={cfg.price}"])
        made = suppress.about(gains)
        result.pop("sweep", None), result.pop("sides", None)
        keep(found=made["found"] | dict(prototypes=len(made["ids"])))
    if "sweep" not in result:
        suppress.sweep([*common, f"--gains={gains}", f"--prompts={prompts}", f"--max_new_tokens={cfg.max_new_tokens}", f"--temperature={cfg.temperature}"])
        swept = json.loads(gains.with_suffix(".sweep").read_text("utf-8"))
        keep(sweep={k: swept[k] for k in ("rows", "per_1000_tokens", "matches", "loss_percent", "cut", "control_cut", "before", "after")})
    if "sides" not in result:
        keep(**dict(zip(("sides", "bias", "steps"), rivals(cfg, out_dir, gains, prompts))))
    return result


def main(argv):
    cfg = parse_config(SuppressionConfig, argv)
    if cfg.prompts == 1 or cfg.prompts < 0 or min(cfg.max_new_tokens, cfg.tokens) < 1 or cfg.steps < 0:
        raise UserError(f"prompts is {cfg.prompts}, max_new_tokens {cfg.max_new_tokens}, tokens {cfg.tokens}, steps {cfg.steps}; expected 0 or at least 2, at least 1, 1 and 0")
    names = cfg.only.split(",") if cfg.only else list(BEHAVIORS)
    if cfg.behavior and (not cfg.only or len(names) > 1):
        raise UserError(f"behavior={cfg.behavior} needs one name, as --only=NAME; found only={cfg.only!r}")
    if wrong := [n for n in names if n not in BEHAVIORS and not cfg.behavior]:
        raise UserError(f"only={cfg.only}: no behavior {wrong[0]!r}; expected some of {', '.join(BEHAVIORS)}")
    for name, x in [(n, study(cfg, n)) for n in names]:
        print(f"{name}: {x['found']['prototypes']} prototypes by {x['found']['by']}; loss and matches per 1,000 tokens: " + "; ".join(
            f"{n} {u['loss_percent'][0]:+.2f}% {u['matches_per_1000'][0]:.2f}" for n, u in x["sides"].items()))


if __name__ == "__main__":
    run_main(main)
