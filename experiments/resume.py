"""Does a killed run end where a run that was never killed ends? SIGKILL at random moments, bit for bit.

    python experiments/resume.py --trials=20               one process
    python experiments/resume.py --trials=5 --ranks=2      torchrun, whose --max-restarts brings a killed rank back

Each trial kills a small run (dropout on) at a random moment, every third one while a checkpoint is being written, starts it
again with --resume (torchrun does so itself) and compares every parameter with the run that was never killed. The last line
reads: killed N of N; identical N of N. (A trial that had ended before its moment came counts as not killed.)
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from prism import atomic, load_tensors, parse_config, run_main  # noqa: E402


@dataclass
class ResumeConfig:
    dataset: str = "pydoc"        # a prepared dataset
    trials: int = 20              # kills
    ranks: int = 1                # processes of a run
    seed: int = 0                 # of the moments
    results: str = ""             # the JSON file; empty is experiments/results/resume-RANKS.json


OPTIONS = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --n_proto=64 --batch_size=8 --total_batch_tokens=512 --dropout=0.1 "
           "--max_iters=400 --warmup_iters=20 --eval_interval=40 --eval_tokens=2000 --device=cpu").split()


def start(cfg, out):
    launch = [sys.executable] if cfg.ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={cfg.ranks}", "--max-restarts=3"]
    return subprocess.Popen([*launch, str(ROOT / "train.py"), f"--dataset={cfg.dataset}", f"--out_dir={out}", "--resume", *OPTIONS],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def step_of(out):
    return load_tensors(out / "last.pt")["step"] if (out / "last.pt").exists() else 0


def main(argv):
    cfg = parse_config(ResumeConfig, argv)
    rng = random.Random(cfg.seed)
    with tempfile.TemporaryDirectory() as tmp:
        t0 = time.perf_counter()
        start(cfg, Path(tmp) / "whole").wait()
        length = time.perf_counter() - t0
        want = load_tensors(Path(tmp) / "whole" / "last.pt")
        print(f"the run that is never killed: {want['step']} steps, {length:.1f} s", flush=True)
        trials = []
        for n in range(cfg.trials):
            out = Path(tmp) / f"trial{n}"
            process = start(cfg, out)
            moment, writing = rng.uniform(0.2, 1.0) * length, n % 3 == 2
            t0 = time.perf_counter()
            while process.poll() is None and time.perf_counter() - t0 < moment:
                time.sleep(0.002)
            while writing and process.poll() is None and not list(out.glob("*.pt*.tmp")):
                time.sleep(0.0002)
            seconds, at = time.perf_counter() - t0, step_of(out)
            killed = process.poll() is None
            if killed:
                pids = [process.pid] if cfg.ranks == 1 else Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                if pids:
                    os.kill(int(rng.choice(pids)), signal.SIGKILL)
            process.wait()
            if cfg.ranks == 1:
                start(cfg, out).wait()
            got = load_tensors(out / "last.pt")
            same = got["step"] == want["step"] and all(torch.equal(v, got["model"][k]) for k, v in want["model"].items())
            trials.append(dict(seconds=round(seconds, 2), checkpoint_step=at, killed=killed, during_write=writing, identical=same))
            print(f"trial {n}: {'killed' if killed else 'had ended'} after {seconds:.1f} s with a checkpoint of step {at}"
                  f"{', while writing' if writing else ''}: {'identical' if same else 'DIFFERENT'}", flush=True)
    with atomic(cfg.results or ROOT / f"experiments/results/resume-{cfg.ranks}.json", "w") as f:
        json.dump(dict(torch=torch.__version__, ranks=cfg.ranks, trials=trials), f, indent=1)
    print(f"killed {sum(t['killed'] for t in trials)} of {len(trials)}; identical {sum(t['identical'] for t in trials)} of {len(trials)}")


if __name__ == "__main__":
    run_main(main)
