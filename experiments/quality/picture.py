"""Draws the ledger of one prediction: logit of y = sum_i a_ti <W[y], p_i> + <W[y], r_t>.

    python experiments/quality/picture.py --prompt="Return the number of" --out=assets/ledger.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from tools import BLUE, GREY, ORANGE, figure  # noqa: E402

from common import Run, parse_config, run_main  # noqa: E402


@dataclass
class PictureConfig:
    out_dir: str = "out"                  # the run
    prompt: str = "Return the number of"  # its most likely next token is explained
    out: str = "out/ledger.png"           # the picture


def main(argv):
    cfg = parse_config(PictureConfig, argv)
    run = Run(cfg.out_dir, "cpu", text=False)
    ids = run.tokenizer.encode_ordinary(cfg.prompt or "\n")
    e = run.model.explain(torch.tensor([ids]))

    def show(tokens, between=" "):        # matplotlib would read $ as mathematics
        return between.join(repr(run.decode([t]))[1:-1] for t in tokens).replace("$", r"\$")
    protos = e.prototypes[0, -1]
    slices = e.contributions[0, -1]
    order = slices.abs().argsort(descending=True)
    shares, names = slices[order[:12]].tolist(), []
    for i in protos[order[:12]].tolist():
        raised = run.model.W[:run.tokenizer.n_vocab] @ run.model.prototypes[i]
        names.append(f"prototype {i}: {show(raised.topk(4).indices)}")
    names.append(f"{len(order[12:])} more prototypes")
    shares += [slices[order[12:]].sum().item(), e.residual[0, -1].item()]
    with figure(cfg.out, width=9, height=1.2 + 0.2 * len(shares)) as axes:
        ax, end = axes[0, 0], 0.0
        for row, share in enumerate(shares):  # each bar starts where the last one ended
            color = BLUE if share >= 0 else ORANGE
            ax.barh(row, share, left=end, color=GREY if row == len(names) else color)
            ax.text(max(end, end + share), row, f" {share:+.2f}", va="center", fontsize=9)
            end += share
        ax.set_yticks(range(len(shares)), [*names, "residual"], fontsize=9)
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.set_xlabel(f"shares of the logit of “{show(e.targets[0, -1:])}” after “{show(ids, '')}”")
    print(f"{cfg.out}: slices {sum(shares[:-1]):.4f} + residual {shares[-1]:.4f} = {end:.4f}")


if __name__ == "__main__":
    run_main(main)
