"""Signals end a step, not a run: saved once, by all ranks alike, and resumed to the same end."""

import signal
import sys

import pytest

from minwurst import checkpoint
from tests.conftest import assert_bitwise_equal, flags, free_port, start

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
RESUME = {"resume_from_checkpoint": "latest"}
SHORT = {"train_data_dir": None, "train_batch_size": 1, "max_train_steps": 6}


def steps(folder):
    return [int(path.name.split("-")[1]) for path in checkpoint.list_all(folder)]


@pytest.fixture(scope="module")
def whole(warm, wuerstchen, few, tmp_path_factory):
    """The uninterrupted runs, by script."""
    folder = tmp_path_factory.mktemp("whole")
    for script in ("train.py", "lora.py"):
        words = flags(wuerstchen, folder / script, **SHORT, dataset_name=few)
        assert warm.run(script, words)[0] == 0
    return folder


CASES = {
    # what is sent when, to the whole session: exit code, checkpoints, what is said
    "SIGTERM": ([["step", 3, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "Ctrl-C": ([["step", 3, INT]], 130, [3], "SIGINT: saved and stopped"),
    "twice SIGTERM": ([["step", 3, TERM, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "both": ([["step", 3, INT, USR1, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "twice Ctrl-C": ([["step", 3, INT], ["step", 4, INT], ["save", 1, INT]], -2, [], "Once more"),
    "SIGUSR1": ([["step", 3, USR1]], 0, [3, 6], "done: "),
    "in the last step": ([["step", 6, TERM]], 143, [6], "SIGTERM: saved and stopped"),
    "while loading": ([["load", 1, TERM]], -15, [], "No GPU here"),
    "while saving": ([["step", 2, USR1], ["save", 1, TERM]], 143, [2, 3], "saved and stopped"),
    "in the last save": ([["save", 1, TERM]], -15, [6], "step 6/6"),
    "while exporting": ([["export", 1, INT]], -2, [6], "step 6/6"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_signal_at_any_time(warm, wuerstchen, few, whole, tmp_path, name):
    """To the process and its workers; the same command then reaches the same end, bit for bit."""
    faults, code, saved, said = CASES[name]
    script = "lora.py" if name == "Ctrl-C" else "train.py"
    settings = {**SHORT, **RESUME, "dataset_name": few, "dataloader_num_workers": 2}
    if name in ("twice Ctrl-C", "in the last save", "while exporting"):
        settings["dataloader_num_workers"] = 0
    words = flags(wuerstchen, tmp_path, **settings)
    found, printed = warm.run(script, words, faults)
    assert (found, steps(tmp_path)) == (code, saved), printed
    assert said in printed and "Traceback" not in printed and "Error" not in printed
    assert (tmp_path / "prior_pipeline").exists() == (code == 0)
    found, printed = warm.run(script, words)
    assert found == 0 and steps(tmp_path)[-1] == 6, printed
    assert_bitwise_equal(whole / script / "checkpoint-6", tmp_path / "checkpoint-6")


def ranks(warm, words, faults):
    """Two ranks, one of which meets the faults. Returns their exit codes and what they printed."""
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    place = {name: str(value) for name, value in place.items()}
    runs = [
        warm.start(
            "train.py", words, faults if rank else (), **place, RANK=str(rank), LOCAL_RANK=str(rank)
        )
        for rank in range(2)
    ]
    return [run.wait() for run in runs]


@pytest.mark.parametrize(("number", "code", "saved"), [(TERM, 143, [3]), (USR1, 0, [3, 6])])
def test_one_rank_that_hears_it_is_enough(warm, wuerstchen, few, tmp_path, number, code, saved):
    settings = {**SHORT, "dataset_name": few, "dataloader_num_workers": 1}
    found = ranks(warm, flags(wuerstchen, tmp_path, **settings), [["step", 3, number]])
    assert [one for one, _ in found] == [code, code], found
    assert steps(tmp_path) == saved
    assert sum("saved and stopped" in printed for _, printed in found) == (code > 0)


# ---- Under torchrun, whose agent passes signals on.


def torchrun(wuerstchen, few, out, *options, ranks=2, script="train.py", **changed):
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    agent += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", *options]
    settings = {**SHORT, **RESUME, "dataset_name": few, "max_train_steps": 2000, **changed}
    return start(*agent, script, *flags(wuerstchen, out, **settings))
