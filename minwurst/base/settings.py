"""Every setting of a run with its help text; `--help` is generated from this file.

    settings = from_command_line(Settings)      # one clear line and exit code 2 on a mistake
    settings = parse(Settings, ["--train_data_dir=images"])      # UserError on a mistake

A setting is a field of a dataclass and becomes the flag of the same name. What else the project
has to know about a setting stands beside it, so that a new one is private and fixed by default:

    may_change   a resumed run may change it: False, True (the change is listed), or "silently"
    in_card      it may appear in a published model card: False, True (if changed), or "always"
    secret       it is never written anywhere
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import shlex
import sys

from minwurst.base import model_folder, prompts
from minwurst.base.console import outlive
from minwurst.base.errors import UserError, exit_with
from minwurst.base.parser import Parser


def section(title):
    """A function that declares settings under this heading of --help."""

    def setting(default, help, **facts):
        """A field with its flag's help text and its facts (see the top of this file).

        Further facts: at_least, at_most, above, below (limits of the value), infinite (it may be),
        aliases (other names of the flag), choices and nargs (as in argparse).
        """
        metadata = {"section": title, "help": help, **facts}
        return dataclasses.field(default=default, repr=not facts.get("secret"), metadata=metadata)

    return setting


demo, model, data, length, objective, optimizer, speed, run, watch, share = map(
    section,
    ("Demo", "Model", "Data", "Length and batch size", "Objective", "Optimizer and average",
     "Precision, memory and speed", "Seed, checkpoints and resuming", "Log and validation",
     "Sharing the result"),
)  # fmt: skip
adapter = section("LoRA")

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip
MOST_STEPS, LARGEST_SIDE = 100_000_000, 8_192  # beyond any use, and before anything overflows
DEMO_HELP = (
    "Use the small trained Würstchen, the images and the settings that come with this project. "
    "Flags on the command line override the demo's settings; --no_NAME turns a switch off."
)
DEMO_LIMIT = (
    "The demo's model knows only emoji: with other images this tries out a run, and the images it "
    "generates say little about what the published model would learn."
)
DEMO_PROMPTS = "The validation prompts are the demo's: give your own with --validation_prompts."


@dataclasses.dataclass
class Settings:
    """The settings of train.py: names and defaults of diffusers' script, except --resolution.

    given: names of the flags on the command line. notes: lines to print at the start.
    """

    given = notes = ()

    demo: bool = demo(False, DEMO_HELP, may_change="silently", in_card=True)

    pretrained_prior_model_name_or_path: str = model(
        "warp-ai/wuerstchen-prior",
        "Folder or Hub repository with the prior (in `prior/` or at its root), the text encoder "
        "and the tokenizer. Missing parts come from warp-ai/wuerstchen-prior. In a folder, "
        "image_encoder/ and decoder/, and resolution and guidance_scale in model_index.json, "
        "replace the defaults of their flags. Or the --output_dir of a run of train.py.",
        may_change=True,
    )
    pretrained_decoder_model_name_or_path: str = model(
        "warp-ai/wuerstchen",
        "Folder or Hub repository with the decoder (Stages B and A), if the prior's folder has "
        "none. Only validation images need it.",
        may_change=True,
    )
    image_encoder_name_or_path: str = model(
        "warp-ai/EfficientNetEncoder",
        "Folder or Hub repository with the image encoder that turns images into latents, if the "
        "prior's folder has none.",
        may_change=True,
    )
    from_scratch: str = model(
        None,
        "Instead of fine-tuning, train a new prior of the sizes in this config.json, or in that of "
        "a model folder. With \"prediction_type\": \"flow_prediction\" in it, the prior becomes a "
        "rectified flow. The text encoder is still that of the prior's folder or repository.",
    )
    cache_dir: str = model(
        None,
        "Folder for downloaded models and data sets, and for what --cache_latents writes.",
        may_change="silently",
    )

    dataset_name: str = data(
        None,
        "Captioned images: the name of a data set on the Hub, a local folder (images, parquet, or "
        "written by save_to_disk), or a .parquet file.",
        may_change=True,
    )
    dataset_config_name: str = data(
        None, "Configuration of the data set, if it has several.", may_change=True, in_card=True
    )
    train_data_dir: str = data(
        None,
        "Folder of images with a metadata.jsonl of lines {\"file_name\": …, \"text\": …}, or with "
        "a .txt file of captions beside each image. Ignored if --dataset_name is given.",
        may_change=True,
    )
    image_column: str = data(
        "image", "Column with the images.", may_change=True, in_card=True
    )
    caption_column: str = data(
        "text",
        "Column with a caption or a list of captions. From a list, one is chosen at random for "
        "each sample.",
        may_change=True,
        in_card=True,
    )
    max_train_samples: int = data(
        None, "Train on a random subset of this many rows.", at_least=1, in_card=True
    )
    skip_rows: list = data(
        None,
        "Numbers of rows to skip: other rows take their places in the stream of samples, and every "
        "other sample stays where it is.",
        nargs="+", type=int, at_least=0, may_change=True, in_card=True,
    )  # fmt: skip
    recheck_data: bool = data(
        False,
        "Read every image and cached latent at the start, instead of trusting those that were good "
        "before and whose size and time of modification are the same.",
        may_change="silently",
    )
    skip_bad_samples: bool = data(
        False,
        "Skip rows with an unreadable image or a bad caption, and list them, instead of stopping.",
        may_change=True,
        in_card=True,
    )
    resolution: int = data(
        768,
        "Side of the square input of the image encoder in pixels, a multiple of 32. 768 gives "
        "latents of 24×24, which the decoder turns into 1024×1024 pixels.",
        in_card="always",
    )
    aspect_buckets: int = data(
        None,
        "Train on images of at most this many shapes instead of squares alone. All have about as "
        "many pixels as the square, each step's batch is of one shape, and the shapes are chosen "
        "so that the images lose least to cropping.",
        at_least=1,
        in_card=True,
    )
    random_flip: bool = data(
        False, "Mirror half of the samples, chosen at random.", in_card=True
    )
    random_crop: bool = data(
        False, "Crop at a random place instead of the center; not with --cache_latents.",
        in_card=True,
    )  # fmt: skip
    caption_dropout: float = data(
        0.0,
        "Fraction of samples whose caption is replaced by the empty one. Classifier-free guidance "
        "needs a model that knows the empty caption. The authors used 0.05.",
        at_least=0,
        at_most=1,
        in_card=True,
    )
    dataloader_num_workers: int = data(
        0,
        "Processes that load images while the step runs; 0 loads them between steps.",
        at_least=0,
        may_change=True,
    )
    cache_latents: bool = data(
        False,
        "Encode every image and caption once before training, into --cache_dir (default: the "
        "output folder). Later runs on the same data and encoders reuse the files. At 768 pixels, "
        "36 KiB per image and 193 KiB per caption in half precision.",
        may_change=True,
        in_card=True,
    )

    train_batch_size: int = length(
        1, "Images per device and micro-step.", at_least=1, at_most=1_000_000, may_change=True,
        in_card="always",
    )
    gradient_accumulation_steps: int = length(
        1, "Micro-steps per optimizer step.", at_least=1, at_most=1_000_000, may_change=True,
        in_card=True,
    )
    num_train_epochs: int = length(
        100, "Passes over the data. Overridden by --max_train_steps.", at_least=1, may_change=True
    )
    max_train_steps: int = length(
        None,
        "Total number of optimizer steps. Raise it to continue a finished run.",
        at_least=1,
        at_most=MOST_STEPS,
        may_change=True,
    )

    skip_steps: list = length(
        None,
        "Numbers of steps to skip. Every other step sees the same samples as before.",
        nargs="+", type=int, at_least=1, may_change=True, in_card=True,
    )  # fmt: skip

    loss_weighting: str = objective(
        "none",
        "Weight of a sample's squared error: none; p2 = 1/(1+SNR), which the authors used; "
        "min_snr = min(SNR, γ)/SNR; or soft_min_snr = 1/(1+SNR/γ).",
        choices=("none", "p2", "min_snr", "soft_min_snr"),
        in_card=True,
    )
    snr_gamma: float = objective(
        None, "γ of min_snr and soft_min_snr. Default: 5.", above=0, in_card=True
    )
    timestep_sampling: str = objective(
        "uniform",
        "Distribution of the timestep t: uniform over [0, 1); the authors' wuerstchen, "
        "t = 1.08·(1−U) + 0.001, at most 1; or logit_normal, the sigmoid of a normal number.",
        choices=("uniform", "wuerstchen", "logit_normal"),
        in_card=True,
    )
    logit_mean: float = objective(
        None, "Mean of logit_normal; above 0 there is more noise. Default: 0.", in_card=True
    )
    logit_std: float = objective(
        None, "Standard deviation of logit_normal. Default: 1.", above=0, in_card=True
    )

    learning_rate: float = optimizer(
        1e-4, "Learning rate after the warm-up.", at_least=0, may_change=True, in_card="always"
    )
    lr_scheduler: str = optimizer(
        "constant",
        "Learning-rate schedule over the optimizer steps; constant has no warm-up.",
        choices=SCHEDULES,
        may_change=True,
        in_card=True,
    )
    lr_warmup_steps: int = optimizer(
        500,
        "Optimizer steps over which the learning rate rises from 0.",
        at_least=0,
        may_change=True,
        in_card=True,
    )
    adam_beta1: float = optimizer(
        0.9, "AdamW beta1.", at_least=0, below=1, may_change=True, in_card=True
    )
    adam_beta2: float = optimizer(
        0.999, "AdamW beta2.", at_least=0, below=1, may_change=True, in_card=True
    )
    adam_weight_decay: float = optimizer(
        0.0, "AdamW weight decay.", at_least=0, may_change=True, in_card=True
    )
    adam_epsilon: float = optimizer(
        1e-8, "AdamW epsilon.", at_least=0, may_change=True, in_card=True
    )
    max_grad_norm: float = optimizer(
        1.0,
        "Maximum gradient norm for clipping; inf disables clipping.",
        above=0,
        infinite=True,
        may_change=True,
        in_card=True,
    )
    use_8bit_adam: bool = optimizer(
        False, "Use 8-bit AdamW; needs the package bitsandbytes.", in_card=True
    )
    use_ema: bool = optimizer(
        False,
        "Keep an exponential moving average of the trained weights, and validate and export it.",
        in_card=True,
    )
    ema_decay: float = optimizer(
        0.9999,
        "Decay of the average after its warm-up: 0.9999 remembers about 10,000 steps.",
        at_least=0,
        at_most=1,
        may_change=True,
        in_card=True,
    )

    mixed_precision: str = speed(
        "no",
        "Data type of the forward pass under autocast. Trained weights, noise and loss stay fp32.",
        choices=("no", "fp16", "bf16"),
        may_change=True,
        in_card="always",
    )
    gradient_checkpointing: bool = speed(
        False,
        "Recompute each block in the backward pass: a tenth of the activation memory, a third "
        "more time.",
        may_change=True,
        in_card=True,
    )
    compile: bool = speed(
        False,
        "Compile each block of the prior with torch.compile, which takes a minute for each shape "
        "and then saves time on a GPU. Numbers differ from uncompiled ones by rounding.",
        may_change=True,
        in_card=True,
    )
    allow_tf32: bool = speed(
        False, "Allow TF32 for fp32 matrix products on GPUs.", may_change=True, in_card=True
    )

    seed: int = run(
        None, "Random seed. Default: chosen at random and recorded.", at_least=0, in_card="always"
    )
    output_dir: str = run(
        "wuerstchen-model-finetuned",
        "Folder for checkpoints, logs and the result.",
        may_change="silently",
    )
    checkpointing_steps: int = run(
        500,
        "Optimizer steps between checkpoints. The last step is always saved.",
        at_least=1,
        may_change=True,
    )
    async_checkpointing: bool = run(
        False,
        "Write checkpoints in a thread while training continues, from a copy of weights, average "
        "and optimizer state in memory.",
        may_change=True,
    )
    checkpoints_total_limit: int = run(
        None,
        "Number of checkpoints to keep. Older ones are deleted once a new one is safe.",
        at_least=1,
        may_change=True,
    )
    keep_best: bool = run(
        False,
        "Never delete the checkpoint with the lowest held-out loss (see --validation_split), and "
        "validate at each checkpoint. `python -m minwurst.export OUTPUT_DIR` exports it.",
        may_change=True,
    )
    resume_from_checkpoint: str = run(
        None,
        "Path of a checkpoint, or `latest`: the newest intact one in --output_dir, or a fresh "
        "start if there is none.",
        may_change="silently",
    )

    logging_dir: str = watch("logs", "Folder for logs inside --output_dir.", may_change=True)
    logging_steps: int = watch(
        10, "Optimizer steps between log entries.", at_least=1, may_change=True
    )
    report_to: str = watch(
        "tensorboard",
        "Trackers to report to, besides the console.",
        choices=("tensorboard", "wandb", "all", "none"),
        may_change=True,
    )
    tracker_project_name: str = watch(
        "text2image-fine-tune", "Project name in wandb.", may_change=True
    )
    validation_prompts: list = watch(
        None,
        "Prompts to generate an image for before, during and after training. Without a value, the "
        "flag turns off the demo's prompts.",
        nargs="*",
        aliases=["--validation_prompt"],
        may_change=True,
    )
    validation_prompt_file: str = watch(
        None,
        "File of further prompts, one per line. A prompt, here and on the command line, may end in "
        "--width 1536 --height 1024 (pixels of the image) and --seed 3.",
        may_change="silently",
    )
    validation_split: float = watch(
        0.0,
        "Fraction of the rows to hold out: they are not trained on, and their loss is reported.",
        at_least=0,
        below=1,
        in_card=True,
    )
    validation_epochs: int = watch(
        5, "Epochs between validations.", at_least=1, may_change=True, in_card=True
    )
    validation_steps: int = watch(
        None,
        "Optimizer steps between validations. Overrides --validation_epochs.",
        at_least=1,
        may_change=True,
        in_card=True,
    )
    guidance_scale: float = watch(
        4.0,
        "Strength of classifier-free guidance in validation images: how much to exaggerate the "
        "prompt. 1 is off.",
        may_change=True,
        in_card=True,
    )
    validation_decoder: str = watch(
        "full",
        "How validation images are decoded: full runs Stages B and A; preview is a linear map "
        "fitted to the training images, which shows colors and rough shapes without a decoder.",
        choices=("full", "preview"),
        may_change=True,
        in_card=True,
    )

    push_to_hub: bool = share(False, "Upload the result to the Hub at the end.", may_change=True)
    hub_token: str = share(
        None,
        "Token for the upload. `hf auth login` or the environment variable HF_TOKEN is safer.",
        secret=True,
    )
    hub_private: bool = share(
        False, "Create the repository as private, if it does not exist yet.", may_change=True
    )
    hub_model_id: str = share(
        None,
        "Repository to upload to. Default: the name of --output_dir under your account.",
        may_change=True,
    )

    def check(self):
        """Raise UserError for values that no run can use."""
        self.complete_model()
        check_limits(self)
        self.complete_objective()
        if self.validation_prompt_file:
            lines = prompts.read(self.validation_prompt_file, "validation_prompt_file")
            self.validation_prompts = [*(self.validation_prompts or []), *lines]
            self.validation_prompt_file = None
        self.prompts()
        if not self.output_dir:
            raise UserError("--output_dir is empty.")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise UserError("--learning_rate must be above 1e-7, where polynomial schedules end.")
        if not 32 <= self.resolution <= LARGEST_SIDE or self.resolution % 32:
            near = min(max(32, (self.resolution + 16) // 32 * 32), LARGEST_SIDE)
            raise UserError(
                f"--resolution is {self.resolution}; it must be a multiple of 32, the stride of "
                f"the image encoder: try {near}."
            )
        if self.keep_best and not self.validation_split:
            raise UserError("--keep_best compares held-out losses: add --validation_split=0.05.")
        if self.random_crop and self.cache_latents:
            raise UserError(
                "--random_crop crops a sample anew each time: drop --cache_latents. With --demo, "
                "which sets it, add --no_cache_latents."
            )
        if self.use_8bit_adam and not importlib.util.find_spec("bitsandbytes"):
            raise UserError("--use_8bit_adam needs a package: pip install bitsandbytes.")
        if self.report_to == "wandb" and not importlib.util.find_spec("wandb"):
            raise UserError("--report_to wandb needs a package: pip install wandb.")
        if self.image_column == self.caption_column:
            raise UserError(f"--image_column and --caption_column are both {self.image_column}.")
        if not self.dataset_name and not self.train_data_dir:
            raise UserError(
                "No data: give --dataset_name (Hub name, folder or .parquet file) or "
                "--train_data_dir (folder of images with metadata.jsonl). --demo brings its own."
            )

    def complete_model(self):
        """What the base's folder has or says replaces the defaults of flags that are not given."""
        folder, taken = self.pretrained_prior_model_name_or_path, []
        found = model_folder.own_parts(folder)
        flags = model_folder.FLAGS | {said: said for said in model_folder.SAID}
        for part, name in flags.items():
            is_given = name in self.given or getattr(self, name) != getattr(type(self), name)
            if not is_given and found.get(part, getattr(self, name)) != getattr(self, name):
                setattr(self, name, found[part])
                taken.append(f"{part} {found[part]}" if part == name else f"{part}/")
        if taken:
            self.notes = (*self.notes, f"taken from {short(folder)}: {', '.join(taken)}")

    def said(self):
        """What the result's folder says of its use."""
        return {name: getattr(self, name) for name in model_folder.SAID}

    def prompts(self):
        """The validation prompts as `Prompt`s."""
        return [prompts.Prompt.of(line, "prompt") for line in self.validation_prompts or []]

    def kept_checkpoints(self):
        """(number of the newest to keep or None, whether to keep the best as well)."""
        return self.checkpoints_total_limit, self.keep_best

    def complete_objective(self):
        """Fill in what the objective reads; UserError for a value that it does not read."""
        weighted = "min_snr" in self.loss_weighting
        normal = self.timestep_sampling == "logit_normal"
        for name, default, is_read, reader in (
            ("snr_gamma", 5.0, weighted, "--loss_weighting=min_snr or soft_min_snr"),
            ("logit_mean", 0.0, normal, "--timestep_sampling=logit_normal"),
            ("logit_std", 1.0, normal, "--timestep_sampling=logit_normal"),
        ):
            if is_read and getattr(self, name) is None:
                setattr(self, name, default)
            elif not is_read and getattr(self, name) is not None:
                raise UserError(f"--{name} is only read with {reader}: give both, or neither.")

    def objective_options(self):
        """The keyword arguments of `diffusion.Objective`."""
        names = "loss_weighting", "snr_gamma", "timestep_sampling", "logit_mean", "logit_std"
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class LoRASettings(Settings):
    """The settings of lora.py: those of train.py and the adapter's."""

    rank: int = adapter(4, "Rank of the adapters: A is (rank, in), B is (out, rank).",
                        at_least=1, in_card=True)  # fmt: skip
    lora_alpha: float = adapter(
        None,
        "The update of a weight is alpha/rank · B·A. Default: alpha = rank.",
        above=0,
        in_card=True,
    )
    lora_dropout: float = adapter(
        0.0, "Dropout on the input of A.", at_least=0, below=1, in_card=True
    )
    use_dora: bool = adapter(
        False,
        "DoRA: also train the norm of each row of the adapted weights, beside A and B.",
        in_card=True,
    )
    lora_targets: list = adapter(
        ("attention",),
        "Layers to adapt: `attention` (q, k, v, out), `all-linear`, or names or endings of names.",
        nargs="+",
        in_card=True,
    )
    lora_weights: str = adapter(
        None, "LoRA file with the same layers and rank to start from.", may_change=True
    )

    def check(self):
        super().check()
        if self.from_scratch:
            raise UserError("--from_scratch is for train.py: a LoRA needs a trained prior.")
        if self.lora_weights and not os.path.exists(self.lora_weights):
            raise UserError(f"--lora_weights {self.lora_weights}: no such file.")

    def adapter_options(self):
        """The keyword arguments of `add_adapters`."""
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        return {
            "rank": self.rank, "alpha": alpha, "targets": self.lora_targets,
            "dropout": self.lora_dropout, "dora": self.use_dora,
        }  # fmt: skip


def check_limits(settings):
    """Raise UserError for a value outside its field's limits, or text that is not UTF-8."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str) and one != one.encode(errors="ignore").decode():
                raise UserError(f"--{field.name} contains bytes that are not valid UTF-8.")
            if isinstance(one, int | float):
                check_number(field.name, one, field.metadata)


def check_number(name, value, facts):
    least, most, above, below = (facts.get(n) for n in ("at_least", "at_most", "above", "below"))
    if not math.isfinite(value) and not (facts.get("infinite") and value > 0):
        raise UserError(f"--{name} is {value}; it must be a finite number.")
    if most is not None and not least <= value <= most:
        raise UserError(f"--{name} is {value}; it must be between {least} and {most}.")
    if least is not None and not value >= least:
        raise UserError(f"--{name} is {value}; it must be at least {least}.")
    if above is not None and not value > above:
        raise UserError(f"--{name} is {value}; it must be above {above}.")
    if below is not None and not value < below:
        raise UserError(f"--{name} is {value}; it must be below {below}.")


def short(path):
    """A path relative to the working directory, if that is shorter."""
    return min(str(path), os.path.relpath(path or "."), key=len)


def as_flags(values):
    """Settings by name as they are typed, with absolute paths made short."""
    words = []
    for name, value in values.items():
        typed = value if isinstance(value, list | tuple) else [] if value is True else [value]
        typed = [short(one) if os.path.isabs(str(one)) else str(one) for one in typed]
        words += [f"--{name}", *typed]
    return shlex.join(words)


def parse(kind, words=None, demo: dict | None = None, prog=None):
    """Parse a command line (default: this process's) into checked settings of class `kind`.

    demo: the values that --demo sets, for flags that are not given. An unknown flag ends the
    process with exit code 2 and the nearest known one; a value that can't be used is a UserError.
    prog: the program's name in messages, by default the script's.
    """
    words = sys.argv[1:] if words is None else words
    parser, sections = Parser(prog=prog), {}
    for field in dataclasses.fields(kind):
        facts = field.metadata
        if facts["section"] not in sections:
            sections[facts["section"]] = parser.add_argument_group(facts["section"])
        options = {name: facts[name] for name in ("choices", "nargs") if name in facts}
        if field.type is bool:
            options["action"] = "store_true"
        else:
            if field.type is list and facts.get("type") is int:
                options["action"] = "extend"  # the command that an error prints adds a number
            options["type"] = facts.get("type", str if field.type is list else field.type)
        help, default = facts["help"], field.default
        if field.type is not bool and default is not None:
            default = " ".join(map(str, default)) if isinstance(default, tuple) else default
            help += f" (default: {default})"
        names = [f"--{field.name}", *facts.get("aliases", [])]
        group = sections[facts["section"]]
        help = help.replace("%", "%%")
        group.add_argument(*names, default=argparse.SUPPRESS, help=help, **options)
        if field.type is bool:  # --no_… turns off what --demo sets
            group.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_false",
                default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip
    given = vars(parser.parse_args(words))
    for field in dataclasses.fields(kind):
        if field.type is not list and isinstance(given.get(field.name), list):
            parser.error(f"--{field.name} has no value.")  # argparse turns --flag=-- into a list
    preset = (demo or {}) if "demo" in given else {}
    preset = {name: value for name, value in preset.items() if name not in given}
    settings = kind(**preset, **given)
    settings.given, settings.notes = frozenset(given), ()
    if preset:
        settings.notes = (f"--demo sets {as_flags(preset)}",)
        own_data = {"train_data_dir", "dataset_name"} & given.keys()
        if own_data and "pretrained_prior_model_name_or_path" in preset:
            settings.notes += (DEMO_LIMIT,)
        if own_data and "validation_prompts" in preset:
            settings.notes += (DEMO_PROMPTS,)
    settings.check()
    for field in dataclasses.fields(kind):  # trackers keep a copy of the command line
        secret = getattr(settings, field.name) if field.metadata.get("secret") else None
        if secret:
            sys.argv = [word.replace(secret, "***") for word in sys.argv]
    return settings


def from_command_line(kind, demo=None):
    """`parse` for a program: a UserError is printed as one line and ends the process."""
    outlive()
    try:
        return parse(kind, demo=demo)
    except UserError as error:
        exit_with(error)


def public(settings):
    """The settings that may be written to a file, by name: all except secrets."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
        if not field.metadata.get("secret")
    }


def defaults_of(kind):
    """{name: default} of all settings that may be written to a file."""
    return {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in dataclasses.fields(kind)
        if not field.metadata.get("secret")
    }


def facts_of(kind, fact):
    """{name: value} of one fact beside each setting, where it is given."""
    return {f.name: f.metadata[fact] for f in dataclasses.fields(kind) if fact in f.metadata}
