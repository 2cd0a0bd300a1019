"""Documents in, tokens and provenance out: text becomes data/<name>/, which train.py and attribute.py read.

    python data/prepare.py                                  # pydoc: Python's own documentation, offline, in seconds
    python data/prepare.py books/ --name=books              # .txt and .jsonl files, or folders of them
    python data/prepare.py notes.txt --separator='---'      # one file that holds many documents
    python data/prepare.py shakespeare                      # a download; so are tinystories and fineweb_edu
    python data/prepare.py fineweb_edu --shards=14          # needs: pip install pyarrow
    python data/prepare.py cloze --dataset=pydoc            # multiple-choice tasks of tasks.py; so are hellaswag, arc, piqa,
                                                            # boolq, openbookqa, winogrande; options: cloze --help

A .jsonl line is {"text": "...", "title": "...", "source": "..."}, the last two optional. What is written:

    train.bin, val.bin      tokens, uint16 (uint32 above 65,536); every document is followed by one end-of-text token
    docs.json               one row a document: {"split", "start", "length", "source", "title"}; length counts the
                            end-of-text token, so tokens[start : start + length - 1] decode to the document's text
    tokenizer.tiktoken      a token a line: its bytes in base64, its rank;  tokenizer.json: name, pattern, eot, n_vocab
    meta.json               counts, dtype and the sha256 of each file; written last: where it is, the rest is too

Memory stays flat however large the corpus is.
"""
import ast, base64, codecs, contextlib, errno, functools, hashlib, heapq, http.client, itertools, json, os, re, shlex
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
    name: str = ""                # the dataset's name; default: the corpus's, or the stem of the one file or folder given
    tokenizer: str = ""           # gpt2, byte, bpe (trained on the corpus) or a prepared dataset; default: bpe, downloads gpt2
    vocab_size: int = 4096        # tokens of a trained bpe, the end-of-text token included
    bpe_chars: int = 50_000_000   # bpe is trained on at most so many characters of the training documents
    val_fraction: float = 0.0     # share held out; 0 takes the corpus's own (0.1; fineweb_edu 0.005)
    separator: str = ""           # text between the documents of a .txt file; none: one document a file
    shards: int = 1               # fineweb_edu: how many of its 14 files of about 2 GB
    mirror: str = ""              # downloads: address that stands in for the site's (https://huggingface.co, ...)
    seed: int = 1337              # which documents are held out is a function of (seed, the document's place)
    workers: int = 0              # threads that tokenise; 0: one a core
    data_dir: str = ""            # the dataset goes to <data_dir>/<name>; default: the folder of this script


# ----------------------------------------------------------------------------- documents
# A corpus is a stream of pieces that can be read again. A document may be larger than memory.

EOT = "<|endoftext|>"
BLOCK = 1 << 20    # bytes read at once; about the size of a piece of a long document and of a batch of short ones
LONGEST = 1 << 22  # characters without a blank after which a piece is cut all the same


class Piece(NamedTuple):
    """A stretch of a document: up to the next `first`, the pieces belong to the same one."""
    first: bool
    title: str
    source: str
    text: str
    split: str = ""  # "train" or "val" where the corpus comes with a held-out file of its own


class Corpus(NamedTuple):
    read: Callable           # () -> iterator of pieces, the same ones each time
    tokenizer: str = "bpe"
    val_fraction: float = 0.1
    size: int | None = None  # bytes, about the number of characters: for the progress bar


@functools.cache
def pydoc_pieces():
    """Python's language reference, a document a topic; then its library's docstrings, a document a module."""
    from pydoc_data.topics import topics
    pieces = [Piece(True, f"topics/{name}", "language reference", topics[name]) for name in sorted(topics)]
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(set(inner) - skipped)
        for path in sorted(Path(folder) / file for file in files if file.endswith(".py")):
            *package, last = path.relative_to(root).with_suffix("").parts
            name = ".".join(package if last == "__init__" else [*package, last])
            try:
                with warnings.catch_warnings(action="ignore"):
                    text = "\n\n".join(docstrings(ast.parse(path.read_bytes()), name))
            except (SyntaxError, ValueError):
                continue
            if len(text) >= 200:  # less says next to nothing: a hundred codecs differ in a number alone
                pieces.append(Piece(True, name, name.split(".")[0].lstrip("_"), text + "\n"))
    return pieces


def docstrings(node, name):
    """Yields each docstring under the name it belongs to, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
        yield f"{name}\n\n{ast.get_docstring(node).strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") else name)
        elif isinstance(child, ast.ExceptHandler):
            yield from docstrings(child, name)


def txt_pieces(path, title, source, separator=""):
    """Streams a text file of any size in pieces whose tokens are those of the whole; line ends stay as they are.

    GPT-2's pattern always ends a token where a non-blank is followed by a blank, so pieces are cut there. With a
    `separator`, the documents between them lose the blanks around them and are numbered; empty ones vanish.
    Raises UserError at a byte that is no UTF-8.
    """
    boundary = re.compile(r".*\S(?=[ \t\r\n])", re.S)  # greedy: the last place
    decoder, tail, read, number, first = codecs.getincrementaldecoder("utf-8")(), "", 0, 1, True

    def piece(text):
        return Piece(first, f"{title}#{number}" if separator else title, source, text)

    with open(path, "rb") as f:
        for block in itertools.chain(iter(lambda: f.read(BLOCK), b""), [b""]):
            begin, read = read - len(decoder.getstate()[0]), read + len(block)
            try:
                tail += decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: byte {begin + e.start} is no UTF-8; convert the file, for instance with "
                                "iconv -f latin1 -t utf-8") from None
            *whole, tail = tail.split(separator) if separator else [tail]
            if not block:
                whole, tail = [*whole, tail], ""
            for text in whole:  # each ends a document
                text = text if not separator else text.strip() if first else text.rstrip()
                if text:
                    yield piece(text)
                number, first = number + bool(text or not first), True
            if len(tail) >= BLOCK // 2:
                end = len(tail) - len(separator)  # behind it may stand the head of a separator
                cut = boundary.match(tail, 0, max(end + 1, 0))
                at = cut.end() if cut else end if len(tail) > LONGEST else 0
                text, tail = tail[:at], tail[at:]
                text = text.lstrip() if separator and first else text
                if text:
                    yield piece(text)
                    first = False


def jsonl_pieces(path, title, source):
    """A document a line. Raises UserError, naming file and line, for what is no document."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where, expected = f"{path}:{number}", 'expected {"text": "...", "title": "...", "source": "..."} in UTF-8'
            try:
                row = json.loads(line.decode("utf-8"))
                piece = Piece(True, row.get("title") or f"{title}#{number}", row.get("source") or source, row["text"])
                "".join(piece[1:4]).encode("utf-8")
            except UnicodeEncodeError as e:
                raise UserError(f"{where}: \\u{ord(e.object[e.start]):04x}, half a surrogate pair, is no character") from None
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where}: {e}; {expected}") from None
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"{where}: found {line[:60].decode('utf-8', 'replace').strip()}; {expected}") from None
            if piece.text:
                yield piece


def own_corpus(words, separator):
    """The .txt and .jsonl files that `words` name, and those in the folders that they name, sorted."""
    files = []  # (path, title)
    for path in map(Path, words):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
            if not found:
                raise UserError(f"{path}: no .txt or .jsonl file in this folder")
            files += [(p, p.relative_to(path).as_posix()) for p in found]
        elif not path.exists():
            raise UserError(f"'{path}' is no file, no folder and no known corpus ({', '.join(SOURCES)})")
        elif path.suffix not in (".txt", ".jsonl"):
            raise UserError(f"{path}: expected a .txt or a .jsonl file, or a folder of them; rename plain text to .txt")
        else:
            files.append((path, path.name))
    for path, _ in files:
        if not path.stat().st_size:
            print(f"{path} is empty: skipped", file=sys.stderr)

    def read():
        for path, title in files:
            yield from jsonl_pieces(path, title, path.stem) if path.suffix == ".jsonl" else \
                txt_pieces(path, title, path.stem, separator)
    return Corpus(read, size=sum(path.stat().st_size for path, _ in files))


# ----------------------------------------------------------------------------- downloads

ATTEMPTS, WAIT = 5, 1.0  # attempts in a row that bring nothing new; seconds after the first, doubled each time


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: Hugging Face announces a file's size and sha256 only there."""

    def __init__(self):
        self.headers = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.headers |= {k.lower(): v for k, v in headers.items()}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def transfer(url, part):
    """One attempt, from where `part` ends. Returns the bytes that the answer makes in all (or None) and every header."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "prism", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    redirects = Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise
        answer = e  # nothing lies behind `have`: complete, or not this file's part
    with answer:
        got = {k.lower(): v for k, v in answer.headers.items()}
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", got.get("content-range", ""))
        resumed = answer.status == 206 and span and span[1] and int(span[1]) == have
        total = span[2] if span else got.get("content-length")
        total = int(total) if total else None
        if answer.status == 416 and have != total or answer.status == 206 and not resumed:
            part.unlink()
            raise OSError("the server cannot go on where the download broke: from the start")
        if answer.status != 416:
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab" if resumed else "wb") as f, tqdm(
                    total=total, initial=f.tell(), unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
                while block := answer.read(BLOCK):
                    f.write(block)
                    bar.update(len(block))
        return total, redirects.headers | got


def fetch(url, path, sha256=""):
    """Downloads `url` to `path` unless it is there; a broken download goes on where it stopped.

    Raises UserError where the server refuses, keeps breaking off, or sends another size or sha256 than announced.
    """
    part, failures = path.with_name(path.name + ".part"), 0
    size = lambda: part.stat().st_size if part.exists() else 0
    while not path.exists():
        before = size()
        try:
            total, headers = transfer(url, part)
            problem = "" if total in (None, size()) else f"{size():,} of {total:,} bytes arrived"
        except urllib.error.HTTPError as e:
            problem = f"the server answers {e.code} {e.reason}"
            if e.code < 500 and e.code not in (408, 429):
                raise UserError(f"{url}: {problem}; if the file has moved, name a copy's site with --mirror=URL") from None
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) == errno.ENOSPC:
                raise
            problem = str(getattr(e, "reason", e)) or type(e).__name__
        if problem:
            failures = 0 if size() > before else failures + 1
            if failures == ATTEMPTS:
                raise UserError(f"{url}: {problem}; the same command tries again and resumes, --mirror=URL asks another server")
            time.sleep(WAIT * 2 ** max(failures - 1, 0))
            continue
        announced = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("x-linked-etag", ""))
        expected = sha256 or (announced[1] if announced else "")
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        wrong = f"{size():,} bytes" if str(size()) != headers.get("x-linked-size", str(size())) else \
            f"sha256 {found}" if expected not in ("", found) else ""
        if wrong:
            part.unlink()
            raise UserError(f"{url}: {wrong} arrived, expected {headers.get('x-linked-size', '?')} bytes, sha256 "
                            f"{expected or '?'}; what arrived is removed: run the command again, or name another --mirror=URL")
        os.replace(part, path)


def shakespeare(folder, cfg):
    path = folder / "tinyshakespeare.txt"
    fetch((cfg.mirror or "https://raw.githubusercontent.com").rstrip("/") + "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
          path, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
    return Corpus(lambda: txt_pieces(path, path.name, "shakespeare"), "gpt2", size=path.stat().st_size)


def hugging_face(cfg, dataset, file, folder):
    """A file of a dataset there, downloaded; returns its path."""
    path = folder / file.rpartition("/")[2]
    fetch(f"{(cfg.mirror or 'https://huggingface.co').rstrip('/')}/datasets/{dataset}/resolve/main/{file}", path)
    return path


def tinystories(folder, cfg):
    val, train = (hugging_face(cfg, "roneneldan/TinyStories", f"TinyStoriesV2-GPT4-{split}.txt", folder) for split in ("valid", "train"))

    def read():
        for split, path in (("train", train), ("val", val)):
            yield from (piece._replace(split=split) for piece in txt_pieces(path, path.stem, "TinyStories", EOT))
    return Corpus(read, "gpt2", size=train.stat().st_size + val.stat().st_size)


def fineweb_edu(folder, cfg):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("fineweb_edu comes as parquet files; run: pip install pyarrow") from None
    if not 1 <= cfg.shards <= 14:
        raise UserError(f"--shards={cfg.shards}: fineweb_edu's sample has 14 files; give 1 to 14")
    paths = [hugging_face(cfg, "HuggingFaceFW/fineweb-edu", f"sample/10BT/{i:03d}_00000.parquet", folder) for i in range(cfg.shards)]

    def read():
        for path in paths:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text", "url"]):
                for row in batch.to_pylist():
                    if row["text"]:
                        yield Piece(True, row["url"], urllib.parse.urlsplit(row["url"]).hostname or "", row["text"])
    return Corpus(read, "gpt2", 0.005)


SOURCES = {"pydoc": lambda folder, cfg: Corpus(pydoc_pieces), "shakespeare": shakespeare,
           "tinystories": tinystories, "fineweb_edu": fineweb_edu}


# ----------------------------------------------------------------------------- held-out text

FEW = 100  # a corpus of fewer documents is split inside them: whole ones would hold out few sources or none


def few_lengths(corpus):
    """Characters of each document of a small corpus; None for a corpus of FEW or more, or with a held-out file."""
    lengths = []
    for piece in corpus.read():
        if piece.first:
            lengths.append(0)
        lengths[-1] += len(piece.text)
        if piece.split or len(lengths) == FEW:
            return None
    return lengths


def with_splits(corpus, lengths, fraction, seed):
    """Yields the corpus's pieces with their split.

    A document is held out where a hash of (seed, its place) falls below `fraction`. With `lengths` (few documents) the
    end of each is held out instead, as a document of its own, cut where the tokenizer cuts.
    """
    place, split, at = -1, "", 0
    for piece in corpus.read():
        if piece.first:
            place, split, at = place + 1, piece.split or "train", 0
            draw = int.from_bytes(hashlib.sha256(f"{seed}:{place}".encode()).digest()[:8], "big") / 2 ** 64
            if lengths is None and not piece.split and draw < fraction:
                split = "val"
        if lengths and split == "train" and (target := int(lengths[place] * (1 - fraction)) - at) < len(piece.text):
            cuts = [0] * (at > 0) + [m.end() for m in re.finditer(r"\S(?=[ \t\r\n]+\S)", piece.text)]
            if cuts:  # the last one before the target, else the first: a document of one word stays whole
                cut = max((c for c in cuts if c <= target), default=cuts[0])
                if cut:
                    yield piece._replace(split="train", text=piece.text[:cut])
                split, at = "val", at + cut
                piece = piece._replace(first=True, text=piece.text[cut:])
        yield piece._replace(split=split)
        at += len(piece.text)


# ----------------------------------------------------------------------------- tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def train_bpe(texts, n_tokens):
    """Byte-level BPE: {token's bytes: rank}, 256 single bytes, then a merge a rank, the most frequent first.

    A merge is known by the bytes it makes: "a" + "bc" and "ab" + "c" are one, as they are one token. Ties go to the
    smaller bytes. Counts follow each merge, in the words that hold it alone.
    """
    words = Counter()
    for text in texts:
        words.update(regex.findall(GPT2_PATTERN, text))
    symbols, times = [], []
    for word, n in words.most_common(100_000):  # nearly all of any text; rarer ones would only cost memory
        word = word.encode("utf-8")
        for i in range(0, len(word), 64):  # an endless "word" teaches no more than its stretches, and costs more
            symbols.append([bytes([b]) for b in word[i:i + 64]])
            times.append(n)
    ranks, count, where, touched = {bytes([b]): b for b in range(256)}, Counter(), defaultdict(set), set()

    def tally(w, sign):
        for pair in map(bytes.__add__, symbols[w], symbols[w][1:]):
            count[pair] += sign * times[w]
            where[pair].add(w)  # may outlive the pair in this word: merging there again changes nothing
            touched.add(pair)

    for w in range(len(symbols)):
        tally(w, 1)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_tokens:
        n, pair = heapq.heappop(heap)
        if n == 0 or -n != count[pair]:
            continue  # an old entry: the pair's count has changed, and a newer one stands in the heap
        ranks[pair] = len(ranks)  # never seen before: what makes these bytes merged everywhere at once
        touched.clear()
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


def make_tokenizer(kind, pieces, cfg):
    """A tiktoken.Encoding: gpt2, byte, bpe trained on the training part of `pieces`, or that of a prepared dataset."""
    if kind == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # tiktoken downloads it: whatever requests raises, or a wrong hash in the cache
            raise UserError(f"GPT-2's vocabulary cannot be had ({type(e).__name__}): connect to the network, or point "
                            "TIKTOKEN_CACHE_DIR at a folder that holds it, or train your own with --tokenizer=bpe") from None
    if kind not in ("bpe", "byte"):
        for folder in (Path(kind), data_dir(cfg) / kind):
            if (folder / "tokenizer.json").exists():
                return load_tokenizer(folder)
        raise UserError(f"--tokenizer={kind}: expected gpt2, byte, bpe or the folder of a prepared dataset")
    if kind == "bpe" and cfg.vocab_size < 258:
        raise UserError(f"--vocab_size={cfg.vocab_size}: 256 bytes, one merge and the end-of-text token make 258; give as many")

    def texts(left=cfg.bpe_chars):
        for piece in pieces:
            if left <= 0:
                return
            if piece.split == "train":
                yield piece.text[:left]
                left -= len(piece.text)

    ranks = train_bpe(texts() if kind == "bpe" else [], cfg.vocab_size - 1)
    if kind == "bpe" and len(ranks) < cfg.vocab_size - 1:
        print(f"the corpus is too small for {cfg.vocab_size} tokens: the vocabulary has {len(ranks) + 1}")
    return tiktoken.Encoding(kind, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


# ----------------------------------------------------------------------------- tokens and provenance out

def batches(pieces):
    """Lists of pieces of about BLOCK characters."""
    batch, n = [], 0
    for piece in pieces:
        batch.append(piece)
        n += len(piece.text)
        if n >= BLOCK:
            yield batch
            batch, n = [], 0
    yield batch


def in_order(pool, job, items, ahead):
    """Yields (item, job(item)) in order, at most `ahead` of them under way: Pool.imap would read on without end."""
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(job, item)))
        if len(waiting) == ahead:
            yield waiting[0][0], waiting.popleft()[1].result()
    while waiting:
        yield waiting[0][0], waiting.popleft()[1].result()


def write_tokens(pieces, encoding, folder, workers, size=None):
    """Tokenises `pieces` into train.bin, val.bin and docs.json in `folder`. Returns part of meta.json, number of sources."""
    dtype = np.dtype("uint16" if encoding.n_vocab <= 65536 else "uint32")
    names = ("train.bin", "val.bin", "docs.json")
    hashes = {name: hashlib.sha256() for name in names}
    totals = {split: {"tokens": 0, "documents": 0} for split in ("train", "val")}
    characters, sources, row = 0, set(), None

    def tokenise(batch):  # tiktoken lets go of the interpreter's lock: threads, as fast as processes, and nothing to copy
        try:
            return [encoding.encode_to_numpy(piece.text, disallowed_special=()).astype(dtype) for piece in batch]
        except ValueError as e:  # its regular expressions have a limit, about half a million blanks in a row
            raise UserError(f"in or after '{batch[0].title}': text that cannot be split ({e}); is there a very long run of blanks?") from None

    def put(name, data):
        files[name].write(data)
        hashes[name].update(data)

    def plain(name):  # a file name may hold bytes that are no UTF-8
        return os.fsencode(name).decode("utf-8", "replace") if any("\udc80" <= c <= "\udcff" for c in name) else name

    def add(tokens):
        put(f"{row['split']}.bin", tokens)
        totals[row["split"]]["tokens"] += len(tokens)
        row["length"] += len(tokens)

    def finish():
        add(np.array([encoding.eot_token], dtype))
        put("docs.json", (",\n" if sources else "[\n").encode() + json.dumps(row, ensure_ascii=False).encode("utf-8"))
        totals[row["split"]]["documents"] += 1
        sources.add(row["source"])

    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        bar = stack.enter_context(tqdm(total=size, unit="char", unit_scale=True, disable=None))
        for batch, arrays in in_order(pool, tokenise, batches(pieces), 4 * workers):
            for piece, tokens in zip(batch, arrays):
                if piece.first:
                    if row:
                        finish()
                    row = {"split": piece.split, "start": totals[piece.split]["tokens"], "length": 0,
                           "source": plain(piece.source), "title": plain(piece.title)}
                add(tokens)
                characters += len(piece.text)
                bar.update(len(piece.text))
        finish()
        put("docs.json", b"\n]\n")
    sha256 = {name: hashes[name].hexdigest() for name in names}
    return {"dtype": dtype.name, **totals, "characters": characters, "sha256": sha256}, len(sources)


def write_tokenizer(encoding, folder):
    """tokenizer.json and tokenizer.tiktoken, as prism.load_tokenizer reads them. Returns the latter's sha256."""
    about = {"name": encoding.name, "pattern": encoding._pat_str, "eot": encoding.eot_token, "n_vocab": encoding.n_vocab}
    (folder / "tokenizer.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", "utf-8")
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    data = b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for piece, rank in ranks)
    (folder / "tokenizer.tiktoken").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def data_dir(cfg):
    return Path(cfg.data_dir or Path(__file__).resolve().parent)


def find_corpus(words, cfg):
    """The corpus that `words` name, and the folder of its dataset."""
    known = set(words) & set(SOURCES)
    if known and len(words) > 1:
        raise UserError(f"{known.pop()} goes alone; found: {' '.join(words)}")
    stem = Path(words[0]).resolve().name if Path(words[0]).is_dir() else Path(words[0]).stem
    name = cfg.name or (stem if len(words) == 1 else "")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", "..", "prepare"):
        raise UserError(f"'{name}' cannot name a dataset; give --name=NAME: letters, digits, _ . - (but not 'prepare')")
    if name in SOURCES and not known:
        raise UserError(f"'{name}' is the name of a corpus of its own; give your text another: --name=NAME")
    folder = data_dir(cfg) / name
    return SOURCES[words[0]](folder / "download", cfg) if known else own_corpus(words, cfg.separator), folder


def prepare(words, cfg, command=""):
    """Prepares the corpus that `words` name. Returns what meta.json holds. An older dataset of the name stays until the end."""
    start = time.time()
    corpus, folder = find_corpus(words, cfg)
    fraction = cfg.val_fraction or corpus.val_fraction
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction={cfg.val_fraction}: expected more than 0 and less than 1")
    for option, least in (("workers", 0), ("bpe_chars", 1), ("shards", 1)):
        if getattr(cfg, option) < least:
            raise UserError(f"--{option}={getattr(cfg, option)}: expected at least {least}")
    lengths = few_lengths(corpus)
    if lengths == []:
        raise UserError(f"{' '.join(words)}: no text; expected at least one document with text")
    if lengths:
        print(f"documents: {len(lengths)}, fewer than {FEW}: of each, the last {fraction:.1%} is held out")
    encoding = make_tokenizer(cfg.tokenizer or corpus.tokenizer, with_splits(corpus, lengths, fraction, cfg.seed), cfg)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            new = Path(new)
            counts, n_sources = write_tokens(with_splits(corpus, lengths, fraction, cfg.seed), encoding, new,
                                             cfg.workers or os.cpu_count(), corpus.size)
            for split in ("train", "val"):
                if not counts[split]["documents"]:
                    raise UserError(f"no text for {split}: too little, or --val_fraction={fraction} does not suit it")
            meta = {"format": 1, "name": folder.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                    "tokenizer": encoding.name, **counts, "command": command.encode("utf-8", "replace").decode()}
            meta["sha256"]["tokenizer.tiktoken"] = write_tokenizer(encoding, new)
            (new / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", "utf-8")
            for name in (names := ("train.bin", "val.bin", "docs.json", "tokenizer.tiktoken", "tokenizer.json", "meta.json")):
                with open(new / name, "rb+") as f:
                    os.fsync(f.fileno())
            for name in names:
                os.replace(new / name, folder / name)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    print(f"{'':8}{'documents':>12}{'tokens':>16}")
    for split in ("train", "val"):
        print(f"{split:8}{meta[split]['documents']:12,}{meta[split]['tokens']:16,}")
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    print(f"{meta['characters'] / tokens:.2f} characters a token ({encoding.name}, {encoding.n_vocab:,} tokens), "
          f"{n_sources:,} sources, {time.time() - start:.1f} s, in {os.path.relpath(folder)}")
    print(f"next: python train.py --dataset={folder.name}")
    return meta


def main(argv):
    options = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")] or ["pydoc"]
    import tasks  # only now: it imports this file
    try:
        if argv[:1] and argv[0] in tasks.TASKS:
            return tasks.main(argv)
        prepare(words, parse_config(PrepareConfig, options), shlex.join(["python", "data/prepare.py", *argv]))
    except (OSError, UnicodeError) as e:
        if isinstance(e, UnicodeError):
            raise UserError(f"a name that is no UTF-8 ({e}); rename it") from None
        raise UserError(f"{e.filename or 'writing'}: {e.strerror or e}; nothing was changed") from None
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was changed") from None


if __name__ == "__main__":
    run_main(main)
