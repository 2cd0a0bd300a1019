"""Are prototypes grounded in training text? How near the nearest training states are, how pure their neighbourhoods, how stable they are over seeds.

    pip install -r experiments/requirements.txt
    python experiments/grounding.py                     about 10 minutes; trains a dense twin and a second seed if they are not there

Three sets of M directions: PRISM's prototypes; random directions in its state space; spherical k-means on the states of the dense twin. Each
direction's neighbourhood is the --near training tokens whose hidden states have the largest cosine with it. Purity is the share of the commonest
value among them: of the next token, of the document's source, and of the token read last. What the commonest value's share would be among as many tokens
drawn at random stands beside it. Stability: two runs of different seeds have different state spaces, so directions are matched by where they fire:
the correlation, over held-out tokens, of gates (k-means: of its k nearest centroids' cosines), one to one by optimal assignment; and the same with
the tokens of one run shifted by half, which leaves what matching alone gives.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import machine, options_of, save, trained  # noqa: E402

from prism import UserError, dataset_folder, load_checkpoint, load_dataset, parse_config, run_main, window_starts  # noqa: E402


@dataclass
class GroundingConfig:
    out_dir: str = "out"            # PRISM's run
    dense: str = "out-dense-1"      # its dense twin, trained here if need be
    other: str = "out-other"        # PRISM of another seed, trained here if need be
    other_dense: str = "out-dense-2"  # and its dense twin
    train: str = ""                 # options of train.py for them beyond those of the first run
    tokens: int = 131072            # training tokens whose states are looked at
    held_out: int = 32768           # held-out tokens that prototypes of two seeds are matched on
    near: int = 32                  # tokens of a neighbourhood
    seed: int = 1                   # of the choice of text, random directions and k-means
    out: str = "experiments/results/grounding.json"  # the result


@torch.no_grad()
def states(model, tokens, starts):
    """Windows at `starts` -> unit hidden states (N, d) and the positions (N,) of the tokens to be predicted."""
    T, parts = model.config.block_size, []
    for i in range(0, len(starts), 64):
        idx = torch.from_numpy(np.stack([tokens[s:s + T] for s in starts[i:i + 64]]).astype(np.int64))
        parts.append(F.normalize(model.hidden(idx).flatten(0, 1), dim=1))
    return torch.cat(parts), (starts[:, None] + 1 + np.arange(T)).ravel()


def k_means(x, k, seed, rounds=15):
    """Spherical k-means of unit x (N, d) -> unit centroids (k, d); an empty cluster takes the worst served point."""
    c = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]].clone()
    for _ in range(rounds):
        best, mine = (torch.cat(u) for u in zip(*((u @ c.T).max(1) for u in x.split(8192))))
        new = torch.zeros_like(c).index_add_(0, mine, x)
        empty = (torch.bincount(mine, minlength=k) == 0).nonzero()[:, 0]
        new[empty] = x[best.argsort()[:len(empty)]]
        c = F.normalize(new, dim=1)
    return c


def purity(values, near):
    """values (N,) whole numbers, near (M, n) -> the share of the commonest value in each row, (M,)."""
    rows = np.sort(values[near], axis=1)
    longest, run = np.ones(len(rows), int), np.ones(len(rows), int)
    for j in range(1, rows.shape[1]):
        run = np.where(rows[:, j] == rows[:, j - 1], run + 1, 1)
        longest = np.maximum(longest, run)
    return longest / rows.shape[1]


def neighbourhoods(directions, x, n):
    """-> cosines and numbers (M, n) of the nearest of x (N, d)."""
    found = [(u @ x.T).topk(n, dim=1) for u in F.normalize(directions, dim=1).split(64)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]).numpy()


def fired(directions, x, k):
    """The positive cosines of the k nearest directions of each state, (N, M), centered and scaled to unit columns."""
    s = x @ F.normalize(directions, dim=1).T
    top = s.topk(k, dim=1)
    a = torch.zeros_like(s).scatter_(1, top.indices, top.values.clamp(min=0))
    return F.normalize(a - a.mean(0), dim=0)


def matched(a, b):
    """Columns of a and b (N, M) -> correlations of the best one-to-one matching (M,)."""
    from scipy.optimize import linear_sum_assignment
    r = (a.T @ b).numpy()
    return r[linear_sum_assignment(-r)]


def main(argv):
    cfg = parse_config(GroundingConfig, argv)
    if min(cfg.tokens, cfg.held_out) < 1 or not 1 <= cfg.near <= cfg.tokens // 2:
        raise UserError(f"tokens is {cfg.tokens}, held_out {cfg.held_out}, near {cfg.near}; expected at least 1, 1, and 1 to half of the tokens")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError("scipy cannot be imported; run: pip install -r experiments/requirements.txt") from None
    model, ckpt = load_checkpoint(cfg.out_dir, "cpu")
    if not model.config.n_proto:
        raise UserError(f"{cfg.out_dir} holds a dense model; expected one with prototypes")
    trained_with, k = ckpt["train_config"], model.config.top_k
    common, second = [*options_of(ckpt), *cfg.train.split()], f"--seed={trained_with['seed'] + 1}"
    dense, other, other_dense = (load_checkpoint(trained(f, *common, *more), "cpu")[0] for f, more in (
        (cfg.dense, ("--n_proto=0",)), (cfg.other, (second,)), (cfg.other_dense, (second, "--n_proto=0"))))
    folder = dataset_folder(trained_with["dataset"])
    train, val, _ = load_dataset(folder)
    T, rng = model.config.block_size, np.random.default_rng(cfg.seed)
    starts = window_starts(len(train), T, cfg.seed, 0)[:max(1, cfg.tokens // T)]
    rows = [x for x in json.loads((folder / "docs.json").read_text("utf-8")) if x["split"] == "train"]
    names = sorted({x["source"] for x in rows})
    source = np.array([names.index(x["source"]) for x in rows])
    begin = np.array([x["start"] for x in rows])
    x, positions = states(model, train, starts)
    xd, _ = states(dense, train, starts)
    P, M = model.prototypes.detach(), model.config.n_proto
    noise = torch.randn(P.shape, generator=torch.Generator().manual_seed(cfg.seed))
    centroids = k_means(xd, M, cfg.seed)
    sets = {"prototypes": (P, x), "random directions": (noise, x), "k-means of the dense twin": (centroids, xd)}
    kinds = {"next token": train[positions].astype(int), "last token": train[positions - 1].astype(int), "source": source[np.searchsorted(begin, positions, side="right") - 1]}
    result = dict(options=asdict(cfg), machine=machine(), sets={}, stability={})
    drawn = rng.integers(len(positions), size=(M, cfg.near))
    result["by_chance"] = {n: float(purity(v, drawn).mean()) for n, v in kinds.items()}
    for name, (directions, at) in sets.items():
        cosine, near = neighbourhoods(directions, at, cfg.near)
        row = dict(nearest_cosine=cosine[:, 0].quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(), distinct=len(np.unique(near)) / near.size)
        result["sets"][name] = row = row | {n: float(purity(v, near).mean()) for n, v in kinds.items()}
        print(f"{name}: cosine of the nearest training state {row['nearest_cosine'][1]:.3f} (10% to 90%: {row['nearest_cosine'][0]:.3f} to {row['nearest_cosine'][2]:.3f}); purity "
              + ", ".join(f"{n} {row[n]:.3f} (by chance {result['by_chance'][n]:.3f})" for n in kinds) + f"; {row['distinct']:.0%} of the neighbours distinct", flush=True)
    places = np.arange(min(cfg.held_out, len(val) - 1) // T) * T
    h = {n: states(m, val, places)[0] for n, m in (("model", model), ("other", other), ("dense", dense), ("other dense", other_dense))}
    pairs = {"prototypes": (fired(P, h["model"], k), fired(other.prototypes.detach(), h["other"], k)),
             "k-means of the dense twin": (fired(centroids, h["dense"], k), fired(k_means(states(other_dense, train, starts)[0], M, cfg.seed), h["other dense"], k)),
             "random directions": (fired(noise, h["model"], k), fired(torch.randn(P.shape, generator=torch.Generator().manual_seed(cfg.seed + 1)), h["other"], k))}
    for name, (a, b) in pairs.items():
        r, by_chance = matched(a, b), matched(a, b.roll(len(b) // T // 2 * T, 0))  # whole windows, so that places in a window stay
        result["stability"][name] = dict(mean=float(r.mean()), above_half=float((r > 0.5).mean()), quantiles=np.quantile(r, [0.1, 0.5, 0.9]).tolist(), by_chance=float(by_chance.mean()))
        print(f"{name}: two seeds matched one to one, correlation of where they fire {r.mean():.3f} (by chance {by_chance.mean():.3f}), {(r > 0.5).mean():.0%} above 0.5", flush=True)
    save(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
