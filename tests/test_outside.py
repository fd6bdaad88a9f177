"""Faults injected from outside: strace makes system calls of a run fail, or kills it at one.

Nothing inside the process is changed, so these tests also see what libraries do. strace attaches to
a forked run (tests/warm.py) before its first line.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minwurst.edge import lora_file
from minwurst.run import checkpoint
from tests.conftest import assert_bitwise_equal, flags
from tests.test_signals import steps
from tests.tiny import IMAGES

pytestmark = pytest.mark.slow

STEPS = 3  # each one is saved, and one is kept beside the newest
RESULTS = {
    "train.py": "prior_pipeline/prior/diffusion_pytorch_model.safetensors",
    "lora.py": lora_file.FILE,
}


def status(pid, line):
    """A line of a process's status: "T (stopped)" for "State"."""
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(part.split(":\t", 1) for part in text.splitlines() if ":\t" in part)[line]


@contextlib.contextmanager
def traced(pid, call, fault, path):
    """Use as a context manager: a stopped process continues, with a fault in a call on a path."""
    while not status(pid, "State").startswith("T"):
        time.sleep(0.01)
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:{fault}", "-P", path, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while status(pid, "TracerPid") == "0":
        if tracer.poll() is not None:
            os.kill(pid, signal.SIGKILL)
            pytest.skip(f"no process can be traced here: {tracer.stderr.read()}")
        time.sleep(0.01)
    os.kill(pid, signal.SIGCONT)
    yield
    tracer.communicate(timeout=60)


class Program:
    """A script on a small data set, and what it ends with if nothing happens."""

    def __init__(self, warm, wuerstchen, few, folder, script):
        self.warm, self.wuerstchen, self.few, self.script = warm, wuerstchen, few, script
        self.whole = folder / script
        code, printed = warm.run(script, self.words(self.whole))
        assert code == 0, printed

    def words(self, out, **changed):
        return flags(self.wuerstchen, out, **{
            "train_data_dir": None, "dataset_name": self.few, "train_batch_size": 1,
            "max_train_steps": STEPS, "checkpointing_steps": 1, "checkpoints_total_limit": 2,
            "resume_from_checkpoint": "latest", **changed,
        })  # fmt: skip

    def run(self, out, call, fault, path, **changed):
        """Run with a fault; returns (exit code, output)."""
        run = self.warm.start(self.script, self.words(out, **changed), stopped=True)
        with traced(run.pid, call, fault, path):
            return run.wait()

    def check_resumed(self, out):
        """The same command ends as if nothing had happened, and leaves nothing behind."""
        code, printed = self.warm.run(self.script, self.words(out))
        assert code == 0 and "is skipped" not in printed, printed
        last = f"checkpoint-{STEPS}"
        assert_bitwise_equal(self.whole / last, out / last)
        result = RESULTS[self.script]
        assert (self.whole / result).read_bytes() == (out / result).read_bytes()
        assert steps(out) == [STEPS - 1, STEPS]
        assert [path.name for path in out.iterdir() if path.name[0] == "."] == [".lock"]


@pytest.fixture(scope="module")
def program(warm, wuerstchen, few, tmp_path_factory):
    """script → Program."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    folder = tmp_path_factory.mktemp("whole")
    programs = {}

    def get(script):
        if script not in programs:
            programs[script] = Program(warm, wuerstchen, few, folder, script)
        return programs[script]

    return get


KILLS = {
    # script, system call, its path in the output folder, checkpoints afterwards
    "writing": ("train.py", "pwrite64", ".checkpoint-2.part/weights.safetensors", [1]),
    "flushing": ("lora.py", "fsync", ".checkpoint-2.part/optimizer.safetensors", [1]),
    "renaming": ("train.py", "rename", ".checkpoint-2.part", [1]),
    "rotating": ("lora.py", "rename", "checkpoint-1", [1, 2, 3]),
    "deleting": ("train.py", "unlinkat", ".checkpoint-1.old", [2, 3]),
    "exporting": ("train.py", "fsync", ".prior_pipeline.part/model_index.json", [2, 3]),
    "exported": ("train.py", "rename", ".prior_pipeline.part", [2, 3]),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_at_a_system_call(program, tmp_path, name):
    script, call, path, saved = KILLS[name]
    code, printed = program(script).run(tmp_path, call, "signal=KILL", tmp_path / path)
    assert (code, steps(tmp_path)) == (-signal.SIGKILL, saved), printed
    assert checkpoint.find("latest", tmp_path).name == f"checkpoint-{saved[-1]}"
    program(script).check_resumed(tmp_path)


ERRORS = {
    # script, system call, its path in the output folder, error, checkpoints afterwards
    "a full disk": ("train.py", "pwrite64", ".checkpoint-2.part/weights.safetensors", "ENOSPC"),
    "full for a small file": ("lora.py", "write", ".checkpoint-2.part/state.json", "ENOSPC"),
    "a quota": ("lora.py", "mkdir", ".checkpoint-2.part", "EDQUOT"),
    "a broken disk": ("train.py", "pwrite64", ".checkpoint-2.part/optimizer.safetensors", "EIO"),
    "full for the result": (
        "train.py", "write", ".prior_pipeline.part/prior/config.json", "ENOSPC",
    ),
    "full for the LoRA": ("lora.py", "fsync", f".{lora_file.FILE}.part", "ENOSPC"),
    "full for run.json": ("lora.py", "write", ".run.json.part", "ENOSPC"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_a_system_call(program, tmp_path, name):
    """One line, with the remedy only for a full disk; what is saved stays, and the run resumes."""
    script, call, path, error = ERRORS[name]
    code, printed = program(script).run(tmp_path, call, f"error={error}", tmp_path / path)
    saved = [1] if ".checkpoint" in path else [] if "run.json" in path else [2, 3]
    assert (code, steps(tmp_path)) == (2, saved), printed
    assert "Traceback" not in printed and "was not written" in printed.splitlines()[-1]
    assert ("Free some space" in printed) == (error in ("ENOSPC", "EDQUOT"))
    assert [file.name for file in tmp_path.iterdir() if file.name[0] == "."] == [".lock"]
    if name in ("a full disk", "full for the LoRA"):  # the others end in the same state
        program(script).check_resumed(tmp_path)


def test_a_read_only_folder_is_said_first(program, tmp_path):
    out = tmp_path / "out"
    code, printed = program("lora.py").run(out, "mkdir", "error=EROFS", out)
    said = f"lora.py: --output_dir {out} is not writable: Read-only file system.\n"
    assert (code, printed) == (2, said)


DENIED = {
    # a file of a finished run that can't be opened, exit code, part of the output
    ".lock": (2, "can't open its .lock: [Errno 13] Permission denied"),
    "checkpoint-3/manifest.json": (0, "checkpoint-3 is skipped: it can't be read: [Errno 13]"),
    "run.json": (0, "run.json can't be read, and what it said of earlier starts is lost: [Errno"),
    "good_rows.json": (0, "done: "),  # it only saves time
}


@pytest.mark.parametrize("name", DENIED)
def test_a_file_that_may_not_be_opened(program, tmp_path, name):
    out = shutil.copytree(program("lora.py").whole, tmp_path / "out")
    code, printed = program("lora.py").run(out, "openat", "error=EACCES", out / name)
    expected, said = DENIED[name]
    assert code == expected and said in printed and "Traceback" not in printed, printed


def test_an_image_that_may_not_be_opened(program, tmp_path):
    """One line that names it; with --skip_bad_samples it is skipped."""
    images = shutil.copytree(IMAGES, tmp_path / "images")
    lines = (images / "metadata.jsonl").read_text().splitlines(keepends=True)[:4]
    (images / "metadata.jsonl").write_text("".join(lines))
    image = images / "bank.webp"
    for skip, expected in ((False, 2), (True, 0)):
        changed = {"dataset_name": None, "train_data_dir": images, "skip_bad_samples": skip}
        code, printed = program("lora.py").run(
            tmp_path / "out", "openat", "error=EACCES", image, **changed
        )
        said = f"Row 3 ({image}): can't read the image: [Errno 13] Permission denied"
        assert code == expected and said in printed and "Traceback" not in printed, printed


def test_a_log_on_a_full_disk_costs_nothing(warm, program, tmp_path):
    """What can't be printed is dropped."""
    words = program("lora.py").words(tmp_path)
    assert warm.run("lora.py", words, log="/dev/full") == (0, "")
    last = f"checkpoint-{STEPS}"
    assert_bitwise_equal(program("lora.py").whole / last, tmp_path / last)
