"""What the experiments share: trained runs, results in JSON, rank correlation, pictures."""
import contextlib
import datetime
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import atomic, load_dataset, reading, write_json  # noqa: E402
from prism import UserError  # noqa: E402
from suppress import interval  # noqa: E402, F401

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


def trained(out_dir, *options):
    """Trains a run with these options of train.py, resumes it, or finds it finished -> Path."""
    note, job = Path(out_dir) / "experiment.json", {"options": list(options), "finished": False}
    found = read_results(note) or job
    if found["options"] != job["options"]:
        raise UserError(f"{out_dir} has other options than {' '.join(options)}; remove it")
    if not found["finished"]:
        write_json(note, job)
        words = [sys.executable, str(ROOT / "train.py"), f"--out_dir={out_dir}", *options]
        done = subprocess.run([*words, "--resume"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train.py failed for {out_dir}: {done.stderr.strip()[-2000:]}")
        write_json(note, job | {"finished": True})
    return Path(out_dir)


def write_dataset(folder, source, documents):
    """Training documents (title, source, tokens), with the tokenizer and the held-out text of the
    dataset `source`, as a dataset of their own."""
    _, _, meta = load_dataset(source)
    rows, size = [], 0
    for title, origin, tokens in documents:
        rows.append(dict(split="train", start=size, title=title, source=origin))
        size += len(tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("val.bin", "tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(source / name, folder / name)
    text = np.concatenate([tokens for _, _, tokens in documents])
    text.tofile(folder / "train.bin")
    write_json(folder / "docs.json", rows)
    meta["train"]["tokens"] = size
    meta["sha256"]["train.bin"] = hashlib.sha256(text).hexdigest()
    write_json(folder / "meta.json", meta)


def trained_on(run, keep, work, seed, options):
    """Trains in the folder `work` on the documents keep (D,) of a run's training text -> Path"""
    name = hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()[:10]
    folder = Path(work) / f"{name}-{seed}"
    if not (folder / "data/meta.json").exists():
        documents = zip(run.titles, run.source_of, np.split(run.train, run.doc_start[1:]))
        write_dataset(folder / "data", run.folder, list(itertools.compress(documents, keep)))
    return trained(folder / "run", *options, f"--dataset={folder / 'data'}", f"--seed={seed}")


def options_of(ckpt):
    """The options of train.py that a checkpoint was trained with, to train a twin of it."""
    skip = "out_dir", "resume", "init_from", "device", "vocab_size"
    return [f"--{name}={value}" for name, value in ckpt["train_config"].items() if name not in skip]


def read_results(path):
    """The dict in a JSON file; {} where there is no file."""
    with reading(path, "remove it and run the experiment again"):
        return dict(json.loads(Path(path).read_text("utf-8"))) if Path(path).exists() else {}


def save_results(path, result):
    """Writes a dict as JSON, with machine, torch, git revision, date and command added."""
    words = ["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --dirty --exclude='*' 2>/dev/null"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
    write_json(path, result | {"machine": machine, "torch": torch.__version__,
                               "revision": subprocess.getoutput(git), "command": shlex.join(words),
                               "date": datetime.date.today().isoformat()})


def spearman(a, b):
    """Rank correlation of a (n, Q) with b (n, Q), column by column -> (Q,)."""
    a, b = (np.argsort(np.argsort(x, axis=0), axis=0).astype(float) for x in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def number_list(name, text, kind=int):
    """The value "1,2,3" of the option `name` -> [1, 2, 3]; UserError unless all are above 0."""
    with reading(f"{name}={text}", "expected numbers above 0 with commas between"):
        numbers = [kind(word) for word in text.split(",")]
        if not all(0 < x < float("inf") for x in numbers):
            raise UserError(f"{name}={text}, expected numbers above 0 with commas between")
    return numbers


def package(name):
    """An optional package as a module; UserError says how to install it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is missing; run: pip install -r experiments/requirements.txt")
    return importlib.import_module(name)


@contextlib.contextmanager
def figure(path, rows=1, columns=1, width=5.5, height=4):
    """with figure("x.png", 1, 2) as axes: draw on axes[0, 0] and axes[0, 1]; then it is saved."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    yield fig.subplots(rows, columns, squeeze=False)
    with atomic(path) as f:
        fig.savefig(f, dpi=120, format="png")
