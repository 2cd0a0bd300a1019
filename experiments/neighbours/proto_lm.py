"""Classification by prototypes on a trained model, against plain classifiers on the same trunk.

    python experiments/neighbours/proto_lm.py       # which module is this passage of? 20 minutes
    python experiments/neighbours/proto_lm.py --out_dir=out-books --most=150 \\
        --out=experiments/results/proto_lm-books.json

After Proto-lm (arXiv 2311.01732), for hidden states h_t of a passage and prototypes p_n of classes:

    alpha = softmax_t(v tanh(A h_t)),   u = sum_t alpha_t V h_t           attention pools the states
    s_n = cos(u, p_n),   logits = scale L s          L starts at 1 for the own class, else at -0.5
    loss = ce + lambda1 (1 - max own s) + lambda2 max other s              cohesion and separation

From 70% of the epochs on each prototype moves onto the pooled state of the nearest training
passage of its class, then L and the scale are fitted alone: a prediction reads "because it is like
this passage, for these tokens". Plain classifiers have a linear layer on u in place of prototypes.
The share of token t in the logit of class c against the mean of the classes is, for prototypes,
alpha_t scale sum_n (L_cn - mean_c' L_c'n) (V h_t . p_n) / (|u| |p_n|).
"""
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tools import figure, save_results  # noqa: E402
from torch import nn  # noqa: E402

from common import Run, load_documents, parse_config, run_main  # noqa: E402
from prism import UserError  # noqa: E402

SHARES = 0.1, 0.2, 0.3, 0.5       # of a passage's tokens that are taken out, or kept


@dataclass
class ProtoConfig:
    out_dir: str = "out"          # the trained model; its own prototypes play no part
    length: int = 48              # tokens of a passage
    most: int = 300               # training passages of a class; a third as many to test on
    per_class: int = 4            # prototypes, at most 20
    lambda1: float = 0.1          # weight of cohesion
    lambda2: float = 0.1          # weight of separation
    epochs: int = 20              # over the training passages; the trunk is frozen
    learning_rate: float = 2e-3   # of the classifier
    seeds: int = 3                # of each classifier
    out: str = "experiments/results/proto_lm.json"  # the result; the picture goes beside it


# ------------------------------------------- passages and their classes

def load_passages(run, length, most):
    """-> passages (n, length) and classes (n,) to train on, the same to test on, class names.

    A class is a source of the dataset. Training and test passages are of different documents.
    """
    found = defaultdict(list)
    for split, text in (("train", run.train), ("val", run.val)):
        start, _, sources = load_documents(run.folder, split, len(text))
        for first, end, source in zip(start, [*start[1:], len(text)], sources):
            for i in range(first, end - length, length):
                found[source, split].append(text[i:i + length])
    names = []
    for source in run.sources:
        if len(found[source, "train"]) >= 20 and len(found[source, "val"]) >= 5:
            names.append(str(source))
    if len(names) < 2:
        raise UserError(f"{run.folder}: {len(names)} sources with 20 training and 5 test passages "
                        f"of {length} tokens, expected 2 or more; lower --length")
    rng = np.random.default_rng(1)
    out = []
    for split, limit in (("train", most), ("val", max(5, most // 3))):
        rows, classes = [], []
        for c, source in enumerate(names):
            passages = np.stack(found[source, split])
            chosen = rng.permutation(len(passages))[:limit]
            rows.append(passages[chosen].astype(np.int64))
            classes += [c] * len(chosen)
        out.append(torch.from_numpy(np.concatenate(rows)))
        out.append(torch.tensor(classes))
    return *out, names


# ------------------------------------------- the classifiers

class Classifier(nn.Module):
    """Attention pools the states; then prototypes, or a linear layer where there are none."""

    def __init__(self, d, classes, per_class=0):
        super().__init__()
        self.A = nn.Linear(d, d)
        self.v = nn.Linear(d, 1, bias=False)
        self.V = nn.Linear(d, d)
        nn.init.eye_(self.V.weight)
        nn.init.zeros_(self.V.bias)
        self.owner = torch.arange(classes * per_class) % classes      # class of each prototype
        self.example = torch.full_like(self.owner, -1)                # its training passage
        self.prototypes = nn.Parameter(torch.zeros(len(self.owner), d))
        if per_class:
            own = F.one_hot(self.owner, classes).T
            self.last = nn.Parameter(1.5 * own - 0.5)                 # (C, N) L
            self.scale = nn.Parameter(torch.tensor(10.0))
        else:
            self.linear = nn.Linear(d, classes)

    def pool(self, h):
        """States h (B, T, d) -> u (B, d), alpha (B, T)."""
        score = self.v(torch.tanh(self.A(h)))[..., 0]
        alpha = score.softmax(1)
        u = torch.einsum("bt,btd->bd", alpha, h)
        return self.V(u), alpha

    def similarity(self, u):
        """u (B, d) -> s (B, N)."""
        p = F.normalize(self.prototypes, dim=1)
        return F.normalize(u, dim=1) @ p.T

    def logits(self, u):
        """u (B, d) -> (B, C)."""
        if not len(self.prototypes):
            return self.linear(u)
        return self.scale * self.similarity(u) @ self.last.T

    @torch.no_grad()
    def shares(self, h):
        """h (B, T, d) -> the tokens' shares (B, T) of the predicted class's logit above the mean of
        the classes (without the linear layer's bias), class (B,)."""
        u, alpha = self.pool(h)
        c = self.logits(u).argmax(1)
        if len(self.prototypes):
            weight = self.scale * (self.last[c] - self.last.mean(0))
            toward = weight @ F.normalize(self.prototypes, dim=1)
            toward = toward / u.norm(dim=1, keepdim=True)
        else:
            toward = self.linear.weight[c] - self.linear.weight.mean(0)
        share = torch.einsum("btd,bd->bt", self.V(h), toward)
        return alpha * share, c


@torch.no_grad()
def states(model, idx):
    """idx (n, L) -> the trunk's states (n, L, d)."""
    return torch.cat([model.hidden(part) for part in idx.split(64)])


def loss_of(clf, h, y, cfg):
    u, _ = clf.pool(h)
    ce = F.cross_entropy(clf.logits(u), y)
    if not len(clf.prototypes):
        return ce
    s = clf.similarity(u)
    own = clf.owner == y[:, None]                                     # (B, N)
    nearest_own = s.masked_fill(~own, -1).amax(1).mean()
    nearest_other = s.masked_fill(own, -1).amax(1).mean()
    return ce + cfg.lambda1 * (1 - nearest_own) + cfg.lambda2 * nearest_other


@torch.no_grad()
def project(clf, u, y):
    """Moves each prototype onto the nearest of pooled states u (n, d) of its class, each once."""
    s = clf.similarity(u).T                                           # (N, n)
    s[clf.owner[:, None] != y] = -torch.inf
    for n in range(len(s)):
        best = s[n].argmax()
        clf.prototypes[n] = u[best]
        clf.example[n] = best
        s[:, best] = -torch.inf


def fit(h, y, classes, per_class, seed, cfg):
    """-> a Classifier of the frozen trunk's states h (n, L, d), prototypes on training passages."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    clf = Classifier(h.size(-1), classes, per_class)
    for n, c in enumerate(clf.owner):                                 # starts on a passage
        among = (y == c).nonzero()[:, 0]
        i = torch.randint(len(among), (1,), generator=rng)
        clf.prototypes.data[n] = h[among[i]].mean((0, 1))
    optimizer = torch.optim.AdamW(clf.parameters(), cfg.learning_rate)
    for epoch in range(1, cfg.epochs + 1):
        for rows in torch.randperm(len(y), generator=rng).split(32):
            optimizer.zero_grad()
            loss_of(clf, h[rows], y[rows], cfg).backward()
            optimizer.step()
        if epoch >= 0.7 * cfg.epochs:
            with torch.no_grad():
                u, _ = clf.pool(h)
            project(clf, u, y)
    fit_last(clf, u, y)
    return clf


def fit_last(clf, u, y):
    """Trains the last layer alone on pooled states u (n, d): prototypes stay on their passages."""
    if len(clf.prototypes):
        optimizer = torch.optim.AdamW([clf.last, clf.scale], 0.02, weight_decay=0)
    else:
        optimizer = torch.optim.AdamW(clf.linear.parameters(), 2e-3, weight_decay=0)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(clf.logits(u), y).backward()
        optimizer.step()


@torch.no_grad()
def predict(clf, h):
    """h (n, L, d) -> logits (n, C)."""
    u, _ = clf.pool(h)
    return clf.logits(u)


def accuracy(logits, y):
    return (logits.argmax(1) == y).float().mean().item()


# ------------------------------------------- are explanations faithful?

def faithful(model, clf, idx, order):
    """order (n, L): places of tokens, the most important first -> two figures at each of SHARES.

    comprehensiveness: what the predicted class's probability loses without the first tokens,
    sufficiency: what it loses when only they are left.
    """
    p, best = predict(clf, states(model, idx)).softmax(1).max(1, keepdim=True)
    row = dict(shares=SHARES, comprehensiveness=[], sufficiency=[])
    for share in SHARES:
        n = max(1, round(share * idx.size(1)))
        parts = {"comprehensiveness": order[:, n:], "sufficiency": order[:, :n]}
        for name, kept in parts.items():
            cut = idx.gather(1, kept.sort(1).values)
            left = predict(clf, states(model, cut)).softmax(1)
            row[name].append((p - left.gather(1, best)).mean().item())
    return row


def judge(run, clf, name, idx, h, seed, result):
    """Adds the faithfulness of explanations of passages idx (n, L), whose states are h."""
    share, _ = clf.shares(h)
    _, attention = clf.pool(h)
    rng = torch.Generator().manual_seed(seed)
    random = torch.rand(idx.shape, generator=rng)
    weights = {"share": share, "attention": attention, "random": random}
    for by, weight in weights.items():
        order = weight.argsort(1, descending=True)
        row = faithful(run.model, clf, idx, order)
        result["faithful"][f"{name}, {by}"].append(row)


@torch.no_grad()
def explain(run, clf, tokens, passages, names):
    """A passage (L,) -> its class, its five main tokens, and the passages of three prototypes."""
    h = states(run.model, tokens[None])
    u, _ = clf.pool(h)
    shares, c = clf.shares(h)
    c = c.item()
    places = shares[0].topk(5).indices.sort().values
    weights = clf.scale * (clf.last[c] - clf.last.mean(0)) * clf.similarity(u)[0]
    because = []
    for n in weights.topk(3).indices:
        source = names[clf.owner[n]]
        text = run.decode(passages[clf.example[n]])
        because.append(dict(source=source, share=weights[n].item(), text=text))
    return dict(
        text=run.decode(tokens),
        read_as=names[c],
        tokens=[run.decode([token]) for token in tokens[places]],
        because=because)


# ------------------------------------------- main

def draw(faithful, path):
    with figure(path, 1, 2) as ((left, right),):
        for ax, kind in ((left, "comprehensiveness"), (right, "sufficiency")):
            for name, rows in faithful.items():
                mean = np.mean([row[kind] for row in rows], 0)
                ax.plot(SHARES, mean, "o-", label=name)
            ax.set(xlabel="share of the tokens", ylabel=kind)
            ax.legend()


def main(argv):
    cfg = parse_config(ProtoConfig, argv)
    run = Run(cfg.out_dir, "cpu")
    length = min(cfg.length, run.T)
    idx, y, test_idx, test_y, names = load_passages(run, length, cfg.most)
    h = states(run.model, idx)
    test_h = states(run.model, test_idx)
    result = dict(options=asdict(cfg), classes=names)
    result["texts"] = [len(y), len(test_y)]
    result["accuracy"] = defaultdict(list)
    result["faithful"] = defaultdict(list)
    for name, per_class in (("linear on attention", 0), ("prototypes", cfg.per_class)):
        for seed in range(1, cfg.seeds + 1):
            clf = fit(h, y, len(names), per_class, seed, cfg)
            share = accuracy(predict(clf, test_h), test_y)
            result["accuracy"][f"{name}, frozen"].append(share)
            print(f"{name}, seed {seed}: {share:.1%}", flush=True)
            judge(run, clf, name if per_class else "plain", test_idx, test_h, seed, result)
    result["explanations"] = []
    for tokens in test_idx[::50]:
        result["explanations"].append(explain(run, clf, tokens, idx, names))
    save_results(cfg.out, result)
    draw(result["faithful"], Path(cfg.out).with_suffix(".png"))


if __name__ == "__main__":
    run_main(main)
