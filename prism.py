"""PRISM: a GPT whose logits are a sum of named parts (arXiv 2607.00510). The whole model, in one file.

The last hidden state z of a GPT-2 trunk is written as a sparse, non-negative mixture of learned prototypes plus a
residual, z = sum_i a_i p_i + r. The LM head W is linear, so each logit is the residual's share plus one share a prototype.

    python prism.py --prompt="The with statement"                      sample from the model in out/
    python prism.py --prompt="The with statement" --temperature=0      greedy
    python prism.py --prompt="The with statement" --gains=out/gains/examples.json

From Python: model, _ = load_checkpoint("out"); logits, loss = model(idx, targets); model.explain(idx); model.generate(idx, 50)
"""
import base64
import contextlib
import csv
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# ----------------------------------------------------------------------------- configuration

@dataclass
class PRISMConfig:
    block_size: int = 128        # T, tokens the model can look back on
    vocab_size: int = 0          # V; 0 takes the dataset's
    n_layer: int = 4             # transformer blocks
    n_head: int = 3              # attention heads a block
    n_embd: int = 192            # d, width of the residual stream
    dropout: float = 0.0         # on embeddings, attention weights and block outputs
    bias: bool = False           # in linear layers and layer norms; True for GPT-2's weights
    n_proto: int = 1024          # M, prototypes; 0 is the dense twin
    top_k: int = 16              # k, prototypes that may be active at a token
    lambda_rec: float = 0.1      # weight of the reconstruction loss
    lambda_t2p: float = 0.02     # weight of the token-to-prototype clustering loss
    lambda_p2t: float = 0.005    # weight of the prototype-to-token clustering loss
    head_share: float = 0.375    # share of a training batch's windows on which the head's three losses are taken

    def check(self):
        """Raises UserError where the sizes do not fit together."""
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads; choose a multiple")
        if self.n_proto < 0 or (self.n_proto and not 1 <= self.top_k <= self.n_proto):
            raise UserError(f"top_k is {self.top_k}, expected 1 to n_proto ({self.n_proto}); lower --top_k or raise --n_proto")
        if not 0.0 < self.head_share <= 1.0:
            raise UserError(f"head_share is {self.head_share}, expected 0 < head_share <= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")
        return self


# ----------------------------------------------------------------------------- the trunk: GPT-2, with its parameter names

class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.n_head, self.dropout = c.n_head, c.dropout

    def forward(self, x, past=None):
        """x (B, T, d). `past`, a list, holds this block's keys and values of earlier calls and is extended in place."""
        B, T, d = x.shape
        q, k, v = (u.view(B, T, self.n_head, d // self.n_head).transpose(1, 2)  # (B, heads, T, d / heads)
                   for u in self.c_attn(x).split(d, dim=2))
        if past is not None:
            if past:
                assert T == 1, "a past is extended by one token at a time: is_causal would hide it from more"
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            past[:] = k, v
        # On a CPU attention runs in float32 also under bfloat16 autocast: its bfloat16 kernel is two to three times slower.
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else contextlib.nullcontext():
            q, k, v = (u.float() if x.device.type == "cpu" and u.dtype is torch.bfloat16 else u for u in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2),  # one new token may see every key
                                               dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, d))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.dropout = c.dropout

    def forward(self, x):
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, bias=c.bias), CausalSelfAttention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd, bias=c.bias), MLP(c)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------- the prototype head

class Mixture(NamedTuple):
    """What the prototypes say of N tokens: z = reconstruction + residual, reconstruction = sum_j gates[:, j] P[ids[:, j]]."""
    ids: torch.Tensor             # (N, k) prototypes, the most similar first
    gates: torch.Tensor           # (N, k) a = relu(cos), >= 0
    reconstruction: torch.Tensor  # (N, d) zhat
    residual: torch.Tensor        # (N, d) r = z - zhat
    nearest_token: torch.Tensor   # (M,) max_t s_ti, each prototype's similarity to its nearest token
    nearest_proto: torch.Tensor   # (N,) max_i s_ti, each token's similarity to its nearest prototype


class TopSimilarity(torch.autograd.Function):
    """z (N, d), p (M, d), k -> the k largest cosines of each token (N, k), their ids (N, k), each prototype's largest (M,).

    Plain autograd would send a dense (N, M) gradient back through two matrix products. Only N k + M entries of it are
    not zero, so dz is a sparse sum, and one product remains, for dp.
    """
    @staticmethod
    def forward(ctx, z, p, k):
        low = autocast_dtype(z)
        znorm, pnorm = (u.norm(dim=1, keepdim=True).clamp(min=1e-12) for u in (z, p))
        zn, pn = z / znorm, p / pnorm
        s = zn.to(low) @ pn.to(low).T                              # (N, M) cosines
        values, ids = s.topk(k, dim=1)
        best, rows = s.max(0)                                      # (M,) the nearest token of each prototype
        ctx.save_for_backward(zn, pn, znorm, pnorm, ids, rows)
        ctx.mark_non_differentiable(ids)
        ctx.low = low
        return values.to(z.dtype), ids, best.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalues, _, dbest):
        zn, pn, znorm, pnorm, ids, rows = ctx.saved_tensors
        dzn = F.embedding_bag(ids, pn, per_sample_weights=dvalues, mode="sum").index_add_(0, rows, dbest[:, None] * pn)
        ds = torch.zeros(zn.size(0), pn.size(0), dtype=ctx.low, device=zn.device)
        tokens, protos = (torch.arange(len(u), device=zn.device) for u in (zn, pn))
        ds.index_put_((tokens[:, None], ids), dvalues.to(ctx.low))
        ds.index_put_((rows, protos), dbest.to(ctx.low), accumulate=True)
        dpn = (ds.T @ zn.to(ctx.low)).to(pn.dtype)
        dz, dp = (dzn - zn * (zn * dzn).sum(1, keepdim=True)) / znorm, (dpn - pn * (pn * dpn).sum(1, keepdim=True)) / pnorm
        return dz, dp, None


def autocast_dtype(x):
    """The dtype in which autocast would multiply now; x's own outside autocast. Custom functions follow it by hand."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def prototype_head(z, prototypes, top_k):
    """z (N, d), prototypes (M, d) -> Mixture.

    s_ti = cos(z_t, p_i); a_ti = relu(s_ti) for the k largest of t, else 0; zhat_t = sum_i a_ti p_i; r_t = z_t - zhat_t
    """
    values, ids, best = TopSimilarity.apply(z, prototypes, top_k)
    gates = values.relu()
    zhat = F.embedding_bag(ids, prototypes, per_sample_weights=gates, mode="sum")  # never a (N, k, d) tensor
    return Mixture(ids, gates, zhat, z - zhat, best, values[:, 0])


class LinearCrossEntropy(torch.autograd.Function):
    """z (N, d), w (V, d), targets (N,) -> sum over tokens of -log softmax(w z_t)[target_t]; targets of -1 count nothing.

    The (N, V) logits are made, turned into their gradient softmax - onehot and used up a chunk of tokens at a time:
    a chunk stays in the cache, where whole logits would cross the memory bus six times.
    """
    @staticmethod
    def forward(ctx, z, w, targets):
        low = autocast_dtype(z)
        zl, wl, total = z.to(low), w.to(low), z.new_zeros(())
        grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dz, dw = (torch.empty_like(z), torch.zeros_like(w)) if grad else (None, None)
        rows = max(64, (2 ** 20 if z.device.type == "cpu" else 2 ** 26) // w.size(0))        # 4 MB, 256 MB of float32
        for i in range(0, z.size(0), rows):
            zc, y = zl[i:i + rows], targets[i:i + rows, None]
            keep = y >= 0
            y = y.clamp(min=0)
            logp = (zc @ wl.T).to(z.dtype).log_softmax(1)
            total -= (logp.gather(1, y) * keep).sum()
            if grad:
                p = logp.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=z.dtype)).mul_(keep).to(low)
                dz[i:i + rows] = p @ wl
                dw += p.T @ zc
        ctx.save_for_backward(dz, dw)
        return total

    @staticmethod
    @once_differentiable  # dz and dw are constants here: a second derivative would be wrong in silence
    def backward(ctx, g):
        dz, dw = ctx.saved_tensors
        return dz * g, dw * g, None


# ----------------------------------------------------------------------------- the model

@dataclass
class Explanation:
    """The ledger of one logit a token: contributions.sum(-1) + residual == logit. Leading dimensions (B, T), k slices."""
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
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList([Block(c) for _ in range(c.n_layer)]), ln_f=nn.LayerNorm(c.n_embd, bias=c.bias)))
        for name, p in self.named_parameters():  # GPT-2's initialisation: branches shrink with depth
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02)
        if c.n_proto:  # drawn last, so that the twin with n_proto = 0 starts from the very same trunk
            # z has norm sqrt(d) after its layer norm; k prototypes add up to it
            self.prototypes = nn.Parameter(torch.randn(c.n_proto, c.n_embd) / math.sqrt(c.top_k))

    def hidden(self, idx, past=None):
        """idx (B, T) -> z (B, T, d), the state after the last layer norm. `past`: one list a block, for generation."""
        T, start = idx.size(1), past[0][0].size(2) if past and past[0] else 0
        if start + T > self.config.block_size:
            raise UserError(f"{start + T} tokens given, the context holds block_size = {self.config.block_size}; shorten the text")
        t = self.transformer
        x = t.wte(idx) + t.wpe.weight[start:start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(t.h):
            x = block(x, past[i] if past is not None else None)
        return t.ln_f(x)

    def mixture(self, z):
        """z (..., d) -> Mixture over its N = numel / d tokens."""
        return prototype_head(z.reshape(-1, z.size(-1)), self.prototypes, self.config.top_k)

    def turned(self, z, gains=None):
        """z (..., d), gains (M,) or None -> the Mixture of its N tokens, and its gates times the gains (N, k).

        A gain of -inf takes its prototype out of the search for the k most similar: ids and gates are what the others express
        the state by, and the residual stays what it was with all of them.
        """
        m = self.mixture(z)
        if gains is None:
            return m, m.gates
        gains = gains.to(m.gates)
        keep = (gains != -math.inf).nonzero()[:, 0]
        if len(keep) < len(gains):
            if len(keep) < self.config.top_k:
                raise UserError(f"gains leave {len(keep)} prototypes in the search, expected at least top_k = {self.config.top_k}; take fewer out")
            again = prototype_head(z.reshape(-1, z.size(-1)), self.prototypes[keep], self.config.top_k)
            m = m._replace(ids=keep[again.ids], gates=again.gates)
        return m, m.gates * gains[m.ids]

    def under(self, z, gains=None):
        """z (..., d), gains (M,) or None -> the states that W reads, (..., d): r + sum_i g_i a_i p_i = z + sum_i (g_i - 1) a_i p_i"""
        if gains is not None:
            if not self.config.n_proto:
                raise UserError("gains given, but this is a dense model (n_proto = 0); it has no prototypes to turn")
            if gains.shape != (self.config.n_proto,):
                raise UserError(f"gains have shape {tuple(gains.shape)}, expected (n_proto,) = ({self.config.n_proto},)")
            m, turned = self.turned(z, gains)
            fresh = (gains == -math.inf).any()
            change = turned if fresh else turned - m.gates
            change = F.embedding_bag(m.ids, self.prototypes, per_sample_weights=change, mode="sum")
            z = m.residual.view_as(z) + change.view_as(z) if fresh else z + change.view_as(z)
        return z

    def logits(self, z, gains=None):
        """z (..., d), gains (M,) or None -> (..., V): W times the states under the gains."""
        return F.linear(self.under(z, gains), self.transformer.wte.weight)

    def forward(self, idx, targets=None, gains=None, return_terms=False):
        """idx (B, T), targets (B, T) or None (-1 is ignored), gains (M,) or None -> logits, loss

        Without targets: logits (B, 1, V) of the last position, loss None. With targets: logits (B, T, V) and the
        training loss, the weighted sum of the terms below. With return_terms, as the trainer calls it, logits are None
        (they are never held whole), gains play no part, and a third value is a detached (4,) vector of

            ce   next-token cross-entropy, in nats
            rec  mean_t ||z_t - zhat_t||^2 / mean_t ||z_t||^2, the residual's share of energy (the denominator is detached)
            t2p  1 - mean_t max_i s_ti, each token state has a near prototype
            p2t  1 - mean_i max_t s_ti, each prototype has a near token state

        In training mode the last three are taken over the first head_share of the windows.
        """
        z = self.hidden(idx)
        if targets is None:
            return self.logits(z[:, -1:], gains), None
        if return_terms:
            targets, logits = targets.reshape(-1), None
            loss = ce = LinearCrossEntropy.apply(z.flatten(0, 1), self.transformer.wte.weight, targets) / (targets >= 0).sum()
        else:
            logits = self.logits(z, gains)
            loss = ce = F.cross_entropy(logits.flatten(0, 1).to(z.dtype), targets.reshape(-1), ignore_index=-1)
        rec = t2p = p2t = ce.new_zeros(())
        if self.config.n_proto:
            # Slices and residual add back to W z, so the cross-entropy sends no gradient to the prototypes:
            # these three terms shape them, and all four shape the trunk. Windows come in random order, so the first of
            # them stand for all, and the head costs half as much.
            c = self.config
            z = z[:math.ceil(c.head_share * z.size(0))] if self.training else z
            m = self.mixture(z)
            rec = (m.residual.norm() / z.detach().norm()).square()
            t2p, p2t = 1 - m.nearest_proto.mean(), 1 - m.nearest_token.mean()
            loss = ce + c.lambda_rec * rec + c.lambda_t2p * t2p + c.lambda_p2t * p2t
        return (logits, loss, torch.stack((ce, rec, t2p, p2t)).detach()) if return_terms else (logits, loss)

    @torch.no_grad()
    def explain(self, idx, targets=None, gains=None, centered=False):
        """The exact ledger of one logit a token. idx (B, T), targets (B, T) (default: the likeliest next token) -> Explanation

        logit_t = <W_y, r_t> + sum_i g_i a_ti <W_y, p_i>. With `centered`, W_y - mean_v W_v stands for W_y: the
        logit against the mean logit, since softmax does not see a shift that all logits share.
        """
        z = self.hidden(idx)
        logits = self.logits(z, gains)
        targets = logits.argmax(-1) if targets is None else targets
        w = self.transformer.wte.weight[targets]                                                # (B, T, d)
        logit = logits.gather(-1, targets[..., None])[..., 0]
        if centered:
            w, logit = w - self.transformer.wte.weight.mean(0), logit - logits.mean(-1)
        if not self.config.n_proto:
            none = logit.new_zeros(*logit.shape, 0)
            return Explanation(targets, logit, none.long(), none, none, (w * z).sum(-1))
        (m, turned), shape = self.turned(z, gains), (*targets.shape, self.config.top_k)
        slices = (w.flatten(0, 1) @ self.prototypes.T).gather(1, m.ids) * turned               # (N, k) g_i a_ti <W_y, p_i>
        return Explanation(targets, logit, m.ids.view(shape), m.gates.view(shape), slices.view(shape),
                           (w * m.residual.view_as(z)).sum(-1))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, gains=None, stop=None,
                 n_vocab=None, use_cache=True):
        """Continues idx (B, T >= 1) -> (B, T + max_new_tokens), or fewer when every row has drawn the token `stop`.

        temperature 0 is greedy; top_k keeps the likeliest tokens, top_p the smallest set that holds that much
        probability; one seed gives one text. n_vocab: the tokenizer's size, where vocab_size is rounded up beyond it.
        When the context is full, its newer half is kept and read afresh.
        """
        if idx.size(1) < 1 or idx.size(1) > self.config.block_size:
            raise UserError(f"the prompt has {idx.size(1)} tokens, expected 1 to block_size = {self.config.block_size}")
        if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise UserError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected >= 0, >= 1, and in (0, 1]")
        rng = torch.Generator(idx.device)
        rng.manual_seed(seed) if seed is not None else rng.seed()
        training, past, start = self.training, None, 0
        self.eval()
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if idx.size(1) - start > self.config.block_size:
                start, past = idx.size(1) - max(1, self.config.block_size // 2), None
            if past is None or not use_cache:
                new, past = idx[:, start:], [[] for _ in self.transformer.h]
            logits = self.logits(self.hidden(new, past)[:, -1:], gains)[:, -1, :n_vocab].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / max(temperature, 1e-6)
                if top_k is not None and top_k < logits.size(-1):
                    logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
                probs, order = logits.softmax(-1).sort(-1, descending=True)
                if top_p is not None:
                    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the first token that crosses top_p stays
                new = order.gather(1, torch.multinomial(probs, 1, generator=rng))
            idx = torch.cat((idx, new), 1)
            if stop is not None:
                done |= new[:, 0] == stop
                if done.all():
                    break
        self.train(training)
        return idx

    @torch.no_grad()
    def start_prototypes(self, idx):
        """Sets the prototypes to hidden states of the tokens idx (B, T), drawn without replacement while they last, and
        to the one common length that minimises the mean ||z - zhat||^2. For a trunk that is trained already."""
        training = self.training
        z = self.eval().hidden(idx).flatten(0, 1)                                               # (N, d)
        M = self.config.n_proto
        draw = torch.cat([torch.randperm(len(z), device=z.device) for _ in range(-(-M // len(z)))])[:M]
        self.prototypes.copy_(z[draw])
        zhat = self.mixture(z).reconstruction
        self.prototypes.mul_((z * zhat).sum() / zhat.square().sum())
        self.train(training)

    @classmethod
    def from_pretrained(cls, source, tokens=None, **overrides):
        """GPT-2 weights with prototypes attached (retrofit).

        source: a state dict of GPT-2's, a file that holds one (torch.save), or a name such as "gpt2-medium", which
        the optional package transformers fetches. tokens (B, T): text on whose hidden states the prototypes start;
        without it they stay random, and the trainer starts them on its first batch. overrides: PRISMConfig's fields.
        """
        state = source
        if not isinstance(source, dict) and Path(source).is_file():
            state = load_tensors(source)
        elif not isinstance(source, dict):
            try:
                from transformers import GPT2LMHeadModel
            except ImportError:
                raise UserError(f"'{source}' is no file and no folder with a ckpt.pt; a name of GPT-2's family takes: pip install transformers") from None
            state = GPT2LMHeadModel.from_pretrained(source).state_dict()
        state = {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in state.items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}      # masks, and W a second time
        try:
            (V, d), T = state["transformer.wte.weight"].shape, len(state["transformer.wpe.weight"])
            conv = state["transformer.h.0.attn.c_attn.weight"].shape == (d, 3 * d)              # GPT-2 stores (in, out)
        except (KeyError, AttributeError) as e:
            raise UserError(f"these are no GPT-2 weights: {e} is missing or no tensor") from None
        n_layer = len({k.split(".")[2] for k in state if k.startswith("transformer.h.")})
        shape = dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=max(1, d // 64), n_embd=d,
                     bias="transformer.ln_f.bias" in state)
        model = cls(PRISMConfig(**{**shape, **overrides}))
        if conv:
            state = {k: v.T if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v for k, v in state.items()}
        load_weights(model, state, source if not isinstance(source, dict) else "the state dict", trunk_only=True)
        if tokens is not None and model.config.n_proto:
            model.start_prototypes(tokens)
        return model


# ----------------------------------------------------------------------------- files and command lines, for every script

class UserError(ValueError):
    """Something that the user can mend: scripts print its message without a traceback and end with status 2."""


@contextlib.contextmanager
def atomic(path, mode="wb", **kw):
    """Opens a temporary file beside `path` and moves it into place only if the block ends well; else removes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, **kw) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load_tensors(path, device="cpu"):
    """torch.load that runs no code from the file. Raises UserError for a file that is missing, damaged or foreign."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train a model first: python train.py, or --resume one that was stopped before its first evaluation") from None
    except Exception as e:  # a truncated zip, a foreign format, a pickle that asks for code: torch has no common class for them
        raise UserError(f"{path} is damaged, no checkpoint, or asks to run code, and was refused ({type(e).__name__}: {str(e)[:100]}); "
                        "restore it or train again") from None


def load_weights(model, state, where, trunk_only=False):
    """load_state_dict with an error that names what does not fit; trunk_only leaves the prototypes as they are."""
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{where} holds no state dict; expected names and tensors")
    want = {k: tuple(v.shape) for k, v in model.state_dict().items() if not (trunk_only and k == "prototypes")}
    have = {k: tuple(v.shape) for k, v in state.items() if k in want or not trunk_only}
    wrong = [k for k in want | have if want.get(k) != have.get(k)]
    if wrong:
        raise UserError(f"{where}: {len(wrong)} tensors do not fit, first {wrong[0]}: found {have.get(wrong[0])}, expected {want.get(wrong[0])}")
    model.load_state_dict({k: state[k] for k in want}, strict=not trunk_only)


def load_checkpoint(path, device="cpu"):
    """path: a checkpoint or a run's folder (its ckpt.pt) -> (PRISM in eval mode on device, the checkpoint's dict)."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
    ckpt = load_tensors(path, device)
    try:
        if not isinstance(ckpt, dict):
            raise TypeError(f"it is a {type(ckpt).__name__}")
        model, state = PRISM(PRISMConfig(**ckpt["config"])), ckpt["model"]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
        raise UserError(f"{path} holds no PRISM checkpoint ({e}); expected a dict with 'model' and 'config', as train.py writes") from None
    load_weights(model, state, path)
    return model.to(device).eval(), ckpt


def fingerprint(state):
    """sha256 (hex) of a model's weights: the same for every file that holds them. state: a state dict."""
    h = hashlib.sha256()
    for name in sorted(state):
        h.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        h.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def load_gains(path, model):
    """A gains file {"checkpoint": fingerprint, "ids": [...], "gains": [...], ...} -> (M,) float tensor, 1 where unnamed. In a file
    of {"mode": "reselect"} a gain of 0 becomes -inf, as PRISM.turned has it. "one.json,two.json" composes: the gains are multiplied.

    Raises UserError if the file is damaged, names unknown prototypes, or was made for other weights than `model`'s.
    """
    if "," in str(path) and not Path(path).exists():
        parts = torch.stack([load_gains(p, model) for p in str(path).split(",")])
        product = parts.masked_fill(parts == -math.inf, 1.0).prod(0)
        if not product.isfinite().all():
            raise UserError(f"{path}: the product of these gains is not finite; turn them down")
        return product.masked_fill((parts == -math.inf).any(0), -math.inf)
    if not Path(path).is_file():
        raise UserError(f"no gains file {str(path)!r}; expected a path such as out/gains/examples.json, which python suppress.py find --name=examples writes")
    try:
        about = json.loads(Path(path).read_text("utf-8"))
        ids, values, owner, mode = about["ids"], torch.tensor(about["gains"], dtype=torch.float32), about["checkpoint"], about.get("mode", "zero")
        ok = all(type(i) is int for i in ids) and values.shape == (len(set(ids)),) == (len(ids),) and values.isfinite().all()
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, RuntimeError) as e:
        raise UserError(f"{path} is no gains file ({type(e).__name__}: {e}); expected JSON with checkpoint, ids and gains") from None
    M = model.config.n_proto
    if not M:
        raise UserError(f"{path} turns prototypes, but this is a dense model (n_proto = 0)")
    if not ok or any(not 0 <= i < M for i in ids):
        raise UserError(f"{path}: expected as many finite gains as ids, and different ids from 0 to {M - 1}")
    if mode not in ("zero", "reselect"):
        raise UserError(f"{path}: mode is {str(mode)[:40]!r}, expected zero or reselect")
    if owner != fingerprint(model.state_dict()):
        raise UserError(f"{path} was made for another checkpoint ({str(owner)[:12]}); make it again for this one")
    gains = torch.ones(M, device=model.prototypes.device)
    gains[torch.tensor(ids, dtype=torch.long)] = values.to(gains.device)
    return gains.masked_fill(gains == 0, -math.inf) if mode == "reselect" else gains


def read_metrics(path):
    """The rows of a metrics.csv, numbers or None; [] where there is no file. Raises UserError if it is damaged."""
    if not Path(path).exists():
        return []
    try:
        with open(path, newline="") as f:
            rows = [{k: (int(v) if v.isdigit() else float(v)) if v else None for k, v in row.items()} for row in csv.DictReader(f)]
            assert all({"step", "tokens"} <= row.keys() for row in rows)
            return rows
    except (ValueError, TypeError, AssertionError, csv.Error) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__} {e}); restore it, or move it away to start a new one") from None


def load_tokenizer(folder):
    """The tiktoken.Encoding of a prepared dataset or a run: its files tokenizer.tiktoken (ranks) and tokenizer.json."""
    import tiktoken
    folder = Path(folder)
    try:
        about = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in lines)}
        numbers = {*ranks.values(), about["eot"]}
        if len(numbers) != len(lines) + 1 or not 0 <= min(numbers) <= max(numbers) < 2 ** 31:  # tiktoken would panic
            raise ValueError("two tokens share a number, or one is out of range")
        return tiktoken.Encoding(about["name"], pat_str=about["pattern"], mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": about["eot"]})
    except FileNotFoundError as e:
        raise UserError(f"no tokenizer in {folder} ({Path(e.filename).name} is missing); run: python data/prepare.py") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"the tokenizer in {folder} is damaged ({e}); run: python data/prepare.py") from None


def load_dataset(folder):
    """A prepared dataset -> (train, val, meta): two read-only memory maps of tokens and the dict of meta.json.

    Raises UserError where a file is missing or empty, or disagrees with meta.json in size, type or hash.
    """
    folder, again = Path(folder), "run: python data/prepare.py"
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]]
        counts = {s: meta[s]["tokens"] for s in ("train", "val")}
        hashes, arrays = dict(meta["sha256"]), {}
    except FileNotFoundError:
        raise UserError(f"no prepared dataset in {folder} (meta.json is missing); {again}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/meta.json is damaged ({type(e).__name__}: {e}); {again}") from None
    for split, count in counts.items():
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.exists() else -1
        if size != count * np.dtype(dtype).itemsize or count < 1:
            raise UserError(f"{path} is {'missing' if size < 0 else f'{size} bytes'}; meta.json promises {count} tokens of "
                            f"{meta['dtype']}, {count * np.dtype(dtype).itemsize} bytes; {again}")
        if size < 2 ** 28 and hashlib.sha256(path.read_bytes()).hexdigest() != hashes.get(path.name):
            raise UserError(f"{path} differs from the sha256 in meta.json; {again}")
        arrays[split] = np.memmap(path, dtype=dtype, mode="r")
    return arrays["train"], arrays["val"], meta


def dataset_folder(name):
    """A dataset's name or path -> its folder: the path where there is one, else the folder under data/."""
    return Path(name) if Path(name).is_dir() else Path(__file__).resolve().parent / "data" / name


def window_starts(n_tokens, block_size, seed, epoch):
    """First tokens of the training windows of one epoch, in the order in which training reads them: (W,) int64.

    A pure function of its arguments, so resuming, any number of ranks and attribution see the same sequences. Windows
    do not overlap; each epoch shifts them by its own offset below block_size, so that documents meet other positions.
    """
    if n_tokens < 2 * block_size:
        raise UserError(f"{n_tokens} training tokens do not fill two windows of block_size = {block_size}; give more text or lower --block_size")
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(block_size)
    return offset + block_size * rng.permutation((n_tokens - block_size) // block_size)


def pick_device(name):
    """'auto', 'cpu', 'cuda[:i]' or 'mps' -> torch.device. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={name} cannot be used here ({str(e).splitlines()[0]}); expected auto, cpu, cuda or mps") from None
    return device


def set_up_ranks(name):
    """name of a device -> rank, number of ranks, device. Under torchrun starts NCCL where there is CUDA, gloo elsewhere."""
    if "RANK" not in os.environ:
        return 0, 1, pick_device(name)
    local = int(os.environ["LOCAL_RANK"])
    cuda = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    device = pick_device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous
    # torchrun keeps one store over its restarts: without a prefix a new rank may read the address of one that died
    store, rank, ranks = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
    return rank, ranks, device


def parse_config(cls, argv):
    """Fills the dataclass `cls` from `--key=value` words and TOML files, left to right, later ones winning.

    `--help` lists every field with its default and the comment beside it. Raises UserError for an unknown key
    (naming the nearest), a value of the wrong type, or a file that is missing or no TOML.
    """
    kinds = {f.name: {"int": int, "float": float, "bool": bool, "str": str}.get(f.type, f.type) for f in fields(cls)}
    cfg = cls()

    def put(key, value, where):
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}: unknown option '{key}'; the nearest is '{near}'. --help lists all")
        kind, found = kinds[key], value
        if isinstance(value, str) and kind is not str:
            try:
                value = {"true": True, "1": True, "false": False, "0": False}[value.lower()] if kind is bool else kind(value)
            except (KeyError, ValueError):
                pass
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{where}: {key} takes {kind.__name__}, found {found!r}")
        setattr(cfg, key, value)

    for word in argv:
        if word in ("-h", "--help"):
            notes = {}
            for base in reversed(cls.__mro__[:-1]):  # the comment beside a field is its help
                notes.update(re.findall(r"^    (\w+)\s*:.*?#\s*(.*)$", inspect.getsource(base), re.M))
            print(sys.modules[cls.__module__].__doc__, *(f"  --{f.name + '=' + str(f.default):<32} {notes.get(f.name, '')}"
                                                         for f in fields(cls)), sep="\n")
            raise SystemExit(0)
        if word.startswith("--"):
            key, eq, value = word[2:].partition("=")
            if not eq and kinds.get(key) is not bool:
                if key in kinds:
                    raise UserError(f"'{word}' has no value; write {word}=VALUE")
            put(key, value if eq else "true", "command line")
        else:
            try:
                table = tomllib.loads(Path(word).read_text("utf-8"))
            except OSError:
                raise UserError(f"'{word}' is neither an option (--key=value) nor a file of options; config/ holds the presets") from None
            except ValueError as e:
                raise UserError(f"{word} is no TOML ({e}); write one `key = value` a line") from None
            for key, value in table.items():
                put(key, value, word)
    if getattr(cfg, "seed", 0) < 0:
        raise UserError(f"seed is {cfg.seed}, expected 0 or more")
    return cfg


def plain(text, keep=""):
    """Text of others for a terminal: what is not printable, but for the characters `keep`, is written as an escape, and cannot act."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def run_command(commands, doc, argv):
    """Subcommands first: commands {name: function of the words behind it}. Without one, or with --help, prints doc."""
    if not argv or argv[0] not in commands:
        print(doc)
        if argv and argv[0] in ("-h", "--help"):
            return
        raise UserError(f"{'no command' if not argv else repr(argv[0])}; expected {', '.join(commands)}, each with --help")
    commands[argv[0]](argv[1:])


def run_main(main):
    """Calls main(sys.argv[1:]); what the user can mend becomes one line on standard error and exit status 2."""
    status = 0
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except SystemExit as e:
        status = e.code if isinstance(e.code, (int, type(None))) else 1
        if status == 1 and e.code != 1:
            print(e.code, file=sys.stderr)
    if "RANK" in os.environ:  # gloo's threads may still want the interpreter while it shuts down, which aborts a run that is finished
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)


# ----------------------------------------------------------------------------- sampling

@dataclass
class SampleConfig:
    prompt: str = "\n"           # the text to continue
    out_dir: str = "out"         # the run to sample from
    max_new_tokens: int = 100    # length of the continuation
    num_samples: int = 1         # continuations, each with the next seed
    temperature: float = 0.8     # 0 is greedy
    top_k: int = 0               # keep the likeliest tokens only; 0 keeps all
    top_p: float = 1.0           # keep the smallest set of tokens with this probability
    seed: int = 1337             # one seed, one text
    gains: str = ""              # a gains file that turns prototypes up or down; several with commas between
    device: str = "auto"         # auto, cpu, cuda or mps


def main(argv):
    cfg = parse_config(SampleConfig, argv)
    device = pick_device(cfg.device)
    model, _ = load_checkpoint(cfg.out_dir, device)
    tokenizer = load_tokenizer(cfg.out_dir)
    ids = tokenizer.encode_ordinary(cfg.prompt)
    if not ids:
        raise UserError("the prompt is empty; give at least one character: --prompt=\"The\"")
    gains = load_gains(cfg.gains, model) if cfg.gains else None
    for i in range(cfg.num_samples):
        out = model.generate(torch.tensor([ids], device=device), cfg.max_new_tokens, cfg.temperature, cfg.top_k or None,
                             cfg.top_p, cfg.seed + i, gains, tokenizer.eot_token, tokenizer.n_vocab)[0].tolist()
        print(tokenizer.decode([t for t in out if t != tokenizer.eot_token]))
        if i + 1 < cfg.num_samples:
            print("-" * 20)


if __name__ == "__main__":
    run_main(main)
