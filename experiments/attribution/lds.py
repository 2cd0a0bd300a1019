"""Does influence predict real retraining? The linear datamodeling score (LDS), and removal.

    pip install -r experiments/requirements.txt                      kronfluence, for EK-FAC
    python data/prepare.py pydoc --name=pydoc512 --vocab_size=512
    python experiments/attribution/lds.py                            80 small trainings: an hour

Models are trained on random halves of the documents. A query q is the loss of a held-out window;
s_qd is a method's score of document d for it, by one model of everything.

    r_q = Spearman correlation over halves h of L_hq and -sum_(d in h) s_qd     LDS = mean_q r_q

(Park et al. 2023, arXiv 2303.14186). `both` is the half-width of a 95% interval that joins a
bootstrap over queries with a jackknife over halves; all methods are compared with the first one.

    ceiling     sqrt(r), r the correlation of the losses of halves that are trained twice
    linear      sqrt((r + c) / 2), no linear score can do better: c is the correlation of L_h with
                minus that of the other half, and (r + c) / 2 the share of the losses' variance
                that changes sign between the two, as all of a linear loss does
    by source   a document gets its source's score times its share of the source's tokens
    removal     how much a loss rises without its best documents, 5% of all tokens
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
from rivals import ask, check_methods, head_scores, right_sides, windows  # noqa: E402
from tools import interval, number_list, save_results, spearman, trained  # noqa: E402
from tools import trained_on  # noqa: E402

from attribute import MU_SHARE, Index, build_index, conjugate_gradients  # noqa: E402
from attribute import curvature_product, records  # noqa: E402
from common import Run, UserError, dataset_folder, load_checkpoint  # noqa: E402
from common import parse_config, run_main  # noqa: E402

TRAIN = ("--n_layer=2 --n_head=2 --n_embd=64 --n_proto=512 --top_k=8 --head_share=1 "
         "--max_iters=500 --device=cpu")


@dataclass
class LDSConfig:
    dataset: str = "pydoc512"            # under data/
    models: int = 32                     # trained on random halves
    repeats: int = 12                    # of them, trained a second time with another seed
    complements: int = 8                 # of them, whose other half is trained too
    queries: int = 128                   # held-out windows
    methods: str = "block,output,ekfac,ekfac-undamped,trak,gradient,cosine,bm25,random"  # compared
    removals: int = 8                    # queries whose best documents are really removed
    removed: str = "block,cosine,random"  # methods that choose them
    share: float = 0.05                  # of the training tokens, removed
    mus: str = "0.001,0.01,0.1,1"        # dampings, in mean eigenvalues of the median block
    full: int = 192                      # windows of the joint Hessian; 0: left out
    train: str = TRAIN                   # options of train.py
    seed: int = 1                        # of halves, queries and models
    work: str = "out-lds"                # models and scores
    out: str = "experiments/results/lds.json"  # the result


def losses_without(cfg, run, queries, keep, seed):
    """Trains a model on the documents `keep` -> mean loss of each query (Q,), nats per token."""
    out_dir = trained_on(run, keep, cfg.work, seed, cfg.train.split())
    return query_losses(run, queries, out_dir)


def query_losses(run, queries, out_dir, last=0):
    model, _ = load_checkpoint(out_dir)
    loss = records(model, *windows(run, run.val, queries)).loss
    return loss.double().view(-1, run.T)[:, -last:].mean(1).numpy()


# ------------------------------------------- the score and its interval

def lds(scores, kept, losses):
    """scores (Q, D), kept (H, D), losses (H, Q) -> r (Q,), Spearman over the halves."""
    return spearman(-(kept.astype(float) @ scores.T), losses)


def correlations(scores, kept, losses):
    """-> r (Q,) over all halves, and r (H, Q) without each half in turn."""
    h = np.arange(len(kept))
    without = [lds(scores, kept[h != j], losses[h != j]) for j in h]
    return lds(scores, kept, losses), np.stack(without)


def mean_interval(r, without):
    """-> the mean of r (Q,), the half-width of its 95% interval over queries, and of that over
    queries and halves; jackknife variance: (H - 1) / H sum_j (mean without j - their mean)^2."""
    mean, low, high = interval(r, np.ones(len(r)), draws=2000)
    half = (high - low) / 2
    error = np.sqrt((len(without) - 1) * without.mean(1).var())
    return mean, half, np.hypot(half, 1.96 * error)


def reliability(losses, others):
    """Losses (H, Q) of the same halves twice -> the mean correlation over queries."""
    r = spearman(losses, others)
    mean, low, high = interval(r, np.ones(len(r)), draws=2000)
    return dict(mean=mean, half_width=(high - low) / 2)


def compared(mine, first):
    """correlations() of a method and of the first one -> its figures."""
    mean, half, both = mean_interval(*mine)
    minus, minus_half, minus_both = mean_interval(first[0] - mine[0], first[1] - mine[1])
    return dict(
        mean=mean,
        half_width=half,
        both=both,
        first_minus_this=[minus, minus_half],
        first_minus_this_both=minus_both)


def by_source(scores, source, tokens):
    """scores (Q, D), source (D,) numbers, tokens (D,) -> (Q, D): a source's sum, shared out."""
    sums = np.stack([np.bincount(source, row) for row in scores])
    return sums[:, source] * (tokens / np.bincount(source, tokens)[source])


def joint_solution(index, b, n):
    """The joint Hessian, summed over n windows -> H^-1 b (Q, M, d), residual, steps."""
    run = index.run
    starts = np.random.default_rng(1).permutation(index.positions[::run.T] - 1)
    drawn = starts[:n]
    r = records(run.model, *windows(run, run.train, drawn))

    def product(v):
        joint = curvature_product(run.model.W, r, v)
        return len(starts) / len(drawn) * joint + index.meta["mu"] * v
    return conjugate_gradients(product, b, index.solve_blocks, tol=0.01)


def variants(cfg, run, queries, result):
    """Yields a name and scores (Q, D): without a Hessian, with the joint one, with another mu."""
    build_index(run)
    index = Index(run.out_dir, "cpu")
    b = right_sides(index, *windows(run, run.val, queries))
    yield "no Hessian", head_scores(index, b)
    if cfg.full:
        x, residual, steps = joint_solution(index, b, cfg.full)
        result["full"] = dict(windows=cfg.full, residual=residual, iterations=steps)
        yield "full", head_scores(index, x)
    for share in number_list("mus", cfg.mus, float):
        build_index(run, mu=index.meta["mu"] * share / MU_SHARE)
        damped = Index(run.out_dir, "cpu")
        yield f"block, share {share:g}", head_scores(damped, damped.solve(b))


def best_documents(scores, tokens, share):
    """Scores (D,), sizes (D,) -> the best documents, until they are `share` of all tokens."""
    best = np.argsort(-scores)
    n = np.searchsorted(tokens[best].cumsum(), share * tokens.sum()) + 1
    return best[:n]


def removal(cfg, run, queries, scores, tokens):
    """How much the loss of a query rises where its best documents are left out of a training."""
    chosen = queries[:cfg.removals]
    added = []
    base = query_losses(run, chosen, run.out_dir)
    for q in range(len(chosen)):
        keep = np.ones(len(tokens), bool)
        keep[best_documents(scores[q], tokens, cfg.share)] = False
        rise = losses_without(cfg, run, chosen, keep, cfg.seed) - base
        added.append(float(rise[q]))
    return added


def main(argv):
    cfg = parse_config(LDSConfig, argv)
    methods = cfg.methods.split(",")
    removed = cfg.removed.split(",")
    named = {*methods, *removed} - {"random"}
    check_methods(named)
    if cfg.models < 3:
        raise UserError(f"models is {cfg.models}, expected at least 3")
    work = Path(cfg.work)
    options = [f"--dataset={dataset_folder(cfg.dataset)}", f"--seed={cfg.seed}"]
    run = Run(trained(work / "all", *options, *cfg.train.split()), "cpu")
    rng = np.random.default_rng(cfg.seed)
    tokens = np.diff([*run.doc_start, len(run.train)])
    D = len(tokens)
    kept = np.stack([rng.permutation(D) < D // 2 for _ in range(cfg.models)])
    queries = run.T * rng.permutation((len(run.val) - 1) // run.T)[:cfg.queries]
    result = dict(options=asdict(cfg), documents=D, queries=len(queries))

    # -- real losses
    losses, twice, opposite = [], [], []
    for j, row in enumerate(kept):
        losses.append(losses_without(cfg, run, queries, row, cfg.seed + 1 + j))
        if j < cfg.repeats:
            twice.append(losses_without(cfg, run, queries, row, cfg.seed + 1001 + j))
        if j < cfg.complements:
            opposite.append(losses_without(cfg, run, queries, ~row, cfg.seed + 2001 + j))
        print(f"half {j + 1} of {cfg.models}: loss {losses[j].mean():.4f}", flush=True)
    losses = np.stack(losses)
    if cfg.repeats > 2:
        result["seeds"] = reliability(losses[:len(twice)], np.stack(twice))
        r = result["seeds"]["mean"]
        result["ceiling"] = np.sqrt(max(0, r))
        if cfg.complements > 2:
            result["complements"] = reliability(losses[:len(opposite)], -np.stack(opposite))
            c = result["complements"]["mean"]
            result["linear_ceiling"] = np.sqrt(max(0, (r + c) / 2))

    # -- scores
    method_scores = {"random": rng.standard_normal((len(queries), D))}
    for method in named:
        method_scores[method], _ = ask(run.out_dir, run, method, queries, work / "scores")
    rows = {}
    for method in methods:
        rows[method] = method_scores[method]
        rows[f"{method}, by source"] = by_source(rows[method], run.doc_source, tokens)
    if {"block", "output"} <= rows.keys():
        rows["block + output"] = rows["block"] + rows["output"]
    rows |= variants(cfg, run, queries, result)
    first = correlations(rows[methods[0]], kept, losses)
    result["lds"] = {}
    for name, scores in rows.items():
        x = compared(correlations(scores, kept, losses), first)
        if result.get("ceiling"):
            x["of_ceiling"] = x["mean"] / result["ceiling"]
        result["lds"][name] = x
        print(f"{name:>24}: LDS {x['mean']:.3f} +- {x['both']:.3f}", flush=True)

    # -- removal
    if cfg.removals:
        added = {m: removal(cfg, run, queries, method_scores[m], tokens) for m in removed}
        result["removal"] = dict(queries=queries[:cfg.removals].tolist(), added=added)
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
