"""A run on one page: its loss, prototype cards, ledgers with the training text behind them, gains.

    python report.py                                     out/report.html, and the plot out/loss.png
    python report.py --prompt="Return the number of"     the page explains this text too
"""
import base64
import csv
import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from attribute import Index, Records
from common import atomic, load_documents, parse_config, plain, reading, run_main

WORD = re.compile(r"[^\W\d_]{2,}")
MAX_CARDS = 2048   # the prototypes that fire most often get a card

OKABE_ITO = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9".split()
matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=OKABE_ITO)   # C0 to C5
TWIN = "val_ce of the dense twin"
LOSSES = {"ce": "C5-", "val_ce": "C0o-", "val_ce_prototypes": "C1s--", TWIN: "k^:"}
TERMS = {"rec": "C2o-", "t2p": "C3s--", "p2t": "C4^:", "residual_share": "C0v-."}
MODES = {"shared": "C0o", "fit": "C2^", "chosen": "k*"}


@dataclass
class ReportConfig:
    out_dir: str = "out"      # the run, indexed before; the page is out_dir/report.html
    prompt: str = ""          # a text of your own for the explorer; the model continues it
    device: str = "auto"      # auto, cpu, cuda or mps


# --------------------------------------- plots
def read_metrics(path):
    """A metrics.csv -> rows {column: number or None}; no file, no rows."""
    if not Path(path).exists():
        return []
    with reading(path, "restore it, or move it away"), open(path, newline="") as f:
        rows = csv.DictReader(f)
        rows = [{key: float(x) if x else None for key, x in row.items()} for row in rows]
        return [row for row in rows if row["val_ce"] is not None]


def draw_loss(path, rows, twin):
    """Rows of the run and of its dense twin -> the plot's data address; None without rows."""
    if not rows:
        return None
    rows = rows + [{"tokens": row["tokens"], TWIN: row["val_ce"]} for row in twin]
    fig = Figure(figsize=(11, 4), layout="constrained")
    for ax, styles in zip(fig.subplots(1, 2), (LOSSES, TERMS)):
        for key, style in styles.items():
            known = [row for row in rows if row.get(key) is not None]
            millions = [row["tokens"] / 1e6 for row in known]
            if known:
                ax.plot(millions, [row[key] for row in known], style, markersize=3, label=key)
        ax.set_xlabel("training tokens (millions)")
        ax.set_ylabel("nats per token" if styles is LOSSES else "head terms (unweighted)")
        ax.legend(frameon=False)
    return save_plot(fig, path)


def draw_sweep(path, sweep):
    """Effect against price; hollow: the controls. -> the plot's data address"""
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    for mode, style in MODES.items():
        mine = [row for row in sweep["rows"] if row["mode"] == mode]
        for kind, fill in (("", "full"), ("control_", "none")):
            loss = [row[f"{kind}loss_percent"] for row in mine]
            rate = [row[f"{kind}rate"] for row in mine]
            ax.plot(loss, rate, style, fillstyle=fill, label=f"{kind}{mode}", markersize=7)
    ax.axvline(sweep["price"], color="0.6", linestyle=":", label="price allowed")
    ax.set_xscale("symlog", linthresh=0.5)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("rise of the loss of text without it, %")
    ax.set_ylabel("rate of the behavior, share of before")
    ax.set_title(plain(sweep["behavior"][:60]), parse_math=False)
    ax.legend()
    return save_plot(fig, path)


def save_plot(fig, path):
    """Writes a PNG -> its data address."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    with atomic(path) as f:
        f.write(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ------------------------------------------- prototype cards

class Cards:
    """What each prototype stands for, read from an index."""

    def __init__(self, index):
        self.index, self.run = index, index.run
        P, W = self.run.model.prototypes.cpu(), self.run.model.W.cpu()
        logits = P @ (W - W.mean(0)).T                            # (M, V) against the mean logit
        count = np.bincount(self.run.train[index.positions], minlength=len(W))
        logits[:, count < 5] = 0                                  # rare tokens have random rows
        self.raised = logits.topk(8)
        self.lowered = logits.topk(8, largest=False)
        unit = F.normalize(P, dim=1)
        cosine = (unit @ unit.T).fill_diagonal_(-1)
        self.near = cosine.topk(min(5, len(P) - 1))
        self.spectrum = torch.linalg.svdvals(P)
        N = len(index.positions)
        fires = np.bincount(index.ids[index.gates > 0], minlength=len(P))
        self.density = fires / N
        self.at_large = self.words(np.arange(0, N, 1 + N // 20000))

    def words(self, tokens, before=6):
        """How often each word occurs in these indexed tokens, each with a few before it."""
        count = Counter()
        for p in self.index.positions[tokens]:
            text = self.run.decode(self.run.train[max(0, p - before):p + 1])
            count.update(word.lower() for word in WORD.findall(text))
        return count

    def label(self, words, K=50):
        """The three words with the largest z of the log-odds against contexts at large, above 1.96.

        y of n words here, b of N at large, a prior of K (Monroe et al. 2008, eqs. 15 to 22).
        """
        z = Counter()
        n, N = words.total(), self.at_large.total() + len(words) + 1
        for word, y in words.items():
            b = self.at_large[word]
            a = K * (b + 1) / N                                   # the prior of this word
            delta = math.log((y + a) / (n + K - y - a)) - math.log((b + a) / (N + K - b - a))
            z[word] = delta / math.sqrt(1 / (y + a) + 1 / (b + a))
        return " ".join(word for word, value in z.most_common(3) if value > 1.96)

    def card(self, i):
        """Card i, as the page shows it."""
        index = self.index
        p = index.order[index.start[i]:index.start[i + 1]]
        gates = index.gates.ravel()[p].astype(np.float32)
        strongest = np.argsort(-gates, kind="stable")[:np.count_nonzero(gates)]
        gates = gates[strongest]
        tokens = p[strongest] // index.ids.shape[1]
        n = len(tokens)
        doc_of = index.unit_of["document"][tokens]
        contexts = []
        places = {0, 1, 2, 3, n // 4, n // 2, 3 * n // 4}         # the strongest, and quartiles
        for j in sorted(places & set(range(n))):
            contexts.append({"gate": float(gates[j]),
                             "quantile": 1 - j / n,
                             "document": self.run.titles[doc_of[j]],
                             "source": self.run.source_of[doc_of[j]],
                             "text": index.around(int(index.positions[tokens[j]]))})
        common = Counter(index.unit_of["source"][tokens].tolist()).most_common(5)
        return {"id": i,
                "label": self.label(self.words(tokens[:100])),
                "density": self.density[i],
                "gate": float(gates.sum()) / max(1, n),
                "raised": self.tokens(self.raised, i),
                "lowered": self.tokens(self.lowered, i),
                "contexts": contexts,
                "sources": [[self.run.sources[s], count / n] for s, count in common],
                "near": [*pairs(self.near, i)]}

    def tokens(self, top, i):
        return [[self.run.decode([token]), logit] for token, logit in pairs(top, i)]


def pairs(top, i):
    """Row i of a topk -> (index, value) each."""
    return zip(top.indices[i].tolist(), top.values[i].tolist())


# ------------------------------------------- the explorer

def explorer(index, prompt):
    """Texts of the explorer: the user's prompt, and the first words of a held-out document."""
    run, texts = index.run, []
    if prompt:
        ids, n = index.encode(prompt)
        room = min(12, run.T + 1 - n)
        idx = torch.tensor([ids], device=run.device)
        out = run.model.generate(idx, room, temperature=0, n_vocab=run.tokenizer.n_vocab)
        texts.append(explain(index, "your prompt, continued", out[0].tolist()))
    start, titles, _ = load_documents(run.folder, "val", len(run.val))
    length = np.diff(start, append=len(run.val)).clip(max=min(64, run.T + 1))
    doc = length.argmax()
    ids = run.val[start[doc]:start[doc] + length[doc]]
    return texts + [explain(index, f"held out: {titles[doc]}", ids.tolist())]


def explain(index, name, ids):
    """The ledger of each token of a text, and the training text behind it."""
    idx = torch.tensor([ids], device=index.run.device)
    e = index.run.model.explain(idx[:, :-1], idx[:, 1:])
    r = index.target_records(ids, 1)
    tokens = [{"text": index.run.decode(ids[:1])}]
    for t, behind in enumerate(influence(index, r)):
        slices = zip(*(part[0, t].tolist() for part in (e.prototypes, e.gates, e.contributions)))
        tokens.append({"text": index.run.decode([ids[t + 1]]),
                       "logit": e.logit[0, t].item(),
                       "residual": e.residual[0, t].item(),
                       "loss": r.loss[t].item(),
                       "slices": [s for s in slices if s[1] > 0],
                       "influence": behind})
    return {"name": name, "tokens": tokens}


def influence(index, r):
    """Records of target tokens -> for each {level: {"proponents": [...], "opponents": [...]}}."""
    for row in zip(*r):
        b = index.right_side(Records(*(value[None] for value in row)))
        x = index.solve(b[None])
        scores = index.token_scores(x)[0]
        found = {}
        for level in ("token", "document", "source"):
            found[level] = {"proponents": index.entries(level, scores, x[0], 5, 1),
                            "opponents": index.entries(level, scores, x[0], 5, -1)}
            for entry in sum(found[level].values(), []):
                entry["text"] = index.around(entry["position"])
        yield found


# ------------------------------------------- the page

def interventions(run):
    """What suppress.py sweep wrote for this checkpoint, as the page shows it."""
    found = []
    for path in sorted((run.out_dir / "gains").glob("*.sweep.json")):
        with reading(path, "remove it, or write it anew: python suppress.py sweep"):
            sweep = json.loads(path.read_text("utf-8"))
            if sweep["checkpoint"] == run.hash:
                name = path.name.removesuffix(".sweep.json")
                effect = "rate {rate:.1%}, loss {loss_percent:+.2f}%".format(**sweep["rows"][-1])
                found.append({"name": name,
                              "behavior": f"{sweep['behavior']}: {effect}",
                              "before": [f"{n} matches: {text}" for n, text in sweep["before"]],
                              "after": [f"{n} matches: {text}" for n, text in sweep["after"]],
                              "plot": draw_sweep(path.with_name(f"{name}.png"), sweep)})
    return found


def report_data(cfg):
    """Everything that report.html shows of a run, as plain values."""
    out_dir = Path(cfg.out_dir)
    rows = read_metrics(out_dir / "metrics.csv")
    twin = read_metrics(f"{out_dir}-dense/metrics.csv")
    loss = draw_loss(out_dir / "loss.png", rows, twin)
    index = Index(out_dir, cfg.device)
    run, c = index.run, index.run.model.config
    facts = {"dataset": run.meta["name"],
             "shape": f"{c.n_layer} layers, width {c.n_embd}, context {c.block_size}, "
                      f"{c.n_proto} prototypes, at most {c.top_k} per token",
             "parameters": f"{sum(p.numel() for p in run.model.parameters()):,}",
             "steps": f"{run.ckpt['step']:,}",
             "checkpoint": run.hash[:12],
             "damping mu": f"{index.meta['mu']:g}"}
    for name, source in (("validation loss", rows), ("validation loss, dense twin", twin)):
        if source:
            facts[name] = f"{min(row['val_ce'] for row in source):.4f} nats per token"
    cards = Cards(index)
    frequent = np.argsort(-cards.density)[:MAX_CARDS].tolist()
    return {"title": f"PRISM: {out_dir.name} on {run.meta['name']}",
            "run": [*facts.items()],
            "loss_png": loss,
            "health": {"density": cards.density.tolist(), "spectrum": cards.spectrum.tolist()},
            "texts": explorer(index, cfg.prompt),
            "cards": [cards.card(i) for i in frequent],
            "gains": interventions(run)}


def render(data):
    """The report's data -> the page. Nothing in the data can end its script or be markup."""
    body = json.dumps(data, allow_nan=False)                      # ASCII only
    for c in "<>&":
        body = body.replace(c, f"\\u{ord(c):04x}")
    template = Path(__file__).resolve().parent / "assets" / "report.html"
    return template.read_text("utf-8").replace("__REPORT_DATA__", body)


def main(argv):
    cfg = parse_config(ReportConfig, argv)
    page = render(report_data(cfg))
    path = Path(cfg.out_dir) / "report.html"
    with atomic(path, "w", encoding="utf-8") as f:
        f.write(page)
    print(f"{path}: {len(page) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
