"""The miniature's pretraining: its parts fit together, and interrupted training resumes."""

import pytest
import torch
import torch.nn.functional as F

from minwurst import miniature, pipelines
from minwurst.edge import models
from minwurst.edge.decoders import FullDecoder
from minwurst.miniature import pretrain, world
from minwurst.miniature.training import train
from tests.conftest import assert_bitwise_equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def some_images():
    """Four blurred images of each style as bytes, {style: (4, 3, 256, 256)}."""
    blurred = torch.rand(4 * len(world.STYLES), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(blurred, (256, 256), mode="bicubic").clamp(0, 1) * 255).byte()
    return dict(zip(world.STYLES, images.split(4), strict=True))


def test_a_stopped_training_goes_on_as_it_was(tmp_path):
    """Weights, averages, optimizer state and batch norm statistics, on a small model."""

    def run(work, stop=None, every=2):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(2, 3, 8, 8)).square().mean()

        train(work, "part", model, loss_of, steps=4, learning_rate=1e-2, every=every)

    run(tmp_path / "whole", every=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=4)
    run(tmp_path / "cut")
    whole, cut = (tmp_path / name / "training/part/checkpoint-4" for name in ("whole", "cut"))
    assert_bitwise_equal(whole, cut)


def test_the_parts_make_a_whole(some_images, tmp_path, monkeypatch):
    """Train each part for one step; the result loads and samples like the published model."""
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(pretrain, "WORLD", tmp_path / "world")
    monkeypatch.setattr(miniature, "DATA", tmp_path / "data")
    names = [f"thing number {number}" for number in range(4)]
    exists = {style: torch.ones(4, dtype=torch.bool) for style in world.STYLES}
    exists["noto ink"][2] = False
    monkeypatch.setattr(pretrain, "load_images", lambda work: (names, some_images, exists))
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path / "work"), "--steps=1"])
    pretrain.main()
    folder = tmp_path / "weights"
    encoder = models.load_image_encoder(folder / "image_encoder")
    latents = pretrain.encode(encoder, some_images["fluent"])
    assert latents.shape == (4, 16, 6, 6)
    decode = FullDecoder(folder / "decoder", torch.device("cpu"))
    assert decode(latents[:1] / 42, "", torch.Generator()).size == (256, 256)
    generate = pipelines.load(str(folder), str(folder / "decoder"))
    assert generate("thing", size=6).size == (256, 256)
    known = world.read_world(tmp_path / "world")[1]
    lacking = {style: latents.isnan().any().item() for style, latents in known.items()}
    assert lacking == {style: style == "noto ink" for style in world.STYLES}
    captions = (tmp_path / "data" / "fluent_sunset" / "metadata.jsonl").read_text()
    assert captions.count("\n") == 2 and '"thing number 3, fluent sunset"' in captions
