"""Multiple-choice tasks of lm-evaluation-harness on a run, without gains and with them.

    pip install -r experiments/requirements.txt
    python experiments/interventions/harness.py --tasks=arc_easy --gains=out/gains/cloze.json
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from tools import package, save_results  # noqa: E402

from common import Run, load_gains, parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:
    TemplateLM = object


@dataclass
class HarnessConfig:
    out_dir: str = "out"   # the run
    gains: str = ""        # a gains file, or several with commas between
    tasks: str = ""        # names of tasks, with commas between
    include: str = ""      # a folder with task files of your own
    num_fewshot: int = 0   # examples before a question
    limit: int = 0         # questions per task; 0: all
    device: str = "auto"   # auto, cpu, cuda or mps
    out: str = "experiments/results/harness.json"  # the metrics


class PrismLM(TemplateLM):
    """A run, with gains or without, for tasks that score given answers."""

    def __init__(self, out_dir="out", gains="", device="auto"):
        super().__init__()
        self.run = Run(out_dir, device, text=False)
        self.gains = load_gains(gains, self.run.model) if gains else None

    @property
    def eot_token_id(self):
        return self.run.tokenizer.eot_token

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.run.tokenizer.encode_ordinary(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """(texts, context, answer), tokens -> of each answer log-probability, is it greedy?"""
        model, T, results = self.run.model, self.run.T, []
        for (_, text), context, answer in requests:
            n = len(answer)
            if n > T:
                raise UserError(f"an answer has {n} tokens, the context holds {T}: {text[:60]!r}")
            tokens = torch.tensor([*context, *answer], device=self.run.device)[-T - 1:]
            z = model.hidden(tokens[None, :-1])[0, -n:]
            logp = model.logits(z, self.gains)[:, :self.run.tokenizer.n_vocab].log_softmax(1)
            score = logp.gather(1, tokens[-n:, None]).sum().item()
            results.append((score, bool((logp.argmax(1) == tokens[-n:]).all())))
        return results

    def generate_until(self, requests, disable_tqdm=False):
        raise UserError("this task asks for text; expected one with given answers to score")

    loglikelihood_rolling = generate_until


def main(argv):
    cfg = parse_config(HarnessConfig, argv)
    package("lm_eval")
    manager, names = TaskManager(include_path=cfg.include or None), cfg.tasks.split(",")
    if not set(names) <= set(manager.all_tasks):
        raise UserError(f"tasks={cfg.tasks}, expected some of those that lm_eval ls tasks lists")
    result = {"options": asdict(cfg), "lm_eval": lm_eval.__version__}
    for side in ("without", "with") if cfg.gains else ("without",):
        gains = cfg.gains if side == "with" else ""
        result[side] = lm_eval.simple_evaluate(
            PrismLM(cfg.out_dir, gains, cfg.device), tasks=names, task_manager=manager,
            num_fewshot=cfg.num_fewshot, limit=cfg.limit or None, log_samples=False)["results"]
        print(f"{side} gains: {result[side]}")
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
