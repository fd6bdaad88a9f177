"""--from_scratch: a new prior, as the published one is trained or as a rectified flow."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minwurst import sample
from minwurst.base.errors import UserError
from minwurst.base.settings import parse
from minwurst.edge import lora_file, models, run_file
from minwurst.edge.card import card
from minwurst.edge.decoders import FullDecoder
from minwurst.step import diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.prior import WuerstchenPrior
from tests import plain, reference
from tests.conftest import assert_bitwise_equal, difference, relative, saved, train_here

SIZES = {"c": 32, "c_cond": 32, "c_r": 16, "depth": 2, "nhead": 2, "dropout": 0.0}
FLOW = {**SIZES, "prediction_type": "flow_prediction"}


def config(folder, sizes):
    file = folder / "sizes.json"
    file.write_text(json.dumps(sizes))
    return file


def test_a_new_prior_predicts_its_input(wuerstchen, tmp_path):
    parts = models.Parts(config(tmp_path, SIZES), wuerstchen, None, None, False, from_scratch=True)
    prior, other = models.initial_prior(parts, seed=1), models.initial_prior(parts, seed=2)
    x, text = torch.randn(2, 16, 3, 3), torch.randn(2, 5, 32)
    assert relative(prior(x, torch.tensor([0.1, 1.0]), text), x) < 1e-4
    name = "blocks.0.channelwise.0.weight"
    assert not torch.equal(prior.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("sizes", [SIZES, FLOW], ids=["noise", "flow"])
def test_equals_a_plain_loop(wuerstchen, tmp_path, sizes):
    file = config(tmp_path, sizes)
    out = train_here(wuerstchen, tmp_path / "out", from_scratch=file, **plain.FLAGS)
    parts = models.Parts(file, wuerstchen, None, None, False, from_scratch=True)
    prior = reference.WuerstchenPrior(**SIZES)
    prior.load_state_dict(models.initial_prior(parts, plain.FLAGS["seed"]).state_dict())
    trained = dict(prior.train().named_parameters())
    plain.train(prior, list(trained.values()), wuerstchen, {}, flow=sizes is FLOW)
    tensors = saved(out / "checkpoint-4")
    found = {name: tensors[f"weights/{name}"] for name in trained}
    assert difference(found, trained) < 1e-6


@pytest.mark.parametrize("sizes", [SIZES, FLOW], ids=["noise", "flow"])
def test_resumed_it_is_the_same(wuerstchen, tmp_path, sizes):
    options = {"from_scratch": config(tmp_path, sizes), "checkpointing_steps": 2}
    one = train_here(wuerstchen, tmp_path / "one", **options)
    two = train_here(wuerstchen, tmp_path / "two", **options, max_train_steps=2)
    train_here(wuerstchen, two, **options, resume_from_checkpoint="latest")
    assert_bitwise_equal(one / "checkpoint-4", two / "checkpoint-4")


@pytest.fixture(scope="module")
def flow_run(wuerstchen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    return train_here(
        wuerstchen, folder / "run", from_scratch=config(folder, FLOW), validation_split=0.2,
        pretrained_decoder_model_name_or_path=wuerstchen / "decoder", resolution=96,
        validation_prompts="a bear",
    )  # fmt: skip


@torch.no_grad()
def test_a_flow_is_sampled_as_one(wuerstchen, flow_run, tmp_path):
    """minwurst.sample gives the image of Euler steps written out here."""
    words = ["--prompt=a bear", f"--prior={flow_run}", f"--output={tmp_path}/image.png"]
    sample.main(parse(sample.SampleSettings, words))
    key = randomness.image_key("a bear", 0)
    noise = randomness.sampling_noise(7, key, (16, 3, 3))  # the run's seed
    text = encode_text(*models.load_text(wuerstchen, torch.float32), ["a bear", ""])
    prior = models.load_prior(flow_run / "prior_pipeline").eval()
    x = noise[0]
    for step in range(29):
        t = torch.full((2,), 1 - step / 29)
        with_text, without = prior(torch.cat([x, x]), t, text)
        x = x - (without + 4 * (with_text - without)) / 29
    decode = FullDecoder(wuerstchen / "decoder", torch.device("cpu"))
    expected = np.asarray(decode(x, "a bear", randomness.decoding_generator(7, key))).astype(int)
    found = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
    assert found.std() > 10 and abs(found - expected).max() <= 1


def test_a_flow_is_recorded(wuerstchen, flow_run, capsys):
    prior = models.load_prior(flow_run / "prior_pipeline", as_trained=True)
    assert diffusion.objective_of(prior.config).prediction == "flow_prediction"
    text = card(run_file.read(flow_run), "somebody/flow", [])
    assert "was trained from scratch" in text and "flow_prediction, which diffusers" in text
    assert str(flow_run) not in text and "sizes.json" not in text


def test_euler_steps_reach_the_image():
    """With the direction of the straight line to one image, sampling ends at that image."""
    objective = diffusion.Flow()
    clean, noise = torch.randn(2, 16, 3, 3), torch.randn(30, 2, 16, 3, 3)

    def predict(x, t):
        return (x - clean) / diffusion.per_sample(t, x)

    found = diffusion.sample(predict, noise, objective.times(), objective.reverse_step)
    assert relative(found, clean) < 1e-5


def test_held_out_times_have_the_same_snr():
    t = torch.linspace(0.05, 0.95, 19)
    signal = diffusion.alpha_bar(t)
    flow = diffusion.Flow().same_snr(t)
    torch.testing.assert_close(((1 - flow) / flow) ** 2, signal / (1 - signal))
    clean, noise = torch.randn(19, 16, 3, 3), torch.randn(19, 16, 3, 3)
    noisy = diffusion.Flow().add_noise(clean, noise, flow)
    target = diffusion.Flow().target(clean, noise, flow)
    assert relative(diffusion.Flow().predicted_noise(target, noisy, flow), noise) < 1e-5


def test_flow_and_noise_are_not_mixed(wuerstchen, flow_run, tmp_path):
    with pytest.raises(UserError, match="--loss_weighting is for priors that predict the noise"):
        train_here(wuerstchen, tmp_path / "a", loss_weighting="p2",
                   from_scratch=config(tmp_path, FLOW))  # fmt: skip
    adapted = train_here(wuerstchen, tmp_path / "lora", script="lora.py", max_train_steps=1)
    prior = WuerstchenPrior(**{**SIZES, "c": 64, "c_r": 16, "nhead": 4})
    prior.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(UserError, match="predicts epsilon, and this one predicts flow_prediction"):
        lora_file.load(prior, adapted)
    models.record_prediction(prior, "flow_prediction", "here")
    with pytest.raises(UserError, match="here predicts sample, and step/diffusion.py knows"):
        models.record_prediction(prior, "sample", "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--from_scratch .*: no .json file, and no folder with a config.json"),
        ("[]", "sizes.json can't be loaded: sizes.json: it is not a JSON object"),
        ('{"c": 30, "nhead": 4, "c_cond": 32}', "30 channels can't be divided among 4 heads"),
        ('{"c_cond": 7}', "The text encoder has width 32, but the prior expects 7"),
        ('{"prediction_type": "x0", "c_cond": 32}', "sizes.json predicts x0, and step/diffusion"),
    ],
)
def test_bad_configs(wuerstchen, tmp_path, content, message):
    file = tmp_path / "sizes.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        train_here(wuerstchen, tmp_path / "out", from_scratch=file)


def test_a_lora_is_not_trained_from_scratch(wuerstchen, tmp_path):
    with pytest.raises(UserError, match="--from_scratch is for train.py"):
        train_here(wuerstchen, tmp_path, script="lora.py", from_scratch=config(tmp_path, SIZES))


def test_a_model_folder_gives_its_sizes(wuerstchen, tmp_path):
    out = train_here(wuerstchen, tmp_path, from_scratch=wuerstchen, max_train_steps=1)
    sizes = models.prior_sizes(out / "prior_pipeline" / "prior")
    assert sizes == models.prior_sizes(wuerstchen / "prior")
