"""Does influence predict real retraining? The linear datamodeling score (LDS) of ours and of what people use otherwise, and removal.

    pip install -r experiments/requirements.txt                                        kronfluence, for EK-FAC
    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python experiments/lds.py                                                          about 70 small trainings; two hours on 2 cores
    python experiments/passages.py --folder=books --out=passages.jsonl                 long texts of your own, as many documents
    python data/prepare.py passages.jsonl --name=books512 --vocab_size=512
    python experiments/lds.py --dataset=books512 --work=out-lds-books --out=experiments/results/lds-books.json

A model is trained on everything; others, of the same options and other seeds, are trained by train.py on random halves of the documents. Queries are
held-out windows. For each query, the Spearman correlation over the halves between the query's real loss and minus the sum of the scores of
the documents that the half kept; LDS is its mean (Park et al. 2023, arXiv 2303.14186). Its 95% interval joins a bootstrap over queries, which alone covers about a third of it, and a
jackknife over halves. All methods share queries and halves, so two are compared by the interval of their difference.
By source: each document is given its source's score times its share of the source's tokens, which is what an attribution to sources alone knows.
Full: the head's joint Hessian, summed over --full windows, solved by 100 iterations or until every query's residual is below 1%; the largest is told. Ensemble: the mean of the first method's scores over --ensemble
more models of everything, trained with other seeds, each scaled to unit spread: so many times the price.
With --retrofit every model is a dense one first, to which prototypes are attached and which these options of train.py then train on.

The ceiling: --again of the halves are trained a second time with another seed. Where r is the correlation of a query's loss between the two, a
method that knew the mean over seeds exactly would reach about sqrt(r) against one of them; LDS is also given as a share of that.
Removal: for --removals queries, a model is trained without the documents with the highest scores of a method, until 5% of the training tokens are gone (random: of
noise), all with the seed of the model of everything; what that adds to the query's loss. Finished models and scores are kept, so a run that was stopped goes on.
"""
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, numbers, save, spearman, trained  # noqa: E402
from rivals import ask, check_methods, joined, vectors  # noqa: E402

import attribute  # noqa: E402
from prism import UserError, atomic, dataset_folder, load_checkpoint, load_dataset, parse_config, run_main  # noqa: E402


@dataclass
class LDSConfig:
    dataset: str = "pydoc512"                          # under data/
    models: int = 32                                   # trained on random halves
    again: int = 16                                    # of them, trained a second time with another seed
    queries: int = 128                                 # held-out windows
    methods: str = "block,joined,ekfac,ekfac-undamped,trak,gradient,cosine,random"  # of rivals.py; the first is compared with each of the others
    removals: int = 6                                  # queries whose best documents are really removed; 0: none
    removed: str = "block,ekfac,cosine,random"         # methods whose best documents are removed
    share: float = 0.05                                # of the training tokens, removed
    train: str = "--n_layer=2 --n_head=2 --n_embd=64 --n_proto=512 --top_k=8 --head_share=1 --max_iters=500 --device=cpu"  # options of train.py
    mus: str = "0.001,0.01,0.1,1"                      # dampings, as shares of the median over blocks of the mean eigenvalue
    full: int = 0                                      # windows that the joint Hessian is summed over; 0: left out
    ensemble: int = 0                                  # more models of everything whose scores are averaged; 0: none
    retrofit: str = ""                                 # options of train.py that follow a dense training with --train
    seed: int = 1                                      # of the halves; model j trains with seed + 1 + j, the second time with seed + 1001 + j
    work: str = "out-lds"                              # models, their data and scores go here
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


@torch.no_grad()
def query_losses(out_dir, idx, targets):
    """Mean loss (queries,) in nats a token."""
    model, _ = load_checkpoint(out_dir)
    return torch.stack([model(i[None], y[None])[0].log_softmax(-1).gather(-1, y[None, :, None]).mean() for i, y in zip(idx, targets)]).neg().numpy()


def lds(scores, kept, losses):
    """scores (queries, documents), kept (models, documents), losses (models, queries) -> Spearman r over models (queries,)."""
    return spearman(-(kept.astype(float) @ scores.T), losses)


def interval(x, rng):
    """Mean and half-width of its 95% bootstrap interval."""
    means = rng.choice(x, (2000, len(x))).mean(1)
    return float(x.mean()), float(np.diff(np.quantile(means, [0.025, 0.975]))[0] / 2)


def model_on(cfg, work, source, keep, seed):
    """Trains on the documents `keep` with a seed, in a folder named after both, unless that is done -> the run."""
    folder = work / f"{hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()[:10]}-{seed}"
    if not (folder / "data/meta.json").exists():
        part_of(folder / "data", source, keep)
    return model_of(cfg, folder / "run", folder / "data", seed)


def model_of(cfg, out, data, seed):
    """Trains a model on the dataset `data`, from scratch or, with cfg.retrofit, a dense one that then gets prototypes -> the run."""
    options = f"--dataset={data}", f"--seed={seed}", *cfg.train.split()
    if cfg.retrofit:
        dense = trained(out.with_name(f"{out.name}-dense"), *options, "--n_proto=0")
        options = *options, *cfg.retrofit.split(), f"--init_from={dense}"
    return trained(out, *options)


def by_source(scores, source, tokens):
    """scores (Q, D), source (D,) whole numbers, tokens (D,) -> (Q, D): a source's summed score, shared out by tokens."""
    sums = np.stack([np.bincount(source, row) for row in scores])
    return sums[:, source] * (tokens / np.bincount(source, tokens)[source])


def jackknife(f, n):
    """Half-width of the 95% interval of the mean of f(halves), halves a mask of n: each half left out once."""
    left = np.array([f(np.arange(n) != j).mean() for j in range(n)])
    return 1.96 * float(np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum()))


@torch.no_grad()
def full(index, b, cfg):
    """The joint Hessian's H^-1 b (Q, M, d) by conjugate gradients -> x, largest relative residual, iterations."""
    run = index.run
    starts = attribute.sampled(attribute.seen_windows(run.ckpt, len(run.tokens)), cfg.seed, cfg.full)[0]
    parts = [attribute.records(run.model, *run.windows(starts[i:i + 64])) for i in range(0, len(starts), 64)]
    weight = index.meta["windows"] * index.meta["window_weight"] / len(starts)

    def product(v):
        return weight * sum(attribute.curvature_product(index.W, ids, gates, pi, v) for ids, gates, _, pi, _, _ in parts) + index.meta["mu"] * v
    return attribute.conjugate_gradients(product, b, index.precondition, 0.01)


def main(argv):
    cfg = parse_config(LDSConfig, argv)
    methods, removed = cfg.methods.split(","), cfg.removed.split(",")
    if min(cfg.full, cfg.ensemble) < 0:
        raise UserError(f"full is {cfg.full}, ensemble {cfg.ensemble}; expected at least 0")
    if cfg.models < 3 or not 0 <= cfg.again <= cfg.models or cfg.queries < 1 or cfg.removals < 0 or not 0 < cfg.share < 1:
        raise UserError(f"models {cfg.models}, again {cfg.again}, queries {cfg.queries}, removals {cfg.removals}, share {cfg.share}; expected at least 3, 0 to models, at least 1, at least 0, between 0 and 1")
    check_methods([*methods, *removed * (cfg.removals > 0)])
    shares = numbers("mus", cfg.mus, float) if cfg.mus else []
    if cfg.ensemble and methods[0] == "random":
        raise UserError("an ensemble of random scores says nothing; name another method first")
    work, source = Path(cfg.work), dataset_folder(cfg.dataset)
    whole = model_of(cfg, work / "all", source, cfg.seed)
    run, rng = attribute.Run(whole, "cpu"), np.random.default_rng(cfg.seed)
    D = len(run.titles)
    kept = np.zeros((cfg.models, D), bool)
    for row in kept:
        row[rng.permutation(D)[:D // 2]] = True
    starts = np.sort(np.random.default_rng(cfg.seed + 1).permutation((len(run.val) - 1) // run.T)[:cfg.queries]) * run.T
    text = torch.from_numpy(np.stack([run.val[s:s + run.T + 1] for s in starts]).astype(np.int64))
    idx, targets, losses, twice = text[:, :-1], text[:, 1:], [], []
    for j, row in enumerate(kept):
        losses.append(query_losses(model_on(cfg, work, source, row, cfg.seed + 1 + j), idx, targets))
        if j < cfg.again:
            twice.append(query_losses(model_on(cfg, work, source, row, cfg.seed + 1001 + j), idx, targets))
        print(f"half {j + 1} of {cfg.models}: mean query loss {losses[-1].mean():.4f}" + (f", again {twice[-1].mean():.4f}" if j < cfg.again else ""), flush=True)
    losses, draws = np.stack(losses), np.random.default_rng(0)
    result = dict(options=asdict(cfg) | dict(work="", out=""), machine=machine(), documents=D, queries=len(starts), lds={}, cost={})
    ceiling = None
    if cfg.again > 2:
        r = spearman(losses[:cfg.again], np.stack(twice))
        result["seeds"] = dict(zip(("mean", "half_width"), interval(r, draws)))
        result["ceiling"] = ceiling = float(np.sqrt(max(0.0, r.mean())))
        print(f"the same half with two seeds: Spearman {r.mean():.3f} +- {result['seeds']['half_width']:.3f}; a method can reach about {ceiling:.3f}", flush=True)

    def tell(name, scores):
        if not first:
            first.append(scores)

        def both(half, f):
            return float(np.hypot(half, jackknife(f, cfg.models)))
        r = lds(scores, kept, losses)
        mean, half = interval(r, np.random.default_rng(0))
        difference, wide = interval(lds(first[0], kept, losses) - r, np.random.default_rng(0))
        x = dict(mean=mean, half_width=half, both=both(half, lambda m: lds(scores, kept[m], losses[m])), first_minus_this=[difference, wide],
                 first_minus_this_both=both(wide, lambda m: lds(first[0], kept[m], losses[m]) - lds(scores, kept[m], losses[m])))
        result["lds"][name] = x | (dict(of_ceiling=mean / ceiling) if ceiling else {})
        print(f"{name:>24}: LDS {mean:.3f} +- {x['both']:.3f} (over queries alone {half:.3f})" + (f", {mean / ceiling:.0%} of the ceiling" if ceiling else "")
              + f"; {methods[0]} minus this {difference:+.3f} +- {x['first_minus_this_both']:.3f}", flush=True)
    every, first, tokens = {}, [], np.diff([*run.doc_start, len(run.tokens)])
    for method in methods:
        every[method], result["cost"][method] = ask(whole, run, method, starts, work / "scores" / f"{method}.npz")
        del result["cost"][method]["key"]
        tell(method, every[method])
        tell(f"{method}, by source", by_source(every[method], run.doc_source, tokens))
    if {"block", "ekfac"} <= every.keys():
        tell("block + ekfac", sum(every[n] / every[n].std(1, keepdims=True) for n in ("block", "ekfac")))
    if not (whole / "attribution/meta.json").exists():
        attribute.main(["index", f"--out_dir={whole}", "--device=cpu"])
    index = attribute.Index(whole, "cpu")
    L, eye, b = torch.from_numpy(np.array(index.factors)), torch.eye(index.meta["n_embd"]), vectors(run, idx, targets)
    tell("no Hessian", index.scan_all(index.stored(b), "document"))
    if cfg.full:
        x, residual, steps = full(index, b, cfg)
        result["full"] = dict(windows=cfg.full, residual=residual, iterations=steps)
        print(f"the joint Hessian of {cfg.full} windows: {steps} iterations, residual {residual:.3f}", flush=True)
        tell("full", index.scan_all(index.stored(x), "document"))
    if cfg.ensemble:
        more = [every[methods[0]]]
        for n in range(cfg.ensemble):
            out = model_of(cfg, work / f"all-{n}", source, cfg.seed + 2000 + n)
            more.append(ask(out, attribute.Run(out, "cpu"), methods[0], starts, work / "scores" / f"{methods[0]}-{n}.npz")[0])
        tell(f"{methods[0]}, {len(more)} models", sum(x / x.std(1, keepdims=True) for x in more))
    H = L @ L.mT - index.meta["mu"] * eye
    mean = H.diagonal(dim1=1, dim2=2).mean(1)
    result["median_mean_eigenvalue"] = size = mean[mean > 0].median().item()
    for share in shares:
        index.factors = torch.linalg.cholesky((H + share * size * eye).double()).float().numpy()
        index.meta = index.meta | {"mu": share * size}
        tell(f"block, share {share:g}", index.scan_all(index.stored(index.precondition(b)), "document"))
        tell(f"joined, share {share:g}", index.scan_all(index.stored(joined(index, b)), "document"))

    # -- removal
    base = query_losses(whole, idx, targets)
    chosen = np.random.default_rng(cfg.seed + 2).permutation(len(starts))[:cfg.removals]
    added, gone = {}, {}
    for q in chosen.tolist():
        for method in removed:
            scores = every[method] if method in every else ask(whole, run, method, starts, work / "scores" / f"{method}.npz")[0]
            keep = np.ones(D, bool)
            order = np.argsort(-scores[q])
            n = min(D - 1, int(np.searchsorted(tokens[order].cumsum(), cfg.share * len(run.tokens))) + 1)
            keep[order[:n]] = False
            change = float((query_losses(model_on(cfg, work, source, keep, cfg.seed), idx, targets) - base)[q])
            added.setdefault(method, []).append(change)
            gone.setdefault(method, []).append([n, float(tokens[order[:n]].sum() / len(run.tokens))])
            print(f"query {q} without the {n} best documents by {method}: loss {base[q]:.3f} {change:+.4f}", flush=True)
        result["removal"] = dict(queries=chosen.tolist(), added=added, documents_and_share=gone)
    save(cfg.out, result)
    best = max(result["lds"].items(), key=lambda u: u[1]["mean"])
    print(f"best of {len(result['lds'])}: {best[0]}, LDS {best[1]['mean']:.3f} +- {best[1]['both']:.3f}; {cfg.models} models, {len(starts)} queries"
          + "".join(f"; without the best by {m} {np.mean(v):+.4f}" for m, v in added.items()))


if __name__ == "__main__":
    run_main(main)
