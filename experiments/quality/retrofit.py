"""Prototypes attached to a trained dense model and trained a little, beside PRISM from scratch.

    python experiments/quality/retrofit.py           an hour on 2 cores

Each recipe, a set of options of train.py, trains three models further: the dense twin with
prototypes, PRISM, and the dense twin as it is, so that the price of prototypes stands apart from
the gain of more training. The first two models of the recipe with the lowest loss are then
suppressed by interventions/suppression.py.

    against_scratch = val_ce of the dense twin with prototypes / val_ce of PRISM - 1
"""
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality import best_metrics  # noqa: E402
from tools import ROOT, options_of, read_results, save_results, trained  # noqa: E402

from common import load_checkpoint, parse_config, run_main  # noqa: E402

RECIPES = ("--max_iters=100 --learning_rate=0.000002 --min_lr=0.0000002 --proto_lr_scale=10000;"
           "--max_iters=100 --learning_rate=0.001;--max_iters=300 --learning_rate=0.001")


@dataclass
class RetrofitConfig:
    out_dir: str = "out"             # PRISM from scratch
    recipes: str = RECIPES           # options of train.py for more training, with ; between
    behavior: str = ">>>"            # is suppressed; empty: left out
    work: str = "out-retrofit"       # runs go here
    out: str = "experiments/results/retrofit.json"  # the result


def suppressed(cfg, name, out_dir):
    """The result of suppression.py for a run."""
    script = ROOT / "experiments/interventions/suppression.py"
    out = Path(cfg.work) / f"suppression-{name}.json"
    words = f"--only={name}", f"--behavior={cfg.behavior}", f"--out_dir={out_dir}", f"--out={out}"
    subprocess.run([sys.executable, script, *words], check=True)
    found = read_results(out)
    return {key: found[key] for key in ("behavior", "found", "sides")}


def main(argv):
    cfg = parse_config(RetrofitConfig, argv)
    options = options_of(load_checkpoint(cfg.out_dir)[1])
    dense = trained(Path(cfg.work) / "dense", *options, "--n_proto=0")
    models = {"retrofitted": (dense, []), "PRISM, trained on": (cfg.out_dir, []),
              "dense, trained on": (dense, ["--n_proto=0"])}
    sides = {"PRISM from scratch": best_metrics(cfg.out_dir), "dense": best_metrics(dense)}
    runs, losses = {}, {name: {} for name in models}
    for number, recipe in enumerate(cfg.recipes.split(";")):
        more = ["--eval_interval=100", "--warmup_iters=10", *recipe.split()]
        for name, (start, words) in models.items():
            out = Path(cfg.work) / f"{name.split(',')[0]}-{number}"
            runs[name, recipe] = trained(out, *options, *more, *words, f"--init_from={start}")
            sides[f"{name}: {recipe}"] = found = best_metrics(out)
            losses[name][recipe] = found["val_ce"]
    best = min(losses["retrofitted"], key=losses["retrofitted"].get)
    against = losses["retrofitted"][best] / losses["PRISM, trained on"][best] - 1
    for name, side in sides.items():
        side["against_dense"] = side["val_ce"] / sides["dense"]["val_ce"] - 1
        print(f"{name}: loss {side['val_ce']:.4f}, {side['against_dense']:+.2%} against dense")
    result = {"options": asdict(cfg), "sides": sides, "recipe": best, "against_scratch": against}
    if cfg.behavior:
        result["suppression"] = {}
        for name in ("retrofitted", "PRISM, trained on"):
            found = suppressed(cfg, name.split(",")[0], runs[name, best])
            result["suppression"][name] = found
    save_results(cfg.out, result)
    print(f"retrofitted against from scratch, trained on alike: {against:+.2%}")


if __name__ == "__main__":
    run_main(main)
