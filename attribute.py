"""Which training text does a prediction rest on? Influence of training tokens, documents and sources, exact for the prototype head.

    python attribute.py index                                           one pass over the training windows of out/ -> out/attribution/
    python attribute.py query --prompt="Return the number of"           the model goes on by itself; each new token is attributed
    python attribute.py query --prompt="Return the" --target=" number" --level=token --hessian=full --json
    python attribute.py explain --prompt="Return the number of"         the ledger: logit = residual + slices
    python attribute.py cards --search=deprecated                       prototype cards
    python attribute.py report                                          out/report.html
    torchrun --standalone --nproc_per_node=8 attribute.py index         the same pass, shared out

The mathematics. Hold gates a and residuals at the checkpoint. Then logits are linear in the prototypes P, and the training loss
over P is multinomial logistic regression with sparse features. With pi_s = softmax(logits_s), m_s = W^T pi_s:

    g_s = W[y_s] - m_s                                                  error vector; -dCE_s/dp_i = a_si g_s
    C_s = W^T (diag pi_s - pi_s pi_s^T) W                               d2CE_s / dp_i dp_j = a_si a_sj C_s
    H_i = W^T diag(sum_s a_si^2 pi_s) W - sum_s a_si^2 m_s m_s^T + mu I the exact diagonal block of the Hessian, (d, d)
    I(s, t) = sum_i a_si a_ti g_s^T H_i^-1 g_t                          score of training token s for target token t, in nats:
                                                                        what removing s adds to t's loss, to first order

Scores are linear in s and in t: those of documents, sources and longer targets are sums. From Python:
Index("out").query("Return the number of", level="document") returns an Answer, which shows itself in a notebook.
"""
import base64
import contextlib
import html
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prism import (UserError, atomic, dataset_folder, fingerprint, load_checkpoint, load_dataset, load_gains, load_tokenizer, parse_config, pick_device,
                   plain, read_metrics, run_command, run_main, set_up_ranks, window_starts)

FORMAT = 2
MU_SHARE = 0.1  # LDS is flat from 0.0003 to 0.3 (experiments/lds.py)
CHUNK = 2048  # postings or sites read at a time: their error vectors stay in the cache


# ----------------------------------------------------------------------------- configuration, a dataclass a subcommand

@dataclass
class IndexConfig:
    out_dir: str = "out"      # the run; its ckpt.pt is indexed
    mu: float = 0.0           # damping: mu I is added to each block; 0 takes MU_SHARE of the median block's mean eigenvalue
    max_tokens: int = 0       # index a random sample of windows of this many tokens; 0 takes all
    cap: int = 0              # postings kept a prototype, about, drawn at random and weighted up; 0 keeps all
    rank: int = 0             # directions kept of each error vector; 0 keeps all
    seed: int = 1337          # of max_tokens' and cap's draws
    dry_run: bool = False     # say what time, memory and disk it will take, and stop
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class QueryConfig:
    out_dir: str = "out"      # the run, indexed before
    prompt: str = ""          # the text that the prediction follows
    target: str = ""          # the text whose loss is explained; without it the model goes on by itself
    queries: str = ""         # a file of many: one {"prompt": ..., "target": ...} a line; they share the reading
    max_new_tokens: int = 4   # length of the model's own continuation
    level: str = "document"   # token, document or source
    top: int = 10             # proponents and opponents shown
    hessian: str = "block"    # block (exact blocks), joined (blocks joined by co-activation), full (exact and joint: slow), none (gradients)
    json: bool = False        # print JSON
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class ExplainConfig:
    out_dir: str = "out"      # the run
    prompt: str = ""          # its tokens' logits are explained, and the likeliest next token's
    gains: str = ""           # a gains file that turns prototypes up or down; several with commas between
    top: int = 4              # slices shown a token
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class CardsConfig:
    out_dir: str = "out"      # the run, indexed before
    search: str = ""          # a regular expression over label, tokens and contexts
    proto: str = ""           # prototypes by number: 3,17
    sort: str = "density"     # density, gate, id or label
    top: int = 10             # cards shown; 0 shows all
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class ReportConfig:
    out_dir: str = "out"      # the run; written: out_dir/report.html
    prompt: str = ""          # a text of your own in the explorer; without it the first words of a held-out document
    max_new_tokens: int = 12  # length of the model's continuation of it
    device: str = "auto"      # auto, cpu, cuda or mps


# ----------------------------------------------------------------------------- the mathematics, on tensors

@torch.no_grad()
def records(model, idx, targets):
    """idx, targets (B, T) -> ids (N, k), gates (N, k), errors g (N, d), pi (N, V), m (N, d), loss (N,); N = B T tokens."""
    W = model.transformer.wte.weight
    z, y = model.hidden(idx).flatten(0, 1), targets.flatten()
    mix = model.mixture(z)
    pi, loss = z.new_empty(len(z), len(W)), z.new_empty(len(z))
    rows = max(64, 2 ** 21 // len(W))  # a chunk of logits stays in the cache
    for i in range(0, len(z), rows):
        logp = (z[i:i + rows] @ W.T).log_softmax(1)
        loss[i:i + rows] = -logp.gather(1, y[i:i + rows, None])[:, 0]
        torch.exp(logp, out=pi[i:i + rows])
    m = pi @ W
    return mix.ids, mix.gates, W[y] - m, pi, m, loss


class Curvature:
    """The sums from which the blocks are made, D_i = sum_s a_si^2 pi_s (M, V) and S_i = sum_s a_si^2 m_s m_s^T (M, d, d), and what
    joins them, G_ij = sum_s a_si a_sj tr C_s (M, M)."""

    def __init__(self, W, n_proto):
        self.W = W.detach()
        self.D, self.S, self.G = W.new_zeros(n_proto, W.size(0)), W.new_zeros(n_proto, W.size(1), W.size(1)), W.new_zeros(n_proto, n_proto)
        self.sums = {"D": self.D, "S": self.S, "G": self.G}

    def add(self, ids, gates, pi, m):
        """N tokens: ids, gates (N, k), pi (N, V), m (N, d). Cost N k (V + d^2), sparse in the prototypes."""
        flat, order = ids.flatten().sort(stable=True)
        tokens, a = order // ids.size(1), gates.flatten()[order]
        first = torch.searchsorted(flat, torch.arange(len(self.D) + 1, device=flat.device))
        self.D += F.embedding_bag(tokens, pi, first[:-1], per_sample_weights=a * a, mode="sum")
        x = m[tokens] * a[:, None]
        trace = pi @ self.W.square().sum(1) - m.square().sum(1)                               # (N,) tr C_s
        self.G.view(-1).index_add_(0, (ids[:, :, None] * len(self.G) + ids[:, None]).flatten(),
                                   (gates[:, :, None] * gates[:, None] * trace[:, None, None]).flatten())
        first = first.tolist()
        for i in flat.unique().tolist():
            xi = x[first[i]:first[i + 1]]
            self.S[i].addmm_(xi.T, xi)

    def block(self, i, mu, weight=1.0):
        """H_i (d, d), of sums that stand for `weight` times their tokens."""
        H = weight * ((self.W.T * self.D[i]) @ self.W - self.S[i])
        return (H + H.T) / 2 + mu * torch.eye(len(H), dtype=H.dtype, device=H.device)

    def size(self):
        """The median over blocks of their mean eigenvalue, tr H_i / d, without mu. Prototypes that never fire do not count."""
        mean = (self.D @ self.W.square().sum(1) - self.S.diagonal(dim1=1, dim2=2).sum(1)) / self.W.size(1)
        return mean[mean > 0].median().item() if (mean > 0).any() else 1.0

    def correlation(self):
        """R (M, M): G with ones on its diagonal, R_ij = G_ij / sqrt(G_ii G_jj). Positive semidefinite, as G is a Gram matrix."""
        size = self.G.diagonal().clamp(min=1e-20).rsqrt()
        return (size[:, None] * self.G * size).fill_diagonal_(1.0)


def root(H):
    """The symmetric square root of positive semidefinite H (..., d, d)."""
    values, vectors = torch.linalg.eigh(H)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def joined_product(factors, roots, R, v):
    """The model Hessian that joins the exact blocks by co-activation, times v (Q, M, d) -> (Q, M, d):
    H_ii = L_i L_i^T (mu within), H_ij = R_ij H_ii^1/2 H_jj^1/2 (without mu). factors, roots (M, d, d), R (M, M)."""
    x = v.permute(1, 2, 0)                                                                    # (M, d, Q)
    joined = ((R - torch.eye(len(R), dtype=R.dtype)) @ (roots @ x).flatten(1)).view_as(x)
    return (roots @ joined + factors @ (factors.mT @ x)).permute(2, 0, 1)


def curvature_product(W, ids, gates, pi, v):
    """The joint Hessian of N tokens times v (Q, M, d) -> (Q, M, d), without mu: A v, times W, softmax Jacobian, and back."""
    out = torch.zeros_like(v)
    for q in range(len(v)):
        x = F.embedding_bag(ids, v[q], per_sample_weights=gates, mode="sum")                  # (N, d) sum_j a_sj v_j
        l = x @ W.T                                                                           # (N, V)
        l = pi * (l - (pi * l).sum(1, keepdim=True))
        x = l @ W                                                                             # (N, d) C_s x_s
        out[q].index_add_(0, ids.flatten(), (gates[:, :, None] * x[:, None]).flatten(0, 1))
    return out


def conjugate_gradients(product, b, precondition, tol=1e-3, max_iters=100, tell=lambda i, r: None):
    """Solves product(x) = b for every b[q]; b (Q, M, d). -> x, the largest relative residual, iterations."""
    def dot(u, w):
        return (u * w).flatten(1).sum(1)[:, None, None]
    x, r = torch.zeros_like(b), b.clone()
    z = p = precondition(r)
    rz, size = dot(r, z), dot(b, b).clamp(min=1e-30)
    for i in range(1, max_iters + 1):
        Hp = product(p)
        step = rz / dot(p, Hp).clamp(min=1e-30)
        x, r = x + step * p, r - step * Hp
        worst = (dot(r, r) / size).max().sqrt().item()
        tell(i, worst)
        if worst < tol:
            break
        z = precondition(r)
        new = dot(r, z)
        p, rz = z + new / rz.clamp(min=1e-30) * p, new
    return x, worst, i


# ----------------------------------------------------------------------------- the run and its text

def seen_windows(ckpt, n_tokens):
    """First tokens, in corpus order, of the last whole epoch that training read before the checkpoint (of all that it
    read, if that is less than one): the very windows that it saw. What the weights had read of the same text when they
    came (--init_from) counts too, if that was in the same order (seed) or a whole epoch."""
    c = ckpt["train_config"]
    read = ckpt["step"] * c["total_batch_tokens"] // c["block_size"]
    per_epoch = len(window_starts(n_tokens, c["block_size"], c["seed"], 0))
    starts = window_starts(n_tokens, c["block_size"], c["seed"], max(0, read // per_epoch - 1))[:max(read, ckpt.get("before", 0) // c["block_size"])]
    if not len(starts):
        raise UserError("this checkpoint has seen no training text (step 0); train it first: python train.py --resume")
    return np.sort(starts)


def sampled(starts, seed, keep):
    """`keep` of the windows, drawn by seed, in corpus order; and all of them in the order of the draw."""
    drawn = starts[np.random.default_rng(seed).permutation(len(starts))]
    return np.sort(drawn[:keep]), drawn


class Run:
    """A run's model and the text that it was trained on: tokens, documents, tokenizer."""

    def __init__(self, out_dir, device="auto"):
        self.out_dir, self.device = Path(out_dir), pick_device(device)
        self.model, self.ckpt = load_checkpoint(out_dir, self.device)
        self.model.requires_grad_(False)
        c = self.model.config
        if not c.n_proto:
            raise UserError(f"{out_dir} holds a dense model (n_proto = 0); attribution goes through prototypes")
        if not {"train_config", "step", "data"} <= self.ckpt.keys():
            raise UserError(f"{out_dir}/ckpt.pt does not say what it was trained on; train it with train.py")
        self.tokenizer = load_tokenizer(out_dir)
        self.hash, self.T = fingerprint(self.model.state_dict()), c.block_size
        folder = dataset_folder(self.ckpt["train_config"]["dataset"])
        self.tokens, self.val, self.meta = load_dataset(folder)
        if self.ckpt["data"] != self.meta["sha256"]["train.bin"]:
            raise UserError(f"{out_dir} was trained on another version of {folder}; prepare that one again, or train anew")
        try:
            docs = json.loads((folder / "docs.json").read_text("utf-8"))
            rows = [x for x in docs if x["split"] == "train"]
            self.val_docs = [{"start": int(x["start"]), "length": int(x["length"]), "title": str(x["title"])} for x in docs if x["split"] == "val"]
            self.doc_start = np.array([x["start"] for x in rows], np.int64)
            self.titles, self.source_of = [str(x["title"]) for x in rows], [str(x["source"]) for x in rows]
            ok = len(rows) and self.doc_start[0] == 0 and (np.diff(self.doc_start) > 0).all() and self.doc_start[-1] < len(self.tokens)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
            raise UserError(f"{folder}/docs.json is missing or damaged ({type(e).__name__}: {e}); run: python data/prepare.py") from None
        if not ok:
            raise UserError(f"{folder}/docs.json does not fit train.bin; run: python data/prepare.py")
        self.sources = sorted(set(self.source_of))
        number = {s: i for i, s in enumerate(self.sources)}
        self.doc_source = np.array([number[s] for s in self.source_of])

    def windows(self, starts):
        """-> idx, targets (len(starts), T) on the device."""
        raw = torch.from_numpy(np.stack([self.tokens[s:s + self.T + 1] for s in starts]).astype(np.int64)).to(self.device)
        return raw[:, :-1], raw[:, 1:]

    def decode(self, tokens):
        return self.tokenizer.decode([int(t) for t in tokens])

    def encode(self, prompt, target=None):
        """-> token ids (list), how many of them are the prompt's. Raises UserError for what cannot be one sequence."""
        if not prompt:
            raise UserError("the prompt is empty; give at least one character: --prompt=\"The\"")
        ids = self.tokenizer.encode_ordinary(prompt)
        if target is not None:
            if not target:
                raise UserError("the target is empty; give at least one character, or leave it out")
            whole, n = self.tokenizer.encode_ordinary(prompt + target), len(ids)
            if whole[:n] != ids:
                joint = next(i for i, t in enumerate(whole) if i >= n or t != ids[i])
                piece = self.decode(whole[joint:joint + 1])
                raise UserError(f"the tokenizer joins the end of the prompt and the start of the target in one token, {piece!r}; move the "
                                "boundary: a space belongs to the word behind it, --prompt=\"The\" --target=\" cat\"")
            ids = whole
        else:
            n = len(ids)
        if len(ids) - (target is not None) > self.T:
            raise UserError(f"the text has {len(ids)} tokens, the context holds block_size = {self.T}; shorten the prompt")
        return ids, n

    def documents_of(self, positions):
        """Numbers of the documents that hold these token positions."""
        return np.searchsorted(self.doc_start, positions, side="right") - 1

    def around(self, position, before=16, after=8):
        """The text around a training token -> (before, token, after), within its document."""
        d = int(self.documents_of(position))
        lo, hi = self.doc_start[d], self.doc_start[d + 1] if d + 1 < len(self.doc_start) else len(self.tokens)
        cut = max(lo, position - before), position, position + 1, min(hi, position + 1 + after)
        return tuple(self.decode(self.tokens[a:b]) for a, b in zip(cut, cut[1:]))


# ----------------------------------------------------------------------------- index: one streaming pass

def proto_type(n_proto):
    return np.uint16 if n_proto <= 2 ** 16 else np.uint32


def layout(meta):
    """-> {file: (dtype, shape)} of an index."""
    N, P, R, M, k, d, r = (meta[x] for x in ("sites", "postings", "pairs", "n_proto", "top_k", "n_embd", "rank"))
    sums = {"pair_docs": (np.int32, (R,)), "pair_sums": (np.float32, (R, r)), "pair_start": (np.int64, (M + 1,))}
    return {"positions": (np.int64, (N,)), "ids": (proto_type(M), (N, k)), "gates": (np.float16, (N, k)), "errors": (np.float16, (N, r)),
            "post_sites": (np.uint32 if N < 2 ** 32 else np.uint64, (P,)), "post_gates": (np.float16, (P,)), "post_start": (np.int64, (M + 1,)),
            "weights": (np.float32, (M,)), "basis": (np.float32, (d, r)), "factors": (np.float32, (M, d, d)), "coactivation": (np.float32, (M, M)), **(sums if R else {})}


SITE_FILES = "positions", "ids", "gates", "errors"


class Builder:
    """Streams a run's windows into files of site records and the sums of Curvature; goes on where it was interrupted."""

    def __init__(self, run, cfg, rank=0, ranks=1):
        self.run, self.cfg, self.rank, self.ranks = run, cfg, rank, ranks
        c = run.model.config
        for name in ("max_tokens", "cap", "rank"):
            if getattr(cfg, name) < 0:
                raise UserError(f"{name} is {getattr(cfg, name)}, expected at least 0")
        if cfg.rank > c.n_embd or not 0 <= cfg.mu < math.inf:
            raise UserError(f"rank is {cfg.rank}, expected at most n_embd = {c.n_embd}; mu is {cfg.mu}, expected 0 or more")
        all_starts = seen_windows(run.ckpt, len(run.tokens))
        keep = min(len(all_starts), -(-cfg.max_tokens // run.T) or len(all_starts))
        self.starts, drawn = sampled(all_starts, cfg.seed, keep)
        self.pilot = drawn[:max(1, min(keep, 2 ** 15 // run.T))]
        self.window_weight = len(all_starts) / keep
        self.W = run.model.transformer.wte.weight
        self.rows = max(1, min(2 ** 13, 2 ** 25 // c.vocab_size) // run.T)  # windows a batch: its softmax is at most 128 MB
        self.key = dict(format=FORMAT, checkpoint=run.hash, data=run.meta["sha256"]["train.bin"], mu_asked=cfg.mu, max_tokens=cfg.max_tokens,
                        cap=cfg.cap, rank=cfg.rank or c.n_embd, seed=cfg.seed)
        self.folder = run.out_dir / "attribution.part"
        self.keep_p, self.basis = self._pilot()

    def _pilot(self):
        """From a sample: the share of postings to keep a prototype (M,), and the basis (d, r) of the error vectors that holds most
        of their energy. Fixed before the pass, so that what is drawn with them is unbiased."""
        c, n = self.run.model.config, len(self.starts) * self.run.T
        if not self.cfg.cap and not self.cfg.rank:
            return None, None
        count, moment = torch.zeros(c.n_proto), torch.zeros(c.n_embd, c.n_embd, dtype=torch.float64)
        for i in range(0, len(self.pilot), self.rows):
            ids, gates, g, _, _, _ = (u.cpu() for u in records(self.run.model, *self.run.windows(self.pilot[i:i + self.rows])))
            count += torch.bincount(ids[gates > 0], minlength=c.n_proto)
            moment += g.double().T @ g.double()
        expect = (count + 1) * n / (len(self.pilot) * self.run.T)
        basis = torch.linalg.eigh(moment).eigenvectors[:, -self.cfg.rank:].float() if self.cfg.rank else None
        return (self.cfg.cap / expect).clamp(max=1.0) if self.cfg.cap else None, basis

    def batch(self, starts, curvature):
        """One batch of windows into the sums -> what is written of it, arrays by name of file."""
        run = self.run
        ids, gates, g, pi, m, _ = records(run.model, *run.windows(starts))
        curvature.add(ids, gates, pi, m)
        positions = (starts[:, None] + 1 + np.arange(run.T)).ravel()  # of the token that is predicted
        ids, gates, g = ids.cpu(), gates.cpu(), g.cpu()
        if self.keep_p is not None:  # drawn a window, so that batches and ranks do not matter
            draw = np.concatenate([np.random.default_rng((self.cfg.seed, int(s))).random((run.T, ids.size(1)), np.float32) for s in starts])
            gates = gates * (torch.from_numpy(draw) < self.keep_p[ids])
            some = (gates > 0).any(1)
            ids, gates, g, positions = ids[some], gates[some], g[some], positions[some.numpy()]
        if self.basis is not None:
            g = g @ self.basis
        return {"positions": positions, "ids": ids.numpy().astype(proto_type(run.model.config.n_proto)), "gates": gates.half().numpy(), "errors": g.half().numpy()}

    def stream(self, show):
        """The pass of this rank: windows share by share, written at once; the state every minute, so that it can go on."""
        mine = self.starts[len(self.starts) * self.rank // self.ranks:len(self.starts) * (self.rank + 1) // self.ranks]
        curvature, done, sizes = Curvature(self.W, self.run.model.config.n_proto), 0, dict.fromkeys(SITE_FILES, 0)
        state, key = self.folder / f"state.{self.rank}.pt", self.key | {"ranks": self.ranks}
        (self.folder / "meta.json").unlink(missing_ok=True)  # of another index that was finished here: this one is not
        if state.exists():
            try:
                s = torch.load(state, weights_only=True)
                if s["key"] == key:
                    for n, u in curvature.sums.items():
                        u.copy_(s[n])
                    self.keep_p, self.basis = s["keep_p"], s["basis"]
                    done, sizes = s["done"], {n: s["sizes"][n] for n in SITE_FILES}
            except Exception:  # damaged: begin again
                for u in curvature.sums.values():
                    u.zero_()
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {n: open(self.folder / f"{n}.{self.rank}", "ab") for n in SITE_FILES}
        for n, f in files.items():
            if f.tell() < sizes[n]:
                done, sizes = 0, dict.fromkeys(SITE_FILES, 0)
                for u in curvature.sums.values():
                    u.zero_()
        for n, f in files.items():
            f.truncate(sizes[n])

        def save():
            for n, f in files.items():
                f.flush()
                os.fsync(f.fileno())
                sizes[n] = f.tell()
            with atomic(state) as f:
                torch.save(dict(key=key, done=done, sizes=sizes, keep_p=self.keep_p, basis=self.basis, **curvature.sums), f)
        bar = tqdm(total=len(mine) * self.run.T, initial=done * self.run.T, unit="token", unit_scale=True, disable=not show or not sys.stderr.isatty())
        saved = told = time.perf_counter()
        cost = 0.0
        while done < len(mine):
            part = mine[done:done + self.rows]
            for n, a in self.batch(part, curvature).items():
                files[n].write(np.ascontiguousarray(a).tobytes())
            done += len(part)
            bar.update(len(part) * self.run.T)
            now = time.perf_counter()
            if bar.disable and show and now - told > 15:
                print(f"{done * self.run.T:,} of {len(mine) * self.run.T:,} tokens", flush=True)
                told = now
            if now - saved > max(60.0, 20 * cost):
                save()
                saved, cost = time.perf_counter(), time.perf_counter() - now
        bar.close()
        save()
        for f in files.values():
            f.close()
        return curvature

    def finish(self, curvature, show):
        """Sums over ranks, files joined, posting lists, factors, meta.json; then the new index takes the old one's place."""
        c, folder, cfg = self.run.model.config, self.folder, self.cfg
        if self.ranks > 1:
            import torch.distributed as dist
            for u in curvature.sums.values():
                dist.all_reduce(u)
        mu = cfg.mu or MU_SHARE * self.window_weight * curvature.size()
        if self.rank == 0:
            for n in SITE_FILES:
                parts, whole = [folder / f"{n}.{r}" for r in range(self.ranks)], folder / f"{n}.bin"
                whole.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    if self.ranks == 1:
                        os.link(parts[0], whole)  # one file under two names: no second copy on the disk
                if not whole.exists():
                    with atomic(whole) as f:
                        for path in parts:
                            with open(path, "rb") as part:
                                shutil.copyfileobj(part, f, 2 ** 24)
            N = (folder / "positions.bin").stat().st_size // 8
            if not N:
                raise UserError(f"no token is left with cap={cfg.cap} and max_tokens={cfg.max_tokens}; raise them")
            meta = self.key | dict(sites=N, postings=0, pairs=0, n_proto=c.n_proto, top_k=c.top_k, n_embd=c.n_embd, block_size=self.run.T,
                                   windows=len(self.starts), window_weight=self.window_weight, mu=mu)
            meta["postings"] = self._postings(meta)
            meta["pairs"] = self._sums(meta)
            weights = torch.full((c.n_proto,), self.window_weight) / (1.0 if self.keep_p is None else self.keep_p)
            for n, a in (("weights", weights), ("coactivation", curvature.correlation().cpu()), ("basis", torch.eye(c.n_embd) if self.basis is None else self.basis)):
                (folder / f"{n}.bin").write_bytes(a.numpy().astype(np.float32).tobytes())
            np.memmap(folder / "factors.bin", np.float32, "w+", shape=(c.n_proto, c.n_embd, c.n_embd)).flush()
        if self.ranks > 1:
            dist.barrier()
        factors = np.memmap(folder / "factors.bin", np.float32, "r+", shape=(c.n_proto, c.n_embd, c.n_embd))
        for i in tqdm(range(self.rank, c.n_proto, self.ranks), unit="block", disable=not show or not sys.stderr.isatty()):
            factors[i] = torch.linalg.cholesky(curvature.block(i, mu, self.window_weight).cpu().double()).float().numpy()
        factors.flush()
        if self.ranks > 1:
            dist.barrier()
        if self.rank == 0:
            with atomic(folder / "meta.json", "w") as f:
                json.dump(meta, f, indent=1)
            self.swap()

    def swap(self):
        """The finished index takes the old one's place. A kill on the way leaves both on disk, and the next call goes on here."""
        final, old = self.run.out_dir / "attribution", self.run.out_dir / "attribution.old"
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        self.folder.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        for path in final.iterdir():
            if path.suffix != ".bin" and path.name != "meta.json":
                path.unlink()

    def made(self, folder):
        """Does this folder hold this very index, finished?"""
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            return all(meta[k] == v for k, v in self.key.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _postings(self, meta):
        """Counting sort of (prototype, site) in two passes over the site records, chunk by chunk -> how many there are."""
        files, M = layout(meta), meta["n_proto"]
        ids, gates = (np.memmap(self.folder / f"{n}.bin", *files[n][:1], "r", shape=files[n][1]) for n in ("ids", "gates"))
        step = 2 ** 18
        count = sum((np.bincount(ids[i:i + step][gates[i:i + step] > 0], minlength=M) for i in range(0, len(ids), step)), np.zeros(M, np.int64))
        start = np.concatenate(([0], count.cumsum())).astype(np.int64)
        out = [np.memmap(self.folder / f"{n}.bin", files[n][0], "w+", shape=(max(1, start[-1]),)) for n in ("post_sites", "post_gates")]
        at = start[:-1].copy()
        for i in range(0, len(ids), step):
            site, slot = np.nonzero(gates[i:i + step] > 0)
            protos = ids[i:i + step][site, slot]
            order = np.argsort(protos, kind="stable")
            protos, n = protos[order], np.bincount(protos, minlength=M)
            where = np.arange(len(order)) - np.repeat(n.cumsum() - n, n) + np.repeat(at, n)
            out[0][where], out[1][where] = site[order] + i, gates[i:i + step][site, slot][order]
            at += n
        for u in out:
            u.flush()
        (self.folder / "post_start.bin").write_bytes(start.tobytes())
        return int(start[-1])

    def _sums(self, meta):
        """What each document adds up to in each prototype, sum_s a_si g_s: with it a document's score takes one product a prototype.
        Kept where there are no more (prototype, document) pairs than sites -> their number, or 0."""
        def mapped(n):
            return np.memmap(self.folder / f"{n}.bin", layout(meta)[n][0], "c", shape=layout(meta)[n][1])
        sites, gates, start, errors = mapped("post_sites"), mapped("post_gates"), mapped("post_start"), torch.from_numpy(mapped("errors"))
        doc = self.run.documents_of(mapped("positions"))

        def runs(i):
            """doc (n,) of prototype i's postings, ascending; the first posting of each document."""
            d = doc[sites[start[i]:start[i + 1]]]
            return d, np.flatnonzero(np.diff(d, prepend=-1))
        counts = np.array([len(runs(i)[1]) for i in range(meta["n_proto"])])
        if counts.sum() > meta["sites"]:
            return 0
        with open(self.folder / "pair_docs.bin", "wb") as docs, open(self.folder / "pair_sums.bin", "wb") as sums:
            for i in range(meta["n_proto"]):
                d, first = runs(i)
                row = torch.from_numpy(np.repeat(np.arange(len(first)), np.diff(first, append=len(d))))
                out = torch.zeros(len(first), meta["rank"], dtype=torch.float64)
                for lo in range(0, len(d), CHUNK):
                    at = slice(start[i] + lo, min(start[i] + lo + CHUNK, start[i + 1]))
                    a = torch.from_numpy(gates[at].astype(np.float64))
                    out.index_add_(0, row[lo:lo + CHUNK], F.embedding(torch.from_numpy(sites[at].astype(np.int64)), errors).double() * a[:, None])
                docs.write(d[first].astype(np.int32).tobytes())
                sums.write(out.float().numpy().tobytes())
        (self.folder / "pair_start.bin").write_bytes(np.concatenate(([0], counts.cumsum())).astype(np.int64).tobytes())
        return int(counts.sum())

    def estimate(self):
        """Times a few batches -> seconds, bytes of memory at the peak, bytes on disk, the same while it is made."""
        c, N = self.run.model.config, len(self.starts) * self.run.T
        curvature, fires = Curvature(self.W, c.n_proto), np.zeros(c.n_proto)
        times, kept, seen = [], 0, 0
        for i in range(4):
            part, t0 = self.pilot[i * self.rows:(i + 1) * self.rows], time.perf_counter()
            if len(part):
                out = self.batch(part, curvature)
                times.append((time.perf_counter() - t0) / len(part))
                kept = len(out["positions"]) / (len(part) * self.run.T)
                fires += np.bincount(out["ids"][out["gates"] > 0], minlength=c.n_proto)
                seen += len(part) * self.run.T
        t0 = time.perf_counter()
        blocks = min(8, c.n_proto)
        for i in range(blocks):
            torch.linalg.cholesky(curvature.block(i, 1.0).cpu().double())
        per_block = (time.perf_counter() - t0) / blocks
        length = np.diff(self.run.doc_start, append=len(self.run.tokens)) * N / len(self.run.tokens)  # indexed tokens a document
        some = length[::-(-len(length) // 1000)]
        pairs = int(sum((1 - (1 - fires / seen) ** n).sum() for n in some) * len(length) / len(some))
        meta = dict(sites=int(N * kept), pairs=pairs if pairs <= N * kept else 0, postings=int(min(N * c.top_k, (self.cfg.cap or N * c.top_k) * c.n_proto)), n_proto=c.n_proto,
                    top_k=c.top_k, n_embd=c.n_embd, rank=self.key["rank"])
        sizes = {n: np.dtype(t).itemsize * math.prod(shape) for n, (t, shape) in layout(meta).items()}
        disk, state = sum(sizes.values()), 4 * sum(u.numel() for u in curvature.sums.values())
        making = disk + (self.ranks + 1) * state + (sum(sizes[n] for n in SITE_FILES) if self.ranks > 1 else 0)
        seconds = (sorted(times)[len(times) // 2] * len(self.starts) + per_block * c.n_proto) / self.ranks
        memory = torch.cuda.max_memory_allocated() if self.run.device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return seconds, memory, disk, making


@contextlib.contextmanager
def alone(path):
    """Holds a lock on `path` while the block runs; the system gives it back if the process dies. Raises UserError if it is taken."""
    try:
        import fcntl
    except ImportError:  # not a Unix: no lock
        yield
        return
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `attribute.py index` is at work on {path.parent}; wait for it, or stop it") from None
        yield


def index(argv):
    cfg = parse_config(IndexConfig, argv)
    rank, ranks, device = set_up_ranks(cfg.device)
    run = Run(cfg.out_dir, str(device))
    show = rank == 0
    builder = Builder(run, cfg, rank, ranks)
    n = len(builder.starts) * run.T
    if show:
        print(f"{n:,} training tokens in {len(builder.starts):,} windows, weight {builder.window_weight:.3g}; {run.model.config.n_proto} prototypes; "
              f"{ranks} rank{'s' * (ranks > 1)}, {device}", flush=True)
    if cfg.dry_run:
        seconds, memory, disk, making = builder.estimate()
        if show:
            print(f"will take about {seconds:.0f} s, {memory / 1e6:,.0f} MB of {'GPU ' * (device.type == 'cuda')}memory a rank, {disk / 1e6:,.0f} MB of disk "
                  f"({disk / n:.0f} bytes a token), {making / 1e6:,.0f} MB while it is made, beside an older index")
        return
    final = run.out_dir / "attribution"
    ready, finished = builder.made(final), builder.made(builder.folder)
    if ranks > 1:
        torch.distributed.barrier()  # every rank has looked before one of them moves anything
    if ready:
        if show:
            print(f"{final} is this index already")
        return
    t0 = time.perf_counter()
    try:
        with alone(run.out_dir / "attribution.lock") if show else contextlib.nullcontext():
            if not finished:
                builder.finish(builder.stream(show), show)
            elif show:
                builder.swap()
    except OSError as e:
        raise UserError(f"{builder.folder} could not be written ({e}); an earlier index is untouched. Free some space, then run the same "
                        "command again: it goes on where it stopped; --dry_run says what it needs") from None
    if show:
        size = sum(p.stat().st_size for p in final.iterdir())
        held = np.unique(run.documents_of(np.fromfile(final / "positions.bin", np.int64)))
        if len(held) < len(run.titles):
            print(f"{len(run.titles) - len(held)} of {len(run.titles)} documents have no indexed token; their scores are 0")
        mu = json.loads((final / "meta.json").read_text("utf-8"))["mu"]
        print(f"damping mu {mu:.3g}" + (f", {MU_SHARE:g} of the median block's mean eigenvalue" if not cfg.mu else ""))
        print(f"{final}: {size / 1e6:,.0f} MB in {time.perf_counter() - t0:.0f} s. Next: python attribute.py query --out_dir={cfg.out_dir} --prompt=\"...\"")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------- query

@dataclass
class Targets:
    """The tokens that are explained: Q of them."""
    tokens: list          # their ids
    ids: torch.Tensor     # (Q, k) prototypes
    gates: torch.Tensor   # (Q, k)
    errors: torch.Tensor  # (Q, d) g_t
    loss: torch.Tensor    # (Q,) nats


@dataclass
class Answer:
    """What one query found. Scores are nats of the target's loss: what removing the training text would add to it, to first order."""
    prompt: str
    target: str            # the text whose loss is explained
    loss: float            # nats, the sum over its tokens
    level: str             # token, document or source
    hessian: str           # block, joined, full or none (then scores are gradient products, not nats)
    scores: np.ndarray     # (units,) float64: of every indexed token (Index.positions), document (Index.run.titles) or source (.run.sources)
    proponents: list       # the largest scores: dicts of score, document, source, offset (tokens into it), text, prototypes
    opponents: list        # the smallest ones
    tokens: list = field(default_factory=list)  # the same for each token of the target: dicts of target, loss, proponents, opponents
    solved: tuple | None = None                 # joined and full: the conjugate gradients' largest relative residual, and iterations

    def as_dict(self):
        return {n: getattr(self, n) for n in ("prompt", "target", "loss", "level", "hessian", "proponents", "opponents", "tokens", "solved")}

    def __str__(self):
        unit = "nats" if self.hessian != "none" else "gradient product"
        lines = [f"{self.prompt!r} -> {self.target!r}: loss {self.loss:.3f} nats; {self.level}s by {unit} ({self.hessian}), "
                 + ("in their text" if self.level == "token" else "each with its strongest token")]
        for name, sign in (("proponents", "+"), ("opponents", "-")):
            lines += [f"{name}:"] + [f"  {e['score']:+10.5f}  {entry_line(e)}" for e in getattr(self, name)] or [f"  none with {sign}"]
        return "\n".join(lines)

    def _repr_html_(self):
        """For notebooks; training text is escaped."""
        def rows(entries):
            return "".join(f"<tr><td style='text-align:right'>{e['score']:+.5f}</td><td>{html.escape(e['document'])}</td><td style='text-align:left; white-space:pre-wrap'>"
                           f"{html.escape(e['text'])}</td><td>{', '.join(f'{i} ({s:.0%})' for i, s in e['prototypes'])}</td></tr>" for e in entries)
        head = f"<tr><th>{'nats' if self.hessian != 'none' else 'gradient product'}</th><th>document</th><th>text</th><th>prototypes</th></tr>"
        return (f"<p><code>{html.escape(self.prompt)}</code> &rarr; <code>{html.escape(self.target)}</code>, loss {self.loss:.3f} nats</p>"
                f"<table>{head}{rows(self.proponents)}{rows(self.opponents)}</table>")


def entry_line(e):
    return f"{plain(e['source'])}, {plain(e['document'])}, token {e['offset']}: '{plain(e['text'])}' via {', '.join(f'{i} ({s:.0%})' for i, s in e['prototypes'][:3])}"


def again(out_dir):
    return f"run: python attribute.py index --out_dir={out_dir}"


class Index:
    """An index on disk, memory-mapped. positions (N,): the training token that each indexed site predicts.

    Raises UserError where there is none, where it is damaged, or where it was made for other weights or data.
    """

    def __init__(self, out_dir="out", device="auto"):
        self.run = run = Run(out_dir, device)
        self.folder = folder = run.out_dir / "attribution"
        try:
            self.meta = meta = json.loads((folder / "meta.json").read_text("utf-8"))
            c = run.model.config
            stale = [n for n, v in (("format", FORMAT), ("checkpoint", run.hash), ("data", run.meta["sha256"]["train.bin"])) if meta[n] != v]
            if stale:
                raise UserError(f"{folder} was made for another {' and '.join(stale)}; {again(out_dir)}")
            if any(type(meta[n]) is not int or meta[n] < (n != "pairs") for n in ("sites", "postings", "pairs", "rank", "windows")) or meta["window_weight"] < 1 or not meta["mu"] > 0 \
                    or [meta[n] for n in ("n_proto", "top_k", "n_embd")] != [c.n_proto, c.top_k, c.n_embd]:
                raise ValueError("its numbers do not fit the model")
            files = layout(meta)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"no index in {folder}; {again(out_dir)}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder}/meta.json is damaged ({type(e).__name__}: {e}); {again(out_dir)}") from None
        for name, (dtype, shape) in files.items():
            path, want = folder / f"{name}.bin", np.dtype(dtype).itemsize * math.prod(shape)
            size = path.stat().st_size if path.exists() else -1
            if size != want:
                raise UserError(f"{path} is {'missing' if size < 0 else f'{size} bytes'}, expected {want}; remove {folder}, then {again(out_dir)}")
            setattr(self, name, np.asarray(np.memmap(path, dtype, "c", shape=shape)))  # "c": torch wants it writable; a plain array slices faster
        self.weights, self.post_start, self.basis = np.array(self.weights), np.array(self.post_start), torch.from_numpy(np.array(self.basis))
        for name, starts, n in (("post_start", self.post_start, meta["postings"]), ("pair_start", self.pair_start if meta["pairs"] else np.zeros(1, int), meta["pairs"])):
            if starts[0] != 0 or starts[-1] != n or (np.diff(starts) < 0).any():
                raise UserError(f"{folder}/{name}.bin is damaged; remove {folder}, then {again(out_dir)}")
        if self.positions[0] < 1 or self.positions[-1] >= len(run.tokens):
            raise UserError(f"{folder}/positions.bin is damaged; remove {folder}, then {again(out_dir)}")
        self.errors_t = torch.from_numpy(self.errors)
        self.W = run.model.transformer.wte.weight
        self.site_doc = run.documents_of(self.positions).astype(np.int32)  # sites are in corpus order: documents are contiguous
        self.units = {"token": meta["sites"], "document": len(run.titles), "source": len(run.sources)}

    def damaged(self):
        return UserError(f"{self.folder} is damaged; remove it, then {again(self.run.out_dir)}")

    # -- targets and their vectors

    def targets(self, ids, n_prompt):
        """The tokens ids[n_prompt:], each predicted from all before it -> Targets."""
        idx = torch.tensor([ids], device=self.run.device)
        i, a, g, _, _, loss = (u[n_prompt - 1:].cpu() for u in records(self.run.model, idx[:, :-1], idx[:, 1:]))
        return Targets(ids[n_prompt:], i, a, g, loss)

    def solve(self, t, hessian="block"):
        """u_j = weight_j a_tj H_j^-1 g_t for each prototype of each target -> (Q, k, r), in the stored basis."""
        u = t.gates[:, :, None] * t.errors[:, None]                                            # (Q, k, d)
        if hessian == "block":
            for i in t.ids[t.gates > 0].unique().tolist():
                here = (t.ids == i) & (t.gates > 0)
                u[here] = torch.cholesky_solve(u[here].T, torch.from_numpy(self.factors[i])).T
        return (u * torch.from_numpy(self.weights)[t.ids][:, :, None]) @ self.basis

    def solve_full(self, t, tol=1e-3, tell=lambda i, r: None):
        """H^-1 b over all prototypes, b_i = a_ti g_t: conjugate gradients with the blocks as preconditioner; one pass over the
        indexed windows an iteration -> x (Q, M, r) in the stored basis, relative residual, iterations."""
        run, device, b = self.run, self.run.device, self.right_side(t)
        starts, _ = sampled(seen_windows(run.ckpt, len(run.tokens)), self.meta["seed"], self.meta["windows"])
        rows = max(1, min(2 ** 12, 2 ** 24 // len(self.W)) // run.T)

        def product(v):
            v, out = v.to(device), torch.zeros_like(v, device=device)
            for i in range(0, len(starts), rows):
                ids, gates, _, pi, _, _ = records(run.model, *run.windows(starts[i:i + rows]))
                out += curvature_product(self.W, ids, gates, pi, v)
            return (out * self.meta["window_weight"] + self.meta["mu"] * v).cpu()

        x, residual, iterations = conjugate_gradients(product, b, self.precondition, tol, tell=tell)
        return self.stored(x), residual, iterations

    def solve_joined(self, t):
        """As solve_full with the blocks joined by co-activation: no pass over the corpus, seconds. The blocks' roots are made at the
        first call and kept in roots.bin. -> x (Q, M, r), relative residual, iterations."""
        path, L = self.folder / "roots.bin", torch.from_numpy(self.factors)
        if not path.exists() or path.stat().st_size != self.factors.nbytes:
            eye = torch.eye(L.size(1))
            with atomic(path) as f:
                for i in range(0, len(L), 64):
                    f.write(root(L[i:i + 64] @ L[i:i + 64].mT - self.meta["mu"] * eye).numpy().tobytes())
        roots, R = torch.from_numpy(np.memmap(path, np.float32, "c", shape=self.factors.shape)), torch.from_numpy(np.array(self.coactivation))
        b = self.right_side(t)
        x, residual, iterations = conjugate_gradients(lambda v: joined_product(L, roots, R, v), b, self.precondition, 0.01, 100)
        return self.stored(x), residual, iterations

    def stored(self, x):
        """A solution x (Q, M, d) as the records want it: weighted, in their basis (Q, M, r)."""
        return (x * torch.from_numpy(self.weights)[:, None]) @ self.basis

    def right_side(self, t):
        """b (Q, M, d), b_i = a_ti g_t."""
        b = torch.zeros(len(t.ids), self.meta["n_proto"], self.meta["n_embd"])
        return b.scatter_(1, t.ids[:, :, None].expand(-1, -1, b.size(2)), t.gates[:, :, None] * t.errors[:, None])

    def precondition(self, r):
        """The exact blocks, inverted: r (Q, M, d) -> (Q, M, d)."""
        return torch.cholesky_solve(r.permute(1, 2, 0), torch.from_numpy(self.factors)).permute(2, 0, 1)

    # -- reading

    def add(self, out, level, sites, scores):
        """Adds the scores (n, c) of sites (n,), in ascending order, to c rows of units."""
        if level == "token":
            for row, column in zip(out, scores.T):
                row[sites] += column
            return
        doc = self.site_doc[sites]
        first = np.concatenate(([0], np.flatnonzero(np.diff(doc)) + 1))
        sums, doc = np.add.reduceat(scores.astype(np.float64), first, axis=0).T, doc[first]    # (c, documents here)
        for row, values in zip(out, sums):
            if level == "document":
                row[doc] += values
            else:
                row += np.bincount(self.run.doc_source[doc], values, len(row))

    def scan(self, t, u, level):
        """Reads the posting list of each prototype that a target uses once, for all targets: one matrix product a chunk. For
        documents and sources it reads their sums instead, if the index has them. u (Q, k, r) of solve() -> (Q, units) float64."""
        ids, used = t.ids.numpy(), (t.gates > 0).numpy()
        lists = ((i, *np.nonzero((ids == i) & used)) for i in np.unique(ids[used]))
        if level != "token" and self.meta["pairs"]:
            return self.scan_sums(((i, q, u[q, j]) for i, q, j in lists), len(ids), level)
        out = np.zeros((len(ids), self.units[level]))
        for i, q, j in lists:
            v, mine = u[q, j].T.contiguous(), [out[row] for row in q]
            for lo in range(self.post_start[i], self.post_start[i + 1], CHUNK):
                hi = min(lo + CHUNK, self.post_start[i + 1])
                sites = self.post_sites[lo:hi].astype(np.int64)
                e = F.embedding(torch.from_numpy(sites), self.errors_t).float()                # (n, r) g_s
                self.add(mine, level, sites, (e @ v).numpy() * self.post_gates[lo:hi, None].astype(np.float32))
        return out

    def scan_sums(self, lists, n, level):
        """lists: a prototype i, targets q, and their vectors (len(q), r); n targets in all -> (n, units) float64."""
        out, sums = np.zeros((n, self.units["document"])), torch.from_numpy(self.pair_sums)
        for i, q, v in lists:
            at = slice(self.pair_start[i], self.pair_start[i + 1])
            scores, docs = (sums[at] @ v.T).numpy(), self.pair_docs[at]
            for row, column in zip(q, scores.T):
                out[row, docs] += column
        return out if level == "document" else np.stack([np.bincount(self.run.doc_source, row, self.units["source"]) for row in out])

    def scan_all(self, x, level):
        """Every site against x (Q, M, r): sum_j a_sj x_j . g_s -> (Q, units) float64. Documents and sources as in scan()."""
        if level != "token" and self.meta["pairs"]:
            return self.scan_sums(((i, range(len(x)), x[:, i]) for i in range(x.size(1))), len(x), level)
        out = np.zeros((len(x), self.units[level]))
        for lo in range(0, self.meta["sites"], CHUNK):
            ids, gates = (torch.from_numpy(a[lo:lo + CHUNK].astype(b)) for a, b in ((self.ids, np.int64), (self.gates, np.float32)))
            e = self.errors_t[lo:lo + CHUNK].float()
            s = torch.stack([(F.embedding_bag(ids, xq, per_sample_weights=gates, mode="sum") * e).sum(1) for xq in x], 1)
            self.add(out, level, np.arange(lo, lo + len(ids)), s.numpy())
        return out

    def carriers(self, x, sites):
        """For sites (n,) and one target's x (M, r): the score of each site (n,) and of each prototype (M,), float64."""
        of_site, of_proto, live = np.zeros(len(sites)), np.zeros(len(x)), x.any(1).numpy()
        for lo in range(0, len(sites), CHUNK):
            at = sites[lo:lo + CHUNK]
            ids, e = self.ids[at], torch.from_numpy(self.errors[at].astype(np.float32))
            n, j = np.nonzero(live[ids])
            protos = ids[n, j].astype(np.int64)
            s = (e[n] * x[protos]).sum(1).double().numpy() * self.gates[at][n, j]
            of_site[lo:lo + CHUNK] = np.bincount(n, s, len(at))
            of_proto += np.bincount(protos, s, len(x))
        return of_site, of_proto

    # -- answers

    def entry(self, level, unit, score, x):
        """One line of an answer: where the unit is, its strongest token, and the prototypes that carry it, as shares of its score
        (of units with more than 2^15 tokens, by an even sample of them)."""
        run = self.run
        sites = np.array([unit]) if level == "token" else np.arange(*np.searchsorted(self.site_doc, [unit, unit + 1])) if level == "document" \
            else np.flatnonzero(run.doc_source[self.site_doc] == unit)
        sites = sites[::-(-len(sites) // 2 ** 15)]
        of_site, of_proto = self.carriers(x, sites)
        if not np.isfinite(of_site).all():
            raise self.damaged()
        best = sites[(of_site * np.sign(score)).argmax()]
        position, doc = int(self.positions[best]), int(self.site_doc[best])
        shares = of_proto / (of_site.sum() or 1.0)
        before, token, after = run.around(position)
        return {"score": float(score), "document": run.titles[doc], "source": run.source_of[doc], "offset": position - int(run.doc_start[doc]),
                "text": f"{before}«{token}»{after}", "parts": [before, token, after],
                "prototypes": [[int(i), float(shares[i])] for i in np.argsort(-np.abs(shares))[:4] if shares[i]]}

    def entries(self, level, scores, x, top):
        """The `top` largest positive and smallest negative of scores (units,) -> {"proponents": [...], "opponents": [...]}"""
        found, n = {}, min(top, len(scores))
        for name, sign in (("proponents", 1), ("opponents", -1)):
            best = np.argpartition(-sign * scores, n - 1)[:n]
            best = best[np.argsort(-sign * scores[best], kind="stable")]
            found[name] = [self.entry(level, int(i), scores[i], x) for i in best if sign * scores[i] > 0]
        return found

    def query(self, prompt, target=None, level="document", hessian="block", top=10, max_new_tokens=4, tell=lambda *a: None):
        """Which training text raised or lowered the probability of `target` after `prompt`, by how many nats -> Answer.

        prompt, target: str, or lists of as many (then a list of Answers; the postings are read once for all). Without a
        target the model's own greedy continuation of max_new_tokens is explained. level: token, document or source.
        hessian: block (exact diagonal blocks; reads only the target's own posting lists), joined (blocks joined by
        co-activation: nearer to full; reads every site), full (the joint Hessian, by conjugate gradients to a relative residual
        of 1e-3; passes over the corpus) or none (gradient products). Raises UserError for text that cannot be read as prompt and target.
        """
        for name, value, allowed in (("level", level, list(self.units)), ("hessian", hessian, ["block", "joined", "full", "none"])):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}, expected {', '.join(allowed)}")
        if top < 1 or max_new_tokens < 1:
            raise UserError(f"top is {top}, max_new_tokens {max_new_tokens}; expected at least 1")
        if isinstance(prompt, str) != isinstance(target or prompt, str) or (target and len(target) != len(prompt) and not isinstance(prompt, str)):
            raise UserError("prompt and target: expected two strings, or two lists of as many")
        if isinstance(prompt, str):
            return self.query([prompt], [target], level, hessian, top, max_new_tokens, tell)[0]
        every, run = [], self.run
        for p, y in zip(prompt, target or [None] * len(prompt), strict=True):
            ids, n = run.encode(p, y)
            if y is None:
                ids = run.model.generate(torch.tensor([ids], device=run.device), min(max_new_tokens, run.T + 1 - n), 0,
                                         stop=run.tokenizer.eot_token, n_vocab=run.tokenizer.n_vocab)[0].tolist()
            every.append((p, self.targets(ids, n)))
        return self.answers(every, level, hessian, top, tell)

    def answers(self, every, level="document", hessian="block", top=10, tell=lambda *a: None):
        """every: a (prompt, Targets) a query -> a list of Answers."""
        widest = max(len(own.tokens) for _, own in every)  # about 1 GB at a time of scores and dense solutions
        size = max(1, 2 ** 30 // (widest * (8 * self.units[level] + 4 * self.meta["n_proto"] * self.meta["rank"])))
        if len(every) > size:
            return [a for i in range(0, len(every), size) for a in self.answers(every[i:i + size], level, hessian, top, tell)]
        t = Targets(sum((own.tokens for _, own in every), []), *(torch.cat([getattr(own, n) for _, own in every])
                                                                  for n in ("ids", "gates", "errors", "loss")))
        M, self.solved = self.meta["n_proto"], None
        if hessian in ("full", "joined"):
            x, *self.solved = self.solve_full(t, tell=tell) if hessian == "full" else self.solve_joined(t)
            scores = self.scan_all(x, level)
        else:
            u = self.solve(t, hessian)
            try:
                scores = self.scan(t, u, level)
            except (IndexError, RuntimeError):
                raise self.damaged() from None
            x = [torch.zeros(M, u.size(2)).index_put_((i,), v) for i, v in zip(t.ids, u)]
        if not np.isfinite(scores).all():
            raise self.damaged()
        found, q = [], 0
        for prompt, own in every:
            mine, q = slice(q, q + len(own.tokens)), q + len(own.tokens)
            tokens = [{"target": self.run.decode([y]), "loss": own.loss[i].item(), **self.entries(level, scores[mine][i], x[mine][i], top)}
                      for i, y in enumerate(own.tokens)]
            total = scores[mine].sum(0)
            both = tokens[0] if len(tokens) == 1 else self.entries(level, total, sum(x[mine]), top)
            found.append(Answer(prompt, self.run.decode(own.tokens), own.loss.sum().item(), level, hessian, total, both["proponents"],
                                both["opponents"], tokens, self.solved))
        return found


def query(argv):
    cfg = parse_config(QueryConfig, argv)
    prompts, targets = [cfg.prompt], [cfg.target or None]
    if cfg.queries:
        prompts, targets = [], []
        try:
            lines = Path(cfg.queries).read_text("utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise UserError(f"{cfg.queries} cannot be read ({e}); expected a text file, one {{\"prompt\": ..., \"target\": ...}} a line") from None
        if not lines:
            raise UserError(f"{cfg.queries} is empty; expected one {{\"prompt\": ..., \"target\": ...}} a line")
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                prompts.append(row["prompt"])
                targets.append(row.get("target"))
                if not isinstance(row["prompt"], str) or not isinstance(targets[-1], (str, type(None))):
                    raise TypeError("prompt and target are strings")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{cfg.queries}, line {n} is no query ({type(e).__name__}: {e}); expected {{\"prompt\": ..., \"target\": ...}}") from None
    index = Index(cfg.out_dir, cfg.device)
    tell = (lambda i, r: print(f"iteration {i}: relative residual {r:.1e}", file=sys.stderr, flush=True)) if cfg.hessian == "full" else lambda *a: None
    answers = index.query(prompts, targets, cfg.level, cfg.hessian, cfg.top, cfg.max_new_tokens, tell)
    if cfg.json:
        out = [a.as_dict() for a in answers]
        print(json.dumps(out if cfg.queries else out[0], allow_nan=False))
        return
    for a in answers:
        print(a)
    if index.solved:
        print("conjugate gradients: relative residual {:.1e} after {} iterations".format(*index.solved))


def explain(argv):
    cfg = parse_config(ExplainConfig, argv)
    run = Run(cfg.out_dir, cfg.device)
    ids, _ = run.encode(cfg.prompt)
    idx = torch.tensor([ids], device=run.device)
    gains = load_gains(cfg.gains, run.model) if cfg.gains else None
    following = torch.tensor([[*ids[1:], int(run.model(idx, gains=gains)[0][..., :run.tokenizer.n_vocab].argmax())]], device=run.device)
    e = run.model.explain(idx, following, gains)
    parts = e.contributions.double().sum(-1) + e.residual.double()
    print(f"{'token':>16} {'logit':>9} = {'residual':>9} + {'slices':>9}   largest slices, prototype: share (gate)")
    for t, y in enumerate(following[0].tolist()):
        c, order = e.contributions[0, t], e.contributions[0, t].abs().argsort(descending=True)[:cfg.top].tolist()
        print(f"{run.decode([y])!r:>16} {e.logit[0, t]:9.4f} = {e.residual[0, t]:9.4f} + {c.sum():9.4f}   "
              + ", ".join(f"{e.prototypes[0, t, j]}: {c[j]:+.3f} ({e.gates[0, t, j]:.2f})" for j in order))
    print(f"the last token is the model's choice; largest |residual + slices - logit|: {(parts - e.logit).abs().max():.1e} of "
          f"logits up to {e.logit.abs().max():.1f}")


# ----------------------------------------------------------------------------- prototype cards

WORD = re.compile(r"[^\W\d_]{2,}")


class Cards:
    """What each prototype stands for, read from an index. cards() -> dicts of the form that report.html shows."""

    def __init__(self, index, before=6):
        self.index, self.before = index, before
        P, W = index.run.model.prototypes.cpu(), index.W.cpu()
        logits = P @ (W - W.mean(0)).T                                                         # (M, V) against the mean logit
        count = np.zeros(len(W), np.int64)
        for i in range(0, len(index.run.tokens), 2 ** 24):
            count += np.bincount(index.run.tokens[i:i + 2 ** 24], minlength=len(W))
        common = np.flatnonzero(count >= min(5, count.max()))  # the model knows nothing of tokens that it has hardly met
        self.known, n = torch.from_numpy(common), min(8, len(common))
        self.raised, self.lowered = (logits[:, self.known].topk(n, largest=up) for up in (True, False))
        unit = F.normalize(P, dim=1)
        self.near = (unit @ unit.T).fill_diagonal_(-1).topk(min(5, len(P) - 1)) if len(P) > 1 else None
        self.general = self.words(np.linspace(0, len(index.positions) - 1, min(len(index.positions), 20000)).astype(int))

    def words(self, sites):
        """How often each word occurs in what precedes and includes the tokens that these sites predict."""
        run, count = self.index.run, Counter()
        for p in self.index.positions[sites]:
            count.update(w.lower() for w in WORD.findall(run.decode(run.tokens[max(0, p - self.before):p + 1])))
        return count

    def label(self, count):
        """The three words with the largest z of the log-odds between a prototype's contexts and contexts at large, with the
        latter as Dirichlet prior (Monroe, Colaresi, Quinn 2008, eqs. 15 to 22) -> "word word word", the smallest z among them."""
        prior, n = self.general, sum(count.values())
        a0 = sum(prior.values()) + len(count)
        scored = []
        for w, y in count.items():
            a = 50.0 * (prior[w] + 1) / a0  # a prior worth 50 words
            b, nb = prior[w] + a, a0 + 50.0
            delta = math.log((y + a) / (n + 50.0 - y - a)) - math.log(b / (nb - b))
            scored.append((delta / math.sqrt(1 / (y + a) + 1 / b), w))
        best = [(z, w) for z, w in sorted(scored, reverse=True)[:3] if z > 1.96]
        return " ".join(w for _, w in best), min((z for z, _ in best), default=0.0)

    def card(self, i):
        index, run = self.index, self.index.run
        lo, hi = index.post_start[i], index.post_start[i + 1]
        gates, sites = index.post_gates[lo:hi].astype(np.float32), index.post_sites[lo:hi].astype(np.int64)
        order = np.argsort(-gates, kind="stable")

        def tokens(top):
            return [[run.decode([t]), round(v, 3)] for v, t in zip(top.values[i].tolist(), self.known[top.indices[i]].tolist())]
        contexts = []
        for rank in dict.fromkeys([*range(min(4, len(order))), *(int(q * (len(order) - 1)) for q in (0.25, 0.5, 0.75) if len(order))]):
            site = sites[order[rank]]
            doc = index.site_doc[site]
            contexts.append({"gate": round(float(gates[order[rank]]), 3), "quantile": round(1 - rank / max(1, len(order) - 1), 3),
                             "document": run.titles[doc], "source": run.source_of[doc], "text": list(run.around(int(index.positions[site])))})
        label, z = self.label(self.words(sites[order[:100]]))
        of_source = np.bincount(run.doc_source[index.site_doc[sites]], minlength=len(run.sources)) / max(1, len(sites))
        return {"id": int(i), "label": label, "z": round(z, 1), "density": len(sites) / max(1, index.meta["sites"]), "gate": float(gates.mean()) if len(gates) else 0.0,
                "raised": tokens(self.raised), "lowered": tokens(self.lowered), "contexts": contexts,
                "sources": [[run.sources[j], round(float(of_source[j]), 3)] for j in np.argsort(-of_source)[:5] if of_source[j]],
                "near": [[int(j), round(v, 3)] for v, j in zip(self.near.values[i].tolist(), self.near.indices[i].tolist())] if self.near else []}


def cards(argv):
    cfg = parse_config(CardsConfig, argv)
    keys = {"density": lambda c: -c["density"], "gate": lambda c: -c["gate"], "id": lambda c: c["id"], "label": lambda c: (not c["label"], c["label"])}
    if cfg.sort not in keys:
        raise UserError(f"sort={cfg.sort}, expected {', '.join(keys)}")
    index = Index(cfg.out_dir, cfg.device)
    M = index.meta["n_proto"]
    try:
        ids = [int(x) for x in cfg.proto.split(",")] if cfg.proto else range(M)
        pattern = re.compile(cfg.search)
        if not all(0 <= i < M for i in ids):
            raise ValueError
    except ValueError:
        raise UserError(f"proto={cfg.proto}, expected numbers from 0 to {M - 1} with commas between") from None
    except (re.error, OverflowError) as e:
        raise UserError(f"search={cfg.search} is no regular expression ({e})") from None
    made = Cards(index)

    def text(c):
        return "\n".join([c["label"], *(t for t, _ in c["raised"]), *("".join(x["text"]) for x in c["contexts"])])
    found = sorted((c for c in map(made.card, tqdm(ids, disable=not sys.stderr.isatty())) if pattern.search(text(c))), key=keys[cfg.sort])
    for c in found[:cfg.top or None]:
        print(f"prototype {c['id']}: {c['label'] or '(no word stands out)'} (log-odds z >= {c['z']}); fires at {c['density']:.2%} of tokens, mean gate {c['gate']:.2f}")
        print("  raises " + " ".join(repr(t) for t, _ in c["raised"]) + "; lowers " + " ".join(repr(t) for t, _ in c["lowered"][:4]))
        print("  " + ", ".join(f"{plain(n)} {v:.0%}" for n, v in c["sources"]) + "; near " + ", ".join(f"{i} ({v:.2f})" for i, v in c["near"]))
        for x in c["contexts"] or [None]:
            print("  no training token makes it fire" if x is None else
                  f"    {x['gate']:.2f}  {plain('{}«{}»{}'.format(*x['text']))}  [{plain(x['document'])}]")
    print(f"{len(found)} of {len(ids)} prototypes" + (f" match {cfg.search!r}" if cfg.search else ""))


# ----------------------------------------------------------------------------- the page

def render(data):
    """The report's data -> the text of the page. Training text is data in it: nothing in it can end the script or be markup."""
    body = json.dumps(data, allow_nan=False)
    for c in "<>&\u2028\u2029":
        body = body.replace(c, f"\\u{ord(c):04x}")
    return (Path(__file__).resolve().parent / "assets" / "report.html").read_text("utf-8").replace("__REPORT_DATA__", body)


def explorer_text(index, name, ids):
    """One text of the explorer: each token's ledger, and the training text that its probability rests on."""
    run = index.run
    idx = torch.tensor([ids], device=run.device)
    t, e = index.targets(ids, 1), run.model.explain(idx[:, :-1], idx[:, 1:])
    one = [("", Targets([y], *(u[i:i + 1] for u in (t.ids, t.gates, t.errors, t.loss)))) for i, y in enumerate(t.tokens)]
    levels = {level: index.answers(one, level, top=5) for level in ("token", "document", "source")}

    def brief(entries):
        return [{**{n: x[n] for n in ("score", "document", "source", "offset", "prototypes")}, "text": x["parts"]} for x in entries]
    tokens = [{"text": run.decode(ids[:1])}]
    for i, y in enumerate(t.tokens):
        slices = zip(e.prototypes[0, i].tolist(), e.gates[0, i].tolist(), e.contributions[0, i].tolist())
        tokens.append({"text": run.decode([y]), "logit": e.logit[0, i].item(), "residual": e.residual[0, i].item(), "loss": t.loss[i].item(),
                       "slices": [list(x) for x in slices if x[1] > 0],
                       "influence": {level: {s: brief(getattr(a[i], s)) for s in ("proponents", "opponents")} for level, a in levels.items()}})
    return {"name": name, "tokens": tokens}


def interventions(run):
    """What suppress.py sweep wrote for this checkpoint, as the page shows it."""
    found = []
    for path in sorted((run.out_dir / "gains").glob("*.sweep")):
        try:
            x = json.loads(path.read_text("utf-8"))
            if x["checkpoint"] == run.hash:
                rows = [[str(v) for v in r.values()] for r in x["rows"]]
                found.append({"name": str(x["name"]), "behavior": f"{x['behavior']}: {x['summary']}", "before": [str(t) for t in x["before"]], "after": [str(t) for t in x["after"]],
                              "table": {"columns": [str(n) for n in x["rows"][0]], "rows": rows}, "plot": str(x["plot"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
            raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); remove it, or run: python suppress.py sweep again") from None
    return found or None


def report_data(index, prompt="", max_new_tokens=12):
    """Everything that report.html shows of a run, as plain values."""
    run, out_dir = index.run, index.run.out_dir
    c, train = run.model.config, run.ckpt["train_config"]

    def evaluated(folder):
        """Rows of metrics.csv that hold a validation loss; what is not finite is None, as JSON has it."""
        rows = [{n: x if x is not None and math.isfinite(x) else None for n, x in r.items()} for r in read_metrics(folder / "metrics.csv")]
        return [r for r in rows if r.get("val_ce") is not None]
    rows = evaluated(out_dir)
    facts = [["dataset", run.meta["name"]], ["parameters", f"{sum(p.numel() for p in run.model.parameters()):,}"],
             ["shape", f"{c.n_layer} layers, width {c.n_embd}, context {c.block_size}"], ["prototypes", f"{c.n_proto:,}, at most {c.top_k} a token"],
             ["steps", f"{run.ckpt['step']:,} of {train['total_batch_tokens']:,} tokens"], ["seed", str(train["seed"])],
             ["checkpoint", run.hash[:12]], ["tokens indexed", f"{index.meta['sites']:,}"], ["damping mu", f"{index.meta['mu']:g}"]]
    if rows:
        best = min(rows, key=lambda r: r["val_ce"])
        facts += [[n, f"{best[k]:.4f}"] for n, k in (("validation cross-entropy, nats a token", "val_ce"),
                  ("the same without the residual", "val_ce_prototypes"), ("residual's share of energy", "residual_share")) if best.get(k) is not None]
    twin = evaluated(out_dir.with_name(out_dir.name + "-dense"))
    facts.append(["the dense twin's validation cross-entropy", f"{min(r['val_ce'] for r in twin):.4f}" if twin else
                  f"not trained: python train.py --n_proto=0 --out_dir={out_dir.name}-dense"])
    made = Cards(index)
    P = run.model.prototypes.cpu()
    near = sorted({(min(i, j), max(i, j)): v for i in range(len(P)) for v, j in zip(made.near.values[i].tolist(), made.near.indices[i].tolist())}.items(),
                  key=lambda x: -x[1])[:10] if made.near else []
    density = np.diff(index.post_start) / max(1, index.meta["sites"])
    texts = []
    if prompt:
        ids, n = run.encode(prompt)
        room = min(max_new_tokens, run.T + 1 - n)
        texts.append(explorer_text(index, "your prompt, continued", run.model.generate(torch.tensor([ids], device=run.device), room, 0,
                                                                                       n_vocab=run.tokenizer.n_vocab)[0].tolist()))
    if any(x["length"] > 1 for x in run.val_docs):
        d = max(run.val_docs, key=lambda x: min(x["length"], 200))
        texts.append(explorer_text(index, f"held out: {d['title']}", [int(x) for x in run.val[d["start"]:d["start"] + min(d["length"], run.T + 1, 64)]]))
    png = out_dir / "loss.png"
    busiest = np.argsort(-density, kind="stable")[:2048]
    return {"title": f"PRISM: {out_dir.name} on {run.meta['name']}", "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "run": facts,
            "loss_png": "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode() if png.exists() else None,
            "loss_alt": "training and validation loss by tokens; the head's terms beside them", "terms": {"columns": [*rows[0]] if rows else [], "rows": [[*r.values()] for r in rows[-60:]]},
            "health": {"density": density.tolist(), "spectrum": torch.linalg.svdvals(P).tolist(), "pairs": [[i, j, v] for (i, j), v in near]},
            "texts": texts, "cards": [made.card(i) for i in tqdm(sorted(busiest.tolist()), unit="card", disable=not sys.stderr.isatty())], "gains": interventions(run),
            "reproduce": [f"python data/prepare.py  # {run.meta.get('command', '')}", f"python train.py --dataset={train['dataset']} --out_dir={out_dir.name} --seed={train['seed']}",
                          f"python attribute.py index --out_dir={out_dir.name} --mu={index.meta['mu']:g}", f"python attribute.py report --out_dir={out_dir.name}"]}


def report(argv):
    cfg = parse_config(ReportConfig, argv)
    if cfg.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {cfg.max_new_tokens}, expected at least 1")
    index = Index(cfg.out_dir, cfg.device)
    page = render(report_data(index, cfg.prompt, cfg.max_new_tokens))
    path = index.run.out_dir / "report.html"
    with atomic(path, "w", encoding="utf-8") as f:
        f.write(page)
    print(f"{path}: {len(page) / 1e6:.1f} MB; open it in a browser")


# ----------------------------------------------------------------------------- command line

COMMANDS = {"index": index, "query": query, "explain": explain, "cards": cards, "report": report}


def main(argv):
    run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
