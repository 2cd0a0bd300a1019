"""What attribution costs: the index against a forward pass, a query against the memory bus.

    python experiments/speed/attribution_speed.py        out/ must be indexed; about 3 minutes

Medians, the sides of a comparison interleaved:

1. the index (records, curvature, blocks) against forward passes with the loss on the same windows
2. bytes per second of a query's postings, over 64 held-out tokens, against the machine's (a sum
   over 512 MB); a posting is its place (8 bytes), a gate (2) and an error vector (2 d)
3. these 64 queries together against one by one, for scores of tokens and of documents
"""
import functools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tools import save_results  # noqa: E402

from attribute import Curvature, Index, records, seen_windows  # noqa: E402
from common import parse_config, run_main  # noqa: E402
from prism import LinearCrossEntropy  # noqa: E402

QUERIES, WINDOWS, MEMORY = 64, 32, 2 ** 27


@dataclass
class SpeedConfig:
    out_dir: str = "out"                                         # the run
    rounds: int = 5                                              # repeats of each side
    out: str = "experiments/results/attribution_speed-cpu.json"  # the result


def interleaved(rounds, *sides):
    """Median seconds of each function, after one call that does not count."""
    seconds = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, spent in zip(sides, seconds):
            begin = time.perf_counter()
            side()
            spent.append(time.perf_counter() - begin)
    return [statistics.median(spent[1:]) for spent in seconds]


def index_cost(run, rounds):
    """Seconds per forward pass over the corpus, and of the parts of the index."""
    model, M = run.model, run.model.config.n_proto
    starts = seen_windows(run.ckpt, len(run.train))
    at = starts[:WINDOWS, None] + np.arange(run.T + 1)
    tokens = torch.from_numpy(run.train[at].astype(np.int64))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    curvature = Curvature(model.W, M)

    def forward():
        LinearCrossEntropy.apply(model.hidden(idx).flatten(0, 1), model.W, targets.flatten())

    def collect():
        curvature.add(records(model, idx, targets))

    def blocks():
        for i in range(8):
            torch.linalg.cholesky(curvature.block(i, 0.1).double())
    seconds = interleaved(rounds, forward, collect, blocks)
    forward_s, records_s = (len(starts) / len(idx) * s for s in seconds[:2])
    blocks_s = seconds[2] * M / 8
    ratio = (records_s + blocks_s) / forward_s
    return {"forward_s": forward_s, "records_s": records_s, "blocks_s": blocks_s, "ratio": ratio}


def main(argv):
    cfg = parse_config(SpeedConfig, argv)
    index = Index(cfg.out_dir, "cpu")
    run, c = index.run, index.run.model.config
    result = {"index": index_cost(run, cfg.rounds)}
    print(f"1. index: {result['index']['ratio']:.2f} forward passes", flush=True)

    # right sides of 64 held-out tokens, each the last of a window of its own
    x, read = torch.zeros(QUERIES, c.n_proto, c.n_embd), 0
    for q in range(QUERIES):
        window = np.resize(run.val, (QUERIES, run.T + 1))[q].tolist()
        r = index.target_records(window, run.T)
        x[q] = index.solve(index.right_side(r)[None])[0]
        live = r.ids[r.gates > 0].numpy()
        read += int((index.start[live + 1] - index.start[live]).sum())
    memory = torch.ones(MEMORY)

    def ask(queries_at_once, level):
        for part in x.split(queries_at_once):
            for scores in index.token_scores(part):
                index.sums(scores, level)
    sides = [(1, "token"), (QUERIES, "token"), (1, "document"), (QUERIES, "document")]
    asked = [functools.partial(ask, *side) for side in sides]
    seconds = interleaved(cfg.rounds, *asked, memory.sum)
    one, together, one_documents, together_documents, bus = seconds
    speed, machine = read * (10 + 2 * c.n_embd) / one, 4 * memory.numel() / bus
    result["bandwidth"] = {"machine_gb_s": machine / 1e9, "postings_gb_s": speed / 1e9,
                           "postings_share": speed / machine, "token_ms": 1000 * one / QUERIES,
                           "document_ms": 1000 * one_documents / QUERIES}
    result["batch"] = {"token": {"ratio": one / together},
                       "document": {"ratio": one_documents / together_documents}}
    print(f"2. {result['bandwidth']}\n3. {result['batch']}")
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
