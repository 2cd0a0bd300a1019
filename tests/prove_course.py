"""Tests the course's tests: each mistake at 10 fresh seeds, blank and complete releases, variants.

    python tests/prove_course.py         all assignments, minutes; writes course/verified.json
    python tests/prove_course.py a1      one of them
    python tests/prove_course.py drift numbers.npz     the first call writes the reference's numbers
                                                       at 5 seeds; others, elsewhere, compare theirs
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
from course import (APART, ASSIGNMENTS, completed, cut, distance, make_key, patched,  # noqa: E402
                    programs, read_checks, read_mistakes, run, secret_seeds, source, variants,
                    submitted, write_grader)
from grade import Key, Stop, difference, judge, results  # noqa: E402


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
        (ROOT / "course/verified.json").write_text(text, "utf-8")


def drift(path):
    """The largest difference of the reference's float64 numbers from those in a file"""
    numbers = {}
    for assignment in ASSIGNMENTS:
        checks, files = read_checks(assignment), source(assignment)
        for check in checks:
            program = programs(assignment)[check.name]
            found = run(files, submitted(checks), program, [1, 2, 3, 4, 5])
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
