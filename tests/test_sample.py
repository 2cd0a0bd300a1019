"""sample.py on a tiny prism and a tiny dense model, with nothing but ckpt.pt and a tokenizer."""
import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from conftest import gpt2_state, tiny

import sample
from common import fingerprint
from prism import PRISM, UserError


def write_model(folder, dataset, **kw):
    """ckpt.pt and the byte tokenizer in folder -> the model."""
    folder.mkdir()
    model = tiny(torch.float32, vocab_size=257, block_size=16, **kw)
    torch.save(dict(model=model.state_dict(), config=asdict(model.config)), folder / "ckpt.pt")
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        (folder / name).write_bytes((dataset / name).read_bytes())
    return model


def printed(capsys, out, *words):
    sample.main([f"--out_dir={out}", "--prompt=the cat", "--device=cpu", *words])
    return capsys.readouterr().out


@pytest.mark.parametrize("n_proto", [5, 0])
def test_samples_follow_the_seed(tmp_path, dataset, capsys, n_proto):
    out = tmp_path / "out"
    write_model(out, dataset, n_proto=n_proto)
    words = "--max_new_tokens=30", "--num_samples=2"
    both = printed(capsys, out, *words)
    line = "-" * 20 + "\n"
    first, second, rest = both.split(line)
    assert both == printed(capsys, out, *words) and first != second and not rest
    assert first.startswith("the cat") and second.startswith("the cat")
    assert printed(capsys, out, *words[:1], "--seed=1338") == second + line
    greedy = printed(capsys, out, *words[:1], "--temperature=0")
    assert printed(capsys, out, *words[:1], "--top_k=1") == greedy != first + line


def test_a_sample_ends_where_its_text_does(tmp_path, dataset, capsys, monkeypatch):
    out = tmp_path / "out"
    write_model(out, dataset)
    drawn = []

    def stream(self, *words):
        for token in (*" säт\x1b".encode(), 0xff, 256, *b" on"):
            drawn.append(token)
            yield torch.tensor([[token]])
    monkeypatch.setattr("prism.PRISM.stream", stream)
    # characters of two bytes come whole, a lone byte and an escape cannot act
    assert printed(capsys, out).startswith("the cat säт\\x1b\ufffd\n----")
    assert drawn[-1] == 256                                       # nothing is computed behind it


def test_tokens_come_as_they_are_drawn(tmp_path, dataset, monkeypatch):
    out = tmp_path / "out"
    model = write_model(out, dataset)
    idx = torch.tensor([list(b"the cat")])
    shown, known = [], []
    monkeypatch.setattr("builtins.print", lambda text, **more: shown.append(text))

    def stream(self, *words):
        for token in b" sat":
            known.append("".join(shown))
            yield torch.tensor([[token]])
    with monkeypatch.context() as m:
        m.setattr("prism.PRISM.stream", stream)
        sample.main([f"--out_dir={out}", "--prompt=the cat", "--device=cpu"])
    assert known == ["the cat", "the cat ", "the cat s", "the cat sa"]
    drawn = list(model.stream(idx, 30, seed=3))
    assert torch.equal(torch.cat((idx, *drawn), 1), model.generate(idx, 30, seed=3))


def test_the_ledger_adds_up_and_obeys_gains(tmp_path, dataset, capsys):
    out, gains = tmp_path / "out", tmp_path / "gains.json"
    model = write_model(out, dataset, top_k=4)
    about = dict(checkpoint=fingerprint(model.state_dict()), ids=[0, 1, 2], gains=[0.0, 0.0, 3.0])
    gains.write_text(json.dumps(about))
    tables = []
    for words in ((), (f"--gains={gains}",)):
        lines = printed(capsys, out, "--explain", *words).splitlines()
        assert "largest |residual + slices - logit|" in lines[-1]
        assert "|sum of parts - gate|" in lines[-1]
        for part in lines[-1].split("|: ")[1:]:
            assert 0 <= float(part.split(",")[0]) < 1e-5
        rows = [line.split("'")[2].replace("=", " ").replace("+ ", " ")
                for line in lines[1:-2] if " = " in line]
        assert len(rows) == 7
        tables.append([[float(x) for x in row.split()[:3]] for row in rows])
    for logit, residual, slices in tables[0] + tables[1]:
        assert logit == pytest.approx(residual + slices, abs=2e-4)
    idx = torch.tensor([list(b"the cat")])
    gain = torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0])
    for table, g in zip(tables, (None, gain)):
        logits = model.logits(model.hidden(idx), g)[0].detach()
        want = [logits[t, y].item() for t, y in enumerate(b"he cat")] + [logits[-1].max().item()]
        assert [row[0] for row in table] == pytest.approx(want, abs=2e-4)
    assert tables[0] != tables[1]


def test_the_three_largest_slices_stand_under_a_token_with_their_labels(tmp_path, dataset, capsys):
    out = tmp_path / "out"
    model = write_model(out, dataset, top_k=4)
    model.prototypes.data = model.prototypes.data.abs() + model.W[:5].abs()
    torch.save(dict(model=model.state_dict(), config=asdict(model.config)), out / "ckpt.pt")
    e = model.explain(torch.tensor([list(b"the cat")]), torch.tensor([list(b"he cats")]))
    labels = {str(i): f"label {i} \x1b" for i in range(5)}
    about = dict(checkpoint=fingerprint(model.state_dict()), labels=labels)
    (out / "labels.json").write_text(json.dumps(about))
    lines = iter(printed(capsys, out, "--explain").splitlines()[1:])
    shown = []
    for t in range(6):
        assert repr("he cat"[t]) in next(lines)
        slices = list(zip(e.contributions[0, t].tolist(), e.prototypes[0, t].tolist(),
                          e.gates[0, t].tolist()))
        for share, i, gate in sorted(slices, key=lambda s: -abs(s[0]))[:3]:
            if gate > 0:                                          # one that is silent is not shown
                assert next(lines).split() == [f"{share:+.3f}", f"#{i}", f"({gate:.2f})",
                                               "label", str(i), "\\x1b"]
            shown.append(gate > 0)
    assert any(shown) and not all(shown)
    about["checkpoint"] = "another"                                # labels of other weights
    (out / "labels.json").write_text(json.dumps(about))
    assert "label" not in printed(capsys, out, "--explain")
    for text in ("[]", "{", '{"labels": 3}'):
        (out / "labels.json").write_text(text)
        with pytest.raises(UserError, match="labels.json cannot be used .*python report.py"):
            printed(capsys, out, "--explain")


# ------------------------------------------- why did a prototype fire?

def models():
    return {"biases": tiny(), "no biases": tiny(bias=False, n_layer=3, n_head=3),
            "GPT-2": PRISM.from_pretrained(gpt2_state(d=128, V=40), n_proto=9, top_k=3).double().eval()}


@pytest.mark.parametrize("name", ["biases", "no biases", "GPT-2"])
def test_parts_add_up_to_each_gate(name):
    model = models()[name]
    c = model.config
    heads = [f"head {a}.{h}" for a in range(1, c.n_layer + 1) for h in range(1, c.n_head + 1)]
    mlps = [f"mlp {a}" for a in range(1, c.n_layer + 1)]
    idx = torch.randint(c.vocab_size, (c.block_size,), generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model.to(dtype)
        P = model.prototypes.detach()
        z = model.hidden(idx[None])[0].detach()
        m = model.mixture(z)
        for t in range(c.block_size):
            parts, writes = sample.gate_ledger(model, idx[:t + 1], torch.arange(c.n_proto))
            assert parts.keys() == {"token", "position", *heads, *mlps, *["bias"] * c.bias}
            assert writes.keys() == parts.keys() - {"bias"}
            for part in parts:
                assert parts[part].shape == (c.n_proto, t + 1 if part in heads else 1)
            total = sum(part.sum(1) for part in parts.values())
            want = torch.cosine_similarity(z[t], P, dim=1)
            assert (total - want).abs().max() < tolerance
            gates = total[m.ids[t]].relu()
            assert (gates - m.gates[t]).abs().max() < tolerance


def test_parts_against_plain_loops():
    model = tiny()
    c, idx, i = model.config, torch.tensor([3, 1, 4, 1, 5]), 2
    T, d, width = 5, c.n_embd, c.n_embd // c.n_head
    W = {name: p.detach() for name, p in model.named_parameters()}

    def norm(x, name):
        out = []
        for row in x.tolist():
            mean = sum(row) / d
            sigma = math.sqrt(sum((value - mean) ** 2 for value in row) / d + 1e-5)
            out.append([(value - mean) / sigma for value in row])
        return torch.tensor(out, dtype=torch.float64) * W[f"{name}.weight"] + W[f"{name}.bias"]

    def linear(x, name):
        return x @ W[f"{name}.weight"].T + W[f"{name}.bias"]
    writes = {"token": W["transformer.wte.weight"][idx[-1]],
              "position": W["transformer.wpe.weight"][T - 1]}
    by_token, biases = {}, torch.zeros(d).double()
    x = W["transformer.wte.weight"][idx] + W["transformer.wpe.weight"][:T]
    for layer in range(c.n_layer):
        at = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        W_O, new = W[f"{at}.attn.c_proj.weight"], x.clone()
        for h in range(c.n_head):
            own = slice(h * width, (h + 1) * width)
            q, k, v = (qkv[:, a * d:(a + 1) * d][:, own] for a in range(3))
            for t in range(T):
                score = [math.exp(q[t] @ k[s] / math.sqrt(width)) for s in range(t + 1)]
                rows = [score[s] / sum(score) * W_O[:, own] @ v[s] for s in range(t + 1)]
                new[t] += sum(rows)
            by_token[f"head {layer + 1}.{h + 1}"] = rows          # those of the last token
        biases += W[f"{at}.attn.c_proj.bias"]
        x = new + W[f"{at}.attn.c_proj.bias"]
        inner = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
        writes[f"mlp {layer + 1}"] = linear(inner, f"{at}.mlp.c_proj")[-1]
        x = x + linear(inner, f"{at}.mlp.c_proj")
    z, p = norm(x, "transformer.ln_f")[-1], W["prototypes"][i]
    sigma = math.sqrt(x[-1].var(correction=0) + 1e-5)

    def part(w):
        scaled = W["transformer.ln_f.weight"] * (w - w.mean()) / sigma
        return (scaled @ p / (z.norm() * p.norm())).item()
    parts, got_writes = sample.gate_ledger(model, idx, torch.tensor([4, i]))
    beta = (W["transformer.ln_f.bias"] @ p / (z.norm() * p.norm())).item()
    assert parts["bias"][1].item() == pytest.approx(part(biases) + beta, abs=1e-12)
    for name, w in writes.items():
        assert parts[name][1].tolist() == pytest.approx([part(w)], abs=1e-12)
        assert torch.allclose(got_writes[name], w[None], atol=1e-12)
    for name, rows in by_token.items():
        assert parts[name][1].tolist() == pytest.approx([part(w) for w in rows], abs=1e-12)
        assert torch.allclose(got_writes[name], torch.stack(rows), atol=1e-12)


def test_the_largest_parts_and_the_largest_head():
    parts = {"token": [[0.0], [0.25]], "head 1.1": [[0, 0], [0.5, -1]],
             "head 1.2": [[0, 0], [1, 2]], "mlp 1": [[0.0], [-4.0]], "bias": [[0.0], [0.75]]}
    parts = {name: torch.tensor(rows) for name, rows in parts.items()}
    got = list(sample.largest_parts(parts, 1))
    assert got == [("mlp 1", -4, []), ("head 1.2", 3, [(1, 2), (0, 1)]), ("bias", 0.75, [])]
    parts["bias"][1], parts["token"][1], parts["mlp 1"][1] = 8, 9, -10
    assert list(sample.largest_parts(parts, 1)) == [
        ("mlp 1", -10, []), ("token", 9, []), ("bias", 8, []), ("head 1.2", 3, [(1, 2), (0, 1)])]


def test_parts_stand_under_the_prototypes_of_the_last_token(tmp_path, dataset, capsys):
    out = tmp_path / "out"
    model = write_model(out, dataset, top_k=4)
    idx = torch.tensor(list(b"the cat"))
    model.prototypes.data[1:4] += model.hidden(idx[None])[0, -1].detach()  # these three fire
    torch.save(dict(model=model.state_dict(), config=asdict(model.config)), out / "ckpt.pt")
    lines = printed(capsys, out, "--explain").splitlines()[:-2]
    last = max(n for n, line in enumerate(lines) if " = " in line)
    assert not [line for line in lines[:last] if re.search(r"mlp|head|token \+", line)]
    e = model.explain(idx[None])
    shown = []
    for j in e.contributions[0, -1].abs().argsort(descending=True)[:3].tolist():
        if e.gates[0, -1, j] > 0:
            i = e.prototypes[0, -1, j].item()
            shown.append(f"{e.contributions[0, -1, j]:+.3f} #{i} ({e.gates[0, -1, j]:.2f})")
            parts, _ = sample.gate_ledger(model, idx, torch.tensor([i]))
            for name, part, read in sample.largest_parts(parts, 0):
                words = [f"{'the cat'[s]!r} {amount:+.3f}" for s, amount in read]
                shown.append(" ".join([f"{name} {part:+.3f}", *["reads"] * bool(read), *words]))
    assert [" ".join(line.split()) for line in lines[last + 1:]] == [
        " ".join(line.split()) for line in shown]
    assert len(shown) >= 12 and any("reads" in line for line in shown)


def test_what_cannot_be_sampled_is_one_line(tmp_path, dataset):
    out = tmp_path / "out"
    write_model(out, dataset)
    for words, message in ((["--prompt="], "the prompt is empty"),
                           (["--prompt=" + "x" * 20, "--explain"], "20 tokens"),
                           (["--prompt=x", "--temperature=-1"], "temperature=-1.0"),
                           (["--prompt=x", "--gains=nowhere.json"], "nowhere.json"),
                           (["--prompt=x", "--device=cuda:99"], "cuda:99")):
        with pytest.raises(UserError, match=message):
            sample.main([f"--out_dir={out}", "--device=cpu", *words])
    write_model(tmp_path / "dense", dataset, n_proto=0)
    with pytest.raises(UserError, match="dense"):
        sample.main([f"--out_dir={tmp_path}/dense", "--prompt=x", "--explain", "--device=cpu"])
