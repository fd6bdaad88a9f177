"""Generate images from prompts: with the base, a fine-tuned prior, or a LoRA at several strengths.

    python -m minwurst.sample --prompt "a bear" "a car" --prior runs/demo --output bear.png
    python -m minwurst.sample --prompt "a bear" --lora runs/demo-lora --lora_scale 0 0.5 1

An image depends on its prompt, its number and the seed, and not on the other images. With a run's
seed, the first image of a prompt is the one that validation generates.
"""

import dataclasses
import json
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

from minwurst import miniature
from minwurst.base import prompts
from minwurst.base.console import progress, say
from minwurst.base.errors import UserError, one_line
from minwurst.base.settings import DEMO_HELP, LARGEST_SIDE, Settings, check_limits, parse, section
from minwurst.edge import files, lora_file, models, run_file
from minwurst.edge.decoders import PIXELS, FullDecoder, latent_shape
from minwurst.edge.grids import grid
from minwurst.run.validation import EvaluationModel, generate_latents
from minwurst.step import adapter, distributed, randomness
from minwurst.step.encoders import Encoders
from minwurst.step.optimizer import NoEMA

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
    seed: int = what(0, "Random seed.", at_least=0)
    output: str = what(
        "pictures.png",
        "File to write. With several images, this is the grid, and the images are numbered files "
        "beside it.",
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
        "Folder or Hub repository of the decoder. Default: the run's, else warp-ai/wuerstchen.",
    )
    cache_dir: str = model(None, "Folder for downloaded models.")

    resolution: int = how(
        None, "As in training: 768 gives 1024 pixels. Default: the run's, else 768.", at_least=32,
        at_most=LARGEST_SIDE,
    )
    width: int = how(
        None, "Width of the images in pixels, instead of --resolution; --height goes with it."
    )
    height: int = how(None, "Height of the images in pixels.")
    guidance_scale: float = how(
        4.0, "Strength of classifier-free guidance: how much to exaggerate the prompt. 1 is off."
    )
    mixed_precision: str = how(
        None,
        "Data type of the forward passes. Default: bf16 on a GPU, no on a CPU.",
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
        if Path(self.output).suffix != ".png":
            raise UserError(f"--output {self.output}: the name must end in .png.")
        if Path(self.output).is_dir():
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


def settings_of_run(path):
    """The settings of the run whose output folder, or file in it, this is; {} if it is none."""
    if not path:
        return {}
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    if not (folder / run_file.FILE).is_file():
        return {}
    return run_file.read(folder)["settings"]


def main(settings):
    """Generate and write the images, and print where they are."""
    device = distributed.start()
    files.make_folder(Path(settings.output).parent, "output")
    known = settings_of_run(settings.lora or settings.prior)

    def setting(name, flag):
        """The command line's value, else the run's, else train.py's default."""
        return getattr(settings, flag) or known.get(name) or getattr(Settings, name)

    # ---- Everything is found and checked before anything large is loaded.
    prior_name = setting("pretrained_prior_model_name_or_path", "prior")
    if (Path(prior_name) / "prior_pipeline").is_dir():
        prior_name = Path(prior_name) / "prior_pipeline"
    prior_folder = models.locate("prior", str(prior_name), settings.cache_dir)
    text_folder = models.text_folder(prior_folder, settings.cache_dir)
    models.check_parts(prior_folder, text_folder)
    decoder = setting("pretrained_decoder_model_name_or_path", "decoder")
    decoder_folder = models.locate("decoder", decoder, settings.cache_dir)
    models.check_decoder(decoder_folder)
    lora = settings.lora and models.locate_lora(settings.lora, settings.cache_dir)
    if lora:
        lora_file.read(lora)
    settings.resolution = setting("resolution", "resolution")
    check_limits(settings)  # of a run, too
    trained = settings.resolution // 32
    for prompt in settings.prompts():
        height, width = latent_shape(FullDecoder, prompt, trained)
        asked = (prompt.height, prompt.width) if prompt.height else (trained * PIXELS,) * 2
        made = height * PIXELS, width * PIXELS
        if any(abs(one - other) > 2 for one, other in zip(asked, made, strict=True)):
            say(f"“{prompt.line}” is generated at about {made[1]:.0f}×{made[0]:.0f} pixels.")

    # ---- Text, prior, latents.
    precision = settings.mixed_precision or ("bf16" if device.type == "cuda" else "no")
    compute_type = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    autocast = torch.autocast(device.type, compute_type, enabled=precision != "no")
    encoders = Encoders(
        lambda: models.load_text(text_folder, compute_type), None, compute_type, device
    )
    encoders.add_prompts([prompt.text for prompt in settings.prompts()])
    encoders.unload()
    prior = models.load_prior(prior_folder, compute_type, as_trained=not lora).to(device)
    if lora:
        lora_file.load(prior, lora)
    generator = EvaluationModel(prior, NoEMA(), autocast)
    wanted = [
        (scale, prompt, number)
        for prompt in settings.prompts()
        for number in range(settings.num_images)
        for scale in (settings.lora_scale if lora else [None])
    ]
    latents = []
    with generator.active():
        for scale, prompt, number in progress(wanted, "images"):  # one by one, to save memory
            if scale is not None:
                adapter.set_scale(prior, scale)
            shape = prior.config.c_in, *latent_shape(FullDecoder, prompt, trained)
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
    decode = FullDecoder(decoder_folder, device, half=precision != "no")
    images = []
    with decode.on_device():
        for (_, prompt, number), x in zip(wanted, latents, strict=True):
            key = randomness.image_key(prompt.text, number)
            images.append(decode(x, prompt.text, randomness.decoding_generator(prompt.seed, key)))
    try:
        write(images, wanted, settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {settings.output}: {files.reason(error)}") from None


def write(images, wanted, settings):
    """Write the images and, if there are several, their grid; one row per image and its scales."""
    output = Path(settings.output)
    names = [output]
    if len(images) > 1:
        names = [output.with_stem(f"{output.stem}-{n}") for n in range(1, len(images) + 1)]
        captions = [
            prompt.line if scale is None else f"{prompt.line} · LoRA {scale:g}"
            for scale, prompt, _ in wanted
        ]
        scales = len(settings.lora_scale)
        grid(images, captions, columns=scales if scales > 1 else 4).save(output)
    for image, name, (scale, prompt, number) in zip(images, names, wanted, strict=True):
        info = PngInfo()  # how the image was made
        made = {"prompt": prompt.text, "number": number, "lora_scale": scale, "seed": prompt.seed}
        info.add_itxt("minwurst", json.dumps(made, ensure_ascii=False))
        image.save(name, pnginfo=info)
    print(f"{output}" + (f", {names[0].name} to {names[-1].name}" if len(images) > 1 else ""))


if __name__ == "__main__":
    with one_line("minwurst.sample"):
        main(parse(SampleSettings, demo=miniature.SAMPLE))
