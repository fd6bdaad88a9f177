"""The forks of minwurst/README.md: each patch is applied to a copy of this tree and run.

In the patched copy, a process of its own runs the check:

    python -m tests.test_forks NAME WUERSTCHEN FOLDER
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from safetensors import safe_open

from minwurst.base.errors import UserError
from minwurst.edge import models
from minwurst.step import diffusion, randomness
from minwurst.step.metrics import QUARTERS, quarter_of
from minwurst.step.samples import batches
from tests import tiny
from tests.conftest import ROOT, assert_bitwise_equal, relative, saved, train_here

pytestmark = pytest.mark.slow
PATCHES = ROOT / "tests" / "forks"
MEND = """To fix it, commit your change, then:
    git apply --3way {0}               # and resolve the conflicts
    git add minwurst train.py lora.py
    git diff --cached -U1 -- minwurst train.py lora.py > {0}
    git apply -R --index {0}
"""


def apply(name, copy):
    """A copy of the tree with a patch applied; it needs no repository."""
    copy.mkdir()
    for script in ("train.py", "lora.py"):
        shutil.copy(ROOT / script, copy)
    for package in ("minwurst", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    patch = f"tests/forks/{name}.patch"
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    done = subprocess.run(
        ["git", "apply", patch], cwd=copy, env=outside, capture_output=True, text=True
    )
    assert not done.returncode, f"{patch} no longer applies.\n{done.stderr}{MEND.format(patch)}"
    return copy


def run_fork(name, wuerstchen, folder):
    """Run a fork's check below, which raises whatever is wrong."""
    copy = apply(name, folder / "fork")
    words = [sys.executable, "-m", "tests.test_forks", name, wuerstchen, folder]
    variables = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=copy, env={**os.environ, **variables},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr


def test_every_patch_has_a_check():
    assert {patch.stem for patch in PATCHES.glob("*.patch")} == CHECKS.keys()


@pytest.mark.parametrize("name", ["muon", "metric", "second_condition", "own_data"])
def test_fork(still_wuerstchen, tmp_path, name):
    run_fork(name, still_wuerstchen, tmp_path)


def test_fork_of_the_prediction(still_wuerstchen, tmp_path):
    """Its result says what it predicts, so that this tree does not sample it."""
    run_fork("v_prediction", still_wuerstchen, tmp_path)
    with pytest.raises(UserError, match="prior predicts v_prediction, and step/diffusion.py knows"):
        models.load_prior(tmp_path / "run" / "prior_pipeline", as_trained=True)


# ---- The checks, which run in the copies.


def entries(run):
    return [json.loads(line) for line in (run / "logs" / "log.jsonl").read_text().splitlines()]


@torch.no_grad()
def first_step(wuerstchen):
    """(latents, noise, t, the initial prior's output) of the first four samples."""
    batch = next(batches(tiny.samples(tiny.rows(), 64, seed=7), [range(4)]))
    encoders = models.make_encoders(tiny.parts(wuerstchen), torch.float32, torch.device("cpu"))
    latents, condition = encoders.encode(batch)
    t, noise = randomness.uniform(7, range(4)), randomness.noise(7, range(4), latents.shape[1:])
    signal, rest = roots(t)
    predicted = models.load_prior(wuerstchen)(signal * latents + rest * noise, t, **condition)
    return latents, noise, t, predicted


def roots(t):
    """√ᾱ and √(1−ᾱ), (B, 1, 1, 1)."""
    signal = diffusion.alpha_bar(t)[:, None, None, None]
    return signal.sqrt(), (1 - signal).sqrt()


def resume_from_the_middle(wuerstchen, folder, whole, **settings):
    """Resume a run of four steps at its second; the end is the same bit for bit."""
    parts = folder / "parts"
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    train_here(wuerstchen, parts, **settings, resume_from_checkpoint="latest")
    assert_bitwise_equal(whole / "checkpoint-4", parts / "checkpoint-4")


def v_prediction(wuerstchen, folder):
    """The first loss is v's, written out; with the right v, sampling ends at the image."""
    run = train_here(wuerstchen, folder / "run", max_train_steps=2, logging_steps=1)
    latents, noise, t, predicted = first_step(wuerstchen)
    signal, rest = roots(t)
    loss = (predicted - (signal * noise - rest * latents)).square().mean().item()
    assert entries(run)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    config = json.loads((run / "prior_pipeline" / "prior" / "config.json").read_text())
    assert config["prediction_type"] == "v_prediction"

    def predict(x, t):
        signal, rest = roots(t)
        return signal * (x - signal * latents) / rest - rest * latents

    objective, start = diffusion.objective_of(config), torch.randn(30, *latents.shape)
    found = diffusion.sample(predict, start, objective.times(), objective.reverse_step)
    assert relative(found, latents) < 0.02


def muon(wuerstchen, folder):
    """Matrices in blocks have Muon's state, all others AdamW's; resumed, both are the same."""
    settings = {"checkpointing_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    whole = train_here(wuerstchen, folder / "whole", **settings)
    tensors = saved(whole / "checkpoint-4")
    for name, weight in tensors.items():
        group, _, name = name.partition("/")
        if group == "weights":
            kinds = {key.rpartition(".")[2] for key in tensors if f"/{name}." in key}
            is_matrix = name.startswith("blocks.") and weight.dim() == 2
            expected = {"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq", "step"}
            assert kinds == expected, name
    resume_from_the_middle(wuerstchen, folder, whole, **settings)


def metric(wuerstchen, folder):
    """The first step's mean in each quarter of t, written out."""
    run = train_here(wuerstchen, folder / "run", max_train_steps=1)
    _, noise, t, predicted = first_step(wuerstchen)
    products, norms = (predicted * noise).sum(1), predicted.norm(dim=1) * noise.norm(dim=1)
    cosine, quarters = (products / norms).mean((1, 2)), quarter_of(t)
    expected = {f"cosine/{QUARTERS[q]}": cosine[quarters == q].mean().item() for q in quarters}
    (entry,) = entries(run)
    found = {name: value for name, value in entry.items() if name.startswith("cosine/")}
    assert found == pytest.approx(expected, abs=1e-5) and max(found.values()) > 0.1


def second_condition(wuerstchen, folder):
    """The pooled state counts for nothing at first, and is learned; live, cached and by a LoRA."""
    settings = {"checkpointing_steps": 2}
    whole = train_here(
        wuerstchen, folder / "whole", **settings, validation_prompts="a bear",
        validation_decoder="preview",
    )  # fmt: skip
    resume_from_the_middle(wuerstchen, folder, whole, **settings)
    latents, noise, t, _ = first_step(wuerstchen)
    text, pooled = torch.randn(4, 77, 32), torch.randn(2, 4, 32)
    for source, is_used in ((wuerstchen, False), (whole / "prior_pipeline", True)):
        prior = models.load_prior(source)
        outputs = [prior(noise, t, text=text, pooled=one) for one in pooled]
        assert (relative(*outputs) > 1e-4) == is_used
    mine = {"pretrained_prior_model_name_or_path": whole / "prior_pipeline", "max_train_steps": 2}
    train_here(wuerstchen, folder / "cached", **mine, cache_latents=True)
    (file,) = (folder / "cached").glob("latents-*/text-00000000.safetensors")
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"pooled", "text"}
    lora = train_here(
        wuerstchen, folder / "lora", script="lora.py", lora_targets="pooled_mapper", **mine
    )
    adapters = saved(lora)
    assert len(adapters) == 2 and all(tensor.abs().sum() > 0 for tensor in adapters.values())


def own_data(wuerstchen, folder):
    """Shards of the test images train what the folder of these does, reading only what is used."""
    from minwurst.edge import tar_shards

    shards, rows = folder / "shards", tiny.rows()
    shards.mkdir()
    for first in (0, 30):
        with tarfile.open(shards / f"{first:02}.tar", "w") as shard:
            for row in list(rows)[first : first + 30]:
                image, caption = Path(row["image"]["path"]), folder / "caption.txt"
                caption.write_text(row["text"])
                shard.add(caption, f"{image.stem}.txt")
                shard.add(image, image.name)
    numbers, read = [], tar_shards.read
    tar_shards.read = lambda where: numbers.append(where) or read(where)
    settings = {"train_data_dir": shards, "checkpointing_steps": 2}
    whole = train_here(wuerstchen, folder / "whole", **settings)
    assert len(numbers) == 2 * (16 + 8)  # images and captions of four steps and of data.png
    resume_from_the_middle(wuerstchen, folder, whole, **settings)
    same = train_here(wuerstchen, folder / "same", checkpointing_steps=2)
    assert_bitwise_equal(whole / "checkpoint-4", same / "checkpoint-4")
    cached = {"cache_latents": True, "aspect_buckets": 2, "validation_split": 0.1}
    train_here(wuerstchen, folder / "cached", **settings, **cached, max_train_steps=1)
    with tarfile.open(shards / "30.tar", "a") as shard:
        shard.add(folder / "caption.txt", "one more.txt")
    with pytest.raises(UserError, match="content of the data set .* would be another run"):
        train_here(wuerstchen, folder / "whole", **settings, resume_from_checkpoint="latest")


CHECKS = {
    check.__name__: check for check in (v_prediction, muon, metric, second_condition, own_data)
}

if __name__ == "__main__":
    name, wuerstchen, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    CHECKS[name](wuerstchen, folder)
