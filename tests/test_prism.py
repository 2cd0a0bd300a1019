"""The model against plain loops, hand-worked numbers and its own promises (design: sections 2 and 5 of the mathematics)."""
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny, write_dataset
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import prism
from prism import PRISM, LinearCrossEntropy, PRISMConfig, TopSimilarity, UserError, prototype_head


# ----------------------------------------------------------------------------- plain-loop references

def ref_layer_norm(x, w, b):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(var + 1e-5) * wi + bi for v, wi, bi in zip(x, w, b)]


def ref_linear(x, w, b):
    return [sum(wi * xi for wi, xi in zip(row, x)) + bi for row, bi in zip(w, b)]


def ref_hidden(model, tokens):
    """The GPT-2 trunk for one sequence, token by token, in Python floats -> list of T lists of d numbers."""
    p = {k: v.tolist() for k, v in model.state_dict().items()}
    c, d = model.config, model.config.n_embd
    xs = [[a + b for a, b in zip(p["transformer.wte.weight"][t], p["transformer.wpe.weight"][i])] for i, t in enumerate(tokens)]
    for layer in range(c.n_layer):
        def w(name):
            return p[f"transformer.h.{layer}.{name}.weight"], p[f"transformer.h.{layer}.{name}.bias"]
        qkv = [ref_linear(ref_layer_norm(x, *w("ln_1")), *w("attn.c_attn")) for x in xs]
        size = d // c.n_head
        for t in range(len(xs)):
            y = []
            for h in range(c.n_head):
                q = qkv[t][h * size:(h + 1) * size]
                scores = [sum(a * b for a, b in zip(q, qkv[s][d + h * size:d + (h + 1) * size])) / math.sqrt(size) for s in range(t + 1)]
                e = [math.exp(v - max(scores)) for v in scores]
                for j in range(size):
                    y.append(sum(e[s] / sum(e) * qkv[s][2 * d + h * size + j] for s in range(t + 1)))
            xs[t] = [a + b for a, b in zip(xs[t], ref_linear(y, *w("attn.c_proj")))]
        for t in range(len(xs)):
            u = ref_linear(ref_layer_norm(xs[t], *w("ln_2")), *w("mlp.c_fc"))
            g = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3))) for v in u]
            xs[t] = [a + b for a, b in zip(xs[t], ref_linear(g, *w("mlp.c_proj")))]
    return [ref_layer_norm(x, p["transformer.ln_f.weight"], p["transformer.ln_f.bias"]) for x in xs]


def ref_head(zs, ps, k):
    """cosine, relu, top-k, mixture, residual -> list a token of (ids, gates, zhat, r), and the matrix of cosines."""
    def cos(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    s = [[cos(z, p) for p in ps] for z in zs]
    out = []
    for z, row in zip(zs, s):
        ids = sorted(range(len(ps)), key=lambda i: -row[i])[:k]
        gates = [max(0.0, row[i]) for i in ids]
        zhat = [sum(a * ps[i][j] for a, i in zip(gates, ids)) for j in range(len(z))]
        out.append((ids, gates, zhat, [a - b for a, b in zip(z, zhat)]))
    return out, s


def test_forward_loss_terms_and_ledger_equal_plain_loops():
    model = tiny()
    c, g = model.config, torch.Generator().manual_seed(1)
    idx, targets = torch.randint(11, (2, 7), generator=g), torch.randint(11, (2, 7), generator=g)
    zs = [z for row in idx.tolist() for z in ref_hidden(model, row)]
    torch.testing.assert_close(model.hidden(idx).flatten(0, 1), torch.tensor(zs, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    head, s = ref_head(zs, model.prototypes.tolist(), c.top_k)
    W = model.transformer.wte.weight.tolist()
    logits = [[sum(a * b for a, b in zip(w, z)) for w in W] for z in zs]
    ys = targets.flatten().tolist()
    ce = sum(math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(logits, ys)) / len(ys)
    rec = sum(sum(v * v for v in r) for *_, r in head) / sum(sum(v * v for v in z) for z in zs)
    t2p = 1 - sum(max(row) for row in s) / len(s)
    p2t = 1 - sum(max(row[i] for row in s) for i in range(c.n_proto)) / c.n_proto
    want = torch.tensor([ce, rec, t2p, p2t], dtype=torch.float64)

    _, loss, terms = model(idx, targets, return_terms=True)
    torch.testing.assert_close(terms, want, rtol=1e-10, atol=1e-10)
    total = ce + c.lambda_rec * rec + c.lambda_t2p * t2p + c.lambda_p2t * p2t
    assert loss.item() == pytest.approx(total, rel=1e-10)
    full, loss2 = model(idx, targets)
    assert loss2.item() == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(full.flatten(0, 1), torch.tensor(logits, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    e = model.explain(idx, targets)
    for n, (ids, gates, _, r) in enumerate(head):
        b, t = divmod(n, 7)
        assert e.prototypes[b, t].tolist() == ids
        wy = W[ys[n]]
        slices = [a * sum(x * y for x, y in zip(wy, model.prototypes[i].tolist())) for a, i in zip(gates, ids)]
        assert e.contributions[b, t].tolist() == pytest.approx(slices, abs=1e-10)
        assert e.residual[b, t].item() == pytest.approx(sum(x * y for x, y in zip(wy, r)), abs=1e-10)
        assert e.logit[b, t].item() == pytest.approx(logits[n][ys[n]], abs=1e-10)


def test_training_takes_the_heads_losses_on_the_first_windows_only():
    model = tiny(head_share=0.5)
    idx = torch.randint(11, (5, 8))
    want_ce, rest = model(idx, idx, return_terms=True)[2][0], model(idx[:3], idx[:3], return_terms=True)[2][1:]
    got = model.train()(idx, idx, return_terms=True)[2]
    torch.testing.assert_close(got, torch.cat((want_ce[None], rest)))


def test_two_prototypes_by_hand():
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    P = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    m = prototype_head(z, P, 2)  # cosines 3/5 and 4/5
    assert m.ids.tolist() == [[1, 0]] and m.gates.tolist() == [[0.8, 0.6]]
    torch.testing.assert_close(m.reconstruction, torch.tensor([[1.2, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(m.residual, torch.tensor([[1.8, 0.0]], dtype=torch.float64))
    m = prototype_head(-z, P, 2)  # both cosines are negative: every gate is shut
    assert m.gates.abs().sum() == 0 and torch.equal(m.residual, -z)


# ----------------------------------------------------------------------------- gradients

def test_gradients_of_every_term():
    g = torch.Generator().manual_seed(2)
    z, P, W = (torch.randn(n, 4, dtype=torch.float64, generator=g).requires_grad_() for n in (6, 5, 7))
    y = torch.tensor([1, 0, -1, 6, 3, 3])  # -1 is ignored
    assert gradcheck(lambda z, P: prototype_head(z, P, 3).residual.square().sum(-1).mean(), (z, P))
    assert gradcheck(lambda z, P: 1 - prototype_head(z, P, 3).nearest_proto.mean(), (z, P))
    assert gradcheck(lambda z, P: 1 - prototype_head(z, P, 3).nearest_token.mean(), (z, P))
    assert gradcheck(lambda z, P: TopSimilarity.apply(z, P, 3)[0], (z, P))
    assert gradcheck(lambda z, W: LinearCrossEntropy.apply(z, W, y), (z, W))


def test_chunked_cross_entropy_is_cross_entropy():
    g = torch.Generator().manual_seed(3)
    z, W = torch.randn(150, 8, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(2 ** 14, 8, generator=g, dtype=torch.float64)
    W.requires_grad_()
    y = torch.randint(-1, 2 ** 14, (150,), generator=g)  # chunks of 64: two full, one not
    got = LinearCrossEntropy.apply(z, W, y)
    want = F.cross_entropy(z @ W.T, y, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(2 * got, (z, W)), torch.autograd.grad(2 * want, (z, W))):
        torch.testing.assert_close(a, b)


def test_prototypes_get_no_cross_entropy_gradient_and_every_parameter_gets_some():
    model = tiny().train()
    idx = torch.randint(11, (3, 8))
    model(idx, idx, return_terms=True)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model = tiny(lambda_rec=0.0, lambda_t2p=0.0, lambda_p2t=0.0).train()
    model(idx, idx)[1].backward()
    assert model.prototypes.grad.abs().max() == 0


def test_training_never_holds_a_tokens_by_k_by_d_tensor():
    model = tiny(torch.float32, n_embd=64, n_proto=100, top_k=16, vocab_size=300, head_share=1.0).train()
    idx, seen = torch.randint(300, (4, 8)), []  # N = 32

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out
    with Watch():
        model(idx, idx, return_terms=True)[1].backward()
    assert 300 * 64 <= max(seen) < 32 * 16 * 64  # W's gradient was seen, no (N, k, d) was


def test_gradient_of_the_loss_equals_plain_autograd():
    """The whole training loss written with ordinary operations; the denominator of rec is held fixed."""
    model = tiny(head_share=1.0).train()
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(4))
    params, c = dict(model.named_parameters()), model.config
    got = torch.autograd.grad(model(idx, idx, return_terms=True)[1], list(params.values()))
    z, P = model.hidden(idx).flatten(0, 1), model.prototypes
    s = F.normalize(z, dim=-1) @ F.normalize(P, dim=-1).T
    top = s.topk(c.top_k)
    gates = torch.zeros_like(s).scatter(1, top.indices, top.values.relu())
    loss = F.cross_entropy(z @ model.transformer.wte.weight.T, idx.flatten()) + c.lambda_t2p * (1 - s.max(1).values.mean()) \
        + c.lambda_p2t * (1 - s.max(0).values.mean()) + c.lambda_rec * (z - gates @ P).square().sum() / z.detach().square().sum()
    for name, a, b in zip(params, got, torch.autograd.grad(loss, list(params.values()))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_second_derivatives_are_refused():
    z, P, W = (torch.randn(n, 4, requires_grad=True) for n in (6, 5, 7))
    for out in (TopSimilarity.apply(z, P, 2)[0].sum(), LinearCrossEntropy.apply(z, W, torch.tensor([0, 1, 2, 3, 4, 5]))):
        first, = torch.autograd.grad(out, z, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
            first.sum().backward()


# ----------------------------------------------------------------------------- promises

@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_slices_add_up_to_the_logit(dtype, tolerance):
    for seed in range(5):
        model = tiny(dtype, seed, n_embd=32, n_proto=40, top_k=8, vocab_size=50)
        idx = torch.randint(50, (3, 8))
        gains = torch.rand(40, dtype=dtype) * 3
        for g in (None, gains):
            for centered in (False, True):
                e = model.explain(idx, gains=g, centered=centered)
                scale = e.logit.abs().max()
                assert (e.contributions.sum(-1) + e.residual - e.logit).abs().max() <= tolerance * scale
                assert (e.gates >= 0).all() and (e.gates[..., :-1] >= e.gates[..., 1:]).all()
        logits = F.linear(model.hidden(idx), model.transformer.wte.weight)
        e = model.explain(idx)
        assert torch.equal(e.targets, logits.argmax(-1))
        e = model.explain(idx, centered=True)
        torch.testing.assert_close(e.logit, logits.max(-1).values - logits.mean(-1))


def test_gains():
    model = tiny(n_proto=9, top_k=4)
    idx = torch.randint(11, (2, 8))
    plain = model(idx, idx)[0]
    assert torch.equal(model(idx, idx, gains=torch.ones(9))[0], plain)  # bit for bit
    off = torch.ones(9)
    off[[0, 3, 5]] = 0
    e = model.explain(idx, idx)
    removed = (e.contributions * (off[e.prototypes] == 0)).sum(-1)
    torch.testing.assert_close(model(idx, idx, gains=off)[0].gather(-1, idx[..., None])[..., 0], e.logit - removed)
    assert removed.abs().max() > 0
    with pytest.raises(UserError, match=r"expected \(n_proto,\) = \(9,\)"):
        model(idx, gains=torch.ones(8))
    with pytest.raises(UserError, match="dense model"):
        tiny(n_proto=0)(idx, gains=torch.ones(9))


def test_dense_twin_is_the_same_trunk():
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=6, top_k=2)
    torch.manual_seed(7)
    a = PRISM(PRISMConfig(n_proto=5, **shape))
    torch.manual_seed(7)
    b = PRISM(PRISMConfig(n_proto=0, **shape))
    assert set(a.state_dict()) - set(b.state_dict()) == {"prototypes"}
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    idx = torch.randint(11, (2, 8))
    assert torch.equal(a(idx, idx)[0], b(idx, idx)[0])
    e = b.explain(idx)
    assert e.prototypes.shape == (2, 8, 0)
    torch.testing.assert_close(e.residual, e.logit)


def test_causality_and_batch_order():
    model = tiny()
    idx = torch.randint(11, (4, 8))
    logits = model(idx, idx)[0]
    later = idx.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 11
    changed = model(later, later)[0]
    torch.testing.assert_close(changed[:, :5], logits[:, :5])
    assert (changed[:, 5:] - logits[:, 5:]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(idx[order], idx[order])[0], logits[order])


def test_names_are_gpt2s():
    names = set(tiny().state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias", "prototypes"} <= names
    assert {f"transformer.h.1.{n}.{s}" for n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
            for s in ("weight", "bias")} <= names


# ----------------------------------------------------------------------------- generation

def test_generation_with_and_without_cache_agree_past_the_context():
    model = tiny()
    idx = torch.randint(11, (3, 4))
    gains = torch.rand(5) * 2
    for kw in (dict(temperature=0), dict(temperature=0.9, top_k=6, top_p=0.9), dict(gains=gains)):
        a = model.generate(idx, 20, seed=5, **kw)
        b = model.generate(idx, 20, seed=5, use_cache=False, **kw)
        assert a.shape == (3, 24) and torch.equal(a, b) and torch.equal(a[:, :4], idx)
    assert not torch.equal(model.generate(idx, 20, seed=5), model.generate(idx, 20, seed=6))


def test_greedy_picks_the_largest_logit_and_stop_stops():
    model = tiny()
    idx = torch.tensor([[1, 2, 3]])
    want = idx
    for _ in range(4):
        want = torch.cat((want, model(want)[0][:, -1].argmax(-1, keepdim=True)), 1)
    got = model.generate(idx, 4, temperature=0)
    assert torch.equal(got, want)
    assert torch.equal(model.generate(idx, 4, temperature=0, stop=int(want[0, 4])), want[:, :want[0, 3:].tolist().index(int(want[0, 4])) + 4])


def test_top_k_and_top_p_limit_what_is_drawn():
    model = tiny()
    idx = torch.tensor([[1, 2, 3]]).expand(400, 3)
    probs = model(idx[:1])[0][0, -1].softmax(-1)
    order = probs.argsort(descending=True)
    assert set(model.generate(idx, 1, top_k=3, seed=1)[:, -1].tolist()) == set(order[:3].tolist())
    p = probs[order[:2]].sum().item() + 1e-6  # the third token crosses it
    assert set(model.generate(idx, 1, top_p=p, seed=1)[:, -1].tolist()) == set(order[:3].tolist())
    drawn = model.generate(idx, 1, seed=1)[:, -1].bincount(minlength=11) / 400
    assert (drawn - probs).abs().max() < 0.1


def test_tokens_beyond_the_tokenizer_are_never_drawn():
    model = tiny()
    assert model.generate(torch.zeros(200, 1, dtype=torch.long), 3, temperature=5.0, seed=1, n_vocab=4).max() == 3


def test_generation_refuses_bad_input():
    model = tiny()
    with pytest.raises(UserError, match="the prompt has 9 tokens, expected 1 to block_size = 8"):
        model.generate(torch.zeros(1, 9, dtype=torch.long), 1)
    with pytest.raises(UserError, match="the prompt has 0 tokens"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(UserError, match="top_p=2"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1, top_p=2)
    with pytest.raises(UserError, match="9 tokens given"):
        model.explain(torch.zeros(1, 9, dtype=torch.long))


# ----------------------------------------------------------------------------- GPT-2's weights

def gpt2_state(model):
    """model's trunk as GPT-2 stores it: Conv1D (in, out) matrices, masks, a second name for W."""
    state = {k: v.T.contiguous() if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v
             for k, v in model.state_dict().items() if k != "prototypes"}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def test_from_pretrained(tmp_path):
    source = tiny(torch.float32)
    idx = torch.randint(11, (4, 8))
    torch.save(gpt2_state(source), tmp_path / "gpt2.pt")
    bare = {k.removeprefix("transformer."): v for k, v in gpt2_state(source).items()}
    for given in (gpt2_state(source), str(tmp_path / "gpt2.pt"), bare):
        model = PRISM.from_pretrained(given, tokens=idx, n_head=2, n_proto=7, top_k=3).eval()
        torch.testing.assert_close(model(idx, idx)[0], source(idx, idx)[0])
    z = model.hidden(idx).flatten(0, 1)
    cosine = F.normalize(model.prototypes, dim=-1) @ F.normalize(z, dim=-1).T
    torch.testing.assert_close(cosine.max(1).values, torch.ones(7))  # each prototype points at a real token state
    residual = model.mixture(z).residual.square().sum()
    for scale in (0.9, 1.1):
        other = z - scale * model.mixture(z).reconstruction
        assert other.square().sum() > residual  # at the best common length
    with pytest.raises(UserError, match="no GPT-2 weights"):
        PRISM.from_pretrained({"a": torch.ones(2)})


def test_from_pretrained_by_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        PRISM.from_pretrained("gpt2")


# ----------------------------------------------------------------------------- files from others

def save_run(folder, model):
    folder.mkdir(exist_ok=True)
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), step=1), folder / "ckpt.pt")


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_checkpoints_of_others_are_refused_and_never_run(tmp_path, capsys):
    model = tiny(torch.float32)
    save_run(tmp_path, model)
    path = tmp_path / "ckpt.pt"
    again, ckpt = prism.load_checkpoint(tmp_path)
    assert ckpt["step"] == 1 and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    whole = path.read_bytes()
    cases = [(whole[:len(whole) // 2], "damaged"), (b"", "damaged"), (b"hello", "damaged"), (pickle.dumps(Evil()), "refused")]
    torch.save({"model": Evil(), "config": {}}, path)
    cases.append((path.read_bytes(), "refused"))
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            prism.load_checkpoint(tmp_path)
    for content, message in (([1, 2], "no PRISM checkpoint"), ({"model": {}}, "no PRISM checkpoint"),
                             ({"model": {}, "config": {"n_layers": 2}}, "no PRISM checkpoint"),
                             ({"model": {}, "config": asdict(model.config)}, "do not fit"), (torch.ones(3), "no PRISM checkpoint"),
                             ({"model": [1], "config": asdict(model.config)}, "no state dict"),
                             ({"model": {"a": 1}, "config": asdict(model.config)}, "no state dict"),
                             ({"model": {}, "config": asdict(model.config) | {"n_embd": 2 ** 62}}, "no PRISM checkpoint")):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            prism.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist; train a model first"):
        prism.load_checkpoint(tmp_path / "nowhere")
    assert "never run" not in capsys.readouterr().out


def test_gains_files(tmp_path):
    model, path = tiny(torch.float32), tmp_path / "g.json"
    good = dict(checkpoint=prism.fingerprint(model.state_dict()), ids=[1, 4], gains=[0.0, 2.5])
    path.write_text(json.dumps(good))
    assert prism.load_gains(path, model).tolist() == [1, 0, 1, 1, 2.5]
    bad = [("{", "no gains file"), (json.dumps({"ids": []}), "no gains file"), (json.dumps(good | dict(checkpoint="ff")), "another checkpoint"),
           (json.dumps(good | dict(ids=[1, 5])), "ids from 0 to 4"), (json.dumps(good | dict(gains=[1, math.nan])), "finite"),
           (json.dumps(good | dict(gains=["0", "1"])), "no gains file"), (json.dumps(good | dict(ids=[1])), "as many"),
           (json.dumps(good | dict(gains=[1, 1e300])), "finite"), (json.dumps(good | dict(gains=[1, 10 ** 400])), "no gains file"), ("[" * 10 ** 5, "no gains file")]
    for text, message in bad:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            prism.load_gains(path, model)


def test_datasets_that_disagree_with_their_meta(tmp_path):
    def fresh():
        return write_dataset(tmp_path / "d", list(range(100)), list(range(50)))
    train, val, meta = prism.load_dataset(fresh())
    assert train.tolist() == list(range(100)) and len(val) == 50 and meta["vocab_size"] == 257
    for break_it, message in (
            (lambda d: (d / "train.bin").unlink(), "train.bin is missing"),
            (lambda d: (d / "train.bin").write_bytes(b"12"), "train.bin is 2 bytes; meta.json promises 100 tokens of uint16, 200 bytes"),
            (lambda d: (d / "val.bin").write_bytes(b"\0" * 100), "val.bin differs from the sha256"),
            (lambda d: (d / "meta.json").unlink(), "meta.json is missing"),
            (lambda d: (d / "meta.json").write_text("{"), "meta.json is damaged"),
            (lambda d: (d / "meta.json").write_text('{"dtype": "float8"}'), "meta.json is damaged"),
            (lambda d: (d / "train.bin").write_bytes(b""), "train.bin is 0 bytes")):
        folder = fresh()
        break_it(folder)
        with pytest.raises(UserError, match=message):
            prism.load_dataset(folder)
    folder = fresh()
    text = "é\r\n <|endoftext|> \U0001f600"
    tokenizer = prism.load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text and tokenizer.eot_token == 256
    (folder / "tokenizer.tiktoken").write_text("YQ== 0\nYg== 0")
    with pytest.raises(UserError, match="two tokens share a number"):
        prism.load_tokenizer(folder)
    (folder / "tokenizer.tiktoken").write_text("no rank file")
    with pytest.raises(UserError, match="damaged"):
        prism.load_tokenizer(folder)


def test_windows_are_a_pure_function_and_do_not_overlap():
    a, b = prism.window_starts(1000, 16, 3, 5), prism.window_starts(1000, 16, 3, 5)
    assert a.tolist() == b.tolist() != prism.window_starts(1000, 16, 3, 6).tolist()
    s = sorted(a.tolist())
    assert len(s) == (1000 - 16) // 16 and all(y - x == 16 for x, y in zip(s, s[1:])) and s[0] < 16 and s[-1] + 17 <= 1000
    for n in range(32, 70):  # the last target exists, whatever the offset
        assert all(prism.window_starts(n, 16, 0, e).max() + 17 <= n for e in range(30))
    with pytest.raises(UserError, match="do not fill two windows"):
        prism.window_starts(31, 16, 0, 0)


# ----------------------------------------------------------------------------- command lines

def test_command_lines(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text('prompt = "a"\ntemperature = 1\nseed = 3\n')
    cfg = prism.parse_config(prism.SampleConfig, [str(path), "--prompt=x=y", "--seed=4"])
    assert (cfg.prompt, cfg.temperature, cfg.seed) == ("x=y", 1.0, 4) and type(cfg.temperature) is float
    for words, message in ((["--temprature=1"], "unknown option 'temprature'; the nearest is 'temperature'"), (["--seed=x"], "seed takes int, found 'x'"),
                           (["--seed"], "has no value"), (["nowhere.toml"], "neither an option"), (["--seed=1.5"], "seed takes int"),
                           (["--sed"], "the nearest is 'seed'")):
        with pytest.raises(UserError, match=message):
            prism.parse_config(prism.SampleConfig, words)
    path.write_text("seed = 'x'")
    with pytest.raises(UserError, match="seed takes int, found 'x'"):
        prism.parse_config(prism.SampleConfig, [str(path)])
    path.write_text("seed == 1")
    with pytest.raises(UserError, match="no TOML"):
        prism.parse_config(prism.SampleConfig, [str(path)])
    with pytest.raises(SystemExit):
        prism.parse_config(prism.SampleConfig, ["--help"])
    assert "0 is greedy" in capsys.readouterr().out


@pytest.mark.parametrize("kw,message", [(dict(top_k=6), r"top_k is 6, expected 1 to n_proto \(5\)"), (dict(n_head=4), "does not divide"),
                                        (dict(vocab_size=0), "vocab_size is 0"), (dict(dropout=1.0), "dropout is 1.0"), (dict(head_share=0.0), "head_share is 0.0")])
def test_configurations_that_do_not_fit(kw, message):
    with pytest.raises(UserError, match=message):
        tiny(**kw)


def test_sampling_from_a_run(tmp_path, dataset, capsys):
    save_run(tmp_path, tiny(torch.float32, vocab_size=257, block_size=16))
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    words = [f"--out_dir={tmp_path}", "--prompt=the cat", "--max_new_tokens=5", "--device=cpu"]
    prism.main(words)
    first = capsys.readouterr().out
    prism.main(words)
    assert first == capsys.readouterr().out and first.startswith("the cat")
    with pytest.raises(UserError, match="the prompt is empty"):
        prism.main(words + ["--prompt="])
    with pytest.raises(UserError, match="the prompt has 20 tokens, expected 1 to block_size = 16"):
        prism.main(words + ["--prompt=" + "x" * 20])
    with pytest.raises(UserError, match="cannot be used here"):
        prism.main(words + ["--device=cuda:99"])


@pytest.mark.parametrize("body, status", [("pass", 0), ("raise prism.UserError('no')", 2), ("raise KeyboardInterrupt", 130), ("sys.exit(143)", 143)])
def test_a_rank_leaves_without_shutting_the_interpreter_down(body, status):
    """Threads of gloo that outlive the group abort the process when the interpreter goes first; a rank says all that it has to say, then goes."""
    code = f"import atexit, sys, prism\natexit.register(print, 'shut down')\ndef main(argv):\n    print('said')\n    {body}\nprism.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(prism.__file__).parent, env=os.environ | {"RANK": "0"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "said\n", "error: no\n" if status == 2 else "")
