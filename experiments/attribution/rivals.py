"""Document scores of a run by one method, ours or another; lds.py and ekfac.py ask for them.

    python experiments/attribution/rivals.py --method=ekfac --queries=0,128 --out=ekfac.npz

Written: scores (Q, D) of documents for the losses of held-out windows, and what they cost by

    block            sum_i a_si g_s . H_i^-1 b_i, attribute.py; its index is built here, and timed
    ekfac            kronfluence on the trunk's linear layers (Grosse et al., arXiv 2308.03296),
                     damped by 0.1 of the mean eigenvalue; ekfac-undamped: by 1e-8, its default
    trak             phi_q (Phi^T Phi + mu I)^-1 phi_s (after Park et al., arXiv 2303.14186), phi a
                     window's gradient of all weights, projected; the loss itself, one checkpoint
    gradient         dot product of the gradients of W, (onehot - pi)_v z in row v
    output           the same with the exact block of each row between them: g_sv . H_v^-1 g_qv
    cosine           cosine of mean hidden states
    bm25             Okapi BM25 of a document's tokens for those of the whole window (rank_bm25)

ekfac-tokens yields scores (Q, windows T) of single tokens: by position, an input to all later ones.
"""
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tools import package  # noqa: E402

from attribute import MU_SHARE, Index, Records, build_index, records, seen_windows  # noqa: E402
from common import Run, UserError, atomic, parse_config, reading, run_main  # noqa: E402

PROJECTION = 2048  # dimensions of trak's features


@dataclass
class RivalConfig:
    out_dir: str = "out"     # the run
    method: str = "block"    # one of those above
    queries: str = "0"       # first tokens of held-out windows, with commas between
    last: int = 0            # only the loss of a window's last tokens is explained; 0: of all
    out: str = "scores.npz"  # written


def ask(out_dir, run, method, queries, folder, last=0):
    """-> scores (Q, D), cost (dict), by this script as a process of its own; kept in `folder`."""
    queries = ",".join(str(q) for q in queries)
    key = hashlib.sha256(f"{run.hash} {last} {queries}".encode()).hexdigest()[:10]
    path = folder / f"{method}-{key}.npz"
    if not path.exists():
        words = [f"--out_dir={out_dir}", f"--method={method}"]
        words += [f"--queries={queries}", f"--last={last}", f"--out={path}"]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"rivals.py --method={method} failed: {done.stderr.strip()[-1500:]}")
    with reading(path, "remove it and run the script anew"):
        kept = np.load(path, allow_pickle=False)
        return kept["scores"], json.loads(str(kept["cost"]))


def check_methods(names):
    """Raises UserError for a method that is not there, or whose package is not."""
    if unknown := set(names) - set(METHODS):
        raise UserError(f"found methods {unknown}, expected some of {', '.join(METHODS)}")
    if {"ekfac", "ekfac-undamped", "ekfac-tokens"} & set(names):
        package("kronfluence")
    if "bm25" in names:
        package("rank_bm25")


def windows(run, text, starts):
    """First tokens of windows of a text -> idx, targets (n, T)."""
    raw = torch.from_numpy(text[starts[:, None] + np.arange(run.T + 1)].astype(np.int64))
    return raw[:, :-1], raw[:, 1:]


def owners(run, starts):
    """The documents (windows T,) of the tokens that the windows at `starts` predict."""
    positions = starts[:, None] + 1 + np.arange(run.T)
    return np.searchsorted(run.doc_start, positions.ravel(), side="right") - 1


def document_sums(run, starts, scores):
    """Scores of the windows' tokens (Q, windows T) -> of documents (Q, D)."""
    owner = owners(run, starts)
    return np.stack([np.bincount(owner, row, len(run.titles)) for row in scores])


def window_sums(run, starts, scores):
    """Scores of windows (Q, windows), in equal parts of their tokens -> of documents (Q, D)."""
    parts = scores.numpy() / run.T
    return document_sums(run, starts, parts.repeat(run.T, 1))


def right_sides(index, idx, targets, last=0):
    """b (Q, M, d): b_i = sum_t a_ti g_t over a query's (last) tokens."""
    sides = []
    for i, y in zip(idx, targets):
        r = records(index.run.model, i[None], y[None])
        sides.append(index.right_side(Records(*(u[-last:] for u in r))))
    return torch.stack(sides)


def head_scores(index, x):
    """Solutions x (Q, M, d) -> scores of documents (Q, D); 16 queries read the index together."""
    return np.stack([index.sums(scores, "document")
                     for part in x.split(16) for scores in index.token_scores(part)])


# A method yields the bytes of what is done once, for any query; then the scores (Q, D) of these.
def bytes_in(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def block(run, cfg, starts, query):
    build_index(run)
    yield bytes_in(run.out_dir / "attribution")
    index = Index(run.out_dir, "cpu")
    yield head_scores(index, index.solve(right_sides(index, *query, cfg.last)))


def window_loss(model, idx, targets, last=0):
    logits = model.logits(model.hidden(idx)[:, -last:]).flatten(0, 1)
    return F.cross_entropy(logits, targets[:, -last:].flatten(), reduction="sum")


def ekfac(run, cfg, starts, query):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            idx, targets = batch
            if sample:
                pi = model.logits(model.hidden(idx)).detach().softmax(-1)
                targets = torch.multinomial(pi.flatten(0, 1), 1).view_as(targets)
            return window_loss(model, idx, targets)

        def compute_measurement(self, batch, model):
            return window_loss(model, *batch, cfg.last)
    task, train = NextToken(), TensorDataset(*windows(run, run.train, starts))
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("ekfac", prepare_model(run.model, task), task, cpu=True,
                            output_dir=folder, disable_model_save=True)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=32)
        yield bytes_in(folder)
        damping = 1e-8 if cfg.method == "ekfac-undamped" else None
        how = ScoreArguments(compute_per_token_scores=True, damping_factor=damping)
        analyzer.compute_pairwise_scores("scores", "factors", TensorDataset(*query), train,
                                         len(query[0]), per_device_train_batch_size=32,
                                         score_args=how)
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]         # (Q, windows, T)
    scores = scores.flatten(1).numpy()
    yield scores if cfg.method == "ekfac-tokens" else document_sums(run, starts, scores)


def trak(run, cfg, starts, query):
    model, rng = run.model.requires_grad_(True), torch.Generator().manual_seed(1)
    weights = [p for name, p in model.named_parameters() if name != "prototypes"]
    size = sum(p.numel() for p in weights)
    place = torch.randint(PROJECTION, (size,), generator=rng)
    sign = torch.randint(0, 2, (size,), generator=rng) * 2.0 - 1

    def features(idx, targets, last=0):
        phi = torch.zeros(len(idx), PROJECTION)
        for row, i, y in zip(phi, idx, targets):
            g = torch.autograd.grad(window_loss(model, i[None], y[None], last), weights)
            row.index_add_(0, place, sign * torch.cat([u.flatten() for u in g]))
        return phi.double()
    phi = features(*windows(run, run.train, starts))                                  # (windows, D)
    K = phi.T @ phi
    K.diagonal().add_(1e-3 * K.diagonal().mean())
    solved = torch.linalg.solve(K, phi.T)                                       # (D, windows)
    yield solved.nbytes
    yield window_sums(run, starts, features(*query, cfg.last) @ solved)


def output_factors(run, starts):
    """Cholesky factors (V, d, d) of H_v = sum_s pi_sv (1 - pi_sv) z_s z_s^T + mu I."""
    W = run.model.W
    H = W.new_zeros(len(W), W.size(1) ** 2)
    for i in range(0, len(starts), 8):
        idx, _ = windows(run, run.train, starts[i:i + 8])
        z = run.model.hidden(idx).flatten(0, 1)
        pi = (z @ W.T).softmax(1)
        outer = z[:, :, None] * z[:, None]
        H += (pi - pi * pi).T @ outer.flatten(1)
    H = H.unflatten(1, (W.size(1), -1))
    diagonal = H.diagonal(dim1=1, dim2=2)
    diagonal += MU_SHARE * diagonal.mean(1).median()
    return torch.linalg.cholesky(H)


def gradient(run, cfg, starts, query):
    def gradients(idx, targets, last=0):
        z = run.model.hidden(idx)[:, -last:]
        onehot = F.one_hot(targets[:, -last:], len(run.model.W))
        e = onehot - (z @ run.model.W.T).softmax(-1)
        return e.mT @ z                                                         # (B, V, d)
    L = output_factors(run, starts) if cfg.method == "output" else None
    yield 0 if L is None else L.nbytes
    mine = gradients(*query, cfg.last)
    if L is not None:
        mine = torch.cholesky_solve(mine.permute(1, 2, 0), L).permute(2, 0, 1)
    scores = []
    for i in range(0, len(starts), 8):
        theirs = gradients(*windows(run, run.train, starts[i:i + 8]))
        scores.append(mine.flatten(1) @ theirs.flatten(1).T)
    yield window_sums(run, starts, torch.cat(scores, 1))


def cosine(run, cfg, starts, query):
    sums = torch.zeros(len(run.titles), run.model.config.n_embd)
    for i in range(0, len(starts), 64):
        part = starts[i:i + 64]
        z = run.model.hidden(windows(run, run.train, part)[0]).flatten(0, 1)
        sums.index_add_(0, torch.from_numpy(owners(run, part)), z)
    yield sums.nbytes
    mine = run.model.hidden(query[0])[:, -cfg.last:].mean(1)
    yield (F.normalize(mine, dim=1) @ F.normalize(sums, dim=1).T).numpy()


def bm25_scores(texts, queries):
    """Token ids of texts and of queries, arrays -> BM25 (Q, texts)."""
    okapi = package("rank_bm25").BM25Okapi([text.tolist() for text in texts])
    return np.stack([okapi.get_scores(query.tolist()) for query in queries])


def bm25(run, cfg, starts, query):
    yield 0
    texts = np.split(run.train, run.doc_start[1:])
    idx, targets = query
    whole = torch.cat((idx, targets[:, -1:]), 1)
    yield bm25_scores(texts, whole.numpy())


METHODS = {
    "block": block,
    "ekfac": ekfac,
    "ekfac-undamped": ekfac,
    "ekfac-tokens": ekfac,
    "trak": trak,
    "gradient": gradient,
    "output": gradient,
    "cosine": cosine,
    "bm25": bm25,
}


def main(argv):
    cfg = parse_config(RivalConfig, argv)
    check_methods([cfg.method])
    run = Run(cfg.out_dir, "cpu")
    with reading(f"--queries={cfg.queries}", "expected first tokens of held-out windows"):
        query = windows(run, run.val, np.array(cfg.queries.split(","), np.int64))
    start = time.perf_counter()
    steps = METHODS[cfg.method](run, cfg, seen_windows(run.ckpt, len(run.train)), query)
    disk = next(steps)
    middle = time.perf_counter()
    scores = next(steps)
    end = time.perf_counter()
    cost = dict(
        once_s=middle - start,
        queries_s=end - middle,
        queries=len(query[0]),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        disk=disk)
    with atomic(cfg.out) as f:
        np.savez(f, scores=scores, cost=json.dumps(cost))


if __name__ == "__main__":
    run_main(main)
