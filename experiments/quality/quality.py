"""What do prototypes cost in validation loss? PRISM beside its dense twin, over several seeds.

    python experiments/quality/quality.py                           pydoc, 3 seeds, about an hour
    python experiments/quality/quality.py --datasets=pydoc,books    also a dataset of your own

    loss              mean of PRISM's best val_ce / mean of the dense twin's - 1     goal: 1%
    without residual  the same with the logits W zhat instead of W z                 goal: 4%

Runs use one thread each, as many at a time as there are cores. A finished run is not repeated.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import save_results, trained  # noqa: E402

from common import load_tensors, parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402
from train import TrainConfig  # noqa: E402

SIDES = {"PRISM": [], "dense": ["--n_proto=0"]}


@dataclass
class QualityConfig:
    datasets: str = "pydoc"          # prepared datasets, separated by commas
    seeds: int = 3                   # runs of each side
    options: str = ""                # more options of train.py for all runs, as one string
    work: str = "out-quality"        # the runs go here
    out: str = "experiments/results/quality.json"  # the result


def compare(dataset, prism, dense):
    """The metrics of both sides, a dict per seed -> what RESULTS.md shows."""
    losses = [m["val_ce"] for m in prism]
    without = [m["val_ce_prototypes"] for m in prism]
    losses_dense = [m["val_ce"] for m in dense]
    return {
        "dataset": dataset,
        "seeds": len(prism),
        "loss": mean(losses) / mean(losses_dense) - 1,
        "without_residual": mean(without) / mean(losses_dense) - 1,
        "residual_share": mean(m["residual_share"] for m in prism),
        "live": min(m["live"] for m in prism),
        "losses": losses,
        "losses_prototypes": without,
        "losses_dense": losses_dense,
    }


def main(argv):
    cfg = parse_config(QualityConfig, argv)
    if cfg.seeds < 1 or not parse_config(TrainConfig, cfg.options.split()).n_proto:
        raise UserError(f"seeds is {cfg.seeds}, options {cfg.options!r}; expected at least 1, and "
                        "a model with prototypes: its dense twin is trained beside it")
    os.environ["OMP_NUM_THREADS"] = "1"
    datasets = cfg.datasets.split(",")
    seeds = range(1, cfg.seeds + 1)

    def run(job):
        dataset, side, seed = job
        words = [f"--dataset={dataset}", f"--seed={seed}", *SIDES[side], *cfg.options.split()]
        out = trained(Path(cfg.work) / f"{Path(dataset).name}-{side}-{seed}", *words)
        found = load_tensors(out / "ckpt.pt")["rows"][-1]         # where the loss was lowest
        print(f"{out}: val_ce {found['val_ce']:.4f}", flush=True)
        return found

    jobs = [(d, side, seed) for d in datasets for side in SIDES for seed in seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        metrics = dict(zip(jobs, pool.map(run, jobs)))

    found = {}
    for dataset in datasets:
        sides = [[metrics[dataset, side, seed] for seed in seeds] for side in SIDES]
        x = compare(Path(dataset).name, *sides)
        found[x["dataset"]] = x
        print(f"{x['dataset']}: PRISM against dense {x['loss']:+.2%}, without the residual "
              f"{x['without_residual']:+.2%}, live prototypes {x['live']:.0f}")
    save_results(cfg.out, {"options": asdict(cfg), "against dense": found})


if __name__ == "__main__":
    run_main(main)
