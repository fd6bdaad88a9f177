"""Both sides of the benchmark compute the same, and every part runs, including the GPU part."""

import sys

import pytest
import torch
from PIL import Image

from minwurst.base.settings import Settings, parse
from tests import benchmark, benchmark_gpu, benchmark_script, benchmark_step, timing, tiny
from tests.conftest import ROOT, command, flags

pytestmark = pytest.mark.slow

SMALL = {"c_in": 16, "c": 64, "c_cond": 1280, "c_r": 16, "depth": 2, "nhead": 4, "dropout": 0.1}


@pytest.fixture
def pair():
    return benchmark_step.make_pair(SMALL)


def test_both_sides_are_shown_to_compute_the_same(pair):
    batch = benchmark_step.make_batch(2, 6, torch.float32)
    benchmark_step.assert_same(*pair, *batch, {torch.float32: 1e-4, torch.bfloat16: 5e-2})
    with torch.no_grad():
        pair[0].blocks[2].attention.to_v.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="the output in fp32 differs"):
        benchmark_step.assert_same(*pair, *batch, {torch.float32: 1e-4})


def test_its_preprocessing_is_torchvisions(torchvision_numbers):
    for name, pixels in torchvision_numbers.items():
        if name.startswith("picture "):
            picture = Image.fromarray(pixels.numpy())
            expected = torchvision_numbers[name.replace("picture", "result")]
            found = benchmark.reference_pixels(picture, 64)
            assert benchmark_step.relative(found, expected) < 1e-6, name


def test_ratios_are_of_the_same_round(capsys):
    timing.row("what", [2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert capsys.readouterr().out == "| what | 4 s | 1 s | 3.00 | 2.00 – 4.00 |\n"


def test_each_side_is_called_once_a_round_and_once_before():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = timing.take_turns(sides, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_gpus_steps_train_their_own_side(kind):
    """On the CPU with a small prior: every variant of a step changes the trained weights."""
    batch = benchmark_step.make_batch(2, 3, torch.bfloat16)
    sides = [(benchmark_step.Reference, benchmark_gpu.their_step, {})]
    variants = [{}, *benchmark_gpu.VARIANTS.values()]
    sides += [(benchmark_step.WuerstchenPrior, benchmark_gpu.our_step, more) for more in variants]
    for prior_class, make, options in sides:
        prior = benchmark_gpu.make_prior(prior_class, SMALL)
        trained = benchmark_gpu.trained_of(prior, kind, make is benchmark_gpu.our_step)
        before = [weight.detach().clone() for weight in trained]
        make(prior, trained, *batch, **options)()
        assert not all(map(torch.equal, before, trained)), options


def test_the_gpus_part_is_rehearsed(capsys):
    benchmark_gpu.gpu(1, rehearse=True)
    printed = capsys.readouterr().out
    assert "one rank under DDP | | gradients 0.0e+00 apart from those without" in printed
    assert "lora.py, fp16, stopped and resumed | | bit for bit the same: True" in printed
    assert "| fp16 compared with fp32 |" in printed
    for kind in ("full", "LoRA"):
        for more in ("", ", gradient checkpointing"):
            assert f"| {kind}, batch 2{more} |" in printed
    assert printed.count("| … peak memory; estimated") == 4
    assert all(f": {name} (first)" in printed for name in benchmark_gpu.VARIANTS)


def test_what_the_references_script_needs_is_named(tmp_path, capsys, monkeypatch):
    benchmark_script.script(3)
    file = tmp_path / "train_text_to_image_lora_prior.py"
    file.touch()
    monkeypatch.setattr(benchmark_script.importlib.util, "find_spec", lambda name: None)
    benchmark_script.script(3, file)
    lines = capsys.readouterr().out.splitlines()
    assert "script needs --reference_script=PATH" in lines[0]
    assert "pip install accelerate tensorboard peft" in lines[1]


def test_a_script_gets_what_it_needs_to_start(wuerstchen, tmp_path):
    """One of ours with the reference's imports, because the reference's is not shipped."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from diffusers import AutoPipelineForText2Image\n"
        "from diffusers.pipelines.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS, WuerstchenPrior\n"
        "from huggingface_hub import hf_hub_download\n"
        "from torchvision.models import efficientnet_v2_s\n"
        "import torch\n"
        "efficientnet_v2_s(weights='DEFAULT')\n"
        "file = hf_hub_download('dome272/wuerstchen', filename='model_v2_stage_b.pt')\n"
        "print(sorted(torch.load(file)), sys.argv[1:], torch.randn_like(torch.ones(2, 3)).shape)\n"
    )
    _, printed = command(
        sys.executable, "-m", "tests.reference_script", script, "--seed=3", "--same_noise=3",
        f"--image_encoder={wuerstchen / 'image_encoder'}",
    )  # fmt: skip
    assert "['effnet_state_dict'] ['--seed=3'] torch.Size([2, 3])" in printed


def test_the_references_run_ends_in_a_result(wuerstchen, tmp_path):
    words = flags(
        wuerstchen, tmp_path, max_train_steps=None, num_train_epochs=1, mixed_precision="bf16"
    )
    benchmark.reference_run(parse(Settings, words))
    before = tiny.WuerstchenPrior.from_pretrained(wuerstchen / "prior").state_dict()
    after = tiny.WuerstchenPrior.from_pretrained(tmp_path).state_dict()
    assert not torch.equal(before["out.1.weight"], after["out.1.weight"])
    assert (tmp_path / "optimizer.bin").is_file()


def test_the_readme_has_the_counted_memory(capsys):
    benchmark_step.memory()
    printed = capsys.readouterr().out
    assert printed in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    shares = [float(line.split("|")[4].split()[0]) for line in printed.splitlines()]
    assert all(share <= 0.7 for share in shares[::2]) and all(s <= 0.1 for s in shares[1::2])


def test_decoding_is_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "WORK", tmp_path)
    small = {
        "b": {"c_hidden": [16, 16, 16, 16], "nhead": [-1, 2, 2, 2], "blocks": [1, 1, 1, 1],
              "c_cond": 32, "clip_embd": 64},
        "a": {"bottleneck_blocks": 1, "embed_dim": 16},
    }  # fmt: skip
    benchmark.decode(1, cells=3, **small)
    assert "| decode 3×3 latents, 1 step of Stage B" in capsys.readouterr().out
