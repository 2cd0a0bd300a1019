"""PRISM: a GPT whose logits are a sum of named parts (arXiv 2607.00510). The whole model.

    s_ti     = cos(z_t, p_i)                                similarity of token state and prototype
    a_ti     = relu(s_ti) for the k most similar, else 0    gate, sparse and non-negative
    zhat_t   = sum_i a_ti p_i,    r_t = z_t - zhat_t        reconstruction and residual
    logits_t = W r_t + sum_i g_i a_ti W p_i                 gains g are ones; then it is W z_t
    + sum_e relu(sum_i w_ei a_ti - c_e) W u_e               edits: prototypes detect, u_e acts

B batch, T tokens, N = B T, d = n_embd, V = vocab_size, M = n_proto, k = top_k.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class UserError(ValueError):
    """A mistake that the user can mend: scripts print its message on one line."""


@dataclass
class PRISMConfig:
    block_size: int = 128        # T, tokens the model can look back on
    vocab_size: int = 0          # V; 0 takes the dataset's
    n_layer: int = 4             # transformer blocks
    n_head: int = 3              # attention heads per block
    n_embd: int = 192            # d, width of the residual stream
    dropout: float = 0.0         # on embeddings, attention weights and block outputs
    bias: bool = False           # in linear layers and layer norms; True for GPT-2's weights
    n_proto: int = 1024          # M, prototypes; 0 is the dense twin
    top_k: int = 64              # k, prototypes that may be active at a token
    lambda_rec: float = 0.5      # weight of the reconstruction loss
    lambda_t2p: float = 0.01     # weight of the token-to-prototype clustering loss
    lambda_p2t: float = 0.01     # weight of the prototype-to-token clustering loss
    head_share: float = 0.375    # share of a batch's windows on which these three losses are taken

    def check(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}, expected a multiple of n_head {self.n_head}")
        if self.n_proto and not 1 <= self.top_k <= self.n_proto:
            raise UserError(f"top_k is {self.top_k}, expected 1 to n_proto {self.n_proto}")
        if not 0 < self.head_share <= 1 or not 0 <= self.dropout < 1:
            raise UserError("expected 0 < head_share <= 1 and 0 <= dropout < 1")
        return self


# --------------------------------------- the trunk: GPT-2, with its parameter names
class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.n_head, self.dropout = c.n_head, c.dropout

    def forward(self, x, past=None):
        """x (B, T, d) -> (B, T, d). past: a list of this block's keys and values, extended."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).split(d, dim=2)
        shape = B, T, self.n_head, d // self.n_head
        q, k, v = (u.view(shape).transpose(1, 2) for u in (q, k, v))  # (B, heads, T, d / heads)
        if past:                                                  # then T is 1
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        if past is not None:
            past[:] = k, v
        if x.device.type == "cpu" and q.dtype is torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()             # two to three times as fast there
        with torch.autocast("cpu", enabled=False):
            causal = q.size(2) == k.size(2)                       # one new token may see every key
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, d))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.dropout = c.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.attn = CausalSelfAttention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.mlp = MLP(c)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


# --------------------------------------- the prototype head
class Mixture(NamedTuple):
    """N states, z = reconstruction + residual; reconstruction = sum_j gates[:, j] P[ids[:, j]]."""
    ids: torch.Tensor             # (N, k) prototypes, the most similar first
    gates: torch.Tensor           # (N, k) a = relu(cos) >= 0, often exactly 0
    reconstruction: torch.Tensor  # (N, d) zhat
    residual: torch.Tensor        # (N, d) r = z - zhat
    nearest_token: torch.Tensor   # (M,) max_t s_ti, each prototype's cosine to its nearest token
    nearest_proto: torch.Tensor   # (N,) max_i s_ti, each token's cosine to its nearest prototype


def mix(ids, weights, prototypes):
    """ids, weights (N, k), prototypes (M, d) -> sum_j weights[:, j] P[ids[:, j]] (N, d)."""
    return F.embedding_bag(ids, prototypes, per_sample_weights=weights, mode="sum")


def prototype_head(z, prototypes, top_k):
    """z (N, d), prototypes (M, d) -> Mixture. The head of the paper."""
    s = F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T  # (N, M) s_ti = cos(z_t, p_i)
    values, ids = s.topk(top_k, dim=1)
    gates = values.to(z.dtype).relu()                             # (N, k) a_ti
    zhat = mix(ids, gates, prototypes)                            # never a (N, k, d) tensor
    nearest_token = s.max(0).values.to(z.dtype)
    return Mixture(ids, gates, zhat, z - zhat, nearest_token, values[:, 0].to(z.dtype))


class Edit(NamedTuple):
    """Gains g (M,), and E gated directions u (E, d) with detectors w (E, M), thresholds c (E,)."""
    g: torch.Tensor
    w: torch.Tensor
    c: torch.Tensor
    u: torch.Tensor

    def fire(self, ids, gates):
        """ids, gates (N, k) -> (N, E) relu(sum_i w_ei a_i - c_e)"""
        return (mix(ids, gates, self.w.T) - self.c).relu()

    def apply(self, z, ids, gates, prototypes):
        """z (N, d) -> z + sum_i (g_i - 1) a_i p_i + sum_e relu(sum_i w_ei a_i - c_e) u_e"""
        change = mix(ids, gates * (self.g[ids] - 1), prototypes)
        return z + change + self.fire(ids, gates) @ self.u


# --------------------------------------- cross-entropy without whole logits
def log_softmax_chunks(z, w, dtype=None):
    """z (N, d), w (V, d) -> yields (slice of the tokens, its log softmax(w z_t) (n, V)).
    A chunk stays in the cache; whole logits would cross the memory bus six times."""
    rows = max(64, (2 ** 20 if z.device.type == "cpu" else 2 ** 26) // len(w))
    for i in range(0, len(z), rows):
        at = slice(i, i + rows)
        yield at, (z[at] @ w.T).to(dtype or z.dtype).log_softmax(1)


class LinearCrossEntropy(torch.autograd.Function):
    """z (N, d), w (V, d), targets (N,) -> sum_t -log softmax(w z_t)[target_t]; -1 counts nothing.
    Each chunk of logits becomes its gradient, softmax - onehot, and is used up at once."""
    @staticmethod
    def forward(ctx, z, w, targets):
        kind = z.device.type                                      # autocast does not reach here
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype
        zl, wl = z.to(low), w.to(low)
        total = z.new_zeros(())
        dz, dw = torch.empty_like(z), torch.zeros_like(w)
        for at, logp in log_softmax_chunks(zl, wl, z.dtype):
            y = targets[at, None].clamp(min=0)
            keep = targets[at, None] >= 0
            total -= (logp.gather(1, y) * keep).sum()
            if any(ctx.needs_input_grad):
                p = logp.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=z.dtype))
                p = p.mul_(keep).to(low)                          # softmax - onehot
                dz[at] = p @ wl
                dw += p.T @ zl[at]
        ctx.save_for_backward(dz, dw)
        return total

    @staticmethod
    @once_differentiable                                          # dz and dw are constants here
    def backward(ctx, g):
        dz, dw = ctx.saved_tensors
        return dz * g, dw * g, None


# --------------------------------------- the model
class Explanation(NamedTuple):
    """The ledger of a logit per token: contributions.sum(-1) + residual + edits == logit."""
    targets: torch.Tensor        # (B, T) the token whose logit is explained
    logit: torch.Tensor          # (B, T)
    prototypes: torch.Tensor     # (B, T, k) ids, the most similar first
    gates: torch.Tensor          # (B, T, k) a >= 0, before gains
    contributions: torch.Tensor  # (B, T, k) g_i a_ti <W[target], p_i>
    residual: torch.Tensor       # (B, T) <W[target], r_t>
    edits: torch.Tensor          # (B, T) sum_e gate_te <W[target], u_e> of an Edit


class PRISM(nn.Module):
    """A GPT-2 trunk and a prototype head that share one output matrix W, the token embedding."""
    TERMS = "ce", "rec", "t2p", "p2t"  # the order of the vector of loss terms

    def __init__(self, config):
        super().__init__()
        self.config = c = config.check()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList([Block(c) for _ in range(c.n_layer)]),
            ln_f=nn.LayerNorm(c.n_embd, bias=c.bias)))
        for name, p in self.named_parameters():                   # GPT-2's initialisation
            if p.dim() == 2:
                branch = name.endswith("c_proj.weight")           # branches shrink with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if branch else 0.02)
        if c.n_proto:  # drawn last, so that the dense twin starts from the very same trunk
            # z has norm sqrt(d) after its layer norm; k prototypes add up to it
            self.prototypes = nn.Parameter(torch.randn(c.n_proto, c.n_embd) / math.sqrt(c.top_k))

    @property
    def W(self):
        return self.transformer.wte.weight                        # (V, d), the output matrix

    def hidden(self, idx, past=None):
        """idx (B, T) -> z (B, T, d), after the last layer norm. past: a list per block."""
        t = self.transformer
        start = past[0][0].size(2) if past and past[0] else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens, more than block_size = {self.config.block_size}")
        x = F.dropout(t.wte(idx) + t.wpe.weight[start:end], self.config.dropout, self.training)
        for i, block in enumerate(t.h):
            x = block(x, past[i] if past else None)
        return t.ln_f(x)

    def mixture(self, z):
        """z (..., d) -> Mixture of its N tokens."""
        return prototype_head(z.reshape(-1, z.size(-1)), self.prototypes, self.config.top_k)

    def edit(self, gains):
        """Gains (M,) or an Edit -> an Edit; gains have one direction, zero."""
        if isinstance(gains, Edit):
            return gains
        M, d = self.config.n_proto, self.config.n_embd
        if gains.shape != (M,):
            raise UserError(f"{tuple(gains.shape)} gains, but n_proto = {M}")
        zero = self.W.new_zeros
        return Edit(gains.to(self.W), zero(1, M), zero(1), zero(1, d))

    def steer(self, z, gains=None):
        """z (..., d), gains (M,), an Edit or None -> the states (..., d) that W reads."""
        if gains is None:
            return z
        edit = self.edit(gains)
        m, flat = self.mixture(z), z.reshape(-1, z.size(-1))
        return edit.apply(flat, m.ids, m.gates, self.prototypes).view_as(z)

    def logits(self, z, gains=None):
        """z (..., d), gains as steer takes them -> (..., V), W times the states of steer()."""
        return F.linear(self.steer(z, gains), self.W)

    def forward(self, idx, targets=None, gains=None, return_terms=False):
        """idx (B, T), targets (B, T) (-1 is ignored), gains as in steer -> logits (B, T, V), loss

        Without targets: the last position's logits, loss None. return_terms: loss, terms (4,).
            ce   next-token cross-entropy, in nats
            rec  mean_t |z_t - zhat_t|^2 / mean_t |z_t|^2, the denominator detached
            t2p  1 - mean_t max_i s_ti, each token state has a near prototype
            p2t  1 - mean_i max_t s_ti, each prototype has a near token state
            loss = ce + lambda_rec rec + lambda_t2p t2p + lambda_p2t p2t
        ce sends no gradient to the prototypes: slices and residual add back to W z.
        """
        c, z = self.config, self.hidden(idx)
        if targets is None:
            return self.logits(z[:, -1:], gains), None
        states, y = self.steer(z, gains), targets.flatten()
        ce = LinearCrossEntropy.apply(states.flatten(0, 1), self.W, y) / (y >= 0).sum()
        loss = ce
        rec = t2p = p2t = ce.new_zeros(())
        if c.n_proto:
            share = c.head_share if self.training else 1.0
            some = z[:math.ceil(share * len(z))]                  # windows come at random
            m = self.mixture(some)
            rec = (m.residual.norm() / some.detach().norm()).square()
            t2p = 1 - m.nearest_proto.mean()
            p2t = 1 - m.nearest_token.mean()
            loss = ce + c.lambda_rec * rec + c.lambda_t2p * t2p + c.lambda_p2t * p2t
        if return_terms:
            return loss, torch.stack((ce, rec, t2p, p2t)).detach()
        return F.linear(states, self.W), loss

    @torch.no_grad()
    def explain(self, idx, targets=None, gains=None):
        """idx (B, T), targets (B, T), by default the likeliest next tokens y -> Explanation:
        logit_t = <W_y, r_t> + sum_i g_i a_ti <W_y, p_i> + edits, exactly."""
        z = self.hidden(idx)
        logits = self.logits(z, gains)
        if targets is None:
            targets = logits.argmax(-1)
        w = self.W[targets].flatten(0, 1)                         # (N, d)
        logit = logits.gather(-1, targets[..., None])[..., 0]
        m = self.mixture(z)
        slices = m.gates * (w @ self.prototypes.T).gather(1, m.ids)  # a_ti <W_y, p_i>
        residual = (w * m.residual).sum(-1)                       # <W_y, r_t>
        edits = torch.zeros_like(residual)
        if gains is not None:
            edit = self.edit(gains)
            slices = slices * edit.g[m.ids]
            edits = (edit.fire(m.ids, m.gates) * (w @ edit.u.T)).sum(1)
        shape = *targets.shape, self.config.top_k
        return Explanation(targets, logit, m.ids.view(shape), m.gates.view(shape),
                           slices.view(shape), residual.view_as(logit), edits.view_as(logit))

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=1337, gains=None,
               n_vocab=None):
        """Yields the tokens (B, 1) that follow idx (B, T). temperature 0 is greedy; top_k keeps the
        likeliest of the first n_vocab tokens. A full context is cut to its newer half."""
        T = self.config.block_size
        rng = torch.Generator(idx.device)
        rng.manual_seed(seed)
        new, past = idx, [[] for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            if idx.size(1) > T:
                new = idx = idx[:, -max(1, T // 2):]
                past = [[] for _ in self.transformer.h]
            logits = self.logits(self.hidden(new, past)[:, -1], gains)[:, :n_vocab].float()
            if top_k:
                least = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                logits[logits < least] = -math.inf
            if temperature:
                probs = (logits / temperature).softmax(-1)
                new = torch.multinomial(probs, 1, generator=rng)
            else:
                new = logits.argmax(-1, keepdim=True)
            idx = torch.cat((idx, new), 1)
            yield new

    def generate(self, idx, *args, **options):
        """As stream; all at once: idx (B, T) -> (B, T + max_new_tokens)."""
        return torch.cat((idx, *self.stream(idx, *args, **options)), 1)

    @torch.no_grad()
    def start_prototypes(self, idx):
        """Sets the prototypes to hidden states of the tokens idx (B, T), times one factor that
        minimises the mean |z - zhat|^2. For a trained trunk; leaves the model in eval mode."""
        z = self.eval().hidden(idx).flatten(0, 1)                 # (N, d)
        M = self.config.n_proto
        rounds = [torch.randperm(len(z), device=z.device) for _ in range(0, M, len(z))]
        self.prototypes.copy_(z[torch.cat(rounds)[:M]])           # no state twice while they last
        zhat = self.mixture(z).reconstruction
        self.prototypes.mul_((z * zhat).sum() / zhat.square().sum())

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """GPT-2 weights, prototypes still random (see start_prototypes). source: a state dict, or a
        name such as "gpt2", for the optional package transformers. overrides: config fields."""
        if isinstance(source, str):
            from transformers import GPT2LMHeadModel
            source = GPT2LMHeadModel.from_pretrained(source).state_dict()
        state = {k.removeprefix("transformer."): v for k, v in source.items()}
        V, d = state["wte.weight"].shape
        n_layer = len({k.split(".")[1] for k in state if k.startswith("h.")})
        shape = dict(block_size=len(state["wpe.weight"]), vocab_size=V, n_layer=n_layer,
                     n_head=max(1, d // 64), n_embd=d, bias="ln_f.bias" in state)
        model = cls(PRISMConfig(**(shape | overrides)))
        for name, p in model.transformer.named_parameters():
            by_input = name.startswith("h.") and p.dim() == 2     # GPT-2 stores (in, out)
            p.data.copy_(state[name].T if by_input else state[name])
        return model
