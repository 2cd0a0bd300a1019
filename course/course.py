"""Assignments from the project's own files: releases for students, autograders with secret keys.

    python course/course.py release a1 --year=2027       out/course/a1-2027: the student's folder
    python course/course.py autograder a1 --year=2027    out/course/a1-2027-grader, with a zip

An assignment is a folder of three files: handout.md, whose table names the checks, their points and
the functions to be written; checks.py, a program per check; mistakes.txt, patches of the source:

    @ prism.py                       the file, until another is named
    - gates = values.relu()          a text that stands in it once, until another is named
    # head no_relu: what to tell whoever makes this mistake
    + gates = values                 what stands there instead

`# variant NAME: ...` makes the patch a convention of a year, so that copying the published source
does not pay. A patch that does not fit stops the build and is named.
"""
import argparse
import ast
import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
import worker  # noqa: E402
from grade import Stop, by_seed, difference, tolerance  # noqa: E402

ASSIGNMENTS = "a1", "a2", "a3", "a4"
KEPT = ["prism.py", "common.py", "train.py", "sample.py", "data/prepare.py", "requirements.txt"]
REFIT = "tools.py", "attribution/refit.py", "attribution/curvature.py", "attribution/rivals.py"
MORE = {"a3": ["attribute.py", "suppress.py", *[f"experiments/{name}" for name in REFIT]],
        "a4": ["suppress.py"]}
PUBLIC_SEEDS, HIDDEN_SEEDS = 2, 3                        # how many
APART = 100                                              # tolerances between a mistake and the key
LIMITS = {"seconds": 10, "total": 45, "file_bytes": 2 ** 24}      # a check's, and of all


class Check(NamedTuple):
    """A row of a handout's table."""
    name: str
    points: int
    stubs: list     # [(file, qualified name)]
    what: str


class Mistake(NamedTuple):
    """Patches, and what they stand for. check: "variant" for a year's convention."""
    check: str
    name: str
    message: str
    patches: list   # [(file, old, new)]


# ------------------------------------------- reading an assignment
def read_checks(assignment):
    """The table of handout.md: | `check` | points | `file: function, function` | what |"""
    checks = []
    text = (HERE / assignment / "handout.md").read_text("utf-8")
    for line in text.splitlines():
        row = re.fullmatch(r"\| `(\w+)` \| (\d+) \| `([\w/.]+): ([\w., ]+)` \| (.+) \|", line)
        if row:
            name, points, file, functions, what = row.groups()
            stubs = [(file, function) for function in functions.split(", ")]
            checks.append(Check(name, int(points), stubs, what))
    total = sum(check.points for check in checks)
    if f"Code {total} points" not in text:
        raise Stop(f"{assignment}/handout.md: expected the words 'Code {total} points', the sum of "
                   "its table")
    return checks


def read_mistakes(assignment):
    """mistakes.txt -> [Mistake]"""
    found, file, old, before = [], "", "", ""
    path = HERE / assignment / "mistakes.txt"
    for n, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        sign, text = line[:1], line[2:]
        if sign == "@":
            file = text
        elif sign == "-":
            old = f"{old}\n{text}" if before == "-" else text
        elif sign == "#":
            head, _, message = text.partition(": ")
            found.append(Mistake(*head.split(), message, []))
        elif sign == "+" and before == "+":
            found[-1].patches[-1][2] += "\n" + text
        elif sign == "+":
            found[-1].patches.append([file, old, text])
        elif line:
            raise Stop(f"{path}, line {n}: expected a line that begins with @, -, # or +")
        before = sign
    return found


def patched(files, mistake):
    """{file: text} and a Mistake -> {file: text}; an old text must occur exactly once."""
    files = dict(files)
    for file, old, new in mistake.patches:
        count = files[file].count(old)
        if count != 1:
            raise Stop(f"{mistake.check} {mistake.name}: '{old}' occurs {count} times in {file}, "
                       "expected once; mend mistakes.txt")
        files[file] = files[file].replace(old, new)
        try:
            ast.parse(files[file] if file.endswith(".py") else "")
        except SyntaxError as error:
            raise Stop(f"{mistake.check} {mistake.name}: {file} is no Python with it ({error})")
    return files


def variant_of(assignment, year):
    """The convention of a year, a Mistake; none for year 0"""
    found = variants(assignment)
    return found[year % len(found)] if year else None


def variants(assignment):
    return [m for m in read_mistakes(assignment) if m.check == "variant"]


def source(assignment, variant=None):
    """The files of an assignment with everything written -> {file: text}"""
    names = KEPT + MORE.get(assignment, [])
    files = {name: (ROOT / name).read_text("utf-8") for name in names}
    files["HANDOUT.md"] = (HERE / assignment / "handout.md").read_text("utf-8")
    return patched(files, variant) if variant else files


# ------------------------------------------- stubs
def body_of(text, name, file):
    """Lines (first, last), counted from 0, of the body of `f` or `Class.f` without its docstring"""
    node = ast.parse(text)
    for part in name.split("."):
        inside = [child for child in node.body if getattr(child, "name", None) == part]
        if not inside:
            raise Stop(f"{file} has no function {name}; mend the handout's table")
        node = inside[0]
    first = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    return first, node.end_lineno


def replaced(files, checks, body):
    """{file: text} -> the same with body(file, name), a list of lines, in every stub"""
    files = dict(files)
    for file, name in sorted({stub for check in checks for stub in check.stubs}):
        first, last = body_of(files[file], name, file)
        lines = files[file].splitlines()
        lines[first:last] = body(file, name)
        files[file] = "\n".join(lines) + "\n"
    return files


def blank(file, name):
    indent = 4 + 4 * name.count(".")
    return [" " * indent + f'raise NotImplementedError("{name}")']


# ------------------------------------------- numbers
def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def submitted(checks):
    """The files that students hand in"""
    return sorted({file for check in checks for file, _ in check.stubs})


def programs(assignment):
    return worker.programs(HERE / assignment / "checks.py")


def run(files, names, program, seeds):
    """Runs one check on {file: text} -> {"seed/name": array} or {"error": text}"""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return worker.answer(folder, names, program, seeds)


def distance(found, right):
    """Two answers -> how many tolerances lie between them; None where one of them crashed"""
    if "error" in found:
        return None
    if found.keys() != right.keys():
        return np.inf
    return max(difference(found[name], right[name]) / tolerance(right[name]) for name in right)


def mutants_of(assignment, check, files, variant):
    """The mistakes of a check whose patches fit (a year's convention may have changed the line),
    and in a year of a convention the published source -> [(name, message, files)]"""
    found = []
    for mistake in read_mistakes(assignment):
        if mistake.check == check:
            try:
                found.append((mistake.name, mistake.message, patched(files, mistake)))
            except Stop:
                if not variant:
                    raise
    if variant:
        told = f"the published source; this year {variant.message}"
        found.append(("published", told, source(assignment)))
    return found


def numbers(name, program, submitted_files, files, mutants, seeds, count):
    """The first `count` seeds at which every mutant of the check `name` lies APART -> {seed:
    {mutant: its arrays}}, the reference under "" """
    found = {}
    for seed in itertools.islice(seeds, 20 * count):
        right = run(files, submitted_files, program, [seed])
        if "error" in right:
            raise Stop(f"the reference fails {name}: {right['error']}")
        answers, near = {"": right}, []
        for mutant, _, wrong in mutants:
            answers[mutant] = run(wrong, submitted_files, program, [seed])
            least = distance(answers[mutant], right)
            if mutant != "published" and least is not None and least < APART:
                near.append(mutant)
        if not near:
            found[seed] = answers
        if len(found) == count:
            return found
    raise Stop(f"{name} does not tell {near} from the reference")


def make_key(assignment, year, seeds_of, count):
    """The key of numbers at `count` seeds of seeds_of() -> dict of key.json, arrays of key.npz"""
    checks, program = read_checks(assignment), programs(assignment)
    names, published = submitted(checks), source(assignment)
    for mistake in read_mistakes(assignment):            # all fit the published source
        patched(published, mistake)
    variant = variant_of(assignment, year)
    files = patched(published, variant) if variant else published
    arrays, seeds, messages, rows = {}, {}, {}, []
    for check in checks:
        mutants = mutants_of(assignment, check.name, files, variant)
        found = numbers(check.name, program[check.name], names, files, mutants, seeds_of(), count)
        seeds[check.name] = list(found)
        messages[check.name] = {name: message for name, message, _ in mutants}
        rows.append(dict(name=check.name, points=check.points, what=check.what))
        for seed, answers in found.items():
            for mutant, answer in answers.items():
                for name, array in by_seed(answer).get(str(seed), {}).items():
                    arrays[f"{check.name}/{seed}/{mutant}/{name}"] = array
    facts = dict(title=f"{assignment}, {year or 'as published'}", files=names, limits=LIMITS,
                 project="", checks=rows, seeds=seeds, mutants=messages)
    return facts, arrays


def secret_seeds():
    return iter(lambda: secrets.randbelow(2 ** 31), None)


# ------------------------------------------- folders
@contextlib.contextmanager
def made(folder):
    """A new folder, complete or not there; an old one may hold somebody's work, or a key."""
    if folder.exists():
        raise Stop(f"{folder} exists; remove it, or give another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        yield Path(new) / "made"
        os.replace(Path(new) / "made", folder)
    print(folder)


def write_grader(folder, assignment, facts, arrays):
    """grade.py, worker.py, the checks and the key: no solution is among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("grade.py", "worker.py", "inputs.py", f"{assignment}/checks.py"):
        shutil.copy(HERE / name, folder)
    (folder / "key.json").write_text(json.dumps(facts, indent=1), "utf-8")
    np.savez_compressed(folder / "key.npz", **arrays)


def stubbed(assignment, year):
    files = source(assignment, variant_of(assignment, year))
    return replaced(files, read_checks(assignment), blank)


def students(handout, variant=None):
    """A handout without the rubrics, *Full: ...*, and with this year's convention on top"""
    text = re.sub(r"\s*\*Full:[^*]*\*", "", handout)
    if variant:
        title, rest = text.split("\n", 1)
        text = (f"{title}\n\n**This year's convention:** {variant.message}. Where the text below "
                f"says otherwise, this line holds.\n{rest}")
    return text


def release(options):
    """The student's folder: stubs, handout, public checks"""
    assignment, year = options.assignment, options.year
    with made(options.out / f"{assignment}-{year or 'published'}") as folder:
        files = stubbed(assignment, year)
        files["HANDOUT.md"] = students(files["HANDOUT.md"], variant_of(assignment, year))
        write_files(folder, files)
        key = make_key(assignment, year, itertools.count, PUBLIC_SEEDS)
        write_grader(folder / "grader", assignment, *key)
        shutil.copy(HERE / "student.mk", folder / "Makefile")


def autograder(options):
    """What grades: kept files, checks and the key of secret seeds; and a zip for Gradescope"""
    assignment, year = options.assignment, options.year
    with made(options.out / f"{assignment}-{year or 'published'}-grader") as folder:
        files = stubbed(assignment, year)
        facts, arrays = make_key(assignment, year, secret_seeds, HIDDEN_SEEDS)
        facts["project"] = str(ROOT)                     # hidden, where it is on the same machine
        write_grader(folder, assignment, facts, arrays)
        del files["HANDOUT.md"]
        write_files(folder / "files", files)
        shutil.copytree(HERE / "gradescope", folder, dirs_exist_ok=True)
        shutil.make_archive(folder.parent / "grader", "zip", folder)
        shutil.move(folder.parent / "grader.zip", folder)
        folder.chmod(0o700)                              # it holds the key


# ------------------------------------------- A5
def research(options):
    """A5: the whole project with a trained model and its text. A release has the public halves."""
    sys.path.append(str(HERE / "a5"))
    import board
    is_release = options.command == "release"
    with made(options.out / ("a5" if is_release else "a5-grader")) as folder:
        run = board.base_run(options.work)
        content = board.read(options.board, run.ckpt["data"])
        files = folder if is_release else folder / "files"
        grader = folder / "grader" if is_release else folder
        names = KEPT + ["attribute.py", "suppress.py", "report.py"]
        names += [str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/**/*.py")]
        write_files(files, {name: (ROOT / name).read_text("utf-8") for name in names})
        write_files(files, {"score.py": (HERE / "a5/score.py").read_text("utf-8")})
        shutil.copytree(run.folder, files / "data/pydoc512")
        write_files(files / "run", {})
        for name in ("ckpt.pt", "tokenizer.json", "tokenizer.tiktoken"):
            shutil.copy(run.out_dir / name, files / "run")
        np.save(files / "queries.npy", content["queries"])
        project = "" if is_release else str(ROOT)
        facts = dict(files=["score.py"], limits=board.LIMITS, project=project)
        write_grader(grader, "a5", facts, content)
        (grader / "key.npz").rename(grader / "board.npz")
        shutil.copy(HERE / "a5/board.py", grader)
        grader.chmod(0o755 if is_release else 0o700)
        if is_release:
            handout = students((HERE / "a5/handout.md").read_text("utf-8"))
            makefile = (HERE / "student.mk").read_text("utf-8")
            makefile = makefile.replace("grade.py .", "board.py score .")
            write_files(folder, {"HANDOUT.md": handout, "Makefile": makefile})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["release", "autograder"])
    parser.add_argument("assignment", choices=[*ASSIGNMENTS, "a5"])
    parser.add_argument("--year", type=int, default=0, help="its convention; 0: as published")
    parser.add_argument("--out", type=Path, default=ROOT / "out/course")
    parser.add_argument("--board", type=Path, default=HERE / "a5/board.npz", help="A5's halves")
    parser.add_argument("--work", type=Path, default=Path("out-board"), help="A5's trained models")
    options = parser.parse_args()
    command = {"release": release, "autograder": autograder}[options.command]
    if options.assignment == "a5":
        command = research
    try:
        command(options)
    except Stop as error:
        raise Stop(f"{options.assignment}: {error}")


if __name__ == "__main__":
    try:
        main()
    except (Stop, OSError) as error:
        sys.exit(f"error: {error}")
