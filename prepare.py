"""Convert stories into token files: data/<name>/ with train.bin, validation.bin, tokenizer.tiktoken and meta.json.

    python prepare.py                                     TinyStories, from the Hugging Face hub
    python prepare.py nursery --tokenizer bpe:2048        the synthetic corpus, with a vocabulary trained on it
    python prepare.py my_texts                            your own text: a file or a folder
    zcat texts.gz | python prepare.py -                   ... or standard input

Stories are streamed, stripped of outer white space and encoded on all cores, each followed by one end-of-text token.
Memory use grows with the number of stories, to find duplicates. data/<name>/ appears only when it is complete.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

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
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from storygpt.corpus import sources
from storygpt.corpus.dataset import read_meta, with_checksum
from storygpt.corpus.stories import Corpus
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line

BATCH_CHARACTERS = 1 << 20  # size of the batches that are encoded in one call
SAMPLE_CHARACTERS = 16 << 20  # a vocabulary is trained on at most this much text


@exit_with_one_line
def main(argv=None):
    """Prepare a dataset; `argv` as on the command line."""
    args = parse_args(argv)
    made_with = {name: value for name, value in vars(args).items() if name not in ("name", "force")}
    folder = Path("data", args.name)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(exist_ok=True)
    files.acquire_lock(folder.with_name(f".{folder.name}.lock"), folder)
    clean_up(partial, folder)  # after a run that died
    if folder.exists():  # with --force too: what is not a dataset is never replaced
        before = read_meta(folder).get("made_with", {})
        changed = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in made_with.items()
                   if value != before.get(key)]
        if sources.is_pipe(args.source):
            changed.append("the text of a pipe, which may have been another")
        if changed and not args.force:
            raise UserError(f"{folder} already exists, created with {', '.join(changed)}: replace it with --force, or "
                            "choose another --name")
        if not args.force:
            return print(f"{folder} already exists: use --force to create it again")

    trained = args.tokenizer.startswith("bpe:")
    if not trained:  # opened before the corpus is read, to fail early
        is_folder = Path(args.tokenizer, "tokenizer.tiktoken").exists()
        tokenizer = Tokenizer.load(args.tokenizer) if is_folder else Tokenizer.named(args.tokenizer)
    corpus = Corpus(args.source, args.text_column, args.config, args.max_stories, args.seed, args.clean)
    characters, findings = corpus.examine(args.validation_fraction, args.seed, args.drop_duplicates)
    if trained:
        tokenizer = train_tokenizer(corpus, int(args.tokenizer.removeprefix("bpe:")), characters)
    try:
        Path(partial, "new").mkdir(parents=True)
        meta = write_dataset(partial / "new", corpus, tokenizer, findings | {"made_with": made_with})
        if folder.exists():
            files.rename(folder, partial / "old")
        files.rename(partial / "new", folder)
    except OSError as error:  # of writing: those of reading are UserErrors
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        clean_up(partial, folder)
    print_table(folder, meta)


def clean_up(partial, folder):
    """Remove temporary files; a dataset that was about to be replaced gets its name back."""
    if Path(partial, "old").exists() and not folder.exists():
        files.rename(partial / "old", folder)
    shutil.rmtree(partial, ignore_errors=True)


def parse_args(argv):
    """Parse the command line. Exits with code 2 for a wrong flag; raises UserError for a wrong --name or bpe: size."""
    parser = Parser(("source", "name", "tokenizer", "max_stories", "force"), usage="%(prog)s [SOURCE] [--flag ...]",
                    description="Convert stories into token files under data/<name>/.")
    add = parser.add_argument
    add("source", nargs="?", default=sources.HUB_DATASET, metavar="SOURCE",
        help="a file, a folder, a dataset on the Hugging Face hub, - for standard input, or nursery, the synthetic "
             "corpus (default: %(default)s); files are .txt (<|endoftext|> separates stories), .jsonl, .json or "
             ".parquet; words in the names of a folder's files and sub-folders tell the split: train, training; "
             "validation, valid, val, dev; test, testing, eval, evaluation (left out)")
    add("--name", help="name of the folder under data/; default: last part of SOURCE, and the tokenizer if not gpt2")
    add("--tokenizer", default="gpt2", help="a tiktoken encoding, or bpe:4096 to train one of 4096 tokens on the text "
        "(default: %(default)s); or the folder of a run or dataset, to reuse its tokenizer")
    add("--text_column", default="text", help="the column that contains the stories (default: %(default)s)")
    add("--config", help="which configuration of a source that has several, such as a language")
    add("--validation_fraction", type=float, default=0.01, help="fraction of the stories, chosen at random, for the "
        "validation split if the source has none; of a single text, its last part (default: %(default)s)")
    add("--max_stories", type=int, help="use only the first MAX_STORIES stories of the training split; duplicates "
        f"included; default: all, of nursery {sources.NURSERY_STORIES:,}")
    add("--drop_duplicates", action="store_true",
        help="drop training stories that repeat an earlier one or are also in the validation split")
    add("--clean", action="store_true", help="make quotes, dashes and spaces plain, and drop invisible characters and "
        "stories that stop in mid-sentence or have less than 100 characters; for English text")
    add("--seed", type=int, default=1337, help="seed of the validation split and of nursery (default: %(default)s)")
    add("--force", action="store_true", help="replace the dataset if it already exists")
    args = parser.parse_args(argv)
    if not args.source:
        parser.error("SOURCE is empty")
    if not 0 < args.validation_fraction < 1:
        parser.error(f"--validation_fraction must be between 0 and 1, not {args.validation_fraction}")
    for name, low in (("max_stories", 2), ("seed", 0)):  # one for each split
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name} must be at least {low}, not {value}")
    args.name = default_name(args) if args.name is None else args.name
    if not re.fullmatch(r"\w[\w.-]*", args.name):  # hidden, a path, or special in a shell
        raise UserError(f"{args.name!r} is not a valid folder name: set --name to letters, digits, '.', '_' and '-'")
    size = args.tokenizer.removeprefix("bpe:")
    if args.tokenizer.startswith("bpe:") and not (size.isdecimal() and int(size) > 256):  # bytes and end of text
        raise UserError(f"--tokenizer {args.tokenizer!r}: the vocabulary size must be at least 257, as in bpe:4096")
    return args


def default_name(args):
    """The name of a dataset that has none: tinystories, nursery-bpe2048 for nursery and bpe:2048, my_texts for the
    folder "My texts/", wikitext-en for --config en.
    """
    path = Path(args.source)
    name = path.stem if path.suffix.lower() in sources.FORMATS else path.resolve().name
    if sources.is_pipe(args.source):
        name = "stdin"
    if args.config:
        name += f"-{args.config}"
    if args.tokenizer != "gpt2":
        name += f"-{Path(args.tokenizer).name.replace(':', '')}"
    return re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name).lower()).strip("_.-")


def train_tokenizer(corpus, vocab_size, characters):
    """Train a vocabulary on about SAMPLE_CHARACTERS of training text, sampled evenly from all `characters`."""
    step = math.ceil(characters / SAMPLE_CHARACTERS)
    # Long stories are sampled in pieces: training takes 100 bytes of memory for each byte of a piece.
    pieces = ((split, piece[start:start + BATCH_CHARACTERS])
              for split, piece, _ in corpus.progress(f"sampling for bpe:{vocab_size}")
              for start in range(0, len(piece), BATCH_CHARACTERS))
    sample = (piece for split, piece in itertools.islice(pieces, 0, None, step) if split == "train")
    return Tokenizer.train(sample, vocab_size, show_progress=sys.stderr.isatty())


def write_dataset(folder, corpus, tokenizer, findings):
    """Write the token files, the tokenizer and meta.json to a folder; return the content of meta.json."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    sizes, hashes = ({split: new() for split in ("train", "validation")} for new in (Counter, hashlib.sha256))
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        for split, tokens, counts in encode_batches(batch_stories(corpus), tokenizer, dtype):
            (train if split == "train" else validation).write(tokens)
            hashes[split].update(tokens)
            sizes[split].update(counts)
    meta = {"source": corpus.source, "tokenizer": tokenizer.save(folder), "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text, "dtype": dtype,
            "splits": {split: {**sizes[split], "sha256": hashes[split].hexdigest()} for split in sizes}, **findings}
    (folder / "meta.json").write_text(json.dumps(with_checksum(meta), indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())  # the data must be on disk before the folder is renamed
    return meta


def batch_stories(corpus):
    """Group a corpus into (split, list of (piece, ends)) of about BATCH_CHARACTERS, in order within a split."""
    batches, characters = {}, Counter()
    for split, piece, ends in corpus.progress("encoding"):
        batches.setdefault(split, []).append((piece, ends))
        characters[split] += len(piece)
        if characters[split] >= BATCH_CHARACTERS:
            yield split, batches.pop(split)
            characters[split] = 0
    yield from batches.items()


def encode_batches(batches, tokenizer, dtype):
    """Encode batches on all cores; yield (split, tokens, sizes for meta.json) of each, in the given order."""
    local, pending = threading.local(), deque()  # threads are enough, because tiktoken releases the GIL

    def encode(split, batch):
        if not hasattr(local, "tokenizer"):  # threads that share one wait for its regular expressions
            local.tokenizer = copy.deepcopy(tokenizer)
        pieces, ends = zip(*batch)
        tokens = local.tokenizer.encode_stories(pieces, ends).astype(np.dtype(dtype).newbyteorder("<"))
        size = sum(len(piece.encode()) for piece in pieces)
        return split, tokens, {"stories": sum(ends), "tokens": len(tokens), "bytes": size}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches:
            pending.append(pool.submit(encode, *batch))
            if len(pending) > 2 * os.cpu_count():  # enough to keep every core busy; more would only use memory
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def print_table(folder, meta):
    """Print the size of each split: stories, tokens, bytes of text, bytes per token, and the token file."""
    splits, duplicates = meta["splits"], meta["duplicates"]
    print(f"{folder}: {meta['tokenizer']['name']}, {meta['vocab_size']:,} tokens in the vocabulary, "
          f"{meta['empty_stories_dropped']:,} empty stories dropped, validation split: {meta['validation_split']}")
    if "cleaned" in meta:
        print(f"cleaned: {meta['cleaned']['stories_changed']:,} stories changed, "
              f"{meta['cleaned']['fragments_dropped']:,} fragments dropped")
    print(f"duplicates: {duplicates['within_train']:,} training stories repeat an earlier one, "
          f"{duplicates['validation_in_train']:,} validation stories are also in training; "
          f"dropped by --drop_duplicates: {duplicates['dropped']:,}")
    print(f"{'split':12}{'stories':>12}{'tokens':>15}{'bytes':>16}{'bytes/token':>13}{'file':>12}")
    for split, sizes in splits.items():
        print(f"{split:12}{sizes['stories']:12,}{sizes['tokens']:15,}{sizes['bytes']:16,}"
              f"{sizes['bytes'] / sizes['tokens']:13.2f}{(folder / f'{split}.bin').stat().st_size / 1e6:9.1f} MB")


if __name__ == "__main__":
    main()
