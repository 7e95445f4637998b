"""Byte-level BPE: `Tokenizer` wraps a `tiktoken.Encoding`, either a published one (gpt2, …) or one trained here."""

import base64
import codecs
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import tiktoken

from storygpt.corpus.dataset import RESTORE, read_meta
from storygpt.system.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pattern, which splits text into words before merging, as tiktoken defines it; and an equivalent that tiktoken
# matches 2.6 times faster, because the alternatives without look-ahead form one group.
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"

# Runs without, or of, white space are cut to train a vocabulary: its time is quadratic in the length of a word.
LONG_RUN = re.compile(r"\S{500}|\s{500}")


class Tokenizer:
    """A byte-level BPE with an end-of-text token, which text cannot inject: it is encoded as ordinary characters."""

    def __init__(self, name, pattern, ranks, special_tokens):
        """`pattern` splits text into words; `ranks`: bytes → id; `special_tokens`: text → id, with `<|endoftext|>`."""
        pattern = GPT2_PATTERN if pattern == TIKTOKEN_GPT2_PATTERN else pattern
        self.name, self.pattern, self.ranks, self.special_tokens = name, pattern, ranks, special_tokens
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        self.vocab_size, self.end_of_text = self.encoding.n_vocab, self.encoding.eot_token

    @classmethod
    def named(cls, name):
        """A tiktoken encoding, which is downloaded once. Raises UserError if it is unknown or cannot be loaded."""
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network, a proxy's page in place of the file, an unknown name
            known = ", ".join(sorted(tiktoken.list_encoding_names()))
            raise UserError(f"cannot load tokenizer '{name}' ({type(error).__name__}): use one of {known}, downloaded "
                            "once or in the folder TIKTOKEN_CACHE_DIR; the folder of a run or dataset; or train one "
                            "(python prepare.py nursery --tokenizer bpe:2048)") from error
        return cls(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)

    @classmethod
    def train(cls, stories, vocab_size, show_progress=False):
        """Train a BPE of `vocab_size` tokens (256 bytes, merges, end of text). Raises UserError if the text is short.

        Sennrich, Haddow & Birch 2016 (arXiv 1508.07909), on bytes as in GPT-2.
        """
        from tokenizers import ByteLevelBPETokenizer  # imported here because only training needs it

        bpe = ByteLevelBPETokenizer()  # with GPT-2's pattern
        pieces = (story[i:j] for story in stories for i, j in itertools.pairwise(
            [0, *(match.end() for match in LONG_RUN.finditer(story)), len(story)]))
        bpe.train_from_iterator(pieces, vocab_size - 1, min_frequency=2, show_progress=show_progress)
        size = bpe.get_vocab_size() + 1
        if size < vocab_size:
            raise UserError(f"the text is only enough for {size} tokens: use --tokenizer bpe:{size} or less")
        decoder = byte_decoder()
        ranks = {bytes(decoder[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
        return cls(f"bpe{vocab_size}", GPT2_PATTERN, ranks, {END_OF_TEXT: vocab_size - 1})

    @classmethod
    def load(cls, folder):
        """The tokenizer of a dataset or run folder. Raises UserError if a file is missing or damaged, or OSError."""
        meta, path = read_meta(folder)["tokenizer"], Path(folder, "tokenizer.tiktoken")
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            raise UserError(f"{path} is missing or damaged: {RESTORE}")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
        return cls(meta["name"], meta["pattern"], ranks, meta["special_tokens"])

    def save(self, folder):
        """Write `tokenizer.tiktoken`, in tiktoken's format: lines of base64-encoded bytes and rank.

        Returns the entry "tokenizer" of the folder's meta.json, which `load` also needs.
        """
        ranks = sorted(self.ranks.items(), key=lambda item: item[1])
        data = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
        Path(folder, "tokenizer.tiktoken").write_bytes(data)
        return {"name": self.name, "pattern": self.pattern, "special_tokens": self.special_tokens,
                "sha256": hashlib.sha256(data).hexdigest()}

    def __eq__(self, other):
        """Whether two tokenizers produce the same tokens; their names may differ."""
        return all(getattr(self, part) == getattr(other, part) for part in ("pattern", "ranks", "special_tokens"))

    def encode(self, text):
        """Encode text as a list of token ids. Raises UserError as `check_whitespace` does."""
        check_whitespace(text)
        return self.encoding.encode_ordinary(text)

    def encode_stories(self, stories, ends=None):
        """Encode a list of stories, each followed by an end-of-text token: uint32 (tokens,). UserError as `encode`.

        Long stories may be given in pieces; `ends` then says which pieces are the last of their story.
        """
        ends = [True] * len(stories) if ends is None else ends
        for story in stories:
            check_whitespace(story)
        if any(END_OF_TEXT in story for story in stories):
            tokens = [self.encode(story) + [self.end_of_text] * end for story, end in zip(stories, ends, strict=True)]
            return np.concatenate(tokens).astype(np.uint32)
        # All in one call, during which tiktoken releases the GIL, and without a Python object for each token.
        text = "".join(story + END_OF_TEXT * end for story, end in zip(stories, ends, strict=True))
        return self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def decode(self, tokens):
        """Decode token ids to text; invalid UTF-8 becomes U+FFFD."""
        return "".join(self.stream(tokens))

    def stream(self, tokens):
        """Decode an iterable of token ids one by one, yielding text; buffers the bytes of incomplete characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            try:
                yield decoder.decode(self.encoding.decode_single_token_bytes(token))
            except KeyError:  # an id that the vocabulary does not use (cl100k_base has such gaps)
                yield ""
        yield decoder.decode(b"", final=True)


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
