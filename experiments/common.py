"""What several experiments share: runs that are trained when they are not there, results that are kept, the machine in words."""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from prism import UserError, atomic  # noqa: E402


def trained(out_dir, *options):
    """Trains a run into out_dir with `options` of train.py, or goes on where it stopped, unless it is finished."""
    out_dir = Path(out_dir)
    key = json.dumps(options)
    log = out_dir / "done"
    if log.exists():
        if log.read_text("utf-8") != key:
            raise UserError(f"{out_dir} was trained with other options ({log.read_text('utf-8')}, expected {key}); remove it or name another folder")
        return out_dir
    if (out_dir / "ckpt.pt").exists() and not (out_dir / "wanted").exists():
        raise UserError(f"{out_dir} already holds a run that no experiment made; name another folder, one that is not there is trained here")
    out_dir.mkdir(parents=True, exist_ok=True)
    if (out_dir / "wanted").exists() and (out_dir / "wanted").read_text("utf-8") != key:
        raise UserError(f"{out_dir} was begun with other options ({(out_dir / 'wanted').read_text('utf-8')}, expected {key}); remove it or name another folder")
    (out_dir / "wanted").write_text(key, "utf-8")
    print(f"training {out_dir}: {' '.join(options)}", flush=True)
    r = subprocess.run([sys.executable, str(ROOT / "train.py"), f"--out_dir={out_dir}", *options, "--resume"], capture_output=True, text=True)
    if r.returncode:
        raise UserError(f"train.py failed for {out_dir}: {r.stderr.strip()[-2000:]}")
    log.write_text(key, "utf-8")
    return out_dir


def options_of(ckpt):
    """The options of train.py that made a checkpoint, but for its folder, how it was started, and the device: for a twin of it."""
    out = {"out_dir", "resume", "init_from", "device", "vocab_size"}
    return [f"--{k}={v}" for k, v in ckpt["train_config"].items() if k not in out]


def kept(path):
    """-> the dict in a JSON file of results; {} where there is none."""
    try:
        result = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(result, dict):
            raise ValueError("no object")
        return result
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); remove it and run again") from None


def spearman(a, b):
    """Rank correlation of each column of a with the same column of b, both (n, Q) -> (Q,)."""
    a, b = (np.argsort(np.argsort(x, axis=0), axis=0).astype(float) for x in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def numbers(name, text, kind=int):
    """"1,2,3" of the option `name` -> [1, 2, 3]; raises UserError unless all are above 0."""
    try:
        out = [kind(x) for x in text.split(",")]
    except ValueError:
        out = [0]
    if not all(0 < x < np.inf for x in out):
        raise UserError(f"{name}={text}, expected {'whole ' * (kind is int)}numbers above 0 with commas between")
    return out


def machine():
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def save(path, result):
    with atomic(path, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
