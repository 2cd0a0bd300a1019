"""What an attribution query costs, and how far other methods agree with exact blocks.

    pip install -r experiments/requirements.txt
    python experiments/attribution/ekfac.py         the default run; about half an hour on 2 cores

A process per method, rivals.py. A query is the last prediction of a held-out window. once_s:
index, factors or features; query_s: what remains, per query; agreement with the first method: the
share of its top 10 (100) documents, and Spearman's correlation of all scores; means over queries.
break_even: queries after which the index has paid for itself, if EK-FAC's factors were free.
"""
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
from rivals import ask, check_methods  # noqa: E402
from tools import save_results, spearman  # noqa: E402

from attribute import seen_windows  # noqa: E402
from common import Run, UserError, parse_config, run_main  # noqa: E402


@dataclass
class EkfacConfig:
    out_dir: str = "out"       # the run
    queries: int = 4           # held-out windows
    methods: str = "block,ekfac,ekfac-undamped,trak,gradient,cosine,bm25"  # against the 1st
    seed: int = 1              # of the choice of queries
    work: str = "out-ekfac"    # scores
    out: str = "experiments/results/ekfac.json"  # the result


def overlap(a, b, n):
    """Scores a, b (D,) -> the share of the top n that they have in common."""
    both = np.intersect1d(np.argsort(-a)[:n], np.argsort(-b)[:n])
    return len(both) / min(n, len(a))


def agreement(a, b):
    """Scores a, b (Q, D) -> means over queries."""
    return dict(top_10=np.mean([overlap(x, y, 10) for x, y in zip(a, b)]),
                top_100=np.mean([overlap(x, y, 100) for x, y in zip(a, b)]),
                spearman=spearman(a.T, b.T).mean())


def main(argv):
    cfg = parse_config(EkfacConfig, argv)
    methods = cfg.methods.split(",")
    check_methods(methods)
    run = Run(cfg.out_dir, "cpu")
    windows = np.random.default_rng(cfg.seed).permutation((len(run.val) - 1) // run.T)
    if not 1 <= cfg.queries <= len(windows):
        raise UserError(f"queries is {cfg.queries}, expected 1 to {len(windows)}")
    copy = Path(cfg.work) / run.hash[:12]                  # the index is built and timed there
    copy.mkdir(parents=True, exist_ok=True)
    for name in ("ckpt.pt", "tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(run.out_dir / name, copy / name)
    tokens = len(seen_windows(run.ckpt, len(run.train))) * run.T
    result = dict(options=asdict(cfg), documents=len(run.titles), training_tokens=tokens)
    scores, costs = {}, {}
    for method in methods:
        queries = windows[:cfg.queries] * run.T
        scores[method], cost = ask(copy, run, method, queries, copy / "scores", last=1)
        costs[method] = cost | {"query_s": cost["queries_s"] / cfg.queries}
        if method != methods[0]:
            costs[method] |= agreement(scores[methods[0]], scores[method])
        print(method, *(f"{name} {value:.3g}" for name, value in costs[method].items()))
    if {"block", "ekfac"} <= costs.keys():
        a = costs["block"]
        b = costs["ekfac"]
        result["ratio"] = dict(query=b["query_s"] / a["query_s"], once=b["once_s"] / a["once_s"],
                               memory=b["peak_bytes"] / a["peak_bytes"],
                               break_even=a["once_s"] / (b["query_s"] - a["query_s"]))
    save_results(cfg.out, result | {"methods": costs})


if __name__ == "__main__":
    run_main(main)
