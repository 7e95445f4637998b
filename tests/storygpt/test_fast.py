"""The faster replacements compute what torch's layers and functions do, and leave everything else as it is."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import GPTConfig
from modern import make_model
from storygpt import fast

CPU = torch.device("cpu")


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


# ---- which modules are replaced ----

def register(name):
    return lambda layer: getattr(layer, f"register_{name}")(lambda *_: None)


EDITS = {
    "subclass": lambda layer: setattr(layer, "__class__", type("Edited", (nn.Linear,), {})),
    **{hook: register(hook) for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook",
                                         "full_backward_pre_hook")},
    "own forward": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, 2 * layer.weight)),
    "parametrization": torch.nn.utils.parametrizations.weight_norm,
    "weight_norm": torch.nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("edit", EDITS)
def test_a_layer_that_was_changed_in_any_way_is_not_plain(edit):
    layer, x = nn.Linear(24, 10, bias=False), seeded(2, 24)
    assert fast.is_plain(layer, nn.Linear) and not fast.is_plain(layer, nn.Module)
    EDITS[edit](layer)
    expected = layer(x)
    assert not fast.is_plain(layer, nn.Linear)
    fast.use_fast_linear(layer, int8=True)
    assert torch.equal(layer(x), expected)


# ---- training on a CPU ----


def test_functions_are_replaced_in_the_context_only():
    torchs, q = (F.dropout, F.scaled_dot_product_attention), seeded(2, 3, 9, 8).requires_grad_()
    with pytest.raises(KeyError), fast.faster_functions(CPU):
        assert (F.dropout, F.scaled_dot_product_attention) == (fast.dropout, fast.attention)
        node = F.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn
        assert node.name() != fast.torch_attention(q, q, q, is_causal=True).grad_fn.name()
        raise KeyError
    assert (F.dropout, F.scaled_dot_product_attention) == torchs
    with fast.faster_functions(torch.device("cuda")):
        assert (F.dropout, F.scaled_dot_product_attention) == torchs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_has_the_same_loss_and_gradients(dtype, tolerance, architecture):
    torch.manual_seed(0)
    model = make_model(GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0,
                                 architecture=architecture))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # some matrices are initialized to zero
    idx, results = torch.randint(50, (3, 9)), []
    for device in (CPU, torch.device("cuda")):  # with the replacements and without
        with fast.faster_functions(device):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(idx[:, :-1], idx[:, 1:])
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() < tolerance * expected.norm() + 1e-6


@pytest.mark.parametrize("p, dtype", [(0.1, torch.float32), (0.5, torch.bfloat16)])
def test_dropout_has_probability_p_everywhere_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(40, 1003, requires_grad=True, dtype=dtype)
    y = fast.dropout(x, p)
    dropped = (y == 0).float()
    assert y.dtype == dtype and dropped.mean().item() == pytest.approx(p, abs=0.01)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 4e-3)
    assert y.unique().numel() == 2
    lanes = dropped.flatten()[:40_000].view(-1, 4)  # four elements share one 64-bit random number
    assert (lanes.mean(0) - p).abs().max() < 0.02
    assert torch.corrcoef(lanes.T).fill_diagonal_(0).abs().max() < 0.05
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(fast.dropout(x, p), y)


@pytest.mark.parametrize("options", [dict(p=0.0), dict(p=0.5, training=False), dict(p=0.5, inplace=True), dict(p=1.0),
                                     dict(p=0.999999), dict(p=1e-7)])
def test_other_dropout_is_torchs(options):
    results = []
    for dropout in (fast.dropout, fast.torch_dropout):
        torch.manual_seed(0)
        x = seeded(4, 6)
        results.append((dropout(x, **options), x))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        fast.dropout(seeded(4), -0.1)


def test_recomputed_dropout_has_the_same_mask():
    x = torch.ones(100, requires_grad=True)
    with fast.faster_functions(CPU):
        y = checkpoint(lambda x: F.dropout(x) * x, x, use_reentrant=False)
        y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach())


def test_dropout_of_attention_weights():
    torch.manual_seed(0)
    q = seeded(1, 2, 64, 64).requires_grad_()
    v = torch.eye(64).expand(1, 2, 64, 64)  # then the output is the weights
    weights, dropped = (fast.attention(q, q, v, None, p, True) for p in (0.0, 0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped, weights / 0.75 * kept)
    assert kept.sum() / (weights != 0).sum() == pytest.approx(0.75, abs=0.03)


T = 2 * fast.QUERIES + 7


@pytest.mark.parametrize("options, L", [
    (dict(is_causal=True), T), (dict(attn_mask=seeded(T, T)), T), (dict(attn_mask=seeded(2, 1, T, 7)), 7),
], ids=["causal", "mask", "mask of each sequence"])
def test_attention_with_gradients_is_torchs(options, L):
    q, k, v = (x.requires_grad_() for x in (seeded(2, 3, T, 8), *seeded(2, 2, 3, L, 8)))
    own, expected = (function(q, k, v, **options) for function in (fast.attention, fast.torch_attention))
    assert own.grad_fn.name() != expected.grad_fn.name()
    torch.testing.assert_close(own, expected)
    weights = seeded(*own.shape)
    for gradients in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (own, expected))):
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


MASK = torch.ones(9, 9, dtype=torch.bool).tril(2)


@pytest.mark.parametrize("shapes, options", [
    ([(2, 4, 9, 8)] * 3, dict(attn_mask=MASK)), ([(2, 4, 9, 8)] * 3, dict(is_causal=False)),
    ([(2, 4, 9, 8)] * 3, dict(attn_mask=seeded(9, 9), scale=0.3)),
    ([(2, 4, 9, 8)] * 3, dict(attn_mask=torch.zeros(9, 9).index_fill_(0, torch.tensor(3), -math.inf))),
    ([(2, 4, 9, 8)] * 3, dict(is_causal=True, scale=0.3)), ([(4, 9, 8)] * 3, dict(is_causal=True)),
    ([(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)], dict(is_causal=True, enable_gqa=True)),
    ([(2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8)], dict(is_causal=True)),
    ([(2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 6)], dict(is_causal=True)),
])
def test_other_attention_is_torchs(shapes, options):
    q, k, v = (seeded(*shape).requires_grad_() for shape in shapes)
    y = fast.attention(q, k, v, **options)
    assert torch.equal(y, fast.torch_attention(q, k, v, **options))
    assert y.grad_fn.name() == fast.torch_attention(q, k, v, **options).grad_fn.name()
    with torch.no_grad():
        q = seeded(2, 4, 9, 8)
        assert torch.equal(fast.attention(q, q, q, is_causal=True),
                           fast.torch_attention(q, q, q, is_causal=True))


# ---- generating ----


def fast_linear(layer, int8=False):
    """A FastLinear of the weights of an nn.Linear, which stays as it is."""
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
    model[0].load_state_dict(layer.state_dict())
    fast.use_fast_linear(model, int8)
    assert type(model[0]) is fast.FastLinear and torch.equal(model[0].weight, layer.weight)
    return model[0]


@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 3, 24), (24,), (2, 0, 24)])
@torch.no_grad()
def test_linear_equals_torchs(monkeypatch, recwarn, shape):
    """Also of an empty batch, as that of an expert that no token is routed to, and with equal rows."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    for bias, equal_rows in ((True, []), (False, [2, 3, 5, 6, 8, 9]), (True, [2, 3, 5, 6, 8, 9]), (False, range(10))):
        layer = nn.Linear(24, 10, bias=bias)
        layer.weight[list(equal_rows)] = layer.weight[2].clone()  # the biases differ
        torch.testing.assert_close(fast_linear(layer)(x), layer(x))
        for reduce_range in {True, fast.REDUCE_RANGE}:
            monkeypatch.setattr(fast, "REDUCE_RANGE", reduce_range)
            actual = fast_linear(layer, int8=True)(x)
            torch.testing.assert_close(actual, layer(x), rtol=0, atol=0.03)
            assert not x.numel() or not torch.equal(actual, layer(x))
    layer = nn.Linear(24, 100, bias=False)
    layer.weight[30:] = 0.5
    head = fast_linear(layer)
    assert head.row_weight.shape == (31, 24)  # equal rows are computed once
    assert torch.equal(head(x)[..., 30:], head(x)[..., 30:31].expand(*shape[:-1], 70))
    assert not recwarn


def test_the_gradient_of_a_single_token_and_a_second_conversion():
    layer, x = nn.Linear(24, 10), seeded(1, 24).requires_grad_()
    fast_linear(layer)(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.detach().sum(0))
    fast.use_fast_linear(layer, int8=True)
    with torch.no_grad():
        layer.weight.mul_(2)
        fast.use_fast_linear(layer, int8=False)  # uses the weights as they are then
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_int8_weights_are_within_half_a_quantization_step():
    layer = nn.Linear(24, 50, bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
        rounded = fast_linear(layer, int8=True)(torch.eye(24)).T  # 0 and 1 are exact in 8 bits
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - layer.weight).abs() <= 0.501 * step + 1e-9).all() and (rounded - layer.weight).abs().max() > 0


def test_direct_calls_skip_no_hook_and_no_forward():
    model, calls, x = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 10), nn.Tanh()), [], seeded(2, 24)
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[1].forward = lambda x: x - 1
    model[2].register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    expected = model(x)
    for _ in range(2):  # twice is no different
        fast.call_directly(model)
    assert torch.equal(model(x), expected) and calls == ["hook", "pre-hook"] * 2
    model[1].register_forward_hook(lambda *_: calls.append("later"))
    assert torch.equal(model(x), expected) and calls[4:] == ["hook", "later", "pre-hook"]


def test_a_child_that_is_replaced_after_the_conversion_is_used():
    model, x = make_model(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=30)).eval(), seeded(1, 8)
    fast.call_directly(model)
    block = model.transformer.h[0]
    block.mlp, model.transformer["ln_f"] = nn.Identity(), nn.Identity()
    assert block.mlp(x) is x and model.transformer.ln_f(x) is x
    masked = nn.Sequential(nn.Dropout(0.5))
    masked[0].register_forward_hook(lambda *_: x + 1)  # such as dropout in generation, for the uncertainty of a model
    fast.call_directly(masked.eval())
    assert torch.equal(masked(x), x + 1)


# ---- loading ----


def test_skipped_initial_values_are_the_random_ones_of_parameters_only():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with fast.skip_init():
        nn.Linear(24, 10), nn.Embedding(5, 3), nn.init.orthogonal_(nn.Parameter(torch.zeros(4, 4)))
        assert torch.equal(torch.get_rng_state(), state)
        assert nn.LayerNorm(6).weight.eq(1).all()
        assert nn.init.normal_(torch.zeros(50)).std() > 0.5
