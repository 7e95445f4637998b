"""The reading side: which windows a run sees, in which order, and what is refused."""

import hashlib
import json

import numpy as np
import pytest

from dataset import Split, TrainingOrder, evaluation_windows, prepare_command, read_meta, seal
from errors import UserError


def write(folder, n, dtype="uint16"):
    """A dataset of which token i is i: a window tells where it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        np.arange(n, dtype=dtype).tofile(folder / f"{split}.bin")
    return describe(folder, n, dtype)


def describe(folder, n, dtype="uint16"):
    """A meta.json for the token files as they are."""
    splits = {split: {"tokens": n, "bytes": 4 * n,
                      "sha256": hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()}
              for split in ("train", "validation")}
    (folder / "meta.json").write_text(json.dumps(seal(
        {"tokenizer": {}, "vocab_size": n, "end_of_text": 0, "dtype": dtype, "splits": splits})))
    return folder


@pytest.fixture
def split(tmp_path):
    return Split(write(tmp_path / "x", 1000), "train", 16)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_targets_are_the_inputs_one_on(tmp_path, dtype):
    x, y = Split(write(tmp_path / "x", 100, dtype), "train", 16).windows([0, 5])
    assert x.tolist() == [list(range(16)), list(range(5, 21))] and (y == x + 1).all()
    assert x.dtype == y.dtype == np.int64


def test_every_epoch_visits_every_window_once_in_a_new_order_from_a_new_offset(split):
    order = TrainingOrder(split, seed=3)
    n = order.windows_per_epoch
    assert n == (1000 - 16) // 16
    epochs = [order.sequences(e * n, n)[0][:, 0] for e in range(6)]  # where each window starts
    for starts in epochs:
        offset = starts.min()
        assert 0 <= offset < 16
        assert sorted(starts) == [offset + 16 * i for i in range(n)]
        assert starts.max() + 16 < 1000  # the last target is in the file
    assert len({starts.min() for starts in epochs}) > 1
    assert len({tuple(starts - starts.min()) for starts in epochs}) == 6


def test_sequences_are_a_function_of_seed_and_number_alone(split):
    whole = TrainingOrder(split, seed=3).sequences(0, 150)[0]  # over two epochs and into a third
    order = TrainingOrder(split, seed=3)
    parts = {first: order.sequences(first, 10)[0] for first in (140, 0, 60, 55, 120)}  # any cut, any order
    assert all((part == whole[first:first + 10]).all() for first, part in parts.items())
    assert (TrainingOrder(split, seed=4).sequences(0, 150)[0] != whole).any()


def test_evaluation_windows_are_the_same_each_time_and_spread_evenly(split):
    starts = evaluation_windows(split, 10)
    assert (starts == evaluation_windows(split, 10)).all()
    assert len(starts) == 10 == len(set(starts)) and starts[0] == 0 and starts[-1] > 800
    everything = evaluation_windows(split)
    assert everything.tolist() == list(range(0, 62 * 16, 16))
    assert evaluation_windows(split, 10**6).tolist() == everything.tolist()
    assert split.windows(everything)[1].max() < 1000


def test_a_split_shorter_than_its_windows_is_refused(tmp_path):
    folder = write(tmp_path / "x", 31)
    with pytest.raises(UserError, match="31 tokens"):
        TrainingOrder(Split(folder, "train", 16), seed=0)
    assert TrainingOrder(Split(folder, "train", 15), seed=0).windows_per_epoch == 1
    with pytest.raises(UserError, match="block_size = 31"):
        evaluation_windows(Split(folder, "validation", 31))
    assert len(evaluation_windows(Split(folder, "validation", 30))) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "odd", "flipped"])
def test_a_damaged_token_file_is_refused_by_name(tmp_path, damage):
    path = write(tmp_path / "x", 100) / "train.bin"
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes()[:{"empty": 0, "short": 100, "odd": 99}.get(damage)])
        if damage == "flipped":
            data[100] ^= 1  # still a token of the vocabulary
        path.write_bytes(data)
    with pytest.raises(UserError, match="train.bin.*--force"):
        Split(path.parent, "train", 16)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    path = write(tmp_path / "x", 100) / "train.bin"
    np.full(100, 100, "uint16").tofile(path)
    describe(path.parent, 100)
    with pytest.raises(UserError, match="train.bin is damaged: it has token 100, and the vocabulary has only 100"):
        Split(path.parent, "train", 16).windows([0])


def test_a_bit_that_flips_in_meta_json_is_noticed_wherever_it_is(tmp_path):
    path = write(tmp_path / "x", 100) / "meta.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read_meta(tmp_path / "x") == json.loads(whole)  # as where a space becomes a tab
        except UserError as error:
            assert "meta.json is damaged" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": 3}', "\xff", json.dumps(
    {"vocab_size": 9, "end_of_text": 0, "dtype": "foo", "splits": {"train": {}, "validation": {}}})])
def test_a_damaged_meta_json_is_refused_by_name(tmp_path, text):
    folder = write(tmp_path / "x", 100)
    (folder / "meta.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match="meta.json is damaged"):
        Split(folder, "train", 16)


def test_the_command_that_makes_a_dataset():
    assert prepare_command("tinystories") == "python prepare.py"
    assert prepare_command("tinystories-bpe4096") == "python prepare.py --tokenizer bpe:4096"
    assert prepare_command("nursery-bpe1024") == "python prepare.py nursery --tokenizer bpe:1024"
    assert prepare_command("tinystories-cl100k_base") == "python prepare.py --tokenizer cl100k_base"
    assert prepare_command("mine-bpe300") == "python prepare.py SOURCE --name mine-bpe300 --tokenizer bpe:300"
    assert prepare_command("mine") == "python prepare.py SOURCE --name mine"
    assert prepare_command("\n") == "python prepare.py SOURCE --name \n"
