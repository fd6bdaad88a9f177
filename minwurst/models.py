"""Where the parts of a Würstchen come from: a folder or the Hub, part by part.

    folder = locate("warp-ai/wuerstchen-prior", "--pretrained_prior_model_name_or_path")
    prior = load_prior(folder)
    tokenizer, text_encoder = load_text(folder, dtype=torch.bfloat16)
    image_encoder = load_image_encoder(locate("warp-ai/EfficientNetEncoder", "--image_encoder_name_or_path"))

Parts are loaded one by one because the Hub's Würstchen pipelines do not load as a whole in diffusers
0.38 or newer. Only safetensors and JSON are read: no pickle, no remote code.
"""

from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError

from minwurst.config import UserError
from minwurst.effnet import EfficientNetEncoder
from minwurst.prior import WuerstchenPrior

COMPLETE_PRIOR = "warp-ai/wuerstchen-prior"  # has the text encoder that prior-only repositories lack
transformers.utils.logging.disable_progress_bar()


def locate(name, flag, cache_dir=None):
    """The local folder of a model: the folder itself, or a Hub repository's files, downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{flag} {name}: there is no such folder.")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                cache_dir=cache_dir,
                allow_patterns=["*.json", "*.txt", "*.safetensors"],
                ignore_patterns=["*.fp16.safetensors"],  # the same weights a second time
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{flag} {name}: no such folder here, and the Hub does not give it ({type(error).__name__}: {reason}). Name a local folder, or mend the connection or the name."
        ) from None


def load_part(load, folder, part, needs):
    """load(folder/part), where a missing or broken part is a UserError that names it."""
    place = Path(folder) / part
    if not (place / needs).is_file():
        raise UserError(f"{folder} is no Würstchen as it stands: {Path(part) / needs} is missing.")
    try:
        return load(place)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{place} can't be loaded: {' '.join(str(error).split())[:300]}") from None


def load_weights(kind, place, **options):
    """A diffusers-style model from its folder, in fp32; every tensor must be there and be known."""
    model, report = kind.from_pretrained(
        place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(f"{what.replace('_', ' ')} in its weights: {', '.join(map(str, report[what][:3]))}")
    return model.float()


def load_prior(folder):
    """The prior in fp32, from `folder/prior` or, in a repository of the prior alone, from its root."""
    at_root = not (Path(folder) / "prior").is_dir() and (Path(folder) / "config.json").is_file()
    part = "." if at_root else "prior"
    return load_part(lambda place: load_weights(WuerstchenPrior, place), folder, part, "config.json")


def load_text(folder, dtype, cache_dir=None):
    """(tokenizer, frozen text encoder in `dtype`); from the complete repository where `folder` is the prior alone."""
    if not (Path(folder) / "text_encoder").is_dir() and (Path(folder) / "config.json").is_file():
        folder = locate(COMPLETE_PRIOR, "--pretrained_prior_model_name_or_path", cache_dir)
    tokenizer = load_part(
        transformers.CLIPTokenizerFast.from_pretrained, folder, "tokenizer", "tokenizer_config.json"
    )
    text_encoder = load_part(
        lambda place: transformers.CLIPTextModel.from_pretrained(place, dtype=dtype, use_safetensors=True),
        folder, "text_encoder", "config.json",
    )  # fmt: skip
    return tokenizer, text_encoder.requires_grad_(False).eval()


def load_image_encoder(folder):
    """The frozen image encoder, fp32 as its authors ran it."""
    encoder = load_part(lambda place: load_weights(EfficientNetEncoder, place), folder, ".", "config.json")
    return encoder.requires_grad_(False).eval()


def check_fit(prior, text_encoder, image_encoder):
    """The three parts must agree on their widths; UserError names the two that don't."""
    text, latent = text_encoder.config.hidden_size, image_encoder.config.c_latent
    if text != prior.config.c_cond:
        raise UserError(f"The text encoder is {text} wide, but the prior expects {prior.config.c_cond}.")
    if latent != prior.config.c_in:
        raise UserError(
            f"--image_encoder_name_or_path: its latents have {latent} channels, the prior's {prior.config.c_in}."
        )


@torch.no_grad()
def encode_text(tokenizer, text_encoder, captions):
    """Captions → the text encoder's last states, (B, 77, D), in its type.

    Padded tokens are masked, as they are when sampling. What goes beyond 77 tokens is cut.
    """
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).to(text_encoder.device)
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
