"""Are prototypes grounded in training text? Near states, pure neighbourhoods, stable over seeds.

    python experiments/quality/grounding.py     trains two dense twins and a second seed: 10 minutes

Three sets of M directions: prototypes; random directions; spherical k-means of the dense twin's
states. A neighbourhood is the 32 training states nearest to a direction.

    purity     share of the commonest next token (or last token, or source) in a neighbourhood
    stability  max over one-to-one s of mean_i corr(a_i, a'_s(i)), gates of two seeds on one text
    by chance  purity of tokens drawn at random; stability when one of the texts is shifted
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tools import options_of, package, save_results, trained  # noqa: E402

from common import Run, load_checkpoint, parse_config, run_main, window_starts  # noqa: E402


WINDOWS, HELD_OUT, NEAR, SEED = 1024, 256, 32, 1  # training and held-out windows, neighbours


@dataclass
class GroundingConfig:
    out_dir: str = "out"            # PRISM's run
    work: str = "out-grounding"     # its dense twin, and both of another seed
    out: str = "experiments/results/grounding.json"  # the result


def states(model, tokens, starts):
    """First tokens of windows -> unit hidden states (N, d)."""
    place = starts[:, None] + np.arange(model.config.block_size)
    windows = torch.from_numpy(tokens[place].astype(np.int64))
    parts = [model.hidden(idx).flatten(0, 1) for idx in windows.split(64)]
    return F.normalize(torch.cat(parts), dim=1)


def k_means(x, k):
    """Spherical k-means of x (N, d) -> unit centroids (k, d)."""
    centroids = x[torch.randperm(len(x))[:k]]
    for _ in range(15):
        nearest = (x @ centroids.T).argmax(1)
        sums = 1e-6 * centroids                                   # an empty one stays where it was
        centroids = F.normalize(sums.index_add_(0, nearest, x), dim=1)
    return centroids


def purity(values, near):
    """values (N,), near (M, n) numbers of tokens -> mean share of the commonest value in a row."""
    counts = [np.unique(row, return_counts=True)[1].max() for row in values[near]]
    return float(sum(counts) / near.size)


def fired(directions, x, k):
    """Positive cosines of the k nearest directions, centered, in unit columns (N, M)."""
    cosine = x @ F.normalize(directions, dim=1).T
    values, ids = cosine.topk(k)
    a = torch.zeros_like(cosine).scatter_(1, ids, values.relu())
    return F.normalize(a - a.mean(0), dim=0)


def matched(a, b):
    """Columns of a and b (N, M) -> mean correlation of the best one-to-one matching."""
    r = (a.T @ b).numpy()
    pairs = package("scipy").optimize.linear_sum_assignment(-r)
    return float(r[pairs].mean())


def direction_sets(prism, dense, texts):
    """-> {kind: directions (M, d), training states and held-out states of the same space}"""
    space = [states(prism, *text) for text in texts]
    space_dense = [states(dense, *text) for text in texts]
    P = prism.prototypes
    return {
        "prototypes": (P, *space),
        "random directions": (torch.randn_like(P), *space),
        "k-means of the dense twin": (k_means(space_dense[0], len(P)), *space_dense),
    }


def main(argv):
    cfg = parse_config(GroundingConfig, argv)
    package("scipy")
    run = Run(cfg.out_dir, "cpu")
    T, k = run.T, run.model.config.top_k

    def train(name, *words):
        out = trained(Path(cfg.work) / name, *options_of(run.ckpt), *words)
        return load_checkpoint(out)[0].requires_grad_(False)
    seed = f"--seed={run.ckpt['train_config']['seed'] + 1}"
    dense = train("dense", "--n_proto=0")
    other = train("other", seed)
    other_dense = train("other-dense", seed, "--n_proto=0")
    torch.manual_seed(SEED)
    starts = window_starts(len(run.train), T, SEED, 0)[:WINDOWS]
    places = np.arange(min(HELD_OUT, len(run.val) // T)) * T
    texts = (run.train, starts), (run.val, places)
    sets = direction_sets(run.model, dense, texts)
    other_sets = direction_sets(other, other_dense, texts)
    position = (starts[:, None] + 1 + np.arange(T)).ravel()       # of the token to be predicted
    document = np.searchsorted(run.doc_start, position, side="right") - 1
    values = {
        "next token": run.train[position],
        "last token": run.train[position - 1],
        "source": run.doc_source[document],
    }
    drawn = torch.randint(len(position), (1000, NEAR)).numpy()
    result = {"sets": {}, "stability": {}}
    result["by_chance"] = {name: purity(v, drawn) for name, v in values.items()}
    for kind, (directions, x, held_out) in sets.items():
        cosine, near = (F.normalize(directions, dim=1) @ x.T).topk(NEAR)
        found = {name: purity(v, near.numpy()) for name, v in values.items()}
        found["nearest_cosine"] = np.quantile(cosine[:, 0], (0.1, 0.5, 0.9)).tolist()
        result["sets"][kind] = found
        a = fired(directions, held_out, k)
        b = fired(other_sets[kind][0], other_sets[kind][2], k)
        shifted = b.roll(len(b) // 2, 0)                          # gates of other text
        stability = {"mean": matched(a, b), "by_chance": matched(a, shifted)}
        result["stability"][kind] = stability
        print(kind, found, stability)
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
