"""Prototypes attached to a dense model that is already trained, and trained on a little, against PRISM from scratch: loss, and turning a behavior down.

    python experiments/retrofit.py                      about half an hour on 2 cores
    python experiments/lds.py --retrofit="--max_iters=50 --learning_rate=0.001 --warmup_iters=5" --models=16 --again=0 --removals=0 --methods=block,gradient,cosine \\
        --work=out-lds-retrofit --out=experiments/results/lds-retrofit.json           does its influence predict retraining?

The dense twin of --out_dir, of the same seed and windows, is the start. Each recipe is a set of options of train.py; beside each stand the dense twin and PRISM from scratch
trained on with the same options, so that what the prototypes cost is told apart from what more training gives: the figure is that against the latter, of the recipe
with the lowest loss. That model is then turned down for --behavior as experiments/suppression.py does it, and so is the run from scratch, trained on.
"""
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine, options_of, save, trained  # noqa: E402
from suppression import SuppressionConfig, study  # noqa: E402

from prism import UserError, load_checkpoint, parse_config, read_metrics, run_main  # noqa: E402
from suppress import compiled  # noqa: E402


RECIPES = ("--max_iters=100 --learning_rate=0.000002 --min_lr=0.0000002 --proto_lr_scale=10000 --warmup_iters=10;"  # the trunk all but stands still
           "--max_iters=100 --learning_rate=0.001 --warmup_iters=10;--max_iters=300 --learning_rate=0.001 --warmup_iters=10")


@dataclass
class RetrofitConfig:
    out_dir: str = "out"             # PRISM from scratch
    dense: str = "out-dense-1"       # its dense twin, trained here if need be
    recipes: str = RECIPES           # sets of options of train.py, with ; between
    train: str = ""                  # options for all of these runs, beyond those of the first
    behavior: str = ">>>"            # is turned down; empty: left out
    prompts: int = 512               # sampled beginnings of each side
    suppress: str = ""               # more options of suppression.py, as one string
    work: str = "out-retrofit"       # runs go here
    out: str = "experiments/results/retrofit.json"  # the result


def best(out):
    """The row of metrics.csv that ckpt.pt holds -> a dict."""
    rows = read_metrics(Path(out) / "metrics.csv")
    if not rows:
        raise UserError(f"{out}/metrics.csv is missing or empty; train the run with train.py")
    row = min(rows, key=lambda r: r["val_ce"])
    return {k: row[k] for k in ("val_ce", "val_ce_prototypes", "residual_share", "live", "tokens") if row.get(k) is not None}


def main(argv):
    cfg = parse_config(RetrofitConfig, argv)
    recipes = [r.strip() for r in cfg.recipes.split(";") if r.strip()]
    if not recipes or cfg.prompts < 2:
        raise UserError(f"recipes={cfg.recipes!r}, prompts={cfg.prompts}; expected at least one recipe and 2 beginnings")
    model, ckpt = load_checkpoint(cfg.out_dir, "cpu")
    if not model.config.n_proto:
        raise UserError(f"{cfg.out_dir} holds a dense model; expected one with prototypes")
    compiled(cfg.behavior) if cfg.behavior else None
    try:
        more = shlex.split(cfg.suppress)
    except ValueError as e:
        raise UserError(f"suppress={cfg.suppress}: {e}") from None
    words = [f"--prompts={cfg.prompts}", f"--out={cfg.work}", *more]
    parse_config(SuppressionConfig, words)
    common = [*options_of(ckpt), *cfg.train.split()]
    dense = trained(cfg.dense, *common, "--n_proto=0")
    if load_checkpoint(dense, "cpu")[1]["data"] != ckpt["data"]:
        raise UserError(f"{dense} was trained on other text than {cfg.out_dir}; remove it, and {cfg.work}, and run again")
    sides = {"PRISM from scratch": best(cfg.out_dir), "dense": best(dense)}
    result, runs = dict(options=asdict(cfg), machine=machine(), sides=sides), {}
    for n, recipe in enumerate(recipes, 1):
        runs[n] = {}
        for name, start, options in (("retrofitted", dense, []), ("PRISM, trained on", cfg.out_dir, []), ("dense, trained on", dense, ["--n_proto=0"])):
            runs[n][name] = out = trained(Path(cfg.work) / f"{name.split(',')[0]}-{n}", *common, "--eval_interval=100", *recipe.split(), *options, f"--init_from={start}")
            sides[f"{name}: {recipe}"] = best(out)
    for name, x in sides.items():
        x["against_dense"] = x["val_ce"] / sides["dense"]["val_ce"] - 1
        print(f"{name}: loss {x['val_ce']:.4f} ({x['against_dense']:+.2%} against dense)"
              + (f", without the residual {x['val_ce_prototypes']:.4f}, residual's share {x['residual_share']:.3f}, {x['live']:.0f} live" if "val_ce_prototypes" in x else ""), flush=True)
    chosen = min(runs, key=lambda n: best(runs[n]["retrofitted"])["val_ce"])
    told = {n: best(runs[chosen][n])["val_ce"] for n in ("retrofitted", "PRISM, trained on")}
    result |= dict(recipe=recipes[chosen - 1], against_scratch=told["retrofitted"] / told["PRISM, trained on"] - 1)
    save(cfg.out, result)
    line = f"retrofitted {told['retrofitted']:.4f} against from scratch with the same further training {told['PRISM, trained on']:.4f} ({result['against_scratch']:+.2%})"
    for name in told if cfg.behavior else ():
        x = study(parse_config(SuppressionConfig, [f"--only=retrofit-{name.split(',')[0]}", f"--behavior={cfg.behavior}", f"--out_dir={runs[chosen][name]}", *words]), f"retrofit-{name.split(',')[0]}")
        result.setdefault("suppression", {})[name] = {k: x[k] for k in ("behavior", "found", "sides")}
        save(cfg.out, result)
        before, after = (x["sides"][side]["matches_per_1000"][0] for side in ("before", "gains"))
        line += f"; {name}: {before:.2f} to {after:.2f} per 1,000 tokens at {x['sides']['gains']['loss_percent'][0]:+.2f}%"
    print(line)


if __name__ == "__main__":
    run_main(main)
