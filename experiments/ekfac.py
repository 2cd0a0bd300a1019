"""What an attribution query costs, ours against EK-FAC (the released kronfluence), TRAK, gradient dot product and hidden-state cosine; how far they agree.

    pip install -r experiments/requirements.txt
    python experiments/ekfac.py                        the default run, predictions at the end of 8 held-out windows; about half an hour on 2 cores
    python experiments/ekfac.py --last=0 --out=experiments/results/ekfac-windows.json          the loss of whole windows

Same checkpoint, same training windows, same queries, a process a method (rivals.py), one after the other. once: factors, index or features, whatever
the number of queries; a query: what remains, divided by their number; peak memory of the process, the libraries included; disk. Break-even is the number
of queries after which ours, index included, has cost less than EK-FAC without its factors. Agreement with ours (block): documents among
both top 10 and top 100, as a share, and the Spearman correlation of all documents' scores; means over queries. Results of a method are kept.
"""
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
from common import machine, save, spearman  # noqa: E402
from rivals import ask, check_methods  # noqa: E402

import attribute  # noqa: E402
from prism import UserError, parse_config, run_main  # noqa: E402


@dataclass
class EkfacConfig:
    out_dir: str = "out"     # the run
    queries: int = 8         # held-out windows
    last: int = 1            # tokens at the end of each whose loss is explained: 1 is one prediction; 0 is all of the window
    methods: str = "block,joined,ekfac,ekfac-undamped,trak,gradient,cosine"  # the first is the one that others are compared with
    seed: int = 1            # of the choice of queries
    work: str = "out-ekfac"  # scores go here
    out: str = "experiments/results/ekfac.json"  # the result


def agreement(a, b, tops=(10, 100)):
    """Scores a, b (Q, D) -> shares of the tops in common, and Spearman r, means over queries."""
    shared = {f"top_{n}": float(np.mean([len(np.intersect1d(np.argsort(-x)[:n], np.argsort(-y)[:n])) / min(n, len(x)) for x, y in zip(a, b)])) for n in tops}
    return shared | dict(spearman=float(spearman(a.T, b.T).mean()))


def main(argv):
    cfg = parse_config(EkfacConfig, argv)
    methods, work, run = cfg.methods.split(","), Path(cfg.work), attribute.Run(cfg.out_dir, "cpu")
    check_methods(methods)
    n = (len(run.val) - 1) // run.T
    if not 1 <= cfg.queries <= n:
        raise UserError(f"queries is {cfg.queries}, expected 1 to {n}, the windows of the held-out text")
    starts = np.sort(np.random.default_rng(cfg.seed).permutation(n)[:cfg.queries]) * run.T
    if not 0 <= cfg.last <= run.T:
        raise UserError(f"last is {cfg.last}, expected 0 to {run.T}")
    work = work / f"{run.hash[:12]}-{cfg.seed}-{cfg.queries}-{cfg.last}"
    copy = work.parent / run.hash[:12]                                                         # the run without its index, which is built and timed there
    copy.mkdir(parents=True, exist_ok=True)
    for name in ("ckpt.pt", "config.json", "tokenizer.json", "tokenizer.tiktoken"):
        if (run.out_dir / name).exists() and not (copy / name).exists():
            shutil.copy(run.out_dir / name, copy / name)
    work.mkdir(exist_ok=True)
    scores, result = {}, dict(options=asdict(cfg), machine=machine(), documents=len(run.titles), training_tokens=len(attribute.seen_windows(run.ckpt, len(run.tokens))) * run.T, methods={})
    for method in methods:
        scores[method], about = ask(copy, run, method, starts, work / f"{method}.npz", cfg.last)
        row = result["methods"][method] = about | dict(query_s=about["queries_s"] / about["queries"]) | (agreement(scores[methods[0]], scores[method]) if method != methods[0] else {})
        del row["key"]
        print(f"{method:>14}: once {row['once_s']:.1f} s, a query {1000 * row['query_s']:.1f} ms, peak {row['peak_bytes'] / 1e6:,.0f} MB, disk {row['disk'] / 1e6:,.1f} MB"
              + (f"; with {methods[0]}: top 10 {row['top_10']:.2f}, top 100 {row['top_100']:.2f}, Spearman {row['spearman']:.3f}" if method != methods[0] else ""), flush=True)
    if {"block", "ekfac"} <= scores.keys():
        a, b = (result["methods"][m] for m in ("block", "ekfac"))
        result["ratio"] = dict(query=b["query_s"] / a["query_s"], once=b["once_s"] / a["once_s"] if a["once_s"] else None, memory=b["peak_bytes"] / a["peak_bytes"],
                               break_even=a["once_s"] / max(1e-9, b["query_s"] - a["query_s"]))
        print(f"a query of ours is {result['ratio']['query']:,.0f} times as fast as EK-FAC's, at {1 / result['ratio']['memory']:.2f} of its peak memory; the index has paid for itself after {result['ratio']['break_even']:.1f} queries")
    save(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
