"""Both sides of the benchmark compute the same, and every part runs, including the GPU part."""

import pytest
import torch
from PIL import Image

from minwurst.base.settings import Settings, parse
from tests import benchmark, tiny
from tests.conftest import ROOT, flags

pytestmark = pytest.mark.slow

SMALL = {"c_in": 16, "c": 64, "c_cond": 1280, "c_r": 16, "depth": 2, "nhead": 4, "dropout": 0.1}


@pytest.fixture
def pair():
    return benchmark.make_pair(SMALL)


def test_both_sides_are_shown_to_compute_the_same(pair):
    batch = benchmark.make_batch(2, 6, torch.float32)
    benchmark.assert_same(*pair, *batch, {torch.float32: 1e-4, torch.bfloat16: 5e-2})
    with torch.no_grad():
        pair[0].blocks[2].attention.to_v.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="the output in fp32 differs"):
        benchmark.assert_same(*pair, *batch, {torch.float32: 1e-4})


def test_its_preprocessing_is_torchvisions(torchvision_numbers):
    for name, pixels in torchvision_numbers.items():
        if name.startswith("picture "):
            picture = Image.fromarray(pixels.numpy())
            expected = torchvision_numbers[name.replace("picture", "result")]
            found = benchmark.reference_pixels(picture, 64)
            assert benchmark.relative(found, expected) < 1e-6, name


def test_ratios_are_of_the_same_round(capsys):
    benchmark.row("what", [2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert capsys.readouterr().out == "| what | 4 s | 1 s | 3.00 | 2.00 – 4.00 |\n"


def test_each_side_is_called_once_a_round_and_once_before():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = benchmark.take_turns(sides, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_gpus_part_takes_steps(pair, kind, monkeypatch):
    """On the CPU with a small prior: every variant updates the weights of its own side only."""
    if kind == "full":
        trained = [list(prior.parameters()) for prior in pair]
    else:
        trained = [benchmark.adapters(prior, side == 0) for side, prior in enumerate(pair)]
    for prior in pair:
        prior.train().enable_gradient_checkpointing()
    monkeypatch.setattr(benchmark, "SIZE", 3)
    for name, function in benchmark.gpu_sides(pair, trained, 2).items():
        before = [[weight.detach().clone() for weight in weights] for weights in trained]
        function()
        moved = [
            not all(torch.equal(old, new) for old, new in zip(one, two, strict=True))
            for one, two in zip(before, trained, strict=True)
        ]
        assert moved == [name != "theirs", name == "theirs"], name


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
    benchmark.memory()
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
