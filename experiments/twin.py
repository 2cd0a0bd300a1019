"""The price of prototypes over model size: PRISM against its dense twin, trained on the same tokens with the same seed.

    python data/prepare.py cloze --dataset=pydoc
    python experiments/twin.py                           four widths, both sides; about 20 minutes on 2 cores
    python experiments/twin.py --sizes=prism-130m,prism-350m --options="--max_iters=2000"      presets of config/, on a GPU

Validation loss, accuracy on the cloze items (chance 25%), and training tokens a second of that run. The runs of a size come one after the other, so their
speeds compare only roughly; experiments/throughput.py interleaves, and measures memory. Loss is fitted as L = c N^-b over the parameters N
of the dense twin, prototypes not counted, with a 95% interval of b (t distribution of the regression of log L on log N).
The Pareto curve over loss weights, k and M at one size is `quality.py --grid=true`.
"""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import ROOT, machine, save, trained  # noqa: E402

from data.tasks import load_items  # noqa: E402
from prism import UserError, atomic, load_checkpoint, load_tokenizer, parse_config, read_metrics, run_main  # noqa: E402

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306}  # 97.5% of the t distribution, by degrees of freedom


@dataclass
class TwinConfig:
    sizes: str = "48,96,144,192"  # widths n_embd, 48 a head, or names of presets in config/
    dataset: str = "pydoc"        # a prepared dataset with cloze.jsonl
    items: int = 0                # cloze items, 0: all
    options: str = ""             # more options of train.py, as one string
    seed: int = 1                 # of training
    work: str = "out-twin"        # runs go here
    out: str = "experiments/results/twin.json"  # the result; the picture goes beside it


@torch.no_grad()
def accuracy(out_dir, items):
    """Share of items whose right choice has the largest sum of log-probabilities."""
    model, tokenizer, right = load_checkpoint(out_dir)[0], load_tokenizer(out_dir), 0
    T = model.config.block_size
    for x in items:
        scores, head = [], tokenizer.encode_ordinary(x["context"])
        for choice in x["choices"]:
            whole = [tokenizer.eot_token, *tokenizer.encode_ordinary(x["context"] + choice)][-T - 1:]
            n = max(1, len(whole) - 1 - len(head))                                            # cloze items are cut so that tokens do not join
            idx = torch.tensor(whole)
            logp = F.linear(model.hidden(idx[None, :-1]), model.transformer.wte.weight)[0].float().log_softmax(-1)
            scores.append(logp.gather(1, idx[1:, None])[-n:].sum().item())
        right += int(np.argmax(scores)) == x["label"]
    return right / len(items)


def power_law(sizes, losses):
    """-> exponent b of L = c N^-b, its 95% interval or None with fewer than three sizes, c."""
    x, y = np.log(sizes), np.log(losses)
    b, a = np.polyfit(x, y, 1)
    df = len(x) - 2
    if df < 1:
        return -b, None, math.exp(a)
    error = math.sqrt(((y - a - b * x) ** 2).sum() / df / ((x - x.mean()) ** 2).sum()) * STUDENT.get(df, 2.0)
    return -b, [-b - error, -b + error], math.exp(a)


def main(argv):
    cfg = parse_config(TwinConfig, argv)
    path = ROOT / "data" / cfg.dataset / "cloze.jsonl" if "/" not in cfg.dataset else Path(cfg.dataset) / "cloze.jsonl"
    items = load_items(str(path))[:cfg.items or None]
    result = dict(options=asdict(cfg), machine=machine(), sizes={})
    for size in cfg.sizes.split(","):
        if size.isdigit() and (int(size) % 48 or not int(size)):
            raise UserError(f"sizes={cfg.sizes}: {size} is no multiple of 48, the width of a head")
        shape = [f"--n_embd={size}", f"--n_head={int(size) // 48}"] if size.isdigit() else [f"config/{size}.toml"]
        sides = {}
        for side, more in (("dense", ["--n_proto=0"]), ("PRISM", [])):
            out = trained(Path(cfg.work) / f"{size}-{side}", *shape, f"--dataset={cfg.dataset}", f"--seed={cfg.seed}", *more, *cfg.options.split())
            (model, ckpt), rows = load_checkpoint(out), read_metrics(out / "metrics.csv")
            weights = sum(p.numel() for n, p in model.named_parameters() if "prototypes" not in n)
            sides[side] = dict(weights=weights, prototypes=model.config.n_proto * model.config.n_embd, val_ce=float(ckpt["best"]), accuracy=accuracy(out, items),
                               tokens_per_s=float(rows[-1]["tokens_per_s"]), tokens=int(float(rows[-1]["tokens"])))
        result["sizes"][size] = sides
        d, p = sides["dense"], sides["PRISM"]
        print(f"{size}: {d['weights']:,} weights; loss dense {d['val_ce']:.4f}, PRISM {p['val_ce']:.4f} ({p['val_ce'] / d['val_ce'] - 1:+.2%}); accuracy {d['accuracy']:.1%}, {p['accuracy']:.1%} "
              f"({100 * (p['accuracy'] - d['accuracy']):+.1f} points); tokens/s {d['tokens_per_s']:,.0f}, {p['tokens_per_s']:,.0f}", flush=True)
    save(cfg.out, result)
    sizes = [x["dense"]["weights"] for x in result["sizes"].values()]
    if len(sizes) > 1:
        result["power_law"] = {n: dict(zip(("b", "interval", "c"), power_law(sizes, [x[n]["val_ce"] for x in result["sizes"].values()]))) for n in ("dense", "PRISM")}
        save(cfg.out, result)
        picture(result, sizes, Path(cfg.out).with_suffix(".png"))
        print("loss falls with size to the power " + ", ".join(f"-{v['b']:.4f}" + (f" [{-v['interval'][1]:.4f}, {-v['interval'][0]:.4f}]" if v["interval"] else "") + f" ({n})" for n, v in result["power_law"].items()))


def picture(result, sizes, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, law), color in zip(result["power_law"].items(), ("#0072B2", "#E69F00")):
        ax.loglog(sizes, [x[name]["val_ce"] for x in result["sizes"].values()], "o", color=color, label=f"{name}, N^-{law['b']:.3f}")
        ax.loglog(sizes, [law["c"] * n ** -law["b"] for n in sizes], color=color)
    for axis, form in ((ax.xaxis, "{x:.2g}"), (ax.yaxis, "{x:.2f}")):
        axis.set_major_formatter(form)
        axis.set_minor_formatter(form)
    ax.set_xticks(sizes, [f"{n / 1e6:.2g}M" for n in sizes])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="weights, prototypes not counted", ylabel="validation loss, nats")
    ax.legend()
    with atomic(path) as f:
        fig.savefig(f, dpi=110, format="png")
    plt.close(fig)


if __name__ == "__main__":
    run_main(main)
