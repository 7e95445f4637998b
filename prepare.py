"""Convert stories into token files: data/<name>/ with train.bin, validation.bin, tokenizer.tiktoken and meta.json.

    python prepare.py                                     TinyStories, from the Hugging Face hub
    python prepare.py nursery --tokenizer bpe:2048        the synthetic corpus, with a vocabulary trained on it
    python prepare.py my_stories.txt                      your own text

Stories are streamed, stripped of outer white space and encoded on all cores, each followed by one end-of-text token.
Memory use grows by about 40 bytes per story, to find duplicates, and not with the text. The folder data/<name>/ appears
only when it is complete.
"""

if __name__ == "__main__":
    from runtime import startup

    startup.before_importing_torch()

import copy
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import sources
from data.dataset import with_checksum
from data.tokenizer import END_OF_TEXT, Tokenizer
from runtime import files
from runtime.errors import Parser, UserError, exit_with_one_line

BATCH_CHARACTERS = 1 << 20  # size of the batches that are encoded in one call
SAMPLE_CHARACTERS = 16 << 20  # a vocabulary is trained on at most this much text

_thread_local = threading.local()  # .tokenizer: the copy that belongs to this thread of the encoding pool


@exit_with_one_line
def main(argv=None):
    """Prepare a dataset; `argv` as on the command line."""
    args = parse_args(argv)
    folder = Path("data", args.name or default_name(args.source, args.tokenizer))
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if folder.is_file():
        raise UserError(f"{folder} is a file: choose another --name")
    folder.parent.mkdir(exist_ok=True)
    files.acquire_lock(folder.with_name(f".{folder.name}.lock"), folder)
    if old.exists() and not folder.exists():  # an earlier run with --force died between the two renames below
        files.rename(old, folder)
    if folder.exists():
        before, now = read_dataset_args(folder), dataset_args(args)  # with --force too: it must be a dataset
        if not args.force and before != now:
            raise UserError(f"{folder} already exists, created with {differences(before, now)}: replace it with "
                            "--force, or choose another --name")
        if not args.force:
            return print(f"{folder} already exists: use --force to create it again")

    for leftover in (partial, old):  # of a run that died
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        meta = write_dataset(partial, args)
        if folder.exists():
            files.rename(folder, old)
        files.rename(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    print_table(folder, meta)


def parse_args(argv):
    """Parse the command line. Exits with code 2 if a flag or its value is wrong; raises UserError for a bad --name."""
    parser = Parser(("source", "name", "tokenizer", "max_stories", "force"), usage="%(prog)s [SOURCE] [--flag ...]",
                    description="Convert stories into token files under data/<name>/.")
    parser.add_argument("source", nargs="?", default=sources.HUB_DATASET, metavar="SOURCE",
                        help="a file, a folder, a dataset on the Hugging Face hub, or 'nursery', the synthetic "
                             f"corpus (default: {sources.HUB_DATASET}); files are .txt (stories separated by lines "
                             "of <|endoftext|>), .jsonl or .parquet; a folder contains .txt files or has the layout of "
                             "a Hugging Face dataset")
    parser.add_argument("--name", help="name of the folder under data/; default: last part of the source, followed by "
                                       "the tokenizer if it is not gpt2")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken encoding, or bpe:4096 to train one of 4096 "
                                                            "tokens on the text (default: gpt2); or the folder of a "
                                                            "run or dataset, to reuse its tokenizer")
    parser.add_argument("--text_column", default="text", help="the column that contains the stories (default: text)")
    parser.add_argument("--validation_fraction", type=float, default=0.01,
                        help="fraction of the stories, chosen at random, that becomes the validation split if the "
                             "source has none; of a single text, its last part (default: 0.01)")
    parser.add_argument("--max_stories", type=int, help="use only the first MAX_STORIES stories of the training split; "
                                                        "duplicates included; default: all, of nursery "
                                                        f"{sources.NURSERY_STORIES:,}")
    parser.add_argument("--drop_duplicates", action="store_true",
                        help="drop training stories that repeat an earlier one or are also in the validation split")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the validation split and of nursery "
                                                               "(default: 1337)")
    parser.add_argument("--force", action="store_true", help="replace the dataset if it already exists")
    args = parser.parse_args(argv)
    if not 0 < args.validation_fraction < 1:
        parser.error(f"--validation_fraction must be between 0 and 1, not {args.validation_fraction}")
    if args.max_stories is not None and args.max_stories < 1:
        parser.error(f"--max_stories must be at least 1, not {args.max_stories}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, not {args.seed}")
    if args.name is not None and not is_valid_name(args.name):
        raise UserError(f"--name {args.name!r} is not a valid folder name: use letters, digits, '.', '_' and '-'")
    return args


def is_valid_name(name):
    """Whether a name can be a folder under data/: not hidden, no path separators, nothing that a shell interprets."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def default_name(source, tokenizer):
    """The default name of a dataset: `nursery-bpe2048` for nursery and bpe:2048."""
    path = Path(source)
    name = (path.stem if path.suffix in sources.FORMATS else path.resolve().name).lower()
    name += "" if tokenizer == "gpt2" else "-" + Path(tokenizer).name.replace(":", "")
    if not is_valid_name(name):
        raise UserError(f"{name!r}, derived from the source, is not a valid folder name: choose one with --name")
    return name


def dataset_args(args):
    """The arguments that determine the content of a dataset, as recorded in meta.json."""
    return {name: value for name, value in vars(args).items() if name not in ("name", "force")}


def read_dataset_args(folder):
    """The arguments that a dataset was created with. Raises UserError if the folder is not a dataset."""
    try:
        made_with = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["made_with"]
        return {"drop_duplicates": False, **made_with}  # older datasets do not have this key
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} exists without a valid meta.json and is left unchanged: remove it, or choose "
                        "another --name") from error


def differences(before, now):
    """Describe the arguments in which two datasets differ: "max_stories 30, now 31"."""
    return ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name])


def write_dataset(folder, args):
    """Write the token files, the tokenizer and meta.json to a folder; return the content of meta.json."""
    bpe_size = bpe_vocab_size(args.tokenizer)
    # The tokenizer is opened before the corpus is read, to fail early.
    tokenizer = None if bpe_size else open_tokenizer(args.tokenizer)

    corpus = sources.Corpus(args.source, args.text_column, args.max_stories, args.seed)
    count, characters, findings = examine_corpus(corpus, args)
    if bpe_size:
        tokenizer = train_tokenizer(corpus, bpe_size, count, characters)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    splits = encode_corpus(corpus, tokenizer, dtype, folder, count)

    tokenizer.save(folder)
    meta = {"source": args.source, "tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text, "dtype": dtype, "splits": splits,
            "empty_stories_dropped": corpus.empty_stories, **findings, "made_with": dataset_args(args)}
    (folder / "meta.json").write_text(json.dumps(with_checksum(meta), indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            files.sync(file.fileno())  # the data must be on disk before the folder is renamed
    return meta


def bpe_vocab_size(name):
    """4096 for bpe:4096; None for any other tokenizer. Raises UserError if the size is invalid."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:")
    if not (size.isdecimal() and int(size) > 256):
        raise UserError(f"--tokenizer {name!r}: the vocabulary size must be at least 257 (256 bytes and end of text), "
                        "as in bpe:4096")
    return int(size)


def open_tokenizer(name):
    """The tokenizer of a run or dataset folder, or a tiktoken encoding. Raises UserError if `name` is neither."""
    return Tokenizer.load(name) if Path(name, "tokenizer.tiktoken").exists() else Tokenizer.named(name)


def examine_corpus(corpus, args):
    """Read the corpus once, choose its validation split and find duplicates.

    Returns the number of stories, the number of characters, and the entries of meta.json about both.
    Raises UserError if a split has no stories, or none are left.
    """
    hashes, characters = {"train": array("q"), "validation": array("q")}, 0
    for split, story in progress(corpus, "counting"):
        hashes[split].append(hash(story))  # 64 bits: among 2 million stories, two have the same with p = 1e-7
        characters += len(story)
    for split in corpus.splits:
        if not hashes[split]:
            raise UserError(f"{args.source}: the {split} split has no stories, or only empty ones")

    hashes = {split: np.asarray(values) for split, values in hashes.items()}
    validation = corpus.split_validation(len(hashes["train"]), args.validation_fraction, args.seed)
    duplicates = corpus.find_duplicates(hashes, args.drop_duplicates)
    count = sum(map(len, hashes.values())) - duplicates["dropped"]
    return count, characters, {"validation_split": validation, "duplicates": duplicates}


def train_tokenizer(corpus, vocab_size, count, characters):
    """Train a vocabulary on training stories sampled evenly from the corpus, about SAMPLE_CHARACTERS at most.

    `count` (stories) and `characters` are the size of the corpus. Long stories are sampled in pieces, because training
    takes 100 bytes of memory for each byte of a piece.
    """
    step = math.ceil(characters / SAMPLE_CHARACTERS)
    pieces = ((split, story[start:start + BATCH_CHARACTERS])
              for split, story in progress(corpus, f"sampling for bpe:{vocab_size}", count)
              for start in range(0, len(story), BATCH_CHARACTERS))
    sample = (piece for split, piece in itertools.islice(pieces, 0, None, step) if split == "train")
    return Tokenizer.train(sample, vocab_size, show_progress=sys.stderr.isatty())


def encode_corpus(corpus, tokenizer, dtype, folder, count):
    """Encode the corpus on all cores into <split>.bin files; return the sizes and hash of each split for meta.json.

    Threads are enough because tiktoken releases the GIL.
    """
    splits = {split: {"stories": 0, "tokens": 0, "bytes": 0} for split in ("train", "validation")}
    hashes = {split: hashlib.sha256() for split in splits}
    with ExitStack() as stack, ThreadPoolExecutor(os.cpu_count(), initializer=copy_tokenizer,
                                                  initargs=[tokenizer]) as pool:
        file = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in splits}
        batches = batch_stories(progress(corpus, "encoding", count))
        for split, tokens, sizes in encode_in_order(pool, batches, np.dtype(dtype).newbyteorder("<")):
            file[split].write(tokens)
            hashes[split].update(tokens)
            for name, size in sizes.items():
                splits[split][name] += size
    return {split: sizes | {"sha256": hashes[split].hexdigest()} for split, sizes in splits.items()}


def batch_stories(pairs):
    """Group (split, story) pairs into (split, list of stories) of about BATCH_CHARACTERS, in order within a split."""
    batches, characters = {}, Counter()
    for split, story in pairs:
        batches.setdefault(split, []).append(story)
        characters[split] += len(story)
        if characters[split] >= BATCH_CHARACTERS:
            yield split, batches.pop(split)
            characters[split] = 0
    yield from batches.items()


def encode_in_order(pool, batches, dtype):
    """Encode batches in the threads of a pool; yield (split, tokens, sizes) of each batch in the given order."""
    pending = deque()
    for split, stories in batches:
        pending.append((split, pool.submit(encode_batch, stories, dtype)))
        if len(pending) > 2 * os.cpu_count():  # enough to keep every core busy; more would only use memory
            oldest, result = pending.popleft()
            yield oldest, *result.result()
    for oldest, result in pending:
        yield oldest, *result.result()


def copy_tokenizer(tokenizer):
    """Give this thread its own copy of the tokenizer: threads that share one wait for its regular expressions."""
    _thread_local.tokenizer = copy.deepcopy(tokenizer)


def encode_batch(stories, dtype):
    """Encode a list of stories; return their tokens (an array of `dtype`) and the sizes that meta.json records."""
    tokens = _thread_local.tokenizer.encode_stories(stories).astype(dtype)
    return tokens, {"stories": len(stories), "tokens": len(tokens), "bytes": sum(len(s.encode()) for s in stories)}


def progress(corpus, description, count=None):
    """Iterate over (split, story) pairs with a progress bar on stderr (MB/s; time left if `count` is given).

    The bar is shown on a terminal only.
    """
    with tqdm(desc=description, total=count, unit=" stories", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        started, characters, i = time.perf_counter(), 0, 0
        for i, (split, story) in enumerate(corpus, 1):
            characters += len(story)
            if i % 1000 == 0:  # updating for every story would take longer than the work itself
                bar.set_postfix_str(f"{characters / 1e6 / (time.perf_counter() - started):.1f} MB/s", refresh=False)
                bar.update(i - bar.n)
            yield split, story
        bar.update(i - bar.n)


def print_table(folder, meta):
    """Print the size of each split: stories, tokens, bytes of text, bytes per token, and the token file."""
    print(f"{folder}: {meta['tokenizer']['name']}, {meta['vocab_size']:,} tokens in the vocabulary, "
          f"{meta['empty_stories_dropped']:,} empty stories dropped")
    if meta["validation_split"] == "end of the text":
        print(f"{meta['source']} has only one text: its last {meta['splits']['validation']['bytes']:,} bytes are the "
              f"validation split (in a .txt file, lines of {END_OF_TEXT} separate stories)")
    duplicates = meta["duplicates"]
    print(f"duplicates: {duplicates['within_train']:,} training stories repeat an earlier one, "
          f"{duplicates['validation_in_train']:,} validation stories are also in training; "
          f"dropped by --drop_duplicates: {duplicates['dropped']:,}")
    print(f"{'split':12}{'stories':>12}{'tokens':>15}{'bytes':>16}{'bytes/token':>13}{'file':>12}")
    for split, sizes in meta["splits"].items():
        megabytes = (folder / f"{split}.bin").stat().st_size / 1e6
        print(f"{split:12}{sizes['stories']:12,}{sizes['tokens']:15,}{sizes['bytes']:16,}"
              f"{sizes['bytes'] / sizes['tokens']:13.2f}{megabytes:9.1f} MB")


if __name__ == "__main__":
    main()
