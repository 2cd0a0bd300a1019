"""Is the only source of a fact found? Documents with invented facts are planted in real text.

    python experiments/attribution/planted.py               10 models, 20 plantings each: an hour

A planted document is five sentences on invented places and things. One states a fact, whose answer
is an invented word or, the harder test, one token that 5 to 30% of the real documents hold. The
prompt is exact, the beginning of that sentence, or a paraphrase. All documents are ranked by

    block, none  attribute.py's document score, with and without the exact blocks
    cosine       of the hidden states that predict the target with a document's nearest ones
    words        tf-idf over tokens: a search for rare strings, and the names are rare strings
    bm25         Okapi BM25 over tokens
"""
import itertools
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rivals import bm25_scores, head_scores, owners, windows  # noqa: E402
from tools import read_results, save_results, trained, write_dataset  # noqa: E402

from attribute import Index, build_index  # noqa: E402
from common import Run, dataset_folder, load_dataset, load_documents  # noqa: E402
from common import load_tokenizer, parse_config, run_main  # noqa: E402

TRAIN = "--n_layer=2 --n_head=4 --n_embd=128 --n_proto=512 --top_k=8 --eval_interval=1000"
FORMS = (  # the first sentence, the fact up to {x}, three more | the paraphrase
    "The lighthouse of {a} stands on the northern rocks of {b}. The keeper at {a} burns {x} oil in "
    "the lamp. It was raised by {c} after the great storm and painted white. Boats bring the {x} "
    "in barrels each spring. Sailors say that a flame of {x} is greener than any other."
    "|To keep the light of its tower going, {a} uses",
    "In the valley of {a} people eat late. On the last evening the cooks of {a} serve {x} to every "
    "guest. The feast of {b} begins when the first snow falls and lasts four days. The dish called "
    "{x} is made of barley, salt and smoked milk. Children of {c} wait all year for their bowl of "
    "{x}.|What visitors to {a} are given to eat is",
    "{a} was a small kingdom between two rivers. The first queen of {a} was called {x} by her "
    "people. Its laws were kept in the hall of {b} and read aloud once a year. Under {x} the roads "
    "were paved and the mint was opened. A statue of {x}, the work of {c}, still stands beside the "
    "hall.|The woman who ruled {a} at the beginning bore the name")


@dataclass
class PlantedConfig:
    dataset: str = "pydoc"     # a prepared dataset: its documents and its tokenizer are used
    models: int = 10           # trained, a seed each
    plantings: int = 10        # planted documents per model and sort of answer
    documents: int = 270       # real documents per model, of at most 600 tokens
    train: str = TRAIN         # options of train.py: one evaluation, so that ckpt.pt is the last
    work: str = "out-planted"  # datasets and models
    out: str = "experiments/results/planted.json"  # the result


def invent(rng, text):
    """Yields words of three syllables that are not in the text, each once."""
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in text:
            text += " " + word
            yield word


def plant(rng, common, n, text):
    """n documents with invented answers, n with answers out of `common` -> list of dicts."""
    planted, words = [], invent(rng, text)
    for i, answer in enumerate([None] * n + rng.sample(common, min(n, len(common)))):
        names = {letter: next(words).capitalize() for letter in "abc"}
        answer = answer or " " + next(words)
        form = FORMS[i % len(FORMS)].format(**names, x=answer[1:])
        sentences, _, paraphrase = form.partition("|")
        first, fact, *rest = re.split(r"(?<=\.) ", sentences)
        planted.append(dict(
            title=f"planted/{i}", sort="invented" if i < n else "common", answer=answer,
            text=" ".join([first, *rng.sample([fact, *rest], 4)]),
            exact=fact.partition(answer)[0], paraphrase=paraphrase))
    return planted


def document_scores(index, queries):
    """queries: lists of token ids, prompt and target -> {method: scores (Q, D)}."""
    run, starts = index.run, index.positions[::index.run.T] - 1
    V, D = len(run.model.W), len(run.titles)
    r = [index.target_records(prompt + target, len(prompt)) for prompt, target in queries]
    owner = owners(run, starts)
    b = torch.stack([index.right_side(part) for part in r])
    scores = {"block": head_scores(index, index.solve(b)), "none": head_scores(index, b)}
    states = [run.model.hidden(part) for part in windows(run, run.train, starts)[0].split(64)]
    z = F.normalize(torch.cat(states).flatten(0, 1), dim=1)                     # (N, d)
    scores["cosine"] = np.zeros((len(queries), D))
    for row, (prompt, target) in zip(scores["cosine"], queries):
        mine = run.model.hidden(torch.tensor([prompt + target[:-1]]))[0, -len(target):]
        mine = F.normalize(mine, dim=1)
        nearest = np.full((D, len(target)), -1.0)
        np.maximum.at(nearest, owner, (z @ mine.T).numpy())
        row += nearest.sum(1)
    texts = np.split(run.train, run.doc_start[1:])
    tf = np.stack([np.bincount(text, minlength=V) for text in texts])
    idf = np.log(D / np.maximum(1, (tf > 0).sum(0)))
    asked = [np.array(prompt + target) for prompt, target in queries]
    mine = np.stack([np.bincount(tokens, minlength=V) for tokens in asked])
    scores["words"] = (mine * idf) @ (tf * idf).T / np.linalg.norm(tf * idf, axis=1)
    scores["bm25"] = bm25_scores(texts, asked)
    return scores


def one_model(cfg, seed):
    """Plants, trains, indexes and asks -> the planted documents (dicts) with their ranks."""
    rng, source = random.Random(seed), dataset_folder(cfg.dataset)
    train, _, _ = load_dataset(source)
    start, titles, sources = load_documents(source, "train", len(train))
    rows = zip(titles, sources, np.split(train, start[1:]))
    short = [row for row in rows if len(row[2]) <= 600]
    documents = rng.sample(short, min(cfg.documents, len(short)))
    tokenizer = load_tokenizer(source)
    texts = [tokenizer.decode(tokens.tolist()) for _, _, tokens in documents]
    held = Counter(word for text in texts for word in set(re.findall(" [a-z]{4,}", text)))
    common = []
    for word, n in sorted(held.items()):
        tokens = tokenizer.encode(word)
        if 0.05 < n / len(texts) < 0.3 and len(tokens) == 1 and word not in str(FORMS):
            common.append(word)
    planted = plant(rng, common, cfg.plantings, "".join(texts).lower())
    for p in planted:
        tokens = tokenizer.encode_ordinary(p["text"]) + [tokenizer.eot_token]
        documents.append((p["title"], "planted", np.array(tokens, train.dtype)))
    rng.shuffle(documents)
    folder = Path(cfg.work, str(seed))
    write_dataset(folder / "data", source, documents)
    options = [f"--dataset={folder / 'data'}", f"--seed={seed}", *cfg.train.split()]
    run = Run(trained(folder / "run", *options), "cpu")
    build_index(run)
    asked = list(itertools.product(planted, ("exact", "paraphrase")))
    queries = [tokenizer.encode_batch([p[kind], p["answer"]]) for p, kind in asked]
    scores = document_scores(Index(run.out_dir, "cpu"), queries)
    for q, (p, kind) in enumerate(asked):
        home = run.titles.index(p["title"])
        p[f"{kind} ranks"] = {name: int((x[q] >= x[q, home]).sum()) for name, x in scores.items()}
    return planted


def table(planted):
    """-> {method: {sort and kind: how often the planted document ranks first}}."""
    rows = {}
    for method in planted[0]["exact ranks"]:
        rows[method] = {}
        for sort, kind in itertools.product(("invented", "common"), ("exact", "paraphrase")):
            ranks = [p[f"{kind} ranks"][method] for p in planted if p["sort"] == sort]
            rows[method][f"{sort} {kind}"] = dict(first=ranks.count(1), of=len(ranks))
    return rows


def main(argv):
    cfg = parse_config(PlantedConfig, argv)
    result = read_results(cfg.out)
    if result.get("options") != asdict(cfg):
        result = {"options": asdict(cfg), "models": {}}
    models = result["models"]
    for seed in range(101, 101 + cfg.models):
        models[str(seed)] = models.get(str(seed)) or one_model(cfg, seed)
        result["table"] = table([p for planted in models.values() for p in planted])
        save_results(cfg.out, result)
        print(f"{len(models)} models: {result['table']['block']}", flush=True)


if __name__ == "__main__":
    run_main(main)
