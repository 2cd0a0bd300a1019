"""Tests the course's tests: each mistake at 10 fresh seeds, blank and complete releases, variants.

    python tests/prove_course.py         all assignments, minutes; writes course/verified.json
    python tests/prove_course.py a1      one of them
    python tests/prove_course.py drift numbers.npz     the first call writes the reference's numbers
                                                       at 5 seeds; others, elsewhere, compare theirs
"""
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

COURSE = Path(__file__).resolve().parent.parent / "course"
sys.path.insert(0, str(COURSE))
from course import (APART, ASSIGNMENTS, blank, body_of, distance, make_key,  # noqa: E402
                    mutants_of, programs, read_checks, replaced, run, secret_seeds, source,
                    submitted, variants, write_grader)
from grade import Key, Stop, by_seed, difference, judge, results  # noqa: E402


def score(key, files, assignment):
    """Points that {file: text} gets, and how many there are"""
    found, program = {}, programs(assignment)
    for name, seeds in key.seeds.items():
        found[name] = run(files, key.files, program[name], seeds)
    return results(key, found, "")["score"], sum(check["points"] for check in key.checks)


def prove_mistakes(assignment, n):
    """A key at n fresh seeds, as they come, and rows: how far off each mistake is at the nearest of
    them, in tolerances, and what the grader says to it"""
    files, program, rows = source(assignment), programs(assignment), []
    checks = read_checks(assignment)
    key = SimpleNamespace(title="", files=submitted(checks), checks=[], seeds={}, mutants={},
                          arrays={})
    for check in checks:
        seeds = list(itertools.islice(secret_seeds(), n))
        mutants = mutants_of(assignment, check.name, files, None)
        answers = {"": run(files, key.files, program[check.name], seeds)}
        for name, _, wrong in mutants:
            answers[name] = run(wrong, key.files, program[check.name], seeds)
        key.seeds[check.name] = seeds
        key.mutants[check.name] = {name: message for name, message, _ in mutants}
        key.checks.append(check._asdict())
        alive = {name: by_seed(a) for name, a in answers.items() if "error" not in a}
        for name, arrays in alive.items():
            key.arrays |= {(check.name, seed, name): answer for seed, answer in arrays.items()}
        for name, message, _ in mutants:
            _, said = judge(key, check.name, answers[name])
            row = dict(check=check.name, mistake=name, tolerances=None, said=said)
            if name in alive:
                off = [distance(alive[name][seed], right) for seed, right in alive[""].items()]
                row |= dict(tolerances=float(min(off)), said=message in said and "or: " not in said)
            rows.append(row)
    return key, rows


def leftovers(assignment, files, stubs):
    """Cut lines of over 25 characters that still stand anywhere in a release -> [line]"""
    paths = [*COURSE.glob("*.py"), *(COURSE / assignment).glob("*.py"),
             COURSE / assignment / "handout.md"]
    kept = "\n".join([*stubs.values(), *(path.read_text("utf-8") for path in paths)])
    gone = set()
    for name, text in files.items():
        gone |= set(text.splitlines()) - set(stubs[name].splitlines())
    return [line for line in gone if len(line.strip()) > 25 and line.strip() in kept]


def body_in(files):
    def body(file, name):
        first, last = body_of(files[file], name, file)
        return files[file].splitlines()[first:last]
    return body


def pasted(assignment, files):
    """{variant: points of a release of its year with the published bodies pasted in}"""
    found, checks = {}, read_checks(assignment)
    for year, variant in enumerate(variants(assignment), len(variants(assignment))):
        with tempfile.TemporaryDirectory() as folder:
            write_grader(Path(folder), assignment, *make_key(assignment, year, secret_seeds, 2))
            key = Key(Path(folder))
        copied = replaced(source(assignment, variant), checks, body_in(files))
        found[variant.name] = score(key, copied, assignment)
    return found


def verify(assignments, n=10):
    """Every claim of course/README.md about checks, for each assignment; writes them down."""
    facts = {}
    for assignment in assignments:
        checks, files = read_checks(assignment), source(assignment)
        stubs = replaced(files, checks, blank)
        if replaced(stubs, checks, body_in(files)) != files:
            raise Stop(f"{assignment}: a completed release is not the source")
        key, rows = prove_mistakes(assignment, n)
        fact = dict(reference=score(key, files, assignment), blank=score(key, stubs, assignment),
                    leftovers=leftovers(assignment, files, stubs), pasted=pasted(assignment, files))
        facts[assignment] = fact | dict(mistakes=rows)
        for row in rows:
            if row["tolerances"] is None or row["tolerances"] < APART or row["said"] is not True:
                print(row)
        print(assignment, len(rows), "mistakes", fact, flush=True)
    if len(assignments) > 1:
        text = json.dumps(dict(seeds=n, assignments=facts), indent=1)
        (COURSE / "verified.json").write_text(text, "utf-8")


def drift(path):
    """The largest difference of the reference's float64 numbers from those in a file"""
    numbers = {}
    for assignment in ASSIGNMENTS:
        checks, files = read_checks(assignment), source(assignment)
        program = programs(assignment)
        for check in checks:
            found = run(files, submitted(checks), program[check.name], [1, 2, 3, 4, 5])
            numbers |= {f"{assignment}/{check.name}/{name}": a for name, a in found.items()}
    if not Path(path).exists():
        np.savez(path, **numbers)
        return
    kept = dict(np.load(path, allow_pickle=False))
    off = {name: difference(numbers[name], kept[name]) for name in kept}
    worst = sorted(off, key=off.get)[::-1]
    double = [name for name in worst if kept[name].dtype == np.float64]
    print(f"{torch.__version__}, Python {sys.version.split()[0]}, {torch.get_num_threads()} threads:"
          f" float64 {off[double[0]]:.1e} ({double[0]}), all {off[worst[0]]:.1e} ({worst[0]})")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["drift"]:
            sys.exit(drift(sys.argv[2]))
        verify(sys.argv[1:] or ASSIGNMENTS)
    except (Stop, OSError) as error:
        sys.exit(f"error: {error}")
