"""What do prototypes cost in validation loss? PRISM beside its dense twin, over several seeds.

    python experiments/quality/quality.py                           pydoc, 3 seeds, two hours
    python experiments/quality/quality.py --datasets=pydoc,books    also a dataset of your own
    python experiments/quality/quality.py --work=out-adamw --out=experiments/results/adamw.json \\
        --options="--muon=false --learning_rate=0.002 --embed_lr_scale=4 --proto_lr_scale=10"

Goals: PRISM's loss within 1% of the dense twin's, the loss of the logits W zhat within 2% of
PRISM's own, a residual's share of at most 0.12, no dead prototype. The last command trains with
AdamW, at the best rates of NOTES.md. Runs use one thread each; a finished run is not repeated.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
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


def compare(prism, dense):
    """The metrics of both sides, a dict per seed -> what RESULTS.md shows."""
    losses = [m["val_ce"] for m in prism]
    without = [m["val_ce_prototypes"] for m in prism]
    losses_dense = [m["val_ce"] for m in dense]
    return {
        "seeds": len(prism),
        "loss": mean(losses) / mean(losses_dense) - 1,
        "without_residual": mean(without) / mean(losses_dense) - 1,
        "without_against_own": mean(without) / mean(losses) - 1,
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
        best = load_tensors(out / "ckpt.pt")["rows"][-1]          # where the loss was lowest
        print(f"{out}: val_ce {best['val_ce']:.4f}", flush=True)
        return best

    jobs = list(product(datasets, SIDES, seeds))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        metrics = dict(zip(jobs, pool.map(run, jobs)))

    found = {}
    for dataset in datasets:
        sides = [[metrics[dataset, side, seed] for seed in seeds] for side in SIDES]
        x = compare(*sides)
        found[Path(dataset).name] = x
        print(f"{dataset}: PRISM against dense {x['loss']:+.2%}, without the residual "
              f"{x['without_against_own']:+.2%} against its own, residual_share "
              f"{x['residual_share']:.3f}, live {x['live']}")
    save_results(cfg.out, {"options": asdict(cfg), "against dense": found})


if __name__ == "__main__":
    run_main(main)
