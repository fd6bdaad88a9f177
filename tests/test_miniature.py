"""The miniature's recipe: its parts fit together, and a stopped training goes on as it was."""

import pytest
import torch

from minwurst import pipelines
from minwurst.edge import models
from minwurst.edge.decoders import FullDecoder
from minwurst.miniature import pretrain
from tests.conftest import assert_bitwise_equal


@pytest.fixture(scope="module")
def some_pictures():
    """Eight blurred pictures, (8, 3, 256, 256) bytes."""
    drawn = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(drawn, (256, 256), mode="bicubic") * 255).byte()


def test_a_stopped_training_goes_on_as_it_was(some_pictures, tmp_path):
    def start():
        torch.manual_seed(1)

    start()
    pretrain.make_stage_a(tmp_path / "whole", some_pictures, 4, every=4)
    start()
    with pytest.raises(KeyboardInterrupt):
        pretrain.make_stage_a(tmp_path / "cut", Interrupting(some_pictures, 3), 4, every=2)
    start()
    pretrain.make_stage_a(tmp_path / "cut", some_pictures, 4, every=2)
    folders = (tmp_path / run / "training/stage_a/checkpoint-4" for run in ("whole", "cut"))
    assert_bitwise_equal(*folders)


class Interrupting:
    """Pictures that are interrupted when they are asked for the n-th time."""

    def __init__(self, pictures, times):
        self.pictures, self.left = pictures, times

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, places):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.pictures[places]


def test_the_parts_make_a_whole(some_pictures, tmp_path, monkeypatch):
    """A few steps of each; what is written loads and draws as the published model does."""
    for place in ("weights", "images", "world"):
        monkeypatch.setattr(pretrain, place.upper(), tmp_path / place)
    names = [f"thing number {number}" for number in range(8)]
    monkeypatch.setattr(
        pretrain, "load_images", lambda work: (names[:4], *some_pictures.split(4))
    )
    steps = [f"--{part}_steps=2" for part in ("a", "encoder", "b", "prior")]
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path / "work"), *steps])
    pretrain.main()
    folder = tmp_path / "weights"
    encoder = models.load_image_encoder(folder / "image_encoder")
    latents = pretrain.encode(encoder, some_pictures)
    assert latents.shape == (8, 16, 6, 6)
    assert 20 < latents.std() < 80  # of unit spread once it is scaled
    decode = FullDecoder(folder / "decoder", torch.device("cpu"))
    assert decode(latents[:1] / 42, "", torch.Generator()).size == (256, 256)
    prior, _ = pipelines.load(str(folder), str(folder / "decoder"))
    assert prior("thing", 256, 256, num_inference_steps=2).image_embeddings.shape == (1, 16, 6, 6)
