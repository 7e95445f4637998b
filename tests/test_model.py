"""Both architectures: size, initialization, causality, loss. Generation is in tests/storygpt/test_generate.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from modern import make_model
from storygpt.settings import Config

each_architecture = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


def small(**changes):
    """A small model in eval mode, with weights large enough that its samples differ."""
    torch.manual_seed(0)
    config = dict(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16) | changes
    model = make_model(GPTConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.02)
            p.mul_(8)
    return model


def test_the_published_model_has_29995392_parameters_and_gpt2s_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257))
    assert model.num_parameters() == 29_995_392
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.02)
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.02)
    for name in ("transformer.h.3.mlp.c_proj.weight", "transformer.h.0.attn.c_proj.weight"):
        assert std[name] == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    idx = torch.randint(50257, (2, 17), generator=torch.Generator().manual_seed(1))
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(50257)) < 0.15  # of a uniform distribution


def test_config_from_settings_and_biases_are_optional():
    settings = Config(block_size=32, n_layer=3, n_head=2, n_embd=64, dropout=0.3, bias=False, gelu="exact")
    assert settings.model_config(500) == GPTConfig(vocab_size=500, block_size=32, n_layer=3, n_head=2, n_embd=64,
                                                   dropout=0.3, bias=False, gelu="exact")
    for bias in (True, False):
        assert any(name.endswith("bias") for name, _ in small(bias=bias).named_parameters()) == bias


@pytest.mark.parametrize("changes, approximate", [({}, "tanh"), ({"gelu": "exact"}, "none")])
def test_the_gelu_is_the_tanh_approximation_or_exact(changes, approximate):
    x, mlp = torch.linspace(-4, 4, 99), small(**changes).transformer.h[0].mlp
    mlp.c_fc = mlp.c_proj = torch.nn.Identity()
    assert torch.equal(mlp(x), F.gelu(x, approximate=approximate))
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


@each_architecture
def test_logits_do_not_depend_on_later_tokens(architecture):
    model, idx = small(architecture=architecture), torch.randint(50, (1, 8))
    logits = model(idx)
    for t in range(1, 8):
        changed = idx.clone()
        changed[0, t:] = (changed[0, t:] + 1) % 50
        assert torch.equal(model(changed)[0, :t], logits[0, :t])
        assert not torch.allclose(model(changed)[0, t], logits[0, t])


@each_architecture
def test_the_head_is_tied_and_the_loss_is_the_mean_cross_entropy_without_ignored_targets(architecture):
    model, idx = small(architecture=architecture), torch.randint(50, (3, 9))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {"lm_head.weight", "transformer.wte.weight"} < set(model.state_dict())
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[:, 3] = -1
    losses = -model(x).log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0]  # (3, 8)
    torch.testing.assert_close(model(x, y), losses[y >= 0].mean())
    with pytest.raises(ValueError, match="9 tokens are more than block_size = 8"):
        model(idx)
