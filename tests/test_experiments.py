"""Each script of experiments/ in its smallest form: it runs, and its figures mean what it says."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny
from test_train import TINY

ROOT = Path(__file__).resolve().parent.parent


def script(name, *words):
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / name), *map(str, words)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text("".join(f'{k[2:]} = "{v}"\n' for k, v in (w.split("=") for w in TINY)))
    return path


def test_throughput(dataset, preset, tmp_path):
    lines = script("throughput.py", f"--preset={preset}", f"--dataset={dataset}", "--rounds=2", "--steps=2", "--threads=1", f"--results={tmp_path}/t.json")
    found = json.loads((tmp_path / "t.json").read_text())
    assert lines[-1] == f"ratio PRISM/dense {found['ratios']['PRISM / dense']:.2f}"
    a, b = (found["seconds"][n] for n in ("PRISM", "dense"))
    assert found["ratios"]["PRISM / dense"] == pytest.approx((b[0] / a[0] + b[1] / a[1]) / 2)
    assert all(s["peak_mb"] > 50 for s in found["sides"].values())


def test_quality(dataset, tmp_path):
    options = " ".join(TINY)
    words = f"--datasets={dataset}", "--seeds=2", f"--options={options}", f"--results={tmp_path}/q.json"
    lines = script("quality.py", *words)
    runs = json.loads((tmp_path / "q.json").read_text())["runs"]
    assert len(runs) == 4 and lines[-1].startswith("PRISM against dense: tiny ")
    again = script("quality.py", *words)  # nothing is run twice
    assert again[-1] == lines[-1] and len(again) < len(lines)


def test_picture(dataset, tmp_path):
    from test_prism import save_run
    import torch
    save_run(tmp_path, tiny(torch.float32, vocab_size=257, block_size=16))
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    line = script("picture.py", f"--out_dir={tmp_path}", "--prompt=the $\\x$ cat", f"--out={tmp_path}/p.png")[-1]
    slices, residual, logit = (float(line.split(w)[1].split()[0]) for w in ("slices ", "residual ", "logit "))
    assert slices + residual == pytest.approx(logit, abs=2e-4)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
