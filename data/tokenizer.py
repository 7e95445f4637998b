"""Text to tokens and back: one `Tokenizer` over a `tiktoken.Encoding`, whether named (gpt2, …) or trained here."""

import base64
import codecs
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import tiktoken

from dataset import again, read_meta
from errors import UserError

END_OF_TEXT = "<|endoftext|>"

# GPT-2's way of cutting text into words before merging bytes, as tiktoken spells it, and the same way spelt so that
# tiktoken's regular expressions run 2.6 times faster: the parts without look-ahead stand together in one group.
TIKTOKENS_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE with an end-of-text token.

    Text is always ordinary text: the characters of a special token in it are encoded as characters, so no story
    and no prompt can inject the token itself.
    """

    def __init__(self, encoding):
        """`encoding`: a tiktoken.Encoding whose special tokens include `<|endoftext|>`."""
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    @classmethod
    def named(cls, name):
        """The tiktoken encoding of that name; tiktoken downloads it once and caches it (TIKTOKEN_CACHE_DIR).

        Raises UserError for a name that tiktoken does not have, and where the download fails.
        """
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(sorted(tiktoken.list_encoding_names()))
            raise UserError(f"unknown tokenizer '{name}': use one of {known}, bpe:4096 to train one of 4096 tokens, "
                            "or the folder of a run or a dataset")
        try:
            theirs = tiktoken.get_encoding(name)
            return cls(_encoding(theirs.name, theirs._pat_str, theirs._mergeable_ranks, theirs._special_tokens))
        except (OSError, ValueError) as error:  # no network, a proxy's page in place of the file, a damaged cache
            raise UserError(f"cannot get tokenizer '{name}': {type(error).__name__}. It is downloaded once: connect "
                            "to the network, set TIKTOKEN_CACHE_DIR to a folder that has it, or train your own with "
                            "--tokenizer bpe:4096") from error

    @classmethod
    def train(cls, stories, vocab_size, show_progress=False):
        """Train a byte-level BPE of exactly `vocab_size` tokens (256 bytes, merges, end of text) on some stories.

        Sennrich, Haddow & Birch 2016 (arXiv 1508.07909), on bytes as in GPT-2. The training is done by the
        `tokenizers` library; only prepare.py comes here, so only it needs that library.
        Raises UserError where the text is too small or too uniform to give that many tokens.
        """
        from tokenizers import Tokenizer as Trained
        from tokenizers import models, pre_tokenizers, trainers

        bpe = Trained(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
        bpe.train_from_iterator(stories, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, show_progress=show_progress,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        vocabulary = bpe.get_vocab()
        if len(vocabulary) < vocab_size - 1:
            size = len(vocabulary) + 1
            raise UserError(f"the text gives a vocabulary of only {size} tokens: use --tokenizer bpe:{size} or less")

        byte_of = byte_of_character()
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}
        return cls(tiktoken.Encoding(f"bpe{vocab_size}", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                     special_tokens={END_OF_TEXT: vocab_size - 1}))

    @classmethod
    def load(cls, folder):
        """The tokenizer that is saved in a dataset or run folder, read without the network.

        Raises UserError where `tokenizer.tiktoken` or `meta.json` is missing or damaged: their checksums tell.
        """
        path = Path(folder) / "tokenizer.tiktoken"
        described = read_meta(folder)["tokenizer"]
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != described["sha256"]:
                raise ValueError("its checksum is not the one in meta.json")
            pairs = (line.split() for line in data.splitlines())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return cls(_encoding(described["name"], described["pattern"], ranks, described["special_tokens"]))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {again(Path(folder))}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {again(Path(folder))}") from error

    def save(self, folder):
        """Write `tokenizer.tiktoken` (tiktoken's own format: base64 of the bytes, a space, the rank) into a folder.

        What else `load` needs stands in the folder's meta.json, under "tokenizer": see `describe`.
        """
        (Path(folder) / "tokenizer.tiktoken").write_bytes(self._to_bytes())

    def _to_bytes(self):
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

    def describe(self):
        """What meta.json keeps of the tokenizer: its name, pattern, special tokens, and the hash of its file."""
        return {"name": self.name, "pattern": self.encoding._pat_str,
                "special_tokens": self.encoding._special_tokens,
                "sha256": hashlib.sha256(self._to_bytes()).hexdigest()}

    def __eq__(self, other):
        """Whether two tokenizers give the same tokens."""
        mine, others = self.encoding, other.encoding
        return (mine._mergeable_ranks == others._mergeable_ranks and mine._pat_str == others._pat_str
                and mine._special_tokens == others._special_tokens)

    def encode(self, text):
        """A list of token ids of ordinary text. Raises UserError for white space without end, as `encode_stories`."""
        refuse_endless_space(text)
        return self.encoding.encode_ordinary(text)

    def encode_stories(self, stories):
        """Tokens of some stories, one end-of-text token after each: a uint32 array.

        All stories go to tiktoken in one call, with the end-of-text token between them: it works without Python's
        lock, so threads use all cores. A story that has the token's characters in it is encoded by itself.
        Raises UserError for a story that tiktoken cannot encode.
        """
        pieces = []
        for story in stories:
            refuse_endless_space(story)
        for holds_token_text, group in itertools.groupby(stories, lambda story: END_OF_TEXT in story):
            if holds_token_text:
                pieces += [np.array([*self.encode(story), self.end_of_text], np.uint32) for story in group]
            else:
                text = "".join(story + END_OF_TEXT for story in group)
                pieces.append(self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT}, disallowed_special=()))
        return np.concatenate(pieces)

    def decode(self, tokens):
        """The text of some token ids; bytes that are not whole characters become U+FFFD."""
        return b"".join(map(self._bytes_of, tokens)).decode("utf-8", errors="replace")

    def stream(self, tokens):
        """Yield the text of each token as it comes, holding bytes back until their character is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self._bytes_of(token))
        yield decoder.decode(b"", final=True)

    def _bytes_of(self, token):
        """The bytes of one token; none for ids that the vocabulary leaves out (cl100k_base has such gaps)."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""


def _encoding(name, pattern, ranks, special_tokens):
    """A tiktoken.Encoding, GPT-2's pattern in the spelling that is fast."""
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN if pattern == TIKTOKENS_GPT2_PATTERN else pattern,
                             mergeable_ranks=ranks, special_tokens=special_tokens)


def refuse_endless_space(text, longest=300_000):
    """Raise UserError for a run of white space over which tiktoken's regular expressions would overflow the stack."""
    if len(text) > longest and (run := re.search(rf"\s{{{longest}}}", text)):
        raise UserError(f"a text has more than {longest:,} white-space characters on end, behind "
                        f"{text[:run.start()][-30:]!r}: take them out")


def byte_of_character():
    """The byte that each printable character stands for in `tokenizers`' byte-level vocabularies (GPT-2's table).

    Printable bytes stand for themselves; the others, in order, for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
