"""Loading the model's parts from subfolders and from the root; errors name the cause."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minwurst.base.errors import UserError
from minwurst.edge import export, models
from minwurst.step.encoders import encode_text
from tests import tiny
from tests.conftest import assert_bitwise_equal, train_here


@pytest.fixture
def copy(wuerstchen, tmp_path):
    """A copy of the small model folder, for tests that damage it."""
    return shutil.copytree(wuerstchen, tmp_path / "copy")


WEIGHTS = "prior/diffusion_pytorch_model.safetensors"


def test_parts_load(wuerstchen):
    prior = models.load_prior(wuerstchen)
    tokenizer, text_encoder = models.load_text(models.text_folder(wuerstchen), torch.bfloat16)
    encoder = models.load_image_encoder(wuerstchen / "image_encoder")
    parts = tiny.parts(wuerstchen)
    encoders = models.make_encoders(parts, torch.bfloat16, torch.device("cpu"))
    models.check_fit(parts)
    assert prior.dtype == encoder.dtype == torch.float32 and text_encoder.dtype == torch.bfloat16
    assert prior.training is False and not text_encoder.training and not encoder.training
    frozen = [*text_encoder.parameters(), *encoder.parameters()]
    assert not any(weight.requires_grad for weight in frozen)
    states = encode_text(tokenizer, text_encoder, ["a bear", ""])
    assert states.shape == (2, 77, 32)
    assert models.encoded_shapes(parts, 96) == ((16, 3, 3), (77, 32))  # before loading
    assert torch.equal(encoders.condition(["a bear", ""])["text"], states)


def test_text_is_encoded_as_the_pipeline_does(wuerstchen):
    """Same text states as diffusers' prompt encoding, for a prompt and for the empty prompt."""
    import diffusers

    tokenizer, text_encoder = models.load_text(wuerstchen, torch.float32)
    pipeline = diffusers.WuerstchenPriorPipeline(
        tokenizer, text_encoder, models.load_prior(wuerstchen), diffusers.DDPMWuerstchenScheduler()
    )
    expected = pipeline.encode_prompt("cpu", 1, True, ["a bear", "a bell"])
    found = encode_text(tokenizer, text_encoder, ["a bear", "a bell"])
    nothing = encode_text(tokenizer, text_encoder, ["", ""])
    torch.testing.assert_close(found, expected[0])
    torch.testing.assert_close(nothing, expected[1])


def test_long_captions_are_cut(wuerstchen):
    tokenizer, text_encoder = models.load_text(wuerstchen, torch.float32)
    assert encode_text(tokenizer, text_encoder, ["bear " * 500]).shape == (1, 77, 32)


def test_prior_at_the_root(wuerstchen, tmp_path):
    """A repository with only the prior: the text encoder comes from the complete repository."""
    alone = shutil.copytree(wuerstchen / "prior", tmp_path / "alone")
    expected = models.load_prior(wuerstchen).state_dict()
    assert all(
        torch.equal(t, expected[name]) for name, t in models.load_prior(alone).state_dict().items()
    )
    said = "warp-ai/wuerstchen-prior.*not available from the Hub.*text encoder that .*alone lacks"
    with pytest.raises(UserError, match=f"--pretrained_prior_model_name_or_path {said}"):
        models.text_folder(alone)  # the Hub is unavailable in tests
    with pytest.raises(UserError, match=f"--prior {said}"):
        models.text_folder(alone, where="--prior")


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("prior", "prior/config.json"),
        ("text_encoder", "text_encoder/config.json"),
        ("tokenizer", "tokenizer/tokenizer_config.json"),
        ("image_encoder", "config.json"),
    ],
)
def test_missing_part_is_named(copy, part, missing):
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"is not a complete model folder: {missing}.* is missing"):
        models.check_parts(copy, models.text_folder(copy), copy / "image_encoder")


def test_a_folder_that_is_something_else(tmp_path):
    with pytest.raises(UserError, match="is not a complete model folder: prior/config.json"):
        models.check_parts(tmp_path, tmp_path, tmp_path)


def test_fingerprint_follows_content(wuerstchen, copy):
    parts = ("image_encoder", "text_encoder", "tokenizer")
    before = models.fingerprint(*(wuerstchen / part for part in parts))
    assert models.fingerprint(*(copy / part for part in parts)) == before
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert models.fingerprint(*(copy / part for part in parts)) != before


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "truncated", "no weights"])
def test_bad_weights_are_named(copy, change):
    file = copy / WEIGHTS
    tensors = load_file(file)
    if change == "missing":
        del tensors["out.1.weight"]
    elif change == "unexpected":
        tensors["stranger"] = torch.zeros(1)
    elif change == "shape":
        tensors["out.1.weight"] = torch.zeros(3, 64, 1, 1)
    save_file(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif change == "no weights":
        file.unlink()
    said = {
        "missing": "missing keys: out.1.weight", "unexpected": "unexpected keys: stranger",
        "shape": r"mismatched out.1.weight: \[3, 64, 1, 1\], not \[32, 64, 1, 1\]",
        "truncated": "diffusion_pytorch_model.safetensors: ", "no weights": "no .safetensors file",
    }[change]  # fmt: skip
    with pytest.raises(UserError, match=f"prior can't be loaded: .*{said}"):
        models.load_prior(copy)


def test_missing_text_weights_are_named(copy):
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="text_encoder can't be loaded: .*layers.1.mlp.fc1.weight"):
        models.load_text(copy, torch.float32)


def test_pickles_are_not_read(copy):
    """Weights available only as a pickle are not loaded, whatever the pickle contains."""
    (copy / WEIGHTS).unlink()
    torch.save({"a": 1}, copy / "prior" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="prior can't be loaded"):
        models.load_prior(copy)


def test_parts_that_do_not_fit(wuerstchen, copy):
    file = copy / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "hidden_size": config["hidden_size"] + 4}))
    with pytest.raises(UserError, match="The text encoder has width 36, but the prior expects 32"):
        models.check_fit(tiny.parts(copy))


def test_names_that_lead_nowhere():
    for name in ("/not/there", "./not/there", "not_there"):
        with pytest.raises(
            UserError, match=f"--image_encoder_name_or_path {name}: no such"
        ):
            models.locate("--image_encoder_name_or_path", name)
    with pytest.raises(
        UserError, match="--image_encoder_name_or_path some/repo: .*Hub.*Give a local"
    ):
        models.locate("--image_encoder_name_or_path", "some/repo")


def edit(file, change):
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


CONFIGS = {
    "no JSON": ("{", "Expecting property name"),
    "a list": ("[1]", "config.json: it is not a JSON object"),
    "absurdly wide": ({"c": 10**12}, "c is 1000000000000, which is not possible"),
    "absurdly deep": ({"depth": 10**9}, "depth is 1000000000, which is not possible"),
    "negative": ({"c": -3}, "c is -3, which is not possible"),
    "impossible heads": ({"nhead": 5}, "64 channels can't be divided among 5 heads"),
    "text for a number": ({"depth": "two"}, "depth is 'two', which is not possible"),
    "another model": ({"_class_name": "UNet2DModel"}, "it is a UNet2DModel, not a WuerstchenPrior"),
    "fewer blocks": ({"depth": 1}, "unexpected keys: blocks.3."),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_from_anybody(copy, kind):
    content, said = CONFIGS[kind]
    file = copy / "prior" / "config.json"
    if isinstance(content, dict):
        edit(file, lambda config: config.update(content))
    else:
        file.write_text(content)
    with pytest.raises(UserError, match=f"prior can't be loaded: .*{said}") as error:
        models.check_fit(tiny.parts(copy))
        models.prior_sizes(copy / "prior")
        models.load_prior(copy)
    assert "\n" not in str(error.value)


def test_unknown_entries_of_a_config_are_said(copy, capsys):
    edit(copy / "prior" / "config.json", lambda config: config.update(attention="linear"))
    models.load_prior(copy)
    assert "config.json: unknown entries are ignored: attention" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["prior", "image_encoder", "text_encoder"])
@pytest.mark.parametrize("kind", ["nan", "int", "complex"])
def test_weights_of_another_kind_are_named_by_their_file(copy, part, kind):
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    file = copy / part / f"{name}.safetensors"
    tensors = load_file(file)
    key = next(key for key, tensor in tensors.items() if tensor.dim() == 2 or "mapper.0" in key)
    tensor = tensors[key]
    tensors[key] = {
        "nan": tensor * float("nan"), "int": tensor.to(torch.int8),
        "complex": tensor.to(torch.complex64),
    }[kind]  # fmt: skip
    save_file(tensors, file, metadata={"format": "pt"})
    load = {
        "prior": models.load_prior, "text_encoder": lambda f: models.load_text(f, torch.float32),
        "image_encoder": lambda f: models.load_image_encoder(f / "image_encoder"),
    }[part]  # fmt: skip
    said = "is not finite" if kind == "nan" else "has type torch"
    with pytest.raises(UserError, match=f"{part} can't be loaded: {file.name}: {key} {said}"):
        load(copy)


def test_an_empty_tokenizer(copy):
    edit(
        copy / "tokenizer" / "tokenizer_config.json",
        lambda config: config.update(model_max_length=10**30),
    )
    with pytest.raises(UserError, match="tokenizer: .* do not fit the text encoder"):
        models.load_text(copy, torch.float32)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        models.load_text(copy, torch.float32)


@pytest.mark.slow
def test_ones_own_base_in_one_flag(copy, tmp_path, capsys):
    """Training, resuming with the same command, and a checkpoint from before there was this."""
    export.write_index(copy, resolution=96, guidance_scale=1.5)
    nothing = dict.fromkeys(["image_encoder_name_or_path", "resolution"])
    same = {**nothing, "validation_prompts": "a bear", "validation_steps": 2}
    run = train_here(copy, tmp_path / "run", **same, max_train_steps=2)
    taken = f"taken from {copy}: image_encoder/, decoder/, resolution 96, guidance_scale 1.5"
    assert taken in capsys.readouterr().out
    known = json.loads((run / "run.json").read_text())["settings"]
    assert known["pretrained_decoder_model_name_or_path"] == str(copy / "decoder")
    assert known["resolution"] == 96
    index = json.loads((run / "prior_pipeline/model_index.json").read_text())
    assert (index["resolution"], index["guidance_scale"]) == (96, 1.5)  # for who uses the result
    again = train_here(run, tmp_path / "again", max_train_steps=1, **nothing)
    assert (again / "prior_pipeline").is_dir()  # the output folder of a run is a base, too
    assert f"taken from {run}: image_encoder/, decoder/, resolution 96" in capsys.readouterr().out
    with pytest.raises(UserError, match="is missing. python -m minwurst.export makes one of"):
        train_here(run / "checkpoint-2", tmp_path / "wrong",
                   image_encoder_name_or_path=copy / "image_encoder")  # fmt: skip

    train_here(copy, run, **same, max_train_steps=3, resume_from_checkpoint="latest")
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: max_train_steps 2 → 3" in printed
    assert printed.count("changed since") == 1
    spelled_out = {
        "image_encoder_name_or_path": copy / "image_encoder", "resolution": 96,
        "pretrained_decoder_model_name_or_path": copy / "decoder",
        "validation_prompts": "a bear", "validation_steps": 2,
    }  # fmt: skip
    other = train_here(copy, tmp_path / "other", **spelled_out, max_train_steps=3)
    assert_bitwise_equal(run / "checkpoint-3", other / "checkpoint-3")
    train_here(copy, other, **same, max_train_steps=4, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="--resolution was 96 and is now 64, which would be"):
        train_here(
            copy, run, **{**same, "resolution": 64}, max_train_steps=5,
            resume_from_checkpoint="latest",
        )  # fmt: skip
