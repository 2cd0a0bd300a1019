"""Runs the experiments and writes RESULTS.md, and the claims in README.md, from what they measured.

    python experiments/all.py --tables       RESULTS.md and the claims of README.md alone, from experiments/results/*.json
    python experiments/all.py --quick        a small version of everything, as a check that nothing has rotted; under 15 minutes on 2 cores;
                                             its runs and results go to out-quick/
    python experiments/all.py                everything: many hours on 2 cores. Each script keeps what is done and goes on where it stopped

A script whose packages (experiments/requirements.txt) are missing is named and left out. RESULTS.md has one table a claim, the paper's figure
beside ours, and says first which claims hold here and which do not; a figure that nobody has measured stays empty.
"""
import importlib.util
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, kept  # noqa: E402

from prism import UserError, atomic, parse_config, run_main  # noqa: E402

RESULTS, README = ROOT / "experiments/results", ROOT / "README.md"
BEGIN, END = "<!-- claims, written by experiments/all.py --tables -->", "<!-- end of claims -->"
TINY = "--n_head=2 --n_embd=32 --n_layer=1 --block_size=64 --n_proto=64 --top_k=4 --max_iters=60 --eval_interval=60 --batch_size=8 --total_batch_tokens=512 --device=cpu"


@dataclass
class AllConfig:
    tables: bool = False   # only write RESULTS.md
    quick: bool = False    # small versions, in out-quick/
    only: str = ""         # names of scripts with commas between, without .py


RETROFIT = '--retrofit="--max_iters=50 --learning_rate=0.001 --warmup_iters=5"'
LDS = {"lds": ("pydoc", "--again=12 --removals=8 --removed=block,cosine,random --full=192 --ensemble=3"),  # name of a result: corpus, options of lds.py
       "lds-books": ("books", "--dataset=books512 --again=12 --removals=8 --removed=block,cosine,random --work=out-lds-books --out=experiments/results/lds-books.json"),
       "lds-retrofit": ("pydoc, prototypes attached to dense models", f"{RETROFIT} --models=16 --again=0 --removals=0 --methods=block,joined,gradient,cosine --work=out-lds-retrofit --out=experiments/results/lds-retrofit.json")}
PROTO = {"proto_lm": ("pydoc", "--tune_epochs=1"), "proto_lm-books": ("books", "--dataset=books --out_dir=out-books --most=150 --tune_epochs=0 --sweep=false --keep=out-proto-lm-books --out=experiments/results/proto_lm-books.json")}
WHOLE = {"quality": ("--datasets=pydoc,books", "--grid=true"), "lds": [v[1] for v in LDS.values()], "proto_lm": [v[1] for v in PROTO.values()], "logit_rank": ("--gains=out/gains/examples.json",)}  # options of the whole runs; else none

# name, packages, options of the quick version; Q/ stands for out-quick/, RUN for a tiny run there
SCRIPTS = (
    ("quality", (), f"--seeds=1 --results=Q/quality.json --options={TINY.replace(' ', '~')}"),
    ("throughput", (), "--quick --results=Q/throughput.json"),
    ("resume", (), "--trials=1 --results=Q/resume.json"),
    ("tokenize_1gb", (), "--mb=2 --out=Q/tokenize.json"),
    ("mix", (), "--rounds=3 --results=Q/mix.json"),
    ("planted", (), "--models=1 --max_iters=100 --documents=40 --plantings=2 --results=Q/planted.json"),
    ("refit", (), "--out_dir=RUN --documents=2 --tokens=8192 --queries=32 --out=Q/refit.json"),
    ("attribution_speed", (), "--out_dir=RUN --quick --out=Q/attribution_speed.json"),
    ("attribution_small", (), "--out_dir=RUN --settings=--rank=16 --queries=8 --out=Q/attribution_small.json"),
    ("lds", ("kronfluence",), f"--dataset=pydoc --models=4 --again=3 --queries=8 --removals=1 --removed=block --mus=0.1 --work=Q/lds --out=Q/lds.json --train={TINY.replace(' ', '~')}"),
    ("retrofit", (), f"--out_dir=RUN --dense=Q/dense1 --work=Q/retrofit --out=Q/retrofit.json --recipes=--max_iters=20 --train={TINY.replace(' ', '~')} --behavior="),
    ("ekfac", ("kronfluence",), "--out_dir=RUN --queries=2 --work=Q/ekfac --out=Q/ekfac.json"),
    ("curvature", (), f"--out_dir=RUN --loose=Q/loose --tokens=4096 --probes=2 --out=Q/curvature.json --train={TINY.replace(' ', '~')}~--lambda_t2p=0~--lambda_p2t=0"),
    ("twin", (), f"--sizes=48,96 --items=20 --work=Q/twin --out=Q/twin.json --options={TINY.split(' ', 2)[2].replace(' ', '~')}"),
    ("grounding", ("scipy",), f"--out_dir=RUN --dense=Q/dense1 --other=Q/other --other_dense=Q/dense2 --tokens=8192 --held_out=4096 --out=Q/grounding.json --train={TINY.replace(' ', '~')}"),
    ("suppression", (), "--only=the --behavior=the --out_dir=RUN --mode=zero --price=1000 --prompts=8 --max_new_tokens=20 --steps=20 --tokens=4096 --out=Q"),
    ("controllers", (), "--runs=RUN --out=Q/controllers.json"),
    ("logit_rank", ("scipy",), f"--out_dir=RUN --dense=Q/dense1 --train={TINY.replace(' ', '~')} --histories=32 --length=24 --futures=2 --future=3 --targets=2 --basis=16 --steps=4 --ranks=2,8 --horizons=4 --shorts=4,8 --alphabet=3 --horizon=5 --learned=2 --out=Q/logit_rank.json"),
    ("proto_lm", (), "--out_dir=RUN --length=24 --most=30 --prototypes=0 --epochs=3 --tune_epochs=1 --seeds=1 --sweep=false --keep=Q/proto_lm --out=Q/proto_lm.json"),
)


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows)])


def about(x, digits=3):
    return f"{mean(x):.{digits}f}" + (f" +- {stdev(x):.{digits}f}" if len(x) > 1 else "")


def spread(x, digits=2, unit=""):
    """[value, low, high] in words."""
    return f"{x[0]:+.{digits}f}{unit} [{x[1]:+.{digits}f}, {x[2]:+.{digits}f}]"


def results():
    """-> name: JSON of every result there is."""
    return {path.stem: kept(path) for path in sorted(RESULTS.glob("*.json"))}


# ----------------------------------------------------------------------------- claims: paper, goal, ours, whether it is met

def suppressions(r):
    return {n[12:]: x for n, x in r.items() if n.startswith("suppression-") and "sides" in x}


def rate(x, side):
    return x["sides"][side]["matches_per_1000"][0]


def cut(x, side="gains"):
    before = rate(x, "before")
    return 1 - rate(x, side) / before if before else 0.0


def claims(r):
    """Yields (claim, the paper's figure, the goal, ours, met). A result that is missing gives an empty figure."""
    def of(name, f):
        try:
            return f(r[name])
        except KeyError:
            return "not measured", None

    def every_one(values):
        """all(), but of nothing nothing was measured."""
        values = list(values)
        if not values:
            raise KeyError("no value")
        return all(values)
    yield ("loss against the dense twin", "within 2.5 points downstream", "within 1% (pydoc, books)", *of("quality", lambda x: (
        ", ".join(f"{x['against dense'][n]['loss']:+.2%} {n}" for n in ("pydoc", "books")), all(x["against dense"][n]["loss"] < 0.01 for n in ("pydoc", "books")))))
    yield ("accuracy on cloze items against the dense twin, over sizes", "within 2.5 points downstream", "within 2.5 points, four sizes", *of("twin", lambda x: (
        ", ".join(f"{100 * (v['PRISM']['accuracy'] - v['dense']['accuracy']):+.1f}" for v in x["sizes"].values()), every_one(v["PRISM"]["accuracy"] > v["dense"]["accuracy"] - 0.025 for v in x["sizes"].values()) and len(x["sizes"]) >= 4)))
    yield ("training throughput against the dense twin", "97.3% (H200)", "97%", *of("throughput-cpu", lambda x: (f"{x['ratios']['PRISM / dense']:.1%} (CPU)", x["ratios"]["PRISM / dense"] >= 0.97)))
    yield ("the same on a GPU", "97.3% (H200)", "97%", "not measured", None)
    yield ("full joint Hessian against real refits of the head", "none", "r > 0.99", *of("refit", lambda x: (f"r {x['pearson']['full']:.3f}", x["pearson"]["full"] > 0.99)))
    yield ("exact blocks against real refits", "none", "r 0.9", *of("refit", lambda x: (f"r {x['pearson']['block']:.3f}, joined {x['pearson']['joined']:.3f}", x["pearson"]["block"] >= 0.9)))
    yield ("a query against EK-FAC", "470 to 500 times", "500 times", *of("ekfac", lambda x: (f"{x['ratio']['query']:,.0f} times at {1 / x['ratio']['memory']:.2f} of the memory", x["ratio"]["query"] >= 500 and x["ratio"]["memory"] >= 1)))
    for name in ("lds", "lds-books"):
        yield (f"LDS of block against EK-FAC's, the better of two dampings, {LDS[name][0]}", "none", "at or above", *of(name, lambda x: (lambda best: (
            f"{x['lds']['block']['mean']:.3f} against {x['lds'][best]['mean']:.3f}, difference {x['lds'][best]['first_minus_this'][0]:+.3f} +- {x['lds'][best]['first_minus_this_both']:.3f}",
            x["lds"][best]["first_minus_this"][0] >= 0))(max(("ekfac", "ekfac-undamped"), key=lambda n: x["lds"][n]["mean"]))))
    yield ("curvature within blocks, squared norm", "close to block diagonal", "above random prototypes", *of("curvature", lambda x: (
        ", ".join(f"{v['within_squared']:.3f} {n}" for n, v in x["heads"].items()), x["heads"]["PRISM"]["within_squared"] > x["heads"]["random prototypes"]["within_squared"])))
    yield ("neighbourhoods purer than random directions'", "cards", "next token", *of("grounding", lambda x: (
        f"{x['sets']['prototypes']['next token']:.3f} against {x['sets']['random directions']['next token']:.3f}, k-means {x['sets']['k-means of the dense twin']['next token']:.3f}",
        x["sets"]["prototypes"]["next token"] > x["sets"]["random directions"]["next token"])))
    yield ("prototypes attached to a trained dense model, against from scratch at equal further training", "none", "within 1%", *of("retrofit", lambda x: (f"{x['against_scratch']:+.2%}", x["against_scratch"] < 0.01)))
    every = suppressions(r)
    good = [n for n, x in every.items() if cut(x) >= 0.9 and x["sides"]["gains"]["loss_percent"][0] < 0.5]
    yield ("behaviors turned down by 90% for less than 0.5% of loss", "without measurable loss", "6 of 6", f"{len(good)} of {len(every)}" + (f" ({', '.join(good)})" if good else "") if every else "not measured", len(good) == 6 if every else None)
    yield ("controllers, points of accuracy on held-out items", "about 3", "3, interval above 0, 3 seeds of 2 corpora", *of("controllers", lambda x: (
        ", ".join(f"{v['result']['controller']['points'][0]:+.1f}" for v in x["runs"].values()), every_one(v["result"]["controller"]["points"][0] >= 3 and v["result"]["controller"]["points"][1] > 0 for v in x["runs"].values()) and len(x["runs"]) >= 6)))
    yield ("singular values of the logits fall as i^-alpha", "0.536 trained, 0.374 untrained", "above 1/2 trained, below untrained", *of("logit_rank", lambda x: (
        ", ".join(f"{v['alpha']:.2f} {n}" for n, v in x["spectrum"].items()) + "; with fewer histories " + ", ".join(f"{u:.2f}" for n in ("PRISM", "untrained") for u in x["spectrum"][n]["fewer"].values()),
        x["spectrum"]["PRISM"]["interval"][0] > 0.5 > x["spectrum"]["untrained"]["interval"][1])))
    yield ("KL of 15 tokens continued from other prompts' logits", "2.85 against 10.79", "below one-token and the last 8 of 48 tokens", *of("logit_rank", lambda x: (
        ", ".join(f"{v[-1]:.2f} {n}" for n, v in x["lingen"]["same text"].items()), x["lingen"]["same text"]["Lingen"][-1] < min(x["lingen"]["same text"][n][-1] for n in ("one-token", "last 8 tokens")))))
    yield ("networks of known rank learned from their logits", "polynomial", "to 1e-6, rank 32", *of("logit_rank", lambda x: (
        f"to {max(v['error'] for v in x['synthetic']):.0e}, rank {max(v['rank'] for v in x['synthetic'])}", max(v["error"] for v in x["synthetic"]) < 1e-6 and max(v["rank"] for v in x["synthetic"]) >= 32)))
    for name, (corpus, _) in PROTO.items():
        yield (f"prototype classifier against a plain one, frozen trunk, {corpus}", "within a point", "within a point", *of(name, lambda x: (lambda a: (
            f"{100 * a['prototypes, frozen']:.1f}% against {100 * a['linear on attention, frozen']:.1f}%", a["prototypes, frozen"] > a["linear on attention, frozen"] - 0.01))({n: mean(v) for n, v in x["accuracy"].items()})))


# ----------------------------------------------------------------------------- tables

def tables(r):
    """Yields (title, command, text) of every table whose result is there."""
    if x := r.get("quality"):
        yield "Loss against the dense twin", "quality.py --datasets=pydoc,books", table(("corpus", "seeds", "dense twin", "PRISM", "against dense", "without the residual", "against dense", "residual's share", "live prototypes"), (
            (n, v["seeds"], about(v["losses_dense"]), about(v["losses"]), f"{v['loss']:+.2%}", about(v["losses_prototypes"]), f"{v['without_residual']:+.2%}", f"{v['residual_share']:.3f}", f"{v['live']:.0f}")
            for n, v in x["against dense"].items()))
        for dataset, rows in x.get("grid", {}).get("rows", {}).items():
            yield f"Loss weights, k and M, {dataset}", f"quality.py --grid=true {x['grid']['options']}", table(("options", "loss", "without the residual", "residual's share", "live"), (
                (f"`{n}`", f"{v['loss']:+.2%}", f"{v['without_residual']:+.2%}", f"{v['residual_share']:.3f}", f"{v['live']:.0f}") for n, v in sorted(rows.items(), key=lambda u: u[1]["loss"]))) + "\n\nOne seed each.\n\n![Pareto curve](results/quality-grid.png)"
    if (x := r.get("twin")) and "power_law" in x:
        law = "; ".join(f"{n} N^-{v['b']:.3f}" + (f" [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" if v["interval"] else "") for n, v in x["power_law"].items())
        yield "The dense twin over size", "twin.py", table(("size", "weights", "loss, dense", "loss, PRISM", "", "accuracy, dense", "accuracy, PRISM"), (
            (n, f"{v['dense']['weights']:,}", f"{v['dense']['val_ce']:.4f}", f"{v['PRISM']['val_ce']:.4f}", f"{v['PRISM']['val_ce'] / v['dense']['val_ce'] - 1:+.2%}",
             *(f"{v[k]['accuracy']:.1%}" for k in ("dense", "PRISM"))) for n, v in x["sizes"].items())) + f"\n\nLoss over weights N, with 95% intervals of the exponent: {law}.\n\n![loss over size](results/twin.png)"
    if x := r.get("throughput-cpu"):
        yield "Throughput on the CPU", "throughput.py", table(("side", "tokens/s", "against dense", "peak MB", "training ce at the end"), (
            *((n, f"{v['tokens_per_s']:,.0f}", f"{v['against_dense']:.3f}", f"{v['peak_mb']:.0f}", f"{v['ce']:.4f}") for n, v in x["sides"].items()), ("PRISM at 130M on a GPU", *["not measured"] * 4))) + (
            "\n\nSides interleaved, medians. Ratios within a round: " + ", ".join(f"{n} {v:.2f}" for n, v in x["ratios"].items()) + ".")
    if x := r.get("refit"):
        yield "Predicted influence against real refits of the head", "refit.py", table(("method", "Pearson r over all pairs", "of the median document"), (
            (n, f"{v:.3f}", f"{median(correlation(u['real'], u[n]) for u in x['documents'].values()):.3f}") for n, v in x["pearson"].items())) + (
            f"\n\n{len(x['documents'])} documents, {x['options']['queries']} held-out tokens, {x['options']['tokens']:,} training tokens; {x['off_diagonal_share']:.0%} of the squared norm of that head's curvature lies off the diagonal blocks.")
    for name, (corpus, options) in LDS.items():
        if not (x := r.get(name)):
            continue
        rows = [(n, f"{v['mean']:.3f} +- {v['both']:.3f}", f"{v['of_ceiling']:.0%}" if "of_ceiling" in v else "", f"{v['first_minus_this'][0]:+.3f} +- {v['first_minus_this_both']:.3f}") for n, v in x["lds"].items()]
        text = table(("method", "LDS", "of the ceiling", "first minus this"), rows) + f"\n\n{x['documents']} documents."
        if x.get("ceiling"):
            text += f" The same half with two seeds correlates {x['seeds']['mean']:.3f} +- {x['seeds']['half_width']:.3f}; its root, {x['ceiling']:.3f}, is the ceiling."
        if v := x.get("full"):
            text += f" Full: {v['windows']} windows, {v['iterations']} iterations, largest residual {v['residual']:.3f}."
        if v := x.get("removal"):
            text += f"\n\nWithout the best documents of a query, up to {x['options']['share']:.0%} of the tokens, rise of its loss, mean and standard error over {len(v['queries'])} queries: " + ", ".join(
                f"{n} {mean(u):+.4f}" + (f" +- {stdev(u) / len(u) ** 0.5:.4f}" if len(u) > 1 else "") for n, u in v["added"].items()) + "."
        yield f"Real retraining, {corpus}: {x['options']['models']} models on halves, {x['queries']} queries", f"lds.py {options}", text
    if x := r.get("retrofit"):
        yield "Prototypes attached afterwards", "retrofit.py", table(("model", "loss", "against dense", "without the residual", "residual's share", "live"), (
            (n, f"{v['val_ce']:.4f}", f"{v['against_dense']:+.2%}", *((f"{v['val_ce_prototypes']:.4f}", f"{v['residual_share']:.3f}", f"{v['live']:.0f}") if "live" in v else ("", "", ""))) for n, v in x["sides"].items())) + "".join(
            f"\n\n`{v['behavior']}`, {n}: {rate(v, 'before'):.2f} to {rate(v, 'gains'):.2f} per 1,000 tokens ({-cut(v):+.0%}; controls {', '.join(f'{rate(v, c):.2f}' for c in v['sides'] if c.startswith('control'))}) for "
            f"{spread(v['sides']['gains']['loss_percent'], unit='%')} of loss." for n, v in x.get("suppression", {}).items())
    if x := r.get("ekfac"):
        yield "Cost of a query, and agreement with exact blocks", "ekfac.py", table(("method", "once, s", "a query, ms", "peak MB", "disk MB", "top 10", "top 100", "Spearman"), (
            (n, "" if v["once_s"] is None else f"{v['once_s']:.1f}", f"{1000 * v['query_s']:.1f}", f"{v['peak_bytes'] / 1e6:,.0f}", f"{v['disk'] / 1e6:,.0f}", *(f"{v[k]:.2f}" if k in v else "" for k in ("top_10", "top_100", "spearman"))) for n, v in x["methods"].items()))
    if x := r.get("curvature"):
        yield "Curvature within prototypes' own blocks", "curvature.py", table(("head", "share of the squared norm", "standard error", "share of the norm", "condition number, median"), (
            (n, f"{v['within_squared']:.3f}", f"{v['standard_error']:.3f}", f"{v['within_norm']:.3f}", f"10^{v['log10_condition'][1]:.2f}") for n, v in x["heads"].items())) + "\n\n![co-activation and condition numbers](results/curvature.png)"
    if x := r.get("grounding"):
        kinds = list(x["by_chance"])
        yield "Neighbourhoods of prototypes in training text", "grounding.py", table(("directions", "cosine of the nearest", *(f"purity, {k}" for k in kinds), "stable over seeds", "by chance"), (
            *((n, f"{v['nearest_cosine'][1]:.3f}", *(f"{v[k]:.3f}" for k in kinds), *((f"{x['stability'][n]['mean']:.3f}", f"{x['stability'][n]['by_chance']:.3f}") if n in x["stability"] else ("", ""))) for n, v in x["sets"].items()),
            ("tokens at random", "", *(f"{x['by_chance'][k]:.3f}" for k in kinds), "", "")))
    if x := r.get("planted"):
        kinds = list(next(iter(x["table"].values())))
        yield "Documents planted with facts: how often the right one ranks first", "planted.py", table(("method", *kinds), ((n, *(f"{v[k]['first']} of {v[k]['of']}" for k in kinds)) for n, v in x["table"].items()))
    if x := r.get("attribution_small"):
        yield "What smaller indexes lose", "attribution_small.py", table(("settings", "r with the whole index", "size, MB", "top 10 in common"), (
            (f"`{n}`", f"{v['r']:.3f}", f"{v['bytes'] / 1e6:,.0f}", f"{v['overlap']:.0%}") for n, v in x["settings"].items()))
    if x := r.get("attribution_speed-cpu"):
        b = x["bandwidth"]
        yield "What attribution costs", "attribution_speed.py", table(("figure", "measured", "goal"), (
            ("index, forward passes over the corpus", f"{x['index']['ratio']:.2f}", "2.5"), ("share of the bandwidth, posting lists", f"{b['postings_share']:.2f}", "0.5"), ("documents of a query, ms", f"{b['document_ms']:.1f}", ""),
            ("64 queries together against one by one, documents", f"{x['batch']['document']['ratio']:.1f}", "8"), ("the same, tokens", f"{x['batch']['token']['ratio']:.1f}", "8")))
    if x := r.get("resume-1"):
        yield "Killed and resumed", "resume.py", f"{sum(t['identical'] for t in x['trials'])} of {len(x['trials'])} runs ended with the same weights, bit for bit; {sum(t['killed'] for t in x['trials'])} of them were killed at a random moment, {sum(t['killed'] and t['during_write'] for t in x['trials'])} while a checkpoint was being written."
    if x := r.get("tokenize_1gb"):
        yield "Tokenising", "tokenize_1gb.py", table(("workers", "MB/s"), x["mb_per_second"].items()) + f"\n\n{x['megabytes']:.0f} MB of text; at most {x['peak_rss_mb']} MB of memory."
    if every := suppressions(r):
        yield "Behaviors turned down", "suppression.py", table(("behavior", "gains", "matches per 1,000 tokens", "controls", "loss of gains", "bias", "ban (text made impossible)", "finetune"), (
            (f"`{x['behavior']}`", f"{x['found']['by']}, {x['found']['prototypes']}", f"{rate(x, 'before'):.2f} -> {rate(x, 'gains'):.2f} ({-cut(x):+.0%})", ", ".join(f"{rate(x, n):.2f}" for n in x["sides"] if n.startswith("control")),
             spread(x["sides"]["gains"]["loss_percent"], unit="%"), *(f"{x['sides'][n]['loss_percent'][0]:+.2f}%, {rate(x, n):.2f}" + (f" ({x['sides'][n]['impossible_percent']:.2f}%)" if "impossible_percent" in x["sides"][n] else "") for n in ("bias", "ban", "finetune"))) for x in every.values()))
    if x := r.get("logit_rank"):
        ranks = list(next(iter(x["spectrum"].values()))["kl"])
        yield "Low logit rank: the spectrum", "logit_rank.py", table(("model", "alpha, 95%", *(f"with {m} histories" for m in next(iter(x["spectrum"].values()))["fewer"]), *(f"KL at rank {n}" for n in ranks), "KL falls as r^-"), (
            (n, f"{v['alpha']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]", *(f"{u:.3f}" for u in v["fewer"].values()), *(f"{u:.3f}" for u in v["kl"].values()), f"{v['kl_exponent']:.2f}" if v["kl_exponent"] else "")
            for n, v in x["spectrum"].items())) + f"\n\n{x['options']['histories']} histories.\n\n![singular values and KL](results/logit_rank.png)"
        steps = (1, 5, 10, 15)
        yield "Lingen: a prompt continued from other prompts' logits", "logit_rank.py", table(("basis prompts", "method", *(f"KL of {t} tokens" for t in steps)), (
            (side, n, *(f"{v[t - 1]:.2f}" for t in steps if t <= len(v))) for side in x["lingen"] for n, v in x["lingen"][side].items()))
        yield "Learned from logits alone: networks of known rank", "logit_rank.py", table(("network", "queries", "of all", "rounds", "linear programs", "largest error of a logit"), (
            (v["name"], f"{v['queries']:,}", f"{sum(v['V'] ** t for t in range(v['N'])):,.3g}" if v["N"] > 12 and v["V"] > 2 else f"{sum(v['V'] ** t for t in range(v['N'])):,}", v["rounds"], v["programs"], f"{v['error']:.0e}") for v in x["synthetic"]))
        yield "Learned from logits alone: the model itself, over a few tokens", "logit_rank.py", table(("learned", "queries", "linear programs", "KL of a sequence", "total variation"), (
            (v["name"], *((f"{v['queries']:,}", v["programs"]) if "queries" in v else ("", "")), f"{v['kl']:.3f} +- {v['kl_error']:.3f}", f"{v['variation']:.3f}") for v in x["real"]))
    for name, (corpus, options) in PROTO.items():
        if not (x := r.get(name)):
            continue
        yield f"Prototype classification, {corpus}: {len(x['classes'])} classes", f"proto_lm.py {options}", table(("classifier", "accuracy over seeds"), ((n, ", ".join(f"{v:.1%}" for v in u) + f"; mean {mean(u):.1%}") for n, u in x["accuracy"].items())) + "\n\n" + table(
            ("explanation", *(f"{k}, {s:.0%}" for k in ("comprehensiveness", "sufficiency") for s in x["faithful"]["prototypes, share"][0]["shares"])), (
                (n, *(f"{mean(q):.3f}" for k in ("comprehensiveness", "sufficiency") for q in zip(*(u[k] for u in runs)))) for n, runs in x["faithful"].items())) + "\n\nA simulator that sees a fifth of the tokens agrees with the classifier: " + ", ".join(
            f"{n} {mean(u):.1%}" for n, u in x["simulatability"].items()) + "." + (f"\n\n![sweeps, curves and simulators](results/{name}.png)" if "sweep" in x else "")
    if x := r.get("controllers"):
        yield "Controllers", "controllers.py", table(("run", "uncalibrated", "controller, points", "random directions", "controller over these", "temperature"), (
            (n, f"{v['result']['uncalibrated']['accuracy']:.1%}", *(spread(v["result"][k]["points"], 1) for k in ("controller", "random")), spread(v["result"]["over_random"], 1) if "over_random" in v["result"] else "",
             spread(v["result"]["temperature"]["points"], 1)) for n, v in sorted(x["runs"].items(), key=lambda u: (u[1]["task"], u[1]["train_seed"]))))


def machines(r, command):
    """Where the results of a script were made."""
    stem, found = command.split(".py")[0], set()
    for name, x in r.items():
        if name.split("-")[0] == stem:
            m = x.get("machine", "a CPU") if isinstance(x.get("machine", ""), str) else f"{x['machine']['cores']} cores, torch {x['machine']['torch']}"
            found.add(m if "torch" in m else f"{m}, torch {x['torch']}" if "torch" in x else m)
    return "; ".join(sorted(found))


def write():
    r = results()
    rows = [(c, paper, goal, ours, {True: "yes", False: "**no**", None: ""}[met]) for c, paper, goal, ours, met in claims(r)]
    text = "# What was measured\n\nWritten by `python experiments/all.py --tables` from the JSON files in results/, which hold every figure with its options and machine.\n\n## Claims\n\n"
    told = table(("claim", "paper", "goal", "here", "met"), rows)
    text += told + "\n\nNot met: " + "; ".join(row[0] for row in rows if row[4] == "**no**") + ". Not measured: " + "; ".join(row[0] for row in rows if not row[4]) + ". NOTES.md tells what else was tried and failed.\n"
    for title, command, body in tables(r):
        text += f"\n## {title}\n\n`python experiments/{command}`; {machines(r, command)}\n\n{body}\n"
    head, begin, rest = README.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise UserError(f"{README} has lost its lines {BEGIN!r} and {END!r}, between which the claims stand; put them back")
    with atomic(RESULTS.parent / "RESULTS.md", "w", encoding="utf-8") as f:
        f.write(text)
    with atomic(README, "w", encoding="utf-8") as f:
        f.write(f"{head}{begin}\n{told}\n{end}{tail}")
    failed = [row[0] for row in rows if row[4] == "**no**"]
    print(f"experiments/RESULTS.md, README.md: {sum(row[4] == 'yes' for row in rows)} claims met, {len(failed)} not ({'; '.join(failed)}), {sum(row[4] == '' for row in rows)} not measured")


def made_small(folder):
    """A tiny run on pydoc, with cloze items, for the quick versions."""
    folder.mkdir(parents=True, exist_ok=True)

    def python(*words):
        subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    data = ROOT / "data/pydoc"
    if not (data / "meta.json").exists():
        python("data/prepare.py", "pydoc")
    for name, words in (("cloze", ()), ("cloze-train", ("--split=train", "--items=300"))):
        if not (data / f"{name}.jsonl").exists():
            python("data/prepare.py", "cloze", "--dataset=pydoc", *words)
    python("train.py", "--resume", f"--out_dir={folder / 'run'}", *TINY.split())
    python("attribute.py", "index", f"--out_dir={folder / 'run'}")


def main(argv):
    cfg = parse_config(AllConfig, argv)
    names = [s[0] for s in SCRIPTS]
    only = cfg.only.split(",") if cfg.only else names
    if wrong := [n for n in only if n not in names]:
        raise UserError(f"only={cfg.only}: no script {wrong[0]!r}; expected some of {', '.join(names)}")
    failed, out = [], ROOT / "out-quick"
    if not cfg.tables:
        if cfg.quick:
            made_small(out)
        for name, packages, options in SCRIPTS:
            if name not in only or cfg.quick and not options:
                continue
            if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
                print(f"{name}: left out, {', '.join(missing)} cannot be imported; pip install -r experiments/requirements.txt", flush=True)
                continue
            place = {"~": " ", "RUN": str(out / "run"), "Q/": f"{out}/"}
            runs = [[re.sub("~|RUN|Q/|Q$", lambda m: place.get(m[0], str(out)), w) for w in options.split()]] if cfg.quick else [shlex.split(w) for w in WHOLE.get(name, ("",))]
            for words in runs:
                t0 = time.perf_counter()
                r = subprocess.run([sys.executable, str(ROOT / "experiments" / f"{name}.py"), *words], cwd=ROOT, **(dict(capture_output=True, text=True) if cfg.quick else {}))
                if r.returncode:
                    failed.append(" ".join([name, *words]) if not cfg.quick else name)
                print(f"{name}: {'failed: ' + (r.stderr or '').strip()[-400:] if r.returncode else 'done'}, {time.perf_counter() - t0:.0f} s", flush=True)
    if not cfg.quick:
        write()
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
