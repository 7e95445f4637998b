"""Reading a dataset: windows, the sampling order, evaluation windows, and errors for damaged files."""

import hashlib
import json

import numpy as np
import pytest

from storygpt.corpus.dataset import (Dataset, Split, TrainingOrder, evaluation_windows, prepare_command, read_meta,
                                     with_checksum)
from storygpt.settings import Config
from storygpt.system.errors import UserError


def write_dataset(folder, n, dtype="uint16"):
    """Write a dataset of n tokens in which token i is i, so that a window's first token is its start position."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(n, dtype=dtype).tobytes()
    for split in ("train", "validation"):
        (folder / f"{split}.bin").write_bytes(tokens)
    sizes = {"tokens": n, "bytes": 4 * n, "sha256": hashlib.sha256(tokens).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(with_checksum(
        {"vocab_size": n, "dtype": dtype, "splits": {"train": sizes, "validation": sizes}})))
    return folder


@pytest.fixture
def split(tmp_path):
    """A split of 1,000 tokens in windows of 16."""
    return Split(write_dataset(tmp_path / "x", 1000), "train", 16)


# ---- windows and their order ----


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_targets_are_the_inputs_shifted_by_one(tmp_path, dtype):
    x, y = Split(write_dataset(tmp_path / "x", 100, dtype), "train", 16).windows([0, 5])
    assert x.tolist() == [list(range(16)), list(range(5, 21))] and (y == x + 1).all()
    assert x.dtype == y.dtype == np.int64


def test_an_epoch_visits_every_window_once_in_a_new_order_from_a_new_offset(split):
    order = TrainingOrder(split, seed=3)
    n = order.windows_per_epoch
    assert n == (1000 - 16) // 16
    epochs = [order.sequences(e * n, n)[0][:, 0] for e in range(6)]  # start positions
    for starts in epochs:
        offset = starts.min()
        assert 0 <= offset < 16
        assert sorted(starts) == [offset + 16 * i for i in range(n)]
        assert starts.max() + 16 < 1000  # the last target is in the file
    assert len({starts.min() for starts in epochs}) > 1
    assert len({tuple(starts - starts.min()) for starts in epochs}) == 6


def test_sequences_are_a_function_of_seed_and_index(split):
    all_at_once = TrainingOrder(split, seed=3).sequences(0, 150)[0]  # two epochs and part of a third
    order = TrainingOrder(split, seed=3)
    for first in (140, 0, 60, 55, 120):  # in any order, also across the end of an epoch
        assert (order.sequences(first, 10)[0] == all_at_once[first:first + 10]).all()
    assert (TrainingOrder(split, seed=4).sequences(0, 150)[0] != all_at_once).any()


def test_evaluation_windows_are_fixed_and_evenly_spaced(split):
    starts = evaluation_windows(split, 10)
    assert (starts == evaluation_windows(split, 10)).all()
    assert len(starts) == 10 == len(set(starts)) and starts[0] == 0 and starts[-1] > 800
    every = list(range(0, 62 * 16, 16))
    assert evaluation_windows(split).tolist() == evaluation_windows(split, 10**6).tolist() == every


def test_a_dataset_has_both_splits_the_order_and_the_evaluation_windows(here):
    write_dataset(here / "data/x", 1000)
    data = Dataset(Config(dataset="x", block_size=16, batch_size=4, eval_iters=3, seed=3))
    assert (data.train.path.name, data.validation.path.name) == ("train.bin", "validation.bin")
    assert data.vocab_size == 1000 and data.train.block_size == data.validation.block_size == 16
    assert data.sha256 == {split: hashlib.sha256((here / f"data/x/{split}.bin").read_bytes()).hexdigest()
                           for split in ("train", "validation")}
    assert data.train.bytes_per_token == 4 and data.tokens_per_epoch == 61 * 16
    assert list(data.eval_windows) == [data.train, data.validation]
    assert all(starts.tolist() == evaluation_windows(data.train, 12).tolist() for starts in data.eval_windows.values())
    assert (data.order.sequences(0, 70)[0] == TrainingOrder(data.train, seed=3).sequences(0, 70)[0]).all()


# ---- errors ----


def test_a_missing_dataset_is_reported_with_the_command_that_creates_it(here):
    with pytest.raises(UserError, match="no data in data/tinystories-bpe4096: create it with  python prepare.py --tok"):
        Dataset(Config(dataset="tinystories-bpe4096"))
    assert prepare_command("tinystories") == "python prepare.py"
    assert prepare_command("nursery-bpe1024") == "python prepare.py nursery --tokenizer bpe:1024"
    assert prepare_command("mine-bpe300") == "python prepare.py SOURCE --name mine-bpe300 --tokenizer bpe:300"
    assert prepare_command("my data") == "python prepare.py SOURCE --name my_data"


def test_a_split_shorter_than_its_windows_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "x", 31)
    with pytest.raises(UserError, match="31 tokens"):
        TrainingOrder(Split(folder, "train", 16), seed=0)
    assert TrainingOrder(Split(folder, "train", 15), seed=0).windows_per_epoch == 1
    advice = "use more text{} or a smaller block_size"
    for split, words in (("train", ""), ("validation", ", a larger --validation_fraction of prepare.py")):
        with pytest.raises(UserError, match=f"block_size = 31 needs at least 32; {advice.format(words)}"):
            evaluation_windows(Split(folder, split, 31))
    assert len(evaluation_windows(Split(folder, "validation", 30))) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "odd", "flipped"])
def test_a_damaged_token_file_is_refused_by_name(tmp_path, damage):
    path = write_dataset(tmp_path / "x", 100) / "train.bin"
    data = bytearray(path.read_bytes()[:{"empty": 0, "odd": 99}.get(damage)])
    data[100:101] = bytes(byte ^ 1 for byte in data[100:101])  # still a token of the vocabulary
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="train.bin is missing or damaged.*--force"):
        Split(path.parent, "train", 16)


def test_a_damaged_meta_json_is_refused_by_name_unless_the_damage_has_no_effect(tmp_path):
    path = write_dataset(tmp_path / "x", 100) / "meta.json"
    original = path.read_bytes()
    damaged = [b"", b"[]", b'{"splits": 3}', b"\xff"]
    for bit in range(0, 8 * len(original), 29):
        damaged.append(bytearray(original))
        damaged[-1][bit // 8] ^= 1 << bit % 8
    for data in damaged:
        path.write_bytes(data)
        try:
            assert read_meta(tmp_path / "x") == json.loads(original)  # for example, a space has become a tab
        except UserError as error:
            assert "meta.json is missing, damaged or from" in str(error)
