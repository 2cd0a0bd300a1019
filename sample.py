"""Text from a trained run, or the ledger of a prediction.

    python sample.py --prompt="Return the number of"
    python sample.py --prompt="Return the number of" --explain

The ledger of a token y:  logit_t = <W_y, r_t> + sum_i g_i a_ti <W_y, p_i> + edits.
The largest slices stand under it; under those of the last token, the largest parts of the gate."""
import codecs
import json
import math
from dataclasses import dataclass

import torch

from common import Run, load_gains, parse_config, plain, reading, run_main
from prism import UserError


@dataclass
class SampleConfig:
    prompt: str = "\n"           # the text to continue
    explain: bool = False        # print the ledger of the prompt's tokens and of the likeliest next
    out_dir: str = "out"         # the run
    max_new_tokens: int = 100    # length of the continuation
    num_samples: int = 1         # continuations, each with the next seed
    temperature: float = 0.8     # 0 is greedy
    top_k: int = 0               # keep the likeliest tokens only; 0 keeps all
    seed: int = 1337             # one seed, one text
    gains: str = ""              # gains files that raise or lower prototypes, commas between
    device: str = "auto"         # auto, cpu, cuda or mps


def sample(run, ids, gains, cfg):
    """Prints continuations, each token as it comes, up to the end of the text."""
    idx = torch.tensor([ids], device=run.device)
    for i in range(cfg.num_samples):
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")   # a token may end in a character
        print(plain(run.decode(ids), keep="\n"), end="")
        for new in run.model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                                    cfg.seed + i, gains, run.tokenizer.n_vocab):
            if new.item() == run.tokenizer.eot_token:
                break
            text = utf8.decode(run.tokenizer.decode_single_token_bytes(new.item()))
            print(plain(text, keep="\n"), end="", flush=True)
        print("\n" + "-" * 20)


@torch.no_grad()
def gate_ledger(model, idx, i):
    """Why prototypes i (n,) fire at the last token of idx (T,) -> parts {"token", "position",
    "head 1.1", ..., "mlp 1", ..., "bias"} of each gate, (n, T) of a head, by the token that it
    reads, else (n, 1); and the writes w, (T, d) or (1, d). z is the last layer norm of their sum:
        z = sum_w D w + beta,    D w = gamma * (w - mean w) / sigma, the scale sigma as it is
        cos(z, p_i) = sum_w <w, q_i> + <beta, p_i> / (|z| |p_i|),  q_i = D^T p_i / (|z| |p_i|)"""
    trunk, ln = model.transformer, model.transformer.ln_f
    token, position = trunk.wte(idx), trunk.wpe.weight[:len(idx)]
    writes = {"token": token[-1:], "position": position[-1:]}     # (1, d) each
    x = token + position                                          # (T, d)
    for layer, block in enumerate(trunk.h, 1):
        attn = block.attn
        u = block.ln_1(x)
        q, k, v = attn.c_attn(u).unflatten(1, (3, attn.n_head, -1)).permute(1, 2, 0, 3)
        scores = k @ q[:, -1, :, None] / math.sqrt(q.size(-1))    # q (heads, T, d / heads)
        att = scores.softmax(1)                                   # (heads, T, 1) of the last
        W_O = attn.c_proj.weight.T.unflatten(0, (attn.n_head, -1))
        for h, write in enumerate(att * (v @ W_O), 1):            # (T, d), att_s W_O v_s in row s
            writes[f"head {layer}.{h}"] = write
        x = x + attn(u[None])[0]
        mlp = block.mlp(block.ln_2(x))
        writes[f"mlp {layer}"] = mlp[-1:]
        x = x + mlp
    p = model.prototypes[i]                                       # (n, d)
    sigma = (x[-1].var(correction=0) + ln.eps).sqrt()
    size = ln(x[-1]).norm() * p.norm(dim=1)                       # (n,) |z| |p_i|
    scaled = ln.weight * p / size[:, None]
    q = (scaled - scaled.mean(1, keepdim=True)) / sigma           # (n, d), the readers of the gates
    parts = {name: q @ w.T for name, w in writes.items()}
    if model.config.bias:
        biases = sum(block.attn.c_proj.bias for block in trunk.h)
        parts["bias"] = (q @ biases + p @ ln.bias / size)[:, None]
    return parts, writes


def largest_parts(parts, j):
    """(name, part, [(token, amount), ...]): the three largest parts of gate j, the largest head."""
    sums = {name: part[j].sum().item() for name, part in parts.items()}
    order = sorted(sums, key=lambda name: -abs(sums[name]))
    heads = [name for name in order if "head" in name]
    for name in dict.fromkeys(order[:3] + heads[:1]):
        amounts = parts[name][j]
        most = amounts.abs().argsort(descending=True)[:3].tolist()
        read = [(s, amounts[s].item()) for s in most if name in heads]
        yield name, sums[name], read


def load_labels(run):
    """The labels of the prototypes' cards, {"12": "label"}; none before report.py wrote them."""
    path = run.out_dir / "labels.json"
    if not path.exists():
        return {}
    with reading(path, "write it anew: python report.py"):
        content = json.loads(path.read_text("utf-8"))
        return dict(content["labels"]) if content["checkpoint"] == run.hash else {}


def explain(run, ids, gains):
    """Prints the ledger: per token its logit as a sum, and under it the three largest slices."""
    idx, labels = torch.tensor([ids], device=run.device), load_labels(run)
    targets = run.model.generate(idx, 1, 0, gains=gains, n_vocab=run.tokenizer.n_vocab)[:, 1:]
    e = run.model.explain(idx, targets, gains)
    _, logit, protos, gates, slices, residual, edits = (u[0] for u in e)
    total = slices.sum(1) + edits                                 # (T,)
    parts, _ = gate_ledger(run.model, idx[0], protos[-1])
    print("           token     logit =  residual +    slices")
    for t, y in enumerate(targets[0]):
        print(f"{run.decode([y])!r:>16} {logit[t]:9.4f} = {residual[t]:9.4f} + {total[t]:9.4f}")
        if gains is not None:
            print(f"{edits[t]:+38.3f}  directions")
        largest = slices[t].abs().argsort(descending=True)[:3]
        for j in largest[gates[t, largest] > 0]:
            label = plain(str(labels.get(str(int(protos[t, j])), "")))
            print(f"{slices[t, j]:+38.3f}  #{protos[t, j]} ({gates[t, j]:.2f}) {label}")
            for name, part, read in largest_parts(parts, j) if t == len(ids) - 1 else ():
                words = [f"{run.decode([ids[s]])!r} {amount:+.3f}" for s, amount in read]
                print(f"{name:>48} {part:+.3f}", "reads" if read else "", *words)
    cosine = sum(part.sum(1) for part in parts.values())
    print("the last token is the likeliest; under its prototypes stand the parts of their gates")
    error, gap = (residual + total - logit).abs().max(), (cosine.relu() - gates[-1]).abs().max()
    print(f"largest |residual + slices - logit|: {error:.1e}, |sum of parts - gate|: {gap:.1e}")


def main(argv):
    cfg = parse_config(SampleConfig, argv)
    run = Run(cfg.out_dir, cfg.device, text=False)
    ids = run.tokenizer.encode_ordinary(cfg.prompt)
    if not ids:
        raise UserError("the prompt is empty; give at least one character: --prompt=\"The\"")
    if cfg.explain and not run.model.config.n_proto:
        raise UserError(f"{cfg.out_dir} holds a dense model (n_proto = 0): no ledger")
    if cfg.temperature < 0 or cfg.top_k < 0:
        raise UserError(f"temperature={cfg.temperature}, top_k={cfg.top_k}; expected 0 or more")
    gains = load_gains(cfg.gains, run.model) if cfg.gains else None
    if cfg.explain:
        explain(run, ids, gains)
    else:
        sample(run, ids, gains, cfg)


if __name__ == "__main__":
    run_main(main)
