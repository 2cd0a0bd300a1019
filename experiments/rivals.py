"""Document scores of one run by one method: ours, and what people use otherwise. experiments/ekfac.py and lds.py call it, a process a method.

    python experiments/rivals.py --out_dir=out --method=ekfac --queries=out/queries.npy --out=out/ekfac.npz

--queries holds the first tokens of held-out windows, (Q,). Written: scores (Q, documents), positive where the document lowers the query's loss;
the seconds of what is done once (null where an index was there already) and of what is done for the queries, loading what was made once included; the
peak memory of the process; bytes of what is kept. Methods:

    block, joined      the head's influence, attribute.py; needs its index, which is built and timed if it is not there
    ekfac              the released kronfluence on all linear layers of the trunk, damping 0.1 of the mean eigenvalue (Grosse et al. 2023, arXiv 2308.03296)
    ekfac-undamped     the same with the package's default, 1e-8
    trak               after Park et al. 2023 (arXiv 2303.14186): gradients of each window, all weights, by a sparse random projection, and (Phi^T Phi)^-1
                       with a thousandth of its mean diagonal added; gradients of the loss instead of their output function and weights, and one checkpoint;
                       one window at a time, so its seconds are those of this loop
    gradient           dot product of the gradients of the output matrix
    cosine             cosine of mean hidden states
    random             noise

ekfac scores tokens, by their places in the sequence: documents' sums are nearly exact (in a window of two, the later one's loss reaches the earlier
one's places), at the price of memory; trak and gradient score windows, of which a document gets its share of tokens.
"""
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import common  # noqa: E402, F401: finds the modules above

import attribute  # noqa: E402
from prism import UserError, atomic, parse_config, run_main  # noqa: E402

METHODS = "block", "joined", "ekfac", "ekfac-undamped", "trak", "gradient", "cosine", "random"


@dataclass
class RivalConfig:
    out_dir: str = "out"     # the run
    method: str = "block"    # block, joined, ekfac, ekfac-undamped, trak, gradient, cosine or random
    queries: str = ""        # a .npy file with the first tokens of held-out windows
    last: int = 0            # only the loss of a window's last tokens is asked about; 0: of all
    dimension: int = 2048    # of trak's projection
    batch: int = 32          # windows at once
    seed: int = 1            # of projections
    out: str = ""            # the .npz that is written


def key_of(out_dir, run, method, queries, last):
    """What scores depend on, the index in out_dir included: another key, other scores."""
    meta = Path(out_dir) / "attribution/meta.json"
    index = json.loads(meta.read_text("utf-8")) if method in ("block", "joined") and meta.exists() else {}
    return json.dumps([run.hash, run.ckpt["step"], method, np.asarray(queries).tolist(), last, attribute.FORMAT, *(index.get(n) for n in ("mu", "rank", "windows", "postings"))])


def ask(out_dir, run, method, queries, path, last=0):
    """-> scores (Q, documents) and what they cost, by this script in a process of its own; kept at `path` while the key is the same."""
    file = path.parent / "queries.npy"
    for again in (False, True):
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as x:
                    scores, about = x["scores"], json.loads(str(x["about"]))
                if about["key"] == key_of(out_dir, run, method, queries, last):
                    return scores, about
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # damaged: again
            path.unlink()
        if again:
            raise UserError(f"the run in {out_dir} changed while {method} was asked; run again")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as f:
            np.save(f, queries)
        r = subprocess.run([sys.executable, __file__, f"--out_dir={out_dir}", f"--method={method}", f"--queries={file}", f"--last={last}", f"--out={path}"], capture_output=True, text=True)
        if r.returncode:
            raise UserError(f"rivals.py --method={method} failed: {r.stderr.strip()[-1500:]}")


def check_methods(names):
    """Raises UserError for a method that is not there, or whose package is not."""
    if wrong := [m for m in names if m not in METHODS]:
        raise UserError(f"no method {wrong[0]!r}; expected some of {', '.join(METHODS)}")
    if any(m.startswith("ekfac") for m in names) and importlib.util.find_spec("kronfluence") is None:
        raise UserError("kronfluence cannot be imported; run: pip install -r experiments/requirements.txt, or leave ekfac out of the methods")


def ours(run, cfg, idx, targets, clock):
    folder = run.out_dir / "attribution"
    if not (folder / "meta.json").exists():
        attribute.main(["index", f"--out_dir={cfg.out_dir}", "--device=cpu"])
        clock["once"] = time.perf_counter() - clock["t"]
        (folder / "seconds").write_text(str(clock["once"]))
    else:
        clock["once"] = float((folder / "seconds").read_text()) if (folder / "seconds").exists() else None
    clock["disk"], clock["t"] = sum(p.stat().st_size for p in folder.iterdir()), time.perf_counter()
    index = attribute.Index(run.out_dir, "cpu")
    b = vectors(index.run, idx, targets, cfg.last)
    if cfg.method == "block":
        x = index.precondition(b)
    else:
        x = joined(index, b)
    return index.scan_all(index.stored(x), "document")


def joined(index, b, tol=0.01):
    L = torch.from_numpy(np.array(index.factors))
    roots = attribute.root(L @ L.mT - index.meta["mu"] * torch.eye(L.size(1)))
    R = torch.from_numpy(np.array(index.coactivation))
    return attribute.conjugate_gradients(lambda v: attribute.joined_product(L, roots, R, v), b, index.precondition, tol)[0]


def vectors(run, idx, targets, last=0):
    """b (Q, M, d): for each query window, sum over its (last) tokens of a_ti g_t, by prototype."""
    M, d = run.model.config.n_proto, run.model.config.n_embd
    ids, gates, g, _, _, _ = attribute.records(run.model, idx, targets)
    b = torch.zeros(len(idx), M, d)
    for q in range(len(idx)):
        at = slice((q + 1) * idx.size(1) - (last or idx.size(1)), (q + 1) * idx.size(1))
        b[q].index_add_(0, ids[at].flatten(), (gates[at, :, None] * g[at, None]).flatten(0, 1))
    return b


class Logits(torch.nn.Module):
    """The model as one module idx (B, T) -> logits (B, T, V)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx):
        return F.linear(self.model.hidden(idx), self.model.transformer.wte.weight)


def ekfac(run, cfg, idx, targets, clock):
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import ScoreArguments
        from kronfluence.task import Task
    except ImportError as e:
        raise UserError(f"kronfluence cannot be imported ({e}); run: pip install -r experiments/requirements.txt") from None

    clock["t"] = time.perf_counter()  # the import is in no clock

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0]).flatten(0, 1)
            y = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0] if sample else batch[1].flatten()
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0])[:, -cfg.last:].flatten(0, 1), batch[1][:, -cfg.last:].flatten(), reduction="sum")

        def get_influence_tracked_modules(self):
            return [n for n, m in Logits(run.model).named_modules() if isinstance(m, torch.nn.Linear)]

        def get_attention_mask(self, batch):
            return None
    starts, task = attribute.seen_windows(run.ckpt, len(run.tokens)), NextToken()
    raw = run.windows(starts)
    train, query = torch.utils.data.TensorDataset(*raw), torch.utils.data.TensorDataset(idx, targets)
    with tempfile.TemporaryDirectory(dir=Path(cfg.out).parent) as folder:
        analyzer = Analyzer("ekfac", prepare_model(Logits(run.model).requires_grad_(True), task), task, cpu=True, output_dir=folder, disable_model_save=True, disable_tqdm=True)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=cfg.batch)
        clock["once"] = time.perf_counter() - clock["t"]
        clock["disk"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        clock["t"] = time.perf_counter()
        analyzer.compute_pairwise_scores("scores", "factors", query, train, per_device_query_batch_size=len(idx), per_device_train_batch_size=cfg.batch,
                                         score_args=ScoreArguments(compute_per_token_scores=True, damping_factor=None if cfg.method == "ekfac" else 1e-8))
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]                        # (Q, windows, T)
    owner = owners(run, starts)
    return np.stack([np.bincount(owner, s.flatten().double().numpy(), len(run.titles)) for s in scores])


def owners(run, starts):
    """The documents (windows T,) of the tokens that windows at `starts` predict."""
    return run.documents_of((starts[:, None] + 1 + np.arange(run.T)).ravel())


def of_windows(run, starts, scores):
    """Scores (Q, windows) -> (Q, documents): each document gets its share of a window's tokens."""
    owner = owners(run, starts)
    return np.stack([np.bincount(owner, np.repeat(s / run.T, run.T), len(run.titles)) for s in scores])


def gradients(run, starts, text, take, last=0):
    """take(n, gradients of window n's summed loss, over its last tokens alone if so asked, a list) for the windows at `starts` of `text`."""
    logits = Logits(run.model).requires_grad_(True)
    weights = [p for n, p in logits.named_parameters() if "prototypes" not in n]
    for n, s in enumerate(starts):
        raw = torch.from_numpy(text[s:s + run.T + 1].astype(np.int64))[None]
        loss = F.cross_entropy(logits(raw[:, :-1])[0, -last:], raw[0, 1:][-last:], reduction="sum")
        take(n, torch.autograd.grad(loss, weights))


def trak(run, cfg, queries, clock):
    starts, D = attribute.seen_windows(run.ckpt, len(run.tokens)), cfg.dimension
    rng = torch.Generator().manual_seed(cfg.seed)
    size = sum(p.numel() for n, p in run.model.named_parameters() if "prototypes" not in n)
    place, sign = torch.randint(D, (size,), generator=rng), torch.randint(0, 2, (size,), generator=rng) * 2.0 - 1

    def features(windows, text, last=0):
        phi = torch.zeros(len(windows), D)
        gradients(run, windows, text, lambda n, g: phi[n].index_add_(0, place, sign * torch.cat([u.flatten() for u in g])), last)
        return phi
    phi = features(starts, run.tokens).double()
    K = phi.T @ phi
    K.diagonal().add_(1e-3 * K.diagonal().mean())
    ready = torch.linalg.solve(K, phi.T)                                                      # (D, windows)
    clock["once"], clock["disk"], clock["t"] = time.perf_counter() - clock["t"], ready.numel() * 8, time.perf_counter()
    return of_windows(run, starts, (features(queries, run.val, cfg.last).double() @ ready).numpy())


@torch.no_grad()
def gradient(run, cfg, idx, targets, clock):
    """sum over s, t of <z_s, z_t> <e_s, e_t>, e = y - pi: the gradients of W, as the output matrix."""
    W, starts = run.model.transformer.wte.weight, attribute.seen_windows(run.ckpt, len(run.tokens))

    def of(i, y, last=0):
        z, y = run.model.hidden(i)[:, -last:], y[:, -last:]
        e = F.one_hot(y, len(W)) - (z @ W.T).softmax(-1)
        return e.mT @ z                                                                       # (B, V, d)
    mine = of(idx, targets, cfg.last).flatten(1)
    out = torch.zeros(len(starts), len(mine))                                                 # one buffer: small results kept between large ones would scatter the heap
    for i in range(0, len(starts), 8):
        out[i:i + 8] = of(*run.windows(starts[i:i + 8])).flatten(1) @ mine.T
    return of_windows(run, starts, out.T.numpy())


@torch.no_grad()
def cosine(run, cfg, idx, targets, clock):
    starts, d, D = attribute.seen_windows(run.ckpt, len(run.tokens)), run.model.config.n_embd, len(run.titles)
    sums = torch.zeros(D, d)
    for i in range(0, len(starts), 64):
        part = starts[i:i + 64]
        owner = owners(run, part)
        sums.index_add_(0, torch.from_numpy(owner), run.model.hidden(run.windows(part)[0]).flatten(0, 1))
    clock["once"], clock["disk"], clock["t"] = time.perf_counter() - clock["t"], sums.numel() * 4, time.perf_counter()
    return (F.normalize(run.model.hidden(idx)[:, -cfg.last:].mean(1), dim=1) @ F.normalize(sums, dim=1).T).numpy()


def main(argv):
    cfg = parse_config(RivalConfig, argv)
    check_methods([cfg.method])
    if not cfg.queries or not cfg.out:
        raise UserError("give --queries=FILE.npy and --out=FILE.npz")
    if cfg.dimension < 1 or cfg.batch < 1:
        raise UserError(f"dimension is {cfg.dimension}, batch {cfg.batch}; expected at least 1")
    run = attribute.Run(cfg.out_dir, "cpu")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    if not 0 <= cfg.last <= run.T:
        raise UserError(f"last is {cfg.last}, expected 0 to {run.T}")
    try:
        queries = np.load(cfg.queries, allow_pickle=False)
        ok = queries.ndim == 1 and queries.dtype.kind == "i" and len(queries) and queries.min() >= 0 and queries.max() + run.T < len(run.val)
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{cfg.queries} cannot be read ({e}); expected a .npy file of whole numbers") from None
    if not ok:
        raise UserError(f"{cfg.queries}: expected whole numbers (Q,), first tokens of windows of {run.T} in the {len(run.val):,} held-out tokens")
    text = torch.from_numpy(np.stack([run.val[s:s + run.T + 1] for s in queries]).astype(np.int64))
    clock = {"t": time.perf_counter(), "once": 0.0, "disk": 0}
    args = run, cfg, text[:, :-1], text[:, 1:], clock
    if cfg.method in ("block", "joined"):
        scores = ours(*args)
    elif cfg.method == "trak":
        scores = trak(run, cfg, queries, clock)
    elif cfg.method == "random":
        scores = np.random.default_rng(cfg.seed).standard_normal((len(queries), len(run.titles)))
    else:
        scores = {"gradient": gradient, "cosine": cosine}.get(cfg.method, ekfac)(*args)
    made = dict(key=key_of(cfg.out_dir, run, cfg.method, queries, cfg.last), method=cfg.method, once_s=clock["once"], queries_s=time.perf_counter() - clock["t"], queries=len(queries), disk=clock["disk"],
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, threads=torch.get_num_threads())
    with atomic(cfg.out) as f:
        np.savez(f, scores=scores, about=np.array(json.dumps(made)))
    print(json.dumps({k: v for k, v in made.items() if k != "key"}))


if __name__ == "__main__":
    run_main(main)
