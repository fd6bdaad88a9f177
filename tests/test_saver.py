"""--async_checkpointing: the same checkpoints, written by a thread; its errors stop all ranks."""

import threading
import time

import pytest

from minwurst.base.errors import UserError
from minwurst.run import checkpoint, saver
from minwurst.step import signals
from tests.conftest import assert_bitwise_equal, flags, train_here

pytestmark = pytest.mark.slow

SETTINGS = {"checkpointing_steps": 1, "use_ema": True, "async_checkpointing": True}


@pytest.fixture
def slow_saves(monkeypatch):
    """Saving takes long; returns the names of the threads that save."""
    threads, save = [], checkpoint.save

    def slow(*arguments):
        threads.append(threading.current_thread().name)
        time.sleep(0.3)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    return threads


@pytest.mark.parametrize("script", ["train.py", "lora.py"])
def test_it_saves_what_was_there_when_it_was_due(wuerstchen, tmp_path, slow_saves, script):
    """Bit for bit as in step, although training continues while the thread writes."""
    later = train_here(wuerstchen, tmp_path / "later", script, **SETTINGS, train_batch_size=1)
    assert slow_saves == ["saver"] * 3 + ["MainThread"]  # the last one is waited for
    plain = {**SETTINGS, "async_checkpointing": False}
    now = train_here(wuerstchen, tmp_path / "now", script, **plain, train_batch_size=1)
    for step in range(1, 5):
        assert_bitwise_equal(now / f"checkpoint-{step}", later / f"checkpoint-{step}")
    assert not [thread for thread in threading.enumerate() if thread.name == "saver"]


def test_an_error_of_the_thread_stops_the_run(wuerstchen, tmp_path, monkeypatch):
    """Two steps later at most, with one line; earlier checkpoints are intact."""
    write = checkpoint.write_tensors

    def full(file, tensors):
        if "checkpoint-3" in str(file):
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match="checkpoint-3 was not written: .*Free some space"):
        train_here(wuerstchen, tmp_path, **SETTINGS, max_train_steps=30)
    assert [checkpoint.step_of(path) for path in checkpoint.list_all(tmp_path)][:2] == [1, 2]
    assert len(checkpoint.list_all(tmp_path)) == 2
    signals.received.clear()


def test_an_error_of_the_thread_stops_all_ranks(warm, wuerstchen, few, tmp_path):
    settings = {**SETTINGS, "train_data_dir": None, "dataset_name": few, "max_train_steps": 30}
    words = flags(wuerstchen, tmp_path, **settings, train_batch_size=1)
    faults = [["write", 4, "raise"]]
    found = [run.wait() for run in warm.start_ranks(2, "train.py", words, faults, faulty=0)]
    assert all(code for code, _ in found), found
    assert checkpoint.list_all(tmp_path)


def test_signals_leave_nothing_half_saved(warm, wuerstchen, few, tmp_path):
    settings = {**SETTINGS, "train_data_dir": None, "dataset_name": few, "max_train_steps": 6}
    words = flags(wuerstchen, tmp_path, **settings, train_batch_size=1)
    code, printed = warm.run("train.py", words, [["step", 3, 15]])
    assert code == 143 and "saved and stopped" in printed
    assert [checkpoint.step_of(path) for path in checkpoint.list_all(tmp_path)] == [1, 2, 3]
    assert not list(tmp_path.glob(".checkpoint*"))


def test_too_little_memory_saves_in_step(wuerstchen, tmp_path, slow_saves, monkeypatch, capsys):
    monkeypatch.setattr(saver, "available_memory", lambda: 1000)
    train_here(wuerstchen, tmp_path, **SETTINGS, max_train_steps=2)
    assert slow_saves == ["MainThread"] * 2
    assert "free; saving in step." in capsys.readouterr().out


def test_available_memory_is_the_machines_or_the_containers(tmp_path):
    assert saver.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 700 kB\n")
    assert saver.available_memory(tmp_path) == 700 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    for name, text in (("max", "500000\n"), ("current", "400000\n"), ("stat", "inactive_file 7\n")):
        (cgroup / f"memory.{name}").write_text(text)
    assert saver.available_memory(tmp_path) == 100_007
    (cgroup / "memory.max").write_text("max\n")
    assert saver.available_memory(tmp_path) == 700 * 1024
