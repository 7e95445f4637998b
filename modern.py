"""A GPT with what lowers the loss per second when a small model is trained for minutes (docs/speedrun.md).

`architecture = "modern"` in a config selects it. It differs from model.py in:

- rotary positions (Su et al. 2021, RoFormer, arXiv 2104.09864) instead of learned ones, in half of each head
- in the other half, the keys of the token before (modded-nanogpt)
- attention to a window of the last tokens (Beltagy et al. 2020, Longformer, arXiv 2004.05150), so that long blocks
  cost little more than short ones
- layer norm on queries and keys (Dehghani et al. 2023, arXiv 2302.05442)
- a gate for each head (Qiu et al. 2025, arXiv 2505.06708), so that a token can leave out what a head found
- the square of ReLU (So et al. 2021, Primer, arXiv 2109.08668) instead of GELU
- layer norms without parameters, except for the last one
- blocks whose output matrices start at zero, and whose queries, keys and values start as the input
- value embeddings (modded-nanogpt; after Zhou et al. 2024, arXiv 2410.17897): in each block, a token adds a learned
  vector of its own to its values. The model does nothing else with these n_layer * V * C parameters, but every
  optimizer step updates them all: they suit small vocabularies
- activations between the matrix products in autocast's dtype, the residual stream included

B: batch size, T: sequence length, C: n_embd, H: n_head, D: C / H, V: vocab_size.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import GPT, CausalSelfAttention

# A factor on value embeddings. It acts like a 16 times larger initial size and, as AdamW's steps do not depend on the
# size of the gradient, like a 16 times higher learning rate. Checkpoints depend on it.
VALUE_SCALE = 16
# Tokens that a token attends to, itself included. Through the blocks, it depends on those of n_layer windows.
# Checkpoints depend on it; tools/formats/gpt.js has it, too.
WINDOW = 128
ROTARY_BASE = 1000  # wavelengths are from 6 to nearly 2 pi * 1,000 tokens


class Modern(GPT):
    """The language model, with GPT's interface, output head and loss, but other layers."""

    def __init__(self, config):
        nn.Module.__init__(self)  # not GPT's, which makes its own layers
        self.config = config
        # The value embeddings of all blocks are one table: one lookup. Muon updates the matrices of the blocks.
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            ve=nn.Embedding(config.vocab_size, config.n_layer * config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.init_weights()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        R = config.n_embd // config.n_head // 2  # rotated dimensions of a head
        frequencies = ROTARY_BASE ** (-torch.arange(0, R, 2) / R)  # (R / 2), in radians per token
        angles = torch.outer(torch.arange(config.block_size), frequencies)  # (block_size, R / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], 1), persistent=False)  # (block_size, R)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], 1), persistent=False)

    def init_weights(self):
        """Embeddings: std 0.02. Gates and matrices into the residual stream: zero. Queries, keys and values: the input
        itself, so that a token attends at first to what followed tokens like it; with random ones, the loss depends
        more on the seed (docs/speedrun.md). Other matrices: orthogonal (Saxe et al. 2014, arXiv 1312.6120).
        """
        C, H = self.config.n_embd, self.config.n_head
        # The halves without positions get the first dimensions, whose variance is largest in computed embeddings.
        identity = torch.eye(C).view(2, H, -1, C).flip(0).transpose(0, 1).reshape(C, C)
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "gate.weight", "bias")):
                nn.init.zeros_(p)
            elif name.endswith("c_attn.weight"):
                p.data.copy_(identity.repeat(3, 1))
            elif ".h." in name and p.dim() == 2:
                nn.init.orthogonal_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def hidden_states(self, idx, positions, cache):
        """Token ids (B, T) at `positions` (T) of the context window -> the output of the last block, (B, T, C)."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # half the memory traffic between the matrix products
        x = self.transformer.drop(x)
        rotation = self.cos[positions, None].to(x.dtype), self.sin[positions, None].to(x.dtype)  # (T, 1, R) each
        value_embeddings = self.transformer.ve(idx).to(x.dtype).chunk(len(self.transformer.h), -1)  # (B, T, C) each
        mask = window_mask(x) if cache is None else None
        for block, value_embedding in zip(self.transformer.h, value_embeddings):
            x = block(x, rotation, value_embedding, mask, cache)
        return x


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each with a residual connection."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation, value_embedding, mask, cache=None):
        """(B, T, C) -> (B, T, C); see Attention for the other arguments."""
        x = x + self.attn(normalize(x), rotation, value_embedding, mask, cache)
        return x + self.mlp(normalize(x))


class Attention(CausalSelfAttention):
    """Multi-head self-attention to the last WINDOW tokens, with normalized queries and keys.

    The first half of a head's dimensions has rotary positions. The second half has no positions; there, the keys are
    those of the token before. So one head can find what followed an earlier occurrence of the token within the window:
    a name is copied. What a head finds is multiplied by its gate, from 0 to 2, which depends on the token's input.
    """

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.n_head, bias=False)

    def forward(self, x, rotation, value_embedding, mask, cache=None):
        """(B, T, C) -> (B, T, C). `value_embedding` (B, T, C) is added to the values; for `rotation` and `mask` see
        `rotate` and `window_mask`.

        With a KVCache, the T tokens follow the cached ones and attend to the last of these too; `mask` is not used.
        """
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qk, v = self.c_attn(x).split([2 * C, C], -1)
        rotated, plain = normalize(qk.view(B, T, 2 * H, D)).chunk(2, -1)  # (B, T, 2H, D / 2) each
        q, k = plain.chunk(2, 2)  # (B, T, H, D / 2) each
        k = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)) if cache is None else cache.previous(k)
        rotated = rotate(rotated, *rotation)
        q, k = torch.cat([rotated[:, :, :H], q], -1), torch.cat([rotated[:, :, H:], k], -1)  # (B, T, H, D) each
        v = torch.add(v, value_embedding, alpha=VALUE_SCALE).view(B, T, H, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D) each
        y = self.attend(q, k, v, mask, cache).transpose(1, 2)  # (B, T, H, D)
        y = y * (2 * torch.sigmoid(self.gate(x)))[..., None]  # by gates (B, T, H), 1 at first
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))

    def attend(self, q, k, v, mask, cache):
        """Attention to the last WINDOW tokens, each itself included, (B, H, T, D) each -> (B, H, T, D)."""
        if cache is None:
            return window_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        k, v = cache.append(k, v, WINDOW)  # (B, H, L, D) each
        return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)


class MLP(model.MLP):
    """Linear to 4C, the square of ReLU, linear back to C."""

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(F.relu(self.c_fc(x)).square()))


def window_attention(q, k, v, mask, dropout):
    """Attention of each token to the last W = WINDOW ones, itself included: q, k, v (B, H, T, D) -> (B, H, T, D).

    The tokens are cut into N groups of W, and each group attends to itself and to the one before. The groups of all
    sequences are one batch. `mask`: see `window_mask`; `dropout`: the probability.
    """
    B, H, T, D = q.shape
    W = min(WINDOW, T)
    q, k, v = (F.pad(x, (0, 0, 0, -T % W)).unflatten(2, (-1, W)).transpose(1, 2) for x in (q, k, v))  # (B, N, H, W, D)
    k, v = (torch.cat([F.pad(x[:, :-1], (0, 0) * 3 + (1, 0)), x], 3) for x in (k, v))  # (B, N, H, 2W, D)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * N, H, W or 2W, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B * N, H, W, D)
    return y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def window_mask(x):
    """What is added to the scores in `window_attention`, 0 or -inf, for x (B, T, C): (B * N, 1, W, 2W)."""
    B, T, _ = x.shape
    W = min(WINDOW, T)
    i, j = torch.arange(W, 2 * W, device=x.device)[:, None], torch.arange(2 * W, device=x.device)
    hidden = ((j > i) | (j <= i - W)).repeat(math.ceil(T / W), 1, 1)  # (N, W, 2W)
    hidden[0, :, :W] = True  # there is no group before the first one
    return torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -math.inf).repeat(B, 1, 1)[:, None]


def normalize(x):
    """Layer norm over the last dimension, without parameters."""
    with torch.autocast(x.device.type, enabled=False):  # on CUDA it would convert to float32: twice the memory
        return F.layer_norm(x, x.shape[-1:])


def rotate(x, cos, sin):
    """Rotary position embedding: x (B, T, H, R); cos, sin (T, 1, R) -> (B, T, H, R)."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def make_model(config):
    """The model of a GPTConfig: a GPT or a Modern, by its `architecture`."""
    return {"gpt2": GPT, "modern": Modern}[config.architecture](config)
