"""The miniature's pretraining: its parts fit together, and interrupted training resumes."""

import pytest
import torch

from minwurst import pipelines
from minwurst.edge import models
from minwurst.edge.decoders import FullDecoder
from minwurst.miniature import pretrain
from minwurst.miniature.training import train
from tests.conftest import assert_bitwise_equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def some_pictures():
    """Eight blurred images as a uint8 tensor (8, 3, 256, 256)."""
    drawn = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(drawn, (256, 256), mode="bicubic") * 255).byte()


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


def test_the_parts_make_a_whole(some_pictures, tmp_path, monkeypatch):
    """Train each part for one step; the result loads and samples like the published model."""
    for place in ("weights", "images", "world"):
        monkeypatch.setattr(pretrain, place.upper(), tmp_path / place)
    names = [f"thing number {number}" for number in range(8)]
    monkeypatch.setattr(
        pretrain, "load_images", lambda work: (names[:4], *some_pictures.split(4))
    )
    steps = [f"--{part}_steps=1" for part in ("a", "encoder", "b", "prior")]
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path / "work"), *steps])
    pretrain.main()
    folder = tmp_path / "weights"
    encoder = models.load_image_encoder(folder / "image_encoder")
    latents = pretrain.encode(encoder, some_pictures)
    assert latents.shape == (8, 16, 6, 6)
    assert 20 < latents.std() < 80  # unit variance after scaling
    decode = FullDecoder(folder / "decoder", torch.device("cpu"))
    assert decode(latents[:1] / 42, "", torch.Generator()).size == (256, 256)
    generate = pipelines.load(str(folder), str(folder / "decoder"))
    assert generate("thing", size=6).size == (256, 256)
