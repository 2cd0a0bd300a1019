"""The course pack: cuts, patches, keys, and a grader that hostile submissions get nothing from."""
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
import course  # noqa: E402
import prove_course  # noqa: E402

AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                             reason="the sandbox needs root")
LOOP = "while True: pass"
# what stands in a function of A1, whose arguments are args, or "import:" at the top of prism.py
ATTACKS = {
    "endless loop": LOOP,
    "import hangs": "import:" + LOOP,
    "100 GB": "return torch.ones(25 * 10 ** 9)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "sys.exit": "import sys\nsys.exit(0)",
    "import exits": "import:import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "escape by setsid": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:"
                        "\n        time.sleep(600)\n    os._exit(0)\nreturn args[0]",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "kills its parents": "import os, signal\nfor pid in range(1, 99999):\n    try:\n        "
                         "pid != os.getpid() and os.kill(pid, 9)\n    except OSError:\n        pass",
    "printed results": "import os, sys\ntext = '{\"score\": 54, \"tests\": []}'\nprint(text)\n"
                       "open('results.json', 'w').write(text)\nos.write(1, text.encode())",
    "forged frame": "import os, io, numpy as np\nf = io.BytesIO()\nnp.savez(f, score=np.ones(9))\n"
                    "os.write(3, f.getvalue())\nos._exit(0)",
    "pickle in a frame": "import os, io, numpy as np\nf = io.BytesIO()\n"
                         "np.savez(f, sum=np.array([print], object))\nos.write(3, f.getvalue())\n"
                         "os._exit(0)",
    "endless frame": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "zip bomb": "import os, io, numpy as np\nf = io.BytesIO()\n"
                "np.savez_compressed(f, sum=np.zeros(10 ** 7))\nos.write(3, f.getvalue())\n"
                "os._exit(0)",
    "patched torch": "import numpy as np\ntorch.allclose = torch.equal = lambda *a, **k: True\n"
                     "np.abs = np.isfinite = lambda *a: np.zeros(1)\nreturn args[0]",
    "overloaded comparison": "import numpy as np\nclass Right(np.ndarray):\n"
                             "    __eq__ = __le__ = __lt__ = lambda *a: True\n"
                             "    __sub__ = __rsub__ = lambda *a: np.zeros(1)\n"
                             "return np.zeros((40, 6)).view(Right)",
    "reads the reference": "space = {}\nexec(open('ROOT/prism.py').read(), space)\n"
                           "return eval('NAME', space)(*args)",
    "imports the reference": "import sys\nsys.path[:] = ['ROOT', *sys.path[2:]]\n"
                             "sys.modules.pop('prism')\nimport prism\nreturn prism.NAME(*args)",
    "parents' memory": "import os, re\nfor pid in (os.getppid(), GRADER):\n"
                       "    open(f'/proc/{pid}/mem', 'rb').read(1)\nreturn args[0]",
    "reads the key": "import numpy as np\nk = np.load('GRADER_FOLDER/key.npz')\n"
                     "return torch.from_numpy(k[k.files[0]])",
    "writes to the grader": "open('GRADER_FOLDER/key.json', 'w').write('{}')",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).recv(9)",
    "syntax error": "import:def f(:",
    "import error": "import:import a_package_that_is_not_there",
    "wrong shape": "return torch.zeros(3)",
    "NaN": "return torch.full((40, 6), float('nan'))",
    "object array": "import numpy as np\nreturn np.array([[None] * 6] * 40)",
    "kills the sweeper": "import os\nif os.fork() == 0:\n    while True:\n        try:\n"
                         "            os.kill(-1, 9)\n        except OSError:\n            pass\n"
                         "return args[0]",
    "words in a frame": "import os, io, numpy as np\nf = io.BytesIO()\n"
                        "np.savez(f, sum=np.array(['a']))\nos.write(3, f.getvalue())\nos._exit(0)",
    "a message that acts": "raise ValueError('\\ud800\\x1b[2J\\n 54 of 54')",
    "deep folders": "import os\nfor i in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\n"
                    "return args[0]",
    "reads a neighbour": "open('NEIGHBOURS/0/prism.py')",
    "str() hangs": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E()",
}
ARRAYS = ("wrong shape", "NaN", "object array", "overloaded comparison", "patched torch",
          "forged frame")


def grader_of(folder, assignment, year=0):
    course.autograder(SimpleNamespace(assignment=assignment, year=year, out=folder))
    return folder / f"{assignment}-{year or 'published'}-grader"


@pytest.fixture(scope="module")
def a1(tmp_path_factory):
    folder = grader_of(tmp_path_factory.mktemp("a1"), "a1")
    facts = json.loads((folder / "key.json").read_text())
    facts["limits"] |= {"seconds": 4, "total": 40}
    (folder / "key.json").write_text(json.dumps(facts))
    return folder


def run(grader, submission, *options, umask=-1):
    """grade.py as a process -> its results.json, what it printed, seconds"""
    out, start = submission / "results.json", time.monotonic()
    words = [sys.executable, str(grader / "grade.py"), str(submission), f"--out={out}", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, umask=umask)
    assert out.exists(), done.stderr
    return json.loads(out.read_text()), done.stdout, time.monotonic() - start


def submit(folder, files, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / Path(name).name).write_text(files[name])
    return folder


def processes():
    """Of the sandbox's users"""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            uid = int(re.search(r"Uid:\s+(\d+)", path.read_text()).group(1))
        except OSError:
            continue
        found += [path] if 50000 <= uid < 60000 else []
    return found


def hostile(stubs, attacks):
    """Stubbed files with one attack per function, or the single one at the import"""
    codes = {(file, name): code for (_, file, name), code in attacks}
    (file, _), code = next(iter(codes.items()))
    if code.startswith("import:"):
        start = code.removeprefix("import:") + "\nimport math"
        return stubs | {file: stubs[file].replace("import math", start, 1)}

    def body(file, name):
        lines = codes[file, name].replace("NAME", name).splitlines()
        indent = " " * (4 + 4 * name.count("."))
        return [indent + line for line in ["args = [*locals().values()]", *lines]]
    return course.replaced(stubs, [SimpleNamespace(stubs=list(codes))], body)


@AS_ROOT
def test_no_attack_gains_anything(a1, tmp_path):
    places = [("mixing", "prism.py", "mix"), ("firing", "prism.py", "Edit.fire"),
              ("editing", "prism.py", "Edit.apply"), ("head", "prism.py", "prototype_head"),
              ("gate_parts", "sample.py", "gate_ledger")]
    before = (a1 / "key.json").read_bytes(), (a1 / "key.npz").read_bytes()
    stubs, groups, said = course.stubbed("a1", 0), [], {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        known = {"GRADER_FOLDER": a1, "GRADER": os.getpid(), "ROOT": ROOT,
                 "PORT": server.getsockname()[1], "NEIGHBOURS": tmp_path}
        inside = []
        for name, code in ATTACKS.items():
            for word, value in known.items():
                code = code.replace(word, str(value))
            if code.startswith("import:"):
                groups.append([(name, places[0], code)])
            else:
                inside.append((name, code))
        # what returns an array of the right kind attacks mix(), the first place
        inside.sort(key=lambda item: item[0] not in ARRAYS)
        n = math.ceil(len(inside) / len(places))
        for i in range(n):
            some = inside[i::n]
            groups.append([(name, place, code) for (name, code), place in zip(some, places)])

        def attack(number, group):
            files = hostile(stubs, [(place, code) for _, place, code in group])
            folder = submit(tmp_path / str(number), files, ["prism.py", "sample.py"])
            return run(a1, folder)
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(attack, range(len(groups)), groups))
        with pytest.raises(TimeoutError):
            server.accept()                              # nobody came
    for group, (result, _, seconds) in zip(groups, outcomes):
        assert result["score"] == 0 and len(result["tests"]) == 8 and seconds < 60, group
        by_check = {test["name"].split(":")[0]: test["output"] for test in result["tests"]}
        said |= {name: by_check[place[0]] for name, place, _ in group}
    expected = {
        "endless loop": "no answer within", "import hangs": "nothing was run: no answer within",
        "100 GB": "memory", "fork bomb": "Resource temporarily unavailable", "sys.exit": "SystemExit",
        "import exits": "nothing was run: prism.py, line 12: SystemExit",
        "os._exit": "ended without an answer", "segmentation fault": "ended without an answer",
        "stops itself": "no answer within", "forged frame": "missing: ",
        "pickle in a frame": "no .npz of numbers", "endless frame": "too long",
        "zip bomb": "too long", "reads the reference": "Error",
        "imports the reference": "Error", "parents' memory": "Permission",
        "reads the key": "Error", "writes to the grader": "Error", "network": "unreachable",
        "syntax error": "prism.py, line 11: SyntaxError", "wrong shape": "shape (3,)",
        "import error": "a_package_that_is_not_there", "NaN": "NaN", "object array": "object",
        "str() hangs": "no answer within"}
    for name, words in expected.items():
        assert words in said[name], (name, said[name])
    assert before == ((a1 / "key.json").read_bytes(), (a1 / "key.npz").read_bytes())
    assert not processes()


@pytest.mark.parametrize("assignment", course.ASSIGNMENTS)
def test_a_completed_release_is_the_source_and_holds_no_line_that_was_cut(assignment):
    checks, files = course.read_checks(assignment), course.source(assignment)
    stubs = course.replaced(files, checks, course.blank)
    assert stubs != files
    assert course.replaced(stubs, checks, prove_course.body_in(files)) == files
    assert not prove_course.leftovers(assignment, files, stubs)
    for mistake in course.read_mistakes(assignment):
        assert course.patched(files, mistake) != files


def test_a_renamed_function_and_a_patch_that_does_not_fit_are_named():
    files, checks = course.source("a1"), course.read_checks("a1")
    files["prism.py"] = files["prism.py"].replace("def prototype_head", "def head")
    with pytest.raises(course.Stop, match="prism.py has no function prototype_head"):
        course.replaced(files, checks, course.blank)
    with pytest.raises(course.Stop, match="head no_relu: 'gone' occurs 0 times in prism.py"):
        course.patched(files, course.Mistake("head", "no_relu", "", [("prism.py", "gone", "")]))
    with pytest.raises(course.Stop, match="is no Python with it"):
        course.patched(files, course.Mistake("head", "x", "", [("prism.py", "import math", "(")]))


def test_trusted_grades_tell_the_mistake_and_are_the_same_each_time(a1, tmp_path):
    files = course.source("a1")
    right = submit(tmp_path / "right", files, ["prism.py", "sample.py"])
    blank = submit(tmp_path / "blank", course.stubbed("a1", 0), ["prism.py", "sample.py"])
    mistake = next(m for m in course.read_mistakes("a1") if m.name == "no_relu")
    wrong = submit(tmp_path / "wrong", course.patched(files, mistake), ["prism.py", "sample.py"])
    assert run(a1, right, "--trusted")[0]["score"] == 54
    assert run(a1, blank, "--trusted")[0]["score"] == 0
    first, printed, _ = run(a1, wrong, "--trusted")
    outputs = {test["name"].split(":")[0]: test["output"] for test in first["tests"]}
    assert mistake.message in outputs["head"] and mistake.message in printed
    assert "--check=head --seed=" in outputs["head"] and not outputs["mixing"]
    assert run(a1, wrong, "--trusted")[0] == first


@AS_ROOT
def test_the_sandbox_gives_full_marks_to_the_source(a1, tmp_path):
    right = submit(tmp_path / "right", course.source("a1"), ["prism.py", "sample.py"])
    result, printed, _ = run(a1, right, umask=0o077)
    assert result["score"] == 54 and "54 of 54" in printed
    assert a1.stat().st_mode & 0o777 == 0o700            # the key, and the zip that holds it
    (right / "prism.py").unlink()
    (right / "prism.py").symlink_to(a1 / "key.json")
    result, _, _ = run(a1, right)
    assert result["score"] == 0 and "prism.py is no file" in result["tests"][0]["output"]
    (right / "prism.py").unlink()
    result, _, _ = run(a1, right)                        # its stub is graded
    assert result["score"] == 8 and "missing" in result["output"]
    assert "not written yet" in result["tests"][0]["output"]
