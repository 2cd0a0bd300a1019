"""Prototypes attached to a dense model that is already trained, and trained on a little, against PRISM from scratch: loss, and turning a behavior down.

    python experiments/retrofit.py                      about half an hour on 2 cores
    python experiments/lds.py --retrofit="--max_iters=50 --learning_rate=0.001 --warmup_iters=5" --again=0 --removals=0 --methods=block,gradient,cosine \\
        --work=out-lds-retrofit --out=experiments/results/lds-retrofit.json           does its influence predict retraining?

The dense twin of --out_dir, of the same seed and windows, is the start. Each recipe is a set of options of train.py; beside each stands the dense twin trained
on with the same options, so that what the prototypes cost is told apart from what more training gives. The recipe with the lowest loss is then
turned down for --behavior as experiments/suppression.py does it, and so is the run from scratch.
"""
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine, options_of, save, trained  # noqa: E402
from suppression import SuppressionConfig, study  # noqa: E402

from prism import UserError, load_checkpoint, parse_config, read_metrics, run_main  # noqa: E402


@dataclass
class RetrofitConfig:
    out_dir: str = "out"             # PRISM from scratch
    dense: str = "out-dense-1"       # its dense twin, trained here if need be
    recipes: str = ("--max_iters=100 --learning_rate=0.000002 --min_lr=0.0000002 --proto_lr_scale=10000 --warmup_iters=10;"   # the trunk all but stands still
                    "--max_iters=100 --learning_rate=0.001 --warmup_iters=10;--max_iters=300 --learning_rate=0.001 --warmup_iters=10")  # options of train.py, ; between
    train: str = ""                  # options for all of these runs, beyond those of the first
    behavior: str = ">>>"            # is turned down; empty: left out
    prompts: int = 512               # sampled beginnings of each side
    suppress: str = ""               # more options of suppression.py, as one string
    work: str = "out-retrofit"       # runs go here
    out: str = "experiments/results/retrofit.json"  # the result


def best(out):
    """The row of metrics.csv that ckpt.pt holds -> a dict."""
    row = min(read_metrics(Path(out) / "metrics.csv"), key=lambda r: r["val_ce"])
    return {k: row[k] for k in ("val_ce", "val_ce_prototypes", "residual_share", "live", "tokens") if row.get(k) is not None}


def main(argv):
    cfg = parse_config(RetrofitConfig, argv)
    recipes = [r.strip() for r in cfg.recipes.split(";") if r.strip()]
    if not recipes or cfg.prompts < 2:
        raise UserError(f"recipes={cfg.recipes!r}, prompts={cfg.prompts}; expected at least one recipe and 2 beginnings")
    model, ckpt = load_checkpoint(cfg.out_dir, "cpu")
    if not model.config.n_proto:
        raise UserError(f"{cfg.out_dir} holds a dense model; expected one with prototypes")
    common = [*options_of(ckpt), *cfg.train.split()]
    dense = trained(cfg.dense, *common, "--n_proto=0")
    sides = {"PRISM from scratch": best(cfg.out_dir), "dense": best(dense)}
    result, runs = dict(options=asdict(cfg), machine=machine(), sides=sides), {}
    for n, recipe in enumerate(recipes, 1):
        for name, more in (("retrofitted", []), ("dense, trained on", ["--n_proto=0"])):
            out = trained(Path(cfg.work) / f"{name.split(',')[0]}-{n}", *common, "--eval_interval=100", *recipe.split(), *more, f"--init_from={dense}")
            x = sides[f"{name}: {recipe}"] = best(out)
            if not more:
                runs[out] = x["val_ce"]
    for name, x in sides.items():
        x["against_dense"] = x["val_ce"] / sides["dense"]["val_ce"] - 1
        print(f"{name}: loss {x['val_ce']:.4f} ({x['against_dense']:+.2%} against dense)"
              + (f", without the residual {x['val_ce_prototypes']:.4f}, residual's share {x['residual_share']:.3f}, {x['live']:.0f} live" if "val_ce_prototypes" in x else ""), flush=True)
    chosen = min(runs, key=runs.get)
    a, b = sides["PRISM from scratch"]["val_ce"], runs[chosen]
    result["against_scratch"] = b / a - 1
    save(cfg.out, result)
    if cfg.behavior:
        for name, out in (("PRISM from scratch", cfg.out_dir), ("retrofitted", chosen)):
            words = [f"--only=retrofit-{name.split()[-1]}", f"--behavior={cfg.behavior}", f"--out_dir={out}", f"--prompts={cfg.prompts}", f"--out={cfg.work}", *shlex.split(cfg.suppress)]
            x = study(parse_config(SuppressionConfig, words), words[0][7:])
            result.setdefault("suppression", {})[name] = {k: x[k] for k in ("behavior", "found", "sides")}
            save(cfg.out, result)
    told = [f"{n}: {v['sides']['before']['matches_per_1000'][0]:.2f} to {v['sides']['gains']['matches_per_1000'][0]:.2f} per 1,000 tokens at {v['sides']['gains']['loss_percent'][0]:+.2f}%" for n, v in result.get("suppression", {}).items()]
    print(f"retrofitted {b:.4f} against from scratch {a:.4f} ({b / a - 1:+.2%})" + "".join("; " + t for t in told))


if __name__ == "__main__":
    run_main(main)
