"""The sample stream: each row once per epoch; random numbers depend only on the position."""

import numpy as np
import pytest
import torch

from minwurst.step import randomness
from minwurst.step.samples import BatchLayout


def taken(step, batch, accumulation, world):
    """The positions of all ranks in a step, in the order micro-step, rank."""
    layout = BatchLayout(batch, accumulation, world)
    ranks = [layout.positions(step, rank) for rank in range(world)]
    pieces = [piece for micro_step in zip(*ranks, strict=True) for piece in micro_step]
    return [position for piece in pieces for position in piece]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "world"), [(7, 2, 3, 2), (10, 4, 1, 3), (1, 3, 2, 1)]
)
def test_each_row_once_an_epoch(rows, batch, accumulation, world):
    """Counted over complete epochs that neither batch size nor rank count divides."""
    epochs = 6
    steps = -(-epochs * rows // (batch * accumulation * world))
    places = [p for step in range(1, steps + 1) for p in taken(step, batch, accumulation, world)]
    seen = [randomness.row_at(5, position, rows) for position in places]
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@pytest.mark.parametrize("cut", [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)], ids=str)
def test_any_cut_of_a_global_batch_sees_the_same_samples(cut):
    for step in (1, 2, 9):
        assert taken(step, *cut) == list(range(4 * step - 4, 4 * step))


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(randomness.epoch_order(seed, epoch, 50)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_draws_do_not_depend_on_the_batch():
    together = randomness.noise(3, [10, 11, 12], (16, 2, 2))
    alone = randomness.noise(3, [11], (16, 2, 2))
    assert torch.equal(together[1], alone[0])
    assert torch.equal(randomness.uniform(3, [10, 11])[1], randomness.uniform(3, [11])[0])


def test_draws_are_distributed_as_they_should():
    noise = randomness.noise(0, range(400), (16, 3, 3))
    assert abs(noise.mean().item()) < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    uniform = randomness.uniform(0, range(4000)).numpy()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert np.histogram(uniform, 4, (0, 1))[0].min() > 900
    # A sample's timestep and noise must be independent.
    pairs = np.corrcoef(uniform[:400], noise[:, 0, 0, 0].numpy())
    assert abs(pairs[0, 1]) < 0.15


def test_caption_choice_and_dropout():
    captions = ["a", "b", "c"]
    drawn = [randomness.caption(1, position, captions, 0.25) for position in range(4000)]
    shares = {text: drawn.count(text) / 4000 for text in ["", *captions]}
    assert all(share == pytest.approx(0.25, abs=0.03) for share in shares.values())
    assert drawn == [randomness.caption(1, position, captions, 0.25) for position in range(4000)]
    assert "" not in [randomness.caption(1, position, captions) for position in range(500)]


def test_dropout_seeds_differ_by_step_and_rank():
    seeds = {randomness.dropout_seed(9, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200


def test_seed_is_given_or_saved_or_drawn():
    assert randomness.choose_seed(0, 5) == 0
    assert randomness.choose_seed(None, 5) == 5
    assert randomness.choose_seed(None, None) != randomness.choose_seed(None, None)


def test_sampling_noise_is_the_pictures_own():
    place = randomness.image_key("a bear", 0)
    noise = randomness.sampling_noise(1, place, (16, 3, 3))
    assert noise.shape == (30, 1, 16, 3, 3) and noise.dtype == torch.float32
    assert torch.equal(noise, randomness.sampling_noise(1, place, (16, 3, 3)))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    bear, car = randomness.image_key("a bear", 1), randomness.image_key("a car", 0)
    for other in ((2, place), (1, bear), (1, car)):
        assert not torch.equal(noise, randomness.sampling_noise(*other, (16, 3, 3)))
    assert (
        randomness.decoding_generator(1, place).initial_seed()
        != randomness.decoding_generator(2, place).initial_seed()
    )
