"""Does a killed run end where a run that was never killed ends? SIGKILL at random, bit for bit.

    python experiments/speed/resume.py --trials=20

Each trial kills a small run (with dropout) at a random moment, one in three while a checkpoint is
written, starts it again with --resume and compares every weight.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from tools import ROOT, save_results  # noqa: E402

from common import load_tensors, parse_config, run_main  # noqa: E402

OPTIONS = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --n_proto=64 --batch_size=8 "
           "--total_batch_tokens=512 --dropout=0.1 --max_iters=400 --warmup_iters=20 "
           "--eval_interval=40 --eval_tokens=2000 --device=cpu --resume").split()


@dataclass
class ResumeConfig:
    dataset: str = "pydoc"        # a prepared dataset
    trials: int = 20              # kills
    out: str = "experiments/results/resume-1.json"  # the result


def start(cfg, out):
    words = [sys.executable, ROOT / "train.py", f"--dataset={cfg.dataset}", f"--out_dir={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*words, *OPTIONS], stdout=subprocess.DEVNULL, env=env)


def trial(cfg, out, moment, writing, wanted):
    """Kills a run after `moment` seconds, brings it to its end and compares it."""
    process, begin = start(cfg, out), time.perf_counter()
    while process.poll() is None and time.perf_counter() - begin < moment:
        time.sleep(0.002)
    while writing and process.poll() is None and not list(out.glob("*.pt*.tmp")):
        time.sleep(0.0002)
    killed = process.poll() is None
    process.kill()                                                # SIGKILL
    process.wait()
    start(cfg, out).wait()
    found = load_tensors(out / "last.pt")
    same = found["step"] == wanted["step"]
    for name, value in wanted["model"].items():
        same = same and torch.equal(value, found["model"][name])
    return {"killed": killed, "during_write": writing, "identical": same}


def main(argv):
    cfg, rng = parse_config(ResumeConfig, argv), random.Random(0)
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        start(cfg, Path(folder) / "whole").wait()
        length = time.perf_counter() - begin
        wanted = load_tensors(Path(folder) / "whole/last.pt")
        for n in range(cfg.trials):
            moment = rng.uniform(0.2, 1.0) * length
            trials.append(trial(cfg, Path(folder) / f"{n}", moment, n % 3 == 2, wanted))
            print(f"trial {n}, after {moment:.1f} s: {trials[-1]}", flush=True)
    save_results(cfg.out, {"trials": trials})
    killed, same = (sum(t[name] for t in trials) for name in ("killed", "identical"))
    print(f"killed {killed} of {len(trials)}; identical {same} of {len(trials)}")


if __name__ == "__main__":
    run_main(main)
