"""Faster replacements for parts of torch, applied to a model from outside. docs/speed.md has the measured speedups.

They replace torch's own layers and functions only, not those of model.py, and only where they compute the same: a
subclass, a layer with hooks, with a parametrization or with another `forward` runs as written.

B: batch size, T: sequence length, C: width, H: heads, D: C / H, V: vocabulary size.
"""

import math
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

# Queries whose scores `attention` computes at once: with fewer, less of the future is computed and masked.
QUERIES = 128

torch_attention, torch_dropout = F.scaled_dot_product_attention, F.dropout


def is_plain(module, kind):
    """Whether a module is of exactly this class of torch's, without hooks and without a `forward` of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (type(module) is kind and "forward" not in vars(module)
            and not any(hooks) and not nn.modules.module._has_any_global_hook())


# ---- training on a CPU ----


@contextmanager
def faster_functions(device):
    """In this context, F.dropout and F.scaled_dot_product_attention are the functions below, on a CPU.

    The backward pass belongs into it too: it repeats parts of the forward pass if a model uses checkpointing.
    """
    if device.type == "cpu":
        F.dropout, F.scaled_dot_product_attention = dropout, attention
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = torch_dropout, torch_attention


def dropout(x, p=0.5, training=True, inplace=False):
    """F.dropout with 16 random bits per element on a CPU, where torch draws an integer for each: (…) -> (…).

    p is rounded to a multiple of 1/65,536, and kept elements are scaled by the exact inverse of their probability.
    """
    dropped = round(p * 65536)
    if not training or not 0 < dropped < 65536 or inplace or x.device.type != "cpu":
        return torch_dropout(x, p, training, inplace)
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None)  # uniform in all 64 bits
    bits = draws.view(torch.int16)[:x.numel()].view(x.shape)  # uniform in [-32768, 32767]
    keep = (bits >= dropped - 32768).to(x.dtype)
    return x * keep.mul_(65536 / (65536 - dropped))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """F.scaled_dot_product_attention without a fused kernel, for training: q (B, H, T, D) and k, v (B, H, L, D) ->
    (B, H, T, D).

    On a CPU, torch's fused kernel is several times slower in the backward pass at short blocks, and with dropout at
    any. Computed here: causal self-attention, and attention with a float mask that hides no query entirely; both with
    gradients. Everything else is torch's.
    """
    causal = is_causal and attn_mask is None and q.shape == k.shape
    added = not is_causal and attn_mask is not None and attn_mask.dtype == q.dtype
    plain = (causal or added) and not options and q.dim() == 4 and q.shape[:2] == k.shape[:2] and k.shape == v.shape
    if (not plain or q.device.type != "cpu" or not (torch.is_grad_enabled() and q.requires_grad)
            or added and attn_mask.amax(-1).isneginf().any()):
        return torch_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)
    (B, H, T, D), L = q.shape, k.size(2)
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    if added:
        mask = attn_mask.expand(B, H, T, L).reshape(B * H, T, L)
        return unfused_attention(q, k, v, mask, dropout_p).view(B, H, T, D)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    ends = [min(T, start + QUERIES) for start in range(0, T, QUERIES)]
    parts = [unfused_attention(q[:, start:end], k[:, :end], v[:, :end], mask[start:end, :end], dropout_p)
             for start, end in zip([0, *ends], ends)]  # (B * H, t, D) each, of t queries
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(B, H, T, D)


def unfused_attention(q, k, v, mask, dropout_p):
    """q (N, T, D), k and v (N, L, D), and what is added to the scores, (T, L) or (N, T, L) -> (N, T, D)."""
    # One operation for the product, the scale and the mask: each is a pass over the largest tensors of the block.
    scores = torch.baddbmm(mask, q, k.mT, alpha=q.size(-1) ** -0.5)  # (N, T, L)
    return dropout(scores.softmax(-1, dtype=q.dtype), dropout_p) @ v


# ---- generating ----


def use_fast_linear(model, int8):
    """Replace the layers of exactly nn.Linear by `FastLinear`, for generating; `int8`: with int8 weights."""
    for module in model.modules():
        module.__class__ = getattr(type(module), "called_normally", type(module))  # if it was prepared before
        if is_plain(module, nn.Linear) or is_plain(module, FastLinear):
            module.__class__ = FastLinear
            module.prepare(int8)


# True while `generate` calls a model, in that thread: the output layer then returns one logit for all repeated rows.
distinct_logits = ContextVar("distinct_logits", default=False)


def distinct_rows(weight, bias=None):
    """If more than half of the rows of a weight (out, in), with their bias (out), are equal: the indices of the other
    rows, (U), and the same with one of the equal rows at the end, (U + 1). Otherwise None and None.
    """
    rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    repeated = (rows == rows[rows[:, 0].mode().indices]).all(1)  # (out), whether a row is the most common one
    if not len(rows) > repeated.sum() > len(rows) / 2:
        return None, None
    distinct = (~repeated).nonzero().flatten()
    return distinct, torch.cat([distinct, repeated.nonzero()[0]])


class FastLinear(nn.Linear):
    """nn.Linear for generating, which computes rows of the weight that are equal once, and in int8 if asked to.

    Of a head trained with `loss.UsedTokens`, the rows of all tokens that did not occur are equal: three quarters of
    GPT-2's vocabulary on TinyStories.
    """

    is_output = False  # whether a model returns the output of this layer as it is

    def prepare(self, int8):
        """Convert the weight as it is now: later changes of it have no effect."""
        self.prepared = self.weight, self.bias
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        self.distinct_rows, computed = distinct_rows(weight, bias)
        if computed is not None:
            weight, bias = weight[computed], None if bias is None else bias[computed]
        self.row_weight, self.row_bias = weight, bias
        self.packed = pack_int8(weight, bias) if int8 else None

    def forward(self, x):
        """(…, in) -> (…, out); of the output layer, while `distinct_logits` is set, (…, U + 1)"""
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # faster than the attributes
        if weight is not self.prepared[0] or bias is not self.prepared[1]:  # in torch.func.functional_call
            return F.linear(x, weight, bias)
        weight, bias = self.row_weight, self.row_bias
        if self.packed is not None:
            if x.dim() == 1:  # which the kernel refuses
                return self.forward(x[None])[0]
            y = linear_int8(x, self.packed, REDUCE_RANGE)
        elif x.numel() == x.size(-1) and x.dtype == weight.dtype:
            # For a single token, torch's matrix product reads bfloat16 weights at a third of the memory bandwidth, its
            # matrix-vector product at nearly all of it.
            y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, weight, bias)
        return y if self.distinct_rows is None or (self.is_output and distinct_logits.get()) else self.expand(y)

    def expand(self, y):
        """(…, U + 1) -> (…, out)"""
        full = y[..., -1:].expand(*y.shape[:-1], self.out_features).contiguous()
        return full.index_copy_(-1, self.distinct_rows, y[..., :-1])


# Each int8 product rounds its input to 8 bits, with one scale and offset for all of it (dynamic quantization). On an
# x86 CPU without AVX-512 VNNI it uses 7 bits, because the kernel then adds pairs of products in 16 bits.
linear_int8 = torch.ops.quantized.linear_dynamic.default
REDUCE_RANGE = (torch.backends.quantized.engine in ("x86", "fbgemm")
                and not torch.cpu.get_capabilities().get("avx512_vnni", False))


def pack_int8(weight, bias):
    """An int8 weight with one scale per row, in the layout of the CPU's kernel."""
    weight = weight.float()
    scale = torch.maximum(weight.amax(1), -weight.amin(1)).clamp_min(1e-30) / 127  # (out)
    with warnings.catch_warnings():
        # Quantized tensors are deprecated. If torch lacks them, `pick_inference_dtype` does not choose int8.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        weight = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(weight, None if bias is None else bias.float())


def call_directly(model):
    """Make calls of a model's modules skip nn.Dropout and nn.Module's searches, for hooks and for children by name,
    which take much of the time of a token on a CPU (docs/speed.md). The model is in eval mode.

    Modules that have hooks, now or later, are called as before.
    """
    for module in model.modules():
        # Python looks there first. A child that is replaced is removed from there, but not by nn.ModuleDict.
        if type(module).__getattr__ is nn.Module.__getattr__ and not isinstance(module, nn.ModuleDict):
            vars(module).update({name: child for name, child in module._modules.items()
                                 if not hasattr(type(module), name)})
        if is_plain(module, nn.Dropout):
            module.__class__ = NoDropout
        if type(module).__call__ is nn.Module.__call__ and module._compiled_call_impl is None:
            module.__class__ = _direct_class(type(module))


class NoDropout(nn.Dropout):
    """nn.Dropout that does nothing in eval mode, not even a call of torch."""

    def forward(self, x):
        """(…) -> (…)"""
        return super().forward(x) if self.training else x


@cache
def _direct_class(kind):
    """A subclass of a module's class that calls `forward` at once."""
    def call(self, *args, **kwargs):
        """Call `forward`, or as nn.Module does if there are hooks."""
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            return kind.__call__(self, *args, **kwargs)
        return self.forward(*args, **kwargs)
    return type(kind.__name__, (kind,), {"__call__": call, "called_normally": kind})


# ---- loading ----


def skip_init():
    """A context that leaves out random initial values of parameters: for a model whose weights are loaded."""
    def skipping(init):
        return lambda tensor, *args, **kwargs: (
            tensor if isinstance(tensor, nn.Parameter) else init(tensor, *args, **kwargs))
    names = ("uniform_", "normal_", "kaiming_uniform_", "orthogonal_")
    return patch.multiple(nn.init, **{name: skipping(getattr(nn.init, name)) for name in names})
