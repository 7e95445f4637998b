"""The output head and the cross-entropy in one, without the logits of a whole batch in memory.

The head is two thirds of the published model's arithmetic, and its logits are by far its largest tensor. `fuse_loss`
makes the head of a model return `Logits`, which are computed when an operation needs them: F.cross_entropy computes
them in chunks together with its gradient, and every other operation gets them as the plain model has them. So the
model may do anything with its logits, and what it does is computed as written. torch's F.linear_cross_entropy does
the same for exactly one call, and is slower on a CPU (docs/speed.md).

B: batch size, T: sequence length, C: width, V: vocabulary size, N: B * T.
"""

import math
from contextvars import ContextVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from storygpt.fast import is_plain

# Rows of logits that are in memory at a time: 100 MB on a CPU with GPT-2's vocabulary, full-sized products on a GPU.
CHUNK_ROWS = {"cpu": 1024, "cuda": 16384}
# For float16, with its maximum of 65,504: the gradient of the head is summed over these rows, and does not overflow as
# long as hidden states are at most 31. Loss scaling cannot prevent it: the sum is computed before the loss is scaled.
CHUNK_ROWS_FLOAT16 = 2048
IGNORED_TARGET = -1  # as in nanoGPT: a target without a loss or a gradient
# The columns of the logits are padded to a multiple of this: tensor cores are slow on odd sizes such as 50,257.
VOCAB_MULTIPLE = {"cpu": 1, "cuda": 64}


# ---- logits that are computed when they are needed ----


@torch.no_grad()
def fuse_loss(model, used=None, equalize=False):
    """Make the output heads of a model return `Logits`: its layers of exactly nn.Linear, without bias and hooks, whose
    width is the vocabulary. `used`, a bool tensor (V): the tokens that occur in the training text, see `UsedTokens`.

    `equalize` sets the rows of the others to zero: unequal, they would add up to a large gradient of the hidden states.
    """
    V = model.config.vocab_size
    if used is not None:
        used = F.pad(used, (0, V - len(used)))  # a model may pad its vocabulary
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if is_plain(module, nn.Linear) and module.bias is None and module.out_features == V:
            module.__class__, module.used_tokens = Head, None
            if used is not None and not used.all():
                module.used_tokens = UsedTokens(used.to(module.weight.device))
                if equalize and id(module.weight) in embeddings:  # another layer can be as wide by chance
                    module.weight[module.used_tokens.unused] = 0


# Whether a Head returns `Logits` in torch.no_grad(), too: during evaluation, in that thread.
lazy_without_gradients = ContextVar("lazy_without_gradients", default=False)


class Head(nn.Linear):
    """nn.Linear that returns `Logits`."""

    def forward(self, x):
        """(…, C) -> (…, V)"""
        if not torch.is_grad_enabled() and not lazy_without_gradients.get():
            # Computed at once, because the weight may change before the logits are used: a teacher's weights can be put
            # into the model for one call.
            return F.linear(x, self.weight)
        return _MakeLogits.apply(x, self.weight, self.used_tokens, product_dtype(x), [])


def product_dtype(x):
    """The dtype of a matrix product of x: autocast's, if it is enabled here."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class Logits(torch.Tensor):
    """The product of hidden states x (…, C) and the weight (V, C) of an output head, (…, V), not computed yet.

    `computed` is a list that logits share with their views: the plain tensor, once an operation has needed it.
    """

    @staticmethod
    def __new__(cls, x, weight, used_tokens, dtype, computed):
        """A tensor without memory."""
        shape = *x.shape[:-1], len(weight)
        logits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=x.device)
        logits.x, logits.weight, logits.used_tokens, logits.computed = x, weight, used_tokens, computed
        return logits

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Every operation on logits: fuse F.cross_entropy, keep a change of the leading dimensions, or compute them."""
        kwargs = kwargs or {}
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is F.cross_entropy and (result := fused_cross_entropy(*args, **kwargs)) is not None:
            return result
        logits = args[0] if args and isinstance(args[0], Logits) else None
        # Not in torch.no_grad(): logits and their views share what is computed, with its graph.
        if function in VIEWS and logits is not None and not kwargs and (
                torch.is_grad_enabled() or not logits.requires_grad):
            shape = function(torch.empty(logits.shape, device="meta"), *args[1:]).shape
            if shape[-1:] == logits.shape[-1:]:
                return _MakeLogits.apply(logits.x.reshape(*shape[:-1], -1), logits.weight, logits.used_tokens,
                                         logits.dtype, logits.computed)
        args, kwargs = tree_map_only(Logits, Logits.compute, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Operations below autograd, as in the forward pass of another autograd.Function: compute the logits."""
        args, kwargs = tree_map_only(Logits, Logits.product, (args, kwargs or {}))
        return function(*args, **kwargs)

    def compute(self):
        """These logits as a plain tensor: the same one for all operations, as one may change it or hook it."""
        if not self.computed:
            with torch.set_grad_enabled(self.requires_grad):
                self.computed.append(self.product())
        logits = self.computed[0]
        return logits if logits.shape == self.shape else logits.view(self.shape)

    def product(self):
        """These logits as a plain tensor, which is not kept if they are not computed yet."""
        if self.computed:
            return self.compute()
        with torch.autocast(self.device.type, enabled=False):  # the context may be another than that of the head
            return F.linear(self.x.to(self.dtype), self.weight.to(self.dtype))


VIEWS = {torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape}
METADATA = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.shape.__get__,
            torch.Tensor.ndim.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__,
            torch.Tensor.requires_grad.__get__, torch.Tensor.grad_fn.__get__, torch.Tensor.is_leaf.__get__}


class _MakeLogits(torch.autograd.Function):
    """Connects `Logits` with the graph, for operations that are no torch functions: another autograd.Function."""

    @staticmethod
    def forward(ctx, x, weight, *args):
        ctx.save_for_backward(x, weight)
        return Logits(x, weight, *args)

    @staticmethod
    def backward(ctx, grad):  # (…, V) -> (…, C), (V, C)
        x, weight = ctx.saved_tensors
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        return grad @ weight.to(grad.dtype), grad_weight, None, None, None


# ---- tokens that do not occur ----


class UsedTokens:
    """Which tokens of a vocabulary occur in the training text, and a cheaper head for it: exact, with fewer logits.

    Tokens that are never a target have equal gradients if their rows of the head are equal, and so stay equal in
    training. One of them then stands for all of them in the softmax, with its probability multiplied by their number.
    Of GPT-2's 50,257 tokens, 12,988 occur in 8 million tokens of TinyStories.
    """

    def __init__(self, used):
        """`used`: whether each token of the vocabulary occurs, a bool tensor (V). At least one must not."""
        self.used, self.unused = used.nonzero().flatten(), (~used).nonzero().flatten()
        rows = torch.where(used, used.cumsum(0) - 1, len(self.used))
        self.row_of_target = F.pad(rows, (1, 0), value=IGNORED_TARGET)  # from target -1 on, (V + 1)
        self.calls, self.is_exact = 0, True
        self.are_targets = torch.tensor(False, device=used.device)  # whether unused tokens were targets in training

    def head(self, weight, targets):
        """The rows of the weight (V, C) for the U used tokens and one unused, (U + 1, C), and targets (N) as indices of
        these rows, (N); or None if that would not be exact.

        On CUDA the first calls and every hundredth find out, because that waits for the GPU. Whole rows are compared
        in these calls; on a CPU, their first columns in every call: one cache line a row.
        """
        targets = self.row_of_target.index_select(0, targets + 1)
        if torch.is_grad_enabled():
            self.are_targets |= (targets == len(self.used)).any()
        compare_whole = self.calls < 64 or self.calls % 100 == 0
        if compare_whole or not weight.is_cuda:
            rows = weight.detach()[:, :None if compare_whole else 16].index_select(0, self.unused)
            self.is_exact = not self.are_targets and bool((rows == rows[0]).all())
        self.calls += 1
        return (_HeadRows.apply(weight, self.used, self.unused), targets) if self.is_exact else None


class _HeadRows(torch.autograd.Function):
    """Rows of a weight for used tokens and one unused token, whose gradient is divided among all unused ones."""

    @staticmethod
    def forward(ctx, weight, used, unused):  # (V, C) -> (U + 1, C)
        ctx.save_for_backward(used, unused)
        return torch.cat([weight[used], weight[unused[:1]]])

    @staticmethod
    def backward(ctx, grad):  # (U + 1, C) -> (V, C)
        used, unused = ctx.saved_tensors
        grad_weight = grad.new_empty(len(used) + len(unused), grad.size(1))
        grad_weight[used] = grad[:-1]
        grad_weight[unused] = grad[-1] / len(unused)
        return grad_weight, None, None


# ---- the fused loss ----


def fused_cross_entropy(logits, targets, weight=None, size_average=None, ignore_index=-100, reduce=None,
                        reduction="mean", label_smoothing=0.0):
    """F.cross_entropy of `Logits` (N, V), or None if the arguments are such that it has to be computed plainly."""
    fits = (isinstance(logits, Logits) and logits.dim() == 2 and not logits.computed
            and not targets.is_floating_point() and logits.dtype != torch.float64
            and weight is size_average is reduce is None and label_smoothing == 0 and ignore_index == IGNORED_TARGET)
    if not fits or reduction not in ("mean", "none") or (reduction == "none" and torch.is_grad_enabled()):
        return None
    weight, used_tokens, last_row_tokens = logits.weight, logits.used_tokens, 1
    if used_tokens is not None and (reduced := used_tokens.head(weight, targets)):
        weight, targets = reduced
        last_row_tokens = len(used_tokens.unused)
    mean, losses = fused_linear_cross_entropy(logits.x, weight, targets, last_row_tokens, logits.dtype)
    return mean if reduction == "mean" else losses


def fused_linear_cross_entropy(x, weight, targets, last_row_tokens=1, dtype=None):
    """Cross-entropy, in nats/token, of the output head: hidden states x (N, C), weight (V, C), targets (N).

    Returns the mean, and the loss of each token (N) without a gradient. Only CHUNK_ROWS rows of the logits, in `dtype`
    (default: that of F.linear here), are in memory at a time. The forward pass also computes the gradients of the mean,
    which the backward pass only scales (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).

    The last row of the weight stands for `last_row_tokens` tokens of equal logits (see `UsedTokens`). Targets of -1 are
    ignored: their loss and gradient are 0, and the mean is that of the others (NaN without others).
    Target probabilities are clamped: to 2^-24 in float16, so that no loss is above 16.6, else to the smallest normal
    number.
    """
    dtype = dtype or product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLinearCrossEntropy.apply(x, weight, targets, last_row_tokens, dtype, torch.is_grad_enabled())


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Mean loss () and losses (N), see `fused_linear_cross_entropy`; keeps the gradients of the mean in ctx."""

    @staticmethod
    def forward(ctx, x, weight, targets, last_row_tokens, dtype, with_gradient):
        N, V = x.size(0), weight.size(0)
        ctx.x_dtype, inputs = x.dtype, (x, weight, targets)
        ignored = targets == IGNORED_TARGET  # (N)
        x = x.to(dtype).masked_fill(ignored[:, None], 0)  # a row of zeros adds nothing to the gradient of the weight
        targets = targets.masked_fill(ignored, 0)  # any token
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
            target = torch.arange(len(y), device=x.device), y
            p_y = p.gather(1, y[:, None]).flatten().float()  # (n), an error for a target that is no token
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
        ctx.save_for_backward(*inputs)
        ctx.last_row_tokens = last_row_tokens
        return losses.sum() / count, losses

    @staticmethod
    def backward(ctx, grad, _):  # () -> (N, C), (V, C)
        if torch.is_grad_enabled():  # create_graph=True: the gradients below are constants
            x, weight, targets = ctx.saved_tensors
            logits = x @ weight.to(x.dtype).T  # (N, V)
            logits = torch.cat([logits[:, :-1], logits[:, -1:] + math.log(ctx.last_row_tokens)], 1)
            mean = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET)
            needed = ctx.needs_input_grad[:2]
            inputs = [tensor for tensor, is_needed in zip((x, weight), needed) if is_needed]
            gradients = iter(torch.autograd.grad(mean, inputs, grad, create_graph=True))
            return *(next(gradients) if is_needed else None for is_needed in needed), None, None, None, None
        grad_x, grad_weight, count = ctx.gradients
        factor = grad / count
        return grad_x.to(ctx.x_dtype) * factor, grad_weight * factor, None, None, None, None
