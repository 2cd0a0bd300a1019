"""Writes RESULTS.md from RESULTS.in.md and the JSON files in results/.

    python experiments/tables.py

{quality.against dense.pydoc.loss:+.2%} is a figure of results/quality.json; " x 1000" behind a path
multiplies it. A list becomes mean +- standard deviation, or what a word before the path says; `*`
in a path takes all entries. "for PATH: | {n} | {v.x} |" is a row per entry, n its name and v its
value. A cell "met if {a} < {b}" becomes the verdict. What is missing leaves its cell empty.
"""
import functools
import re
import sys
from pathlib import Path
from statistics import correlation, mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tools import ROOT, read_results  # noqa: E402

from common import atomic, run_main  # noqa: E402

HERE = ROOT / "experiments"
OLDER = "ded8bf2"  # results of this revision do not name it
FIGURE = re.compile(r"\{(?:(each|min|max|mean|error) )?([^:}]+):?([^}]*)\}")


def standard_error(values):
    return stdev(values) / len(values) ** 0.5


WORDS = {"min": min, "max": max, "mean": mean, "error": standard_error}


def look_up(value, keys):
    """What stands at a path of nested dicts and lists."""
    if not keys:
        return value
    key, *rest = keys
    if key == "*":
        entries = value.values() if isinstance(value, dict) else value
        return [look_up(entry, rest) for entry in entries]
    return look_up(value[int(key)] if isinstance(value, list) else value[key], rest)


def figure(results, match):
    word, path, form = match.groups()
    path, _, factor = path.replace("<n>", str(results.get("n"))).partition(" x ")
    value = look_up(results, path.split("."))
    if value is None:
        raise KeyError(path)
    if word == "each":
        return ", ".join(format(x, form) for x in value)
    if word:
        value = WORDS[word](value)
    if isinstance(value, list):
        spread = [stdev(value)] if len(value) > 1 else []
        return " +- ".join(format(x, form) for x in (mean(value), *spread))
    return format(value * float(factor) if factor else value, form).replace("|", r"\|")


def fill(text, results):
    """Puts figures into a text -> text, or None where one is missing."""
    try:
        return FIGURE.sub(functools.partial(figure, results), text)
    except (KeyError, IndexError, TypeError):                     # nothing, or null, is there
        return None


def verdict(text):
    """ "0.004 < 0.01 and 3 > 2" -> yes or **no** """
    for part in text.split(" and "):
        a, sign, b = part.split()
        low, high = (a, b) if sign == "<" else (b, a)
        if not float(low) < float(high):
            return "**no**"
    return "yes"


def fill_row(row, results):
    cells = []
    for template in row.split("|")[1:-1]:
        text = fill(template, results) or " "
        if text.startswith(" met if "):
            text = f" {verdict(text[8:])} "
        cells.append(text)
    return "|".join(["", *cells, ""])


def made_by(x):
    """Machine, torch and revision of a result, in words."""
    words = [str(x.get("machine", "a CPU"))]
    if "torch" in x:
        words.append(f"torch {x['torch']}")
    return ", ".join([*words, f"revision {x.get('revision', OLDER)}"])


def add_suppression(r):
    """How far the gains cut the matches, beside the controls; in how many of the six, enough."""
    studies = {name: x for name, x in r.items() if name.startswith("suppression-")}
    good = 0
    for x in [*studies.values(), *r.get("retrofit", {}).get("suppression", {}).values()]:
        rates = {side: v["matches_per_1000"][0] for side, v in x["sides"].items()}
        x["cut"] = rates["gains"] / max(rates["before"], 1e-9) - 1
        x["controls"] = [rate for side, rate in rates.items() if side.startswith("control")]
    for x in studies.values():
        good += x["cut"] <= -0.9 and x["sides"]["gains"]["loss_percent"][0] < 0.5
    r["suppression"] = studies
    r["suppressed"] = {"count": good, "of": len(studies)}


def add_derived(r):
    """Adds figures that follow from those in the files to the results r."""
    r["made"] = {name: made_by(x) for name, x in r.items()}
    add_suppression(r)
    for x in r.get("twin", {}).get("sizes", {}).values():
        x["loss"] = x["PRISM"]["val_ce"] / x["dense"]["val_ce"] - 1
        x["points"] = 100 * (x["PRISM"]["accuracy"] - x["dense"]["accuracy"])
    for x in r.get("logit_rank", {}).get("synthetic", []):
        x["all"] = sum(x["V"] ** t for t in range(x["N"]))        # sequences
    if "refit" in r:
        documents = r["refit"]["documents"].values()
        r["refit"]["median"] = {}
        for method in r["refit"]["pearson"]:
            found = [correlation(u["real"], u[method]) for u in documents]
            r["refit"]["median"][method] = median(found)
    if "resume-1" in r:
        trials = r["resume-1"]["trials"]
        killed = [t for t in trials if t["killed"]]
        r["resume-1"] |= {"count": len(trials), "killed": len(killed),
                          "identical": sum(t["identical"] for t in trials),
                          "during_write": sum(t["during_write"] for t in killed)}
    for name in {"proto_lm", "proto_lm-books"} & set(r):
        accuracy = {n: mean(v) for n, v in r[name]["accuracy"].items()}
        behind = accuracy["linear on attention, frozen"] - accuracy["prototypes, frozen"]
        r[name]["points_behind"] = 100 * behind


def main(argv):
    r = {path.stem: read_results(path) for path in sorted((HERE / "results").glob("*.json"))}
    add_derived(r)
    lines = []
    for line in (HERE / "RESULTS.in.md").read_text("utf-8").splitlines():
        if line.startswith("for "):
            path, _, row = line[4:].partition(": ")
            try:
                entries = look_up(r, path.split("."))
            except KeyError:
                continue
            pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
            lines += [fill_row(row, r | {"n": n, "v": v}) for n, v in pairs]
        elif line.startswith("| "):
            lines.append(fill_row(line, r))
        else:
            text = fill(line, r)
            if text is not None:
                lines.append(text)
    with atomic(HERE / "RESULTS.md", "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_main(main)
