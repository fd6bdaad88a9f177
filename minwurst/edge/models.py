"""The parts of a Würstchen model, found and loaded one by one from folders or the Hub.

    parts = find(settings)                     # folders, checked; nothing large is loaded
    prior = load_prior(parts.prior)
    encoders = make_encoders(parts, torch.bfloat16, device)

Only safetensors and JSON files are read: no pickle, no remote code.
"""

import dataclasses
import hashlib
import math
import re
import textwrap
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HTTPError

from minwurst.base.errors import UserError
from minwurst.base.model_folder import resolve
from minwurst.edge import networks
from minwurst.edge.files import describe
from minwurst.edge.networks import load_part
from minwurst.step import diffusion
from minwurst.step.encoders import Encoders, try_out
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.prior import WuerstchenPrior

PRIOR = "--pretrained_prior_model_name_or_path"
COMPLETE = "warp-ai/wuerstchen-prior"  # has the text encoder that other repositories lack
PATTERNS = ["*.json", "*.txt", "*.safetensors"]
transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass
class Parts:
    """The folders of a model's parts.

    prior: of the prior's own files; from_scratch: only of its config. text: has text_encoder/ and
    tokenizer/. image_encoder. decoder: has the parts of Stages B and A, or None. prior_alone:
    whether the prior's folder has no text encoder beside it.
    """

    prior: Path
    text: Path
    image_encoder: Path
    decoder: Path | None
    prior_alone: bool
    from_scratch: bool = False


# ---- Finding.


def find(settings):
    """Find all parts, downloading what is on the Hub; UserError if one is missing or misfits."""
    source = locate(PRIOR, settings.pretrained_prior_model_name_or_path, settings.cache_dir)
    encoder = settings.image_encoder_name_or_path
    image_encoder = locate("--image_encoder_name_or_path", encoder, settings.cache_dir)
    text = text_folder(source, settings.cache_dir)
    check_parts(source, text, image_encoder, from_scratch=settings.from_scratch)
    decoder = None
    if settings.validation_prompts and settings.validation_decoder == "full":
        decoder = find_decoder(settings.pretrained_decoder_model_name_or_path, settings.cache_dir)
    from_scratch = settings.from_scratch is not None
    prior = find_config(settings.from_scratch) if from_scratch else prior_folder(source)
    parts = Parts(prior, text, image_encoder, decoder, is_prior_alone(source), from_scratch)
    check_fit(parts)
    return parts


def locate(where, name, cache_dir=None, advice=""):
    """A model's local folder: `name`, the result in it, or the downloaded files of a repository.

    where: the flag or argument that the UserError names if there is none; advice follows.
    """
    if Path(name := str(name)).is_dir():
        return resolve(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{where} {name}: no such folder.{advice}")
    try:
        folder = huggingface_hub.snapshot_download(
            name, cache_dir=cache_dir, allow_patterns=PATTERNS,
            ignore_patterns=["*.fp16.safetensors"],  # the same weights a second time
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        raise UserError(
            f"{where} {name}: no such local folder, and not available from the Hub "
            f"({type(error).__name__}: {reason}). Give a local folder, or fix the name or the "
            f"connection.{advice}"
        ) from None
    return Path(folder)


def locate_lora(name, cache_dir=None):
    """The path of a LoRA: `name` itself, or the folder of a Hub repository's files."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        return name
    return locate("--lora", name, cache_dir)


def is_prior_alone(folder):
    """Whether this is a repository of the prior alone, with its config at the root."""
    return not (Path(folder) / "prior").is_dir() and (Path(folder) / "config.json").is_file()


def prior_folder(folder):
    """Where the prior's files are: in `prior/`, or at the root of a prior alone."""
    return Path(folder) if is_prior_alone(folder) else Path(folder) / "prior"


def find_config(path):
    """The config of a new prior: a .json file, or the folder of a prior's config.json."""
    config = prior_folder(path) if Path(path).is_dir() else Path(path)
    if not (config.suffix == ".json" and config.is_file() or (config / "config.json").is_file()):
        raise UserError(f"--from_scratch {path}: no .json file, and no folder with a config.json.")
    return config


def text_folder(folder, cache_dir=None, where=PRIOR):
    """The folder with the text_encoder/ and tokenizer/ that belong to the prior in `folder`."""
    if is_prior_alone(folder):
        return locate(where, COMPLETE, cache_dir, f" It has the text encoder that {folder} lacks.")
    return Path(folder)


def check_parts(source, text, image_encoder=None, from_scratch=None):
    """UserError names the first missing part."""
    needed = [(text, "text_encoder/config.json"), (text, "tokenizer/tokenizer_config.json")]
    if not from_scratch:
        needed.insert(0, (source, (prior_folder(source) / "config.json").relative_to(source)))
    if image_encoder:
        needed.append((image_encoder, "config.json"))
    for folder, file in needed:
        if not (Path(folder) / file).is_file():
            unfinished = any(Path(folder).glob("checkpoint-*")) or (folder / "state.json").is_file()
            hint = " python -m minwurst.export makes one of a checkpoint." * unfinished
            raise UserError(f"{folder} is not a complete model folder: {file} is missing.{hint}")


def find_decoder(name, cache_dir=None):
    """The local folder of the decoder; UserError if there is none, or a part is missing."""
    folder = locate(
        "--pretrained_decoder_model_name_or_path", name, cache_dir,
        advice=" Or train without it: --validation_decoder=preview.",
    )  # fmt: skip
    check_decoder(folder)
    return folder


def check_decoder(folder):
    """UserError names the first missing part of the decoder."""
    for part in ("decoder", "vqgan", "text_encoder", "tokenizer"):
        file = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        if not (Path(folder) / part / file).is_file():
            raise UserError(f"{folder} is not a complete decoder folder: {part}/{file} is missing.")


def check_fit(parts):
    """UserError if the widths of prior, text encoder and image encoder differ."""
    (channels, *_), (_, width) = encoded_shapes(parts, 32)
    config = prior_sizes(parts.prior)
    if width != config["c_cond"]:
        raise UserError(
            f"The text encoder has width {width}, but the prior expects {config['c_cond']}."
        )
    if channels != config["c_in"]:
        raise UserError(
            f"--image_encoder_name_or_path outputs {channels} channels, but the prior expects "
            f"{config['c_in']}."
        )


def encoded_shapes(parts, side):
    """((16, R/32, R/32), (77, D)): of an image of side R and of a caption, by the configs."""
    text = load_part(transformers.CLIPTextConfig.from_pretrained, parts.text / "text_encoder")
    channels = networks.config_of(EfficientNetEncoder, parts.image_encoder)["c_latent"]
    return (channels, side // 32, side // 32), (text.max_position_embeddings, text.hidden_size)


def encoded_bytes(parts, side, text_type):
    """Bytes of one image's latents and of one caption's condition."""
    latents, text = (math.prod(shape) for shape in encoded_shapes(parts, side))
    return latents * torch.float32.itemsize, text * text_type.itemsize


def prior_sizes(folder):
    """The sizes in the prior's config, without loading the prior."""
    config = networks.config_of(WuerstchenPrior, folder)
    return {name: config[name] for name in ("c_in", "c", "c_cond", "c_r", "depth", "nhead")}


def fingerprint(*folders):
    """16 hex digits that change with the content of any model file in the folders."""
    files = [file for folder in folders for p in PATTERNS for file in sorted(Path(folder).glob(p))]
    digests = [describe(file)["sha256"] for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


# ---- Loading.


def load_prior(folder, dtype=torch.float32, as_trained=False):
    """The prior in `dtype`, from its own folder or the one that contains `prior/`.

    A prior that does not say what it predicts predicts ε. A fork that predicts something else may
    train it further, but as_trained, to sample with it, it has to be something that is known here.
    """
    folder = prior_folder(folder)
    prior = networks.load(WuerstchenPrior, folder, dtype)
    default = "epsilon" if as_trained else diffusion.Objective.prediction
    record_prediction(prior, prior.config.get("prediction_type", default), folder)
    return prior


def record_prediction(prior, prediction, where):
    """Write into the prior's config what it predicts, unless that is ε; UserError if unknown."""
    if prediction not in diffusion.OBJECTIVES:
        known = ", ".join(diffusion.OBJECTIVES)
        raise UserError(
            f"{where} predicts {prediction}, and step/diffusion.py knows {known}. Use the version "
            "of this project that it was trained with."
        )
    if prediction != "epsilon":
        prior.register_to_config(prediction_type=prediction)


def prediction_of(folder):
    """What a prior of this config will be trained to predict."""
    config = networks.config_of(WuerstchenPrior, folder)
    return config.get("prediction_type", diffusion.Objective.prediction)


def initial_prior(parts, seed):
    """The prior that full training starts from, fp32: loaded, or with --from_scratch a new one.

    A new one predicts its input at first: the head divides by |1 − b|, which random weights would
    bring near zero, and so its weights start at zero.
    """
    if not parts.from_scratch:
        return load_prior(parts.prior)

    def make(path):
        torch.manual_seed(seed)
        return WuerstchenPrior.from_config(networks.read_config(WuerstchenPrior, path))

    prior = load_part(make, parts.prior)
    torch.nn.init.zeros_(prior.out[1].weight)
    torch.nn.init.zeros_(prior.out[1].bias)
    record_prediction(prior, prediction_of(parts.prior), parts.prior)
    return prior


def load_text(folder, dtype):
    """(tokenizer, frozen text encoder in `dtype`) from the folder that contains both."""
    folder = Path(folder)

    def load(place):
        networks.check_sizes(transformers.CLIPTextConfig.from_pretrained(place).to_dict())
        networks.read_tensors(place)  # only to check them
        model, report = transformers.CLIPTextModel.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, dtype=dtype
        )
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = [str(key) for key in report[problem]]
            keys = [key for key in keys if not key.endswith("position_ids")]
            networks.refuse(keys, problem.replace("_", " "))
        return model

    tokenizer = load_part(transformers.CLIPTokenizerFast.from_pretrained, folder / "tokenizer")
    text_encoder = load_part(load, folder / "text_encoder")
    config, length, words = text_encoder.config, tokenizer.model_max_length, len(tokenizer)
    fits = isinstance(length, int) and 3 <= length <= config.max_position_embeddings
    if not fits or not 3 <= words <= config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer'}: {words} tokens and texts of {length} do not fit the text "
            f"encoder, which has {config.vocab_size} and {config.max_position_embeddings}."
        )
    text_encoder.requires_grad_(False).eval()
    load_part(lambda _: try_out(tokenizer, text_encoder), folder)
    return tokenizer, text_encoder


def load_image_encoder(folder):
    """The frozen image encoder: fp32, as its authors ran it, and channels last, which is faster."""
    encoder = networks.load(EfficientNetEncoder, folder, torch.float32)
    return encoder.to(memory_format=torch.channels_last).requires_grad_(False)


def make_encoders(parts, compute_type, device):
    """The frozen encoders, not loaded yet. compute_type: of the text's."""
    return Encoders(
        lambda: load_text(parts.text, compute_type),
        lambda: load_image_encoder(parts.image_encoder),
        compute_type, device,
    )  # fmt: skip
