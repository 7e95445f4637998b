"""The GPT: blocks, forward pass, loss, and generation with a key-value cache.

GPT-2's architecture (Radford et al. 2019): learned positions, pre-norm blocks, GELU, and an output head tied to the
token embedding. Parameters have GPT-2's names (`transformer.h.0.attn.c_attn.weight`).

B: batch size, T: sequence length, C: n_embd, H: n_head, D: C / H, V: vocab_size.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import (Dropout, Embedding, Int8Linear, Linear, UsedTokens, causal_attention, fused_linear_cross_entropy,
                    fused_loss_bytes, linear, tokens_with_own_rows)


@dataclass
class GPTConfig:
    """Architecture of a model. All fields but vocab_size are settings, with the same defaults as in `config.Config`.

    A checkpoint that was saved before a field was added gets the field's default.
    """

    vocab_size: int
    block_size: int = 128
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = True
    gelu: str = "tanh"
    architecture: str = "gpt2"  # or "modern": see modern.py

    @classmethod
    def from_settings(cls, settings, vocab_size):
        """The GPTConfig of a config.Config: every field except vocab_size is the setting of the same name."""
        names = [field.name for field in fields(cls) if field.name != "vocab_size"]
        return cls(vocab_size, **{name: getattr(settings, name) for name in names})

    def training_bytes(self, parameters, device_type, dtype):
        """Estimated memory for training with matrix products in `dtype`, in bytes: (fixed, per sequence).

        The fixed part is the buffers of the loss and, for each parameter, at most 24 bytes: the weight, the gradient,
        its copy for the all-reduce, AdamW's two moments and autocast's copy of the weight. A sequence's part is the
        activations kept for the backward pass. On a CPU they were measured in bfloat16 (docs/speed.md) and include the
        weights of attention; on CUDA they are what autograd saves, and one layer more for all outside of the blocks.
        """
        fixed = 24 * parameters + fused_loss_bytes(self.n_embd, self.vocab_size, device_type, dtype)
        per_token = self.n_layer * (65 * self.n_embd + 8 * self.n_head * self.block_size)
        if device_type == "cuda":
            per_width = 10 + 14 * dtype.itemsize if self.architecture == "gpt2" else 3 + 19 * dtype.itemsize
            per_token = (self.n_layer + 1) * per_width * self.n_embd
        return fixed, per_token * self.block_size


class KVCache:
    """Keys and values of the tokens processed so far, for every layer, with room for one block.

    On a GPU the length is only known to the device, and every decoding step has the same tensor shapes, so that the
    step can be captured as a CUDA graph. Gradients do not pass through the cache: use it under no_grad or
    inference_mode.
    """

    def __init__(self, config, batch_size, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (2 * config.n_layer, batch_size, config.block_size, config.n_head, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # (2 * n_layer, B, block_size, H, D): k, v, k, v, …
        self.length = torch.zeros((), dtype=torch.long, device=device)  # number of tokens in the cache
        self.slots = torch.arange(config.block_size, device=device)
        self.positions = None  # of the new tokens, counted from the start of the context window: (T)
        self.mask = None  # added to their attention scores: (T, kv_length); None if they attend to all slots read
        # Views of the keys and of the values of each layer, 2 * n_layer tensors each:
        self.write_views = None  # the slots of the new tokens, (B, T, H, D); with fixed shapes, all slots
        self.read_views = None  # the slots that attention reads, (B, H, kv_length, D)
        self.fixed_shapes = self.kv.is_cuda

    def advance(self, T):
        """Prepare for the next T tokens. Call it once before the layers' `append`."""
        self.positions = self.length + self.slots[:T]
        self.length += T
        # Views for all layers at once, because on a CPU each of the small operations of a token counts.
        kv_length = self.kv.size(2) if self.fixed_shapes else int(self.length)
        self.read_views = self.kv[:, :, :kv_length].transpose(2, 3).unbind()
        self.write_views = (self.kv if self.fixed_shapes else self.kv[:, :, kv_length - T:kv_length]).unbind()
        self.mask = None
        if T > 1 or self.fixed_shapes:
            future_mask = self.slots[:kv_length] > self.positions[:, None]  # (T, kv_length)
            self.mask = torch.zeros(future_mask.shape, device=self.kv.device, dtype=self.kv.dtype)
            self.mask.masked_fill_(future_mask, -math.inf)

    def keep(self, rows):
        """Drop all sequences of the batch but those where `rows`, a bool tensor (B), is true."""
        self.kv = self.kv[:, rows]

    def append(self, layer, k, v):
        """Store the keys and values (B, T, H, D) of new tokens; returns the layer's, (B, H, kv_length, D) each."""
        keys, values = 2 * layer, 2 * layer + 1
        if self.fixed_shapes:
            self.write_views[keys].index_copy_(1, self.positions, k)
            self.write_views[values].index_copy_(1, self.positions, v)
        else:
            self.write_views[keys].copy_(k)
            self.write_views[values].copy_(v)
        return self.read_views[keys], self.read_views[values]


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a causal mask."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C). With a KVCache, the T tokens follow the cached ones and attend to them too."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D) each
        y = self.attend(q, k, v, cache)  # (B, T, H, D)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))

    def attend(self, q, k, v, cache):
        """Attention of queries q to keys k and values v, (B, T, H, D) each -> (B, T, H, D), and to those in a KVCache.

        Uses the fastest function for the device.
        """
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, kv_length, D) each
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=cache.mask)  # (B, H, T, D)
            return y.transpose(1, 2)  # (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D) each
        if self.training and q.device.type == "cpu":
            y = causal_attention(q, k, v, self.attn_dropout)
        else:
            dropout = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return y.transpose(1, 2)  # (B, T, H, D)


class MLP(nn.Module):
    """Linear to 4C, GELU (the tanh approximation, as in GPT-2, or exact, as in nanoGPT), linear back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = {"tanh": "tanh", "exact": "none"}[config.gelu]  # torch's names
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)"""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each with a residual connection."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: token ids -> logits or loss."""

    loss_function = staticmethod(fused_linear_cross_entropy)  # layers.linear_cross_entropy is the plain one to change

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(self._make_layers(config))
        self.head = self.head_tokens = None  # see for_inference
        self.used_tokens = None  # see skip_unused_tokens
        if not self.transformer.wte.weight.is_meta:  # counting parameters needs no values
            self._init_weights()

    @staticmethod
    def _make_layers(config):
        """The layers of a GPTConfig, by GPT-2's names."""
        return dict(
            wte=Embedding(config.vocab_size, config.n_embd),  # also the weight of the output head
            wpe=Embedding(config.block_size, config.n_embd),
            drop=Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        )

    def _init_weights(self):
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

    def load_pretrained(self, weights):
        """Load the state dict of a model whose block may be longer: its extra position embeddings are dropped.

        Raises RuntimeError if names or other dimensions differ.
        """
        position_embeddings = "transformer.wpe.weight"
        self.load_state_dict({name: w[:self.config.block_size] if name == position_embeddings else w
                              for name, w in weights.items()})

    def for_inference(self, device, dtype):
        """Convert for generating stories: to a device, and the weights to a torch.dtype. Returns self.

        torch.int8 works on a CPU only, with float32 activations. Matrix products then round their input with one scale
        for the whole batch, so that a story depends slightly on the others.

        Afterwards the model can only generate: it cannot be trained, moved, saved or converted again. Its logits are
        those of the U tokens in `head_tokens`, (B, T, U). Tokens with equal embeddings, as those that never occurred
        have after training from random weights, are left out: the head is cheaper, and they are never generated.
        """
        self.eval()
        self.head_tokens = tokens_with_own_rows(self.transformer.wte.weight.detach().cpu()).to(device)  # (U)
        self.to(device, None if dtype == torch.int8 else dtype)
        head_weight = self.transformer.wte.weight.detach()[self.head_tokens]  # (U, C)
        self.head = Int8Linear(head_weight).forward if dtype == torch.int8 else partial(linear, weight=head_weight)
        for block in self.transformer.h:
            for module in list(block.modules()):
                for name, child in list(module.named_children()):
                    if dtype == torch.int8 and isinstance(child, Linear):
                        child = Int8Linear(child.weight, child.bias)
                    # Not a module but its function: calling modules is a tenth of the time of a token on a CPU.
                    delattr(module, name)
                    setattr(module, name, child.forward)
        return self

    @torch.no_grad()
    def set_embeddings(self, embeddings):
        """Start from token embeddings (V, C) whose rows have a mean square of 1, instead of random ones.

        They are scaled to ten times the std of random ones, so that training does not change them quickly; the last
        norm's gain is a tenth, so that the logits are no larger.
        """
        self.transformer.wte.weight.copy_(0.2 * embeddings)
        self.transformer.ln_f.weight.fill_(0.1)

    def skip_unused_tokens(self, used, equalize):
        """Make training cheaper if it uses a part of the vocabulary: `used`, a bool tensor (V). See `UsedTokens`.

        `equalize` sets the embeddings of unused tokens to zero. Without it, nothing is done unless they are equal.
        """
        weight = self.transformer.wte.weight
        unused = ~used.to(weight.device)
        if not unused.any():
            return
        with torch.no_grad():
            if equalize:
                weight[unused] = 0  # other values would add up to a large gradient of the hidden states
            if (weight[unused] == weight[unused][0]).all():
                self.used_tokens = UsedTokens(~unused)

    def loss(self, x, targets):
        """Hidden states x (N, C), targets (N) -> the mean loss, and the loss of each token (N) without a gradient."""
        weight = self.transformer.wte.weight
        if self.used_tokens is None:
            return self.loss_function(x, weight, targets)
        rows, targets = self.used_tokens.head(weight, targets)
        return self.loss_function(x, rows, targets, len(self.used_tokens.unused))

    def forward(self, idx, targets=None, cache=None, reduction="mean"):
        """Token ids (B, T) -> logits (B, T, V), or (B, T, U) after `for_inference`; with targets (B, T), the mean loss
        in nats/token instead.

        `reduction="none"` returns the loss of each token, (B, T), without a gradient, for evaluation. With a KVCache,
        the tokens follow the cached ones, and only the logits of the last token are returned, (B, 1, V). Targets of -1
        are ignored. Raises ValueError for more than `block_size` tokens.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size = {self.config.block_size}")
        if cache is not None:
            cache.advance(T)
        positions = cache.positions if cache is not None else torch.arange(T, device=idx.device)
        x = self.hidden_states(idx, positions, cache)  # (B, T, C)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C)
        x = self.transformer.ln_f(x)  # (B, T, C)
        if targets is not None:
            mean, losses = self.loss(x.flatten(0, 1), targets.flatten())
            return mean if reduction == "mean" else losses.view(B, T)
        return self.head(x) if self.head else linear(x, self.transformer.wte.weight)  # (B, T, V)

    def hidden_states(self, idx, positions, cache):
        """Token ids (B, T) at `positions` (T) of the context window -> the output of the last block, (B, T, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        return x

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, end_of_text=None,
                 with_logits=False):
        """Continue token ids (B, T), T >= 1; yields the next token of every sequence, (B), one step at a time.

        `temperature` 0 selects the most likely token. `top_k` samples from the k most likely tokens (0: all), `top_p`
        from the most likely tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751). `generator` is on the model's device. After `end_of_text` a sequence yields only
        `end_of_text`, and generation stops when all sequences have ended. `with_logits` yields pairs: the tokens (B)
        and the logits (B, V) they were sampled from, valid until the next step.

        The model reads the context window that begins at `window_start`; the cache is recomputed when that moves.
        Sequences that have ended are dropped from the batch, except on CUDA and with `with_logits`. The random numbers
        of the others depend on that.
        Call eval() first: dropout is active in training mode.
        """
        weight = self.transformer.wte.weight
        cache = KVCache(self.config, len(idx), weight.device, weight.dtype)
        decode = self.capture_decode_graph(cache) if weight.is_cuda else lambda token: self(token, cache=cache)
        rows = torch.arange(len(idx), device=idx.device)  # which of the B sequences are in the cache, (b)
        token = ended = None  # the last token of each sequence in the cache, and whether it has ended, (b)
        running = len(idx)  # number of sequences that have not ended
        tokens = torch.zeros_like(rows)  # the last tokens of all sequences, (B)
        start = None  # of the context window in the cache
        steps = []  # tokens that are not in idx yet, (B, 1) each
        for n in range(idx.size(1), idx.size(1) + max_new_tokens):
            if start == window_start(n, self.config.block_size):
                logits = decode(token[:, None])  # (b, 1, V)
            else:
                start = window_start(n, self.config.block_size)
                cache.length.zero_()
                idx = torch.cat([idx, *steps], 1)
                logits = self(idx[rows, start:], cache=cache)  # (b, 1, V)
                steps = []
            token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)  # (b)
            if self.head_tokens is not None:
                token = self.head_tokens[token]
            if running < len(token):
                token = token.masked_fill(ended, end_of_text)
            # Not in place: the caller has the last ones.
            tokens = token if len(token) == len(tokens) else tokens.index_copy(0, rows, token)  # (B)
            steps.append(tokens[:, None])
            yield (tokens, self.all_logits(logits[:, -1])) if with_logits else tokens
            if end_of_text is None:
                continue
            ended = token == end_of_text
            running = len(token) - int(ended.sum())
            if not running:
                return
            # Ended sequences cost as much as others. Dropping them copies the cache, so only when they are many.
            if running < 0.8 * len(token) and not cache.fixed_shapes and not with_logits:
                cache.keep(~ended)
                rows, token, ended = rows[~ended], token[~ended], ended[~ended]

    def all_logits(self, logits):
        """Logits (B, U) of the tokens in `head_tokens` -> of all tokens, (B, V), with -inf for the others."""
        if self.head_tokens is None:
            return logits
        shape = len(logits), self.config.vocab_size
        return logits.new_full(shape, -math.inf).index_copy_(1, self.head_tokens, logits)

    def capture_decode_graph(self, cache):
        """Capture a decoding step as a CUDA graph: a function of tokens (B, 1) -> logits (B, 1, V).

        A step launches about two hundred small kernels, and launching them one by one takes longer than running them.
        The cache must be empty; the logits are valid until the next call.
        """
        tokens = torch.zeros(cache.kv.size(1), 1, dtype=torch.long, device=cache.kv.device)
        with torch.cuda.device(tokens.device):  # every thread has its own current device
            self(tokens, cache=cache)  # not captured: initializes CUDA's libraries
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self(tokens, cache=cache)

        def decode(token):
            """Replay the graph: token (B, 1) -> logits (B, 1, V)."""
            tokens.copy_(token)
            graph.replay()
            return logits
        return decode


def window_start(n, block_size):
    """Start of the context window of n tokens: 0 while they fit in a block, then advancing by half a block.

    A full block is therefore recomputed from its second half, and the cache then serves for another half block.
    """
    half = block_size // 2
    return 0 if n <= block_size else half * math.ceil((n - block_size) / half)


def sample_token(logits, temperature, top_k, top_p, generator):
    """Sample a token from each row of logits: (B, V) -> (B). The settings are those of `GPT.generate`."""
    if temperature < 1e-6:  # 0, or so small that dividing by it overflows
        return logits.argmax(-1)
    k = min(top_k, logits.size(-1)) if top_k else logits.size(-1)
    if k < logits.size(-1) or top_p < 1:
        logits, tokens = fast_topk(logits, k)  # (B, k) each
    else:
        tokens = None
    probs = F.softmax(logits.float() / temperature, dim=-1)  # (B, k)
    if top_p < 1:
        # Keep each token whose predecessors sum to less than p, so always the first.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    # Select the token at which the cumulative probability exceeds a random part of the whole.
    cumulative = probs.cumsum(-1)  # (B, k)
    threshold = cumulative[:, -1:] * torch.rand(len(probs), 1, generator=generator, device=probs.device)  # (B, 1)
    choice = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)


def fast_topk(logits, k):
    """`logits.topk(k)`, several times faster for small k: (B, V) -> values (B, k) and tokens (B, k), largest first.

    Tokens g, g + n_groups, g + 2 n_groups, … form group g. The k largest logits are all in the k groups with the
    largest maxima, so only those groups are searched.
    """
    B, V = logits.shape
    group_size = round(math.sqrt(V / k))  # as many groups as logits in k groups
    if group_size < 4 or logits.numel() < 2**15:
        return logits.topk(k)
    n_groups = V // group_size
    grouped = group_size * n_groups  # the last V % group_size tokens are in no group
    maxima = logits[:, :grouped].unflatten(1, (group_size, n_groups)).amax(1)  # (B, n_groups)
    groups = maxima.topk(k, sorted=False).indices  # (B, k)
    members = torch.arange(0, grouped, n_groups, device=logits.device)[:, None]  # (group_size, 1)
    candidates = (groups[:, None] + members).flatten(1)  # (B, group_size * k)
    ungrouped = torch.arange(grouped, V, device=logits.device).expand(B, -1)  # (B, V - grouped)
    candidates = torch.cat([candidates, ungrouped], 1)
    values, indices = logits.gather(1, candidates).topk(k)  # (B, k) each
    return values, candidates.gather(1, indices)
