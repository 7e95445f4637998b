"""Communication between ranks, and train.py on several processes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from conftest import TINY, load_last, records
from faults.processes import run_ranks, wait_for_steps
from faults.soak import equal
from storygpt.corpus.dataset import with_checksum
from storygpt.system.distributed import (all_reduce_sum, broadcast_object, cleanup_distributed, distributed_errors,
                                         init_distributed, rank_0_first, sync_stop_and_time)
from storygpt.system.errors import UserError

# Four optimizer steps, with a checkpoint after the second.
FLAGS = [*TINY, "--dropout=0", "--log_interval=1", "--max_iters=8", "--lr_decay_iters=8", "--eval_interval=4"]


def train_on_ranks(world_size, flags, **options):
    """`run_ranks` of train.main. Each rank saves its final weights in weights0.pt, weights1.pt, …"""
    def main(argv):
        models, make_model = [], train.make_model
        train.make_model = lambda config: models.append(make_model(config)) or models[-1]
        train.main(argv)
        if models:
            torch.save(models[-1].state_dict(), f"weights{os.environ['RANK']}.pt")
    return run_ranks(world_size, main, flags, **options)


def losses(out_dir):
    return [r["loss"] for r in records(out_dir, "step")] + [r["val_loss"] for r in records(out_dir, "eval")]


def last_weights(out_dir):
    return load_last(out_dir)["model"]


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
WINDOWS_GLOO = r"[C:\pytorch\third_party\gloo\gloo\transport\uv\unbound_buffer.cc:67] "


@pytest.mark.parametrize("error, reason", [
    (RuntimeError(GLOO + "Connection closed by peer [::1]:9. This is …"), "Connection closed by peer [::1]:9"),
    (RuntimeError(WINDOWS_GLOO + "Timed out waiting 5000ms for recv"), "Timed out waiting 5000ms for recv"),
    (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}no error"), "Gloo connectFullMesh failed with no error"),
    (dist.DistNetworkError("The client socket has timed out\nframe #0"), "The client socket has timed out"),
    (dist.DistBackendError("NCCL error in: x.cpp:3, unhandled cuda error (run with NCCL_DEBUG=INFO)"), None),
    (ValueError("math domain error"), None),
    (ConnectionResetError(104, "Connection reset by peer"), None),  # an OSError: of something else
    (UserError(GLOO), None),
], ids=range(8))
def test_only_errors_of_the_communication_are_translated(error, reason):
    with pytest.raises(UserError if reason else type(error)) as raised, distributed_errors():
        raise error
    if reason:
        assert raised.value.__cause__ is error
        assert str(raised.value).startswith(f"the other processes of the run cannot be reached ({reason}): see")
    else:
        assert raised.value is error


def test_without_torchrun_there_is_one_rank_and_torchruns_environment_must_be_complete(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert init_distributed() == (0, 1)
    assert broadcast_object("x") == "x" and sync_stop_and_time(True, 2.5) == (True, 2.5)
    assert all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
    with rank_0_first():
        cleanup_distributed()
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the other processes of the run cannot be reached"):
        init_distributed()


def test_collectives(here):
    """What each rank gets is written to a file for the assertions below."""
    def main(argv):
        rank, world_size = init_distributed()
        torch.save([world_size, broadcast_object(f"of rank {rank}"), all_reduce_sum(torch.tensor(rank + 1)).item(),
                    sync_stop_and_time(False, 5.0 + rank), sync_stop_and_time(rank == 1, 0.0)[0]], f"{rank}.pt")
        cleanup_distributed()

    results = run_ranks(2, main, [])
    assert [code for code, _, _ in results] == [0, 0], results
    assert torch.load("0.pt") == torch.load("1.pt") == [2, "of rank 0", 3, (False, 5.0), True]


@pytest.fixture
def machine2(with_data, nursery_data):
    """Another working folder, with a copy of the data."""
    shutil.copytree(nursery_data / "data", with_data / "machine2/data")
    return with_data / "machine2"


def test_two_ranks_equal_one_process_and_resume_each_others_runs(with_data, machine2, large_eps, capsys):
    """Rank 1 needs no run folder, and does not hash the data, as another process of its machine does."""
    with open(machine2 / "data/nursery-bpe300/validation.bin", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")  # of a token that is in no evaluation window
    options = {"other_folder": machine2}
    train.main([*FLAGS, "--out_dir=out/one"])
    (code, out, err), other = train_on_ranks(2, [*FLAGS, "--out_dir=out/two"], **options)
    assert code == other[0] == 0 and "in micro-batches of 4 sequences on 2 processes" in out, err
    assert other[1] == "" and not Path("machine2/out").exists()  # only rank 0 prints and writes

    for name, source in {"more": "one", "fewer": "two", "same": "two"}.items():
        shutil.copytree(f"out/{source}", f"out/{name}")
        os.replace(f"out/{name}/last.prev.pt", f"out/{name}/last.pt")  # of the second step
    capsys.readouterr()
    train.main(["--resume", "--out_dir=out/fewer"])
    assert "changed: the world size is now 1, was 2" in capsys.readouterr().out
    for name, message in {"more": "changed: the world size is now 2, was 1", "same": "after step 2 of 4"}.items():
        (code, out, err), _ = train_on_ranks(2, ["--resume", f"--out_dir=out/{name}"], **options)
        assert code == 0 and message in out, err
    assert equal(last_weights("out/two"), last_weights("out/same"))
    for name in ("two", "more", "fewer"):
        assert losses(f"out/{name}") == pytest.approx(losses("out/one"), rel=1e-3)
        torch.testing.assert_close(last_weights(f"out/{name}"), last_weights("out/one"), rtol=1e-4, atol=1e-5)
    (code, out, _), other = train_on_ranks(2, ["--eval_only", "--out_dir=out/two"])
    assert code == 0 and "bits_per_byte" in out and other[0] == 0 and other[1] == ""


def test_all_ranks_have_the_weights_of_rank_0(with_data):
    """Rank 0 alone computes the embeddings from the text."""
    flags = [*FLAGS, "--optimizer=muon", "--architecture=modern", "--init_embeddings=cooccurrence"]
    train.main([*flags, "--out_dir=out/one"])
    results = train_on_ranks(2, [*flags, "--out_dir=out/two"])
    assert [code for code, _, _ in results] == [0, 0], results
    assert equal(torch.load("weights0.pt"), torch.load("weights1.pt"))
    assert losses("out/one") == pytest.approx(losses("out/two"), rel=1e-3)


def test_dropout_masks_differ_between_ranks_and_steps(with_data):
    def main(argv):
        seeds, forward_backward = [], train.forward_backward
        train.forward_backward = lambda *args: (seeds.append(torch.initial_seed()), forward_backward(*args))[1]
        train.main(argv)
        torch.save(seeds, f"{os.environ['RANK']}.pt")

    results = run_ranks(2, main, [*FLAGS, "--out_dir=out/x"])
    assert [code for code, *_ in results] == [0, 0], results
    seeds = [*torch.load("0.pt"), *torch.load("1.pt")]
    assert len(seeds) == len(set(seeds)) > 2


@pytest.mark.parametrize("world_size, flag, complaint", [
    (3, "--dropout=0", "3 processes cannot divide a step's 8 sequences evenly: use 2, or another batch_size"),
    (2, "--dataset=none", "no data in data/none"),
    (2, "--device=mps", "device = 'mps' is a single device")])
def test_an_error_of_all_ranks_is_printed_once(with_data, world_size, flag, complaint):
    (code, _, err), *others = train_on_ranks(world_size, [*FLAGS, "--out_dir=out/x", flag])
    assert code == 1 and f"error: {complaint}" in err and not Path("out").exists()
    for code, _, err in others:
        assert code == 1 and err.startswith("error: the other processes of the run cannot be reached (")
        assert "Traceback" not in err


def test_rank_1_needs_no_folder_of_the_run_to_start_from(machine2):
    train.main([*FLAGS, "--out_dir=out/one"])
    for code, _, err in train_on_ranks(2, [*FLAGS, "--init_from=out/one", "--out_dir=out/two"], other_folder=machine2):
        assert code == 0, err


def test_all_ranks_need_the_same_data(machine2):
    path = machine2 / "data/nursery-bpe300/meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["sha256"] = "another"
    path.write_text(json.dumps(with_checksum(meta)))
    results = train_on_ranks(2, [*FLAGS, "--out_dir=out/x"], other_folder=machine2)
    assert "data/nursery-bpe300 differs from rank 0's copy" in results[1][2] and results[0][0] == 1, results[0][2]


def send_after_three_steps(rank, number):
    """Train on two ranks without an end, and send one of them a signal; returns what `run_ranks` does."""
    def send(pids):
        wait_for_steps("out/x", 3)
        os.kill(pids[rank], number)

    return train_on_ranks(2, [*FLAGS, "--out_dir=out/x", "--max_iters=100000", "--eval_interval=100000"],
                          while_running=send)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(with_data):
    (code, out, err), other = send_after_three_steps(1, signal.SIGTERM)
    assert code == other[0] == 0 and "stopped after step" in out and "Traceback" not in err
    assert equal(torch.load("weights0.pt"), torch.load("weights1.pt")) and load_last("out/x")["step"] >= 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(with_data, rank):
    results = send_after_three_steps(rank, signal.SIGKILL)
    code, _, err = results[1 - rank]
    assert results[rank][0] == -signal.SIGKILL and code == 1
    assert "the other processes of the run cannot be reached (" in err and "Traceback" not in err
    assert ("(rank 1 on " in err) == (rank == 0)
    train_on_ranks(2, ["--resume", "--out_dir=out/x", "--max_iters=4"])
    assert load_last("out/x")["step"] == 2
