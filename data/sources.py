"""Reading stories: from the Hugging Face hub, from local files and folders, or from the synthetic nursery corpus."""

import glob
import itertools
import logging
import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from data import nursery
from data.tokenizer import END_OF_TEXT
from runtime.errors import UserError

HUB_DATASET = "roneneldan/TinyStories"
NURSERY_STORIES = 20_000  # used if --max_stories is not set, because the grammar generates without end
MAX_STORY_CHARACTERS = 1 << 26  # a longer text in a .txt file has no separators, and reading on would exhaust memory
WINDOW_CHARACTERS = 1024  # a window of 128 tokens (the default block_size) takes fewer, if they average 7 or less
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # file extension → its name in `datasets`


class Corpus:
    """The stories of a source as (split, story) pairs, streamed; can be iterated any number of times.

    `splits` are the splits of the source. `empty_stories` counts the empty stories that the latest iteration dropped.
    """

    def __init__(self, source, text_column="text", max_stories=None, seed=0):
        """`max_stories` limits the training split. Raises UserError if the source cannot be opened."""
        self.source, self.max_stories = source, max_stories
        self.splits = open_source(source, text_column, max_stories, seed)
        # Masks of the source's training stories, bool (stories,), set by split_validation and find_duplicates.
        self.in_validation = self.dropped = itertools.repeat(False)
        self.cut = None  # set by split_validation: where the only training story is divided, in characters
        self.empty_stories = 0

    def __iter__(self):
        """Yield (split, story) pairs in the order of the source, with outer white space stripped."""
        self.empty_stories = 0
        train = itertools.islice(self._clean(self.splits["train"](), "train"), self.max_stories)
        for story, in_validation, dropped in zip(train, self.in_validation, self.dropped):
            if self.cut:
                yield "train", story[:self.cut].rstrip()
                yield "validation", story[self.cut:].lstrip()
            elif not dropped:
                yield "validation" if in_validation else "train", story
        if "validation" in self.splits:
            for story in self._clean(self.splits["validation"](), "validation"):
                yield "validation", story

    def _clean(self, stories, split):
        """Strip stories and drop the empty ones. Raises UserError for values that are not text."""
        for i, story in enumerate(stories, 1):
            if not isinstance(story, str | None):
                raise UserError(f"{self.source}: story {i} of the {split} split is {type(story).__name__}, not text: "
                                "choose another column with --text_column")
            if story := (story or "").strip():
                yield story
            else:
                self.empty_stories += 1

    def split_validation(self, count, fraction, seed):
        """Make a validation split of a fraction of the `count` training stories, if the source has none.

        It is a random choice of stories, at least one, or the end of the text if there is only one. Returns which, as
        recorded in meta.json. Raises UserError if the only text is too short.
        """
        self.in_validation = np.zeros(count, bool)
        if "validation" in self.splits:
            return "source"
        if count == 1:
            self.cut = self._cut_text(next(iter(self))[1], fraction)
            return "end of the text"
        size = min(max(1, round(count * fraction)), count - 1)
        self.in_validation[np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False)] = True
        return "random stories"

    def find_duplicates(self, hashes, drop):
        """Count duplicates; if `drop`, drop training stories that repeat an earlier one or are also in validation.

        `hashes`: for each split of the source, one integer per story, int64 (stories,). `split_validation` must have
        been called. Returns the counts, as recorded in meta.json. Raises UserError if no training story would be left.
        """
        moved = self.in_validation
        train = hashes["train"][~moved]
        validation = np.concatenate([hashes["train"][moved], hashes["validation"]])
        duplicate = repeats(train)
        counts = {"within_train": int(duplicate.sum()), "validation_in_train": int(occurs_in(validation, train).sum())}
        if drop:
            duplicate |= occurs_in(train, validation)
            if duplicate.all():
                raise UserError(f"{self.source}: all training stories are also in the validation split, so "
                                "--drop_duplicates would leave none: use more text")
            self.dropped = np.zeros(len(moved), bool)
            self.dropped[~moved] = duplicate
        return counts | {"dropped": int(duplicate.sum()) if drop else 0}

    def _cut_text(self, text, fraction):
        """Where a fraction of a text begins, at the end of a word; in characters, to be the same for every tokenizer.

        Training needs twice block_size tokens, and validation one more than block_size.
        """
        spare = len(text) - 2 * WINDOW_CHARACTERS
        if spare < WINDOW_CHARACTERS:
            raise UserError(f"{self.source} has only one text, of {len(text):,} characters, but training and "
                            f"validation need {3 * WINDOW_CHARACTERS:,}: use more text, or several stories (in a .txt "
                            f"file, separated by lines of {END_OF_TEXT})")
        cut = len(text) - min(max(round(len(text) * fraction), WINDOW_CHARACTERS), spare)
        return re.compile(r"\S{,99}").match(text, cut).end()  # bounded, for languages that do not separate words


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
    """Open a source and return a dict: split → function that iterates over its stories (str or None) from the start.

    `max_stories` and `seed` are used by the nursery corpus only. Raises UserError if the source is none of the kinds
    that `prepare.py --help-all` lists, or cannot be reached.
    """
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
    """The paths of each split if `path` is a .txt file, or a folder of only .txt files; {} for anything else.

    Hidden files are ignored. Files whose names end in valid or validation (TinyStories-valid.txt) are the validation
    split.
    """
    if path.is_file():
        return {"train": [path]} if path.suffix == ".txt" else {}
    visible = sorted(file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts))
    if not visible or any(file.suffix != ".txt" for file in visible):
        return {}
    validation = [file for file in visible if re.search(r"(^|[-_.])valid(ation)?$", file.stem)]
    train = [file for file in visible if file not in validation]
    return {"train": train} | ({"validation": validation} if validation else {})


def read_text_files(paths):
    """Yield the stories of UTF-8 text files, which are separated by lines of `<|endoftext|>`.

    Raises UserError if a file cannot be decoded, or a story is longer than MAX_STORY_CHARACTERS.
    """
    for path in paths:
        with reading_source(path), open(path, encoding="utf-8-sig") as file:
            lines, size = [], 0
            for line in iter(lambda: file.readline(MAX_STORY_CHARACTERS), ""):
                if line.strip() == END_OF_TEXT:
                    yield "".join(lines)
                    lines, size = [], 0
                    continue
                lines.append(line)
                size += len(line)
                if size >= MAX_STORY_CHARACTERS:
                    raise UserError(f"{path} has {size:,} characters without a line of {END_OF_TEXT}: put one between "
                                    "its stories")
            if any(map(str.strip, lines)):  # blank lines after the last separator do not count as an empty story
                yield "".join(lines)


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
    from huggingface_hub import HfApi, constants  # imported here for the reason below
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(source, timeout=10)  # seconds; does not retry
    except HfHubHTTPError:  # it answers, and load_dataset will report what is wrong
        pass
    except Exception as error:  # by the library's version, of requests, httpx or httpx2
        if not type(error).__module__.startswith(("requests", "httpx")):
            raise
        constants.HF_HUB_OFFLINE = True  # `datasets` reads it when it is imported


def load_dataset(source, *args, **options):
    """`datasets.load_dataset(*args, **options)`, with its errors as a UserError about `source`."""
    with reading_source(source):
        import datasets  # imported here because it takes seconds, and --help, .txt files and nursery do not need it

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # their warnings only precede an error
        return datasets.load_dataset(*args, **options)


@contextmanager
def reading_source(source):
    """Convert the errors of reading a source to UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        encoding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"  # most likely from Windows
        raise UserError(f"{source} is not UTF-8 text ({error.reason}): convert it, for example with  "
                        f"iconv -f {encoding} -t utf-8 OLD > NEW") from error
    except ConnectionError as error:
        raise UserError(f"cannot reach {source} on the Hugging Face hub: check the name and the network, or stay "
                        "offline with a local file or folder (python prepare.py my_stories.txt --tokenizer bpe:4096) "
                        "or with synthetic stories (python prepare.py nursery --tokenizer bpe:2048)") from error
    except Exception as error:
        library_error = type(error).__module__.startswith(("datasets", "huggingface_hub", "pyarrow"))
        if not library_error and not isinstance(error, (OSError, ValueError)):
            raise
        hint = ("a folder must contain .txt, .jsonl or .parquet files" if Path(source).is_dir() else
                "it is empty or damaged, or its type does not match its name")
        raise UserError(f"cannot read {source}: {error} ({hint})") from error
