"""Multiple-choice tasks, one JSON object a line: from a prepared dataset's held-out text, or from public benchmarks.

    python data/prepare.py cloze --dataset=pydoc             # which text goes on here? -> data/pydoc/cloze.jsonl
    python data/prepare.py hellaswag                         # a download; so are piqa, boolq, openbookqa, winogrande
    python data/prepare.py arc --level=challenge             # easy or challenge, out of a .zip of 680 MB
    python data/prepare.py piqa --file=valid.jsonl --labels=valid-labels.lst      # files that you have; also of other splits

An item is {"context": str, "choices": [str, ...], "label": int, ...}. The answer of a model is the choice with the largest
log p(choice | context), or the largest per token or byte; a choice brings the blank that it begins with. "id", "document" and
"source" say where an item is from. With "given": [int, ...] the first given[i] characters of choice i are read, not scored.

cloze cuts the held-out documents into windows that do not overlap: a context, then its true continuation. Both begin and
end where a word does, and the tokenizer cuts the text where the item does. The wrong choices are the true continuations
of other windows, so that every text is an answer as often as a distractor: of the same source, and of any source where that
has too few ("widened" counts those). No choice's tokens stand in train.bin in a row.
With --split=train the items are of the training text, to calibrate on: there are ten times as many.

Contexts and choices of the benchmarks are lm-evaluation-harness's, without shots. WinoGrande scores one ending after two
sentences that differ in a name: context is what stands before the name, a choice is name and ending, and "given" covers the
name. Who ignores "given" scores the name as well, which is another measure.
"""
import itertools, json, re, sys, zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from prepare import fetch
from prism import UserError, atomic, dataset_folder, load_dataset, load_tokenizer, parse_config


@dataclass
class ClozeConfig:
    dataset: str = "pydoc"       # a prepared dataset: its name under data/, or its folder
    items: int = 1000            # items to write; fewer where the held-out text is short
    choices: int = 4             # choices an item, the true one included
    context_tokens: int = 48     # length of a context
    choice_tokens: int = 5       # length of each choice
    split: str = "val"           # val, or train: items of text that the model has seen, to calibrate on
    seed: int = 1337             # which windows become items, their distractors and the order are functions of it
    out: str = ""                # the file to write; default: cloze.jsonl, or cloze-train.jsonl, in the dataset's folder


@dataclass
class PublicConfig:
    file: str = ""               # the benchmark's own file (.jsonl, or the .zip that holds it); default: a download
    mirror: str = ""             # address that stands in for the download's site (https://...)
    out: str = ""                # the file to write; default: <data_dir>/<task>/<task>.jsonl
    data_dir: str = ""           # downloads go to <data_dir>/<task>/download; default: the folder of this script


@dataclass
class ArcConfig(PublicConfig):
    level: str = "easy"          # easy or challenge


@dataclass
class PiqaConfig(PublicConfig):
    labels: str = ""             # with --file: the file of answers, 0 or 1 a line


# ----------------------------------------------------------------------------- the task format

def check_item(item, where):
    """Returns `item`. Raises UserError, beginning with `where`, unless it is an item of the task format."""
    def need(ok, found):
        if not ok:
            raise UserError(f'{where}: {found}; expected {{"context": "...", "choices": ["...", "..."], "label": 0}}')
    need(isinstance(item, dict), f"found {str(item)[:40]}")
    context, choices, label = (item.get(key) for key in ("context", "choices", "label"))
    need(isinstance(context, str), "context is no text")
    need(isinstance(choices, list) and len(choices) >= 2, "fewer than two choices")
    for i, choice in enumerate(choices):
        need(isinstance(choice, str) and choice.strip(), f"choice {i} is empty or no text")
    need(type(label) is int and 0 <= label < len(choices), f"label is {label!r}, not one of 0 to {len(choices) - 1}")
    given = item.get("given", [0] * len(choices))
    need(isinstance(given, list) and len(given) == len(choices) and all(type(g) is int and 0 <= g < len(c) for g, c in zip(given, choices)),
         f"given is {given!r}, not a number of characters for each choice, below its length")
    broken = re.search("[\ud800-\udfff]", context + "".join(choices))
    need(not broken, f"\\u{ord(broken[0]):04x}, half a surrogate pair, is no character" if broken else "")
    return item


def json_lines(path, lines):
    """Yields (where, object) of lines of JSON in bytes; blank lines count and are skipped. where: path:number."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{number}: no JSON in UTF-8 ({e})") from None


def load_items(path):
    """A file of the task format -> list of dicts. Raises UserError, naming file and line, for what is no item."""
    try:
        with open(path, "rb") as f:
            items = [check_item(item, where) for where, item in json_lines(path, f)]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; make a task first: python data/prepare.py cloze") from None
    if not items:
        raise UserError(f"{path} holds no item; make it again: python data/prepare.py cloze")
    return items


def write_items(items, path):
    with atomic(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    print(f"{len(items):,} items in {path}")


# ----------------------------------------------------------------------------- cloze: from held-out text

class Window(NamedTuple):
    at: int              # its first token in val.bin, or train.bin
    document: str
    source: str
    tokens: list         # context_tokens + choice_tokens
    context: str
    choice: str


def cut_windows(text, rows, encoding, n_context, n_choice):
    """Yields the windows of the documents `rows`, from the left as densely as the rules of a cut allow.

    A cut lies before a token that begins with a blank, and so never inside a character; behind the context it is one space, and no
    choice ends in a blank. The text must give the same tokens again, in both parts: what the tokenizer joins across is passed over.
    """
    blank = np.zeros(encoding.n_vocab, bool)
    blank[[rank for piece, rank in encoding._mergeable_ranks.items() if piece[:1].isspace()]] = True
    for row in rows:
        document = text[row["start"]:row["start"] + row["length"] - 1]  # without its end-of-text token
        cut = np.append(blank[document], True)
        cut[0], at, n = True, 0, n_context + n_choice
        while at + n <= len(document):
            if cut[at] and cut[at + n_context] and cut[at + n]:
                tokens = document[at:at + n].tolist()
                context, choice = (encoding.decode(part, errors="strict") for part in (tokens[:n_context], tokens[n_context:]))
                if re.fullmatch(r" \S(.*\S)?", choice, re.S) and fits(encoding, context, tokens[:n_context], choice, tokens[n_context:]):
                    yield Window(row["start"] + at, row["title"], row["source"], tokens, context, choice)
                    at += n
                    continue
            at += 1


def fits(encoding, context, context_tokens, choice, choice_tokens):
    """Does the tokenizer cut context + choice where the item does?"""
    return encoding.encode_ordinary(context) == context_tokens and encoding.encode_ordinary(context + choice) == context_tokens + choice_tokens


def occurs(tokens, queries, chunk=1 << 20):
    """tokens (N,), queries (Q, n) -> (Q,) bool: does the row stand in `tokens`, in a row? Hashes find, comparison decides."""
    queries = np.asarray(queries, np.uint64)
    n, found = queries.shape[1], set()

    def hashes(t):  # (..., L) -> (..., L - n + 1): sum_j t[i + j] b^(n - 1 - j) mod 2^64
        h = np.zeros((*t.shape[:-1], t.shape[-1] - n + 1), np.uint64)
        for j in range(n):
            h = h * np.uint64(0x9E3779B97F4A7C15) + t[..., j:j + h.shape[-1]]
        return h

    wanted = np.unique(hashes(queries))
    for start in range(0, len(tokens) - n + 1, chunk):
        part = np.asarray(tokens[start:start + chunk + n - 1], np.uint64)
        for i in np.flatnonzero(np.isin(hashes(part), wanted)):
            found.add(part[i:i + n].tobytes())
    return np.array([query.tobytes() in found for query in queries], bool)


def rows_of(folder, split, n_tokens):
    """The rows of docs.json that lie in train.bin or val.bin."""
    try:
        rows = [row for row in json.loads((folder / "docs.json").read_text("utf-8")) if row["split"] == split]
        ok = all(0 <= row["start"] < row["start"] + row["length"] <= n_tokens and isinstance(row["title"] + row["source"], str) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/docs.json is missing or damaged ({type(e).__name__}: {e}); run: python data/prepare.py") from None
    if not ok:
        raise UserError(f"{folder}/docs.json does not fit {split}.bin; run: python data/prepare.py")
    return rows


def cloze(cfg):
    """Writes the items; returns them."""
    for name, least in (("items", 1), ("choices", 2), ("context_tokens", 1), ("choice_tokens", 2)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)}: expected at least {least}")
    if cfg.split not in ("train", "val"):
        raise UserError(f"--split={cfg.split}: expected val or train")
    folder = dataset_folder(cfg.dataset)
    train, val, meta = load_dataset(folder)
    encoding, rng, length = load_tokenizer(folder), np.random.default_rng(cfg.seed), cfg.context_tokens + cfg.choice_tokens
    text, where = (val, "held-out text") if cfg.split == "val" else (train, "training text")
    rows = rows_of(folder, cfg.split, len(text))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    # a large corpus gives more windows than anyone needs: some documents, drawn, are enough to choose from
    windows = list(itertools.islice(cut_windows(text, rows, encoding, cfg.context_tokens, cfg.choice_tokens), 20 * cfg.items))
    if len(windows) < cfg.choices:
        longest = max((row["length"] - 1 for row in rows), default=0)
        raise UserError(f"{folder}: {len(windows)} windows of {length} tokens in the {where}, expected at least {cfg.choices}; its longest "
                        f"document has {longest} tokens: lower --context_tokens or --choice_tokens, or hold out more (--val_fraction)")
    dropped, pool, sources, seen = Counter(), [], defaultdict(list), set()
    known = occurs(train, [w.tokens[cfg.context_tokens:] for w in windows]) if cfg.split == "val" else [False] * len(windows)
    for window, known in zip(windows, known):
        plain = " ".join(window.choice.split())
        why = "occurs in training" if known else "repeats another's" if plain in seen else ""
        seen.add(plain)
        if why:
            dropped[f"whose continuation {why}"] += 1
        else:
            sources[window.source].append(len(pool))
            pool.append(window)

    def distractors(i):
        """Indices of windows in the pool that may stand beside window i: its source's, drawn; then all others', drawn."""
        own, n = sources[pool[i].source], cfg.context_tokens
        rest = (j for j in rng.permutation(len(pool)) if pool[j].source != pool[i].source)
        for j in itertools.chain(rng.permutation(own), rest):
            if j != i and pool[j].choice.strip() not in pool[i].context and \
                    fits(encoding, pool[i].context, pool[i].tokens[:n], pool[j].choice, pool[j].tokens[n:]):
                yield j

    items = []
    for i in rng.permutation(len(pool)):
        if len(items) == cfg.items:
            break
        w, others = pool[i], list(itertools.islice(distractors(i), cfg.choices - 1))
        if len(others) < cfg.choices - 1 or w.choice.strip() in w.context:
            dropped["for want of choices that the context does not hold"] += 1
            continue
        label = int(rng.integers(cfg.choices))
        choices = [pool[j].choice for j in others]
        choices.insert(label, w.choice)
        items.append(check_item({"context": w.context, "choices": choices, "label": label, "id": f"{meta['name']}:{cfg.split}:{w.at}", "document": w.document,
                                 "source": w.source, "widened": sum(pool[j].source != w.source for j in others)}, folder))
    if not items:
        raise UserError(f"{folder}: no item is left of {len(windows)} windows ({', '.join(f'{n} {why}' for why, n in dropped.items())}); "
                        "raise --choice_tokens, or hold out more text")
    print(f"{len(windows):,} windows of {cfg.context_tokens} + {cfg.choice_tokens} tokens in the {where} of {folder.name}")
    for why, n in sorted(dropped.items()):
        print(f"{n:,} dropped {why}")
    count = Counter(item["source"] for item in items)
    print(f"{len(count):,} sources: {', '.join(f'{source} {n:,}' for source, n in count.most_common(8))}{', ...' if len(count) > 8 else ''}")
    print(f"{sum(item['widened'] > 0 for item in items):,} items with distractors of other sources, their own having too few")
    if len(items) < cfg.items:
        print(f"fewer than --items={cfg.items:,}: the {where} gives no more")
    write_items(items, cfg.out or folder / ("cloze.jsonl" if cfg.split == "val" else "cloze-train.jsonl"))
    return items


# ----------------------------------------------------------------------------- public benchmarks
# Each: a row of the public file -> context, choices (without the blank before them), label, and what else an item holds.

def index(answer, names):
    """The place of a row's answer among the names of its choices. Raises LookupError, with a message, where it has none."""
    if answer in ("", None):
        raise LookupError("the answer is missing; files of hidden tests cannot be used")
    if str(answer) not in names:
        raise LookupError(f"the answer is {answer!r}, not one of {', '.join(names)}")
    return names.index(str(answer))


def hellaswag(row):
    def clean(text):  # brackets are WikiHow's mark-up
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    endings = [clean(ending) for ending in row["endings"]]
    return (clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"), endings,
            index(row.get("label"), [str(i) for i in range(len(endings))]), {"id": str(row["ind"]), "source": row["source_id"]})


def arc(row):
    context, choices, label, more = openbookqa(row)
    return f"Question: {context}\nAnswer:", choices, label, more


def openbookqa(row):
    choices = row["question"]["choices"]
    label = index(row.get("answerKey"), [choice["label"] for choice in choices])
    return row["question"]["stem"], [choice["text"] for choice in choices], label, {"id": row["id"]}


def piqa(row):
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], index(row.get("label"), ["0", "1"]), {}


def boolq(row):  # SuperGLUE calls the answer label, the first release called it answer
    return (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"],
            index(row.get("label", row.get("answer")), ["False", "True"]), {})


def winogrande(row):
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise LookupError("the sentence has no _ for the name")
    names, blank = [row["option1"], row["option2"]], before[len(before.rstrip()):]
    # as in the harness one space follows the name, whatever stood there
    return (before, [f"{blank}{name} {after.strip()}" for name in names], index(row.get("answer"), ["1", "2"]),
            {"id": row["qID"], "given": [len(blank + name) for name in names]})


class Public(NamedTuple):
    convert: object
    site: str
    path: str        # at the site
    member: str = "" # of a .zip
    config: type = PublicConfig


AI2, YONATAN = "https://s3-us-west-2.amazonaws.com", "https://yonatanbisk.com"
PUBLIC = {
    "hellaswag": Public(hellaswag, "https://raw.githubusercontent.com", "rowanz/hellaswag/master/data/hellaswag_val.jsonl"),
    "arc": Public(arc, AI2, "ai2-website/data/ARC-V1-Feb2018.zip", "ARC-V1-Feb2018-2/ARC-{0}/ARC-{0}-Test.jsonl", ArcConfig),
    "piqa": Public(piqa, YONATAN, "piqa/data/valid.jsonl", config=PiqaConfig),
    "boolq": Public(boolq, "https://dl.fbaipublicfiles.com", "glue/superglue/data/v2/BoolQ.zip", "BoolQ/val.jsonl"),
    "openbookqa": Public(openbookqa, AI2, "ai2-website/data/OpenBookQA-V1-Sep2018.zip", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
    "winogrande": Public(winogrande, "https://storage.googleapis.com", "ai2-mosaic/public/winogrande/winogrande_1.1.zip", "winogrande_1.1/dev.jsonl")}


def read_lines(path, member):
    """The lines of a file, or of `member` in a .zip, as bytes."""
    try:
        if path.suffix != ".zip":
            return path.read_bytes().splitlines()
        with zipfile.ZipFile(path) as z:
            return z.read(member).splitlines()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give the benchmark's own file, or no --file to download it") from None
    except (KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: {e}; expected a .zip with {member}; remove it to download it again") from None


def public(task, cfg):
    """Converts a benchmark and writes its items; returns them."""
    p, folder, name = PUBLIC[task], Path(cfg.data_dir or Path(__file__).resolve().parent) / task, task
    member = p.member
    if task == "arc":
        if cfg.level not in ("easy", "challenge"):
            raise UserError(f"--level={cfg.level}: expected easy or challenge")
        name, member = f"arc_{cfg.level}", member.format(cfg.level.capitalize())
    if task == "piqa" and bool(cfg.file) != bool(cfg.labels):
        raise UserError("PIQA's questions and answers are two files; give both, --file=valid.jsonl --labels=valid-labels.lst, or neither")

    def local(given, path):
        target = Path(given) if given else folder / "download" / path.rpartition("/")[2]
        if not given:
            fetch(f"{(cfg.mirror or p.site).rstrip('/')}/{path}", target)
        return target
    path = local(cfg.file, p.path)
    rows = list(json_lines(path, read_lines(path, member)))
    if task == "piqa":
        answers = local(cfg.labels, p.path.replace(".jsonl", "-labels.lst"))
        labels = read_lines(answers, "")
        if len(labels) != len(rows):
            raise UserError(f"{answers} has {len(labels)} lines, {path} has {len(rows)} questions; they do not belong together")
    items = []
    for i, (where, row) in enumerate(rows):
        try:
            if task == "piqa":
                where = f"{answers}:{i + 1}, {where}"
                row["label"] = labels[i].decode("ascii", "replace").strip()
            context, choices, label, more = p.convert(row)
            # blanks that end the context go to the choices, as in the harness: tokens begin with a blank. WinoGrande's have theirs
            blank, context = "" if task == "winogrande" else context[len(context.rstrip()):] + " ", context.rstrip()
            item = {"context": context, "choices": [blank + choice for choice in choices], "label": label, **more}
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(f"{where}: no row of {task} ({type(e).__name__}: {e}); give the benchmark's own .jsonl file") from None
        except LookupError as e:
            raise UserError(f"{where}: {e}") from None
        items.append(check_item(item, where))
    if not items:
        raise UserError(f"{path} holds no question")
    write_items(items, cfg.out or folder / f"{name}.jsonl")
    return items


TASKS = ("cloze", *PUBLIC)


def main(argv):
    """argv: a name of TASKS, then --key=value."""
    if argv[0] == "cloze":
        return cloze(parse_config(ClozeConfig, argv[1:]))
    return public(argv[0], parse_config(PUBLIC[argv[0]].config, argv[1:]))
