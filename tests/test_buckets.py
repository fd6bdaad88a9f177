"""Aspect buckets, flips and crops: which step takes which shape and row, and whole runs."""

import collections
import json
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file

import train
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import models
from minwurst.edge.shapes import shapes_for
from minwurst.run import checkpoint
from minwurst.step import diffusion, randomness
from minwurst.step.buckets import Buckets, EachOnce, Schedule, candidates, choose_shapes, cropped
from minwurst.step.encoders import encode_text
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import BatchLayout, Samples, batches
from tests import conftest, tiny
from tests.conftest import assert_bitwise_equal, saved, torchrun, train_here

# ---- Arithmetic.


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 99))
def test_every_bucket_keeps_within_one_step_of_its_share(sizes, seed):
    schedule, done = Schedule(sizes, seed), [0] * len(sizes)
    for step in range(2 * sum(sizes) + 3):
        bucket, earlier = schedule.at(step)
        assert earlier == done[bucket]
        done[bucket] += 1
        for count, size in zip(done, sizes, strict=True):
            assert abs(count - (step + 1) * size / sum(sizes)) < 1
    assert Schedule(sizes, seed).at(step) == (bucket, earlier)  # asked out of order


def test_seeds_break_ties():
    orders = {tuple(Schedule([5] * 4, seed).at(step)[0] for step in range(4)) for seed in range(9)}
    assert len(orders) > 3 and all(sorted(order) == [0, 1, 2, 3] for order in orders)


class Indices(Samples):
    """Only which row and shape is at a position."""

    def __getitem__(self, position):
        shape, index = self.buckets.at(position)
        return {"index": index, "shape": shape}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_has_one_shape_and_rows_are_seen_equally_often(world, accumulation, workers):
    shape_of = np.repeat([0, 1, 2], [31, 17, 9])
    shapes, layout = [(4, 4), (3, 5), (5, 3)], BatchLayout(2, accumulation, world)
    steps, seen, taken = range(1, 40 if workers else 120), collections.Counter(), [0, 0, 0]
    positions = [layout.positions(step, rank) for step in steps for rank in range(world)]
    buckets = Buckets(shapes, shape_of, layout.global_batch, seed=3)
    stream = batches(Indices(None, buckets, 3), [p for part in positions for p in part], workers)
    for _ in steps:
        parts = [next(stream) for _ in range(world * accumulation)]
        shape, = {shape for part in parts for shape in part["shape"]}
        taken[shapes.index(shape)] += 1
        seen.update(index for part in parts for index in part["index"])
        assert {shapes[shape_of[index]] for part in parts for index in part["index"]} == {shape}
    for index, bucket in enumerate(shape_of):
        often = taken[bucket] * layout.global_batch / (shape_of == bucket).sum()
        assert np.floor(often) <= seen[index] <= np.ceil(often)


def test_any_cut_of_a_global_batch_sees_the_same_rows():
    shape_of = np.repeat([0, 1], [20, 13])
    buckets = Buckets([(4, 4), (3, 5)], shape_of, 12, seed=3)
    for step in (1, 5, 30):
        cuts = [(12, 1, 1), (1, 4, 3), (2, 3, 2), (4, 1, 3)]
        seen = [
            sorted(buckets.at(position)[1]
                   for rank in range(world)
                   for part in BatchLayout(batch, accumulation, world).positions(step, rank)
                   for position in part)
            for batch, accumulation, world in cuts
        ]  # fmt: skip
        assert all(rows == seen[0] for rows in seen)


def test_one_bucket_is_the_stream_without_buckets():
    one = Buckets.one(11, 2, 7, skipped=[4])
    wide = Buckets([(2, 2), (1, 4)], [0] * 11, 5, 7, skipped=[4])  # nothing has the second shape
    for position in range(40):
        expected = randomness.row_at(7, position, 11, {4})
        assert one.at(position) == wide.at(position) == ((2, 2), expected)


def test_held_out_rows_come_once_in_batches_of_one_shape():
    buckets = EachOnce([(2, 2), (1, 4)], [0, 1, 0, 0, 1, 0, 0], 1, seed=5)
    assert buckets.batches(2) == [range(0, 2), range(2, 4), range(4, 5), range(5, 7)]
    found = [buckets.at(position) for position in range(7)]
    assert sorted(index for _, index in found) == list(range(7))
    assert [shape for shape, _ in found] == 5 * [(2, 2)] + 2 * [(1, 4)]


@pytest.mark.parametrize("side", [2, 3, 6, 16, 24, 32])
def test_shapes_have_as_many_latents_as_fit_into_the_square(side):
    shapes = candidates(side)
    assert shapes[0] == (side, side) and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert side**2 - max(height, width) < height * width <= side**2 or (side, height) == (2, 1)
        assert 1 / 4 <= height / width <= 4
        assert (width, height) in shapes


def test_shapes_are_chosen_to_crop_least():
    sizes = 50 * [(800, 800)] + 40 * [(900, 600)] + 30 * [(600, 1200)] + 2 * [(3000, 600)]
    chosen = choose_shapes(sizes, 24, most=3, least=8)
    assert chosen == [(24, 24), (33, 17), (19, 30)]
    lost = cropped(sizes, chosen).min(axis=1)
    assert lost.mean() < 0.05 < 0.2 < cropped(sizes, [(24, 24)]).mean()
    assert choose_shapes(sizes, 24, most=1, least=8) == [(24, 24)]
    # Two panoramas are too few for a step of their own, and so are 40 for one of 41.
    assert len(choose_shapes(sizes, 24, most=9, least=8)) == 3
    assert choose_shapes(sizes, 24, most=9, least=31) == [(24, 24), (19, 30)]
    assert choose_shapes([(600, 1200)] * 9, 24, most=5, least=8) == [(33, 17)]
    assert len(choose_shapes(sizes, 24, most=9, least=1000)) == 1


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (64, 64), (33, 200), (200, 33)])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_images_are_resized_to_cover_and_cropped_in_the_center(size, shape):
    height, width = shape
    bear = Image.open(tiny.IMAGES / "bear.webp").convert("RGB")
    image = bear.resize((size[0] * 3, size[1] * 3))
    scale = max(width / image.width, height / image.height)
    whole = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    expected = np.asarray(whole.crop((left, top, left + width, top + height)), dtype=float)
    found = preprocess(image, height, width)
    assert found.shape == (3, height, width)
    unscaled = found * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    unscaled = (unscaled + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    assert np.abs(unscaled.permute(1, 2, 0).numpy() - expected).mean() < 3  # within half a pixel


# ---- Whole runs, on 200 portraits and landscapes as JPEG files.


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("album"), []
    originals = sorted(tiny.IMAGES.glob("*.webp"))
    numbers = np.random.default_rng(0)
    for number in range(200):
        ratio = [1, 2 / 3, 3 / 2, 9 / 16, 2.4, 1 / 2.3][number % 6] * numbers.uniform(0.95, 1.05)
        short = int(numbers.integers(70, 160))
        size = (int(short * ratio), short) if ratio > 1 else (short, int(short / ratio))
        image = ImageOps.fit(Image.open(originals[number % 56]).convert("RGB"), size)
        file = f"{number:03}.jpg"
        image.save(folder / file, quality=90)
        lines.append(json.dumps({"file_name": file, "text": f"thing {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


ASPECT = {"aspect_buckets": 5, "resolution": 192, "checkpointing_steps": 2, "random_flip": True}


@pytest.mark.parametrize("how", [{"cache_latents": True}, {"random_crop": True}], ids=list)
def test_resumed_it_is_the_same(wuerstchen, album, tmp_path, capsys, how):
    options = {**ASPECT, **how, "train_data_dir": album, "cache_dir": tmp_path / "cache"}
    one = train_here(wuerstchen, tmp_path / "one", **options)
    printed = capsys.readouterr().out
    shapes = re.findall(r"\((\d+)×(\d+) for the encoder\): (\d+) images", printed)
    assert len(shapes) == 5 and sum(int(count) for *_, count in shapes) == 200
    assert "cropped on average; without buckets" in printed
    two = train_here(wuerstchen, tmp_path / "two", **options, max_train_steps=2)
    train_here(wuerstchen, two, **options, resume_from_checkpoint="latest")
    assert_bitwise_equal(one / "checkpoint-4", two / "checkpoint-4")
    edit_shapes(two)
    with pytest.raises(UserError, match=r"the shapes of --aspect_buckets .*another run"):
        train_here(wuerstchen, two, **options, resume_from_checkpoint="latest")


def edit_shapes(folder):
    """Write a checkpoint that looks like one of a run with other shapes."""
    tensors, progress = checkpoint.load(folder / "checkpoint-4")
    progress["step"], progress["identity"]["shapes"] = 5, "4×4 (0)"
    checkpoint.save(folder, 5, tensors, progress)


def test_cached_and_live_are_the_same_run(still_wuerstchen, album, tmp_path):
    options = {**ASPECT, "train_data_dir": album, "adam_epsilon": 1e-4}
    live = train_here(still_wuerstchen, tmp_path / "live", **options)
    cached = train_here(still_wuerstchen, tmp_path / "cached", **options, cache_latents=True)
    one, two = saved(live / "checkpoint-4"), saved(cached / "checkpoint-4")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_are_the_same_run(still_wuerstchen, album, tmp_path):
    options = {**ASPECT, "train_data_dir": album, "cache_dir": tmp_path / "cache",
               "cache_latents": True, "adam_epsilon": 1e-4}  # fmt: skip
    one = train_here(still_wuerstchen, tmp_path / "one", **options)
    two = torchrun(2, still_wuerstchen, tmp_path / "two", **options, train_batch_size=2)
    one, two = saved(one / "checkpoint-4"), saved(two / "checkpoint-4")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


def test_lora_and_a_preview(wuerstchen, album, tmp_path):
    out = train_here(
        wuerstchen, tmp_path, script="lora.py", **ASPECT, train_data_dir=album, max_train_steps=2,
        validation_prompts="a thing", validation_decoder="preview", gradient_checkpointing=True,
    )  # fmt: skip
    assert Image.open(out / "validation" / "step-000002.png").size[0] > 100


def test_held_out_loss_is_the_mean_over_rows(still_wuerstchen, album, tmp_path, capsys):
    train_here(still_wuerstchen, tmp_path, **ASPECT, train_data_dir=album, max_train_steps=1,
               validation_split=0.1)  # fmt: skip
    expect_held_out(still_wuerstchen, album, capsys.readouterr().out)


@torch.no_grad()
def expect_held_out(wuerstchen, album, printed):
    """Each row once, at its shape, written out."""
    listed = re.search(r"held out at step 0: loss \S+ \((.*)\)", printed)[1]
    found = [float(n) for n in re.findall(r": ([\d.]+)", listed)]
    shapes = [
        (int(height) // 32, int(width) // 32)
        for width, height in re.findall(r"\((\d+)×(\d+) for the encoder\)", printed)
    ]
    prior, seed = models.load_prior(wuerstchen), randomness.held_out_seed(7)
    encoder = models.load_image_encoder(wuerstchen / "image_encoder")
    text_parts = models.load_text(wuerstchen, torch.float32)
    rows = tiny.rows(train_data_dir=album)
    order = randomness.epoch_order(seed, 0, len(rows))
    held_out = rows.select(np.sort(order[:20]))
    nearest = [int(cropped([open_image(row).size], shapes).argmin()) for row in held_out]
    errors, position = [], 0
    for bucket in range(len(shapes)):
        members = [row for row, number in zip(held_out, nearest, strict=True) if number == bucket]
        if not members:
            continue
        kind = sorted(set(nearest)).index(bucket)
        for index in randomness.epoch_order(seed, 0, len(members), kind):
            row, (height, width) = members[int(index)], shapes[bucket]
            pixels = preprocess(open_image(row), 32 * height, 32 * width)[None]
            latents = diffusion.scale_latents(encoder(pixels))
            text = encode_text(*text_parts, [row["text"]])
            noise = randomness.noise(seed, [position], latents.shape[1:])
            for quarter in range(4):
                t = (quarter + randomness.uniform(seed, [position])) / 4
                predicted = prior(diffusion.add_noise(latents, noise, t), t, text)
                errors.append((predicted - noise).square().mean().item())
            position += 1
    assert position == 20
    assert np.array(errors).reshape(20, 4).mean(axis=0) == pytest.approx(found, abs=3e-5)


def test_both_sides_are_cached_and_seen_half_the_time(wuerstchen, few, tmp_path, monkeypatch):
    """With the cache, a row is seen both ways, each as the encoder gives it."""
    seen, item = [], Samples.is_flipped

    def keep(self, position):
        seen.append((position, item(self, position)))
        return seen[-1][1]

    monkeypatch.setattr(Samples, "is_flipped", keep)
    options = {"train_data_dir": None, "dataset_name": few, "max_train_steps": 60,
               "random_flip": True, "cache_latents": True}  # fmt: skip
    out = train_here(wuerstchen, tmp_path, **options)
    flipped = {p: bool(is_flipped) for p, is_flipped in seen}
    assert len(flipped) == 240 and 90 < sum(flipped.values()) < 150
    of_row = collections.defaultdict(set)
    for position, is_flipped in flipped.items():
        of_row[randomness.row_at(7, position, 5)].add(is_flipped)
    assert all(sides == {True, False} for sides in of_row.values())

    file, = out.glob("latents-*/latents-00000000.safetensors")
    encoder, stored = models.load_image_encoder(wuerstchen / "image_encoder"), load_file(file)
    rows = datasets.load_from_disk(few)
    for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
        image = open_image({**row, "number": number})
        for name, one in (("latents", image), ("flipped", ImageOps.mirror(image))):
            with torch.no_grad():
                expected = diffusion.scale_latents(encoder(preprocess(one, 64)[None]))[0]
            torch.testing.assert_close(stored[name][number], expected, rtol=1e-2, atol=2e-2)


# ---- Mistakes.


def test_random_crops_are_not_cached(wuerstchen, tmp_path):
    with pytest.raises(UserError, match="--random_crop crops .* drop --cache_latents"):
        train_here(wuerstchen, tmp_path, random_crop=True, cache_latents=True)


def test_too_few_images_for_a_step(wuerstchen, few, tmp_path, capsys):
    """Five square images stay one bucket; of twelve, none has enough for a step. Both say so."""
    train_here(wuerstchen, tmp_path, train_data_dir=None, dataset_name=few, aspect_buckets=4,
               max_train_steps=1)  # fmt: skip
    assert "--aspect_buckets: 1 of 4 shapes; more would crop no less" in capsys.readouterr().out
    settings = Settings(train_data_dir="x", aspect_buckets=4, resolution=192)
    sizes = [(64, 64)] * 8 + [(64, 128)] * 4
    assert len(shapes_for(sizes, settings, least=4)) == 2
    assert shapes_for(sizes, settings, least=6) == [(6, 6)]
    assert "1 of 4 shapes; others would have fewer images than a step's" in capsys.readouterr().out


def test_a_shape_that_does_not_fit_is_one_line(wuerstchen, album, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(UserError, match=r"--aspect_buckets: 4 images of 192×192 pixels need more"):
        train_here(wuerstchen, tmp_path, **ASPECT, train_data_dir=album)


def test_skipping_all_rows_of_a_shape(wuerstchen, album, tmp_path):
    panoramas = [str(number) for number in range(4, 200, 6)]
    words = conftest.flags(wuerstchen, tmp_path, **ASPECT, train_data_dir=album)
    with pytest.raises(UserError, match=r"--skip_rows leaves none of the 3\d rows of 288×128 pix"):
        train.main(parse(Settings, [*words, "--skip_rows", *panoramas]))
