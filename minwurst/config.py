"""Every setting of a run, with its help text; `--help` is made from this page.

    settings = parse(Settings)          # from the command line; a mistake ends in one clear line

A setting is a field of a dataclass and becomes the flag of its name. `UserError` is the exception
that means "the user can put this right": `dist.run` prints it as one line, without a traceback.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import sys
from typing import ClassVar

from minwurst import miniature


class UserError(Exception):
    """A mistake the user can put right; its text names the flag, file or row and what to do."""

    alone = False  # True where one rank alone met it, and the others know nothing of it


def setting(default, help, secret=False, **argparse_options):
    """A field with its flag's help text; further options go to argparse's `add_argument`.

    What is secret stays out of the dataclass's printed form and of `public`.
    """
    metadata = {"help": help, **argparse_options}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def demo_setting():
    """The flag --demo, which takes its class's DEMO for the defaults of the other flags."""
    return setting(
        False,
        "Take the small trained Würstchen and the pictures that come with this project, and "
        "settings that suit them; flags that are given go before these.",
    )


SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip


@dataclasses.dataclass
class Settings:
    """The settings of train.py, named and preset as in diffusers' script, but for --resolution."""

    DEMO: ClassVar = miniature.TRAIN
    demo: bool = demo_setting()

    # What is trained, and the frozen parts
    pretrained_prior_model_name_or_path: str = setting(
        "warp-ai/wuerstchen-prior",
        "Folder or Hub repository with the prior (in `prior/` or at its root), the text encoder "
        "and the tokenizer. Parts that a repository lacks come from warp-ai/wuerstchen-prior.",
    )
    pretrained_decoder_model_name_or_path: str = setting(
        "warp-ai/wuerstchen",
        "Folder or Hub repository with the decoder (Stages B and A). Only validation pictures "
        "need it.",
    )
    image_encoder_name_or_path: str = setting(
        "warp-ai/EfficientNetEncoder",
        "Folder or Hub repository with the image encoder that turns pictures into latents.",
    )

    # Data
    dataset_name: str = setting(
        None,
        "Captioned pictures: a data set's name on the Hub, or a local folder (pictures, "
        "parquet, or written by save_to_disk), or a .parquet file.",
    )
    dataset_config_name: str = setting(None, "The data set's configuration, where it has several.")
    train_data_dir: str = setting(
        None,
        "A folder of pictures with a metadata.jsonl of lines {\"file_name\": …, \"text\": …}. "
        "Ignored when --dataset_name is given.",
    )
    image_column: str = setting("image", "The column that holds the pictures.")
    caption_column: str = setting(
        "text",
        "The column that holds a caption or a list of captions; of a list, one is drawn each "
        "time.",
    )
    max_train_samples: int = setting(None, "Train on this many randomly chosen rows only.")
    skip_bad_samples: bool = setting(
        False,
        "Leave out rows whose picture or caption is bad, naming them, instead of stopping.",
    )
    resolution: int = setting(
        768,
        "Side of the square, in pixels, that pictures are resized and cropped to for the image "
        "encoder; a multiple of 32. 768 gives latents of 24×24, which the decoder turns into "
        "1024 pixels.",
    )
    caption_dropout: float = setting(
        0.0,
        "Share of samples whose caption is replaced by the empty one, which keeps "
        "classifier-free guidance working. The authors used 0.05.",
    )
    dataloader_num_workers: int = setting(
        0,
        "Processes that decode pictures while the step runs; 0 decodes between steps.",
    )
    cache_latents: bool = setting(
        False,
        "Encode every picture and every caption once, before training, into --cache_dir (by "
        "default the output folder), where later runs on the same data and encoders find them. "
        "At 768 pixels a picture takes 36 KiB and a caption 193 KiB in half precision.",
    )

    # Length and batch
    train_batch_size: int = setting(1, "Pictures per device and micro-step.")
    gradient_accumulation_steps: int = setting(1, "Micro-steps per optimizer step.")
    num_train_epochs: int = setting(100, "Passes over the data. --max_train_steps overrides it.")
    max_train_steps: int = setting(
        None,
        "Optimizer steps in all. A finished run goes on when this is raised.",
    )

    # Objective
    loss_weighting: str = setting(
        "none",
        "Weight of a sample's squared error: none, or p2 = 1/(1+SNR), the authors'.",
        choices=("none", "p2"),
    )
    timestep_sampling: str = setting(
        "uniform",
        "uniform draws t evenly in [0, 1); wuerstchen is the authors' t = 1.08·(1−U) + 0.001, "
        "cut at 1.",
        choices=("uniform", "wuerstchen"),
    )

    # Optimizer
    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: str = setting(
        "constant",
        "How the learning rate goes over the optimizer steps; constant has no warm-up.",
        choices=SCHEDULES,
    )
    lr_warmup_steps: int = setting(500, "Optimizer steps in which the learning rate rises from 0.")
    adam_beta1: float = setting(0.9, "Adam's memory of the gradient.")
    adam_beta2: float = setting(0.999, "Adam's memory of the squared gradient.")
    adam_weight_decay: float = setting(0.0, "AdamW's decoupled weight decay.")
    adam_epsilon: float = setting(1e-8, "Adam's smallest denominator.")
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it.")
    use_8bit_adam: bool = setting(
        False,
        "Keep Adam's state in 8 bits; needs the package bitsandbytes.",
    )
    use_ema: bool = setting(
        False,
        "Keep an exponential moving average of the weights and export it in place of them.",
    )
    ema_decay: float = setting(0.9999, "The average's memory once it has warmed up.")

    # Precision, memory, speed
    mixed_precision: str = setting(
        "no",
        "Type of the forward pass under autocast; trained weights, noise and loss stay fp32.",
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = setting(
        False,
        "Compute each block again in the backward pass: a tenth of the activation memory, a "
        "third more time.",
    )
    allow_tf32: bool = setting(False, "Let fp32 matrix products use TF32 on GPUs that have it.")

    # Seed, checkpoints, resuming
    seed: int = setting(None, "Makes a run repeatable. Without it one is drawn and written down.")
    output_dir: str = setting(
        "wuerstchen-model-finetuned",
        "Where checkpoints, logs and the result go.",
    )
    checkpointing_steps: int = setting(
        500,
        "Optimizer steps between two checkpoints; the last step is always saved.",
    )
    checkpoints_total_limit: int = setting(
        None,
        "Keep this many checkpoints; older ones are removed once a new one is safe.",
    )
    resume_from_checkpoint: str = setting(
        None,
        "Path of a checkpoint, or `latest`: the newest whole one in --output_dir, a fresh start "
        "where there is none.",
    )
    cache_dir: str = setting(
        None,
        "Where downloaded models, data sets and what --cache_latents writes are kept.",
    )

    # Seeing and sharing
    logging_dir: str = setting("logs", "TensorBoard's folder inside --output_dir.")
    logging_steps: int = setting(10, "Optimizer steps between two lines of the log.")
    report_to: str = setting(
        "tensorboard",
        "Where the log goes besides the console.",
        choices=("tensorboard", "wandb", "all", "none"),
    )
    tracker_project_name: str = setting("text2image-fine-tune", "The project's name in wandb.")
    validation_prompts: list = setting(
        None,
        "Prompts to draw pictures for before, while and after training; with none after it, the "
        "flag turns off those of --demo.",
        nargs="*",
        also=["--validation_prompt"],
    )
    validation_split: float = setting(
        0.0,
        "Share of the rows that is held out: they are not trained on, their loss is reported.",
    )
    validation_epochs: int = setting(5, "Epochs between two validations.")
    validation_steps: int = setting(
        None,
        "Optimizer steps between two validations. It overrides --validation_epochs.",
    )
    validation_decoder: str = setting(
        "full",
        "What turns latents into validation pictures: full is the decoder, in good quality; "
        "preview is a small linear map fitted to the training pictures, in no memory.",
        choices=("full", "preview"),
    )
    push_to_hub: bool = setting(False, "Upload the result to the Hub at the end.")
    hub_token: str = setting(
        None,
        "Token for the upload. Better: `hf auth login`, or the variable HF_TOKEN.",
        secret=True,
    )
    hub_private: bool = setting(
        False,
        "Make the repository private, where the upload has to make it.",
    )
    hub_model_id: str = setting(
        None,
        "Repository to upload to; by default --output_dir's name under your account.",
    )

    def check(self):
        """Raise UserError for values that no run can use."""
        at_least = {
            "train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_samples": 1,
            "num_train_epochs": 1, "max_train_steps": 1, "checkpointing_steps": 1,
            "checkpoints_total_limit": 1, "logging_steps": 1, "validation_epochs": 1,
            "validation_steps": 1,
            "lr_warmup_steps": 0, "dataloader_num_workers": 0, "seed": 0, "learning_rate": 0,
            "adam_weight_decay": 0, "adam_epsilon": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name} is {value}; it must be at least {least}.")
        for name in ("caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        for name in ("adam_beta1", "adam_beta2", "validation_split"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be below 1.")
        for name, value in vars(self).items():
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and text != text.encode(errors="ignore").decode():
                    raise UserError(f"--{name} holds bytes that are no text in UTF-8.")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise UserError("--learning_rate must be above 1e-7, where polynomial schedules end.")
        if self.resolution < 32 or self.resolution % 32:
            near = max(1, round(self.resolution / 32)) * 32
            raise UserError(
                f"--resolution is {self.resolution}; it must be a multiple of 32, the encoder's "
                f"stride: try {near}."
            )
        if not self.max_grad_norm > 0:
            raise UserError("--max_grad_norm must be above 0; `inf` turns clipping off.")
        if self.use_8bit_adam and not importlib.util.find_spec("bitsandbytes"):
            raise UserError("--use_8bit_adam needs a package: pip install bitsandbytes.")
        if self.report_to == "wandb" and not importlib.util.find_spec("wandb"):
            raise UserError("--report_to wandb needs a package: pip install wandb.")
        if not self.dataset_name and not self.train_data_dir:
            raise UserError(
                "No data: give --dataset_name (Hub name, folder or .parquet) or --train_data_dir "
                "(a folder of pictures with metadata.jsonl). To try it without, give --demo."
            )


def parse(kind, argv=None):
    """The command line as a `kind` of Settings, checked; unknown flags are told the nearest."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(kind):
        options = {"default": field.default, **field.metadata}
        options["help"] = options["help"].replace("%", "%%")
        if field.type is bool:
            options["action"] = "store_true"
        elif field.type is not list:
            options["type"] = field.type
        names = [f"--{field.name}", *options.pop("also", [])]
        parser.add_argument(*names, **options)
    if "--demo" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**kind.DEMO)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(kind)]
        flag = unknown[0].split("=")[0]  # without its value, which may be a secret
        near = difflib.get_close_matches(flag, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help."
        if not flag.startswith("--"):
            parser.error("a word stands where no flag takes one; see --help.")
        parser.error(f"{flag} is not known; {hint}")
    for field in dataclasses.fields(kind):
        if field.type is not list and isinstance(getattr(known, field.name), list):
            parser.error(f"--{field.name} has no value.")  # argparse takes --flag=-- for a list
    settings = kind(**vars(known))
    settings.check()
    for field in dataclasses.fields(kind):  # trackers keep a copy of the command line
        if not field.repr and getattr(settings, field.name):
            secret = getattr(settings, field.name)
            sys.argv = [word.replace(secret, "***") for word in sys.argv]
    return settings


@dataclasses.dataclass
class LoRASettings(Settings):
    """The settings of lora.py: those of train.py and what an adapter needs."""

    DEMO: ClassVar = miniature.LORA
    rank: int = setting(4, "Rank of the change: A is (rank, in), B is (out, rank).")
    lora_alpha: float = setting(None, "The change is alpha/rank · B·A; by default alpha = rank.")
    lora_dropout: float = setting(0.0, "Dropout before A.")
    lora_targets: list = setting(
        ("attention",),
        "Layers to adapt: `attention` (q, k, v, out), `all-linear`, or names and ends of names.",
        nargs="+",
    )
    lora_weights: str = setting(None, "A LoRA file of the same layers and rank to start from.")

    def check(self):
        super().check()
        if self.rank < 1:
            raise UserError(f"--rank is {self.rank}; it must be at least 1.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UserError(f"--lora_alpha is {self.lora_alpha}; it must be above 0.")
        if self.lora_weights and not os.path.exists(self.lora_weights):
            raise UserError(f"--lora_weights {self.lora_weights}: there is no such file.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout is {self.lora_dropout}; it must be below 1.")


def public(settings):
    """The settings as they may be written to a file: all but the token."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
        if field.repr
    }
