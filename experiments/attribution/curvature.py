"""Is the curvature of the head local? How much of the joint Hessian lies within its blocks.

    python experiments/attribution/curvature.py       three heads; about 15 minutes on 2 cores

    within = |D|^2 / |H|^2,   |H - D|^2 = E |(H - D) v|^2      squared Frobenius norms

H is the joint Hessian without damping, D its blocks, v random signs; H is never formed. The heads:
PRISM's; that of a run without the clustering losses; random prototypes of the same lengths on
PRISM's trunk. Were all blocks of H alike, `within` would be 1 / the number of prototypes that fire.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rivals import windows  # noqa: E402
from tools import options_of, save_results, trained  # noqa: E402

from attribute import Curvature, curvature_product, records, seen_windows  # noqa: E402
from common import Run, parse_config, run_main  # noqa: E402


@dataclass
class CurvatureConfig:
    out_dir: str = "out"        # PRISM's run
    loose: str = "out-loose"    # the run without clustering losses, trained here
    tokens: int = 32768         # training tokens that H is summed over
    out: str = "experiments/results/curvature.json"  # the result


def measured(run, n_tokens, probes=8):
    """-> the figures of a head (dict)."""
    W, M = run.model.W, run.model.config.n_proto
    rng = np.random.default_rng(1)
    starts = rng.permutation(seen_windows(run.ckpt, len(run.train)))[:n_tokens // run.T]
    signs = rng.choice([-1.0, 1.0], (probes, M, W.size(1)))
    v = torch.from_numpy(signs.astype(np.float32))
    Hv = torch.zeros_like(v)
    curvature = Curvature(W, M)
    for i in range(0, len(starts), 64):
        r = records(run.model, *windows(run, run.train, starts[i:i + 64]))
        curvature.add(r)
        Hv += curvature_product(W, r, v)
    D = torch.stack([curvature.block(i, 0.0) for i in range(M)]).double()
    Dv = torch.einsum("iab,qib->qia", D, v.double())
    beyond = (Hv - Dv).square().sum((1, 2))                                     # (probes,)
    inside = D.square().sum()
    share = inside / (inside + beyond.mean())
    error = (inside / (inside + beyond)).std() / probes ** 0.5
    firing = D.flatten(1).any(1).sum()
    return dict(within_squared=share.item(), standard_error=error.item(),
                within_norm=share.sqrt().item(), firing=firing.item())


def main(argv):
    cfg = parse_config(CurvatureConfig, argv)
    prism = Run(cfg.out_dir, "cpu")
    random = Run(cfg.out_dir, "cpu")
    loose = trained(cfg.loose, *options_of(prism.ckpt), "--lambda_t2p=0", "--lambda_p2t=0")
    P = random.model.prototypes
    torch.manual_seed(1)
    P.copy_(F.normalize(torch.randn_like(P), dim=1) * P.norm(dim=1, keepdim=True))
    heads = {
        "PRISM": prism,
        "without clustering losses": Run(loose, "cpu"),
        "random prototypes": random,
    }
    result = {}
    for name, run in heads.items():
        result[name] = measured(run, cfg.tokens)
        print(name, result[name], flush=True)
    save_results(cfg.out, dict(options=asdict(cfg), heads=result))


if __name__ == "__main__":
    run_main(main)
