"""sample.py on a tiny prism and a tiny dense model, with nothing but ckpt.pt and a tokenizer."""
import json
from dataclasses import asdict

import pytest
import torch
from conftest import tiny

import sample
from common import fingerprint
from prism import UserError


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
        error = float(lines[-1].split("logit|: ")[1].split()[0])
        assert 0 <= error < 1e-5
        rows = [line.split("'")[2].replace("=", " ").replace("+ ", " ")
                for line in lines[1:-1] if "'" in line]
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
