"""Is the model of low logit rank, and can it be learned from its logits alone? After Golowich, Liu and Shetty (arXiv 2510.24966 and 2512.09892).

    pip install -r experiments/requirements.txt                   scipy, for the linear programs of part c
    python experiments/logit_rank.py                              all three parts, about 15 minutes on 2 cores; trains a dense twin if it is not there
    python experiments/logit_rank.py --parts=a --gains=out/gains/examples.json           with the spectrum of the suppressed model

L(h, (f, v)) is the logit of token v after history h and future f, centered over v. Everything is asked of one function, Ask, that counts its answers.

a  Singular values of L over sampled histories of held-out text and futures, all beginnings of passages of training text; the exponent alpha of sigma_i ~ i^-alpha fitted over i from 4 to a
   quarter of the histories, with a 95% interval by the jackknife over groups of histories and over passages. Alpha depends on how many histories there are: it is told for a quarter and a half of them
   too. Mean KL of the model from its rank-r approximations, and the exponent of its fall over r up to a quarter of the histories.
b  Lingen: coefficients c, by ridge regression, with L(target, .) = sum_i c_i L(basis prompt i, .) over futures; then the target, of held-out text, is continued by sum_i c_i L(basis prompt i, y) for
   whatever y was drawn so far. One-token: c from the empty future alone. Each with the ridge that is best on other targets. Short context: the model itself, given the last tokens of the target. Continuations
   y are drawn from the model; what is summed over the steps is KL(model, method), so the sum is the KL of whole continuations. Basis prompts of training text, or these shuffled.
c  Learning: histories of length t are expressed in a basis of them, h = sum_i x_i b_i as rows of L. A history longer by z is sum_i x_i (b_i z), so with the coefficients A_z of the b_i z in the
   next basis the model is an input-switched affine network: x_t = A_{z,t} x_{t-1}, logits B_t x_t. Our choices where the paper's text leaves them open: a basis is picked by pivots, the
   candidate that the others explain worst; where a candidate's coefficient exceeds --bound the two change places, which lets the basis span more; coefficients are least squares, and, where one still exceeds the
   bound, the linear program min_c max|c Phi - phi| with |c| <= bound. Futures are added where sequences drawn from the learned model, or uniformly, show an error: the step of the sequence that makes
   most of it names the future. Queries are distinct histories asked for. The real model is asked over its --alphabet most frequent tokens after one prompt.
"""
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import kept, machine, numbers, options_of, save, trained  # noqa: E402

from prism import PRISM, UserError, atomic, dataset_folder, load_checkpoint, load_dataset, load_gains, parse_config, run_main  # noqa: E402


@dataclass
class RankConfig:
    out_dir: str = "out"             # PRISM's run
    dense: str = "out-dense-1"       # its dense twin, trained here if need be
    gains: str = ""                  # a gains file whose effect on the spectrum is shown
    train: str = ""                  # options of train.py for the twin beyond those of the first run
    parts: str = "abc"               # which of the three
    histories: int = 192             # of part a
    length: int = 48                 # tokens of a history
    futures: int = 12                # passages whose beginnings are futures
    future: int = 8                  # tokens of each
    targets: int = 12                # prompts that Lingen continues
    basis: int = 128                 # prompts that it combines
    steps: int = 15                  # tokens of a continuation
    ridges: str = "1e-6,1e-4,1e-2,0.1,1"  # of the regressions, as shares of the basis's mean squared norm; each method gets the best on other targets
    shorts: str = "4,8,16,32"        # tokens of the target that short contexts keep
    ranks: str = "4,8,16,32"         # of synthetic networks, learned exactly
    horizons: str = "6,12,24"        # of synthetic networks of rank 8, for how queries grow
    alphabet: int = 8                # tokens that the real model is asked about in part c
    horizon: int = 8                 # tokens of the sequences that are learned
    learned: str = "2,4,8,16,32"     # ranks at which the real model is learned
    bound: float = 4.0               # of coefficients, before the linear program steps in
    seed: int = 1                    # of every draw
    out: str = "experiments/results/logit_rank.json"  # the result; the picture goes beside it


class Ask:
    """The one way to a model's logits; counts how often one context's were asked for. n_vocab: the tokenizer's size."""

    def __init__(self, model, n_vocab, gains=None):
        self.model, self.n_vocab, self.gains, self.count = model.eval(), n_vocab, gains, 0

    @torch.no_grad()
    def __call__(self, idx, last=1):
        """Sequences idx (n, L) -> centered logits (n, last, V) after each of their last tokens."""
        self.count += len(idx) * last
        parts = []
        for part in idx.split(64):
            l = self.model.logits(self.model.hidden(part)[:, -last:], self.gains)[..., :self.n_vocab].float()
            parts.append(l - l.mean(-1, keepdim=True))
        return torch.cat(parts)


def kl(l, q):
    """Logits l, q (..., V) -> KL of softmax(l) from softmax(q), in nats (...)."""
    p, q = l.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# ----------------------------------------------------------------------------- a: the spectrum

def extended(ask, histories, futures):
    """histories (n, L), futures (m, K) -> L as (n, m K, V): after each beginning, of one token and more, of each future."""
    K = futures.size(1)
    return torch.cat([ask(torch.cat([histories, f.expand(len(histories), K)], 1), K) for f in futures], 1)


def exponent(values, low, high):
    """values (n,) that fall as i^-alpha, i from 1 -> alpha, by least squares of logs over low <= i <= high."""
    i = np.arange(low, high + 1)
    return -float(np.polyfit(np.log(i), np.log(values[low - 1:high]), 1)[0])


def spectrum(X, passages, ranks=(1, 2, 4, 8, 16, 32, 64, 128)):
    """X (n, C, V), its C futures from `passages` passages in turn -> singular values, alpha with its 95% interval and at fewer histories, mean KL at each rank and its exponent."""
    n, parts = len(X), []
    for future in X.split(X.size(1) // passages, dim=1):
        flat = future.flatten(1).double()
        parts.append((flat @ flat.T).numpy())
    parts = np.stack(parts)                                                                    # Gram matrices, one a passage

    def alpha(rows, kept):
        G = parts[kept].sum(0)[np.ix_(rows, rows)]
        return exponent(np.sqrt(np.linalg.eigvalsh(G)[::-1].clip(min=1e-30)), min(4, max(1, len(rows) // 8)), max(len(rows) // 4, 3))
    values, U = np.linalg.eigh(parts.sum(0))
    values, U = np.sqrt(values[::-1].clip(min=0)), torch.from_numpy(U[:, ::-1].copy()).float()
    every, all_of, variance = np.arange(n), np.arange(passages), 0.0
    for left in ([alpha(every[every % 8 != g], all_of) for g in range(8)], [alpha(every, all_of[all_of != g]) for g in range(passages)] if passages > 1 else [0.0]):
        variance += (len(left) - 1) / len(left) * ((np.array(left) - np.mean(left)) ** 2).sum()
    found, error = alpha(every, all_of), 2.36 * float(variance ** 0.5)                         # 97.5% of the t distribution, 7 degrees of freedom
    falls = {}
    for r in [r for r in ranks if r < n]:
        total = 0.0
        for j in range(0, X.size(1), 8):
            part = X[:, j:j + 8]
            total += kl(part, (U[:, :r] @ (U[:, :r].T @ part.flatten(1))).view_as(part)).sum().item()
        falls[r] = max(0.0, total / (n * X.size(1)))
    r, v = np.array([(r, v) for r, v in falls.items() if v > 1e-7 and r <= n // 4]).reshape(-1, 2).T  # below that, float32 rounding
    return dict(values=values.tolist(), alpha=found, interval=[found - error, found + error], fewer={m: alpha(every[:m], all_of) for m in (n // 4, n // 2) if m >= 32}, kl=falls,
                kl_exponent=-float(np.polyfit(np.log(r), np.log(v), 1)[0]) if len(r) > 1 else None)


# ----------------------------------------------------------------------------- b: Lingen

def coefficients(X, Y, ridge):
    """X (m, C), Y (n, C) -> c (n, m), the ridge regression of the rows of Y on those of X."""
    G, R = (X.double() @ X.double().T), (Y.double() @ X.double().T)
    return torch.linalg.solve(G + ridge * G.diagonal().mean() * torch.eye(len(G), dtype=torch.double), R.T).T.float()


def lingen(ask, targets, basis, futures, cfg, ridges, steps):
    """ridges {method: values} -> {method: {ridge or tokens: mean KL summed over 1 .. steps (steps,)}}"""
    rng = torch.Generator().manual_seed(cfg.seed)
    empty = [ask(u, 1).flatten(1) for u in (basis, targets)]
    more = [extended(ask, u, futures).flatten(1) for u in (basis, targets)]
    sides = {"Lingen": [torch.cat(u, 1) for u in zip(empty, more)], "one-token": empty}
    c = {(n, ridge): coefficients(*sides[n], ridge) for n, values in ridges.items() for ridge in values}
    y, sums = targets[:, :0], {k: [] for k in (*c, *(("short context", k) for k in numbers("shorts", cfg.shorts)))}
    for _ in range(steps):
        true = ask(torch.cat([targets, y], 1))[:, 0]
        parts = [ask(torch.cat([basis, row.expand(len(basis), -1)], 1))[:, 0] for row in y]       # (m, V) for each target
        for k, w in c.items():
            sums[k].append(kl(true, torch.stack([u @ part for u, part in zip(w, parts)])))
        for n, k in sums:
            if n == "short context":
                sums[n, k].append(kl(true, ask(torch.cat([targets[:, targets.size(1) - k:], y], 1))[:, 0]))
        y = torch.cat([y, torch.multinomial(true.softmax(-1), 1, generator=rng)], 1)
    out = {}
    for (n, k), v in sums.items():
        out.setdefault(n, {})[k] = torch.stack(v).cumsum(0).mean(1).tolist()
    return out


def continued(ask, tune, targets, basis, futures, cfg):
    """-> {method: mean KL summed over 1 .. steps}, each regression with the ridge that is best on the targets `tune`; the ridges."""
    values = numbers("ridges", cfg.ridges, float)
    tried = lingen(ask, tune, basis, futures, cfg, {n: values for n in ("Lingen", "one-token")}, min(5, cfg.steps))
    best = {n: min(values, key=lambda r: tried[n][r][-1]) for n in ("Lingen", "one-token")}
    found = lingen(ask, targets, basis, futures, cfg, {n: [r] for n, r in best.items()}, cfg.steps)
    return {n if n != "short context" else f"last {k} tokens": v for n, u in found.items() for k, v in u.items()}, best


# ----------------------------------------------------------------------------- c: learning

def drawn(l, rng):
    """Logits l (n, V) -> a token drawn for each (n,)."""
    p = torch.from_numpy(l).softmax(-1).numpy().cumsum(1)
    return (rng.random((len(p), 1)) * p[:, -1:] > p).sum(1).clip(max=p.shape[1] - 1)


class Network:
    """x_t = A_{z,t} x_{t-1}, logits B_t x_t; A: a list over t of (V, r', r), B: a list over t of (V, r); x_0 = (1, 0, ...)."""

    def __init__(self, A, B):
        self.A, self.B = A, B

    def states(self, z):
        """Sequences z (n, L) -> the states after 0 .. L tokens, a list of (n, r_t)."""
        x = [np.eye(1, self.B[0].shape[1]).repeat(len(z), 0)]
        for t in range(z.shape[1]):
            x.append(np.einsum("nij,nj->ni", self.A[t][z[:, t]], x[-1]))
        return x

    def logits(self, z):
        """Sequences z (n, N) -> centered logits (n, N, V) before each of their tokens."""
        l = np.stack([x @ B.T for x, B in zip(self.states(z[:, :-1]), self.B)], 1)
        return l - l.mean(-1, keepdims=True)

    def sample(self, n, rng):
        """-> sequences (n, N), drawn from the network."""
        z, x = np.zeros((n, 0), int), self.states(np.zeros((n, 0), int))[0]
        for t, B in enumerate(self.B):
            new = drawn(x @ B.T, rng)
            z = np.concatenate([z, new[:, None]], 1)
            x = np.einsum("nij,nj->ni", self.A[t][new], x) if t < len(self.A) else x
        return z


def random_network(V, N, rank, rng):
    """A network of that rank whose states keep their length: A orthogonal."""
    A = [np.linalg.qr(rng.standard_normal((V, rank, rank)))[0] for _ in range(N - 1)]
    return Network(A, [rng.standard_normal((V, rank)) for _ in range(N)])


def noisy_parity(secret, noise):
    """Uniform bits z_1 .. z_n, then their parity over `secret` (n,), wrong with probability `noise`; rank 1 where it says anything."""
    n, c = len(secret), np.log((1 - noise) / noise) / 2
    A = [np.array([np.diag([1.0, 1.0]), np.diag([1.0, -1.0 if s else 1.0])]) for s in secret]
    A[0] = A[0] @ np.array([[1.0, 0], [1.0, 0]])                                              # the state (1, parity's sign) from x_0 = (1, 0)
    return Network(A, [np.zeros((2, 2)) for _ in range(n)] + [np.array([[0, c], [0, -c]])])


class Oracle:
    """Centered logits of `answer`, a function of histories (n, t) -> (n, V), each history asked for once."""

    def __init__(self, answer):
        self.answer, self.known = answer, {}

    def __call__(self, histories):
        """A list of tuples -> (n, V)."""
        new = sorted({h for h in histories if h not in self.known}, key=len)
        for _, group in itertools.groupby(new, len):
            group = list(group)
            self.known.update(zip(group, self.answer(np.array(group, int).reshape(len(group), -1))))
        return np.stack([self.known[h] for h in histories])


def bounded(Phi, phi, bound):
    """The linear program min_c max |c Phi - phi| with |c| <= bound; Phi (r, C), phi (C,) -> c (r,)."""
    from scipy.optimize import linprog
    r, C = Phi.shape
    A = np.block([[Phi.T, -np.ones((C, 1))], [-Phi.T, -np.ones((C, 1))]])
    answer = linprog(np.eye(1, r + 1, r)[0], A, np.concatenate([phi, -phi]), bounds=[(-bound, bound)] * r + [(0, None)], method="highs")
    if not answer.success:
        raise UserError(f"the linear program of {r} coefficients and {C} columns was not solved: {answer.message}")
    return answer.x[:r]


def pivots(Phi, rank, tol):
    """Rows of Phi (n, C), at most `rank`, each the one that those before explain worst, until none is off by more than tol."""
    left, chosen = Phi.copy(), []
    while len(chosen) < rank:
        size = (left ** 2).sum(1)
        best = int(size.argmax())
        if abs(left[best]).max() <= tol:
            break
        chosen.append(best)
        u = left[best] / np.sqrt(size[best])
        left = left - np.outer(left @ u, u)
        left = left - np.outer(left @ u, u)                                                   # twice: rounding
    return chosen


class Learner:
    """Learns a Network of at most `rank` states a step from an oracle's logits of sequences of N tokens out of V."""

    def __init__(self, oracle, V, N, rank, tol, bound):
        self.oracle, self.V, self.N, self.rank, self.tol, self.bound, self.programs = oracle, V, N, rank, tol, bound, 0
        self.futures = [[()] for _ in range(N)]                                               # of histories of t tokens
        self.build()

    def rows(self, histories, futures):
        return self.oracle([h + f for h in histories for f in futures]).reshape(len(histories), -1)

    def build(self):
        self.basis, A = [[()]], []
        for t in range(1, self.N):
            grown = [b + (z,) for z in range(self.V) for b in self.basis[-1]]
            Phi = self.rows(grown, self.futures[t])
            chosen = pivots(Phi, self.rank, self.tol) or [0]
            for _ in range(20 * len(chosen) + 1):
                P = Phi[chosen]
                c = np.linalg.lstsq(P.T, Phi.T, rcond=1e-10)[0].T                             # (V r, r')
                row, place = np.unravel_index(abs(c).argmax(), c.shape)
                if abs(c[row, place]) <= self.bound:
                    break
                chosen[place] = int(row)                                                      # the volume that they span grows by |c|
            for j in np.flatnonzero(abs(c).max(1) > self.bound):
                c[j], self.programs = bounded(P, Phi[j], self.bound), self.programs + 1
            A.append(c.reshape(self.V, len(self.basis[-1]), -1).swapaxes(1, 2))
            self.basis.append([grown[j] for j in chosen])
        self.network = Network(A, [self.rows(b, [()]).T for b in self.basis])

    def improve(self, z):
        """Adds the futures that the worst errors on sequences z (n, N) name -> how many are new, the largest error."""
        true = np.stack([self.oracle([tuple(row[:t]) for row in z.tolist()]) for t in range(self.N)], 1)
        error = abs(self.network.logits(z) - true).max(2)                                     # (n, N)
        new, x = 0, self.network.states(z[:, :-1])
        for n in np.argsort(-error.max(1))[:8]:
            end = int(error[n].argmax())
            if error[n, end] <= self.tol:
                break
            s = tuple(z[n, :end].tolist())
            # after t steps of the network, then the truth: where two neighbours differ, step t made the error
            told = [x[t][n] @ self.oracle([b + s[t:] for b in self.basis[t]]) for t in range(end + 1)]
            step = int(np.argmax([abs(a - b).max() for a, b in zip(told, told[1:])])) + 1
            if s[step:] not in self.futures[step]:
                self.futures[step].append(s[step:])
                new += 1
        return new, float(error.max())


def learn(oracle, V, N, rank, tol, bound, rng, rounds=200, batch=32):
    """-> a Learner, and a row a round of queries, the largest error seen and futures. Half of the sequences are drawn from the learned network, half are uniform."""
    learner, told = Learner(oracle, V, N, rank, tol, bound), []
    for _ in range(rounds):
        z = np.concatenate([learner.network.sample(batch, rng), rng.integers(V, size=(batch, N))])
        new, error = learner.improve(z)
        told.append(dict(queries=len(oracle.known), error=error, futures=sum(map(len, learner.futures))))
        if not new:
            break
        learner.build()
    return learner, told


def worst(learner, true, z):
    """The largest difference of a learner's logits from a network's on sequences z."""
    return float(abs(learner.network.logits(z) - true.logits(z)).max())


def synthetic(cfg, V=4, N=12):
    """Random networks of known rank and horizon, and a noisy parity, learned from their logits -> rows."""
    rows = []
    for rank, N in [(r, N) for r in numbers("ranks", cfg.ranks)] + [(8, n) for n in numbers("horizons", cfg.horizons) if (8, n) not in [(r, N) for r in numbers("ranks", cfg.ranks)]]:
        rng = np.random.default_rng([cfg.seed, rank, N])
        rows.append(recovered(f"random, rank {rank}, {N} tokens", random_network(V, N, rank, rng), V, N, rank, cfg, rng))
    rng = np.random.default_rng([cfg.seed, 0])
    rows.append(recovered("parity of 12 bits, noise 0.1", noisy_parity(rng.random(12) < 0.5, 0.1), 2, 13, 2, cfg, rng))
    return rows


def recovered(name, true, V, N, rank, cfg, rng):
    oracle = Oracle(lambda h: true.logits(np.concatenate([h, np.zeros((len(h), 1), int)], 1))[:, -1])
    learner, told = learn(oracle, V, N, rank, 1e-8, cfg.bound, rng)
    row = dict(name=name, V=V, N=N, rank=rank, queries=len(oracle.known), rounds=len(told), states=max(map(len, learner.basis)), programs=learner.programs, told=told,
               error=max(worst(learner, true, true.sample(500, rng)), worst(learner, true, rng.integers(V, size=(500, N)))))
    print(f"{name}: {row['queries']:,} of {sum(V ** t for t in range(N)):,} possible queries, {row['rounds']} rounds, {row['states']} states, {row['programs']} programs; "
          f"largest error of a logit on new sequences {row['error']:.1e}", flush=True)
    return row


def real(ask, prompt, tokens, cfg):
    """The model over `tokens` after `prompt` (1, L), learned at each rank -> rows: queries; KL(model, learned) of whole sequences and total
    variation E max(0, 1 - learned / model), both over sequences drawn from the model."""
    letters, rng, V, N = torch.from_numpy(tokens), np.random.default_rng(cfg.seed), len(tokens), cfg.horizon

    def answer(h):
        l = ask(torch.cat([prompt.expand(len(h), -1), letters[torch.from_numpy(h)]], 1))[:, 0, letters].double()
        return (l - l.mean(-1, keepdim=True)).numpy()

    def logits(z):
        return np.stack([answer(z[:, :t]) for t in range(N)], 1)

    def of(l, z):
        return np.take_along_axis(torch.from_numpy(l).log_softmax(-1).numpy(), z[:, :, None], 2).sum((1, 2))
    z = np.zeros((400, 0), int)
    for t in range(N):
        z = np.concatenate([z, drawn(answer(z), rng)[:, None]], 1)
    told = logits(z)
    mine, rows = of(told, z), []

    def judged(name, l, **more):
        theirs, steps = of(l, z), kl(torch.from_numpy(told), torch.from_numpy(l)).sum(1).numpy()   # the sum over steps is the KL of whole sequences
        rows.append(dict(name=name, kl=float(steps.mean()), kl_error=1.96 * float(steps.std() / len(z) ** 0.5), variation=float((1 - np.exp(theirs - mine)).clip(min=0).mean()), **more))
        r = rows[-1]
        print(f"{name}: " + (f"{r['queries']:,} queries, " if "queries" in r else "") + f"KL {r['kl']:.4f} +- {r['kl_error']:.4f} nats a sequence of {N}, total variation {r['variation']:.3f}", flush=True)
    judged("uniform", np.zeros((len(z), N, V)))
    first, after = answer(z[:1, :0]), answer(np.arange(V)[:, None])
    judged("the last token alone", np.concatenate([first[None].repeat(len(z), 0), after[z[:, :-1]]], 1))
    for rank in numbers("learned", cfg.learned):
        oracle = Oracle(answer)
        learner, path = learn(oracle, V, N, rank, 1e-3, cfg.bound, np.random.default_rng(cfg.seed), rounds=6)
        judged(f"rank {rank}", learner.network.logits(z), rank=rank, queries=len(oracle.known), programs=learner.programs, told=path)
    return rows


# ----------------------------------------------------------------------------- the three parts

def windows(tokens, n, length, rng):
    """n passages (n, length) at random places of `tokens`, none twice."""
    places = rng.permutation((len(tokens) - 1) // length)[:n]
    if len(places) < n:
        raise UserError(f"a text has {len(tokens):,} tokens, {n} passages of {length} were asked of it; lower --histories, --targets, --basis or --length")
    return torch.from_numpy(np.stack([tokens[p * length:(p + 1) * length] for p in places]).astype(np.int64))


def main(argv):
    cfg = parse_config(RankConfig, argv)
    if not cfg.parts or set(cfg.parts) - set("abc"):
        raise UserError(f"parts={cfg.parts!r}, expected some of a, b and c")
    if cfg.histories < 16 or min(cfg.length, cfg.futures, cfg.future, cfg.targets, cfg.basis, cfg.steps, cfg.horizon - 1, cfg.alphabet - 1) < 1 or not 1 <= cfg.bound < np.inf:
        raise UserError("histories must be at least 16, horizon and alphabet 2, the other counts 1, and bound at least 1")
    for name, kind in (("ridges", float), ("shorts", int), ("ranks", int), ("horizons", int), ("learned", int)):
        numbers(name, getattr(cfg, name), kind)
    if max(numbers("shorts", cfg.shorts)) > cfg.length or min(numbers("horizons", cfg.horizons)) < 2:
        raise UserError(f"shorts={cfg.shorts} with length {cfg.length}, horizons={cfg.horizons}; expected at most the length, and at least 2")
    if "c" in cfg.parts:
        try:
            import scipy  # noqa: F401
        except ImportError:
            raise UserError("scipy cannot be imported; run: pip install -r experiments/requirements.txt, or leave part c out, --parts=ab") from None
    model, ckpt = load_checkpoint(cfg.out_dir, "cpu")
    if cfg.length + max(n for p, n in zip("abbc", (cfg.future, cfg.future, cfg.steps, cfg.horizon)) if p in cfg.parts) > model.config.block_size:
        raise UserError(f"length {cfg.length} and what follows it do not fit the context of {model.config.block_size} tokens; lower --length")
    folder = dataset_folder(ckpt["train_config"]["dataset"])
    train, val, meta = load_dataset(folder)
    gains = load_gains(cfg.gains, model) if cfg.gains else None
    V, result, told = meta["vocab_size"], kept(cfg.out) | dict(options=asdict(cfg), machine=machine()), []
    rng = np.random.default_rng(cfg.seed)
    histories, futures = windows(val, cfg.histories, cfg.length, rng), windows(train, cfg.futures, cfg.future, rng)
    if "a" in cfg.parts:
        torch.manual_seed(cfg.seed)
        sides = {"PRISM": Ask(model, V), "dense": None, "untrained": Ask(PRISM(model.config), V)}
        sides["dense"] = Ask(load_checkpoint(trained(cfg.dense, *options_of(ckpt), *cfg.train.split(), "--n_proto=0"), "cpu")[0], V)
        if gains is not None:
            sides["PRISM, suppressed"] = Ask(model, V, gains)
        result["spectrum"] = {}
        for name, ask in sides.items():
            x = result["spectrum"][name] = spectrum(extended(ask, histories, futures), cfg.futures) | dict(queries=ask.count)
            print(f"{name}: alpha {x['alpha']:.3f} [{x['interval'][0]:.3f}, {x['interval'][1]:.3f}], " + "".join(f"{v:.3f} with {m} histories, " for m, v in x["fewer"].items()) + "mean KL " + ", ".join(f"{v:.3f} at rank {r}" for r, v in x["kl"].items())
                  + (f", as r^-{x['kl_exponent']:.2f}" if x["kl_exponent"] else "") + f"; {ask.count:,} queries", flush=True)
        told.append("alpha " + ", ".join(f"{v['alpha']:.3f} {n}" for n, v in result["spectrum"].items()))
        save(cfg.out, result)
        picture(result, Path(cfg.out).with_suffix(".png"))
    if "b" in cfg.parts:
        ask, prompts, basis = Ask(model, V), windows(val, 2 * cfg.targets, cfg.length, rng), windows(train, cfg.basis, cfg.length, rng)
        shuffled = torch.stack([row[torch.from_numpy(rng.permutation(cfg.length))] for row in basis])
        result["lingen"] = {}
        for name, part in (("same text", basis), ("shuffled", shuffled)):
            sums, best = continued(ask, prompts[cfg.targets:], prompts[:cfg.targets], part, futures, cfg)
            result["lingen"][name], result[f"ridges, {name}"] = sums, best
            print(f"{name}: KL of {cfg.steps} tokens " + ", ".join(f"{n} {v[-1]:.2f}" for n, v in sums.items()) + "; ridges " + ", ".join(f"{n} {r:g}" for n, r in best.items()), flush=True)
        told.append(f"KL of {cfg.steps} tokens: " + ", ".join(f"{n} {v[-1]:.2f}" for n, v in result["lingen"]["same text"].items()))
        save(cfg.out, result)
    if "c" in cfg.parts:
        result["synthetic"] = synthetic(cfg)
        common = np.bincount(val, minlength=V).argsort()[::-1][:cfg.alphabet].copy()
        result["real"] = real(Ask(model, V), histories[:1], common, cfg)
        told.append(f"recovered to {max(r['error'] for r in result['synthetic']):.0e}; the real model at rank {result['real'][-1]['rank']}: KL {result['real'][-1]['kl']:.3f} of {result['real'][0]['kl']:.3f} nats")
        save(cfg.out, result)
    print("; ".join([*told, cfg.out]))


def picture(result, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, x), color, dash in zip(result["spectrum"].items(), ("#0072B2", "#E69F00", "#999999", "#009E73"), ("-", "--", ":", "-.")):
        v = np.array(x["values"])
        axes[0].loglog(np.arange(1, len(v) + 1), v / v[0], dash, color=color, label=f"{name}, alpha {x['alpha']:.2f}")
        axes[1].loglog(list(x["kl"]), list(x["kl"].values()), dash, marker="o", color=color, label=name)
    axes[0].set(xlabel="i", ylabel="singular value i over the first")
    axes[1].set(xlabel="rank of the approximation", ylabel="mean KL, nats")
    for ax in axes:
        ax.legend(fontsize=8)
    with atomic(path) as f:
        fig.savefig(f, dpi=110, format="png")
    plt.close(fig)


if __name__ == "__main__":
    run_main(main)
