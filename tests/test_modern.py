"""modern.py: what differs from model.py. Tests that hold for both architectures are in test_model.py and elsewhere."""

import itertools
import math

import torch

import modern
import train
from conftest import TINY
from model import GPTConfig
from modern import VALUE_SCALE, WINDOW, Modern, normalize, rotate, window_mask
from storygpt.generate import KVCache


def small(**changes):
    """A small model in eval mode with its initial weights."""
    torch.manual_seed(0)
    config = dict(vocab_size=50, block_size=8, n_layer=3, n_head=2, n_embd=16, bias=False)
    return Modern(GPTConfig(**config | changes)).eval()


def test_rotated_scores_depend_on_the_distance_alone():
    model = small(block_size=64, n_embd=32)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 64, 1, 8)  # (1, T, 1, R): the same vector at every position
    q, k = (rotate(x, model.cos[:, None], model.sin[:, None])[0, :, 0] for x in (q, k))  # (T, R)
    scores = q @ k.T  # (T, T)
    for distance in (0, 1, 40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(64))
    rotated = rotate(torch.ones(1, 1, 1, 8), model.cos[1:2, None], model.sin[1:2, None]).flatten()
    angle = torch.tensor(1.0)  # radians per token, of the first pair: checkpoints depend on the direction
    torch.testing.assert_close(rotated[[0, 4]], torch.stack([angle.cos() - angle.sin(), angle.cos() + angle.sin()]))


def test_half_of_a_key_is_that_of_the_token_before():
    model = small(n_layer=1, n_head=1)
    attention, rotation = model.transformer.h[0].attn, (model.cos[:, None], model.sin[:, None])
    keys, x = [], torch.randn(1, 8, 16)
    for _ in range(2):
        cache = KVCache(8, "cpu")
        cache.advance(8)
        attention(x, rotation, torch.zeros(1, 8, 16), None, cache)
        keys.append(cache.keys[0][0, 0])  # (T, D)
        x[0, 5] += 1
    changed = keys[0] != keys[1]
    assert changed[:, :8].any(1).nonzero().flatten().tolist() == [5]
    assert changed[:, 8:].any(1).nonzero().flatten().tolist() == [6]
    assert not keys[0][0, 8:].any() and keys[0][1:, 8:].all()


def test_a_token_attends_to_the_window_before_it():
    model = small(block_size=3 * WINDOW, n_layer=1)
    torch.nn.init.normal_(model.transformer.h[0].attn.c_proj.weight)
    idx, token = torch.randint(50, (2, 3 * WINDOW)), 40
    idx[1] = idx[0]
    idx[1, token] = (idx[0, token] + 1) % 50
    one, other = model(idx)
    changed = (one != other).any(1).nonzero().flatten().tolist()
    assert changed == list(range(token, token + WINDOW + 1))  # the last one by the key of the token after it


def test_window_attention_is_attention_with_a_mask(monkeypatch):
    monkeypatch.setattr(modern, "WINDOW", 4)
    for T in (1, 3, 4, 10):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 3, T, 8))
        visible = torch.ones(T, T, dtype=torch.bool).tril().triu(-3)
        own = modern.window_attention(q, k, v, modern.window_mask(torch.zeros(2, T, 24)), 0.0)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible)
        torch.testing.assert_close(own, expected)
        weights = torch.randn(own.shape)
        for gradients in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (own, expected))):
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_parameters_and_blocks_that_start_as_the_identity():
    model, idx = small(), torch.randint(50, (2, 8))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = [shape for name, shape in shapes.items() if name.startswith("transformer.h.")]
    assert blocks == [(48, 16), (16, 16), (2, 16), (64, 16), (16, 64)] * 3
    assert len(shapes) == len(blocks) + 3 and shapes["transformer.wte.weight"] == (50, 16)  # the norm and ve
    assert shapes["transformer.ve.weight"] == (50, 3 * 16)
    torch.testing.assert_close(model(idx), normalize(model.transformer.wte(idx)) @ model.transformer.wte.weight.T)
    assert abs(model(idx, idx.roll(-1, 1)).item() - math.log(50)) < 0.15
    biases = [p for name, p in small(bias=True).named_parameters() if name.endswith("bias")]
    assert len(biases) == 3 * 4 + 1 and not any(p.any() for p in biases)


def test_queries_keys_and_values_start_as_the_input():
    """The first half of its dimensions in the halves of the heads without positions."""
    x = torch.arange(16.0)
    for block in small().transformer.h:  # 2 heads of 8 dimensions
        q, k, v = block.attn.c_attn(x).view(3, 2, 2, 4)
        assert torch.equal(q, k) and torch.equal(q, v)
        assert torch.equal(q[:, 1], x[:8].view(2, 4)) and torch.equal(q[:, 0], x[8:].view(2, 4))


def test_a_value_embedding_adds_to_the_values_of_its_token_in_each_block():
    """So in a sequence of one token, where attention returns its value, it adds c_proj of itself."""
    model, idx = small(), torch.tensor([[3, 7, 3, 9]])
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight)
    model(idx, idx.roll(-1, 1)).backward()
    for grad in model.transformer.ve.weight.grad.chunk(3, 1):  # of each block
        assert grad.any(1).nonzero().flatten().tolist() == [3, 7, 9]
    attention, rotation = model.transformer.h[0].attn, (model.cos[:1, None], model.sin[:1, None])
    x, embedding = torch.randn(2, 1, 1, 16)
    with torch.no_grad():
        mask = window_mask(x)
        difference = attention(x, rotation, embedding, mask) - attention(x, rotation, torch.zeros(1, 1, 16), mask)
        torch.testing.assert_close(difference, attention.c_proj(VALUE_SCALE * embedding), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_gate_is_a_factor_on_what_its_head_found():
    """Between 0 and 2, by the input of each token."""
    model = small(n_layer=1)
    attention, rotation, values = model.transformer.h[0].attn, (model.cos[:, None], model.sin[:, None]), torch.randn(16)
    attention.c_proj.weight.copy_(torch.eye(16).flip(0))  # so the second head's output comes first
    x = torch.ones(1, 8, 16)
    x[:, 5:] = -1
    without = attention(x, rotation, values.expand(1, 8, 16), window_mask(x))
    attention.gate.weight[1] = math.log(3) / 16  # of the second head
    gated = attention(x, rotation, values.expand(1, 8, 16), window_mask(x))
    assert without.all() and torch.equal(gated[..., 8:], without[..., 8:])
    torch.testing.assert_close(gated[:, :5, :8], 1.5 * without[:, :5, :8])
    torch.testing.assert_close(gated[:, 5:, :8], 0.5 * without[:, 5:, :8])


def test_every_dropout_is_used():
    """Also that of the attention weights, which is no module: it alone is left in the end."""
    model, used, idx = small(dropout=0.5).train(), set(), torch.arange(8)[None]
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    for name, module in dropouts.items():
        module.register_forward_hook(lambda *_, name=name: used.add(name))
    model(idx)
    assert len(used) == 1 + 3 * 2 == len(dropouts)
    for block, module in itertools.product(model.transformer.h, dropouts.values()):
        torch.nn.init.normal_(block.attn.c_proj.weight)
        module.p = 0.0
    assert not torch.equal(model(idx), model(idx))


def test_a_run_is_trained_and_fine_tuned(with_data, capsys, fails):
    short = [*TINY, "--max_iters=8"]  # with 2 the gates would still be 0
    train.main([*short, "--architecture=modern", "--bias=False", "--optimizer=muon", "--out_dir=out/x"])
    assert "20,624 parameters" in capsys.readouterr().out
    train.main([*short, "--init_from=out/x", "--block_size=8", "--out_dir=out/y"])
    assert "starting from the weights of out/x" in capsys.readouterr().out
    odd = [*TINY, "--architecture=modern", "--n_embd=18", "--out_dir=out/z"]
    assert "n_embd / n_head = 9 is not a multiple of 4" in fails(train.main, odd)
