"""Options, files from others, datasets and runs: what they give and how they fail, in one line."""
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_dataset, write_run

import common
from common import Run, UserError, fingerprint, load_gains, parse_config, window_starts
from prism import Edit

ROOT = Path(__file__).resolve().parent.parent


def refusal(call, *args, match=None, **kw):
    """The message of the UserError that call raises: one line without control characters."""
    with pytest.raises(UserError, match=match) as e:
        call(*args, **kw)
    message = str(e.value)
    assert message.isprintable() and len(message) < 600
    return message


# -- options and command lines

@dataclass
class Basic:
    steps: int = 10           # number of steps
    rate: float = 0.5         # its size


@dataclass
class Options(Basic):
    """A docstring with `lambda: 1` in it."""
    prompt: str = ""          # text, 'quoted' or not
    quiet: bool = False       # print nothing


def test_options_from_words_and_files(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('prompt = "from file"\nrate = 1\nsteps = 1_000\nquiet = true\n')
    c = parse_config(Options, [str(path), "--prompt=x=y", "--steps=4"])
    assert c == Options(4, 1.0, "x=y", True) and type(c.rate) is float
    assert parse_config(Options, ["--steps=4", str(path)]).steps == 1000  # later ones win
    assert parse_config(Options, ["--quiet", "--prompt="]) == Options(quiet=True)
    assert parse_config(Options, ["--quiet=False", "--rate=1e-3"]) == Options(rate=0.001)
    for words, message in (
            (["--stps=1"], "unknown option --stps=1; the nearest is --steps"),
            (["--=1"], "unknown option --=1"),
            (["--steps=1.5"], "--steps=1.5: steps takes --steps=int"),
            (["--steps"], "steps takes --steps=int"), (["--rate=x"], "rate takes --rate=float"),
            (["--quiet=maybe"], "quiet takes --quiet=bool"),
            (["nowhere.toml"], "file of options 'nowhere.toml' cannot be used (FileNotFoundError")):
        refusal(parse_config, Options, words, match=re.escape(message))
    path.write_text("steps = 'many'")
    refusal(parse_config, Options, [str(path)], match="--steps=many: steps takes")
    path.write_text("stepz = 3")
    refusal(parse_config, Options, [str(path)], match="the nearest is --steps")
    for text in (b"steps == 1", b"\xff\xfe", b"[" * 5000):
        path.write_bytes(text)
        refusal(parse_config, Options, [str(path)], match="an option is --key=value")


def test_help_lists_each_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Options, ["--steps=x", "--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == __doc__
    assert [line.split() for line in lines if line.startswith("  --")] == [
        "--steps=10 number of steps".split(), "--rate=0.5 its size".split(),
        "--prompt='' text, 'quoted' or not".split(), "--quiet=False print nothing".split()]


def test_subcommands_come_first(capsys):
    got = []
    common.run_command({"walk": got.append, "sit": None}, "the docstring", ["walk", "--far"])
    assert got == [["--far"]] and not capsys.readouterr().out
    for words in ([], ["wlk"], ["--far", "walk"]):
        message = refusal(common.run_command, {"walk": got.append, "sit": None}, "usage", words)
        assert message == "the first word is one of walk, sit; each takes --help"
        assert capsys.readouterr().out == "usage\n"


@pytest.mark.parametrize("error,status,said", [
    (None, 0, ""), (UserError("no"), 2, "error: no\n"), (KeyboardInterrupt(), 130, ""),
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    (SystemExit(143), 143, ""), (SystemExit(), 0, "")])
def test_exit_statuses(error, status, said, monkeypatch, capsys):
    """A rank leaves at once: threads of gloo may outlive the group and abort the interpreter."""
    def main(words):
        assert words == ["--a"]
        if error:
            raise error

    def leave(code):
        raise SystemExit(code, "at once")
    monkeypatch.setattr(sys, "argv", ["script.py", "--a"])
    monkeypatch.setattr(common.os, "_exit", leave)
    for rank, want in (("", (status,)), ("1", (status, "at once"))):
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as e:
            common.run_main(main)
        assert e.value.args == want and capsys.readouterr().err == said


def test_a_script_ends_with_one_line_and_status_2():
    done = subprocess.run([sys.executable, ROOT / "attribute.py", "query", "--out_dir=nowhere"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: nowhere.* cannot be used .*python train.py.*\n", done.stderr)


def test_plain_text_cannot_act():
    assert common.plain("naïve 'x' \\ «y»") == "naïve 'x' \\ «y»"
    assert common.plain("a\x1b[2J\r\n\u202e\ud800") == r"a\x1b[2J\r\n\u202e\ud800"
    assert common.plain("a\n\t\x07", keep="\n\t") == "a\n\t\\x07"


# -- files

def test_atomic_writes_leave_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "a.json"
    common.write_json(path, {"é": [1]})
    assert json.loads(path.read_text("utf-8")) == {"é": [1]}
    with common.atomic(path) as f:
        f.write(b"second")
        assert json.loads(path.read_text("utf-8")) == {"é": [1]}  # until the block ends
    assert path.read_bytes() == b"second"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), common.atomic(path, "w", encoding="utf-8") as f:
            f.write("half")
            f.flush()
            raise error
        with pytest.raises(error), common.atomic(tmp_path / "never", "w") as f:
            raise error
    assert path.read_bytes() == b"second" and not (tmp_path / "never").exists()
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]  # no temporary file stays


def test_reading_makes_one_line_of_any_failure():
    def read(error):
        with common.reading("the file 'x'", "run: y"):
            raise error
    assert refusal(read, KeyError("b")) == "the file 'x' cannot be used (KeyError: 'b'); run: y"
    long = refusal(read, RuntimeError("a\n  b " * 500))
    assert long.startswith("the file 'x' cannot be used (RuntimeError: a b a b")
    assert long.endswith("); run: y")
    assert refusal(read, UserError("its own")) == "its own"
    with pytest.raises(KeyboardInterrupt):
        read(KeyboardInterrupt())


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def write_checkpoint(path, model):
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), step=1), path)


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_checkpoints_of_others_are_refused_and_never_run(tmp_path, capsys):
    model, path = tiny(torch.float32), tmp_path / "ckpt.pt"
    write_checkpoint(path, model)
    for where in (tmp_path, path, str(path)):
        loaded, ckpt = common.load_checkpoint(where)
        assert ckpt["step"] == 1 and not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    whole, config = path.read_bytes(), asdict(model.config)
    torch.save({"model": Evil(), "config": config}, path)
    evil = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"hello", pickle.dumps(Evil(), 2), evil):
        path.write_bytes(content)
        message = refusal(common.load_checkpoint, tmp_path)
        assert message.startswith(f"{path} cannot be used")
    foreign = model.state_dict() | {"prototypes": torch.ones(5, 7)}
    for content in ([1, 2], torch.ones(3), {"model": {}}, {"model": {}, "config": config},
                    {"model": {}, "config": {"n_layers": 2}}, {"model": [1], "config": config},
                    {"model": {"a": 1}, "config": config}, {"model": foreign, "config": config},
                    {"model": {}, "config": config | {"n_embd": 2 ** 62}},
                    {"model": {}, "config": config | {"n_embd": "six"}}):
        torch.save(content, path)
        refusal(common.load_checkpoint, tmp_path, match="cannot be used .*'model' and 'config'")
    torch.save({"model": {}, "config": config | {"top_k": 6}}, path)
    refusal(common.load_checkpoint, tmp_path, match="top_k is 6")
    refusal(common.load_checkpoint, tmp_path / "nowhere", match="train first")
    assert "never run" not in capsys.readouterr().out


def test_a_fingerprint_is_that_of_names_shapes_types_and_values():
    state = tiny().state_dict()
    shuffled = dict(reversed(state.items()))
    assert fingerprint(state) == fingerprint(shuffled)
    changed = [dict(state), {k: v.float() for k, v in state.items()}, dict(state)]
    changed[0]["prototypes"] = state["prototypes"].clone()
    changed[0]["prototypes"][4, 5] += 1e-12
    changed[2]["prototypes"] = state["prototypes"].view(6, 5)
    assert len({fingerprint(s) for s in (state, *changed)}) == 4
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(state))


@pytest.fixture()
def gains_file(tmp_path):
    """A model, and a function that writes a file of gains for it -> the file's path."""
    model = tiny(torch.float32)
    good = dict(checkpoint=fingerprint(model.state_dict()), ids=[1, 4], gains=[0.0, 2.5])

    def write(name, text=None, **changes):
        path = tmp_path / name
        path.write_text(json.dumps(good | changes) if text is None else text)
        return path
    return model, write


def direction(**changes):
    good = dict(ids=[2, 0], weights=[0.5, -3], threshold=0.25, direction=[1, 2, 3, 4, 5, 6])
    return good | changes


def test_gains_files_compose(gains_file):
    model, write = gains_file
    path = write("a.json")                                        # as before there were directions
    edit = load_gains(path, model)
    assert isinstance(edit, Edit) and all(part.dtype is torch.float32 for part in edit)
    assert edit.g.tolist() == [1, 0, 1, 1, 2.5]
    assert edit.w.shape == (1, 5) and edit.c.shape == (1,) and edit.u.shape == (1, 6)
    assert not any(part.any() for part in edit[1:])
    one = write("b.json", ids=[4, 0], gains=[-2, 3], directions=[direction()])
    always, never = direction(ids=[3], weights=[1], threshold=-1), direction(ids=[], weights=[])
    two = write("c.json", ids=[], gains=[], directions=[always, never])
    edit = load_gains(one, model)
    assert edit.g.tolist() == [3, 1, 1, 1, -2]
    assert edit.w[1].tolist() == [-3, 0, 0.5, 0, 0]
    assert edit.c.tolist() == [0, 0.25] and edit.u[1].tolist() == [1, 2, 3, 4, 5, 6]
    assert load_gains(f"{path},{one}", model).g.tolist() == [3, 0, 1, 1, -5]
    # states of both files together: gains multiply, what directions add is a sum
    z = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    m, P = model.mixture(z), model.prototypes
    edits = [load_gains(name, model) for name in (one, two, f"{one},{two}", f"{two},{one}")]
    a, b, both, reverse = [edit.apply(z, m.ids, m.gates, P) for edit in edits]
    assert not torch.allclose(a, z) and not torch.allclose(b, z)
    torch.testing.assert_close(both, a + b - z)
    torch.testing.assert_close(reverse, both)
    double = tiny()
    double.load_state_dict(model.state_dict())                    # of another type: other weights
    refusal(load_gains, one, double, match="another checkpoint")


def test_gains_files_of_others_are_refused(gains_file, tmp_path):
    model, write = gains_file
    good = write("good.json", directions=[direction()])
    refusal(load_gains, f"{good},{tmp_path}/none.json", model, match="FileNotFoundError")
    nan, inf = math.nan, math.inf
    other, distinct = "it was made for another checkpoint", "as many different ids below 5"
    for changes, message in (
            (dict(checkpoint="ff"), other), (dict(checkpoint=None), other),
            (dict(ids=[1, 5]), distinct), (dict(ids=[-1, 1]), distinct),
            (dict(ids=[1, 1]), distinct), (dict(ids=[1]), distinct),
            (dict(ids=[0.5, 1]), distinct), (dict(gains=[1.0] * 10 ** 5), distinct),
            (dict(ids=list(range(10 ** 5))), distinct), (dict(gains=[1, nan]), "finite"),
            (dict(gains=[1, inf]), "finite"), (dict(gains=[1, -inf]), "finite"),
            (dict(gains=[1, 1e300]), "finite"), (dict(gains=[1, 3e38]), "finite"),
            (dict(ids=[1, 10 ** 400]), distinct), (dict(ids=["1", "4"]), distinct),
            (dict(gains=[1, 10 ** 400]), ""), (dict(gains=["0", "1"]), ""), (dict(gains=1), ""),
            (dict(gains=[[0.0], [1.0]]), ""), (dict(gains=[[0.0, 1.0]], ids=[1]), ""),
            (dict(ids={"1": 0, "4": 0}), ""), (dict(ids="", gains=[]), ""), (dict(ids=None), ""),
            (dict(directions=3), ""), (dict(directions=None), ""), (dict(directions="abc"), ""),
            (dict(directions=[3]), ""), (dict(directions={"ids": []}), ""),
            (dict(directions=[{}]), "KeyError")):
        path = write("bad.json", **changes)
        refusal(load_gains, path, model, match=f"^gains file '{path}' .*{message}")
        refusal(load_gains, f"{good},{path}", model, match=f"^gains file '{path}' ")
    for changes, message in (
            (dict(direction=[1] * 5), "below 6"), (dict(direction=[1] * 7), "below 6"),
            (dict(direction=[]), "below 6"), (dict(direction=[0] * 5 + [nan]), "finite"),
            (dict(direction=[0] * 5 + [inf]), "finite"), (dict(direction=[1e9] * 6), "finite"),
            (dict(direction=["1"] * 6), ""), (dict(direction=[[1]] * 6), ""),
            (dict(direction=1), ""), (dict(direction=None), ""), (dict(direction="abcdef"), ""),
            (dict(ids=[2, 5]), distinct), (dict(ids=[2, -1]), distinct),
            (dict(ids=[2, 2]), distinct), (dict(ids=[2]), distinct), (dict(ids="20"), distinct),
            (dict(weights=[1, nan]), "finite"), (dict(weights=[1, -inf]), "finite"),
            (dict(weights=[1, 2, 3]), distinct), (dict(weights=["1", "2"]), ""),
            (dict(threshold=nan), "finite"), (dict(threshold=-inf), "finite"),
            (dict(threshold=1e7), "finite"), (dict(threshold=10 ** 400), ""),
            (dict(threshold=[0.5]), ""), (dict(threshold=[0.5, 1]), ""),
            (dict(threshold="0.5"), ""), (dict(threshold=None), "")):
        path = write("bad.json", directions=[direction(), direction(**changes)])
        refusal(load_gains, path, model, match=f"^gains file '{path}' .*{message}")
    for text in ("{", "[" * 10 ** 5, "[]", "3", "", '{"ids": [], "gains": []}', "\x00",
                 '{"checkpoint": "%s"}' % fingerprint(model.state_dict())):
        path = write("bad.json", text)
        refusal(load_gains, path, model, match="python suppress.py find writes one")


# -- datasets

def test_tokenizers(tmp_path):
    folder = write_dataset(tmp_path / "d", [1], [1])
    tokenizer = common.load_tokenizer(folder)
    text = "é\r\n <|endoftext|> \U0001f600"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eot_token == 256 and tokenizer.n_vocab == 257
    ranks, about = (folder / "tokenizer.tiktoken"), (folder / "tokenizer.json")
    whole = ranks.read_bytes()
    for content in (b"YQ== 0\nYg== 0", b"YQ== 256", b"YQ== -1", b"YQ== 4294967295", b"no rank",
                    b"YQ== 1 2", b"\xff\xfe"):
        ranks.write_bytes(content)
        refusal(common.load_tokenizer, folder, match="the tokenizer in .*data/prepare.py")
    ranks.write_bytes(whole)
    for content in ("{", "[]", '{"name": "x", "pattern": "(", "eot": 256}',
                    '{"name": "x", "pattern": ".", "eot": "a"}'):
        about.write_text(content)
        refusal(common.load_tokenizer, folder, match="the tokenizer in")
    refusal(common.load_tokenizer, tmp_path, match="FileNotFoundError")


def test_datasets_that_disagree_with_their_meta(tmp_path):
    folder = tmp_path / "d"
    train, val, meta = common.load_dataset(write_dataset(folder, range(100), range(50)))
    assert train.tolist() == list(range(100)) and len(val) == 50 and meta["vocab_size"] == 257
    wide = common.load_dataset(write_dataset(tmp_path / "w", [70_000], [1], dtype="uint32"))
    assert wide[0].tolist() == [70_000]
    for name, content, message in (
            ("train.bin", None, "FileNotFoundError"),
            ("train.bin", b"12", "train.bin has 1 tokens, unlike meta.json"),
            ("train.bin", b"", "cannot be used"), ("train.bin", b"123", "cannot be used"),
            ("val.bin", b"\0" * 100, "val.bin differs from its sha256"),
            ("meta.json", None, "FileNotFoundError"), ("meta.json", b"{", "JSONDecodeError"),
            ("meta.json", b'{"dtype": "float8"}', "KeyError"), ("meta.json", b"[]", "TypeError")):
        write_dataset(folder, range(100), range(50))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        refusal(common.load_dataset, folder, match=f"the dataset in {folder} .*{message}")
    assert common.dataset_folder(folder) == folder
    assert common.dataset_folder("pydoc") == ROOT / "data" / "pydoc"


def test_documents(tmp_path):
    rows = [dict(split="train", start=0, length=4, title="a", source="s"),
            dict(split="val", start=0, length=3, title="v", source="s"),
            dict(split="train", start=4, length=6, title="b", source=7)]
    path = tmp_path / "docs.json"
    path.write_text(json.dumps(rows))
    start, titles, sources = common.load_documents(tmp_path, "train", 10)
    assert start.tolist() == [0, 4] and titles == ["a", "b"] and sources == ["s", "7"]
    assert common.load_documents(tmp_path, "val", 3)[1] == ["v"]
    for n in (0, 2):
        for start in (5, -1, 10, "x", 2 ** 70):
            bad = [dict(row) for row in rows]
            bad[n]["start"] = start
            path.write_text(json.dumps(bad))
            if (n, start) != (2, 5):                              # that one fits
                refusal(common.load_documents, tmp_path, "train", 10, match="docs.json")
    for text in ("{", "[]", "[1]", '[{"split": "train"}]'):
        path.write_text(text)
        refusal(common.load_documents, tmp_path, "train", 10, match="docs.json cannot be used")


def test_windows_are_a_pure_function_and_do_not_overlap():
    a = window_starts(1000, 16, 3, 5)
    np.random.seed(1)
    assert a.tolist() == window_starts(1000, 16, 3, 5).tolist()
    assert a.tolist() != window_starts(1000, 16, 3, 6).tolist()
    assert a.tolist() != window_starts(1000, 16, 4, 5).tolist()
    assert a[:5].tolist() == [752, 224, 352, 144, 896]             # in any version
    for n in range(32, 70):
        offsets = set()
        for epoch in range(60):
            s = np.sort(window_starts(n, 16, 0, epoch))
            assert len(s) == (n - 16) // 16 and (np.diff(s) == 16).all()
            assert 0 <= s[0] < 16 and s[-1] + 17 <= n             # the last target exists
            offsets.add(int(s[0]))
        assert len(offsets) > 12                                  # an epoch has its own offset
    refusal(window_starts, 31, 16, 0, 0, match="31 training tokens, expected two windows")


# -- a trained run

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), iters=2)


def test_a_run_is_the_model_with_its_text(out):
    run = Run(out, "cpu")
    assert run.T == 16 and run.hash == fingerprint(run.ckpt["model"]) and not run.model.training
    assert not any(p.requires_grad for p in run.model.parameters())
    assert run.titles[3] == "document 3" and run.source_of[3] == "source <1>"
    assert run.sources.tolist() == ["source <0>", "source <1>"]
    assert [run.sources[s] for s in run.doc_source] == run.source_of
    first = run.train[run.doc_start[1]:run.doc_start[1] + 4]
    assert run.decode(first) == bytes(first.tolist()).decode()


def copied(out, folder, **changes):
    """A copy of the run `out` and its dataset, with changes to its checkpoint -> their folders."""
    new = Path(shutil.copytree(out.parent, folder))
    ckpt = common.load_tensors(new / "out/ckpt.pt")
    ckpt["train_config"]["dataset"] = str(new / "tiny")
    torch.save(ckpt | changes, new / "out/ckpt.pt")
    return new / "out", new / "tiny"


def test_a_run_without_its_text_or_of_other_text_is_refused(out, tmp_path):
    here, data = copied(out, tmp_path / "a")
    Run(here, "cpu")
    shutil.rmtree(data)
    refusal(Run, here, "cpu", match="the dataset in .*tiny cannot be used")
    assert Run(here, "cpu", text=False).decode([97]) == "a"       # sampling takes no text
    here, data = copied(out, tmp_path / "b")
    docs = (data / "docs.json").read_text()
    write_dataset(data, [97] * 3000, [97] * 300)
    (data / "docs.json").write_text(docs)
    refusal(Run, here, "cpu", match=f"it was trained on another version of {data}")
    here, data = copied(out, tmp_path / "c", train_config={})
    refusal(Run, here, "cpu", match="ckpt.pt cannot be used .KeyError.*train it again")
    refusal(Run, out, "cuda:99", match="--device=cuda:99 cannot be used")
    refusal(Run, out, "abacus", match="expected auto, cpu, cuda or mps")


def test_a_dense_run_has_no_prototypes_to_explain(out, tmp_path):
    model = tiny(torch.float32, vocab_size=257, n_proto=0)
    write_checkpoint(tmp_path / "ckpt.pt", model)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        shutil.copy(out / name, tmp_path)
    refusal(Run, tmp_path, "cpu", match="holds a dense model")
    assert Run(tmp_path, "cpu", text=False).model.config.n_proto == 0


def test_devices():
    assert common.pick_device("cpu") == torch.device("cpu")
    assert isinstance(common.pick_device("auto"), torch.device)
    assert common.set_up_ranks("cpu") == (0, 1, torch.device("cpu"))
