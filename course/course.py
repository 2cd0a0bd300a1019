"""Assignments from the project's own files: releases for students, autograders with secret keys.

    python course/course.py release a1 --year=2027       out/course/a1-2027: the student's folder
    python course/course.py autograder a1 --year=2027    out/course/a1-2027-grader, and its zip

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
import itertools
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
import worker  # noqa: E402
from grade import Stop, difference, tolerance  # noqa: E402

ASSIGNMENTS = "a1", "a2", "a3", "a4"
KEPT = ["prism.py", "common.py", "train.py", "sample.py", "data/prepare.py", "requirements.txt"]
REFIT = "tools.py", "attribution/refit.py", "attribution/curvature.py", "attribution/rivals.py"
MORE = {"a3": ["attribute.py", "suppress.py", *[f"experiments/{name}" for name in REFIT]],
        "a4": ["suppress.py"]}
PUBLIC_SEEDS, HIDDEN_SEEDS = [1, 2], 3
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
    for line in (HERE / assignment / "handout.md").read_text("utf-8").splitlines():
        row = re.fullmatch(r"\| `(\w+)` \| (\d+) \| `([\w/.]+): ([\w., ]+)` \| (.+) \|", line)
        if row:
            name, points, file, functions, what = row.groups()
            stubs = [(file, function) for function in functions.split(", ")]
            checks.append(Check(name, int(points), stubs, what))
    if not checks:
        raise Stop(f"{assignment}/handout.md has no table of checks")
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
    return patched(files, variant) if variant else files


# ------------------------------------------- stubs
def function(tree, name, where):
    """The syntax tree of a function `f` or `Class.f`"""
    node = tree
    for part in name.split("."):
        inside = [n for n in node.body if getattr(n, "name", None) == part]
        if not inside:
            raise Stop(f"{where} has no function {name}; mend the handout's table")
        node = inside[0]
    return node


def body_of(text, name, where):
    """Lines (first, last), counted from 0, of a function's body without its docstring"""
    node = function(ast.parse(text), name, where)
    first = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    return first, node.end_lineno


def cut(files, checks):
    """{file: text} -> the same with the bodies of the stubs gone; signature and docstring stay."""
    files = dict(files)
    for file, name in sorted({stub for check in checks for stub in check.stubs}):
        first, last = body_of(files[file], name, file)
        lines = files[file].splitlines()
        indent = re.match(" *", lines[last - 1] if first == last else lines[first]).group()
        indent = " " * (4 + 4 * name.count("."))
        lines[first:last] = [f'{indent}raise NotImplementedError("{name}")']
        files[file] = "\n".join(lines) + "\n"
    return files


def completed(stubbed, files, checks):
    """A release's files with the bodies of other files pasted in -> {file: text}"""
    done = dict(stubbed)
    for file, name in sorted({stub for check in checks for stub in check.stubs}):
        first, last = body_of(files[file], name, file)
        body = files[file].splitlines()[first:last]
        first, last = body_of(done[file], name, file)
        lines = done[file].splitlines()
        lines[first:last] = body
        done[file] = "\n".join(lines) + "\n"
    return done


# ------------------------------------------- numbers
def write_files(folder, files):
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


def fitting(files, mistakes, check):
    """The mistakes of a check whose patches fit; a year's convention may have changed the line."""
    found = []
    for mistake in mistakes:
        if mistake.check == check:
            try:
                found.append((mistake, patched(files, mistake)))
            except Stop:
                print(f"left out this year: {check} {mistake.name}", file=sys.stderr)
    return found


def make_key(assignment, year, seeds_of, count, redraw=True):
    """The key of numbers: for each check `count` of the seeds that seeds_of() yields, those at which
    every mistake lies APART -> the dict of key.json, the arrays of key.npz"""
    checks, variant = read_checks(assignment), variant_of(assignment, year)
    files, public = source(assignment, variant), source(assignment)
    program, names = programs(assignment), submitted(checks)
    arrays, seeds, messages = {}, {}, {}
    for check in checks:
        mutants = fitting(files, read_mistakes(assignment), check.name)
        if variant:
            told = f"the published source; this year {variant.message}"
            mutants.append((Mistake(check.name, "published", told, []), public))
        messages[check.name] = {mistake.name: mistake.message for mistake, _ in mutants}
        seeds[check.name] = []
        for tried, seed in enumerate(seeds_of()):
            right = run(files, names, program[check.name], [seed])
            if "error" in right:
                raise Stop(f"the reference fails {check.name}: {right['error']}")
            answers = {mistake.name: run(wrong, names, program[check.name], [seed])
                       for mistake, wrong in mutants}
            near = [name for name, found in answers.items()
                    if name != "published" and (distance(found, right) or np.inf) < APART]
            if near and redraw and tried < 20:
                continue
            if near and redraw:
                raise Stop(f"{assignment}: {check.name} does not tell {near} from the reference")
            seeds[check.name].append(seed)
            for name, found in {"": right, **answers}.items():
                for path, array in found.items():
                    if path != "error":
                        arrays[f"{check.name}/{seed}/{name}/{path.split('/', 1)[1]}"] = array
            if len(seeds[check.name]) == count:
                break
    rows = [dict(name=check.name, points=check.points, what=check.what) for check in checks]
    facts = dict(title=f"{assignment}, {year or 'as published'}", files=names, limits=LIMITS, project="",
                 checks=rows, seeds=seeds, mutants=messages)
    return facts, arrays


def secret_seeds():
    while True:
        yield secrets.randbelow(2 ** 31)


# ------------------------------------------- folders
def write_grader(folder, assignment, facts, arrays):
    """grade.py, worker.py, the checks and the key: no solution is among them."""
    folder.mkdir(parents=True)
    for name in ("grade.py", "worker.py", "inputs.py", f"{assignment}/checks.py"):
        shutil.copy(HERE / name, folder)
    (folder / "key.json").write_text(json.dumps(facts, indent=1), "utf-8")
    np.savez_compressed(folder / "key.npz", **arrays)


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def stubbed(assignment, year):
    return cut(source(assignment, variant_of(assignment, year)), read_checks(assignment))


def handout(assignment, year):
    text, variant = (HERE / assignment / "handout.md").read_text("utf-8"), variant_of(assignment, year)
    if variant:
        title, rest = text.split("\n", 1)
        text = f"{title}\n\n**This year's convention:** {variant.message}\n{rest}"
    return text


def release(assignment, year, out):
    """The student's folder: stubs, handout, public checks"""
    folder = fresh(out / f"{assignment}-{year or 'published'}")
    write_files(folder, stubbed(assignment, year))
    facts, arrays = make_key(assignment, year, itertools.count, 2)
    write_grader(folder / "grader", assignment, facts, arrays)
    (folder / "HANDOUT.md").write_text(handout(assignment, year), "utf-8")
    shutil.copy(HERE / "student.mk", folder / "Makefile")
    print(f"{folder}: give it to the students as it is")


def autograder(assignment, year, out):
    """What grades: kept files, checks and the key of secret seeds; and a zip for Gradescope"""
    folder = fresh(out / f"{assignment}-{year or 'published'}-grader")
    facts, arrays = make_key(assignment, year, secret_seeds, HIDDEN_SEEDS)
    facts["project"] = str(ROOT)                         # hidden, where it is on the same machine
    shutil.rmtree(folder)
    write_grader(folder, assignment, facts, arrays)
    write_files(folder / "files", stubbed(assignment, year))
    for path in (HERE / "gradescope").iterdir():
        shutil.copy(path, folder)
    shutil.make_archive(str(folder), "zip", folder)
    print(f"{folder}: sudo python {folder}/grade.py SUBMISSION; {folder}.zip is for Gradescope")


# ------------------------------------------- A5
def fill(folder, run):
    """The whole project, a trained model and its text, and the baseline as score.py"""
    names = KEPT + ["attribute.py", "suppress.py", "report.py"]
    names += [str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/**/*.py")]
    write_files(folder, {name: (ROOT / name).read_text("utf-8") for name in names})
    shutil.copytree(run.folder, folder / "data/pydoc512", dirs_exist_ok=True)
    (folder / "run").mkdir()
    for name in ("ckpt.pt", "tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(run.out_dir / name, folder / "run")
    shutil.copy(HERE / "a5/score.py", folder)


def research(board_file, work, out, name):
    """A5: a release if the board is the published one; else a grader with secret halves"""
    sys.path.append(str(HERE / "a5"))
    import board
    run, folder = board.base_run(work), fresh(out / name)
    with np.load(board_file, allow_pickle=False) as content:
        if content["text"] != run.ckpt["data"]:
            raise Stop(f"{board_file} was made of another Python's documentation; make your own: "
                       "python course/a5/board.py train")
        queries = content["queries"]
    is_grader = name.endswith("grader")
    files, grader = (folder / "files", folder) if is_grader else (folder, folder / "grader")
    for place in (files, grader):
        place.mkdir(exist_ok=True)
    fill(files, run)
    np.save(files / "queries.npy", queries)
    for path in ("grade.py", "worker.py", "inputs.py", "a5/board.py", "a5/checks.py"):
        shutil.copy(HERE / path, grader)
    shutil.copy(board_file, grader / "board.npz")
    facts = dict(files=["score.py"], limits=board.LIMITS, project=str(ROOT) if is_grader else "")
    (grader / "key.json").write_text(json.dumps(facts), "utf-8")
    if not is_grader:
        shutil.copy(HERE / "a5/handout.md", folder / "HANDOUT.md")
        make = (HERE / "student.mk").read_text("utf-8")
        (folder / "Makefile").write_text(make.replace("grade.py .", "board.py score ."), "utf-8")


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
    if options.assignment == "a5":
        name = "a5" if options.command == "release" else "a5-grader"
        research(options.board, options.work, options.out, name)
        return
    command = {"release": release, "autograder": autograder}[options.command]
    command(options.assignment, options.year, options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:  # TEMPORARY
        sys.exit(subprocess.call([sys.executable, str(ROOT / "tests/prove_course.py"), *sys.argv[2:]]))
    try:
        main()
    except (Stop, OSError) as error:
        sys.exit(f"error: {error}")
