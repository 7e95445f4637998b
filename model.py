"""The published GPT, in plain PyTorch: GPT-2's architecture (Radford et al. 2019) with learned positions, pre-norm
blocks, GELU, and an output head tied to the token embedding.

Parameters have GPT-2's names (`transformer.h.0.attn.c_attn.weight`). Nothing here is written for speed: what makes it
fast is in storygpt/fast.py and storygpt/loss.py, and computes the same, whatever you change here.

B: batch size, T: sequence length, C: n_embd, H: n_head, D: C / H, V: vocab_size.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


def setting(default, meaning, **rules):
    """A dataclass field with its line in --help-all and its rules, such as low=1 (storygpt/settings.py)."""
    return field(default=default, metadata={"meaning": meaning, **rules})


@dataclass(frozen=True)
class ModelSettings:
    """The settings that determine the architecture, for config files and the command line.

    A field added here is a new setting, and is stored in checkpoints; those saved before have its default.
    """

    architecture: Literal["gpt2", "modern"] = setting(
        "gpt2", "gpt2: the published GPT, in model.py; modern: for small vocabularies and few tokens, in modern.py")
    n_layer: int = setting(6, "number of blocks", low=1, high=1000)
    n_head: int = setting(6, "attention heads per block", low=1)
    n_embd: int = setting(384, "embedding dimension, a multiple of n_head", low=1, high=2**20)
    block_size: int = setting(128, "length of a sequence in tokens; also of the context window", low=2)
    dropout: float = setting(0.1, "probability of dropping an activation in training", low=0, high=0.99)
    bias: bool = setting(True, "biases in linear layers and layer norms")
    gelu: Literal["tanh", "exact"] = setting("tanh", "GELU of gpt2: tanh approximation, or exact, as in nanoGPT")


@dataclass(frozen=True)
class GPTConfig(ModelSettings):
    """Architecture of a model."""

    vocab_size: int = 50_257  # that of the dataset's tokenizer


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a causal mask."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C). With a KVCache, the T tokens follow the cached ones and attend to them too."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D) each
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v, cache):
        """Attention of queries q to keys k and values v, (B, H, T, D) each -> (B, H, T, D), and to the cached ones."""
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, L, D) each
            return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class MLP(nn.Module):
    """Linear to 4C, GELU, linear back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = {"tanh": "tanh", "exact": "none"}[config.gelu]  # torch's names
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each with a residual connection."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: token ids -> logits or loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.init_weights()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

    def init_weights(self):
        """GPT-2's: std 0.02, for projections into the residual stream less, so that it does not grow with depth."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self):
        """Number of parameters, including all embeddings; the tied head has none of its own."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T) -> logits (B, T, V); with targets (B, T), the mean loss in nats/token instead.

        Targets of -1 are ignored. With a KVCache (storygpt/generate.py), the tokens follow the cached ones, and only
        the logits of the last token are returned, (B, 1, V). Raises ValueError for more than `block_size` tokens.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size = {self.config.block_size}")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.advance(T)
        x = self.hidden_states(idx, positions, cache)  # (B, T, C)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden_states(self, idx, positions, cache):
        """Token ids (B, T) at `positions` (T) of the context window -> the output of the last block, (B, T, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        return x
