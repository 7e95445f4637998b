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

from layers import Dropout, Int8Linear, Linear, attend, head_loss, linear


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

    def num_parameters(self):
        """Parameters of the model, known before it is made."""
        C, bias = self.n_embd, int(self.bias)
        block = 12 * C * C + 2 * C + bias * 11 * C  # two norms; C → 3C, C → C, C → 4C and 4C → C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + C + bias * C


class KVCache:
    """Keys and values of the tokens read so far, for every layer, with room for one whole block.

    So that a new token costs one token's work. Where it stands is kept on the device, and on a GPU every step has the
    same shapes: it can then be recorded once and played again and again.
    """

    def __init__(self, config, batch_size, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.block_size, config.n_head, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, 2, B, block_size, H, D)
        self.length = torch.zeros((), dtype=torch.long, device=device)  # tokens in the cache
        self.slots = torch.arange(config.block_size, device=device)
        self.positions = self.mask = None  # of the tokens that are being read: (T), (T, used)
        self.used = config.block_size  # slots that attention goes over
        self.fixed_shapes = self.kv.is_cuda

    def advance(self, T):
        """Make ready for T more tokens, which go behind those that are there."""
        self.positions = self.length + self.slots[:T]
        later = self.slots > self.positions[:, None]  # a token sees itself and what is before it
        self.mask = torch.zeros(later.shape, device=later.device, dtype=self.kv.dtype).masked_fill(later, -math.inf)
        self.length += T
        if not self.fixed_shapes:
            self.used = int(self.length)
            self.mask = self.mask[:, :self.used]

    def add(self, layer, k, v):
        """Put in the keys and values (B, H, T, D) of new tokens; those of the layer's used slots come back."""
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys.index_copy_(1, self.positions, k.transpose(1, 2))
        values.index_copy_(1, self.positions, v.transpose(1, 2))
        return keys[:, :self.used].transpose(1, 2), values[:, :self.used].transpose(1, 2)  # (B, H, used, D) each


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token looks at itself and at earlier tokens only."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            y = F.scaled_dot_product_attention(q, *cache.add(self.layer, k, v), attn_mask=cache.mask)
        elif self.training and x.device.type == "cpu":
            y = attend(q, k, v, self.attn_dropout)
        else:
            dropout = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with GELU (the tanh form, GPT-2's) between them, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

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

    head_loss = staticmethod(head_loss)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # also the weight of the head
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.int8_head = None  # see to_int8
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

    def to_int8(self):
        """Turn every matrix into int8, for generating on a CPU; the rest becomes bfloat16. Comes back itself.

        Only `forward` with a cache, or without targets, works after it.
        """
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child.weight, child.bias))
        self.int8_head = Int8Linear(self.transformer.wte.weight)
        return self.bfloat16()

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        """Token ids (B, T) → logits (B, T, V); with targets (B, T), their cross-entropy in nats a token instead.

        `reduction="none"` gives the loss of each token, (B, T), without a gradient. With a KVCache the tokens go on
        from those in it, and only the last token's logits come back, (B, 1, V).
        """
        B, T = idx.shape
        if cache is not None:
            cache.advance(T)
        positions = cache.positions if cache is not None else torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C)
        x = self.transformer.ln_f(x)
        if targets is not None:
            mean, losses = self.head_loss(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten())
            return mean if reduction == "mean" else losses.view(B, T)
        return self.int8_head(x) if self.int8_head else linear(x, self.transformer.wte.weight)  # (B, T, V)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, end_of_text=None,
                 with_logits=False):
        """Go on from token ids (B, T), T at least 1; yields the next token of every sequence, (B,), one at a time.

        `temperature` 0 takes the likeliest token; `top_k` and `top_p` keep only the k likeliest tokens (0: all) and
        the likeliest that together hold a share p of the probability (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751). `generator`, on the model's device, seeds the choice. A sequence that has given
        `end_of_text` gives nothing else after it, and generation stops when all have. `with_logits` yields pairs: the
        tokens (B,), and the logits (B, V) that they were chosen by, which are good until the next step.

        The model reads the window that begins at `window_start`; when that moves, the window's tokens are read anew.
        Set the model to eval() first: in training mode dropout is on.
        """
        B, block_size = idx.size(0), self.config.block_size
        weight = self.transformer.wte.weight
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        cache = KVCache(self.config, B, weight.device, weight.dtype)
        read_one = self.record_step(cache) if weight.is_cuda else lambda token: self(token, cache=cache)
        start = None
        for _ in range(max_new_tokens):
            if start == window_start(idx.size(1), block_size):
                logits = read_one(idx[:, -1:])  # (B, 1, V)
            else:
                start = window_start(idx.size(1), block_size)
                cache.length.zero_()
                logits = self(idx[:, start:], cache=cache)
            token = choose_token(logits[:, -1], temperature, top_k, top_p, generator)  # (B,)
            if end_of_text is not None:
                token = token.masked_fill(ended, end_of_text)
                ended |= token == end_of_text
            yield (token, logits[:, -1]) if with_logits else token
            if end_of_text is not None and ended.all():
                return
            idx = torch.cat([idx, token[:, None]], dim=1)

    def record_step(self, cache):
        """Reading one token, recorded as a CUDA graph: a function of tokens (B, 1) → logits (B, 1, V).

        A step is some two hundred small kernels, and launching them one by one takes longer than running them. The
        cache must be empty; the logits are good until the next call.
        """
        tokens = torch.zeros(cache.kv.size(2), 1, dtype=torch.long, device=cache.kv.device)
        with torch.cuda.device(tokens.device):  # another thread than the main one has its own current device
            self(tokens, cache=cache)  # not recorded: CUDA's libraries initialize in it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self(tokens, cache=cache)

        def read_one(new):
            tokens.copy_(new)
            graph.replay()
            return logits
        return read_one


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
        logits, tokens = largest(logits, k)  # (B, k) each, largest first
    else:
        tokens = None
    logits = logits.float() - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot give inf - inf
    probs = F.softmax(logits / temperature, dim=-1)  # (B, k)
    if top_p < 1:
        # Keep every token before which less than p has been gathered: always the first.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)


def largest(logits, k, n=16):
    """`logits.topk(k)` for few of many, several times faster: the values (B, k) and their tokens (B, k).

    The logits stand in columns of n; the k largest are within the k columns whose best are the largest.
    """
    B, V = logits.shape
    if 4 * n * k > V:
        return logits.topk(k)
    size = V // n  # columns; the last V % n tokens are in none
    best = logits[:, :n * size].unflatten(1, (n, size)).amax(1).topk(k, sorted=False).indices  # (B, k)
    tokens = (best[:, None] + torch.arange(0, n * size, size, device=best.device)[:, None]).flatten(1)  # (B, n * k)
    rest = torch.arange(n * size, V, device=best.device).expand(B, -1)
    tokens = torch.cat([tokens, rest], 1)
    values, places = logits.gather(1, tokens).topk(k)
    return values, tokens.gather(1, places)
