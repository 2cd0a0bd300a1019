"""A5: which documents does a model's loss on held-out windows rest on? This is the baseline."""
import numpy as np
import torch

from attribute import Index, build_index


def score(run, queries):
    """run: common.Run of a model of all text; queries (Q,): first tokens of windows of run.val

    -> scores (Q, D): how much each document lowers the summed loss of each window's T tokens."""
    build_index(run)
    index = Index(run.out_dir, "cpu")
    scores = []
    for start in queries:
        window = torch.from_numpy(run.val[start:start + run.T + 1].astype(np.int64))
        records = index.target_records(window.tolist(), 1)
        x = index.solve(index.right_side(records)[None])
        scores.append(index.sums(index.token_scores(x)[0], "document"))
    return np.stack(scores)
