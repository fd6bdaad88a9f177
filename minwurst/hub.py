"""Sharing the result: a folder every diffusers can load, a model card, one commit to the Hub.

    export_prior(output_dir / "prior_pipeline", prior, text_folder)

    python -m minwurst.hub OUTPUT_DIR owner/name        # push what a run left, at any time

`prior_pipeline/` holds the fine-tuned prior and the base's text encoder and tokenizer, byte for
byte. Its model_index.json names the parts as the Hub's own repositories do, under the library name
"wuerstchen"; what diffusers' save_pretrained would write there does not load again.
"""

import argparse
import json
import re
import shlex
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
from safetensors import SafetensorError

from minwurst import lora, models, report
from minwurst.checkpoint import put_in_place
from minwurst.config import LoRASettings, Settings, UserError, public
from minwurst.pictures import FullDecoder
from minwurst.validation import Draw

PARTS = ("prior", "text_encoder", "tokenizer", "scheduler")
WAITS = (2, 10, 30, 60)  # seconds between tries


def export_prior(folder, prior, text_folder):
    """Write the pipeline's folder whole or not at all, else UserError; an earlier one is replaced.

    prior: the fine-tuned network. text_folder: where the base's text encoder and tokenizer lie.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        write_pipeline(draft, prior, text_folder)
        put_in_place(draft, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"{folder} was not written: {error}. Free some space; the last checkpoint is intact, "
            "and --resume_from_checkpoint=latest writes the result from it."
        ) from None


def write_pipeline(folder, prior, text_folder):
    """The parts and their index, in a folder that is not there yet."""
    prior.save_pretrained(folder / "prior")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
        for pattern in models.PATTERNS:
            for file in (Path(text_folder) / part).glob(pattern):
                shutil.copyfile(file, folder / part / file.name)
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
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
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def clean(token):
    """The token without the blanks of the file it came from; UserError where it can be none."""
    token = (token or huggingface_hub.get_token() or "").strip()
    if not token:
        raise UserError("The Hub knows no login here. Run `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("The Hub's token holds characters that no token has. Copy it once more.")
    return token


def make_repository(name, private=False, token=None):
    """Make a model repository, or find one's own of this name. Returns its full name.

    token: None takes HF_TOKEN or what `hf auth login` left. UserError says why it can't be pushed
    to: no login, a wrong token, one that only reads, somebody else's repository.
    """
    api = huggingface_hub.HfApi(token=clean(token))
    try:
        # A foreign repository is "found" as well: only the check after it tells.
        made = tried(lambda: api.create_repo(name, private=private or None, exist_ok=True))
        tried(lambda: api.auth_check(made.repo_id, write=True))
        public = private and not tried(lambda: api.model_info(made.repo_id)).private
    except HFValidationError as error:
        raise UserError(f"{name} is no name for a repository: {error}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"No push to {name}: {reason(error)}") from None
    if public:
        raise UserError(
            f"The repository {made.repo_id} is there already, and public. Make it private on its "
            "page, name another one, or do not ask for a private one."
        )
    return made.repo_id


def tried(call):
    """call(); again after a while where the Hub is busy (429), failing (5xx) or out of reach."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 599
            here = OfflineModeIsEnabled | PermissionError | FileNotFoundError
            hopeless = status < 500 and status != 429 or isinstance(error, here)
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
        return "It is somebody else's, or the token may not write."
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError | ValueError):  # it can quote the request, token and all
        return f"{type(error).__name__} on the way to the Hub."
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
    run = read_run(folder)
    files = results(folder, run)
    text = card(run, repository, files).encode()
    summary = f"{len(files)} files of a prior fine-tuned with minwurst"
    try:
        api, add = huggingface_hub.HfApi(token=clean(token)), huggingface_hub.CommitOperationAdd
        operations = [add(path, file) for path, file in files.items()] + [add("README.md", text)]
        done = tried(lambda: api.create_commit(repository, operations, commit_message=summary))
    except (HTTPError, OSError, ValueError, UserError) as error:
        raise UserError(
            f"Not pushed to {repository}: {reason(error)} The result is safe in {folder}. Push it "
            f"again with: {shlex.join(['python', '-m', 'minwurst.hub', str(folder), repository])}"
        ) from None
    report.say(f"pushed: {done.repo_url}")


def read_run(folder):
    """What a run wrote of itself into run.json."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {key: run[key] for key in ("settings", "identity", "published", "steps", "starts")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no run's --output_dir: its run.json can't be read ({error!r})."
        ) from None


def results(folder, run):
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
    if run["settings"]["validation_prompts"] and (folder / "validation" / Draw.BOTH).is_file():
        files[Draw.BOTH] = folder / "validation" / Draw.BOTH
    return files


CARD = """---
{metadata}
---

# {name}

{what} the prior (Stage C) of [Würstchen v2](https://huggingface.co/papers/2306.00637), trained with
minwurst on {data}. It started from {base}.

{pictures}

## Use

```python
{snippet}
```

## Training

Steps: {steps}, of {global_batch} pictures each, on {device}, with torch {torch} and diffusers
{diffusers}.

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
place = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
prior.to(*place), decoder.to(*place)

prompt = {prompt!r}
times = stage_c.DEFAULT_STAGE_C_TIMESTEPS
latents = prior(prompt, {side}, {side}, timesteps=times, guidance_scale=4.0).image_embeddings
decoder(latents, prompt).images[0].save("picture.png")"""

LORA_LINE = """{advice}# The next line needs PEFT: pip install peft
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


def published(settings, prior_folder):
    """What of a run's names may stand in a card: those of Hub repositories, and of no folder here.

    settings: by name. Told now, because a name that is a folder's here is none elsewhere.
    """
    names = {
        "base": settings["pretrained_prior_model_name_or_path"],
        "decoder": settings["pretrained_decoder_model_name_or_path"],
        "data": settings["dataset_name"],
    }
    for part, name in names.items():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name or "") or Path(name).exists():
            names[part] = None
    return {**names, "prior_alone": models.is_prior_alone(prior_folder)}


def card(run, repository, files):
    """The model card for what `results` found: metadata, pictures, how to use it, settings."""
    settings, base, data = run["settings"], run["published"]["base"], run["published"]["data"]
    adapter = lora.FILE in files
    metadata = huggingface_hub.ModelCardData(
        license="mit" if (base or "").startswith("warp-ai/") else None,
        base_model=base,
        datasets=[data] if data else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["wuerstchen", "minwurst", *(["lora"] if adapter else [])],
    )
    prompts = settings["validation_prompts"] or ["a bear"]
    listed = "; ".join(f"“{' '.join(prompt.split())}”" for prompt in prompts)
    defaults = public(LoRASettings())
    told = {
        name: value
        for name, value in settings.items()
        if name in ALWAYS or name not in NEVER and value not in (defaults[name], None)
    }
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=repository.split("/")[-1],
        what=f"A LoRA of rank {settings['rank']} for" if adapter else "All weights of",
        base=f"`{base}`" if base else "a base that is not on the Hub",
        data=f"`{data}`" if data else "captioned pictures",
        pictures=f"![before and after training]({Draw.BOTH})\n\nPrompts: {listed}"
        if Draw.BOTH in files
        else "",
        snippet=snippet(repository, run, prompts[0], adapter),
        settings="\n".join(f"| {name} | {value} |" for name, value in told.items()),
        global_batch=run["identity"]["global_batch"],
        steps=run["steps"],
        **{name: run["starts"][-1][name] for name in ("device", "torch", "diffusers")},
    )


def snippet(repository, run, prompt, adapter):
    """Python that draws a picture with what was pushed; it needs diffusers, not this project."""
    names = run["published"]
    base, alone = names["base"] or "THE/BASE", adapter and names["prior_alone"]
    side = int(FullDecoder.cells(run["settings"]["resolution"] // 32) * 42.67)
    advice = "" if names["base"] else "# Name the base in place of THE/BASE: a folder will do.\n"
    return SNIPPET.format(
        prior=base if adapter else repository,
        subfolder="None" if alone else '"prior"',
        text=models.COMPLETE if alone else base if adapter else repository,
        lora=LORA_LINE.format(repository=repository, file=lora.FILE, advice=advice)
        if adapter
        else "",
        decoder=names["decoder"] or Settings.pretrained_decoder_model_name_or_path,
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
        results(Path(given.folder), read_run(Path(given.folder)))
        push(given.folder, make_repository(given.repository, given.private))
    except UserError as error:
        sys.exit(f"minwurst.hub: {error}")


if __name__ == "__main__":
    main()
