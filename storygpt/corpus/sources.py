"""Where texts come from: local files and folders, the Hugging Face hub, a pipe, or the synthetic nursery corpus.

`open_source` returns the splits of a source. A split is a function that returns an iterator over its texts from the
start. A text is an iterable of its parts in order, so that no file has to fit into memory. docs/training.md has the
rules: which files of a folder are read, and how their names tell the split.
"""

import atexit
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from storygpt.corpus import nursery
from storygpt.system.errors import UserError
from storygpt.system.files import open_text

HUB_DATASET = "roneneldan/TinyStories"
NURSERY_STORIES = 20_000  # used if --max_stories is not set, because the grammar generates without end
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
PART_CHARACTERS = 1 << 18  # read from a text file at a time; larger parts are slower
# Words in names that tell the split. The split test is left out.
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test",
               "evaluation": "test"}
# Names of files that are about the texts of a folder.
DOCUMENTS = {"readme", "license", "licence", "copying", "notice", "changelog", "citation", "requirements"}


def open_source(source, text_column="text", config=None, max_stories=None, seed=0):
    """Open a source: a dict, "train" and perhaps "validation" → function that iterates over the texts of the split.

    `config`: one of the configurations of a folder or a dataset on the hub. `max_stories` and `seed`: of nursery.
    Raises UserError if the source does not exist or cannot be read.
    """
    path = Path(os.path.expanduser(source))
    is_saved = any(all((path / f"{name}.json").exists() for name in names)  # by save_to_disk of `datasets`
                   for names in (["dataset_dict"], ["dataset_info", "state"]))
    if config and (source == "nursery" or is_pipe(source) or path.is_file() or is_saved):
        raise UserError(f"{source} has no configurations: leave out --config")
    if source == "nursery":
        return {"train": lambda: ((story,) for story in nursery.stories(max_stories or NURSERY_STORIES, seed))}
    if is_pipe(source):
        splits = {"train": [copy_of_pipe(source)]}
    elif is_saved:
        splits = load_saved_dataset(path)
    elif path.is_dir():
        splits = split_files(path, find_files(path, config))
    elif path.is_file() and path.suffix.lower() not in (*FORMATS, ""):
        raise UserError(f"{path}: unsupported file type, use one of {', '.join(FORMATS)}, or a pipe as in  "
                        "zcat texts.gz | python prepare.py -")
    elif path.is_file():
        splits = {"train": [path]}
    else:
        splits = load_from_hub(source, config)
    if "train" not in splits:
        raise UserError(f"{source} has no split 'train', only {', '.join(splits)}")
    return {split: partial(read_split, splits[split], text_column, source)
            for split in ("train", "validation") if split in splits}


def is_pipe(source):
    """Whether a source is standard input (-) or another pipe, as <(zcat a.gz) is in a shell."""
    return source in ("-", "/dev/stdin") or Path(source).is_fifo()


def copy_of_pipe(source):
    """The path of a copy of the text that a pipe delivers, until this process ends: a source is read several times."""
    folder = tempfile.mkdtemp(prefix="storygpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "stdin")
    try:
        with open(path, "wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer if source in ("-", "/dev/stdin") else open(source, "rb"), copy)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {folder} ({error.strerror}): set TMPDIR to a folder with more space"
                        ) from error
    return path


# ---- the files of a folder ----


def find_files(folder, config):
    """The files of a folder: path → split, or None if no name tells it. `config`: those of one configuration.

    Raises UserError if there are several configurations and `config` is none of them.
    """
    if files := listed_files(folder, config):
        return files
    files = {path: split_of(path.relative_to(folder)) for path in walk(folder)}
    configurations = configuration_folders(folder, files)
    if config is None and not configurations:
        return files
    if not configurations:
        raise UserError(f"{folder} has no configurations: leave out --config")
    if config not in configurations:
        raise UserError(f"{folder}: choose a configuration with --config: {', '.join(configurations)}")
    return configurations[config]


def walk(folder):
    """The paths of all files in a folder and its sub-folders, links to folders included, sorted; none that is hidden.

    Raises UserError for a link to a folder that contains the link, OSError for a folder that cannot be read.
    """
    def fail(error):
        raise error

    files, tops, seen = [], [str(folder)], {}  # seen: real path of a folder → path where it was found first
    for top in tops:  # the links are appended: what is found without them counts first
        for root, folders, names in os.walk(top, onerror=fail):
            first = seen.setdefault(os.path.realpath(root), root)
            if first != root and Path(root).is_relative_to(first):
                raise UserError(f"{root} is {first} again: remove the link that leads there")
            folders[:] = sorted(name for name in folders if not name.startswith(".") and first == root)
            tops += filter(os.path.islink, (os.path.join(root, name) for name in folders))
            files += [Path(root, name) for name in names if not name.startswith(".") and first == root]
    return sorted(files)


def split_of(path):
    """The split that a path names (train, validation, test), or None.

    The whole name of the file counts first, then that of a folder; then the last or first word of a name without
    spaces, because one with spaces is a title. Numbers do not count.
    """
    *folders, name = path.with_suffix("").parts
    names = {name: re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name))
             for name in (name, *reversed(folders))}
    candidates = [words[0] for words in names.values() if len(words) == 1]
    candidates += [word for name, words in names.items() if " " not in name for word in (*words[-1:], *words[:1])]
    return next((SPLIT_WORDS[word.lower()] for word in candidates if word.lower() in SPLIT_WORDS), None)


def listed_files(folder, config):
    """The files of a configuration (None: the default) that the README.md of a dataset lists, as the hub defines it:
    path → split; or {} if it lists none.
    """
    if not (folder / "README.md").is_file():
        return {}
    import yaml  # not at the top, as the libraries below: only some sources need them
    from huggingface_hub import metadata_load

    try:
        configurations = (metadata_load(folder / "README.md") or {}).get("configs")
    except (ValueError, yaml.YAMLError):  # it describes something else
        return {}
    if not isinstance(configurations, list):
        return {}
    builder = call_datasets("load_dataset_builder", str(folder), config, folder / "README.md")
    return {Path(folder, os.path.relpath(path, folder)): split_of(Path(str(split))) or str(split)
            for split, paths in builder.config.data_files.items() for path in paths}


def configuration_folders(folder, files):
    """If several sub-folders contain a training split, as en/train.jsonl and fr/train.jsonl: their name → files, as of
    `find_files`; and "all", every file.
    """
    parts = {}
    for path, split in files.items():
        name, *rest = path.relative_to(folder).parts
        if rest and name.lower() not in SPLIT_WORDS:
            parts.setdefault(name, {})[path] = split
    parts = {name: part for name, part in parts.items()
             if any(split_of(path.relative_to(folder / name)) == "train" for path in part)}
    return parts | {"all": files} if len(parts) > 1 else {}


def split_files(folder, files):
    """The files of a folder that are read, split → paths; what is left out is said in one line on stderr.

    `files`: as of `find_files`. Only files of one format are read: .txt, or else the one with the most bytes. If the
    folder is laid out as on the hub, data/train-00000-of-00001.parquet, only those in data/ are read.
    """
    texts = {path: split or "train" for path, split in files.items()
             if path.suffix.lower() in FORMATS and path.stem.lower() not in DOCUMENTS}
    names = [path.relative_to(folder).as_posix() for path in texts]
    if any(re.match(r"data/\w+-\d{5}-of-\d{5}", name) for name in names):
        texts = {path: split for (path, split), name in zip(texts.items(), names) if name.startswith("data/")}
    sizes = Counter()
    for path in texts:
        sizes[path.suffix.lower()] += 1 + path.stat().st_size
    if not sizes:
        raise UserError(f"{folder} has no {', '.join(FORMATS)} files")
    suffix = ".txt" if ".txt" in sizes else max(sizes, key=sizes.get)
    splits, others = {}, Counter()
    for path in walk(folder):
        if path in texts and path.suffix.lower() == suffix:
            splits.setdefault(texts[path], []).append(path)
        else:
            is_document = path.suffix.lower() in FORMATS and path.stem.lower() in DOCUMENTS
            others[path.name if is_document else path.suffix or "without an ending"] += 1
    print(f"{folder}: {suffix} files: " + ", ".join(f"{len(paths)} {split}" for split, paths in splits.items())
          + " (left out: test)" * ("test" in splits) + "; skipped: " * bool(others)
          + ", ".join(f"{count} {name}" for name, count in sorted(others.items())), file=sys.stderr)
    return splits


# ---- the texts of a file ----


def read_split(split, column, source):
    """Iterate over the texts of a split: a list of paths, or a `datasets` dataset."""
    if not isinstance(split, list):
        yield from texts_of_values(read_dataset(split, column, source), source)
        return
    for path in split:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from texts_of_values(read_parquet(path, column), path)
        elif suffix in (".json", ".jsonl") or (suffix == "" and is_json(path)):
            yield from texts_of_values(read_json(path, column), path)
        else:
            yield read_text(path)


def texts_of_values(values, where):
    """A text of one part for each value of a column; a missing value is an empty text. UserError: it is not text.

    As in a text file, a line ends with a newline, and there are no unpaired surrogates, which JSON allows.
    """
    for i, value in enumerate(values, 1):
        if not isinstance(value, str | None):
            raise UserError(f"{where}: value {i} is {type(value).__name__}, not text: choose another column with "
                            "--text_column")
        text = (value or "").replace("\r\n", "\n").replace("\r", "\n")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield (text,)


def read_text(path):
    """The parts of a text file."""
    with open_text(path) as file:
        while part := file.read(PART_CHARACTERS):
            yield part


def is_json(path):
    """Whether the text of a file begins as JSON with objects: for a pipe, whose format has no name."""
    with open_text(path) as file:
        return re.match(r'\s*\[?\s*\{\s*"', file.read(1000)) is not None


def read_json(path, column):
    """The values of a column of a file with a JSON object in each line, or with a list of objects."""
    i, found = 0, False
    with open_text(path) as file:
        is_list = file.read(PART_CHARACTERS).lstrip().startswith("[")
        file.seek(0)
        try:
            for i, row in enumerate(json.load(file, parse_int=float) if is_list else file, 1):  # any number of digits
                if not is_list:
                    if row.isspace():
                        continue
                    row = json.loads(row, parse_int=float)
                where = f"{path}, {'item' if is_list else 'line'} {i}"
                if not isinstance(row, dict):
                    raise UserError(f"{where} is not a JSON object such as {{\"{column}\": \"…\"}}")
                if not (found := found or column in row):  # in a later row, the value may be missing
                    raise missing_column(where, column, row)
                yield row.get(column)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {max(i, error.lineno)} is not valid JSON ({error.msg}): a file must have an "
                            "object in each line, or be a list of objects; it may also be damaged") from error


def read_parquet(path, column):
    """The values of a column of a Parquet file; other columns are not read."""
    import pyarrow.parquet

    with reading(path):
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise missing_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(1000, columns=[column]):
            yield from batch.column(0).to_pylist()


def missing_column(where, column, names):
    """The UserError for a column that does not exist."""
    return UserError(f"{where} has no column '{column}': choose one of {', '.join(names)} with --text_column")


# ---- Hugging Face: the hub, and what `datasets` has saved ----


def load_saved_dataset(folder):
    """The splits of a folder that `save_to_disk` of `datasets` wrote, as of `load_from_hub`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever is missing or damaged
        raise UserError(f"cannot read {folder}, which `save_to_disk` wrote: {error or type(error).__name__}") from error
    return by_split(saved if isinstance(saved, dict) else {"train": saved}, folder)


def load_from_hub(source, config):
    """The splits of a dataset on the hub, split → `datasets` dataset. Raises UserError if there is no such dataset."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if Path(source).suffix.lower() in FORMATS:
            raise HFValidationError
        validate_repo_id(source)
    except HFValidationError as error:
        raise UserError(f"{source} does not exist: give a file, a folder, a dataset on the Hugging Face hub, or nursery"
                        ) from error
    print(f"loading {source} from the Hugging Face hub", file=sys.stderr)
    try:
        use_only_the_cache_if_offline(source)
        return by_split(call_datasets("load_dataset", source, config, source), source)
    except OSError as error:
        if not error.errno:  # an answer of the hub
            raise
        raise UserError(f"cannot use the cache of Hugging Face's libraries, {error.filename} ({error.strerror}): set "
                        "HF_HOME to a folder that can be written") from error


def use_only_the_cache_if_offline(source):
    """Switch the hub's library to its offline mode if the hub does not answer: it would retry for 25 seconds."""
    from huggingface_hub import HfApi, constants

    try:
        HfApi().dataset_info(source, timeout=10)  # seconds; does not retry
    except Exception as error:
        module = type(error).__module__
        if module.startswith(("requests", "httpx")):  # depends on the version of the hub's library
            constants.HF_HUB_OFFLINE = True  # `datasets` reads it when it is imported
        elif not module.startswith("huggingface_hub"):  # an answer of the hub, or offline: load_dataset will report it
            raise


def call_datasets(function, source, config, where):
    """Call a function of `datasets` for a configuration of a source. Raises UserError, or OSError for its cache.

    `where`: what its errors are about.
    """
    import datasets  # it takes seconds

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their warnings only precede an error
    try:
        with reading(where):
            return getattr(datasets, function)(source, config)
    except (RuntimeError, TypeError, ValueError) as error:
        message = f"cannot read {where}: {' '.join(str(error).split())[:300]}"
        if names := re.search(r"[Aa]vailable.*?: \[(.*?)\]", str(error)):
            message = f"{where}: choose a configuration with --config: {names[1].replace(chr(39), '')}"
        raise UserError(message) from error


def by_split(datasets, source):
    """A dict of datasets by the splits that their names tell; what is left out is said in one line on stderr."""
    splits = {}
    for name in sorted(datasets, key=lambda name: name not in SPLIT_WORDS.values()):  # validation before dev
        splits.setdefault(split_of(Path(name)) or name, name)
    used = [splits[split] for split in ("train", "validation") if split in splits]
    if skipped := ", ".join(name for name in datasets if name not in used):
        print(f"{source}: splits {', '.join(used)}; skipped: {skipped}", file=sys.stderr)
    return {split: datasets[name] for split, name in splits.items()}


def read_dataset(dataset, column, source):
    """The values of a column of a `datasets` dataset."""
    if column not in dataset.column_names:
        raise missing_column(source, column, dataset.column_names)
    with reading(source):
        for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
            yield from table[column].to_pylist()


@contextmanager
def reading(source):
    """Convert the errors of the libraries that read a source to UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{source} has text that is not UTF-8 ({error.reason}): convert it") from error
    except ConnectionError as error:
        raise UserError(f"cannot reach {source} on the Hugging Face hub: check the name and the network, or use local "
                        "text or synthetic stories (python prepare.py nursery --tokenizer bpe:2048)") from error
    except Exception as error:
        of_parquet = isinstance(error, OSError) and error.errno is None
        if not of_parquet and not type(error).__module__.startswith(("datasets", "huggingface_hub", "pyarrow")):
            raise
        raise UserError(f"cannot read {source}: {error or type(error).__name__} (it may be damaged)") from error
