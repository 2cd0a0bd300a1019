"""RESULTS.md from RESULTS.in.md and the JSON files in results/: python experiments/all.py --tables

{quality.against dense.pydoc.loss:+.2%} is a figure of results/quality.json; " x 1000" behind a path
multiplies it. A list becomes mean +- standard deviation, or what a word before the path says; `*`
in a path takes all entries. "for PATH: | {n} | {v.x} |" is a row per entry, n its name and v its
value. A cell "met if {a} < {b}" becomes the verdict. What is missing leaves its cell empty.
"""
import functools
import re
from statistics import mean, stdev

from tools import ROOT, read_results

from common import atomic

HERE = ROOT / "experiments"
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
    path, _, factor = path.partition(" x ")
    value = look_up(results, path.split("."))
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
    """Machine, torch, revision and date of a result, in words."""
    torch = [f"torch {x['torch']}"] if "torch" in x else []
    origin = f"revision {x.get('revision')}", str(x.get("date"))
    return ", ".join([str(x.get("machine", "a CPU")), *torch, *origin])


def price(e):
    """What a side of suppression.py costs, in words."""
    if not e.get("reached", True):
        gap = f"{e['rise'][0]:+.2f} nats" if "rate" not in e else f"rate x{e['rate'][0]:.2f}"
        return f"not reached ({gap})"
    parts = [f"{e['loss'][0]:+.2f}%"]
    parts += [f"benign {e['benign'][0]:+.2f}%"] if "benign" in e else []
    parts += [f"{e['kl'][0]:.4f} nats"] if "kl" in e else []
    return ", ".join(parts)


def add_suppression(r):
    """Sources and expressions of both corpora, and how many of each are suppressed as was asked."""
    r["sources"], r["expressions"] = {}, {}
    counts = dict(far=0, sampled=0, expressions=0)
    for name in ("suppression-pydoc", "suppression-books"):
        for behavior, x in r.get(name, {}).get("studies", {}).items():
            e = x["sides"]["edit"]
            x["price"] = {side: price(v) for side, v in x["sides"].items()}
            cheap = e["kl"][0] <= 0.02 if "kl" in e else True
            if "retrained" in x["sides"]:
                r["sources"][behavior] = x
                far = e["rise"][0] >= x["sides"]["retrained"]["rise"][0]
                counts["far"] += far and cheap and e["loss"][0] <= 0.3
                before, after = x["sampled"]["own"]
                counts["sampled"] += after <= 0.1 * before
            else:
                r["expressions"][behavior] = x
                dear = max(e["loss"][0], e.get("benign", [0])[0])
                counts["expressions"] += cheap and dear <= 0.5 and e["rate"][0] <= 0.1
    r["suppressed"] = counts | {"of": len(r["sources"]), "of_expressions": len(r["expressions"])}


def add_derived(r):
    """Adds figures that follow from those in the files to the results r."""
    r["made"] = {name: made_by(x) for name, x in r.items()}
    add_suppression(r)
    rows = r.get("forget", {}).items()
    r["forgotten"] = {n.split(": ")[1]: x for n, x in rows if ": " in n}
    for x in r.get("twin", {}).get("sizes", {}).values():
        x["loss"] = x["PRISM"]["val_ce"] / x["dense"]["val_ce"] - 1
        x["points"] = 100 * (x["PRISM"]["accuracy"] - x["dense"]["accuracy"])
    for x in r.get("logit_rank", {}).get("synthetic", []):
        x["all"] = sum(x["V"] ** t for t in range(x["N"]))        # sequences
    for kind, x in r.get("grounding", {}).get("sets", {}).items():
        x["stability"] = r["grounding"]["stability"][kind]
    for name in {"proto_lm", "proto_lm-books"} & set(r):
        accuracy = {n: mean(v) for n, v in r[name]["accuracy"].items()}
        behind = accuracy["linear on attention, frozen"] - accuracy["prototypes, frozen"]
        r[name]["points_behind"] = 100 * behind


def write_tables():
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
