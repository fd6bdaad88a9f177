"""The command line: diffusers' command, the reference's flags, and one-line errors."""

import importlib.util
import os
import shlex

import pytest

from minwurst import cost, export, hub, lora
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, from_command_line, parse, public
from minwurst.step import distributed

DATA = ["--train_data_dir=pictures"]


def test_the_seeds_command_parses():
    words = shlex.split(
        """--mixed_precision="fp16" --dataset_name=lambdalabs/naruto-blip-captions --resolution=768
        --train_batch_size=4 --gradient_accumulation_steps=4 --gradient_checkpointing
        --dataloader_num_workers=4 --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
        --checkpoints_total_limit=3 --lr_scheduler="constant" --lr_warmup_steps=0
        --validation_prompts="A robot naruto, 4k photo" --report_to="wandb" --push_to_hub
        --output_dir="wuerstchen-prior-naruto-model" """
    )
    settings = parse(Settings, words)
    assert settings.dataset_name == "lambdalabs/naruto-blip-captions"
    assert settings.validation_prompts == ["A robot naruto, 4k photo"]
    assert (settings.learning_rate, settings.max_train_steps) == (1e-5, 15000)
    assert settings.gradient_checkpointing and settings.push_to_hub and not settings.use_ema


def test_names_and_defaults_of_the_reference():
    """Names and defaults as in the reference script's parser."""
    expected = {
        "pretrained_prior_model_name_or_path": "warp-ai/wuerstchen-prior",
        "pretrained_decoder_model_name_or_path": "warp-ai/wuerstchen",
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": "pictures",
        "image_column": "image", "caption_column": "text", "max_train_samples": None,
        "validation_prompts": None, "output_dir": "wuerstchen-model-finetuned", "cache_dir": None,
        "seed": None, "train_batch_size": 1, "num_train_epochs": 100, "max_train_steps": None,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-4,
        "lr_scheduler": "constant", "lr_warmup_steps": 500, "use_8bit_adam": False,
        "allow_tf32": False, "use_ema": False, "dataloader_num_workers": 0, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "push_to_hub": False, "hub_token": None, "hub_model_id": None, "logging_dir": "logs",
        "report_to": "tensorboard", "checkpointing_steps": 500, "checkpoints_total_limit": None,
        "resume_from_checkpoint": None, "validation_epochs": 5,
        "tracker_project_name": "text2image-fine-tune", "mixed_precision": "no",
    }  # fmt: skip
    found = vars(parse(Settings, DATA))
    assert {name: found[name] for name in expected} == expected
    assert found["resolution"] == 768  # 512 gives 16×16 latents, which can't be decoded


def test_help_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    printed = capsys.readouterr().out
    for name in public(Settings()).keys() | {"hub_token"}:
        assert f"--{name}" in printed


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--resolution=700", "--resolution is 700; it must be a multiple of 32.*try 704"),
        ("--resolution=0", "--resolution is 0.*try 32"),
        ("--train_batch_size=0", "--train_batch_size is 0; it must be between 1 and"),
        ("--max_train_steps=-1", "--max_train_steps is -1; it must be between 1 and"),
        ("--checkpoints_total_limit=0", "--checkpoints_total_limit is 0"),
        ("--seed=-5", "--seed is -5; it must be at least 0"),
        ("--learning_rate=nan", "--learning_rate is nan"),
        ("--caption_dropout=1.5", "--caption_dropout is 1.5; it must be between 0 and 1"),
        ("--max_grad_norm=0", "--max_grad_norm is 0.0; it must be above 0"),
        ("--max_grad_norm=-inf", "--max_grad_norm is -inf; it must be a finite number"),
        ("--learning_rate=inf", "--learning_rate is inf; it must be a finite number"),
        ("--snr_gamma=5", "--snr_gamma is only read with --loss_weighting=min_snr"),
        ("--logit_std=2", "--logit_std is only read with --timestep_sampling=logit_normal"),
        ("--skip_steps=0", "--skip_steps is 0; it must be at least 1"),
    ],
)
def test_impossible_values(flag, said):
    with pytest.raises(UserError, match=said):
        parse(Settings, [*DATA, flag])


def test_the_objectives_defaults_are_filled_in():
    words = [*DATA, "--loss_weighting=soft_min_snr", "--timestep_sampling=logit_normal"]
    assert parse(Settings, words).objective_options() == {
        "loss_weighting": "soft_min_snr", "snr_gamma": 5.0,
        "timestep_sampling": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0,
    }  # fmt: skip
    assert parse(Settings, [*words, "--snr_gamma=1", "--logit_mean=-0.5"]).logit_mean == -0.5
    assert parse(Settings, DATA).snr_gamma is None
    parse(Settings, [*DATA, "--max_grad_norm=inf"])


def test_repeated_numbers_add_up():
    words = [*DATA, "--skip_steps", "3", "4", "--skip_steps=9"]
    assert parse(Settings, words).skip_steps == [3, 4, 9]


def test_eight_bit_adam_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--use_8bit_adam needs .*pip install bitsandbytes"):
        parse(Settings, [*DATA, "--use_8bit_adam"])


def test_no_data_names_the_flags():
    with pytest.raises(UserError, match="--dataset_name .*--train_data_dir"):
        parse(Settings, [])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--leaning_rate=1", "did you mean --learning_rate"),
        ("--max_train", "did you mean --max_train_steps"),  # no abbreviations
        ("--mixed_precision=fp8", "--mixed_precision fp8: choose no, fp16 or bf16."),
        ("--train_batch_size=four", "--train_batch_size four: must be a whole number."),
        ("--learning_rate=fast", "--learning_rate fast: must be a number."),
        ("--learning_rate", "--learning_rate: expected one argument"),
        ("--use_ema=true", "--use_ema: takes no value, but there is 'true'"),
        ("--zzz", "unknown flag --zzz; see --help."),
    ],
)
def test_mistakes_are_one_line(flag, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stopped:
        parse(Settings, [*DATA, flag])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("train.py: ") and said in printed


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (hub, ["run"], "minwurst.hub: the following arguments are required: repository"),
        (hub, ["run", "me/x", "y"], "minwurst.hub: found a value without a flag; see --help."),
        (lora, ["shw", "x"], "minwurst.lora: verb shw: choose show or merge."),
        (lora, ["merge", "a", "b", "c", "--scal=2"], "minwurst.lora: unknown flag --scal; did you "
         "mean --scale?"),
        (cost, ["--roofline=X"], "minwurst.cost: --roofline X: choose H100, "),
        (export, ["run", "--chekpoint=x"], "minwurst.export: unknown flag --chekpoint; did you "
         "mean --checkpoint?"),
    ],
)  # fmt: skip
def test_mistakes_of_other_programs_are_one_line(program, words, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [program.__name__, *words])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith(said) and printed.count("\n") == 1


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model folder with an image encoder, a decoder and a resolution, by name."""
    for file in ("image_encoder/config.json", "decoder/decoder/config.json"):
        (tmp_path / "base" / file).parent.mkdir(parents=True)
        (tmp_path / "base" / file).write_text("{}")
    (tmp_path / "base/model_index.json").write_text('{"resolution": 192}')
    monkeypatch.chdir(tmp_path)
    return "base"


def test_a_complete_folder_is_enough(base):
    words = [*DATA, f"--pretrained_prior_model_name_or_path={base}"]
    settings = parse(Settings, words)
    assert settings.image_encoder_name_or_path == "base/image_encoder"
    assert settings.pretrained_decoder_model_name_or_path == "base/decoder"
    assert settings.resolution == 192
    assert settings.notes == ("taken from base: image_encoder/, decoder/, resolution 192",)
    settings.check()  # a second time
    assert len(settings.notes) == 1


def test_given_flags_override_the_folder(base):
    """Also where they are at their default."""
    words = [f"--pretrained_prior_model_name_or_path={base}", "--resolution=768",
             "--image_encoder_name_or_path=mine"]  # fmt: skip
    settings = parse(Settings, [*DATA, *words])
    assert (settings.resolution, settings.image_encoder_name_or_path) == (768, "mine")
    assert settings.notes == ("taken from base: decoder/",)
    demo = {"pretrained_prior_model_name_or_path": base, "seed": 3, "train_data_dir": "emoji"}
    assert parse(Settings, ["--demo", "--resolution=64"], demo).resolution == 64
    switched = {**demo, "cache_latents": True}
    words = ["--demo", "--random_crop"]
    with pytest.raises(UserError, match="With --demo, which sets it, add --no_cache_latents"):
        parse(Settings, words, switched)
    assert not parse(Settings, [*words, "--no_cache_latents"], switched).cache_latents


@pytest.mark.parametrize(
    ("stated", "wrong"),
    [
        ("{", " can't be read"), ("[]", " can't be read"),
        *[(f'{{"resolution": {one}}}', ": its resolution") for one in ("700", '"192"', "true")],
        *[(f'{{"guidance_scale": {one}}}', ": its guidance") for one in ("-1", '"4"', "NaN")],
    ],
)  # fmt: skip
def test_what_a_folder_says_can_not_be_used(base, tmp_path, stated, wrong):
    (tmp_path / "base/model_index.json").write_text(stated)
    with pytest.raises(UserError, match=f"base/model_index.json{wrong}"):
        parse(Settings, [*DATA, f"--pretrained_prior_model_name_or_path={base}"])


def test_the_demo_says_what_it_sets(base):
    demo = {
        "pretrained_prior_model_name_or_path": base, "train_data_dir": os.path.abspath("emoji"),
        "cache_latents": True, "seed": 0, "validation_prompts": ["a bear", "owl"],
    }  # fmt: skip
    notes = parse(Settings, ["--demo"], demo).notes
    assert notes[0] == (
        "--demo sets --pretrained_prior_model_name_or_path base --train_data_dir emoji "
        "--cache_latents --seed 0 --validation_prompts 'a bear' owl"
    )
    assert len(notes) == 2 and notes[1].startswith("taken from base")
    words = shlex.split(notes[0].removeprefix("--demo sets "))
    assert public(parse(Settings, words)) == {
        **public(parse(Settings, ["--demo"], demo)), "demo": False, "train_data_dir": "emoji",
    }  # fmt: skip
    for flag in ("--train_data_dir=mine", "--dataset_name=mine"):
        settings = parse(Settings, ["--demo", "--seed=4", flag], demo)
        assert "--seed" not in settings.notes[0] and "knows only emoji" in settings.notes[1]
        assert "give your own with --validation_prompts" in settings.notes[2]
    words = ["--demo", "--train_data_dir=mine", "--pretrained_prior_model_name_or_path=other"]
    assert "emoji" not in " ".join(parse(Settings, words, demo).notes)


def test_the_token_is_not_written():
    settings = parse(Settings, [*DATA, "--hub_token=hf_secret"])
    assert "hf_secret" not in str(public(settings))
    assert "hub_token" not in public(settings)


def test_a_user_error_is_one_line(capsys, monkeypatch):
    def fail(settings):
        raise UserError("Row 3: broken.")

    monkeypatch.setattr("sys.argv", ["train.py", *DATA])
    with pytest.raises(SystemExit) as stopped:
        distributed.launch(fail, from_command_line(Settings), print)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "train.py: Row 3: broken.\n"
