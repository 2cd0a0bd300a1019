"""Is the model of low logit rank, and can it be learned from its logits alone?

    python experiments/neighbours/logit_rank.py     # trains a dense twin, then about 10 minutes

After arXiv 2510.24966 and 2512.09892. L(h, f v): centered logit of v after history h and future f.

    spectrum   sigma_i ~ i^-alpha, the singular values of L over sampled histories and futures
    Lingen     c from L(target, f) = sum_i c_i L(basis_i, f) over known futures f; then
               L(target, y v) = sum_i c_i L(basis_i, y v) for any continuation y
    learning   h = sum_i x_i b_i, as rows of L, in a basis of histories of t tokens; then
               h z = sum_i x_i (b_i z), so x_t = A_{z,t} x_{t-1}, logits B_t x_t
"""
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tools import figure, number_list, options_of, save_results, trained  # noqa: E402

from common import Run, load_checkpoint, parse_config, run_main  # noqa: E402
from prism import PRISM, UserError  # noqa: E402


@dataclass
class RankConfig:
    out_dir: str = "out"             # PRISM's run
    dense: str = "out-dense-1"       # its dense twin
    histories: int = 192             # of the spectrum
    length: int = 48                 # tokens of a history, target or basis prompt
    futures: int = 12                # passages of 8 tokens, whose beginnings are futures
    targets: int = 12                # prompts that Lingen continues
    basis: int = 128                 # prompts that it combines
    steps: int = 15                  # tokens of a continuation
    states: str = "1,2,4,8,16,32"    # of the networks that are learned
    seed: int = 1                    # of each draw
    out: str = "experiments/results/logit_rank.json"  # the result; the picture goes beside it


@torch.no_grad()
def ask(model, idx, last=1):
    """Sequences idx (n, L) -> centered logits (n, last, V) after each of their last tokens."""
    parts = []
    for part in idx.split(64):
        logits = model.logits(model.hidden(part)[:, -last:])
        parts.append(logits - logits.mean(-1, keepdim=True))
    return torch.cat(parts)


def append(histories, future):
    """Sequences (n, L), one future (K,) or one of each (n, K) -> sequences (n, L + K)."""
    return torch.cat([histories, future.expand(len(histories), -1)], 1)


def extended(model, histories, futures):
    """L (n, 1 + m K, V) after no future and the first 1 .. K tokens of each of futures (m, K)."""
    parts = [ask(model, histories)]
    for future in futures:
        parts.append(ask(model, append(histories, future), len(future)))
    return torch.cat(parts, 1)


def kl(true, told):
    """Logits (..., V) -> KL(softmax(true), softmax(told)) in nats (...)."""
    p = true.log_softmax(-1)
    q = told.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# ------------------------------------------- the spectrum

def alpha(gram):
    """Gram matrix (n, n) of histories -> alpha by least squares of logs over 4 <= i <= n / 4."""
    i = np.arange(4, len(gram) // 4 + 1)
    values = np.linalg.eigvalsh(gram)[-i]                                     # sigma_i^2
    slope, _ = np.polyfit(np.log(i), np.log(values), 1)
    return -float(slope) / 2


def jackknife(estimates):
    """Estimates that leave out one group each -> the variance of the estimate of all."""
    return (len(estimates) - 1) * np.var(estimates)


def spectrum(X, passages):
    """X (n, C, V), whose C futures come from `passages` passages in turn -> a dict of figures;
    the 95% interval of alpha is a jackknife over eight groups of histories and over passages."""
    n = len(X)
    grams = []
    for part in X.chunk(passages, dim=1):
        flat = part.flatten(1).double()
        grams.append((flat @ flat.T).numpy())
    gram = sum(grams)
    without_histories = []
    for g in range(8):
        kept = np.flatnonzero(np.arange(n) % 8 != g)
        without_histories.append(alpha(gram[np.ix_(kept, kept)]))
    without_passages = [alpha(gram - G) for G in grams]
    variance = jackknife(without_histories) + jackknife(without_passages)
    error = 2.36 * float(variance) ** 0.5                   # t distribution, 7 degrees of freedom
    found = alpha(gram)
    values = np.linalg.eigvalsh(gram)[::-1].clip(min=0) ** 0.5
    fewer = {}                                            # alpha depends on n
    for m in (n // 4, n // 2):
        if m >= 32:
            fewer[m] = alpha(gram[:m, :m])
    return dict(
        values=values.tolist(),
        alpha=found,
        interval=[found - error, found + error],
        fewer=fewer)


# ------------------------------------------- Lingen

def coefficients(X, Y, ridge):
    """X (m, ...), Y (n, ...) -> c (n, m), ridge regression of Y on X; ridge in mean |X_i|^2."""
    X = X.flatten(1).double()
    Y = Y.flatten(1).double()
    G = X @ X.T
    G.diagonal().add_(ridge * G.diagonal().mean())
    return torch.linalg.solve(G, X @ Y.T).T.float()


def lingen(model, targets, basis, futures, steps, seed):
    """targets (n, L), basis (m, L) -> {method: mean KL(model, method) of continuations y drawn from
    the model, of 1 .. steps tokens}. "one-token": c from the logits after the prompts alone."""
    rng = torch.Generator().manual_seed(seed)
    X = extended(model, basis, futures)
    Y = extended(model, targets, futures)
    combined = {}
    combined["Lingen"] = coefficients(X, Y, 1e-6)
    combined["one-token"] = coefficients(X[:, :1], Y[:, :1], 1e-2)            # its best ridge
    found = defaultdict(list)
    y = targets[:, :0]
    for _ in range(steps):
        true = ask(model, append(targets, y))                                 # (n, 1, V)
        rows = [ask(model, append(basis, drawn))[:, 0] for drawn in y]
        rows = torch.stack(rows)                                              # (n, m, V)
        for method, c in combined.items():                                    # sum_i c_i L_i
            found[method].append(kl(true, c[:, None] @ rows))
        for k in (4, 8, 16, 32):                                              # short contexts
            told = ask(model, append(targets[:, -k:], y))
            found[f"last {k} tokens"].append(kl(true, told))
        new = torch.multinomial(true[:, 0].softmax(1), 1, generator=rng)
        y = append(y, new)
    for method, values in found.items():
        found[method] = torch.stack(values).mean((1, 2)).cumsum(0).tolist()
    return found


# ------------------------------------------- learning

def network_logits(A, B, z):
    """x_t = A_{z,t} x_{t-1}, logits B_t x_t, x_0 = (1, 0, ...): z (n, L) -> logits (n, L + 1, V).
    A: a list over t of (V, r', r). B: of (V, r)."""
    x = torch.eye(1, B[0].size(1)).double().expand(len(z), -1)
    logits = [x @ B[0].T]
    for A_t, B_t, token in zip(A, B[1:], z.T):
        x = torch.einsum("nij,nj->ni", A_t[token], x)
        logits.append(x @ B_t.T)
    return torch.stack(logits, 1)


def pivots(Phi, most, tol=1e-6):
    """Rows of Phi (n, C), each the one that those before explain worst, until all are explained."""
    left = Phi.clone()
    chosen = []
    for _ in range(most):
        size = left.norm(dim=1)
        best = size.argmax().item()
        if size[best] <= tol:
            break
        chosen.append(best)
        u = left[best] / size[best]
        for _ in range(2):                                                    # twice: rounding
            left -= torch.outer(left @ u, u)
    return chosen


def learn(answer, V, N, most, rng):
    """A network of at most `most` states for sequences of N tokens out of V, from answer(histories
    (n, t)) -> logits (n, V). The basis at t extends the one at t - 1 by a token, the futures are
    random. -> A, B, the number of histories asked for."""
    queries = set()
    basis = torch.zeros(1, 0).long()
    A = []
    B = [answer(basis).T]
    for t in range(1, N):
        last = torch.arange(V).repeat_interleave(len(basis))
        grown = append(basis.repeat(V, 1), last[:, None])                     # (V r, t)
        sizes = torch.randint(N - t, (most,), generator=rng).tolist()
        columns = []
        for size in [0, *sizes]:                                              # of random futures
            longer = append(grown, torch.randint(V, (size,), generator=rng))
            queries.update(map(tuple, longer.tolist()))
            columns.append(answer(longer))
        Phi = torch.cat(columns, 1)
        chosen = pivots(Phi, most)
        c = Phi @ torch.linalg.pinv(Phi[chosen])                              # Phi = c Phi[chosen]
        A.append(c.view(V, len(basis), -1).mT)
        B.append(Phi[chosen, :V].T)
        basis = grown[chosen]
    return A, B, len(queries) + 1


def recover(answer, V, N, states, seed):
    """Learns a network -> a row: queries, and over 400 sequences of the truth the largest error of
    a logit and the mean KL of a sequence with 1.96 standard errors."""
    rng = torch.Generator().manual_seed(seed)
    A, B, queries = learn(answer, V, N, states, rng)
    z = torch.zeros(400, 0).long()
    true = []
    for _ in range(N):
        true.append(answer(z))
        new = torch.multinomial(true[-1].softmax(-1), 1, generator=rng)
        z = append(z, new)
    true = torch.stack(true, 1)
    told = network_logits(A, B, z[:, :-1])
    sums = kl(true, told).sum(1)
    row = dict(name=f"rank {states}, {N} tokens", V=V, N=N, rank=states, queries=queries)
    row["error"] = (true - told).abs().max().item()
    row["kl"] = sums.mean().item()
    row["kl_error"] = 1.96 * sums.std().item() / 400 ** 0.5
    print(row, flush=True)
    return row


def random_answer(V, N, states, seed):
    """The logits of a random network whose A are orthogonal: its states keep their length."""
    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(N, V, states, states, generator=rng).double()
    A, _ = torch.linalg.qr(A)
    B = torch.randn(N, V, states, generator=rng).double()
    return lambda histories: network_logits(A, B, histories)[:, -1]


def model_answer(model, prompt, tokens):
    """The model's logits over tokens (V,) after prompt (L,)."""
    def answer(histories):
        prompts = prompt.expand(len(histories), -1)
        logits = ask(model, append(prompts, tokens[histories]))[:, 0, tokens].double()
        return logits - logits.mean(1, keepdim=True)
    return answer


# ------------------------------------------- main

def passages(tokens, n, length, rng):
    """n different passages (n, length) of a text."""
    starts = length * rng.permutation((len(tokens) - 1) // length)[:n]
    rows = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(rows.astype(np.int64))


def main(argv):
    cfg = parse_config(RankConfig, argv)
    if cfg.histories < 32:
        raise UserError(f"histories={cfg.histories}, expected at least 32")
    run = Run(cfg.out_dir, "cpu")
    twin = trained(cfg.dense, *options_of(run.ckpt), "--n_proto=0")
    dense, _ = load_checkpoint(twin)
    rng = np.random.default_rng(cfg.seed)
    histories = passages(run.val, cfg.histories, cfg.length, rng)
    futures = passages(run.train, cfg.futures, 8, rng)
    targets = passages(run.val, cfg.targets, cfg.length, rng)
    basis = passages(run.train, cfg.basis, cfg.length, rng)
    result = dict(options=asdict(cfg), spectrum={}, synthetic=[], real=[])

    torch.manual_seed(cfg.seed)
    untrained = PRISM(run.model.config).eval()
    models = {"PRISM": run.model, "dense": dense, "untrained": untrained}
    for name, model in models.items():
        x = spectrum(extended(model, histories, futures)[:, 1:], cfg.futures)
        result["spectrum"][name] = x
        print(f"{name}: alpha {x['alpha']}, 95% {x['interval']}", flush=True)
    with figure(Path(cfg.out).with_suffix(".png")) as ((ax,),):
        for name, x in result["spectrum"].items():
            ax.loglog(range(1, cfg.histories + 1), x["values"], label=name)
        ax.set(xlabel="i", ylabel="singular value i")
        ax.legend()

    sums = lingen(run.model, targets, basis, futures, cfg.steps, cfg.seed)
    result["lingen"] = {"same text": sums}
    for method, values in sums.items():
        print(f"{method}: KL {values[-1]:.2f}", flush=True)

    tokens = np.bincount(run.val).argsort()[::-1][:8].copy()
    real = model_answer(run.model, histories[0], torch.from_numpy(tokens))
    for states in number_list("states", cfg.states):
        synthetic = random_answer(4, 12, states, cfg.seed)
        result["synthetic"].append(recover(synthetic, 4, 12, states, cfg.seed))
        result["real"].append(recover(real, 8, 8, states, cfg.seed))
    save_results(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
