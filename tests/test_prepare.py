"""data/prepare.py against plain references: a BPE that recounts everything, text read back from
the tokens, and a stand-in for the package that downloads."""
import hashlib
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare  # noqa: E402
from common import UserError, load_tokenizer  # noqa: E402
from prepare import BLOCK, EOT, GPT2_PATTERN, Document, PrepareConfig  # noqa: E402

NASTY = ["", " ", "\n\n", "plain text", "e\u0301a\u0308 combining", "👩‍👩‍👧 🏳️‍🌈 🇩🇪",
         "שלום עולם العربية", "\0 nul \x1c\x1f\x85\xa0\u2028", "a\r\nb\rc\n",
         "𝔘𝔫𝔦 𐍈 \U0010ffff \uffff", f"before {EOT} after", f"{EOT}", "日本語、句読点。",
         "\ufeffbom", "  trailing  \t ", "don't I'LL 12,345.6"]


def config(tmp_path, **options):
    return PrepareConfig(**{"data_dir": str(tmp_path / "data"), "vocab_size": 300} | options)


def words(n, seed=0):
    """n words of a small language of 60 words, with line ends."""
    rng = np.random.default_rng(seed)
    letters = list("abcdeé ")
    known = ["".join(rng.choice(letters, rng.integers(1, 7))).strip() or "x" for _ in range(60)]
    text = ""
    for j, i in enumerate(rng.integers(0, 60, n)):
        text += known[i] + "." * (j % 9 == 8) + (" ", "\n")[j % 17 == 16]
    return text


def train_documents(*texts):
    return [Document("title", "source", text, "train") for text in texts]


def encoding(tokens, name="test"):
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=tokens,
                             special_tokens={EOT: len(tokens)})


@pytest.fixture(scope="session")
def local():
    """Stands in for GPT-2's tokenizer, which only the network has."""
    return encoding(prepare.train_bpe(train_documents(words(500)), 350), "gpt2")


def read_back(folder):
    """[(row, text)] from the files; checks that the rows tile both .bin files, and the hashes."""
    meta = json.loads((folder / "meta.json").read_text())
    lines = (folder / "docs.json").read_text("utf-8").splitlines()
    rows, found, ends = json.loads("\n".join(lines)), [], {"train": 0, "val": 0}
    bins = {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ends}
    tokenizer = load_tokenizer(folder)
    for row in rows:
        split = row["split"]
        assert row["start"] == ends[split] and row["length"] >= 1
        ends[split] += row["length"]
        tokens = bins[split][row["start"]:ends[split]]
        assert tokens[-1] == meta["eot"] and meta["eot"] not in tokens[:-1]
        found.append((row, tokenizer.decode_bytes(tokens[:-1].tolist()).decode("utf-8")))
    for split in ends:
        assert ends[split] == len(bins[split]) == meta[split]["tokens"]
        assert meta[split]["documents"] == sum(row["split"] == split for row in rows)
    assert meta["characters"] == sum(len(text) for _, text in found)
    assert set(meta["sha256"]) == {"train.bin", "val.bin", "docs.json", "tokenizer.tiktoken"}
    for name, sha in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha
    assert len(lines) == len(rows) + 2                                  # a row per line
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


# ------------------------------------------- tokenizers

def naive_bpe(text, n_tokens):
    """Recounts every pair before every merge."""
    symbols = []
    for word in regex.findall(GPT2_PATTERN, text):
        symbols.append([bytes([b]) for b in word.encode("utf-8")])
    tokens = {bytes([b]): b for b in range(256)}
    while len(tokens) < n_tokens:
        count = Counter(a + b for word in symbols for a, b in zip(word, word[1:]))
        if not count:
            break
        best = min(count, key=lambda pair: (-count[pair], pair))
        assert best not in tokens
        tokens[best] = len(tokens)
        for w, word in enumerate(symbols):
            merged = []
            while word:
                n = 2 if len(word) > 1 and word[0] + word[1] == best else 1
                merged, word = merged + [b"".join(word[:n])], word[n:]
            symbols[w] = merged
    return tokens


@pytest.mark.parametrize("text, n", [
    (words(1000), 360), (words(200, 1), 10_000), ("aaaa aaaaa aaa abcabc bcabca " * 3, 300),
    ("日本語 日本 語日 👩‍👩‍👧 👩‍👧", 300), ("", 300)])
def test_bpe_equals_the_naive_one(text, n):
    half = len(text) // 2 + text[len(text) // 2:].find(" ")
    found = prepare.train_bpe(train_documents(text[:half], text[half:]), n)
    assert list(found.items()) == list(naive_bpe(text, n).items())


def test_bpe_by_hand():
    """ "ab" 3 times, then " ab" twice, then "abc" once: the counts leave no choice."""
    tokens = prepare.train_bpe(train_documents("ab ab abc"), 300)
    assert list(tokens)[256:] == [b"ab", b" ab", b" abc"]


def test_bpe_of_an_endless_word_ends():
    assert len(prepare.train_bpe(train_documents("=" * 100_000 + "ab1" * 20_000), 300)) <= 300


def test_bpe_shortens_text():
    text = words(3000)
    tokens = prepare.train_bpe(train_documents(text), 340)
    assert len(tokens) == 340
    assert len(encoding(tokens).encode_ordinary(text)) < len(text) / 2


@pytest.mark.parametrize("kind", ["bpe", "byte", "gpt2", "folder"])
def test_every_text_comes_back(tmp_path, monkeypatch, local, kind):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": local}.__getitem__)
    rows = [{"text": text, "title": f"t{i}", "source": f"s{i % 3}"}
            for i, text in enumerate(NASTY * 8)]
    path = jsonl(tmp_path / "nasty.jsonl", rows)
    if kind == "folder":
        prepare.prepare([path], config(tmp_path, name="first", vocab_size=290))
        kind = str(tmp_path / "data" / "first")
    meta = prepare.prepare([path], config(tmp_path, tokenizer=kind))
    found = read_back(tmp_path / "data" / "nasty")
    assert [(row["title"], row["source"], text) for row, text in found] == [
        (row["title"], row["source"], row["text"]) for row in rows if row["text"]]
    assert meta["vocab_size"] == {"bpe": 300, "byte": 257, "gpt2": local.n_vocab}.get(kind, 290)
    assert meta["tokenizer"] == (kind if kind in ("bpe", "byte", "gpt2") else "bpe")


def test_wide_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    many = {bytes([b]): b for b in range(256)}
    many |= {f"{i:05d}".encode(): 256 + i for i in range(65_300)}
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding(many, name))
    (tmp_path / "a.txt").write_text("wide words " * 30)
    meta = prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path, tokenizer="gpt2"))
    assert (meta["dtype"], meta["eot"]) == ("uint32", 65_556)
    texts = [text for _, text in read_back(tmp_path / "data" / "a")]
    assert "".join(texts) == "wide words " * 30


def test_bpe_learns_from_a_bounded_part_of_the_training_text(tmp_path, monkeypatch):
    def learned(name, rows):
        prepare.prepare([jsonl(tmp_path / f"{name}.jsonl", rows)], config(tmp_path))
        return list(load_tokenizer(tmp_path / "data" / name)._mergeable_ranks)[256:]

    rows = [{"text": "zqzq zqzq" if split == "val" else "abab abab"} for split in splits(1337, 120)]
    tokens = learned("a", rows)
    assert tokens and not any(b"z" in token for token in tokens)
    assert any(row["split"] == "val" for row, _ in read_back(tmp_path / "data" / "a"))
    monkeypatch.setattr(prepare, "BPE_CHARS", 100)
    tokens = learned("b", [{"text": "abab" if i < 60 else "xyxy"} for i in range(120)])
    assert tokens and not any(b"x" in token for token in tokens)


# ------------------------------------------- documents and splits

def splits(seed, n, fraction=0.1):
    found = []
    for i in range(n):
        draw = int(hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:16], 16)
        found.append("val" if draw < fraction * 2 ** 64 else "train")
    return found


def test_documents_are_held_out_by_hash(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(300)]
    path = jsonl(tmp_path / "many.jsonl", rows)
    for seed in (1337, 2):
        prepare.prepare([path], config(tmp_path, seed=seed))
        found = read_back(tmp_path / "data" / "many")
        assert [row["split"] for row, _ in found] == splits(seed, 300)
        assert [(row["title"], row["source"], text) for row, text in found] == [
            (f"many.jsonl#{i + 1}", "many", f"document {i}") for i in range(300)]
    assert splits(1337, 300) != splits(2, 300)


@pytest.mark.parametrize("n, inside", [(99, True), (100, False)])
def test_few_documents_are_split_inside(tmp_path, n, inside):
    texts = [words(100, i) for i in range(n)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": t, "title": str(i)} for i, t in enumerate(texts)])
    prepare.prepare([path], config(tmp_path, val_fraction=0.2))
    parts = {str(i): [] for i in range(n)}
    for row, text in read_back(tmp_path / "data" / "a"):
        parts[row["title"]].append((row["split"], text))
    for i, whole in enumerate(texts):
        found = parts[str(i)]
        assert "".join(text for _, text in found) == whole and len(found) == 1 + inside
        if inside:
            (a, head), (b, rest) = found
            assert (a, b) == ("train", "val") and abs(len(rest) / len(whole) - 0.2) < 0.06
            assert not head[-1].isspace() and rest[0].isspace()


def test_the_two_parts_have_the_tokens_of_the_whole(tmp_path):
    text = words(3000) + "\r\n \x1c x\u2003y\u2003\u2003z \x85 w 日本語 " + "=" * 300
    text += "    run   of       blanks\n        " * 40 + "   \t\t\n\n" + words(500, 3) + "\n \n"
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    for fraction in (0.05, 0.15, 0.5, 0.999):
        prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path, val_fraction=fraction))
        assert "".join(part for _, part in read_back(tmp_path / "data" / "a")) == text
        files = [tmp_path / "data/a/train.bin", tmp_path / "data/a/val.bin"]
        parts = [np.fromfile(file, np.uint16)[:-1] for file in files]
        tokens = load_tokenizer(tmp_path / "data" / "a").encode_ordinary(text)
        assert np.concatenate(parts).tolist() == tokens


@pytest.mark.parametrize("block", [7, 64, BLOCK])
@pytest.mark.parametrize("separator", [EOT, "\n\n\n", " -- ", "END OF\nSTORY", "é"])
def test_separators(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(prepare, "BLOCK", block)
    texts = [words(40, i).replace("é", "e").strip() for i in range(5)] + ["x"]
    text = separator + f"\n{separator}\n".join(texts[:3] + [" \n "] + texts[3:])
    (tmp_path / "a.txt").write_text(text + f"\n{separator}\n", newline="")
    found = list(prepare.read_txt(tmp_path / "a.txt", "a.txt", separator))
    assert [document.text for document in found] == texts
    assert [document.title for document in found] == [f"a.txt#{i + 1}" for i in range(6)]
    assert {document.source for document in found} == {"a"}


def test_a_file_may_end_in_the_head_of_a_separator(tmp_path):
    (tmp_path / "a.txt").write_text("one --- two -")
    found = prepare.read_txt(tmp_path / "a.txt", "a.txt", "---")
    assert [document.text for document in found] == ["one", "two -"]


def test_folders_titles_sources_and_line_ends(tmp_path):
    books = tmp_path / "books"
    (books / "inner").mkdir(parents=True)
    texts = {"b.txt": "second\r\nbook \r tail of it", "a.txt": "first book\n\nhere it ends\n",
             "inner/a.txt": "third one of them"}
    for name, text in texts.items():
        (books / name).write_bytes(text.encode())
    jsonl(books / "c.jsonl", [{"text": "a line of its own", "source": "web"},
                              {"text": "another line here", "title": "T", "source": None}])
    (books / "ignored.pdf").write_bytes(b"\xff")
    prepare.prepare([str(books)], config(tmp_path))
    got = {}
    for row, text in read_back(tmp_path / "data" / "books"):
        key = row["title"], row["source"]
        got[key] = got.get(key, "") + text
    assert list(got.items()) == [
        (("a.txt", "a"), texts["a.txt"]), (("b.txt", "b"), texts["b.txt"]),
        (("c.jsonl#1", "web"), "a line of its own"), (("T", "c"), "another line here"),
        (("inner/a.txt", "a"), texts["inner/a.txt"])]


def test_the_bytes_are_those_of_every_run(tmp_path):
    """Pinned hashes: a run finds its text again by the sha256 of train.bin."""
    rows = [{"text": words(100, i), "title": f"é{i}"} for i in range(150)]
    meta = prepare.prepare([jsonl(tmp_path / "a.jsonl", rows)], config(tmp_path, vocab_size=400))
    rows = "".join(words(300, i) + "\n%%\n" for i in range(5))
    (tmp_path / "b.txt").write_text(rows, newline="")
    other = prepare.prepare([str(tmp_path / "b.txt")], config(tmp_path, separator="%%"))
    assert sorted(os.listdir(tmp_path / "data/a")) == [
        "docs.json", "meta.json", "tokenizer.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    assert {name: sha[:12] for name, sha in meta["sha256"].items()} == PINNED_A
    assert {name: sha[:12] for name, sha in other["sha256"].items()} == PINNED_B


PINNED_A = {"train.bin": "90833c1d9631", "val.bin": "79dd3443d11f",
            "docs.json": "b374ef86bb78", "tokenizer.tiktoken": "115df420fce7"}
PINNED_B = {"train.bin": "d30b07b39028", "val.bin": "6b20282da32a",
            "docs.json": "65be50519956", "tokenizer.tiktoken": "574db47d8d60"}


def test_pydoc_reads_as_text():
    documents = list(prepare.pydoc([], None))
    by_title = {document.title: document for document in documents}
    assert len(by_title) == len(documents) > 300
    assert 1.5e6 < sum(len(document.text) for document in documents) < 6e6
    assert by_title["topics/assert"].source == "language reference"
    import asyncio.events as events
    text = by_title["asyncio.events"].text
    assert by_title["asyncio.events"].source == "asyncio"
    assert text.startswith(f"asyncio.events\n\n{events.__doc__.strip()}\n\n")
    when = inspect.getdoc(events.TimerHandle.when).strip()
    assert f"asyncio.events.TimerHandle.when\n\n{when}\n\n" in text
    assert not any(re.search(r"(^|\.)(tests?|idle_test)(\.|$)", title) for title in by_title)
    for document in documents:
        document.text.encode("utf-8")


# ------------------------------------------- what users get wrong

def wrong(tmp_path, *names, match, **options):
    with pytest.raises(UserError, match=match) as e:
        prepare.prepare([str(n) for n in names], config(tmp_path, **options))
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "data").rglob("*.*"))


@pytest.mark.parametrize("line, match", [
    ('{"a":' * 100_000, r"bad.jsonl:2 .*ecursion.*expected"),
    ("{'text': 1}", r"bad.jsonl:2 .*Expecting property name.*expected"),
    ("[1]", r"bad.jsonl:2 .*list.*expected"), ('{"body": "x"}', r"bad.jsonl:2 .*'text'.*expected"),
    ('{"text": 5}', r"bad.jsonl:2 .*int found.*expected"),
    ('{"text": "x", "title": 5}', r"bad.jsonl:2 .*int found.*expected"),
    (r'{"text": "a \ud800 b"}', r"bad.jsonl:2 .*ud800.*surrogates"),
    (r'{"text": "a", "source": "\udc00"}', r"bad.jsonl:2 .*udc00.*surrogates")])
def test_broken_lines(tmp_path, line, match):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    wrong(tmp_path, tmp_path / "bad.jsonl", match=match)


@pytest.mark.parametrize("separator", ["", "%%"])
@pytest.mark.parametrize("at", [0, 5, 63, 64, 1000, 20_001])
def test_bytes_that_are_no_utf8(tmp_path, monkeypatch, at, separator):
    monkeypatch.setattr(prepare, "BLOCK", 64)
    good = ("é " * 10_000).encode()[:3 * (at // 3)] + b"x" * (at % 3)
    for tail in (b"\xff and more", b"\xc3"):
        (tmp_path / "a.txt").write_bytes(good + tail)
        wrong(tmp_path, tmp_path / "a.txt", match=f"a.txt: byte {at} is no UTF-8",
              separator=separator)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    wrong(tmp_path, tmp_path / "a.jsonl", match=r"a.jsonl:1 .*decode byte 0xff in position 10")


def test_empty_and_missing_input(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "word.txt").write_text("word")
    for name in ("empty.txt", "empty.jsonl", "word.txt"):
        wrong(tmp_path, tmp_path / name, match="no text to train on or to hold out")
    for name in ("folder", "nowhere.txt", "a.md"):
        wrong(tmp_path, tmp_path / name, match=f"{name}': expected .txt or .jsonl .*tinystories")
    (tmp_path / "full.txt").write_text("some words to read here")
    names = [str(tmp_path / "empty.txt"), str(tmp_path / "full.txt")]
    prepare.prepare(names, config(tmp_path, name="both"))
    assert len(read_back(tmp_path / "data" / "both")) == 2


def test_bad_options(tmp_path):
    (tmp_path / "a.txt").write_text("some words to read here")
    wrong(tmp_path, tmp_path / "a.txt", tokenizer="nowhere",
          match="--tokenizer=nowhere: expected gpt2, byte, bpe or a dataset")
    with pytest.raises(UserError, match="the nearest is --vocab_size"):
        prepare.main([str(tmp_path / "a.txt"), "--vocab_siz=300"])


def test_names_and_texts_that_break_elsewhere(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt", "w") as f:  # a name that is no UTF-8
        f.write(words(300))
    prepare.prepare([str(tmp_path / "in")], config(tmp_path, name="odd"))
    assert {row["title"] for row, _ in read_back(tmp_path / "data/odd")} == {"caf?.txt"}
    rows = [{"text": "a" + " " * 3_000_000 + "b", "title": "the blank one"}, {"text": "more text"}]
    path = jsonl(tmp_path / "blank.jsonl", rows)
    with pytest.raises(UserError, match="'the blank one'.*run of blanks"):
        prepare.prepare([path], config(tmp_path, tokenizer="byte"))


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_the_old_dataset(tmp_path, monkeypatch, trouble):
    (tmp_path / "a.txt").write_text("some words to read here")
    prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path))
    before = {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()}

    def dumps(*a, **kw):  # the first row of docs.json
        raise trouble
    monkeypatch.setattr(prepare.json, "dumps", dumps)
    for name in ("a", "new"):
        with pytest.raises(type(trouble)):
            prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path, name=name))
    assert {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()} == before
    assert not list((tmp_path / "data").rglob("*.tmp"))


def test_command_line(tmp_path, capsys):
    """As users run it: quiet when piped, one line and status 2 where the disk is full."""
    (tmp_path / "mine.txt").write_text(words(2000))

    def run(*options, **kw):
        command = [sys.executable, ROOT / "data/prepare.py", tmp_path / "mine.txt",
                   f"--data_dir={tmp_path}", "--tokenizer=byte", *options]
        return subprocess.run(command, capture_output=True, text=True, **kw)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("next: python train.py --dataset=mine\n")
    command = json.loads((tmp_path / "mine/meta.json").read_text())["command"]
    assert command.startswith("python data/prepare.py /") and "--tokenizer=byte" in command
    limit = (2000, 2000)
    full = run("--name=full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert full.returncode == 2 and re.fullmatch(r"error: .*File too large.*\n", full.stderr)
    assert not os.listdir(tmp_path / "full")
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["--help"])
    assert "--vocab_size=4096" in capsys.readouterr().out


# ------------------------------------------- downloads, from a folder on this machine

@pytest.fixture
def hub(tmp_path, monkeypatch, local):
    """A folder that stands in for the Hugging Face Hub, and for the package that reads it."""
    def hf_hub_download(repo_id, filename, *, repo_type):
        path = tmp_path / "hub" / repo_id / filename
        assert repo_type == "dataset"
        if not path.exists():
            raise FileNotFoundError("404 Client Error.\n\nEntry Not Found for url")
        return str(path)

    package = types.ModuleType("huggingface_hub")
    package.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": local}.__getitem__)

    def put(name, text):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_text(text)
    return put


def test_tinystories(tmp_path, hub):
    name = "roneneldan/TinyStories/TinyStoriesV2-GPT4-"
    hub(name + "train.txt", f"\nOne day.\nIt ended.\n{EOT}\nTwo days.\n{EOT}")
    wrong(tmp_path, "tinystories", match=r"valid.txt: 404 Client Error.*HF_ENDPOINT")
    hub(name + "valid.txt", f"A third.\n{EOT}\n")
    meta = prepare.prepare(["tinystories"], config(tmp_path, val_fraction=0.9))
    found = read_back(tmp_path / "data/tinystories")
    assert meta["tokenizer"] == "gpt2"
    assert [(row["split"], row["title"], row["source"], text) for row, text in found] == [
        ("train", "TinyStoriesV2-GPT4-train#1", "TinyStories", "One day.\nIt ended."),
        ("train", "TinyStoriesV2-GPT4-train#2", "TinyStories", "Two days."),
        ("val", "TinyStoriesV2-GPT4-valid#1", "TinyStories", "A third.")]


def test_fineweb_edu(tmp_path, hub, monkeypatch):
    """With a stand-in for pyarrow."""
    def iter_batches(self, batch_size, columns):
        assert columns == ["text", "url"]
        for k in (0, 300):
            rows = [{"text": f"page {i} of many", "url": f"https://site{i % 7}.org/{i}"}
                    for i in range(k, k + 300)]
            yield types.SimpleNamespace(to_pylist=lambda: rows)

    parquet = types.ModuleType("pyarrow.parquet")
    parquet.ParquetFile = type("ParquetFile", (), {"__init__": lambda self, path: None,
                                                   "iter_batches": iter_batches})
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    hub("HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet", "PAR1")
    prepare.prepare(["fineweb_edu"], config(tmp_path))
    found = read_back(tmp_path / "data/fineweb_edu")
    assert [row["split"] for row, _ in found] == splits(1337, 600, 0.005)
    assert [(row["title"], row["source"], text) for row, text in found] == [
        (f"https://site{i % 7}.org/{i}", f"site{i % 7}.org", f"page {i} of many")
        for i in range(600)]
    with pytest.raises(UserError, match="001_00000.parquet: 404"):
        prepare.prepare(["fineweb_edu"], config(tmp_path, shards=2))


@pytest.mark.parametrize("corpus, package", [("tinystories", "huggingface_hub"),
                                             ("fineweb_edu", "pyarrow")])
def test_missing_packages_are_named(tmp_path, monkeypatch, corpus, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"run: pip install {package}"):
        prepare.main([corpus, "--tokenizer=bpe", f"--data_dir={tmp_path}"])
    assert not os.listdir(tmp_path)


def test_gpt2_without_a_network(tmp_path, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("unreachable")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    (tmp_path / "a.txt").write_text("some words to read here")
    wrong(tmp_path, tmp_path / "a.txt", tokenizer="gpt2", match="unreachable.*--tokenizer=bpe")
