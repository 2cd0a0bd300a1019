"""Runs every command and the Python of README.md, in small, so that the page cannot rot."""
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SMALL = {"train.py": "--max_iters=40 --eval_interval=40 --n_layer=1 --n_head=2 --n_embd=32 "
                     "--n_proto=64 --top_k=4 --block_size=64 --batch_size=4 --total_batch_tokens=512 "
                     "--eval_tokens=2000 --dtype=float32 --device=cpu",
         "prepare.py": "--vocab_size=400 --data_dir=.",
         "suppress.py find": "--tokens=4000 --price=5000 --kl=100 --size=16",
         "suppress.py apply": "--max_new_tokens=20",
         "sample.py": "--max_new_tokens=20"}


def shown_commands():
    """The words of each command line of the README's indented blocks, without its comment."""
    found = []
    for line in re.findall(r"^    ((?:python|torchrun|make) .*)$", README, re.M):
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words[0] in ("python", "torchrun", "make"):
                found.append(words)
    return found


def small(words):
    """A command's script, the words behind it, and options that make it small."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    names = [words[at].split("/")[-1], *words[at + 1:at + 2]]
    extra = SMALL.get(" ".join(names)) or SMALL.get(names[0], "")
    return words[at], words[at + 1:], extra.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a few texts, and pydoc cut down to its first documents."""
    sys.path.insert(0, str(ROOT / "data"))
    prepare = importlib.import_module("prepare")
    pydoc, *rest = prepare.SOURCES["pydoc"]
    few = lambda words, cfg: itertools.islice(pydoc(words, cfg), 120)  # noqa: E731
    where, before = tmp_path_factory.mktemp("readme"), os.getcwd()
    (where / "books").mkdir()
    for name in ("one", "two", "three"):
        text = f"Chapter {name}. The cat sat on the mat and the dog ran to the log. " * 200
        (where / "books" / f"{name}.txt").write_text(text)
    (where / "config").symlink_to(ROOT / "config")
    prepare.SOURCES["pydoc"] = (few, *rest)
    os.chdir(where)
    yield where
    os.chdir(before)
    prepare.SOURCES["pydoc"] = (pydoc, *rest)


@pytest.fixture(scope="module")
def ran(folder):
    """Every command of the README, run; the folder that they wrote into."""
    commands = shown_commands()
    assert len(commands) >= 20
    kinds = {words[0] for words in commands}
    assert kinds == {"python", "torchrun", "make"}
    for words in commands:
        if words[0] == "make":                                    # the Makefile knows its target
            known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
            assert words[1] in known, words
        elif words[1] == "-m":
            assert words[2:] == ["venv", ".venv"]
        else:
            script, options, extra = small(words)
            module = importlib.import_module(Path(script).stem)
            assert (ROOT / script).is_file()
            if "fineweb_edu" in options:                          # a download of 28 GB
                with pytest.raises(ModuleNotFoundError, match="huggingface_hub|pyarrow"), \
                        pytest.MonkeyPatch.context() as patch:
                    patch.setitem(sys.modules, "huggingface_hub", None)
                    patch.setitem(sys.modules, "pyarrow", None)
                    module.prepare(["fineweb_edu"], module.parse_config(
                        module.PrepareConfig, [*options[1:], "--tokenizer=byte", *extra]))
                continue
            if words[0] == "torchrun":
                torchrun(script, [*options, *extra, "--dataset=pydoc", "--out_dir=out-130m",
                                  "--warmup_iters=4", "--max_iters=4", "--eval_interval=4"])
                continue
            first = [word for word in options if not word.startswith("--")]
            module.main([*first, *extra, *options[len(first):]])
    return folder


def test_every_command_of_the_readme_runs(ran):
    for name in ("out/report.html", "out/loss.png", "out/gains/examples.sweep.json",
                 "out-mine-dense/ckpt.pt", "out-130m/ckpt.pt"):
        assert (ran / name).exists(), name


def torchrun(script, options):
    """Two ranks on the CPU for the eight GPUs of the README."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(ROOT / script), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    r = subprocess.run(command, capture_output=True, text=True, env=env, timeout=140)
    assert r.returncode == 0, r.stderr[-2000:]


def test_the_readmes_python_runs(ran):
    block = re.search(r"## From Python\n\n((?:    .*\n|\n)+)", README)[1]
    code = "".join(line[4:] + "\n" for line in block.splitlines())
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    e = names["e"]
    total = e.contributions.sum(-1) + e.residual
    assert (total - e.logit).abs().max() < 1e-4
    assert names["out"].shape[1] == names["idx"].shape[1] + 50


def test_the_table_of_files_is_true():
    rows = re.findall(r"^\| `([\w/]+\.\w+)`.*?\| (\d+) \|", README, re.M)
    assert len(rows) >= 7
    for name, lines in rows:
        assert len((ROOT / name).read_text("utf-8").splitlines()) == int(lines), name
