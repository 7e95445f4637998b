"""The fused loss equals F.cross_entropy of the plain logits, and every other use of the logits computes them."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, GPTConfig
from modern import make_model
from storygpt import loss as module
from storygpt.evaluate import evaluating
from storygpt.loss import Head, Logits, UsedTokens, fuse_loss, fused_linear_cross_entropy
from storygpt.system.hardware import autocast

CPU = torch.device("cpu")


def cross_entropy(x, weight, y, **options):
    """The plain loss."""
    return F.cross_entropy(F.linear(x, weight), y, ignore_index=-1, **options)


def leaves(*shapes):
    """Random tensors that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


# ---- the function ----


@pytest.fixture(params=[(1, 1), (5, 64), (1000, 1)], ids=str)
def chunks(request, monkeypatch):
    """Values of CHUNK_ROWS, for 14 rows, and of VOCAB_MULTIPLE, for 50 columns."""
    for setting, value in zip((module.CHUNK_ROWS, module.VOCAB_MULTIPLE), request.param):
        monkeypatch.setitem(setting, "cpu", value)


def test_loss_and_gradients_equal_plain_cross_entropy(chunks):
    """With ignored targets, and with none but them."""
    x, weight = leaves((14, 16), (50, 16))
    y = torch.arange(14) + 36  # with the last token of the vocabulary, which an index of -1 would select
    for ignored in ([], [0, 5, 6, 12]):
        y[ignored] = -1
        plain = cross_entropy(x, weight, y)
        expected = plain, *torch.autograd.grad(3 * plain, (x, weight))
        mean, losses = fused_linear_cross_entropy(x, weight, y)
        for a, b in zip((mean, *torch.autograd.grad(3 * mean, (x, weight))), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses, cross_entropy(x, weight, y, reduction="none").detach())
        with torch.no_grad():
            assert torch.equal(fused_linear_cross_entropy(x, weight, y)[1], losses)
    mean, losses = fused_linear_cross_entropy(x, weight, torch.full((14,), -1))
    assert mean.isnan() and losses.tolist() == [0] * 14  # the mean of nothing, as in torch


def test_a_head_of_the_used_tokens_gives_the_losses_and_gradients_of_the_whole_head(chunks):
    used = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.5
    x, weight = leaves((14, 16), (50, 16))
    with torch.no_grad():
        weight[~used] = weight[~used][0]
    head = UsedTokens(used)
    y = head.used[torch.randint(len(head.used), (14,))]
    y[3] = -1
    mean = cross_entropy(x, weight, y)
    rows, targets = head.head(weight, y)
    assert 15 < len(rows) == len(head.used) + 1 < 35
    mean_of_rows, _ = fused_linear_cross_entropy(x, rows, targets, len(head.unused))
    for a, b in zip(torch.autograd.grad(3 * mean_of_rows, (x, weight)), torch.autograd.grad(3 * mean, (x, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    y[5] = head.unused[-1]  # in validation text an unused token can be a target
    with torch.no_grad():
        losses = fused_linear_cross_entropy(x, *head.head(weight, y), len(head.unused))[1]
        torch.testing.assert_close(losses, cross_entropy(x, weight, y, reduction="none"), rtol=1e-4, atol=1e-6)


def test_the_whole_head_is_used_once_an_unused_token_is_a_target_in_training_or_unused_rows_differ():
    used, weight = torch.arange(50) < 40, leaves((50, 32))[0]
    with torch.no_grad():
        weight[40:] = weight[40]
    head, y = UsedTokens(used), torch.arange(14)
    assert head.head(weight, y) and head.head(weight, y + 30) is head.head(weight, y) is None
    with torch.no_grad():
        weight[45, 31] += 1  # not among the first columns
    assert UsedTokens(used).head(weight, y) is None


@pytest.mark.parametrize("target_logit", [0.0, 8.0])
def test_loss_in_bfloat16_is_as_exact_as_autocast_for_likely_tokens(monkeypatch, target_logit):
    """A probability near 1 has few digits in bfloat16; the loss and the gradient need those of 1 - p."""
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    x, weight = leaves((200, 16), (50, 16))
    y = torch.randint(50, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x += target_logit * weight[y] / weight[y].square().sum(1, keepdim=True)
    exact_loss, errors = cross_entropy(x, weight, y), []
    exact = [exact_loss, *torch.autograd.grad(exact_loss, (x, weight))]
    for loss_function in (cross_entropy, lambda *args: fused_linear_cross_entropy(*args)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_function(x, weight, y)
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
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 16384)
    x, weight = torch.full((16384, 1), 19.6), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        mean, _ = fused_linear_cross_entropy(x, weight, torch.zeros(16384, dtype=torch.long))
    torch.testing.assert_close(torch.autograd.grad(mean, weight)[0], torch.tensor([[-9.8], [9.8]]), rtol=1e-2, atol=0)


def test_a_target_that_is_no_token_is_an_error(model):
    for used, target in itertools.product((None, torch.arange(50) < 40), (-100, -2, 50)):
        x, y = batch()
        y[0, 0] = target
        with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
            fused(model, used=used)(x, y, mean_loss)


def test_the_backward_pass_can_be_repeated_and_differentiated():
    """As for a gradient penalty, also with a head of the used tokens."""
    leaf, weight = leaves((14, 16), (50, 16))
    with torch.no_grad():
        weight[40:] = weight[40]
    y, used, results = torch.arange(14), UsedTokens(torch.arange(50) < 40), []
    y[3] = -1
    for loss_of in (lambda x: cross_entropy(x, weight, y), lambda x: fused_linear_cross_entropy(x, weight, y)[0],
                    lambda x: fused_linear_cross_entropy(x, *used.head(weight, y), len(used.unused))[0]):
        x = 1.5 * leaf
        loss = loss_of(x)
        first, second = (torch.autograd.grad(3 * loss, x, create_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        results.append([first, *torch.autograd.grad(first.square().sum(), (leaf, weight))])
    for plain, fused, reduced in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=1e-6)
    for x, w in ((leaf, weight.detach()), (leaf.detach(), weight)):  # one is frozen
        gradients = [torch.autograd.grad(loss_of(x, w, y), x if x.requires_grad else w, create_graph=True)[0]
                     for loss_of in (cross_entropy, lambda *args: fused_linear_cross_entropy(*args)[0])]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert fused_linear_cross_entropy(x * math.nan, weight, torch.arange(14))[0].isnan()


# ---- the head of a model ----


class Square(torch.autograd.Function):
    """An operation on logits that is no torch function."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def mean_loss(logits, y, **options):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y.flatten(), ignore_index=-1, **options)


def set_item(logits, y):
    logits[..., 7] = -30.0
    return mean_loss(logits, y)


def change_of_a_view(logits, y):
    logits.view(-1, 50)[:, 3:9].mul_(0.5)
    return mean_loss(logits, y)


def after_a_metric(view):
    def use(logits, y):
        with torch.no_grad():
            view(logits).argmax(-1)
        return mean_loss(logits, y)
    return use


def with_hook(logits, y):
    logits.register_hook(lambda grad: 3 * grad)
    return mean_loss(logits, y)


FUSED = {
    "flatten": lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1),
    "view": mean_loss,
    "reshape": lambda logits, y: F.cross_entropy(logits.reshape(24, 50), y.reshape(-1), None, ignore_index=-1),
    "module": lambda logits, y: nn.CrossEntropyLoss(ignore_index=-1)(logits.view(24, -1), y.view(-1)),
}
PLAIN = {
    "torch's ignored target": lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten().clamp_min(0)),
    "sum": lambda logits, y: mean_loss(logits, y, reduction="sum"),
    "losses": lambda logits, y: mean_loss(logits, y, reduction="none").square().sum(),
    "class weights": lambda logits, y: mean_loss(logits, y, weight=torch.arange(50.0)),
    "label smoothing": lambda logits, y: mean_loss(logits, y, label_smoothing=0.1),
    "probabilities": lambda logits, y: F.cross_entropy(logits.flatten(0, 1), torch.full((24, 50), 0.02)),
    "classes in dimension 1": lambda logits, y: F.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1),
    "softcap": lambda logits, y: mean_loss(5 * torch.tanh(logits / 5), y),
    "float": lambda logits, y: mean_loss(logits.float(), y),
    "z-loss": lambda logits, y: mean_loss(logits, y) + 0.01 * logits.logsumexp(-1).square().mean(),
    "index": lambda logits, y: F.cross_entropy(logits[:, 2], y[:, 2], ignore_index=-1) + logits[0, 1, 2],
    "operators": lambda logits, y: (2 - logits @ torch.ones(50, 3, dtype=logits.dtype)).square().mean(),
    "list": lambda logits, y: torch.cat([logits, logits], 1).square().mean(),
    "set item": set_item,
    "change of a view": change_of_a_view,
    "hook": with_hook,
    "after a metric": after_a_metric(lambda logits: logits),
    "after a metric of a view": after_a_metric(lambda logits: logits.view(-1, 50)),
    "Function": lambda logits, y: Square.apply(logits).mean(),
}
USES = FUSED | PLAIN


class Model(GPT):
    """A GPT whose loss is an arbitrary function of its logits."""

    def forward(self, idx, targets, use):
        x = self.hidden_states(idx, torch.arange(idx.size(1)), None)
        return use(self.lm_head(self.transformer.ln_f(x)), targets)


@pytest.fixture
def model():
    """A small model, whose last 18 tokens do not occur."""
    torch.manual_seed(0)
    model = Model(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
        model.transformer.wte.weight[32:] = 0
    return model


def batch():
    """Inputs and targets, (3, 8) each; some targets are ignored."""
    idx = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))
    return idx[:, :-1], idx[:, 1:].masked_fill(torch.arange(8) == 5, -1)


def loss_and_gradients(model, use, dtype=torch.float32):
    """The loss of a `use` of the logits, and the gradients of the parameters that it depends on."""
    with autocast(CPU, dtype):
        loss = model(*batch(), use)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def fused(model, **options):
    """A copy of a model with the fused loss."""
    model = copy.deepcopy(model)
    fuse_loss(model, **options)
    return model


def node_names(loss):
    """The names of all nodes in a loss's graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            nodes += [parent for parent, _ in node.next_functions if parent]
        seen.add(node)
    return {node.name() for node in seen}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_logits_gives_the_loss_and_gradients_of_the_plain_model(model, use):
    """Only cross-entropies are fused; without any, the plain loss would be compared with itself."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        expected = loss_and_gradients(model, USES[use], dtype)
        for used in (None, torch.arange(50) < 32):
            for a, b in zip(loss_and_gradients(fused(model, used=used), USES[use], dtype), expected, strict=True):
                assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm() + 1e-7
    names = node_names(fused(model)(*batch(), USES[use]))
    assert ("_FusedLinearCrossEntropyBackward" in names) == (use in FUSED or use == "z-loss")


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_logits_that_are_used_outside_of_autocast(dtype, tolerance, architecture):
    torch.manual_seed(0)
    model, (x, y) = make_model(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16,
                                         architecture=architecture)), batch()
    for use in (mean_loss, lambda logits, y: logits.float().logsumexp(-1).mean()):
        losses = []
        for m in (fused(model), model):
            with autocast(CPU, dtype):
                logits = m.eval()(x)
            assert logits.dtype == dtype and logits.requires_grad and logits.shape == (3, 8, 50) and len(logits) == 3
            losses.append(use(logits, y).item())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_losses_of_each_token_without_gradients(model):
    used, (x, y) = torch.arange(50) < 32, batch()
    x, y = x.clone(), y.clone()
    x[0, 0] = y[0, 0] = 40  # in validation text an unused token can occur
    with torch.no_grad():
        for use in (mean_loss, lambda logits, y: mean_loss(logits, y, reduction="none")):
            for m in (fused(model), fused(model, used=used)):
                torch.testing.assert_close(m(x, y, use), model(x, y, use), rtol=1e-4, atol=1e-5)


def test_unused_tokens_have_equal_rows_only_if_asked_and_are_not_merged_otherwise(model):
    used = torch.arange(50) < 32
    with torch.no_grad():
        model.transformer.wte.weight.normal_()
    unequal, equal = fused(model, used=used), fused(model, used=used, equalize=True)
    assert torch.equal(unequal.lm_head.weight, model.lm_head.weight)
    assert not equal.lm_head.weight[32:].any() and equal.lm_head.weight is equal.transformer.wte.weight
    for actual, expected in zip(loss_and_gradients(unequal, mean_loss), loss_and_gradients(model, mean_loss)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_as_wide_as_the_vocabulary_keeps_its_weights():
    """c_fc has 64 outputs, as many as there are tokens; only the head has rows of tokens."""
    model = GPT(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=False)).eval()
    for equalize in (False, True):
        other = fused(model, used=torch.arange(64) < 40, equalize=equalize)
        assert torch.equal(other.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
        assert equalize or other(*batch()).item() == pytest.approx(model(*batch()).item(), rel=1e-5)


@pytest.mark.parametrize("edit", [  # others: test_fast.py
    lambda head: head.register_forward_hook(lambda *_: None), torch.nn.utils.parametrizations.weight_norm,
    lambda head: setattr(head, "bias", nn.Parameter(torch.ones(50)))])
def test_an_edited_head_is_not_replaced(model, edit):
    model.lm_head = nn.Linear(16, 50, bias=False)
    edit(model.lm_head)
    kind = type(model.lm_head)
    fuse_loss(model)
    assert type(model.lm_head) is kind and type(model(*batch(), lambda logits, y: logits)) is torch.Tensor


def test_hooks_on_the_replaced_head_and_printing_see_the_logits(model):
    (x, y), seen = batch(), []
    model, plain = fused(model), model
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    model.lm_head.register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0]))
    model(x, y, mean_loss).backward()
    expected = plain(x, y, lambda logits, y: logits)
    assert type(model.lm_head) is Head and type(model(x, y, lambda logits, y: logits)) in (Logits, torch.Tensor)
    torch.testing.assert_close(seen[0] + 0, expected)
    torch.testing.assert_close(seen[1], torch.autograd.grad(mean_loss(expected, y), expected)[0])
    with torch.no_grad(), evaluating(plain):
        logits = fused(plain)(x, y, lambda logits, y: logits)
        assert type(logits) is Logits and repr(logits) == repr(logits + 0)
        torch.testing.assert_close(Square.apply(logits), Square.apply(logits + 0))


def test_logits_in_no_grad_are_those_of_the_weight_at_that_time(model):
    """As of a teacher, whose weights are put into the model for one call."""
    (x, y), model = batch(), fused(model)
    with torch.no_grad():
        expected = model(x, y, lambda logits, y: logits) + 0
        logits = model(x, y, lambda logits, y: logits)
        model.lm_head.weight.mul_(2)
        assert torch.equal(logits + 0, expected)


def test_the_loss_of_a_float64_model_is_float64(model):
    (x, y), plain = batch(), model.double()
    torch.testing.assert_close(fused(plain)(x, y, mean_loss), plain(x, y, mean_loss), rtol=1e-14, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_head(model, use_reentrant):
    """torch.utils.checkpoint around the last norm and the head, and around these with the loss."""
    for recomputed in (lambda head, x, y: mean_loss(checkpoint(head, x, use_reentrant=use_reentrant), y),
                       lambda head, x, y: checkpoint(lambda x: mean_loss(head(x), y), x, use_reentrant=use_reentrant)):
        results = []
        for m in (fused(model), model):
            x, y = batch()
            head = torch.nn.Sequential(m.transformer.ln_f, m.lm_head)
            loss = recomputed(head, m.hidden_states(x, torch.arange(8), None), y)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in m.parameters())])
            m.zero_grad()
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
