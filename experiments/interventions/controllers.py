"""Linear controllers: gains fitted to multiple choice, tested on other text, traced to its source.

    python experiments/interventions/controllers.py --out_dir=out --items=4000 --name=cloze
    python sample.py --gains=out/gains/cloze.json --prompt="Return the"

Items are those of cloze.py: of training text to fit on, of held-out text to test on. The score of a
choice with tokens y_t, where m_t = W^T pi_t, and its slopes S by the gains:

    s(g)    = sum_t log softmax(W (r_t + sum_i g_i a_ti p_i))[y_t]
    ds/dg_i = sum_t a_ti <W[y_t] - m_t, p_i>

To first order scores are linear in theta = g - 1, so the fit is convex:

    min_theta  mean over items of -log softmax(b (s + S theta))[label] + l2/2 |theta|^2

It is solved ROUNDS times, each time with the slopes at the last solution. Cross-validation picks
l2. The factor b is there because sums of log-probabilities are far too sure. Controls: one
temperature for all scores, and the same fit with random directions of the prototypes' lengths.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from interventions.cloze import CHOICES, cloze  # noqa: E402
from tools import interval, read_results, save_results  # noqa: E402

from common import Run, parse_config, plain, run_main  # noqa: E402
from prism import UserError, log_softmax_chunks, mix  # noqa: E402
from suppress import write_edit  # noqa: E402

CONTEXT, CHOICE = 48, 5  # tokens
PENALTIES = 0.001, 0.0003, 0.0001
ROUNDS = 3
TEMPERATURES = 1.0, 1.4, 0.7, 0.5, 2.0


@dataclass
class ControllersConfig:
    out_dir: str = "out"    # the run
    name: str = "cloze"     # the gains are written to out_dir/gains/NAME.json
    items: int = 4000       # items of training text
    test_items: int = 1000  # items of held-out text; fewer where it is short
    folds: int = 3          # of the cross-validation
    trace: int = 5          # largest gains that are traced to training text
    seed: int = 1           # of folds, controls and intervals
    device: str = "auto"    # auto, cpu, cuda or mps
    out: str = "experiments/results/controllers.json"  # one entry per run


# ------------------------------------------- scores, and their slopes

class Scored(NamedTuple):
    """The tokens of all choices, N = n CHOICES CHOICE, in the order of Items.tokens."""
    z: torch.Tensor      # (N, d)
    ids: torch.Tensor    # (N, k)
    gates: torch.Tensor  # (N, k)
    y: torch.Tensor      # (N,)
    label: torch.Tensor  # (n,)


@torch.no_grad()
def head_states(model, rows, last):
    """rows (n, L) of tokens -> z (n last, d), ids, gates (n last, k) of their last positions."""
    parts = []
    for some in rows.split(64):
        z = model.hidden(some)[:, -last:].flatten(0, 1)
        m = model.mixture(z)
        parts.append((z, m.ids, m.gates))
    return [torch.cat(u) for u in zip(*parts)]


def score_states(run, items):
    rows = torch.from_numpy(items.tokens).to(run.device).flatten(0, 1)
    z, ids, gates = head_states(run.model, rows[:, :-1], CHOICE)
    y = rows[:, -CHOICE:].flatten()
    return Scored(z, ids, gates, y, torch.from_numpy(items.label).to(run.device))


@torch.no_grad()
def choice_scores(t, W, P, gains):
    """Scored, gains (M,) of the directions P (M, d) -> s (n, CHOICES), S (n, CHOICES, M)"""
    n, M = len(t.label), len(P)
    s = t.z.new_zeros(n * CHOICES)
    slopes = t.z.new_zeros(n * CHOICES * M)
    choice = torch.arange(len(t.y), device=s.device) // CHOICE    # (N,)
    z = t.z + mix(t.ids, t.gates * (gains[t.ids] - 1), P)
    for at, logp in log_softmax_chunks(z, W):
        y = t.y[at]
        ids = t.ids[at]
        s.index_add_(0, choice[at], logp.gather(1, y[:, None])[:, 0])
        error = W[y] - logp.exp() @ W                             # W[y_t] - m_t
        slices = t.gates[at] * (error @ P.T).gather(1, ids)
        place = choice[at, None] * M + ids
        slopes.index_add_(0, place.flatten(), slices.flatten())
    return s.view(n, CHOICES), slopes.view(n, CHOICES, M)


def hits(t, W, P, gains):
    """-> (n,) 1.0 where the right choice has the largest score"""
    s, _ = choice_scores(t, W, P, gains)
    return (s.argmax(1) == t.label).double().cpu().numpy()


# ------------------------------------------- the convex fit

def controller(s, slopes, label, l2):
    """s (n, C), slopes (n, C, M), label (n,) -> theta (M,), the minimum above at b = 1"""
    theta = torch.zeros_like(slopes[0, 0], requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(s + slopes @ theta, label) + l2 / 2 * theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach()


def cross_validate(s, slopes, label, folds):
    """Folds, arrays of items -> the best l2, and the mean loss of items that its fits left out."""
    losses = {}
    for l2 in PENALTIES:
        total = 0.0
        for fold in folds:
            rest = np.setdiff1d(np.concatenate(folds), fold)
            theta = controller(s[rest], slopes[rest], label[rest], l2)
            scores = s[fold] + slopes[fold] @ theta
            total += F.cross_entropy(scores, label[fold], reduction="sum").item()
        losses[l2] = total / len(label)
    best = min(losses, key=losses.get)
    return best, losses[best]


def fit_gains(t, W, P, folds):
    """Scored -> gains (M,) of the directions P (M, d), and l2; if none helps, ones and None."""
    gains = torch.ones_like(P[:, 0])
    for i in range(ROUNDS):
        s, slopes = choice_scores(t, W, P, gains)
        losses = {}
        for b in np.geomspace(0.01, 3, 60):
            losses[b] = F.cross_entropy(b * s, t.label).item()
        b = min(losses, key=losses.get)
        slopes *= b
        s = b * s - slopes @ (gains - 1)                          # at theta = 0
        if i == 0:
            l2, loss = cross_validate(s, slopes, t.label, folds)
            if loss >= losses[b]:
                return gains, None
        gains = 1 + controller(s, slopes, t.label, l2)
    return gains, l2


# ------------------------------------------- the experiment

def split(items, n_folds, seed):
    """-> n_folds arrays of items; no document is in two of them."""
    n_documents = items.document.max() + 1
    if n_documents < n_folds:
        raise UserError(f"the items are of {n_documents} documents, expected at least one for "
                        f"each of {n_folds} folds; give more --items")
    drawn = np.random.default_rng(seed).permutation(n_documents)
    parts = np.array_split(drawn, n_folds)
    return [np.flatnonzero(np.isin(items.document, part)) for part in parts]


def random_directions(P, seed):
    """P (M, d) -> random directions (M, d) of the same lengths"""
    noise = torch.randn(P.shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise.to(P), dim=1) * P.norm(dim=1, keepdim=True)


def trace(run, gains, n):
    """The n largest gains -> a list: tokens that the prototype raises, and training text (of the
    first 131,072 tokens) before the predictions where its gate is largest. Printed as well."""
    tokens = torch.from_numpy(run.train[:2 ** 17].astype(np.int64)).to(run.device)
    windows = tokens[:len(tokens) // run.T * run.T].view(-1, run.T)
    _, ids, gates = head_states(run.model, windows, run.T)
    logits = run.model.prototypes @ run.model.W[:run.tokenizer.n_vocab].T
    found = []
    for i in (gains - 1).abs().argsort(descending=True)[:n].tolist():
        raises = [run.decode([v]) for v in logits[i].argsort(descending=True)[:5]]
        gate = (gates * (ids == i)).sum(1)
        places = gate.argsort(descending=True)[:3].tolist()
        training = [run.decode(tokens[max(0, at - 11):at + 2]) for at in places]
        gain = round(gains[i].item(), 4)
        found.append(dict(prototype=i, gain=gain, raises=raises, training=training))
        print(f"prototype {i}, gain {gain:.2f}: raises", *map(repr, raises))
        for text in training:
            print(f"    {plain(text)}")
    return found


def main(argv):
    cfg = parse_config(ControllersConfig, argv)
    if min(cfg.items, cfg.test_items) < 1 or cfg.folds < 2:
        raise UserError(f"items is {cfg.items}, test_items {cfg.test_items}, folds {cfg.folds}; "
                        "expected at least 1, 1 and 2")
    results = read_results(cfg.out)
    run = Run(cfg.out_dir, cfg.device)
    W, P = run.model.W, run.model.prototypes
    items = cloze(run.folder, "train", cfg.items, CONTEXT, CHOICE)
    test_items = cloze(run.folder, "val", cfg.test_items, CONTEXT, CHOICE)
    t = score_states(run, items)
    test = score_states(run, test_items)
    folds = split(items, cfg.folds, cfg.seed)
    ones = torch.ones_like(P[:, 0])
    gains, l2 = fit_gains(t, W, P, folds)
    gains = torch.where((gains - 1).abs() > 1e-3, gains.mul(1e4).round() / 1e4, ones)
    R = random_directions(P, cfg.seed)
    random_gains, _ = fit_gains(t, W, R, folds)
    tau = max(TEMPERATURES, key=lambda tau: hits(t, W / tau, P, ones).mean())
    heads = {"uncalibrated": (W, P, ones),
             "controller": (W, P, gains),
             "temperature": (W / tau, P, ones),
             "random": (W, R, random_gains)}

    success = {side: hits(test, *head) for side, head in heads.items()}
    size = np.bincount(test_items.document)

    def points(side, other):
        """Points of accuracy of a side over another, and their interval over documents."""
        gained = np.bincount(test_items.document, success[side] - success[other])
        return [100 * float(x) for x in interval(gained, size, cfg.seed)]

    result = {}
    for side, head in heads.items():
        accuracy = success[side].mean()
        x, low, high = points(side, "uncalibrated")
        result[side] = dict(accuracy=accuracy, points=[x, low, high],
                            calibration_accuracy=hits(t, *head).mean())
        print(f"{side:>12}: accuracy {accuracy:.1%}, {x:+.1f} points [{low:+.1f}, {high:+.1f}]")
    x, low, high = result["over_random"] = points("controller", "random")
    print(f"controller over random: {x:+.1f} points [{low:+.1f}, {high:+.1f}]")

    found = dict(by="calibrate", l2=l2, temperature=tau, options=asdict(cfg), result=result,
                 items=len(t.label), test_items=len(test.label))
    path = run.out_dir / "gains" / f"{cfg.name}.json"
    edit = run.model.edit(gains)
    write_edit(path, run, edit, found=found, traced=trace(run, gains, cfg.trace))
    facts = dict(checkpoint=run.hash, train_seed=run.ckpt["train_config"]["seed"])
    runs = results.get("runs", {}) | {cfg.out_dir: facts | found}
    save_results(cfg.out, {"runs": runs})
    print(f"{path}: {int((gains != 1).sum())} gains, fitted to {len(t.label)} items, tested on "
          f"{len(test.label)}")


if __name__ == "__main__":
    run_main(main)
