"""How fast does PRISM train beside its dense twin, and beside nanoGPT? Every side in one run, interleaved.

    python experiments/throughput.py                          the default preset on this machine
    python experiments/throughput.py --quick=true             under a minute
    python experiments/throughput.py --nanogpt=DIR            also a checkout of nanoGPT, at equal shape
    python experiments/throughput.py --preset=config/prism-130m.toml --dataset=pydoc --steps=5

Each side is a process of its own that trains on the same windows; in each round every side runs the same number of
steps, in an order that rotates, while the others wait. Ratios are taken within a round; medians over rounds are shown.
Results go to experiments/results/throughput-DEVICE.json. The last line reads: ratio PRISM/dense X.XX
"""
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import train  # noqa: E402
from prism import UserError, atomic, load_dataset, parse_config, pick_device, run_main  # noqa: E402


@dataclass
class ThroughputConfig:
    preset: str = ""              # a file of options for train.py; empty takes the defaults
    dataset: str = "pydoc"        # a prepared dataset to train on
    nanogpt: str = ""             # folder of a nanoGPT checkout
    rounds: int = 12              # rounds that count; one more warms up
    steps: int = 8                # optimiser steps a side and round
    quick: bool = False           # 3 rounds of 4 steps
    compile: bool = False         # also time compiled sides
    device: str = "auto"          # auto, cpu or cuda
    threads: int = 0              # CPU threads a side; 0 takes all
    side: str = ""                # internal: this process is one side
    results: str = ""             # the JSON file; empty is experiments/results/throughput-DEVICE.json


SIDES = {  # name -> options of train.py; None is nanoGPT
    "PRISM": "", "dense": "--n_proto=0",
    "PRISM float32": "--dtype=float32", "dense float32": "--n_proto=0 --dtype=float32",
    "PRISM compiled": "--compile=on", "dense compiled": "--n_proto=0 --compile=on",
    "nanoGPT float32": None,
}


def train_config(cfg, options):
    return parse_config(train.TrainConfig, [*([cfg.preset] if cfg.preset else []), f"--dataset={cfg.dataset}", f"--device={cfg.device}", *options.split()])


def work(cfg):
    """One side: for each line "run STEPS" on standard input, trains and answers seconds, mean loss and peak memory (MB)."""
    tc = train_config(cfg, SIDES[cfg.side] or "")
    device = pick_device(tc.device)
    folder = Path(tc.dataset) if Path(tc.dataset).is_dir() else ROOT / "data" / tc.dataset
    tokens, _, meta = load_dataset(folder)
    tc.vocab_size = tc.vocab_size or meta["vocab_size"]
    torch.manual_seed(tc.seed)
    if SIDES[cfg.side] is None:
        # nanoGPT as its README runs it on a CPU: float32, eager, its optimizer; on a GPU bfloat16 autocast and compiled
        sys.path.insert(0, cfg.nanogpt)
        from model import GPT, GPTConfig
        stdout, sys.stdout = sys.stdout, sys.stderr  # it prints
        model = GPT(GPTConfig(block_size=tc.block_size, vocab_size=tc.vocab_size, n_layer=tc.n_layer, n_head=tc.n_head, n_embd=tc.n_embd,
                              dropout=tc.dropout, bias=tc.bias)).to(device)
        optimizer = model.configure_optimizers(tc.weight_decay, tc.learning_rate, (tc.beta1, tc.beta2), device.type)
        sys.stdout = stdout
        cuda = device.type == "cuda"
        dtype, compiled, extra = (torch.bfloat16, True, {}) if cuda else (torch.float32, False, {})
    else:
        train.keep_freed_memory()
        model = train.PRISM(train.model_config(tc)).to(device)
        optimizer = train.make_optimizer(model, tc, device)
        dtype, compiled, _ = train.choose_precision(tc, device)
        extra = dict(return_terms=True)
    step_model = torch.compile(model) if compiled else model
    windows = train.Windows(tokens, tc.block_size, tc.seed, tc.vocab_size, folder / "train.bin")
    micros = max(1, tc.total_batch_tokens // (tc.batch_size * tc.block_size))
    step = 0
    print("ready", flush=True)
    for line in sys.stdin:
        losses, t0 = [], time.perf_counter()
        for _ in range(int(line.split()[1])):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, tc) * group.get("scale", 1.0)
            for i in range(micros):
                idx, targets = (u.to(device) for u in windows.train((step * micros + i) * tc.batch_size, tc.batch_size))
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                    out = step_model(idx, targets, **extra)
                (out[1] / micros).backward()
                losses.append(out[2][0] if extra else out[1].detach())  # the cross-entropy
            torch.nn.utils.clip_grad_norm_(model.parameters(), tc.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        loss = torch.stack(losses).mean().item()  # waits for the device
        peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([time.perf_counter() - t0, loss, peak]), flush=True)


def main(argv):
    cfg = parse_config(ThroughputConfig, argv)
    if cfg.side:
        return work(cfg)
    if cfg.quick:
        cfg.rounds, cfg.steps = 3, 4
    names = [n for n in SIDES if (cfg.nanogpt or "nanoGPT" not in n) and (cfg.compile or "compiled" not in n)]
    env = os.environ | ({"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else {})
    sides = {n: subprocess.Popen([sys.executable, __file__, *argv, f"--side={n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 text=True, env=env) for n in names}

    def ask(name, steps):
        sides[name].stdin.write(f"run {steps}\n")
        sides[name].stdin.flush()
        line = sides[name].stdout.readline()
        if not line:
            raise UserError(f"the side '{name}' ended early; its message stands above")
        return json.loads(line)
    for name, p in sides.items():
        if p.stdout.readline().strip() != "ready":
            raise UserError(f"the side '{name}' did not start; its message stands above")
    for name in names:
        ask(name, 3)
    tc = train_config(cfg, "")
    tokens, seconds, losses, peaks = cfg.steps * tc.total_batch_tokens, {n: [] for n in names}, {n: [] for n in names}, {}
    for r in range(cfg.rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            s, loss, peaks[name] = ask(name, cfg.steps)
            seconds[name].append(s)
            losses[name].append(loss)
    for p in sides.values():
        p.stdin.close()

    def ratio(a, b):  # of speeds: how many times as fast is a
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b])) if a in seconds and b in seconds else None
    device = pick_device(cfg.device)
    about = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{about}, torch {torch.__version__}: {tc.n_layer} layers, d {tc.n_embd}, T {tc.block_size}, V {tc.vocab_size or 'of ' + tc.dataset}, "
          f"M {tc.n_proto}, k {tc.top_k}; {cfg.rounds} rounds of {cfg.steps} steps of {tc.total_batch_tokens:,} tokens")
    print("| side | tokens/s, median | slowest, fastest round | against dense | peak memory, MB | training ce, last round |\n|---|---|---|---|---|---|")
    table = {}
    for n in names:
        v = sorted(tokens / s for s in seconds[n])
        table[n] = dict(tokens_per_s=statistics.median(v), slowest=v[0], fastest=v[-1], against_dense=ratio(n, "dense"), peak_mb=peaks[n], ce=losses[n][-1])
        print(f"| {n} | {statistics.median(v):,.0f} | {v[0]:,.0f}, {v[-1]:,.0f} | {ratio(n, 'dense'):.3f} | {peaks[n]:,.0f} | {losses[n][-1]:.4f} |")
    ratios = {f"{a} / {b}": ratio(a, b) for a, b in (("PRISM", "dense"), ("PRISM float32", "dense float32"), ("dense float32", "nanoGPT float32"),
                                                     ("dense", "nanoGPT float32"), ("PRISM", "nanoGPT float32"), ("PRISM compiled", "PRISM"),
                                                     ("PRISM compiled", "dense compiled")) if ratio(a, b)}
    for pair, value in ratios.items():
        print(f"{pair}: {value:.3f}")
    path = Path(cfg.results or ROOT / f"experiments/results/throughput-{device.type}.json")
    with atomic(path, "w") as f:
        json.dump(dict(machine=about, torch=torch.__version__, sides=table, ratios=ratios, seconds=seconds, quick=cfg.quick,
                       shape={k: getattr(tc, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "n_proto", "top_k", "total_batch_tokens")}), f, indent=1)
    print(f"ratio PRISM/dense {ratios['PRISM / dense']:.2f}")


if __name__ == "__main__":
    run_main(main)
