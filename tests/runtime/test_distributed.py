"""ranks.py and train.py on several processes: what one process does, what each does alike, how all end together."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from conftest import TINY
from faults.processes import run

WORDS = [*TINY, "--dropout=0", "--log_interval=1", "--optimizer=muon"]


def on_ranks(count, words, meanwhile=None, elsewhere="."):
    """train.main on so many processes, as torchrun would start them: what `run` says of each.

    Each leaves its weights in weights0.pt, weights1.pt, …; `meanwhile(pids)` is called while they run. All but rank 0
    are started in the folder `elsewhere`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results, pids = [], []

    def start(rank):
        def before():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.chdir(elsewhere if rank else ".")

        def main(argv):
            made, GPT = [], train.GPT
            train.GPT = lambda config: made.append(GPT(config)) or made[-1]
            train.main(argv)
            if made:
                torch.save(made[0].state_dict(), f"weights{rank}.pt")

        def then(pid):
            pids.append(pid)
            if rank + 1 < count:
                start(rank + 1)
            elif meanwhile:
                meanwhile(pids)
        results.insert(0, run(main, words, before, then))
    start(0)
    return results


def losses(out_dir):
    log = checkpoint.read_log(Path(out_dir, "log.jsonl"))
    return [r["loss"] for r in log if r["kind"] == "step"] + [r["val_loss"] for r in log if r["kind"] == "eval"]


def wait_for_steps(out_dir, count):
    log = Path(out_dir, "log.jsonl")
    while not log.exists() or len(log.read_bytes().splitlines()) <= count:
        time.sleep(0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_do_what_one_process_does_and_hold_the_same_weights(with_data, large_eps, optimizer):
    words = [*WORDS, f"--optimizer={optimizer}"]
    train.main([*words, "--out_dir=out/one"])
    (code, out, err), other = on_ranks(2, [*words, "--out_dir=out/two"])
    assert code == other[0] == 0 and "4 sequences at a time on each of 2 processes" in out, err
    assert other[1] == ""  # rank 0 speaks for all
    assert losses("out/one") == pytest.approx(losses("out/two"), rel=1e-3)
    if optimizer == "adamw":  # Muon orthogonalises in bfloat16, which turns rounding noise into other weights
        a, b = (checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("one", "two"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    a, b = torch.load("weights0.pt"), torch.load("weights1.pt")
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) > 10


def test_a_run_goes_on_with_more_ranks_and_with_fewer(with_data, large_eps, capsys):
    ends = ["--lr_decay_iters=24", "--max_iters=10"]
    train.main([*WORDS, "--out_dir=out/one"])
    train.main([*WORDS, *ends, "--out_dir=out/up"])
    (code, out, _), _ = on_ranks(2, ["--resume", "--out_dir=out/up", "--max_iters=24"])
    assert code == 0 and "changed: 2 processes share the run, were 1" in out
    on_ranks(2, [*WORDS, *ends, "--out_dir=out/down"])
    train.main(["--resume", "--out_dir=out/down", "--max_iters=24"])
    assert "changed: 1 processes share the run, were 2" in capsys.readouterr().out
    whole = losses("out/one")
    for name in ("up", "down"):  # the evaluation at the end of the first part comes on top
        assert losses(f"out/{name}")[:12] == pytest.approx(whole[:12], rel=1e-3)
        assert losses(f"out/{name}")[-1] == pytest.approx(whole[-1], rel=1e-3)


def test_two_ranks_stopped_and_resumed_are_two_ranks_never_stopped(with_data):
    words = [*WORDS, "--dropout=0.2", "--lr_decay_iters=24"]
    on_ranks(2, [*words, "--out_dir=out/whole"])
    on_ranks(2, [*words, "--out_dir=out/parts", "--max_iters=10"])
    on_ranks(2, ["--resume", "--out_dir=out/parts", "--max_iters=24"])
    a, b = (checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_masks_differ_from_rank_to_rank_and_from_update_to_update():
    seeds = {train.dropout_seed(1337, update, rank) for update in range(50) for rank in range(8)}
    assert len(seeds) == 400 and train.dropout_seed(1337, 3, 1) == train.dropout_seed(1337, 3, 1) in seeds


def test_a_number_of_ranks_that_does_not_divide_the_update_is_refused_once(with_data):
    results = on_ranks(3, [*WORDS, "--out_dir=out/x"])
    assert [code for code, _, _ in results] == [1, 1, 1] and not Path("out").exists()
    assert results[0][2] == ("error: 3 processes cannot share an update's 8 sequences evenly: start 1, 2, 4, 8 of "
                             "them\n")
    assert not any("cannot share" in err or "Traceback" in err for _, _, err in results[1:])


def test_what_is_wrong_for_all_is_told_by_rank_0(with_data):
    (code, _, err), other = on_ranks(2, [*WORDS, "--out_dir=out/x", "--dataset=none"])
    assert code == other[0] == 1 and "no data in data/none" in err
    assert "no data" not in other[2] and "Traceback" not in other[2]


def test_the_run_folder_is_rank_0s_alone_and_the_data_must_be_the_same(with_data, nursery_data):
    import prepare
    Path("machine2").mkdir()
    Path("machine2/data").symlink_to(nursery_data / "data")
    results = on_ranks(2, [*WORDS, "--out_dir=out/x", "--max_iters=8", "--lr_decay_iters=24"], elsewhere="machine2")
    assert [code for code, _, _ in results] == [0, 0], results
    results = on_ranks(2, ["--resume", "--out_dir=out/x", "--max_iters=16"], elsewhere="machine2")
    assert [code for code, _, _ in results] == [0, 0] and not Path("machine2/out").exists()
    Path("machine3").mkdir()
    os.chdir("machine3")
    prepare.main(["nursery", "--tokenizer", "bpe:300", "--max_stories", "70", "--validation_fraction", "0.1"])
    os.chdir("..")
    results = on_ranks(2, [*WORDS, "--out_dir=out/y"], elsewhere="machine3")
    assert "data/nursery-bpe300 is not the data that rank 0 has" in results[1][2] and results[0][0] == 1


def test_only_rank_0_measures(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (code, out, _), other = on_ranks(2, ["--eval_only", "--out_dir=out/tiny"])
    assert code == 0 and "bits_per_byte" in out and other[0] == 0 and other[1] == ""


def test_a_signal_to_one_rank_stops_all_after_the_same_update(with_data):
    def stop(pids):
        wait_for_steps("out/x", 5)
        os.kill(pids[1], signal.SIGTERM)

    words = [*WORDS, "--out_dir=out/x", "--max_iters=100000", "--eval_interval=100000"]
    (code, out, err), other = on_ranks(2, words, stop)
    assert code == other[0] == 0 and "stopped after update" in out and "Traceback" not in err
    a, b = torch.load("weights0.pt"), torch.load("weights1.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert checkpoint.load("out/x/last.pt")["update"] > 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_others_down(with_data, rank):
    def kill(pids):
        wait_for_steps("out/x", 5)
        os.kill(pids[rank], signal.SIGKILL)

    results = on_ranks(2, [*WORDS, "--out_dir=out/x", "--max_iters=100000", "--eval_interval=100000"], kill)
    code, _, err = results[1 - rank]
    assert results[rank][0] == -signal.SIGKILL and code == 1
    assert "the run's other processes cannot be reached ("  in err and "Traceback" not in err
    assert ("(rank 1 on " in err) == (rank == 0)
    on_ranks(2, ["--resume", "--out_dir=out/x", "--max_iters=40"])
    assert checkpoint.load("out/x/last.pt")["update"] == 20
