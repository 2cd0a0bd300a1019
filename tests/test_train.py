"""The trainer: exact resume, ranks, what it writes, and what it refuses."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_dataset

import prism
import train
from prism import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--n_proto=12", "--top_k=3", "--batch_size=4",
        "--total_batch_tokens=128", "--warmup_iters=4", "--max_iters=20", "--eval_interval=5", "--device=cpu", "--dtype=float32"]


def run(dataset, out, *more):
    """train.py in this process; gives the signals back to pytest."""
    keep = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main([f"--dataset={dataset}", f"--out_dir={out}", *TINY, *more])
    finally:
        for s, handler in keep.items():
            signal.signal(s, handler)


def spawn(dataset, out, *more, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}", "--max-restarts=3"]
    return subprocess.Popen([*launch, str(ROOT / "train.py"), f"--dataset={dataset}", f"--out_dir={out}", *TINY, *more],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(out, name="last.pt"):
    return prism.load_tensors(Path(out) / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_run_and_what_it_writes(dataset, tmp_path, capsys):
    run(dataset, tmp_path / "out-dense", "--n_proto=0")
    run(dataset, tmp_path / "out")
    out = tmp_path / "out"
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [int(r["step"]) for r in rows] == [5, 10, 15, 20]
    assert float(rows[-1]["val_ce"]) < float(rows[0]["val_ce"]) < 5.6  # ln 257 = 5.55
    assert all(float(r[k]) >= 0 for r in rows for k in ("rec", "t2p", "p2t", "residual_share"))
    ckpt, last = (prism.load_tensors(out / n) for n in ("ckpt.pt", "last.pt"))
    assert last["step"] == 20 and ckpt["best"] == last["best"] == pytest.approx(min(float(r["val_ce"]) for r in rows), abs=1e-5)
    assert json.loads((out / "config.json").read_text())["n_proto"] == 12
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.tmp"))
    printed = capsys.readouterr().out
    assert "device: cpu, 1 rank, float32 (as asked), eager" in printed and "live" in printed and "s to go" in printed
    model, _ = prism.load_checkpoint(out)
    assert prism.load_tokenizer(out).decode(model.generate(torch.tensor([[116]]), 5)[0].tolist()).startswith("t")


def test_evaluation_is_the_mean_over_every_validation_token(dataset):
    _, val, meta = prism.load_dataset(dataset)
    model = tiny(torch.float32, vocab_size=257, block_size=16)
    cfg = train.TrainConfig(batch_size=3)
    windows = train.Windows(val, 16, 1, 257, "val.bin")
    got = train.evaluate(model, windows, cfg, 0, 1, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    tokens = torch.from_numpy(val.astype(np.int64))
    ce = proto = n = r2 = z2 = 0.0
    used = set()
    for s in range(0, len(tokens) - 1, 16):  # 600 tokens: the last window is short
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
    assert got["val_ce"] == pytest.approx(ce / n, rel=1e-5) and got["val_ce_prototypes"] == pytest.approx(proto / n, rel=1e-5)
    assert got["residual_share"] == pytest.approx(r2 / z2, rel=1e-5) and got["live"] == len(used)


def test_ten_and_resume_and_ten_equal_twenty(dataset, tmp_path):
    drop = ["--dropout=0.2"]
    run(dataset, tmp_path / "a", *drop)
    run(dataset, tmp_path / "b", *drop, "--max_iters=10")  # another schedule: must not give the same weights
    run(dataset, tmp_path / "c", *drop, "--resume")        # nothing there yet: starts afresh
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c")) and not same(weights(tmp_path / "a"), weights(tmp_path / "b"))

    process = spawn(dataset, tmp_path / "d", *drop)
    for line in process.stdout:  # stopped on the way by SIGINT, then gone on
        if line.startswith("step 10: validation"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate()
    step = prism.load_tensors(tmp_path / "d" / "last.pt")["step"]
    assert step >= 10
    if step < 20:
        assert process.returncode == 130
    run(dataset, tmp_path / "d", *drop, "--resume")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    drop_speed = [[{k: v for k, v in r.items() if k != "tokens_per_s"} for r in train.read_metrics(tmp_path / x / "metrics.csv")] for x in "ad"]
    assert drop_speed[0] == drop_speed[1]  # also the means of the interval in which the signal came
    assert same(weights(tmp_path / "a", "ckpt.pt"), weights(tmp_path / "d", "ckpt.pt"))


def test_killed_at_any_moment_resumes_bit_for_bit(dataset, tmp_path):
    """SIGKILL twice on the way, once as soon as a checkpoint is being written. experiments/resume.py tries many more."""
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
    run(dataset, tmp_path / "b", *more, "--resume")
    assert not list(tmp_path.glob("b/*.tmp"))
    assert [r["step"] for r in train.read_metrics(tmp_path / "b/metrics.csv")] == list(range(5, 61, 5))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a", "ckpt.pt"), weights(tmp_path / "b", "ckpt.pt"))


@pytest.mark.parametrize("batch", [[], ["--total_batch_tokens=256"]])  # one micro-batch a rank; two, the first without a reduction
def test_two_ranks_equal_one_and_a_run_may_change_their_number(dataset, tmp_path, batch):
    """Accumulation steps in one process against half as many in each of two gloo processes, dropout on; then 2 ranks -> 1."""
    more = ["--dropout=0.1", "--eval_interval=5", *batch]
    two = spawn(dataset, tmp_path / "two", *more, "--max_iters=5", ranks=2)
    run(dataset, tmp_path / "one", *more, "--max_iters=5")
    said = two.communicate()[0]
    assert two.returncode == 0, said
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert max((a[k] - v).abs().max().item() for k, v in tiny_start().items()) > 1e-3  # and training moved them
    rows = [train.read_metrics(tmp_path / x / "metrics.csv")[-1] for x in ("one", "two")]
    for key in ("loss", "ce", "rec", "t2p", "p2t", "val_ce", "val_ce_prototypes", "residual_share", "live"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4), key
    run(dataset, tmp_path / "one", *more, "--max_iters=8", "--resume")
    run(dataset, tmp_path / "two", *more, "--max_iters=8", "--resume")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


def tiny_start():
    torch.manual_seed(1337)
    cfg = prism.parse_config(train.TrainConfig, [*TINY, "--vocab_size=257"])
    return prism.PRISM(train.model_config(cfg)).state_dict()


def test_torchrun_brings_a_killed_rank_back(dataset, tmp_path):
    more = ["--max_iters=300", "--eval_interval=20"]
    reference = spawn(dataset, tmp_path / "a", *more, ranks=2)
    assert reference.wait() == 0
    process = spawn(dataset, tmp_path / "b", *more, "--resume", ranks=2)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 40: validation") and not any("killed" in x for x in lines):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            lines.append("killed")
    assert process.wait() == 0, "".join(lines)
    assert sum(x.startswith("steps: ") for x in lines) == 2, "".join(lines)  # it started again
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_state(dataset, tmp_path, monkeypatch):
    schedule = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 1e30 if step >= 12 else schedule(step, cfg))
    with pytest.raises(UserError, match=r"the training loss is nan at step 1\d; the run stops, .*last.pt holds the last good state"):
        run(dataset, tmp_path)
    last = prism.load_tensors(tmp_path / "last.pt")
    assert last["step"] == 10 and all(v.isfinite().all() for v in last["model"].values())


def test_a_full_disk_keeps_the_earlier_checkpoint(dataset, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        run(dataset, small / "out", "--max_iters=5")
        before = (small / "out/last.pt").read_bytes()
        (small / "filler").write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_bsize - 4096))
        with pytest.raises(UserError, match="could not be written .* what was there before is untouched"):
            run(dataset, small / "out", "--resume")
        assert (small / "out/last.pt").read_bytes() == before and not list(small.glob("out/*.tmp"))
        (small / "filler").unlink()
        run(dataset, small / "out", "--resume")
        assert prism.load_tensors(small / "out/last.pt")["step"] == 20
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_bad_input_is_refused(dataset, tmp_path):
    for words, message in ((["--n_protos=3"], "unknown option 'n_protos'; the nearest is 'n_proto'"), (["--top_k=13"], "top_k is 13"),
                           (["--total_batch_tokens=100"], "expected a multiple of batch_size x block_size x ranks = 4 x 16 x 1 = 64"),
                           (["--dtype=float8"], "dtype=float8"), (["--device=tpu"], "cannot be used here"), (["--vocab_size=10"], "vocab_size 10"),
                           (["--init_from=/nowhere.pt", "--n_proto=0"], "transformers|no file")):
        with pytest.raises(UserError, match=message):
            run(dataset, tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()
    for words, message in ((["--grad_clip=-1"], "grad_clip is -1.0, expected at least 0"), (["--eval_interval=0"], "eval_interval is 0, expected at least 1"),
                           (["--batch_size=0"], "batch_size is 0"), (["--total_batch_tokens=-128"], "total_batch_tokens is -128"),
                           (["--seed=-1"], "seed is -1"), (["--beta1=1"], "beta1 is 1.0, expected at least 0 and below 1"),
                           (["--learning_rate=nan"], "learning_rate is nan, expected above 0"), (["--learning_rate=inf"], "learning_rate is inf")):
        with pytest.raises(UserError, match=message):
            run(dataset, tmp_path / "x", *words)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        run(dataset, tmp_path / "file")
    with pytest.raises(UserError, match="no prepared dataset in .*nowhere.*python data/prepare.py"):
        run("nowhere", tmp_path / "x")
    text = list(b"abcd" * 200)
    with pytest.raises(UserError, match="token 300 at position 77 is beyond the vocabulary"):
        run(write_dataset(tmp_path / "d", text[:77] + [300] + text, text), tmp_path / "x")
    with pytest.raises(UserError, match="do not fill two windows"):
        run(write_dataset(tmp_path / "e", text[:20], text), tmp_path / "x2")
    run(dataset, tmp_path / "y", "--max_iters=2")
    for words, message in (([], "already holds a run; go on with --resume"), (["--resume", "--seed=5"], "was started with seed=1337, now seed=5"),
                           (["--resume", "--n_embd=32"], "was started with n_embd=16")):
        with pytest.raises(UserError, match=message):
            run(dataset, tmp_path / "y", *words)
    with pytest.raises(UserError, match="another version"):
        run(write_dataset(tmp_path / "d", text[::-1], text), tmp_path / "x", "--resume")
    (tmp_path / "y/metrics.csv").write_text("a,b\n1,x\n")
    with pytest.raises(UserError, match="metrics.csv is damaged"):
        run(dataset, tmp_path / "y", "--resume")
    whole = prism.load_tensors(tmp_path / "y/last.pt")
    torch.save(whole | dict(optimizer={}), tmp_path / "y/last.pt")
    (tmp_path / "y/metrics.csv").unlink()
    with pytest.raises(UserError, match="no state of this optimizer"):
        run(dataset, tmp_path / "y", "--resume")
    del whole["data"]
    torch.save(whole, tmp_path / "y/last.pt")
    with pytest.raises(UserError, match="no checkpoint of train.py"):
        run(dataset, tmp_path / "y", "--resume")
    (tmp_path / "y/last.pt").write_bytes((tmp_path / "y/last.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        run(dataset, tmp_path / "y", "--resume")


def test_starting_from_other_weights(dataset, tmp_path):
    """The shape is the start's, also for the windows and on resuming; prototypes are attached where there were none."""
    run(dataset, tmp_path / "dense", "--n_proto=0", "--block_size=32")
    more = [f"--init_from={tmp_path}/dense", "--n_embd=32", "--head_share=1", "--dropout=0.1"]
    run(dataset, tmp_path / "a", *more, "--max_iters=10")
    run(dataset, tmp_path / "b", *more, "--max_iters=10", "--eval_interval=3")
    last = prism.load_tensors(tmp_path / "a/last.pt")
    assert last["config"]["block_size"] == 32 and last["config"]["n_embd"] == 16 and last["config"]["head_share"] == 1
    assert last["model"]["prototypes"].shape == (12, 16)
    start = prism.load_tensors(tmp_path / "dense/ckpt.pt")
    assert last["before"] == start["step"] * start["train_config"]["total_batch_tokens"] > 0  # the same text: attribution counts it as read
    process = spawn(dataset, tmp_path / "c", *more, "--max_iters=10", "--eval_interval=3")
    for line in process.stdout:
        if line.startswith("step 3: validation"):
            process.kill()
    process.communicate()
    run(dataset, tmp_path / "c", *more, "--max_iters=10", "--resume")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert prism.load_tensors(tmp_path / "c/last.pt")["before"] == last["before"]
    run(dataset, tmp_path / "seed", *more, "--max_iters=5", "--seed=5")
    assert prism.load_tensors(tmp_path / "seed/last.pt")["before"] == 0  # part of an epoch in another order
    with pytest.raises(UserError, match="was started with lambda_rec=0.1, now lambda_rec=7.0"):
        run(dataset, tmp_path / "a", *more, "--resume", "--lambda_rec=7")
    dense, retro = (train.read_metrics(tmp_path / n / "metrics.csv") for n in ("dense", "a"))
    assert retro[0]["val_ce"] < dense[1]["val_ce"]
    torch.save(weights(tmp_path / "dense"), tmp_path / "gpt2.pt")  # a bare state dict with GPT-2's names
    run(dataset, tmp_path / "gpt", f"--init_from={tmp_path}/gpt2.pt", "--max_iters=1", "--eval_interval=1", "--learning_rate=1e-9")
    assert prism.load_tensors(tmp_path / "gpt/last.pt")["config"]["n_head"] == 1  # n_embd / 64, at least 1
    assert prism.load_tensors(tmp_path / "gpt/last.pt")["before"] == 0


def test_what_the_optimizer_does():
    model = tiny(torch.float32)
    cfg = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110, proto_lr_scale=7.0, weight_decay=0.3)
    decayed, plain, protos = train.make_optimizer(model, cfg, torch.device("cpu")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in protos["params"]] == ["prototypes"] and (protos["weight_decay"], protos["scale"]) == (0.0, 7.0)
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"]) and plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.3 and len(decayed["params"]) + len(plain["params"]) + 1 == len(names)
    assert [round(train.learning_rate(s, cfg), 4) for s in (0, 4, 9, 10, 60, 110)] == [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]


@pytest.mark.parametrize("name,millions,prototypes", [("laptop", 2.78, 1024), ("tinystories", 31, 2048), ("prism-130m", 128, 4096),
                                                      ("prism-350m", 363, 8192), ("prism-770m", 784, 8192), ("prism-1.6b", 1583, 16384)])
def test_presets_build(name, millions, prototypes):
    """Every preset builds on the meta device, runs forward there, and divides its batch among its GPUs."""
    cfg = prism.parse_config(train.TrainConfig, [str(ROOT / f"config/{name}.toml")])
    cfg.vocab_size = cfg.vocab_size or 4096
    with torch.device("meta"):
        model = prism.PRISM(train.model_config(cfg))
        logits, _ = model(torch.zeros(1, cfg.block_size, dtype=torch.long))
    n = sum(p.numel() for p in model.parameters())
    print(f"{name}: {n:,} parameters")
    assert n / 1e6 == pytest.approx(millions, rel=0.02) and cfg.n_proto == prototypes and logits.shape == (1, 1, cfg.vocab_size)
    ranks = 8 if name.startswith("prism") else 1
    assert cfg.total_batch_tokens % (cfg.batch_size * cfg.block_size * ranks) == 0
