"""Attribution against plain loops, autograd and its own promises."""
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import tiny, write_dataset
from torch.func import grad, hessian

import attribute
from attribute import Curvature, Index, conjugate_gradients, curvature_product, records
from common import Run, load_tensors, window_starts
from prism import UserError

MU = 0.05                         # of the index of `made`


@pytest.fixture(scope="module")
def index(made):
    return Index(made, "cpu")


@pytest.fixture
def own(made, tmp_path):
    """A copy of `made` and of its dataset that a test may damage."""
    shutil.copytree(made.parent, tmp_path / "own")
    out = tmp_path / "own/out"
    ckpt = load_tensors(out / "ckpt.pt")
    ckpt["train_config"]["dataset"] = str(tmp_path / "own/tiny")
    torch.save(ckpt, out / "ckpt.pt")
    return out


def refusal(call, *args, match=None, **kw):
    with pytest.raises(UserError, match=match) as e:
        call(*args, **kw)
    assert str(e.value).isprintable()


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def close(a, b, tolerance):
    return np.abs(a - b).max() < tolerance * np.abs(b).max()


# -- the mathematics, in float64

def small_problem(seed=0):
    """-> model, records, and the summed loss as a function of the prototypes alone: gates and
    residuals are held."""
    model = tiny(seed=seed)
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    m = model.mixture(model.hidden(idx))
    gates, residual, W = m.gates.detach(), m.residual.detach(), model.W.detach()

    def loss(P):
        logits = (residual + (gates[:, :, None] * P[m.ids]).sum(1)) @ W.T
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")
    return model, records(model, idx, targets), loss


def test_blocks_and_joint_product_against_the_autograd_hessian():
    model, r, loss = small_problem()
    P, W = model.prototypes.detach(), model.W.detach()
    M, d = P.shape
    assert r.loss.sum().item() == pytest.approx(loss(P).item(), rel=1e-12)
    assert (r.pi.sum(1) - 1).abs().max() < 1e-12
    H = hessian(loss)(P)                                          # (M, d, M, d)
    c = Curvature(W, M)
    for part in (slice(0, 10), slice(10, 24)):                    # in two batches
        c.add(attribute.Records(*(u[part] for u in r)))
    for i in range(M):
        want = H[i, :, i] + 0.3 * eye(d)
        assert (c.block(i, 0.3) - want).norm() < 1e-8 * want.norm()
    means = torch.stack([torch.linalg.eigvalsh(H[i, :, i]).mean() for i in range(M)])
    live = means[means > 1e-12]
    assert c.mean_eigenvalue() == pytest.approx(live.median().item(), rel=1e-9)
    v = torch.randn(2, M, d, dtype=torch.float64)
    want = torch.einsum("iajb,qjb->qia", H, v)
    assert (curvature_product(W, r, v) - want).norm() < 1e-8 * want.norm()
    slope = grad(loss)(P)                                         # -dCE/dp_i = sum_s a_si g_s
    assert (attribute.spread(r, r.errors, M) + slope).norm() < 1e-10 * slope.norm()


def test_conjugate_gradients_solve_the_joint_system():
    model, r, loss = small_problem(1)
    P, W = model.prototypes.detach(), model.W.detach()
    M, d = P.shape
    H = hessian(loss)(P).reshape(M * d, M * d) + 0.1 * eye(M * d)
    b = torch.randn(3, M, d, dtype=torch.float64)
    b[2] = 0.0                                                    # no prototype fires
    c = Curvature(W, M)
    c.add(r)
    inverse = torch.stack([torch.linalg.inv(c.block(i, 0.1)) for i in range(M)])
    x, residual, steps = conjugate_gradients(
        lambda v: curvature_product(W, r, v) + 0.1 * v, b,
        lambda v: torch.einsum("iab,qib->qia", inverse, v), tol=1e-10)
    want = torch.linalg.solve(H, b.reshape(3, -1).T).T.reshape(b.shape)
    assert (x - want).norm() < 1e-8 * want.norm()
    assert residual < 1e-10 and steps < 40
    _, residual, steps = conjugate_gradients(lambda v: v, b, lambda v: v / 2, max_iters=3)
    assert residual < 1e-10 and steps == 1                        # of the identity


# -- the index and its scores

def plain_scores(run, ids, n):
    """I(s, t) for each token of the indexed windows, by loops in float64 -> {position: score}."""
    model = run.model.double()
    W, d = model.W, model.config.n_embd
    H = torch.zeros(model.config.n_proto, d, d, dtype=torch.float64)

    def facts(text):
        """(prototypes and gates, g, pi, m) of each token that `text` (T + 1,) predicts."""
        z = model.hidden(text[None, :-1])[0]
        mixture = model.mixture(z)
        for t, y in enumerate(text[1:].tolist()):
            pi = (W @ z[t]).softmax(0)
            m = W.T @ pi
            yield dict(zip(mixture.ids[t].tolist(), mixture.gates[t])), W[y] - m, pi, m

    trained = []
    for start in attribute.seen_windows(run.ckpt, len(run.train)).tolist():
        text = torch.from_numpy(run.train[start:start + run.T + 1].astype(np.int64))
        for position, (gates, g, pi, m) in enumerate(facts(text), start + 1):
            covariance = (W.T * pi) @ W - torch.outer(m, m)
            for i, a in gates.items():
                H[i] += a * a * covariance
            trained.append((position, gates, g))
    scores = dict.fromkeys((position for position, _, _ in trained), 0.0)
    for gates, g, _, _ in list(facts(torch.tensor(ids)))[n - 1:]:
        for i, a in gates.items():
            x = a * torch.linalg.solve(H[i] + MU * eye(d), g)
            for position, other, gs in trained:
                if i in other:
                    scores[position] += (other[i] * gs @ x).item()
    return scores


def test_scores_against_plain_loops_and_they_add_up(made, index):
    want = plain_scores(Run(made, "cpu"), list(b"the cat sat"), 7)
    answers = {level: index.query("the cat", " sat", level) for level in index.names}
    token = answers["token"]["scores"]
    assert index.positions.tolist() == list(want)
    assert close(token, np.array(list(want.values())), 2e-3)      # float16 records
    document, source = np.zeros(12), np.zeros(2)
    for position, s in zip(index.positions, token):
        n = sum(position >= index.run.doc_start) - 1
        document[n] += s
        source[n % 2] += s
    assert close(answers["document"]["scores"], document, 1e-9)
    assert close(answers["source"]["scores"], source, 1e-9)
    parts = [index.query("the cat" + " sat"[:i], " sat"[i], "token") for i in range(4)]
    assert close(sum(p["scores"] for p in parts), token, 1e-5)    # linear in the target too
    assert answers["token"]["loss"] == pytest.approx(sum(p["loss"] for p in parts), rel=1e-5)


def test_what_an_entry_says(index):
    run, kept = index.run, {"token": 5, "document": 5, "source": 2}
    token = index.query("the cat", " sat", "token")["scores"]
    x = index.solve(index.right_side(index.target_records(list(b"the cat sat"), 7))[None])[0]
    for level, n in kept.items():
        answer = index.query("the cat", " sat", level, top=n)
        assert answer["target"] == " sat" and answer["loss"] > 0
        positive = [e["score"] for e in answer["proponents"]]
        negative = [e["score"] for e in answer["opponents"]]
        ordered = sorted(answer["scores"])
        assert positive == [s for s in ordered[::-1][:n] if s > 0]
        assert negative == [s for s in ordered[:n] if s < 0]
        assert len(positive) + len(negative) > 1
        for e in answer["proponents"] + answer["opponents"]:
            name = run.titles.index(e["document"])
            assert e["position"] == run.doc_start[name] + e["offset"]
            assert e["source"] == run.source_of[name]
            unit = {"token": e["position"], "document": e["document"], "source": e["source"]}
            members = np.array(index.names[level])[index.unit_of[level]] == unit[level]
            sign = np.sign(e["score"])
            s, = np.flatnonzero(index.positions == e["position"])
            assert members[s] and sign * token[s] == (sign * token[members]).max()
            before, rest = e["text"].split("«")
            inside, after = rest.split("»")
            assert inside == run.decode([run.train[e["position"]]])
            assert len(before) <= 16 and len(after) <= 8
            around = bytes(run.train[e["position"] - len(before):][:25].tolist()).decode()
            assert around.startswith(before + inside + after)
            for i, share in e["prototypes"]:
                column = index.ids[s].tolist().index(i)
                g = torch.from_numpy(index.errors[s]).float()
                part = float(index.gates[s, column]) * float(g @ x[i])
                assert share * token[s] == pytest.approx(part, rel=1e-3, abs=1e-6)
            assert sum(share for _, share in e["prototypes"]) == pytest.approx(1, abs=1e-5)


def test_a_text_around_a_token_ends_with_its_document(index, monkeypatch):
    text = np.array([*b"abc", 256, *b"defgh", 256, *b"ij"], np.uint16)
    monkeypatch.setattr(index.run, "train", text)
    assert index.around(6) == ["de", "f", "gh"]
    assert index.around(0) == ["", "a", "bc"]
    assert index.around(11, before=1) == ["i", "j", ""]
    assert index.around(9)[:2] == ["defgh", "<|endoftext|>"]


def test_several_queries_at_once_equal_each_alone(index):
    texts = (b"the cat sat", 7), (b"a dog ran", 5), (b"my hen", 2)
    sides = [index.right_side(index.target_records(list(text), n)) for text, n in texts]
    together = index.token_scores(index.solve(torch.stack(sides)))
    assert together.shape == (3, len(index.positions)) and together.dtype == np.float64
    for side, scores in zip(sides, together):
        assert close(index.token_scores(index.solve(side[None]))[0], scores, 1e-5)


def test_full_equals_a_dense_solve(made, index, capsys):
    """Conjugate gradients over the windows, to 1e-3, against the joint Hessian in float64."""
    run = Run(made, "cpu")
    model, starts = run.model.double(), attribute.seen_windows(run.ckpt, len(run.train))
    W, M, d = model.W, model.config.n_proto, model.config.n_embd
    (_, idx, targets), = attribute.read_windows(run, starts)
    r = records(model, idx, targets)
    rows = []
    for part in eye(M * d).view(-1, M, d).split(24):
        rows.append(curvature_product(W, r, part).flatten(1))
    H = torch.cat(rows) + MU * eye(M * d)
    ids = torch.tensor([list(b"the cat s")])
    target = records(model, ids[:, :-1], ids[:, 1:])
    b = attribute.spread(attribute.Records(*(u[6:] for u in target)), target.errors[6:], M)
    x = torch.linalg.solve(H, b.flatten()).view(M, d)
    want = ((r.gates[:, :, None] * x[r.ids]).sum(1) * r.errors).sum(1).numpy()
    got = index.query("the cat", " s", "token", "full")["scores"]
    assert close(got, want, 0.01)
    said = capsys.readouterr().err
    steps, residual = re.search(r"(\d+) steps, relative residual (\S+)", said).groups()
    assert 0 < int(steps) < 60 and float(residual) < 1e-3
    block = index.query("the cat", " s", "token")["scores"]
    assert not close(block, want, 0.02) and np.corrcoef(block, want)[0, 1] > 0.5


# -- building

def arrays(out):
    files = (Path(out) / "attribution").glob("*.npy")
    return {p.stem: np.load(p).astype(np.float64) for p in files}


def test_the_windows_are_those_of_the_last_whole_epoch(made):
    run = Run(made, "cpu")
    n, T = len(run.train), 16
    per_epoch = len(window_starts(n, T, 1337, 0))
    assert run.ckpt["step"] == 135 and 135 * 64 // T // per_epoch == 3
    for step, epoch, count in ((135, 2, None), (80, 0, None), (5, 0, 5 * 4)):
        want = np.sort(window_starts(n, T, 1337, epoch)[:count])
        assert attribute.seen_windows(run.ckpt | {"step": step}, n).tolist() == want.tolist()


def test_the_index_is_that_of_the_model_at_any_batch_size(made, own, monkeypatch):
    whole = arrays(made)
    assert {p.name for p in (made / "attribution").iterdir()} == {
        "meta.json", "positions.npy", "ids.npy", "gates.npy", "errors.npy", "factors.npy"}
    read = attribute.read_windows

    def three_at_a_time(run, starts):
        for i in range(0, len(starts), 3):
            for at, idx, targets in read(run, starts[i:i + 3]):
                yield slice(i * run.T, i * run.T + at.start + idx.numel()), idx, targets
    monkeypatch.setattr(attribute, "read_windows", three_at_a_time)
    attribute.main(["index", f"--out_dir={own}", f"--mu={MU}", "--device=cpu"])
    parts = arrays(own)
    for name in whole:
        assert np.abs(whole[name] - parts[name]).max() < 2e-3, name
    assert (parts["ids"] == whole["ids"]).all() and parts["gates"].min() >= 0
    run = Run(made, "cpu")
    meta = json.loads((own / "attribution/meta.json").read_text())
    assert meta == {"checkpoint": run.hash, "mu": MU, "tokens": len(parts["positions"])}
    starts = attribute.seen_windows(run.ckpt, len(run.train))
    assert parts["positions"].tolist() == (starts[:, None] + 1 + np.arange(16)).ravel().tolist()
    assert not (own / "attribution.tmp").exists()


def test_mu_is_a_tenth_of_the_median_block_unless_given(own, capsys):
    attribute.main(["index", f"--out_dir={own}"])
    said = capsys.readouterr().out
    meta = json.loads((own / "attribution/meta.json").read_text())
    factors = arrays(own)["factors"]
    H = factors @ factors.transpose(0, 2, 1)
    means = np.trace(H, axis1=1, axis2=2) / 16 - meta["mu"]
    live = np.sort(means[means > 1e-4])
    assert meta["mu"] == pytest.approx(0.1 * live[(len(live) - 1) // 2], rel=1e-2)
    assert re.search(r"attribution: 2,\d+ training tokens, mu \S+, 0 MB\n"
                     r"next: python attribute.py query --out_dir=\S+ --prompt=", said)


def test_max_windows_indexes_a_sample(own, index):
    attribute.main(["index", f"--out_dir={own}", f"--mu={MU}", "--max_windows=40"])
    sample = Index(own, "cpu")
    place = np.searchsorted(index.positions, sample.positions)
    assert len(place) == 640 and (index.positions[place] == sample.positions).all()
    assert (np.diff(sample.positions) > 0).all() and len(set(sample.doc_of)) > 8
    assert (sample.ids == index.ids[place]).all()
    assert len(sample.query("the cat", " sat")["scores"]) == 12
    attribute.main(["index", f"--out_dir={own}", f"--mu={MU}", "--max_windows=100000"])
    assert (Index(own, "cpu").positions == index.positions).all()


def test_an_index_that_fails_leaves_the_earlier_one(own, monkeypatch):
    before = arrays(own)

    def stopped(run, starts):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(attribute, "read_windows", stopped)
        with pytest.raises(KeyboardInterrupt):
            attribute.main(["index", f"--out_dir={own}", "--mu=3"])
    after = arrays(own)
    assert all((after[name] == before[name]).all() for name in before)
    with monkeypatch.context() as m:
        m.setattr(attribute.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
        refusal(attribute.main, ["index", f"--out_dir={own}"], match="free some space or lower")
    assert Index(own, "cpu").meta["mu"] == MU
    attribute.main(["index", f"--out_dir={own}", "--mu=3"])
    assert Index(own, "cpu").meta["mu"] == 3


# -- bad files

class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_damaged_index_is_one_line(own, capsys):
    folder = own / "attribution"
    hint = f"the index {folder} cannot be used .*; run: python attribute.py index --out_dir={own}"
    meta, errors = (folder / "meta.json").read_text(), (folder / "errors.npy").read_bytes()
    array = np.load(folder / "errors.npy")
    for content in (errors[:-2], errors[:50], b"", b"123", pickle.dumps(Evil())):
        (folder / "errors.npy").write_bytes(content)
        refusal(Index, own, "cpu", match=hint)
    np.save(folder / "errors.npy", np.array([Evil()] * 3, object), allow_pickle=True)
    refusal(Index, own, "cpu", match=hint)
    assert "never run" not in capsys.readouterr().out
    for other in (array.astype(np.float32), array[1:], array.ravel(), array[:, :8]):
        np.save(folder / "errors.npy", other)
        refusal(Index, own, "cpu", match=hint)
    (folder / "errors.npy").write_bytes(errors)
    for content in ("{", "[]", "{}", meta.replace('"tokens": ', '"tokens": 1')):
        (folder / "meta.json").write_text(content)
        refusal(Index, own, "cpu", match=hint)
    (folder / "meta.json").write_text(meta)
    Index(own, "cpu")
    shutil.rmtree(folder)
    refusal(Index, own, "cpu", match=hint)


@pytest.mark.parametrize("name", ["errors", "gates", "factors"])
def test_numbers_that_are_not_finite_are_told(own, name):
    path = own / f"attribution/{name}.npy"
    array = np.load(path)
    array[:] = np.nan
    np.save(path, array)
    refusal(Index(own, "cpu").query, "the cat", " sat", match="the index is damaged; index again")


def test_an_index_of_other_weights_is_refused(own):
    ckpt = load_tensors(own / "ckpt.pt")
    ckpt["model"]["prototypes"][0, 0] += 1
    torch.save(ckpt, own / "ckpt.pt")
    refusal(Index, own, "cpu", match="it was made for other weights")


# -- queries and the command line

def test_where_the_prompt_ends(index, monkeypatch):
    assert index.encode("the cat", " sat") == (list(b"the cat sat"), 7)
    assert index.encode("the cat") == (list(b"the cat"), 7)
    refusal(index.encode, "", "cat", match="the prompt is empty")
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
    pairs = tiktoken.Encoding("pairs", pat_str=r"[\s\S]+", mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(index.run, "tokenizer", pairs)
    assert index.encode("ab", "c") == ([257, 99], 1)
    assert index.encode("cab", "") == ([99, 257], 2)
    refusal(index.encode, "ca", "b", match="a token spans its end and the target's start")
    assert index.encode("é<|endoftext|>", "b")[1] == 15           # text of users is never special
    refusal(index.encode, "a\udcff", "b", match="the prompt is empty, or")  # a byte that is no text


def test_queries_are_checked(index):
    for words, message in ((("", "x"), "the prompt is empty"), (("x" * 17, "y"), "17 tokens, more"),
                           (("x" * 10, "y" * 8), "17 tokens, more than block_size = 16"),
                           (("x", "y", "page"), "level.* token, document or source"),
                           (("x", "y", "token", "half"), "hessian.* block or full")):
        refusal(index.query, *words, match=message)
    answer = index.query("x" * 16, "y")                           # a full context
    assert answer["target"] == "y" and answer["loss"] > 0
    answer = index.query("the c", max_new_tokens=3)
    ids = index.run.model.generate(torch.tensor([list(b"the c")]), 3, temperature=0)[0].tolist()
    assert answer["target"] == bytes(ids[5:]).decode()
    again = index.query("the c", answer["target"])
    assert again["loss"] == answer["loss"] and (again["scores"] == answer["scores"]).all()
    for n in (0, -1):
        refusal(index.query, "t", max_new_tokens=n, match="max_new_tokens")


def test_the_command_line(made, capsys):
    words = ["query", f"--out_dir={made}", "--prompt=the cat", "--target= sat", "--top=3"]
    attribute.main([*words, "--json", "--level=token"])
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["target", "loss", "proponents", "opponents"]
    assert len(answer["proponents"]) == len(answer["opponents"]) == 3
    assert list(answer["proponents"][0]) == ["score", "document", "source", "offset", "position",
                                             "text", "prototypes"]
    attribute.main([*words, "--level=source"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"'the cat' -> ' sat': loss \d+\.\d{3} nats; scores by source \(block\), "
                        "each with its strongest token", lines[0])
    assert lines[1] == "proponents:" and "opponents:" in lines
    assert re.fullmatch(r"  +[+-]\d+\.\d{5}  source <\d>, document \d+, token \d+: '.*«.».*' "
                        r"via \d+ \(-?\d+%\), \d+ \(-?\d+%\), \d+ \(-?\d+%\)", lines[2])
    for words, message in (([], "the first word is one of index, query"),
                           (["indx"], "the first word is one of index, query"),
                           (["index", "--mu=-1"], "mu and max_windows: expected 0 or more"),
                           (["index", "--max_windows=-1"], "expected 0 or more"),
                           (["index", "--mus=1"], "the nearest is --mu"),
                           (["query", "--out_dir=nowhere"], "train first"),
                           (["query", f"--out_dir={made}"], "the prompt is empty")):
        refusal(attribute.main, words, match=message)


def test_hostile_training_text_cannot_act(own, capsys):
    """Titles, sources and text with escape sequences print as escapes; JSON stays ASCII."""
    data = own.parent / "tiny"
    rows = json.loads((data / "docs.json").read_text())
    n = sum(row["length"] for row in rows if row["split"] == "train")
    write_dataset(data, list(b"\x1b]0;x\x07\r\n" * n)[:n], [97] * 300)
    for row in rows:
        row |= dict(title="\x1b[2J\u202e", source="\x9b31m\n")
    (data / "docs.json").write_text(json.dumps(rows))
    ckpt = load_tensors(own / "ckpt.pt")
    ckpt["data"] = json.loads((data / "meta.json").read_text())["sha256"]["train.bin"]
    torch.save(ckpt, own / "ckpt.pt")
    words = ["query", f"--out_dir={own}", "--prompt=the cat\x1b[2J", "--target= s"]
    attribute.main(words)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and r"\x9b31m\n, \x1b[2J\u202e, token " in out
    assert re.search(r"«(\\x1b|\]|0|;|x|\\x07|\\r|\\n)»", out)
    attribute.main([*words, "--json"])
    out = capsys.readouterr().out
    assert out.isascii() and out.strip().isprintable()
    assert json.loads(out)["proponents"][0]["document"] == "\x1b[2J\u202e"
