"""What attribution costs: the index against a forward pass, a query against the size of the corpus, and what sharing gains.

    python experiments/attribution_speed.py                 out/ must be trained and indexed; about 3 minutes
    python experiments/attribution_speed.py --quick         under a minute

Four measurements, each with its two sides interleaved in one run, medians of `rounds`:
1. the index's pass (records, curvature sums, writing apart) and its blocks, against forward passes over the same windows;
2. a query's scan of its k posting lists on generated indexes of 10^4 to 10^7 postings, against a scan of all of them;
3. bytes a second on out/'s index, of the posting lists (token scores) and of the documents' sums, over 64 real query tokens one by
   one, against the machine's read bandwidth (a sum over 512 MB); document scores from sums against those from posting lists;
4. queries a second, 64 together against one by one, with the same query tokens, beside the lists that they read one by one and together.
"""
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from attribute import Builder, Curvature, Index, IndexConfig, Run, Targets  # noqa: E402
from prism import LinearCrossEntropy, atomic, parse_config, run_main  # noqa: E402


@dataclass
class SpeedConfig:
    out_dir: str = "out"                                         # the run
    rounds: int = 5                                              # repeats of each side
    quick: bool = False                                          # fewer and smaller
    out: str = "experiments/results/attribution_speed-cpu.json"  # the result


def timed(f):
    t0 = time.perf_counter()
    f()
    return time.perf_counter() - t0


def interleaved(rounds, *sides):
    """Medians of each side's seconds, after one turn that does not count."""
    for f in sides:
        f()
    return [statistics.median(u) for u in zip(*([timed(f) for f in sides] for _ in range(rounds)))]


def generated(real, postings, seed=0):
    """An Index like `real` with so many postings: random prototypes a token, the run's k and M, error vectors in memory."""
    index = object.__new__(Index)
    rng, meta = np.random.default_rng(seed), real.meta
    M, k, d = meta["n_proto"], meta["top_k"], meta["n_embd"]
    N = max(1, postings // k)
    index.meta, index.run, index.weights, index.basis, index.factors = meta | {"sites": N, "pairs": 0}, real.run, real.weights, real.basis, real.factors
    index.errors_t = torch.randn(N, d).half()
    protos = (rng.integers(M, size=(N, 1)) + rng.permutation(M)[:k]) % M                          # k different ones a token
    order = np.argsort(protos.ravel(), kind="stable")
    index.post_sites, index.post_gates = (order // k).astype(np.uint32), np.full(N * k, 0.4, np.float16)
    index.post_start = np.concatenate(([0], np.bincount(protos.ravel(), minlength=M).cumsum()))
    index.site_doc = np.arange(N) * len(real.run.titles) // N
    index.units = real.units | {"token": N}
    return index


def main(argv):
    cfg = parse_config(SpeedConfig, argv)
    run, index = Run(cfg.out_dir, "cpu"), Index(cfg.out_dir, "cpu")
    M, k, W = index.meta["n_proto"], index.meta["top_k"], index.W
    rounds, result = 3 if cfg.quick else cfg.rounds, dict(command=" ".join(["python experiments/attribution_speed.py", *argv]), torch=torch.__version__,
                                                          machine=f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")

    # 1. the index against forward passes
    builder = Builder(run, IndexConfig(out_dir=cfg.out_dir))
    curvature, starts = Curvature(W, M), builder.starts[:builder.rows]

    @torch.no_grad()
    def forward():
        idx, targets = run.windows(starts)
        LinearCrossEntropy.apply(run.model.hidden(idx).flatten(0, 1), W, targets.flatten()).item()

    def blocks():
        for i in range(8):
            torch.linalg.cholesky(curvature.block(i, 0.1).double())
    f, b, c = interleaved(rounds, forward, lambda: builder.batch(starts, curvature), blocks)
    batches = len(builder.starts) / len(starts)
    result["index"] = dict(forward_s=f * batches, records_s=b * batches, blocks_s=c * M / 8, ratio=(b * batches + c * M / 8) / (f * batches))
    print(f"1. forward pass {f * batches:.1f} s; index {b * batches:.1f} s for records and sums + {c * M / 8:.1f} s for blocks: "
          f"{result['index']['ratio']:.2f} forward passes", flush=True)

    # 2. a query against the size of the corpus
    text = np.resize(run.val, (64, run.T + 1))
    every = [index.targets(row[:2 + i % (run.T - 1)].tolist(), 1 + i % (run.T - 1)) for i, row in enumerate(text)]
    rng, result["size"] = np.random.default_rng(1), []
    for n in (10 ** 4, 10 ** 5, 10 ** 6) if cfg.quick else (10 ** 4, 10 ** 5, 10 ** 6, 3 * 10 ** 6, 10 ** 7):
        made = generated(index, n)
        t = Targets([0], torch.from_numpy(rng.permutation(M)[:k])[None], torch.full((1, k), 0.4), torch.randn(1, index.meta["n_embd"]), None)
        u = torch.randn(1, k, index.meta["n_embd"])
        lists = torch.arange(M)[None]
        all_t, all_u = Targets([0], lists, torch.full((1, M), 0.4), None, None), torch.randn(1, M, index.meta["n_embd"])
        q, a = interleaved(rounds, lambda: made.scan(t, u, "token"), lambda: made.scan(all_t, all_u, "token"))
        read = int(sum(made.post_start[i + 1] - made.post_start[i] for i in t.ids[0]))
        result["size"].append(dict(postings=len(made.post_sites), read=read, query_s=q, full_scan_s=a, share_of_postings=read / len(made.post_sites), ratio=q / a))
        print(f"2. {len(made.post_sites):>10,} postings: query {q * 1e3:8.2f} ms, all {a * 1e3:9.1f} ms, ratio {q / a:.4f}; k/M {k / M:.4f}", flush=True)
    read_n, query_s = (np.array([r[c] for r in result["size"]]) for c in ("read", "query_s"))
    slope, start = np.polyfit(read_n, query_s, 1, w=1 / query_s)
    result["line"] = dict(ns_a_posting=slope * 1e9, start_ms=start * 1e3, largest_relative_error=float(np.abs((slope * read_n + start) / query_s - 1).max()))
    print(f"   straight line: {start * 1e3:.2f} ms + {slope * 1e9:.0f} ns a posting read, off by at most {result['line']['largest_relative_error']:.0%}")

    # 3. bandwidth, over real query tokens
    big = torch.ones(2 ** 25 if cfg.quick else 2 ** 27)
    solved, whole = [index.solve(e) for e in every], index.meta["pairs"]

    def scan_each(level):
        for e, u in zip(every, solved):
            index.scan(e, u, level)

    def from_postings():
        index.meta["pairs"] = 0
        scan_each("document")
        index.meta["pairs"] = whole
    p, d, o, m = interleaved(rounds, lambda: scan_each("token"), lambda: scan_each("document"), from_postings, lambda: big.sum())
    machine = big.numel() * 4 / m

    def read(start, row):
        return row * sum(int(start[i + 1] - start[i]) for e in every for i in e.ids[0][e.gates[0] > 0])
    rank = index.meta["rank"]
    sizes = dict(postings=read(index.post_start, 2 * rank + index.post_sites.itemsize + 2), sums=read(index.pair_start, 4 * rank + 4) if whole else 0)
    result["bandwidth"] = dict(machine_gb_s=machine / 1e9, postings_gb_s=sizes["postings"] / p / 1e9, sums_gb_s=sizes["sums"] / d / 1e9,
                               postings_share=sizes["postings"] / p / machine, sums_share=sizes["sums"] / d / machine, token_ms=p / 64 * 1e3,
                               document_ms=d / 64 * 1e3, document_from_postings_ms=o / 64 * 1e3, sums_over_postings=o / d)
    x = result["bandwidth"]
    print(f"3. the machine reads {machine / 1e9:.1f} GB/s in order; posting lists {x['postings_gb_s']:.1f} GB/s ({x['postings_share']:.2f}), documents' sums {x['sums_gb_s']:.1f} GB/s "
          f"({x['sums_share']:.2f}); a query's tokens {x['token_ms']:.2f} ms, documents {x['document_ms']:.2f} ms, {x['sums_over_postings']:.0f} times as fast as from postings", flush=True)

    # 4. queries together
    both = Targets([], *(torch.cat([getattr(e, n) for e in every]) for n in ("ids", "gates", "errors", "loss")))
    lists = [set(e.ids[0][e.gates[0] > 0].tolist()) for e in every]
    result["batch"] = dict(lists_one_by_one=sum(map(len, lists)), lists_together=len(set().union(*lists)))
    for level in ("document", "token"):
        one, many = interleaved(rounds, lambda: [index.scan(e, index.solve(e), level) for e in every], lambda: index.scan(both, index.solve(both), level))
        result["batch"][level] = dict(one_by_one_s=one, together_s=many, ratio=one / many)
        print(f"4. 64 queries, {level}s: {64 / one:.0f} a second one by one, {64 / many:.0f} together, {one / many:.1f} times; "
              f"they read {result['batch']['lists_one_by_one']} lists one by one, {result['batch']['lists_together']} together", flush=True)
    with atomic(cfg.out, "w") as f:
        json.dump(result, f, indent=1)
    print(f"index {result['index']['ratio']:.2f} forward passes; query at 10^{round(np.log10(read_n[-1] * M / k))} postings {query_s[-1] * 1e3:.0f} ms; scan at {result['bandwidth']['postings_share']:.2f} "
          f"of the read bandwidth, {result['bandwidth']['sums_share']:.2f} for documents; 64 together {result['batch']['document']['ratio']:.1f} times one by one")


if __name__ == "__main__":
    run_main(main)
