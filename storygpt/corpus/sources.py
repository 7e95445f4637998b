"""Reading stories: from the Hugging Face hub, from local files and folders, or from the synthetic nursery corpus."""

import glob
import itertools
import logging
import re
import sys
from array import array
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from storygpt.corpus import nursery
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.system.errors import UserError

HUB_DATASET = "roneneldan/TinyStories"
NURSERY_STORIES = 20_000  # used if --max_stories is not set, because the grammar generates without end
MAX_STORY_CHARACTERS = 1 << 26  # a longer text in a .txt file has no separators, and reading on would exhaust memory
WINDOW_CHARACTERS = 1024  # a window of 128 tokens (the default block_size) takes fewer, if they average 7 or less
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # file extension → its name in `datasets`


class Corpus:
    """The stories of a source as (split, story) pairs, streamed; can be iterated any number of times."""

    def __init__(self, source, text_column="text", max_stories=None, seed=0):
        """`max_stories` limits the training split. Raises UserError if the source cannot be opened."""
        self.source, self.max_stories = source, max_stories
        self.splits = open_source(source, text_column, max_stories, seed)
        # Masks of the source's training stories, bool (stories,), set by split_validation and examine.
        self.in_validation = self.dropped = itertools.repeat(False)
        self.cut = None  # set by split_validation: where the only text is divided, in characters to suit all tokenizers
        self.count = None  # of stories, set by examine
        self.empty_stories = 0  # dropped by the latest iteration

    def __iter__(self):
        """Yield (split, story) pairs in the order of the source, with outer white space stripped."""
        self.empty_stories = 0
        train = itertools.islice(self._clean("train"), self.max_stories)
        for story, in_validation, dropped in zip(train, self.in_validation, self.dropped):
            if self.cut:
                yield "train", story[:self.cut].rstrip()
                yield "validation", story[self.cut:].lstrip()
            elif not dropped:
                yield "validation" if in_validation else "train", story
        if "validation" in self.splits:
            yield from (("validation", story) for story in self._clean("validation"))

    def _clean(self, split):
        """Strip the stories of a split and drop the empty ones. Raises UserError for values that are not text."""
        for i, story in enumerate(self.splits[split](), 1):
            if not isinstance(story, str | None):
                raise UserError(f"{self.source}: story {i} of the {split} split is {type(story).__name__}, not text: "
                                "choose another column with --text_column")
            if story := (story or "").strip():
                yield story
            else:
                self.empty_stories += 1

    def split_validation(self, count, fraction, seed):
        """Make a validation split of the `count` training stories, if the source has none; returns its kind."""
        self.in_validation = np.zeros(count, bool)
        if "validation" in self.splits:
            return "source"
        if count > 1:
            size = min(max(1, round(count * fraction)), count - 1)
            self.in_validation[np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False)] = True
            return "random stories"
        text = next(iter(self))[1]
        spare = len(text) - 2 * WINDOW_CHARACTERS  # training needs 2 * block_size tokens, and validation block_size + 1
        if spare < WINDOW_CHARACTERS:
            raise UserError(f"{self.source} has only one text, of {len(text):,} characters, but training and "
                            f"validation need {3 * WINDOW_CHARACTERS:,}: use more text (in a .txt file, lines of "
                            f"{END_OF_TEXT} separate stories)")
        cut = len(text) - min(max(round(len(text) * fraction), WINDOW_CHARACTERS), spare)
        # At the end of a word. The search is bounded, for languages that do not separate words.
        self.cut = re.compile(r"\S{,99}").match(text, cut).end()
        return "end of the text"

    def progress(self, description):
        """The (split, story) pairs, with a progress bar on a terminal; it shows the time left once `count` is set."""
        return tqdm(self, description, self.count, unit=" stories", unit_scale=True, dynamic_ncols=True, disable=None)

    def examine(self, fraction, seed, drop):
        """Make a validation split of `fraction`, if the source has none, and find duplicates in training.

        These are dropped if `drop`. Returns the number of characters, and the entries of meta.json about both. Raises
        UserError if a split has too little text.
        """
        hashes, characters = {"train": array("q"), "validation": array("q")}, 0
        for split, story in self.progress("counting"):
            hashes[split].append(hash(story))  # 64 bits: among 2 million stories, two have the same with p = 1e-7
            characters += len(story)
        for split in self.splits:
            if not hashes[split]:
                raise UserError(f"{self.source}: the {split} split has no stories, or only empty ones")
        train, validation = (np.asarray(values) for values in hashes.values())
        kind, moved = self.split_validation(len(train), fraction, seed), self.in_validation
        train, validation = train[~moved], np.concatenate([train[moved], validation])
        repeated, in_train = repeats(train), occurs_in(validation, train)
        self.dropped = np.zeros(len(moved), bool)
        if drop:
            self.dropped[~moved] = repeated | occurs_in(train, validation)
        dropped = int(self.dropped.sum())
        if dropped == len(train):
            raise UserError(f"{self.source}: all training stories are also in the validation split, so "
                            "--drop_duplicates would leave none: use more text")
        self.count = len(train) + len(validation) - dropped
        return characters, {"validation_split": kind, "duplicates": {
            "within_train": int(repeated.sum()), "validation_in_train": int(in_train.sum()), "dropped": dropped}}


def repeats(values):
    """Whether each value equals an earlier one: int64 (n,) to bool (n,)."""
    order = np.argsort(values, kind="stable")
    ordered, repeated = values[order], np.zeros(len(values), bool)
    repeated[order[1:]] = ordered[1:] == ordered[:-1]
    return repeated


def occurs_in(values, others):
    """Whether each value is among `others`: int64 (n,) to bool (n,). `numpy.isin` would take three times the memory."""
    others = np.sort(others)
    return np.searchsorted(others, values, "left") < np.searchsorted(others, values, "right")


def open_source(source, text_column="text", max_stories=None, seed=0):
    """Open a source; returns a dict, split → function that iterates over its stories (str or None) from the start."""
    if source == "nursery":
        return {"train": partial(nursery.stories, max_stories or NURSERY_STORIES, seed)}
    path = Path(source).expanduser()
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is empty")
    if path.is_file() and path.suffix not in FORMATS:
        raise UserError(f"{path}: unsupported file type, use one of {', '.join(FORMATS)}")
    if not path.exists() and (path.suffix in FORMATS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise UserError(f"{path} does not exist: give a file, a folder, a dataset on the Hugging Face hub, or nursery")

    if texts := text_files(path):
        return {split: partial(read_text_files, paths) for split, paths in texts.items()}
    if path.is_file():
        splits = load_dataset(source, FORMATS[path.suffix], data_files=glob.escape(str(path)), streaming=True)
    elif path.is_dir():
        splits = load_dataset(source, str(path), streaming=True)
    else:
        print(f"loading {source} from the Hugging Face hub", file=sys.stderr)
        use_only_the_cache_if_offline(source)
        splits = load_dataset(source, source)  # not streamed: the downloaded files stay in the cache of `datasets`
    if "train" not in splits:
        raise UserError(f"{source} has no split 'train', only {', '.join(splits)}")
    return {split: partial(read_column, splits[split], text_column, source)
            for split in ("train", "validation") if split in splits}


def text_files(path):
    """The paths of each split, if `path` is a .txt file, or a folder without other files except hidden ones; or {}."""
    if path.is_file():
        return {"train": [path]} if path.suffix == ".txt" else {}
    visible = sorted(file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts))
    if not visible or any(file.suffix != ".txt" for file in visible):
        return {}
    validation = [file for file in visible if re.search(r"(^|[-_.])valid(ation)?$", file.stem)]  # TinyStories-valid.txt
    train = [file for file in visible if file not in validation]
    return {"train": train} | ({"validation": validation} if validation else {})


def read_text_files(paths):
    """Yield the stories of UTF-8 files, separated by lines of `<|endoftext|>`. Raises UserError if one is too long."""
    for path in paths:
        lines, size = [], 0
        for line in read_lines(path):
            if line.strip() == END_OF_TEXT:
                yield "".join(lines)
                lines, size = [], 0
                continue
            lines.append(line)
            size += len(line)
            if size >= MAX_STORY_CHARACTERS:
                raise UserError(f"{path} has {size:,} characters without a line of {END_OF_TEXT}: put one between "
                                "stories")
        if any(map(str.strip, lines)):  # blank lines after the last separator do not count as an empty story
            yield "".join(lines)


def read_lines(path):
    """Yield the lines of a UTF-8 text file, in pieces of at most MAX_STORY_CHARACTERS."""
    with reading_source(path), open(path, encoding="utf-8-sig") as file:
        yield from iter(partial(file.readline, MAX_STORY_CHARACTERS), "")


def read_column(dataset, column, source):
    """Yield the values of a column of a `datasets` dataset. Raises UserError if it is missing or a file is damaged."""
    with reading_source(source):
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            if column not in table.column_names:
                raise UserError(f"{source} has no column '{column}': choose one of {', '.join(table.column_names)} "
                                "with --text_column")
            yield from table[column].to_pylist()


def use_only_the_cache_if_offline(source):
    """Switch the hub's library to its offline mode if the hub does not answer: it would retry for 25 seconds."""
    from huggingface_hub import HfApi, constants  # not at the top, as `datasets` below

    try:
        HfApi().dataset_info(source, timeout=10)  # seconds; does not retry
    except Exception as error:
        module = type(error).__module__
        if module.startswith(("requests", "httpx")):  # depends on the version of the hub's library
            constants.HF_HUB_OFFLINE = True  # `datasets` reads it when it is imported
        elif not module.startswith("huggingface_hub"):  # an answer of the hub, or offline: load_dataset will report it
            raise


def load_dataset(source, *args, **options):
    """`datasets.load_dataset(*args, **options)`, with its errors as a UserError about `source`."""
    import datasets  # not at the top: it takes seconds, and --help, .txt files and nursery do not need it

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their warnings only precede an error
    with reading_source(source):
        return datasets.load_dataset(*args, **options)


@contextmanager
def reading_source(source):
    """Convert the errors of reading a source, in Python's files or in the libraries behind `datasets`, to UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        encoding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"  # most likely from Windows
        raise UserError(f"{source} is not UTF-8 text ({error.reason}): convert it, for example with  "
                        f"iconv -f {encoding} -t utf-8 OLD > NEW") from error
    except ConnectionError as error:
        raise UserError(f"cannot reach {source} on the Hugging Face hub: check the name and the network, or use local "
                        "text or synthetic stories (python prepare.py nursery --tokenizer bpe:2048)") from error
    except Exception as error:
        library_error = type(error).__module__.startswith(("datasets", "huggingface_hub", "pyarrow"))
        if not library_error and not isinstance(error, (OSError, ValueError)):
            raise
        hint = ("check its permissions" if isinstance(error, PermissionError) else
                "a folder must contain .txt, .jsonl or .parquet files" if Path(source).is_dir() else
                "it is empty or damaged, or its type does not match its name")
        raise UserError(f"cannot read {source}: {error} ({hint})") from error
