"""What do prototypes cost in validation loss? Default preset against its dense twin, and the table the defaults come from.

    python experiments/quality.py                               3 seeds, pydoc
    python experiments/quality.py --datasets=pydoc,books        also your own dataset named books
    python experiments/quality.py --grid=true                   loss weights, k and M at one seed; the picture is their Pareto curve

Each finished run is written to experiments/results/quality.json at once; a run that is there is not repeated. Runs use one
thread each, as many at a time as there are cores. The last line: the default preset's validation loss against the mean of
the dense twin's (goal: within 1%), the same without the residual (goal: within 4%), and the fewest live prototypes.
"""
import csv
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, kept, save  # noqa: E402

from prism import UserError, atomic, parse_config, run_main  # noqa: E402
from train import TrainConfig  # noqa: E402

GRID = [  # options beside the defaults, one seed, pydoc
    "--lambda_rec=1", "--lambda_rec=.3",
    "--lambda_rec=.03", "--lambda_t2p=0", "--lambda_p2t=0", "--lambda_p2t=.1",
    "--top_k=4", "--top_k=8", "--top_k=8 --n_proto=2048", "--n_proto=512", "--proto_lr_scale=1", "--proto_lr_scale=10", "--head_share=1",
]


@dataclass
class QualityConfig:
    datasets: str = "pydoc"          # prepared datasets, separated by commas
    seeds: int = 3                   # runs of each side
    grid: bool = False               # the table over loss weights, k and M instead
    options: str = ""                # more options for every run of train.py, as one string
    results: str = str(ROOT / "experiments/results/quality.json")  # where figures are kept


def train(dataset, seed, options):
    """One run of train.py in a temporary folder -> the row of metrics.csv with the best validation loss."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, str(ROOT / "train.py"), f"--dataset={dataset}", f"--seed={seed}", f"--out_dir={out}/run", *options.split()]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"{' '.join(words[1:])} failed:\n{done.stderr[-2000:]}")
        with open(f"{out}/run/metrics.csv", newline="") as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        return min(rows, key=lambda r: r["val_ce"])


def main(argv):
    cfg = parse_config(QualityConfig, argv)
    path = Path(cfg.results)
    if cfg.seeds < 1 or "n_proto" in cfg.options and parse_config(TrainConfig, cfg.options.split()).n_proto == 0:
        raise UserError(f"seeds is {cfg.seeds}, options {cfg.options!r}; expected at least 1, and options of a model with prototypes, whose dense twin is trained beside it")
    results = {"runs": {}, "against dense": {}} | kept(path)
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one thread a run"
    todo, one = [], Lock()
    for dataset in cfg.datasets.split(","):
        for seed in range(1, 2 if cfg.grid else cfg.seeds + 1):
            for options in ["", "--n_proto=0", *GRID] if cfg.grid else ["", "--n_proto=0"]:
                todo.append((dataset, seed, f"{options} {cfg.options}".strip()))

    def key_of(job):  # the defaults belong to a run's identity: a figure of other defaults is never shown for these
        dataset, seed, options = job
        full = asdict(parse_config(TrainConfig, options.split())) | dict(dataset=dataset, seed=seed)
        return f"{Path(dataset).name} seed {seed} {options or 'default'} #{hashlib.sha256(json.dumps(full).encode()).hexdigest()[:8]}"

    def work(job):
        key = key_of(job)
        if key not in results["runs"]:
            row = train(*job)
            with one:
                results["runs"][key] = row
                save(path, results)
            print(f"{key:<60} val_ce {row['val_ce']:.4f}", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, todo))

    default, grids = [], {}  # the first: of cfg.options alone, dataset, loss and loss without residual against dense, fewest live prototypes
    for dataset in cfg.datasets.split(","):
        jobs = [j for j in todo if j[0] == dataset]
        print(f"\n{dataset}, {len({j[1] for j in jobs})} seeds\n| options | validation ce | against the dense twin | without residual | against the dense twin "
              "| residual share | live |\n|---|---|---|---|---|---|---|")
        rows = {o: [results["runs"][key_of(j)] for j in jobs if j[2] == o] for o in dict.fromkeys(j[2] for j in jobs)}
        dense = statistics.mean(r["val_ce"] for r in rows[f"--n_proto=0 {cfg.options}".strip()])
        for options, group in rows.items():
            def mean(key):
                return statistics.mean(r[key] for r in group)
            spread = f" +- {statistics.stdev(r['val_ce'] for r in group):.3f}" if len(group) > 1 else ""
            head = f"{mean('val_ce_prototypes'):.3f} | {mean('val_ce_prototypes') / dense - 1:+.2%} | {mean('residual_share'):.3f} | " \
                   f"{min(r['live'] for r in group):.0f}" if "val_ce_prototypes" in group[0] else "| | |"
            print(f"| {options or 'default'} | {mean('val_ce'):.3f}{spread} | {mean('val_ce') / dense - 1:+.2%} | {head} |")
            if cfg.grid and "val_ce_prototypes" in group[0]:
                grids.setdefault(Path(dataset).name, {})[options.removesuffix(cfg.options).strip() or "default"] = dict(
                    loss=mean("val_ce") / dense - 1, without_residual=mean("val_ce_prototypes") / dense - 1, residual_share=mean("residual_share"), live=min(r["live"] for r in group))
            if options == cfg.options.strip():
                default.append(dict(dataset=Path(dataset).name, loss=mean("val_ce") / dense - 1, without_residual=mean("val_ce_prototypes") / dense - 1,
                                    live=min(r["live"] for r in group), seeds=len(group), residual_share=mean("residual_share"), losses=[r["val_ce"] for r in group],
                                    losses_prototypes=[r["val_ce_prototypes"] for r in group], losses_dense=[r["val_ce"] for r in rows[f"--n_proto=0 {cfg.options}".strip()]]))
    if cfg.grid:
        results["grid"] = dict(options=cfg.options, rows=grids)
        picture(grids, path.with_name("quality-grid.png"))
    else:
        results["against dense"] |= {f"{d['dataset']} {cfg.options}".strip(): d for d in default}
    save(path, results)
    print("PRISM against dense: " + "; ".join(f"{d['dataset']} {d['loss']:+.2%}, without residual {d['without_residual']:+.2%}, live {d['live']:.0f}" for d in default))


def pareto(points):
    """points {name: (x, y)} -> names, by x, that no other point beats: at least as low in both, lower in one."""
    return sorted((n for n, p in points.items() if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())), key=lambda n: points[n])


def picture(grid, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(grid), figsize=(8 * len(grid), 5.5), layout="constrained", squeeze=False)
    for ax, (dataset, rows) in zip(axes[0], grid.items()):
        points = {n: (100 * v["loss"], 100 * v["without_residual"]) for n, v in rows.items()}
        ax.scatter(*zip(*points.values()), color="#0072B2")
        ax.plot(*zip(*(points[n] for n in pareto(points))), color="#E69F00", label="Pareto curve")
        for n, (x, y) in points.items():
            ax.annotate(n.replace("--", ""), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        ax.margins(x=0.15)
        ax.set(xlabel="validation loss against the dense twin, %", ylabel="loss without the residual against the dense twin, %", title=dataset)
        ax.legend()
    with atomic(path) as f:
        fig.savefig(f, dpi=110, format="png")
    plt.close(fig)


if __name__ == "__main__":
    run_main(main)
