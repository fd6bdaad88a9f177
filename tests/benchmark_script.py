"""Whole runs of the reference implementation's own script beside ours.

    python -m tests.benchmark script --reference_script=…/train_text_to_image_prior.py

The script is not part of this project: it is in diffusers' repository, in
examples/research_projects/wuerstchen/text_to_image. reference_script.py starts it, unchanged. Both
sides get the same images, models and flags, one process each, in turn; the models are small but for
the image encoder, because the reference can load no other.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

from safetensors.torch import load_file

from minwurst.step.image_encoder import EfficientNetEncoder
from tests import tiny
from tests.timing import WORK, note, row

STEPS, IMAGES, RESOLUTION = 20, 16, 256
RESULT = "prior_pipeline/prior/diffusion_pytorch_model.safetensors"


def missing(path):
    """What is missing to start the script, in one sentence; None if nothing."""
    if path is None or not path.is_file():
        return "script needs --reference_script=PATH, the reference implementation's script."
    needed = ["accelerate", "tensorboard"] + ["peft"] * ("lora" in path.name)
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{path.name} needs packages: pip install {' '.join(lacking)}"
    if not (tiny.IMAGES.parent.parent / ".torchvision" / "torchvision").is_dir():
        return f"{path.name} needs torchvision in .torchvision: see tests/README.md, Tests."
    return None


def make_models(folder, dropout):
    if not (folder / "image_encoder").is_dir():
        tiny.make(folder, c=256, nhead=4, depth=4, dropout=dropout)
        shutil.rmtree(folder / "image_encoder")
        encoder = tiny.make_image_encoder(tiny.rows(), EfficientNetEncoder())
        encoder.save_pretrained(folder / "image_encoder")
    return folder


def commands(path, models, images, out, *flags):
    """(the reference's command, ours) for the same run, a list of words each."""
    common = [
        f"--pretrained_prior_model_name_or_path={models}", f"--train_data_dir={images}",
        f"--output_dir={out}", "--train_batch_size=4", "--seed=1", "--lr_warmup_steps=0",
        "--learning_rate=1e-4", *flags,
    ]  # fmt: skip
    encoder = models / "image_encoder"
    theirs = ["-m", "tests.reference_script", str(path), f"--image_encoder={encoder}"]
    ours = ["lora.py" if "lora" in path.name else "train.py"]
    return [*theirs, *common], [*ours, f"--image_encoder_name_or_path={encoder}", *common]


def execute(words, out):
    """Seconds from start to result."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-3000:]}")
    return time.perf_counter() - begin


def script(rounds, path=None):
    """A run from start to result: each script, ours also with --cache_latents."""
    if problem := missing(path):
        return note("the reference's own script", f"not measured: {problem}")
    models = make_models(WORK / "script-models", dropout=0.1)
    images, out = tiny.make_pictures(WORK / f"pictures-{IMAGES}", IMAGES), WORK / "script-out"
    theirs, ours = commands(
        path, models, images, out, f"--max_train_steps={STEPS}", f"--resolution={RESOLUTION}",
        "--mixed_precision=bf16", "--report_to=tensorboard",
    )  # fmt: skip
    sides = {"theirs": theirs, "ours": ours, "cached": [*ours, "--cache_latents"]}
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, words in sides.items():
            found[name].append(execute(words, out))
    what = f"{path.name}, {STEPS} steps of 4 images, start to result"
    row(what, found["theirs"], found["ours"])
    row(f"{what}; here with --cache_latents", found["theirs"], found["cached"])
    if "lora" not in path.name:  # adapters start from random numbers of either side
        apart = distance(path)
        note("… weights after 6 steps with the same noise", f"{apart:.0e} of their way apart")


def distance(path):
    """How far the weights of both sides end apart, relative to how far ours moved in six steps.

    The images are copies of one, because either side has its own order; the reference gets our
    noise and timesteps; there is no dropout, and all of it is fp32.
    """
    models, images = make_models(WORK / "script-still", dropout=0.0), WORK / "script-image"
    if not images.is_dir():
        photos = tiny.make_pictures(WORK / f"pictures-{IMAGES}", IMAGES)
        images.mkdir()
        lines = []
        for number in range(8):
            shutil.copy(photos / "000.jpg", images / f"{number}.jpg")
            lines.append(json.dumps({"file_name": f"{number}.jpg", "text": "a photo"}))
        (images / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    theirs, ours = commands(
        path, models, images, WORK / "script-out", "--max_train_steps=6", "--resolution=96",
        "--mixed_precision=no", "--report_to=tensorboard",
    )  # fmt: skip
    ends = []
    for words in ([*theirs, "--same_noise=1"], ours):
        execute(words, WORK / "script-out")
        ends.append(load_file(WORK / "script-out" / RESULT))
    start = load_file(models / "prior" / "diffusion_pytorch_model.safetensors")
    reference, found = ends
    apart, moved = (
        sum((found[name].double() - other[name]).square().sum() for name in found).sqrt()
        for other in (reference, start)
    )
    return (apart / moved).item()
