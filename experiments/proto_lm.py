"""Classification by prototypes on a trained model, with explanations built in, after Proto-lm (arXiv 2311.01732), against plain classifiers on the same trunk.

    python experiments/proto_lm.py                                     which book or family of modules is this passage of? about 25 minutes on 2 cores
    python experiments/proto_lm.py --dataset=books --out_dir=out-books --out=experiments/results/proto_lm-books.json
    python experiments/proto_lm.py --train=mine.jsonl --test=held-out.jsonl          your own: {"text": "...", "label": "..."} a line
    python experiments/proto_lm.py --convert=sst2 --files=SST-2/train.tsv --to=mine.jsonl     also sst5, imdb, qnli, mnli, rte, wnli, from their released files
    python experiments/proto_lm.py --explain="Return the charset of the message"   a page, with the classifier that the first form kept

h_t are the trunk's states of a text's tokens. Attention pools them, alpha = softmax(v tanh(A h_t)), u = sum_t alpha_t V h_t; s_n = cos(u, p_n) for --prototypes p_n, as many for each
class; logits = scale * W s with W started at +1 for a prototype's own class and -0.5 for the others. Loss: lambda0 ce + lambda1 (1 - mean s of the K own-class prototypes) +
lambda2 (mean s of the K others), K each the nearest or the farthest. After --project of the epochs, and at the end, each prototype moves onto the pooled state of the nearest training text of its class, so
that a prediction reads: because it is like these, and for these words; the last layer is then trained on alone, as is that of the others. Our choices where the paper's text leaves them
open: V, cosines, a learned scale, projection. Plain: the same with u straight into a linear layer, pooled by attention or by the mean.

A token's weight in the predicted class c is its share of the logit above the classes' mean, alpha_t scale sum_n (W_cn - mean_c' W_c'n) (V h_t . p_n) / (|u| |p_n|); of the plain classifier, alpha_t
(W_c - mean_c' W_c') . V h_t. Comprehensiveness is what the probability of c loses when the highest tokens are taken out of the text, sufficiency what it loses
when only they are left (the lower the better), each classifier judged on itself: by its shares, by its attention, by random tokens. Simulatability: a linear bag of tokens that sees only the
highest fifth of the tokens learns what the classifier answers; told is how often it is right on new texts, against one that sees as many random tokens.
"""
import copy
import csv
import html
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import machine, save  # noqa: E402
from torch import nn  # noqa: E402

from prism import UserError, atomic, dataset_folder, fingerprint, load_checkpoint, load_dataset, load_tensors, load_tokenizer, parse_config, run_main  # noqa: E402


@dataclass
class ProtoConfig:
    out_dir: str = "out"          # the trained model; dense or with prototypes of its own, which play no part
    dataset: str = ""             # passages of a prepared dataset, its sources as classes; empty: the model's own dataset
    train: str = ""               # or a .jsonl file of {"text", "label"}
    test: str = ""                # and one to test on
    length: int = 48              # tokens of a passage, and at most of a text
    most: int = 300               # training texts of a class, at most; a third as many to test on
    prototypes: int = 0           # in all; 0: 4 a class
    near: int = 1                 # K of cohesion and separation
    own: str = "nearest"          # K nearest or farthest of the own class's prototypes are pulled
    other: str = "nearest"        # and of the others are pushed
    lambda0: float = 1.0          # weight of cross-entropy
    lambda1: float = 0.1          # of cohesion
    lambda2: float = 0.1          # of separation
    epochs: int = 20              # with a frozen trunk
    tune_epochs: int = 3          # of the unfrozen runs, after as many epochs frozen as above; 0: frozen only
    project: float = 0.7          # share of the epochs after which prototypes are first moved onto examples
    learning_rate: float = 2e-3   # of the classifier; the trunk learns at a tenth
    seeds: int = 3                # of every classifier
    sweep: bool = True            # over N, K and the lambdas, one seed, frozen, judged on held-out training texts
    convert: str = ""             # only convert files of sst2, sst5, imdb, qnli, mnli, rte or wnli
    files: str = ""               # its file (imdb: folder with pos/ and neg/)
    to: str = ""                  # .jsonl that is written
    explain: str = ""             # only write a page that explains the class of this text
    keep: str = "out-proto-lm"    # folder of the kept classifier and of pages
    out: str = "experiments/results/proto_lm.json"  # the result; the picture goes beside it


# ----------------------------------------------------------------------------- texts with labels

COLUMNS = {"sst2": ("sentence", "", "label"), "qnli": ("question", "sentence", "label"), "rte": ("sentence1", "sentence2", "label"),
           "wnli": ("sentence1", "sentence2", "label"), "mnli": ("sentence1", "sentence2", "gold_label")}


def converted(task, path):
    """-> a list of {"text", "label"} of the released files of a task."""
    try:
        return list(released(task, Path(path)))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read ({e}); expected the {task} file as it was released, in UTF-8") from None


def released(task, path):
    if task in COLUMNS:
        first, second, label = COLUMNS[task]
        with open(path, encoding="utf-8", newline="") as f:
            rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            if missing := {first, second or first, label} - set(rows.fieldnames or ()):
                raise UserError(f"{path}: no column {sorted(missing)[0]!r}; expected the {task} file of GLUE, with tabs and a header that names {first}, {second + ', ' if second else ''}{label}")
            for n, row in enumerate(rows, 2):
                if None in (row[first], row[second or first], row[label]):
                    raise UserError(f"{path}:{n}: too few columns")
                if row[label] != "-":                                                         # mnli: no two annotators agreed
                    yield dict(text=f"{row[first]}\n{row[second]}" if second else row[first], label=row[label])
    elif task == "sst5":
        for n, line in enumerate(path.read_text("utf-8").splitlines(), 1):                    # (3 (2 It) (4 ...)): the first number is the sentence's
            if not (m := re.match(r"\((\d) ", line)):
                raise UserError(f"{path}:{n}: expected a tree such as (3 (2 It) (4 works)), found {line[:40]!r}")
            words = re.findall(r"\(\d ([^()]+)\)", line)
            yield dict(text=" ".join(words), label=m[1])
    elif task == "imdb":
        files = [(p, label) for label in ("pos", "neg") for p in sorted((path / label).glob("*.txt"))]
        if not files:
            raise UserError(f"{path}: expected the folders pos/ and neg/ with .txt files in them")
        for p, label in files:
            yield dict(text=p.read_text("utf-8").replace("<br />", "\n"), label=label)
    else:
        raise UserError(f"convert={task}, expected {', '.join(COLUMNS)}, sst5 or imdb")


def labelled(path):
    """The rows of a .jsonl file of {"text", "label"}."""
    rows = []
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e}); expected a .jsonl file in UTF-8") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
            f"{text}{label}".encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            text = label = None
        if not isinstance(text, str) or not text.strip() or not isinstance(label, (str, int)):
            raise UserError(f'{path}:{n}: found {line[:60]!r}; expected {{"text": "...", "label": "..."}} with a text that is not empty')
        rows.append(dict(text=text, label=str(label)))
    if not rows:
        raise UserError(f"{path} holds no text")
    return rows


def passages(folder, cfg, rng):
    """A prepared dataset's passages of cfg.length tokens, classes its sources -> tokens, labels of training and held-out documents, names. Documents are in one of the two."""
    train, val, _ = load_dataset(folder)
    found = {}
    try:
        rows = [(x["split"], str(x["source"]), int(x["start"]), int(x["length"])) for x in json.loads((folder / "docs.json").read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/docs.json is missing or damaged ({type(e).__name__} {e}); prepare the dataset again") from None
    for split, source, start, length in rows:
        text = train if split == "train" else val
        for at in range(start, start + length - cfg.length, cfg.length):
            found.setdefault((split, source), []).append(text[at:at + cfg.length].astype(np.int64))
    names = sorted(s for split, s in found if split == "train" and len(found["train", s]) >= 20 and len(found.get(("val", s), ())) >= 5)
    if len(names) < 2:
        raise UserError(f"{folder}: {len(names)} sources have 20 passages of {cfg.length} tokens to train and 5 to test on, expected at least two; lower --length, or give --train and --test")
    out = []
    for split, most in (("train", cfg.most), ("val", max(5, cfg.most // 3))):
        chosen = [(p, n) for n, s in enumerate(names) for p in (found[split, s][j] for j in rng.permutation(len(found[split, s]))[:most])]
        out += [[p for p, _ in chosen], torch.tensor([n for _, n in chosen])]
    return (*out, names)


def padded(sequences, length):
    """Token sequences -> idx (n, L), mask (n, L) of what is text; each keeps its last `length` tokens."""
    L = min(length, max(map(len, sequences)))
    idx, mask = torch.zeros(len(sequences), L, dtype=torch.long), torch.zeros(len(sequences), L, dtype=torch.bool)
    for row, there, s in zip(idx, mask, sequences):
        s = s[-L:]
        row[:len(s)], there[:len(s)] = torch.as_tensor(np.asarray(s, np.int64)), True
    return idx, mask


# ----------------------------------------------------------------------------- the classifiers

class Classifier(nn.Module):
    """Attention (or mean) pooling of h (B, T, d), then prototypes or, with none, a linear layer -> logits (B, C)."""

    def __init__(self, d, classes, prototypes=0, attend=True):
        super().__init__()
        self.A, self.v, self.V, self.attend = nn.Linear(d, d), nn.Linear(d, 1, bias=False), nn.Linear(d, d), attend
        with torch.no_grad():
            self.V.weight.copy_(torch.eye(d))
            self.V.bias.zero_()
        self.prototypes = nn.Parameter(torch.zeros(prototypes, d))
        self.register_buffer("owner", torch.arange(prototypes) % classes)
        self.register_buffer("example", torch.full((prototypes,), -1))
        if prototypes:
            own = F.one_hot(self.owner, classes).T.float()
            self.last, self.scale = nn.Parameter(1.5 * own - 0.5), nn.Parameter(torch.tensor(10.0))
        else:
            self.linear = nn.Linear(d, classes)

    def pool(self, h, mask):
        """-> u (B, d), alpha (B, T)"""
        score = self.v(torch.tanh(self.A(h)))[..., 0] if self.attend else h.new_zeros(mask.shape)
        alpha = score.masked_fill(~mask, -torch.inf).softmax(1)
        return self.V(torch.einsum("bt,btd->bd", alpha, h)), alpha

    def forward(self, h, mask):
        """-> logits (B, C), similarities (B, N) or None, alpha (B, T)"""
        u, alpha = self.pool(h, mask)
        return *self.answer(u), alpha

    def answer(self, u):
        """Pooled u (B, d) -> logits (B, C), similarities (B, N) or None"""
        if not len(self.prototypes):
            return self.linear(u), None
        s = F.normalize(u, dim=1) @ F.normalize(self.prototypes, dim=1).T
        return self.scale * s @ self.last.T, s

    def weights(self, h, mask):
        """-> of each token its share of the predicted class's logit above the classes' mean (B, T), without the linear layer's bias; the class (B,)."""
        u, alpha = self.pool(h, mask)
        c = self.answer(u)[0].argmax(1)
        if len(self.prototypes):
            toward = self.scale * (self.last[c] - self.last.mean(0)) @ F.normalize(self.prototypes, dim=1) / u.norm(dim=1, keepdim=True)
        else:
            toward = self.linear.weight[c] - self.linear.weight.mean(0)                       # (B, d)
        return alpha * torch.einsum("btd,bd->bt", self.V(h), toward), c


def loss_of(clf, h, mask, y, cfg):
    logits, s, _ = clf(h, mask)
    ce = F.cross_entropy(logits, y)
    if s is None:
        return ce
    own = clf.owner[None] == y[:, None]
    return cfg.lambda0 * ce + cfg.lambda1 * (1 - some(s, own, cfg.near, cfg.own)) + cfg.lambda2 * some(s, ~own, cfg.near, cfg.other)


def some(s, which, k, side):
    """Mean over rows of the k largest (nearest) or smallest (farthest) similarities among `which` (B, N)."""
    sign = 1.0 if side == "nearest" else -1.0
    return sign * (sign * s).masked_fill(~which, -torch.inf).topk(k, dim=1).values.mean()


class Texts:
    """Token sequences, their labels, and the trunk's states of them, made once for a frozen trunk."""

    def __init__(self, model, sequences, y, length):
        self.sequences, self.y, (self.idx, self.mask) = [np.asarray(s)[-length:] for s in sequences], y, padded(sequences, length)
        self.h = states(model, self.idx)

    def some(self, at):
        """The texts of the numbers `at` alone."""
        part = copy.copy(self)
        part.sequences, part.y, part.idx, part.mask, part.h = [self.sequences[j] for j in at.tolist()], self.y[at], self.idx[at], self.mask[at], self.h[at]
        return part


@torch.no_grad()
def states(model, idx):
    return torch.cat([model.hidden(part) for part in idx.split(64)])


@torch.no_grad()
def batched(f, h, mask):
    """f(h, mask), a tuple of tensors (B, ...), over all texts in batches -> the tensors of all."""
    return tuple(torch.cat(u) for u in zip(*(f(a, m) for a, m in zip(h.split(256), mask.split(256)))))


def project(clf, texts, u):
    """Each prototype moves onto the pooled state, of u (texts, d), of the nearest training text of its class that no other has taken."""
    with torch.no_grad():
        s = F.normalize(clf.prototypes, dim=1) @ F.normalize(u, dim=1).T                      # (N, texts)
        s[clf.owner[:, None] != texts.y[None]] = -torch.inf
        for n in range(len(s)):
            best = int(s[n].argmax())
            if s[n, best] > -torch.inf:                                                       # a class with fewer texts than prototypes leaves some where they are
                clf.prototypes[n], clf.example[n] = u[best], best
                s[:, best] = -torch.inf


def fitted(model, texts, classes, cfg, seed, prototypes=0, attend=True):
    """A classifier on the frozen trunk's states -> clf"""
    torch.manual_seed(seed)
    clf, rng = Classifier(texts.h.size(-1), classes, prototypes, attend), torch.Generator().manual_seed(seed)
    if prototypes:
        with torch.no_grad():                                                                 # each starts on a training text of its class
            for n, c in enumerate(clf.owner.tolist()):
                among = (texts.y == c).nonzero()[:, 0]
                j = among[torch.randint(len(among), (), generator=rng)]
                clf.prototypes[n] = clf.V(texts.h[j][texts.mask[j]].mean(0))
    run(clf, texts, cfg, rng, cfg.epochs, lambda at: texts.h[at], [dict(params=clf.parameters(), lr=cfg.learning_rate)], lambda: texts.h)
    return clf


def tuned(model, clf, texts, cfg, seed):
    """The trunk and the classifier trained on together -> copies of both."""
    torch.manual_seed(seed)
    model, clf = copy.deepcopy(model), copy.deepcopy(clf)
    model.requires_grad_(True)
    trunk = [p for n, p in model.named_parameters() if "prototypes" not in n]
    run(clf, texts, cfg, torch.Generator().manual_seed(seed), cfg.tune_epochs, lambda at: model.hidden(texts.idx[at]),
        [dict(params=clf.parameters(), lr=cfg.learning_rate), dict(params=trunk, lr=cfg.learning_rate / 10)], lambda: states(model, texts.idx))
    return model, clf


def run(clf, texts, cfg, rng, epochs, hidden, groups, every):
    """Epochs of AdamW in batches of 32; from cfg.project of them on prototypes are moved onto examples after each, and at the end."""
    opt = torch.optim.AdamW(groups, weight_decay=0.01)
    for epoch in range(epochs):
        for at in torch.randperm(len(texts.y), generator=rng).split(32):
            opt.zero_grad()
            loss_of(clf, hidden(at), texts.mask[at], texts.y[at], cfg).backward()
            opt.step()
        if epoch + 1 == epochs or len(clf.prototypes) and epoch + 1 >= cfg.project * epochs:
            u, _ = batched(clf.pool, every(), texts.mask)
            project(clf, texts, u)
    settle(clf, texts, u)


def settle(clf, texts, u, steps=200):
    """The last layer alone, on the pooled u (texts, d), all texts at once: prototypes stay on their examples."""
    opt = torch.optim.AdamW([clf.last, clf.scale] if len(clf.prototypes) else clf.linear.parameters(), 0.02 if len(clf.prototypes) else 2e-3, weight_decay=0.0)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(clf.answer(u)[0], texts.y).backward()
        opt.step()


def answers(clf, texts, h=None):
    """-> logits (texts, C); h: the states, where they are not those of the frozen trunk."""
    u, _ = batched(clf.pool, texts.h if h is None else h, texts.mask)
    with torch.no_grad():
        return clf.answer(u)[0]


def accuracy(logits, y):
    return (logits.argmax(1) == y).float().mean().item()


# ----------------------------------------------------------------------------- are explanations faithful?

@torch.no_grad()
def faithful(model, clf, texts, order, shares=(0.1, 0.2, 0.3, 0.5)):
    """order: of each text its token places, the most important first -> comprehensiveness and sufficiency at each share: mean losses of the predicted class's probability."""
    p = answers(clf, texts).softmax(-1)
    c, out = p.argmax(1), dict(shares=list(shares), comprehensiveness=[], sufficiency=[])
    for share in shares:
        for name in ("comprehensiveness", "sufficiency"):
            cut = []
            for s, o in zip(texts.sequences, order):
                n = min(len(s) - 1, max(1, round(share * len(s))))
                cut.append(s[np.sort(o[n:] if name == "comprehensiveness" else o[:n])] if len(s) > 1 else s)
            idx, mask = padded(cut, texts.idx.size(1))
            left = clf(states(model, idx), mask)[0].softmax(-1)
            out[name].append((p - left).gather(1, c[:, None]).mean().item())
    return out


def orders(clf, texts, by="share"):
    """Each text's token places, by share of the logit or by attention, largest first; the answers (n,)."""
    w, c = batched(clf.weights, texts.h, texts.mask)
    if by == "attention":
        _, w = batched(clf.pool, texts.h, texts.mask)
    return [row[:len(s)].argsort(descending=True).numpy() for row, s in zip(w, texts.sequences)], c


def simulated(train, test, V, seed, steps=150):
    """(bags, answers) to learn from and to judge by -> the share of answers that a linear layer over bags of tokens predicts; bags: lists of token lists."""
    def counts(bags):
        x = torch.zeros(len(bags), V)
        for row, bag in zip(x, bags):
            row.index_add_(0, torch.as_tensor(np.asarray(bag, np.int64)), torch.ones(len(bag)))
        return x
    torch.manual_seed(seed)
    (x, y), (a, b) = (counts(train[0]), train[1]), (counts(test[0]), test[1])
    linear = nn.Linear(V, int(max(y.max(), b.max())) + 1)
    opt = torch.optim.AdamW(linear.parameters(), 0.05, weight_decay=0.05)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(linear(x), y).backward()
        opt.step()
    return accuracy(linear(a), b)


def simulatability(clf, train, test, V, seed, share=0.2):
    """-> agreement with the classifier of simulators that see its highest tokens, or as many random ones."""
    rng = np.random.default_rng(seed)

    def seen(texts, order):
        return [q[o[:max(1, round(share * len(q)))]] for q, o in zip(texts.sequences, order)]
    sides = [(texts, *orders(clf, texts)) for texts in (train, test)]
    return {name: simulated(*((seen(texts, order if name == "words" else [rng.permutation(len(q)) for q in texts.sequences]), c) for texts, order, c in sides), V, seed)
            for name in ("words", "random words")}


# ----------------------------------------------------------------------------- the page

def page(text_tokens, weights, c, tops, names, tokenizer):
    """HTML: the text with its tokens' weights, and the examples that it is like. All text is escaped."""
    def spans(tokens, w):
        size, out, left = max(abs(w).max(), 1e-9), [], b""
        for t, x in zip(tokens, w):
            left += tokenizer.decode_single_token_bytes(int(t))
            try:
                word, left = html.escape(left.decode("utf-8")).replace("\n", "<br>"), b""         # a character may span tokens
            except UnicodeDecodeError as e:
                word, left = ("", left) if e.reason == "unexpected end of data" else (html.escape(left.decode("utf-8", "replace")), b"")
            level = min(3, int(4 * abs(x) / size))
            out.append(f'<span class="w{level} {"for" if x >= 0 else "against"}" title="{x:+.3f}">{word}</span>')
        return "".join(out)
    parts = [f"<h1>Read as {html.escape(str(names[c]))}</h1><p>{spans(text_tokens, weights)}</p>",
             "<p>Underlined: tokens that speak for it, the thicker the more; dotted: against. Because it is like these training texts:</p>"]
    for s, share, owner, tokens, w in tops:
        parts.append(f"<h2>{html.escape(str(names[owner]))}: cosine {s:.2f}, {share:+.2f} to the logit</h2><p>{spans(tokens, w)}</p>")
    style = "body{font:16px/1.7 sans-serif;max-width:46em;margin:2em auto;padding:0 1em;overflow-wrap:anywhere;color:#222;background:#fff}h1{font-size:1.3em}h2{font-size:1em}" + "".join(
        f".w{n}.for{{border-bottom:{n}px solid #0072B2}}.w{n}.against{{border-bottom:{n}px dotted #D55E00}}" for n in (1, 2, 3))
    return f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Because it is like these</title><style>{style}</style>{''.join(parts)}</html>\n"


def explain(cfg):
    path = Path(cfg.keep) / "classifier.pt"
    if not path.exists():
        raise UserError(f"{path} is not there; run python experiments/proto_lm.py first")
    kept = load_tensors(path)
    if not isinstance(kept, dict) or not {"classifier", "names", "out_dir", "model", "length", "examples"} <= kept.keys():
        raise UserError(f"{path} is no classifier of proto_lm.py; remove it and run python experiments/proto_lm.py")
    model, _ = load_checkpoint(kept["out_dir"], "cpu")
    if fingerprint(model.state_dict()) != kept["model"]:
        raise UserError(f"{kept['out_dir']} holds other weights than {path} was made for; run python experiments/proto_lm.py again")
    tokenizer = load_tokenizer(kept["out_dir"])
    clf = Classifier(model.config.n_embd, len(kept["names"]), len(kept["classifier"]["prototypes"]))
    clf.load_state_dict(kept["classifier"])
    tokens = tokenizer.encode_ordinary(cfg.explain.strip())[-kept["length"]:]
    if not tokens:
        raise UserError("the text is empty")

    @torch.no_grad()
    def weighed(tokens):
        idx, mask = padded([tokens], kept["length"])
        h = states(model, idx)
        return clf.weights(h, mask)[0][0].numpy(), clf(h, mask)
    w, (logits, s, _) = weighed(tokens)
    c = int(logits[0].argmax())
    share = clf.scale * (clf.last[c] - clf.last.mean(0)) * s[0]                               # of the logit above the classes' mean
    tops, spoken = [], (clf.example >= 0) & (share > 0) & (s[0] > 0)
    for n in [n for n in share.argsort(descending=True).tolist() if spoken[n]][:3]:
        example = kept["examples"][n].tolist()
        tops.append((s[0, n].item(), share[n].item(), int(clf.owner[n]), example, weighed(example)[0]))
    out = Path(cfg.keep) / "page.html"
    with atomic(out, "w", encoding="utf-8") as f:
        f.write(page(tokens, w, c, tops, kept["names"], tokenizer))
    like = f", because it is like a text of {kept['names'][tops[0][2]]!r}: {tokenizer.decode(tops[0][3])[:80]!r}" if tops else "; no example speaks for it"
    print(f"read as {kept['names'][c]!r} (probability {logits.softmax(-1)[0, c]:.2f}){like}; {out}")


# ----------------------------------------------------------------------------- the comparison

def main(argv):
    cfg = parse_config(ProtoConfig, argv)
    if cfg.convert:
        if not cfg.files or not cfg.to:
            raise UserError("give --files=WHAT WAS RELEASED and --to=FILE.jsonl")
        rows = converted(cfg.convert, cfg.files)
        with atomic(cfg.to, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
        return print(f"{cfg.to}: {len(rows)} texts, {len({r['label'] for r in rows})} classes")
    if any(w.startswith("--explain") for w in argv):
        return explain(cfg)
    if not all(map(np.isfinite, (cfg.lambda0, cfg.lambda1, cfg.lambda2, cfg.learning_rate, cfg.project))) or cfg.learning_rate <= 0 or not 0 <= cfg.project <= 1:
        raise UserError("the lambdas must be finite, learning_rate above 0, project 0 to 1")
    if {cfg.own, cfg.other} - {"nearest", "farthest"} or min(cfg.length - 1, cfg.most, cfg.near, cfg.epochs, cfg.seeds) < 1 or min(cfg.prototypes, cfg.tune_epochs, cfg.lambda0, cfg.lambda1, cfg.lambda2) < 0:
        raise UserError("own and other must be nearest or farthest; length at least 2, most, near, epochs and seeds at least 1, prototypes, tune_epochs and the lambdas at least 0")
    model, ckpt = load_checkpoint(cfg.out_dir, "cpu")
    tokenizer, rng = load_tokenizer(cfg.out_dir), np.random.default_rng(1)
    length = min(cfg.length, model.config.block_size)
    if cfg.train or cfg.test:
        if not (cfg.train and cfg.test):
            raise UserError("give both --train and --test")
        sides = [labelled(cfg.train), labelled(cfg.test)]
        names = sorted({r["label"] for r in sides[0]})
        if len(names) < 2:
            raise UserError(f"{cfg.train}: one class alone, {names[0] if names else 'no text'}; expected at least two")
        if extra := {r["label"] for r in sides[1]} - set(names):
            raise UserError(f"{cfg.test}: the class {sorted(extra)[0]!r} is not in {cfg.train}, which has {', '.join(names)}")
        data = []
        for rows in sides:
            data += [[tokenizer.encode_ordinary(r["text"]) for r in rows], torch.tensor([names.index(r["label"]) for r in rows])]
        a, ya, b, yb = data
    else:
        folder = dataset_folder(cfg.dataset or ckpt["train_config"]["dataset"])
        if (folder / "tokenizer.tiktoken").read_bytes() != (Path(cfg.out_dir) / "tokenizer.tiktoken").read_bytes():
            raise UserError(f"{folder} has another tokenizer than {cfg.out_dir}; prepare it with --tokenizer={ckpt['train_config']['dataset']}")
        a, ya, b, yb, names = passages(folder, cfg, rng)
    train, test, C = Texts(model, a, ya, length), Texts(model, b, yb, length), len(names)
    N = cfg.prototypes or 4 * C
    if N % C or cfg.near > N // C:
        raise UserError(f"prototypes is {N} and near {cfg.near} with {C} classes; expected a multiple of {C}, and near at most the number of a class")
    result = dict(options=asdict(cfg), machine=machine(), classes=names, texts=[len(ya), len(yb)], chance=float(torch.bincount(yb).max() / len(yb)), accuracy={}, faithful={}, simulatability={})
    print(f"{len(ya):,} texts of {C} classes to train on, {len(yb):,} to test on; the commonest class is {result['chance']:.1%}", flush=True)

    def tell(name, values):
        result["accuracy"][name] = values
        print(f"{name}: " + ", ".join(f"{v:.1%}" for v in values) + f"; mean {np.mean(values):.1%}", flush=True)
    kinds = {"linear on the mean": dict(attend=False), "linear on attention": {}, "prototypes": dict(prototypes=N)}
    made = {n: [fitted(model, train, C, cfg, seed, **k) for seed in range(1, cfg.seeds + 1)] for n, k in kinds.items()}
    for name, clfs in made.items():
        tell(f"{name}, frozen", [accuracy(answers(clf, test), yb) for clf in clfs])
    save(cfg.out, result)
    if cfg.tune_epochs:
        for name, clfs in list(made.items())[1:]:
            values = []
            for seed, clf in enumerate(clfs, 1):
                trunk, clf = tuned(model, clf, train, cfg, seed)
                values.append(accuracy(answers(clf, test, states(trunk, test.idx)), yb))
            tell(f"{name}, unfrozen", values)
            save(cfg.out, result)
    for name, label in (("prototypes", "prototypes"), ("linear on attention", "plain")):
        for seed, clf in enumerate(made[name], 1):
            shuffled = [np.random.default_rng([seed, n]).permutation(len(s)) for n, s in enumerate(test.sequences)]
            for by, order in (("share", orders(clf, test)[0]), ("attention", orders(clf, test, "attention")[0]), ("random", shuffled)):
                result["faithful"].setdefault(f"{label}, {by}", []).append(faithful(model, clf, test, order))
            for n, v in simulatability(clf, train, test, model.config.vocab_size, seed).items():
                result["simulatability"].setdefault(f"{label}, {n}", []).append(v)
            save(cfg.out, result)
    for name, runs in result["faithful"].items():
        print(f"{name}: " + "; ".join(f"{k} " + ", ".join(f"{v:.3f}" for v in np.mean([r[k] for r in runs], 0)) for k in ("comprehensiveness", "sufficiency")) + f" at {runs[0]['shares']}", flush=True)
    print("simulators agree: " + ", ".join(f"{n} {np.mean(v):.1%}" for n, v in result["simulatability"].items()), flush=True)
    if cfg.sweep:
        result["sweep"] = swept(model, train, C, cfg)
        save(cfg.out, result)
        picture(result, Path(cfg.out).with_suffix(".png"))
    clf = made["prototypes"][0]
    examples = [torch.as_tensor(train.sequences[e].astype(np.int64)) if e >= 0 else torch.zeros(0, dtype=torch.long) for e in clf.example.tolist()]
    with atomic(Path(cfg.keep) / "classifier.pt") as f:
        torch.save(dict(classifier=clf.state_dict(), model=fingerprint(model.state_dict()), names=names, out_dir=str(cfg.out_dir), length=length, examples=examples), f)
    best = {n: np.mean(v) for n, v in result["accuracy"].items()}
    print(f"prototypes {best['prototypes, frozen']:.1%} against linear on attention {best['linear on attention, frozen']:.1%} and on the mean {best['linear on the mean, frozen']:.1%}, frozen"
          + (f"; {best['prototypes, unfrozen']:.1%} against {best['linear on attention, unfrozen']:.1%} unfrozen" if cfg.tune_epochs else "") + f"; {cfg.seeds} seeds, {C} classes; {cfg.out}, {cfg.keep}/classifier.pt")


def swept(model, train, C, cfg):
    """Accuracies over N a class, K, and each lambda, the others as they are, on a fifth of the training texts that is held out for this -> {name: {value: accuracy}}"""
    drawn, out = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(1)), {}
    train, test = train.some(drawn[len(drawn) // 5:]), train.some(drawn[:len(drawn) // 5])
    for name, values, change in (("prototypes a class", (1, 2, 4, 8), lambda v: dict(n=v, near=min(v, cfg.near))), ("K", (1, 2, 4), lambda v: dict(near=v)),
                                 ("lambda1, cohesion", (0.0, 0.1, 0.3, 1.0), lambda v: dict(lambda1=v)), ("lambda2, separation", (0.0, 0.1, 0.3, 1.0), lambda v: dict(lambda2=v))):
        for v in values:
            new, options = copy.copy(cfg), change(v)
            n = options.pop("n", max((cfg.prototypes or 4 * C) // C, options.get("near", 1)))
            for k, u in options.items():
                setattr(new, k, u)
            clf = fitted(model, train, C, new, 1, prototypes=n * C)
            out.setdefault(name, {})[v] = accuracy(answers(clf, test), test.y)
        print(f"{name}: " + ", ".join(f"{v:g} {a:.1%}" for v, a in out[name].items()), flush=True)
    return out


def picture(result, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for ax, (name, values) in zip(axes[0], result["sweep"].items()):
        ax.plot([str(v) for v in values], [100 * a for a in values.values()], "o-", color="#0072B2")
        ax.set(xlabel=name, ylabel="accuracy on held-out training texts, %")
    for ax, kind in zip(axes[1], ("comprehensiveness", "sufficiency")):
        for (name, runs), color, dash in zip(result["faithful"].items(), ("#0072B2", "#0072B2", "#0072B2", "#E69F00", "#E69F00", "#E69F00"), ("-", "--", ":") * 2):
            ax.plot([100 * s for s in runs[0]["shares"]], np.mean([r[kind] for r in runs], 0), dash, marker="o", color=color, label=name)
        ax.set(xlabel="tokens, %", ylabel=f"{kind}, probability")
        ax.legend(fontsize=8)
    axes[1][2].barh(list(result["simulatability"]), [100 * np.mean(v) for v in result["simulatability"].values()], color="#0072B2")
    axes[1][2].set(xlabel="simulator agrees, %")
    axes[1][3].axis("off")
    with atomic(path) as f:
        fig.savefig(f, dpi=110, format="png")
    plt.close(fig)


if __name__ == "__main__":
    run_main(main)
