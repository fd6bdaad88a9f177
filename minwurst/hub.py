"""Sharing the result: a folder every diffusers can load, a model card, one commit to the Hub.

    export_prior(output_dir / "prior_pipeline", prior, text_folder)

    python -m minwurst.hub OUTPUT_DIR owner/name        # push what a run left, at any time

`prior_pipeline/` holds the fine-tuned prior and the base's text encoder and tokenizer, byte for
byte. Its model_index.json names the parts as the Hub's own repositories do, under the library name
"wuerstchen"; what diffusers' save_pretrained would write there does not load again.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import diffusers
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP library's own, of which there are two: httpx and httpx2
    OfflineModeIsEnabled,
)

from minwurst import lora, models, report
from minwurst.checkpoint import put_in_place
from minwurst.config import LoRASettings, Settings, UserError
from minwurst.pictures import FullDecoder
from minwurst.validation import Draw

PARTS = ("prior", "text_encoder", "tokenizer", "scheduler")
WAITS = (2, 10, 30, 60)  # seconds between tries


def export_prior(folder, prior, text_folder):
    """Write the pipeline's folder whole or not at all; an earlier one is replaced.

    prior: the fine-tuned network. text_folder: where the base's text encoder and tokenizer lie.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    prior.save_pretrained(draft / "prior")
    for part in ("text_encoder", "tokenizer"):
        (draft / part).mkdir()
        for pattern in models.PATTERNS:
            for file in (Path(text_folder) / part).glob(pattern):
                shutil.copyfile(file, draft / part / file.name)
    diffusers.DDPMWuerstchenScheduler().save_pretrained(draft / "scheduler")
    index = {
        "_class_name": "WuerstchenPriorPipeline",
        "_diffusers_version": diffusers.__version__,
        "latent_mean": 42.0,
        "latent_std": 1.0,
        "resolution_multiple": 42.67,
        "prior": ["wuerstchen", "WuerstchenPrior"],
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    put_in_place(draft, folder)


def make_repository(name, private=False, token=None):
    """Make a model repository, or find one's own of this name. Returns its full name.

    token: None takes HF_TOKEN or what `hf auth login` left. UserError says why it can't be pushed
    to: no login, a wrong token, one that only reads, somebody else's repository.
    """
    if not (token or huggingface_hub.get_token()):
        raise UserError("The Hub knows no login here. Run `hf auth login`, or set HF_TOKEN.")
    api = huggingface_hub.HfApi(token=token)
    try:
        user = tried(api.whoami)
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        owner = name.split("/")[0] if "/" in name else user["name"]
        if owner not in owners:  # an existing one would be found, and refuse the upload at the end
            raise UserError(
                f"--hub_model_id {name} is somebody else's: you can push to {', '.join(owners)}."
            )
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError("The Hub's token can only read. Make one that can write.")
        made = tried(lambda: api.create_repo(name, private=private or None, exist_ok=True))
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {name} is no name for a repository: {error}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"--push_to_hub: {reason(error)}") from None
    return made.repo_id


def tried(call):
    """call(); again after a while where the Hub is busy (429), failing (5xx) or out of reach."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 599
            hopeless = status < 500 and status != 429 or isinstance(error, OfflineModeIsEnabled)
            if hopeless or wait is None:
                raise
            report.say(f"The Hub: {reason(error)} Trying again in {wait} s.")
            time.sleep(wait)


def reason(error):
    """What went wrong between us and the Hub, in a line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "The Hub does not know this token. Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "The Hub does not let this token write there."
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def share(settings):
    """Push what a run left in its output folder, where --push_to_hub asks for it."""
    if settings.push_to_hub:
        push(settings.output_dir, settings.hub_model_id, settings.hub_token)


def push(folder, repository, token=None):
    """Upload a run's result, its card and its pictures in one commit.

    folder: the run's output folder. UserError, with the command that tries again, where it fails.
    """
    folder = Path(folder)
    files = results(folder)
    operations = [huggingface_hub.CommitOperationAdd(path, file) for path, file in files.items()]
    text = card(folder, repository, files).encode()
    operations.append(huggingface_hub.CommitOperationAdd("README.md", text))
    api = huggingface_hub.HfApi(token=token)
    summary = f"{len(files)} files of a prior fine-tuned with minwurst"
    try:
        done = tried(lambda: api.create_commit(repository, operations, commit_message=summary))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Not pushed to {repository}: {reason(error)} The result is safe in {folder}. Push it "
            f"again with: python -m minwurst.hub {folder} {repository}"
        ) from None
    report.say(f"pushed: {done.repo_url}")


def results(folder):
    """{path in the repository: file here}: all that is ever uploaded, besides the card."""
    pipeline = folder / "prior_pipeline"
    wanted = [pipeline / "model_index.json"]
    for part in PARTS:
        wanted += [file for p in models.PATTERNS for file in sorted((pipeline / part).glob(p))]
    files = {str(file.relative_to(pipeline)): file for file in wanted if file.is_file()}
    if (folder / lora.FILE).is_file():
        files[lora.FILE] = folder / lora.FILE
    if not files:
        raise UserError(
            f"{folder} holds no result: neither prior_pipeline/ nor {lora.FILE}. Name the "
            "--output_dir of a run that is done."
        )
    if (folder / "validation" / Draw.BOTH).is_file():
        files[Draw.BOTH] = folder / "validation" / Draw.BOTH
    return files


CARD = """---
{metadata}
---

# {name}

{what} the prior (Stage C) of [Würstchen v2](https://huggingface.co/papers/2306.00637), from
{base} on, trained with minwurst on {data}.

{pictures}

## Use

```python
{snippet}
```

## Training

{steps} steps of {global_batch} pictures on {device}, with torch {torch} and diffusers {diffusers}.

| setting | value |
|---|---|
{settings}
"""

# Part by part, because no Würstchen pipeline loads as a whole since diffusers 0.38.
SNIPPET = """import sys

import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from transformers import CLIPTextModel, CLIPTokenizerFast

stage_c = sys.modules[WuerstchenPriorPipeline.__module__]
stages_b_and_a = sys.modules[WuerstchenDecoderPipeline.__module__]
prior = WuerstchenPriorPipeline(
    prior=stage_c.WuerstchenPrior.from_pretrained("{prior}", subfolder={subfolder}),
    text_encoder=CLIPTextModel.from_pretrained("{text}", subfolder="text_encoder"),
    tokenizer=CLIPTokenizerFast.from_pretrained("{text}", subfolder="tokenizer"),
    scheduler=DDPMWuerstchenScheduler(),
)
{lora}decoder = WuerstchenDecoderPipeline(
    decoder=stages_b_and_a.WuerstchenDiffNeXt.from_pretrained("{decoder}", subfolder="decoder"),
    vqgan=stages_b_and_a.PaellaVQModel.from_pretrained("{decoder}", subfolder="vqgan"),
    text_encoder=CLIPTextModel.from_pretrained("{decoder}", subfolder="text_encoder"),
    tokenizer=CLIPTokenizerFast.from_pretrained("{decoder}", subfolder="tokenizer"),
    scheduler=DDPMWuerstchenScheduler(),
)
if torch.cuda.is_available():
    prior.to("cuda", torch.float16), decoder.to("cuda", torch.float16)

prompt = {prompt!r}
times = stage_c.DEFAULT_STAGE_C_TIMESTEPS
latents = prior(prompt, {side}, {side}, timesteps=times, guidance_scale=4.0).image_embeddings
decoder(latents, prompt).images[0].save("picture.png")"""

LORA_LINE = """# The next line needs PEFT: pip install peft
prior.load_lora_weights("{repository}", weight_name="{file}")
"""

# Settings the card always names, and those it never does: places, logs and the upload itself.
ALWAYS = {"resolution", "learning_rate", "train_batch_size", "mixed_precision", "seed"}
NEVER = {
    "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path",
    "image_encoder_name_or_path", "dataset_name", "train_data_dir", "lora_weights", "output_dir",
    "cache_dir", "logging_dir", "logging_steps", "report_to", "tracker_project_name",
    "validation_prompts", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private",
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit",
    "dataloader_num_workers",
}  # fmt: skip


def card(folder, repository, files):
    """The model card for what `results` found: metadata, pictures, how to use it, settings."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    settings = run["settings"]
    base, data = settings["pretrained_prior_model_name_or_path"], settings["dataset_name"]
    adapter = lora.FILE in files
    metadata = huggingface_hub.ModelCardData(
        license="mit" if base.startswith("warp-ai/") else None,
        base_model=base if on_the_hub(base) else None,
        datasets=[data] if on_the_hub(data) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["wuerstchen", "minwurst", *(["lora"] if adapter else [])],
    )
    prompts = settings["validation_prompts"] or ["a bear"]
    listed = "; ".join(f"“{' '.join(prompt.split())}”" for prompt in prompts)
    defaults = {field.name: field.default for field in dataclasses.fields(LoRASettings)}
    told = {
        name: value
        for name, value in settings.items()
        if name in ALWAYS or name not in NEVER and value not in (defaults[name], None)
    }
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=repository.split("/")[-1],
        what=f"A LoRA of rank {settings['rank']} for" if adapter else "All weights of",
        base=f"`{base}`" if on_the_hub(base) else "a base that is not on the Hub",
        data=f"`{data}`" if on_the_hub(data) else "captioned pictures",
        pictures=f"![before and after training]({Draw.BOTH})\n\nPrompts: {listed}"
        if Draw.BOTH in files
        else "",
        snippet=snippet(repository, settings, prompts[0], adapter),
        settings="\n".join(f"| {name} | {value} |" for name, value in told.items()),
        global_batch=run["identity"]["global_batch"],
        steps=run["steps"],
        **{name: run["starts"][-1][name] for name in ("device", "torch", "diffusers")},
    )


def on_the_hub(name):
    """Whether a name is a repository's and no folder's."""
    return bool(name) and not Path(name).exists() and name.count("/") == 1


def snippet(repository, settings, prompt, adapter):
    """Python that draws a picture with what was pushed; it needs diffusers, not this project."""
    base = settings["pretrained_prior_model_name_or_path"]
    decoder = settings["pretrained_decoder_model_name_or_path"]
    named = base if on_the_hub(base) else "THE/BASE"  # a folder's name is nobody's business
    alone = adapter and models.is_prior_alone(models.locate("prior", base, settings["cache_dir"]))
    side = int(FullDecoder.cells(settings["resolution"] // 32) * 42.67)
    return SNIPPET.format(
        prior=named if adapter else repository,
        subfolder="None" if alone else '"prior"',
        text=models.COMPLETE if alone else named if adapter else repository,
        lora=LORA_LINE.format(repository=repository, file=lora.FILE) if adapter else "",
        decoder=decoder if on_the_hub(decoder) else Settings.pretrained_decoder_model_name_or_path,
        prompt=prompt,
        side=side,
    )


def main():
    """`python -m minwurst.hub`: see the top of this page."""
    parser = argparse.ArgumentParser(prog="python -m minwurst.hub", allow_abbrev=False)
    parser.add_argument("folder", help="the --output_dir of a run that is done")
    parser.add_argument("repository", help="owner/name on the Hub, or a name under your account")
    parser.add_argument("--private", action="store_true", help="private, where it has to be made")
    given = parser.parse_args()
    try:
        results(Path(given.folder))
        push(given.folder, make_repository(given.repository, given.private))
    except UserError as error:
        sys.exit(f"minwurst.hub: {error}")


if __name__ == "__main__":
    main()
