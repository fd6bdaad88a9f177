"""What checks the exercises: each function takes an answer, raises AssertionError, or returns what
it found, in one line.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minwurst import miniature
from minwurst.edge import models
from minwurst.step import adapter as adapters
from minwurst.step import diffusion
from minwurst.step.encoders import encode_text
from minwurst.tour.bench import QUIET, ROOT


def random_latents(seed=0, batch=3):
    return torch.randn(batch, 16, 6, 6, generator=torch.Generator().manual_seed(seed))


def prior_and_text():
    """The miniature's prior, and the states of a prompt and of the empty caption."""
    words = [miniature.TRAIN["validation_prompts"][0], ""]
    text = encode_text(*models.load_text(miniature.WEIGHTS, torch.float32), words)
    return models.load_prior(miniature.WEIGHTS).eval(), text


def ddim(answer):
    """One step and three steps with the exact noise end at the same noisy latents."""
    clean, noise = random_latents(0), random_latents(1)
    times = [torch.full((3,), t) for t in (0.9, 0.7, 0.4, 0.2)]
    x = diffusion.add_noise(clean, noise, times[0])
    expected = diffusion.add_noise(clean, noise, times[-1])
    direct = answer(x, noise, times[0], times[-1])
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = answer(x, noise, t, t_next)
    for name, found in (("one step", direct), ("three steps", x)):
        error = (found - expected).abs().max().item()
        assert error < 1e-4, f"{name} from t = 0.9 to 0.2 misses by {error:.2g}"
    return "one step and three steps agree"


@torch.no_grad()
def noise_in_bf16(answer):
    """The prediction is near that in fp32, and t = 0.999 gives another one than t = 1."""
    prior, text = prior_and_text()
    noisy, t = random_latents(0, 1).expand(2, -1, -1, -1), torch.tensor([0.999, 1.0])
    text = text[:1].expand(2, -1, -1)
    expected = prior(noisy, t, text)
    found = answer(prior, noisy, t, text)
    off = ((found - expected).norm() / expected.norm()).item()
    assert off < 0.1, f"the relative error is {off:.1%}"
    apart = [(both[0] - both[1]).abs().max().item() for both in (expected, found)]
    assert apart[1] > 0, f"t = 0.999 and t = 1 give the same; fp32 differs by {apart[0]:.3g}"
    return f"t = 0.999 and t = 1 differ by {apart[1]:.3g}, in fp32 by {apart[0]:.3g}"


def flags_that_survive(answer):
    """The loss of step 3 of a killed run is the same, bit for bit, when it is run again."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", *QUIET, f"--output_dir={folder}/run",
                 f"--cache_dir={folder}/cache", "--max_train_steps=4", "--train_batch_size=2",
                 "--logging_steps=1", "--max_train_samples=16", *answer()]  # fmt: skip
        log = Path(folder) / "run" / "logs" / "log.jsonl"
        quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, **quiet)
        while 3 not in losses(log):
            assert process.poll() is None, "the run ended before step 3"
            time.sleep(0.01)
        before = losses(log)[3]
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        resumed = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert not resumed[0].startswith("step 1/"), "the second run started with step 1"
        after = losses(log)[3]
    assert after == before, f"the loss was {before} and is {after}"
    return f"the loss of step 3 is {after} in both runs"


def losses(log):
    """{step: loss} of a log that may be incomplete."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def noise_from_v(answer):
    """ε is found from v, at five times."""
    clean, noise, t = random_latents(0, 5), random_latents(1, 5), torch.linspace(0, 1, 5)
    s = diffusion.per_sample(diffusion.alpha_bar(t), clean)
    x, v = s.sqrt() * clean + (1 - s).sqrt() * noise, s.sqrt() * noise - (1 - s).sqrt() * clean
    errors = (answer(v, x, t) - noise).abs().amax(dim=(1, 2, 3))
    each = [round(error, 3) for error in errors.tolist()]
    assert errors.max() < 1e-4, f"errors at t = 0, ¼, ½, ¾, 1: {each}"
    return f"largest error {errors.max():.1e}"


def initialise(answer):
    """A new adapter changes nothing, and a step of SGD changes it."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 6), torch.randn(5, 8)
    adapter = adapters.LoRALinear(layer.requires_grad_(False), rank=2, alpha=2)
    answer(adapter)
    out = adapter(x)
    assert torch.equal(out, layer(x)), "the new adapter changes the layer's output"
    out.square().sum().backward()
    sizes = {n: getattr(adapter, n).grad.norm().item() for n in ("lora_A", "lora_B")}
    assert any(sizes.values()), "it will never learn: both gradients are zero"
    return f"gradient of A {sizes['lora_A']:.3g}, of B {sizes['lora_B']:.3g}"


def lora_parameters(answer):
    """The number is that of lora.py's adapters, for three ranks."""
    for rank in (1, 4, 16):
        prior = models.load_prior(miniature.WEIGHTS)
        names = adapters.find_targets(prior, ["attention"])
        layers = [prior.get_submodule(name) for name in names]
        sizes = [(layer.in_features, layer.out_features) for layer in layers]
        weights = adapters.add_adapters(prior, rank, rank, ["attention"])
        expected, found = sum(w.numel() for w in weights.values()), answer(sizes, rank)
        assert found == expected, f"rank {rank}: {found}, but {expected} are trained"
    return f"{expected:,} at rank {rank}, on {len(sizes)} layers"


@torch.no_grad()
def guided_noise(answer):
    """The result is that of diffusion.guided, with one call of the prior."""
    prior, text = prior_and_text()
    calls, x, t = [], random_latents(0, 1), torch.tensor([0.6])

    def counted(*arguments):
        calls.append(1)
        return prior(*arguments)

    found = answer(counted, x, t, text[:1], text[1:], 3.0)
    error = (found - diffusion.guided(prior, {"text": text}, 3.0)(x, t)).abs().max().item()
    assert error < 1e-4, f"it differs from diffusion.guided by {error:.2g}"
    assert len(calls) == 1, f"right, but with {len(calls)} calls of the prior"
    return "one call, same result"


def p2_weight(answer):
    """The weights are those of --loss_weighting=p2."""
    t = torch.linspace(0, 1, 101)
    signal_left = diffusion.alpha_bar(t)
    found = answer(signal_left / (1 - signal_left))
    error = (found - diffusion.Objective("p2").loss_weight(t)).abs().max().item()
    assert error < 1e-4, f"it differs from Objective('p2') by up to {error:.2g}"
    return f"largest difference {error:.1e}"
