"""A5's board: document scores against real retraining on secret halves, beside baselines.

    python course/a5/board.py train --seed=7 --out=secret.npz     32 halves: an hour, resumable
    python grader/board.py score . --trusted                      your own score.py
    python board.py score SUBMISSION --out=results.json           as root: in the sandbox
    python board.py table name=results.json ... --out=board.html  all submissions, the best first

A submission is one function, score(run, queries) -> (queries, documents). It gets the run of one
model of all text and never sees the halves; board.npz keeps their losses. LDS as in lds.py:
mean over queries of Spearman's correlation, over halves, of losses and minus the kept scores' sum.
"""
import argparse
import html
import json
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
PLACES = [HERE, HERE.parent, HERE / "files", HERE.parents[1]]     # in a grader, or in the project
for place in PLACES:
    sys.path += [str(place), str(place / "experiments"), str(place / "experiments/attribution")]
import grade  # noqa: E402
import numpy as np  # noqa: E402
from lds import TRAIN, compared, correlations, losses_without, reliability  # noqa: E402
from rivals import ask  # noqa: E402
from tools import trained  # noqa: E402

from common import Run, atomic  # noqa: E402

BASELINES = "block", "ekfac", "gradient"                          # the first is to be beaten
LIMITS = {"seconds": 450, "total": 450, "file_bytes": 2 ** 30}


def base_run(work):
    """The run of one model of all text"""
    return Run(trained(work / "all", "--dataset=pydoc512", "--seed=1", *TRAIN.split()), "cpu")


def read(path, text=None):
    """A board -> {name: array}; Stop if it was made of other training text"""
    with np.load(path, allow_pickle=False) as content:
        board = dict(content)
    if text and board["text"] != text:
        raise grade.Stop(f"{path} was made of another Python's documentation; make your own: "
                         "python course/a5/board.py train")
    return board


def train(seed, work, out, models=32, repeats=8, n_queries=128):
    """Trains the halves, scores the baselines, and writes a board."""
    run = base_run(work)
    rng = np.random.default_rng(seed)
    D = len(run.titles)
    kept = np.stack([rng.permutation(D) < D // 2 for _ in range(models)])
    queries = run.T * rng.permutation((len(run.val) - 1) // run.T)[:n_queries]
    cfg = SimpleNamespace(work=work, train=TRAIN)
    losses, twice = [], []
    for j, row in enumerate(kept):
        losses.append(losses_without(cfg, run, queries, row, seed + 1 + j))
        if j < repeats:
            twice.append(losses_without(cfg, run, queries, row, seed + 1001 + j))
        print(f"half {j + 1} of {models}: loss {losses[j].mean():.4f}", flush=True)
    board = dict(kept=kept, queries=queries, losses=losses, twice=twice, text=run.ckpt["data"])
    for name in BASELINES:
        scores, _ = ask(run.out_dir, run, name, queries, work / "scores")
        r, without = correlations(scores, kept, np.stack(losses))
        board |= {f"{name}/r": np.float32(r), f"{name}/without": np.float32(without)}
    with atomic(out) as f:
        np.savez_compressed(f, **board)


def figures(board, mine):
    """correlations() of scores -> LDS, its half-width, block minus this one, and its half-width"""
    x = compared(mine, (board["block/r"], board["block/without"]))
    return [x["mean"], x["both"], x["first_minus_this"][0], x["first_minus_this_both"]]


def score(submission, trusted, out):
    """Runs a submission and compares its scores with the losses -> results.json"""
    board = read(HERE / "board.npz")
    key = SimpleNamespace(**json.loads((HERE / "key.json").read_text("utf-8")))
    grade.may_grade(trusted)
    found, note = grade.grade(key, submission, [("board", [0])], trusted)
    arrays = found.get("board") or found["import"]
    shape = len(board["queries"]), board["kept"].shape[1]
    scores = arrays.get("0/scores")
    row, why = [0.0, 0.0, 0.0, 0.0], ""
    if "error" in arrays:
        why = str(arrays["error"])
    elif scores is None or scores.shape != shape or not np.isfinite(scores).all():
        why = f"expected finite scores of shape {shape}"
    else:
        row = figures(board, correlations(scores, board["kept"], board["losses"]))
    test = dict(name="LDS", max_score=1, score=max(0.0, row[0]), output=why or shown(row))
    result = dict(score=test["score"], output=note, tests=[test], figures=row,
                  leaderboard=[dict(name="LDS", value=round(row[0], 4))])
    print(test["output"])
    if out:
        grade.write(out, result)


def shown(row):
    lds, half, minus, minus_half = row
    beats = ", beats block" if minus + minus_half < 0 else ""
    return f"LDS {lds:.3f} +- {half:.3f}; to block {0 - minus:+.3f} +- {minus_half:.3f}{beats}"


def table(names, out):
    """name=results.json ... -> the board, printed and as a page; baselines and ceiling in it"""
    board, rows = read(HERE / "board.npz"), {}
    for name in BASELINES:
        rows[f"({name})"] = figures(board, (board[f"{name}/r"], board[f"{name}/without"]))
    repeats = len(board["twice"])
    seeds = reliability(board["losses"][:repeats], board["twice"])
    for word in names:
        name, _, path = word.partition("=")
        rows[name] = json.loads(Path(path).read_text("utf-8"))["figures"]
    best = sorted(rows, key=lambda name: -rows[name][0])
    lines = [f"{name:>20}  {shown(rows[name])}" for name in best]
    lines.append(f"{'(ceiling)':>20}  LDS {np.sqrt(max(0, seeds['mean'])):.3f}, of a perfect score")
    print("\n".join(lines))
    if out:
        page = f"<!doctype html><meta charset=utf-8><pre>{html.escape(chr(10).join(lines))}</pre>"
        with atomic(out, "w", encoding="utf-8") as f:
            f.write(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "score", "table"])
    parser.add_argument("words", nargs="*", help="a submission, or name=results.json of several")
    parser.add_argument("--seed", type=int, default=1, help="of the halves: keep it secret")
    parser.add_argument("--work", type=Path, default=Path("out-board"), help="models and scores")
    parser.add_argument("--trusted", action="store_true", help="no sandbox: only for your own work")
    parser.add_argument("--out", help="a board, results.json, or a page for table")
    options = parser.parse_args()
    if options.command == "train" and not options.out:
        raise grade.Stop("expected --out=secret.npz")
    if options.command == "score" and len(options.words) != 1:
        raise grade.Stop(f"found {options.words}, expected one folder with score.py")
    if options.command == "train":
        train(options.seed, options.work, options.out)
    elif options.command == "table":
        table(options.words, options.out)
    else:
        score(options.words[0], options.trusted, options.out)


if __name__ == "__main__":
    try:
        main()
    except (grade.Stop, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
