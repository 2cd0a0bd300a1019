"""What a smaller index loses: fewer directions of the error vectors, fewer postings, fewer windows, against the whole index.

    python experiments/attribution_small.py            out/ must be trained and indexed; a minute for each setting

Document scores of single held-out tokens (block) by each index against the whole one: the mean Pearson r over query tokens, the
share of the whole index's ten best documents that are among its ten best, and the size on disk. Finished settings are kept.
"""
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402

import attribute  # noqa: E402
from prism import atomic, parse_config, run_main  # noqa: E402

SETTINGS = "--rank=96", "--rank=48", "--rank=24", "--cap=3000", "--cap=1000", "--max_tokens=200000", "--rank=48 --cap=3000"


@dataclass
class SmallConfig:
    out_dir: str = "out"                                  # the run
    settings: str = ";".join(SETTINGS)                    # options of attribute.py index, separated by semicolons
    queries: int = 64                                     # held-out tokens
    out: str = "experiments/results/attribution_small.json"  # the result


def document_scores(index, queries):
    """-> (queries, documents): block scores of one token in the middle of each of so many held-out windows."""
    T = index.run.T
    rows = [index.run.val[i * T:i * T + T // 2].tolist() for i in range(min(queries, len(index.run.val) // T))]
    targets = [index.targets(row, len(row) - 1) for row in rows]
    return np.concatenate([index.scan(t, index.solve(t), "document") for t in targets])


def size(folder):
    return sum(p.stat().st_size for p in (Path(folder) / "attribution").iterdir() if p.name != "roots.bin")


def main(argv):
    cfg = parse_config(SmallConfig, argv)
    whole = attribute.Index(cfg.out_dir, "cpu")
    key = dict(checkpoint=whole.run.hash, mu=whole.meta["mu"], queries=cfg.queries)
    try:
        result = json.loads(Path(cfg.out).read_text("utf-8"))
        assert result["key"] == key
    except (OSError, ValueError, KeyError, AssertionError):
        result = dict(key=key, machine=f"{platform.machine()}, {os.cpu_count()} cores", command="python experiments/attribution_small.py", settings={})
    reference, full_size = document_scores(whole, cfg.queries), size(cfg.out_dir)
    best = np.argsort(-reference, axis=1)[:, :10]
    for setting in cfg.settings.split(";"):
        if setting not in result["settings"]:
            with tempfile.TemporaryDirectory() as folder:
                for name in ("ckpt.pt", "tokenizer.tiktoken", "tokenizer.json"):
                    os.symlink((Path(cfg.out_dir) / name).resolve(), Path(folder) / name)
                attribute.main(["index", f"--out_dir={folder}", f"--mu={whole.meta['mu']}", *setting.split()])
                scores = document_scores(attribute.Index(folder, "cpu"), cfg.queries)
                kept = np.argsort(-scores, axis=1)[:, :10]
                result["settings"][setting] = dict(r=float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores, reference)])), bytes=size(folder),
                                                   overlap=float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(kept, best)])))
            with atomic(cfg.out, "w") as f:
                json.dump(result, f, indent=1)
    for setting, x in result["settings"].items():
        print(f"{setting:>24}: r {x['r']:.3f}, {x['overlap']:.0%} of the ten best documents, {x['bytes'] / full_size:.0%} of the disk")
    worst = min(result["settings"].items(), key=lambda u: u[1]["r"])
    print(f"smallest agreement with the whole index: r {worst[1]['r']:.3f} at {worst[0]}")


if __name__ == "__main__":
    run_main(main)
