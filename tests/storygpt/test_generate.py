"""Generation: the KV cache, models that were edited, fast layers, and the choice of the next token."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import modern
from model import GPT, GPTConfig
from storygpt.generate import (KVCache, capture_graph, check_cache, fast_topk, generate, prepare_for_generation,
                               sample_token, uses_cache, window_start)
from storygpt.system.errors import UserError
from test_model import each_architecture, small


def greedy(model, idx, max_new_tokens, **options):
    """The most likely tokens after each prompt, idx (B, T) -> (B, max_new_tokens) or fewer."""
    return torch.stack(list(generate(model, idx, max_new_tokens, temperature=0, **options)), 1)


@torch.no_grad()
def assert_generates_as_the_plain_forward(model, idx, max_new_tokens=20):
    """Each token's logits are those of the model's forward on the context window."""
    for token, logits in generate(model, idx, max_new_tokens, temperature=0, with_logits=True):
        start = window_start(idx.size(1), model.config.block_size)
        torch.testing.assert_close(logits, model(idx[:, start:])[:, -1], rtol=1e-4, atol=1e-4)
        assert torch.equal(token, logits.argmax(-1))
        idx = torch.cat([idx, token[:, None]], 1)


# ---- the cache ----


@pytest.mark.parametrize("block_size, prompt", [(2, 1), (7, 21), (8, 8)])
@each_architecture
def test_cached_logits_equal_uncached_logits_also_past_the_block(block_size, prompt, architecture):
    model, calls = small(block_size=block_size, architecture=architecture), []
    state, model.cache_is_exact = torch.get_rng_state(), False  # as before a correction of the model
    check_cache(model)
    assert uses_cache(model) and torch.equal(torch.get_rng_state(), state) and not model.training
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].size(1)))
    for _ in generate(model, torch.randint(50, (2, prompt)), 5):
        assert calls.pop() == 1 and not calls  # with the cache, the head has one token
    hook.remove()
    assert_generates_as_the_plain_forward(model, torch.randint(50, (2, prompt)), 2 * block_size + 2)


def test_a_difference_at_some_tokens_only_is_found_if_they_are_likely(capsys):
    class SentenceNumbers(GPT):
        def hidden_states(self, idx, positions, cache):
            return super().hidden_states(idx, positions, cache) + (
                (idx == 7).cumsum(1)[..., None] * torch.linspace(-1, 1, 16))  # not those of cached tokens

        def forward(self, idx, targets=None, cache=None):
            return super().forward(idx, targets, cache) + 4 * F.one_hot(torch.tensor(7), 50)
    model = SentenceNumbers(small().config).eval()
    check_cache(model)
    assert not uses_cache(model) and "note: with a cache" in capsys.readouterr().err


def test_a_model_that_excludes_a_token_keeps_the_cache_and_a_note_is_printed_once(capsys):
    class WithoutFullStops(GPT):
        def forward(self, idx, targets=None, cache=None):
            return super().forward(idx, targets, cache).index_fill(-1, torch.tensor([13]), -math.inf)
    model = WithoutFullStops(small().config).eval()
    check_cache(model)
    assert uses_cache(model) and not capsys.readouterr().err
    model.transformer.h[0].attn.attend = lambda q, k, v, cache: v if cache is None else -v
    for count in (1, 0):
        check_cache(model)
        assert capsys.readouterr().err.count("note: with a cache") == count


def test_window_start_advances_by_half_a_block():
    assert [window_start(n, 8) for n in (1, 8, 9, 12, 13, 16, 17)] == [0, 0, 4, 4, 8, 8, 12]
    assert all(1 <= n - window_start(n, T) <= T for T in (2, 3, 8, 9) for n in range(1, 50))


@torch.no_grad()
@pytest.mark.parametrize("fixed_shapes", [False, True])  # as on a CPU, as on a GPU
@each_architecture
def test_cache_filled_by_several_tokens_and_by_single_ones(fixed_shapes, architecture, monkeypatch):
    monkeypatch.setattr(modern, "WINDOW", 3)
    model, idx = small(architecture=architecture).double(), torch.randint(50, (2, 8))
    plain, cache = model(idx), KVCache(8, "cpu")
    cache.fixed_shapes = fixed_shapes
    for _ in range(2):
        for start, end in ((0, 4), (4, 6), (6, 7), (7, 8)):
            logits = model(idx[:, start:end], cache=cache)
            assert cache.length == end and logits.shape == (2, 1, 50)
            torch.testing.assert_close(logits[:, 0], plain[:, end - 1])
        cache.length.zero_()  # the window has moved
    cache.keep(torch.tensor([False, True]))
    torch.testing.assert_close(model(idx[1:], cache=cache)[:, 0], plain[1:, -1])


@torch.inference_mode()
def test_a_captured_graph_has_the_shapes_of_the_batch(monkeypatch):
    """The rest of the graph is tested on a GPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    model, cache = small(), KVCache(8, "cpu")
    cache.fixed_shapes = True
    model(torch.zeros(3, 2, dtype=torch.long), cache=cache)
    assert capture_graph(model, cache)(torch.zeros(3, 1, dtype=torch.long)).shape == (3, 1, 50)


# ---- fast layers ----


@each_architecture
@torch.no_grad()
def test_bfloat16_and_int8_logits_are_close_to_float32(architecture):
    torch.manual_seed(0)
    idx = torch.randint(300, (2, 16))
    exact = small(vocab_size=300, block_size=16, n_embd=64, architecture=architecture)
    for p in exact.parameters():
        if p.dim() == 1:
            p.add_(torch.randn_like(p))  # biases are initialized to zero
    exact.transformer.wte.weight[100:] = exact.transformer.wte.weight[100].clone()  # of tokens that never occurred
    logits = exact(idx)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.int8, 0.1)):
        model, cache = prepare_for_generation(copy.deepcopy(exact), "cpu", dtype), KVCache(16, "cpu")
        difference = (model(idx).float() - logits).abs()
        assert difference.mean() < error * logits.std() and (difference.max() > 0 or dtype == torch.float32)
        stepwise = torch.cat([model(idx[:, t:t + 1], cache=cache) for t in range(16)], 1)
        assert (stepwise.float() - logits).abs().mean() < error * logits.std()
        assert len(model.lm_head.row_weight) == 101
        assert torch.equal(stepwise[..., 100:], stepwise[..., 100:101].expand(2, 16, 200))


# ---- the loop ----


@pytest.mark.parametrize("prompt", [3, 21])  # 21: more than a block of 8
def test_ended_sequences_are_dropped_and_generation_stops_when_all_have_ended(prompt):
    model, prompts = small(vocab_size=300, n_embd=64), torch.randint(40, (12, prompt))
    with torch.no_grad():
        model.transformer.wte.weight[40:] = 0  # of tokens that never occurred
    prepare_for_generation(model, "cpu", torch.float64)
    endless = greedy(model, prompts, 30)  # (12, 30)
    first = [(row[:, None] == torch.arange(40)).int().argmax(0) for row in endless]  # step of each token, 0 if none
    end_of_text = int(torch.stack(first).gt(0).sum(0).argmax())  # the one in most sequences, at a later step
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    steps = greedy(model, prompts, 30, end_of_text=end_of_text)
    ended = (endless == end_of_text).int().cumsum(1).gt(0)
    assert torch.equal(steps, endless.masked_fill(ended, end_of_text)[:, :steps.size(1)])
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
    hook.remove()
    model.cache_is_exact = False
    assert torch.equal(greedy(model, prompts, 30, end_of_text=end_of_text), steps)
    model.cache_is_exact, generator = True, torch.Generator().manual_seed(0)
    ends = torch.stack(list(generate(model, prompts, 4000, end_of_text=7, generator=generator)), 1) == 7  # (12, steps)
    assert ends[:, -1].all() and not ends[:, -2].all() and ends.size(1) < 4000


# ---- the next token ----


@pytest.mark.parametrize("unused", [0, 200])  # without rows of their own in the head
def test_an_edit_of_sample_token_can_exclude_a_token_by_its_id(unused, monkeypatch):
    def without_the_frequent_one(logits, tokens, *settings):
        return sample_token(logits.masked_fill(tokens == frequent, -math.inf), tokens, *settings)
    torch.manual_seed(0)
    model, prompts = small(vocab_size=300, n_embd=64), torch.randint(300, (50, 3))
    with torch.no_grad():
        model.transformer.wte.weight[:unused] = 0
    prepare_for_generation(model, "cpu", torch.float32)
    frequent = torch.stack(list(generate(model, prompts, 40))).mode().values.mode().values
    monkeypatch.setattr("storygpt.generate.sample_token", without_the_frequent_one)
    assert not (torch.stack(list(generate(model, prompts, 40))) == frequent).any()


@torch.no_grad()
def test_a_head_that_is_called_with_another_weight():
    """Its rows that are equal are not left out."""
    class OtherWeight(GPT):
        def forward(self, idx):
            x = self.transformer.ln_f(self.hidden_states(idx, torch.arange(idx.size(1)), None))
            return torch.func.functional_call(self.lm_head, {"weight": self.lm_head.weight.flip(0)}, (x,))
    torch.manual_seed(0)
    model = OtherWeight(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0)).eval()
    model.transformer.wte.weight[:30] = 0
    plain = copy.deepcopy(model)
    prepare_for_generation(model, torch.device("cpu"), torch.float32)
    idx = torch.randint(50, (2, 5))
    _, logits = next(generate(model, idx, 1, with_logits=True))
    torch.testing.assert_close(logits, plain(idx)[:, -1])


def test_a_model_that_does_not_run_in_a_dtype_says_so():
    class NormInFloat32(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float()) if self.weight.dtype == torch.float32 else x.float()
    model = small()
    model.transformer.ln_f = NormInFloat32(model.config.n_embd)
    with pytest.raises(UserError, match="the model does not run in bfloat16: use --dtype float32"):
        prepare_for_generation(model.eval(), torch.device("cpu"), torch.bfloat16)


def frequencies(logits, n=10_000, **settings):
    """The relative frequency of each token (V) in n samples from the same logits (V)."""
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    tokens = sample_token(logits.expand(n, -1), torch.arange(len(logits)), **options,
                          generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.numel()) / n


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = F.softmax(logits / temperature, 0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=0.02, rtol=0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature, top_k=4, top_p=0.99999), expected,
                                   atol=0.02, rtol=0)
    likely = torch.tensor([0.0, 80.0, 79.9, -5.0])
    assert all(frequencies(likely, temperature=temperature)[1] == 1 for temperature in (0, 1e-30, 1e-5))


def test_top_k_and_top_p_exclude_all_other_tokens():
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log()
    assert frequencies(logits, top_k=2).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, top_k=1)[1] == 1
    assert frequencies(logits, top_k=99).nonzero().numel() == 4
    assert frequencies(logits, top_p=0.45)[1] == 1
    assert frequencies(logits, top_p=0.6).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, top_p=1e-9)[1] == 1
    torch.testing.assert_close(frequencies(logits, top_k=2)[1], torch.tensor(0.5 / 0.8), atol=0.02, rtol=0)


def test_few_tokens_that_are_not_excluded_are_sampled_with_a_larger_top_k():
    logits = torch.full((8, 4096), -math.inf)  # so large that fast_topk pads it
    logits[:, [7, 4095]] = 0.0
    tokens = sample_token(logits, torch.arange(4096), 1.0, 200, 1.0, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {7, 4095}


def test_fast_topk_equals_topk():
    logits = torch.randn(10, 5000, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 60, 200, 407, 409, 5000):  # from 409 on it calls topk: groups would have fewer than 4 tokens
        group_size = round(math.sqrt(5000 / k))
        logits[torch.arange(10), -1 - torch.arange(10) % max(1, 5000 % group_size)] = 9 + torch.rand(10)  # in no group
        for actual, expected in zip(fast_topk(logits, k), logits.topk(k), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("settings", [(0.0,), (0.8,), (0.8, 5), (0.8, 0, 0.9)], ids=str)
@pytest.mark.parametrize("count, end_of_text", [(20, 49), (40, 49), (20, 7)])  # 7: its logit is NaN, and it is chosen
def test_a_logit_that_is_nan_is_an_error_however_a_token_is_chosen(settings, count, end_of_text):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=1, n_embd=8)).eval()
    steps = generate(model, torch.zeros(2, 3, dtype=torch.long), count, *settings, end_of_text=end_of_text)
    next(steps)
    model.lm_head.weight.data[7, 0] = math.nan  # of one token, after the first step
    with pytest.raises(UserError, match="the model's logits are NaN or infinite: its weights are damaged"):
        list(steps)
    for dtype in (torch.float32, torch.int8):
        with pytest.raises(UserError, match="the model's logits are NaN or infinite"):
            prepare_for_generation(model, torch.device("cpu"), dtype)


def test_float32_samples_equal_those_of_plain_code():
    """The KV cache, matrix-vector products and fast_topk change no sampled token."""
    plain = small(vocab_size=12_000, block_size=16)  # so many that fast_topk does not call torch's for 3 stories
    model = prepare_for_generation(copy.deepcopy(plain), "cpu", torch.float32)
    for B in (1, 3):
        idx = torch.zeros(B, 1, dtype=torch.long)
        tokens = torch.stack(list(generate(model, idx, 40, 0.9, 10, generator=torch.Generator().manual_seed(5))), 1)
        generator = torch.Generator().manual_seed(5)
        for _ in range(40):
            logits = plain(idx[:, window_start(idx.size(1), 16):])[:, -1] / 0.9  # (B, V)
            top = logits.topk(10).indices  # (B, 10), largest first
            cumulative = logits.gather(1, top).softmax(-1).cumsum(-1)  # (B, 10)
            choice = (cumulative < torch.rand(B, 1, generator=generator)).sum(-1, keepdim=True)  # (B, 1)
            idx = torch.cat([idx, top.gather(1, choice)], 1)
        assert torch.equal(tokens, idx[:, 1:])
