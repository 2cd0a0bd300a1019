"""The model against plain loops, hand-worked numbers and its own promises."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import gpt2_state, tiny
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from prism import PRISM, Edit, LinearCrossEntropy, PRISMConfig, UserError, prototype_head


def tokens(*shape, vocab=11, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_edit(M, d, E=3):
    """Gains and E directions with detectors of which about half fire at a token."""
    g, w, c, u = randn(M, seed=4), randn(E, M, seed=5), 0.1 * randn(E, seed=6), randn(E, d, seed=7)
    g[::3] = 1.0
    w[:, 1::2] = 0.0
    return Edit(g, w, c, u)


def ledger_error(e):
    """Largest |contributions + residual + edits - logit| of an Explanation."""
    return (e.contributions.sum(-1) + e.residual + e.edits - e.logit).abs().max()


# -- plain loops in Python floats

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def ref_layer_norm(x, w, b):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(var + 1e-5) * wi + bi for v, wi, bi in zip(x, w, b)]


def ref_linear(x, w, b):
    return [dot(row, x) + bi for row, bi in zip(w, b)]


def ref_attention(qkv, t, heads, d):
    """What token t takes from the tokens up to itself -> d numbers."""
    size, y = d // heads, []
    for h in range(heads):
        a, b = h * size, (h + 1) * size
        past = qkv[:t + 1]
        scores = [dot(qkv[t][a:b], u[d + a:d + b]) / math.sqrt(size) for u in past]
        e = [math.exp(v - max(scores)) for v in scores]
        y += [dot(e, [u[2 * d + j] for u in past]) / sum(e) for j in range(a, b)]
    return y


def ref_gelu(v):
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))


def ref_hidden(weights, c, idx):
    """The GPT-2 trunk for one sequence, matrices (out, in) -> a list of d numbers per token."""
    p = {name.removeprefix("transformer."): w.tolist() for name, w in weights.items()}
    xs = []
    for t, token in enumerate(idx):
        xs.append([a + b for a, b in zip(p["wte.weight"][token], p["wpe.weight"][t])])
    for layer in range(c.n_layer):
        def w(name):
            return p[f"h.{layer}.{name}.weight"], p[f"h.{layer}.{name}.bias"]
        qkv = [ref_linear(ref_layer_norm(x, *w("ln_1")), *w("attn.c_attn")) for x in xs]
        for t in range(len(xs)):
            y = ref_linear(ref_attention(qkv, t, c.n_head, c.n_embd), *w("attn.c_proj"))
            x = [a + b for a, b in zip(xs[t], y)]
            u = ref_linear(ref_layer_norm(x, *w("ln_2")), *w("mlp.c_fc"))
            y = ref_linear([ref_gelu(v) for v in u], *w("mlp.c_proj"))
            xs[t] = [a + b for a, b in zip(x, y)]
    return [ref_layer_norm(x, p["ln_f.weight"], p["ln_f.bias"]) for x in xs]


def ref_head(zs, ps, k):
    """cosine, relu, top-k, residual -> (ids, gates, residual) per token, and all cosines."""
    s = [[dot(z, p) / math.sqrt(dot(z, z)) / math.sqrt(dot(p, p)) for p in ps] for z in zs]
    out = []
    for z, row in zip(zs, s):
        ids = sorted(range(len(ps)), key=lambda i: -row[i])[:k]
        gates = [max(0.0, row[i]) for i in ids]
        zhat = [dot(gates, [ps[i][j] for i in ids]) for j in range(len(z))]
        out.append((ids, gates, [a - b for a, b in zip(z, zhat)]))
    return out, s


def test_forward_loss_terms_and_ledger_equal_plain_loops():
    model = tiny()
    c, idx, targets = model.config, tokens(2, 7), tokens(2, 7, seed=2)
    zs = [z for row in idx.tolist() for z in ref_hidden(model.state_dict(), c, row)]
    want_z = torch.tensor(zs, dtype=torch.float64)
    torch.testing.assert_close(model.hidden(idx).flatten(0, 1), want_z, rtol=1e-10, atol=1e-10)
    ps, W, ys = model.prototypes.tolist(), model.W.tolist(), targets.flatten().tolist()
    head, s = ref_head(zs, ps, c.top_k)
    logits = [[dot(w, z) for w in W] for z in zs]
    losses = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, ys)]
    ce = sum(losses) / len(ys)
    rec = sum(dot(r, r) for *_, r in head) / sum(dot(z, z) for z in zs)
    t2p = 1 - sum(max(row) for row in s) / len(s)
    p2t = 1 - sum(max(row[i] for row in s) for i in range(c.n_proto)) / c.n_proto
    total = ce + c.lambda_rec * rec + c.lambda_t2p * t2p + c.lambda_p2t * p2t

    loss, terms = model(idx, targets, return_terms=True)
    assert terms.tolist() == pytest.approx([ce, rec, t2p, p2t], rel=1e-10)
    assert loss.item() == pytest.approx(total, rel=1e-10)
    whole, loss = model(idx, targets)
    assert loss.item() == pytest.approx(total, rel=1e-10)
    assert whole.flatten().tolist() == pytest.approx(sum(logits, []), rel=1e-9, abs=1e-9)
    last, loss = model(idx)
    assert loss is None and torch.equal(last[:, 0], model.logits(model.hidden(idx)[:, -1]))

    e = model.explain(idx, targets)
    for n, (ids, gates, r) in enumerate(head):
        at = divmod(n, 7)
        wy = W[ys[n]]
        slices = [a * dot(wy, ps[i]) for a, i in zip(gates, ids)]
        assert e.prototypes[at].tolist() == ids
        assert e.gates[at].tolist() == pytest.approx(gates, abs=1e-10)
        assert e.contributions[at].tolist() == pytest.approx(slices, abs=1e-10)
        assert e.residual[at].item() == pytest.approx(dot(wy, r), abs=1e-10)
        assert e.logit[at].item() == pytest.approx(logits[n][ys[n]], abs=1e-10)


def test_targets_of_minus_one_count_nothing():
    model, idx, targets = tiny(), tokens(2, 8), tokens(2, 8, seed=2)
    targets[0, 3:] = -1
    logits = model(idx, targets)[0].flatten(0, 1)
    want = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)  # the mean of eleven
    ce, *others = model(idx, targets, return_terms=True)[1]
    torch.testing.assert_close(ce, want.detach())
    assert others == [*model(idx, idx, return_terms=True)[1][1:]]  # of all tokens


def test_training_takes_the_heads_losses_on_the_first_windows_only():
    model, idx = tiny(head_share=0.5), tokens(5, 8)
    ce = model(idx, idx, return_terms=True)[1][:1]
    rest = model(idx[:3], idx[:3], return_terms=True)[1][1:]
    got = model.train()(idx, idx, return_terms=True)[1]
    torch.testing.assert_close(got, torch.cat((ce, rest)))


def test_two_prototypes_by_hand():
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    P = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    m = prototype_head(z, P, 2)                                   # cosines 3/5 and 4/5
    assert m.ids.tolist() == [[1, 0]]
    assert m.gates[0].tolist() == pytest.approx([0.8, 0.6])
    assert m.reconstruction[0].tolist() == pytest.approx([1.2, 4.0])
    assert m.residual[0].tolist() == pytest.approx([1.8, 0.0])
    assert m.nearest_token.tolist() == pytest.approx([0.6, 0.8])
    assert m.nearest_proto.tolist() == pytest.approx([0.8])
    m = prototype_head(z, P, 1)                                   # only the nearer one
    assert m.ids.tolist() == [[1]] and m.residual[0].tolist() == pytest.approx([3.0, 0.0])
    m = prototype_head(-z, P, 2)                                  # both cosines are negative
    assert m.gates.abs().sum() == 0 and torch.equal(m.residual, -z)


# -- gradients

def test_gradients_of_each_term():
    z, P, W = randn(6, 4).requires_grad_(), randn(5, 4).requires_grad_(), randn(7, 4, seed=3)
    y = torch.tensor([1, 0, -1, 6, 3, 3])                         # -1 is ignored
    assert gradcheck(lambda z, P: prototype_head(z, P, 3).residual.square().sum(), (z, P))
    assert gradcheck(lambda z, P: prototype_head(z, P, 3).nearest_proto.mean(), (z, P))
    assert gradcheck(lambda z, P: prototype_head(z, P, 3).nearest_token.mean(), (z, P))
    assert gradcheck(lambda z, W: LinearCrossEntropy.apply(z, W, y), (z, W.requires_grad_()))


@pytest.mark.parametrize("least", [0, -1])
def test_linear_cross_entropy_is_cross_entropy(least):
    """In float64 to rounding; in bfloat16 like the product in bfloat16, in three chunks of it."""
    V = 2 ** 14                                                   # 64 rows in a chunk
    z, W = randn(150, 8).requires_grad_(), randn(V, 8, seed=2).requires_grad_()
    y = torch.randint(least, V, (150,), generator=torch.Generator().manual_seed(3))
    y[:2] = least
    got = LinearCrossEntropy.apply(z, W, y)
    want = F.cross_entropy(z @ W.T, y, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(2 * want, (z, W))
    for a, b in zip(torch.autograd.grad(2 * got, (z, W)), gradients):
        torch.testing.assert_close(a, b)
    z, W = z.detach().float().requires_grad_(), W.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low = LinearCrossEntropy.apply(z, W, y)
        plain = F.cross_entropy((z @ W.T).float(), y, ignore_index=-1, reduction="sum")
    assert low.dtype is torch.float32
    assert low.item() == pytest.approx(plain.item(), rel=1e-5)
    assert low.item() == pytest.approx(want.item(), rel=5e-3)
    for a, b in zip(torch.autograd.grad(2 * low, (z, W)), gradients):
        assert a.dtype is torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_prototypes_get_no_cross_entropy_gradient_and_each_parameter_gets_some():
    model, idx = tiny().train(), tokens(3, 8)
    model(idx, idx, return_terms=True)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model = tiny(lambda_rec=0.0, lambda_t2p=0.0, lambda_p2t=0.0).train()
    for terms in (True, False):
        loss = model(idx, idx, return_terms=terms)[0 if terms else 1]
        loss.backward()
        assert model.prototypes.grad.abs().max() == 0
        assert model.W.grad.abs().max() > 0


def test_training_never_holds_a_tensor_of_tokens_by_k_by_d_nor_whole_logits():
    shape = dict(n_embd=64, n_proto=100, top_k=16, vocab_size=20_000, block_size=64)
    model = tiny(torch.float32, head_share=1.0, **shape).train()
    idx, sizes = tokens(4, 64, vocab=20_000), []                  # N = 256, chunks of 64

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    sizes.append(tuple(t.shape))
            return out
    with Watch():
        model(idx, idx, return_terms=True)[0].backward()
    assert (20_000, 64) in sizes and (64, 20_000) in sizes        # W's gradient, a chunk of logits
    assert not {s for s in sizes if len(s) == 3 and s[1:] == (16, 64)}
    assert max(math.prod(s) for s in sizes) <= 64 * 20_000


def test_gradient_of_the_loss_equals_plain_autograd():
    """The training loss in ordinary operations; the denominator of rec is held fixed."""
    model, idx = tiny(head_share=1.0).train(), tokens(3, 8)
    params, c, P = dict(model.named_parameters()), model.config, model.prototypes
    got = torch.autograd.grad(model(idx, idx, return_terms=True)[0], list(params.values()))
    z = model.hidden(idx).flatten(0, 1)
    s = F.normalize(z, dim=-1) @ F.normalize(P, dim=-1).T
    top = s.topk(c.top_k)
    gates = torch.zeros_like(s).scatter(1, top.indices, top.values.relu())
    rec = (z - gates @ P).square().sum() / z.detach().square().sum()
    loss = F.cross_entropy(z @ model.W.T, idx.flatten()) + c.lambda_rec * rec
    loss = loss + c.lambda_t2p * (1 - s.max(1).values.mean())
    loss = loss + c.lambda_p2t * (1 - s.max(0).values.mean())
    for name, a, b in zip(params, got, torch.autograd.grad(loss, list(params.values()))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_second_derivatives_are_refused():
    z, W = randn(6, 4).requires_grad_(), randn(7, 4).requires_grad_()
    loss = LinearCrossEntropy.apply(z, W, torch.arange(6))
    first, = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()


# -- promises

@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_slices_add_up_to_the_logit(dtype, tolerance):
    for seed in range(5):
        model = tiny(dtype, seed, n_embd=32, n_proto=40, top_k=8, vocab_size=50)
        idx = tokens(3, 8, vocab=50, seed=seed)
        edit = Edit(*(part.to(dtype) for part in random_edit(40, 32)))
        for gains in (None, torch.rand(40) * 3, edit):
            e = model.explain(idx, gains=gains)
            assert ledger_error(e) <= tolerance * e.logit.abs().max()
            assert (e.edits.abs().max() > 0.1) == (gains is edit)
            logits = model.logits(model.hidden(idx), gains)
            assert torch.equal(e.targets, logits.argmax(-1))
            torch.testing.assert_close(e.logit, logits.max(-1).values)
            assert (e.gates >= 0).all() and (e.gates[..., :-1] >= e.gates[..., 1:]).all()


def test_gates_are_those_of_the_k_most_similar_and_never_negative():
    model = tiny(n_embd=32, n_proto=40, top_k=8)
    z = model.hidden(tokens(3, 8)).flatten(0, 1)
    s = F.normalize(z, dim=1) @ F.normalize(model.prototypes, dim=1).T
    m = model.mixture(z)
    dense = torch.zeros_like(s).scatter(1, m.ids, m.gates)
    assert m.ids.shape == (24, 8) and all(len(set(row)) == 8 for row in m.ids.tolist())
    kept = s >= s.sort(1, descending=True).values[:, 7:8]
    torch.testing.assert_close(dense, s.relu() * kept)
    torch.testing.assert_close(m.reconstruction, dense @ model.prototypes)


def test_gains():
    model, idx = tiny(n_proto=9, top_k=4), tokens(2, 8)
    plain, loss = model(idx, idx)
    ones, loss_of_ones = model(idx, idx, gains=torch.ones(9))
    assert torch.equal(ones, plain) and loss == loss_of_ones      # bit for bit
    gains = torch.ones(9)
    gains[[0, 3, 5]] = torch.tensor([0.0, -2.0, 1.5])
    e = model.explain(idx, idx)
    change = ((gains[e.prototypes] - 1) * e.contributions).sum(-1)
    assert change.abs().max() > 0.01
    logits, loss = model(idx, idx, gains=gains)
    torch.testing.assert_close(logits.gather(-1, idx[..., None])[..., 0], e.logit + change)
    torch.testing.assert_close(model(idx, gains=gains)[0][:, 0], logits[:, -1])
    ce = model(idx, idx, gains=gains, return_terms=True)[1][0]
    torch.testing.assert_close(ce, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    assert loss != loss_of_ones
    for call in (model, model.explain):
        with pytest.raises(UserError, match=r"\(8,\) gains, but n_proto = 9"):
            call(idx, gains=torch.ones(8))


# -- edits

def test_an_edit_equals_plain_loops():
    """z'_t = z_t + sum_i (g_i - 1) a_ti p_i + sum_e relu(sum_i w_ei a_ti - c_e) u_e"""
    model, M, d = tiny(n_proto=9, top_k=4), 9, 6
    edit = random_edit(M, d)
    g, w, c, u = (part.tolist() for part in edit)
    z = model.hidden(tokens(2, 8)).flatten(0, 1)
    P, m = model.prototypes.tolist(), model.mixture(z)
    fired, states = [], []
    for row, ids, gates in zip(z.tolist(), m.ids.tolist(), m.gates.tolist()):
        a = [0.0] * M
        for i, gate in zip(ids, gates):
            a[i] = gate
        fire = [max(0.0, dot(w[e], a) - c[e]) for e in range(3)]
        state = []
        for j in range(d):
            change = sum((g[i] - 1) * a[i] * P[i][j] for i in range(M))
            state.append(row[j] + change + sum(fire[e] * u[e][j] for e in range(3)))
        fired.append(fire)
        states.append(state)
    fired, states = (torch.tensor(x, dtype=torch.float64) for x in (fired, states))
    torch.testing.assert_close(edit.fire(m.ids, m.gates), fired)
    torch.testing.assert_close(edit.apply(z, m.ids, m.gates, model.prototypes), states)
    assert 0.2 < (fired > 0).double().mean() < 0.8                # some fire, some do not
    none = edit._replace(g=torch.ones(M, dtype=torch.float64), u=torch.zeros_like(edit.u))
    assert torch.equal(none.apply(z, m.ids, m.gates, model.prototypes), z)


def test_edited_logits_are_w_times_the_edited_states():
    model, idx, edit = tiny(n_proto=9, top_k=4), tokens(2, 8), random_edit(9, 6)
    z = model.hidden(idx)
    m = model.mixture(z)
    states = edit.apply(z.flatten(0, 1), m.ids, m.gates, model.prototypes).view(2, 8, 6)
    want = states @ model.W.T
    assert (want - model.logits(z)).abs().max() > 0.1
    torch.testing.assert_close(model.steer(z, edit), states)
    torch.testing.assert_close(model.logits(z, edit), want)
    logits, loss = model(idx, idx, gains=edit)
    torch.testing.assert_close(logits, want)
    ce = F.cross_entropy(want.flatten(0, 1), idx.flatten())
    terms = model(idx, idx, gains=edit, return_terms=True)[1]
    torch.testing.assert_close(terms[0], ce.detach())
    assert torch.equal(terms[1:], model(idx, idx, return_terms=True)[1][1:])  # of the head alone
    torch.testing.assert_close(model(idx, gains=edit)[0][:, 0], want[:, -1])
    assert model.steer(z) is z


def test_the_ledger_of_an_edit_names_each_part():
    model, idx, edit = tiny(n_proto=9, top_k=4), tokens(2, 8), random_edit(9, 6)
    plain, e = model.explain(idx, idx), model.explain(idx, idx, edit)
    w = model.W[idx]
    fired = edit.fire(e.prototypes.flatten(0, 1), e.gates.flatten(0, 1)).view(2, 8, 3)
    torch.testing.assert_close(e.contributions, edit.g[e.prototypes] * plain.contributions)
    torch.testing.assert_close(e.edits, (fired * (w @ edit.u.T)).sum(-1))
    torch.testing.assert_close(e.residual, plain.residual)
    torch.testing.assert_close(e.gates, plain.gates)
    assert plain.edits.shape == (2, 8) and not plain.edits.any()
    assert ledger_error(e) < 1e-12 and ledger_error(plain) < 1e-12


def test_gains_are_an_edit_without_a_direction():
    model, idx, gains = tiny(n_proto=9, top_k=4), tokens(2, 8), randn(9)
    zeros = randn(1, 9) * 0, randn(1) * 0, randn(1, 6) * 0
    edit = Edit(gains, *zeros)
    assert all(torch.equal(a, b) for a, b in zip(model.edit(gains), edit))
    assert model.edit(edit) is edit
    assert torch.equal(model(idx, idx, gains=gains)[0], model(idx, idx, gains=edit)[0])
    for a, b in zip(model.explain(idx, gains=gains), model.explain(idx, gains=edit)):
        assert torch.equal(a, b)
    assert model.edit(gains.float()).g.dtype is torch.float64     # that of the model


def test_dense_twin_starts_from_the_same_trunk():
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=6, top_k=2)
    models = []
    for n_proto in (5, 0):
        torch.manual_seed(7)
        models.append(PRISM(PRISMConfig(n_proto=n_proto, **shape)))
    a, b = models
    assert set(a.state_dict()) - set(b.state_dict()) == {"prototypes"}
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    idx = tokens(2, 8)
    logits, loss = b(idx, idx)
    assert torch.equal(a(idx, idx)[0], logits)
    assert a(idx, idx, return_terms=True)[1][0] == loss           # the twin's loss is ce alone
    assert b(idx, idx, return_terms=True)[1].tolist() == [loss.item(), 0, 0, 0]


def test_causality_and_batch_order():
    model, idx = tiny(), tokens(4, 8)
    logits = model(idx, idx)[0]
    later = idx.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 11
    changed = model(later, later)[0]
    torch.testing.assert_close(changed[:, :5], logits[:, :5])
    assert (changed[:, 5:] - logits[:, 5:]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(idx[order], idx[order])[0], logits[order])


def test_initial_weights():
    torch.manual_seed(0)
    c = PRISMConfig(vocab_size=500, n_layer=2, n_head=2, n_embd=64, n_proto=300, top_k=4)
    model = PRISM(c)
    stds = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
    assert stds.pop("prototypes") == pytest.approx(0.5, rel=0.03)  # 1 / sqrt(top_k)
    for name, std in stds.items():
        want = 0.01 if name.endswith("c_proj.weight") else 0.02   # 0.02 / sqrt(2 n_layer)
        assert std == pytest.approx(want, rel=0.05), name


@pytest.mark.parametrize("kw,message", [
    (dict(top_k=6), "top_k is 6, expected 1 to n_proto 5"),
    (dict(n_head=4), "n_embd is 6, expected a multiple of n_head 4"),
    (dict(vocab_size=0), "vocab_size is 0"), (dict(n_layer=-1), "n_layer is -1"),
    (dict(dropout=1.0), "dropout < 1"), (dict(head_share=0.0), "0 < head_share")])
def test_configurations_that_do_not_fit(kw, message):
    with pytest.raises(UserError, match=message):
        tiny(**kw)


# -- generation

def plain_generate(model, idx, n, seed, temperature=1.0, top_k=None, gains=None):
    """Full passes over the kept context; a full one keeps its newer half."""
    rng, start, T = torch.Generator().manual_seed(seed), 0, model.config.block_size
    for _ in range(n):
        if idx.size(1) - start > T:
            start = idx.size(1) - T // 2
        logits = model(idx[:, start:], gains=gains)[0][:, 0].detach().float()
        order = logits.argsort(-1, descending=True)
        if top_k:
            logits.scatter_(1, order[:, top_k:], -math.inf)
        new = order[:, :1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        idx = torch.cat((idx, new), 1)
    return idx


@pytest.mark.parametrize("prompt", [1, 4, 8, 13])
def test_cached_generation_equals_full_passes_past_the_context(prompt):
    model, idx = tiny(), tokens(3, prompt)
    gains, edit = torch.rand(5) * 2, random_edit(5, 6)
    edit = edit._replace(c=edit.c - 1, u=5 * edit.u)              # one that changes each text
    for kw in (dict(temperature=0), dict(temperature=0.9, top_k=6), dict(gains=gains),
               dict(gains=edit)):
        got = model.generate(idx, 20, seed=5, **kw)
        assert got.shape == (3, prompt + 20)
        assert torch.equal(got, plain_generate(model, idx, 20, 5, **kw))
    whole = model.generate(idx, 20, seed=5)
    assert not torch.equal(whole, model.generate(idx, 20, seed=6))
    assert not torch.equal(whole, model.generate(idx, 20, seed=5, gains=edit))
    steps = torch.cat([*model.stream(idx, 20, seed=5, gains=edit)], 1)
    assert torch.equal(model.generate(idx, 20, seed=5, gains=edit)[:, prompt:], steps)


def test_one_greedy_string():
    model, letters = tiny(seed=3), "abcdefghijk"
    idx = torch.tensor([[letters.index(c) for c in "abc"]])
    for options in (dict(temperature=0), dict(top_k=1)):
        got = model.generate(idx, 20, **options)[0]
        assert "".join(letters[t] for t in got) == "abcfhjekkchhcchjekkchhc"


def test_what_top_k_and_n_vocab_allow():
    model, idx = tiny(), torch.tensor([[1, 2, 3]]).expand(400, 3)
    probs = model(idx[:1])[0][0, -1].softmax(-1)
    likeliest = probs.argsort(descending=True)[:3].tolist()
    assert set(model.generate(idx, 1, top_k=3, seed=1)[:, -1].tolist()) == set(likeliest)
    drawn = model.generate(idx, 1, seed=1)[:, -1].bincount(minlength=11) / 400
    assert (drawn - probs).abs().max() < 0.1
    assert model.generate(idx, 3, temperature=5.0, n_vocab=4)[:, 3:].max() == 3


def test_a_context_that_is_too_long_is_refused():
    for call in (tiny().hidden, tiny().explain, tiny()):
        with pytest.raises(UserError, match="9 tokens, more than block_size = 8"):
            call(tokens(1, 9))


# -- GPT-2's weights, prototypes for a trained trunk

def test_gpt2_weights_give_gpt2s_hidden_states():
    bare, idx = gpt2_state(), tokens(2, 8)
    named = {f"transformer.{name}": w for name, w in bare.items()}
    named["lm_head.weight"] = bare["wte.weight"]
    by_output = {}
    for name, w in bare.items():
        matrix = name.startswith("h.") and w.dim() == 2
        by_output[name] = w.T if matrix else w
    for state in (bare, named):
        model = PRISM.from_pretrained(state, n_head=2, n_proto=7, top_k=3).double().eval()
        c = model.config
        assert (c.block_size, c.vocab_size, c.n_layer, c.n_embd, c.bias) == (8, 11, 2, 6, True)
        want = [ref_hidden(by_output, c, row) for row in idx.tolist()]
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(model.hidden(idx), want, rtol=1e-9, atol=1e-9)
        assert model.prototypes.shape == (7, 6)
    no_bias = {name: w for name, w in bare.items() if not name.endswith("bias")}
    assert PRISM.from_pretrained(no_bias, n_proto=0).config.bias is False


@pytest.mark.parametrize("n_proto", [7, 20])
def test_prototypes_start_as_token_states_of_the_best_length(n_proto):
    model, idx = tiny(n_proto=n_proto, top_k=3).train(), torch.arange(8).repeat(2, 1)
    idx[1] += 3
    torch.manual_seed(0)
    model.start_prototypes(idx)
    assert not model.training
    z = model.hidden(idx).flatten(0, 1)                    # 16 states
    near = (F.normalize(model.prototypes, dim=1) @ F.normalize(z, dim=1).T).max(1)
    torch.testing.assert_close(near.values, torch.ones(n_proto, dtype=torch.float64))
    assert len(set(near.indices.tolist())) == min(n_proto, 16)    # none twice while they last
    norms = model.prototypes.norm(dim=1) / z[near.indices].norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(n_proto))
    m = model.mixture(z)
    for scale in (0.99, 1.01):
        other = z - scale * m.reconstruction
        assert other.square().sum() > m.residual.square().sum()
