"""Tasks of lm-evaluation-harness on a run, without and with gains.

    pip install -r experiments/requirements.txt
    python experiments/harness.py --tasks=arc_easy,hellaswag --gains=out/gains/cloze.json --limit=200
    python experiments/harness.py --tasks=mine --include=folder        a task of your own: folder/mine.yaml

Prints the metrics of every task, each with its standard error, without gains and with them, and writes --out. In a program of yours:
    lm_eval.simple_evaluate(model=PrismLM("out", "out/gains/cloze.json"), tasks=["arc_easy"])
"""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch  # noqa: E402
from common import machine, save  # noqa: E402

from prism import UserError, load_checkpoint, load_gains, load_tokenizer, parse_config, pick_device, run_main  # noqa: E402

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    lm_eval, TemplateLM = None, object


@dataclass
class HarnessConfig:
    out_dir: str = "out"     # the run
    gains: str = ""          # a gains file, or several with commas between; without one only the model as it is
    tasks: str = ""          # names of tasks, with commas between
    include: str = ""        # a folder with task files of your own
    num_fewshot: int = 0     # examples before each question
    limit: int = 0           # questions a task, 0: all
    batch_size: int = 32     # sequences at once
    device: str = "auto"     # auto, cpu, cuda or mps
    out: str = "experiments/results/harness.json"  # the metrics


class PrismLM(TemplateLM):
    """A run, with gains or without, as a model that lm-evaluation-harness can ask."""

    def __init__(self, out_dir="out", gains="", device="auto", batch_size=32):
        super().__init__()
        self._device, self.batch_size = pick_device(device), int(batch_size)
        self.model = load_checkpoint(out_dir, self._device)[0].requires_grad_(False).eval()
        self.gains = load_gains(gains, self.model) if gains else None
        self.words, self.T = load_tokenizer(out_dir), self.model.config.block_size

    @property
    def eot_token_id(self):
        return self.words.eot_token

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.words.encode_ordinary(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """requests: ((context, continuation), their tokens) -> for each, the log-probability of the continuation in nats, and whether every
        token of it is the likeliest. The oldest tokens of the context go where both together are longer than the context holds."""
        results = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        for i in range(0, len(order), self.batch_size):
            batch, rows = order[i:i + self.batch_size], []
            for n in batch:
                (context, continuation), head, tail = requests[n]
                if len(tail) > self.T:
                    raise UserError(f"a continuation has {len(tail)} tokens, the context holds {self.T}: {continuation[:60]!r}")
                rows.append((*head, *tail)[-self.T - 1:])
            idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            for line, row in zip(idx, rows):
                line[:len(row)] = torch.tensor(row)
            idx = idx.to(self._device)
            z = self.model.hidden(idx[:, :-1])
            for j, n in enumerate(batch):
                size, end = len(requests[n][2]), len(rows[j]) - 1
                y = idx[j, end - size + 1:end + 1]
                logp = self.model.logits(z[j, end - size:end], self.gains)[:, :self.words.n_vocab].float().log_softmax(1)
                results[n] = logp.gather(1, y[:, None]).sum().item(), bool((logp.argmax(1) == y).all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of each whole text, behind the end of a text, every token predicted once."""
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self.T, 1)
            parts = [(("", ""), *make_disjoint_window(w)) for w in windows]
            sums.append(sum(x[0] for x in self._loglikelihood_tokens(parts)))
        return sums

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            new = int(options.get("max_gen_toks", 128))
            head = (self.tok_encode(context) or [self.eot_token_id])[-self.T:]
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            idx = self.model.generate(torch.tensor([head], device=self._device), new, temperature, gains=self.gains, seed=0,
                                      n_vocab=self.words.n_vocab, stop=self.eot_token_id)
            text = self.words.decode([t for t in idx[0, len(head):].tolist() if t != self.eot_token_id])
            texts.append(text[:min((text.find(u) for u in until if u and u in text), default=None)])
        return texts


def main(argv):
    cfg = parse_config(HarnessConfig, argv)
    if lm_eval is None:
        raise UserError("lm_eval cannot be imported; run: pip install -r experiments/requirements.txt")
    if not cfg.tasks or cfg.limit < 0 or cfg.num_fewshot < 0 or cfg.batch_size < 1:
        raise UserError(f"tasks={cfg.tasks!r}, limit {cfg.limit}, num_fewshot {cfg.num_fewshot}, batch_size {cfg.batch_size}; expected names, and at least 0, 0 and 1")
    if cfg.include and not Path(cfg.include).is_dir():
        raise UserError(f"{cfg.include} is no folder; expected one with task files")
    manager, names = TaskManager(include_path=cfg.include or None), cfg.tasks.split(",")
    if missing := [n for n in names if n not in manager.all_tasks]:
        raise UserError(f"no task {missing[0]!r}; lm_eval ls tasks lists those there are, --include=FOLDER adds your own, whose files must be well-formed")
    result = {"options": asdict(cfg), "lm_eval": lm_eval.__version__, "machine": machine()}
    for side, gains in (("without", ""), *((("with", cfg.gains),) if cfg.gains else ())):
        found = lm_eval.simple_evaluate(PrismLM(cfg.out_dir, gains, cfg.device, cfg.batch_size), tasks=names, task_manager=manager, num_fewshot=cfg.num_fewshot,
                                        limit=cfg.limit or None, bootstrap_iters=1000, log_samples=False)
        result[side] = {t: {k.removesuffix(",none"): v for k, v in x.items() if isinstance(v, float) and math.isfinite(v)} for t, x in found["results"].items()}
    for task, x in result["without"].items():
        for metric in (m for m in x if "_stderr" not in m):
            error = ",".join((metric.split(",")[0] + "_stderr", *metric.split(",")[1:]))       # acc_stderr, or exact_match_stderr,strict-match
            print(f"{task} {metric}: " + "; ".join(f"{n} gains {result[n][task][metric]:.4f} +- {result[n][task].get(error, math.nan):.4f}" for n in ("without", "with") if n in result))
    save(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
