"""Generate images from prompts: with the base, a fine-tuned prior, or a LoRA at several strengths.

    python -m minwurst.sample --prompt "a bear" "a car" --prior runs/demo --output bear.png
    python -m minwurst.sample --prompt "a bear" --lora runs/demo-lora --lora_scale 0 0.5 1

An image depends on its prompt, its number and the seed, and not on the other images. With a run's
seed, which is the default, the first image of a prompt is the one that validation generated last.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

from minwurst import miniature
from minwurst.base import prompts
from minwurst.base.console import progress, say
from minwurst.base.errors import UserError, blame, one_line
from minwurst.base.model_folder import SAID, own_parts
from minwurst.base.settings import (
    DEMO_HELP,
    LARGEST_SIDE,
    Settings,
    check_limits,
    parse,
    section,
    short,
)
from minwurst.edge import export, files, lora_file, models, run_file
from minwurst.edge.decoders import FullDecoder, announce_sizes, latent_shape
from minwurst.edge.grids import grid
from minwurst.run.validation import EvaluationModel, generate_latents
from minwurst.step import adapter, distributed, randomness
from minwurst.step.encoders import Encoders
from minwurst.step.optimizer import NoEMA

PRIOR, DECODER = "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"
what, model, how = map(section, ("What to generate", "Model", "How"))


@dataclasses.dataclass
class SampleSettings:
    """The settings of `python -m minwurst.sample`."""

    prompt: list = what(None, "Prompts to generate images for.", nargs="+")
    prompt_file: str = what(
        None,
        "File of further prompts, one per line. A prompt, here and on the command line, may end in "
        "--width 1536 --height 1024 and --seed 3, which override these flags.",
    )
    num_images: int = what(1, "Images per prompt.", at_least=1)
    seed: int = what(None, "Random seed. Default: the run's, else 0.", at_least=0)
    output: str = what(
        None,
        "File to write. With several images, this is the grid, and the images are numbered files "
        "beside it. Default: new files, named by the prompts, and grid.png, in samples/ in the "
        "run's folder; if the model is not of a run, in the working directory.",
    )

    demo: bool = model(False, DEMO_HELP)
    prior: str = model(
        None,
        "Folder or Hub repository of the prior, or the --output_dir of a run. Default: the prior "
        "of --lora's run, else warp-ai/wuerstchen-prior.",
    )
    lora: str = model(
        None, "LoRA: a file, a folder, a Hub repository, or the --output_dir of a run."
    )
    lora_scale: list = model(
        (1.0,), "Strengths of the LoRA; every image is generated once for each.", nargs="+",
        type=float,
    )  # fmt: skip
    decoder: str = model(
        None,
        "Folder or Hub repository of the decoder. Default: the run's or the one in the prior's "
        "folder, else warp-ai/wuerstchen.",
    )
    cache_dir: str = model(None, "Folder for downloaded models.")

    resolution: int = how(
        None,
        "As in training: 768 gives 1024 pixels. Default: the run's, or what the prior's folder "
        "says, else 768.",
        at_least=32,
        at_most=LARGEST_SIDE,
    )
    width: int = how(
        None, "Width of the images in pixels, instead of --resolution; --height goes with it."
    )
    height: int = how(None, "Height of the images in pixels.")
    guidance_scale: float = how(
        None,
        "Strength of classifier-free guidance: how much to exaggerate the prompt. 1 is off. "
        "Default: the run's, or what the prior's folder says, else 4.",
    )
    mixed_precision: str = how(
        None,
        "Data type of the forward passes. Default: on a GPU the run's, else bf16; no on a CPU.",
        choices=("no", "fp16", "bf16"),
    )

    def check(self):
        """Raise UserError for values that can't be used."""
        check_limits(self)
        if self.prompt_file:
            lines = prompts.read(self.prompt_file, "prompt_file")
            self.prompt, self.prompt_file = [*(self.prompt or []), *lines], None
        if not self.prompt:
            raise UserError("--prompt is missing.")
        prompts.check_size(self.width, self.height)
        self.prompts()
        if not self.lora and self.lora_scale != SampleSettings.lora_scale:
            raise UserError("--lora_scale needs a --lora.")
        if self.output is not None and Path(self.output).suffix != ".png":
            raise UserError(f"--output {self.output}: the name must end in .png.")
        if self.output is not None and Path(self.output).is_dir():
            raise UserError(f"--output {self.output}: this is a folder.")

    def prompts(self):
        """The prompts as `Prompt`s, completed with --seed, --width and --height."""
        completed = []
        for prompt in map(prompts.Prompt.of, self.prompt):
            size = (prompt.width, prompt.height) if prompt.width else (self.width, self.height)
            seed = self.seed if prompt.seed is None else prompt.seed
            own = {"width": size[0], "height": size[1], "seed": seed}
            completed.append(dataclasses.replace(prompt, **own))
        return completed


@dataclasses.dataclass
class Found:
    """What there is to sample with: folders, and side, that of the latents by default."""

    prior: Path
    text: Path
    decoder: Path
    lora: str | None
    side: int


def find(settings, known):
    """Find and check all parts, before anything large is loaded; a UserError begins with its flag.

    known: the settings of the run that is sampled from, or {}.
    """
    lora = None
    if settings.lora:
        with blame("--lora", settings.lora):
            if (Path(settings.lora) / export.FOLDER).is_dir():
                raise UserError(f"it contains no LoRA but a prior: give --prior {settings.lora}.")
            lora = models.locate_lora(settings.lora, settings.cache_dir)
            lora_file.read(lora)
    name = settings.prior or known.get(PRIOR) or getattr(Settings, PRIOR)
    with blame("--prior", name):
        if (Path(name) / lora_file.FILE).is_file() and not (Path(name) / "prior").is_dir():
            raise UserError(f"it contains no prior but a LoRA: give --lora {name}.")
        advice = "" if settings.prior or not known else " The run has trained from this one."
        prior = models.locate("--prior", name, settings.cache_dir, advice)
        text = models.text_folder(prior, settings.cache_dir, "--prior")
        models.check_parts(prior, text)
        own = own_parts(prior)
    of_run = {"decoder": known.get(DECODER), **{name: known.get(name) for name in SAID}}
    # A prior on the command line may be another than the run's.
    first, second = (own, of_run) if settings.prior else (of_run, own)
    name = settings.decoder or first.get("decoder") or second.get("decoder")
    name = name or getattr(Settings, DECODER)
    with blame("--decoder", name):
        decoder = models.locate("--decoder", name, settings.cache_dir)
        models.check_decoder(decoder)
    for said in SAID:
        choices = getattr(settings, said), first.get(said), second.get(said)
        chosen = [value for value in choices if value is not None]
        setattr(settings, said, [*chosen, getattr(Settings, said)][0])
    return Found(prior, text, decoder, lora, settings.resolution // 32)


def new_file(folder, name):
    """A .png file that does not exist yet."""
    names = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(2)))
    return next(file for name in names if not (file := folder / f"{name}.png").exists())


def name_of(prompt, scale):
    """Of an image's file: its prompt, and the strength of the LoRA."""
    name = re.sub(r"\W+", "_", prompt.text.lower()).strip("_")[:40] or "image"
    return name if scale is None else f"{name}-{scale:g}"


def main(settings):
    """Generate and write the images, and print where they are."""
    device = distributed.start()
    for note in settings.notes:
        say(note)
    run = run_file.folder_of(settings.lora) or run_file.folder_of(settings.prior)
    known = run_file.read(run)["settings"] if run else {}
    if settings.seed is None:
        settings.seed = known.get("seed") or 0
    folder = Path(settings.output).parent if settings.output else (run or Path()) / "samples"
    files.make_folder(folder, "output")
    found = find(settings, known)
    check_limits(settings)  # what the run and the folder say, too
    say(f"seed {settings.seed}, guidance {settings.guidance_scale:g}, from {short(found.prior)}")
    announce_sizes(FullDecoder, settings.prompts(), found.side)

    # ---- Text, prior, latents.
    usual = known.get("mixed_precision", "bf16") if device.type == "cuda" else "no"
    precision = settings.mixed_precision or usual
    compute_type = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    autocast = torch.autocast(device.type, compute_type, enabled=precision != "no")
    encoders = Encoders(
        lambda: models.load_text(found.text, compute_type), None, compute_type, device
    )
    with blame("--prior", found.prior):
        encoders.add_prompts([prompt.text for prompt in settings.prompts()])
        encoders.unload()
        prior = models.load_prior(found.prior, compute_type, as_trained=not found.lora).to(device)
    if found.lora:
        with blame("--lora", found.lora):
            lora_file.load(prior, found.lora)
    generator = EvaluationModel(prior, NoEMA(), autocast)
    wanted = [
        (scale, prompt, number)
        for prompt in settings.prompts()
        for number in range(settings.num_images)
        for scale in (settings.lora_scale if found.lora else [None])
    ]
    latents = []
    with generator.active():
        for scale, prompt, number in progress(wanted, "images"):  # one by one, to save memory
            if scale is not None:
                adapter.set_scale(prior, scale)
            shape = prior.config.c_in, *latent_shape(FullDecoder, prompt, found.side)
            latents.append(generate_latents(
                generator, encoders.prompts[prompt.text], shape, seed=prompt.seed,
                key=randomness.image_key(prompt.text, number), guidance=settings.guidance_scale,
            ))  # fmt: skip
            if not latents[-1].isfinite().all():
                raise UserError(
                    f"The image of “{prompt.text[:40]}” has numbers that are not finite. Lower "
                    "--guidance_scale or --lora_scale, or use --mixed_precision=no."
                )
    del prior, generator  # to make room for the decoder

    # ---- Images.
    with blame("--decoder", found.decoder):
        decode = FullDecoder(found.decoder, device, half=precision != "no")
    images = []
    with decode.on_device():
        for (_, prompt, number), x in zip(wanted, latents, strict=True):
            key = randomness.image_key(prompt.text, number)
            images.append(decode(x, prompt.text, randomness.decoding_generator(prompt.seed, key)))
    try:
        write(images, wanted, settings, folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {settings.output or folder}: {files.reason(error)}") from None


def write(images, wanted, settings, folder):
    """Write the images and, if there are several, their grid; one row per image and its scales."""
    several, output, written = len(images) > 1, Path(settings.output or ""), []
    for image, (scale, prompt, number) in zip(images, wanted, strict=True):
        info = PngInfo()  # how the image was made
        made = {"prompt": prompt.text, "number": number, "lora_scale": scale, "seed": prompt.seed}
        info.add_itxt("minwurst", json.dumps(made, ensure_ascii=False))
        file = new_file(folder, name_of(prompt, scale))
        if settings.output:
            file = output.with_stem(f"{output.stem}-{len(written) + 1}") if several else output
        image.save(file, pnginfo=info)
        written.append(str(file))
    if several:
        captions = [
            prompt.line if scale is None else f"{prompt.line}, LoRA {scale:g}"
            for scale, prompt, _ in wanted
        ]
        scales = len(settings.lora_scale)
        written.insert(0, str(output if settings.output else new_file(folder, "grid")))
        grid(images, captions, columns=scales if scales > 1 else 4).save(written[0])
    print("\n".join(written))


if __name__ == "__main__":
    with one_line("minwurst.sample"):
        main(parse(SampleSettings, demo=miniature.SAMPLE, prog="python -m minwurst.sample"))
