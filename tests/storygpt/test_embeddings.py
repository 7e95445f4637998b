"""Token embeddings from co-occurrence counts."""

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from storygpt.embeddings import cooccurrence_embeddings, set_embeddings
from storygpt.system.errors import UserError


def text(width):
    """Embeddings of a text of 'a B c D' where B is 10 or 11, and D is 20 … 29; and of tokens 0 … 39."""
    rng = np.random.default_rng(0)
    phrases = np.stack([np.full(4000, 1), rng.integers(10, 12, 4000), np.full(4000, 2), rng.integers(20, 30, 4000)], 1)
    return cooccurrence_embeddings(phrases.reshape(-1, 16), 40, width)


@pytest.mark.parametrize("width", [8, 64])  # 64: more than there are tokens
def test_rows_have_a_mean_square_of_one_and_tokens_outside_of_the_text_are_zero(width):
    embeddings = text(width)
    assert embeddings.shape == (40, width) and embeddings.dtype == torch.float32
    present = [1, 2, 10, 11, *range(20, 30)]
    expected = torch.zeros(40).index_fill(0, torch.tensor(present), 1.0)
    torch.testing.assert_close(embeddings.square().mean(1), expected)


def test_tokens_with_the_same_neighbours_have_similar_embeddings_without_global_random_numbers():
    torch.manual_seed(5)
    embeddings, drawn = text(32), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)) and torch.equal(embeddings, text(32))
    similarity = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings, dim=2)
    assert similarity[10, 11] > 0.9 and similarity[20:30, 20:30].min() > 0.9
    assert similarity[10, 20:30].max() < 0.5 and similarity[1, 2].abs() < 0.5


@pytest.mark.parametrize("name, layer", [
    ("ln_f", torch.nn.LayerNorm(16, elementwise_affine=False)), ("wte", torch.nn.Embedding(40, 8)),
    ("wte", torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 16)))], ids=["norm", "narrow", "factors"])
def test_a_model_without_such_an_embedding_or_gain_is_refused(name, layer):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=40))
    model.transformer[name] = layer
    with pytest.raises(UserError, match="use --init_embeddings=random"):
        set_embeddings(model, torch.zeros(40, 16))
