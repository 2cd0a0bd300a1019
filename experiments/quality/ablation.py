"""One change at a time: PRISM and its dense twin with the defaults, each time with one change.

    python experiments/quality/ablation.py      500 steps each, one seed, two hours on 2 cores
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality import measure  # noqa: E402
from tools import save_results  # noqa: E402

from common import parse_config, run_main  # noqa: E402

CHANGES = {  # a name and options of train.py
    "none": "",
    "AdamW": "--muon=false",
    "learning rate 0.002": "--learning_rate=0.002",
    "learning rate 0.008": "--learning_rate=0.008",
    "embeddings at the trunk's rate": "--embed_lr_scale=1",
    "beta2 0.9": "--beta2=0.9",
    "beta2 0.99": "--beta2=0.99",
    "decay 0.3": "--decay=0.3",
    "decay 0.9": "--decay=0.9",
}
OF_PROTOTYPES = {  # the dense twin is that of "none"
    "prototypes' rate 5 times the trunk's": "--proto_lr_scale=5",
    "prototypes' rate 45 times the trunk's": "--proto_lr_scale=45",
    "lambdas tripled": "--lambda_rec=0.3 --lambda_t2p=0.06 --lambda_p2t=0.015",
    "M 1,024, k 16": "--n_proto=1024 --top_k=16",
    "M 2,048, k 32": "--n_proto=2048 --top_k=32",
    "M 4,096, k 32": "--n_proto=4096 --top_k=32",
    "head_share 1": "--head_share=1",
}


@dataclass
class AblationConfig:
    dataset: str = "pydoc"           # a prepared dataset
    steps: int = 500                 # optimiser steps of each run
    options: str = ""                # more options of train.py for all runs, as one string
    only: str = ""                   # names of changes with semicolons between; empty: all
    work: str = "out-ablation"       # the runs go here
    out: str = "experiments/results/ablation.json"  # the result


def main(argv):
    cfg, cases = parse_config(AblationConfig, argv), {}
    common = [f"--dataset={cfg.dataset}", *cfg.options.split(), f"--max_iters={cfg.steps}"]
    for name, words in (CHANGES | OF_PROTOTYPES).items():
        if not cfg.only or name in ["none", *cfg.only.split(";")]:
            twin = name if name in CHANGES else "none"
            cases[name] = [*common, *words.split()], twin
    found = measure(cases, [1], cfg.work)
    save_results(cfg.out, {"options": asdict(cfg), "changes": found})


if __name__ == "__main__":
    run_main(main)
