"""The model: its size, initialization, causality, loss, KV cache and sampling."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from config import Config
from layers import fused_linear_cross_entropy, linear_cross_entropy
from model import GPT, GPTConfig, KVCache, fast_topk, sample_token, window_start
from modern import count_parameters, make_model
from runtime.hardware import autocast

each_architecture = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


def small(**changes):
    """A small model in eval mode, with weights large enough that its samples differ."""
    torch.manual_seed(0)
    config = GPTConfig(**dict(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16) | changes)
    model = make_model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.02)
            p.mul_(8)
    return model


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50257))


def test_published_model_has_29995392_parameters(published):
    assert published.num_parameters() == 29_995_392
    assert len({p.data_ptr() for p in published.parameters()}) == len(list(published.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@each_architecture
def test_count_parameters_builds_no_model_and_draws_no_random_numbers(bias, architecture):
    config = GPTConfig(300, 16, 3, 2, 24, bias=bias, architecture=architecture)
    expected, state = make_model(config).num_parameters(), torch.get_rng_state()
    assert count_parameters(config) == expected
    assert count_parameters(GPTConfig(10**9, n_embd=1200, architecture=architecture)) > 1.2e12  # more than any memory
    assert torch.equal(torch.get_rng_state(), state)


def test_config_from_settings():
    settings = Config(block_size=32, n_layer=3, n_head=2, n_embd=64, dropout=0.3, bias=False)
    assert GPTConfig.from_settings(settings, 500) == GPTConfig(500, 32, 3, 2, 64, 0.3, False)


def test_pretrained_weights_of_a_longer_block():
    model, longer = small(), small(block_size=12)
    with torch.no_grad():
        longer.transformer.wpe.weight.normal_()
    model.load_pretrained(longer.state_dict())
    idx = torch.randint(50, (2, 8))
    assert torch.equal(model(idx), longer(idx))


@pytest.mark.parametrize("change", [
    lambda weights: weights.pop("transformer.ln_f.weight"), lambda weights: weights.update(extra=torch.zeros(8)),
    lambda weights: weights.update({"transformer.wpe.weight": torch.zeros(4, 16)}),
])
def test_pretrained_weights_that_do_not_fit(change):
    weights = small().state_dict()
    change(weights)
    with pytest.raises(RuntimeError):
        small().load_pretrained(weights)


def test_first_loss_is_that_of_a_uniform_distribution(published):
    idx = torch.randint(50257, (2, 129), generator=torch.Generator().manual_seed(1))
    loss = published(idx[:, :-1], idx[:, 1:]).item()
    assert abs(loss - math.log(50257)) < 0.15


def test_initialization_is_gpt2s(published):
    std = {name: p.std().item() for name, p in published.named_parameters()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.02)
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.02)
    for name in ("transformer.h.3.mlp.c_proj.weight", "transformer.h.0.attn.c_proj.weight"):
        assert std[name] == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert all((p == 0).all() for name, p in published.named_parameters() if name.endswith("bias"))


def test_without_bias_there_are_only_weights():
    names = [name for name, _ in small(bias=False).named_parameters()]
    assert names and not [name for name in names if name.endswith("bias")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_architecture
def test_the_estimate_for_a_gpu_is_what_autograd_saves(dtype, architecture):
    """Counted on the CPU in eval mode, with the functions that CUDA uses; a dropout mask has a byte per element."""
    cpu = torch.device("cpu")
    shape = dict(block_size=64, n_head=2, n_embd=64, architecture=architecture)

    def saved_bytes(n_layer):
        model = small(n_layer=n_layer, **shape)
        weights, saved = {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(cpu, dtype):
            model.hidden_states(torch.zeros(8, 64, dtype=torch.long), torch.arange(64), None)
        return sum(t.untyped_storage().nbytes() for address, t in saved.items()
                   if address not in weights and t.size(0) in (8, 8 * 64))  # others: weights in autocast's dtype

    def estimate(n_layer):
        return 8 * GPTConfig(50, n_layer=n_layer, **shape).training_bytes(0, "cuda", dtype)[1]

    masks = 2 * 2 * 8 * 64 * 64  # in two layers
    assert estimate(4) - estimate(2) == pytest.approx(saved_bytes(4) - saved_bytes(2) + masks, rel=0.02)


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
def test_loss_is_the_cross_entropy_of_the_logits(architecture):
    model, idx = small(architecture=architecture), torch.randint(50, (3, 9))
    x, y = idx[:, :-1], idx[:, 1:]
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(3, 8)
    torch.testing.assert_close(model(x, y, reduction="none"), expected)
    torch.testing.assert_close(model(x, y), expected.mean())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_plain_loss_function_gives_the_same_loss_and_gradients(dtype, tolerance):
    fused, plain = small(), small()
    fused.loss_function = fused_linear_cross_entropy
    plain.loss_function = torch.compiler.disable(linear_cross_entropy)  # train.py wraps it so for compiled models
    idx = torch.randint(50, (3, 9))
    results = []
    for model in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            mean, losses = (model(idx[:, :-1], idx[:, 1:], reduction=reduction) for reduction in ("mean", "none"))
        mean.backward()
        assert mean.requires_grad and not losses.requires_grad
        results.append([mean.detach(), losses, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() < tolerance * expected.norm()


def test_more_tokens_than_a_block_are_a_clear_error():
    with pytest.raises(ValueError, match="9 tokens are more than block_size = 8"):
        small()(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("block_size", [2, 7, 8])
@pytest.mark.parametrize("prompt", [1, 8, 21])
@each_architecture
def test_cached_logits_equal_uncached_logits_also_past_the_block(block_size, prompt, architecture):
    model = small(block_size=block_size, architecture=architecture)
    idx = torch.randint(50, (2, prompt))
    cached = []
    hook = model.register_forward_hook(lambda module, inputs, logits: cached.append(logits[:, -1].clone()))
    tokens = list(model.generate(idx, 3 * block_size + 2, temperature=0))
    hook.remove()
    for logits, token in zip(cached, tokens, strict=True):
        plain = model(idx[:, window_start(idx.size(1), block_size):])[:, -1]
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(token, plain.argmax(-1))
        idx = torch.cat([idx, token[:, None]], 1)


def test_window_start_advances_by_half_a_block():
    T, h = 8, 4
    assert [window_start(n, T) for n in range(1, 20)] == [
        0 if n <= T else h * math.ceil((n - T) / h) for n in range(1, 20)]
    assert all(1 <= n - window_start(n, T) <= T for T in (2, 3, 8, 9) for n in range(1, 50))


@torch.no_grad()
@pytest.mark.parametrize("fixed_shapes", [False, True])  # as on a CPU, as on a GPU
@each_architecture
def test_cache_filled_by_a_prompt_and_by_single_tokens(fixed_shapes, architecture):
    model, idx = small(architecture=architecture).double(), torch.randint(50, (2, 8))
    cache = KVCache(model.config, 2, "cpu", torch.float64)
    cache.fixed_shapes = fixed_shapes
    model(idx[:, :5], cache=cache)
    for t in range(5, 8):
        logits = model(idx[:, t:t + 1], cache=cache)
    assert cache.length == 8 and cache.kv.size(2) == 8
    torch.testing.assert_close(logits[:, -1], model(idx)[:, -1])


def test_generation_stops_when_all_sequences_have_ended():
    model = small()
    steps = torch.stack(list(model.generate(torch.zeros(4, 1, dtype=torch.long), 4000, end_of_text=7,
                                            generator=torch.Generator().manual_seed(0))), 1)  # (4, steps)
    assert steps.size(1) < 4000
    ends = [row.tolist().index(7) for row in steps]
    assert len(set(ends)) > 1 and max(ends) == steps.size(1) - 1
    assert all((row[end:] == 7).all() for row, end in zip(steps, ends))


def test_ended_sequences_are_dropped_from_the_batch():
    model, prompts = small().double(), torch.randint(50, (12, 3))
    endless = torch.stack(list(model.generate(prompts, 30, temperature=0)), 1)  # (12, 30)
    first = [(row[:, None] == torch.arange(50)).int().argmax(0) for row in endless]  # step of each token, 0 if none
    end_of_text = int(torch.stack(first).gt(0).sum(0).argmax())  # the one in most sequences, at a later step
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    steps = torch.stack(list(model.generate(prompts, 30, temperature=0, end_of_text=end_of_text)), 1)
    ended = (endless == end_of_text).int().cumsum(1).gt(0)
    assert torch.equal(steps, endless.masked_fill(ended, end_of_text)[:, :steps.size(1)])
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2


def test_generate_with_logits():
    model, idx = small().double(), torch.randint(50, (2, 3))  # double: rounding is far below the tolerance
    for token, logits in model.generate(idx, 12, temperature=0, with_logits=True):
        with torch.no_grad():
            expected = model(idx[:, window_start(idx.size(1), 8):])[:, -1]  # (B, V)
        torch.testing.assert_close(logits, expected)
        assert torch.equal(token, logits.argmax(-1))
        idx = torch.cat([idx, token[:, None]], 1)


def test_seed_determines_the_story():
    def story(seed):
        generator = torch.Generator().manual_seed(seed)
        return [t.item() for t in small().generate(torch.zeros(1, 1, dtype=torch.long), 20, generator=generator)]
    assert story(1) == story(1) != story(2)


def frequencies(logits, n=10_000, **settings):
    """The relative frequency of each token (V) in n samples from the same logits (V)."""
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    tokens = sample_token(logits.expand(n, -1), **options, generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.numel()) / n


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = F.softmax(logits / temperature, 0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=0.02, rtol=0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature, top_k=4, top_p=0.99999), expected,
                                   atol=0.02, rtol=0)


def test_top_k_and_top_p_exclude_all_other_tokens():
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log()
    assert frequencies(logits, top_k=2).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, top_k=1)[1] == 1
    assert frequencies(logits, top_k=99).nonzero().numel() == 4
    assert frequencies(logits, top_p=0.45)[1] == 1
    assert frequencies(logits, top_p=0.6).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, top_p=1e-9)[1] == 1
    torch.testing.assert_close(frequencies(logits, top_k=2)[1], torch.tensor(0.5 / 0.8), atol=0.02, rtol=0)


def test_temperature_zero_and_near_zero_select_the_most_likely_token():
    logits = torch.tensor([0.0, 80.0, 79.9, -5.0])
    assert frequencies(logits, temperature=0)[1] == 1
    assert frequencies(logits, temperature=1e-30)[1] == frequencies(logits, temperature=1e-5)[1] == 1


def test_fast_topk_equals_topk():
    logits = torch.randn(10, 5000, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 60, 200, 407, 409, 5000):  # from 409 on it calls topk: groups would have fewer than 4 tokens
        group_size = round(math.sqrt(5000 / k))
        logits[torch.arange(10), -1 - torch.arange(10) % max(1, 5000 % group_size)] = 9 + torch.rand(10)  # in no group
        for actual, expected in zip(fast_topk(logits, k), logits.topk(k), strict=True):
            assert torch.equal(actual, expected)


def test_float32_samples_equal_those_of_plain_code():
    """The KV cache, matrix-vector products and fast_topk change no sampled token."""
    model = small(vocab_size=1000, block_size=16)
    for B in (1, 3):
        idx = torch.zeros(B, 1, dtype=torch.long)
        tokens = torch.stack(list(model.generate(idx, 40, 0.9, 10, generator=torch.Generator().manual_seed(5))), 1)
        generator = torch.Generator().manual_seed(5)
        for _ in range(40):
            logits = model.eval()(idx[:, window_start(idx.size(1), 16):])[:, -1] / 0.9  # (B, V)
            top = logits.topk(10).indices  # (B, 10), largest first
            cumulative = logits.gather(1, top).softmax(-1).cumsum(-1)  # (B, 10)
            choice = (cumulative < torch.rand(B, 1, generator=generator)).sum(-1, keepdim=True)  # (B, 1)
            idx = torch.cat([idx, top.gather(1, choice)], 1)
        assert torch.equal(tokens, idx[:, 1:])


@pytest.mark.parametrize("B", [1, 2])
@each_architecture
def test_bfloat16_and_int8_logits_are_close_to_float32(B, architecture):
    torch.manual_seed(0)
    idx = torch.randint(300, (B, 16))
    exact = small(vocab_size=300, block_size=16, n_embd=64, architecture=architecture)
    with torch.no_grad():
        for p in exact.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p))  # biases are initialized to zero
        logits = exact(idx)
        for dtype, activations, error in ((torch.bfloat16, torch.bfloat16, 0.03), (torch.int8, torch.float32, 0.1)):
            model = copy.deepcopy(exact).for_inference("cpu", dtype)
            difference = (model(idx).float() - logits).abs()
            assert difference.mean() < error * logits.std() and difference.max() > 0
            cache = KVCache(exact.config, B, "cpu", activations)
            stepwise = torch.cat([model(idx[:, t:t + 1], cache=cache) for t in range(16)], 1)
            assert (stepwise.float() - logits).abs().mean() < error * logits.std()


@each_architecture
def test_tokens_that_never_occurred_in_training_are_not_generated(architecture):
    model = small(architecture=architecture).double()
    with torch.no_grad():
        model.transformer.wte.weight[20:45] = 0
    prompt = torch.tensor([[3, 30, 7]])
    plain = list(model.generate(prompt, 20, temperature=0, with_logits=True))
    converted = copy.deepcopy(model).for_inference("cpu", torch.float64)
    assert converted(prompt).shape == (1, 3, 25)
    for (token, logits), (expected, all_logits) in zip(
            converted.generate(prompt, 20, temperature=0, with_logits=True), plain, strict=True):
        trained = [*range(20), *range(45, 50)]
        torch.testing.assert_close(logits[:, trained], all_logits[:, trained])
        assert torch.equal(token, expected) and (logits[:, 20:45] == -math.inf).all()
    tokens = torch.cat(list(converted.generate(prompt, 300, temperature=100)))
    assert len(set(tokens.tolist())) == 25 and not set(range(20, 45)) & set(tokens.tolist())


@torch.inference_mode()
def test_a_captured_graph_has_the_shapes_of_the_batch(monkeypatch):
    """The rest of the graph is tested on a GPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    model = small(block_size=8)
    cache = KVCache(model.config, 3, "cpu", torch.float32)
    cache.fixed_shapes = True
    assert model.capture_decode_graph(cache)(torch.zeros(3, 1, dtype=torch.long)).shape == (3, 1, 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_converted_model_past_the_block_with_dropped_sequences(dtype):
    model = small(vocab_size=300, n_embd=64)
    with torch.no_grad():
        model.transformer.wte.weight[40:] = 0
    model.for_inference("cpu", dtype)
    prompts = torch.randint(40, (6, 21))
    endless = torch.stack(list(model.generate(prompts, 40, 0)), 1)
    end_of_text = int(endless[0, 5])
    steps = torch.stack(list(model.generate(prompts, 40, 0, end_of_text=end_of_text)), 1)
    ended = (endless == end_of_text).int().cumsum(1).gt(0)
    equal = steps == endless.masked_fill(ended, end_of_text)[:, :steps.size(1)]
    assert equal.all() if dtype == torch.float64 else equal[:, 0].all()  # int8 rounds a smaller batch differently
    assert steps.max() < 40
