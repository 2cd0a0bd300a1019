"""Text from a trained run, or the ledger of a prediction.

    python sample.py --prompt="Return the number of"
    python sample.py --prompt="Return the number of" --explain

The ledger of a token y:  logit_t = <W_y, r_t> + sum_i g_i a_ti <W_y, p_i>, residual + slices.
The three largest slices stand under it; report.py gives the prototypes' labels.
"""
import codecs
import json
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


def load_labels(run):
    """The labels of the prototypes' cards, {"12": "label"}; none before report.py wrote them."""
    path = run.out_dir / "labels.json"
    if not path.exists():
        return {}
    with reading(path, "write it anew: python report.py"):
        content = json.loads(path.read_text("utf-8"))
        return dict(content["labels"]) if content["checkpoint"] == run.hash else {}


def explain(run, ids, gains, top=3):
    """Prints the ledger: per token its logit as a sum, and under it the `top` largest slices."""
    idx, labels = torch.tensor([ids], device=run.device), load_labels(run)
    logits, _ = run.model(idx, gains=gains)
    likeliest = logits[0, -1, :run.tokenizer.n_vocab].argmax().item()
    targets = [*ids[1:], likeliest]
    e = run.model.explain(idx, torch.tensor([targets], device=run.device), gains)
    protos, gates, logit = e.prototypes[0], e.gates[0], e.logit[0]
    slices = e.contributions[0].double()                          # (T, k)
    residual = e.residual[0].double()                             # (T,)
    total = slices.sum(-1)
    print("           token     logit =  residual +    slices")
    for t, y in enumerate(targets):
        token = repr(run.decode([y]))
        print(f"{token:>16} {logit[t]:9.4f} = {residual[t]:9.4f} + {total[t]:9.4f}")
        for j in slices[t].abs().argsort(descending=True)[:top]:
            if gates[t, j] > 0:
                label = plain(str(labels.get(str(protos[t, j].item()), "")))
                print(f"{slices[t, j]:+38.3f}  #{protos[t, j]} ({gates[t, j]:.2f}) {label}")
    error = (residual + total - logit).abs().max()
    print(f"the last token is the likeliest; largest |residual + slices - logit|: {error:.1e}")


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
