"""How fast does PRISM train beside its dense twin, and beside nanoGPT?

    python experiments/speed/throughput.py                    the default preset: 10 minutes
    python experiments/speed/throughput.py --nanogpt=DIR      also a checkout of nanoGPT
    python experiments/speed/throughput.py --preset=config/prism-130m.toml              on a GPU

Each side is a process that trains on the same windows. In each round every side runs the same
number of steps, in an order that rotates, while the others wait. Ratios are medians over rounds.
"""
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from tools import save_results  # noqa: E402

import train  # noqa: E402
from common import (dataset_folder, load_dataset, parse_config, pick_device, reading,  # noqa: E402
                    run_main)

SIDES = {"PRISM": "", "dense": "--n_proto=0", "PRISM float32": "--dtype=float32",
         "dense float32": "--n_proto=0 --dtype=float32", "nanoGPT float32": "--dtype=float32"}
PAIRS = (("PRISM", "dense"), ("PRISM float32", "dense float32"), ("PRISM", "nanoGPT float32"),
         ("dense float32", "nanoGPT float32"), ("dense", "nanoGPT float32"))


@dataclass
class ThroughputConfig:
    preset: str = ""              # a file of options for train.py; empty takes the defaults
    dataset: str = "pydoc"        # a prepared dataset
    nanogpt: str = ""             # folder of a nanoGPT checkout
    rounds: int = 12              # rounds that count
    steps: int = 8                # optimiser steps per side and round
    device: str = "auto"          # auto, cpu or cuda
    side: str = ""                # internal: this process is one side
    out: str = "experiments/results/throughput-cpu.json"  # the result


def train_config(cfg, side):
    words = f"--dataset={cfg.dataset} --device={cfg.device} {SIDES[side]}".split()
    return parse_config(train.TrainConfig, cfg.preset.split() + words)


def nanogpt_model(folder, tc, device):
    """nanoGPT's model of the same shape, and its optimiser."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig
    names = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"
    with contextlib.redirect_stdout(sys.stderr):                  # it prints
        model = GPT(GPTConfig(**{name: getattr(tc, name) for name in names})).to(device)
    rates = tc.weight_decay, tc.learning_rate, (tc.beta1, tc.beta2)
    return model, model.configure_optimizers(*rates, device.type)


def serve(cfg):
    """One side: for each line of standard input, a number of steps, it trains so many and answers
    seconds, the last cross-entropy and peak memory (MB)."""
    tc, folder = train_config(cfg, cfg.side), dataset_folder(cfg.dataset)
    device = pick_device(tc.device)
    tokens, _, meta = load_dataset(folder)
    tc.vocab_size = tc.vocab_size or meta["vocab_size"]
    torch.manual_seed(tc.seed)
    dtype, compiled, _ = train.choose_precision(tc, device)
    ours = "nanoGPT" not in cfg.side
    if ours:
        model = train.PRISM(train.model_config(tc)).to(device)
        optimizer = train.make_optimizer(model, tc)
    else:
        model, optimizer = nanogpt_model(cfg.nanogpt, tc, device)
    step_model, low = torch.compile(model) if compiled else model, dtype is torch.bfloat16
    terms = {"return_terms": True} if ours else {}
    B, step = tc.batch_size, 0
    windows = train.Windows(tokens, tc.block_size, tc.seed, tc.vocab_size, folder / "train.bin")
    micros = tc.total_batch_tokens // (B * tc.block_size)
    for line in sys.stdin:
        begin = time.perf_counter()
        for step in range(step + 1, step + 1 + int(line)):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, tc) * group.get("scale", 1.0)
            for micro in range(step * micros, (step + 1) * micros):
                idx, targets = (u.to(device) for u in windows.train(micro * B, B))
                with torch.autocast(device.type, torch.bfloat16, enabled=low):
                    first, second = step_model(idx, targets, **terms)
                loss, ce = (first, second[0]) if ours else (second, second.detach())
                (loss / micros).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), tc.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ce = ce.item()                                            # waits for the device
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2 ** 20
        print(json.dumps([time.perf_counter() - begin, ce, peak]), flush=True)


def ask(process, steps):
    """Lets a side train -> its seconds, loss and memory."""
    print(steps, file=process.stdin, flush=True)
    with reading("the answer of a side", "its message stands above"):
        return json.loads(process.stdout.readline())


def main(argv):
    cfg = parse_config(ThroughputConfig, argv)
    if cfg.side:
        return serve(cfg)
    names = [name for name in SIDES if cfg.nanogpt or "nanoGPT" not in name]
    sides, pipes = {}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    for name in names:
        sides[name] = subprocess.Popen([sys.executable, __file__, *argv, f"--side={name}"], **pipes)
        ask(sides[name], 3)                                       # warms up
    answers = {name: [] for name in names}
    for number in range(cfg.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            answers[name].append(ask(sides[name], cfg.steps))
    seconds = {name: [answer[0] for answer in answers[name]] for name in names}

    def ratio(a, b):
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b]))
    table, tokens = {}, cfg.steps * train_config(cfg, "PRISM").total_batch_tokens
    for name in names:
        speed, against = tokens / statistics.median(seconds[name]), ratio(name, "dense")
        _, ce, peak = answers[name][-1]
        table[name] = {"tokens_per_s": speed, "against_dense": against, "peak_mb": peak, "ce": ce}
        print(f"{name}: {speed:,.0f} tokens/s, {against:.3f} of dense, {peak:,.0f} MB, ce {ce:.4f}")
    ratios = {f"{a} / {b}": ratio(a, b) for a, b in PAIRS if {a, b} <= set(names)}
    save_results(cfg.out, {"sides": table, "ratios": ratios, "seconds": seconds})
    print(f"ratio PRISM/dense {ratios['PRISM / dense']:.2f}")


if __name__ == "__main__":
    run_main(main)
