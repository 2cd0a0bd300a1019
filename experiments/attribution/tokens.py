"""What is a token worth? The best 1% of the training tokens are masked, and the model trains anew.

    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python experiments/attribution/tokens.py                 200 small trainings: an hour

A query is the loss of the last tokens of a held-out window. A method chooses positions S_q for it.
The training tokens there stay as context, but lose their own loss terms; the start, the windows and
their order do not change. Scores are by the model that is trained anew.

    rise_q = L_q(trained without the terms S_q) - L_q(trained with all), nats per token
    random       1% of the tokens that the model was trained to predict, one of four such draws
    block        1% by the token scores of attribute.py
    ekfac        1% by kronfluence's token scores: there a token also counts as context
    cosine       1% predicted from the states nearest to one of the query's
    cosine-same  1% likewise, of those that equal the query's token at that state
    bm25         1% as whole windows, by BM25 for the query's window
    documents    5% as whole documents, by sums of block's scores

others: the mean rise of the other queries; ratio: block's rise by that of documents.
"""
import contextlib
import hashlib
import io
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lds import TRAIN, best_documents, query_losses  # noqa: E402
from rivals import ask, bm25_scores, check_methods, right_sides, windows  # noqa: E402
from tools import interval, save_results, trained  # noqa: E402

import train  # noqa: E402
from attribute import Index, build_index  # noqa: E402
from common import Run, atomic, dataset_folder, parse_config, run_main  # noqa: E402

LAST = 16  # tokens of a query


@dataclass
class TokensConfig:
    dataset: str = "pydoc512"     # under data/
    queries: int = 16             # held-out windows
    seeds: int = 2                # models
    share: float = 0.01           # of the tokens, masked; five times as much by documents
    train: str = f"{TRAIN} --max_iters=350 --eval_interval=1000 --eval_tokens=2048"
    work: str = "out-tokens"      # models, scores and the losses after each training
    out: str = "experiments/results/tokens.json"  # the result


class MaskedWindows(train.Windows):
    """The trainer's windows; targets at the positions `masked` of train.bin are -1: no loss."""
    masked = np.empty(0, np.int64)

    def read(self, starts):
        idx, targets = super().read(starts)
        if self.path.name == "train.bin":
            positions = np.array(starts)[:, None] + 1 + np.arange(self.T)
            targets[torch.from_numpy(np.isin(positions, self.masked))] = -1
        return idx, targets


def losses_without(cfg, run, queries, options, masked):
    """-> losses of all queries (Q,) after a training without `masked`; kept in the folder work."""
    job = np.concatenate([queries, masked])
    key = hashlib.sha256(f"{options}".encode() + job.tobytes())
    path = Path(cfg.work) / f"losses/{key.hexdigest()}.npy"
    if not path.exists():
        MaskedWindows.masked = masked
        with tempfile.TemporaryDirectory() as out_dir:
            quiet = contextlib.redirect_stdout(io.StringIO())
            with quiet, mock.patch.object(train, "Windows", MaskedWindows):
                train.main([f"--out_dir={out_dir}", *options])
            losses = query_losses(run, queries, out_dir, LAST)
        with atomic(path) as f:
            np.save(f, losses)
    return np.load(path)


def cosine(run, starts, query, same):
    """Cosine of each training token's state with the nearest of a query's states -> Q times (N,)"""
    idx, targets = windows(run, run.train, starts)
    z = F.normalize(run.model.hidden(idx).flatten(0, 1), dim=1)                 # (N, d)
    for states, y in zip(run.model.hidden(query[0]), query[1]):
        s = z @ F.normalize(states[-LAST:], dim=1).T                            # (N, LAST)
        if same:
            s[targets.flatten()[:, None] != y[-LAST:]] = -1
        yield s.max(1).values.numpy()


def choices(cfg, run, queries, rng):
    """Yields a method and, for each query, a set of positions in train.bin."""
    build_index(run)
    index, query = Index(run.out_dir, "cpu"), windows(run, run.val, queries)
    starts = index.positions[::run.T] - 1
    b = right_sides(index, *query, LAST)
    block = index.token_scores(index.solve(b))
    draws = rng.random((4, len(index.positions)))
    scores = {"random": np.resize(draws, block.shape), "block": block}
    scores["ekfac"], _ = ask(
        run.out_dir, run, "ekfac-tokens", queries, run.out_dir / "scores", LAST)
    scores["cosine"] = cosine(run, starts, query, same=False)
    scores["cosine-same"] = cosine(run, starts, query, same=True)
    span = np.arange(run.T + 1)
    texts = run.train[starts[:, None] + span]
    scores["bm25"] = bm25_scores(texts, run.val[queries[:, None] + span]).repeat(run.T, 1)
    n = round(cfg.share * len(index.positions))
    for method, rows in scores.items():
        yield method, [index.positions[np.argsort(-row, kind="stable")[:n]] for row in rows]
    size = np.bincount(index.doc_of, minlength=len(run.titles))
    sums = [index.sums(row, "document") for row in block]
    best = [best_documents(row, size, 5 * cfg.share) for row in sums]
    yield "documents", [index.positions[np.isin(index.doc_of, chosen)] for chosen in best]


def figures(rises):
    """rises (seeds, masks Q, Q): what each mask adds to each query's loss -> a row of the table."""
    mean = np.mean(rises, 0)
    own = mean.diagonal()
    others = mean[~np.eye(len(mean), dtype=bool)].mean()
    return dict(rise=interval(own, np.ones(len(own))), others=others, queries=own.tolist())


def main(argv):
    cfg = parse_config(TokensConfig, argv)
    check_methods(["ekfac", "bm25"])
    rises = {}
    for seed in range(1, 1 + cfg.seeds):
        options = [f"--dataset={dataset_folder(cfg.dataset)}", f"--seed={seed}", *cfg.train.split()]
        run = Run(trained(Path(cfg.work) / f"base-{seed}", *options), "cpu")
        rng = np.random.default_rng(1)
        queries = run.T * rng.permutation((len(run.val) - 1) // run.T)[:cfg.queries]
        base = query_losses(run, queries, run.out_dir, LAST)
        rows = {}
        for method, sets in choices(cfg, run, queries, rng):
            after = [losses_without(cfg, run, queries, options, masked) for masked in sets]
            rises.setdefault(method, []).append(np.stack(after) - base)
            rows[method] = figures(rises[method])
            print(f"seed {seed}, {method}: {rows[method]['rise']}", flush=True)
        pair = [np.array(rows[method]["queries"]) for method in ("block", "documents")]
        save_results(cfg.out, dict(options=asdict(cfg), methods=rows, ratio=interval(*pair)))


if __name__ == "__main__":
    run_main(main)
