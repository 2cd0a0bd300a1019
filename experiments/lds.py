"""Does the head's influence predict real retraining? The linear datamodeling score (LDS), and what the damping does to it.

    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python experiments/lds.py                                16 models on random halves of the documents; about 20 minutes

A model is trained on everything and indexed; others, of the same options and other seeds, are trained by train.py on random halves
of the documents. Queries are held-out windows. For each query, the Spearman correlation over the halves between the query's real
loss and minus the sum of the scores of the documents that the half kept; LDS is its mean, with a 95% bootstrap interval over queries
(Park et al. 2023, arXiv 2303.14186). Finished models are kept, so a run that was stopped goes on.
"""
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import attribute  # noqa: E402
from prism import UserError, atomic, dataset_folder, load_checkpoint, load_dataset, parse_config, run_main  # noqa: E402


@dataclass
class LDSConfig:
    dataset: str = "pydoc512"                          # under data/
    models: int = 16                                   # trained on random halves
    queries: int = 64                                  # held-out windows
    train: str = "--n_layer=2 --n_head=2 --n_embd=64 --n_proto=512 --top_k=8 --head_share=1 --max_iters=500 --device=cpu"  # options of train.py
    mus: str = "0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1,3"  # dampings, as shares of the median over blocks of the mean eigenvalue
    seed: int = 1                                      # of the halves; model j trains with seed + j
    work: str = "out-lds"                              # models and their data go here
    out: str = "experiments/results/lds.json"          # the result


def part_of(folder, source, keep):
    """Writes the prepared dataset `source` with only the training documents `keep` (bools) into `folder`."""
    train, _, meta = load_dataset(source)
    rows, tokens, at, place = json.loads((source / "docs.json").read_text("utf-8")), [], 0, 0
    kept = [x for x in rows if x["split"] == "val"]
    ends = [x["start"] for x in rows if x["split"] == "train"][1:] + [len(train)]
    for x in rows:
        if x["split"] == "train":
            if keep[place]:
                tokens.append(train[x["start"]:ends[place]])
                kept.append(x | {"start": at})
                at += len(tokens[-1])
            place += 1
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("val.bin", "tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(source / name, folder / name)
    np.concatenate(tokens).tofile(folder / "train.bin")
    (folder / "docs.json").write_text(json.dumps(kept), "utf-8")
    meta = meta | {"name": folder.name, "train": meta["train"] | {"tokens": at}}
    meta["sha256"] = meta["sha256"] | {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("train.bin", "docs.json")}
    with atomic(folder / "meta.json", "w") as f:
        json.dump(meta, f)


def trained(cfg, out_dir, dataset, seed):
    """Trains into out_dir unless that is done."""
    log, key = out_dir / "done", json.dumps(asdict(cfg) | {"mus": "", "out": "", "queries": 0, "models": 0})
    if log.exists() and log.read_text().splitlines()[0] != key:
        raise UserError(f"{out_dir} was trained with other options; give another --work, or remove it")
    if not log.exists():
        out_dir.mkdir(parents=True, exist_ok=True)
        r = subprocess.run([sys.executable, ROOT / "train.py", f"--dataset={dataset}", f"--out_dir={out_dir}", f"--seed={seed}", "--resume", *cfg.train.split()],
                           capture_output=True, text=True)
        if r.returncode:
            raise UserError(f"train.py failed: {r.stderr[-2000:]}")
        log.write_text(f"{key}\n{r.stdout}")


@torch.no_grad()
def query_losses(out_dir, idx, targets):
    """Mean loss (queries,) in nats a token."""
    model, _ = load_checkpoint(out_dir)
    return torch.stack([model(i[None], y[None])[0].log_softmax(-1).gather(-1, y[None, :, None]).mean() for i, y in zip(idx, targets)]).neg().numpy()


def query_vectors(index, idx, targets):
    """b (queries, M, d): sum over a window's tokens of a_ti g_t, by prototype."""
    M, d = index.meta["n_proto"], index.meta["n_embd"]
    ids, gates, g, _, _, _ = attribute.records(index.run.model, idx, targets)
    b = torch.zeros(len(idx), M, d)
    for q in range(len(idx)):
        at = slice(q * idx.size(1), (q + 1) * idx.size(1))
        b[q].index_add_(0, ids[at].flatten(), (gates[at, :, None] * g[at, None]).flatten(0, 1))
    return b


def ranks(x):
    return np.argsort(np.argsort(x, axis=0), axis=0).astype(float)


def lds(scores, kept, losses):
    """scores (queries, documents), kept (models, documents), losses (models, queries) -> Spearman r over models (queries,)."""
    a, b = ranks(-(kept.astype(float) @ scores.T)), ranks(losses)
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def interval(x, rng):
    """Mean and half-width of its 95% bootstrap interval."""
    means = rng.choice(x, (2000, len(x))).mean(1)
    return float(x.mean()), float(np.diff(np.quantile(means, [0.025, 0.975]))[0] / 2)


def main(argv):
    cfg = parse_config(LDSConfig, argv)
    work, source = Path(cfg.work).resolve(), dataset_folder(cfg.dataset)
    trained(cfg, work / "all", source.resolve(), cfg.seed)
    if not (work / "all/attribution/meta.json").exists():
        attribute.main(["index", f"--out_dir={work / 'all'}"])
    index = attribute.Index(work / "all", "cpu")
    rng, run = np.random.default_rng(cfg.seed), index.run
    D = len(run.titles)
    kept = np.zeros((cfg.models, D), bool)
    for row in kept:
        row[rng.permutation(D)[:D // 2]] = True
    starts = np.sort(rng.permutation((len(run.val) - 1) // run.T)[:cfg.queries]) * run.T
    text = torch.from_numpy(np.stack([run.val[s:s + run.T + 1] for s in starts]).astype(np.int64))
    idx, targets, losses = text[:, :-1], text[:, 1:], []
    for j, row in enumerate(kept):
        folder = work / f"half{j}"
        if not (folder / "done").exists():
            part_of(folder / "data", source, row)
        trained(cfg, folder, folder / "data", cfg.seed + 1 + j)
        losses.append(query_losses(folder, idx, targets))
        print(f"model {j + 1} of {cfg.models}: mean query loss {losses[-1].mean():.4f}", flush=True)

    losses, b = np.stack(losses), query_vectors(index, idx, targets)
    L, eye = torch.from_numpy(index.factors), torch.eye(index.meta["n_embd"])
    H = L @ L.mT - index.meta["mu"] * eye
    mean = H.diagonal(dim1=1, dim2=2).mean(1)
    size = mean[mean > 0].median().item()
    result = dict(options=asdict(cfg), command="python experiments/lds.py " + " ".join(argv), torch=torch.__version__, machine=f"{platform.machine()}, {os.cpu_count()} cores",
                  documents=D, median_mean_eigenvalue=size, lds={})

    def tell(name, x):
        scores = index.scan_all(index.stored(x), "document")
        r = lds(scores, kept, losses)
        mean, half = interval(r, np.random.default_rng(0))
        result["lds"][name] = dict(mean=mean, half_width=half)
        print(f"{name:>24}: LDS {mean:.3f} +- {half:.3f}", flush=True)
    tell("no Hessian", b)
    roots, R = attribute.root(H), index.coactivation
    for share in map(float, cfg.mus.split(",")):
        factor = torch.linalg.cholesky((H + share * size * eye).double()).float()

        def precondition(r):
            return torch.cholesky_solve(r.permute(1, 2, 0), factor).permute(2, 0, 1)
        tell(f"block, share {share:g}", precondition(b))
        x, _, _ = attribute.conjugate_gradients(lambda v: attribute.joined_product(factor, roots, torch.from_numpy(np.array(R)), v), b, precondition, 0.01)
        tell(f"joined, share {share:g}", x)
    with atomic(cfg.out, "w") as f:
        json.dump(result, f, indent=1)
    best = max(result["lds"].items(), key=lambda u: u[1]["mean"])
    print(f"best of {len(result['lds'])}: {best[0]}, LDS {best[1]['mean']:.3f} +- {best[1]['half_width']:.3f}; {cfg.models} models, {cfg.queries} queries")


if __name__ == "__main__":
    run_main(main)
