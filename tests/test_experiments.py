"""Each script of experiments/ in its smallest form: it runs, and its figures mean what it says."""
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_run
from test_train import TINY

import suppress
import train

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))


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
    (name, row), = json.loads((tmp_path / "q.json").read_text())["against dense"].items()
    assert name == f"tiny {options}" and row["loss"] == pytest.approx(sum(row["losses"]) / sum(row["losses_dense"]) - 1)
    again = script("quality.py", *words)  # nothing is run twice
    assert again[-1] == lines[-1] and len(again) < len(lines)


def test_quality_refuses_what_has_no_twin(tmp_path):
    import quality
    for wrong, message in (("--seeds=0", "seeds is 0"), ("--options=--n_proto=0", "prototypes"), (f"--results={tmp_path}/bad.json", "bad.json is damaged")):
        (tmp_path / "bad.json").write_text("[")
        with pytest.raises(quality.UserError, match=message):
            quality.main([wrong])


def test_quality_grid_and_its_pareto_curve(dataset, tmp_path, monkeypatch):
    import quality
    assert quality.pareto({"a": (1, 5), "b": (2, 2), "c": (3, 3), "d": (4, 1), "e": (1, 6)}) == ["a", "b", "d"]
    rows = {"": (4.04, 4.4), "--n_proto=0": (4.0, None), "--top_k=8": (4.02, 4.5), "--lambda_rec=1": (4.2, 4.3)}

    def train(dataset, seed, options):
        ce, without = rows[options.removesuffix("--max_iters=7").strip()]
        return dict(val_ce=ce) | ({} if without is None else dict(val_ce_prototypes=without, residual_share=0.1, live=9))
    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "GRID", ["--top_k=8", "--lambda_rec=1"])
    quality.main(["--grid=true", f"--datasets={dataset}", "--options=--max_iters=7", f"--results={tmp_path}/q.json"])
    result = json.loads((tmp_path / "q.json").read_text())
    assert {n: (v["loss"], v["without_residual"]) for n, v in result["grid"]["rows"]["tiny"].items()} == {
        "default": pytest.approx((0.01, 0.1)), "--top_k=8": pytest.approx((0.005, 0.125)), "--lambda_rec=1": pytest.approx((0.05, 0.075))}
    assert result["against dense"] == {} and (tmp_path / "quality-grid.png").read_bytes()[:4] == b"\x89PNG"


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


def test_planted(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import planted
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprst", k=5)) for _ in range(40)]
    rows = [{"text": " ".join(rng.choices(rng.sample(words, 8), k=40))} for _ in range(130)]
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subprocess.run([sys.executable, ROOT / "data/prepare.py", f"{tmp_path}/real.jsonl", f"--data_dir={tmp_path}", "--vocab_size=500"], check=True)
    options = [f"--dataset={tmp_path}/real", "--models=1", "--plantings=5", "--max_iters=20", f"--results={tmp_path}/p.json",
               "--options=--n_layer=1 --n_head=1 --n_embd=16 --n_proto=16 --block_size=64 --batch_size=8 --total_batch_tokens=512"]
    planted.main(options)
    lines, found = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "p.json").read_text())
    assert found["table"]["words"]["invented exact"]["first"] == 5  # rare words betray the document, however little is trained
    assert lines[-1].startswith(f"planted document first: block {found['table']['block']['invented exact']['first']} of 5 (cosine ")
    planted.main(options)
    assert capsys.readouterr().out.splitlines() == lines[1:]  # nothing is run twice


def test_refit(made, tmp_path):
    words = [f"--out_dir={made}", "--tokens=2000", "--documents=3", "--queries=40", "--mu=0.5", "--largest=1", f"--out={tmp_path}/r.json"]
    lines = script("refit.py", *words)
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["documents"]) == 3 and f" query tokens: r full {found['pearson']['full']:.4f}, joined" in lines[-1]
    assert found["pearson"]["full"] > 0.97 > found["pearson"]["none"] and 0 < found["off_diagonal_share"] < 1
    assert script("refit.py", *words)[-1] == lines[-1]  # finished documents are not refitted
    script("refit.py", *words[:-1], "--fitted=true", f"--out={tmp_path}/f.json")
    fitted = json.loads((tmp_path / "f.json").read_text())
    assert fitted["fit_on_all"]["steps"] > 0 == found["fit_on_all"]["steps"] and fitted["pearson"]["full"] > 0.97


def trains_here(monkeypatch, module):
    """common.trained of an experiment, in this process: seconds instead of a start of Python each."""
    def trained(out_dir, *options):
        if not (Path(out_dir) / "done").exists():
            keep = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
            train.main([f"--out_dir={out_dir}", *options, "--resume"])
            (Path(out_dir) / "done").write_text("")
            for s, handler in keep.items():
                signal.signal(s, handler)
        return Path(out_dir)
    monkeypatch.setattr(module, "trained", trained)


def test_lds(made, tmp_path, monkeypatch, capsys):
    import lds
    trains_here(monkeypatch, lds)
    dataset = json.loads((made / "config.json").read_text())["dataset"]
    words = (f"--dataset={dataset}", "--models=4", "--again=3", "--queries=6", "--mus=0.01,0.1", "--methods=block,cosine", "--removals=2", "--removed=cosine", "--full=9", "--ensemble=1", f"--work={tmp_path}/w", f"--out={tmp_path}/l.json",
             "--train=--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --max_iters=30 --batch_size=4 --total_batch_tokens=64 --eval_interval=30 --device=cpu")
    lds.main(words)
    last = capsys.readouterr().out.splitlines()[-1]
    result = json.loads((tmp_path / "l.json").read_text())
    assert list(result["lds"]) == ["block", "block, by source", "cosine", "cosine, by source", "no Hessian", "full", "block, 2 models", "block, share 0.01", "joined, share 0.01", "block, share 0.1", "joined, share 0.1"]
    assert all(-1 <= x["mean"] <= 1 for x in result["lds"].values()) and "4 models, 6 queries; without the best by cosine" in last
    assert result["lds"]["block"] == result["lds"]["block, share 0.1"] and result["full"]["residual"] < 0.01 and all(0 < x["both"] < 3 for x in result["lds"].values()) and -1 <= result["seeds"]["mean"] <= 1
    assert result["ceiling"] == pytest.approx(max(0, result["seeds"]["mean"]) ** 0.5)
    (folder,) = tmp_path.glob("w/*-2")  # the seed of the first half
    half = json.loads((folder / "data/docs.json").read_text())
    whole = json.loads((Path(dataset) / "docs.json").read_text())
    kept = [x for x in half if x["split"] == "train"]
    assert len(kept) == sum(x["split"] == "train" for x in whole) // 2
    a, b = (np.fromfile(Path(f) / "train.bin", np.uint16) for f in (dataset, folder / "data"))
    for x in kept:
        y = next(y for y in whole if y["split"] == "train" and y["title"] == x["title"])
        assert (b[x["start"]:x["start"] + x["length"]] == a[y["start"]:y["start"] + y["length"]]).all()
    scores, titles = np.load(tmp_path / "w/scores/cosine.npz")["scores"], [x["title"] for x in whole if x["split"] == "train"]
    gone = [set(titles) - {x["title"] for x in json.loads((f / "data/docs.json").read_text()) if x["split"] == "train"} for f in tmp_path.glob("w/*-1")]
    for q, (n, share) in zip(result["removal"]["queries"], result["removal"]["documents_and_share"]["cosine"]):
        best = np.argsort(-scores[q])
        length = [next(x["length"] for x in whole if x["split"] == "train" and x["title"] == titles[d]) for d in best]
        assert {titles[d] for d in best[:n]} in gone and sum(length[:n - 1]) < 0.05 * sum(length) <= sum(length[:n]) and share == pytest.approx(sum(length[:n]) / sum(length))
    assert result["lds"]["cosine"]["first_minus_this"][0] == pytest.approx(result["lds"]["block"]["mean"] - result["lds"]["cosine"]["mean"])

    def never(argv):
        raise AssertionError("trained again")
    monkeypatch.setattr(train, "main", never)
    lds.main(words)
    assert capsys.readouterr().out.splitlines()[-1] == last
    (tmp_path / "w/scores/cosine.npz").write_bytes(b"damaged")
    lds.main(words)  # asked again
    assert capsys.readouterr().out.splitlines()[-1] == last
    for wrong, message in (("--methods=block,guess", "no method 'guess'"), ("--removals=-1", "removals -1"), ("--mus=a", "mus=a, expected numbers"), ("--mus=0.1,-1", "numbers above 0"), ("--models=2", "models 2"),
                           ("--methods=random,block", "ensemble of random")):
        with pytest.raises(lds.UserError, match=message):
            lds.main([*words, wrong])


def test_a_run_is_trained_once_and_never_under_other_options(made, tmp_path):
    import common
    words = [w for w in TINY if "max_iters" not in w] + [f"--dataset={json.loads((made / 'config.json').read_text())['dataset']}"]
    out = common.trained(tmp_path / "r", *words, "--max_iters=5")
    stamp = (out / "ckpt.pt").stat().st_mtime_ns
    assert common.trained(tmp_path / "r", *words, "--max_iters=5") == out and (out / "ckpt.pt").stat().st_mtime_ns == stamp
    with pytest.raises(common.UserError, match="was trained with other options"):
        common.trained(tmp_path / "r", *words, "--max_iters=10")
    (out / "done").unlink()  # as after a kill
    with pytest.raises(common.UserError, match="was begun with other options"):
        common.trained(tmp_path / "r", *words, "--max_iters=10")
    with pytest.raises(common.UserError, match="already holds a run that no experiment made"):
        common.trained(made, *words)
    with pytest.raises(common.UserError, match="train.py failed"):
        common.trained(tmp_path / "bad", "--n_layer=0")
    options = common.options_of(common.torch.load(out / "ckpt.pt", weights_only=True))
    assert "--max_iters=5" in options and "--n_proto=12" in options and not any(o.startswith(("--out_dir", "--resume")) for o in options)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(common.UserError, match="x.json is damaged"):
        common.kept(tmp_path / "x.json")
    assert common.kept(tmp_path / "none.json") == {}


def test_scores_of_rivals_against_plain_gradients(made, tmp_path):
    import rivals
    np.save(tmp_path / "q.npy", [0, 32])
    run, got = rivals.attribute.Run(made, "cpu"), {}
    for method in ("trak", "gradient", "cosine", "random"):
        rivals.main([f"--out_dir={made}", f"--method={method}", "--dimension=64", f"--queries={tmp_path}/q.npy", f"--out={tmp_path}/{method}.npz"])
        x = np.load(tmp_path / f"{method}.npz", allow_pickle=False)
        got[method] = x["scores"]
        assert got[method].shape == (2, len(run.titles)) and json.loads(str(x["about"]))["peak_bytes"] > 10 ** 8
    starts, W = rivals.attribute.seen_windows(run.ckpt, len(run.tokens)), run.model.transformer.wte.weight

    def of(text, at):  # the gradient of the output matrix alone
        raw, w = torch.from_numpy(text[at:at + run.T + 1].astype(np.int64))[None], W.detach().clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy((run.model.hidden(raw[:, :-1]) @ w.T)[0], raw[0, 1:], reduction="sum")
        return torch.autograd.grad(loss, w)[0]
    want = np.zeros((2, len(run.titles)))
    for q, at in enumerate((0, 32)):
        mine = of(run.val, at)
        for s in starts:
            owner = run.documents_of(np.arange(s + 1, s + 1 + run.T))
            np.add.at(want[q], owner, (mine * of(run.tokens, s)).sum().item() / run.T)
    assert np.allclose(got["gradient"], want, rtol=1e-3, atol=1e-3 * abs(want).max())
    assert abs(got["cosine"]).max() <= 1 + 1e-6
    model, rng = rivals.Logits(run.model).requires_grad_(True), torch.Generator().manual_seed(1)
    weights = [p for n, p in model.named_parameters() if "prototypes" not in n]
    size = sum(p.numel() for p in weights)
    place, sign = torch.randint(64, (size,), generator=rng), torch.randint(0, 2, (size,), generator=rng) * 2.0 - 1

    def projected(text, at):
        raw = torch.from_numpy(text[at:at + run.T + 1].astype(np.int64))[None]
        g = sign * torch.cat([u.flatten() for u in torch.autograd.grad(torch.nn.functional.cross_entropy(model(raw[:, :-1])[0], raw[0, 1:], reduction="sum"), weights)])
        return torch.stack([g[place == j].sum() for j in range(64)]).double()
    phi = torch.stack([projected(run.tokens, s) for s in starts])
    K = phi.T @ phi + 1e-3 * (phi.T @ phi).diagonal().mean() * torch.eye(64)
    want = rivals.of_windows(run, starts, (torch.stack([projected(run.val, at) for at in (0, 32)]) @ torch.linalg.solve(K, phi.T)).numpy())
    assert np.allclose(got["trak"], want, atol=1e-3 * abs(want).max())
    for wrong, message in (("--method=guess", "no method 'guess'"), ("--dimension=0", "dimension is 0"), ("--last=99", "last is 99"), (f"--queries={made}/ckpt.pt", "cannot be read"),
                           (f"--queries={tmp_path}/far.npy", "expected whole numbers")):
        np.save(tmp_path / "far.npy", [10 ** 6])
        with pytest.raises(rivals.UserError, match=message):
            rivals.main([f"--out_dir={made}", "--method=random", f"--queries={tmp_path}/q.npy", f"--out={tmp_path}/x.npz", wrong])


def test_ekfac_of_the_package_with_much_damping_is_the_gradient_product(made, tmp_path, monkeypatch):
    """H + lambda I is lambda I then, so lambda times the scores of the package are products of the linear layers' gradients: sign, order and sums."""
    arguments = pytest.importorskip("kronfluence.arguments")
    import rivals
    plain = arguments.ScoreArguments
    monkeypatch.setattr(arguments, "ScoreArguments", lambda **k: plain(**k | {"damping_factor": 1e8}))
    np.save(tmp_path / "q.npy", [0, 32])
    rivals.main([f"--out_dir={made}", "--method=ekfac", f"--queries={tmp_path}/q.npy", f"--out={tmp_path}/e.npz"])
    x = np.load(tmp_path / "e.npz", allow_pickle=False)
    run = rivals.attribute.Run(made, "cpu")
    model = rivals.Logits(run.model).requires_grad_(True)
    weights = [p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()]

    def of(text, at, mask=1.0):
        raw = torch.from_numpy(text[at:at + run.T + 1].astype(np.int64))[None]
        loss = torch.nn.functional.cross_entropy(model(raw[:, :-1])[0], raw[0, 1:], reduction="none") * mask
        return torch.cat([u.flatten() for u in torch.autograd.grad(loss.sum(), weights)])
    mine, want = torch.stack([of(run.val, at) for at in (0, 32)]), np.zeros_like(x["scores"])
    for s in rivals.attribute.seen_windows(run.ckpt, len(run.tokens)):
        owner = run.documents_of(np.arange(s + 1, s + 1 + run.T))
        for d in set(owner.tolist()):
            want[:, d] += (mine @ of(run.tokens, s, torch.from_numpy((owner == d).astype(np.float32)))).numpy()
    assert np.allclose(1e8 * x["scores"], want, atol=0.02 * abs(want).max())  # in a window of two documents the later loss reaches the earlier places
    assert (1e8 * x["scores"]).sum(1) == pytest.approx(want.sum(1), rel=1e-3) and json.loads(str(x["about"]))["once_s"] > 0


def test_lds_of_scores_that_are_right_is_one():
    import lds
    rng = np.random.default_rng(0)
    scores, kept = rng.standard_normal((5, 40)), rng.random((12, 40)) < 0.5
    assert lds.lds(scores, kept, -(kept @ scores.T)) == pytest.approx(np.ones(5)) and lds.lds(scores, kept, kept @ scores.T) == pytest.approx(-np.ones(5))


def test_scores_by_source_and_the_jackknife():
    import lds
    scores, source, tokens = np.array([[1.0, 2, 3, 4], [0, 1, 0, -1]]), np.array([0, 1, 0, 1]), np.array([10, 5, 30, 15])
    assert lds.by_source(scores, source, tokens) == pytest.approx(np.array([[1, 1.5, 3, 4.5], [0, 0, 0, 0]]))
    x = np.array([0.1, 0.5, 0.2, 0.9])
    assert lds.jackknife(lambda m: x[m], 4) == pytest.approx(1.96 * x.std(ddof=1) / 2)  # of a mean: its standard error


def test_the_joint_hessian_of_lds_is_that_of_its_windows(made):
    import lds
    index = lds.attribute.Index(made, "cpu")
    run, n = index.run, 40
    b = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    x, residual, _ = lds.full(index, b, lds.LDSConfig(full=n, seed=3))
    starts = lds.attribute.sampled(lds.attribute.seen_windows(run.ckpt, len(run.tokens)), 3, n)[0]
    P, W = run.model.prototypes.double(), run.model.transformer.wte.weight.double()
    ids, gates, _, _, _, _ = lds.attribute.records(run.model, *run.windows(starts))
    a = torch.zeros(len(ids), 12, dtype=torch.double).scatter_(1, ids, gates.double())
    held = run.model.hidden(run.windows(starts)[0]).flatten(0, 1).double() - a @ P             # gates and residuals are held fixed
    H = torch.autograd.functional.hessian(lambda p: (held + a @ p.view(12, 16)).matmul(W.T).logsumexp(-1).sum(), P.flatten())
    H = H * index.meta["windows"] * index.meta["window_weight"] / n + index.meta["mu"] * torch.eye(192)
    want = torch.linalg.solve(H, b.double().flatten(1).T).T.view(2, 12, 16)
    assert residual < 0.01 and (x - want).norm() < 0.05 * want.norm()


def test_a_retrofitted_model_beside_its_dense_twin(made, tmp_path, monkeypatch, capsys):
    import lds
    import retrofit
    trains_here(monkeypatch, retrofit)
    trains_here(monkeypatch, lds)
    words = [f"--out_dir={made}", f"--dense={tmp_path}/dense", "--recipes=--max_iters=20;--max_iters=40 --learning_rate=0.001", "--train=--eval_interval=20", "--behavior=h", "--prompts=6",
             "--suppress=--mode=zero --price=1000 --max_new_tokens=20 --steps=20 --tokens=1500", f"--work={tmp_path}/w", f"--out={tmp_path}/r.json"]
    retrofit.main(words)
    last, result = capsys.readouterr().out.splitlines()[-1], json.loads((tmp_path / "r.json").read_text())
    assert len(result["sides"]) == 8 and result["sides"]["dense"]["against_dense"] == 0 and result["suppression"].keys() == {"PRISM, trained on", "retrofitted"}
    best, recipe = min((x["val_ce"], n.split(": ")[1]) for n, x in result["sides"].items() if n.startswith("retrofitted"))
    same = result["sides"][f"PRISM, trained on: {recipe}"]["val_ce"]
    assert last.startswith(f"retrofitted {best:.4f} against from scratch with the same further training {same:.4f}") and result["against_scratch"] == pytest.approx(best / same - 1)
    assert lds.load_checkpoint(tmp_path / "w/dense-1")[0].config.n_proto == 0 < lds.load_checkpoint(tmp_path / "w/retrofitted-1")[0].config.n_proto
    cfg = lds.LDSConfig(train="--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --max_iters=10 --batch_size=4 --total_batch_tokens=64 --eval_interval=5 --device=cpu",
                        retrofit="--max_iters=5")
    run = lds.model_of(cfg, tmp_path / "x/run", json.loads((made / "config.json").read_text())["dataset"], 4)
    content = lds.load_checkpoint(run)[1]
    assert content["config"]["n_proto"] == 12 and content["train_config"]["init_from"] == str(tmp_path / "x/run-dense") and content["before"] > 0
    for wrong, message in (("--recipes=;", "at least one recipe"), ("--suppress='", "No closing quotation"), ("--behavior=(", "pattern|parenthesis"), ("--suppress=--guess=1", "guess")):
        with pytest.raises(retrofit.UserError, match=message):
            retrofit.main([*words, wrong])


def test_passages_hold_the_text(tmp_path, capsys):
    import passages
    text = "".join(f"line {n} of a text\n" for n in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short, without a last line end")
    passages.main([f"--folder={tmp_path}", "--length=500", "--most=2000", f"--out={tmp_path}/p.jsonl"])
    rows = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    mine = [x["text"] for x in rows if x["source"] == "a"]
    assert text.startswith("".join(mine)) and 2000 <= sum(map(len, mine)) < 2600 and all(500 <= len(x) < 530 and x.endswith("\n") for x in mine)
    assert rows[-1] == {"text": "short, without a last line end", "title": "b.txt#1", "source": "b"} and f"{len(rows)} passages of 2 files, {sum(len(x['text']) for x in rows):,} of their {len(text) + 30:,} characters" in capsys.readouterr().out
    assert [len(x) for x in passages.passages("word " * 1000, 100, 0)] == [404] + [400] * 11 + [196] and list(passages.passages("a\n\n  \nb c", 3, 0)) == ["a\n\n", "  \nb c"]
    for wrong, message in ((f"--folder={tmp_path}/none", "no .txt file there"), ("--length=0", "length is 0")):
        with pytest.raises(passages.UserError, match=message):
            passages.main([f"--folder={tmp_path}", wrong, f"--out={tmp_path}/q.jsonl"])
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(passages.UserError, match="c.txt: .*convert it to UTF-8"):
        passages.main([f"--folder={tmp_path}", f"--out={tmp_path}/q.jsonl"])
    assert not (tmp_path / "q.jsonl").exists()


def test_what_attribution_costs_and_what_less_of_it_loses(made, tmp_path):
    lines = script("attribution_speed.py", f"--out_dir={made}", "--quick", f"--out={tmp_path}/s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert lines[-1].startswith(f"index {found['index']['ratio']:.2f} forward passes") and found["size"][-1]["read"] > 0
    lines = script("attribution_small.py", f"--out_dir={made}", "--settings=--rank=16;--rank=2", "--queries=5", f"--out={tmp_path}/a.json")
    found = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert found["--rank=16"]["r"] > 0.999 > found["--rank=2"]["r"] and lines[-1].endswith("--rank=2")


def test_suppression_against_its_rivals_goes_on_where_it_stopped(tmp_path):
    out = write_run(tmp_path, iters=135)
    options = [f"--out_dir={out}", "--only=h", "--behavior=h", "--mode=zero", "--price=1000", "--prompts=6", "--max_new_tokens=20", "--steps=20", "--tokens=1500", f"--out={tmp_path}"]
    lines = script("suppression.py", *options)
    result = json.loads((tmp_path / "suppression-h.json").read_text())
    sides = result["sides"]
    assert list(sides) == ["before", "gains", "control 1", "control 2", "control 3", "ban", "bias", "finetune"] and result["sweep"]["rows"][-1]["mode"] == "chosen"
    assert lines[-1].startswith(f"h: {result['found']['prototypes']} prototypes by zero; loss and matches")
    assert sides["before"]["rate"] == 1 and sides["ban"]["rate"] < 0.01 and sides["bias"]["rate"] == pytest.approx(sides["gains"]["rate"], rel=0.05)
    assert sides["ban"]["matches_per_1000"] == [0, 0, 0]
    assert script("suppression.py", *options)[-2:] == ["--- h: h", lines[-1]]  # nothing is done again
    result.pop("sides")
    (tmp_path / "suppression-h.json").write_text(json.dumps(result))
    again = script("suppression.py", *options)
    assert not any("prototype  margin" in line for line in again) and again[-1] == lines[-1]


def test_harness_scores_as_the_model_does_without_and_with_gains(tmp_path):
    """Against the package itself, where it is installed: its accuracy is that of our own scores, rolling windows predict each token once."""
    lm_eval = pytest.importorskip("lm_eval")
    import harness
    out, words = write_run(tmp_path), {"context": "the cat sat on the", "choices": [" mat", " dog ran", " hen"]}
    items = [words | dict(context=f"a {n} {words['context']}", label=n % 3) for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    (tmp_path / "mine.yaml").write_text(f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/mine.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\n"
                                        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\ntarget_delimiter: ""\nmetric_list:\n  - {metric: acc}\n')
    lab = suppress.Lab(out, "cpu")
    gains = torch.linspace(-4, 4, 12).round(decimals=4)
    suppress.write_gains(tmp_path / "g.json", lab, gains)
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "experiments/harness.py"), f"--out_dir={out}", "--tasks=mine", f"--include={tmp_path}", f"--gains={tmp_path}/g.json", f"--out={tmp_path}/h.json"],
                          capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    result, s = json.loads((tmp_path / "h.json").read_text()), suppress.read_items(lab, items)
    for side, g in (("without", None), ("with", gains)):
        score = suppress.choice_scores(lab, s, "sum", g).view(12, 3)
        assert result[side]["mine"]["acc"] == pytest.approx((score.argmax(1) == torch.tensor([x["label"] for x in items])).float().mean().item())
        lm = harness.PrismLM(out, str(tmp_path / "g.json") if g is not None else "", "cpu", batch_size=5)
        asked = [lm_eval.api.instance.Instance("loglikelihood", {}, (x["context"], c), 0) for x in items for c in x["choices"]]
        assert [x[0] for x in lm.loglikelihood(asked, disable_tqdm=True)] == pytest.approx(score.flatten().tolist(), abs=1e-4)
        text = "the cat sat on the mat and ran away"  # longer than the context of 16
        rolling = lm.loglikelihood_rolling([lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text,), 0)])
        ids, want = [256, *text.encode()], 0.0
        for a in (0, 16, 32):  # the last window is full too, and scores only what is left
            b = min(a + 16, len(ids) - 1)
            logp = lab.model.logits(lab.model.hidden(torch.tensor([ids[b - 16:b]])), g)[0].log_softmax(-1)
            want += sum(logp[t - b - 1, ids[t]].item() for t in range(a + 1, b + 1))
        assert rolling[0] == pytest.approx(want, abs=1e-3)
        for prompt, options, n in (("the cat", {"until": ["t"], "max_gen_toks": 9}, 9), ("a hen sat on the mat", {"until": "zz"}, 128)):
            ask = lm_eval.api.instance.Instance("generate_until", {}, (prompt, options), 0)
            idx = lab.model.generate(torch.tensor([list(prompt.encode())[-16:]]), n, 0.0, gains=g, n_vocab=257, stop=256)
            said = bytes(t for t in idx[0, len(prompt[-16:]):].tolist() if t < 256).decode("utf-8", "replace")
            assert lm.generate_until([ask])[0] == said.split("t" if n == 9 else "zz")[0]


def test_controllers_over_runs(tmp_path):
    out, folder = write_run(tmp_path), tmp_path / "tiny"
    for n, name in enumerate(("cloze", "cloze-train")):
        items = [dict(context=f"a {n}{i} the cat sat on", choices=[" the mat", " a hen"], label=i % 2, document=f"{i}") for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    lines = script("controllers.py", f"--runs={out}", f"--out={tmp_path}/c.json")
    result = json.loads((tmp_path / "c.json").read_text())["runs"][str(out)]
    assert lines[-1].startswith(f"{out}: uncalibrated {result['result']['uncalibrated']['accuracy']:.1%}; controller ") and result["train_seed"] == 1337
    assert script("controllers.py", f"--runs={out}", f"--out={tmp_path}/c.json") == lines[-1:]  # nothing is done again
    done = subprocess.run([sys.executable, str(ROOT / "experiments/controllers.py"), "--runs=none"], capture_output=True, text=True)
    assert done.returncode == 2 and "none holds no run; train it: python train.py" in done.stderr


def test_curvature_within_blocks_is_that_of_the_dense_hessian(tmp_path):
    import curvature
    out = write_run(tmp_path)
    words = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --batch_size=4 --total_batch_tokens=64 --warmup_iters=4 --max_iters=30 --eval_interval=30 "
             "--device=cpu --dtype=float32 --lambda_t2p=0 --lambda_p2t=0")
    lines = script("curvature.py", f"--out_dir={out}", f"--loose={tmp_path}/loose", f"--train={words}", "--tokens=512", "--probes=4", f"--out={tmp_path}/c.json")
    heads = json.loads((tmp_path / "c.json").read_text())["heads"]
    assert lines[-1].startswith(f"within blocks: PRISM {heads['PRISM']['within_squared']:.3f}, without clustering losses ") and (tmp_path / "c.png").exists()
    # many probes against the dense matrix
    run, cfg = curvature.attribute.Run(out, "cpu"), curvature.CurvatureConfig(tokens=512, probes=400)
    x, _, _ = curvature.measured(run, cfg)
    starts = np.sort(np.random.default_rng(cfg.seed).permutation(curvature.attribute.seen_windows(run.ckpt, len(run.tokens)))[:32])
    ids, gates, _, pi, _, _ = curvature.attribute.records(run.model, *run.windows(starts))
    eye = torch.eye(12 * 16).view(-1, 12, 16)
    H = curvature.attribute.curvature_product(run.model.transformer.wte.weight, ids, gates, pi, eye).view(12, 16, 12, 16).double()
    within = sum(H[i, :, i].square().sum().item() for i in range(12))
    assert x["within_squared"] == pytest.approx(within / H.square().sum().item(), rel=0.05)


def test_purity_and_k_means():
    import grounding
    values, near = np.array([3, 3, 5, 5, 5, 7]), np.array([[0, 1, 2, 5], [2, 0, 3, 4], [5, 0, 2, 2]])
    assert grounding.purity(values, near).tolist() == [0.5, 0.75, 0.5]
    rng = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(4, 8, generator=rng), dim=1)
    x = torch.nn.functional.normalize(centers.repeat_interleave(50, 0) + 0.01 * torch.randn(200, 8, generator=rng), dim=1)
    found = grounding.k_means(x, 4, seed=3)
    assert (centers @ found.T).max(1).values.min() > 0.99 and torch.allclose(found.norm(dim=1), torch.ones(4))
    a = grounding.fired(centers, x, 2)
    direct = np.zeros((200, 4))
    for t in range(200):
        s = [float(x[t] @ c) for c in centers]
        for i in sorted(range(4), key=lambda i: -s[i])[:2]:
            direct[t, i] = max(0, s[i])
    direct -= direct.mean(0)
    assert np.allclose(a, direct / np.linalg.norm(direct, axis=0), atol=1e-5)


def test_grounding_of_a_run_and_its_twin(tmp_path):
    pytest.importorskip("scipy")
    import grounding
    out = write_run(tmp_path)
    words = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --n_proto=12 --top_k=3 --batch_size=4 --total_batch_tokens=64 --warmup_iters=4 --max_iters=10 --eval_interval=10 --device=cpu --dtype=float32"
    common = [f"--out_dir={out}", *(f"--{n}={tmp_path}/{n}" for n in ("dense", "other", "other_dense")), f"--train={words}", "--tokens=640", "--near=4", f"--out={tmp_path}/g.json"]
    lines = script("grounding.py", *common)
    result = json.loads((tmp_path / "g.json").read_text())
    assert list(result["sets"]) == ["prototypes", "random directions", "k-means of the dense twin"]
    assert all(0 < x["nearest_cosine"][1] <= 1 and 0.25 <= x["next token"] <= 1 for x in result["sets"].values())
    assert lines[-1].startswith("random directions: two seeds matched") and set(result["stability"]) == set(result["sets"])
    a = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), dim=0)
    assert grounding.matched(a, a[:, [2, 0, 1, 4, 3]]) == pytest.approx(np.ones(5), abs=1e-5)


def test_agreement_and_costs_of_rivals(made, tmp_path):
    import ekfac
    a = np.array([[4.0, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    assert ekfac.agreement(a, a, (2,)) == {"top_2": 1, "spearman": pytest.approx(1)} and ekfac.agreement(a, -a, (2,)) == {"top_2": 0, "spearman": pytest.approx(-1)}
    assert ekfac.agreement(a, a[:, [1, 0, 2, 3, 4]], (1, 2))["top_1"] == 0.5
    words = f"--out_dir={made}", "--queries=2", "--methods=block,gradient", f"--work={tmp_path}/w", f"--out={tmp_path}/e.json"
    lines = script("ekfac.py", *words)
    result = json.loads((tmp_path / "e.json").read_text())["methods"]
    assert lines[-1].lstrip().startswith("gradient: once 0.0 s, a query ") and result["block"]["query_s"] > 0 and -1 <= result["gradient"]["spearman"] <= 1
    assert script("ekfac.py", *words)[-1] == lines[-1]  # kept
    (copy,) = (p for p in (tmp_path / "w").iterdir() if (p / "attribution").exists())
    key = ekfac.ask.__globals__["key_of"]
    run, before = ekfac.attribute.Run(made, "cpu"), key(copy, ekfac.attribute.Run(made, "cpu"), "block", [0], 0)
    meta = json.loads((copy / "attribution/meta.json").read_text())
    (copy / "attribution/meta.json").write_text(json.dumps(meta | dict(mu=2 * meta["mu"])))
    assert key(copy, run, "block", [0], 0) != before and key(copy, run, "gradient", [0], 0) == key(made, run, "gradient", [0], 0)  # another index, other scores


def test_results_md_says_what_the_json_files_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    spec = importlib.util.spec_from_file_location("every", ROOT / "experiments/all.py")
    every = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(every)
    committed = (ROOT / "experiments/RESULTS.md").read_text("utf-8")
    shutil.copytree(every.RESULTS, tmp_path / "results")
    monkeypatch.setattr(every, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(every, "README", Path(shutil.copy(ROOT / "README.md", tmp_path)))
    every.main(["--tables"])
    assert (tmp_path / "README.md").read_text("utf-8") == (ROOT / "README.md").read_text("utf-8"), "run: python experiments/all.py --tables"
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == committed, "run: python experiments/all.py --tables"
    refit = json.loads((tmp_path / "results/refit.json").read_text())
    refit["pearson"]["full"] = 0.999
    (tmp_path / "results/refit.json").write_text(json.dumps(refit))
    (tmp_path / "results/quality.json").unlink()
    every.main(["--tables"])
    text = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "| r 0.999 | yes |" in text and "within 1% (pydoc, books) | not measured |" in text
    (tmp_path / "results/refit.json").write_text("{")
    with pytest.raises(every.UserError, match="refit.json is damaged"):
        every.main(["--tables"])
    (tmp_path / "results/refit.json").unlink()
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(every.UserError, match="README.md has lost its lines"):
        every.main(["--tables"])


def test_twins_of_two_sizes_and_their_power_law(made, tmp_path, monkeypatch, capsys):
    import twin
    b, (low, high), c = twin.power_law([1e5, 1e6, 1e7, 1e8], [5 * n ** -0.07 * e for n, e in zip((1e5, 1e6, 1e7, 1e8), (1.01, 0.99, 0.99, 1.01))])
    assert low < 0.07 < high and b == pytest.approx(0.07, abs=1e-3) and c == pytest.approx(5, rel=0.05)
    assert twin.power_law([1, 2], [4.0, 2.0])[:2] == (pytest.approx(1), None)
    trains_here(monkeypatch, twin)
    dataset = Path(json.loads((made / "config.json").read_text())["dataset"])
    items = [dict(context="the cat sat on", choices=[" the mat", " a dog"], label=0), dict(context="", choices=["a hen", "the"], label=1)]
    (dataset / "cloze.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    twin.main([f"--dataset={dataset}", "--sizes=48,96", f"--work={tmp_path}/w", f"--out={tmp_path}/t.json",
               "--options=--n_layer=1 --block_size=16 --n_proto=12 --top_k=3 --batch_size=4 --total_batch_tokens=64 --max_iters=20 --eval_interval=20 --device=cpu --dtype=float32"])
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["sizes"]["96"]["PRISM"]["weights"] == result["sizes"]["96"]["dense"]["weights"] > result["sizes"]["48"]["dense"]["weights"]
    assert (tmp_path / "t.png").exists() and "loss falls with size to the power -" in capsys.readouterr().out
    model = twin.load_checkpoint(tmp_path / "w/48-PRISM")[0]
    right = 0
    for x in items:
        scores = []
        for choice in x["choices"]:
            ids = [256, *(x["context"] + choice).encode()]
            start = len(ids) - len(choice)
            scores.append(sum(model(torch.tensor([ids[max(0, t - 16):t]]))[0][0, -1].log_softmax(-1)[ids[t]].item() for t in range(start, len(ids))))
        right += int(np.argmax(scores)) == x["label"]
    assert result["sizes"]["48"]["PRISM"]["accuracy"] == right / 2
