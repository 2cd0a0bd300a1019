"""data/tasks.py against plain references: items read back from the tokens, benchmarks' rows converted by hand, broken files."""
import io, json, os, re, subprocess, sys, zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare
import tasks
from conftest import write_dataset
from prism import UserError, load_dataset, load_tokenizer, parse_config
from tasks import load_items, occurs
from test_prepare import jsonl, server  # noqa: F401


def made_up(n, seed):
    """n words, hardly ever the same ones in a row, with line ends and characters of several bytes."""
    rng = np.random.default_rng(seed)
    return "".join("".join(rng.choice(list("abcdeéo🜚"), rng.integers(1, 6))) + str(rng.choice([" ", " ", ", ", "\n", "  \n\n"])) for _ in range(n))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A trained BPE; the held-out documents are of sources a and b and, once, c; two hold a passage that is in training."""
    folder, copied = tmp_path_factory.mktemp("cloze"), made_up(120, 999)
    texts = [made_up(150, i) + (copied if i % 60 < 2 else "") for i in range(240)]
    held = [i for i in range(240) if i % 6 == 0]
    rows = [{"text": text, "title": f"{i}", "source": "c" if i == 6 else "ab"[i % 4 // 2]} for i, text in enumerate(texts)]
    path = jsonl(folder / "some.jsonl", rows)
    keep, prepare.with_splits = prepare.with_splits, lambda corpus, *a: (p._replace(split="val" if int(p.title) in held else "train") for p in corpus.read())
    prepare.prepare([path], parse_config(prepare.PrepareConfig, [f"--data_dir={folder}", "--vocab_size=400", "--workers=1"]))
    prepare.with_splits = keep
    return folder / "some"


def run(dataset, *words):
    """-> items read back, through the command line's entry."""
    prepare.main(["cloze", f"--dataset={dataset}", *words])
    out = [word[6:] for word in words if word.startswith("--out=")]
    return load_items(out[0] if out else dataset / "cloze.jsonl")


def wrong(match, *words):
    with pytest.raises(UserError, match=match):
        prepare.main(list(map(str, words)))


# ----------------------------------------------------------------------------- cloze

def test_cloze_items_read_back_from_the_tokens(corpus, capsys):
    items, (train, val, _), encoding = run(corpus, "--context_tokens=12", "--choice_tokens=6", "--items=500"), load_dataset(corpus), load_tokenizer(corpus)
    rows = {row["title"]: row for row in json.loads((corpus / "docs.json").read_text("utf-8")) if row["split"] == "val"}
    known, held = ({tuple(tokens[i:i + 6]) for i in range(len(tokens) - 5)} for tokens in (train.tolist(), val.tolist()))
    starts, truths = [], {item["choices"][item["label"]]: item["source"] for item in items}
    for item in items:
        at, row = int(item["id"].rpartition(":")[2]), rows[item["document"]]
        starts.append(at)
        assert row["start"] <= at and at + 18 <= row["start"] + row["length"] - 1 and row["source"] == item["source"]
        truth = item["choices"][item["label"]]
        assert (item["context"] + truth).encode() == encoding.decode_bytes(val[at:at + 18].tolist())
        assert len(item["choices"]) == 4 == len(set(item["choices"])) and not any(c.strip() in item["context"] for c in item["choices"])
        for choice in item["choices"]:
            tokens = encoding.encode_ordinary(item["context"] + choice)
            assert tokens[:12] == val[at:at + 12].tolist() and len(tokens) == 18 and re.fullmatch(r" \S(.*\S)?", choice, re.S)
            assert tuple(tokens[12:]) in held and tuple(tokens[12:]) not in known
        others = [truths[c] for c in item["choices"]]  # every wrong choice is the answer of another item
        assert len(others) == 4 and item["widened"] == sum(source != item["source"] for source in others)
    assert np.diff(sorted(starts)).min() >= 18 and 150 < len(items) < 500
    assert {item["widened"] for item in items if item["source"] in "ab"} == {0} and {item["source"] for item in items} == {"a", "b", "c"}
    assert min(np.bincount([item["label"] for item in items], minlength=4)) > len(items) / 8
    said = capsys.readouterr().out
    assert re.search(r"(\d+) dropped whose continuation occurs in training", said) and f"{len(items)} items in" in said and "fewer than --items=500" in said


def test_what_is_dropped_is_what_training_holds(corpus, capsys):
    """The passage copied into two held-out documents: none of its text stays, and as many are counted as a plain search finds."""
    items = run(corpus, "--context_tokens=12", "--choice_tokens=6")
    train, val, _ = load_dataset(corpus)
    encoding = load_tokenizer(corpus)
    known, text = {tuple(train[i:i + 6]) for i in range(len(train) - 5)}, encoding.decode(train.tolist())
    copied = [w for w in tasks.cut_windows(val, tasks.rows_of(corpus, "val", len(val)), encoding, 12, 6) if tuple(w.tokens[12:]) in known]
    assert len(copied) > 10 and f"\n{len(copied)} dropped whose continuation occurs in training" in capsys.readouterr().out
    choices = {choice for item in items for choice in item["choices"]}
    assert len(items) > 150 and not [c for c in choices if re.search(re.escape(c) + r"(?!\w)", text)]  # in a longer word it is other text


def test_the_seed_and_nothing_else_chooses(corpus, tmp_path):
    options = ("--items=40", "--context_tokens=12", "--choice_tokens=6")
    one, two, other = (run(corpus, *options, f"--out={tmp_path / str(i)}", f"--seed={seed}") for i, seed in enumerate((1, 1, 2)))
    assert len(one) == len(other) == 40 and one == two and not {i["id"] for i in one} == {i["id"] for i in other}
    few = [run(corpus, "--items=2", *options[1:], f"--out={tmp_path}/few", f"--seed={seed}") for seed in range(6)]
    assert len({item["document"] for items in few for item in items}) > 5 and len({item["document"] for item in one}) > 15


@pytest.mark.parametrize("seed", range(4))
def test_occurs_equals_the_naive_search(seed):
    rng = np.random.default_rng(seed)
    tokens, queries = rng.integers(0, 3, 200).astype(np.uint16), rng.integers(0, 3, (60, 5))
    expected = [any((tokens[i:i + 5] == query).all() for i in range(196)) for query in queries]
    assert 5 < sum(expected) < 55
    for chunk in (1, 7, 1000):
        assert occurs(tokens, queries, chunk).tolist() == expected
    assert occurs(tokens[:4], queries).sum() == 0 and occurs(tokens[:5], [tokens[:5]]).all()


def dataset_of(folder, train, *documents):
    """A prepared dataset with the byte tokenizer; documents: (source, text) that are held out."""
    val, rows = b"", []
    for i, (source, text) in enumerate(documents):
        rows.append(dict(split="val", start=len(val) + i, length=len(text.encode()) + 1, source=source, title=f"{i}"))
        val += text.encode()
    tokens = [t for _, text in documents for t in [*text.encode(), 256]]
    write_dataset(folder, [*train.encode(), 256], tokens)
    (folder / "docs.json").write_text(json.dumps(rows))
    return folder


def test_a_poor_source_borrows_and_a_repeated_text_stands_once(tmp_path, capsys):
    """By hand, a byte a token, windows of 4 + 3: "abcd ef" is a context of 4 and a choice of 3."""
    data = dataset_of(tmp_path / "d", "nothing of it", ("rich", "abcd ef ghi jk lmn op"), ("rich", "wxyz\nef qrs tu"), ("rich", "vwxy ef"), ("poor", "ABCD EF"))
    items = run(data, "--context_tokens=4", "--choice_tokens=3", "--choices=3")
    assert {item["choices"][item["label"]]: item["widened"] for item in items} == {" ef": 0, " jk": 0, " op": 0, " tu": 0, " EF": 2}
    assert all(len(set(item["choices"])) == 3 for item in items)
    assert "6 windows of 4 + 3 tokens" in (said := capsys.readouterr().out) and "1 dropped whose continuation repeats another's" in said and "2 sources: rich 4, poor 1\n" in said


def test_no_choice_stands_in_the_context(tmp_path, capsys):
    data = dataset_of(tmp_path / "d", "nothing", ("s", "abcd ef"), ("s", "x ef mn"), ("s", "ijkl op"), ("s", "qr y qr"))
    found = [{item["context"]: set(item["choices"]) for item in run(data, "--context_tokens=4", "--choice_tokens=3", "--choices=2", f"--seed={seed}")} for seed in range(9)]
    assert all(" ef" not in items["x ef"] and items.keys() == {"abcd", "x ef", "ijkl"} for items in found)
    assert any(" ef" in items["ijkl"] for items in found) and any(" qr" in items["ijkl"] for items in found)
    assert len(run(data, "--context_tokens=4", "--choice_tokens=3", "--choices=4")) == 2
    assert "2 dropped for want of choices that the context does not hold" in capsys.readouterr().out


def test_texts_that_differ_in_blanks_are_one(tmp_path, capsys):
    data = dataset_of(tmp_path / "d", "nothing", ("s", "abcd e f ghi k l"), ("s", "mnop e\nf"))
    assert len(run(data, "--context_tokens=4", "--choice_tokens=4", "--choices=2")) == 2 and "1 dropped whose continuation repeats" in capsys.readouterr().out


def test_tokens_that_the_text_does_not_give_again(tmp_path):
    """The tokenizer joins " ef", which the dataset holds apart: no such choice. It joins d and " m": none such in one item."""
    data = dataset_of(tmp_path / "d", "nothing", ("s", "abcd ef ghi jk lst op"), ("s", "éab ñ"), ("s", "uvwd qr"), ("s", "cxyz mn"))
    with open(data / "tokenizer.tiktoken", "ab") as f:
        f.write(b"\nIGVm 257\nZCBt 258\n")
    (data / "tokenizer.json").write_text(json.dumps(dict(name="b", pattern=r" ef|d m|[\s\S]", eot=256, n_vocab=259)))
    items = run(data, "--context_tokens=4", "--choice_tokens=3", "--choices=5")  # of five: " qr" follows uvwd, where " mn" cannot stand
    assert {item["choices"][item["label"]] for item in items} == {" jk", " op", " ñ", " mn"}


@pytest.mark.parametrize("words, match", [
    (["--dataset=nowhere"], "no prepared dataset in .*nowhere"), (["--items=0"], "--items=0: expected at least 1"), (["--choices=1"], "--choices=1: expected at least 2"),
    (["--context_tokens=-4"], "--context_tokens=-4: expected at least 1"), (["--choice_tokens=1"], "at least 2"), (["--seed=-1"], "seed is -1, expected 0 or more"),
    (["--context_tokens=3000"], "0 windows of 3005 tokens .* longest document has \\d+ tokens: lower --context_tokens"), (["--choice=3"], "nearest is 'choices'"),
    (["--choices=5000"], "\\d+ windows of 53 tokens .* expected at least 5000")])
def test_cloze_refuses(corpus, words, match):
    wrong(match, "cloze", f"--dataset={corpus}", *words)


def test_cloze_without_documents_or_items(tmp_path, dataset):
    wrong(r"docs.json is missing or damaged .*run: python data/prepare.py", "cloze", f"--dataset={dataset}")
    data = dataset_of(tmp_path / "d", "abcd ef ghi jk", ("s", "abcd ef ghi jk"))
    wrong(r"no item is left of 2 windows \(2 whose continuation occurs in training\)", "cloze", f"--dataset={data}", "--context_tokens=4", "--choice_tokens=3", "--choices=2")
    (data / "docs.json").write_text('[{"split": "val", "start": 3, "length": 90, "title": "", "source": ""}]')
    wrong("docs.json does not fit val.bin", "cloze", f"--dataset={data}")


def test_an_interruption_leaves_the_old_file(corpus, monkeypatch, tmp_path):
    (tmp_path / "c.jsonl").write_text("old")
    monkeypatch.setattr(tasks.json, "dumps", lambda *a, **kw: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    wrong("No space left.*nothing was changed", "cloze", f"--dataset={corpus}", "--context_tokens=12", "--choice_tokens=6", f"--out={tmp_path}/c.jsonl")
    assert (tmp_path / "c.jsonl").read_text() == "old" and os.listdir(tmp_path) == ["c.jsonl"]


def test_command_line(corpus, tmp_path, capsys):
    call = lambda *a: subprocess.run([sys.executable, ROOT / "data/prepare.py", *a], capture_output=True, text=True)
    done = call("cloze", f"--dataset={corpus}", "--context_tokens=12", "--choice_tokens=6", "--items=9", f"--out={tmp_path}/c.jsonl")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(f"9 items in {tmp_path}/c.jsonl\n") and len(load_items(tmp_path / "c.jsonl")) == 9
    wrong("--level=hard: expected easy or challenge", "arc", "--level=hard")
    with pytest.raises(SystemExit):
        prepare.main(["cloze", "--help"])
    assert "--choice_tokens=5 " in capsys.readouterr().out


# ----------------------------------------------------------------------------- the task format

GOOD = {"context": "It is", "choices": [" so.", " not."], "label": 1}


def test_load_items(tmp_path):
    rows = [GOOD, GOOD | {"context": "", "id": "é", "given": [0, 4]}]
    path = jsonl(tmp_path / "t.jsonl", rows)
    with open(path, "a") as f:
        f.write("\n")
    assert load_items(path) == rows
    wrong_path = tmp_path / "none.jsonl"
    with pytest.raises(UserError, match="none.jsonl: No such file"):
        load_items(wrong_path)
    wrong_path.write_text("\n")
    with pytest.raises(UserError, match="holds no item"):
        load_items(wrong_path)


@pytest.mark.parametrize("line, match", [
    ("{", "no JSON in UTF-8"), (b'{"context": "\xff"}', "no JSON in UTF-8"), ("[1]", r"found \[1\]"), (GOOD | {"context": 1}, "context is no text"),
    (GOOD | {"choices": [" a"]}, "fewer than two"), (GOOD | {"choices": "ab"}, "fewer than two"), (GOOD | {"choices": [" a", ""]}, "choice 1 is empty"),
    (GOOD | {"choices": [" ", "a"]}, "choice 0 is empty"), (GOOD | {"choices": ["a", 3]}, "choice 1 is .*no text"), (GOOD | {"label": 2}, "label is 2, not one of 0 to 1"),
    (GOOD | {"label": -1}, "label is -1"), (GOOD | {"label": True}, "label is True"), (GOOD | {"label": 1.0}, "label is 1.0"), ({"context": "", "choices": ["a", "b"]}, "label is None"),
    (GOOD | {"given": [1]}, r"given is \[1\]"), (GOOD | {"given": [0, 5]}, "given is"), (GOOD | {"context": "\ud800"}, r"\\ud800, half a surrogate pair")])
def test_load_items_refuses(tmp_path, line, match):
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    (tmp_path / "t.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=f"t.jsonl:3: .*{match}"):
        load_items(tmp_path / "t.jsonl")


# ----------------------------------------------------------------------------- public benchmarks

def ai2(stem, texts, labels, key):
    return {"id": "Q1", "question": {"stem": stem, "choices": [{"text": t, "label": x} for t, x in zip(texts, labels)]}, "answerKey": key}


HELLA = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof. [step] He rests.", "ctx_b": "he", "label": 3,
         "endings": ["is using wrap. [title] End", "is ripping  tiles off.", "is  holding a cube.", "starts [x] pulling up."], "source_id": "activitynet~v"}
ARC = ai2("Which one?", ["ice", "fire", "air"], "123", "3")
BOOK = ai2("The sun is", ["cold", "hot"], "AB", "B")
PIQA = {"goal": "Boil an egg", "sol1": "in water", "sol2": "in sand"}
BOOLQ = {"question": "is it so", "passage": "It is so.", "idx": 0, "label": True}
WINO = {"qID": "3D-1", "sentence": "Sarah was better than Maria so _ always got the easier cases.", "option1": "Sarah", "option2": "Maria", "answer": "2"}
ROWS = {  # task: row of the public file, item
    "hellaswag": (HELLA, {"context": "Roof shingle removal: A man is sitting on a roof. He rests. He", "label": 3, "id": "24", "source": "activitynet~v",
                          "choices": [" is using wrap.. End", " is ripping tiles off.", " is holding a cube.", " starts pulling up."]}),
    "arc": (ARC, {"context": "Question: Which one?\nAnswer:", "choices": [" ice", " fire", " air"], "label": 2, "id": "Q1"}),
    "openbookqa": (BOOK, {"context": "The sun is", "choices": [" cold", " hot"], "label": 1, "id": "Q1"}),
    "piqa": (PIQA, {"context": "Question: Boil an egg\nAnswer:", "choices": [" in water", " in sand"], "label": 0}),
    "boolq": (BOOLQ, {"context": "It is so.\nQuestion: is it so?\nAnswer:", "choices": [" no", " yes"], "label": 1}),
    "winogrande": (WINO, {"context": "Sarah was better than Maria so", "label": 1, "id": "3D-1", "given": [6, 6],
                          "choices": [" Sarah always got the easier cases.", " Maria always got the easier cases."]})}


@pytest.mark.parametrize("task", ROWS)
def test_rows_by_hand(tmp_path, task):
    row, item = ROWS[task]
    (tmp_path / "l.lst").write_text("0\n0\n")
    words = [task, f"--file={jsonl(tmp_path / 'f.jsonl', [row, row])}", f"--data_dir={tmp_path}"] + [f"--labels={tmp_path}/l.lst"] * (task == "piqa")
    prepare.main(words)
    assert load_items(tmp_path / task / f"{'arc_easy' if task == 'arc' else task}.jsonl") == [item, item]


def test_blanks_before_a_choice(tmp_path):
    """A blank that ends the context goes to the choices, a name that begins the sentence has none."""
    path = jsonl(tmp_path / "f.jsonl", [BOOK | {"question": BOOK["question"] | {"stem": "The sun is "}}])
    prepare.main(["openbookqa", f"--file={path}", f"--out={tmp_path}/o.jsonl"])
    assert load_items(tmp_path / "o.jsonl")[0]["choices"] == ["  cold", "  hot"]
    path = jsonl(tmp_path / "f.jsonl", [WINO | {"sentence": "_ won ."}, WINO | {"sentence": "Once _, and", "answer": 1}])
    prepare.main(["winogrande", f"--file={path}", f"--out={tmp_path}/o.jsonl"])
    assert [(i["context"], i["choices"][0], i["given"], i["label"]) for i in load_items(tmp_path / "o.jsonl")] == \
        [("", "Sarah won .", [5, 5], 1), ("Once", " Sarah , and", [6, 6], 0)]


@pytest.mark.parametrize("task, change, match", [
    ("hellaswag", {"label": None}, "the answer is missing; files of hidden tests"), ("hellaswag", {"label": 4}, "the answer is 4, not one of 0, 1, 2, 3"),
    ("hellaswag", {"endings": 3}, "no row of hellaswag"), ("hellaswag", {"endings": ["[x]", "a", "b", "c"]}, "choice 0 is empty"), ("arc", {"answerKey": "A"}, "'A', not one of 1, 2, 3"),
    ("arc", {"answerKey": ""}, "is missing"), ("openbookqa", {"question": "stem"}, "no row of openbookqa"), ("boolq", {"label": "maybe"}, "'maybe', not one of False, True"),
    ("winogrande", {"answer": ""}, "is missing"), ("winogrande", {"sentence": "no gap"}, "no _ for the name"), ("winogrande", {"option1": 3}, "no row of winogrande")])
def test_broken_rows(tmp_path, task, change, match):
    row = ROWS[task][0]
    path = jsonl(tmp_path / "f.jsonl", [row, row | change])
    wrong(f"f.jsonl:2: .*{match}", task, f"--file={path}", f"--out={tmp_path}/o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


def test_broken_files(tmp_path):
    (tmp_path / "f.jsonl").write_text(json.dumps(PIQA) + "\n" + json.dumps(PIQA) + "\n")
    (tmp_path / "l.lst").write_text("0\n2\n")
    both = ("piqa", f"--file={tmp_path}/f.jsonl", f"--labels={tmp_path}/l.lst")
    wrong("l.lst:2, .*f.jsonl:2: the answer is '2', not one of 0, 1", *both)
    (tmp_path / "l.lst").write_text("0\n")
    wrong("l.lst has 1 lines, .*f.jsonl has 2 questions", *both)
    wrong("give both, --file", *both[:2])
    wrong("f.jsonl:1: no row of boolq", "boolq", f"--file={tmp_path}/f.jsonl")
    wrong("nowhere.jsonl: No such file.*no --file to download it", "boolq", f"--file={tmp_path}/nowhere.jsonl")
    (tmp_path / "f.jsonl").write_text(json.dumps(BOOLQ) + '\n{"passage"\n')
    wrong("f.jsonl:2: no JSON", "boolq", f"--file={tmp_path}/f.jsonl")
    (tmp_path / "f.jsonl").write_text("")
    wrong("holds no question", "boolq", f"--file={tmp_path}/f.jsonl")
    (tmp_path / "f.zip").write_text("no zip")
    wrong("f.zip: .*not a zip file; expected a .zip with BoolQ/val.jsonl", "boolq", f"--file={tmp_path}/f.zip")
    wrong("unknown option 'labels'", "boolq", f"--labels={tmp_path}/l.lst")


@pytest.mark.parametrize("task", ROWS)
def test_downloads(tmp_path, server, task):  # noqa: F811
    row, item = ROWS[task]
    p, lines = tasks.PUBLIC[task], (json.dumps(row) + "\n").encode() * 3
    if p.member:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as z:
            z.writestr(p.member.format("Challenge"), lines)
        lines = packed.getvalue()
    server.files = {"/" + p.path: lines, "/piqa/data/valid-labels.lst": b"0\n0\n0\n"}
    words = [task, f"--mirror={server.url}/", f"--data_dir={tmp_path}"] + ["--level=challenge"] * (task == "arc")
    prepare.main(words)
    assert load_items(tmp_path / task / f"{'arc_challenge' if task == 'arc' else task}.jsonl") == [item] * 3
    asked = len(server.asked)
    prepare.main(words)
    assert len(server.asked) == asked  # what has arrived stays
    if task == "arc":
        wrong("no item named 'ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl'", *words[:3])
    server.files = {}
    wrong("404 Not Found", task, f"--mirror={server.url}", f"--data_dir={tmp_path}/new")


def test_items_of_the_training_text_are_its_own(corpus, tmp_path):
    items = run(corpus, "--split=train", "--items=50", "--context_tokens=12", "--choice_tokens=6", f"--out={tmp_path}/t.jsonl")
    train, _, meta = load_dataset(corpus)
    text = load_tokenizer(corpus).decode(train.tolist())
    assert len(items) == 50 and all(x["context"] + x["choices"][x["label"]] in text and x["id"].startswith(f"{meta['name']}:train:") for x in items)
