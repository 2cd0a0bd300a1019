"""Which form of the mixture zhat_t = sum_j a_tj p_[ids_tj] is fastest, forward and backward?

    python experiments/mix.py                       this machine, at the default preset's shape
    python experiments/mix.py --n_embd=768 --n_proto=4096 --tokens=8192

embedding_bag  a bag of k weighted rows a token; holds (N, k) and (N, d)
dense          gates scattered into an (N, M) matrix, then one product
gather         P[ids], an (N, k, d) tensor, which training must never hold: for comparison only
head           the whole prototype_head as it stands in prism.py, and the same written with plain autograd

Interleaved rounds, medians, and ratios to the first of each pair. Writes experiments/results/mix-DEVICE.json; the last line
names the fastest form of the mixture.
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from prism import atomic, parse_config, pick_device, prototype_head, run_main  # noqa: E402
from train import keep_freed_memory  # noqa: E402


@dataclass
class MixConfig:
    tokens: int = 2048     # N
    n_embd: int = 192      # d
    n_proto: int = 1024    # M
    top_k: int = 16        # k
    rounds: int = 30       # interleaved repeats
    device: str = "auto"   # auto, cpu or cuda
    results: str = ""      # the JSON file; empty is experiments/results/mix-DEVICE.json


def main(argv):
    cfg = parse_config(MixConfig, argv)
    device = pick_device(cfg.device)
    keep_freed_memory()
    torch.manual_seed(0)
    N, d, M, k = cfg.tokens, cfg.n_embd, cfg.n_proto, cfg.top_k
    z, P = (torch.randn(n, d, device=device, requires_grad=True) for n in (N, M))
    ids = torch.rand(N, M, device=device).topk(k, 1).indices
    gates = torch.rand(N, k, device=device, requires_grad=True)
    up = torch.randn(N, d, device=device)

    def plain_head():
        values, ids = (F.normalize(z, dim=-1) @ F.normalize(P, dim=-1).T).topk(k, 1)
        return F.embedding_bag(ids, P, per_sample_weights=values.relu(), mode="sum")
    forms = {
        "embedding_bag": lambda: F.embedding_bag(ids, P, per_sample_weights=gates, mode="sum"),
        "dense": lambda: torch.zeros(N, M, device=device).scatter(1, ids, gates) @ P,
        "gather": lambda: (gates[..., None] * P[ids]).sum(1),
        "head": lambda: prototype_head(z, P, k).reconstruction,
        "head, plain autograd": plain_head,
    }
    torch.testing.assert_close(forms["dense"](), forms["embedding_bag"](), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forms["head"](), plain_head(), rtol=1e-4, atol=1e-4)
    seconds = {n: [] for n in forms}
    for r in range(cfg.rounds + 3):
        for name, form in forms.items():
            t0 = time.perf_counter()
            form().backward(up)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if r >= 3:
                seconds[name].append(time.perf_counter() - t0)
            z.grad = P.grad = gates.grad = None
    print(f"N {N}, d {d}, M {M}, k {k}, float32, {device}\n| form | milliseconds, median | against the first |\n|---|---|---|")
    table = {}
    for name in forms:
        base = seconds["head" if "head" in name else "embedding_bag"]
        table[name] = dict(ms=statistics.median(seconds[name]) * 1e3, ratio=statistics.median(a / b for a, b in zip(seconds[name], base)))
        print(f"| {name} | {table[name]['ms']:.2f} | {table[name]['ratio']:.2f} |")
    with atomic(cfg.results or ROOT / f"experiments/results/mix-{device.type}.json", "w") as f:
        json.dump(dict(shape=dict(tokens=N, n_embd=d, n_proto=M, top_k=k), torch=torch.__version__, threads=torch.get_num_threads(), forms=table), f, indent=1)
    print(f"fastest mixture: {min(('embedding_bag', 'dense', 'gather'), key=lambda n: table[n]['ms'])}")


if __name__ == "__main__":
    run_main(main)
