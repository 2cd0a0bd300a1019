"""The experiments on quality and speed, and their tables, in their smallest form."""
import csv
import importlib.util
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "", "quality", "speed"
sys.path[:0] = [str(ROOT / "experiments" / name) for name in FOLDERS]

import attribution_speed  # noqa: E402
import grounding  # noqa: E402
import picture  # noqa: E402
import quality  # noqa: E402
import tables  # noqa: E402
import throughput  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
import twin  # noqa: E402
from common import UserError, load_checkpoint, load_tensors, parse_config  # noqa: E402

TINY = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --max_iters=20 "
        "--batch_size=4 --total_batch_tokens=64 --eval_interval=10 --device=cpu --dtype=float32")
PNG = b"\x89PNG"


def trains_here(monkeypatch, module):
    """tools.trained of an experiment, in this process: seconds instead of a start of Python."""
    def trained(out_dir, *options):
        train.main([f"--out_dir={out_dir}", *options, "--resume"])
        return Path(out_dir)
    monkeypatch.setattr(module, "trained", trained)


def dataset_of(out_dir):
    return json.loads((out_dir / "config.json").read_text())["dataset"]


# ------------------------------------------- tools

def test_a_run_is_trained_once_and_never_with_other_options(dataset, tmp_path, monkeypatch):
    words = f"--dataset={dataset}", *TINY.split()
    out = tools.trained(tmp_path / "run", *words)
    assert load_tensors(out / "last.pt")["step"] == 20
    with monkeypatch.context() as patch:
        patch.setattr(tools.subprocess, "run", None)              # nothing more may be started
        assert tools.trained(out, *words) == out
        with pytest.raises(UserError, match="has other options"):
            tools.trained(out, *words, "--seed=3")
    ckpt = load_tensors(out / "ckpt.pt")
    twin_config = parse_config(train.TrainConfig, tools.options_of(ckpt))
    differs = {"out_dir", "resume", "device", "vocab_size"}
    for name, value in ckpt["train_config"].items():
        assert name in differs or getattr(twin_config, name) == value


    with pytest.raises(UserError, match="train.py failed.*top_k is 99"):
        tools.trained(tmp_path / "wrong", *words, "--top_k=99")


def test_results_name_their_origin(tmp_path):
    tools.save_results(tmp_path / "r.json", {"x": 1})
    found = tools.read_results(tmp_path / "r.json")
    assert found["x"] == 1 and found["torch"] == torch.__version__
    assert {"machine", "revision", "date", "command"} < set(found)
    assert tools.read_results(tmp_path / "none.json") == {}
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="r.json .*remove it"):
        tools.read_results(tmp_path / "r.json")


def test_rank_correlation_and_numbers():
    a = np.array([[1.0, 3.0], [2.0, 2.0], [30.0, 1.0], [4.0, 0.0]])
    b = np.array([[5.0, 0.0], [6.0, 1.0], [9.0, 2.0], [7.0, 3.0]])
    assert tools.spearman(a, b) == pytest.approx([1, -1])
    assert tools.number_list("sizes", "1,20") == [1, 20]
    assert tools.number_list("mus", "0.1", float) == [0.1]
    for wrong in ("1,a", "0", "", "-1"):
        with pytest.raises(UserError, match="numbers above 0"):
            tools.number_list("sizes", wrong)
    with pytest.raises(UserError, match="pip install"):
        tools.package("no_such_package")


# ------------------------------------------- quality

@pytest.fixture
def quality_here(monkeypatch):
    """Runs of quality.py in this process, one after the other."""
    trains_here(monkeypatch, quality)
    monkeypatch.setattr(quality.os, "cpu_count", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def best_row(folder):
    with open(folder / "metrics.csv", newline="") as f:
        return min(csv.DictReader(f), key=lambda row: float(row["val_ce"]))


def test_quality_of_two_sides(dataset, tmp_path, quality_here, capsys):
    words = f"--datasets={dataset}", "--seeds=1", f"--options={TINY}", f"--work={tmp_path}"
    quality.main([*words, f"--out={tmp_path}/q.json"])
    x = tools.read_results(tmp_path / "q.json")["against dense"]["tiny"]
    prism, dense = (best_row(tmp_path / f"tiny-{side}-1") for side in ("PRISM", "dense"))
    loss, without = float(prism["val_ce"]), float(prism["val_ce_prototypes"])
    assert x["loss"] == pytest.approx(loss / float(dense["val_ce"]) - 1)
    assert x["without_against_own"] == pytest.approx(without / loss - 1)
    assert x["losses_dense"] == [float(dense["val_ce"])]
    assert 1 <= x["live"] <= 12
    assert ": PRISM against dense" in capsys.readouterr().out
    for wrong in ("--seeds=0", "--options=--n_proto=0"):
        with pytest.raises(UserError, match="expected at least 1"):
            quality.main([wrong])


def test_quality_over_seeds():
    def prism(loss, live):
        return {"val_ce": loss, "val_ce_prototypes": 1.5 * loss, "residual_share": 0.1,
                "live": live}
    x = quality.compare([prism(2.0, 9), prism(4.0, 7)], [{"val_ce": 1.0}, {"val_ce": 4.0}])
    assert x["loss"] == pytest.approx(0.2) and x["without_residual"] == pytest.approx(0.8)
    assert x["without_against_own"] == pytest.approx(0.5)
    assert (x["live"], x["seeds"]) == (7, 2)


def test_twin_over_two_sizes(made, tmp_path, monkeypatch):
    trains_here(monkeypatch, twin)
    options = TINY.replace("--n_head=2 --n_embd=16 ", "")
    rows = np.random.default_rng(0).integers(97, 122, (6, 4, 12))
    items = twin.cloze.__globals__["Items"](rows, np.array([0, 1, 2, 3, 0, 1]), np.arange(6))
    monkeypatch.setattr(twin, "cloze", lambda *args, **kw: items)
    twin.main([f"--dataset={dataset_of(made)}", "--sizes=48,96", f"--options={options}",
               f"--work={tmp_path}", f"--out={tmp_path}/t.json"])
    result = tools.read_results(tmp_path / "t.json")
    small, large = (result["sizes"][size] for size in ("48", "96"))
    assert small["PRISM"]["weights"] == small["dense"]["weights"] < large["dense"]["weights"]
    assert (tmp_path / "t.png").read_bytes()[:4] == PNG

    model, hits = load_checkpoint(tmp_path / "48-PRISM")[0], 0
    for choices, label in zip(items.tokens, items.label):
        scores = []
        for row in choices:
            logp = [model(torch.from_numpy(row[None, :t]))[0][0, -1].log_softmax(0)[row[t]].item()
                    for t in range(7, 12)]
            scores.append(sum(logp))
        hits += int(np.argmax(scores)) == label
    assert small["PRISM"]["accuracy"] == hits / 6


def test_purity_clusters_and_gates():
    values, near = np.array([3, 3, 5, 5, 5, 7]), np.array([[0, 1, 2, 5], [2, 0, 3, 4]])
    assert grounding.purity(values, near) == (0.5 + 0.75) / 2
    rng = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(4, 8, generator=rng), dim=1)
    noise = 0.01 * torch.randn(200, 8, generator=rng)
    x = F.normalize(centers.repeat(50, 1) + noise, dim=1)
    torch.manual_seed(3)
    found = grounding.k_means(x, 4)
    assert torch.allclose(found.norm(dim=1), torch.ones(4))
    assert ((x @ found.T).max(1).values > 0.9).float().mean() > 0.7
    direct = np.zeros((200, 4))
    for t in range(200):
        cosine = [float(x[t] @ c) for c in centers]
        for i in np.argsort(cosine)[-2:]:
            direct[t, i] = max(0, cosine[i])
    direct -= direct.mean(0)
    direct /= np.linalg.norm(direct, axis=0)
    assert np.allclose(grounding.fired(centers, x, 2), direct, atol=1e-5)


def test_grounding_of_a_run(made, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    a = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), dim=0)
    assert grounding.matched(a, a[:, [2, 0, 1, 4, 3]]) == pytest.approx(1, abs=1e-5)
    trains_here(monkeypatch, grounding)
    grounding.main([f"--out_dir={made}", f"--work={tmp_path}", f"--out={tmp_path}/g.json"])
    result = tools.read_results(tmp_path / "g.json")
    assert list(result["sets"]) == list(result["stability"])
    for found in result["sets"].values():
        low, middle, high = found["nearest_cosine"]
        assert -1 <= low <= middle <= high <= 1 + 1e-5 and 1 / 32 <= found["next token"] <= 1
    dense = load_tensors(tmp_path / "other-dense/ckpt.pt")["train_config"]
    assert dense["n_proto"] == 0 and dense["seed"] == 1338


def test_picture_of_a_ledger(made, tmp_path, capsys):
    picture.main([f"--out_dir={made}", "--prompt=the $\\x$ cat", f"--out={tmp_path}/p.png"])
    line = capsys.readouterr().out
    slices, residual, logit = (float(line.split(w)[1].split()[0])
                               for w in ("slices ", "residual ", " = "))
    assert slices + residual == pytest.approx(logit, abs=2e-4)
    assert (tmp_path / "p.png").read_bytes()[:4] == PNG


# ------------------------------------------- speed

def test_throughput_of_interleaved_sides(dataset, tmp_path, monkeypatch):
    lines = [word[2:].replace("=", ' = "') + '"\n' for word in TINY.split()]
    (tmp_path / "tiny.toml").write_text("".join(lines))
    monkeypatch.setattr(throughput, "PAIRS", [("PRISM", "dense")])
    throughput.main([f"--preset={tmp_path}/tiny.toml", f"--dataset={dataset}", "--rounds=2",
                     "--steps=1", f"--out={tmp_path}/t.json"])
    found = tools.read_results(tmp_path / "t.json")
    a, b = found["seconds"]["PRISM"], found["seconds"]["dense"]
    assert found["ratios"] == {"PRISM / dense": pytest.approx((b[0] / a[0] + b[1] / a[1]) / 2)}
    speed = (64 / a[0] + 64 / a[1]) / 2
    assert found["sides"]["PRISM"]["tokens_per_s"] == pytest.approx(speed)
    assert all(side["peak_mb"] > 50 for side in found["sides"].values())
    assert "race" not in found


NANOGPT = """
import json
from dataclasses import dataclass
from pathlib import Path
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, *rates):
        print("nothing that should reach the pipe")
        seen = {"rates": rates, "config": vars(self.config)}
        Path(__file__).with_name("seen.json").write_text(json.dumps(seen))
        return torch.optim.SGD(self.parameters(), lr=0.0)         # until the schedule acts
"""


def test_race_with_nanogpt(dataset, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    throughput.main([f"--preset={TINY}", f"--dataset={dataset}", f"--nanogpt={tmp_path}",
                     "--rounds=0", "--race_steps=3", "--race_ours=8", "--device=cpu",
                     f"--out={tmp_path}/t.json"])
    found = tools.read_results(tmp_path / "t.json")["race"]
    theirs, ours = found["sides"]["nanoGPT"], found["sides"]["PRISM"]
    assert (theirs["steps"], ours["steps"]) == (3, 8)
    assert found["ratio"] == theirs["cpu_seconds"] / ours["cpu_seconds"] > 0
    assert found["reached"] is (ours["val_ce"] <= theirs["val_ce"]) is True
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["rates"] == [0.1, 1e-3, [0.9, 0.99], "cpu"]
    assert seen["config"]["block_size"] == 16 and seen["config"]["n_embd"] == 16
    train.main([f"--dataset={dataset}", *TINY.split(), "--max_iters=8", f"--out_dir={tmp_path}/o"])
    row = load_tensors(tmp_path / "o/last.pt")["rows"][-1]        # the same run by train.py
    assert ours["val_ce"] == pytest.approx(row["val_ce"], abs=1e-4)


def test_the_learning_rate_of_nanogpt():
    tc = parse_config(train.TrainConfig, [*throughput.RECIPE.split(), "--max_iters=1000"])
    assert throughput.nanogpt_rate(0, tc) == pytest.approx(1e-3 / 101)
    assert throughput.nanogpt_rate(100, tc) == pytest.approx(1e-3)
    assert throughput.nanogpt_rate(550, tc) == pytest.approx(5.5e-4)
    assert throughput.nanogpt_rate(1000, tc) == pytest.approx(1e-4)


def test_what_attribution_costs(made, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution_speed, "QUERIES", 3)
    monkeypatch.setattr(attribution_speed, "MEMORY", 2 ** 20)
    attribution_speed.main([f"--out_dir={made}", "--rounds=1", f"--out={tmp_path}/a.json"])
    found = tools.read_results(tmp_path / "a.json")
    cost, bus = found["index"], found["bandwidth"]
    whole = cost["records_s"] + cost["blocks_s"]
    assert cost["ratio"] == pytest.approx(whole / cost["forward_s"])
    assert bus["postings_share"] == pytest.approx(bus["postings_gb_s"] / bus["machine_gb_s"])
    assert found["batch"]["token"]["ratio"] > 0


# ------------------------------------------- tables, and the list of runs

def load_all():
    spec = importlib.util.spec_from_file_location("every", ROOT / "experiments/all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_md_says_what_the_json_files_say(tmp_path, monkeypatch):
    committed = (ROOT / "experiments/RESULTS.md").read_text("utf-8")
    shutil.copytree(tables.HERE / "results", tmp_path / "results")
    shutil.copy(tables.HERE / "RESULTS.in.md", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    load_all().main(["--tables"])
    found = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert found == committed, "run: python experiments/all.py --tables"

    refit = {"pearson": {"full": 0.999}, "revision": "1234567"}
    (tmp_path / "results/refit.json").write_text(json.dumps(refit))
    (tmp_path / "results/quality.json").unlink()
    tables.write_tables()
    found = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "| r 0.999 | yes |" in found and "revision 1234567" in found
    assert "| within 1% (pydoc, books) | | |" in found
    (tmp_path / "results/refit.json").write_text("{")
    with pytest.raises(UserError, match="refit.json .*remove it"):
        tables.write_tables()


def test_figures_of_the_template():
    r = {"a": {"x": {"v": 1.5, "l": [1, 2, 4]}, "y": {"v": 0.5, "l": [3, 3, 3]}, "s": "p|q"}}
    assert tables.fill("{a.x.v x 1000:.0f} {a.x.l.2}", r) == "1500 4"
    assert tables.fill("{a.x.l:.2f}; {each a.x.l}; {mean a.y.l}", r) == "2.33 +- 1.53; 1, 2, 4; 3"
    assert tables.fill("{max a.x.l}", r) == "4" and tables.fill("{a.z}", r) is None
    del r["a"]["s"]
    assert tables.fill("{min a.*.v}", r) == "0.5"
    row = "| {a.x.v} | {a.z} | met if {a.x.v} > 1 and 2 < 3 |"
    assert tables.fill_row(row, r) == "| 1.5 | | yes |"
    assert tables.fill_row("| met if {a.x.v} < 1 |", r) == "| **no** |"
    error = math.sqrt(7 / 3 / 3)
    assert float(tables.fill("{error a.x.l}", r)) == pytest.approx(error)


def test_each_run_of_all_has_a_script_with_these_options():
    every = load_all()
    for command, quick in every.RUNS:
        script, *options = shlex.split(command)
        path = ROOT / "experiments" / script
        spec = importlib.util.spec_from_file_location(f"checked_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        sys.path.remove(str(path.parent))
        (config,) = [value for name, value in vars(module).items()
                     if name.endswith("Config") and value.__module__ == spec.name]
        for words in (options, shlex.split(quick)):
            assert parse_config(config, words).out.startswith(("experiments/results", "out-quick"))
    with pytest.raises(UserError, match="none of quality"):
        every.main(["--only=nothing"])
