"""Compares a submission's numbers with a key: your own work in a release, or that of others.

    python grader/grade.py . --trusted                         your own files, in this process
    python grade.py SUBMISSION --out=results.json              as root: in a sandbox
    python grader/grade.py . --trusted --check=head --seed=12  one check at the seed of a failure

A check is a program of checks.py that returns arrays; the key holds the right ones for its seeds,
and those of typical mistakes. They are equal if they differ by at most 1e-7 of the largest entry.
"""
import argparse
import ast
import contextlib
import io
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import worker

HERE = Path(__file__).resolve().parent
LARGEST = 2 ** 20                                        # bytes of a submitted file
OPEN = "no network namespace here: nothing but its user id keeps the submission off the network"


class Stop(Exception):
    """A mistake of whoever grades or builds: one line."""


# ------------------------------------------- comparing
def tolerance(expected):
    return 1e-7 if expected.dtype == np.float64 else 1e-4         # what holds float32 is float32


def difference(found, expected):
    """Two arrays -> the largest difference as a share of the largest expected entry."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return np.inf
    if not found.size:
        return 0.0
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)


def first_fault(found, expected):
    """Where two sets of arrays, {name: array}, differ, in words; "" if all agree"""
    if found.keys() != expected.keys():
        missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
        return f"missing: {sorted(missing)}, not expected: {sorted(more)}"
    for name, right in expected.items():
        mine = found[name]
        if mine.shape != right.shape:
            return f"{name} has shape {mine.shape}, expected {right.shape}"
        if not np.isfinite(mine).all():
            return f"{name} holds NaN or infinity"
        off = difference(mine, right)
        if not off <= tolerance(right):                  # a mistake's numbers may be NaN
            at = np.unravel_index(np.abs(mine - right).argmax(), mine.shape)
            place = f" at [{', '.join(map(str, at))}]" if at else ""
            return (f"{name} {mine.shape} is off by {off:.1e} of its largest entry{place}, where "
                    f"it holds {mine[at]:.6g}")
    return ""


def by_seed(arrays):
    """{"seed/name": array} -> {seed: {name: array}}, seeds as words"""
    found = {}
    for path, array in arrays.items():
        seed, _, name = path.partition("/")
        found.setdefault(seed, {})[name] = array
    return found


def judge(key, check, arrays):
    """One check's arrays, "seed/name" -> whether they are right, and what to say if not"""
    if "error" in arrays:
        return False, str(arrays["error"])[:400]
    answers = by_seed(arrays)
    for seed in map(str, key.seeds[check]):
        found = answers.get(seed, {})
        why = first_fault(found, key.arrays[check, seed, ""])
        if not why:
            continue
        told = [message for mutant, message in key.mutants[check].items()
                if not first_fault(found, key.arrays.get((check, seed, mutant), {}))]
        if told:
            why = f"{why}. These are the numbers of this mistake: {' -- or: '.join(told)}"
        again = f".venv/bin/python grader/grade.py . --trusted --check={check} --seed={seed}"
        return False, f"{why}. Seed {seed}; to see your numbers: {again}"
    return True, ""


class Key:
    """key.json: files, checks, seeds, messages; key.npz: arrays check/seed/mutant/name."""
    def __init__(self, folder):
        facts = json.loads((folder / "key.json").read_text("utf-8"))
        self.title, self.files, self.limits = facts["title"], facts["files"], facts["limits"]
        self.checks, self.seeds, self.mutants = facts["checks"], facts["seeds"], facts["mutants"]
        self.project = facts["project"]
        self.arrays = {}
        with np.load(folder / "key.npz", allow_pickle=False) as content:
            for path in content.files:
                check, seed, mutant, name = path.split("/", 3)
                self.arrays.setdefault((check, seed, mutant), {})[name] = content[path]


# ------------------------------------------- running
def printable(words):
    """What a submission says, on one short line that does nothing to a terminal"""
    words = " ".join(str(words).split())[:400]
    return "".join(c if c.isprintable() else "?" for c in words)


def read_frame(frame, why):
    """What a worker sent -> {name: array}; "error" if it is not an .npz of numbers"""
    if why:
        return {"error": why}
    try:
        sizes = [part.file_size for part in zipfile.ZipFile(io.BytesIO(frame)).infolist()]
        if sum(sizes) > worker.MOST:
            return {"error": "the answer is too long"}
        with np.load(io.BytesIO(frame), allow_pickle=False) as content:
            arrays = {name: np.asarray(content[name]) for name in content.files}
    except Exception:                                    # a forged frame can be anything
        return {"error": "the answer is no .npz of numbers"}
    if "error" in arrays:
        return {"error": printable(arrays["error"])}
    kinds = {array.dtype.kind for array in arrays.values()}
    if not kinds <= set("biuf") or len(str(list(arrays))) > 10000:
        return {"error": "the answer is no .npz of numbers"}
    return arrays


def in_process(key, folder, run):
    """{check: arrays}, without a sandbox"""
    checks = worker.programs(HERE / "checks.py")
    found = {"import": worker.answer(folder, key.files, None, [])}
    if found["import"]:
        return found
    return {name: worker.answer(folder, key.files, checks[name], seeds) for name, seeds in run}


def modules_used():
    """The modules that the kept files import, to be imported once, before the sandbox closes"""
    found = {"torch.func"}
    for path in (HERE / "files").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    return sorted(found)


def hidden(project):
    """What a submission must not see: the project that the key was made of, wherever it is now"""
    places = [Path(project), *HERE.parents]
    found = [p for p in places if project and (p / "course/course.py").exists()]
    return [str(place) for place in found]


def free_user():
    """Two user ids that nobody has: one for the submission, the next for what kills its processes
    -> the first, a socket that holds a lock on both"""
    taken = in_use()
    for uid in range(50000, 60000, 2):
        lock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            lock.bind(f"\0course grader {uid}")
            if not {uid, uid + 1} & taken:
                return uid, lock
    raise Stop("all user ids from 50000 to 60000 are in use")


def in_use():
    """User ids that have a name or a process"""
    found = {entry.pw_uid for entry in pwd.getpwall()}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.add(path.stat().st_uid)
    return found


def in_sandbox(key, submission, folder, run):
    """{check: arrays}, each check in a child of a user of its own; notes on what was not closed"""
    uid, lock = free_user()
    scratch = tempfile.mkdtemp()
    os.chown(scratch, uid, uid)
    request = dict(key.limits, uid=uid, folder=str(folder), files=key.files, run=run,
                   scratch=scratch, checks=str(HERE / "checks.py"), preload=modules_used(),
                   hide=hidden(key.project), beside=str(Path(submission).resolve().parent))
    env = {"PATH": "/usr/bin:/bin", "HOME": scratch, "USER": "student", "TMPDIR": scratch,
           "PYTHONHASHSEED": "0"}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        env[name] = "1"
    words = [sys.executable, "-s", "-P", str(HERE / "worker.py")]
    try:
        done = subprocess.run(words, cwd="/", input=json.dumps(request).encode(), env=env,
                              capture_output=True, timeout=key.limits["total"] + 60)
    except subprocess.TimeoutExpired:
        return {"import": {"error": "the sandbox did not end"}}, ""
    finally:
        worker.sweep(uid)                                # if the nursery was killed, or at Ctrl-C
        subprocess.run(["rm", "-rf", scratch])           # rmtree fails on very deep folders
        lock.close()
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()[-300:]
        return {"import": {"error": f"the sandbox failed: {why}"}}, ""
    stream = io.BytesIO(done.stdout)
    facts = json.loads(stream.readline())
    if not facts["ready"]:
        raise Stop("no mount namespace here, so the submission could read the project, or could "
                   "not read Python; grade where the project is not, with a Python open to all")
    found, note = {}, "" if facts["isolated"] else OPEN
    for line in stream:
        facts = json.loads(line)
        found[facts["check"]] = read_frame(stream.read(facts["size"]), facts["why"])
    return found, note


def assemble(key, submission, folder):
    """The kept files of the assignment, over them the submitted ones -> in `folder`; a problem, and
    the files that are missing: their stubs stay."""
    shutil.copytree(HERE / "files", folder, dirs_exist_ok=True)
    missing = []
    for name in key.files:
        path = Path(submission) / name
        if not path.exists():                            # uploaded without or in another folder
            path, *more = [*Path(submission).rglob(Path(name).name), None]
            if path is None or more != [None]:
                missing.append(name)
                continue
        mode = os.lstat(path).st_mode
        inside = path.resolve().is_relative_to(Path(submission).resolve())
        if not inside or not stat.S_ISREG(mode) or path.stat().st_size > LARGEST:
            return f"{name} is no file of at most {LARGEST:,} bytes", missing
        (folder / name).write_bytes(path.read_bytes())
    if missing == key.files:
        return f"none of {', '.join(missing)} is in the submission", missing
    return "", missing


def grade(key, submission, run, trusted):
    """-> {check: arrays}, a note"""
    if trusted and not (HERE / "files").exists():        # a release: the folder is complete
        return in_process(key, submission, run), ""
    with tempfile.TemporaryDirectory() as folder:
        problem, missing = assemble(key, submission, Path(folder))
        if problem:
            return {"import": {"error": problem}}, ""
        if trusted:
            found, note = in_process(key, folder, run), ""
        else:
            subprocess.run(["chmod", "-R", "a+rX", folder], check=True)   # whatever the umask is
            found, note = in_sandbox(key, submission, folder, run)
    if missing:
        note = f"missing, or there more than once: {', '.join(missing)}. {note}"
    return found, note


# ------------------------------------------- reporting
def results(key, found, note):
    """{check: arrays} -> what Gradescope reads as results.json"""
    broken = found.get("import", {}).get("error")
    tests = []
    for check in key.checks:
        name, points = check["name"], check["points"]
        if broken is not None:
            right, why = False, f"nothing was run: {broken}"
        else:
            arrays = found.get(name, {"error": "not run"})
            right, why = judge(key, name, arrays)
        tests.append({"name": f"{name}: {check['what']}", "max_score": points,
                      "score": points if right else 0, "output": why,
                      "status": "passed" if right else "failed"})
    score = sum(test["score"] for test in tests)
    return {"score": score, "output": note or key.title, "output_format": "text", "tests": tests}


def table(result):
    """results() for a person"""
    lines = [result["output"]]
    for test in result["tests"]:
        lines.append(f"{test['score']:>3} of {test['max_score']:<3} {test['name']}")
        if test["output"]:
            lines.append(f"           {test['output']}")
    most = sum(test["max_score"] for test in result["tests"])
    return "\n".join([*lines, f"{result['score']:>3} of {most}"])


def consult_oracles(key, folder, checks):
    """Properties that need no key, at a random seed: an oracle returns pairs that must agree."""
    for name, program in checks.items():
        if not name.startswith("oracle_"):
            continue
        seed = secrets.randbelow(10000)
        arrays = worker.answer(folder, key.files, program, [seed])
        said = str(arrays.get("error", "agrees"))
        for path, (mine, right) in arrays.items() if "error" not in arrays else ():
            if difference(mine, right) > tolerance(right):
                said = f"{path.split('/')[1]} differs by {difference(mine, right):.1e}"
        print(f"    {name} at seed {seed}: {said}")


def write(path, result):
    temporary = Path(f"{path}.{secrets.token_hex(8)}")
    with open(temporary, "x", encoding="utf-8") as f:    # never through a link that is there
        json.dump(result, f, indent=1)
    os.replace(temporary, path)


def may_grade(trusted):
    """Raises Stop unless the sandbox can be set up; closes the keys to the submission's user."""
    if trusted:
        return
    if not (HERE / "files").exists():
        raise Stop("a release checks only your own work: give --trusted")
    if os.geteuid():
        raise Stop("grading others' work needs root, for a user id of its own; or --trusted")
    HERE.chmod(0o700)                                    # the key, and the zip that holds it
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C: what runs is killed


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", help="the folder with the submitted files")
    parser.add_argument("--out", help="write results.json, as Gradescope reads it")
    parser.add_argument("--trusted", action="store_true", help="no sandbox: only for your own work")
    parser.add_argument("--check", help="run only this one")
    parser.add_argument("--seed", type=int, help="with this seed, and print its arrays")
    options = parser.parse_args()
    if not Path(options.submission).is_dir():
        raise Stop(f"there is no folder {options.submission}")
    may_grade(options.trusted)
    key = Key(HERE)
    run = [(c["name"], key.seeds[c["name"]]) for c in key.checks]
    if options.check:
        run = [(name, seeds) for name, seeds in run if name == options.check]
    if not run:
        names = ", ".join(check["name"] for check in key.checks)
        raise Stop(f"found the check {options.check}, expected one of {names}")
    if options.seed is not None:
        run = [(name, [options.seed]) for name, _ in run]
        found, _ = grade(key, options.submission, run, options.trusted)
        for arrays in found.values():
            for name, array in arrays.items():
                print(f"{name} {np.shape(array)}\n{array}")
        return
    found, note = grade(key, options.submission, run, options.trusted)
    key.checks = [check for check in key.checks if check["name"] in dict(run)]
    result = results(key, found, note)
    if options.out:
        write(options.out, result)
    print(table(result).encode("ascii", "backslashreplace").decode())
    if options.trusted and not (HERE / "files").exists():
        consult_oracles(key, options.submission, worker.programs(HERE / "checks.py"))


if __name__ == "__main__":
    try:
        main()
    except (Stop, OSError) as error:
        sys.exit(f"error: {error}")
