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

from storygpt.corpus.dataset import read_meta, recovery_hint
from storygpt.system.errors import UserError

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 10  # to wait for the connection, and for each piece of a vocabulary

# GPT-2's pattern, which splits text into words before merging, as tiktoken defines it; and an equivalent that tiktoken
# matches 2.6 times faster, because the alternatives without look-ahead form one group.
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE with an end-of-text token, which text cannot inject: it is encoded as ordinary characters."""

    def __init__(self, encoding):
        """Wrap a tiktoken.Encoding, whose special tokens must include `<|endoftext|>`."""
        self.encoding, self.name = encoding, encoding.name
        self.vocab_size, self.end_of_text = encoding.n_vocab, encoding.eot_token

    @classmethod
    def named(cls, name):
        """A tiktoken encoding, which is downloaded once. Raises UserError if it is unknown or cannot be loaded."""
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(sorted(tiktoken.list_encoding_names()))
            raise UserError(f"unknown tokenizer '{name}': use one of {known}, bpe:4096 to train one of 4096 tokens, "
                            "or the folder of a run or dataset")
        tiktoken.load.read_file = _download  # its own waits forever in a network that drops packets
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network, a proxy's page in place of the file, a damaged cache
            raise UserError(f"cannot load tokenizer '{name}' ({type(error).__name__}): connect to the network once, "
                            "set TIKTOKEN_CACHE_DIR to a folder that contains it, or train one on local text "
                            "(--tokenizer bpe:4096) or synthetic stories (python prepare.py nursery --tokenizer "
                            "bpe:2048)") from error
        # A new object: the copies for threads would share the one in tiktoken's registry.
        return cls(_encoding(encoding.name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens))

    @classmethod
    def train(cls, stories, vocab_size, show_progress=False):
        """Train a BPE of `vocab_size` tokens (256 bytes, merges, end of text). Raises UserError if the text is short.

        Sennrich, Haddow & Birch 2016 (arXiv 1508.07909), on bytes as in GPT-2.
        """
        import tokenizers  # imported here because only training needs it
        from tokenizers import models, pre_tokenizers, trainers

        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
        bpe.train_from_iterator(stories, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, show_progress=show_progress,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        size = bpe.get_vocab_size() + 1
        if size < vocab_size:
            raise UserError(f"the text is only enough for {size} tokens: use --tokenizer bpe:{size} or less")
        decoder = byte_decoder()
        ranks = {bytes(decoder[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
        return cls(_encoding(f"bpe{vocab_size}", GPT2_PATTERN, ranks, {END_OF_TEXT: vocab_size - 1}))

    @classmethod
    def load(cls, folder):
        """The tokenizer of a dataset or run folder. Raises UserError if a file is missing or damaged, or OSError."""
        meta, path = read_meta(folder)["tokenizer"], Path(folder, "tokenizer.tiktoken")
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            problem = "damaged" if path.exists() else "missing"
            raise UserError(f"{path} is {problem}: {recovery_hint(path.parent)}")
        pairs = (line.split() for line in data.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        return cls(_encoding(meta["name"], meta["pattern"], ranks, meta["special_tokens"]))

    def save(self, folder):
        """Write `tokenizer.tiktoken`; `load` also needs `describe()` in the folder's meta.json, as "tokenizer"."""
        Path(folder, "tokenizer.tiktoken").write_bytes(self._to_bytes())

    def _to_bytes(self):
        """The content of `tokenizer.tiktoken`, in tiktoken's format: lines of base64-encoded bytes and rank."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

    def describe(self):
        """The tokenizer's entry in meta.json: its name, pattern, special tokens, and the SHA-256 of its file."""
        return {"name": self.name, "pattern": self.encoding._pat_str, "special_tokens": self.encoding._special_tokens,
                "sha256": hashlib.sha256(self._to_bytes()).hexdigest()}

    def __eq__(self, other):
        """Whether two tokenizers produce the same tokens; their names may differ."""
        a, b = self.encoding, other.encoding
        return all(getattr(a, part) == getattr(b, part) for part in ("_mergeable_ranks", "_pat_str", "_special_tokens"))

    def encode(self, text):
        """Encode text as a list of token ids. Raises UserError as `check_whitespace` does."""
        check_whitespace(text)
        return self.encoding.encode_ordinary(text)

    def encode_stories(self, stories):
        """Encode stories, each followed by an end-of-text token: uint32 (tokens,). UserError as `check_whitespace`."""
        arrays = []
        for story in stories:
            check_whitespace(story)
        for contains_token_text, group in itertools.groupby(stories, lambda story: END_OF_TEXT in story):
            if contains_token_text:
                arrays += [np.array([*self.encode(story), self.end_of_text], np.uint32) for story in group]
            else:  # many stories in one call, during which tiktoken releases the GIL
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
    """The content of a URL, which tiktoken verifies by its hash. Raises OSError."""
    import requests  # imported here because it takes a tenth of a second, and tiktoken needs it only once

    return requests.get(url, timeout=DOWNLOAD_SECONDS).content


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
    """The byte of each character in a byte-level vocabulary of `tokenizers`: printable ones, then those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
