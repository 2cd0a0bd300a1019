"""Trains PRISM on a prepared dataset: one process, or one a device under torchrun.

    python data/prepare.py && python train.py                          the default: a laptop CPU, minutes
    python train.py config/tinystories.toml --n_proto=1024             a preset, then options; later words win
    python train.py --resume                                           goes on from out/last.pt, bit for bit
    python train.py --n_proto=0 --out_dir=out-dense                    the dense twin: then --resume draws it on loss.png of out/
    torchrun --standalone --nproc_per_node=8 train.py config/prism-130m.toml

Writes to out_dir: ckpt.pt (best on validation), last.pt (newest), config.json, metrics.csv, loss.png, the tokenizer.
"""
import contextlib
import csv
import ctypes
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from prism import (PRISM, LinearCrossEntropy, PRISMConfig, UserError, atomic, dataset_folder, load_dataset, load_tensors, load_weights,
                   parse_config, read_metrics, run_main, set_up_ranks, window_starts)


# ----------------------------------------------------------------------------- configuration

@dataclass
class TrainConfig(PRISMConfig):
    dataset: str = "pydoc"            # a folder under data/, or a path
    out_dir: str = "out"              # where the run is written
    resume: bool = False              # go on from out_dir/last.pt, or start where there is none
    init_from: str = ""               # weights to start from: a checkpoint, or GPT-2 ("gpt2", "gpt2-medium", a state dict's file)
    seed: int = 1337                  # of the weights, the order of windows and dropout
    max_iters: int = 1000             # optimiser steps
    batch_size: int = 16              # windows a micro-batch
    total_batch_tokens: int = 2048    # tokens an optimiser step, over all micro-batches and ranks
    learning_rate: float = 2e-3       # its peak
    min_lr: float = 2e-4              # at the end of the cosine
    proto_lr_scale: float = 30.0      # the prototypes' learning rate, as a multiple
    warmup_iters: int = 100           # steps of linear warm-up
    weight_decay: float = 0.1         # on matrices; not on norms, biases and prototypes
    beta1: float = 0.9                # AdamW's
    beta2: float = 0.95               # AdamW's
    grad_clip: float = 1.0            # largest norm of the gradient; 0 for none
    eval_interval: int = 200          # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 0              # validation tokens an evaluation reads; 0 reads all
    device: str = "auto"              # auto, cpu, cuda or mps
    dtype: str = "auto"               # auto, float32 or bfloat16 (autocast)
    compile: str = "auto"             # auto, on or off: torch.compile


    def check_run(self):
        """Raises UserError for a value outside its range; check() of the model's shape comes when that is settled."""
        above, least = 1e-12, {"max_iters": 0, "warmup_iters": 0, "eval_tokens": 0, "seed": 0, "grad_clip": 0.0, "weight_decay": 0.0, "min_lr": 0.0,
                               "proto_lr_scale": 0.0, "beta1": 0.0, "beta2": 0.0, "lambda_rec": 0.0, "lambda_t2p": 0.0, "lambda_p2t": 0.0}
        least |= dict.fromkeys(("batch_size", "total_batch_tokens", "eval_interval", "block_size"), 1) | {"learning_rate": above}
        most = {"beta1": 1 - above, "beta2": 1 - above}
        for name, low in least.items():
            value, high = getattr(self, name), most.get(name, math.inf)
            if not low <= value <= high or value == math.inf:
                raise UserError(f"{name} is {value}, expected {'above 0' if low == above else f'at least {low:g}'}{' and below 1' if name in most else ''}")
        return self


SHAPE = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias"  # what init_from settles


def model_config(cfg):
    return PRISMConfig(**{f.name: getattr(cfg, f.name) for f in fields(PRISMConfig)})


# ----------------------------------------------------------------------------- devices and ranks

def choose_precision(cfg, device):
    """-> (dtype, compile?, why): what 'auto' means on this device, in words."""
    has = {"cuda": lambda: torch.cuda.is_bf16_supported(), "mps": lambda: False,
           "cpu": lambda: any(v for k, v in torch.cpu.get_capabilities().items() if k in ("avx512_bf16", "amx_bf16", "bf16"))}
    if cfg.dtype not in ("auto", "float32", "bfloat16") or cfg.compile not in ("auto", "on", "off"):
        raise UserError(f"dtype={cfg.dtype}, compile={cfg.compile}: expected auto, float32 or bfloat16; and auto, on or off")
    bf16 = has[device.type]() if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    why = "as asked" if cfg.dtype != "auto" else f"the {device.type} {'multiplies bfloat16 natively' if bf16 else 'has no native bfloat16'}"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    wanted = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    how = "eager, as asked" if cfg.compile == "off" else "eager: compiling pays back only in long runs" if not wanted else \
        "compiled" if compiler else "eager: no C++ compiler was found"
    return torch.bfloat16 if bf16 else torch.float32, wanted and bool(compiler), f"{'bfloat16 autocast' if bf16 else 'float32'} ({why}), {how}"


def keep_freed_memory():
    """Asks glibc to keep what is freed. Else each step returns its large tensors and pays for fresh pages at the next."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2 ** 25), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


# ----------------------------------------------------------------------------- data: a function of (seed, step)

class Windows:
    """Training windows by their place in the endless sequence of epochs, and validation windows by number."""

    def __init__(self, tokens, block_size, seed, vocab_size, path):
        self.tokens, self.T, self.vocab_size, self.path = tokens, block_size, vocab_size, path
        self.starts = functools.lru_cache(2)(lambda epoch: window_starts(len(tokens), block_size, seed, epoch))

    def train(self, first, count):
        """Windows first ... first + count - 1 of training -> idx, targets (count, T) int64."""
        W = len(self.starts(0))
        return self.read([self.starts(p // W)[p % W] for p in range(first, first + count)])

    def val(self, first, count):
        """Windows of the plain order; the last is filled up with targets of -1, which the loss ignores."""
        return self.read([w * self.T for w in range(first, first + count)])

    def read(self, starts):
        raw, sizes = np.zeros((len(starts), self.T + 1), np.int64), []
        for row, s in zip(raw, starts):
            chunk = self.tokens[s:s + self.T + 1]
            row[:len(chunk)] = chunk
            sizes.append(len(chunk))
        if raw.max() >= self.vocab_size:
            r, c = np.unravel_index(raw.argmax(), raw.shape)
            raise UserError(f"{self.path}: token {raw.max()} at position {starts[r] + c} is beyond the vocabulary ({self.vocab_size}); "
                            "prepare the data again: python data/prepare.py")
        idx, targets = torch.from_numpy(raw[:, :-1].copy()), torch.from_numpy(raw[:, 1:].copy())
        for row, n in zip(targets, sizes):
            row[max(0, n - 1):] = -1
        return idx, targets


# ----------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, windows, cfg, rank, ranks, device, autocast):
    """One pass over the validation text, shared by all ranks -> a dict of means over its tokens.

    val_ce; val_ce_prototypes, the cross-entropy without the residual, softmax(W zhat); residual_share, the residual's
    share of energy; live, how many prototypes have a positive gate somewhere.
    """
    c, T = model.config, windows.T
    n_tokens = min(len(windows.tokens) - 1, cfg.eval_tokens or len(windows.tokens))
    n_windows = -(-n_tokens // T)
    sums = torch.zeros(5, dtype=torch.float64)  # ce, ce without residual, ||r||^2, ||z||^2, tokens
    used = torch.zeros(c.n_proto)
    W = model.transformer.wte.weight.detach()
    model.eval()
    for first in range(rank * cfg.batch_size, n_windows, ranks * cfg.batch_size):
        idx, targets = (u.to(device) for u in windows.val(first, min(cfg.batch_size, n_windows - first)))
        targets, keep = targets.flatten(), targets.flatten() >= 0
        with autocast:
            z = model.hidden(idx).flatten(0, 1)
            sums += torch.tensor([LinearCrossEntropy.apply(z, W, targets).item(), 0, 0, 0, keep.sum()])
            if c.n_proto:
                m = model.mixture(z)
                r2, z2 = (u[keep].float().square().sum().item() for u in (m.residual, z))
                sums += torch.tensor([0, LinearCrossEntropy.apply(m.reconstruction, W, targets).item(), r2, z2, 0])
                used.index_add_(0, m.ids[keep].flatten().cpu(), (m.gates[keep] > 0).float().flatten().cpu())
    model.train()
    if ranks > 1:
        sums, used = sums.to(device), used.to(device)
        dist.all_reduce(sums)
        dist.all_reduce(used)
    ce_, proto, r2, z2, n = sums.tolist()
    return dict(val_ce=ce_ / n, **dict(val_ce_prototypes=proto / n, residual_share=r2 / z2, live=int((used > 0).sum())) if c.n_proto else {})


# ----------------------------------------------------------------------------- what a run writes

COLUMNS = ["step", "tokens", "lr", "loss", *PRISM.TERMS, "val_ce", "val_ce_prototypes", "residual_share", "live", "tokens_per_s"]


@contextlib.contextmanager
def writing(path):
    """Around every write: a full or forbidden disk becomes an error that says what still stands."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save wraps the former in the latter
        raise UserError(f"{path} could not be written ({str(e).splitlines()[0]}); what was there before is untouched. "
                        "Free some space, then go on with --resume") from None


def write_metrics(out_dir, rows):
    """metrics.csv and loss.png, both whole or not at all."""
    with atomic(out_dir / "metrics.csv", "w", newline="") as f:
        w = csv.DictWriter(f, COLUMNS)
        w.writeheader()
        w.writerows(rows)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")

    def draw(ax, rows, key, label, color, style="-", marker="o"):
        xy = [(r["tokens"] / 1e6, r[key]) for r in rows if r.get(key) is not None]
        if xy:
            ax.plot(*zip(*xy), style, color=color, label=label, marker=marker, ms=3)
    draw(left, rows, "ce", "training", "#999999", "-", "")
    draw(left, rows, "val_ce", "validation", "#0072B2")
    draw(left, rows, "val_ce_prototypes", "validation, prototypes only", "#E69F00", "--", "s")
    with contextlib.suppress(UserError, OSError):
        twin = read_metrics(out_dir.with_name(out_dir.name + "-dense") / "metrics.csv")
        draw(left, twin, "val_ce", "validation, dense twin", "#000000", ":", "^")
    for key, color, style, marker in (("rec", "#009E73", "-", "o"), ("t2p", "#D55E00", "--", "s"), ("p2t", "#CC79A7", ":", "^")):
        draw(right, rows, key, key, color, style, marker)
    draw(right, rows, "residual_share", "residual share, validation", "#56B4E9", "-.", "v")
    for ax, ylabel in ((left, "cross-entropy (nats a token)"), (right, "head terms (unweighted)")):
        ax.set(xlabel="training tokens (millions)", ylabel=ylabel)
        if ax.lines:
            ax.legend(frameon=False)
    with atomic(out_dir / "loss.png") as f:
        fig.savefig(f, dpi=120, format="png")
    plt.close(fig)


# ----------------------------------------------------------------------------- the model to train

def load_start(cfg):
    """The weights that cfg.init_from names, whose shape then replaces the options' -> (state dict, its n_proto), and what they had read:
    (sha256 of the train.bin, seed of its order, tokens of it)."""
    path = Path(cfg.init_from) / "ckpt.pt" if Path(cfg.init_from).is_dir() else Path(cfg.init_from)
    content = load_tensors(path) if path.is_file() else cfg.init_from
    if isinstance(content, dict) and "config" in content:
        config, state = content["config"], content["model"]
        c = content.get("train_config", {})
        read = content.get("data"), c.get("seed"), max(content.get("before", 0), content.get("step", 0) * c.get("total_batch_tokens", 0))
    else:  # GPT-2's; n_head is n_embd / 64 as in all of its sizes
        model = PRISM.from_pretrained(content, n_proto=0)
        config, state, read = asdict(model.config), model.state_dict(), (None, None, 0)
    for name in SHAPE:
        setattr(cfg, name, config[name])
    return (state, config["n_proto"]), read


def attach(model, state, n_proto, cfg, windows, device):
    """Loads a start into model; prototypes that it lacks start on token states of the first windows."""
    load_weights(model, state, cfg.init_from, trunk_only=n_proto != cfg.n_proto)
    if cfg.n_proto and n_proto != cfg.n_proto:
        model.start_prototypes(windows.train(0, max(cfg.batch_size, -(-cfg.n_proto // cfg.block_size)))[0].to(device))


def make_optimizer(model, cfg, device):
    params = dict(model.named_parameters())
    protos = [params.pop("prototypes")] if "prototypes" in params else []
    groups = [dict(params=[p for p in params.values() if p.dim() >= 2], weight_decay=cfg.weight_decay, scale=1.0),
              dict(params=[p for p in params.values() if p.dim() < 2], weight_decay=0.0, scale=1.0),
              # prototypes follow a trunk that moves: at the trunk's own rate they lag, and the residual's share doubles
              dict(params=protos, weight_decay=0.0, scale=cfg.proto_lr_scale)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cpu", "cuda"))


def learning_rate(step, cfg):
    """Linear warm-up to learning_rate, then a cosine down to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (cfg.learning_rate - cfg.min_lr)


# ----------------------------------------------------------------------------- the run

def main(argv):
    cfg = parse_config(TrainConfig, argv).check_run()
    keep_freed_memory()
    rank, ranks, device = set_up_ranks(cfg.device)
    master = rank == 0
    say = (lambda *a: print(*a, flush=True)) if master else (lambda *a: None)
    out_dir = Path(cfg.out_dir)
    folder = dataset_folder(cfg.dataset)
    train_tokens, val_tokens, meta = load_dataset(folder)
    cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
    dtype, compiled, why = choose_precision(cfg, device)

    # -- a checkpoint to go on from, or weights to start from
    last, begin, before = None, None, 0  # before: tokens of this very text, in this order or all of them, that the weights had read when they came
    if (out_dir / "last.pt").exists():
        if not cfg.resume:
            raise UserError(f"{out_dir} already holds a run; go on with --resume, choose another --out_dir, or remove the folder")
        last = load_tensors(out_dir / "last.pt")
        if not isinstance(last, dict) or not {"model", "config", "optimizer", "step", "best", "train_config", "data", "sums"} <= last.keys():
            raise UserError(f"{out_dir}/last.pt is no checkpoint of train.py; remove it to start afresh")
        before = last.get("before", 0)
        if last["train_config"].get("init_from"):
            cfg.init_from = last["train_config"]["init_from"]
            for name in SHAPE:
                setattr(cfg, name, last["config"][name])
        free = {"out_dir", "resume", "max_iters", "eval_interval", "eval_tokens", "device", "dtype", "compile", "batch_size"}
        for k, v in sorted(last["train_config"].items(), key=lambda kv: kv[0] != "dataset"):  # the dataset explains what follows from it
            if k not in free and getattr(cfg, k, v) != v:
                raise UserError(f"{out_dir} was started with {k}={v}, now {k}={getattr(cfg, k)}; give --{k}={v} or another --out_dir")
        if last["data"] != meta["sha256"]["train.bin"]:
            raise UserError(f"{out_dir} was trained on another version of {folder}; choose another --out_dir")
    elif cfg.init_from:
        begin, (text, seed, read) = load_start(cfg)
        before = read if text == meta["sha256"]["train.bin"] and (seed == cfg.seed or read >= len(train_tokens)) else 0
    start, best = (last["step"], last["best"]) if last else (0, math.inf)
    rows = [r for r in read_metrics(out_dir / "metrics.csv") if r["step"] <= start] if last else []

    # -- the shape is settled: windows, model, optimiser
    if cfg.vocab_size < meta["vocab_size"]:
        raise UserError(f"the model has vocab_size {cfg.vocab_size}, the dataset {meta['vocab_size']}; prepare it with the model's tokenizer")
    windows = Windows(train_tokens, cfg.block_size, cfg.seed, meta["vocab_size"], folder / "train.bin")
    val_windows = Windows(val_tokens, cfg.block_size, cfg.seed, meta["vocab_size"], folder / "val.bin")
    micros = cfg.total_batch_tokens // (cfg.batch_size * cfg.block_size)  # micro-batches a step, over all ranks
    if micros * cfg.batch_size * cfg.block_size != cfg.total_batch_tokens or micros % ranks or not micros:
        raise UserError(f"total_batch_tokens is {cfg.total_batch_tokens}, expected a multiple of batch_size x block_size x ranks "
                        f"= {cfg.batch_size} x {cfg.block_size} x {ranks} = {cfg.batch_size * cfg.block_size * ranks}")
    torch.manual_seed(cfg.seed)
    model = PRISM(model_config(cfg)).to(device)
    if last:
        load_weights(model, last["model"], out_dir / "last.pt")
    elif begin:
        attach(model, *begin, cfg, windows, device)
    optimizer = make_optimizer(model, cfg, device)
    if last:
        try:
            optimizer.load_state_dict(last["optimizer"])
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f"{out_dir}/last.pt holds no state of this optimizer ({e}); remove it to start afresh") from None
    autocast = torch.autocast(device.type, dtype=dtype) if dtype is not torch.float32 else contextlib.nullcontext()
    step_model = torch.compile(model) if compiled else model
    if ranks > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device] if device.type == "cuda" else None,
                                             gradient_as_bucket_view=True)

    n_params = sum(p.numel() for p in model.parameters())
    per_epoch = len(windows.starts(0)) * cfg.block_size
    say(f"{meta['name']}: {len(train_tokens):,} training and {len(val_tokens):,} validation tokens, vocabulary {meta['vocab_size']:,}")
    say(f"model: {n_params:,} parameters, {f'{cfg.n_proto} prototypes, top_k {cfg.top_k}' if cfg.n_proto else 'the dense twin'}")
    say(f"device: {device}, {ranks} rank{'s' * (ranks > 1)}, {why}")
    say(f"steps: {start} to {cfg.max_iters} of {cfg.total_batch_tokens:,} tokens in {micros} micro-batch{'es' * (micros > 1)}, "
        f"{cfg.max_iters * cfg.total_batch_tokens / per_epoch:.1f} epochs")
    if master:
        with writing(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        for left in out_dir.glob("*.tmp"):  # of a run that was killed while it wrote
            left.unlink()
        with atomic(out_dir / "config.json", "w") as f:
            json.dump(asdict(cfg), f, indent=1)
        for name in ("tokenizer.tiktoken", "tokenizer.json"):
            with atomic(out_dir / name) as f:
                f.write((folder / name).read_bytes())

    # -- Ctrl-C and SIGTERM end the run after the step, with a checkpoint
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))

    def agreed_to_stop():
        if ranks == 1:
            return bool(stop)
        flag = torch.tensor(float(bool(stop)), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def checkpoint(step, is_best=False):
        if not master:
            return
        content = dict(model=model.state_dict(), config=asdict(model.config), step=step, best=best, optimizer=optimizer.state_dict(),
                       train_config=asdict(cfg), data=meta["sha256"]["train.bin"], before=before, sums=sums)
        for name in ["ckpt.pt"] * is_best + ["last.pt"]:  # a kill in between repeats this interval and writes both again
            with writing(out_dir / name), atomic(out_dir / name) as f:
                torch.save(content, f)

    def bad(what, value, step):
        kept = f"{out_dir}/last.pt holds the last good state" if (out_dir / "last.pt").exists() else "there was no checkpoint yet"
        return UserError(f"{what} is {value} at step {step}; the run stops, {kept}. "
                         "Lower --learning_rate or --grad_clip, or look at the data there")

    # -- steps
    bar = tqdm(total=cfg.max_iters, initial=start, disable=not (master and sys.stderr.isatty()), unit="step", dynamic_ncols=True)
    sums = last["sums"].to(device) if last else torch.zeros(6, device=device)  # since the last evaluation: loss, its terms, steps
    step_terms, t0, t_eval = torch.ones(6, device=device), time.perf_counter(), 0.0
    check_every = 1 if device.type == "cpu" else 10  # reading the loss of a GPU makes it wait
    for step in range(start, cfg.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["scale"]
        step_terms.zero_()[5] = 1 / ranks
        for i in range(rank, micros, ranks):
            micro = step * micros + i  # its number in the run, whatever the number of ranks
            idx, targets = windows.train(micro * cfg.batch_size, cfg.batch_size)
            if device.type == "cuda":
                idx, targets = (u.pin_memory().to(device, non_blocking=True) for u in (idx, targets))
            else:
                idx, targets = idx.to(device), targets.to(device)
            if cfg.dropout:
                torch.manual_seed(cfg.seed * 1_000_003 + micro)  # dropout is a function of (seed, step) too
            last_micro = i + ranks >= micros
            with contextlib.nullcontext() if ranks == 1 or last_micro else step_model.no_sync():
                with autocast:
                    _, loss, parts = step_model(idx, targets, return_terms=True)
                (loss * ranks / micros).backward()
            step_terms[:5] += torch.cat((loss.detach()[None], parts)) / micros
        if ranks > 1:
            dist.all_reduce(step_terms)
        if (step + 1) % check_every == 0 and not math.isfinite(step_terms[0].item()):
            raise bad("the training loss", step_terms[0].item(), step)
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums, done = sums + step_terms, step + 1
        speed = (done - start) * cfg.total_batch_tokens / (time.perf_counter() - t0 - t_eval)
        bar.update()
        if bar.n % 10 == 0 and not bar.disable:
            bar.set_postfix_str(f"ce {step_terms[1].item():.3f}, {speed:,.0f} tokens/s")
        elif bar.disable and master and done % max(1, cfg.eval_interval // 5) == 0:
            left = (cfg.max_iters - done) * cfg.total_batch_tokens / speed
            say(f"step {done}: ce {step_terms[1].item():.3f}, {speed:,.0f} tokens/s, {left:.0f} s to go")
        stopping = done % check_every == 0 and agreed_to_stop()
        if not (done == cfg.max_iters or done % cfg.eval_interval == 0):
            if stopping:
                checkpoint(done)
                break
            continue
        t1 = time.perf_counter()
        result = evaluate(model, val_windows, cfg, rank, ranks, device, autocast)
        means = dict(zip(("loss", *PRISM.TERMS), (sums[:5] / sums[5]).tolist()))
        if not math.isfinite(result["val_ce"]) or not math.isfinite(means["loss"]):
            raise bad("the loss", result["val_ce"], done)
        sums = torch.zeros(6, device=device)
        is_best = result["val_ce"] < best
        best = min(best, result["val_ce"])
        row = dict.fromkeys(COLUMNS) | dict(step=done, tokens=done * cfg.total_batch_tokens, lr=optimizer.param_groups[0]["lr"],
                                            tokens_per_s=speed) | means | result
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        if master:
            with writing(out_dir / "metrics.csv"):  # before the checkpoint: resuming drops rows that are too new, but cannot make one up
                write_metrics(out_dir, rows)
        checkpoint(done, is_best)
        bar.clear()
        head = f", prototypes only {result['val_ce_prototypes']:.4f}, residual share {result['residual_share']:.3f}, " \
               f"live {result['live']}/{cfg.n_proto}" if cfg.n_proto else ""
        say(f"step {done}: validation ce {result['val_ce']:.4f}{head}, {speed:,.0f} tokens/s{' *' if is_best else ''}")
        t_eval += time.perf_counter() - t1
        if stopping:
            break
    bar.close()
    if stop:
        say(f"stopped by a signal after step {done}; go on with --resume")
    elif start >= cfg.max_iters:
        if master and rows:
            write_metrics(out_dir, rows)  # loss.png again: a dense twin may have come since
        say(f"{out_dir} is at step {start} of {cfg.max_iters} already; only loss.png was drawn again")
    else:
        say(f"best validation ce {best:.4f}; wrote {out_dir}/ckpt.pt. Next: python prism.py --out_dir={out_dir} --prompt=\"The\"")
    if ranks > 1:
        dist.barrier()  # rank 0 may still write; a rank that leaves earlier breaks the group under it
        del step_model  # the reducer's threads end before the group that they use
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    run_main(main)
