"""Runs the experiments, then writes RESULTS.md from what they measured.

    python experiments/all.py --tables           RESULTS.md alone, as python experiments/tables.py
    python experiments/all.py --quick            a small version of each, into out-quick/
    python experiments/all.py --only=quality,lds
    python experiments/all.py                    everything: a day and a half on 2 cores

README.md in this folder says which datasets and runs must be there before.
"""
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tables  # noqa: E402
from tools import ROOT  # noqa: E402

from common import parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402

# In options of the quick runs Q is the folder out-quick, RUN a tiny run in it, TINY its options.
TINY = ("--n_head=2 --n_embd=32 --n_layer=1 --block_size=64 --n_proto=64 --top_k=4 --max_iters=60 "
        "--eval_interval=60 --batch_size=8 --total_batch_tokens=512 --device=cpu")
RUNS = [  # result, script, options, options of the quick run (None: there is none)
    ("quality", "quality/quality.py", "--datasets=pydoc,books",
     "--seeds=1 --options='TINY' --work=Q/quality"),
    ("twin", "quality/twin.py", "",
     "--sizes=48,96 --items=20 --options='--n_layer=1 --max_iters=60' --work=Q/twin"),
    ("grounding", "quality/grounding.py", "", "--out_dir=RUN --work=Q/grounding"),
    ("retrofit", "quality/retrofit.py", "",
     "--out_dir=RUN --recipes=--max_iters=20 --behavior= --work=Q/retrofit"),
    ("throughput-cpu", "speed/throughput.py", "--device=cpu", "--device=cpu --rounds=2 --steps=2"),
    ("attribution_speed-cpu", "speed/attribution_speed.py", "", "--out_dir=RUN --rounds=1"),
    ("resume-1", "speed/resume.py", "", "--trials=1"),
    ("refit", "attribution/refit.py", "",
     "--out_dir=RUN --documents=2 --tokens=8192 --queries=32"),
    ("lds", "attribution/lds.py", "",
     "--dataset=pydoc --models=4 --repeats=3 --queries=8 --removals=1 --removed=block --mus=0.1 "
     "--full=0 --methods=block,gradient,cosine --train='TINY' --work=Q/lds"),
    ("lds-books", "attribution/lds.py", "--dataset=books512 --full=0 --work=out-lds-books", None),
    ("ekfac", "attribution/ekfac.py", "",
     "--out_dir=RUN --queries=2 --methods=block,gradient,cosine --work=Q/ekfac"),
    ("curvature", "attribution/curvature.py", "", "--out_dir=RUN --loose=Q/loose --tokens=4096"),
    ("planted", "attribution/planted.py", "",
     "--models=1 --plantings=2 --documents=40 --train='TINY' --work=Q/planted"),
    ("suppression-examples", "interventions/suppression.py", "--only=examples",
     "--only=examples --behavior=the --out_dir=RUN --price=1000 --prompts=8 --max_new_tokens=20 "
     "--steps=20 --tokens=4096"),
    ("suppression-deprecated", "interventions/suppression.py", "--only=deprecated", None),
    ("suppression-threads", "interventions/suppression.py", "--only=threads", None),
    ("suppression-quotes", "interventions/suppression.py", "--only=quotes", None),
    ("suppression-exclamation", "interventions/suppression.py", "--only=exclamation", None),
    ("suppression-sea", "interventions/suppression.py", "--only=sea", None),
    ("controllers", "interventions/controllers.py", "--out_dir=out",
     "--out_dir=RUN --items=200 --test_items=100"),
    ("controllers", "interventions/controllers.py", "--out_dir=out-books", None),
    ("logit_rank", "neighbours/logit_rank.py", "",
     "--out_dir=RUN --dense=Q/dense --histories=32 --length=24 --futures=2 --targets=2 --basis=16 "
     "--steps=4 --states=2,4"),
    ("proto_lm", "neighbours/proto_lm.py", "",
     "--out_dir=RUN --length=24 --most=30 --epochs=3 --seeds=1"),
    ("proto_lm-books", "neighbours/proto_lm.py", "--out_dir=out-books --most=150", None),
]


@dataclass
class AllConfig:
    tables: bool = False   # only write RESULTS.md
    quick: bool = False    # small versions, in out-quick/
    only: str = ""         # results with commas between; empty: all


def run(script, options):
    """Runs a script from the repository's root -> whether it ended well."""
    print(f"python {script} {options}", flush=True)
    return subprocess.run([sys.executable, script, *shlex.split(options)], cwd=ROOT).returncode == 0


def main(argv):
    cfg = parse_config(AllConfig, argv)
    names = [name for name, *_ in RUNS]
    only = cfg.only.split(",") if cfg.only else names
    if unknown := set(only) - set(names):
        raise UserError(f"only={cfg.only}: {unknown.pop()} is none of {', '.join(names)}")
    if cfg.tables:
        return tables.main([])
    if cfg.quick:
        run("train.py", f"--out_dir=out-quick/run --resume {TINY}")
        run("attribute.py", "index --out_dir=out-quick/run")
    failed = []
    for name, script, options, quick in RUNS:
        if name not in only or (cfg.quick and quick is None):
            continue
        folder = "experiments/results"
        if cfg.quick:
            folder = "out-quick"
            options = quick.replace("TINY", TINY).replace("RUN", "Q/run")
            options = options.replace("Q/", "out-quick/")
        if not run(f"experiments/{script}", f"{options} --out={folder}/{name}.json"):
            failed.append(name)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their messages stand above")
    if not cfg.quick:
        tables.main([])


if __name__ == "__main__":
    run_main(main)
