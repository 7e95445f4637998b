"""Generating stories: the KV cache, the choice of the next token, and the loop.

Works with any model whose `forward` takes token ids and a `cache`, as model.py's; and with any other at the cost of
computing the whole context window for each token.

B: batch size, T: sequence length, C: width, H: heads, D: C / H, V: vocabulary size.
"""

import inspect
import math
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from storygpt.fast import FastLinear, call_directly, distinct_logits, is_plain, use_fast_linear
from storygpt.system.errors import UserError, out_of_memory


class KVCache:
    """Keys and values of the tokens processed so far, of every attention layer, with room for one block.

    The forward pass calls `advance` once and then `append` in each attention layer, in the same order every time; also
    `previous`, where a layer needs something of the token before. On a GPU the length is only known to the device, and
    every pass reads all slots, so that a decoding step, whose tensors then have fixed shapes, can be captured as a CUDA
    graph. Gradients do not pass through the cache.
    """

    def __init__(self, block_size, device):
        self.length = torch.zeros((), dtype=torch.long, device=device)  # number of tokens in the cache
        self.slots = torch.arange(block_size, device=device)
        self.keys, self.values = [], []  # of each layer, (B, H, block_size, D), from its first `append` on
        self.last = []  # of each call of `previous`, (B, 1, …): what the last token has
        self.fixed_shapes = torch.device(device).type == "cuda"

    def advance(self, T):
        """Prepare for the next T tokens; returns their positions in the context window, (T)."""
        self.positions = self.length + self.slots[:T]
        self.length += T
        self.end = len(self.slots) if self.fixed_shapes else int(self.length)  # of the slots that are read
        self.layer = self.call = 0  # the next ones of `append` and `previous`
        return self.positions

    def previous(self, x):
        """What the tokens before the new ones have, where the new ones have x: (B, T, …) -> (B, T, …). The first token
        of the context window gets zeros.
        """
        if self.call == len(self.last):
            self.last.append(torch.zeros_like(x[:, :1]))
        last = self.last[self.call]
        self.call += 1
        x = torch.cat([last * (self.positions[0] > 0), x], 1)  # (B, 1 + T, …)
        last.copy_(x[:, -1:])
        return x[:, :-1]

    def append(self, k, v, window=None):
        """Store the keys and values (B, H, T, D) of new tokens; returns those for attention, (B, H, L, D) each.

        With `window`, a token attends to the last `window` tokens only, itself included. Sets `mask`, (T, L), to add to
        the scores; None: the new token attends to all that are returned.
        """
        T, layer = k.size(2), self.layer
        self.layer += 1
        if layer == len(self.keys):
            for tensors, new in ((self.keys, k), (self.values, v)):
                B, H, _, D = new.shape
                tensors.append(new.new_zeros(B, H, len(self.slots), D))
        keys, values = self.keys[layer], self.values[layer]
        start, end = 0, self.end  # of the L slots
        if self.fixed_shapes:
            keys.index_copy_(2, self.positions, k)
            values.index_copy_(2, self.positions, v)
        else:
            start = max(0, end - T + 1 - window) if window else 0
            keys[:, :, end - T:end] = k
            values[:, :, end - T:end] = v
        if layer == 0 or window != self.window:
            self.window, self.mask = window, None
            if T > 1 or self.fixed_shapes:
                distance = self.positions[:, None] - self.slots[start:end]  # (T, L)
                hidden = (distance < 0) | (distance >= (window or end))
                self.mask = torch.zeros_like(hidden, dtype=k.dtype).masked_fill_(hidden, -math.inf)
        return keys[:, :, start:end], values[:, :, start:end]

    def keep(self, rows):
        """Drop all sequences of the batch but those where `rows`, a bool tensor (B), is true."""
        self.keys, self.values, self.last = ([x[rows] for x in tensors] for tensors in
                                             (self.keys, self.values, self.last))


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, end_of_text=None,
             with_logits=False):
    """Continue token ids (B, T), T >= 1; yields the next token of every sequence, (B), one step at a time.

    `temperature` 0 selects the most likely token. `top_k` samples from the k most likely tokens (0: all), `top_p` from
    the most likely tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
    `generator` is on the model's device. After `end_of_text` a sequence yields only `end_of_text`, and generation stops
    when all sequences have ended. `with_logits` yields pairs: the tokens (B) and the logits (B, V) they were sampled
    from, valid until the next step. Raises UserError if logits are NaN or +infinity, at every 32nd step and the end.

    The model reads the context window that begins at `window_start`. Sequences that have ended are dropped from the
    batch, except on CUDA and with `with_logits`; the random numbers of the others depend on that.
    Call eval() first: dropout is active in training mode.
    """
    head = next((m for m in model.modules() if isinstance(m, FastLinear) and m.is_output), None)
    distinct = None if head is None else head.distinct_rows  # the tokens that have a logit of their own, (U)
    V = model.config.vocab_size  # a model may have more logits than tokens, for speed
    candidates = torch.arange(V, device=idx.device) if distinct is None else distinct[distinct < V]
    cache = KVCache(model.config.block_size, idx.device) if uses_cache(model) else None
    forward = partial(last_logits, model, cache)
    cached_start = decode = None  # the start of the window in the cache; how a single token is computed with it
    rows = torch.arange(len(idx), device=idx.device)  # which of the B sequences are in the batch, (b)
    tokens = torch.zeros_like(rows)  # the last tokens of all sequences, (B)
    ended = None  # whether each sequence in the batch has ended, (b); None if none has
    for step in range(max_new_tokens):
        start = window_start(idx.size(1), model.config.block_size)
        if cache is None:
            logits = forward(idx[:, start:])  # (b, V) or (b, U + 1)
        elif start != cached_start:  # the window has moved: compute it anew
            cached_start = start
            cache.length.zero_()
            logits = forward(idx[:, start:])
        else:
            decode = decode or (capture_graph(forward, cache) if idx.is_cuda else forward)
            logits = decode(idx[:, -1:])
        if step % 32 == 0:  # not at every step, because reading a number waits for a GPU
            check_finite(logits)
        # With `distinct`, tokens that did not occur in training are not generated.
        token = sample_token(logits[:, :len(candidates)], candidates, temperature, top_k, top_p, generator)  # (b)
        if with_logits:
            logits = (logits if distinct is None else head.expand(logits))[:, :V]
        if ended is not None:
            token = token.masked_fill(ended, end_of_text)
        idx = torch.cat([idx, token[:, None]], 1)
        # Not in place: the caller has the last ones.
        tokens = token if len(token) == len(tokens) else tokens.index_copy(0, rows, token)  # (B)
        yield (tokens, logits) if with_logits else tokens
        if end_of_text is None:
            continue
        running = token != end_of_text  # (b)
        count = int(running.sum())
        if not count:
            break
        # Ended sequences cost as much as others. Dropping them copies the cache, so only when they are many.
        if count < 0.8 * len(token) and not with_logits and idx.device.type != "cuda":
            if cache is not None:
                cache.keep(running)
            rows, idx, running = rows[running], idx[running], running[running]
        ended = None if count == len(running) else ~running
    check_finite(logits)


def check_finite(logits):
    """Raise UserError if a logit is NaN or +infinity; -infinity excludes a token."""
    if not math.isfinite(logits.amax()):
        raise UserError("the model's logits are NaN or infinite: its weights are damaged, as after training that has "
                        "diverged (use another run or checkpoint), or too large for the dtype (use float32)")


def last_logits(model, cache, idx):
    """Token ids (b, T) -> the logits of the last token, (b, V), or (b, U + 1) from a head with U `distinct_rows`."""
    reset = distinct_logits.set(True)
    try:
        return (model(idx) if cache is None else model(idx, cache=cache))[:, -1]
    finally:
        distinct_logits.reset(reset)


def uses_cache(model):
    """Whether a model's forward takes a KVCache, and `check_cache` has not found that its logits differ with one."""
    return "cache" in inspect.signature(model.forward).parameters and getattr(model, "cache_is_exact", True)


def prepare_for_generation(model, device, dtype):
    """Prepare a float32 model for fast generation: eval mode, on a device, in a torch.dtype. Returns the model.

    torch.int8 works on a CPU only, for layers of exactly nn.Linear; all else stays in float32. Matrix products then
    round their input with one scale for the whole batch, so that a story depends slightly on the others. Raises
    UserError if the logits are not finite.
    """
    head = output_layer(model.eval())
    check_cache(model)
    model.to(device)
    if dtype != torch.int8:
        model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)  # not complex ones
    use_fast_linear(model, int8=dtype == torch.int8)
    if head is not None:
        head.is_output = True
    call_directly(model)
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    except RuntimeError as error:  # such as an operation between two dtypes
        if dtype == torch.float32 or out_of_memory(error):
            raise
        raise UserError(f"the model does not run in {str(dtype).removeprefix('torch.')}: use --dtype float32 "
                        f"({error})") from error
    return model


@torch.no_grad()
def output_layer(model):
    """The layer of exactly nn.Linear whose output a model returns as its logits, without any operation on it, or None.

    Raises UserError if the logits are not finite.
    """
    outputs = {}  # of each layer, a list: None if it was called with others, by torch.func.functional_call

    def add(module, args, output, weight, bias):
        outputs.setdefault(module, []).append(output if module.weight is weight and module.bias is bias else None)
    hooks = [module.register_forward_hook(partial(add, weight=module.weight, bias=module.bias))
             for module in model.modules() if is_plain(module, nn.Linear)]
    logits = model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    check_finite(logits)
    return next((module for module, calls in outputs.items()
                 if len(calls) == 1 and calls[0] is logits and logits._version == 0), None)


@torch.no_grad()
def check_cache(model):
    """Compare the logits of a float32 model with and without a KVCache: if they differ, it generates without one.

    An edit of the model may have reached only one of the two, such as another attention mask. It may also concern only
    some tokens, such as full stops, so the model reads random tokens and, after each, one that it finds likely.
    """
    device, T, V = next(model.parameters()).device, model.config.block_size, model.config.vocab_size
    noted, model.cache_is_exact = not getattr(model, "cache_is_exact", True), True
    if not uses_cache(model):
        return
    generator = torch.Generator(device).manual_seed(0)
    idx, tokens = torch.randint(V, (1, T), generator=generator, device=device), torch.arange(V, device=device)
    logits = model(idx[:, :min(T, 128)])[0, :-1:2, :V]  # of every other token, (about T / 2, V)
    idx[0, 1:2 * len(logits):2] = sample_token(logits, tokens, 1.0, 0, 1.0, generator)
    cache, ends = KVCache(T, device), sorted({T // 2, T // 2 + 1, T})
    cached = [model(idx[:, start:end], cache=cache)[:, -1] for start, end in zip([0, *ends], ends)]  # (1, V) each
    plain = model(idx)[:, [end - 1 for end in ends]]  # (1, 2 or 3, V)
    tolerance = 1e-3 if device.type == "cpu" else 1e-2  # TF32
    largest = plain.nan_to_num(0, 0, 0).abs().max().item()
    # -infinity, which excludes a token, is equal to itself.
    model.cache_is_exact = torch.allclose(torch.stack(cached, 1), plain, rtol=0, atol=tolerance * largest)
    if not model.cache_is_exact and not noted:
        print("note: with a cache, the model's forward gives other logits: generating without one, which is slower "
              "(storygpt/generate.py: check_cache)", file=sys.stderr)


def capture_graph(forward, cache):
    """Capture a decoding step as a CUDA graph: a function as `forward`, of tokens (B, 1).

    A step launches about two hundred small kernels, and launching them one by one takes longer than running them.
    The logits are valid until the next call.
    """
    state = [(x, x.clone()) for x in (cache.length, *cache.last)]
    tokens = torch.zeros(len(cache.keys[0]), 1, dtype=torch.long, device=cache.length.device)
    with torch.cuda.device(tokens.device):  # every thread has its own current device
        forward(tokens)  # not captured: initializes CUDA's libraries
        for x, value in state:
            x.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(tokens)

    def step(token):
        """Replay the graph: token (B, 1) -> logits (B, V) or (B, U + 1)."""
        tokens.copy_(token)
        graph.replay()
        return logits
    return step


def window_start(n, block_size):
    """Start of the context window of n tokens: 0 while they fit in a block, then advancing by half a block.

    A full block is therefore recomputed from its second half, and the cache then serves for another half block.
    """
    half = block_size // 2
    return 0 if n <= block_size else half * math.ceil((n - block_size) / half)


def sample_token(logits, tokens, temperature, top_k, top_p, generator):
    """Sample a token id from each row of logits, (B, K) -> (B). The settings are those of `generate`.

    `tokens` (K): the ids of the tokens of the columns, which need not be all. So `logits[:, tokens == 13] = -math.inf`
    excludes token 13.
    """
    if temperature < 1e-6:  # 0, or so small that dividing by it overflows
        return tokens[logits.argmax(-1)]
    k = min(top_k, logits.size(-1)) if top_k else logits.size(-1)
    if k < logits.size(-1) or top_p < 1:
        logits, columns = fast_topk(logits, k)  # (B, k) each
        tokens = tokens[columns]  # (B, k)
    probs = F.softmax(logits.float() / temperature, dim=-1)  # (B, k)
    if top_p < 1:
        # Keep each token whose predecessors sum to less than p, so always the first.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    # Select the token at which the cumulative probability exceeds a random part of the whole.
    cumulative = probs.cumsum(-1)  # (B, k)
    threshold = cumulative[:, -1:] * torch.rand(len(probs), 1, generator=generator, device=probs.device)  # (B, 1)
    choice = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    choice = choice % probs.size(-1)  # if a logit is NaN, which `generate` reports, it is that size: no token
    return tokens.expand_as(probs).gather(-1, choice).squeeze(-1)


def fast_topk(logits, k):
    """`logits.topk(k)`, faster for several rows and small k: (B, V) -> values (B, k) and tokens (B, k), largest first.

    Tokens g, g + n_groups, g + 2 n_groups, … form group g. The k largest logits are all in the k groups with the
    largest maxima, so only those groups are searched.
    """
    V = logits.size(1)
    group_size = round(math.sqrt(V / k))  # as many groups as logits in k groups
    if group_size < 4 or logits.numel() < 2**15:
        return logits.topk(k)
    n_groups = math.ceil(V / group_size)
    padded = F.pad(logits, (0, n_groups * group_size - V), value=-math.inf)  # (B, group_size * n_groups)
    groups = padded.unflatten(1, (group_size, n_groups)).amax(1).topk(k, sorted=False).indices  # (B, k)
    members = torch.arange(0, padded.size(1), n_groups, device=logits.device)[:, None]  # (group_size, 1)
    candidates = (groups[:, None] + members).flatten(1)  # (B, group_size * k)
    values, indices = padded.gather(1, candidates).topk(k)  # (B, k) each
    return values, candidates.gather(1, indices).clamp_max(V - 1)  # padding, if fewer than k are finite
