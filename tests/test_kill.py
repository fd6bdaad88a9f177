"""SIGKILL at every file operation of a run that saves and rotates: no saved step is lost.

A sample of the kill points runs with the other tests. All of them take some minutes:

    python -m pytest -m exhaustive tests/test_kill.py

SIGKILL loses the memory of the process, not data already passed to the kernel, so these tests do
not show that the flushes withstand a power failure.
"""

import signal

import pytest

from minwurst.edge import lora_file
from minwurst.run import checkpoint
from tests.conftest import assert_bitwise_equal, flags

pytestmark = pytest.mark.slow

STEPS = 4  # each one is saved


class Case:
    """A run that saves each step: its uninterrupted result and its numbered file operations."""

    def __init__(self, warm, wuerstchen, few, folder, script, limit, **changed):
        self.warm, self.script, self.limit, self.folder = warm, script, limit, folder
        self.settings = {
            "train_data_dir": None, "dataset_name": few, "train_batch_size": 1,
            "max_train_steps": STEPS, "checkpointing_steps": 1, "checkpoints_total_limit": limit,
            "resume_from_checkpoint": "latest", **changed,
        }  # fmt: skip
        self.wuerstchen, self.whole = wuerstchen, folder / "whole"
        code, printed = self.run(self.whole, kill_at=0)
        assert code == 0, printed
        self.operations, self.saved = [None], [0]  # from 1; number of saves completed before each
        for line in printed.splitlines():
            if line.startswith("operation "):
                self.operations.append(line.split(": ")[1])
                self.saved.append(self.saved[-1])
            self.saved[-1] += line == "save is done"
        self.saved = [0, *self.saved[:-1]]

    def run(self, output_dir, kill_at=None):
        words = flags(self.wuerstchen, output_dir, **self.settings)
        return self.warm.run(self.script, words, kill_at=kill_at)

    def check(self, number):
        """Kill at an operation; the same command then reaches the uninterrupted result."""
        out = self.folder / f"killed-{number}"
        code, printed = self.run(out, kill_at=number)
        assert code == -signal.SIGKILL, printed
        newest = checkpoint.find("latest", out)
        reached = int(newest.name.split("-")[1]) if newest else 0
        assert self.saved[number] <= reached <= self.saved[number] + 1
        code, printed = self.run(out)
        assert code == 0, printed
        assert "is skipped" not in printed  # an incomplete save never has a checkpoint's name
        assert_bitwise_equal(self.whole / f"checkpoint-{STEPS}", out / f"checkpoint-{STEPS}")
        result = "prior_pipeline/prior/diffusion_pytorch_model.safetensors"
        result = result if self.script == "train.py" else lora_file.FILE
        assert (self.whole / result).read_bytes() == (out / result).read_bytes()
        # What a kill during the last rotation left is removed by the next start.
        assert len(checkpoint.list_all(out)) == self.limit
        left = [path.name for path in out.iterdir() if path.name.startswith(".")]
        assert left == [".lock"], f"killed at {number}, {self.operations[number]}"


CASES = {
    1: ("train.py", {"use_ema": True}),
    2: ("lora.py", {"dataloader_num_workers": 1}),
    3: ("train.py", {"mixed_precision": "fp16"}),
}


@pytest.fixture(scope="module", params=CASES, ids="limit {}".format)
def case(request, warm, wuerstchen, few, tmp_path_factory):
    script, changed = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    return Case(warm, wuerstchen, few, folder, script, request.param, **changed)


def kind(operation):
    """An operation without its step number: "os.rename .checkpoint-.part"."""
    words = [word.rsplit("/", 1)[-1] for word in operation.split()]
    return "".join(letter for letter in " ".join(words) if not letter.isdigit())


def test_a_sample_of_the_points(case):
    """The last operation of each kind: of these, the checkpoint renames and every seventh.

    The cases start at different offsets.
    """
    last = {kind(text): number for number, text in enumerate(case.operations) if number}
    points = sorted(last.values())
    renames = [last[name] for name in last if "rename" in name and "checkpoint" in name]
    assert len(points) > 15 and len(renames) == 2
    for number in sorted({*renames, *points[case.limit :: 7]}):
        case.check(number)


@pytest.mark.exhaustive
def test_every_point(case):
    assert len(case.operations) > 60
    for number in range(1, len(case.operations)):
        case.check(number)


PLACES = [["save", 3], ["write", 4], ["rotate", 3], ["step", 4], ["step", 2]]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[1]}")
def test_a_kill_while_a_thread_saves(warm, wuerstchen, few, tmp_path_factory, place):
    """--async_checkpointing keeps the same promise; uninterrupted, it gives the same files."""
    folder = tmp_path_factory.mktemp("async")
    settings = {
        "train_data_dir": None, "dataset_name": few, "train_batch_size": 1, "use_ema": True,
        "max_train_steps": STEPS, "checkpointing_steps": 1, "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
    }  # fmt: skip
    plain = flags(wuerstchen, folder / "plain", **settings)
    assert warm.run("train.py", plain)[0] == 0
    words = flags(wuerstchen, folder / "async", **settings, async_checkpointing=True)
    code, printed = warm.run("train.py", words, faults=[[*place, signal.SIGKILL]])
    assert code == -signal.SIGKILL, printed
    code, printed = warm.run("train.py", words)
    assert code == 0 and "is skipped" not in printed, printed
    assert_bitwise_equal(folder / f"plain/checkpoint-{STEPS}", folder / f"async/checkpoint-{STEPS}")
    assert len(checkpoint.list_all(folder / "async")) == 2
