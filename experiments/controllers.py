"""What linear controllers gain at multiple choice, over runs of several seeds: `suppress.py calibrate` on each, gathered.

    python data/prepare.py cloze --dataset=pydoc                    940 items of held-out text; books: --dataset=books --items=2000
    python data/prepare.py cloze --dataset=pydoc --split=train      4,000 items of training text to fit on; likewise for books
    python train.py --dataset=pydoc --seed=2 --out_dir=out-seeds/pydoc-2      and so on; three seeds a corpus
    python experiments/controllers.py                               three to eight minutes a run; what is done is kept
    python experiments/controllers.py --score=norm                  choices scored by log-likelihood per byte
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import kept, machine, save  # noqa: E402

import suppress  # noqa: E402
from prism import UserError, fingerprint, load_checkpoint, parse_config, run_main  # noqa: E402


@dataclass
class ControllersConfig:
    runs: str = "out,out-seeds/pydoc-2,out-seeds/pydoc-3,out-books,out-seeds/books-2,out-seeds/books-3"  # folders of runs, with commas between
    score: str = "sum"          # of a choice: sum of its tokens' log-probabilities, or norm, that divided by its bytes
    folds: int = 3              # of the cross-validation
    out: str = "experiments/results/controllers.json"  # the result; of --score=norm controllers-norm.json


def main(argv):
    cfg = parse_config(ControllersConfig, argv)
    path = Path(cfg.out if cfg.score == "sum" or cfg.out != ControllersConfig.out else cfg.out.replace(".json", f"-{cfg.score}.json"))
    runs = kept(path).get("runs", {})
    for run in cfg.runs.split(","):
        if not (Path(run) / "ckpt.pt").exists():
            raise UserError(f"{run} holds no run; train it: python train.py --dataset=pydoc --seed=2 --out_dir={run}, or name others by --runs")
        model, ckpt = load_checkpoint(run, "cpu")
        trained = ckpt["train_config"]
        folder = Path("data") / trained["dataset"] if "/" not in trained["dataset"] else Path(trained["dataset"])
        task, calibration = (str(folder / f"{n}.jsonl") for n in ("cloze", "cloze-train"))
        key = dict(checkpoint=fingerprint(model.state_dict()), task=task, calibration=calibration, score=cfg.score, folds=cfg.folds)
        if {k: runs.get(run, {}).get(k) for k in key} == key:
            continue
        print(f"--- {run}: {trained['dataset']}, seed {trained['seed']}", flush=True)
        name = "cloze" if cfg.score == "sum" else f"cloze-{cfg.score}"
        suppress.calibrate([f"--out_dir={run}", f"--task={task}", f"--calibration={calibration}", f"--name={name}", f"--score={cfg.score}", f"--folds={cfg.folds}"])
        runs[run] = key | dict(train_seed=trained["seed"]) | suppress.about(Path(run) / "gains" / f"{name}.json")["found"]
        save(path, dict(runs=runs, machine=machine()))
    sides = ("uncalibrated", "controller", "random", "temperature")
    for run in cfg.runs.split(","):
        x = runs[run]["result"]
        print(f"{run}: " + "; ".join(f"{n} {x[n]['accuracy']:.1%}" + (f" {x[n]['points'][0]:+.1f} [{x[n]['points'][1]:+.1f}, {x[n]['points'][2]:+.1f}]" if n != sides[0] else "") for n in sides))


if __name__ == "__main__":
    run_main(main)
