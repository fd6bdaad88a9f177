"""Stages B and A equal diffusers' classes: outputs, gradients, files, initial weights."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from minwurst.base.errors import UserError
from minwurst.edge import decoders
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt
from tests import reference
from tests.conftest import ROOT, relative

# The published widths; fewer blocks, because the deepest level has 14 of 83 million parameters.
B = {"blocks": [1, 1, 2, 1], "dropout": 0.0}
A = {"bottleneck_blocks": 3}


def random_weights(model, std):
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=std)
    return model


def both(name, ours, std, **config):
    """Our class and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = random_weights(getattr(reference, name)(**config), std)
    model = ours(**config)
    model.load_state_dict(theirs.state_dict())
    return model, theirs


@pytest.fixture(scope="module")
def stage_b():
    return both("WuerstchenDiffNeXt", WuerstchenDiffNeXt, 0.03, **B)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [(6, 9)], ids=str)
def test_stage_b_predicts_the_same(stage_b, cells):
    """Larger grids, and other odd ones, are in test_decoders.py, with a smaller decoder."""
    ours, theirs = (model.eval() for model in stage_b)
    height, width = (int(side * 10.67) for side in cells)
    x, effnet = torch.randn(1, 4, height, width), torch.randn(1, 16, *cells)
    text = torch.randn(1, 77, 1024)
    for t in (0.02, 0.999):
        with torch.no_grad():
            found = ours(x, torch.tensor([t]), effnet, text)
            assert relative(found, theirs(x, torch.tensor([t]), effnet, text)) < 1e-5


def gradients_agree(ours, theirs):
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if weight.grad is None:
            assert expected[name].grad is None, name
        elif name.endswith("to_k.bias"):  # zero but for rounding
            assert weight.grad.norm() < 1e-4 * expected[name.replace("_k", "_v")].grad.norm()
        elif weight.grad.norm() < 1e-12:  # so is a bias in front of a batch norm
            assert expected[name].grad.norm() < 1e-12, name
        else:
            assert relative(weight.grad, expected[name].grad) < 1e-5, name


@pytest.mark.slow
def test_gradients_of_stage_b(stage_b):
    x, effnet, text = torch.randn(2, 4, 32, 32), torch.randn(2, 16, 3, 3), torch.randn(2, 77, 1024)
    t, noise = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 32, 32)
    for model in stage_b:
        model.train()
        (model(x, t, effnet, text) - noise).square().mean().backward()
    gradients_agree(*stage_b)


def encode(theirs, images):
    """Not `theirs.encode(images)`, which fails in diffusers 0.37."""
    return theirs.down_blocks(theirs.in_block(images))


def test_stage_a_encodes_decodes_and_learns_the_same(monkeypatch):
    ours, theirs = both("PaellaVQModel", PaellaVQModel, 0.1, **A)
    images, latents = torch.rand(2, 3, 48, 64), torch.randn(2, 4, 12, 16)
    with torch.no_grad():
        for model in (ours, theirs):
            model.eval()
        assert relative(ours.encode(images), encode(theirs, images)) < 1e-5
        expected = theirs.decode(latents).sample
        assert relative(ours.decode(latents), expected) < 1e-5
        quantised = theirs.decode(latents, force_not_quantize=False).sample
        assert relative(ours.decode(latents, quantise=True), quantised) < 1e-5
        assert relative(quantised, expected) > 1e-2
        monkeypatch.setattr("minwurst.step.stage_a.ROWS", 100)  # parts, the last shorter
        assert relative(ours.decode(latents), expected) < 1e-5
    images = images.double()  # or what should cancel in front of a batch norm would not
    ours.double().train()(images).square().mean().backward()
    theirs.double().train().decode(encode(theirs, images)).sample.square().mean().backward()
    gradients_agree(ours, theirs)
    for name in ("1.running_mean", "1.running_var"):
        mine, other = (m.down_blocks[-1].state_dict()[name] for m in (ours, theirs))
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("name", "ours", "config"),
    [
        ("WuerstchenDiffNeXt", WuerstchenDiffNeXt, {"blocks": [1, 1, 1, 1]}),
        ("PaellaVQModel", PaellaVQModel, {"bottleneck_blocks": 1}),
    ],
)
def test_initial_weights_and_files(tmp_path, name, ours, config):
    """The same distributions; a file of one class loads in the other.

    diffusers scales Stage B's `channelwise.4` once for each of the network's modules, to zero; the
    authors, and this project, once.
    """
    torch.manual_seed(1)
    mine, theirs = ours(**config), getattr(reference, name)(**config)
    expected = theirs.state_dict()
    assert list(mine.state_dict()) == list(expected)
    for key, weight in mine.state_dict().items():
        assert weight.shape == expected[key].shape, key
        if weight.numel() > 10_000 and not (ours is WuerstchenDiffNeXt and "wise.4" in key):
            one, other = weight.std().item(), expected[key].std().item()
            assert one == pytest.approx(other, rel=0.05), key
    theirs.save_pretrained(tmp_path / "theirs"), mine.save_pretrained(tmp_path / "mine")
    for kind, folder, wanted in ((ours, "theirs", theirs), (type(theirs), "mine", mine)):
        found = kind.from_pretrained(tmp_path / folder, low_cpu_mem_usage=False).state_dict()
        assert all(torch.equal(found[key], weight) for key, weight in wanted.state_dict().items())
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("mine", "theirs")]
    assert configs[0] == configs[1]


# ---- A diffusers without its Würstchen.


BLOCKED = """
import runpy, sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("diffusers.pipelines.") and ("deprecated" in name or "wuerst" in name):
            raise ImportError(f"{name} is gone")
sys.meta_path.insert(0, Gone())
for command in sys.argv[1:]:
    sys.argv = command.split()
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
import diffusers
diffusers.WuerstchenPriorPipeline
"""


@pytest.mark.slow
def test_it_all_works_without_diffusers_wuerstchen(tmp_path):
    """Train and sample with both scripts in a process where nothing can import it."""
    short = "--demo --max_train_steps=2 --train_batch_size=2 --validation_prompts rocket"
    commands = [f"{s}.py {short} --output_dir={tmp_path / s}" for s in ("train", "lora")]
    for script, kind in (("train", "prior"), ("lora", "lora")):
        output = tmp_path / f"{script}.png"
        where = f"--{kind}={tmp_path / script} --output={output}"
        commands.append(f"minwurst.sample --prompt rocket {where}")
    words = [sys.executable, "-c", BLOCKED, *commands]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("images before and after: ") == 2, done.stderr
    assert all((tmp_path / f"{script}.png").is_file() for script in ("train", "lora"))
    assert done.returncode and "is gone" in done.stderr  # it was really out of reach


# ---- Bad folders.


def edit(file, **changes):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


MISTAKES = {
    "other channels": (
        lambda f: edit(f / "vqgan/config.json", latent_channels=8),
        r"vqgan can't be loaded: ",
    ),
    "another width": (
        lambda f: edit(f / "decoder/config.json", clip_embd=8),
        r"decoder can't be loaded: ",
    ),
    "no json": (
        lambda f: (f / "decoder/config.json").write_text("{"),
        r"decoder can't be loaded: ",
    ),
    "a list": (
        lambda f: (f / "vqgan/config.json").write_text("[1]"),
        r"vqgan can't be loaded: ",
    ),
    "no weights": (
        lambda f: (f / "vqgan/diffusion_pytorch_model.safetensors").unlink(),
        r"vqgan can't be loaded: ",
    ),
    "cut weights": (
        lambda f: (f / "vqgan/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99),
        r"vqgan can't be loaded: ",
    ),
    "a strange index": (
        lambda f: (f / "model_index.json").write_text('{"latent_dim_scale": "big"}'),
        r"model_index.json can't be read, or its latent_dim_scale is impossible",
    ),
    "an unknown block": (
        lambda f: edit(f / "decoder/config.json", level_config=["CT", "CTA", "CTA", "CTX"]),
        r"decoder can't be loaded: .*unknown block X",
    ),
    "impossible heads": (
        lambda f: edit(f / "decoder/config.json", nhead=[-1, 3, 2, 2]),
        r"decoder can't be loaded: .*16 channels can't be divided among 3 heads",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_decoder_folder_is_one_line(wuerstchen, tmp_path, mistake):
    folder = shutil.copytree(wuerstchen / "decoder", tmp_path / "decoder")
    change, said = MISTAKES[mistake]
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        decoders.load_decoder(folder, torch.float32)
    assert "\n" not in str(error.value)


def test_the_scale_comes_from_the_folders_index(wuerstchen, tmp_path):
    folder = shutil.copytree(wuerstchen / "decoder", tmp_path / "decoder")
    assert decoders.load_decoder(folder, torch.float32)[-1] == 10.67
    (folder / "model_index.json").write_text('{"latent_dim_scale": 16}')
    decode = decoders.FullDecoder(folder, torch.device("cpu"))
    assert decode(torch.zeros(1, 16, 2, 3), "", torch.Generator()).size == (192, 128)
