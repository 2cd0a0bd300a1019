"""How does a gate change without its largest part in the ledger of sample.py?

    python experiments/quality/ledger.py      500 gates of held-out text in half a minute

    predicted  minus the part: the last layer norm keeps its scale
    direct     the part's write is taken from h_L, then comes the true layer norm
    random     a random vector of the write's norm is taken from h_L
    ablated    the part is not written at this token, and later blocks see that
Goals: r of predicted and direct above 0.9, mean |direct| three times mean |random|."""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tools import save_results  # noqa: E402

from common import Run, parse_config, run_main  # noqa: E402
from sample import gate_ledger  # noqa: E402


@dataclass
class LedgerConfig:
    out_dir: str = "out"    # the run
    gates: int = 500        # firing gates, drawn at random
    out: str = "experiments/results/ledger.json"  # the result


def last_state(model, idx, name="", w=0):
    """h_L (d,) of the last token of idx (T,) if the part `name` does not write w (d,) there."""
    trunk = model.transformer
    x = trunk.wte(idx[None]) + trunk.wpe.weight[:len(idx)]        # (1, T, d)
    if name in ("token", "position"):
        x[0, -1] -= w
    for layer, block in enumerate(trunk.h, 1):
        x = x + block.attn(block.ln_1(x))
        if name.startswith(f"head {layer}."):
            x[0, -1] -= w
        x = x + block.mlp(block.ln_2(x))
        if name == f"mlp {layer}":
            x[0, -1] -= w
    return x[0, -1]


def measure(model, tokens):
    """Draws a gate of the last token -> gate, sum of its three largest parts, and the changes."""
    idx = torch.from_numpy(tokens.astype(np.int64))
    m = model.mixture(model.hidden(idx[None])[:, -1])
    i = m.ids[0, torch.multinomial((m.gates[0] > 0).float(), 1)]
    parts, writes = gate_ledger(model, idx, i)
    sums = {name: parts[name].sum().item() for name in writes}
    largest = sorted(sums, key=lambda name: -abs(sums[name]))[:3]
    first = largest[0]
    w = writes[first].sum(0)
    noise = torch.randn_like(w)
    noise *= w.norm() / noise.norm()
    h = last_state(model, idx)
    ablated = last_state(model, idx, first, w)
    z = model.transformer.ln_f(torch.stack((h, h - w, h - noise, ablated)))
    cosine = torch.cosine_similarity(z, model.prototypes[i])
    three = sum(sums[name] for name in largest)
    return cosine[0], three, -sums[first], *(cosine[1:] - cosine[0])


def main(argv):
    cfg = parse_config(LedgerConfig, argv)
    run = Run(cfg.out_dir, "cpu")
    torch.manual_seed(1)
    most = len(run.val) - run.T, run.T
    places = np.random.default_rng(1).integers(most, size=(cfg.gates, 2))
    rows = [measure(run.model, run.val[start:start + t + 1]) for start, t in places]
    gate, three, predicted, direct, random, ablated = np.array(rows, float).T
    result = {
        "r_direct": np.corrcoef(predicted, direct)[0, 1],
        "r_ablated": np.corrcoef(predicted, ablated)[0, 1],
        "ratio": abs(direct).mean() / abs(random).mean(),
        "first_is_half": (gate <= -2 * predicted).mean(),
        "three_are_half": (gate <= 2 * three).mean(),
    }
    save_results(cfg.out, asdict(cfg) | result)
    print(*(f"{name} {value:.3f}" for name, value in result.items()))


if __name__ == "__main__":
    run_main(main)
