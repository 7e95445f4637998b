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
WINDOW_CHARACTERS = 1024  # a window of 128 tokens (the default block_size) takes fewer, if they average 7 or less
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # file extension → its name in `datasets`


class Corpus:
    """The stories of a source as (split, story) pairs, streamed; can be iterated any number of times."""

    def __init__(self, source, text_column="text", max_stories=None, seed=0):
        """`max_stories` limits the training split. Raises UserError if the source cannot be opened."""
        self.source, self.max_stories = source, max_stories
        self.splits = open_source(source, text_column, max_stories, seed)
        self.split_of = itertools.repeat("train")  # of each training story of the source; set by `examine`
        self.count = None  # of stories, set by `examine`
        self.empty_stories = 0  # dropped by the latest iteration

    def __iter__(self):
        """Yield (split, story) pairs in the order of the source, with outer white space stripped."""
        self.empty_stories = 0
        train = itertools.islice(self._clean("train"), self.max_stories)
        yield from ((split, story) for story, split in zip(train, self.split_of) if split)
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

    def progress(self, description):
        """The (split, story) pairs, with a progress bar on a terminal; it shows the time left once `count` is set."""
        return tqdm(self, description, self.count, unit=" stories", unit_scale=True, dynamic_ncols=True, disable=None)

    def examine(self, fraction, seed, drop_duplicates):
        """Count the stories, make a validation split of `fraction` if the source has none, and find duplicates.

        Returns the number of characters, and the entries of meta.json about all this. Raises UserError if a split has
        too little text.
        """
        hashes, characters = {"train": array("q"), "validation": array("q")}, 0
        for split, story in self.progress("counting"):
            hashes[split].append(hash(story))  # 64 bits: among 2 million stories, two have the same with p = 1e-7
            characters += len(story)
        for split in self.splits:
            if not hashes[split]:
                raise UserError(f"{self.source}: the {split} split has no stories, or only empty ones")
        found = {"empty_stories_dropped": self.empty_stories, "validation_split": "source"}
        train, validation = (np.asarray(values) for values in hashes.values())
        self.split_of = np.full(len(train), "train", object)
        if "validation" not in self.splits and len(train) == 1:
            found["validation_split"] = "end of the text"
            self.splits = {name: partial(iter, [part]) for name, part in self.divide(story, fraction).items()}
        elif "validation" not in self.splits:
            found["validation_split"] = "random stories"
            size = min(max(1, round(len(train) * fraction)), len(train) - 1)
            chosen = np.random.default_rng(seed).choice(len(train), size, replace=False, shuffle=False)
            self.split_of[chosen] = "validation"
            train, validation = np.delete(train, chosen), train[chosen]

        stories, first = np.unique(train, return_index=True)
        repeated = np.ones(len(train), bool)
        repeated[first] = False
        # `np.isin(validation, train)`, but that is slow if the second argument is the longer one.
        in_train = stories.take(np.searchsorted(stories, validation), mode="clip") == validation
        dropped = repeated | np.isin(train, validation) if drop_duplicates else np.zeros(len(train), bool)
        if dropped.all():
            raise UserError(f"{self.source}: --drop_duplicates would leave none of the training stories: use more text")
        self.split_of[np.flatnonzero(self.split_of == "train")[dropped]] = None
        self.count = len(train) + len(validation) - int(dropped.sum())
        found["duplicates"] = {"within_train": int(repeated.sum()), "validation_in_train": int(in_train.sum()),
                               "dropped": int(dropped.sum())}
        return characters, found

    def divide(self, text, fraction):
        """Divide the only text of a source, split → text, in characters to suit all tokenizers.

        The last `fraction` is the validation split, at least one window; training needs two, or UserError is raised.
        """
        if len(text) < 3 * WINDOW_CHARACTERS:
            raise UserError(f"{self.source} has only one text, of {len(text):,} characters, but training and "
                            f"validation need {3 * WINDOW_CHARACTERS:,}: use more text (in a .txt file, lines of "
                            f"{END_OF_TEXT} separate stories)")
        size = min(max(round(len(text) * fraction), WINDOW_CHARACTERS), len(text) - 2 * WINDOW_CHARACTERS)
        # At the end of a word. The search is bounded, for languages that do not separate words.
        cut = re.compile(r"\S{,99}").match(text, len(text) - size).end()
        return {"train": text[:cut], "validation": text[cut:]}


def open_source(source, text_column="text", max_stories=None, seed=0):
    """Open a source; returns a dict, split → function that iterates over its stories (str or None) from the start.

    Raises UserError if it does not exist or cannot be read.
    """
    if source == "nursery":
        return {"train": partial(nursery.stories, max_stories or NURSERY_STORIES, seed)}
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in FORMATS:
        raise UserError(f"{path}: unsupported file type, use one of {', '.join(FORMATS)}")
    if not path.exists() and (path.suffix in FORMATS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise UserError(f"{path} does not exist: give a file, a folder, a dataset on the Hugging Face hub, or nursery")
    if texts := text_files(path):
        return {split: partial(read_text_files, paths) for split, paths in texts.items()}

    if path.is_file():
        arguments = {"path": FORMATS[path.suffix], "data_files": glob.escape(str(path)), "streaming": True}
    elif path.is_dir():
        arguments = {"path": str(path), "streaming": True}
    else:
        print(f"loading {source} from the Hugging Face hub", file=sys.stderr)
        use_only_the_cache_if_offline(source)
        arguments = {"path": source}  # not streamed: the downloaded files stay in the cache of `datasets`
    import datasets  # not at the top: it takes seconds, and --help, .txt files and nursery do not need it

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their warnings only precede an error
    with reading_source(source):
        splits = datasets.load_dataset(**arguments)
    if "train" not in splits:
        raise UserError(f"{source} has no split 'train', only {', '.join(splits)}")
    return {split: partial(read_column, splits[split], text_column, source)
            for split in ("train", "validation") if split in splits}


def use_only_the_cache_if_offline(source):
    """Switch the hub's library to its offline mode if the hub does not answer: it would retry for 25 seconds."""
    from huggingface_hub import HfApi, constants  # not at the top, as `datasets` above

    try:
        HfApi().dataset_info(source, timeout=10)  # seconds; does not retry
    except Exception as error:
        module = type(error).__module__
        if module.startswith(("requests", "httpx")):  # depends on the version of the hub's library
            constants.HF_HUB_OFFLINE = True  # `datasets` reads it when it is imported
        elif not module.startswith("huggingface_hub"):  # an answer of the hub, or offline: load_dataset will report it
            raise


def text_files(path):
    """The paths of each split, if `path` is a .txt file, or a folder without other files except hidden ones; or {}."""
    if path.is_file():
        return {"train": [path]} if path.suffix == ".txt" else {}
    visible = sorted(file for name in glob.glob("**", root_dir=path, recursive=True) if (file := path / name).is_file())
    if not visible or any(file.suffix != ".txt" for file in visible):
        return {}
    validation = [file for file in visible if re.search(r"(^|[-_.])valid(ation)?$", file.stem)]  # TinyStories-valid.txt
    train = [file for file in visible if file not in validation]
    return {"train": train, "validation": validation} if validation else {"train": train}


def read_text_files(paths):
    """Yield the stories of UTF-8 files, separated by lines of `<|endoftext|>`."""
    for path in paths:
        with reading_source(path), open(path, encoding="utf-8-sig") as file:
            for is_separator, lines in itertools.groupby(file, lambda line: line.strip() == END_OF_TEXT):
                if not is_separator:
                    yield "".join(lines)


def read_column(dataset, column, source):
    """Yield the values of a column of a `datasets` dataset. Raises UserError if it is missing or a file is damaged."""
    with reading_source(source):
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            if column not in table.column_names:
                raise UserError(f"{source} has no column '{column}': choose one of {', '.join(table.column_names)} "
                                "with --text_column")
            yield from table[column].to_pylist()


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
        if not library_error and not isinstance(error, (OSError, ValueError, StopIteration)):  # the last: no lines
            raise
        raise UserError(f"cannot read {source}: {str(error) or type(error).__name__} (a file may be empty or damaged, "
                        "or of another type than its name says; a folder must contain .txt, .jsonl or .parquet files)"
                        ) from error
