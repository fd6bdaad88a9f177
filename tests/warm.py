"""A parent process for tests that kill processes: it imports once, then forks the runs.

    with Warm(wuerstchen) as warm:
        run = warm.start("train.py", flags(…), faults=[["step", 3, signal.SIGTERM]])
        code, printed = run.wait()

A forked run does what `python train.py …` does, in its own session, in half a second instead of
ten. It can send signals to this session at a given point in the code, kill itself at its n-th file
operation, or print its file operations.
"""

import ctypes
import datetime
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Warm:
    """Use as a context manager: the parent process. wuerstchen: the model folder to preload."""

    def __init__(self, wuerstchen):
        self.wuerstchen = wuerstchen

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", self.wuerstchen], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, script, words, faults=(), kill_at=None, patience=60, stopped=False, log=None,
        **variables,
    ):  # fmt: skip
        """Start a run of a script.

        faults: a list of [key of PLACES, which call of it, signal, …]. kill_at: number of the file
        operation at which to die; 0 prints them. patience: seconds that ranks wait for each other.
        stopped: it waits for SIGCONT, so that it can be traced. log: where its output goes.
        """
        log = log or tempfile.mkstemp(suffix=".log")[1]
        how = {"faults": faults, "kill_at": kill_at, "patience": patience, "log": log}
        how["stopped"] = stopped
        pid = self.ask(script=script, words=words, variables=variables, **how)
        return Run(self, pid, Path(log))

    def start_ranks(self, ranks, script, words, faults=(), faulty=-1, **options):
        """Start a run on several ranks without torchrun; rank `faulty`, the last, gets the faults.
        """
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            port = opened.getsockname()[1]
        place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                script, words, faults if rank == faulty % ranks else (), **options,
                **{name: str(value) for name, value in place.items()},
                RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def run(self, *arguments, **options):
        return self.start(*arguments, **options).wait()


class Run:
    """A forked run: its process id and its log file."""

    def __init__(self, warm, pid, log):
        self.warm, self.pid, self.log = warm, pid, log

    def wait(self):
        """Returns (exit code, or minus the signal that ended it; output)."""
        code = self.warm.ask(wait=self.pid)
        if not self.log.is_file():
            return code, ""
        printed = self.log.read_text()
        self.log.unlink()
        return code, printed


def serve():
    """Answer requests from standard input, one per line; in a forked run, return its request."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        else:
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    return None


def wait(pid, seconds=120):
    for _ in range(100 * seconds):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "it ran on"


def become(request):
    """In a forked run: set up its own session, output, environment and arguments."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["variables"])
    sys.argv = [request["script"], *request["words"]]
    if request["stopped"]:
        ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: anybody may trace it
        os.kill(os.getpid(), signal.SIGSTOP)


def send(place, call, *numbers):
    """Send signals to the whole session when PLACES[place] is called for the call-th time.

    A separate process sends them, as in real use: workers distinguish signals from their trainer
    from others. Instead of a signal, "nan" turns the function's result into NaN, "raise" raises an
    error, and "nohup" ignores SIGHUP from then on.
    """
    module, name = PLACES[place]
    function, calls = getattr(module, name), []

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            if numbers == ("nan",):
                return function(*arguments, **options) * float("nan")
            if numbers == ("nohup",):
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                return function(*arguments, **options)
            if numbers == ("raise",):
                raise RuntimeError("injected")
            for number in numbers:
                kill = f"kill -{number} -{os.getpgrp()}"
                subprocess.run(["bash", "-c", kill], start_new_session=True)
        return function(*arguments, **options)

    setattr(module, name, wrapped)


class Operations:
    """Counts file operations while saving, and kills the process at operation `kill_at`.

    Python reports file operations before they happen, through audit events. Those it does not
    report, fsync and safetensors' writes, are wrapped. For each file, kill points are before it is
    opened and after half of its bytes are written. A kill_at of 0 prints each operation instead.
    """

    EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}

    def __init__(self, kill_at):
        self.kill_at, self.count, self.depth = kill_at, 0, 0
        self.watch(checkpoint, "save"), self.watch(run_file, "write")
        self.watch(lora_file, "save"), self.watch(export, "save_pipeline")
        self.wrap(os, "fsync"), self.wrap_writing(lora_file, "save_file")
        self.wrap_writing(checkpoint, "write_tensors", file_first=True)
        sys.addaudithook(self.heard)

    def heard(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        ours = self.depth and arguments[0] != os.devnull
        if ours and (event in self.EVENTS or writes):
            self.tick(f"{event} {arguments[0]}")

    def tick(self, what, before=lambda: None):
        self.count += 1
        if not self.kill_at:
            print(f"operation {self.count}: {what}", flush=True)
        if self.count == self.kill_at:
            self.depth = 0
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, module, name):
        """Count operations only within this function."""
        function = getattr(module, name)

        def watched(*arguments):
            self.depth += 1
            try:
                return function(*arguments)
            finally:
                self.depth -= 1
                print(f"{name} is done", flush=True)

        setattr(module, name, watched)

    def wrap(self, module, name):
        function = getattr(module, name)

        def wrapped(*arguments):
            if self.depth:
                self.tick(name)
            return function(*arguments)

        setattr(module, name, wrapped)

    def wrap_writing(self, module, name, file_first=False):
        function = getattr(module, name)

        def wrapped(*words, **options):
            file = words[0 if file_first else 1]

            def half():
                function(*words, **options)
                os.truncate(file, Path(file).stat().st_size // 2)

            if self.depth:
                self.tick(f"write {file}")
                self.tick(f"half of {file}", half)
            return function(*words, **options)

        setattr(module, name, wrapped)


if __name__ == "__main__":
    import numpy.ctypeslib  # noqa: F401 - a run imports it
    import torch
    from PIL import Image

    import lora
    import train
    from minwurst.base.settings import LoRASettings, Settings, from_command_line
    from minwurst.edge import decoders, export, lora_file, models, push, run_file
    from minwurst.run import checkpoint, estimate, validation
    from minwurst.step import diffusion, distributed, randomness

    PLACES = {
        "load": (models, "load_prior"), "step": (randomness, "dropout_seed"),
        "save": (checkpoint, "check_finite"), "export": (export, "write_parts"),
        "noise": (diffusion, "add_noise"), "validate": (validation.Validation, "validate"),
        "write": (checkpoint, "write_tensors"), "rotate": (checkpoint, "rotate"),
        "measure": (validation.GenerateImages, "measure"),
        "decode": (decoders.FullDecoder, "__call__"),
    }  # fmt: skip
    SCRIPTS = {"train.py": (train.main, Settings), "lora.py": (lora.main, LoRASettings)}
    # Preload what a run would import on first use.
    wuerstchen = Path(sys.argv[1])
    models.load_text(wuerstchen, torch.float32)
    config_of_prior = dict(models.load_prior(wuerstchen).config)
    estimate.activations(
        config_of_prior, batch=1, shape=(1, 1), compute_type=torch.float32,
        gradient_checkpointing=False,
    )  # fmt: skip
    Image.init()
    tasks = Path("/proc/self/task").iterdir()
    threads = {task.joinpath("comm").read_text().strip() for task in tasks}
    assert threads <= {"python", "python3", "jemalloc_bg_thd"}, "threads can't be forked safely"
    gc.freeze()  # avoids copying pages that the collector visits
    request = serve()
    if request:
        become(request)
        for fault in request["faults"]:
            send(*fault)
        if request["kill_at"] is not None:
            Operations(request["kill_at"])
        distributed.TIMEOUT = datetime.timedelta(seconds=request["patience"])
        main, kind = SCRIPTS[request["script"]]
        distributed.launch(main, from_command_line(kind), push.push_result)
