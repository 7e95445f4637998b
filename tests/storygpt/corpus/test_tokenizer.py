"""Encoding and decoding, with a published and with a trained vocabulary."""

import json
import random

import numpy as np
import pytest
import tiktoken

from storygpt.corpus import nursery
from storygpt.corpus.dataset import with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from storygpt.system.errors import UserError

TEXTS = ["Once upon a time, there was a fox.", "", " \n\n\t ", "naïve café – “quotes” 🦊🦊", "a" * 5000, " " * 5000,
         "don't WE'LL x's 123,456", f"the end{END_OF_TEXT}not the end", "\x00\x01\ufeff\u2028"]


def saved(tokenizer, folder):
    """Save a tokenizer to a folder with the part of meta.json that it needs; return the folder."""
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(with_checksum({"tokenizer": tokenizer.save(folder)})))
    return folder


@pytest.fixture(scope="module", params=["gpt2", "trained"])
def tokenizer(request):
    return Tokenizer.named("gpt2") if request.param == "gpt2" else Tokenizer.train(nursery.stories(100), 400)


def test_decode_inverts_encode(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_story_ends_with_one_end_of_text_and_cannot_inject_another(tokenizer):
    expected = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.end_of_text]]
    tokens = tokenizer.encode_stories(TEXTS)
    assert tokens.dtype == np.uint32 and tokens.tolist() == expected
    assert (tokens == tokenizer.end_of_text).sum() == len(TEXTS)
    assert tokenizer.encode_stories([END_OF_TEXT]).tolist().count(tokenizer.end_of_text) == 1


def test_saved_tokenizer_loads_without_the_network(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    loaded = Tokenizer.load(saved(tokenizer, tmp_path / "x"))
    assert loaded == tokenizer and loaded.name == tokenizer.name
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.encode_stories(TEXTS).tolist() == tokenizer.encode_stories(TEXTS).tolist()


def test_stream_yields_whole_characters(tokenizer):
    text = "🦊 naïve 狐狸"
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    fox = tokenizer.encode("🦊")
    assert len(fox) > 1 and "".join(tokenizer.stream(fox[:-1])) == "\ufffd"  # an incomplete character


def test_training_is_deterministic_and_gives_the_requested_size():
    one, two = (Tokenizer.train(nursery.stories(100), 400) for _ in range(2))
    assert one.vocab_size == 400 and one.end_of_text == 399 and one == two
    assert len(one.encode("Once upon a time")) <= 6
    assert one != Tokenizer.train(nursery.stories(100), 401)
    with pytest.raises(UserError, match="bpe:258 or less"):
        Tokenizer.train(["abab"], 4096)
    assert Tokenizer.train(["abab"], 258).vocab_size == 258


@pytest.mark.parametrize("first, middle, last", ["cad", "\t \n"])
def test_long_runs_without_spaces_are_cut_for_training(first, middle, last):
    """Training is quadratic in the length of a word: 5 million letters without a space would never end."""
    block = first + middle * 498 + last
    with pytest.raises(UserError, match="the text is only enough for 272 tokens"):  # none has letters of two blocks
        Tokenizer.train([block * 20], 280)


def test_unknown_name_and_no_network_raise_user_errors(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="cannot load tokenizer 'gpt5' .*: use one of .*gpt2"):
        Tokenizer.named("gpt5")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="cannot load tokenizer 'r50k_base'.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.named("r50k_base")


def test_only_extreme_runs_of_white_space_are_rejected(tokenizer):
    for text in ("The end." + " " * 400_000, "\n" * 400_000):
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_stories(["One.", text])):
            with pytest.raises(UserError, match="more than 300,000 consecutive white-space characters"):
                encode(text)
    assert tokenizer.decode(tokenizer.encode("x" + " " * 200_000)) == "x" + " " * 200_000


@pytest.mark.parametrize("damage", ["missing", "short", "twice", "text"])
def test_damaged_file_is_rejected_by_name(tmp_path, damage):
    folder = saved(Tokenizer.train(["abab"], 258), tmp_path / "x")
    path = folder / "tokenizer.tiktoken"
    damaged = {"short": b"".join(path.read_bytes().splitlines(keepends=True)[:-10]),  # truncated at the end of a line
               "twice": path.read_bytes().replace(b" 4\n", b" 3\n", 1)}  # two tokens with the same rank
    path.write_bytes(damaged.get(damage, b"not base64 1\n"))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="tokenizer.tiktoken is missing or damaged"):
        Tokenizer.load(folder)


def test_gpt2s_tokens_are_those_of_its_published_pattern():
    published, ours = tiktoken.get_encoding("gpt2"), Tokenizer.named("gpt2")
    assert ours.pattern != published._pat_str and (ours.vocab_size, ours.end_of_text) == (50257, 50256)
    assert ours.encode("Once upon a time") == [7454, 2402, 257, 640]
    rng = random.Random(0)
    parts = [" ", "  ", "\n", "\n\n\n", "\t", "\r\n", "\xa0", "\u2028", "'s", "'ll", "'", "’t", "a", "Word", "é",
             "中文", "12", "٣", "!", "...", "\0", "🙂", "_", "-"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        assert ours.encode(text) == published.encode_ordinary(text), repr(text)
