"""The GPT: blocks, forward pass, loss, and generation with a key-value cache.

GPT-2's architecture (Radford et al. 2019): learned positions, norms before the attention and the MLP, GELU, and an
output head that shares the token embedding. Parameters bear GPT-2's names (`transformer.h.0.attn.c_attn.weight`).

B: sequences in a batch, T: tokens in a sequence, C: n_embd, H: n_head, D: C / H, V: vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model."""

    vocab_size: int
    block_size: int = 128
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = True


class KVCache:
    """Keys and values of the tokens read so far, for every layer, with room for one whole block.

    So that a new token costs one token's work. `length` is how many tokens are in it.
    """

    def __init__(self, config, batch_size, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)  # (n_layer, 2, B, H, block_size, D)
        self.length = 0

    def add(self, layer, k, v):
        """Put the keys and values (B, H, T, D) of new tokens behind the others; all of this layer's come back."""
        end = self.length + k.size(2)
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]  # (B, H, end, D) each


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token looks at itself and at earlier tokens only."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)  # (B, H, past + T, D)
        # A single new token may look at everything in the cache; several stand at the start (see GPT.forward).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with GELU (the tanh form, GPT-2's) between them, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP, each reading a normed copy of the residual stream and adding to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """The language model: token ids in, logits or the loss out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # also the weight of the head
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.apply(self._init_weights)
        # GPT-2 scales what each block adds, so that the residual stream does not grow with depth.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_parameters(self):
        """Number of parameters, all embeddings included (the head has none of its own)."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        """Token ids (B, T) → logits (B, T, V); with targets (B, T), their cross-entropy in nats a token instead.

        `reduction="none"` gives the loss of each token, (B, T). With a KVCache, which must be empty unless T is 1,
        the tokens go on from those in it, and only the last token's logits come back, (B, 1, V).
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]  # (B, 1, C)
        x = self.transformer.ln_f(x)
        if targets is None:
            return F.linear(x, self.transformer.wte.weight)  # (B, T, V)
        # Tensor cores are slow on odd shapes such as 50,257 columns.
        logits = padded_logits(x, self.transformer.wte.weight, 64 if x.is_cuda else 1)  # (B, T, V rounded up)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view(B, T)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, end_of_text=None):
        """Go on from token ids (B, T), T at least 1; yields the next token of every sequence, (B,), one at a time.

        `temperature` 0 takes the likeliest token; `top_k` and `top_p` keep only the k likeliest tokens (0: all) and
        the likeliest that together hold a share p of the probability (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751). `generator`, on the model's device, seeds the choice. A sequence that has given
        `end_of_text` gives nothing else after it, and generation stops when all have.

        The model reads the window that begins at `window_start`; when that moves, the window's tokens are read anew.
        Set the model to eval() first: in training mode dropout is on.
        """
        B, block_size = idx.size(0), self.config.block_size
        weight = self.transformer.wte.weight
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        start, cache = None, None
        for _ in range(max_new_tokens):
            if start != window_start(idx.size(1), block_size):
                start = window_start(idx.size(1), block_size)
                cache = KVCache(self.config, B, weight.device, weight.dtype)
            logits = self(idx[:, start + cache.length:], cache=cache)[:, -1]  # (B, V)
            token = choose_token(logits, temperature, top_k, top_p, generator)  # (B,)
            if end_of_text is not None:
                token = token.masked_fill(ended, end_of_text)
                ended |= token == end_of_text
            yield token
            if end_of_text is not None and ended.all():
                return
            idx = torch.cat([idx, token[:, None]], dim=1)


def padded_logits(x, weight, multiple):
    """Logits (B, T, V rounded up to a multiple) of hidden states x (B, T, C) and a head's weight (V, C), for the loss.

    The extra columns have a logit of -inf, so they take no probability and get no gradient, and exist only here.
    """
    padding = -weight.size(0) % multiple
    if not padding:
        return F.linear(x, weight)
    bias = F.pad(weight.new_zeros(weight.size(0)), (0, padding), value=-math.inf)
    return F.linear(x, F.pad(weight, (0, 0, 0, padding)), bias)


def window_start(n, block_size):
    """Where the context window begins when n tokens are there: 0 while they fit, then in steps of half a block.

    So a full block is re-read from its newer half, and the cache then serves for half a block more.
    """
    half = block_size // 2
    return 0 if n <= block_size else half * math.ceil((n - block_size) / half)


def choose_token(logits, temperature, top_k, top_p, generator):
    """Choose one token for each row of logits (B, V): (B,). The settings are those of `GPT.generate`."""
    if temperature < 1e-6:  # 0, or so near that dividing by it overflows
        return logits.argmax(-1)
    k = min(top_k, logits.size(-1)) if top_k else logits.size(-1)
    if k < logits.size(-1) or top_p < 1:
        logits, tokens = logits.topk(k)  # (B, k), largest first
    else:
        tokens = None
    logits = logits.float() - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot give inf - inf
    probs = F.softmax(logits / temperature, dim=-1)  # (B, k)
    if top_p < 1:
        # Keep every token before which less than p has been gathered: always the first.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)
