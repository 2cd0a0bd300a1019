"""Documents in, tokens and provenance out: text becomes data/<name>/, which train.py and attribute.py read.

    python data/prepare.py                                  # pydoc: Python's own documentation, offline, seconds
    python data/prepare.py books/ --name=books              # .txt and .jsonl files, or folders of them
    python data/prepare.py log.txt --separator='---'        # one file that holds many documents
    python data/prepare.py shakespeare                      # downloads; so do tinystories and fineweb_edu
    python data/prepare.py fineweb_edu --shards=14          # needs pip install pyarrow

A .jsonl line is {"text": "...", "title": "...", "source": "..."}, the last two optional. Written to data/<name>/:

    train.bin, val.bin      tokens, uint16 (uint32 above 65,536); every document is followed by one end-of-text token
    docs.json               one row a document: {"split", "start", "length", "source", "title"}; length counts the
                            end-of-text token, so tokens[start : start + length - 1] decode to the document's text
    tokenizer.tiktoken      one token a line: its bytes in base64, its rank;  tokenizer.json: name, pattern, eot, n_vocab
    meta.json               counts, dtype and the sha256 of each file; written last, so where it is, all is

Everything streams: memory stays flat however large the corpus. `python data/prepare.py --help` lists the options.
"""
import ast, base64, codecs, errno, functools, hashlib, heapq, http.client, itertools, json, os, re, shlex, shutil
import sys, sysconfig, tempfile, time, urllib.error, urllib.parse, urllib.request, warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prism import UserError, load_tokenizer, parse_config, run_main


@dataclass
class PrepareConfig:
    name: str = ""                # the dataset's name; default: pydoc, or the stem of the one file or folder given
    tokenizer: str = ""           # gpt2, bpe (trained on the corpus), byte, or a prepared dataset; default: bpe, downloads gpt2
    vocab_size: int = 4096        # tokens of a trained bpe, the end-of-text token included
    bpe_chars: int = 50_000_000   # bpe is trained on at most so many characters of the training documents
    val_fraction: float = 0.0     # share held out; 0 takes the source's own (0.1; fineweb_edu 0.005)
    separator: str = ""           # text between the documents of a .txt file; none: one document a file
    shards: int = 1               # fineweb_edu: how many of its 14 files of about 2 GB
    mirror: str = ""              # downloads: an address that stands in for the site's (https://huggingface.co, ...)
    seed: int = 1337              # which documents are held out is a function of (seed, the document's place)
    workers: int = 0              # threads that tokenise; 0: one a core
    data_dir: str = ""            # where data/<name>/ goes; default: the folder of this script


# ---------------------------------------------------------------------------------------------------------------------
# Documents. A corpus is a stream of pieces that can be read again: documents may be larger than memory.

EOT = "<|endoftext|>"
BLOCK = 1 << 20    # bytes read at once, and the size of a batch of text
LONGEST = 1 << 22  # a stretch of text without a single blank is cut here, come what may
FEW = 100          # a corpus of fewer documents is split inside its documents


class Piece(NamedTuple):
    """A stretch of a document; the pieces up to the next `first` belong to the same one."""
    first: bool
    title: str
    source: str
    text: str
    split: str = ""  # "train" or "val" where the source has its own held-out file


class Corpus(NamedTuple):
    name: str
    read: Callable        # () -> iterator of pieces, the same ones each time
    tokenizer: str = "bpe"
    val_fraction: float = 0.1
    size: int | None = None  # bytes to come, for the progress bar


SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}


@functools.cache
def pydoc_pieces():
    """Python's language reference, a document a topic, then the docstrings of its library, a document a module."""
    from pydoc_data.topics import topics
    pieces = [Piece(True, f"topics/{name}", "language reference", topics[name]) for name in sorted(topics)]
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(d for d in inner if d not in SKIPPED and "-" not in d)
        for file in sorted(f for f in files if f.endswith(".py")):
            module = (Path(folder) / file).relative_to(root).with_suffix("").parts
            name = ".".join(module[:-1] if module[-1] == "__init__" else module)
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse((Path(folder) / file).read_bytes())
            except (SyntaxError, ValueError):
                continue
            text = "".join(docstrings(tree, name))
            if text:
                pieces.append(Piece(True, name, name.split(".")[0].lstrip("_"), text))
    return pieces


def docstrings(node, name):
    """Yields each docstring under the name it belongs to, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        doc = ast.get_docstring(node)
        if doc and doc.strip():
            yield f"{name}\n\n{doc}\n\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") and isinstance(child, ast.stmt) else name)


def txt_pieces(path, title, source, separator=""):
    """Streams a text file of any size, cut where the tokenizer cuts in any case.

    GPT-2's pattern always ends a token where a non-blank is followed by a blank, so the tokens of the pieces are those
    of the whole. Line ends stay as they are. Parts between separators lose the blanks around them; empty ones vanish.
    """
    decoder, tail, done, part, first = codecs.getincrementaldecoder("utf-8")(), "", 0, 1, True
    boundary = re.compile(r".*\S(?=[ \t\r\n])", re.S)  # greedy: the last one; the pattern's \s includes these four
    with open(path, "rb") as f:
        for block in itertools.chain(iter(lambda: f.read(BLOCK), b""), [b""]):
            pending = len(decoder.getstate()[0])
            try:
                tail += decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: byte {done - pending + e.start} is no UTF-8; convert it: iconv -f latin1 -t utf-8") from None
            done += len(block)
            *whole, tail = tail.split(separator) if separator else [tail]
            if not block:
                whole, tail = whole + [tail], ""
            for text in whole:  # each ends a document
                text = text.strip() if separator and first else text.rstrip() if separator else text
                if text:
                    yield Piece(first, f"{title}#{part}" if separator else title, source, text)
                part, first = part + (bool(text) or not first), True
            if len(tail) >= BLOCK // 2:
                end = len(tail) - len(separator)  # what follows may be the head of a separator
                cut = boundary.match(tail, 0, end + 1) if end > 0 else None
                at = cut.end() if cut else end if len(tail) > LONGEST else 0
                text = tail[:at].lstrip() if separator and first else tail[:at]
                if text:
                    yield Piece(first, f"{title}#{part}" if separator else title, source, text)
                    first = False
                tail = tail[at:]


def jsonl_pieces(path, title, source):
    """A document a line, checked."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as e:
                raise UserError(f'{path}:{number}: {e}; expected {{"text": "..."}} in UTF-8') from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f'{path}:{number}: found {line[:60].decode("utf-8", "replace").strip()}; expected {{"text": "..."}}')
            piece = Piece(True, row.get("title", f"{title}#{number}"), row.get("source", source), row["text"])
            try:
                "".join(piece[1:4]).encode("utf-8")
            except TypeError:
                raise UserError(f"{path}:{number}: title and source must be text") from None
            except UnicodeEncodeError as e:
                raise UserError(f"{path}:{number}: half a surrogate pair (\\u{ord(e.object[e.start]):04x}) is no character; mend the line") from None
            if piece.text:
                yield piece


def own_corpus(words, separator):
    """The .txt and .jsonl files named, and those in the folders named, sorted."""
    files = []  # (path, title)
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
            if not found:
                raise UserError(f"{word}: no .txt or .jsonl file in this folder")
            files += [(p, p.relative_to(path).as_posix()) for p in found]
        elif not path.exists():
            raise UserError(f"'{word}' is no file, no folder and no known corpus (pydoc, {', '.join(DOWNLOADS)})")
        elif path.suffix not in (".txt", ".jsonl"):
            raise UserError(f"{word}: expected a .txt or a .jsonl file, or a folder of them; rename plain text to .txt")
        else:
            files.append((path, path.name))
    for path, _ in files:
        if not path.stat().st_size:
            print(f"{path} is empty: skipped", file=sys.stderr)

    def read():
        for path, title in files:
            yield from jsonl_pieces(path, title, path.stem) if path.suffix == ".jsonl" else \
                txt_pieces(path, title, path.stem, separator)

    name = Path(words[0]).resolve().stem if len(words) == 1 else ""
    return Corpus(name, read, size=sum(path.stat().st_size for path, _ in files))


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: resumed where they broke, checked against what the server announces.

HUGGING_FACE, GITHUB = "https://huggingface.co", "https://raw.githubusercontent.com"
TINY = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
FINEWEB = "/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{:03d}_00000.parquet"
SHAKESPEARE = "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ATTEMPTS, WAIT = 5, 1.0  # attempts in a row that bring nothing new; seconds before the second one, doubled each time


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: Hugging Face announces size and sha256 only there."""

    def __init__(self):
        self.seen = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.seen |= {k.lower(): v for k, v in headers.items()}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def transfer(url, part):
    """One attempt, from where `part` ends. Returns what the server announces: (bytes in all or None, sha256 or None)."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "prism", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    redirects = Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise
        answer = e  # nothing lies beyond `have`: the part may be complete
    with answer:
        got = {k.lower(): v for k, v in answer.headers.items()}
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", got.get("content-range", ""))
        resumed = answer.status == 206 and span is not None and span[1] is not None and int(span[1]) == have
        total = span[2] if span else got.get("content-length")
        total = (redirects.seen | got).get("x-linked-size") or total
        total = int(total) if total and total.isdigit() else None
        sha256 = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', (redirects.seen | got).get("x-linked-etag", ""))
        if answer.status != 416:
            with open(part, "ab" if resumed else "wb") as f, tqdm(
                    total=total, initial=have if resumed else 0, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
                while block := answer.read(BLOCK):
                    f.write(block)
                    bar.update(len(block))
        return total, sha256 and sha256[1]


def fetch(url, path, sha256=None):
    """Downloads `url` to `path` unless it is there; a broken download goes on where it stopped.

    Raises UserError where the server refuses, keeps breaking off, or sends another size or sha256 than announced.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    size = lambda: part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        before = size()
        try:
            total, announced = transfer(url, part)
            if total is None or size() == total:
                break
            problem = f"{size():,} of {total:,} bytes arrived"
            if size() > total:
                part.unlink()
                raise UserError(f"{url}: {size():,} bytes arrived where the server announced {total:,}; run the command again")
        except urllib.error.HTTPError as e:
            if e.code < 500 and e.code not in (408, 429):
                raise UserError(f"{url}: the server answers {e.code} {e.reason}; if the file has moved, name a copy with --mirror=URL") from None
            problem = f"the server answers {e.code} {e.reason}"
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) == errno.ENOSPC:
                raise
            problem = str(getattr(e, "reason", e)) or type(e).__name__
        failures = 0 if size() > before else failures + 1
        if failures >= ATTEMPTS:
            raise UserError(f"{url}: {problem}, {ATTEMPTS} times in a row; the same command resumes, --mirror=URL names another server")
        time.sleep(WAIT * 2 ** failures)
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if (sha256 or announced or found) != found:
        part.unlink()
        raise UserError(f"{url}: sha256 {found} arrived, expected {sha256 or announced}; removed it, run the command again")
    os.replace(part, path)


def shakespeare(folder, cfg):
    path = folder / "tinyshakespeare.txt"
    fetch((cfg.mirror or GITHUB).rstrip("/") + SHAKESPEARE, path, SHAKESPEARE_SHA)
    return Corpus("shakespeare", lambda: txt_pieces(path, path.name, "shakespeare"), "gpt2", size=path.stat().st_size)


def tinystories(folder, cfg):
    paths = {split: folder / f"TinyStoriesV2-GPT4-{file}.txt" for split, file in (("train", "train"), ("val", "valid"))}
    for path in reversed(paths.values()):  # the small one first: trouble shows early
        fetch((cfg.mirror or HUGGING_FACE).rstrip("/") + TINY + path.stem.rpartition("-")[2] + ".txt", path)

    def read():
        for split, path in paths.items():
            for piece in txt_pieces(path, path.stem, "TinyStories", EOT):
                yield piece._replace(split=split)
    return Corpus("tinystories", read, "gpt2", size=sum(path.stat().st_size for path in paths.values()))


def fineweb_edu(folder, cfg):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("fineweb_edu comes as parquet files; run: pip install pyarrow") from None
    if not 1 <= cfg.shards <= 14:
        raise UserError(f"--shards={cfg.shards}: fineweb_edu's sample has 14 files; give 1 to 14")
    paths = [folder / f"{i:03d}_00000.parquet" for i in range(cfg.shards)]
    for i, path in enumerate(paths):
        fetch((cfg.mirror or HUGGING_FACE).rstrip("/") + FINEWEB.format(i), path)

    def read():
        for path in paths:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256, columns=["text", "url"]):
                    for text, url in zip(batch.column("text").to_pylist(), batch.column("url").to_pylist()):
                        if text:
                            yield Piece(True, url or "", urllib.parse.urlsplit(url or "").hostname or "", text)
    return Corpus("fineweb_edu", read, "gpt2", 0.005)


DOWNLOADS = {"tinystories": tinystories, "fineweb_edu": fineweb_edu, "shakespeare": shakespeare}


# ---------------------------------------------------------------------------------------------------------------------
# Held-out text.

def few_lengths(corpus):
    """Characters of each document of a small corpus; None for one of FEW documents or more, of which no more is read."""
    lengths = []
    for piece in corpus.read():
        if piece.split:
            return None
        if piece.first:
            lengths.append(0)
            if len(lengths) == FEW:
                return None
        lengths[-1] += len(piece.text)
    return lengths


def with_splits(corpus, lengths, fraction, seed):
    """The corpus's pieces, each with its split.

    A document is held out where a hash of (seed, its place) falls below `fraction`. With `lengths` (few documents) the
    end of each is held out instead, as a document of its own, cut where the tokenizer cuts.
    """
    place = -1
    for piece in corpus.read():
        place += piece.first
        if lengths is None:
            draw = int.from_bytes(hashlib.sha256(f"{seed}:{place}".encode()).digest()[:8], "big") / 2 ** 64
            yield piece if piece.split else piece._replace(split="val" if draw < fraction else "train")
            continue
        if piece.first:
            at, split, target = 0, "train", int(lengths[place] * (1 - fraction))
        text, cut = piece.text, None
        if split == "train" and at + len(text) > target:
            cuts = [m.end() for m in re.finditer(r"\S(?=[ \t\r\n]+\S)", text)]
            cut = max((c for c in cuts if c <= target - at), default=0 if at else cuts[0] if cuts else None)
        at += len(text)
        if cut is None:
            yield piece._replace(split=split)
        else:
            if cut:
                yield piece._replace(text=text[:cut], split="train")
            split = "val"
            yield piece._replace(text=text[cut:], split="val", first=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def train_bpe(texts, n_tokens):
    """Byte-level BPE: {token's bytes: rank}, 256 single bytes, then one merge a rank, most frequent first.

    A merge is known by the bytes it makes, so that "a" + "bc" and "ab" + "c" are one candidate, as they are one token
    for tiktoken. Ties go to the smaller bytes. Counts follow each merge, only in the words that hold it.
    """
    words = Counter()
    for text in texts:
        words.update(regex.findall(GPT2_PATTERN, text))
    symbols, times = [], []
    for word, n in words.items():
        word = word.encode("utf-8")
        for i in range(0, len(word), 64):  # a very long "word" teaches no more than its stretches, and costs more
            symbols.append([bytes([b]) for b in word[i:i + 64]])
            times.append(n)
    count, where = Counter(), defaultdict(set)  # merged bytes -> occurrences, words that hold it

    def tally(w, sign):
        for pair in map(bytes.__add__, symbols[w], symbols[w][1:]):
            count[pair] += sign * times[w]
            where[pair].add(w)
            touched.add(pair)

    ranks, touched = {bytes([b]): b for b in range(256)}, set()
    for w in range(len(symbols)):
        tally(w, 1)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_tokens:
        n, pair = heapq.heappop(heap)
        if n == 0 or -n != count[pair]:
            continue  # an old entry: the count has changed since, and a newer one stands in the heap
        ranks.setdefault(pair, len(ranks))
        touched = set()
        for w in where.pop(pair):
            tally(w, -1)
            old, new, i = symbols[w], [], 0
            while i < len(old):
                step = 2 if i + 1 < len(old) and old[i] + old[i + 1] == pair else 1
                new.append(pair if step == 2 else old[i])
                i += step
            symbols[w] = new
            tally(w, 1)
        for other in touched:
            heapq.heappush(heap, (-count[other], other))
    return ranks


def make_tokenizer(kind, texts, cfg):
    """A tiktoken.Encoding: gpt2, bpe trained on `texts`, byte, or that of a prepared dataset."""
    if kind == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests' errors, or a wrong hash in the cache
            raise UserError(f"GPT-2's vocabulary cannot be fetched ({type(e).__name__}); connect to the network, point "
                            "TIKTOKEN_CACHE_DIR at a folder that holds it, or train your own: --tokenizer=bpe") from None
    if kind not in ("bpe", "byte"):
        for folder in (Path(kind), data_dir(cfg) / kind):
            if (folder / "tokenizer.json").exists():
                return load_tokenizer(folder)
        raise UserError(f"--tokenizer={kind}: expected gpt2, bpe, byte or the folder of a prepared dataset")
    if kind == "bpe" and cfg.vocab_size <= 257:
        raise UserError(f"--vocab_size={cfg.vocab_size}: bpe needs more than 256 bytes and the end-of-text token; give 258 or more")
    ranks = train_bpe(texts, cfg.vocab_size - 1 if kind == "bpe" else 256)
    if kind == "bpe" and len(ranks) < cfg.vocab_size - 1:
        print(f"the corpus is too small for {cfg.vocab_size} tokens: the vocabulary has {len(ranks) + 1}")
    return tiktoken.Encoding(kind, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def bpe_texts(pieces, limit):
    """The training text, up to `limit` characters."""
    for piece in pieces:
        if limit <= 0:
            return
        if piece.split == "train":
            yield piece.text[:limit]
            limit -= len(piece.text)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and provenance out.

class Hashed:
    """A file opened for writing that knows the sha256 of what went into it."""

    def __init__(self, path):
        self.file, self.sha = open(path, "wb"), hashlib.sha256()

    def write(self, data):
        self.file.write(data)
        self.sha.update(data)

    def close(self):
        """Flushes to the disk; returns the sha256 in hex."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.sha.hexdigest()


def batches(pieces, size=BLOCK):
    """Lists of pieces of about `size` characters."""
    batch, n = [], 0
    for piece in pieces:
        batch.append(piece)
        n += len(piece.text)
        if n >= size:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


def in_order(pool, job, items, ahead):
    """Yields (item, job(item)) in order, with at most `ahead` items in the works: memory stays flat."""
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(job, item)))
        if len(waiting) >= ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()


def write_tokens(pieces, encoding, folder, workers, size=None):
    """Tokenises `pieces` into train.bin, val.bin and docs.json in `folder`; returns meta.json's counts and hashes."""
    dtype = np.dtype("uint16" if encoding.n_vocab <= 65536 else "uint32")
    eot = np.array(encoding.eot_token, dtype).tobytes()
    files = {"train": Hashed(folder / "train.bin"), "val": Hashed(folder / "val.bin"), "docs": Hashed(folder / "docs.json")}
    totals = {"train": {"tokens": 0, "documents": 0}, "val": {"tokens": 0, "documents": 0}}
    characters, sources, row, out = 0, set(), None, {}

    def job(batch):  # tiktoken lets go of the interpreter's lock, so threads run side by side
        return [encoding.encode_to_numpy(p.text, disallowed_special=()).astype(dtype).tobytes() for p in batch]

    def finish(row):
        out[row["split"]].append(eot)
        row["length"] += 1
        files["docs"].write(("[\n" if not len(sources) else ",\n").encode() + json.dumps(row, ensure_ascii=False).encode("utf-8"))
        sources.add(row["source"])
        totals[row["split"]]["tokens"] += row["length"]
        totals[row["split"]]["documents"] += 1

    with ThreadPoolExecutor(workers) as pool, tqdm(total=size, unit="B", unit_scale=True, desc="tokens", disable=None) as bar:
        for batch, tokens in in_order(pool, job, batches(pieces), 4 * workers):
            out = {"train": [], "val": []}
            for piece, data in zip(batch, tokens):
                if piece.first:
                    if row:
                        finish(row)
                    row = {"split": piece.split, "start": totals[piece.split]["tokens"], "length": 0,
                           "source": piece.source, "title": piece.title}
                out[row["split"]].append(data)
                row["length"] += len(data) // dtype.itemsize
                characters += len(piece.text)
                bar.update(len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8")))
            for split in out:
                files[split].write(b"".join(out[split]))
        out = {"train": [], "val": []}
        if row:
            finish(row)
        for split in out:
            files[split].write(b"".join(out[split]))
        files["docs"].write(b"\n]\n")
    sha256 = {name: files[key].close() for name, key in (("train.bin", "train"), ("val.bin", "val"), ("docs.json", "docs"))}
    return {"dtype": dtype.name, **totals, "characters": characters, "sha256": sha256}, len(sources)


def write_tokenizer(encoding, folder):
    """tokenizer.json and tokenizer.tiktoken, as prism.load_tokenizer reads them; returns the latter's sha256."""
    about = {"name": encoding.name, "pattern": encoding._pat_str, "eot": encoding.eot_token, "n_vocab": encoding.n_vocab}
    (folder / "tokenizer.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", "utf-8")
    file = Hashed(folder / "tokenizer.tiktoken")
    for piece, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        file.write(base64.b64encode(piece) + f" {rank}\n".encode())
    return file.close()


def data_dir(cfg):
    return Path(cfg.data_dir) if cfg.data_dir else Path(__file__).resolve().parent


def find_corpus(words, cfg):
    """The corpus that the words name. Returns it with the folder that it will be prepared in."""
    known = {"pydoc", *DOWNLOADS} & set(words)
    if known and len(words) > 1:
        raise UserError(f"{known.pop()} stands alone; found {' '.join(words)}")
    corpus = None if known else own_corpus(words, cfg.separator)
    name = cfg.name or (words[0] if known else corpus.name)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in ("prepare", ".", ".."):
        raise UserError(f"'{name}' cannot name a dataset: give --name=NAME of letters, digits, _ . - (and not 'prepare')")
    folder = data_dir(cfg) / name
    if words == ["pydoc"]:
        corpus = Corpus("pydoc", pydoc_pieces)
    elif known:
        corpus = DOWNLOADS[words[0]](folder / "download", cfg)
    return corpus, folder


def prepare(words, cfg, command=""):
    """Prepares the corpus that `words` name; returns its meta.json as a dict. A dataset of that name is replaced at the end."""
    start = time.time()
    corpus, folder = find_corpus(words, cfg)
    fraction = cfg.val_fraction or corpus.val_fraction
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction={cfg.val_fraction}: expected more than 0 and less than 1")
    lengths = few_lengths(corpus)
    if lengths == []:
        raise UserError(f"no text in {' '.join(words)}; expected at least one document with text")
    if lengths:
        print(f"{len(lengths)} document{'s' * (len(lengths) > 1)}, fewer than {FEW}: the last {fraction:.1%} of each is held out")
    pieces = lambda: with_splits(corpus, lengths, fraction, cfg.seed)
    encoding = make_tokenizer(cfg.tokenizer or corpus.tokenizer, bpe_texts(pieces(), cfg.bpe_chars), cfg)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            new = Path(new)
            meta, n_sources = write_tokens(pieces(), encoding, new, cfg.workers or len(os.sched_getaffinity(0)), corpus.size)
            for split in ("train", "val"):
                if not meta[split]["documents"]:
                    raise UserError(f"no document fell to {split} of {meta['train']['documents'] + meta['val']['documents']}; "
                                    "give more text or another --val_fraction")
            meta["sha256"]["tokenizer.tiktoken"] = write_tokenizer(encoding, new)
            meta = {"format": 1, "name": folder.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                    "tokenizer": encoding.name, **meta, "command": command}
            (new / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", "utf-8")
            for file in ("train.bin", "val.bin", "docs.json", "tokenizer.tiktoken", "tokenizer.json", "meta.json"):
                os.replace(new / file, folder / file)
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    print(f"{'':10}{'documents':>12}{'tokens':>16}")
    for split in ("train", "val"):
        print(f"{split:10}{meta[split]['documents']:12,}{meta[split]['tokens']:16,}")
    print(f"{meta['characters'] / tokens:.2f} characters a token ({encoding.name}, {encoding.n_vocab:,} tokens), "
          f"{n_sources:,} sources, {time.time() - start:.1f} s, in {folder}")
    print(f"next: python train.py --dataset={folder.name}")
    return meta


def main(argv):
    options = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")] or ["pydoc"]
    try:
        prepare(words, parse_config(PrepareConfig, options), shlex.join(["python", "data/prepare.py", *argv]))
    except OSError as e:
        raise UserError(f"{e.filename or 'writing'}: {e.strerror or e}; nothing was changed") from None
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was changed") from None


if __name__ == "__main__":
    run_main(main)
