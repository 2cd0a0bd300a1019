"""The price of prototypes over model size: PRISM and its dense twin on the same tokens and seed.

    python experiments/quality/twin.py            four widths, both sides: 20 minutes on 2 cores

Measured are the validation loss and the accuracy on cloze items (four continuations of held-out
text, chance 25%). Weights are counted without the prototypes.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from interventions.cloze import cloze  # noqa: E402
from tools import figure, number_list, save_results, trained  # noqa: E402

from common import dataset_folder, load_checkpoint, parse_config, run_main  # noqa: E402

CHOICE = 5                        # tokens of a cloze item's choice


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


def main(argv):
    cfg = parse_config(TwinConfig, argv)
    items = cloze(dataset_folder(cfg.dataset), "val", cfg.items, n_choice=CHOICE)
    result = {"options": asdict(cfg), "items": len(items.label), "sizes": {}}
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
    with figure(Path(cfg.out).with_suffix(".png")) as ((ax,),):
        for side in ("dense", "PRISM"):
            found = [sides[side] for sides in result["sizes"].values()]
            weights = [x["weights"] for x in found]
            ax.semilogx(weights, [x["val_ce"] for x in found], "o-", label=side)
        ax.set(xlabel="weights, prototypes not counted", ylabel="validation loss, nats")
        ax.legend()
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
