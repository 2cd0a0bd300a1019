"""Trains PRISM on a prepared dataset: one process, or one per GPU under torchrun.

    python data/prepare.py && python train.py                   the default: a laptop CPU, minutes
    python train.py config/tinystories.toml --n_proto=1024      a preset, then options
    python train.py --resume                                    goes on from out/last.pt
    python train.py --n_proto=0 --out_dir=out-dense             the dense twin: no prototypes
    torchrun --standalone --nproc_per_node=8 train.py config/prism-130m.toml

Writes to out_dir: ckpt.pt (best on validation), last.pt (newest), metrics.csv, config.json and the
tokenizer. A resumed run ends with the very weights of a run that was never interrupted.
"""
import csv
import functools
import io
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import (atomic, dataset_folder, load_checkpoint, load_dataset, load_tensors,
                    parse_config, reading, run_main, set_up_ranks, window_starts, write_json)
from prism import PRISM, LinearCrossEntropy, PRISMConfig, UserError


@dataclass
class TrainConfig(PRISMConfig):
    dataset: str = "pydoc"            # a folder in data/, or a path
    out_dir: str = "out"              # where the run is written
    resume: bool = False              # go on from out_dir/last.pt, or start where there is none
    init_from: str = ""               # weights to start from: a checkpoint, or GPT-2 (name or file)
    seed: int = 1337                  # of the weights, the order of windows and dropout
    max_iters: int = 1000             # optimiser steps
    batch_size: int = 16              # windows per micro-batch
    total_batch_tokens: int = 2048    # tokens per step, over all micro-batches and ranks
    learning_rate: float = 4e-3       # its peak
    muon: bool = True                 # Muon for the blocks' matrices; false: AdamW for all
    embed_lr_scale: float = 2.0       # the embeddings' learning rate, as a multiple
    proto_lr_scale: float = 5.0       # the prototypes'
    warmup_iters: int = 100           # steps of linear warm-up
    decay: float = 0.6                # last part of the run, in which the rates fall to zero
    weight_decay: float = 0.1         # on matrices; not on norms, biases and prototypes
    beta1: float = 0.9                # AdamW's
    beta2: float = 0.99               # AdamW's
    grad_clip: float = 1.0            # largest norm of the gradient; 0 for none
    eval_interval: int = 200          # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 0              # validation tokens that an evaluation reads; 0 reads all
    device: str = "auto"              # auto, cpu, cuda or mps
    dtype: str = "auto"               # float32, bfloat16 (autocast) or auto, as the device prefers
    compile: bool = True              # on a GPU; needs a C compiler

    def check_run(self):
        """Raises UserError for a value out of range. PRISM itself checks the model's sizes."""
        for name, value in asdict(self).items():
            least = 1 if name in POSITIVE else 0
            most = 1 if name in ("beta1", "beta2", "decay") else math.inf
            if isinstance(value, (int, float)) and not least <= value < most:
                raise UserError(f"{name} is {value}, expected at least {least}, below {most}")
            if value not in CHOICES.get(name, [value]):
                raise UserError(f"{name} is {value}, expected {' or '.join(CHOICES[name])}")
        return self


POSITIVE = "batch_size", "block_size", "total_batch_tokens", "max_iters", "eval_interval"
CHOICES = {"dtype": ["auto", "float32", "bfloat16"]}
SHAPE = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias"  # init_from settles it
MAY_CHANGE = {"out_dir", "resume", "max_iters", "batch_size", "eval_interval", "eval_tokens",
              "device", "dtype", "compile"}                       # on resuming
COLUMNS = ["step", "tokens", "lr", "loss", *PRISM.TERMS, "val_ce", "val_ce_prototypes",
           "residual_share", "live", "tokens_per_s"]              # of metrics.csv


def model_config(cfg):
    return PRISMConfig(**{f.name: getattr(cfg, f.name) for f in fields(PRISMConfig)})


def choose_precision(cfg, device):
    """-> dtype to multiply in, whether to compile, and both in words with the reason."""
    able = torch.cpu.get_capabilities()
    native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type != "cpu":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    low = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and native)
    compiled = cfg.compile and device.type == "cuda"
    dtype = torch.bfloat16 if low else torch.float32
    return dtype, compiled, f"{dtype} (native bfloat16: {native}), compiled: {compiled}"


class Windows:
    """T tokens and, as targets, the T that follow each: a function of the seed and a number."""
    def __init__(self, tokens, block_size, seed, vocab_size, path):
        self.tokens, self.T, self.vocab_size, self.path = tokens, block_size, vocab_size, path
        starts = functools.partial(window_starts, len(tokens), block_size, seed)
        self.starts = functools.lru_cache(2)(starts)              # first tokens, by epoch

    def train(self, first, count):
        """Windows first ... first + count - 1 of the endless sequence of epochs -> idx, targets."""
        starts = []
        for number in range(first, first + count):
            epoch, place = divmod(number, len(self.starts(0)))
            starts.append(self.starts(epoch)[place])
        return self.read(starts)

    def read(self, starts):
        """First tokens (n,) -> idx, targets (n, T) int64; past the end targets are -1."""
        rows = np.full((len(starts), self.T + 1), -1, np.int64)
        for row, start in zip(rows, starts):
            chunk = self.tokens[start:start + self.T + 1]
            row[:len(chunk)] = chunk
        if rows.max() >= self.vocab_size:
            raise UserError(f"{self.path}: token {rows.max()} is beyond the model's vocabulary of "
                            f"{self.vocab_size}; prepare the text with the model's tokenizer")
        rows = torch.from_numpy(rows)
        return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, windows, cfg, rank, ranks, device, autocast):
    """One pass over the validation text, shared by all ranks -> dict of val_ce, val_ce_prototypes
    (of the logits W zhat), residual_share = sum_t |r_t|^2 / sum_t |z_t|^2, and live, the number of
    prototypes with a positive gate somewhere."""
    T, B, n_proto = windows.T, cfg.batch_size, model.config.n_proto
    n_tokens = min(len(windows.tokens) - 1, cfg.eval_tokens or len(windows.tokens))
    sums = torch.zeros(5 + n_proto, dtype=torch.float64)  # tokens, four sums, prototypes that fire
    model.eval()
    for first in range(rank * B * T, n_tokens, ranks * B * T):
        idx, targets = windows.read(range(first, min(first + B * T, n_tokens), T))
        y = targets.flatten().to(device)
        keep = y >= 0
        sums[0] += keep.sum().item()
        with autocast:
            z = model.hidden(idx.to(device)).flatten(0, 1)
            sums[1] += LinearCrossEntropy.apply(z, model.W, y).item()
            if n_proto:
                m = model.mixture(z)
                sums[2] += LinearCrossEntropy.apply(m.reconstruction, model.W, y).item()
                sums[3] += m.residual[keep].cpu().double().square().sum().item()
                sums[4] += z[keep].cpu().double().square().sum().item()
                sums[5 + m.ids[keep][m.gates[keep] > 0].cpu()] = 1
    model.train()
    if ranks > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    n, ce, ce_prototypes, r2, z2 = sums[:5].tolist()
    if not n_proto:
        return {"val_ce": ce / n}
    return {"val_ce": ce / n, "val_ce_prototypes": ce_prototypes / n, "residual_share": r2 / z2,
            "live": int((sums[5:] > 0).sum())}


def orthogonal(g, dtype):
    """g (m, n) = U S V' -> about U V', in dtype. Five Newton-Schulz steps push the singular values
    of g / |g| to 1: X <- a X + b XX'X + c XX'XX'X, a, b, c of Jordan et al. 2024."""
    if g.size(0) > g.size(1):
        return orthogonal(g.T, dtype).T                           # X X' is then the smaller product
    x = g.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        poly = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, poly, x, beta=3.4445)
    return x.to(g.dtype)


class Muon(torch.optim.Optimizer):
    """A matrix moves by its mean gradient made orthogonal: equally far in every direction. Unlike
    torch.optim.Muon in any dtype: bfloat16 takes ten times as long where a CPU emulates it."""
    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]), self.dtype)
                size = 0.2 * math.sqrt(max(p.shape))              # as large as AdamW's (Liu 2025)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-size * group["lr"])


def make_optimizers(model, cfg, dtype):
    """Muon for the matrices of the blocks, AdamW for the rest. Embeddings have few gradients each,
    and prototypes follow a trunk that moves: both need a higher rate than the matrices."""
    t, decay = model.transformer, cfg.weight_decay
    matrices = [p for p in t.h.parameters() if p.dim() == 2]
    vectors = [p for p in t.parameters() if p.dim() == 1]
    prototypes = [model.prototypes] if model.config.n_proto else []
    blocks = [{"params": matrices, "weight_decay": decay, "scale": 1.0}]
    groups = [{"params": [t.wte.weight, t.wpe.weight], "weight_decay": decay,
               "scale": cfg.embed_lr_scale},
              {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
              {"params": prototypes, "weight_decay": 0.0, "scale": cfg.proto_lr_scale}]
    muon = [Muon(blocks, dtype)] if cfg.muon else []
    groups += [] if cfg.muon else blocks
    return [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True), *muon]


def learning_rate(step, cfg):
    """Linear warm-up, a plateau, and a linear decay to zero at max_iters."""
    up = (step + 1) / max(1, cfg.warmup_iters)
    down = (cfg.max_iters - step) / max(1, cfg.decay * cfg.max_iters)
    return cfg.learning_rate * min(1.0, up, down)


def load_start(cfg):
    """The model that init_from names; its shape becomes the options'."""
    path = Path(cfg.init_from)
    content = load_tensors(path) if path.is_file() else {}
    with reading(cfg.init_from, "expected a checkpoint or GPT-2's weights"):
        if path.is_dir() or "config" in content:
            start, _ = load_checkpoint(path)
        else:
            start = PRISM.from_pretrained(content or cfg.init_from, n_proto=0)
    for name in SHAPE:
        setattr(cfg, name, getattr(start.config, name))
    return start


def load_last(path, cfg, meta):
    """last.pt -> its content. Raises UserError where the run had other options or another text."""
    if not cfg.resume:
        raise UserError(f"{path.parent} holds a run; give --resume or another --out_dir")
    last = load_tensors(path)
    with reading(path, "remove it to start afresh"):
        started = last["train_config"]
        if started["init_from"]:                                  # it settled the shape
            for name in ("init_from", *SHAPE):
                setattr(cfg, name, started[name])
        for name in ("dataset", *started):                        # the text explains other changes
            then, now = started[name], getattr(cfg, name)
            if name not in MAY_CHANGE and now != then:
                raise UserError(f"{path.parent} was started with {name}={then}, now {name}={now}; "
                                f"give --{name}={then} or another --out_dir")
        if last["data"] != meta["sha256"]["train.bin"]:
            raise UserError(f"{cfg.dataset} changed since {path.parent} was started on it")
    return last


def save(out_dir, is_best, content):
    """Writes metrics.csv, ckpt.pt, last.pt. After a kill in between a resumed run repeats it."""
    with atomic(out_dir / "metrics.csv", "w", newline="") as f:
        table = csv.DictWriter(f, COLUMNS)
        table.writeheader()
        table.writerows(content["rows"])
    buffer = io.BytesIO()
    torch.save(content, buffer)
    for name in ["ckpt.pt", "last.pt"] if is_best else ["last.pt"]:
        with atomic(out_dir / name) as f:
            f.write(buffer.getbuffer())


def main(argv):
    cfg = parse_config(TrainConfig, argv).check_run()
    rank, ranks, device = set_up_ranks(cfg.device)
    out_dir, folder = Path(cfg.out_dir), dataset_folder(cfg.dataset)
    train_tokens, val_tokens, meta = load_dataset(folder)
    cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
    last_path = out_dir / "last.pt"
    last = load_last(last_path, cfg, meta) if last_path.exists() else None
    source = load_start(cfg) if cfg.init_from and not last else None
    T, B, step_tokens = cfg.block_size, cfg.batch_size, cfg.total_batch_tokens
    micros = step_tokens // (B * T)                               # micro-batches, over all ranks
    if step_tokens % (B * T * ranks):
        raise UserError(f"total_batch_tokens is {step_tokens}, expected a multiple of batch_size x "
                        f"block_size x ranks = {B} x {T} x {ranks} = {B * T * ranks}")
    windows = Windows(train_tokens, T, cfg.seed, cfg.vocab_size, folder / "train.bin")
    val_windows = Windows(val_tokens, T, cfg.seed, cfg.vocab_size, folder / "val.bin")
    torch.manual_seed(cfg.seed)
    model = PRISM(model_config(cfg)).to(device)
    dtype, compiled, words = choose_precision(cfg, device)
    optimizers = make_optimizers(model, cfg, dtype)
    start, best, rows = 0, math.inf, []
    sums = torch.zeros(1 + len(PRISM.TERMS), device=device)  # loss and terms since the last row
    if last:
        with reading(last_path, "remove it to start afresh"):
            model.load_state_dict(last["model"])
            for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            start, best = int(last["step"]), float(last["best"])
            rows = [dict(row) for row in last["rows"]]
    elif source:
        model.transformer.load_state_dict(source.transformer.state_dict())
        if cfg.n_proto == source.config.n_proto:
            model.load_state_dict(source.state_dict())
        elif cfg.n_proto:                                         # they start on states of tokens
            count = max(B, math.ceil(cfg.n_proto / T))
            model.start_prototypes(windows.train(0, count)[0].to(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)
    step_model = torch.compile(model) if compiled else model
    if ranks > 1:
        step_model = DistributedDataParallel(step_model, gradient_as_bucket_view=True)
    def say(text):
        if rank == 0:
            print(text, flush=True)
    n_params = sum(p.numel() for p in model.parameters())
    say(f"{meta['name']}: {len(train_tokens):,} training and {len(val_tokens):,} validation tokens")
    say(f"model: {n_params:,} parameters, {cfg.n_proto} prototypes, vocabulary {cfg.vocab_size:,}")
    say(f"device: {device}, ranks: {ranks}, {words}")
    say(f"steps: {start} to {cfg.max_iters} of {micros} x {B} windows of {T} tokens")
    if rank == 0:
        write_json(out_dir / "config.json", asdict(cfg))
        for name in ("tokenizer.tiktoken", "tokenizer.json"):
            with atomic(out_dir / name) as f:
                f.write((folder / name).read_bytes())
        for leftover in out_dir.glob("*.*.tmp"):                  # of a run that was killed
            leftover.unlink()

    done, clock = start, time.perf_counter()
    for step in range(start, cfg.max_iters):
        lr = learning_rate(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
        terms = torch.zeros_like(sums)
        for i in range(rank, micros, ranks):
            micro = step * micros + i                             # the same for any number of ranks
            idx, targets = windows.train(micro * B, B)
            torch.manual_seed(cfg.seed * 1_000_003 + micro)       # of dropout
            if ranks > 1:                                         # ranks add up at the last one
                step_model.require_backward_grad_sync = i + ranks >= micros
            with autocast:
                loss, parts = step_model(idx.to(device), targets.to(device), return_terms=True)
            (loss * ranks / micros).backward()
            terms += torch.cat((loss.detach()[None], parts)) / micros
        if ranks > 1:
            dist.all_reduce(terms)
        loss = terms[0].item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

        done, sums, now = step + 1, sums + terms, time.perf_counter()
        speed = (done - start) * step_tokens / (now - clock)
        evaluating = done % cfg.eval_interval == 0 or done == cfg.max_iters
        is_best = False
        if evaluating:
            result = evaluate(model, val_windows, cfg, rank, ranks, device, autocast)
            loss = result["val_ce"]
            row = {"step": done, "tokens": done * step_tokens, "lr": lr, "tokens_per_s": speed}
            means = sums / (done - (rows[-1]["step"] if rows else 0))
            row |= dict(zip(("loss", *PRISM.TERMS), means.tolist())) | result
            rows.append({name: round(value, 6) for name, value in row.items()})
            sums = torch.zeros_like(sums)
            is_best = result["val_ce"] < best
            best = min(best, result["val_ce"])
            clock += time.perf_counter() - now
            shown = ", ".join(f"{name} {value:.5g}" for name, value in result.items())
            say(f"step {done}: {shown}, {speed:,.0f} tokens/s")
        elif done % max(1, cfg.eval_interval // 5) == 0:
            say(f"step {done}: ce {terms[1].item():.3f}, {speed:,.0f} tokens/s")
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {done}; the run stops, {out_dir} keeps "
                            "its last checkpoint. Lower --learning_rate or --grad_clip")
        if rank == 0 and evaluating:
            save(out_dir, is_best, {
                "model": model.state_dict(), "config": asdict(model.config), "step": done,
                "best": best, "rows": rows, "data": meta["sha256"]["train.bin"],
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "train_config": asdict(cfg)})
    if ranks > 1:
        dist.barrier()                                            # rank 0 may still write
    say(f"step {done}: best validation ce {best:.4f} is in {out_dir}/ckpt.pt. "
        f'Next: python sample.py --out_dir={out_dir} --prompt="The"')


if __name__ == "__main__":
    run_main(main)
