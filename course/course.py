"""Assignments from the project's own files: releases, keys, autograders, and the proof of them.

    python course/course.py release a1 --year=2027       out/course/a1-2027: the student's folder
    python course/course.py autograder a1 --year=2027    out/course/a1-2027-grader, and its zip
    python course/course.py check                        all mutants of all assignments, 10 seeds

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
from grade import Key, Stop, difference, judge, results, tolerance  # noqa: E402

ASSIGNMENTS = "a1", "a2", "a3", "a4"
KEPT = ["prism.py", "common.py", "train.py", "sample.py", "data/prepare.py", "requirements.txt"]
REFIT = "tools.py", "attribution/refit.py", "attribution/curvature.py", "attribution/rivals.py"
MORE = {"a3": ["attribute.py", "suppress.py", *[f"experiments/{name}" for name in REFIT]],
        "a4": ["suppress.py"]}
PUBLIC_SEEDS, HIDDEN_SEEDS = [1, 2], 3
APART = 100                                              # tolerances between a mistake and the key
LIMITS = {"seconds": 10, "total": 45}                    # for a check, and for a submission


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


# ------------------------------------------- the proof
def score(key, files, assignment):
    """Points that {file: text} gets, and how many there are"""
    found, program = {}, programs(assignment)
    for name, seeds in key.seeds.items():
        found[name] = run(files, key.files, program[name], seeds)
    result = results(key, found, "")
    return result["score"], sum(check["points"] for check in key.checks)


def kept_key(assignment, year, seeds_of, count, redraw=True):
    """make_key() through the files, as a grader reads it -> Key"""
    with tempfile.TemporaryDirectory() as folder:
        facts, arrays = make_key(assignment, year, seeds_of, count, redraw)
        write_grader(Path(folder) / "key", assignment, facts, arrays)
        return Key(Path(folder) / "key")


def leftovers(files, stubs):
    """Cut lines of over 25 characters that still stand in the stubbed files, and in no function or
    table that was kept -> [line]"""
    kept = "\n".join(stubs.values())
    found = []
    for name, text in files.items():
        gone = set(text.splitlines()) - set(stubs[name].splitlines())
        found += [line for line in gone if len(line.strip()) > 25 and line.strip() in kept]
    return found


def prove_mistakes(assignment, key, n):
    """Each mistake at the key's seeds -> rows: the least distance in tolerances, and what is said"""
    files, program, rows = source(assignment), programs(assignment), []
    for mistake in read_mistakes(assignment):
        if mistake.check == "variant":
            continue
        check, seeds = mistake.check, key.seeds[mistake.check]
        found = run(patched(files, mistake), key.files, program[check], seeds)
        right, said = judge(key, check, found)
        least = None
        if "error" not in found:
            apart = []
            for seed in map(str, seeds):
                mine = {k: v for k, v in found.items() if k.startswith(seed + "/")}
                expected = key.arrays[check, seed, ""]
                apart.append(distance(mine, {f"{seed}/{k}": v for k, v in expected.items()}))
            least = float(min(apart))
        rows.append(dict(assignment=assignment, check=check, mistake=mistake.name, tolerances=least,
                         crash=said if least is None else "", told=mistake.message in said,
                         only=" -- or: " not in said, right=right))
    return rows


def verify(assignments, n=10):
    """Every claim of course/README.md about checks, for each assignment; writes them down."""
    rows, facts = [], {}
    for assignment in assignments:
        checks, files = read_checks(assignment), source(assignment)
        stubs = cut(files, checks)
        if completed(stubs, files, checks) != files:
            raise Stop(f"{assignment}: a completed release is not the source")
        key = kept_key(assignment, 0, secret_seeds, n, redraw=False)
        mine = prove_mistakes(assignment, key, n)
        rows += mine
        facts[assignment] = dict(
            reference=score(key, files, assignment),
            blank=score(key, stubs, assignment),
            leftovers=leftovers(files, stubs),
            pasted={})
        for year, variant in enumerate(variants(assignment)):
            changed = cut(source(assignment, variant), checks)
            pasted = completed(changed, files, checks)
            this = kept_key(assignment, len(variants(assignment)) + year, secret_seeds, 2)
            facts[assignment]["pasted"][variant.name] = score(this, pasted, assignment)
        for row in mine:
            weak = row["tolerances"] is not None and row["tolerances"] < APART
            if weak or not (row["told"] and row["only"] or row["crash"]):
                print(row)
        print(assignment, len(mine), "mistakes", facts[assignment], flush=True)
    if len(assignments) > 1:
        text = json.dumps(dict(seeds=n, assignments=facts, mistakes=rows), indent=1)
        (HERE / "verified.json").write_text(text, "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["release", "autograder", "check"])
    parser.add_argument("assignment", nargs="?", choices=ASSIGNMENTS, help="all, for check")
    parser.add_argument("--year", type=int, default=0, help="its convention; 0: as published")
    parser.add_argument("--out", type=Path, default=ROOT / "out/course")
    options = parser.parse_args()
    if options.command == "check":
        verify([options.assignment] if options.assignment else ASSIGNMENTS)
    elif not options.assignment:
        raise Stop(f"expected an assignment: {', '.join(ASSIGNMENTS)}")
    else:
        command = {"release": release, "autograder": autograder}[options.command]
        command(options.assignment, options.year, options.out)


if __name__ == "__main__":
    try:
        main()
    except (Stop, OSError) as error:
        sys.exit(f"error: {error}")
