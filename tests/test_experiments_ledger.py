"""experiments/quality/ledger.py on a tiny model: real ablations, and the file that it writes."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/quality")]

import ledger  # noqa: E402
from sample import gate_ledger  # noqa: E402


def test_the_last_state_with_and_without_a_write():
    model = tiny(n_layer=2)
    idx = torch.tensor([3, 1, 4, 1, 5])
    norm = model.transformer.ln_f
    z = model.hidden(idx[None])[0, -1]
    assert torch.allclose(norm(ledger.last_state(model, idx)), z)
    _, writes = gate_ledger(model, idx, torch.tensor([0]))
    other = tiny(n_layer=2)
    for name, table, row in (("token", other.transformer.wte, 5),
                             ("position", other.transformer.wpe, 4)):
        other.load_state_dict(model.state_dict())
        table.weight.data[row] = 0
        got = norm(ledger.last_state(model, idx, name, writes[name].sum(0)))
        assert torch.allclose(got, other.hidden(idx[None])[0, -1]) and not torch.allclose(got, z)
    for layer, block in enumerate(model.transformer.h, 1):
        for h in range(2):
            def cut(module, x, h=h):
                x[0][0, -1, 3 * h:3 * h + 3] = 0
            hook = block.attn.c_proj.register_forward_pre_hook(cut)
            want = model.hidden(idx[None])[0, -1]
            hook.remove()
            name = f"head {layer}.{h + 1}"
            got = norm(ledger.last_state(model, idx, name, writes[name].sum(0)))
            assert torch.allclose(got, want) and not torch.allclose(got, z)

        def silent(module, x, y):
            y[0, -1] = 0
        hook = block.mlp.register_forward_hook(silent)
        want = model.hidden(idx[None])[0, -1]
        hook.remove()
        name = f"mlp {layer}"
        got = norm(ledger.last_state(model, idx, name, writes[name].sum(0)))
        assert torch.allclose(got, want) and not torch.allclose(got, z)


def test_the_changes_of_one_gate():
    model = tiny(n_layer=1, top_k=3)
    tokens = np.array([3, 1, 4, 1, 5])
    torch.manual_seed(0)
    gate, three, predicted, direct, random, ablated = ledger.measure(model, tokens)
    m = model.mixture(model.hidden(torch.from_numpy(tokens)[None])[:, -1])
    near = (m.gates - gate).abs()
    assert near.min() < 1e-12
    i = m.ids[0, near.argmin()]
    parts, writes = gate_ledger(model, torch.from_numpy(tokens), i[None])
    sums = {name: parts[name].sum().item() for name in writes}
    order = sorted(sums.values(), key=lambda part: -abs(part))
    assert predicted == pytest.approx(-order[0]) and three == pytest.approx(sum(order[:3]))
    name = next(name for name in sums if sums[name] == order[0])
    h = ledger.last_state(model, torch.from_numpy(tokens))
    z = model.transformer.ln_f(h - writes[name].sum(0))
    changed = torch.cosine_similarity(z, model.prototypes[i], dim=0) - gate
    assert direct.item() == pytest.approx(changed.item(), abs=1e-12)
    assert random != 0 and random != direct
    if name == "mlp 1":                                           # nothing reads it but the norm
        assert ablated.item() == pytest.approx(direct.item(), abs=1e-12)


def test_the_file_and_the_line(made, tmp_path, capsys):
    words = [f"--out_dir={made}", f"--out={tmp_path}/ledger.json", "--gates=20"]
    ledger.main(words)
    found = json.loads((tmp_path / "ledger.json").read_text())
    line = capsys.readouterr().out.splitlines()[-1]
    for name in ("r_direct", "r_ablated", "ratio", "first_is_half", "three_are_half"):
        assert f"{name} {found[name]:.3f}" in line
    assert -1 <= found["r_ablated"] <= 1 and 0.3 < found["r_direct"] <= 1 and found["ratio"] > 0
    assert 0 <= found["first_is_half"] <= 1 and found["gates"] == 20
    ledger.main(words)
    assert json.loads((tmp_path / "ledger.json").read_text()) == found  # the draw has a seed
