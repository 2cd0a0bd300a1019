"""Is the curvature of the head local? The share of the joint head Hessian that lies within prototypes' own blocks, and how the blocks are conditioned.

    python experiments/curvature.py                     three heads, about 15 minutes; trains one of them if it is not there

Three heads on the same text: PRISM's; that of a run without the clustering losses (lambda_t2p = lambda_p2t = 0); random prototypes of the
same lengths on the first run's trunk. With D the blocks and H the whole, both exact and without damping, |H - D|_F^2 = E |(H - D) v|^2
over random signs v (Hutchinson), so H is never formed. If all blocks of H were alike, the share within would be 1 over the number of prototypes that fire. The picture shows
co-activation, R_ij = tr H_ij / sqrt(tr H_ii tr H_jj), of the 64 busiest prototypes, and the condition numbers of the blocks with damping.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, options_of, save, trained  # noqa: E402

import attribute  # noqa: E402
from prism import UserError, atomic, parse_config, run_main  # noqa: E402


@dataclass
class CurvatureConfig:
    out_dir: str = "out"               # PRISM's run
    loose: str = "out-loose"           # the run without clustering losses; trained here if need be
    train: str = "--lambda_t2p=0 --lambda_p2t=0"  # its options, beyond those of the first
    tokens: int = 32768                # training tokens that the curvature is summed over
    probes: int = 8                    # random signs
    seed: int = 1                      # of tokens, probes and random prototypes
    out: str = "experiments/results/curvature.json"  # the result; the picture goes beside it


@torch.no_grad()
def measured(run, cfg):
    """A run -> shares and condition numbers; R (64, 64) of the busiest prototypes."""
    model, M = run.model, run.model.config.n_proto
    W, d = model.transformer.wte.weight, model.config.n_embd
    rng = np.random.default_rng(cfg.seed)
    starts = np.sort(rng.permutation(attribute.seen_windows(run.ckpt, len(run.tokens)))[:max(1, cfg.tokens // run.T)])
    v = torch.from_numpy(rng.choice([-1.0, 1.0], (cfg.probes, M, d)).astype(np.float32))
    curvature, Hv, loss = attribute.Curvature(W, M), torch.zeros_like(v), 0.0
    rows = max(1, 2 ** 23 // len(W) // run.T)
    for i in range(0, len(starts), rows):
        ids, gates, _, pi, m, ce = attribute.records(model, *run.windows(starts[i:i + rows]))
        curvature.add(ids, gates, pi, m)
        Hv += attribute.curvature_product(W, ids, gates, pi, v)
        loss += ce.sum().item()
    H = torch.stack([curvature.block(i, 0.0) for i in range(M)])
    within = H.double().square().sum().item()
    beyond = (Hv - torch.einsum("iab,qib->qia", H, v)).double().square().flatten(1).sum(1)       # (probes,)
    mu = attribute.MU_SHARE * curvature.size()
    values = torch.linalg.eigvalsh(H.double()).clamp(min=0)
    fires = H.diagonal(dim1=1, dim2=2).sum(1) > 0
    condition = ((values[:, -1] + mu) / (values[:, 0] + mu))[fires]
    share = within / (within + beyond)
    R = curvature.correlation()
    busy = curvature.G.diagonal().argsort(descending=True)[:64]
    R = R[busy][:, busy]
    off = R - torch.eye(len(R))
    quantiles = condition.log10().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.double)).tolist()
    return dict(within_squared=within / (within + beyond.mean().item()), standard_error=(share.std(correction=1) / len(share) ** 0.5).item(),
                within_norm=(within / (within + beyond.mean().item())) ** 0.5, if_alike=1 / max(1, int(fires.sum())), log10_condition=quantiles, mu=mu, firing=int(fires.sum()),
                mean_coactivation=off.abs().sum().item() / max(1, len(R) * (len(R) - 1)), loss=loss / len(starts) / run.T), R, condition.log10()


def main(argv):
    cfg = parse_config(CurvatureConfig, argv)
    if cfg.tokens < 1 or cfg.probes < 2:
        raise UserError(f"tokens is {cfg.tokens}, probes {cfg.probes}; expected at least 1 and 2")
    prism = attribute.Run(cfg.out_dir, "cpu")
    loose = trained(cfg.loose, *options_of(prism.ckpt), *cfg.train.split())
    heads = {"PRISM": prism, "without clustering losses": attribute.Run(loose, "cpu"), "random prototypes": attribute.Run(cfg.out_dir, "cpu")}
    P = heads["random prototypes"].model.prototypes
    P.copy_(torch.nn.functional.normalize(torch.randn(P.shape, generator=torch.Generator().manual_seed(cfg.seed)), dim=1) * P.norm(dim=1, keepdim=True))
    result, pictures = dict(options=asdict(cfg), machine=machine(), heads={}), {}
    for name, run in heads.items():
        x, R, condition = measured(run, cfg)
        result["heads"][name], pictures[name] = x, (R, condition)
        print(f"{name}: {x['within_squared']:.3f} of the squared Frobenius norm within blocks ({x['within_norm']:.3f} of the norm; {x['if_alike']:.4f} if all blocks were alike); condition number "
              f"of the blocks 10^{x['log10_condition'][1]:.2f} (10% to 90%: 10^{x['log10_condition'][0]:.2f} to 10^{x['log10_condition'][2]:.2f}), mean |R| of the 64 busiest {x['mean_coactivation']:.3f}", flush=True)
    save(cfg.out, result)

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for ax, (name, (R, _)) in zip(axes, pictures.items()):
        shown = ax.imshow(R.abs(), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        ax.set_title(f"{name}: {result['heads'][name]['within_squared']:.0%} within blocks", fontsize=10)
        ax.set_xlabel("prototype, by its own curvature")
    fig.colorbar(shown, ax=axes[2], label="|R|, co-activation")
    for (name, (_, condition)), color in zip(pictures.items(), ("#0072B2", "#E69F00", "#999999")):
        axes[3].hist(condition.numpy(), bins=40, histtype="step", label=name, color=color)
    axes[3].set(xlabel="log10 of a block's condition number", ylabel="prototypes")
    axes[3].legend(fontsize=8)
    with atomic(Path(cfg.out).with_suffix(".png")) as f:
        fig.savefig(f, dpi=110, format="png")
    a, b, c = (result["heads"][n]["within_squared"] for n in heads)
    print(f"within blocks: PRISM {a:.3f}, without clustering losses {b:.3f}, random prototypes {c:.3f}")


if __name__ == "__main__":
    run_main(main)
