"""Start one of the reference implementation's scripts, unchanged, on today's libraries.

    python -m tests.reference_script train_text_to_image_prior.py --train_data_dir images …

Its own flags follow its path. What it needs to start, and would otherwise download, is supplied
from outside: the place where diffusers keeps its classes now, torchvision from the folder
.torchvision, and the image encoder of --image_encoder, a folder in this project's layout. At the
end it only gets the prior's pipeline to save, so it loads no decoder.

--same_noise gives it the noise and timesteps that train.py uses at each position of the stream, to
compare the weights after training.
"""

import argparse
import importlib
import runpy
import sys
import tempfile
import types
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from safetensors.torch import load_file

from minwurst.step import randomness
from tests import torchvision_schemas

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


def supply_diffusers():
    """The module's name of before diffusers 0.38, and a pipeline for the end."""
    kind = diffusers.WuerstchenPriorPipeline
    package = importlib.import_module(kind.__module__.rpartition(".")[0])
    sys.modules["diffusers.pipelines.wuerstchen"] = package

    def from_pretrained(folder, prior_prior, prior_text_encoder, prior_tokenizer, **_):
        scheduler = diffusers.DDPMWuerstchenScheduler()
        pipeline = kind(
            prior=prior_prior, text_encoder=prior_text_encoder, tokenizer=prior_tokenizer,
            scheduler=scheduler,
        )  # fmt: skip
        return types.SimpleNamespace(prior_pipe=pipeline)

    diffusers.AutoPipelineForText2Image.from_pretrained = from_pretrained


def supply_torchvision():
    """torchvision, which downloads no ImageNet weights; the script overwrites them at once.

    transformers must have looked for it before: it would import it in places where a build for CUDA
    beside a CPU build of torch fails.
    """
    torchvision_schemas.define()
    sys.path.append(str(ROOT / ".torchvision"))
    import torchvision

    make = torchvision.models.efficientnet_v2_s
    torchvision.models.efficientnet_v2_s = lambda weights=None: make()


def supply_image_encoder(folder, scratch):
    """A file with the key that the script reads from a file of 4.3 GB on the Hub."""
    file = Path(scratch) / "model_v2_stage_b.pt"
    torch.save({"effnet_state_dict": load_file(Path(folder) / WEIGHTS)}, file)
    huggingface_hub.hf_hub_download = lambda *_, **__: str(file)


def supply_noise(seed):
    """Replace the two random numbers of a step by train.py's, for batch after batch."""
    after = 0

    def randn_like(latents):
        noise = randomness.noise(seed, range(after, after + len(latents)), latents.shape[1:])
        return noise.to(latents)

    def rand(shape, device, dtype):
        nonlocal after
        (count,) = shape
        t = randomness.uniform(seed, range(after, after + count), device)
        after += count
        return t.to(dtype)

    torch.randn_like, torch.rand = randn_like, rand


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("script")
    parser.add_argument("--image_encoder", required=True)
    parser.add_argument("--same_noise", type=int, metavar="SEED")
    given, flags = parser.parse_known_args(words)
    transformers.utils.import_utils.is_torchvision_available()  # remembered: no
    supply_diffusers()
    supply_torchvision()
    if given.same_noise is not None:
        supply_noise(given.same_noise)
    sys.path.insert(0, str(Path(given.script).parent))  # where its image encoder's class is
    sys.argv = [given.script, *flags]
    with tempfile.TemporaryDirectory() as scratch:
        supply_image_encoder(given.image_encoder, scratch)
        runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
