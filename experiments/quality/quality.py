"""What do prototypes cost in validation loss? PRISM beside its dense twin, over several seeds.

    python experiments/quality/quality.py                           pydoc, 3 seeds, two hours
    python experiments/quality/quality.py --datasets=pydoc,books    also a dataset of your own

Goals: the mean of PRISM's best losses within 1% of the dense twin's, the loss of the logits W zhat,
without the residual, within 2% of PRISM's own, the residual's share of |z|^2 at most 0.12, and no
dead prototype. AdamW for all weights, with options of its own, is measured beside the default.
Runs use one thread each, as many at a time as there are cores. A finished run is not repeated.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import save_results, trained  # noqa: E402

from common import load_tensors, parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402
from train import TrainConfig  # noqa: E402

ADAMW = "--muon=false --learning_rate=0.002 --embed_lr_scale=4 --proto_lr_scale=10"


@dataclass
class QualityConfig:
    datasets: str = "pydoc"          # prepared datasets, separated by commas
    seeds: int = 3                   # runs of each side
    options: str = ""                # more options of train.py for all runs, as one string
    adamw: str = ADAMW               # options of the runs with AdamW; empty leaves these out
    work: str = "out-quality"        # the runs go here
    out: str = "experiments/results/quality.json"  # the result


def compare(prism, dense):
    """The metrics of both sides, a dict per seed -> what RESULTS.md shows."""
    losses = [m["val_ce"] for m in prism]
    without = [m["val_ce_prototypes"] for m in prism]
    losses_dense = [m["val_ce"] for m in dense]
    by_seed = [a / b - 1 for a, b in zip(losses, losses_dense)]
    return {
        "seeds": len(prism),
        "loss": mean(losses) / mean(losses_dense) - 1,
        "loss_spread": stdev(by_seed) if len(by_seed) > 1 else None,
        "without_residual": mean(without) / mean(losses_dense) - 1,
        "without_against_own": mean(without) / mean(losses) - 1,
        "residual_share": mean(m["residual_share"] for m in prism),
        "live": min(m["live"] for m in prism),
        "dead": max(m["n_proto"] - m["live"] for m in prism),
        "losses": losses,
        "losses_prototypes": without,
        "losses_dense": losses_dense,
    }


def measure(cases, seeds, work):
    """{name: (options of train.py, the name of the case whose dense twin it is compared with)} ->
    {name: what compare finds}. Trains what is missing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    runs, found = {}, {}
    for (name, (options, twin)), seed in product(cases.items(), seeds):
        runs[name, "PRISM", seed] = [*options, f"--seed={seed}"]
        if twin == name:
            runs[name, "dense", seed] = [*options, f"--seed={seed}", "--n_proto=0"]

    def run(key):
        out = trained(Path(work) / "{}-{}-{}".format(*key).replace(" ", ""), *runs[key])
        ckpt = load_tensors(out / "ckpt.pt")
        best = ckpt["rows"][-1]                                   # where the loss was lowest
        print(f"{out}: val_ce {best['val_ce']:.4f}", flush=True)
        return best | {"n_proto": ckpt["config"]["n_proto"]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        metrics = dict(zip(runs, pool.map(run, runs)))
    for name, (_, twin) in cases.items():
        prism = [metrics[name, "PRISM", seed] for seed in seeds]
        x = compare(prism, [metrics[twin, "dense", seed] for seed in seeds])
        found[name] = x
        print(f"{name}: PRISM against dense {x['loss']:+.2%}, without the residual "
              f"{x['without_against_own']:+.2%} against its own, residual_share "
              f"{x['residual_share']:.3f}, live {x['live']}, dead {x['dead']}")
    return found


def main(argv):
    cfg = parse_config(QualityConfig, argv)
    if cfg.seeds < 1 or not parse_config(TrainConfig, cfg.options.split()).n_proto:
        raise UserError(f"seeds is {cfg.seeds}, options {cfg.options!r}; expected at least 1, and "
                        "a model with prototypes: its dense twin is trained beside it")
    cases = {}
    for dataset in cfg.datasets.split(","):
        name, options = Path(dataset).name, [f"--dataset={dataset}", *cfg.options.split()]
        cases[name] = options, name
        if cfg.adamw:
            cases[f"{name}, AdamW"] = [*options, *cfg.adamw.split()], f"{name}, AdamW"
    found = measure(cases, range(1, cfg.seeds + 1), cfg.work)
    save_results(cfg.out, {"options": asdict(cfg), "against dense": found})


if __name__ == "__main__":
    run_main(main)
