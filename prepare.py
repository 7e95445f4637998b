"""Turn stories into token files: data/<name>/ with train.bin, validation.bin, tokenizer.tiktoken and meta.json.

    python prepare.py                                     TinyStories, from the Hugging Face hub
    python prepare.py nursery --tokenizer bpe:2048        the embedded corpus, with a vocabulary trained on it
    python prepare.py my_stories.txt                      your own text

Stories are read as a stream, stripped of outer white space and encoded on all cores, one end-of-text token after
each; memory does not grow with the corpus. Nothing stands under data/<name>/ before all of it is whole.
"""

import argparse
import copy
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

import files
from dataset import seal
from errors import Parser, UserError, exit_with_one_line
from tokenizer import END_OF_TEXT, Tokenizer

HUB_DATASET = "roneneldan/TinyStories"
NURSERY_STORIES = 20_000  # unless --max_stories says otherwise: the grammar has no end of its own
BATCH_CHARACTERS = 1 << 20  # text that goes to the tokenizer at once
SAMPLE_CHARACTERS = 16 << 20  # text that a vocabulary is trained on, at most
LONGEST_STORY = 1 << 26  # characters of a .txt file without a separator that are believed to be one story
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # ending → what `datasets` calls it


@exit_with_one_line
def main(argv=None):
    """Prepare a dataset; `argv` as on the command line. What a user can mend ends in one line."""
    args = parse_args(argv)
    folder = Path("data", args.name or default_name(args.source, args.tokenizer))
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if folder.is_file():
        raise UserError(f"{folder} is a file: give another --name")
    folder.parent.mkdir(exist_ok=True)
    files.hold(folder.with_name(f".{folder.name}.lock"), folder)
    if old.exists() and not folder.exists():  # a run with --force died between the two renames below
        old.rename(folder)
    made_with = {name: value for name, value in vars(args).items() if name not in ("name", "force")}
    if folder.exists():
        before = read_made_with(folder)
        if not args.force:
            if before != made_with:
                raise UserError(f"{folder} is there already, made with {differences(before, made_with)}: --force makes "
                                "it again, --name puts this beside it")
            return print(f"{folder} is there already; --force makes it again")

    for leftover in (partial, old):  # of a run that died
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        meta = write_dataset(partial, args, made_with)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    print_table(folder, meta)


def parse_args(argv):
    """The command line as a namespace; exits with code 2 for wrong flags, raises UserError for a wrong name."""
    def at_least(low):
        def whole_number(text):
            if (value := int(text)) < low:
                raise argparse.ArgumentTypeError(f"{text} is not {low} or more")
            return value
        return whole_number

    def fraction(text):
        if not 0 < (value := float(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
        return value

    parser = Parser(description="Turn stories into token files under data/<name>/.")
    parser.add_argument("source", nargs="?", default=HUB_DATASET, metavar="SOURCE",
                        help="'nursery' (the embedded corpus), a .txt file (stories between lines of <|endoftext|>), "
                             "a .jsonl or .parquet file, a folder of .txt files, a folder laid out as on the "
                             f"Hugging Face hub, or a dataset on the hub (default: {HUB_DATASET})")
    parser.add_argument("--name", help="the folder under data/ (default: the source's last part, with the tokenizer "
                                       "behind it when that is not gpt2)")
    parser.add_argument("--tokenizer", default="gpt2", help="an encoding of tiktoken; bpe:4096 to train a byte-level "
                                                            "BPE of 4096 tokens on the text; or the folder of a run or "
                                                            "a dataset, to take its own (default: gpt2)")
    parser.add_argument("--text_column", default="text", help="the column that holds the stories (default: text)")
    parser.add_argument("--validation_fraction", type=fraction, default=0.01,
                        help="share of the stories, drawn at random, that makes the validation split where the source "
                             "has none (default: 0.01)")
    parser.add_argument("--max_stories", type=at_least(1), help="take only the first so many (default: all; "
                                                               f"of nursery {NURSERY_STORIES:,})")
    parser.add_argument("--seed", type=at_least(0), default=1337, help="of the draw, and of nursery (default: 1337)")
    parser.add_argument("--force", action="store_true", help="make the dataset again where it is there already")
    args = parser.parse_args(argv)
    if args.name is not None and not is_plain_name(args.name):
        raise UserError(f"--name {args.name!r} is no plain folder name: use letters, digits, '.', '_' and '-'")
    return args


def is_plain_name(name):
    """Whether a name can be a folder under data/: no separators, nothing hidden, nothing that a shell would cut."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def default_name(source, tokenizer):
    """The name of a dataset: `nursery` and bpe:2048 give `nursery-bpe2048`."""
    path = Path(source)
    name = (path.stem if path.suffix in FORMATS else path.resolve().name).lower()
    name += "" if tokenizer == "gpt2" else "-" + Path(tokenizer).name.replace(":", "")
    if not is_plain_name(name):
        raise UserError(f"{name!r}, the source's last part, is no plain folder name: give one with --name")
    return name


def read_made_with(folder):
    """The arguments that a dataset was made with. Raises UserError where the folder is something else."""
    try:
        return dict(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["made_with"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is there but has no sound meta.json, so it is left alone: remove it, or give "
                        "another --name") from error


def differences(before, now):
    """The settings in which two dicts differ, in words."""
    return ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name])


def write_dataset(folder, args, made_with):
    """Write the token files, the tokenizer and meta.json into a folder; meta.json's dict comes back."""
    trained_size = trained_vocabulary_size(args.tokenizer)
    # First: it may fail, and costs little.
    tokenizer = None if trained_size else open_tokenizer(args.tokenizer)

    corpus = Corpus(args)
    counts, characters = survey(corpus)
    for split in corpus.splits:
        if not counts[split]:
            raise UserError(f"{args.source}: the {split} split has no story in it that is not empty")
    if "validation" not in corpus.splits:
        corpus.draw_validation(counts["train"], args.validation_fraction, args.seed)

    if trained_size:
        tokenizer = train_tokenizer(corpus, trained_size, counts.total(), characters)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    splits = encode(corpus, tokenizer, dtype, folder, counts.total())

    tokenizer.save(folder)
    meta = {"source": args.source, "tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text, "dtype": dtype, "splits": splits,
            "empty_stories_dropped": corpus.empty, "made_with": made_with}
    (folder / "meta.json").write_text(json.dumps(seal(meta), indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())  # on the disk before the folder gets its name
    return meta


def trained_vocabulary_size(name):
    """4096 for bpe:4096, None for the name of an encoding. Raises UserError for a size that cannot be."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:")
    if not (size.isdecimal() and int(size) > 256):
        raise UserError(f"--tokenizer {name!r}: a vocabulary has at least 257 tokens (the bytes and end of text), "
                        "as in bpe:4096")
    return int(size)


def open_tokenizer(name):
    """The tokenizer of a run's or a dataset's folder, or the encoding of that name. Raises UserError for neither."""
    return Tokenizer.load(name) if Path(name, "tokenizer.tiktoken").exists() else Tokenizer.named(name)


class Corpus:
    """The stories of a source, each with its split, to be read from the start as often as one likes.

    `splits` are the source's own; `empty` is how many empty stories the latest reading has dropped.
    """

    def __init__(self, args):
        self.args = args
        self.splits = open_source(args)  # split → a function that reads its stories, just as they are
        self.in_validation = None
        self.empty = 0

    def __iter__(self):
        """Yield (split, story), outer white space stripped; of the training split the first `max_stories`."""
        self.empty = 0
        for split, read in self.splits.items():
            limit = self.args.max_stories if split == "train" else None
            for i, story in enumerate(itertools.islice(self._clean(read(), split), limit)):
                yield ("validation" if self.in_validation is not None and self.in_validation[i] else split), story

    def _clean(self, stories, split):
        for i, story in enumerate(stories):
            if not isinstance(story, str | None):
                raise UserError(f"{self.args.source}: story {i + 1} of the {split} split is no text but "
                                f"{type(story).__name__}: name another column with --text_column")
            if story := (story or "").strip():
                yield story
            else:
                self.empty += 1

    def draw_validation(self, count, fraction, seed):
        """Set a share of that many training stories aside as the validation split: those that a shuffle puts first.

        Raises UserError where there is only one story.
        """
        if count < 2:
            raise UserError(f"{self.args.source} has only one story, and some must be kept for validation: a .txt file "
                            f"has a line {END_OF_TEXT} between its stories")
        wanted = min(max(1, round(count * fraction)), count - 1)
        self.in_validation = np.zeros(count, bool)
        self.in_validation[np.random.default_rng(seed).choice(count, wanted, replace=False, shuffle=False)] = True


def open_source(args):
    """Where the stories are: split → a function that iterates over its stories (str, or None) from the start.

    Raises UserError where the source is none of the kinds that `--help` lists, or cannot be reached.
    """
    source, column = args.source, args.text_column
    if source == "nursery":
        from data import nursery
        return {"train": lambda: nursery.stories(args.max_stories or NURSERY_STORIES, args.seed)}

    path = Path(source).expanduser()
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is empty")
    if path.is_file() and path.suffix not in FORMATS:
        raise UserError(f"{path}: a file must be {', '.join(FORMATS)}")
    if not path.exists() and (path.suffix in FORMATS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise UserError(f"{path} does not exist: name a file, a folder, a dataset on the hub, or nursery")

    if texts := text_files(path):
        return {split: lambda paths=paths: itertools.chain.from_iterable(map(read_text, paths))
                for split, paths in texts.items()}
    if path.is_file():
        splits = load(source, FORMATS[path.suffix], data_files=glob.escape(str(path)), streaming=True)
    elif path.is_dir():
        splits = load(source, str(path), streaming=True)
    else:
        print(f"getting {source} from the Hugging Face hub", file=sys.stderr)
        splits = load(source, source)  # downloaded and kept in the library's cache, so that it need not come twice
    if "train" not in splits:
        raise UserError(f"{source} has no split 'train', only {', '.join(splits)}")
    return {split: lambda split=split: read_column(splits[split], column, source)
            for split in ("train", "validation") if split in splits}


def text_files(path):
    """A .txt file, or a folder of nothing else but hidden files, as split → paths; {} for any other source.

    In a folder, a name that ends in valid or validation (TinyStories-valid.txt) is the validation split.
    """
    if path.is_file():
        return {"train": [path]} if path.suffix == ".txt" else {}
    texts = sorted(file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts)) if path.is_dir() else []
    if not texts or any(file.suffix != ".txt" for file in texts):
        return {}
    validation = [file for file in texts if re.search(r"(^|[-_.])valid(ation)?$", file.stem)]
    train = [file for file in texts if file not in validation]
    return {"train": train} | ({"validation": validation} if validation else {})


def load(source, *words, **options):
    """`datasets.load_dataset`, whose many errors become one UserError about the source."""
    with reading(source):
        import datasets  # here, because it takes seconds and --help and nursery do without

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # what they warn of comes as an error anyway
        return datasets.load_dataset(*words, **options)


@contextmanager
def reading(source):
    """Turn what can go wrong in reading a source into one UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        theirs = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"  # Windows' two others
        raise UserError(f"{source} is not UTF-8 text ({error.reason}): convert it, for example with  "
                        f"iconv -f {theirs} -t utf-8 OLD > NEW") from error
    except ConnectionError as error:
        raise UserError(f"cannot reach {source} on the Hugging Face hub: check the name and the network, or give a "
                        "local file or folder, or nursery") from error
    except Exception as error:
        known = type(error).__module__.startswith(("datasets", "huggingface_hub", "pyarrow"))
        if not known and not isinstance(error, (OSError, ValueError)):
            raise
        needed = ". A folder needs .txt, .jsonl or .parquet files" if Path(source).is_dir() else ""
        raise UserError(f"cannot read {source}, it is broken or not what its name says: {error}{needed}") from error


def read_column(dataset, column, source):
    """Yield the stories of a `datasets` dataset. Raises UserError where the column is missing or a file is broken."""
    with reading(source):
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            if column not in table.column_names:
                raise UserError(f"{source} has no column '{column}': name one of {', '.join(table.column_names)} with "
                                "--text_column")
            yield from table[column].to_pylist()


def read_text(path):
    """Yield the stories of a text file: what stands between lines of `<|endoftext|>`.

    Raises UserError where a story is so long that the file must be something else: it would fill the memory.
    """
    with reading(path), open(path, encoding="utf-8-sig") as file:
        story, size = [], 0
        for line in iter(lambda: file.readline(LONGEST_STORY), ""):
            if line.strip() == END_OF_TEXT:
                yield "".join(story)
                story, size = [], 0
                continue
            story.append(line)
            size += len(line)
            if size >= LONGEST_STORY:
                raise UserError(f"{path} has no line {END_OF_TEXT} in {size:,} characters: put one between its stories")
        if any(map(str.strip, story)):  # nothing but line ends behind the last separator is no story
            yield "".join(story)


def survey(corpus):
    """Read the corpus once: how many stories each split has, and how many characters there are in all."""
    counts, characters = Counter(), 0
    for split, story in progress(corpus, "counting"):
        counts[split] += 1
        characters += len(story)
    return counts, characters


def train_tokenizer(corpus, size, count, characters):
    """A vocabulary trained on training stories taken evenly from the whole corpus, SAMPLE_CHARACTERS at most."""
    step = math.ceil(characters / SAMPLE_CHARACTERS)
    labelled = enumerate(progress(corpus, f"sampling for bpe:{size}", count))
    sample = (story for i, (split, story) in labelled if i % step == 0 and split == "train")
    return Tokenizer.train(sample, size, show_progress=sys.stderr.isatty())


def progress(corpus, doing, count=None):
    """Go through the corpus behind a bar (stories, MB/s, time left where the count is known); none off a terminal."""
    with tqdm(desc=doing, total=count, unit=" stories", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        started, characters = time.perf_counter(), 0
        for i, (split, story) in enumerate(corpus, 1):
            characters += len(story)
            if i % 1000 == 0:  # not each time: the bar must not cost more than the work
                bar.set_postfix_str(f"{characters / 1e6 / (time.perf_counter() - started):.1f} MB/s", refresh=False)
                bar.update(i - bar.n)
            yield split, story
        bar.update(i - bar.n if characters else 0)


def encode(corpus, tokenizer, dtype, folder, count):
    """Encode the corpus on all cores into <split>.bin files; the figures of each split, as meta.json has them, come
    back. Threads are enough: tiktoken works outside of Python's lock.
    """
    figures = {split: {"stories": 0, "tokens": 0, "bytes": 0} for split in ("train", "validation")}
    hashes = {split: hashlib.sha256() for split in figures}
    little_endian = np.dtype(dtype).newbyteorder("<")

    mine = threading.local()

    def work(batch):
        if not hasattr(mine, "tokenizer"):  # threads that share one wait for each other at its regular expressions
            mine.tokenizer = copy.deepcopy(tokenizer)
        return mine.tokenizer.encode_stories(batch).astype(little_endian), sum(len(story.encode()) for story in batch)

    with ExitStack() as opened, ThreadPoolExecutor(os.cpu_count()) as pool:
        file = {split: opened.enter_context(open(folder / f"{split}.bin", "wb")) for split in figures}
        pending = deque()

        def write_oldest():
            split, batch, result = pending.popleft()
            tokens, size = result.result()
            file[split].write(tokens)
            hashes[split].update(tokens)
            for name, value in (("stories", len(batch)), ("tokens", len(tokens)), ("bytes", size)):
                figures[split][name] += value

        for split, batch in batches(progress(corpus, "encoding", count)):
            pending.append((split, batch, pool.submit(work, batch)))
            if len(pending) > 2 * os.cpu_count():  # enough to keep every core busy, and a bound on memory
                write_oldest()
        while pending:
            write_oldest()
    return {split: figures[split] | {"sha256": hashes[split].hexdigest()} for split in figures}


def batches(labelled):
    """Gather (split, story) pairs into (split, list of stories) of about BATCH_CHARACTERS each, in order."""
    waiting, size = {}, Counter()
    for split, story in labelled:
        waiting.setdefault(split, []).append(story)
        size[split] += len(story)
        if size[split] >= BATCH_CHARACTERS:
            yield split, waiting.pop(split)
            size[split] = 0
    yield from waiting.items()


def print_table(folder, meta):
    """What was made: stories, tokens, bytes of text, bytes a token and the size of the file, for each split."""
    print(f"{folder}: {meta['tokenizer']['name']}, {meta['vocab_size']:,} tokens in the vocabulary, "
          f"{meta['empty_stories_dropped']:,} empty stories dropped")
    print(f"{'split':12}{'stories':>12}{'tokens':>15}{'bytes':>16}{'bytes/token':>13}{'file':>12}")
    for split, f in meta["splits"].items():
        megabytes = (folder / f"{split}.bin").stat().st_size / 1e6
        print(f"{split:12}{f['stories']:12,}{f['tokens']:15,}{f['bytes']:16,}{f['bytes'] / f['tokens']:13.2f}"
              f"{megabytes:9.1f} MB")


if __name__ == "__main__":
    main()
