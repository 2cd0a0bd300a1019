"""How fast does PRISM train beside its dense twin, and beside nanoGPT?

    python experiments/speed/throughput.py                    the default preset: 10 minutes
    python experiments/speed/throughput.py --nanogpt=DIR      also a checkout of nanoGPT: 30 minutes
    python experiments/speed/throughput.py --preset=config/prism-130m.toml              on a GPU

Each side is a process that trains on the same windows; in each round it runs some steps while the
others wait. Ratios are medians over rounds. In the race, on a CPU, nanoGPT trains by the recipe of
its README for a CPU and PRISM by ours, at the same time, one thread each. It counts if PRISM ends
with at most nanoGPT's validation loss. Processor seconds leave out this evaluation.
"""
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tools import save_results  # noqa: E402

import train  # noqa: E402
from common import (dataset_folder, load_dataset, parse_config, pick_device, reading,  # noqa: E402
                    run_main)

RECIPE = ("--learning_rate=1e-3 --warmup_iters=100 --beta1=0.9 --beta2=0.99 --weight_decay=0.1 "
          "--grad_clip=1 --dropout=0 --dtype=float32")            # nanoGPT's
SIDES = {"PRISM": "", "dense": "--n_proto=0", "PRISM float32": "--dtype=float32",
         "dense float32": "--n_proto=0 --dtype=float32", "nanoGPT float32": RECIPE}
PAIRS = ("PRISM", "dense"), ("PRISM float32", "dense float32")


@dataclass
class ThroughputConfig:
    preset: str = ""              # a file of options for train.py; empty takes the defaults
    dataset: str = "pydoc"        # a prepared dataset
    nanogpt: str = ""             # folder of a nanoGPT checkout
    rounds: int = 12              # rounds that count; 0 for the race alone
    steps: int = 8                # optimiser steps per side and round
    race_steps: int = 1000        # nanoGPT's steps in the race; 0 for no race
    race_ours: int = 320          # PRISM's steps in the race
    device: str = "auto"          # auto, cpu or cuda
    side: str = ""                # internal: this process is one side
    out: str = "experiments/results/throughput-cpu.json"  # the result


def nanogpt_model(folder, tc, device):
    """nanoGPT's model of the same shape, and its optimiser."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig
    names = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"
    rates = tc.weight_decay, tc.learning_rate, (tc.beta1, tc.beta2)
    with contextlib.redirect_stdout(sys.stderr):                  # it prints
        model = GPT(GPTConfig(**{name: getattr(tc, name) for name in names})).to(device)
        return model, model.configure_optimizers(*rates, device.type)


def nanogpt_rate(step, tc):
    """Linear warm-up, then half a cosine that ends at a tenth of the learning rate."""
    part = (step - tc.warmup_iters) / max(1, tc.max_iters - tc.warmup_iters)
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * max(0.0, part)))
    return tc.learning_rate * min((step + 1) / (tc.warmup_iters + 1), cosine)


@torch.no_grad()
def validation_loss(model, windows, device):
    """Mean cross-entropy over the validation text, in the windows of train.evaluate."""
    total, count = 0.0, len(windows.tokens) - 1
    model.eval()
    for first in range(0, count, windows.T):
        idx, targets = (u.to(device) for u in windows.read([first]))
        logits, _ = model(idx, targets)
        total += F.cross_entropy(logits[0], targets[0], ignore_index=-1, reduction="sum").item()
    return total / count


def serve(cfg):
    """One side: for each line of standard input, a number of steps, it trains so many and answers
    seconds, the last cross-entropy and peak memory; after max_iters also its validation loss."""
    tc = parse_config(train.TrainConfig, [*cfg.preset.split(), *SIDES[cfg.side].split()])
    device, folder = pick_device(cfg.device), dataset_folder(cfg.dataset)
    *texts, meta = load_dataset(folder)
    tc.vocab_size = tc.vocab_size or meta["vocab_size"]
    torch.manual_seed(tc.seed)
    dtype, compiled, _ = train.choose_precision(tc, device)
    ours = "nanoGPT" not in cfg.side
    if ours:
        model, rate = train.PRISM(train.model_config(tc)).to(device), train.learning_rate
        optimizers = train.make_optimizers(model, tc, dtype)
    else:
        model, optimizer = nanogpt_model(cfg.nanogpt, tc, device)
        optimizers, rate = [optimizer], nanogpt_rate
    step_model, low = torch.compile(model) if compiled else model, dtype is torch.bfloat16
    terms = {"return_terms": True} if ours else {}
    B, done, shared = tc.batch_size, 0, (tc.block_size, tc.seed, tc.vocab_size, folder)
    windows, val_windows = (train.Windows(text, *shared) for text in texts)
    micros = tc.total_batch_tokens // (B * tc.block_size)
    for line in sys.stdin:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for done in range(done + 1, done + 1 + int(line)):
            for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
                group["lr"] = rate(done - 1, tc) * group.get("scale", 1.0)
            for micro in range((done - 1) * micros, done * micros):
                idx, targets = (u.to(device) for u in windows.train(micro * B, B))
                with torch.autocast(device.type, torch.bfloat16, enabled=low):
                    first, second = step_model(idx, targets, **terms)
                loss, ce = (first, second[0]) if ours else (second, second.detach())
                (loss / micros).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), tc.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            if done % 100 == 0:
                print(f"{cfg.side}: step {done}, ce {ce.item():.3f}", file=sys.stderr)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2 ** 20
        answer = {"ce": ce.item(), "peak_mb": peak, "steps": done}  # item waits for the device
        answer["seconds"] = time.perf_counter() - begin
        answer["cpu_seconds"] = time.process_time() - begin_cpu
        answer["tokens_per_s"] = int(line) * tc.total_batch_tokens / answer["seconds"]
        if done == tc.max_iters:
            answer["val_ce"] = validation_loss(model, val_windows, device)
        print(json.dumps(answer), flush=True)


def start(side, argv):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__, *argv, f"--side={side}"], **pipes)


def ask(process, steps):
    with reading("the answer of a side", "its message stands above"):
        print(steps, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())


def race(cfg, argv):
    """nanoGPT and PRISM at the same time -> the answers of both, and the ratio of their seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    lengths, processes = {"nanoGPT": cfg.race_steps, "PRISM": cfg.race_ours}, []
    for name, steps in lengths.items():
        preset = f"--preset={cfg.preset} --max_iters={steps}"
        processes.append(start(f"{name} float32", [*argv, preset]))
    with ThreadPoolExecutor() as pool:
        theirs, ours = pool.map(ask, processes, lengths.values())
    ratio, reached = theirs["cpu_seconds"] / ours["cpu_seconds"], ours["val_ce"] <= theirs["val_ce"]
    print(f"nanoGPT: {theirs}\nPRISM: {ours}\nratio nanoGPT/PRISM {ratio:.2f}, reached: {reached}")
    return {"sides": {"nanoGPT": theirs, "PRISM": ours}, "ratio": ratio, "reached": reached}


def rounds(cfg, argv):
    """The sides interleaved -> their speeds and ratios."""
    names = [name for pair in PAIRS for name in pair]
    sides, answers = {}, {name: [] for name in names}
    for name in names:
        sides[name] = start(name, argv)
        ask(sides[name], 3)                                       # warms up
    for number in range(cfg.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            answers[name].append(ask(sides[name], cfg.steps))
    for process in sides.values():
        process.communicate()                                     # it ends
    seconds = {name: [answer["seconds"] for answer in answers[name]] for name in names}

    def ratio(a, b):
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b]))
    table = {}
    for name in names:
        speed = statistics.median(answer["tokens_per_s"] for answer in answers[name])
        against, last = ratio(name, "dense"), answers[name][-1]
        table[name] = last | {"tokens_per_s": speed, "against_dense": against}
        print(f"{name}: {speed:,.0f} tokens/s, {against:.3f} of dense, {last['peak_mb']:,.0f} MB")
    ratios = {f"{a} / {b}": ratio(a, b) for a, b in PAIRS}
    print(f"ratio PRISM/dense {ratios['PRISM / dense']:.2f}")
    return {"sides": table, "ratios": ratios, "seconds": seconds}


def main(argv):
    cfg = parse_config(ThroughputConfig, argv)
    if cfg.side:
        return serve(cfg)
    result = rounds(cfg, argv) if cfg.rounds else {}
    if cfg.nanogpt and cfg.race_steps and pick_device(cfg.device).type == "cpu":
        result["race"] = race(cfg, argv)
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
