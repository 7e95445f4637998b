"""Faster replacements for torch's dropout, linear, attention with dropout and cross-entropy, and an int8 linear layer.

B: batch size, T: sequence length, C: width, H: heads, D: C / H, V: vocabulary size, N: B * T.
`docs/speed.md` has the measured speedups.
"""

import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# Rows of logits that are in memory at a time: 100 MB on a CPU with GPT-2's vocabulary, full-sized products on a GPU.
CHUNK_ROWS = {"cpu": 1024, "cuda": 16384}
# For float16, with its maximum of 65,504: the gradient of the head is summed over these rows, and does not overflow as
# long as hidden states are at most 31. Loss scaling cannot prevent it: the sum is computed before the loss is scaled.
CHUNK_ROWS_FLOAT16 = 2048
IGNORED_TARGET = -1  # as in nanoGPT: a target without a loss or a gradient
# The columns of the logits are padded to a multiple of this: tensor cores are slow on odd sizes such as 50,257.
VOCAB_MULTIPLE = {"cpu": 1, "cuda": 64}


class Dropout(nn.Dropout):
    """Dropout that on a CPU uses 16 random bits per element, where torch draws an integer for each.

    p is rounded to a multiple of 1/65,536, and kept elements are scaled by the exact inverse of their probability.
    """

    def forward(self, x):
        """(…) -> (…)"""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None)  # uniform in all 64 bits
        bits = draws.view(torch.int16)[:x.numel()].view(x.shape)  # uniform in [-32768, 32767]
        dropped = round(self.p * 65536)
        keep = (bits >= dropped - 32768).to(x.dtype)
        return x * keep.mul_(65536 / (65536 - dropped))


class Linear(nn.Linear):
    """nn.Linear that computes a matrix-vector product for a single token, as when generating one sequence.

    There torch's matrix product reads bfloat16 weights at a third of the memory bandwidth, `addmv` at nearly all of it.
    """

    def reset_parameters(self):
        """Random initial values, but not on the meta device: torch would import torch._dynamo for it, in 1.5 s."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        """(…, in) -> (…, out)"""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding without random initial values on the meta device, as `Linear`."""

    def reset_parameters(self):
        """Random initial values, except on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


def linear(x, weight, bias=None):
    """F.linear, see `Linear`: x (…, in), weight (out, in), bias (out) or None -> (…, out)."""
    if x.numel() > x.size(-1) or x.dtype != weight.dtype:  # the dtypes differ under autocast
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())  # (out)
    return y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """Linear layer for inference on a CPU with int8 weights, one scale per row, and integer products.

    Each call rounds its input to 8 bits, with one scale and offset for all of it (dynamic quantization). On an x86 CPU
    without AVX-512 VNNI it uses 7 bits, because the kernel then adds pairs of products in 16 bits.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = torch.maximum(weight.amax(1), -weight.amin(1)).clamp_min(1e-30) / 127  # (out)
        with warnings.catch_warnings():
            # Quantized tensors are deprecated. If torch lacks them, `pick_inference_dtype` does not choose int8.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            weight = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)  # in the layout of the kernel
        on_x86 = torch.backends.quantized.engine in ("x86", "fbgemm")
        self.reduce_range = on_x86 and not torch.cpu.get_capabilities().get("avx512_vnni", False)

    def forward(self, x):
        """(…, N, in) -> (…, N, out), float32"""
        return torch.ops.quantized.linear_dynamic.default(x, self.packed, self.reduce_range)


def causal_attention(q, k, v, dropout):
    """Causal attention without a fused kernel, for training on a CPU: q, k, v (B, H, T, D) -> (B, H, T, D).

    torch's fused kernel is several times slower there, in the backward pass at short blocks and with dropout at any.
    """
    B, H, T, D = q.shape
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    # One operation for the product, the scale and the mask: each is a pass over the largest tensors of the block.
    scores = torch.baddbmm(mask, q.reshape(B * H, T, D), k.reshape(B * H, T, D).mT, alpha=D**-0.5)  # (B * H, T, T)
    weights = scores.softmax(-1, dtype=q.dtype).view(B, H, T, T)
    return dropout(weights) @ v


class UsedTokens:
    """Which tokens of a vocabulary occur in the training text, and a cheaper head for it: exact, with fewer logits.

    Tokens that never occur have equal gradients if their rows of the head are equal, and so stay equal in training. One
    of them then stands for all of them in the softmax, with its probability multiplied by their number. Of GPT-2's
    50,257 tokens, 12,988 occur in 8 million tokens of TinyStories.
    """

    def __init__(self, used):
        """`used`: whether each token of the vocabulary occurs, a bool tensor (V). At least one must not."""
        self.used, self.unused = used.nonzero().flatten(), (~used).nonzero().flatten()
        row_of_token = torch.where(used, used.cumsum(0) - 1, len(self.used))
        self.row_of_token = F.pad(row_of_token, (0, 1), value=IGNORED_TARGET)  # the last: of target -1

    def head(self, weight, targets):
        """The head's weight (V, C) and targets (N) -> the weight's rows of the U used tokens and of one unused token,
        (U + 1, C), and the targets as indices of these rows (N).
        """
        return _HeadRows.apply(weight, self.used, self.unused), self.row_of_token[targets]


def tokens_with_own_rows(weight):
    """The ids (U) of tokens whose embedding is not the most common one of a weight (V, C): all if no two are equal.

    After training with `UsedTokens` the most common one is that of the tokens that did not occur.
    """
    shared = (weight == weight[weight[:, 0].mode().indices]).all(1)  # (V)
    if not 1 < shared.sum() < len(weight):
        shared = torch.zeros_like(shared)
    return (~shared).nonzero().flatten()


class _HeadRows(torch.autograd.Function):
    """See `UsedTokens.head`."""

    @staticmethod
    def forward(ctx, weight, used, unused):
        """weight (V, C) -> (U + 1, C)"""
        ctx.save_for_backward(used, unused)
        return torch.cat([weight[used], weight[unused[:1]]])

    @staticmethod
    def backward(ctx, grad):
        """(U + 1, C) -> (V, C)"""
        used, unused = ctx.saved_tensors
        grad_weight = grad.new_empty(len(used) + len(unused), grad.size(1))
        grad_weight[used] = grad[:-1]
        grad_weight[unused] = grad[-1] / len(unused)
        return grad_weight, None, None


def linear_cross_entropy(x, weight, targets, last_row_tokens=1):
    """Plain version of `fused_linear_cross_entropy`: the place to try another loss (z-loss, softcap, label smoothing).

    x (N, C), weight (V, C), targets (N) -> the mean loss, and the loss of each token (N) without a gradient. Targets of
    -1 are ignored; the last row of the weight stands for `last_row_tokens` tokens of equal logits (see `UsedTokens`).
    Training uses the mean, so additional terms belong there; evaluation uses the losses. All logits (N, V) are in
    memory several times over: lower device_batch_size.
    """
    tokens_of_row = torch.ones(len(weight), device=x.device)  # (V)
    tokens_of_row[-1] = last_row_tokens
    logits = F.linear(x, weight) + tokens_of_row.log()  # (N, V)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="none")  # (N)
    losses = losses + tokens_of_row[targets].log().masked_fill(targets == IGNORED_TARGET, 0)  # of one of the tokens
    return losses.sum() / (targets != IGNORED_TARGET).sum(), losses.detach()


def fused_linear_cross_entropy(x, weight, targets, last_row_tokens=1):
    """Cross-entropy, in nats/token, of the output head: hidden states x (N, C), weight (V, C), targets (N).

    Returns the mean, and the loss of each token (N) without a gradient. The head is two thirds of this model's
    arithmetic, and its logits (N, V) are by far its largest tensor: only CHUNK_ROWS rows of them are in memory at a
    time, in autocast's dtype. The forward pass also computes the gradients of the mean, which the backward pass only
    scales (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).

    The last row of the weight stands for `last_row_tokens` tokens of equal logits (see `UsedTokens`). Targets of -1 are
    ignored: their loss and gradient are 0, and the mean is that of the others (NaN without others).
    Target probabilities are clamped: to 2^-24 in float16, so that no loss is above 16.6, else to the smallest normal
    number.
    """
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    with torch.autocast(device_type, enabled=False):
        return _FusedLinearCrossEntropy.apply(x, weight, targets, last_row_tokens, dtype, torch.is_grad_enabled())


def fused_loss_bytes(C, V, device_type, dtype):
    """Largest memory that `fused_linear_cross_entropy` takes with width C and V tokens, in bytes."""
    logits = CHUNK_ROWS.get(device_type, 1024) * V * dtype.itemsize
    return logits + C * V * (2 * dtype.itemsize + 8)  # the weight, a chunk's gradient (also in float32) and their sum


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """See `fused_linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, x, weight, targets, last_row_tokens, dtype, with_gradient):
        """x (N, C), weight (V, C), targets (N) -> mean loss, losses (N). Keeps the gradients of the mean in ctx."""
        N, V = x.size(0), weight.size(0)
        ctx.x_dtype = x.dtype
        ignored = targets == IGNORED_TARGET  # (N)
        x = x.to(dtype).masked_fill(ignored[:, None], 0)  # a row of zeros adds nothing to the gradient of the weight
        padding = -V % VOCAB_MULTIPLE.get(x.device.type, 1)
        # (C, V + padding): the layout in which both products below are fastest on a CPU
        weight = F.pad(weight.to(dtype), (0, 0, 0, padding)).T.contiguous()
        rows = min(N, CHUNK_ROWS.get(x.device.type, 1024), CHUNK_ROWS_FLOAT16 if dtype == torch.float16 else N)
        buffer = x.new_empty(rows, V + padding)  # logits, then probabilities, then gradients of a chunk
        losses = torch.empty(N, device=x.device)
        if with_gradient:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros(V + padding, x.size(1), device=x.device)
            product, product_float32 = x.new_empty(grad_weight.shape), torch.empty_like(grad_weight)
        min_probability = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        for i in range(0, N, rows):
            x_i, y = x[i:i + rows], targets[i:i + rows]  # (n, C), (n)
            p = torch.mm(x_i, weight, out=buffer[:len(y)])  # (n, V + padding)
            p[:, V - 1] += math.log(last_row_tokens)
            p[:, V:] = -math.inf
            torch.softmax(p, -1, out=p)
            target = torch.arange(len(y), device=x.device), y  # an ignored target indexes the last column here
            p_y = p[target].float()  # (n)
            p[target] = 0
            rest = p.sum(-1)  # (n), 1 - p_y without its rounding to zero when p_y is near 1
            losses[i:i + rows] = torch.where(p_y > 0.5, -torch.log1p(-rest.float()),
                                             -p_y.clamp_min(min_probability).log())
            losses[i:i + rows] += math.log(last_row_tokens) * (y == V - 1)  # the probability of one of the tokens
            if with_gradient:
                p[target] = -rest  # p is now the gradient of the logits, times N
                grad_x[i:i + rows] = torch.mm(weight, p.T).T
                # Accumulated in float32: there can be many chunks.
                grad_weight += product_float32.copy_(torch.mm(p.T, x_i, out=product))
        losses.masked_fill_(ignored, 0)
        count = (~ignored).sum()  # not a Python number: that would wait for the device
        if with_gradient:
            ctx.gradients = grad_x.masked_fill_(ignored[:, None], 0), grad_weight[:V], count
        ctx.mark_non_differentiable(losses)
        return losses.sum() / count, losses

    @staticmethod
    def backward(ctx, grad, _):
        """Gradient of the mean loss () -> those of x (N, C) and weight (V, C)."""
        (grad_x, grad_weight, count), ctx.gradients = ctx.gradients, None
        factor = grad / count
        return grad_x.to(ctx.x_dtype) * factor, grad_weight.mul_(factor), None, None, None, None
