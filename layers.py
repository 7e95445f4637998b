"""Layers that torch has too, but slower for this model: dropout, linear, attention with dropout, the head's loss, int8.

B: sequences in a batch, T: tokens in a sequence, C: width, H: heads, D: C / H, V: vocabulary, N: B · T.
`docs/speed.md` says what each of them brings.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Rows of logits that exist at once: on a CPU 100 MB of GPT-2's vocabulary, on a GPU enough for full-sized products.
HEAD_ROWS = {"cpu": 1024, "cuda": 16384}
# In float16, whose largest number is 65,504: the head's gradient is summed over these rows, and stays below that as
# long as no hidden state is above 31. A loss scale cannot help, because the sum is made before the loss is scaled.
HEAD_ROWS_FLOAT16 = 2048
# Their columns are padded to a multiple of this: tensor cores are slow on odd shapes such as 50,257.
HEAD_MULTIPLE = {"cpu": 1, "cuda": 64}


class Dropout(nn.Dropout):
    """Dropout that on a CPU takes 16 random bits an element: torch draws a whole number for each, one by one.

    So the share dropped is p to within 1/131,072, and what is kept is scaled by exactly its inverse.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None)  # all 64 bits
        bits = draws.view(torch.int16)[:x.numel()].view(x.shape)  # evenly from -32,768 to 32,767
        dropped = round(self.p * 65536)
        keep = (bits >= dropped - 32768).to(x.dtype)
        return x * keep.mul_(65536 / (65536 - dropped))


class Linear(nn.Linear):
    """nn.Linear that for a single token, as in telling one story, is a matrix-vector product.

    torch's matrix product reads bfloat16 weights at a third of the memory's speed then, its `addmv` at almost all.
    """

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """x (…, in), weight (out, in), bias (out) or None → (…, out)."""
    if x.numel() > x.size(-1) or x.dtype != weight.dtype:  # the latter under autocast
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())  # (out)
    return y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer whose weight (out, in) is stored in int8 with one scale a row; for reading only.

    Half of bfloat16's bytes, so up to twice the tokens where memory is what one waits for. Activations stay bfloat16.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = (weight.abs().amax(1).clamp_min(1e-30) / 127).bfloat16()  # rounded before it is divided by
        self.padding = -weight.size(1) % 16  # torch's kernel reads sixteen columns at a time, be they there or not
        weight = F.pad(weight, (0, self.padding))
        self.register_buffer("weight", (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def forward(self, x):
        if self.padding:
            x = F.pad(x, (0, self.padding))
        y = torch._weight_int8pack_mm(x.reshape(-1, x.size(-1)), self.weight, self.scale)  # (N, out)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def attend(q, k, v, dropout):
    """Causal attention written out, for training on a CPU: q, k, v (B, H, T, D) → (B, H, T, D).

    torch's fused one is several times slower there: its backward at short blocks, and dropout at any.
    """
    T = q.size(2)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, H, T, T)
    weights = weights.masked_fill(later, -math.inf).softmax(-1, dtype=q.dtype)
    return dropout(weights) @ v


def head_loss(x, weight, targets):
    """Cross-entropy of a head of weight (V, C) over hidden states x (N, C), against targets (N), in nats a token.

    Returns the mean, which has a gradient, and the loss of each token (N), which has none. The head is two thirds of
    this model's arithmetic and its logits (N, V) by far its largest tensor: only HEAD_ROWS rows of them exist at a
    time, in autocast's dtype. Their gradient is made while they are there, as the mean's is known in advance but for
    a factor (the idea of Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).

    A token's probability is taken at the smallest number of the dtype or more: in float16 no loss is above 16.6.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return _HeadLoss.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradient):
        N, V = x.size(0), weight.size(0)
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        padding = -V % HEAD_MULTIPLE.get(x.device.type, 1)
        # As (C, V'), in which both products below are quickest on a CPU.
        weight = F.pad(weight.to(dtype), (0, 0, 0, padding)).T.contiguous()
        rows = min(N, HEAD_ROWS.get(x.device.type, 1024), HEAD_ROWS_FLOAT16 if dtype == torch.float16 else N)
        buffer = x.new_empty(rows, V + padding)  # the logits, then probabilities, then gradients of these rows
        losses = torch.empty(N, device=x.device)
        if with_gradient:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros(V + padding, x.size(1), device=x.device)
            summand, product = torch.empty_like(grad_weight), x.new_empty(grad_weight.shape)
        smallest = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        for i in range(0, N, rows):
            x_i, y = x[i:i + rows], targets[i:i + rows, None]  # (n, C), (n, 1)
            p = torch.mm(x_i, weight, out=buffer[:len(y)])  # (n, V')
            p[:, V:] = -math.inf
            torch.softmax(p, -1, out=p)
            target = torch.arange(len(y), device=x.device), y[:, 0]
            p_y = p[target].float()  # (n)
            p[target] = 0
            others = p.sum(-1)  # 1 - p_y, but not rounded to nothing where p_y is near 1
            losses[i:i + rows] = torch.where(p_y > 0.5, -torch.log1p(-others.float()), -p_y.clamp_min(smallest).log())
            if with_gradient:
                p[target] = -others  # p is now N times the logits' gradient
                grad_x[i:i + rows] = torch.mm(weight, p.T).T
                grad_weight += summand.copy_(torch.mm(p.T, x_i, out=product))  # in float32: many parts are summed
        ctx.gradients = (grad_x, grad_weight[:V]) if with_gradient else None
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, grad, _):
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        factor = grad / grad_x.size(0)
        return grad_x.to(ctx.x_dtype) * factor, grad_weight.mul_(factor), None, None, None
