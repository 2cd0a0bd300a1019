"""Cloze items: which text goes on here? A context of a document, and its continuation among those
of three other contexts of the same source."""
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402

from common import load_dataset, load_documents, load_tokenizer  # noqa: E402
from prism import UserError  # noqa: E402
from suppress import token_bytes  # noqa: E402

CHOICES = 4
SEED = 1337    # models of the same text meet the same items


class Items(NamedTuple):
    tokens: np.ndarray    # (n, CHOICES, n_context + n_choice) each choice behind the context
    label: np.ndarray     # (n,) the right choice
    document: np.ndarray  # (n,) number of the document


class Window(NamedTuple):
    document: str
    source: str
    context: list         # tokens
    choice: list          # tokens
    context_text: str
    choice_text: str


def cut_windows(tokens, documents, tokenizer, n_context, n_choice):
    """Documents (start, end, title, source) -> yields Windows that do not overlap.

    Parts begin with a token that begins with a blank. GPT-2's pattern cuts text there, so that a
    choice is the same tokens behind any context.
    """
    blank = [piece[:1].isspace() for piece in token_bytes(tokenizer, tokenizer.n_vocab)]
    blank = np.array(blank)
    n = n_context + n_choice
    for start, end, title, source in documents:
        text = tokens[start:end]
        cut = np.append(blank[text], True)
        cut[0] = True
        at = 0
        while at + n <= len(text):
            context = text[at:at + n_context].tolist()
            choice = text[at + n_context:at + n].tolist()
            words = tokenizer.decode(choice)
            whole = cut[at] and cut[at + n_context] and cut[at + n]
            if whole and words.strip() and words == " " + words.strip():
                yield Window(title, source, context, choice, tokenizer.decode(context), words)
                at += n
            else:
                at += 1


def occurs(tokens, rows):
    """tokens (N,), rows of n tokens -> for each row whether it stands in tokens, in one piece."""
    rows = [np.array(row, tokens.dtype).tobytes() for row in rows]
    text = tokens.tobytes()
    size = len(rows[0])
    places = range(0, len(text), tokens.itemsize)
    found = set(rows).intersection(text[i:i + size] for i in places)
    return [row in found for row in rows]


def different(windows, train):
    """The windows with different choices, of which none stands in `train`, tokens or None."""
    first = {}
    for w in windows:
        first.setdefault(" ".join(w.choice_text.split()), w)
    windows = list(first.values())
    if train is None or not windows:
        return windows
    known = occurs(train, [w.choice for w in windows])
    return [w for w, is_known in zip(windows, known) if not is_known]


def cloze(folder, split, n_items, n_context=48, n_choice=5):
    """A prepared dataset's held-out ("val") or training text ("train") -> Items, at most n_items.

    No choice stands in its context, and none of held-out text in the training text.
    """
    train, val, _ = load_dataset(folder)
    tokens = train if split == "train" else val
    rng = np.random.default_rng(SEED)
    start, titles, sources = load_documents(folder, split, len(tokens))
    end = np.append(start[1:], len(tokens)) - 1                   # without its end-of-text token
    documents = list(zip(start, end, titles, sources))
    drawn = [documents[i] for i in rng.permutation(len(documents))]
    windows = cut_windows(tokens, drawn, load_tokenizer(folder), n_context, n_choice)
    windows = islice(windows, 20 * n_items)                       # enough to choose from
    pool = different(windows, train if split == "val" else None)
    source = np.array([w.source for w in pool])
    rows, labels, owners = [], [], []
    for i in rng.permutation(len(pool)):
        w = pool[i]
        anyone = rng.permutation(len(pool))
        own = rng.permutation(np.flatnonzero(source == w.source))
        order = np.concatenate((own, anyone[source[anyone] != w.source]))
        others = (pool[j] for j in order if j != i)
        fitting = (v for v in others if v.choice_text.strip() not in w.context_text)
        choices = list(islice(fitting, CHOICES - 1))
        if len(choices) == CHOICES - 1 and w.choice_text.strip() not in w.context_text:
            label = int(rng.integers(CHOICES))
            choices.insert(label, w)
            rows.append([w.context + v.choice for v in choices])
            labels.append(label)
            owners.append(w.document)
        if len(rows) == n_items:
            break
    if not rows:
        raise UserError(f"found no item of {n_context} + {n_choice} tokens in the {split} text of "
                        f"{folder}, expected at least one; prepare more text")
    return Items(np.array(rows), np.array(labels), np.unique(owners, return_inverse=True)[1])
