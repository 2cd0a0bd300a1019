"""Attribution against plain loops, autograd and its own promises (design: sections 3 and 4 of the mathematics)."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from torch.func import hessian

import attribute
import prism
from attribute import Curvature, Index, UserError, conjugate_gradients, curvature_product, records

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def own(made, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


# ----------------------------------------------------------------------------- the mathematics, in float64

def small_problem(seed=0):
    """Records of a tiny model in float64: W, ids, gates, g, pi, m, loss, y, and what the head is a function of."""
    model = tiny(seed=seed)
    torch.manual_seed(seed)
    idx, y = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    return model, y.flatten(), records(model, idx, y), model.mixture(model.hidden(idx)), idx


def head_loss(model, mix, y):
    """The training loss, summed, as a function of the prototypes alone: gates and residuals are held."""
    W = model.transformer.wte.weight.detach()
    gates, r = mix.gates.detach(), mix.residual.detach()

    def loss(P):
        logits = (r + (gates[:, :, None] * P[mix.ids]).sum(1)) @ W.T
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    return loss


def test_blocks_and_joint_product_against_the_autograd_hessian():
    model, y, (ids, gates, g, pi, m, loss), mix, _ = small_problem()
    P, W = model.prototypes.detach(), model.transformer.wte.weight.detach()
    f = head_loss(model, mix, y)
    assert loss.sum().item() == pytest.approx(f(P).item(), rel=1e-12)
    H = hessian(f)(P)                                                       # (M, d, M, d)
    c = Curvature(W, len(P))
    for part in (slice(0, 10), slice(10, 24)):                              # in two batches
        c.add(ids[part], gates[part], pi[part], m[part])
    for i in range(len(P)):
        block = c.block(i, 0.3)
        want = H[i, :, i] + 0.3 * torch.eye(6, dtype=torch.float64)
        assert (block - want).norm() / want.norm() < 1e-8
    means = [torch.linalg.eigvalsh(H[i, :, i]).mean().item() for i in range(len(P))]
    assert c.size() == pytest.approx(sorted(x for x in means if x > 1e-12)[(sum(x > 1e-12 for x in means) - 1) // 2], rel=1e-9)
    v = torch.randn(2, *P.shape, dtype=torch.float64)
    want = torch.einsum("iajb,qjb->qia", H, v)
    got = curvature_product(W, ids, gates, pi, v)
    assert (got - want).norm() / want.norm() < 1e-8
    gradient = torch.func.grad(f)(P)                                        # -dCE/dp_i = sum_s a_si g_s
    mine = torch.zeros_like(P).index_add_(0, ids.flatten(), (gates[:, :, None] * g[:, None]).flatten(0, 1))
    assert (mine + gradient).norm() / gradient.norm() < 1e-10


def test_conjugate_gradients_solve_the_joint_system():
    model, y, (ids, gates, g, pi, m, _), mix, _ = small_problem(1)
    P, W = model.prototypes.detach(), model.transformer.wte.weight.detach()
    M, d = P.shape
    H = hessian(head_loss(model, mix, y))(P).reshape(M * d, M * d) + 0.1 * torch.eye(M * d, dtype=torch.float64)
    b = torch.randn(3, M, d, dtype=torch.float64)
    b[2] = 0.0
    c = Curvature(W, M)
    c.add(ids, gates, pi, m)
    inverse = torch.stack([torch.linalg.inv(c.block(i, 0.1)) for i in range(M)])
    x, residual, iterations = conjugate_gradients(lambda v: curvature_product(W, ids, gates, pi, v) + 0.1 * v, b,
                                                  lambda r: torch.einsum("iab,qib->qia", inverse, r), tol=1e-10)
    want = torch.linalg.solve(H, b.reshape(3, -1).T).T.reshape(b.shape)
    assert residual < 1e-10 and iterations < 40
    assert (x - want).norm() / want.norm() < 1e-8


def test_joined_blocks_against_plain_loops():
    model, _, (ids, gates, g, pi, m, _), _, _ = small_problem(2)
    W, (M, d) = model.transformer.wte.weight.detach(), model.prototypes.shape
    c = Curvature(W, M)
    c.add(ids, gates, pi, m)
    G = torch.zeros(M, M, dtype=torch.float64)
    for s in range(len(ids)):
        C = W.T @ (torch.diag(pi[s]) - torch.outer(pi[s], pi[s])) @ W
        for i, a in zip(ids[s].tolist(), gates[s]):
            for j, b in zip(ids[s].tolist(), gates[s]):
                G[i, j] += a * b * C.trace()
    assert (c.G - G).norm() < 1e-10 * G.norm()
    R, mu = c.correlation(), 0.1
    blocks = torch.stack([c.block(i, 0.0) for i in range(M)])
    roots = attribute.root(blocks)
    assert (roots @ roots - blocks).norm() < 1e-8 * blocks.norm() and (roots - roots.mT).abs().max() < 1e-10
    factors = torch.linalg.cholesky(blocks + mu * torch.eye(d, dtype=torch.float64))
    v = torch.randn(2, M, d, dtype=torch.float64)
    got = attribute.joined_product(factors, roots, R, v)
    for q in range(2):
        for i in range(M):
            want = mu * v[q, i] + sum((1.0 if i == j else G[i, j] / (G[i, i] * G[j, j]).sqrt().clamp(min=1e-20)) * (roots[i] @ (roots[j] @ v[q, j])) for j in range(M))
            assert (got[q, i] - want).norm() < 1e-8 * v[q].norm() * blocks.norm()


# ----------------------------------------------------------------------------- the index and its scores, against plain loops

def plain_scores(out, prompt, target, mu, hessian="block"):
    """I(s, t) for every token of the windows that were indexed, by loops in float64 -> {position: score}."""
    run = attribute.Run(out, "cpu")
    model, W = run.model.double(), run.model.transformer.wte.weight.double()
    windows = attribute.seen_windows(run.ckpt, len(run.tokens))
    M, d = model.config.n_proto, model.config.n_embd
    H, every = torch.zeros(M, d, d, dtype=torch.float64), []
    for start in windows:
        text = torch.from_numpy(run.tokens[start:start + run.T + 1].astype(np.int64))
        z = model.hidden(text[None, :-1])[0]
        mix = model.mixture(z)
        for t in range(run.T):
            pi = (W @ z[t]).softmax(0)
            m = W.T @ pi
            C = W.T @ (torch.diag(pi) - torch.outer(pi, pi)) @ W
            for i, a in zip(mix.ids[t].tolist(), mix.gates[t]):
                H[i] += a * a * C
            every.append((int(start) + t + 1, dict(zip(mix.ids[t].tolist(), mix.gates[t])), W[text[t + 1]] - m))
    ids, n = run.encode(prompt, target)
    scores = dict.fromkeys((p for p, _, _ in every), 0.0)
    z = model.hidden(torch.tensor([ids[:-1]]))[0]
    mix = model.mixture(z)
    for t in range(n - 1, len(ids) - 1):
        g = W[ids[t + 1]] - W.T @ (W @ z[t]).softmax(0)
        for i, a in zip(mix.ids[t].tolist(), mix.gates[t]):
            u = a * (torch.linalg.solve(H[i] + mu * torch.eye(d, dtype=torch.float64), g) if hessian == "block" else g)
            for position, gates, gs in every:
                if i in gates:
                    scores[position] += (gates[i] * gs @ u).item()
    return scores


@pytest.mark.parametrize("kind", ["block", "none"])
def test_scores_against_plain_loops_and_they_add_up(made, kind):
    index = Index(made)
    want = plain_scores(made, "the cat", " sat", 0.05, kind)
    answers = {level: index.query("the cat", " sat", level=level, hessian=kind, top=5) for level in ("token", "document", "source")}
    token = answers["token"]
    assert index.positions.tolist() == list(want)
    reference = np.array(list(want.values()))
    assert np.abs(token.scores - reference).max() < 2e-3 * np.abs(reference).max()  # float16 records
    doc, source = np.zeros(12), np.zeros(2)
    for position, s in zip(index.positions, token.scores):
        d = sum(position >= x for x in index.run.doc_start.tolist()) - 1
        doc[d] += s
        source[d % 2] += s
    assert np.abs(answers["document"].scores - doc).max() < 1e-5 * np.abs(doc).max()
    assert np.abs(answers["source"].scores - source).max() < 1e-5 * np.abs(source).max()
    assert index.meta["pairs"] > 0  # those came from the documents' sums; the posting lists say the same
    index.meta["pairs"] = 0
    for level in ("document", "source"):
        assert np.abs(answers[level].scores - index.query("the cat", " sat", level=level, hessian=kind).scores).max() < 1e-5 * np.abs(doc).max()
    parts = [index.query("the cat" + " sat"[:i], " sat"[i:i + 1], level="token", hessian=kind).scores for i in range(4)]
    assert np.abs(sum(parts) - token.scores).max() < 1e-5 * np.abs(token.scores).max()  # linear in the target too
    assert token.loss == pytest.approx(sum(t["loss"] for t in token.tokens)) and len(token.tokens) == 4
    best = token.proponents[0]
    assert best["score"] == pytest.approx(token.scores.max()) and best["score"] > 0 > token.opponents[0]["score"]
    position = index.run.doc_start[index.run.titles.index(best["document"])] + best["offset"]
    assert token.scores[index.positions == position].item() == best["score"]
    assert best["parts"][1] == index.run.decode(index.run.tokens[position:position + 1])
    assert sum(share for _, share in answers["token"].tokens[0]["proponents"][0]["prototypes"]) == pytest.approx(1, abs=1e-3)  # k = 3 fit in


def test_many_queries_equal_one_by_one(made):
    index = Index(made)
    prompts, targets = ["the cat", "a dog", "my hen is", "the"], [" sat", " ran", " in", None]
    for level in ("document", "token"):
        together = index.query(prompts, targets, level=level)
        for p, y, a in zip(prompts, targets, together):
            b = index.query(p, y, level=level)
            assert np.abs(a.scores - b.scores).max() < 1e-5 * np.abs(b.scores).max() and a.target == b.target
            assert [e["score"] for e in a.proponents] == pytest.approx([e["score"] for e in b.proponents], rel=1e-4)


def test_full_equals_a_dense_solve(made):
    """Conjugate gradients over the run's windows, to 1e-3, against the joint Hessian built and solved in float64."""
    run = attribute.Run(made, "cpu")
    model, W = run.model.double(), run.model.transformer.wte.weight.double()
    starts = attribute.seen_windows(run.ckpt, len(run.tokens))
    idx, y = run.windows(starts)
    ids, gates, g, pi, m, _ = records(model, idx, y)
    M, d = model.config.n_proto, model.config.n_embd
    eye = torch.eye(M * d, dtype=torch.float64).reshape(M * d, M, d)
    H = torch.cat([curvature_product(W, ids, gates, pi, eye[i:i + 24]) for i in range(0, M * d, 24)]).reshape(M * d, M * d)
    prompt, n = run.encode("the cat", " s")
    qi, qa, qg, _, _, _ = (u[n - 1:] for u in records(model, torch.tensor([prompt[:-1]]), torch.tensor([prompt[1:]])))
    b = torch.zeros(2, M, d, dtype=torch.float64)
    for q in range(2):
        b[q].index_add_(0, qi[q], qa[q][:, None] * qg[q])
    x = torch.linalg.solve(H + 0.05 * torch.eye(M * d, dtype=torch.float64), b.sum(0).flatten()).reshape(M, d)
    want = ((gates[:, :, None] * x[ids]).sum(1) * g).sum(1).numpy()
    index = Index(made)
    said = []
    got = index.query("the cat", " s", level="token", hessian="full", tell=lambda i, r: said.append(r)).scores
    assert np.abs(got - want).max() < 0.01 * np.abs(want).max()
    assert index.solved[0] < 1e-3 and index.solved[1] == len(said) and said[-1] == index.solved[0]
    block = index.query("the cat", " s", level="token").scores
    assert np.abs(block - want).max() > 0.02 * np.abs(want).max()  # which is not the same
    joined = index.query("the cat", " s", level="token", hessian="joined").scores
    assert np.corrcoef(joined, want)[0, 1] > max(0.9, np.corrcoef(block, want)[0, 1])
    assert (made / "attribution/roots.bin").exists() and np.array_equal(joined, index.query("the cat", " s", level="token", hessian="joined").scores)


# ----------------------------------------------------------------------------- building: batches, ranks, interruption, samples

def files(out, skip=("meta.json", "roots.bin")):
    return {p.name: p.read_bytes() for p in sorted((Path(out) / "attribution").iterdir()) if p.name not in skip}


def same_index(a, b):
    """Records and postings bit for bit; factors to float32 rounding, since sums were taken in another order."""
    x, y = files(a), files(b)
    fx, fy = (np.frombuffer(u.pop("factors.bin") + u.pop("coactivation.bin"), np.float32) for u in (x, y))
    return x.keys() == y.keys() and all(np.abs(np.frombuffer(x[n], np.float16).astype(float) - np.frombuffer(y[n], np.float16)).max() < 2e-3
                                        if n in ("errors.bin", "gates.bin", "post_gates.bin") else x[n] == y[n] for n in x) and np.abs(fx - fy).max() < 1e-3


def test_the_windows_are_those_of_the_last_whole_epoch(made):
    run = attribute.Run(made, "cpu")
    n, T = len(run.tokens), 16
    per_epoch = len(prism.window_starts(n, T, 1337, 0))
    read = 135 * 64 // T
    assert run.ckpt["step"] == 135 and read // per_epoch == 3
    assert attribute.seen_windows(run.ckpt, n).tolist() == sorted(prism.window_starts(n, T, 1337, 2).tolist())
    early = run.ckpt | {"step": 5}
    assert attribute.seen_windows(early, n).tolist() == sorted(prism.window_starts(n, T, 1337, 0)[:5 * 4].tolist())
    for before, count in ((64, 5 * 4), (n // 2, n // 2 // T), (n, per_epoch)):  # weights that had read less than this run, half of the text, or all of it
        assert attribute.seen_windows(early | {"before": before}, n).tolist() == sorted(prism.window_starts(n, T, 1337, 0)[:count].tolist())


def test_batches_and_ranks_do_not_matter(made, own, monkeypatch):
    shutil.rmtree(own / "attribution")
    build = attribute.Builder.__init__

    def small(self, *a, **kw):
        build(self, *a, **kw)
        self.rows = 3
    with monkeypatch.context() as m:
        m.setattr(attribute.Builder, "__init__", small)
        attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])
    assert same_index(made, own)
    shutil.rmtree(own / "attribution")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "attribute.py"), "index",
                    f"--out_dir={own}", "--mu=0.05", "--device=cpu"], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert same_index(made, own)


def test_an_interrupted_index_goes_on(made, own, monkeypatch):
    shutil.rmtree(own / "attribution")
    calls, batch, build = [], attribute.Builder.batch, attribute.Builder.__init__

    def small(self, *a, **kw):
        build(self, *a, **kw)
        self.rows = 20

    def failing(self, starts, curvature):
        calls.append(len(starts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return batch(self, starts, curvature)
    monkeypatch.setattr(attribute.Builder, "__init__", small)
    clock = iter(range(0, 10 ** 9, 100))
    monkeypatch.setattr(attribute.time, "perf_counter", lambda: next(clock))  # each batch seems to take long: the state is saved
    with monkeypatch.context() as m:
        m.setattr(attribute.Builder, "batch", failing)
        with pytest.raises(KeyboardInterrupt):
            attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])
    assert len(calls) == 5 and not (own / "attribution").exists()
    before = len(calls)
    counting = lambda self, starts, curvature: (calls.append(len(starts)), batch(self, starts, curvature))[1]  # noqa: E731
    monkeypatch.setattr(attribute.Builder, "batch", counting)
    attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])
    total = len(attribute.seen_windows(attribute.Run(own, "cpu").ckpt, 12 * 240))
    assert 0 < sum(calls[before:]) < total and same_index(made, own)
    before = len(calls)
    attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])  # it is there already: nothing is read again
    assert len(calls) == before


def test_an_index_killed_while_it_takes_its_place_is_not_lost(made, own, monkeypatch):
    (own / "attribution").rename(own / "attribution.part")
    (own / "attribution.part/state.0.pt").write_text("left over")
    monkeypatch.setattr(attribute.Builder, "stream", None)  # nothing is read again
    attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])
    assert same_index(made, own) and not (own / "attribution/state.0.pt").exists() and not (own / "attribution.part").exists()


def test_a_half_built_index_is_never_taken_for_another(made, own, monkeypatch):
    (own / "attribution").rename(own / "attribution.part")  # finished with mu 0.05, but killed before it took its place
    with monkeypatch.context() as m:
        m.setattr(attribute.Builder, "finish", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attribute.main(["index", f"--out_dir={own}", "--mu=7"])
    attribute.main(["index", f"--out_dir={own}", "--mu=0.05"])
    assert same_index(made, own)


def test_samples_are_unbiased_and_fewer_directions_lose_little(made, own):
    whole = Index(made).query("the cat", " sat", hessian="none")
    drawn = []
    for seed in range(30):
        attribute.main(["index", f"--out_dir={own}", "--cap=150", "--max_tokens=2000", f"--seed={seed}"])
        index = Index(own)
        assert np.diff(index.post_start).max() < 230 and index.meta["sites"] < 2000
        drawn.append(index.query("the cat", " sat", hessian="none", top=1).scores)
    drawn = np.array(drawn)
    z = (drawn.mean(0) - whole.scores) / (drawn.std(0) / 30 ** 0.5)  # of 12 documents, in standard errors
    assert np.abs(z).max() < 4.5 and np.abs(drawn.mean(0) / 1.4 - whole.scores).max() > 4.5 * (drawn.std(0) / 30 ** 0.5).mean()
    attribute.main(["index", f"--out_dir={own}", "--rank=12", "--mu=0.05"])
    block = Index(made).query("the cat", " sat").scores
    few = Index(own).query("the cat", " sat").scores
    assert np.corrcoef(few, block)[0, 1] > 0.9
    attribute.main(["index", f"--out_dir={own}", "--rank=16", "--mu=0.05"])  # a rotation only
    assert np.abs(Index(own).query("the cat", " sat").scores - block).max() < 5e-3 * np.abs(block).max()


# ----------------------------------------------------------------------------- command line and bad input

def test_the_command_line(made, capsys):
    attribute.main(["index", f"--out_dir={made}", "--mu=0.05", "--dry_run"])
    assert "will take about" in capsys.readouterr().out
    attribute.main(["query", f"--out_dir={made}", "--prompt=the cat", "--target= sat", "--json", "--top=3", "--level=token"])
    a = json.loads(capsys.readouterr().out)
    assert {"target", "loss", "proponents", "opponents"} <= a.keys() and a["target"] == " sat" and len(a["proponents"]) == 3
    assert {"score", "document", "source", "offset", "text", "prototypes"} <= a["proponents"][0].keys()
    attribute.main(["query", f"--out_dir={made}", "--prompt=the cat", "--hessian=full", "--max_new_tokens=1"])
    assert "conjugate gradients: relative residual" in capsys.readouterr().out
    attribute.main(["explain", f"--out_dir={made}", "--prompt=the cat"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and "largest |residual + slices - logit|" in lines[-1]
    logit, residual, slices = (float(x) for x in lines[1].split("'")[-1].replace("=", " ").replace("+ ", " ").split()[:3])
    assert logit == pytest.approx(residual + slices, abs=2e-4)


def test_many_queries_from_a_file(made, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "the cat", "target": " sat"}\n{"prompt": "a dog"}\n')
    attribute.main(["query", f"--out_dir={made}", f"--queries={path}", "--json"])
    assert [x["prompt"] for x in json.loads(capsys.readouterr().out)] == ["the cat", "a dog"]
    for text, message in (('{"prompt": "the cat"}\n{"target": 3}\n', "line 2 is no query"), ('["the"]', "line 1 is no query"), ("", "is empty"),
                          ('{"prompt": "x", "target": 3}', "line 1 is no query .*strings")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            attribute.main(["query", f"--out_dir={made}", f"--queries={path}"])
    with pytest.raises(UserError, match="cannot be read"):
        attribute.main(["query", f"--out_dir={made}", f"--queries={tmp_path}/nowhere"])


def test_an_answer_shows_itself_and_escapes_text(made):
    answer = Index(made).query("<script>alert", "(1)")
    shown = answer._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;alert" in shown
    assert "proponents:" in str(answer)


def test_bad_input_is_refused(made, own):
    index = Index(made)
    for options, message in ((dict(prompt=""), "the prompt is empty"), (dict(prompt="x", target=""), "the target is empty"),
                             (dict(prompt="x" * 17), "has 17 tokens, the context holds block_size = 16"),
                             (dict(prompt="x" * 10, target="y" * 8), "has 18 tokens"), (dict(prompt="x", level="page"), "level is 'page'"),
                             (dict(prompt="x", hessian="half"), "hessian is 'half'"), (dict(prompt="x", top=0), "top is 0")):
        with pytest.raises(UserError, match=message):
            index.query(**options)
    assert len(index.query("x" * 16, "y").tokens) == 1  # a full context leaves room for one token to predict
    with pytest.raises(UserError, match="no command"):
        attribute.main([])
    with pytest.raises(UserError, match="'indx'; expected index, query"):
        attribute.main(["indx"])
    for words, message in ((["--mu=-1"], "mu is -1.0, expected 0 or more"), (["--rank=17"], "rank is 17, expected at most n_embd = 16"),
                           (["--cap=-1"], "cap is -1"), (["--mus=1"], "unknown option 'mus'")):
        with pytest.raises(UserError, match=message):
            attribute.main(["index", f"--out_dir={own}", *words])
    with pytest.raises(UserError, match="does not exist; train a model first"):
        Index(own / "nowhere")
    for name, content in (("factors", 0.0), ("errors", np.nan), ("pair_sums", np.nan), ("weights", np.inf)):
        whole = (own / f"attribution/{name}.bin").read_bytes()
        dtype = np.float16 if name == "errors" else np.float32
        (own / f"attribution/{name}.bin").write_bytes(np.full(len(whole) // dtype(0).itemsize, content, dtype).tobytes())
        with pytest.raises(UserError, match="is damaged; remove it"):
            Index(own).query("the cat", " sat")
        (own / f"attribution/{name}.bin").write_bytes(whole)
    meta = (own / "attribution/meta.json").read_text()
    (own / "attribution/meta.json").write_text(meta.replace('"top_k": 3', '"top_k": 0'))
    with pytest.raises(UserError, match="its numbers do not fit the model"):
        Index(own)
    (own / "attribution/meta.json").write_text(meta)
    (own / "attribution/errors.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="errors.bin is 3 bytes, expected .*; remove .* then run: python attribute.py index"):
        Index(own)
    (own / "attribution/meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is damaged"):
        Index(own)
    shutil.rmtree(own / "attribution")
    with pytest.raises(UserError, match="no index in .*attribution; run: python attribute.py index --out_dir="):
        Index(own)


def test_two_at_once_do_not_mix(made, own):
    before = files(own)
    with attribute.alone(own / "attribution.lock"), pytest.raises(UserError, match="another `attribute.py index` is at work"):
        attribute.main(["index", f"--out_dir={own}", "--mu=3"])
    assert files(own) == before
    attribute.main(["index", f"--out_dir={own}", "--mu=3"])


def test_a_stale_index_is_refused(made, own):
    ckpt = prism.load_tensors(own / "ckpt.pt")
    ckpt["model"]["prototypes"][0, 0] += 1
    torch.save(ckpt, own / "ckpt.pt")
    with pytest.raises(UserError, match="was made for another checkpoint; run: python attribute.py index"):
        Index(own)


def test_a_target_that_the_tokenizer_joins_to_the_prompt(made, monkeypatch):
    index = Index(made)
    joint = {"ab": [7], "a": [5], "abc": [7, 8]}
    monkeypatch.setattr(type(index.run.tokenizer), "encode_ordinary", lambda self, text: joint[text])
    with pytest.raises(UserError, match="joins the end of the prompt and the start of the target in one token"):
        index.query("a", "b")


def test_a_full_disk_loses_nothing(made, own, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        shutil.copytree(own, small / "out")
        before = files(small / "out")
        (small / "filler").write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_bsize - 2 ** 14))
        with pytest.raises(UserError, match="could not be written .* an earlier index is untouched"):
            attribute.main(["index", f"--out_dir={small / 'out'}", "--mu=0.2"])
        assert files(small / "out") == before
        Index(small / "out")
        (small / "filler").unlink()
        attribute.main(["index", f"--out_dir={small / 'out'}", "--mu=0.2"])
        assert Index(small / "out").meta["mu"] == 0.2
    finally:
        subprocess.run(["umount", str(small)], check=True)
