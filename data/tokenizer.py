"""Byte-level BPE: `Tokenizer` wraps a `tiktoken.Encoding`, either a published one (gpt2, …) or one trained here."""

import base64
import codecs
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load

from data.dataset import read_meta, recovery_hint
from runtime.errors import UserError

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 10  # to wait for the connection, and for each piece of a vocabulary

# GPT-2's pattern, which splits text into words before merging, as tiktoken defines it; and an equivalent that tiktoken
# matches 2.6 times faster, because the alternatives without look-ahead form one group.
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE with an end-of-text token.

    The text of a special token is encoded as ordinary characters, so that no story or prompt can inject the token.
    """

    def __init__(self, encoding):
        """Wrap a tiktoken.Encoding, whose special tokens must include `<|endoftext|>`."""
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    @classmethod
    def named(cls, name):
        """The tiktoken encoding with this name. tiktoken downloads it once and caches it in TIKTOKEN_CACHE_DIR.

        Raises UserError if tiktoken does not have the encoding, or the download fails.
        """
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(sorted(tiktoken.list_encoding_names()))
            raise UserError(f"unknown tokenizer '{name}': use one of {known}, bpe:4096 to train one of 4096 tokens, "
                            "or the folder of a run or dataset")
        try:
            tiktoken.load.read_file = _download  # its own waits forever in a network that drops packets
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network, a proxy's page in place of the file, a damaged cache
            raise UserError(f"cannot load tokenizer '{name}' ({type(error).__name__}): it must be downloaded once, so "
                            "connect to the network, set TIKTOKEN_CACHE_DIR to a folder that contains it, or stay "
                            "offline with a vocabulary trained on local text (--tokenizer bpe:4096) or on synthetic "
                            "stories (python prepare.py nursery --tokenizer bpe:2048)") from error
        return cls(_encoding(encoding.name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens))

    @classmethod
    def train(cls, stories, vocab_size, show_progress=False):
        """Train a byte-level BPE of exactly `vocab_size` tokens (256 bytes, merges, end of text) on some stories.

        Sennrich, Haddow & Birch 2016 (arXiv 1508.07909), on bytes as in GPT-2.
        Raises UserError if the text is too short or too uniform for that many tokens.
        """
        import tokenizers  # imported here because only training needs it
        from tokenizers import models, pre_tokenizers, trainers

        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
        bpe.train_from_iterator(stories, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, show_progress=show_progress,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        vocabulary = bpe.get_vocab()
        if len(vocabulary) < vocab_size - 1:
            size = len(vocabulary) + 1
            raise UserError(f"the text is only enough for {size} tokens: use --tokenizer bpe:{size} or less")

        decoder = byte_decoder()
        ranks = {bytes(decoder[c] for c in token): rank for token, rank in vocabulary.items()}
        return cls(_encoding(f"bpe{vocab_size}", GPT2_PATTERN, ranks, {END_OF_TEXT: vocab_size - 1}))

    @classmethod
    def load(cls, folder):
        """Load the tokenizer of a dataset or run folder; needs no network.

        Raises UserError if `tokenizer.tiktoken` or `meta.json` is missing, or does not match its checksum.
        """
        folder = Path(folder)
        path = folder / "tokenizer.tiktoken"
        meta = read_meta(folder)["tokenizer"]
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != meta["sha256"]:
                raise ValueError("checksum differs from meta.json")
            pairs = (line.split() for line in data.splitlines())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return cls(_encoding(meta["name"], meta["pattern"], ranks, meta["special_tokens"]))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {recovery_hint(folder)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {recovery_hint(folder)}") from error

    def save(self, folder):
        """Write `tokenizer.tiktoken` to a folder, in tiktoken's format: lines of base64-encoded bytes and rank.

        `load` also needs the result of `describe` in the folder's meta.json, under "tokenizer".
        """
        (Path(folder) / "tokenizer.tiktoken").write_bytes(self._to_bytes())

    def _to_bytes(self):
        """The content of `tokenizer.tiktoken`."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

    def describe(self):
        """The tokenizer's entry in meta.json: its name, pattern, special tokens, and the SHA-256 of its file."""
        return {"name": self.name, "pattern": self.encoding._pat_str,
                "special_tokens": self.encoding._special_tokens,
                "sha256": hashlib.sha256(self._to_bytes()).hexdigest()}

    def __eq__(self, other):
        """Whether two tokenizers produce the same tokens; their names may differ."""
        a, b = self.encoding, other.encoding
        return (a._mergeable_ranks == b._mergeable_ranks and a._pat_str == b._pat_str
                and a._special_tokens == b._special_tokens)

    def encode(self, text):
        """Encode text as a list of token ids. Raises UserError as `check_whitespace` does."""
        check_whitespace(text)
        return self.encoding.encode_ordinary(text)

    def encode_stories(self, stories):
        """Encode a list of stories, each followed by an end-of-text token: a uint32 array (tokens,).

        Consecutive stories are joined by end-of-text tokens and encoded in one call, during which tiktoken releases
        the GIL. A story that contains the text of that token is encoded separately.
        Raises UserError as `check_whitespace` does.
        """
        arrays = []
        for story in stories:
            check_whitespace(story)
        for contains_token_text, group in itertools.groupby(stories, lambda story: END_OF_TEXT in story):
            if contains_token_text:
                arrays += [np.array([*self.encode(story), self.end_of_text], np.uint32) for story in group]
            else:
                text = "".join(story + END_OF_TEXT for story in group)
                arrays.append(self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT}, disallowed_special=()))
        return np.concatenate(arrays)

    def decode(self, tokens):
        """Decode token ids to text; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self._token_bytes, tokens)).decode("utf-8", errors="replace")

    def stream(self, tokens):
        """Decode an iterable of token ids one by one, yielding text; buffers the bytes of incomplete characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self._token_bytes(token))
        yield decoder.decode(b"", final=True)

    def _token_bytes(self, token):
        """The bytes of one token; empty for ids that the vocabulary does not use (cl100k_base has such gaps)."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""


def _download(url):
    """The content of a URL, as `tiktoken.load.read_file` returns it. Raises OSError."""
    import requests  # imported here because it takes a tenth of a second, and tiktoken needs it only once

    response = requests.get(url, timeout=DOWNLOAD_SECONDS)
    response.raise_for_status()
    return response.content


def _encoding(name, pattern, ranks, special_tokens):
    """Create a tiktoken.Encoding, with the faster equivalent of GPT-2's pattern."""
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN if pattern == TIKTOKEN_GPT2_PATTERN else pattern,
                             mergeable_ranks=ranks, special_tokens=special_tokens)


def check_whitespace(text, limit=300_000):
    """Raise UserError for a run of white space so long that tiktoken's regular expressions overflow the stack."""
    if len(text) > limit and (run := re.search(rf"\s{{{limit}}}", text)):
        raise UserError(f"a text has more than {limit:,} consecutive white-space characters, after "
                        f"{text[:run.start()][-30:]!r}: remove them")


def byte_decoder():
    """The byte of each character in the `tokenizers` library's byte-level vocabularies: GPT-2's `byte_decoder`.

    Printable bytes map to themselves; the others map, in order, to the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
