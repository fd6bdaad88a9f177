"""The model card of a result: metadata, images, a snippet that generates an image, settings."""

import huggingface_hub

from minwurst.base.prompts import Prompt
from minwurst.base.settings import LoRASettings, facts_of, public
from minwurst.edge import lora_file, models
from minwurst.edge.decoders import PIXELS, FullDecoder
from minwurst.edge.grids import BEFORE_AFTER

CARD = """---
{metadata}
---

# {name}

{what} the prior (Stage C) of [Würstchen v2](https://huggingface.co/papers/2306.00637), trained with
minwurst on {data}. It {start}.{decoder}

{images}

## Use

```python
{snippet}
```

## Training

Steps: {steps}, with {global_batch} images each{rows}, on {device}, with torch {torch} and diffusers
{diffusers}.{loss}

| setting | value |
|---|---|
{settings}
"""

SNIPPET = """# It loads part by part: since diffusers 0.38, no Würstchen pipeline loads as a whole.
import inspect

import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from transformers import CLIPTextModel, CLIPTokenizerFast

stage_c = inspect.getmodule(WuerstchenPriorPipeline)
stages_b_and_a = inspect.getmodule(WuerstchenDecoderPipeline)
prior = WuerstchenPriorPipeline(
    prior=stage_c.WuerstchenPrior.from_pretrained("{prior}", subfolder={subfolder}),
    text_encoder=CLIPTextModel.from_pretrained("{text}", subfolder="text_encoder"),
    tokenizer=CLIPTokenizerFast.from_pretrained("{text}", subfolder="tokenizer"),
    scheduler=DDPMWuerstchenScheduler(),
)
{lora}{replace}decoder = WuerstchenDecoderPipeline(
    decoder=stages_b_and_a.WuerstchenDiffNeXt.from_pretrained("{decoder}", subfolder="decoder"),
    vqgan=stages_b_and_a.PaellaVQModel.from_pretrained("{decoder}", subfolder="vqgan"),
    text_encoder=CLIPTextModel.from_pretrained("{decoder}", subfolder="text_encoder"),
    tokenizer=CLIPTokenizerFast.from_pretrained("{decoder}", subfolder="tokenizer"),
    scheduler=DDPMWuerstchenScheduler(),
)
place = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
prior.to(*place), decoder.to(*place)

prompt = {prompt!r}
times = stage_c.DEFAULT_STAGE_C_TIMESTEPS
found = prior(prompt, {height}, {width}, timesteps=times, guidance_scale={guidance})
decoder(found.image_embeddings, prompt).images[0].save("picture.png")"""

NO_SNIPPET = """# It predicts {prediction_type}, which diffusers can't sample. With minwurst:
# python -m minwurst.sample --prompt "a bear" --{kind} {repository}"""

LORA_LINE = """{advice}# The next line needs PEFT: pip install peft
prior.load_lora_weights("{repository}", weight_name="{file}")
"""


def card(run, repository, files):
    """The card's text. run: as run_file.read gives it. files: as push.results gives them."""
    settings, base, data = run["settings"], run["published"]["base"], run["published"]["data"]
    is_lora, from_scratch = lora_file.FILE in files, settings.get("from_scratch")
    kind = "DoRA" if settings.get("use_dora") else "LoRA"
    metadata = huggingface_hub.ModelCardData(
        license="mit" if (base or "").startswith("warp-ai/") and not from_scratch else None,
        base_model=None if from_scratch else base,
        datasets=[data] if data else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["wuerstchen", "minwurst", *(["lora"] if is_lora else [])],
    )
    prompts = settings["validation_prompts"] or ["a bear"]
    listed = "; ".join(f"“{' '.join(prompt.split())}”" for prompt in prompts)
    defaults, allowed = public(LoRASettings()), facts_of(LoRASettings, "in_card")
    shown = {
        name: value
        for name, value in settings.items()
        if allowed.get(name) == "always"
        or allowed.get(name) and value not in (defaults[name], None)
    }
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=repository.split("/")[-1],
        what=f"A {kind} of rank {settings['rank']} for" if is_lora else "All weights of",
        start="was trained from scratch"
        if from_scratch
        else f"started from `{base}`"
        if base
        else "started from a base that is not on the Hub",
        decoder="" if run["published"]["decoder"] else " Its decoder is not on the Hub.",
        data=f"`{data}`" if data else "captioned images",
        images=f"![before and after training]({BEFORE_AFTER})\n\nPrompts: {listed}"
        if BEFORE_AFTER in files
        else "",
        snippet=snippet(repository, run, Prompt.of(prompts[0]), is_lora)
        if run["prediction_type"] == "epsilon"
        else NO_SNIPPET.format(kind="lora" if is_lora else "prior", repository=repository, **run),
        settings="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
        global_batch=run["identity"]["global_batch"],
        rows=f", out of {run['images']:,}" if run["images"] else "",
        loss=held_out(run["result"]),
        steps=run["steps"],
        **{name: run["starts"][-1][name] for name in ("device", "torch", "diffusers")},
    )


def held_out(result):
    """A sentence about the loss on held-out rows, or "" where there were none."""
    final, lowest = result.get("validation_loss"), result.get("lowest_validation_loss")
    if not isinstance(final, int | float):
        return ""
    best = f" (lowest: {lowest:.4f})" if isinstance(lowest, int | float) else ""
    return f"\nLoss on held-out images: {final:.4f}{best}; predicting zero noise gives 1."


def snippet(repository, run, prompt, is_lora):
    """Python that generates an image with the pushed result; it needs diffusers, not minwurst."""
    names = run["published"]
    base, alone = names["base"] or "THE/BASE", is_lora and names["prior_alone"]
    side = int(FullDecoder.latent_size(run["settings"]["resolution"] // 32) * PIXELS)
    advice = "" if names["base"] else "# Replace THE/BASE by the base's repository or folder.\n"
    decoder = names["decoder"] or "THE/DECODER"
    return SNIPPET.format(
        prior=base if is_lora else repository,
        subfolder="None" if alone else '"prior"',
        text=models.COMPLETE if alone else base if is_lora else repository,
        lora=LORA_LINE.format(repository=repository, file=lora_file.FILE, advice=advice)
        if is_lora
        else "",
        decoder=decoder,
        replace=""
        if names["decoder"]
        else f"# Replace {decoder} by the decoder's repository or folder.\n",
        prompt=prompt.text,
        guidance=run["settings"].get("guidance_scale", 4.0),
        height=prompt.height or side,
        width=prompt.width or side,
    )
