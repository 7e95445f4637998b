"""The stories of a source: separated, stripped, perhaps cleaned, and divided into a training and a validation split."""

import re
from array import array
from collections import Counter

import numpy as np
from tqdm import tqdm

from storygpt.corpus.clean import clean, is_fragment
from storygpt.corpus.sources import open_source
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.system.errors import UserError

WINDOW_CHARACTERS = 1024  # a window of 128 tokens (the default block_size) takes fewer, if they average 7 or less
PIECE_CHARACTERS = 1 << 20  # a longer story comes in pieces of this length or more
# Where a story may be cut: between a word and the white space after it, where no tokenizer has a token.
BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?=\s)")


class Corpus:
    """The stories of a source, streamed: (split, piece, ends) triples, which can be read any number of times.

    `ends`: whether the piece is the last of its story. Only very long stories have several.
    """

    def __init__(self, source, text_column="text", config=None, max_stories=None, seed=0, cleaned=False):
        """`max_stories` limits the training split. Raises UserError if the source cannot be opened."""
        self.source, self.max_stories, self.cleaned = source, max_stories, cleaned
        self.splits = open_source(source, text_column, config, max_stories, seed)
        self.split_of = None  # of each training story of the source, None for a dropped one; set by `examine`
        self.cut = None  # if the source is one text: number of characters before the validation split
        self.count = None  # of stories that are written, set by `examine`
        self.findings = Counter()  # "empty", "fragment", "changed" (by cleaning) → stories, in the latest iteration

    def __iter__(self):
        """Yield the triples in the order of the source, the training split first."""
        self.findings.clear()
        for split in self.splits:
            pieces, number = self._pieces(split), 0  # of the story
            if split == "train" and self.cut:
                pieces = cut_in_two(pieces, self.cut)
            for piece, ends in pieces:
                assigned = split
                if split == "train" and self.split_of is not None:
                    assigned = self.split_of[number] if number < len(self.split_of) else None
                if assigned:
                    yield assigned, piece, ends
                number += ends
                if split == "train" and number == self.max_stories:
                    break
            if split == "train" and self.split_of is not None and number != len(self.split_of):
                raise UserError(f"{self.source} has changed while it was read: run the command again when it is "
                                "complete")

    def _pieces(self, split):
        """Yield (piece, ends) of each story of a split of the source; blank stories and, if cleaning, fragments are
        dropped.
        """
        for text in self.splits[split]():
            begins, changed = True, False
            for piece, ends in pieces_of_stories(text):
                if "\0" in piece:
                    raise UserError(f"{self.source}: text of the {split} split has NUL characters, after "
                                    f"{piece[:piece.index(chr(0))][-30:]!r}: remove them, or convert it to UTF-8")
                whole, begins = begins and ends, ends
                if self.cleaned:
                    before, piece = piece, clean(piece)
                    piece = piece.strip() if whole else piece
                    changed = changed or piece != before
                if whole and not piece:
                    self.findings["empty"] += 1
                elif whole and self.cleaned and is_fragment(piece):
                    self.findings["fragment"] += 1
                else:
                    self.findings["changed"] += ends and changed
                    yield piece, ends
                changed = changed and not ends

    def progress(self, description):
        """The triples, with a progress bar on a terminal; it shows the time left once `count` is set."""
        return tqdm(self, description, None if self.cut else self.count, unit=" stories", unit_scale=True,
                    dynamic_ncols=True, disable=None)

    def examine(self, fraction, seed, drop_duplicates):
        """Count the stories, make a validation split of `fraction` if the source has none, and find duplicates.

        Returns the number of characters, and the entries of meta.json about all this. Raises UserError if a split has
        too little text.
        """
        hashes, characters = self._hash_stories()
        for split in self.splits:
            if not len(hashes[split]):
                fragments = " and fragments (--clean)" * bool(self.findings["fragment"])
                raise UserError(f"{self.source}: the {split} split has no stories, or only empty ones{fragments}")
        found = {"empty_stories_dropped": self.findings["empty"]}
        if self.cleaned:
            found["cleaned"] = {"stories_changed": self.findings["changed"],
                                "fragments_dropped": self.findings["fragment"]}
        train, validation = hashes["train"], hashes["validation"]
        self.split_of = np.full(len(train), "train", object)
        if "validation" in self.splits:
            found["validation_split"] = "source"
        elif len(train) == 1:
            found["validation_split"] = "end of the text"
            self.cut = self._place_of_cut(characters, fraction)
            self.split_of = np.array(["train", "validation"], object)
        else:
            found["validation_split"] = "random stories"
            size = min(max(1, round(len(train) * fraction)), len(train) - 1)
            chosen = np.random.default_rng(seed).choice(len(train), size, replace=False, shuffle=False)
            self.split_of[chosen] = "validation"
            train, validation = np.delete(train, chosen), train[chosen]
        dropped, found["duplicates"] = find_duplicates(train, validation, drop_duplicates)
        if dropped.all():
            raise UserError(f"{self.source}: --drop_duplicates would leave none of the training stories: use more text")
        self.split_of[np.flatnonzero(self.split_of == "train")[dropped]] = None
        self.count = np.count_nonzero(self.split_of) + len(hashes["validation"])
        return characters, found

    def _hash_stories(self):
        """The hashes of the stories of each split, as arrays, and the number of characters of all."""
        hashes, characters, so_far = {"train": array("q"), "validation": array("q")}, 0, 0
        for split, piece, ends in self.progress("counting"):
            so_far = hash((so_far, piece))  # 64 bits: among 2 million stories, two have the same with p = 1e-7
            characters += len(piece)
            if ends:
                hashes[split].append(so_far)
                so_far = 0
        return {split: np.asarray(values) for split, values in hashes.items()}, characters

    def _place_of_cut(self, length, fraction):
        """The number of characters of the only text before its validation split, which is its last `fraction`.

        Validation gets at least one window and training two. Raises UserError if there is less text.
        """
        if length < 3 * WINDOW_CHARACTERS:
            raise UserError(f"{self.source} has only one text, of {length:,} characters, but training and validation "
                            f"need {3 * WINDOW_CHARACTERS:,}: use more text (in a .txt file, {END_OF_TEXT} separates "
                            "stories)")
        return length - min(max(round(length * fraction), WINDOW_CHARACTERS), length - 2 * WINDOW_CHARACTERS)


def pieces_of_stories(text):
    """Divide a text, an iterable of strings, into stories at END_OF_TEXT, and strip them; yield (piece, ends) as
    `Corpus` does. Blank text before the first and after the last END_OF_TEXT is no story; between two it is an empty
    one.
    """
    rest, begins, separated = "", True, False  # `begins`: the rest is the beginning of a story
    for part in text:
        *stories, rest = (rest + part.replace("\ufeff", "")).split(END_OF_TEXT)  # without byte-order marks
        for story in stories:
            *first, last = cut_in_pieces(story.strip() if begins else story.rstrip())
            for piece in first:
                yield piece, False
            if separated or last or not begins:
                yield last, True
            begins = separated = True
        *first, rest = cut_in_pieces(rest.lstrip() if begins else rest)  # the rest may end within END_OF_TEXT
        for piece in first:
            yield piece, False
            begins = False
    if rest.strip() or not (separated and begins):
        yield rest.rstrip(), True


def cut_in_pieces(story):
    """Cut a story of more than 2 * PIECE_CHARACTERS into pieces of PIECE_CHARACTERS to twice that, between words if
    possible.
    """
    if len(story) <= 2 * PIECE_CHARACTERS:
        return [story]
    pieces, start = [], 0
    while len(story) - start > 2 * PIECE_CHARACTERS:
        match = BETWEEN_WORDS.search(story, start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        end = match.start() if match else start + PIECE_CHARACTERS
        pieces.append(story[start:end])
        start = end
    return [*pieces, story[start:]]


def cut_in_two(pieces, place):
    """Divide the pieces of the only story in two stories after `place` characters, or later: at the end of a word."""
    position, begins = 0, False  # the latter: whether the next piece is the first of the second story
    for piece, ends in pieces:
        start, position = position, position + len(piece)
        if start <= place < position:
            # The search is bounded, for languages that do not separate words.
            end = re.compile(r"\S{,99}").match(piece, place - start).end()
            yield piece[:end].rstrip(), True
            piece, begins = piece[end:], True
        piece = piece.lstrip() if begins else piece
        if piece or ends:
            yield piece, ends
            begins = False


def find_duplicates(train, validation, drop):
    """Find equal hashes of training (N) and validation stories (M).

    Returns which training stories to drop, bool (N), none without `drop`; and the counts of duplicates for meta.json.
    """
    stories, first = np.unique(train, return_index=True)
    repeated = np.ones(len(train), bool)
    repeated[first] = False
    # `np.isin(validation, train)`, but that is slow if the second argument is the longer one.
    in_train = stories.take(np.searchsorted(stories, validation), mode="clip") == validation
    dropped = repeated | np.isin(train, validation) if drop else np.zeros(len(train), bool)
    return dropped, {"within_train": int(repeated.sum()), "validation_in_train": int(in_train.sum()),
                     "dropped": int(dropped.sum())}
