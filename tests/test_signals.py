"""Signals: the step is finished and saved once by all ranks, and the resumed run is the same."""

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from minwurst.run import checkpoint
from tests.conftest import ROOT, assert_bitwise_equal, flags, start

pytestmark = pytest.mark.slow

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
RESUME = {"resume_from_checkpoint": "latest"}
README = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
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
    # signals sent to the whole session, exit code, checkpoints, part of the output
    "SIGTERM": ([["step", 3, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "Ctrl-C": ([["step", 3, INT]], 130, [3], "SIGINT: saved and stopped"),
    "twice SIGTERM": ([["step", 3, TERM, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "SIGHUP": ([["step", 3, signal.SIGHUP]], 129, [3], "SIGHUP: saved and stopped"),
    "both": ([["step", 3, INT, USR1, TERM]], 143, [3], "SIGTERM: saved and stopped"),
    "twice Ctrl-C": ([["step", 3, INT], ["step", 4, INT], ["save", 1, INT]], -2, [], "Again to"),
    "SIGUSR1": ([["step", 3, USR1]], 0, [3, 6], "done: "),
    "in the last step": ([["step", 6, TERM]], 143, [6], "SIGTERM: saved and stopped"),
    "while loading": ([["load", 1, TERM]], -15, [], "No GPU found"),
    "while saving": ([["step", 2, USR1], ["save", 1, TERM]], 143, [2, 3], "saved and stopped"),
    "in the last save": ([["save", 1, TERM]], -15, [6], "step 6/6"),
    "while exporting": ([["export", 1, INT]], -2, [6], "step 6/6"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_signal_at_any_time(warm, wuerstchen, few, whole, tmp_path, name):
    """Sent to the process and its workers; the same command then ends with identical bits."""
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


def test_under_nohup_the_run_goes_on(warm, wuerstchen, few, whole, tmp_path):
    words = flags(wuerstchen, tmp_path, **SHORT, dataset_name=few)
    faults = [["load", 1, "nohup"], ["step", 3, signal.SIGHUP]]
    code, printed = warm.run("train.py", words, faults)
    assert (code, steps(tmp_path)) == (0, [6]), printed
    assert_bitwise_equal(whole / "train.py" / "checkpoint-6", tmp_path / "checkpoint-6")


def test_a_console_that_goes_away_costs_nothing(wuerstchen, few, tmp_path):
    """The reader of a pipe leaves after two lines; the run ends as it should."""
    words = flags(wuerstchen, tmp_path, **SHORT, dataset_name=few, logging_steps=1)
    process = start(sys.executable, "-u", "train.py", *words)
    assert "minwurst on" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert steps(tmp_path) == [6] and (tmp_path / "prior_pipeline").is_dir()


@pytest.mark.parametrize(("number", "code", "saved"), [(TERM, 143, [3]), (USR1, 0, [3, 6])])
def test_one_rank_that_hears_it_is_enough(warm, wuerstchen, few, tmp_path, number, code, saved):
    settings = {**SHORT, "dataset_name": few, "dataloader_num_workers": 1}
    words, faults = flags(wuerstchen, tmp_path, **settings), [["step", 3, number]]
    found = [run.wait() for run in warm.start_ranks(2, "train.py", words, faults)]
    assert [one for one, _ in found] == [code, code], found
    assert steps(tmp_path) == saved
    assert sum("saved and stopped" in printed for _, printed in found) == (code > 0)


def test_a_rank_that_stalls_ends_the_others(warm, wuerstchen, few, tmp_path):
    """When one rank is stopped, the other times out, and its checkpoint remains."""
    words = flags(wuerstchen, tmp_path, **SHORT, dataset_name=few, checkpointing_steps=2)
    waiting, stopped = warm.start_ranks(
        2, "train.py", words, [["step", 4, signal.SIGSTOP]], patience=10
    )
    code, printed = waiting.wait()
    assert code == 1 and "imed out" in printed, printed
    assert steps(tmp_path) == [2] and checkpoint.find("latest", tmp_path)
    os.killpg(stopped.pid, signal.SIGKILL)
    assert stopped.wait()[0] == -signal.SIGKILL


# ---- Under torchrun and a scheduler, which send signals to several processes.


def family(pid):
    """The ids of a process and all its current descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # exited since it was listed
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.fixture
def launched():
    """A list of commands to kill, with their descendants, when the test ends or fails."""
    processes = []
    yield processes
    for process in processes:
        for pid in family(process.pid) if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, process, seconds=90):
    for _ in range(100 * seconds):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def a_rank(agent):
    """The process id of the last rank that the agent started."""
    words = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family(agent.pid)[1:]}
    return max(pid for pid in words if "train.py" in words[pid])


def test_a_rank_that_dies_is_started_again(launched, warm, wuerstchen, few, tmp_path):
    """After kill -9 of one rank, all ranks restart and reach the uninterrupted result."""
    settings = {**SHORT, **RESUME, "dataset_name": few, "max_train_steps": 60}
    settings |= {"checkpointing_steps": 5, "checkpoints_total_limit": 2}
    words = flags(wuerstchen, tmp_path / "whole", **settings)
    found = [run.wait() for run in warm.start_ranks(2, "train.py", words)]
    assert [code for code, _ in found] == [0, 0], found
    out = tmp_path / "out"
    agent = start(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=1", "train.py", *flags(wuerstchen, out, **settings),
    )  # fmt: skip
    launched.append(agent)
    wait_for((out / "checkpoint-10").exists, agent)
    os.kill(a_rank(agent), signal.SIGKILL)
    printed, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0 and "resuming from" in printed, printed
    assert_bitwise_equal(tmp_path / "whole" / "checkpoint-60", out / "checkpoint-60")


def test_the_readmes_slurm_script(launched, wuerstchen, few, tmp_path):
    """The script with only flags and GPU count changed; it receives the time limit signal."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", README, re.DOTALL)
    settings = {**SHORT, **RESUME, "dataset_name": few, "max_train_steps": 100000}
    settings |= {"dataloader_num_workers": 1, "logging_steps": 1}
    words = shlex.join(flags(wuerstchen, tmp_path / "out", **settings))
    given, count = re.subn(r"train\.py .*?(?= &\n)", f"train.py {words}", script, flags=re.DOTALL)
    given = given.replace("--nproc_per_node=gpu", "--nproc_per_node=2 --standalone")
    assert count == 1 and "--nproc_per_node=2" in given
    (tmp_path / "job").write_text(given)
    for name, line in {
        "scontrol": f'echo "$@" > {tmp_path}/asked',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    log = tmp_path / "log"
    with open(log, "w") as opened:
        job = start("bash", tmp_path / "job", PATH=path, SLURM_JOB_ID="17", stdout=opened)
        launched.append(job)
        wait_for(lambda: "step 2/" in log.read_text(), job)
        os.kill(job.pid, USR1)
        job.wait(timeout=60)
    assert "SIGTERM: saved and stopped" in log.read_text(), log.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert len(steps(tmp_path / "out")) == 1 and checkpoint.find("latest", tmp_path / "out")
