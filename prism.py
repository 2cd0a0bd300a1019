"""PRISM: a GPT whose logits are a sum of named parts (arXiv 2607.00510). The whole model.

The last hidden state z of a GPT-2 trunk is a sparse, non-negative mixture of learned prototypes
plus a residual. The LM head W is linear, so a logit is one share per prototype and a residual.

    s_ti     = cos(z_t, p_i)                                     similarity
    a_ti     = relu(s_ti) for the k most similar, else 0         gate
    zhat_t   = sum_i a_ti p_i,        r_t = z_t - zhat_t         reconstruction and residual
    logits_t = W r_t + sum_i g_i a_ti W p_i                      gains g are ones; then it is W z_t

Symbols: B batch, T tokens, N = B T, d = n_embd, V = vocab_size, M = n_proto, k = top_k.
"""
import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class UserError(ValueError):
    """A mistake that the user can mend: scripts print its message on one line, without a traceback."""


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
    top_k: int = 16              # k, prototypes that may be active at a token
    lambda_rec: float = 0.1      # weight of the reconstruction loss
    lambda_t2p: float = 0.02     # weight of the token-to-prototype clustering loss
    lambda_p2t: float = 0.005    # weight of the prototype-to-token clustering loss
    head_share: float = 0.375    # share of a batch's windows on which these three losses are taken

    def check(self):
        """Raises UserError where the sizes do not fit together."""
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}, expected a multiple of n_head {self.n_head}")
        if self.n_proto < 0:
            raise UserError(f"n_proto is {self.n_proto}, expected 0 (dense) or more")
        if self.n_proto and not 1 <= self.top_k <= self.n_proto:
            raise UserError(f"top_k is {self.top_k}, expected 1 to n_proto {self.n_proto}")
        if not 0.0 < self.head_share <= 1.0:
            raise UserError(f"head_share is {self.head_share}, expected 0 < head_share <= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")
        return self


# ------------------------------------------- the trunk: GPT-2, with its parameter names

class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.n_head = c.n_head
        self.dropout = c.dropout

    def forward(self, x, past=None):
        """x (B, T, d) -> (B, T, d). past: the list of this block's keys and values, extended here."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).split(d, dim=2)
        shape = B, T, self.n_head, d // self.n_head
        q, k, v = (u.view(shape).transpose(1, 2) for u in (q, k, v))  # (B, heads, T, d / heads)
        if past:
            assert T == 1, "a past is extended by one token at a time"
            k = torch.cat((past[0], k), 2)
            v = torch.cat((past[1], v), 2)
        if past is not None:
            past[:] = k, v
        # A CPU's bfloat16 attention is two to three times slower than float32: leave autocast.
        leave = x.device.type == "cpu"
        if leave and q.dtype is torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False) if leave else contextlib.nullcontext():
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


# ------------------------------------------- the prototype head

class Mixture(NamedTuple):
    """N states as z = reconstruction + residual, reconstruction = sum_j gates[:, j] P[ids[:, j]]."""
    ids: torch.Tensor             # (N, k) prototypes, the most similar first
    gates: torch.Tensor           # (N, k) a = relu(cos) >= 0
    reconstruction: torch.Tensor  # (N, d) zhat
    residual: torch.Tensor        # (N, d) r = z - zhat
    nearest_token: torch.Tensor   # (M,) max_t s_ti, each prototype to its nearest token
    nearest_proto: torch.Tensor   # (N,) max_i s_ti, each token to its nearest prototype


def autocast_dtype(x):
    """The dtype in which autocast would multiply now; custom functions follow it by hand."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def mix(ids, weights, prototypes):
    """ids, weights (N, k), prototypes (M, d) -> sum_j weights[:, j] P[ids[:, j]] (N, d)."""
    return F.embedding_bag(ids, prototypes, per_sample_weights=weights, mode="sum")


class TopSimilarity(torch.autograd.Function):
    """z (N, d), p (M, d), k -> the k largest cosines (N, k), ids (N, k), each prototype's largest.

    Only N k + M entries of the gradient of the cosines are not zero, so dz is a sparse sum.
    """

    @staticmethod
    def forward(ctx, z, p, k):
        low = autocast_dtype(z)
        znorm = z.norm(dim=1, keepdim=True).clamp(min=1e-12)
        pnorm = p.norm(dim=1, keepdim=True).clamp(min=1e-12)
        zn, pn = z / znorm, p / pnorm
        s = zn.to(low) @ pn.to(low).T                             # (N, M) s_ti = cos(z_t, p_i)
        values, ids = s.topk(k, dim=1)
        best, rows = s.max(0)
        ctx.save_for_backward(zn, pn, znorm, pnorm, ids, rows)
        ctx.mark_non_differentiable(ids)
        ctx.low = low
        return values.to(z.dtype), ids, best.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalues, _, dbest):
        zn, pn, znorm, pnorm, ids, rows = ctx.saved_tensors
        dzn = mix(ids, dvalues, pn).index_add_(0, rows, dbest[:, None] * pn)
        ds = torch.zeros(len(zn), len(pn), dtype=ctx.low, device=zn.device)
        tokens = torch.arange(len(zn), device=zn.device)
        protos = torch.arange(len(pn), device=zn.device)
        ds.index_put_((tokens[:, None], ids), dvalues.to(ctx.low))
        ds.index_put_((rows, protos), dbest.to(ctx.low), accumulate=True)
        dpn = (ds.T @ zn.to(ctx.low)).to(pn.dtype)
        dz = (dzn - zn * (zn * dzn).sum(1, keepdim=True)) / znorm
        dp = (dpn - pn * (pn * dpn).sum(1, keepdim=True)) / pnorm
        return dz, dp, None


def prototype_head(z, prototypes, top_k):
    """z (N, d), prototypes (M, d) -> Mixture. The head of the paper."""
    values, ids, best = TopSimilarity.apply(z, prototypes, top_k)
    gates = values.relu()                                         # (N, k) a_ti
    zhat = mix(ids, gates, prototypes)                            # never a (N, k, d) tensor
    return Mixture(ids, gates, zhat, z - zhat, best, values[:, 0])


def apply_gains(z, ids, gates, gains, prototypes):
    """r + sum_i g_i a_i p_i = z + sum_i (g_i - 1) a_i p_i. z (N, d), gains (M,) -> (N, d)."""
    return z + mix(ids, gates * (gains[ids] - 1), prototypes)


# ------------------------------------------- cross-entropy without whole logits

def log_softmax_chunks(z, w, dtype=None):
    """z (N, d), w (V, d) -> yields (slice of the tokens, log softmax(w z_t) of it (n, V)).

    A chunk stays in the cache; whole logits would cross the memory bus six times.
    """
    rows = max(64, (2 ** 20 if z.device.type == "cpu" else 2 ** 26) // len(w))
    for i in range(0, len(z), rows):
        at = slice(i, i + rows)
        yield at, (z[at] @ w.T).to(dtype or z.dtype).log_softmax(1)


class LinearCrossEntropy(torch.autograd.Function):
    """z (N, d), w (V, d), targets (N,) -> sum_t -log softmax(w z_t)[target_t]; -1 counts nothing.

    Each chunk of logits becomes its gradient, softmax - onehot, and is used up at once.
    """

    @staticmethod
    def forward(ctx, z, w, targets):
        low = autocast_dtype(z)
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


# ------------------------------------------- the model

@dataclass
class Explanation:
    """The ledger of one logit per token: contributions.sum(-1) + residual == logit."""
    targets: torch.Tensor        # (B, T) the token whose logit is explained
    logit: torch.Tensor          # (B, T)
    prototypes: torch.Tensor     # (B, T, k) ids, the most similar first
    gates: torch.Tensor          # (B, T, k) a >= 0, before gains
    contributions: torch.Tensor  # (B, T, k) g_i a_ti <W[target], p_i>
    residual: torch.Tensor       # (B, T) <W[target], r_t>


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
        """The output matrix (V, d)."""
        return self.transformer.wte.weight

    def hidden(self, idx, past=None):
        """idx (B, T) -> z (B, T, d), the state after the last layer norm. past: a list per block."""
        t = self.transformer
        start = past[0][0].size(2) if past and past[0] else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens given, the context holds block_size = "
                            f"{self.config.block_size}; shorten the text")
        x = t.wte(idx) + t.wpe.weight[start:end]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(t.h):
            x = block(x, past[i] if past else None)
        return t.ln_f(x)

    def mixture(self, z):
        """z (..., d) -> Mixture of its N tokens."""
        return prototype_head(z.reshape(-1, z.size(-1)), self.prototypes, self.config.top_k)

    def logits(self, z, gains=None):
        """z (..., d), gains (M,) or None -> (..., V): logits_t = W (r_t + sum_i g_i a_ti p_i)."""
        if gains is not None:
            if gains.shape != (self.config.n_proto,):
                raise UserError(f"gains have shape {tuple(gains.shape)}, expected (n_proto,) = "
                                f"({self.config.n_proto},)")
            m = self.mixture(z)
            flat = z.reshape(-1, z.size(-1))
            z = apply_gains(flat, m.ids, m.gates, gains.to(z), self.prototypes).view_as(z)
        return F.linear(z, self.W)

    def forward(self, idx, targets=None, gains=None, return_terms=False):
        """idx (B, T), targets (B, T) or None (-1 is ignored), gains (M,) or None -> logits, loss

        Without targets: logits (B, 1, V) of the last position, loss None. With targets: logits
        (B, T, V) and the training loss. The trainer asks for loss, terms with return_terms: the
        terms are a detached (4,) vector, and whole logits are never made.

            ce   next-token cross-entropy, in nats
            rec  mean_t |z_t - zhat_t|^2 / mean_t |z_t|^2, the denominator detached
            t2p  1 - mean_t max_i s_ti, each token state has a near prototype
            p2t  1 - mean_i max_t s_ti, each prototype has a near token state
            loss = ce + lambda_rec rec + lambda_t2p t2p + lambda_p2t p2t

        Slices and residual add back to W z, so ce sends no gradient to the prototypes: rec, t2p
        and p2t shape them, all four shape the trunk. In training the last three are taken over the
        first head_share of the windows, which come in random order: the head costs half as much.
        """
        c, z = self.config, self.hidden(idx)
        if targets is None:
            return self.logits(z[:, -1:], gains), None
        y = targets.flatten()
        if return_terms:
            ce = LinearCrossEntropy.apply(z.flatten(0, 1), self.W, y) / (y >= 0).sum()
        else:
            logits = self.logits(z, gains)
            ce = F.cross_entropy(logits.flatten(0, 1).to(z.dtype), y, ignore_index=-1)
        loss = ce
        rec = t2p = p2t = ce.new_zeros(())
        if c.n_proto:
            share = c.head_share if self.training else 1.0
            z = z[:math.ceil(share * len(z))]
            m = self.mixture(z)
            rec = (m.residual.norm() / z.detach().norm()).square()
            t2p = 1 - m.nearest_proto.mean()
            p2t = 1 - m.nearest_token.mean()
            loss = ce + c.lambda_rec * rec + c.lambda_t2p * t2p + c.lambda_p2t * p2t
        if return_terms:
            return loss, torch.stack((ce, rec, t2p, p2t)).detach()
        return logits, loss

    @torch.no_grad()
    def explain(self, idx, targets=None, gains=None):
        """The exact ledger of one logit per token. idx (B, T), targets (B, T) -> Explanation

        logit_t = <W_y, r_t> + sum_i g_i a_ti <W_y, p_i>; y is by default the likeliest next token.
        """
        z = self.hidden(idx)
        logits = self.logits(z, gains)
        if targets is None:
            targets = logits.argmax(-1)
        w = self.W[targets]                                       # (B, T, d)
        logit = logits.gather(-1, targets[..., None])[..., 0]
        if not self.config.n_proto:
            none = logit.new_zeros(*logit.shape, 0)
            return Explanation(targets, logit, none.long(), none, none, (w * z).sum(-1))
        m = self.mixture(z)
        slices = m.gates * (w.flatten(0, 1) @ self.prototypes.T).gather(1, m.ids)  # a_ti <W_y, p_i>
        if gains is not None:
            slices = slices * gains.to(z)[m.ids]
        residual = (w * m.residual.view_as(z)).sum(-1)
        shape = *targets.shape, self.config.top_k
        return Explanation(targets, logit, m.ids.view(shape), m.gates.view(shape),
                           slices.view(shape), residual)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
                 gains=None, stop=None, n_vocab=None):
        """Continues idx (B, T) -> (B, T + max_new_tokens), or fewer once every row drew `stop`.

        temperature 0 is greedy; top_k keeps the likeliest tokens, top_p the smallest set with that
        much probability; one seed gives one text. n_vocab: the tokenizer's size, where vocab_size
        is rounded up. When the context is full, its newer half is kept and read afresh.
        """
        c = self.config
        if not 1 <= idx.size(1) <= c.block_size:
            raise UserError(f"the prompt has {idx.size(1)} tokens, expected 1 to {c.block_size}")
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature is {temperature}, expected 0 or more")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}, expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}, expected 0 < top_p <= 1")
        rng = torch.Generator(idx.device)
        if seed is None:
            rng.seed()
        else:
            rng.manual_seed(seed)
        training = self.training
        self.eval()
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        new, past, start = idx, [[] for _ in self.transformer.h], 0
        for _ in range(max_new_tokens):
            if idx.size(1) - start > c.block_size:
                start = idx.size(1) - max(1, c.block_size // 2)
                new, past = idx[:, start:], [[] for _ in self.transformer.h]
            z = self.hidden(new, past)[:, -1]
            new = draw(self.logits(z, gains)[:, :n_vocab].float(), temperature, top_k, top_p, rng)
            idx = torch.cat((idx, new), 1)
            done |= new[:, 0] == (-1 if stop is None else stop)
            if done.all():
                break
        self.train(training)
        return idx

    @torch.no_grad()
    def start_prototypes(self, idx):
        """Sets the prototypes to hidden states of the tokens idx (B, T), scaled to one length that
        minimises the mean |z - zhat|^2. For a trunk that is trained already."""
        training = self.training
        z = self.eval().hidden(idx).flatten(0, 1)                 # (N, d)
        M, N = self.config.n_proto, len(z)
        rounds = -(-M // N)                                       # without replacement while they last
        order = [torch.randperm(N, device=z.device) for _ in range(rounds)]
        self.prototypes.copy_(z[torch.cat(order)[:M]])
        zhat = self.mixture(z).reconstruction
        self.prototypes.mul_((z * zhat).sum() / zhat.square().sum())
        self.train(training)

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """GPT-2 weights, their prototypes still random: call start_prototypes, as the trainer does.

        source: a state dict of GPT-2's, or a name such as "gpt2-medium", which the optional
        package transformers fetches. overrides: fields of PRISMConfig.
        """
        state = source
        if isinstance(source, str):
            try:
                from transformers import GPT2LMHeadModel
            except ImportError:
                raise UserError(f"'{source}' is neither a file nor a folder with a ckpt.pt; for a "
                                "name of GPT-2's family: pip install transformers") from None
            state = GPT2LMHeadModel.from_pretrained(source).state_dict()
        skip = ".attn.bias", ".attn.masked_bias", "lm_head.weight"  # masks, and W a second time
        state = {f"transformer.{k.removeprefix('transformer.')}": v
                 for k, v in state.items() if not k.endswith(skip)}
        try:
            V, d = state["transformer.wte.weight"].shape
            T = len(state["transformer.wpe.weight"])
            by_input = state["transformer.h.0.attn.c_attn.weight"].shape == (d, 3 * d)
        except (KeyError, AttributeError, ValueError) as e:
            raise UserError(f"these are no GPT-2 weights: {e} is missing or no tensor") from None
        n_layer = len({k.split(".")[2] for k in state if k.startswith("transformer.h.")})
        shape = dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=max(1, d // 64),
                     n_embd=d, bias="transformer.ln_f.bias" in state)
        model = cls(PRISMConfig(**(shape | overrides)))
        for name, p in model.transformer.named_parameters(prefix="transformer"):
            value = state.get(name)
            if value is not None and by_input and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                value = value.T                                   # GPT-2 stores (in, out)
            if value is None or value.shape != p.shape:
                found = "nothing" if value is None else tuple(value.shape)
                raise UserError(f"{name}: found {found}, expected {tuple(p.shape)}")
            p.data.copy_(value)
        return model


def draw(logits, temperature, top_k, top_p, rng):
    """logits (B, V) -> one token per row (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / max(temperature, 1e-6)
    if top_k is not None and top_k < logits.size(-1):
        logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0              # the one that crosses top_p stays
    return order.gather(1, torch.multinomial(probs, 1, generator=rng))
