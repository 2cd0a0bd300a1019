"""Draws the ledger of one prediction, the picture in the README.

    python experiments/picture.py --prompt="Return the number of" --out=assets/ledger.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from prism import UserError, atomic, load_checkpoint, load_tokenizer, parse_config, run_main  # noqa: E402


@dataclass
class PictureConfig:
    out_dir: str = "out"                              # the run
    prompt: str = "Return the number of"              # its most likely next token is explained
    out: str = "out/ledger.png"                       # the picture


def main(argv):
    cfg = parse_config(PictureConfig, argv)
    model, _ = load_checkpoint(cfg.out_dir)
    tokenizer = load_tokenizer(cfg.out_dir)
    ids = tokenizer.encode_ordinary(cfg.prompt)
    if not ids or not model.config.n_proto:
        raise UserError("a prompt and a model with prototypes are needed")

    def plain(text):  # matplotlib would read $ as mathematics
        return repr(text)[1:-1].replace("$", r"\$")

    def show(tokens):
        return " ".join(plain(tokenizer.decode([t])) for t in tokens)
    e = model.explain(torch.tensor([ids]), centered=True)
    target, logit, residual = (u[0, -1].item() for u in (e.targets, e.logit, e.residual))
    slices = e.contributions[0, -1].tolist()
    raised = (model.prototypes[e.prototypes[0, -1]] @ model.transformer.wte.weight.T).topk(4).indices.tolist()
    names = [f"prototype {i}: {show(r)}" for i, r in zip(e.prototypes[0, -1].tolist(), raised)] + ["residual"]

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.2 * len(names)), layout="constrained")
    left = 0.0
    for row, (name, value) in enumerate(zip(names, slices + [residual])):  # a waterfall: each bar starts where the last ended
        color = "#999999" if name == "residual" else "#0072B2" if value >= 0 else "#E69F00"
        ax.barh(row, value, left=left, color=color)
        ax.text(max(left, left + value), row, f" {value:+.2f}", va="center", fontsize=9)
        left += value
    ax.axvline(left, color="black", lw=0.8, ls=":")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.09 * (high - low))  # room for the last number
    ax.set_xlabel("share of the logit against the mean logit")
    ax.set_title(f"“{plain(cfg.prompt)}” → “{show([int(target)])}”: {sum(slices):.2f} by prototypes {residual:+.2f} residual = {logit:.2f}", fontsize=10)
    with atomic(cfg.out) as f:
        fig.savefig(f, dpi=130, format="png")
    print(f"{cfg.out}: slices {sum(slices):.4f} + residual {residual:.4f} = logit {logit:.4f}")


if __name__ == "__main__":
    run_main(main)
