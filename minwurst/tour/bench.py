"""What the panels of the tour work with: the miniature's parts, and a few calls they share."""

import functools
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from minwurst import miniature, pipelines
from minwurst.base.model_folder import own_parts
from minwurst.base.settings import Settings
from minwurst.edge import dataset, models
from minwurst.step import diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.images import open_image, preprocess

ROOT = Path(miniature.__file__).parents[2]  # of the repository: train.py and lora.py are here
GUIDANCE = own_parts(miniature.WEIGHTS)["guidance_scale"]
QUIET = ("--demo", "--validation_prompts", "--report_to=none")  # no images while training


class Run:
    """A finished run of train.py or lora.py. log: its entries. console: what it printed."""

    def __init__(self, folder, console):
        self.folder, self.console = folder, console
        lines = (folder / "logs" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        self.log = [json.loads(line) for line in lines]

    def curve(self, name):
        """[(step, value), …] of one number of the log."""
        return [(entry["step"], entry[name]) for entry in self.log if name in entry]


class Bench:
    """Called `m` in the panels. prompts: the demo's. side: of the latents, 6."""

    def __init__(self, work):
        """work: a folder for runs."""
        self.work = Path(work).absolute()  # the scripts run in the repository's root
        self.prompts = miniature.TRAIN["validation_prompts"]
        self.generate = self.pipeline()
        self.side, self.guidance = self.generate.size, GUIDANCE
        self.prior = self.generate.prior.prior
        self.objective = diffusion.objective_of(self.prior.config)

    # ---- One of the images that the demo trains on.

    @functools.cached_property
    def row(self):
        return dataset.find(Settings(train_data_dir=str(miniature.IMAGES)))[60]

    @functools.cached_property
    def pixels(self):
        """As the image encoder takes it, (1, 3, 192, 192)."""
        return preprocess(open_image(self.row), 32 * self.side, 32 * self.side)[None]

    @functools.cached_property
    def image_encoder(self):
        return models.load_image_encoder(miniature.WEIGHTS / "image_encoder")

    @functools.cached_property
    @torch.no_grad()
    def latents(self):
        """Encoded and scaled, (1, 16, 6, 6)."""
        return diffusion.scale_latents(self.image_encoder(self.pixels))

    # ---- Sampling.

    def noise(self, prompt, seed=0):
        """All the noise of one image's latents, (30, 1, 16, 6, 6)."""
        shape = self.prior.config.c_in, self.side, self.side
        return randomness.sampling_noise(seed, randomness.image_key(prompt, 0), shape)

    def guided(self, prompt, guidance=GUIDANCE):
        """predict(x, t) for a prompt, as `diffusion.sample` takes it."""
        states = encode_text(self.generate.tokenizer, self.generate.text_encoder, [prompt, ""])
        return diffusion.guided(self.prior, {"text": states}, guidance)

    @property
    def decoder_text(self):
        """The decoder's tokenizer and text encoder."""
        return self.generate.decode.tokenizer, self.generate.decode.text_encoder

    def decode(self, latents):
        """Stages B and A: an RGB image."""
        return self.generate.decode(latents, "", torch.Generator().manual_seed(0))

    @functools.lru_cache(maxsize=4)  # noqa: B019  the panels of a run use it one after the other
    def pipeline(self, run=None, scale=1.0):
        """All three stages with the base, or with a run's result; scale: of its LoRA."""
        prior, decoder = str(miniature.WEIGHTS), str(miniature.WEIGHTS / "decoder")
        if run is None:
            return pipelines.load(prior, decoder)
        if (run.folder / "prior_pipeline").is_dir():
            return pipelines.load(str(run.folder / "prior_pipeline"), decoder)
        return pipelines.load(prior, decoder, lora=str(run.folder), lora_scale=scale)

    def image(self, prompt, run=None, scale=1.0, guidance=GUIDANCE, seed=0):
        return self.pipeline(run, scale)(prompt, seed, self.side, guidance)

    # ---- Training.

    def train(self, script, *flags):
        """Print a command, and run it if no panel did."""
        print(f"$ python {script} {shlex.join([*QUIET, *flags])}")
        return self.run(script, flags)

    @functools.cache  # noqa: B019  panels may share a run
    def run(self, script, flags):
        name = "-".join([script.split(".")[0], *(flag.strip("-") for flag in flags)])
        folder = self.work / name.replace("/", "-")
        words = [*QUIET, f"--cache_dir={self.work / 'cache'}", f"--output_dir={folder}", *flags]
        done = subprocess.run(
            [sys.executable, script, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{script} {shlex.join(words)}:\n{done.stdout}")
        return Run(folder, done.stdout)


def fingerprint():
    """Identifies the miniature's prior, to see with which one a result was made."""
    files = sorted((miniature.WEIGHTS / "prior").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
