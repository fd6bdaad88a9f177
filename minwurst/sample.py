"""Pictures from prompts: from the base, a fine-tuned prior, or a LoRA at several scales.

    python -m minwurst.sample --prompt "a bear" "a car" --prior runs/demo --output bear.png
    python -m minwurst.sample --prompt "a bear" --lora runs/demo-lora --lora_scale 0 0.5 1

A picture depends on its prompt, its number and the seed, and on nothing that is drawn beside it.
With a run's seed, a prompt's first picture is the one that validation drew for it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import ClassVar

import torch
from PIL.PngImagePlugin import PngInfo

from minwurst import checkpoint, config, dist, draws, hub, lora, models, pictures, pipelines, report
from minwurst.config import Settings, UserError, demo_setting, setting
from minwurst.miniature import SAMPLE
from minwurst.validation import draw_latents


@dataclasses.dataclass
class SampleSettings:
    """The settings of `python -m minwurst.sample`."""

    DEMO: ClassVar = SAMPLE
    demo: bool = demo_setting()
    prompt: list = setting(None, "What to draw; several prompts are allowed.", nargs="+")
    prior: str = setting(
        None,
        "Folder or Hub repository of the prior, or a run's --output_dir. By default the run's that "
        "--lora names, else warp-ai/wuerstchen-prior.",
    )
    lora: str = setting(
        None, "A LoRA's file, folder or Hub repository, or a run's --output_dir."
    )
    lora_scale: list = setting(
        (1.0,), "How much of the LoRA; several draw every picture so often.", nargs="+", type=float
    )
    decoder: str = setting(
        None,
        "Folder or Hub repository of the decoder. By default the run's, else warp-ai/wuerstchen.",
    )
    resolution: int = setting(
        None, "As in training: 768 gives 1024 pixels. By default the run's, else 768."
    )
    seed: int = setting(0, "Which of all possible pictures.")
    num_images: int = setting(1, "Pictures a prompt.")
    guidance_scale: float = setting(
        4.0, "How far towards the prompt, and beyond; 1 is no guidance."
    )
    mixed_precision: str = setting(
        None,
        "Type of the forward passes. By default bf16 on a GPU, no on a CPU.",
        choices=("no", "fp16", "bf16"),
    )
    output: str = setting(
        "pictures.png",
        "The file to write; of several pictures it is the grid, and they lie beside it, numbered.",
    )
    cache_dir: str = setting(None, "Where downloaded models are kept.")

    def check(self):
        """Raise UserError for values that can't be used."""
        if not self.prompt:
            raise UserError("--prompt is missing: say what to draw.")
        if self.num_images < 1:
            raise UserError(f"--num_images is {self.num_images}; it must be at least 1.")
        if self.resolution is not None and self.resolution < 32:
            raise UserError(f"--resolution is {self.resolution}; it must be at least 32.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be at least 0.")
        if not self.lora and self.lora_scale != SampleSettings.lora_scale:
            raise UserError("--lora_scale needs a --lora.")
        if not self.output.endswith(".png"):
            raise UserError(f"--output {self.output}: its name must end in .png.")


def of_a_run(place):
    """The settings of the run whose output folder, or file in it, this is; {} where it is none."""
    if not place:
        return {}
    folder = Path(place).parent if Path(place).is_file() else Path(place)
    file = folder / "run.json"
    return hub.read_run(folder)["settings"] if file.is_file() else {}


def main(settings):
    """Draw, write, and say where."""
    device = dist.start()[2]
    checkpoint.make_folder(Path(settings.output).parent, "output")
    known = of_a_run(settings.lora or settings.prior)

    def given(name, flag):
        """The command line's value, else the run's, else train.py's default."""
        return getattr(settings, flag) or known.get(name) or getattr(Settings, name)

    prior_name = given("pretrained_prior_model_name_or_path", "prior")
    if (Path(prior_name) / "prior_pipeline").is_dir():
        prior_name = Path(prior_name) / "prior_pipeline"
    prior_folder = models.locate("prior", str(prior_name), settings.cache_dir)
    text_folder = models.text_folder(prior_folder, settings.cache_dir)
    models.check_parts(prior_folder, text_folder)
    decoder = given("pretrained_decoder_model_name_or_path", "decoder")
    decoder_folder = models.locate("decoder", decoder, settings.cache_dir)
    pipelines.check_decoder(decoder_folder)
    adapters = settings.lora and models.locate_lora(settings.lora, settings.cache_dir)
    if adapters:
        lora.read(adapters)  # a wrong path or a broken file is said before the long loading
    trained = given("resolution", "resolution") // 32
    cells = pictures.FullDecoder.cells(trained)
    if cells != trained:
        report.say(f"The decoder can't take {trained}×{trained} cells: drawing {cells}×{cells}.")

    precision = settings.mixed_precision or ("bf16" if device.type == "cuda" else "no")
    compute_type = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    autocast = torch.autocast(device.type, compute_type, enabled=precision != "no")
    tokenizer, text_encoder = models.load_text(text_folder, compute_type)
    models.tell_cut(tokenizer, settings.prompt)
    captions = {  # the prompt's states and the empty caption's
        prompt: models.encode_text(tokenizer, text_encoder.to(device), [prompt, ""])
        for prompt in settings.prompt
    }
    del text_encoder
    prior = models.load_prior(prior_folder, compute_type).to(device).eval()
    if settings.lora:
        lora.load(prior, adapters)

    # ---- One latent after the other: large batches would draw the same and take more memory.
    scales = settings.lora_scale if settings.lora else [None]
    wanted = [
        (scale, prompt, number)
        for prompt in settings.prompt
        for number in range(settings.num_images)
        for scale in scales
    ]
    latents = []
    for scale, prompt, number in report.progress(wanted, "pictures"):
        if scale is not None:
            lora.set_scale(prior, scale)
        latents.append(draw_latents(
            prior, autocast, captions[prompt], seed=settings.seed, cells=cells,
            place=draws.picture(prompt, number), guidance=settings.guidance_scale,
        ))  # fmt: skip
    del prior  # room for the decoder

    decode = pictures.FullDecoder(decoder_folder, device, half=precision != "no")
    drawn = []
    with decode.ready():
        for (_, prompt, number), x in zip(wanted, latents, strict=True):
            noise = draws.decoding_generator(settings.seed, draws.picture(prompt, number))
            drawn.append(decode(x, prompt, noise))
    write(drawn, wanted, settings)


def write(drawn, wanted, settings):
    """Write the pictures, and of several the grid: with several scales, side by side in a row."""
    output = Path(settings.output)
    names = [output]
    if len(drawn) > 1:
        names = [output.with_stem(f"{output.stem}-{place}") for place in range(1, len(drawn) + 1)]
        captions = [
            prompt if scale is None else f"{prompt} · LoRA {scale:g}" for scale, prompt, _ in wanted
        ]
        scales = len(settings.lora_scale)
        sheet = pictures.grid(drawn, captions, columns=scales if scales > 1 else 4)
        sheet.save(output)
    for picture, name, (scale, prompt, number) in zip(drawn, names, wanted, strict=True):
        facts = PngInfo()  # so that a picture tells how it was made
        made = {"prompt": prompt, "number": number, "lora_scale": scale, "seed": settings.seed}
        facts.add_itxt("minwurst", json.dumps(made, ensure_ascii=False))
        picture.save(name, pnginfo=facts)
    others = f", and {names[0].name} to {names[-1].name} beside it" if len(drawn) > 1 else ""
    print(f"{output}{others}")


if __name__ == "__main__":
    try:
        main(config.parse(SampleSettings))
    except UserError as error:
        sys.exit(f"minwurst.sample: {error}")
