"""Shared fixtures and helpers: small models, runs in this process or under torchrun."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never contact the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as minwurst does, but before torch
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: one thread for each
    os.environ["OMP_NUM_THREADS"] = "1"

import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import lora
import train
from minwurst.base.settings import LoRASettings, Settings, parse
from tests import tiny
from tests.warm import Warm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Put the tables that `datasets` prepares into a temporary folder."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def wuerstchen(tmp_path_factory):
    """A small complete model folder whose prior has dropout 0.1."""
    return tiny.make(tmp_path_factory.mktemp("wuerstchen"))


@pytest.fixture(scope="session")
def still_wuerstchen(tmp_path_factory):
    """The same without dropout, so that any split of a batch must give the same step."""
    return tiny.make(tmp_path_factory.mktemp("still"), dropout=0.0)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A data set of five rows, which are quick to check."""
    folder = tmp_path_factory.mktemp("data") / "few"
    rows = tiny.rows()
    rows.select(range(5)).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def warm(wuerstchen):
    """A process that forks runs of the scripts, for tests that kill processes."""
    with Warm(wuerstchen) as parent:
        yield parent


@pytest.fixture(scope="session")
def torchvision_numbers(tmp_path_factory):
    """Inputs and outputs of torchvision's encoder and preprocessing, by name."""
    folder, file = ROOT / ".torchvision", tmp_path_factory.mktemp("numbers") / "numbers.safetensors"
    assert folder.is_dir(), (
        "pip install --no-deps --target .torchvision 'torchvision>=0.25,<0.29' (see README)"
    )
    paths = f"{folder}{os.pathsep}{ROOT}"
    command(sys.executable, "tests/torchvision_numbers.py", file, PYTHONPATH=paths)
    return load_file(file)


def flags(wuerstchen, output_dir, **changed):
    """A command line for a short run on the test images; True becomes a flag without a value."""
    settings = {
        "pretrained_prior_model_name_or_path": wuerstchen,
        "image_encoder_name_or_path": Path(wuerstchen) / "image_encoder",
        "train_data_dir": tiny.IMAGES,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "seed": 7,
        "report_to": "none",
        **changed,
    }
    given = {n: value for n, value in settings.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


SCRIPTS = {"train.py": (train.main, Settings), "lora.py": (lora.main, LoRASettings)}


def train_here(wuerstchen, output_dir, script="train.py", **changed):
    """Run a script in this process, which saves the import time. Returns output_dir."""
    main, kind = SCRIPTS[script]
    main(parse(kind, flags(wuerstchen, output_dir, **changed)))
    return Path(output_dir)


def start(*words, stdout=subprocess.PIPE, **variables):
    """Start a command in the repository root: one thread per process, stderr merged into stdout."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        text=True,
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def command(*words, check=True, **variables):
    """Run a command to completion; returns (exit code, output)."""
    process = start(*words, **variables)
    printed, _ = process.communicate(timeout=300)
    assert not check or process.returncode == 0, printed
    return process.returncode, printed


def torchrun(ranks, wuerstchen, output_dir, script="train.py", **changed):
    """Run a script on several ranks of this machine. Returns output_dir."""
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    agent += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command(*agent, script, *flags(wuerstchen, output_dir, **changed))
    return Path(output_dir)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def saved(folder):
    """All tensors of a checkpoint as {"weights/name": tensor, …}."""
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, f"{folder} holds no tensors"
    return {f"{f.stem}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def assert_bitwise_equal(folder, other):
    """Two checkpoints hold the same tensors, bit for bit."""
    one, two = saved(folder), saved(other)
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ, first {differing[:3]}"


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖ in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def difference(found, expected):
    """‖found − expected‖ / ‖expected‖ over all tensors of two dicts of the same names."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([part[n].flatten() for n in found]) for part in (found, expected))
    return relative(one, other)
