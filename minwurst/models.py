"""Where the parts of a Würstchen come from: a folder or the Hub, part by part.

    folder = locate("pretrained_prior_model_name_or_path", "warp-ai/wuerstchen-prior")
    prior = load_prior(folder)
    tokenizer, text_encoder = load_text(text_folder(folder), torch.bfloat16)
    image_encoder = load_image_encoder(locate("image_encoder_name_or_path", "my_encoder"))

Parts are loaded one by one because the Hub's Würstchen pipelines do not load as a whole since
diffusers 0.38. Only safetensors and JSON are read: no pickle, no remote code.
"""

import functools
import hashlib
import json
import math
import re
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from minwurst import checkpoint, data, diffusion, report
from minwurst.config import UserError
from minwurst.effnet import EfficientNetEncoder
from minwurst.prior import WuerstchenPrior

COMPLETE = "warp-ai/wuerstchen-prior"  # has the text encoder, where a repository has none
PATTERNS = ["*.json", "*.txt", "*.safetensors"]
transformers.utils.logging.disable_progress_bar()


def locate(flag, name, cache_dir=None, advice=""):
    """The local folder of a model: `name` itself, or a Hub repository's files, downloaded.

    flag, advice: for the UserError where there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"--{flag} {name}: there is no such folder.{advice}")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            cache_dir=cache_dir,
            allow_patterns=PATTERNS,
            ignore_patterns=["*.fp16.safetensors"],  # the same weights a second time
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--{flag} {name}: no such folder here, and not to be had from the Hub "
            f"({type(error).__name__}: {reason}). Name a local folder, or mend the name or the "
            f"connection.{advice}"
        ) from None
    return Path(folder)


def locate_lora(name, cache_dir=None):
    """The path of a LoRA: `name` itself, or the folder of a Hub repository's files."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        return name
    return locate("lora", name, cache_dir)


def is_prior_alone(folder):
    """Whether a folder is a repository of the prior alone, with its config at the root."""
    return not (Path(folder) / "prior").is_dir() and (Path(folder) / "config.json").is_file()


def text_folder(folder, cache_dir=None):
    """The folder with text_encoder/ and tokenizer/ that go with the prior in `folder`."""
    if is_prior_alone(folder):
        return locate("pretrained_prior_model_name_or_path", COMPLETE, cache_dir)
    return Path(folder)


def check_parts(prior_folder, text, encoder_folder=None):
    """UserError names the first part that is missing. It takes no time: do it before what does."""
    needed = [
        (prior_folder, prior_part(prior_folder).relative_to(prior_folder) / "config.json"),
        (text, "text_encoder/config.json"),
        (text, "tokenizer/tokenizer_config.json"),
    ]
    for folder, file in [*needed, (encoder_folder, "config.json")] if encoder_folder else needed:
        if not (Path(folder) / file).is_file():
            raise UserError(f"{folder} is no whole Würstchen: {file} is missing in it.")


def prior_part(folder):
    """Where in a folder the prior lies: in `prior` or, where it stands alone, at the root."""
    return Path(folder) / ("." if is_prior_alone(folder) else "prior")


def prior_sizes(folder):
    """The prior's sizes as its config names them, read without loading it."""
    config = json.loads((prior_part(folder) / "config.json").read_text(encoding="utf-8"))
    return {name: config.get(name) for name in ("c_in", "c", "c_cond", "c_r", "depth", "nhead")}


def fingerprint(*folders):
    """16 hex digits that change with the content of any model file in the folders."""
    files = [file for folder in folders for p in PATTERNS for file in sorted(Path(folder).glob(p))]
    digests = [checkpoint.describe(file)["sha256"] for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def load_part(load, folder, part):
    """load(folder/part); where that is broken, a UserError names it."""
    place = Path(folder) / part
    try:
        return load(place)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place} can't be loaded: {reason}") from None


def load_weights(kind, place, **options):
    """A model from its folder; a missing tensor is an error, where libraries draw it anew."""
    model, found = kind.from_pretrained(
        place, use_safetensors=True, output_loading_info=True, **options
    )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # Older CLIP files hold the positions' numbers too, which are no weights.
        keys = [key for key in found[problem] if not str(key).endswith("position_ids")]
        if keys:
            named = ", ".join(str(key) for key in keys[:3])
            raise ValueError(f"its weights have {problem.replace('_', ' ')}: {named}")
    return model


def load_prior(folder, dtype=torch.float32):
    """The prior in `dtype`, from where `prior_part` finds it."""

    def prior(place):
        return load_weights(WuerstchenPrior, place, low_cpu_mem_usage=False, torch_dtype=dtype)

    return load_part(prior, prior_part(folder), ".")


def load_text(folder, dtype):
    """(tokenizer, frozen text encoder in `dtype`) from a folder that `text_folder` gave."""

    def encoder(place):
        return load_weights(transformers.CLIPTextModel, place, dtype=dtype)

    read = transformers.CLIPTokenizerFast.from_pretrained
    tokenizer = load_part(read, folder, "tokenizer")
    return tokenizer, load_part(encoder, folder, "text_encoder").requires_grad_(False).eval()


def load_image_encoder(folder):
    """The frozen image encoder, fp32 as its authors ran it, its channels last: that is faster."""

    def encoder(place):
        loaded = load_weights(EfficientNetEncoder, place, low_cpu_mem_usage=False)
        return loaded.to(torch.float32, memory_format=torch.channels_last)

    return load_part(encoder, folder, ".").requires_grad_(False).eval()


class Encoders:
    """The two frozen encoders, each loaded onto the device when it is first needed."""

    def __init__(self, text_folder, image_folder, compute_type, device):
        """compute_type: the text encoder's; the image encoder is in fp32, as trained."""
        self.text_folder, self.image_folder = text_folder, image_folder
        self.compute_type, self.device = compute_type, device

    @functools.cached_property
    def for_text(self):
        tokenizer, text_encoder = load_text(self.text_folder, self.compute_type)
        return tokenizer, text_encoder.to(self.device)

    @functools.cached_property
    def for_pictures(self):
        return load_image_encoder(self.image_folder).to(self.device)

    def text(self, captions):
        """B captions → their states (B, 77, D) in the compute type."""
        return encode_text(*self.for_text, captions)

    @torch.no_grad()
    def latents(self, pixels):
        """Pictures (B, 3, R, R) → (B, 16, R/32, R/32) fp32, scaled as the prior knows them."""
        pixels = data.to_device(pixels, self.device)
        # A CPU is twice as fast one by one, where what a layer leaves still lies in its caches.
        parts = pixels.split(1 if self.device.type == "cpu" else len(pixels))
        encoded = torch.cat([self.for_pictures(part) for part in parts]).contiguous()
        return diffusion.scale_latents(encoded)

    def shapes(self, side):
        """((16, R/32, R/32), (77, D)) for pictures of side R, read from the configs alone."""
        read = transformers.CLIPTextConfig.from_pretrained
        text = load_part(read, self.text_folder, "text_encoder")
        channels = load_part(EfficientNetEncoder.load_config, self.image_folder, ".")["c_latent"]
        return (channels, side // 32, side // 32), (text.max_position_embeddings, text.hidden_size)

    def bytes_each(self, side):
        """What one picture's latents and one text's states take."""
        sizes = [math.prod(shape) for shape in self.shapes(side)]
        return sizes[0] * torch.float32.itemsize, sizes[1] * self.compute_type.itemsize

    def parts(self):
        """The modules, loaded."""
        return [self.for_text[1], self.for_pictures]

    def drop(self):
        """Give back their memory; what is needed again is loaded again."""
        for name in ("for_text", "for_pictures"):
            self.__dict__.pop(name, None)


def check_fit(prior, encoders):
    """UserError where the three parts do not agree on their widths."""
    (latent, *_), (_, text) = encoders.shapes(32)
    c_in, c_cond = prior.config.c_in, prior.config.c_cond
    if text != c_cond:
        raise UserError(f"The text encoder is {text} wide, but the prior expects {c_cond}.")
    if latent != c_in:
        raise UserError(
            f"--image_encoder_name_or_path gives {latent} channels, but the prior takes {c_in}."
        )


def tell_cut(tokenizer, prompts):
    """Say which prompts are longer than the text encoder reads."""
    for prompt in prompts:
        count = len(tokenizer(prompt, verbose=False).input_ids)
        most = tokenizer.model_max_length
        if count > most:
            report.say(f"The prompt “{prompt[:40]}…” has {count} tokens; only {most} are read.")


@torch.no_grad()
def encode_text(tokenizer, text_encoder, captions):
    """Captions → the text encoder's last states, (B, 77, D), in its type.

    Padded tokens are masked, as they are when sampling. What goes beyond 77 tokens is cut.
    """
    tokens = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    device = text_encoder.device
    words, mask = (data.to_device(t, device) for t in (tokens.input_ids, tokens.attention_mask))
    return text_encoder(words, attention_mask=mask).last_hidden_state
