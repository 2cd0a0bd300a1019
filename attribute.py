"""Which training text does a prediction rest on? Influence that is exact for the prototype head.

    python attribute.py index                                     one pass over the training text
    python attribute.py query --prompt="Return the number of"     the model continues by itself
    python attribute.py query --prompt="Return the" --target=" number" --level=token --json

Hold the gates a and residuals at the checkpoint. Then the logits are linear in the prototypes P,
and the training loss over P is multinomial logistic regression with sparse features a_s:

    (1)  g_s = W[y_s] - m_s,  m_s = W^T pi_s,  pi_s = softmax(logits_s);      -dCE_s/dp_i = a_si g_s
    (2)  H_i = W^T diag(sum_s a_si^2 pi_s) W - sum_s a_si^2 m_s m_s^T + mu I   exact block (d, d)
    (3)  x_i = H_i^-1 b_i,  b_i = sum_t a_ti g_t                               the target's side
    (4)  I(s, t) = sum_i a_si g_s . x_i                                        score, in nats:

what removing training token s adds to the loss of target t, to first order: above 0 for proponents.
It is linear in s and in t, so scores of documents, sources and longer targets are sums.
"""
import json
import shutil
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (Run, parse_config, plain, reading, run_command, run_main, window_starts,
                    write_json)
from prism import UserError, log_softmax_chunks, mix

MU_SHARE = 0.1   # of the median block's mean eigenvalue; results are flat from 0.001 to 0.1
EOT = "<|endoftext|>"  # ends every document


@dataclass
class IndexConfig:
    out_dir: str = "out"      # the run; its ckpt.pt is indexed
    mu: float = 0.0           # damping; 0 takes a tenth of the median block's mean eigenvalue
    max_windows: int = 0      # index so many windows, drawn at random; 0 takes an epoch
    device: str = "auto"      # auto, cpu, cuda or mps


@dataclass
class QueryConfig:
    out_dir: str = "out"      # the run, indexed before
    prompt: str = ""          # the text before the prediction
    target: str = ""          # the text whose loss is explained; without it the model continues
    max_new_tokens: int = 4   # length of the model's own continuation
    level: str = "document"   # token, document or source
    top: int = 10             # proponents and opponents shown
    hessian: str = "block"    # block (exact blocks) or full (the joint Hessian: minutes)
    json: bool = False        # print JSON
    device: str = "auto"      # auto, cpu, cuda or mps


# --------------------------------------- (1) records: what the head says of each token
class Records(NamedTuple):
    """N tokens: the gates of each, and the error vector of its prediction."""
    ids: torch.Tensor     # (N, k) prototypes
    gates: torch.Tensor   # (N, k) a_si
    errors: torch.Tensor  # (N, d) g_s = W[y_s] - m_s
    pi: torch.Tensor      # (N, V) softmax(logits_s)
    m: torch.Tensor       # (N, d) W^T pi_s
    loss: torch.Tensor    # (N,) -log pi_s[y_s], nats


@torch.no_grad()
def records(model, idx, targets):
    """idx, targets (B, T) -> Records of N = B T tokens."""
    z = model.hidden(idx).flatten(0, 1)
    y = targets.flatten()
    mixture = model.mixture(z)
    loss = z.new_empty(len(z))
    pi = z.new_empty(len(z), len(model.W))
    for at, logp in log_softmax_chunks(z, model.W):
        loss[at] = -logp.gather(1, y[at, None])[:, 0]
        torch.exp(logp, out=pi[at])
    m = pi @ model.W
    return Records(mixture.ids, mixture.gates, model.W[y] - m, pi, m, loss)


# --------------------------------------- (2) curvature: exact blocks, and the joint product
class Curvature:
    """The two sums in (2): D_i = sum_s a_si^2 pi_s (M, V) and S_i = sum_s a_si^2 m_s m_s^T."""
    def __init__(self, W, n_proto):
        V, d = W.shape
        self.W = W
        self.D = W.new_zeros(n_proto, V)
        self.S = W.new_zeros(n_proto, d, d)

    def add(self, r):
        """Adds N tokens. Sparse in the prototypes: it costs N k (V + d^2)."""
        count = torch.bincount(r.ids.flatten(), minlength=len(self.D))
        order = r.ids.flatten().argsort(stable=True)              # by prototype
        s = order // r.ids.size(1)                                # tokens
        a = r.gates.flatten()[order]
        start = count.cumsum(0) - count
        self.D += F.embedding_bag(s, r.pi, start, per_sample_weights=a * a, mode="sum")
        am = a[:, None] * r.m[s]                                  # (N k, d)
        for i, x in enumerate(am.split(count.tolist())):
            self.S[i].addmm_(x.T, x)

    def block(self, i, mu):
        """H_i (d, d)."""
        H = (self.W.T * self.D[i]) @ self.W - self.S[i]
        H.diagonal().add_(mu)
        return H

    def mean_eigenvalue(self):
        """tr(H_i) / d without mu, the median over the prototypes that fire."""
        trace = self.D @ self.W.square().sum(1) - self.S.diagonal(dim1=1, dim2=2).sum(1)
        return trace[trace > 0].median().item() / self.W.size(1)


def spread(r, v, n_proto):
    """v (N, d) -> sum_s a_si v_s for each prototype (M, d)."""
    av = r.gates[:, :, None] * v[:, None]                         # (N, k, d)
    return v.new_zeros(n_proto, v.size(1)).index_add_(0, r.ids.flatten(), av.flatten(0, 1))


def curvature_product(W, r, v):
    """The joint Hessian, sum_s a_si a_sj W^T (diag pi_s - pi_s pi_s^T) W, times v (Q, M, d)."""
    out = []
    for vq in v:
        u = mix(r.ids, r.gates, vq) @ W.T                         # (N, V) W sum_j a_sj v_j
        u = r.pi * (u - (r.pi * u).sum(1, keepdim=True))          # (diag pi - pi pi^T) u
        out.append(spread(r, u @ W, len(vq)))                     # sum_s a_si W^T u_s
    return torch.stack(out)


def conjugate_gradients(product, b, precondition, tol=1e-3, max_iters=100):
    """Solves product(x) = b[q] for each q; b (Q, M, d) -> x, largest relative residual, steps."""
    def dot(u, v):
        return (u * v).flatten(1).sum(1)[:, None, None]
    x = torch.zeros_like(b)
    r = b
    p = z = precondition(r)
    rz = dot(r, z)
    for step in range(1, max_iters + 1):
        Hp = product(p)
        alpha = rz / (dot(p, Hp) + 1e-30)
        x = x + alpha * p
        r = r - alpha * Hp
        residual = (dot(r, r) / (dot(b, b) + 1e-30)).max().sqrt().item()
        if residual < tol:
            break
        z = precondition(r)
        old, rz = rz, dot(r, z)
        p = z + rz / (old + 1e-30) * p
    return x, residual, step


# --------------------------------------- index: one pass over the training windows
def seen_windows(ckpt, n_tokens):
    """First tokens, in corpus order, of the last whole epoch that training read before the
    checkpoint; of all that it read, if that is less: the very windows that it saw."""
    c = ckpt["train_config"]
    read = ckpt["step"] * c["total_batch_tokens"] // c["block_size"]
    per_epoch = len(window_starts(n_tokens, c["block_size"], c["seed"], 0))
    epoch = max(0, read // per_epoch - 1)
    return np.sort(window_starts(n_tokens, c["block_size"], c["seed"], epoch)[:read])


def read_windows(run, starts):
    """Yields (slice of the tokens, idx, targets (n, T)): windows whose softmax takes 128 MB."""
    n = max(1, min(2 ** 13, 2 ** 25 // run.model.config.vocab_size) // run.T)
    for i in tqdm(range(0, len(starts), n), disable=None):
        at = starts[i:i + n, None] + np.arange(run.T + 1)
        tokens = torch.from_numpy(run.train[at].astype(np.int64)).to(run.device)
        yield slice(i * run.T, (i + n) * run.T), tokens[:, :-1], tokens[:, 1:]


def layout(c, n):
    """The files of an index of n tokens: {name: (dtype, shape)}."""
    return {"positions": (np.int64, (n,)),                        # of the token that is predicted
            "ids": (np.min_scalar_type(c.n_proto), (n, c.top_k)),
            "gates": (np.float16, (n, c.top_k)),                  # a_si
            "errors": (np.float16, (n, c.n_embd)),                # g_s
            "factors": (np.float32, (c.n_proto, c.n_embd, c.n_embd))}  # L_i, H_i = L_i L_i^T


def build_index(run, mu=0.0, max_windows=0):
    """One pass over the training windows -> out_dir/attribution, complete or not there."""
    c = run.model.config
    with reading(f"{run.out_dir}/ckpt.pt", "train it with train.py"):
        starts = seen_windows(run.ckpt, len(run.train))
    if max_windows:
        starts = np.sort(np.random.default_rng(0).permutation(starts)[:max_windows])
    new, final = run.out_dir / "attribution.tmp", run.out_dir / "attribution"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    n = len(starts) * run.T
    files = layout(c, n)
    for name, form in files.items():
        files[name] = np.lib.format.open_memmap(new / f"{name}.npy", "w+", *form)
    size = sum(array.nbytes for array in files.values())
    if size > shutil.disk_usage(new).free:
        raise UserError(f"{new} takes {size:,} bytes; free some space or lower --max_windows")
    files["positions"][:] = (starts[:, None] + 1 + np.arange(run.T)).ravel()
    curvature = Curvature(run.model.W, c.n_proto)
    for at, idx, targets in read_windows(run, starts):
        r = records(run.model, idx, targets)
        curvature.add(r)
        files["ids"][at] = r.ids.cpu()
        files["gates"][at] = r.gates.cpu()
        files["errors"][at] = r.errors.cpu()
    mu = mu or MU_SHARE * curvature.mean_eigenvalue()
    for i in range(c.n_proto):
        files["factors"][i] = torch.linalg.cholesky(curvature.block(i, mu).cpu().double())
    write_json(new / "meta.json", dict(checkpoint=run.hash, mu=mu, tokens=n))
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    print(f"{final}: {n:,} training tokens, mu {mu:.3g}, {size / 1e6:,.0f} MB")


# --------------------------------------- (3) and (4): a query
class Index:
    """The files of `layout`, memory-mapped; raises UserError if they are not of these weights."""
    def __init__(self, out_dir="out", device="auto"):
        self.run = run = Run(out_dir, device)
        folder = run.out_dir / "attribution"
        with reading(f"the index {folder}", f"run: python attribute.py index --out_dir={out_dir}"):
            self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
            if self.meta["checkpoint"] != run.hash:
                raise ValueError("it was made for other weights")
            for name, form in layout(run.model.config, self.meta["tokens"]).items():
                array = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
                if (array.dtype, array.shape) != form:
                    raise ValueError(f"{name}.npy has {array.dtype} {array.shape}")
                setattr(self, name, np.asarray(array))
            if self.ids.max() >= len(self.factors) or not self.meta["mu"] > 0:
                raise ValueError("its prototypes or mu are out of range")
        self.doc_of = np.searchsorted(run.doc_start, self.positions, side="right") - 1
        self.unit_of = {"token": np.arange(len(self.doc_of)),     # of each indexed token
                        "document": self.doc_of,
                        "source": run.doc_source[self.doc_of]}
        self.names = {"token": self.positions, "document": run.titles, "source": run.sources}
        # the posting list of prototype i: order[start[i]:start[i + 1]], places in ids and gates
        self.order = np.argsort(self.ids, axis=None, kind="stable")
        count = np.bincount(self.ids.ravel(), minlength=len(self.factors))
        self.start = np.append(0, count.cumsum())

    def target_records(self, ids, n_prompt):
        """Records, on the CPU, of the tokens ids[n_prompt:], each predicted from all before it."""
        idx = torch.tensor([ids], device=self.run.device)
        r = records(self.run.model, idx[:, :-1], idx[:, 1:])
        return Records(*(u[n_prompt - 1:].cpu() for u in r))

    def right_side(self, r):
        """b_i = sum_t a_ti g_t over the target's tokens -> (M, d)."""
        return spread(r, r.errors, len(self.factors))

    def solve(self, b, hessian="block", tol=1e-3):
        """(3): x = H^-1 b, b (Q, M, d) -> (Q, M, d). full: the joint Hessian, by conjugate
        gradients with the blocks as preconditioner; each step reads all indexed text."""
        if hessian == "block":
            return self.solve_blocks(b)
        x, residual, steps = conjugate_gradients(self.product, b, self.solve_blocks, tol)
        print(f"{steps} steps, relative residual {residual:.1e}", file=sys.stderr)
        return x

    def product(self, v):
        """The joint Hessian of the indexed tokens, mu included, times v (Q, M, d)."""
        run = self.run
        out = self.meta["mu"] * v
        for _, idx, targets in read_windows(run, self.positions[::run.T] - 1):
            r = records(run.model, idx, targets)
            out += curvature_product(run.model.W, r, v.to(run.device)).cpu()
        return out

    def solve_blocks(self, b):
        """x_i = H_i^-1 b_i, H_i = L_i L_i^T; prototypes with b_i = 0 take no time."""
        live = b.any((0, 2)).nonzero()[:, 0]
        L = torch.from_numpy(self.factors[live.numpy()])
        x = torch.zeros_like(b)
        x[:, live] = torch.cholesky_solve(b[:, live].permute(1, 2, 0), L).permute(2, 0, 1)
        return x

    def token_scores(self, x):
        """(4): I(s) = sum_i a_si g_s . x_i of each indexed token. x (Q, M, d) -> (Q, N)."""
        gates = self.gates.ravel()
        errors = torch.from_numpy(self.errors)
        scores = np.zeros((len(self.positions), len(x)))
        for i in x.any((0, 2)).nonzero()[:, 0].tolist():
            postings = self.order[self.start[i]:self.start[i + 1]]
            for p in np.array_split(postings, 1 + len(postings) // 2048):  # stays in the cache
                s = p // self.ids.shape[1]                        # their training tokens
                g = F.embedding(torch.from_numpy(s), errors).float()
                scores[s] += gates[p, None] * (g @ x[:, i].T).numpy()
        if not np.isfinite(scores).all():
            raise UserError("scores are not finite: the index is damaged; index again")
        return scores.T

    def sums(self, token_scores, level):
        """Scores (N,) of tokens -> (units,) of tokens, documents or sources: plain sums."""
        return np.bincount(self.unit_of[level], token_scores, len(self.names[level]))

    def query(self, prompt, target="", level="document", hessian="block", top=10,
              max_new_tokens=4):
        """Which training text made `target` (else: the greedy continuation) likely after `prompt`?
        -> dict: target, its loss in nats, scores (units,), proponents and opponents."""
        run = self.run
        if level not in self.names:
            raise UserError(f"level={level}, expected token, document or source")
        if hessian not in ("block", "full"):
            raise UserError(f"hessian={hessian}, expected block or full")
        ids, n = self.encode(prompt, target)
        if not target:
            idx = torch.tensor([ids], device=run.device)
            idx = run.model.generate(idx, max_new_tokens, 0, n_vocab=run.tokenizer.n_vocab)
            ids = idx[0].tolist()
        if len(ids) == n:
            raise UserError("no token to explain; expected max_new_tokens of 1 or more")
        r = self.target_records(ids, n)
        x = self.solve(self.right_side(r)[None], hessian)
        scores = self.token_scores(x)[0]
        return {"target": run.decode(ids[n:]),
                "loss": r.loss.sum().item(),
                "scores": self.sums(scores, level),
                "proponents": self.entries(level, scores, x[0], top, 1),
                "opponents": self.entries(level, scores, x[0], top, -1)}

    def entries(self, level, token_scores, x, top, sign):
        """The units of the largest sign * score, each with its strongest token -> dicts."""
        run = self.run
        found = []
        scores = sign * self.sums(token_scores, level)
        for unit in np.argsort(-scores)[:top]:
            if scores[unit] <= 0:
                break
            tokens = np.flatnonzero(self.unit_of[level] == unit)
            s = tokens[(sign * token_scores[tokens]).argmax()]
            position, doc = int(self.positions[s]), self.doc_of[s]
            ids = self.ids[s].astype(np.int64)
            g = torch.from_numpy(self.errors[s]).float()
            products = (x[ids] @ g).numpy()
            parts = self.gates[s] * products                      # a_si g_s . x_i
            largest = np.argsort(-np.abs(parts))[:4]
            shares = parts[largest] / parts.sum()
            found.append({"score": sign * scores[unit],
                          "document": run.titles[doc],
                          "source": run.source_of[doc],
                          "offset": position - int(run.doc_start[doc]),
                          "position": position,
                          "text": "{}«{}»{}".format(*self.around(position)),
                          "prototypes": list(zip(ids[largest].tolist(), shares.tolist()))})
        return found

    def encode(self, prompt, target=""):
        """-> token ids of prompt + target (list), how many of them are the prompt's."""
        tokenizer = self.run.tokenizer
        n = len(tokenizer.encode_ordinary(prompt))
        ids = tokenizer.encode_ordinary(prompt + target)
        if not prompt or tokenizer.decode_bytes(ids[:n]) != prompt.encode(errors="replace"):
            raise UserError("the prompt is empty, or a token spans its end and the target's start; "
                            "give for instance --prompt=\"The\" --target=\" cat\"")
        return ids, n

    def around(self, position, before=16, after=8):
        """The text around a training token -> [before, token, after], within its document."""
        cut = max(0, position - before), position, position + 1, position + 1 + after
        texts = [self.run.decode(self.run.train[a:b]) for a, b in zip(cut, cut[1:])]
        head, token, tail = texts
        return [head.split(EOT)[-1], token, tail.split(EOT)[0]]


def index(argv):
    cfg = parse_config(IndexConfig, argv)
    if min(cfg.mu, cfg.max_windows) < 0:
        raise UserError("mu and max_windows: expected 0 or more")
    build_index(Run(cfg.out_dir, cfg.device), cfg.mu, cfg.max_windows)
    print(f"next: python attribute.py query --out_dir={cfg.out_dir} --prompt=\"...\"")


def query(argv):
    cfg = parse_config(QueryConfig, argv)
    answer = Index(cfg.out_dir, cfg.device).query(
        cfg.prompt, cfg.target, cfg.level, cfg.hessian, cfg.top, cfg.max_new_tokens)
    if cfg.json:
        del answer["scores"]
        print(json.dumps(answer, allow_nan=False))
        return
    print(f"{cfg.prompt!r} -> {answer['target']!r}: loss {answer['loss']:.3f} nats; scores by "
          f"{cfg.level} ({cfg.hessian}), each with its strongest token")
    for name in ("proponents", "opponents"):
        print(f"{name}:")
        for e in answer[name]:
            carriers = ", ".join(f"{i} ({share:.0%})" for i, share in e["prototypes"][:3])
            print(f"  {e['score']:+10.5f}  {plain(e['source'])}, {plain(e['document'])}, token "
                  f"{e['offset']}: '{plain(e['text'])}' via {carriers}")


def main(argv):
    run_command({"index": index, "query": query}, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
