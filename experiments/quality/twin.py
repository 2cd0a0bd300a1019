"""The price of prototypes over model size: PRISM and its dense twin on the same tokens and seed.

    python experiments/quality/twin.py            four widths, both sides: 20 minutes on 2 cores

Measured are the validation loss and the accuracy on cloze items (four continuations of held-out
text, chance 25%). The loss over the weights N, prototypes not counted, is fitted by least squares
on logarithms, with a 95% interval of b by the t distribution:

    L = c N^-b
"""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from interventions.cloze import cloze  # noqa: E402
from tools import BLUE, ORANGE, figure, number_list, save_results, trained  # noqa: E402

from common import dataset_folder, load_checkpoint, parse_config, run_main  # noqa: E402

CHOICE = 5                                                     # tokens of a cloze item's choice
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # 97.5% quantile, by freedom


@dataclass
class TwinConfig:
    sizes: str = "48,96,144,192"  # widths n_embd, multiples of 48, the width of a head
    dataset: str = "pydoc"        # a prepared dataset
    items: int = 1000             # cloze items
    options: str = ""             # more options of train.py, as one string
    work: str = "out-twin"        # runs go here
    out: str = "experiments/results/twin.json"  # the result; the picture goes beside it


@torch.no_grad()
def accuracy(model, items):
    """Share of items whose own continuation has the largest sum of log-probabilities."""
    hits = 0
    for rows, label in zip(items.tokens, items.label):
        idx = torch.from_numpy(rows).long()                       # (choices, L)
        logp = F.linear(model.hidden(idx[:, :-1]), model.W).log_softmax(-1)
        score = logp.gather(-1, idx[:, 1:, None])[:, -CHOICE:, 0].sum(1)
        hits += int(score.argmax() == label)
    return hits / len(items.label)


def power_law(sizes, losses):
    """-> b, its 95% interval (None below three sizes) and c of L = c N^-b."""
    x, y = np.log(sizes), np.log(losses)
    slope, start = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    law = {"b": -slope, "interval": None, "c": math.exp(start)}
    if freedom > 0:
        variance = ((y - start - slope * x) ** 2).sum() / freedom
        error = math.sqrt(variance / ((x - x.mean()) ** 2).sum()) * STUDENT.get(freedom, 2.5)
        law["interval"] = [-slope - error, -slope + error]
    return law


def main(argv):
    cfg = parse_config(TwinConfig, argv)
    items = cloze(dataset_folder(cfg.dataset), "val", cfg.items, n_choice=CHOICE)
    result = {"options": asdict(cfg), "items": len(items.label), "sizes": {}, "power_law": {}}
    common = [f"--dataset={cfg.dataset}", "--seed=1", *cfg.options.split()]
    for size in number_list("sizes", cfg.sizes):
        shape = [f"--n_embd={size}", f"--n_head={size // 48}"]
        sides = result["sizes"][str(size)] = {}
        for side, more in (("dense", ["--n_proto=0"]), ("PRISM", [])):
            out = trained(Path(cfg.work) / f"{size}-{side}", *shape, *common, *more)
            model, ckpt = load_checkpoint(out)
            weights = sum(p.numel() for p in model.transformer.parameters())
            loss, share = ckpt["best"], accuracy(model, items)
            sides[side] = {"weights": weights, "val_ce": loss, "accuracy": share}
            print(f"{size} {side}: {weights:,} weights, loss {loss:.4f}, accuracy {share:.1%}")
    fit_and_draw(result, Path(cfg.out).with_suffix(".png"))
    save_results(cfg.out, result)


def fit_and_draw(result, path):
    weights = [sides["dense"]["weights"] for sides in result["sizes"].values()]
    with figure(path) as axes:
        ax = axes[0, 0]
        for side, color in (("dense", BLUE), ("PRISM", ORANGE)):
            losses = [sides[side]["val_ce"] for sides in result["sizes"].values()]
            law = result["power_law"][side] = power_law(weights, losses)
            ax.loglog(weights, losses, "o", color=color, label=f"{side}, N^-{law['b']:.3f}")
            ax.loglog(weights, [law["c"] * n ** -law["b"] for n in weights], color=color)
            print(f"{side}: loss falls as N^-{law['b']:.3f}, interval {law['interval']}")
        ax.set_xticks(weights, [f"{n / 1e6:.2g}M" for n in weights])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="weights, prototypes not counted", ylabel="validation loss, nats")
        ax.legend()


if __name__ == "__main__":
    run_main(main)
