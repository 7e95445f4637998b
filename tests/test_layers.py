"""The faster layers give the results of torch's."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import layers
from layers import (Dropout, Int8Linear, Linear, UsedTokens, causal_attention, fused_linear_cross_entropy,
                    linear_cross_entropy, tokens_with_own_rows)


@pytest.fixture(params=[(1, 1), (5, 1), (7, 64), (1000, 64), (1000, 1)])
def chunks(request, monkeypatch):
    """Values of CHUNK_ROWS, for 14 rows, and of VOCAB_MULTIPLE, for 50 columns."""
    for setting, value in zip((layers.CHUNK_ROWS, layers.VOCAB_MULTIPLE), request.param):
        monkeypatch.setitem(setting, "cpu", value)


def leaves(*shapes):
    """Random tensors that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def test_loss_and_gradients_equal_plain_cross_entropy(chunks):
    y = torch.randint(50, (14,))
    x, weight = leaves((14, 16), (50, 16))
    plain = F.cross_entropy(x @ weight.T, y, reduction="none")
    expected = plain, *torch.autograd.grad(3 * plain.mean(), (x, weight))
    for loss_function in (fused_linear_cross_entropy, linear_cross_entropy):
        mean, losses = loss_function(x, weight, y)
        assert not losses.requires_grad
        torch.testing.assert_close(mean, losses.mean())
        for a, b in zip((losses, *torch.autograd.grad(3 * mean, (x, weight))), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(loss_function(x, weight, y)[1], losses)


@pytest.mark.parametrize("loss_function", [fused_linear_cross_entropy, linear_cross_entropy])
def test_targets_of_minus_one_are_ignored(chunks, loss_function):
    """In the loss, the gradients and the mean, as by F.cross_entropy."""
    x, weight = leaves((14, 16), (50, 16))
    y = torch.arange(14) + 36  # with the last token of the vocabulary, which an index of -1 would select
    y[[0, 5, 6, 12]] = -1
    plain = F.cross_entropy(x @ weight.T, y, ignore_index=-1)
    expected = plain, *torch.autograd.grad(3 * plain, (x, weight))
    mean, losses = loss_function(x, weight, y)
    for a, b in zip((mean, *torch.autograd.grad(3 * mean, (x, weight))), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (losses == 0).tolist() == (y == -1).tolist()
    mean, losses = loss_function(x, weight, torch.full((14,), -1))
    assert mean.isnan() and losses.tolist() == [0] * 14  # the mean of nothing, as in torch


def test_loss_in_bfloat16_equals_plain_autocast_to_rounding(chunks):
    y = torch.randint(50, (14,))
    x, weight = leaves((14, 16), (50, 16))
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = linear_cross_entropy(x, weight, y)
        mean, _ = fused_linear_cross_entropy(x, weight, y)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, plain, rtol=2e-3, atol=0)
    for actual, expected in zip(torch.autograd.grad(mean, (x, weight)), torch.autograd.grad(plain, (x, weight))):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("loss_function", [fused_linear_cross_entropy, linear_cross_entropy])
def test_a_head_of_the_used_tokens_gives_the_losses_and_gradients_of_the_whole_head(chunks, loss_function):
    used = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.5
    x, weight = leaves((14, 16), (50, 16))
    with torch.no_grad():
        weight[~used] = weight[~used][0]
    head = UsedTokens(used)
    assert 15 < len(head.used) < 35 and len(head.unused) == 50 - len(head.used)
    y = head.used[torch.randint(len(head.used), (14,))]
    y[3] = -1
    mean, losses = loss_function(x, weight, y)
    rows, targets = head.head(weight, y)
    assert len(rows) == len(head.used) + 1
    mean_of_rows, losses_of_rows = loss_function(x, rows, targets, len(head.unused))
    torch.testing.assert_close(losses_of_rows, losses, rtol=1e-4, atol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * mean_of_rows, (x, weight)), torch.autograd.grad(3 * mean, (x, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    y[5] = head.unused[-1]  # in validation text an unused token can be a target
    with torch.no_grad():
        losses_of_rows = loss_function(x, *head.head(weight, y), len(head.unused))[1]
        torch.testing.assert_close(losses_of_rows, loss_function(x, weight, y)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target_logit", [0.0, 4.0, 8.0, 12.0])
def test_loss_in_bfloat16_is_as_exact_as_autocast_for_likely_tokens(target_logit):
    """A probability near 1 has few digits in bfloat16; the loss and the gradient need those of 1 - p."""
    x, weight = leaves((200, 16), (50, 16))
    y = torch.randint(50, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x += target_logit * weight[y] / weight[y].square().sum(1, keepdim=True)
    exact_loss = F.cross_entropy(x @ weight.T, y)
    exact = [exact_loss, *torch.autograd.grad(exact_loss, (x, weight))]
    errors = []
    for loss_function in (linear_cross_entropy, fused_linear_cross_entropy):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_function(x, weight, y)
        results = [loss, *torch.autograd.grad(loss, (x, weight))]
        errors.append([(a - b).norm() / b.norm() for a, b in zip(results, exact, strict=True)])
    plain_errors, fused_errors = errors
    for plain, fused in list(zip(plain_errors, fused_errors))[1:]:
        assert fused < 1.5 * plain + 1e-3
    assert fused_errors[0] < plain_errors[0] + 2e-3


@pytest.mark.parametrize("dtype, maximum", [(torch.float32, 87.4), (torch.bfloat16, 87.4), (torch.float16, 16.7)])
def test_loss_is_finite_where_a_probability_underflows(dtype, maximum):
    x, weight = torch.tensor([[200.0]], dtype=dtype), torch.tensor([[1.0], [-1.0]], dtype=dtype)
    loss = fused_linear_cross_entropy(x, weight, torch.tensor([1]))[1]
    assert maximum - 0.2 < loss.item() < maximum  # exactly 400; the gradient is exact
    assert fused_linear_cross_entropy(x, weight, torch.tensor([0]))[1].item() == 0


def test_gradient_of_a_frequent_token_does_not_overflow_in_float16(monkeypatch):
    """Half of 16,384 rows times 19.6 is above float16's maximum, and is summed before the loss is scaled."""
    monkeypatch.setitem(layers.CHUNK_ROWS, "cpu", 16384)
    x, weight = torch.full((16384, 1), 19.6), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        mean, _ = fused_linear_cross_entropy(x, weight, torch.zeros(16384, dtype=torch.long))
    torch.testing.assert_close(torch.autograd.grad(mean, weight)[0], torch.tensor([[-9.8], [9.8]]), rtol=1e-2, atol=0)


def test_loss_of_nan_is_nan():
    x, weight, y = torch.full((3, 2), math.nan), torch.ones(5, 2), torch.zeros(3, dtype=torch.long)
    assert fused_linear_cross_entropy(x, weight, y)[0].isnan()


def test_causal_attention_equals_torchs():
    q, k, v = leaves(*[(2, 3, 9, 8)] * 3)
    actual, expected = causal_attention(q, k, v, nn.Identity()), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_has_probability_p_everywhere_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(40, 1003, requires_grad=True)
    y = Dropout(p)(x)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.01)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4) and y.unique().numel() == 2
    lanes = dropped.flatten()[:40_000].view(-1, 4)  # four elements share one 64-bit random number
    assert (lanes.mean(0) - p).abs().max() < 0.02
    assert torch.corrcoef(lanes.T).fill_diagonal_(0).abs().max() < 0.05
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(Dropout(p)(x), y)
    assert torch.equal(Dropout(p).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (1, 3, 24), (24,)])
def test_linear_equals_torchs(monkeypatch, recwarn, bias, shape, has_vnni):
    if not has_vnni:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    torch.manual_seed(0)
    layer, x = Linear(24, 10, bias=bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    x, expected, int8 = x.view(-1, 24), expected.view(-1, 10), Int8Linear(layer.weight, layer.bias)
    assert int8.reduce_range or has_vnni
    assert int8(x).shape == expected.shape and 0 < (int8(x) - expected).abs().max() < 0.03
    assert not recwarn


def test_gradients_of_linear_for_a_single_row():
    layer, x = Linear(24, 10), torch.randn(1, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.detach().sum(0))
    torch.testing.assert_close(layer.weight.grad, x.detach().expand(10, -1))


def test_int8_weights_are_within_half_a_quantization_step():
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rounded = Int8Linear(weight)(torch.eye(24)).T  # 0 and 1 are exact in 8 bits
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= 0.501 * step + 1e-9).all() and (rounded - weight).abs().max() > 0


def test_tokens_with_own_rows():
    weight = torch.randn(10, 4)
    assert tokens_with_own_rows(weight).tolist() == list(range(10))
    weight[[2, 5, 9]] = weight[2].clone()
    assert tokens_with_own_rows(weight).tolist() == [0, 1, 3, 4, 6, 7, 8]
    weight[7, 0] = weight[2, 0]  # a token that shares only the first element
    assert tokens_with_own_rows(weight).tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert tokens_with_own_rows(torch.zeros(3, 4)).tolist() == [0, 1, 2]  # of a model that generates none
