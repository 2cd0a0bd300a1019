"""Text in, tokens and their provenance out: writes data/<name>/ for train.py and attribute.py.

    python data/prepare.py                               # pydoc: Python's documentation, offline
    python data/prepare.py books/ --name=books           # .txt and .jsonl files, or folders of them
    python data/prepare.py notes.txt --separator='---'   # one file that holds many documents
    python data/prepare.py tinystories                   # a download: pip install huggingface_hub
    python data/prepare.py fineweb_edu --shards=14       # pip install huggingface_hub pyarrow

A .jsonl line is {"text": "...", "title": "...", "source": "..."}; title and source are optional.
train.bin and val.bin hold tokens, uint16 (uint32 above 65,536), each document with end-of-text
behind it. docs.json has a row per document: {"split", "start", "length", "source", "title"};
tokens[start : start + length - 1] decode to its text. meta.json holds counts and hashes.
A hundred documents must fit in memory at once. HF_ENDPOINT=URL downloads from a mirror.
"""
import ast
import base64
import contextlib
import hashlib
import heapq
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, atomic, dataset_folder, load_tokenizer
from common import parse_config, reading, run_main

Document = namedtuple("Document", "title source text split", defaults=[""])
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
EOT = "<|endoftext|>"
BLOCK = 1 << 24         # characters of a .txt file that are read at once
BPE_CHARS = 50_000_000  # characters that a tokenizer is trained on
FEW = 100               # with fewer documents the end of each is held out, else whole documents


@dataclass
class PrepareConfig:
    name: str = ""             # the dataset's name; default: the corpus's, or that of the input
    tokenizer: str = ""        # gpt2, byte, bpe or a prepared dataset; default: bpe, downloads gpt2
    vocab_size: int = 4096     # tokens of a bpe that is trained here, end-of-text included
    val_fraction: float = 0.0  # share held out; 0: the corpus's own (0.1; fineweb_edu 0.005)
    separator: str = ""        # text between the documents of a .txt file; none: one per file
    shards: int = 1            # fineweb_edu: how many of its 14 files of about 2 GB
    seed: int = 1337           # decides which documents are held out
    data_dir: str = str(Path(__file__).resolve().parent)  # the dataset goes to <data_dir>/<name>


# ------------------------------------------- corpora: generators of documents

def pydoc(words, cfg):
    """Python's language reference, a document per topic, then its docstrings, one per module."""
    from pydoc_data.topics import topics
    for name in sorted(topics):
        yield Document(f"topics/{name}", "language reference", topics[name])
    root = Path(os.__file__).parent
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled"}
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(set(inner) - skip)
        for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            text = "\n\n".join(docstrings(ast.parse(path.read_bytes()), name))
            if len(text) >= 200:               # less says next to nothing
                yield Document(name, parts[0].lstrip("_"), text + "\n")


def docstrings(node, name):
    """Yields each docstring with the name that it belongs to, in the order of the source."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, owners) and ast.get_docstring(node):
        yield f"{name}\n\n{ast.get_docstring(node).strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, owners):
            yield from docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from docstrings(child, name)


def own_text(words, cfg):
    """The .txt and .jsonl files that `words` name, and those in the folders that they name."""
    for path in map(Path, words):
        folder = path if path.is_dir() else path.parent
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [f for f in files if f.suffix in (".txt", ".jsonl") and f.is_file()]
        if not files:
            raise UserError(f"'{path}': expected .txt or .jsonl files, or one of {[*SOURCES]}")
        for file in files:
            read = read_jsonl if file.suffix == ".jsonl" else read_txt
            yield from read(file, file.relative_to(folder).as_posix(), cfg.separator)


def read_jsonl(path, title, separator):
    expected = 'expected {"text": "...", "title": "...", "source": "..."} in UTF-8'
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            with reading(f"{path}:{number}", expected):
                row = json.loads(line.decode("utf-8")) if line.strip() else {"text": ""}
                name = row.get("title") or f"{title}#{number}"
                document = Document(name, row.get("source") or path.stem, row["text"])
                "".join(document).encode("utf-8")  # fails on numbers and on half characters
            yield document


def read_txt(path, title, separator):
    """A document per file; with a separator, those between them without the blanks around."""
    if not separator:
        yield Document(title, path.stem, "".join(blocks(path)))
        return
    number, tail = 0, ""
    for block in itertools.chain(blocks(path), [""]):
        *texts, tail = (tail + block).split(separator) if block else [tail, ""]
        for text in filter(None, map(str.strip, texts)):
            number += 1
            yield Document(f"{title}#{number}", path.stem, text)


def blocks(path):
    with open(path, encoding="utf-8", newline="") as f:
        try:
            while block := f.read(BLOCK):
                yield block
        except UnicodeDecodeError as e:
            byte = f.buffer.tell() - len(e.object) + e.start
            raise UserError(f"{path}: byte {byte} is no UTF-8; convert the file to it") from None


def hub_file(dataset, file):
    """A file from the Hugging Face Hub -> its path in the hub's cache."""
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as e:                     # the network's and the hub's share no class
        why = str(e).strip().partition("\n")[0]
        raise UserError(f"{file}: {why}; try again, or set HF_ENDPOINT to a mirror's URL") from None


def tinystories(words, cfg):
    for split, part in (("train", "train"), ("val", "valid")):
        path = hub_file("roneneldan/TinyStories", f"TinyStoriesV2-GPT4-{part}.txt")
        for document in read_txt(path, path.stem, EOT):
            yield document._replace(source="TinyStories", split=split)


def fineweb_edu(words, cfg):
    from pyarrow.parquet import ParquetFile
    for shard in range(cfg.shards):
        path = hub_file("HuggingFaceFW/fineweb-edu", f"sample/10BT/{shard:03d}_00000.parquet")
        for batch in ParquetFile(path).iter_batches(batch_size=256, columns=["text", "url"]):
            for row in batch.to_pylist():
                site = row["url"].partition("://")[2].partition("/")[0]
                yield Document(row["url"], site, row["text"])


SOURCES = {"pydoc": (pydoc, "bpe", 0.1),       # its documents, its tokenizer, the share held out
           "tinystories": (tinystories, "gpt2", 0.1),
           "fineweb_edu": (fineweb_edu, "gpt2", 0.005)}


def with_splits(documents, cfg):
    """Yields the documents with their split: train, val or, where they are few, both."""
    documents = (document for document in documents if document.text)
    first = list(itertools.islice(documents, FEW))
    for place, document in enumerate(itertools.chain(first, documents)):
        if document.split:                     # the corpus has a held-out file of its own
            yield document
        elif len(first) < FEW:
            yield from cut(document, cfg.val_fraction)
        else:
            digest = hashlib.sha256(f"{cfg.seed}:{place}".encode()).digest()
            draw = int.from_bytes(digest[:8], "big") / 2 ** 64             # uniform in [0, 1)
            yield document._replace(split="val" if draw < cfg.val_fraction else "train")


def cut(document, fraction):
    """Holds out the end of a document, cut before a blank, where the tokenizer cuts too."""
    text, at = document.text, 0
    for match in re.finditer(r"\S(?=[ \t\r\n]+\S)", text):
        if at and match.end() > len(text) * (1 - fraction):
            break
        at = match.end()
    yield document._replace(split="train", text=text[:at] if at else text)
    if at:                                     # else a single word, which stays whole
        yield document._replace(split="val", text=text[at:])


# ------------------------------------------- tokenizers: byte-level BPE

def train_bpe(documents, n_tokens):
    """Byte-level BPE -> {token's bytes: number}: single bytes, then the most frequent merges.

    A merge is known by the bytes that it makes: "a" + "bc" and "ab" + "c" are one token. Ties go
    to the smaller bytes. After a merge, only the words that contain it are counted anew.
    """
    words, times = distinct_words(documents)
    tokens = {bytes([b]): b for b in range(256)}
    count, words_with, updates = Counter(), defaultdict(set), set()

    def tally(w, n):
        for pair in map(bytes.__add__, words[w], words[w][1:]):
            count[pair] += n
            words_with[pair].add(w)
            updates.add(pair)

    for w, n in enumerate(times):
        tally(w, n)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < n_tokens:
        n, best = heapq.heappop(heap)
        if n == 0 or -n != count[best]:
            continue                           # an old entry: a newer one stands in the heap
        tokens[best] = len(tokens)
        updates.clear()
        for w in words_with.pop(best):
            tally(w, -times[w])
            word = words[w]
            for i in range(len(word)):         # it shrinks, and ends in empty slices
                if b"".join(word[i:i + 2]) == best:
                    word[i:i + 2] = [best]
            tally(w, times[w])
        for pair in updates:
            heapq.heappush(heap, (-count[pair], pair))
    return tokens


def distinct_words(documents):
    """Each word of the train documents as a list of single bytes, and how often it occurs."""
    frequency, left = Counter(), BPE_CHARS
    for document in documents:
        if document.split == "train" and left > 0:
            frequency.update(regex.findall(GPT2_PATTERN, document.text[:left]))
            left -= len(document.text)
    words, times = [], []
    for word, n in frequency.most_common(100_000):  # nearly all of any text
        for part in re.findall(rb"(?s).{1,64}", word.encode("utf-8")):  # rulers can be long
            words.append([bytes([b]) for b in part])
            times.append(n)
    return words, times


def make_tokenizer(documents, cfg):
    """A tiktoken.Encoding: gpt2, byte, bpe (trained on the documents) or that of a dataset."""
    if cfg.tokenizer == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise UserError(f"GPT-2's vocabulary: {e}; go online or use --tokenizer=bpe") from None
    if cfg.tokenizer not in ("bpe", "byte"):
        folder = dataset_folder(cfg.tokenizer)
        if not folder.is_dir():
            raise UserError(f"--tokenizer={folder.name}: expected gpt2, byte, bpe or a dataset")
        return load_tokenizer(folder)
    tokens = train_bpe(documents if cfg.tokenizer == "bpe" else [], cfg.vocab_size - 1)
    return tiktoken.Encoding(cfg.tokenizer, pat_str=GPT2_PATTERN, mergeable_ranks=tokens,
                             special_tokens={EOT: len(tokens)})


# ------------------------------------------- tokens and provenance

def tokenize(documents, encoding):
    """Yields (document, its tokens and end-of-text) in order; a thread per core, 100 at once."""
    def encode(document):
        with reading(f"'{document.title}'", "is there a very long run of blanks?"):
            tokens = encoding.encode_to_numpy(document.text, disallowed_special=())
        return np.append(tokens, encoding.eot_token)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(documents, 100)):
            yield from zip(batch, pool.map(encode, batch))


def write_dataset(folder, documents, encoding, command):
    """Writes the files, which replace an older dataset at the end. Returns meta.json's dict."""
    dtype = np.dtype("uint16" if encoding.n_vocab <= 65536 else "uint32")
    meta = {"format": 1, "name": folder.name, "vocab_size": encoding.n_vocab,
            "eot": encoding.eot_token, "tokenizer": encoding.name, "dtype": dtype.name,
            "train": {"tokens": 0, "documents": 0}, "val": {"tokens": 0, "documents": 0},
            "characters": 0, "sha256": {}, "command": command}
    files, hashes = {}, defaultdict(hashlib.sha256)
    content = ("train.bin", "val.bin", "docs.json", "tokenizer.tiktoken")

    def put(name, text):
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        files[name].write(data)
        hashes[name].update(data)

    with contextlib.ExitStack() as stack:      # closes in reverse: meta.json is replaced last
        for name in ("meta.json", "tokenizer.json", *content):
            files[name] = stack.enter_context(atomic(folder / name))
        for document, tokens in tqdm(tokenize(documents, encoding), unit=" docs", disable=None):
            counts = meta[document.split]
            row = {"split": document.split, "start": counts["tokens"], "length": len(tokens),
                   "source": document.source, "title": document.title}
            put(f"{document.split}.bin", tokens.astype(dtype))
            mark = "," if meta["characters"] else "["
            put("docs.json", f"{mark}\n{json.dumps(row, ensure_ascii=False)}")
            counts["tokens"] += len(tokens)
            counts["documents"] += 1
            meta["characters"] += len(document.text)
        put("docs.json", "\n]\n")
        if not (meta["train"]["documents"] and meta["val"]["documents"]):
            raise UserError("no text to train on or to hold out; give more, or --val_fraction")
        for piece, number in encoding._mergeable_ranks.items():
            put("tokenizer.tiktoken", base64.b64encode(piece) + f" {number}\n".encode())
        settings = {"name": encoding.name, "pattern": encoding._pat_str, "eot": encoding.eot_token,
                    "n_vocab": encoding.n_vocab}
        put("tokenizer.json", json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
        meta["sha256"] = {name: hashes[name].hexdigest() for name in content}
        put("meta.json", json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
    return meta


def prepare(words, cfg, command=""):
    """Prepares a corpus of SOURCES, or own files and folders. Returns meta.json's dict."""
    corpus, tokenizer, share = SOURCES.get(" ".join(words), (own_text, "bpe", 0.1))
    cfg.tokenizer = cfg.tokenizer or tokenizer
    cfg.val_fraction = cfg.val_fraction or share
    encoding = make_tokenizer(with_splits(corpus(words, cfg), cfg), cfg)
    folder = Path(cfg.data_dir) / (cfg.name or Path(words[0]).resolve().stem)
    meta = write_dataset(folder, with_splits(corpus(words, cfg), cfg), encoding, command)
    for split in ("train", "val"):
        print(f"{split}: {meta[split]['documents']:,} documents, {meta[split]['tokens']:,} tokens")
    print(f"next: python train.py --dataset={folder.name}")
    return meta


def main(argv):
    options = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")] or ["pydoc"]
    command = shlex.join(["python", "data/prepare.py", *argv])
    try:
        prepare(words, parse_config(PrepareConfig, options), command)
    except ModuleNotFoundError as e:
        raise UserError(f"this corpus needs a package; run: pip install {e.name}") from None


if __name__ == "__main__":
    run_main(main)
