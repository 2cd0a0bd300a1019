"""data/prepare.py against plain references: BPE that recounts everything, text read back from the tokens, a broken server."""
import hashlib, http.server, inspect, json, os, re, resource, subprocess, sys, threading, types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare
from prepare import BLOCK, EOT, GPT2_PATTERN, PrepareConfig, UserError
from prism import load_tokenizer, parse_config

NASTY = ["", " ", "\n\n", "plain text", "e\u0301a\u0308 combining", "👩‍👩‍👧 🏳️‍🌈 🇩🇪", "שלום עולם العربية", "\0 nul \x1c\x1f\x85\xa0\u2028", "a\r\nb\rc\n",
         "𝔘𝔫𝔦 𐍈 \U0010ffff \uffff", f"before {EOT} after", f"{EOT}", "日本語、句読点。", "\ufeffbom", "  trailing  \t ", "don't I'LL 12,345.6"]


def config(tmp_path, **kw):
    return PrepareConfig(data_dir=str(tmp_path / "data"), **{"vocab_size": 300, "workers": 2} | kw)


def words(n, seed=0):
    """n words of a small made-up language, with line ends."""
    rng = np.random.default_rng(seed)
    known = ["".join(rng.choice(list("abcdeé "), rng.integers(1, 7))).strip() or "x" for _ in range(60)]
    return "".join(f"{known[i]}{'.' if j % 9 == 8 else ''}{chr(10) if j % 17 == 16 else ' '}" for j, i in enumerate(rng.integers(0, 60, n)))


def read_back(folder):
    """[(row, text)] from the files alone; checks that the rows tile both .bin files and that each ends in eot."""
    meta, rows, encoding = json.loads((folder / "meta.json").read_text()), json.loads((folder / "docs.json").read_text("utf-8")), load_tokenizer(folder)
    bins, ends, found = {s: np.fromfile(folder / f"{s}.bin", meta["dtype"]) for s in ("train", "val")}, {"train": 0, "val": 0}, []
    for row in rows:
        assert row["start"] == ends[row["split"]] and row["length"] >= 1
        ends[row["split"]] += row["length"]
        tokens = bins[row["split"]][row["start"]:ends[row["split"]]]
        assert tokens[-1] == meta["eot"] and meta["eot"] not in tokens[:-1]
        found.append((row, encoding.decode_bytes(tokens[:-1].tolist()).decode("utf-8")))
    for split in ends:
        assert ends[split] == len(bins[split]) == meta[split]["tokens"]
        assert meta[split]["documents"] == sum(row["split"] == split for row in rows)
    assert meta["characters"] == sum(len(text) for _, text in found)
    assert set(meta["sha256"]) == {"train.bin", "val.bin", "docs.json", "tokenizer.tiktoken"}
    for name, sha in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha
    assert len((folder / "docs.json").read_text("utf-8").splitlines()) == len(rows) + 2  # a row a line
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


# ----------------------------------------------------------------------------- tokenizers

def naive_bpe(text, n_tokens):
    """Recounts every pair before every merge."""
    symbols = [[bytes([b]) for b in word.encode("utf-8")] for word in regex.findall(GPT2_PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n_tokens:
        count = Counter(a + b for word in symbols for a, b in zip(word, word[1:]))
        if not count:
            break
        best = min(count, key=lambda pair: (-count[pair], pair))
        assert best not in ranks
        ranks[best] = len(ranks)
        for w, word in enumerate(symbols):
            merged = []
            while word:
                n = 2 if len(word) > 1 and word[0] + word[1] == best else 1
                merged, word = merged + [b"".join(word[:n])], word[n:]
            symbols[w] = merged
    return ranks


@pytest.mark.parametrize("text, n", [(words(1500), 400), (words(400, 1), 10_000), ("aaaa aaaaa aaa abcabc bcabca " * 3, 300), ("日本語 日本 語日 👩‍👩‍👧 👩‍👧", 300), ("", 300)])
def test_bpe_equals_the_naive_one(text, n):
    half = len(text) // 2 + text[len(text) // 2:].find(" ")
    assert list(prepare.train_bpe([text[:half], text[half:]], n).items()) == list(naive_bpe(text, n).items())


def test_bpe_by_hand():
    """ "ab" 3 times, then " ab" twice, then "abc" once: the counts leave no choice."""
    assert list(prepare.train_bpe(["ab ab abc"], 300))[256:] == [b"ab", b" ab", b" abc"]


def test_bpe_tokens_are_used_and_trainer_is_short():
    text = words(3000)
    ranks = prepare.train_bpe([text], 340)
    encoding = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 340})
    assert len(ranks) == 340 and len(encoding.encode_ordinary(text)) < len(text) / 2
    assert len(inspect.getsource(prepare.train_bpe).splitlines()) <= 60


def test_bpe_of_an_endless_word_ends():
    assert len(prepare.train_bpe(["ab1" * 300_000], 300)) <= 300


@pytest.mark.parametrize("kind", ["bpe", "byte", "gpt2", "folder"])
def test_every_text_comes_back(tmp_path, monkeypatch, kind):
    local = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=prepare.train_bpe([words(500)], 350), special_tokens={EOT: 350})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": local}.__getitem__)
    rows = [{"text": text, "title": f"t{i}", "source": f"s{i % 3}"} for i, text in enumerate(NASTY * 8)]
    path = jsonl(tmp_path / "nasty.jsonl", rows)
    if kind == "folder":
        prepare.prepare([path], config(tmp_path, name="first", vocab_size=290))
        kind = str(tmp_path / "data" / "first")
    meta = prepare.prepare([path], config(tmp_path, tokenizer=kind))
    found = read_back(tmp_path / "data" / "nasty")
    assert [(row["title"], row["source"], text) for row, text in found] == [(r["title"], r["source"], r["text"]) for r in rows if r["text"]]
    assert meta["vocab_size"] == {"bpe": 300, "byte": 257, "gpt2": 351}.get(kind, 290)
    assert meta["tokenizer"] == (kind if kind in ("bpe", "byte", "gpt2") else "bpe")


def test_wide_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    many = {bytes([b]): b for b in range(256)} | {f"{i:05d}".encode(): 256 + i for i in range(65_300)}
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=many, special_tokens={EOT: len(many)}))
    (tmp_path / "a.txt").write_text("wide words " * 30)
    meta = prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path, tokenizer="gpt2"))
    assert (meta["dtype"], meta["eot"]) == ("uint32", 65_556)
    assert "".join(text for _, text in read_back(tmp_path / "data" / "a")) == "wide words " * 30


def test_bpe_learns_from_the_training_text_alone_and_a_bounded_part(tmp_path):
    rows = [{"text": "zqzq zqzq" if split == "val" else "abab abab"} for split in splits(1337, 120)]
    prepare.prepare([jsonl(tmp_path / "a.jsonl", rows)], config(tmp_path))
    learned = list(load_tokenizer(tmp_path / "data" / "a")._mergeable_ranks)[256:]
    assert learned and not any(b"z" in piece for piece in learned)
    assert any(row["split"] == "val" for row, _ in read_back(tmp_path / "data" / "a"))
    rows = [{"text": "abab" if i < 60 else "xyxy"} for i in range(120)]
    prepare.prepare([jsonl(tmp_path / "b.jsonl", rows)], config(tmp_path, bpe_chars=100))
    assert not any(b"x" in piece for piece in list(load_tokenizer(tmp_path / "data" / "b")._mergeable_ranks)[256:])


def test_a_small_corpus_says_that_its_vocabulary_is_smaller(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three four five six")
    meta = prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path, vocab_size=4096))
    assert meta["vocab_size"] < 300 and f"the vocabulary has {meta['vocab_size']}" in capsys.readouterr().out


# ----------------------------------------------------------------------------- documents and splits

def splits(seed, n, fraction=0.1):
    return ["val" if int(hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:16], 16) < fraction * 2 ** 64 else "train" for i in range(n)]


def test_documents_are_held_out_by_hash(tmp_path):
    path = jsonl(tmp_path / "many.jsonl", [{"text": f"document {i}"} for i in range(300)])
    for seed in (1337, 2):
        prepare.prepare([path], config(tmp_path, seed=seed))
        found = read_back(tmp_path / "data" / "many")
        assert [row["split"] for row, _ in found] == splits(seed, 300)
        assert [(row["title"], row["source"], text) for row, text in found] == [(f"many.jsonl#{i + 1}", "many", f"document {i}") for i in range(300)]
    assert splits(1337, 300) != splits(2, 300)


@pytest.mark.parametrize("n, inside", [(99, True), (100, False)])
def test_few_documents_are_split_inside(tmp_path, capsys, n, inside):
    texts = [words(200, i) for i in range(n)]
    prepare.prepare([jsonl(tmp_path / "a.jsonl", [{"text": t, "title": str(i)} for i, t in enumerate(texts)])], config(tmp_path, val_fraction=0.2))
    found = read_back(tmp_path / "data" / "a")
    assert len(found) == (2 * n if inside else n) and ("of each" in capsys.readouterr().out) == inside
    for i, whole in enumerate(texts):
        parts = [(row["split"], text) for row, text in found if row["title"] == str(i)]
        assert "".join(text for _, text in parts) == whole
        if inside:
            (a, head), (b, rest) = parts
            assert (a, b) == ("train", "val") and abs(len(rest) / len(whole) - 0.2) < 0.05
            assert not head[-1].isspace() and rest[0].isspace()


def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 64)
    text = words(3000) + "\r\n \x1c x\u2003y\u2003\u2003z \x85 w 日本語 " + "=" * 300 + "    run   of       blanks\n        " * 40 + "   \t\t\n\n" + words(500, 3) + "\n \n"
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    pieces = list(prepare.txt_pieces(tmp_path / "a.txt", "a", "a"))
    assert len(pieces) > 50 and [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert "".join(p.text for p in pieces) == text
    encoding = prepare.make_tokenizer("bpe", [p._replace(split="train") for p in pieces], config(tmp_path, vocab_size=400))
    assert sum((encoding.encode_ordinary(p.text) for p in pieces), []) == encoding.encode_ordinary(text)
    prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path))
    assert "".join(t for _, t in read_back(tmp_path / "data" / "a")) == text
    tokens = {s: np.fromfile(tmp_path / f"data/a/{s}.bin", np.uint16)[:-1].tolist() for s in ("train", "val")}
    assert tokens["train"] + tokens["val"] == load_tokenizer(tmp_path / "data" / "a").encode_ordinary(text)


def test_a_text_without_blanks_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 64)
    monkeypatch.setattr(prepare, "LONGEST", 256)
    (tmp_path / "a.txt").write_text("é" * 5000)
    pieces = list(prepare.txt_pieces(tmp_path / "a.txt", "a", "a"))
    assert max(len(p.text) for p in pieces) < 400 and "".join(p.text for p in pieces) == "é" * 5000


@pytest.mark.parametrize("block", [7, 64, BLOCK])
@pytest.mark.parametrize("separator", [EOT, "\n\n\n", " -- ", "END OF\nSTORY", "é"])
def test_separators(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(prepare, "BLOCK", block)
    texts = [words(40, i).replace("é", "e").strip() for i in range(5)] + ["x"]
    (tmp_path / "a.txt").write_text(separator + f"\n{separator}\n".join(texts[:3] + [" \n "] + texts[3:]) + f"\n{separator}\n", newline="")
    found, pieces = [], list(prepare.txt_pieces(tmp_path / "a.txt", "a.txt", "a", separator))
    for piece in pieces:
        found += [""] * piece.first
        found[-1] += piece.text
    assert [t.rstrip() for t in found] == texts
    assert [p.title for p in pieces if p.first] == [f"a.txt#{i + 1}" for i in range(6)] and {p.source for p in pieces} == {"a"}


def test_folders_titles_sources_and_line_ends(tmp_path):
    books = tmp_path / "books"
    (books / "inner").mkdir(parents=True)
    texts = {"b.txt": "second\r\nbook \r tail of it", "a.txt": "first book\n\nhere it ends\n", "inner/a.txt": "third one of them"}
    for name, text in texts.items():
        (books / name).write_bytes(text.encode())
    jsonl(books / "c.jsonl", [{"text": "a line of its own", "source": "web"}, {"text": "another line here", "title": "T", "source": None}])
    (books / "ignored.pdf").write_bytes(b"\xff")
    prepare.prepare([str(books)], config(tmp_path))
    got = {}
    for row, text in read_back(tmp_path / "data" / "books"):
        got[row["title"], row["source"]] = got.get((row["title"], row["source"]), "") + text
    assert list(got.items()) == [(("a.txt", "a"), texts["a.txt"]), (("b.txt", "b"), texts["b.txt"]), (("c.jsonl#1", "web"), "a line of its own"),
                                 (("T", "c"), "another line here"), (("inner/a.txt", "a"), texts["inner/a.txt"])]


def test_two_runs_write_the_same_bytes(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": words(300, i)} for i in range(150)])
    for workers, where in ((1, "x"), (3, "y")):
        prepare.prepare([path], PrepareConfig(data_dir=str(tmp_path / where), vocab_size=400, workers=workers))
    files = sorted(os.listdir(tmp_path / "x/a"))
    assert files == ["docs.json", "meta.json", "tokenizer.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    assert all((tmp_path / "x/a" / f).read_bytes() == (tmp_path / "y/a" / f).read_bytes() for f in files)


def test_pydoc_reads_as_text(tmp_path):
    pieces = prepare.pydoc_pieces()
    by_title = {p.title: p for p in pieces}
    assert all(p.first for p in pieces) and len(by_title) == len(pieces) > 300
    assert 1.5e6 < sum(len(p.text) for p in pieces) < 6e6
    assert by_title["topics/assert"].source == "language reference"
    import asyncio.events as events
    text = by_title["asyncio.events"].text
    assert by_title["asyncio.events"].source == "asyncio" and text.startswith(f"asyncio.events\n\n{events.__doc__.strip()}\n\n")
    assert f"asyncio.events.TimerHandle.when\n\n{inspect.getdoc(events.TimerHandle.when).strip()}\n\n" in text
    assert not any(re.search(r"(^|\.)(tests?|idle_test)(\.|$)", p.title) for p in pieces)
    for p in pieces:
        p.text.encode("utf-8")


def test_work_ahead_is_bounded():
    """At most `ahead` items are taken from the source before the first result is."""
    from concurrent.futures import ThreadPoolExecutor
    taken = []
    with ThreadPoolExecutor(2) as pool:
        results = prepare.in_order(pool, lambda x: x * x, (taken.append(i) or i for i in range(100)), 5)
        assert next(results) == (0, 0) and len(taken) == 5
        assert list(results) == [(i, i * i) for i in range(1, 100)]


# ----------------------------------------------------------------------------- what users get wrong

def wrong(tmp_path, *names, match, **kw):
    with pytest.raises(UserError, match=match):
        prepare.prepare([str(n) for n in names], config(tmp_path, **kw))
    assert not list((tmp_path / "data").rglob("*.*"))


@pytest.mark.parametrize("line, match", [
    ('{"a":' * 100_000, r"bad.jsonl:2: .*recursion.*expected"), ("{'text': 1}", r"bad.jsonl:2: Expecting property name.*expected"), ("[1]", r"bad.jsonl:2: found \[1\]; expected"),
    ('{"body": "x"}', r'bad.jsonl:2: found {"body"'), ('{"text": 5}', r"bad.jsonl:2: found"), ('{"text": "x", "title": 5}', r"bad.jsonl:2: found"),
    (r'{"text": "a \ud800 b"}', r"bad.jsonl:2: \\ud800.*surrogate"), (r'{"text": "a", "source": "\udc00"}', r"bad.jsonl:2: \\udc00.*surrogate")])
def test_broken_lines(tmp_path, line, match):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    wrong(tmp_path, tmp_path / "bad.jsonl", match=match)


@pytest.mark.parametrize("at", [0, 5, 63, 64, 1000])
def test_bytes_that_are_no_utf8(tmp_path, monkeypatch, at):
    monkeypatch.setattr(prepare, "BLOCK", 64)
    good = ("é " * 1000).encode()[:3 * (at // 3)] + b"x" * (at % 3)  # a two-byte character now and then lies across two blocks
    for tail in (b"\xff and more", b"\xc3"):
        (tmp_path / "a.txt").write_bytes(good + tail)
        wrong(tmp_path, tmp_path / "a.txt", match=rf"a.txt: byte {at} is no UTF-8")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    wrong(tmp_path, tmp_path / "a.jsonl", match=r"a.jsonl:1: .*can't decode byte 0xff in position 10")


def test_empty_and_missing_input(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.md").write_text("text")
    wrong(tmp_path, tmp_path / "empty.txt", match="no text; expected")
    wrong(tmp_path, tmp_path / "empty.jsonl", match="no text; expected")
    wrong(tmp_path, tmp_path / "folder", match="no .txt or .jsonl file")
    wrong(tmp_path, tmp_path / "nowhere.txt", match="is no file, no folder and no known corpus .*tinystories")
    wrong(tmp_path, tmp_path / "a.md", match="expected a .txt or a .jsonl file")
    (tmp_path / "full.txt").write_text("some words to read here")
    prepare.prepare([str(tmp_path / "empty.txt"), str(tmp_path / "full.txt")], config(tmp_path, name="both"))
    assert "empty.txt is empty: skipped" in capsys.readouterr().err and len(read_back(tmp_path / "data" / "both")) == 2


def test_bad_options(tmp_path):
    (tmp_path / "a.txt").write_text("some words to read here")
    (tmp_path / "word.txt").write_text("word")
    for name in ("prepare", "..", "a b", "x/y"):
        wrong(tmp_path, tmp_path / "a.txt", name=name, match="cannot name a dataset; give --name=NAME")
    wrong(tmp_path, tmp_path / "a.txt", tmp_path / "word.txt", match="cannot name a dataset; give --name=NAME")
    wrong(tmp_path, "pydoc", tmp_path / "a.txt", match="pydoc goes alone")
    wrong(tmp_path, tmp_path / "word.txt", match="no text for val")
    wrong(tmp_path, tmp_path / "a.txt", val_fraction=1.5, match="val_fraction=1.5: expected")
    wrong(tmp_path, tmp_path / "a.txt", vocab_size=257, match="make 258")
    wrong(tmp_path, tmp_path / "a.txt", tokenizer="nowhere", match="expected gpt2, byte, bpe or the folder")
    with pytest.raises(UserError, match="the nearest is 'vocab_size'"):
        prepare.main([str(tmp_path / "a.txt"), "--vocab_siz=300"])


def test_gpt2_without_a_network(tmp_path, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("unreachable")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    (tmp_path / "a.txt").write_text("some words to read here")
    wrong(tmp_path, tmp_path / "a.txt", tokenizer="gpt2", match="network.*TIKTOKEN_CACHE_DIR.*--tokenizer=bpe")


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_the_old_dataset(tmp_path, monkeypatch, trouble):
    (tmp_path / "a.txt").write_text("some words to read here")
    prepare.prepare([str(tmp_path / "a.txt")], config(tmp_path))
    before = {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()}

    def dumps(*a, **kw):  # the first row of docs.json
        raise trouble
    monkeypatch.setattr(prepare.json, "dumps", dumps)
    for name in ("a", "new"):
        with pytest.raises(UserError, match="No space left.*nothing was changed|interrupted; nothing was changed"):
            prepare.main([str(tmp_path / "a.txt"), f"--name={name}", f"--data_dir={tmp_path / 'data'}"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()} == before
    assert os.listdir(tmp_path / "data") == ["a"]


def test_command_line(tmp_path):
    """The script as users run it: quiet when piped, one line and status 2 for an error, also where the disk is full."""
    (tmp_path / "mine.txt").write_text(words(4000))
    run = lambda *a, **kw: subprocess.run([sys.executable, ROOT / "data/prepare.py", *a, f"--data_dir={tmp_path}"], capture_output=True, text=True, **kw)
    done = run(tmp_path / "mine.txt", "--vocab_size=300")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.rstrip().endswith("next: python train.py --dataset=mine")
    assert "--vocab_size=300" in json.loads((tmp_path / "mine/meta.json").read_text())["command"]
    full = run(tmp_path / "mine.txt", "--name=full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert full.returncode == 2 and re.fullmatch(r"error: .*; nothing was changed\n", full.stderr) and not (tmp_path / "full").exists()
    help = run("--help")
    assert help.returncode == 0 and "--bpe_chars=50000000" in help.stdout and "at most so many characters" in help.stdout


# ----------------------------------------------------------------------------- downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` (path -> bytes) with the habits in `habits`, and notes each request's Range in `asked`."""
    def do_GET(self):
        habits, asked = self.server.habits, self.headers.get("Range")
        self.server.asked.append(asked)
        if habits.get("fail") and habits["fail"].pop():
            return self.send_error(503)
        if self.path.startswith("/cdn"):
            data = self.server.files.get(self.path[4:])
        else:
            data = self.server.files.get(self.path)
            if data is not None and "linked" in habits:  # as Hugging Face: the redirect alone tells size and sha256
                self.send_response(302)
                for key, value in ({"Location": "/cdn" + self.path, "Content-Length": "0"} | habits["linked"](data)).items():
                    self.send_header(key, value)
                return self.end_headers()
        if data is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and not habits.get("no_range") else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        ranged, start = start > 0, 0 if habits.get("shifted") else start  # shifted: another range than asked for
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = len(data)
        if habits.get("breaks"):
            habits["breaks"] -= 1
            stop = (start + len(data)) // 2  # half of what is left, then the line goes dead
        self.wfile.write(data[start:stop])
        self.close_connection = True

    def log_message(self, *a):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare, "WAIT", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.files, s.habits, s.asked = {"/f": bytes(range(256)) * 5000}, {}, []
        s.url = f"http://127.0.0.1:{s.server_port}"
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def linked(data, size=None, sha=None):
    return {"X-Linked-Size": str(size or len(data)), "X-Linked-ETag": f'"{sha or hashlib.sha256(data).hexdigest()}"'}


@pytest.mark.parametrize("habits, asked", [
    ({}, [None]), ({"linked": linked}, [None, None]), ({"breaks": 1}, [None, "bytes=640000-"]),
    ({"breaks": 2, "linked": linked}, [None, None, *["bytes=640000-"] * 2, *["bytes=960000-"] * 2]),
    ({"breaks": 1, "no_range": True}, [None, "bytes=640000-"]), ({"breaks": 1, "shifted": True}, [None, "bytes=640000-", None]), ({"fail": [True, True]}, [None, None, None])])
def test_fetch(tmp_path, server, habits, asked):
    server.habits = dict(habits)
    prepare.fetch(server.url + "/f", tmp_path / "down/f")
    assert (tmp_path / "down/f").read_bytes() == server.files["/f"] and os.listdir(tmp_path / "down") == ["f"]
    assert server.asked == asked
    prepare.fetch(server.url + "/f", tmp_path / "down/f")
    assert server.asked == asked  # it is there: nothing is asked


@pytest.mark.parametrize("have, asked", [(100, ["bytes=100-"]), (1_280_000, ["bytes=1280000-"]), (2_000_000, ["bytes=2000000-", None])])
def test_fetch_resumes_the_part_of_an_earlier_run(tmp_path, server, have, asked):
    (tmp_path / "f.part").write_bytes((server.files["/f"] * 2)[:have])
    prepare.fetch(server.url + "/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"] and server.asked == asked


def test_fetch_errors(tmp_path, server):
    def refused(match, path="/f", **kw):
        with pytest.raises(UserError, match=match):
            prepare.fetch(server.url + path, tmp_path / "down/f", **kw)
        assert not (tmp_path / "down/f").exists()
    refused("404 Not Found; .*--mirror", path="/nothing")
    assert len(server.asked) == 1 and not (tmp_path / "down").exists()
    refused("sha256 [0-9a-f]{64} arrived, expected .*0000", sha256="0" * 64)
    server.habits = {"linked": lambda data: linked(data, sha="1" * 64)}
    refused("sha256 [0-9a-f]{64} arrived, expected 1280000 bytes, sha256 1111")
    server.habits = {"linked": lambda data: linked(data, size=7)}
    refused("1,280,000 bytes arrived, expected 7 bytes")
    assert not os.listdir(tmp_path / "down")
    server.habits = {"breaks": 100, "no_range": True}
    server.asked.clear()
    refused("640,000 of 1,280,000 bytes arrived; the same command")
    assert len(server.asked) == prepare.ATTEMPTS + 1 and os.listdir(tmp_path / "down") == ["f.part"]
    server.habits = {"fail": [True] * 99}
    refused("503 Service Unavailable")
    with pytest.raises(UserError, match="Connection refused"):
        prepare.fetch("http://127.0.0.1:9/f", tmp_path / "f")


def test_downloaded_corpora(tmp_path, server, monkeypatch):
    """tinystories and shakespeare through --mirror, fineweb_edu with a stand-in for pyarrow."""
    local = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=prepare.train_bpe([words(500)], 350), special_tokens={EOT: 350})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": local}.__getitem__)
    tiny = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
    server.habits = {"linked": linked}
    server.files = {tiny + "train.txt": f"\nOne day.\nIt ended.\n{EOT}\nTwo days.\n{EOT}".encode(), tiny + "valid.txt": f"A third.\n{EOT}\n".encode(),
                    "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt": b"not his"}
    prepare.prepare(["tinystories"], config(tmp_path, mirror=server.url + "/", val_fraction=0.9))
    assert [(r["split"], r["title"], r["source"], text) for r, text in read_back(tmp_path / "data/tinystories")] == [
        ("train", "TinyStoriesV2-GPT4-train#1", "TinyStories", "One day.\nIt ended."), ("train", "TinyStoriesV2-GPT4-train#2", "TinyStories", "Two days."),
        ("val", "TinyStoriesV2-GPT4-valid#1", "TinyStories", "A third.")]
    with pytest.raises(UserError, match="expected .* bytes, sha256 86c4e6aa"):
        prepare.prepare(["shakespeare"], config(tmp_path, mirror=server.url))

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        prepare.prepare(["fineweb_edu"], config(tmp_path, mirror=server.url))
    def iter_batches(self, batch_size, columns):
        assert columns == ["text", "url"]
        return [types.SimpleNamespace(to_pylist=lambda k=k: [{"text": f"page {i} of many", "url": f"https://site{i % 7}.org/{i}"} for i in range(k, k + 300)]) for k in (0, 300)]
    pyarrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    pyarrow.parquet, parquet.ParquetFile = parquet, type("ParquetFile", (), {"__init__": lambda self, path: None, "iter_batches": iter_batches})
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    server.files = {"/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet": b"PAR1"}
    prepare.prepare(["fineweb_edu"], config(tmp_path, mirror=server.url))
    found = read_back(tmp_path / "data/fineweb_edu")
    assert [r["split"] for r, _ in found] == splits(1337, 600, 0.005)
    assert [(r["title"], r["source"], t) for r, t in found] == [(f"https://site{i % 7}.org/{i}", f"site{i % 7}.org", f"page {i} of many") for i in range(600)]
    with pytest.raises(UserError, match="give 1 to 14"):
        prepare.prepare(["fineweb_edu"], config(tmp_path, shards=15))


def test_benchmark(tmp_path):
    """experiments/tokenize_1gb.py on 1 MB: figures on the last line and in the file, nothing else left behind."""
    (tmp_path / "tmp").mkdir()
    done = subprocess.run([sys.executable, ROOT / "experiments/tokenize_1gb.py", "--mb=1", f"--out={tmp_path / 'r.json'}"],
                          capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")})
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("tokenize: 1 MB, ") and not os.listdir(tmp_path / "tmp")
    assert result["megabytes"] == 1 and result["tokens"] > 100_000 and 50 < result["peak_rss_mb"] < 1000
    assert {run["workers"] for run in result["runs"]} == {1, os.cpu_count()} and all(run["seconds"] > 0 for run in result["runs"])


def test_names_and_texts_that_break_elsewhere(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt", "w") as f:  # a file name that is no UTF-8
        f.write(words(300))
    prepare.prepare([str(tmp_path / "in")], config(tmp_path, name="odd"))
    assert {row["title"] for row, _ in read_back(tmp_path / "data/odd")} == {"caf\ufffd.txt"}
    with pytest.raises(UserError, match="'pydoc' is the name of a corpus of its own"):
        prepare.prepare([str(tmp_path / "in")], config(tmp_path, name="pydoc"))
    jsonl(tmp_path / "blank.jsonl", [{"text": "a" + " " * 3_000_000 + "b", "title": "the blank one"}, {"text": "more text here " * 50}])
    with pytest.raises(UserError, match="'the blank one': text that cannot be split"):
        prepare.prepare([str(tmp_path / "blank.jsonl")], config(tmp_path, name="blank", tokenizer="byte"))
    for kw in (dict(workers=-1), dict(bpe_chars=0)):
        with pytest.raises(UserError, match=f"--{next(iter(kw))}={next(iter(kw.values()))}: expected at least"):
            prepare.prepare([str(tmp_path / "in")], config(tmp_path, name="odd", **kw))
