"""The trainer: exact resume, ranks, what it writes, and what it refuses."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_dataset

import train
from common import load_checkpoint, load_dataset, load_tensors, load_tokenizer, parse_config
from prism import PRISM, UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--n_proto=12", "--top_k=3",
        "--batch_size=4", "--total_batch_tokens=128", "--warmup_iters=4", "--max_iters=20",
        "--eval_interval=5", "--device=cpu", "--dtype=float32"]


def run(dataset, out, *more):
    """train.py in this process."""
    train.main([f"--dataset={dataset}", f"--out_dir={out}", *TINY, *more])


def spawn(dataset, out, *more, ranks=1):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                   "--max-restarts=3"]
    options = [f"--dataset={dataset}", f"--out_dir={out}", *TINY, *more]
    return subprocess.Popen([*launch, str(ROOT / "train.py"), *options], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(out, name="last.pt"):
    return load_tensors(Path(out) / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def difference(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def metrics(out):
    """Rows of metrics.csv without the speed, which no two runs share."""
    with open(out / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ("step tokens lr loss ce rec t2p p2t val_ce val_ce_prototypes "
                             "residual_share live tokens_per_s").split()
    return [{k: float(v) for k, v in row.items() if v and k != "tokens_per_s"} for row in rows]


def test_a_run_and_what_it_writes(dataset, tmp_path, capsys):
    run(dataset, tmp_path / "dense", "--n_proto=0")
    assert "val_ce_prototypes" not in metrics(tmp_path / "dense")[0]
    out = tmp_path / "out"
    run(dataset, out)
    rows = metrics(out)
    assert [r["step"] for r in rows] == [5, 10, 15, 20]
    assert rows[-1]["val_ce"] < rows[0]["val_ce"] < 5.6           # ln 257 = 5.55
    assert all(r[k] >= 0 for r in rows for k in ("rec", "t2p", "p2t", "residual_share"))
    ckpt, last = load_tensors(out / "ckpt.pt"), load_tensors(out / "last.pt")
    assert ckpt.keys() == last.keys() == {"model", "config", "step", "best", "optimizers",
                                          "train_config", "data", "rows"}
    lowest = min(r["val_ce"] for r in rows)
    assert last["step"] == 20 and ckpt["best"] == last["best"] == pytest.approx(lowest, abs=1e-5)
    assert json.loads((out / "config.json").read_text())["n_proto"] == 12
    printed = capsys.readouterr().out
    assert "device: cpu, ranks: 1, torch.float32" in printed and "live " in printed
    assert printed.endswith(f'Next: python sample.py --out_dir={out} --prompt="The"\n')
    model, _ = load_checkpoint(out)
    text = load_tokenizer(out).decode(model.generate(torch.tensor([[116]]), 5)[0].tolist())
    assert text.startswith("t")


def test_evaluation_is_the_mean_over_every_validation_token(dataset):
    _, val, _ = load_dataset(dataset)
    model = tiny(torch.float32, vocab_size=257, block_size=16)
    cfg = train.TrainConfig(batch_size=3)
    windows = train.Windows(val, 16, 1, 257, "val.bin")
    autocast = torch.autocast("cpu", enabled=False)
    got = train.evaluate(model, windows, cfg, 0, 1, torch.device("cpu"), autocast)
    tokens = torch.from_numpy(val.astype(np.int64))
    ce = proto = n = r2 = z2 = 0.0
    used = set()
    for s in range(0, len(tokens) - 1, 16):                       # the last window is short
        x, y = tokens[s:s + 16][:len(tokens) - 1 - s], tokens[s + 1:s + 17]
        z = model.hidden(x[None])[0].detach()
        m = model.mixture(z)
        for t in range(len(y)):
            ce -= (model.logits(z)[t].log_softmax(-1)[y[t]]).item()
            proto -= (model.logits(m.reconstruction)[t].log_softmax(-1)[y[t]]).item()
            used |= {i for i, a in zip(m.ids[t].tolist(), m.gates[t].tolist()) if a > 0}
            n += 1
        r2, z2 = r2 + m.residual.square().sum().item(), z2 + z.square().sum().item()
    assert n == 599
    assert got["val_ce"] == pytest.approx(ce / n, rel=1e-5)
    assert got["val_ce_prototypes"] == pytest.approx(proto / n, rel=1e-5)
    assert got["residual_share"] == pytest.approx(r2 / z2, rel=1e-5) and got["live"] == len(used)


def test_windows_follow_the_order_of_the_epochs():
    windows = train.Windows(np.arange(100, dtype=np.uint16), 8, 5, 100, "train.bin")
    per_epoch = len(train.window_starts(100, 8, 5, 0))
    idx, targets = windows.train(0, 3 * per_epoch)
    order = np.concatenate([train.window_starts(100, 8, 5, epoch) for epoch in range(3)])
    assert idx[:, 0].tolist() == order.tolist() and (targets == idx + 1).all()
    assert torch.equal(windows.train(per_epoch - 1, 2)[0], idx[per_epoch - 1:per_epoch + 1])
    idx, targets = windows.read([96])                             # 3 tokens have a successor
    assert targets.tolist() == [[97, 98, 99, -1, -1, -1, -1, -1]] and idx[0, 0] == 96


def test_ten_and_resume_and_ten_equal_twenty(dataset, tmp_path):
    drop = ["--dropout=0.2"]
    run(dataset, tmp_path / "a", *drop)
    run(dataset, tmp_path / "b", *drop, "--max_iters=10")         # another schedule
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run(dataset, tmp_path / "c", *drop, "--resume")               # nothing there yet
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))

    process = spawn(dataset, tmp_path / "d", *drop, "--resume", "--max_iters=20")
    for line in process.stdout:                                   # Ctrl-C, then gone on
        if line.startswith("step 6:"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate()
    if load_tensors(tmp_path / "d" / "last.pt")["step"] < 20:
        assert process.returncode == 130
    run(dataset, tmp_path / "d", *drop, "--resume")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "d")
    assert same(weights(tmp_path / "a", "ckpt.pt"), weights(tmp_path / "d", "ckpt.pt"))


def test_killed_at_any_moment_resumes_bit_for_bit(dataset, tmp_path):
    """SIGKILL twice on the way, once as soon as a checkpoint is being written."""
    more = ["--dropout=0.1", "--max_iters=60"]
    run(dataset, tmp_path / "a", *more)
    process = spawn(dataset, tmp_path / "b", *more)
    while process.poll() is None and not list(tmp_path.glob("b/*.pt*.tmp")):
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = spawn(dataset, tmp_path / "b", *more, "--resume")
    for line in process.stdout:
        if line.startswith("step 20"):
            break
    process.kill()
    process.communicate()
    (tmp_path / "b/ckpt.pt.123.tmp").write_text("of a killed write")
    (tmp_path / "b/attribution.tmp").mkdir()                      # of a killed index
    run(dataset, tmp_path / "b", *more, "--resume")
    assert [p.name for p in tmp_path.glob("b/*.tmp")] == ["attribution.tmp"]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a", "ckpt.pt"), weights(tmp_path / "b", "ckpt.pt"))


RANKS = ["--dropout=0.1", "--total_batch_tokens=256", "--max_iters=100", "--eval_interval=20"]


@pytest.fixture(scope="module")
def two_ranks(dataset, tmp_path_factory):
    """A run of two gloo processes, each with two micro-batches per step."""
    out = tmp_path_factory.mktemp("ranks") / "two"
    process = spawn(dataset, out, *RANKS, ranks=2)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert said.count("Next: python sample.py") == 1              # one rank speaks for all
    return out


def test_two_ranks_equal_one_and_a_run_may_change_their_number(dataset, two_ranks, tmp_path):
    one, two = tmp_path / "one", shutil.copytree(two_ranks, tmp_path / "two")
    run(dataset, one, *RANKS)
    assert difference(weights(one), weights(two)) < 2e-6
    assert difference(weights(one), first_weights()) > 1e-3       # and training moved them
    assert metrics(one)[-1] == pytest.approx(metrics(two)[-1], rel=1e-4)
    run(dataset, one, *RANKS, "--max_iters=103", "--resume")
    run(dataset, two, *RANKS, "--max_iters=103", "--resume")
    assert difference(weights(one), weights(two)) < 1e-5


def first_weights():
    torch.manual_seed(1337)
    cfg = parse_config(train.TrainConfig, [*TINY, "--vocab_size=257"])
    return PRISM(train.model_config(cfg)).state_dict()


def test_torchrun_brings_a_killed_rank_back(dataset, two_ranks, tmp_path):
    process = spawn(dataset, tmp_path / "b", *RANKS, "--resume", ranks=2)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 40: val_ce") and "killed" not in lines:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children.split()[-1]), signal.SIGKILL)
            lines.append("killed")
    assert process.wait() == 0, "".join(lines)
    assert sum(x.startswith("steps: ") for x in lines) == 2, "".join(lines)  # it started again
    assert same(weights(two_ranks), weights(tmp_path / "b"))
    assert metrics(two_ranks) == metrics(tmp_path / "b")


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_state(dataset, tmp_path, monkeypatch):
    schedule = train.learning_rate

    def explode(step, cfg):
        return 1e30 if step >= 12 else schedule(step, cfg)
    monkeypatch.setattr(train, "learning_rate", explode)
    with pytest.raises(UserError, match=r"the loss is nan at step 1\d; the run stops, "):
        run(dataset, tmp_path)
    last = load_tensors(tmp_path / "last.pt")
    assert last["step"] == 10 and all(v.isfinite().all() for v in last["model"].values())


def test_a_full_disk_keeps_the_earlier_checkpoint(dataset, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        run(dataset, small / "out", "--max_iters=5")
        before = (small / "out/last.pt").read_bytes()
        disk = os.statvfs(small)
        (small / "filler").write_bytes(b"x" * (disk.f_bavail * disk.f_bsize - 2 ** 15))
        with pytest.raises(OSError, match="No space left"):       # run_main prints it on one line
            run(dataset, small / "out", "--resume")
        assert (small / "out/last.pt").read_bytes() == before
        assert not list(small.glob("out/*.tmp"))
        (small / "filler").unlink()
        run(dataset, small / "out", "--resume")
        assert load_tensors(small / "out/last.pt")["step"] == 20
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("word,message", [
    ("--n_protos=3", "unknown option .*the nearest is --n_proto"),
    ("--top_k=13", "top_k is 13"),
    ("--total_batch_tokens=100", "block_size x ranks = 4 x 16 x 1 = 64"),
    ("--dtype=float8", "dtype is float8, expected auto or float32 or bfloat16"),
    ("--device=tpu", "--device=tpu"),
    ("--init_from=/nowhere.pt", "transformers|neither a file"),
    ("--grad_clip=-1", "grad_clip is -1.0, expected at least 0"),
    ("--eval_interval=0", "eval_interval is 0, expected at least 1"),
    ("--batch_size=0", "batch_size is 0"),
    ("--total_batch_tokens=-128", "total_batch_tokens is -128"),
    ("--learning_rate=nan", "takes --learning_rate=float"),
])
def test_an_option_out_of_range_is_refused(dataset, tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        run(dataset, tmp_path / "x", word)
    assert not (tmp_path / "x").exists()


def test_bad_data_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="the dataset in .*nowhere.*python data/prepare.py"):
        run("nowhere", tmp_path / "x")
    with pytest.raises(UserError, match="beyond the model's vocabulary of 10"):
        run(dataset, tmp_path / "x", "--vocab_size=10")
    text = list(b"abcd" * 200)
    odd = write_dataset(tmp_path / "d", [*text[:77], 300, *text], text)
    with pytest.raises(UserError, match="token 300 is beyond the model's vocabulary"):
        run(odd, tmp_path / "x")
    with pytest.raises(UserError, match="expected two windows of block_size"):
        run(write_dataset(tmp_path / "e", text[:20], text), tmp_path / "y")


def test_a_run_is_not_mixed_with_another(dataset, tmp_path):
    """A folder with a run, changed options, another text, and files that only seem checkpoints."""
    out = tmp_path / "y"
    run(dataset, out, "--max_iters=2")
    for words, message in ((["--max_iters=4"], "holds a run; give --resume"),
                           (["--resume", "--seed=5"], "started with seed=1337, now seed=5"),
                           (["--resume", "--n_embd=32"], "was started with n_embd=16")):
        with pytest.raises(UserError, match=message):
            run(dataset, out, *words)
    path, whole = out / "last.pt", load_tensors(out / "last.pt")
    torch.save(whole | {"data": "0" * 64}, path)
    with pytest.raises(UserError, match="changed since"):
        run(dataset, out, "--resume")
    for wrong in (whole | {"optimizers": [{}]}, whole | {"model": {}}, {"model": whole["model"]},
                  whole | {"optimizers": whole["optimizers"][:1]}, whole | {"rows": 3}, [1, 2],
                  whole["model"]):
        torch.save(wrong, path)
        with pytest.raises(UserError, match="last.pt cannot be used .*remove it to start"):
            run(dataset, out, "--resume")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="last.pt cannot be used"):
        run(dataset, out, "--resume")


def test_starting_from_other_weights(dataset, tmp_path):
    """The shape is the start's, also for the windows and on resuming; prototypes are attached."""
    run(dataset, tmp_path / "dense", "--n_proto=0", "--block_size=32")
    more = [f"--init_from={tmp_path}/dense", "--n_embd=32", "--head_share=1", "--dropout=0.1",
            "--max_iters=10", "--eval_interval=3"]
    run(dataset, tmp_path / "a", *more)
    last = load_tensors(tmp_path / "a/last.pt")
    assert last["config"]["block_size"] == 32 and last["config"]["n_embd"] == 16
    assert last["config"]["head_share"] == 1 and last["model"]["prototypes"].shape == (12, 16)
    assert metrics(tmp_path / "a")[0]["val_ce"] < metrics(tmp_path / "dense")[1]["val_ce"]
    process = spawn(dataset, tmp_path / "c", *more)
    for line in process.stdout:
        if line.startswith("step 4:"):
            process.kill()
    process.communicate()
    run(dataset, tmp_path / "c", "--head_share=1", "--dropout=0.1", "--max_iters=10",
        "--eval_interval=3", "--resume")                          # init_from is in last.pt
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    with pytest.raises(UserError, match="was started with lambda_rec=0.5, now lambda_rec=7.0"):
        run(dataset, tmp_path / "a", *more, "--resume", "--lambda_rec=7")
    still = ["--max_iters=1", "--learning_rate=1e-9", "--warmup_iters=0"]
    run(dataset, tmp_path / "b", f"--init_from={tmp_path}/a/ckpt.pt", *still)
    assert difference(weights(tmp_path / "a", "ckpt.pt"), weights(tmp_path / "b")) < 1e-6


def test_starting_from_gpt2(dataset, tmp_path):
    """A file with GPT-2's state dict, which stores linear layers as (in, out)."""
    run(dataset, tmp_path / "dense", "--n_proto=0", "--max_iters=1")
    state = weights(tmp_path / "dense")
    for name, value in state.items():
        if ".h." in name and value.dim() == 2:
            state[name] = value.T
    torch.save(state, tmp_path / "gpt2.pt")
    start = f"--init_from={tmp_path}/gpt2.pt"
    run(dataset, tmp_path / "gpt", start, "--max_iters=1", "--learning_rate=1e-9")
    last = load_tensors(tmp_path / "gpt/last.pt")
    assert last["config"]["n_head"] == 1                          # n_embd / 64, at least 1
    assert difference(weights(tmp_path / "dense"), last["model"]) < 1e-6
    run(dataset, tmp_path / "gpt", start, "--resume", "--max_iters=5", "--learning_rate=1e-9")
    assert load_tensors(tmp_path / "gpt/last.pt")["step"] == 5
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no GPT-2 weights|cannot be used"):
        run(dataset, tmp_path / "x", f"--init_from={tmp_path}/list.pt")


def test_the_groups_of_the_optimizers_and_the_schedule():
    model = tiny(torch.float32)
    cfg = train.TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=110, decay=0.5,
                            embed_lr_scale=3.0, proto_lr_scale=7.0, weight_decay=0.3)
    adamw, muon = train.make_optimizers(model, cfg, torch.float32)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = {}
    for group in adamw.param_groups + muon.param_groups:
        seen |= {names[id(p)]: (group["scale"], group["weight_decay"]) for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, facts in seen.items():
        want = (1.0, 0.0) if "ln_" in name or name.endswith("bias") else (1.0, 0.3)
        want = (3.0, 0.3) if ".wte" in name or ".wpe" in name else want
        assert facts == ((7.0, 0.0) if name == "prototypes" else want), name
    moved = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert moved == {n for n in seen if ".h." in n and n.endswith("weight") and "ln_" not in n}
    one, = train.make_optimizers(model, parse_config(train.TrainConfig, ["--muon=false"]), None)
    assert type(one) is torch.optim.AdamW
    assert sum(len(group["params"]) for group in one.param_groups) == len(names)
    rates = [round(train.learning_rate(s, cfg), 4) for s in (0, 4, 9, 10, 55, 82, 109)]
    assert rates == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5091, 0.0182]
    assert train.learning_rate(3, train.TrainConfig(warmup_iters=0, decay=0.0)) == 4e-3


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_an_update_is_made_orthogonal(shape):
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(g / g.norm(), full_matrices=False)
    for _ in range(5):                                            # on the singular values alone
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    got = train.orthogonal(g, torch.float64)
    assert torch.allclose(got, u @ torch.diag(s) @ v, atol=1e-12)
    assert 0.65 < s.min() and s.max() < 1.25
    assert not train.orthogonal(0 * g, torch.float64).any()


def test_muon_is_torchs_in_bfloat16():
    """torch.optim.Muon knows bfloat16 only; there both take the very same steps."""
    ours, theirs = (torch.nn.Linear(8, 24, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    group = {"params": ours.parameters(), "weight_decay": 0.3}
    a = train.Muon([group], torch.bfloat16)
    a.param_groups[0]["lr"] = 0.1
    b = torch.optim.Muon(theirs.parameters(), 0.1, 0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
        assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


@pytest.mark.parametrize("name,millions,prototypes", [
    ("laptop", 2.78, 1024), ("tinystories", 31, 2048), ("prism-130m", 128, 4096),
    ("prism-350m", 363, 8192), ("prism-770m", 784, 8192), ("prism-1.6b", 1583, 16384)])
def test_presets_build(name, millions, prototypes):
    """Each preset builds on the meta device and divides its batch among its GPUs."""
    cfg = parse_config(train.TrainConfig, [str(ROOT / f"config/{name}.toml")]).check_run()
    cfg.vocab_size = cfg.vocab_size or 4096
    with torch.device("meta"):
        model = PRISM(train.model_config(cfg))
    n = sum(p.numel() for p in model.parameters())
    assert n / 1e6 == pytest.approx(millions, rel=0.02) and cfg.n_proto == prototypes
    ranks = 8 if name.startswith("prism") else 1
    assert cfg.total_batch_tokens % (cfg.batch_size * cfg.block_size * ranks) == 0
