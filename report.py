"""A run on one page: ledgers with the training text behind them, its prototypes, gains and loss.

    python report.py                                     out/report.html, loss.png and labels.json
    python report.py --prompt="Return the number of"     the model continues this text on the page
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from attribute import Index
from common import (atomic, load_documents, load_gains, parse_config, reading, run_main,
                    write_json)
from sample import gate_ledger, largest_parts

MAX_CARDS = 2048   # the prototypes that fire most often get a card
WORD = re.compile(r"[^\W\d_]{2,}")
FUNCTION_WORDS = """a all an and any are as at be been but by can could did do does for from had has
have he her his how i if in into is it its may might must no nor not of on only or our out over she
should so some such than that the their them then there these they this those to under up was we
were what when where which while who whose will with without would you your"""
KINDS = {  # a token is of the first kind whose pattern it matches; the last four are words
    "space": r"\s*|<\|endoftext\|>",
    "number": r" ?[\d.,]*\d[\d.,]*",
    "code": r".*(?:[_=+*/<>|&^%~@\\{}\[\]#$`]|[a-z][A-Z]|[^\W_]\d|\d[^\W_]).*",
    "punctuation": r"\s*[^\w\s\ufffd]+\s*",
    "function word": f"(?: |(?=[A-Z]))(?i:{'|'.join(FUNCTION_WORDS.split())})",
    "name": r" [A-ZÀ-Þ].*",
    "word piece": r"['’]?[^\W\dA-ZÀ-Þ].*",
    "content word": r".*"}
FUNCTION, NAME, _, CONTENT = range(4, 8)


@dataclass
class ReportConfig:
    out_dir: str = "out"      # the run, indexed before; the page is out_dir/report.html
    prompt: str = "The"       # a text of your own for the explorer; the model continues it
    device: str = "auto"      # auto, cpu, cuda or mps


def draw_loss(out_dir):
    """Validation losses of the run and its dense twin -> loss.png; {name: text of metrics.csv}."""
    metrics = {}
    ax = Figure(layout="constrained").subplots()
    for name, folder in (("this run", out_dir), ("its dense twin", f"{out_dir}-dense")):
        path = Path(folder, "metrics.csv")
        if path.exists():
            with reading(path, "restore it, or move it away"):
                rows = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
                ax.plot(rows["tokens"] / 1e6, rows["val_ce"], "o-", label=name)
                metrics[name] = path.read_text("utf-8")
    ax.set(xlabel="training tokens (millions)", ylabel="validation loss, nats per token")
    if metrics:
        ax.legend()
        with atomic(Path(out_dir, "loss.png")) as f:
            ax.figure.savefig(f, format="png", dpi=110)
    return metrics


# --------------------------------------- kinds of tokens
def kinds_at(run, positions):
    """The number in KINDS of the token at each position (N,)."""
    pattern = re.compile("|".join(f"({rule})" for rule in KINDS.values()), re.S)
    kind_of = np.zeros(run.model.config.vocab_size, np.int64)
    for token in np.unique(run.train[positions]):
        kind_of[token] = pattern.fullmatch(run.decode([token])).lastindex - 1
    kinds = kind_of[run.train[positions]]
    before = kind_of[run.train[positions - 1]]
    kinds[(kinds == NAME) & (before < FUNCTION)] = CONTENT        # begins a sentence: no name
    return kinds


# --------------------------------------- map: t-SNE, van der Maaten & Hinton 2008
def squared_distances(X):
    square = np.square(X).sum(1)
    return np.maximum(square[:, None] + square - 2 * X @ X.T, 0)


def affinities(X, perplexity):
    """p_j|i ~ exp(-beta_i |x_i - x_j|^2) whose entropy is log(perplexity); P is symmetric."""
    D = squared_distances(X)
    np.fill_diagonal(D, 1e9)                                      # p_i|i = 0
    D -= D.min(1, keepdims=True)                                  # changes no p
    beta = np.ones((len(X), 1), np.float32)
    for halvings in range(25):                                    # of a step in log beta
        E = np.exp(-beta * D)
        total = E.sum(1, keepdims=True)
        entropy = np.log(total) + beta * (D * E).sum(1, keepdims=True) / total
        beta *= np.exp(8 / 2 ** halvings * np.sign(entropy - math.log(perplexity)))
    P = E / total
    return (P + P.T) / (2 * len(X))


def tsne(X, steps=500):
    """X (n, d) float32 -> Y (n, 2), from the first two principal components downhill in KL(P|Q):
    q_ij ~ 1 / (1 + |y_i - y_j|^2),  dKL/dy_i = 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |..|^2)"""
    X = X - X.mean(0)
    if len(X) < 4:                                                # too few for neighbourhoods
        return np.zeros((len(X), 2))
    P = affinities(X, perplexity=min(30, len(X) / 4))
    Y = X @ np.linalg.eigh(X.T @ X)[1][:, :-3:-1]
    Y *= 0.01 / Y.std()
    velocity = 0
    for _ in range(steps):
        K = 1 / (1 + squared_distances(Y))
        np.fill_diagonal(K, 0)
        A = (P - K / K.sum()) * K
        gradient = A.sum(1, keepdims=True) * Y - A @ Y            # a quarter of dKL/dy
        velocity = 0.8 * velocity - len(X) * gradient
        Y += velocity
    return Y


# --------------------------------------- prototype cards
def top_tokens(run, logits):
    top = logits.topk(8)
    return [[run.decode([y]), x] for y, x in zip(top.indices.tolist(), top.values.tolist())]


def make_cards(index):
    """The prototypes that fire most often, as the page shows them, and the density of each."""
    run, N = index.run, len(index.positions)
    kinds = kinds_at(run, index.positions)
    P, W = run.model.prototypes.cpu(), run.model.W.cpu()
    logits = P @ (W - W.mean(0)).T                                # (M, V) against the mean logit
    seen = np.bincount(run.train[index.positions], minlength=len(W))
    logits[:, seen < 5] = 0                                       # rare tokens have random rows
    unit = F.normalize(P, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-1)
    gates = index.gates.ravel()
    density = np.bincount(index.ids.ravel()[gates > 0], minlength=len(P)) / N
    frequent = np.argsort(-density, kind="stable")[:MAX_CARDS]
    cards = []
    for i, place in zip(frequent.tolist(), tsne(unit[frequent].numpy()).tolist()):
        p = index.order[index.start[i]:index.start[i + 1]]
        p = p[np.argsort(-gates[p], kind="stable")][:np.count_nonzero(gates[p])]
        tokens = p // index.ids.shape[1]                          # the strongest first
        n = len(p)
        contexts = []
        for j in sorted({0, 1, 2, n // 4, n // 2, 3 * n // 4}):
            if j >= n:
                break
            doc = index.doc_of[tokens[j]]
            contexts.append({"gate": float(gates[p[j]]),
                             "document": run.titles[doc],
                             "text": index.around(int(index.positions[tokens[j]]), 14, 6)})
        sources = Counter(index.unit_of["source"][tokens].tolist()).most_common(5)
        raised = top_tokens(run, logits[i])
        words = [text.strip() or repr(text) for text, _ in raised[:4]]
        cards.append({"id": i,
                      "place": place,
                      "label": " ".join(words),                   # what it makes likely
                      "kinds": np.bincount(kinds[tokens[:100]], minlength=len(KINDS)).tolist(),
                      "gate": gates[p].sum(dtype=float) / max(1, n),
                      "raised": raised,
                      "lowered": top_tokens(run, -logits[i]),
                      "contexts": contexts,
                      "sources": [[run.sources[s], m / n] for s, m in sources],
                      "near": cosine[i].topk(min(5, len(P) - 1)).indices.tolist()})
    return rounded(cards), density


# --------------------------------------- explorer
def explorer(index, prompt):
    """Texts of the explorer: the prompt with a sampled continuation, and held-out prose."""
    run = index.run
    texts = []
    if prompt:
        ids, n = index.encode(prompt)
        idx = torch.tensor([ids], device=run.device)
        idx = run.model.generate(idx, min(24, run.T + 1 - n), 0.8, n_vocab=run.tokenizer.n_vocab)
        texts.append(explain(index, "your prompt, continued by the model", idx[0].tolist(), n))
    start, titles, _ = load_documents(run.folder, "val", len(run.val))
    length = np.diff(start, append=len(run.val)).clip(max=min(64, run.T + 1))
    beginnings = [run.val[a:a + n].tolist() for a, n in zip(start, length)]
    words = [len(WORD.findall(run.decode(ids))) for ids in beginnings]
    doc = np.argmax(words)                                        # prose, more likely than not
    return texts + [explain(index, f"held out: {titles[doc]}", beginnings[doc], 0)]


def explain(index, name, ids, n_prompt):
    """The ledger of each token of a text, and the training text behind it."""
    idx = torch.tensor([ids], device=index.run.device)
    e = index.run.model.explain(idx[:, :-1], idx[:, 1:])
    tokens = [{"text": index.run.decode(ids[:1])}]
    for t in range(len(ids) - 1):
        r = index.target_records(ids[:t + 2], t + 1)
        tokens.append({"text": index.run.decode([ids[t + 1]]),
                       "logit": e.logit[0, t].item(),
                       "residual": e.residual[0, t].item(),
                       "loss": r.loss.item(),
                       "prototypes": e.prototypes[0, t].tolist(),
                       "gates": e.gates[0, t].tolist(),
                       "contributions": e.contributions[0, t].tolist(),
                       "parts": gate_parts(index.run.model, idx[0, :t + 1], e),
                       "influence": influence(index, r)})
    return {"name": name, "prompt": n_prompt, "tokens": tokens}


def gate_parts(model, idx, e):
    """{prototype: the largest parts of its gate}, of the largest slices of the last token of idx"""
    t = len(idx) - 1
    largest = e.contributions[0, t].abs().argsort(descending=True)[:3]
    protos = e.prototypes[0, t, largest]
    parts, _ = gate_ledger(model, idx, protos)
    return rounded({i: list(largest_parts(parts, j)) for j, i in enumerate(protos.tolist())})


def influence(index, r):
    """Records of a target token -> {level: {"proponents": [...], "opponents": [...]}}."""
    x = index.solve(index.right_side(r)[None])
    scores = index.token_scores(x)[0]
    found = {}
    for level in ("token", "document", "source"):
        found[level] = {"proponents": index.entries(level, scores, x[0], 5, 1),
                        "opponents": index.entries(level, scores, x[0], 5, -1)}
        for entry in sum(found[level].values(), []):
            entry["text"] = index.around(entry["position"])
    return rounded(found)


# --------------------------------------- the page
def interventions(run):
    """What suppress.py sweep wrote for this checkpoint, with what detects; the page draws it."""
    found = []
    for path in sorted(run.out_dir.glob("gains/*.sweep.json")):
        with reading(path, "remove it, or write it anew: python suppress.py sweep"):
            sweep = rounded(json.loads(path.read_text("utf-8")))
            if sweep["checkpoint"] == run.hash:
                gains = path.with_suffix("").with_suffix(".json")
                largest = detectors(load_gains(gains, run.model))
                found.append(sweep | {"name": gains.stem, "detectors": largest})
    return found


def detectors(edit):
    """Edit -> [[prototype, its weight], ...] of the 12 largest weights; a gain's is g - 1."""
    weight = edit.w.sum(0) + edit.g - 1
    largest = weight.abs().argsort(descending=True)[:12]
    return rounded([[i, weight[i].item()] for i in largest.tolist() if weight[i]])


def rounded(value):
    """The same with four digits of each float: a smaller page."""
    return json.loads(json.dumps(value, allow_nan=False), parse_float=four_digits)


def four_digits(text):
    return float(f"{float(text):.4g}")


def report_data(cfg):
    """Everything that report.html shows of a run, as plain values; writes the other two files."""
    index = Index(cfg.out_dir, cfg.device)
    run = index.run
    cards, density = make_cards(index)
    labels = {str(card["id"]): card["label"] for card in cards}
    write_json(run.out_dir / "labels.json", {"checkpoint": run.hash, "labels": labels})
    return {"title": f"PRISM: {run.out_dir.name} on {run.meta['name']}",
            "run": {"dataset": run.meta["name"],
                    "steps": run.ckpt["step"],
                    "parameters": sum(p.numel() for p in run.model.parameters()),
                    **run.ckpt["config"]},
            "metrics": draw_loss(cfg.out_dir),
            "health": {"density": density.tolist(),
                       "spectrum": torch.linalg.svdvals(run.model.prototypes).tolist()},
            "kinds": list(KINDS),
            "function_words": FUNCTION_WORDS,
            "texts": explorer(index, cfg.prompt),
            "cards": cards,
            "gains": interventions(run)}


def render(data):
    """The report's data -> the page. Nothing in the data can end its script or be markup."""
    body = json.dumps(data, allow_nan=False, separators=",:")     # ASCII only
    for c in "<>&":
        body = body.replace(c, f"\\u{ord(c):04x}")
    template = Path(__file__).with_name("assets") / "report.html"
    return template.read_text("utf-8").replace("__REPORT_DATA__", body)


def main(argv):
    cfg = parse_config(ReportConfig, argv)
    page = render(report_data(cfg))
    path = Path(cfg.out_dir, "report.html")
    with atomic(path) as f:
        f.write(page.encode())
    print(f"{path}: {len(page) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
