"""Communication between ranks, and train.py on several processes."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from conftest import TINY
from faults.processes import run_ranks, wait_for_steps
from model import GPT
from storygpt import checkpoint, run
from storygpt.run import read_log
from storygpt.system import distributed
from storygpt.system.distributed import (all_reduce_sum, broadcast_object, cleanup_distributed, distributed_errors,
                                         init_distributed, rank_0_first, sync_stop_and_time)
from storygpt.system.errors import UserError

FLAGS = [*TINY, "--dropout=0", "--log_interval=1", "--optimizer=muon"]


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
    log = read_log(Path(out_dir, "log.jsonl"))
    return [r["loss"] for r in log if r["kind"] == "step"] + [r["val_loss"] for r in log if r["kind"] == "eval"]


def equal(a, b):
    """Whether two state dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
WINDOWS_GLOO = r"[C:\pytorch\third_party\gloo\gloo\transport\uv\unbound_buffer.cc:67] "


@pytest.mark.parametrize("error, reason", [
    (RuntimeError(GLOO + "Connection closed by peer [::1]:9. This is …"), "Connection closed by peer [::1]:9"),
    (RuntimeError(WINDOWS_GLOO + "Timed out waiting 5000ms for recv"), "Timed out waiting 5000ms for recv"),
    (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}no error"), "Gloo connectFullMesh failed with no error"),
    (dist.DistNetworkError("The client socket has timed out\nframe #0"), "The client socket has timed out"),
    (dist.DistStoreError("wait timeout after 2000ms"), "wait timeout after 2000ms"),
    (dist.DistBackendError("NCCL error in: x.cpp:3, remote process exited or there was a network error"),
     "NCCL error in: x.cpp:3, remote process exited or there was a network error"),
    (ValueError("Error initializing torch.distributed using env:// rendezvous: environment variable MASTER_ADDR "
                "expected, but not set"), "Error initializing torch.distributed using env:// rendezvous: environment "
                                          "variable MASTER_ADDR expected, but not set"),
    (dist.DistBackendError("NCCL error in: x.cpp:3, unhandled cuda error (run with NCCL_DEBUG=INFO)"), None),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), None),
    (torch.OutOfMemoryError("CUDA out of memory."), None),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"), None),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"), None),
    (ValueError("math domain error"), None),
    (ConnectionResetError(104, "Connection reset by peer"), None),  # an OSError: of something else
    (UserError(GLOO), None),
])
def test_only_errors_of_the_communication_are_translated(error, reason):
    @distributed_errors()
    def fail():
        raise error

    with pytest.raises(type(error) if reason is None else UserError) as raised:
        fail()
    if reason is None:
        assert raised.value is error
    else:
        assert raised.value.__cause__ is error
        assert str(raised.value).startswith(f"the other processes of the run cannot be reached ({reason}): see")


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert init_distributed() == (0, 1)
    assert broadcast_object("x") == "x" and sync_stop_and_time(True, 2.5) == (True, 2.5)
    assert all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
    with rank_0_first():
        pass
    cleanup_distributed()


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


@pytest.mark.parametrize("rank, expected", [(0, ["block", "wait"]), (1, ["wait", "block"])])
def test_rank_0_first(monkeypatch, rank, expected):
    events = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: events.append("wait"))
    with rank_0_first():
        events.append("block")
    assert events == expected


def test_an_environment_without_the_address_of_rank_0_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="the other processes of the run cannot be reached"):
        init_distributed()


@pytest.mark.parametrize("optimizer, architecture", [("adamw", "gpt2"), ("muon", "modern")])
def test_two_ranks_equal_one_process_and_have_equal_weights(with_data, large_eps, optimizer, architecture):
    flags = [*FLAGS, f"--optimizer={optimizer}", f"--architecture={architecture}"]
    train.main([*flags, "--out_dir=out/one"])
    (code, out, err), other = train_on_ranks(2, [*flags, "--out_dir=out/two"])
    assert code == other[0] == 0 and "in micro-batches of 4 sequences on 2 processes" in out, err
    assert other[1] == ""  # only rank 0 prints
    assert losses("out/one") == pytest.approx(losses("out/two"), rel=1e-3)
    if optimizer == "adamw":  # Muon orthogonalizes in bfloat16, which amplifies rounding differences
        a, b = (checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("one", "two"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    weights = torch.load("weights0.pt")
    assert equal(weights, torch.load("weights1.pt")) and len(weights) > 10


@pytest.mark.parametrize("start", ["new", "resumed", "init_from"])
def test_all_ranks_start_with_the_weights_of_rank_0(with_data, monkeypatch, start):
    """Rank 1 initializes and loads other weights, as another processor or PyTorch build could."""
    original_init, original_load, load_weights = GPT.init_weights, GPT.load_state_dict, run.load_weights

    def add_rank(model):
        with torch.no_grad():
            for p in model.parameters():
                p += float(os.environ.get("RANK", 0))

    monkeypatch.setattr(GPT, "init_weights", lambda model: (original_init(model), add_rank(model)))
    if start == "init_from":
        monkeypatch.setattr(GPT, "load_state_dict", lambda model, weights: (
            original_load(model, weights), add_rank(model)))
    monkeypatch.setattr(run, "load_weights", lambda path, model, weights: (
        load_weights(path, model, weights), add_rank(model)))
    flags = {"new": [*FLAGS, "--out_dir=out/x"], "resumed": ["--resume", "--out_dir=out/first", "--max_iters=16"],
             "init_from": [*FLAGS, "--out_dir=out/x", "--init_from=out/first"]}[start]
    if start != "new":
        train.main([*FLAGS, "--out_dir=out/first", "--max_iters=8", "--lr_decay_iters=24"])
    results = train_on_ranks(2, flags)
    assert [code for code, _, _ in results] == [0, 0], results
    assert equal(torch.load("weights0.pt"), torch.load("weights1.pt"))


def test_only_one_process_a_machine_hashes_the_data(with_data, monkeypatch):
    from storygpt.corpus import dataset
    hashed, file_sha256 = [], dataset.file_sha256
    monkeypatch.setattr(dataset, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    main = train.main

    def main_and_report(argv):
        main(argv)
        Path(f"hashed{os.environ['RANK']}").write_text(" ".join(path.name for path in hashed))

    monkeypatch.setattr(train, "main", main_and_report)
    results = train_on_ranks(2, [*FLAGS, "--out_dir=out/x", "--max_iters=2", "--lr_decay_iters=24"])
    assert [code for code, _, _ in results] == [0, 0], results
    assert Path("hashed0").read_text() == "train.bin validation.bin" and Path("hashed1").read_text() == ""


def test_a_run_can_be_resumed_with_another_world_size(with_data, large_eps, capsys):
    shortened = ["--lr_decay_iters=24", "--max_iters=10"]
    train.main([*FLAGS, "--out_dir=out/whole"])
    train.main([*FLAGS, *shortened, "--out_dir=out/more"])
    (code, out, _), _ = train_on_ranks(2, ["--resume", "--out_dir=out/more", "--max_iters=24"])
    assert code == 0 and "changed: the world size is now 2, was 1" in out
    train_on_ranks(2, [*FLAGS, *shortened, "--out_dir=out/fewer"])
    train.main(["--resume", "--out_dir=out/fewer", "--max_iters=24"])
    assert "changed: the world size is now 1, was 2" in capsys.readouterr().out
    whole = losses("out/whole")
    for name in ("more", "fewer"):  # they have one evaluation more, at iteration 10
        assert losses(f"out/{name}")[:12] == pytest.approx(whole[:12], rel=1e-3)
        assert losses(f"out/{name}")[-1] == pytest.approx(whole[-1], rel=1e-3)


def test_resume_on_two_ranks_is_bit_exact(with_data):
    flags = [*FLAGS, "--dropout=0.2", "--lr_decay_iters=24"]
    train_on_ranks(2, [*flags, "--out_dir=out/whole"])
    train_on_ranks(2, [*flags, "--out_dir=out/resumed", "--max_iters=10"])
    train_on_ranks(2, ["--resume", "--out_dir=out/resumed", "--max_iters=24"])
    assert equal(*(checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("whole", "resumed")))


def test_dropout_masks_differ_between_ranks_and_steps():
    def seed_of(*integers):
        train.seed_random(*integers)
        return torch.initial_seed()

    seeds = {seed_of(1337, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400 and seed_of(1337, 3, 1) == seed_of(1337, 3, 1) in seeds


def test_a_world_size_that_does_not_divide_the_step_is_refused_once(with_data):
    results = train_on_ranks(3, [*FLAGS, "--out_dir=out/x"])
    assert [code for code, _, _ in results] == [1, 1, 1] and not Path("out").exists()
    assert results[0][2] == ("error: 3 processes cannot divide a step's 8 sequences evenly: use 2, or another "
                             "batch_size\n")
    assert all(err.startswith("error: the other processes of the run cannot be reached (") for _, _, err in results[1:])


@pytest.mark.parametrize("flag, complaint", [("--dataset=none", "no data in data/none"),
                                             ("--device=mps", "device = 'mps' is a single device")])
def test_an_error_of_all_ranks_is_printed_once(with_data, flag, complaint):
    (code, _, err), other = train_on_ranks(2, [*FLAGS, "--out_dir=out/x", flag])
    assert code == other[0] == 1 and complaint in err
    assert complaint not in other[2] and "Traceback" not in other[2]
    assert "the other processes of the run cannot be reached (" in other[2]


def test_only_rank_0_uses_the_run_folder_and_all_ranks_need_the_same_data(with_data, nursery_data):
    import prepare
    Path("machine2").mkdir()
    Path("machine2/data").symlink_to(nursery_data / "data")
    flags = [*FLAGS, "--out_dir=out/x", "--max_iters=8", "--lr_decay_iters=24"]
    results = train_on_ranks(2, flags, other_folder="machine2")
    assert [code for code, _, _ in results] == [0, 0], results
    results = train_on_ranks(2, ["--resume", "--out_dir=out/x", "--max_iters=16"], other_folder="machine2")
    assert [code for code, _, _ in results] == [0, 0] and not Path("machine2/out").exists()
    Path("machine3").mkdir()
    os.chdir("machine3")
    prepare.main(["nursery", "--tokenizer", "bpe:300", "--max_stories", "70", "--validation_fraction", "0.1"])
    os.chdir("..")
    results = train_on_ranks(2, [*FLAGS, "--out_dir=out/y"], other_folder="machine3")
    assert "data/nursery-bpe300 differs from rank 0's copy" in results[1][2] and results[0][0] == 1, results[0][2]


def test_only_rank_0_runs_eval_only(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (code, out, _), other = train_on_ranks(2, ["--eval_only", "--out_dir=out/tiny"])
    assert code == 0 and "bits_per_byte" in out and other[0] == 0 and other[1] == ""


def test_a_signal_to_one_rank_stops_all_after_the_same_step(with_data):
    def stop(pids):
        wait_for_steps("out/x", 5)
        os.kill(pids[1], signal.SIGTERM)

    flags = [*FLAGS, "--out_dir=out/x", "--max_iters=100000", "--eval_interval=100000"]
    (code, out, err), other = train_on_ranks(2, flags, while_running=stop)
    assert code == other[0] == 0 and "stopped after step" in out and "Traceback" not in err
    assert equal(torch.load("weights0.pt"), torch.load("weights1.pt"))
    assert checkpoint.load("out/x/last.pt")["step"] > 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(with_data, rank):
    def kill(pids):
        wait_for_steps("out/x", 5)
        os.kill(pids[rank], signal.SIGKILL)

    flags = [*FLAGS, "--out_dir=out/x", "--max_iters=100000", "--eval_interval=100000"]
    results = train_on_ranks(2, flags, while_running=kill)
    code, _, err = results[1 - rank]
    assert results[rank][0] == -signal.SIGKILL and code == 1
    assert "the other processes of the run cannot be reached (" in err and "Traceback" not in err
    assert ("(rank 1 on " in err) == (rank == 0)
    train_on_ranks(2, ["--resume", "--out_dir=out/x", "--max_iters=40"])
    assert checkpoint.load("out/x/last.pt")["step"] == 20
