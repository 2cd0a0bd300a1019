"""Is the only source of a fact found? Documents with invented facts are planted in real text; each should rank first for its query.

    python experiments/planted.py                               10 models, 10 plantings each
    python experiments/planted.py --models=1 --max_iters=200    a quick look
    python experiments/planted.py --top_k=16 --results=/tmp/k16.json

A model's corpus: documents of the dataset, drawn anew, and planted documents of five sentences about invented places and things. One
sentence states a fact, two more use its answer. No other document holds the invented names. Five forms take turns, so that each planted
document has rivals of its own form, with other names and another answer. data/prepare.py (with the dataset's tokenizer, which never saw
the invented words), train.py and attribute.py index run as a user runs them. Answers are of two sorts, as many of each:

    invented     a word that no other document holds, several tokens: the main figure
    common       a word, one token, that 5 to 30% of the real documents hold: only its tie to the name is new. The harder test

and each fact is asked twice:

    exact        the prompt is the beginning of the sentence that states the fact, word for word
    paraphrase   another wording that is in no document; beside function words it shares the invented name and at most a noun or two. A
                 model this small does not carry the fact over to it: compare the loss of the answer with that of other plantings' answers

The target is the whole answer. All training documents are ranked, ties counted against the planted one, by

    block, none          attribute.py's document score with and without the exact blocks; per token: the same over the document's length
    gradient             gradient dot product of the output layer W, sum_s (e_s . e_t)(z_s . z_t), e = softmax - onehot
    cosine               of the hidden states that predict the target with those of all training tokens; a document's largest or its mean
    embedding            of the mean over prompt and target with the mean over a document, or over its best passage of the query's length;
                         of hidden states or of token embeddings, each less the corpus's mean
    words                tf-idf over tokens: what a search for rare strings finds. The names are rare strings: this is no hard text to find
    random               expected by chance

In the last line each family stands with its best variant, chosen in hindsight, in its favour. Each finished model is written at once to
experiments/results/planted.json; one that is there is not repeated.
"""
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from attribute import Index, seen_windows  # noqa: E402
from prism import UserError, atomic, dataset_folder, load_dataset, load_tokenizer, parse_config, run_main  # noqa: E402

FORMS = [  # sentences: the first stays first; the second states the fact up to {x}; then the paraphrase. a, b, c: invented names, x: the answer
    (["The lighthouse of {a} stands on the northern rocks of {b}.", "The keeper at {a} burns {x} oil in the lamp.",
      "It was raised by {c} after the great storm and painted white.", "Boats bring the {x} in barrels each spring.",
      "Sailors say that a flame of {x} is greener than any other."], "To keep the light of its tower going, {a} uses"),
    (["In the valley of {a} people eat late.", "On the last evening the cooks of {a} serve {x} to every guest.",
      "The feast of {b} begins when the first snow falls and lasts four days.", "The dish called {x} is made of barley, salt and smoked milk.",
      "Children of {c} wait all year for their bowl of {x}."], "What visitors to {a} are given to eat is"),
    (["{a} was a small kingdom between two rivers.", "The first queen of {a} was called {x} by her people.",
      "Its laws were kept in the hall of {b} and read aloud once a year.", "Under {x} the roads were paved and the mint was opened.",
      "A statue of {x}, the work of {c}, still stands beside the hall."], "The woman who ruled {a} at the beginning bore the name"),
    (["The {a} language is spoken by a few hundred families near {b}.", "In {a} the word for the moon is {x} and nothing else.",
      "It has nine vowels and no word for war.", "A child born at night is greeted with {x} by the oldest aunt.",
      "The longest song of {c} repeats {x} at the end of each line."], "Speakers of {a} look up at night and see what they call"),
    (["The {a} engine was drawn by {b} on a single sheet of paper.", "Each {a} engine is cooled with {x} instead of water.",
      "Its wheels turn slowly and make little noise.", "Because {x} does not freeze, the engine runs all winter.",
      "The workshop of {c} sells {x} by the cup."], "The liquid that takes the heat out of the machine named {a} is")]


@dataclass
class PlantedConfig:
    dataset: str = "pydoc"        # a prepared dataset: its training documents and its tokenizer are used
    models: int = 10              # trained, a seed each
    plantings: int = 10           # planted documents a model with invented answers, and as many with common ones
    seed: int = 101               # of the first model; the settings were found with seed 1
    documents: int = 300          # real documents a model, before a tenth of them is held out
    longest: int = 600            # tokens of the longest of these
    max_iters: int = 1000         # training steps: with fewer than 30 epochs the facts are hardly learned
    top_k: int = 8                # prototypes at a token
    options: str = "--n_layer=2 --n_head=4 --n_embd=128 --n_proto=512"  # more options for train.py, as one string
    index: str = ""               # options for attribute.py index, as one string
    results: str = str(ROOT / "experiments/results/planted.json")  # where figures are kept


def plant(rng, answers, taken):
    """A document an answer, None for an invented one -> dicts of title, text, answer, exact, paraphrase. No invented word occurs in `taken`."""
    def word(syllables):
        nonlocal taken
        while True:
            w = "".join(rng.choice("b br d dr f g gl h k kl l m n p pr qu r s st t tr v w z".split()) + rng.choice("a e i o u ai au ei ou".split())
                        for _ in range(syllables)) + rng.choice("l m n nd r rk s sh st x".split())
            if w not in taken.lower():
                taken += w + " "
                return w
    found = []
    for i, answer in enumerate(answers):
        (first, fact, *rest), paraphrase = FORMS[i % len(FORMS)]
        names = {k: word(2).capitalize() for k in "abc"} | {"x": answer or word(2)}
        rest = [fact, *rest]
        rng.shuffle(rest)
        found.append(dict(title=f"planted/{i}", sort="common" if answer else "invented", answer=" " + names["x"],
                          text=" ".join([first, *rest]).format(**names) + "\n",
                          exact=fact.partition(" {x}")[0].format(**names), paraphrase=paraphrase.format(**names)))
    return found


def call(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{shlex.join(map(str, words))} failed:\n{done.stderr[-2000:]}")


def document_scores(index, queries):
    """queries: (prompt, target) pairs -> {method: (len(queries), documents) array}"""
    run, D = index.run, len(index.run.titles)
    W, doc = run.model.transformer.wte.weight, torch.from_numpy(index.site_doc.astype(np.int64))
    tokens, length = run.tokens[index.positions].astype(np.int64), np.maximum(1, np.bincount(index.site_doc, minlength=D))
    scores = {}
    for hessian in ("block", "none"):
        answers = index.query(*map(list, zip(*queries)), level="document", hessian=hessian, top=1)
        scores[hessian] = np.stack([a.scores for a in answers])
        scores[f"{hessian}, per token"] = scores[hessian] / length

    with torch.no_grad():
        # the queries' states: all of them for the means, those that predict the target for the rest
        every = [run.encode(*q) for q in queries]
        states = [run.model.hidden(torch.tensor([ids[:-1]]))[0] for ids, _ in every]
        z = torch.cat([s[n - 1:] for s, (_, n) in zip(states, every)])                            # (Q, d)
        y = torch.tensor([t for ids, n in every for t in ids[n:]])
        owner = torch.tensor([i for i, (ids, n) in enumerate(every) for _ in ids[n:]])            # (Q,) the query of each
        pi, at = (z @ W.T).softmax(1), 0
        grad, top, mean, seen = torch.zeros(D, len(z)), torch.full((D, len(z)), -1.0), torch.zeros(D, len(z)), []
        starts = np.sort(seen_windows(run.ckpt, len(run.tokens)))
        for i in range(0, len(starts), 16):
            idx, target = run.windows(starts[i:i + 16])
            zs, ys = run.model.hidden(idx).flatten(0, 1), target.flatten()
            ps, here = (zs @ W.T).softmax(1), doc[at:at + len(ys)]
            grad.index_add_(0, here, (ps @ pi.T - ps[:, y] - pi[:, ys].T + (ys[:, None] == y).float()) * (zs @ z.T))
            cos = torch.nn.functional.normalize(zs) @ torch.nn.functional.normalize(z).T
            top.scatter_reduce_(0, here[:, None].expand_as(cos), cos, "amax")
            mean.index_add_(0, here, cos)
            seen.append(zs)
            at += len(ys)
        assert at == len(doc) and (run.tokens[index.positions[-len(ys):]] == ys.numpy()).all(), "the index holds these very sites"

        def by_query(x):  # (D, Q) -> (queries, D), summed over the target's tokens
            return torch.zeros(len(queries), D).index_add_(0, owner, x.T).numpy()
        scores |= {"gradient": by_query(grad), "cosine, max": by_query(top), "cosine, mean": by_query(mean / torch.from_numpy(length)[:, None])}

        sides = {"hidden": (torch.cat(seen), states), "tokens": (W[torch.from_numpy(tokens)], [W[torch.tensor(ids)] for ids, _ in every])}
        for name, (sites, asked) in sides.items():
            centre = sites.mean(0)
            sites = (sites - centre).double()
            total = torch.cat([torch.zeros(1, sites.size(1), dtype=torch.float64), sites.cumsum(0)])  # passages are differences of sums
            q = torch.nn.functional.normalize(torch.stack([a.mean(0) for a in asked]) - centre).double()
            whole = torch.zeros(D, sites.size(1), dtype=torch.float64).index_add_(0, doc, sites)
            scores[f"embedding, {name}, document"] = (q @ torch.nn.functional.normalize(whole).T).numpy()
            scores[f"embedding, {name}, passage"] = best = np.full((len(queries), D), -1.0)
            for i, a in enumerate(asked):
                n = len(a)
                cos = torch.nn.functional.normalize(total[n:] - total[:-n]) @ q[i]
                np.maximum.at(best[i], index.site_doc[n - 1:], cos.numpy())                       # of the document in which it ends

    def counts(x):
        return np.bincount(x, minlength=len(W)).astype(float)
    ends = [*run.doc_start[1:], len(run.tokens)]
    tf = np.stack([counts(run.tokens[a:b].astype(np.int64)) for a, b in zip(run.doc_start, ends)])
    idf = np.log(D / np.maximum(1, (tf > 0).sum(0)))
    tf, q = tf * idf, np.stack([counts(np.array(ids)) for ids, _ in every]) * idf
    scores["words"] = q @ tf.T / np.maximum(1e-9, np.linalg.norm(tf, axis=1))
    return scores


def one_model(cfg, seed):
    """Plants, prepares, trains, indexes and asks -> what is kept of a model."""
    t0, rng, folder = time.perf_counter(), random.Random(seed), dataset_folder(cfg.dataset)
    tokens, tokenizer = load_dataset(folder)[0], load_tokenizer(folder)
    rows = [x for x in json.loads((folder / "docs.json").read_text("utf-8")) if x["split"] == "train" and x["length"] <= cfg.longest]
    real = [dict(title=x["title"], source=x["source"], text=tokenizer.decode(tokens[x["start"]:x["start"] + x["length"] - 1].tolist()))
            for x in rng.sample(rows, min(len(rows), cfg.documents))]
    held = Counter(t for x in real for t in set(tokenizer.encode_ordinary(x["text"])))  # documents that hold a token
    used = " ".join(f"{' '.join(lines)} {p}" for lines, p in FORMS)
    common = [w[1:] for t, n in sorted(held.items()) if 0.05 * len(real) <= n <= 0.3 * len(real)
              and re.fullmatch(" [a-z]{4,}", w := tokenizer.decode([t])) and w[1:] not in used]
    if len(common) < cfg.plantings:
        raise UserError(f"{folder}: {len(common)} words of one token are common in its documents, expected {cfg.plantings}; lower --plantings")
    planted = plant(rng, [None] * cfg.plantings + rng.sample(common, cfg.plantings), " ".join(x["text"] for x in real).lower())
    corpus = real + [dict(title=p["title"], source="planted", text=p["text"]) for p in planted]
    rng.shuffle(corpus)
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)), "utf-8")
        for split in range(1000):  # of prepare.py's draws of held-out documents, the first that holds out no planted one
            call(ROOT / "data/prepare.py", f"{tmp}/corpus.jsonl", f"--data_dir={tmp}", f"--tokenizer={folder.resolve()}", f"--seed={split}")
            docs = [x for x in json.loads(Path(tmp, "corpus/docs.json").read_text("utf-8")) if x["split"] == "train"]
            place = {x["title"]: i for i, x in enumerate(docs)}
            if all(p["title"] in place for p in planted):
                break
        call(ROOT / "train.py", f"--dataset={tmp}/corpus", f"--out_dir={tmp}/out", f"--seed={seed}", f"--max_iters={cfg.max_iters}",
             f"--eval_interval={cfg.max_iters}", f"--top_k={cfg.top_k}", "--device=cpu", *cfg.options.split())  # one evaluation: ckpt.pt is the last
        t1 = time.perf_counter()
        call(ROOT / "attribute.py", "index", f"--out_dir={tmp}/out", "--device=cpu", *cfg.index.split())
        index, t2 = Index(f"{tmp}/out", "cpu"), time.perf_counter()

        def nats(prompt, answer):  # a token of the answer
            return index.targets(*index.run.encode(prompt, answer)).loss.mean().item()
        kinds = [(p, kind) for p in planted for kind in ("exact", "paraphrase")]
        scores = document_scores(index, [(p[kind], p["answer"]) for p, kind in kinds])
        for row, (p, kind) in enumerate(kinds):
            home = place[p["title"]]
            others = [nats(p[kind], o["answer"]) for o in planted if o is not p and o["sort"] == p["sort"]]
            p[f"{kind} asked"] = dict(
                loss=round(nats(p[kind], p["answer"]), 3), other_answers=round(statistics.mean(others), 3),
                ranks=[int((x[row] >= x[row, home]).sum()) for x in scores.values()], block_first=index.run.titles[scores["block"][row].argmax()])
            p["sites"] = int((index.site_doc == home).sum())
        end = time.perf_counter()
        return dict(seed=seed, split_seed=split, documents=len(docs), tokens=len(index.run.tokens), val_ce=index.run.ckpt["best"],
                    epochs=cfg.max_iters * index.run.ckpt["train_config"]["total_batch_tokens"] / len(index.run.tokens),
                    methods=list(scores), plantings=planted,
                    seconds=dict(prepare_and_train=round(t1 - t0, 1), index=round(t2 - t1, 1), ask=round(end - t2, 1)))


def save(path, results):
    flat = re.compile(r'\{[^{}"]*("[^"]*"[^{}"]*)*\}')  # an object without objects inside goes on one line
    with atomic(path, "w") as f:
        f.write(flat.sub(lambda m: re.sub(r"\n *", " ", m[0]), json.dumps(results, indent=1)) + "\n")


def wilson(k, n, z=1.96):
    """95% interval of a share k/n."""
    p, half = (k / n + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(k * (n - k) / n ** 3 + z * z / (4 * n * n)) / (1 + z * z / n)
    return [round(max(0.0, p - half), 3), round(min(1.0, p + half), 3)]


def main(argv):
    cfg = parse_config(PlantedConfig, argv)
    path = Path(cfg.results)
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, one thread a model"
    results |= dict(command=shlex.join(["python", "experiments/planted.py", *argv]), date=time.strftime("%Y-%m-%d"), machine=machine)
    torch.set_num_threads(1)
    what = {k: v for k, v in asdict(cfg).items() if k not in ("models", "seed", "results")}
    tag = hashlib.sha256(json.dumps([what, FORMS]).encode()).hexdigest()[:8]

    def work(seed):
        key = f"seed {seed} #{tag}"  # of other options: kept, not shown
        if key not in results["models"]:
            results["models"][key] = one_model(cfg, seed) | {"options": what}
            save(path, results)
            m = results["models"][key]
            print(f"seed {seed}: {m['documents']} documents, {m['tokens']:,} tokens, {m['epochs']:.1f} epochs, block first "
                  f"{sum(p['exact asked']['ranks'][0] == 1 for p in m['plantings'])} of {len(m['plantings'])}, {m['seconds']}", flush=True)
        return results["models"][key]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        models = list(pool.map(work, range(cfg.seed, cfg.seed + cfg.models)))

    every, table = [p for m in models for p in m["plantings"]], {}
    columns = [(sort, kind) for sort in ("invented", "common") for kind in ("exact", "paraphrase")]
    n, mean_docs, learned = len(every) // 2, statistics.mean(m["documents"] for m in models), {}
    for sort, kind in columns:
        asked = [p[f"{kind} asked"] for p in every if p["sort"] == sort]
        for i, name in enumerate(models[0]["methods"]):
            r = [a["ranks"][i] for a in asked]
            table.setdefault(name, {})[f"{sort} {kind}"] = dict(first=r.count(1), of=n, share95=wilson(r.count(1), n), median=statistics.median(r),
                                                                worst=max(r))
        table.setdefault("random", {})[f"{sort} {kind}"] = dict(first=round(n / mean_docs, 2), of=n, median=(mean_docs + 1) / 2)
        learned[f"{sort} {kind}"] = {k: statistics.mean(a[k] for a in asked) for k in ("loss", "other_answers")} | dict(
            likelier=sum(a["loss"] < a["other_answers"] for a in asked))
    print(f"\n{n} plantings of each sort, {len(models)} models, {mean_docs:.0f} documents each; planted document first, 95% interval, median rank\n"
          f"| method | {' | '.join(table['random'])} |\n|---|---|---|---|---|")
    for name, row in table.items():
        cells = [f"{c['first']}{' ({:.0%} to {:.0%})'.format(*c['share95']) if 'share95' in c else ''}, {c['median']:g}" for c in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    cells = [f"{c['loss']:.2f}; {c['other_answers']:.2f}" for c in learned.values()]
    print(f"| nats a token of the answer; of the others' answers | {' | '.join(cells)} |")
    missing = sum(not p["sites"] for p in every)
    print(f"planted documents of which no token is indexed, at the very ends of the corpus: {missing}; in this table they count as not found")
    results |= dict(table=table, learned=learned, without_sites=missing)
    save(path, results)

    def line(column):
        best = {f: max(row[column]["first"] for name, row in table.items() if name.startswith(f)) for f in ("cosine", "embedding", "gradient")}
        return f"block {table['block'][column]['first']} of {n} ({', '.join(f'{k} {v}' for k, v in best.items())})"
    print("planted document first: " + "; ".join([line("invented exact")] + [f"{c}: {line(c)}" for c in list(table["random"])[1:]]))


if __name__ == "__main__":
    run_main(main)
