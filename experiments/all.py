"""Runs the experiments, then writes RESULTS.md from what they measured.

    python experiments/all.py --tables             RESULTS.md alone, from results/*.json
    python experiments/all.py --quick              a small version of each, into out-quick/
    python experiments/all.py --only=quality,lds   these scripts
    python experiments/all.py                      everything: a day and a half on 2 cores
"""
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tables import write_tables  # noqa: E402
from tools import ROOT  # noqa: E402

from common import parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402

Q = "out-quick"
RUN = f"--out_dir={Q}/run"       # the quick runs share a tiny model
TINY = ("--n_head=2 --n_embd=32 --n_layer=1 --block_size=64 --n_proto=64 --top_k=4 --max_iters=60 "
        "--eval_interval=60 --batch_size=8 --total_batch_tokens=512 --device=cpu")
RUNS = [  # a script with its options, and the options of its quick run ("": there is none)
    ("quality/quality.py --datasets=pydoc,books",
     f"--seeds=1 --options='{TINY}' --work={Q}/quality"),
    ("quality/twin.py",
     f"--sizes=48,96 --items=20 --options='--n_layer=1 --max_iters=60' --work={Q}/twin"),
    ("quality/grounding.py", f"{RUN} --work={Q}/grounding"),
    ("quality/ledger.py", f"{RUN} --gates=20"),
    ("speed/throughput.py --device=cpu", "--device=cpu --rounds=2 --steps=2"),
    ("speed/attribution_speed.py", f"{RUN} --rounds=1"),
    ("attribution/refit.py", f"{RUN} --documents=2 --tokens=8192 --queries=32"),
    ("attribution/lds.py",
     "--dataset=pydoc --models=4 --repeats=3 --queries=8 --removals=1 --removed=block --mus=0.1 "
     f"--full=0 --methods=block,gradient,cosine --train='{TINY}' --work={Q}/lds"),
    ("attribution/lds.py --dataset=books512 --full=0 --work=out-lds-books "
     "--out=experiments/results/lds-books.json", ""),
    ("attribution/tokens.py", ""),
    ("attribution/ekfac.py", f"{RUN} --queries=2 --methods=block,gradient,cosine --work={Q}/ekfac"),
    ("attribution/curvature.py", f"{RUN} --loose={Q}/loose --tokens=4096"),
    ("attribution/planted.py",
     f"--models=1 --plantings=2 --documents=40 --train='{TINY}' --work={Q}/planted"),
    ("interventions/suppression.py --corpus=pydoc",
     f"{RUN} --corpus=pydoc --price=1000 --texts=8 --finetune=2 --size=16 --tokens=4096 "
     f"--only=tkinter --train='{TINY}' --work={Q}/without"),
    ("interventions/suppression.py --corpus=books", ""),
    ("interventions/forget.py", ""),
    ("interventions/forget.py --out_dir=out-books "
     "--texts=melville-moby_dick,edgeworth-parents,austen-emma", ""),
    ("interventions/controllers.py", f"{RUN} --items=200 --test_items=100"),
    ("interventions/controllers.py --out_dir=out-books", ""),
    ("neighbours/logit_rank.py",
     f"{RUN} --dense={Q}/dense --histories=32 --length=24 --futures=2 --targets=2 --basis=16 "
     "--steps=4 --states=2,4"),
    ("neighbours/proto_lm.py", f"{RUN} --length=24 --most=30 --epochs=3 --seeds=1"),
    ("neighbours/proto_lm.py --out_dir=out-books --most=150 "
     "--out=experiments/results/proto_lm-books.json", ""),
]


@dataclass
class AllConfig:
    tables: bool = False   # only write RESULTS.md
    quick: bool = False    # small versions, in out-quick/
    only: str = ""         # names of scripts with commas between; empty: all


def run(command):
    """Runs a script from the repository's root -> whether it ended well."""
    print(f"python {command}", flush=True)
    return subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode == 0


def main(argv):
    cfg = parse_config(AllConfig, argv)
    if cfg.tables:
        return write_tables()
    scripts = [command.split()[0] for command, _ in RUNS]
    names = [Path(script).stem for script in scripts]
    only = cfg.only.split(",") if cfg.only else names
    if unknown := set(only) - set(names):
        raise UserError(f"only={cfg.only}: {unknown.pop()} is none of {', '.join(names)}")
    if cfg.quick:
        run(f"train.py --out_dir={Q}/run --resume {TINY}")
        run(f"attribute.py index --out_dir={Q}/run")
    failed = []
    for script, name, (command, quick) in zip(scripts, names, RUNS):
        if cfg.quick:
            command = f"{script} --out={Q}/{name}.json {quick}"
        if name in only and (quick or not cfg.quick) and not run(f"experiments/{command}"):
            failed.append(name)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their messages stand above")
    if not cfg.quick:
        write_tables()


if __name__ == "__main__":
    run_main(main)
