"""Images and captions: equal to torchvision, any mode, any source; bad rows are reported."""

import datetime
import io
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from minwurst.base.errors import UserError
from minwurst.edge import dataset
from minwurst.edge.good_rows import GoodRows
from minwurst.step import images
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import batches, captions_of
from tests import tiny


def png(picture, kind="PNG", **options):
    """A row that contains the encoded bytes of an image."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "text": "a text", "number": 3}


@pytest.mark.slow
def test_preprocess_equals_torchvision(torchvision_numbers):
    sizes = [name.split()[1] for name in torchvision_numbers if name.startswith("picture ")]
    assert len(sizes) == 8
    for size in sizes:
        picture = Image.fromarray(torchvision_numbers[f"picture {size}"].numpy())
        found, expected = preprocess(picture, 64), torchvision_numbers[f"result {size}"]
        assert found.shape == (3, 64, 64) and found.dtype == torch.float32
        spread = torch.from_numpy(images.IMAGENET_STD)[:, None, None]
        levels = (found - expected) * spread * 255
        assert levels.abs().max() < 1.01, size  # at most one of 256 levels
        assert levels.mean().abs() < 0.02, size  # no bias up or down


def gradient(mode, high):
    """A gradient image from 0 at the left to `high` at the right."""
    row = np.linspace(0, high, 64)
    types = {"I;16": np.uint16, "I": np.int32, "F": np.float32, "L": np.uint8}
    return Image.fromarray(np.tile(row, (64, 1)).astype(types[mode]))


@pytest.mark.parametrize(
    ("mode", "high", "kind"),
    [
        ("I;16", 65535, "PNG"),
        ("I;16", 65535, "TIFF"),
        ("I", 65535, "TIFF"),
        ("F", 1.0, "TIFF"),
        ("F", 255.0, "TIFF"),
    ],
)
def test_deep_pictures_are_scaled(mode, high, kind):
    found = np.asarray(open_image(png(gradient(mode, high), kind)))
    expected = np.asarray(gradient("L", 255).convert("RGB"))
    assert found.shape == (64, 64, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    palette = clear.quantize(4)
    grey = Image.new("LA", (8, 8), (0, 0))
    for picture in (clear, palette, grey):
        found = open_image(png(picture))
        assert found.mode == "RGB" and found.getpixel((5, 5)) == (255, 255, 255), picture.mode
    assert open_image(png(clear)).getpixel((0, 0)) == (0, 0, 255)


def test_other_modes():
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    cmyk = open_image(png(red.convert("CMYK"), "JPEG", quality=95)).getpixel((4, 4))
    assert np.abs(np.subtract(cmyk, (200, 30, 40))).max() < 12
    assert open_image(png(Image.new("1", (8, 8), 1))).getpixel((4, 4)) == (255, 255, 255)
    assert open_image(png(Image.new("L", (8, 8), 7))).getpixel((4, 4)) == (7, 7, 7)


def test_exif_rotation_is_applied():
    wide = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_image(png(wide, "JPEG", exif=exif)).size == (20, 40)


def check_rows(rows, **options):
    """dataset.check_rows with nothing known from earlier starts."""
    with tempfile.TemporaryDirectory() as folder:
        return dataset.check_rows(rows, GoodRows(Path(folder) / "good_rows.json", rows), **options)


def open_folder(folder, image="image", text="text"):
    return tiny.rows(train_data_dir=folder, image_column=image, caption_column=text)


def named(name):
    """Open a data set that has the columns of `table`."""
    return tiny.rows(dataset_name=name, image_column="picture", caption_column="words")


@pytest.fixture
def table():
    """Four rows with images as bytes; the last has two captions."""
    rows = [png(Image.new("RGB", (8, 8), (i, 0, 0)))["image"] for i in range(4)]
    captions = [["one"], ["two"], ["three"], ["four", "vier"]]
    return datasets.Dataset.from_dict(
        {"picture": rows, "words": captions},
        features=datasets.Features(
            {"picture": datasets.Image(), "words": [datasets.Value("string")]}
        ),
    )


def test_sources(table, tmp_path):
    """An image folder, parquet as a file and in a folder, save_to_disk with and without splits."""
    assert len(open_folder(tiny.IMAGES)) == 56
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    table.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    for name in ("folder", "folder/train.parquet", "alone", "splits"):
        rows = named(tmp_path / name)
        assert [captions_of(row) for row in rows] == table["words"], name
        assert [open_image(row).getpixel((0, 0))[0] for row in rows] == [0, 1, 2, 3]
        assert rows["number"] == [0, 1, 2, 3]
        assert len(check_rows(rows)[1]) == 16


def test_fingerprint_follows_content_not_place(table, tmp_path):
    table.save_to_disk(tmp_path / "one")
    table.save_to_disk(tmp_path / "two")
    table.select([1, 0, 2, 3]).save_to_disk(tmp_path / "other")
    prints = [
        check_rows(named(tmp_path / name))[1]
        for name in ("one", "two", "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_sample_rows_keep_their_numbers():
    rows = open_folder(tiny.IMAGES)
    some = dataset.sample_rows(rows, 5, seed=1)
    assert len(some) == len(set(some["number"])) == 5
    assert some["number"] == dataset.sample_rows(rows, 5, seed=1)["number"]
    assert some["number"] != dataset.sample_rows(rows, 5, seed=2)["number"]
    assert rows[some["number"][0]]["text"] == some[0]["text"]
    assert len(dataset.sample_rows(rows, 1000, seed=1)) == 56


def test_pairs_are_the_same_for_any_number_of_workers():
    rows = open_folder(tiny.IMAGES)
    pairs = tiny.samples(rows, 32, seed=1, caption_dropout=0.3)
    places = [range(0, 3), range(55, 58), range(3, 6)]
    alone, helped = (list(batches(pairs, places, workers)) for workers in (0, 2))
    assert [batch["positions"] for batch in alone] == [list(place) for place in places]
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one["pixels"], two["pixels"])
        assert one["captions"] == two["captions"] and one["positions"] == two["positions"]


# ---- Errors are reported in one line that names the cause.


def folder_with(tmp_path, rows, **files):
    (tmp_path / "pictures").mkdir()
    for name, content in files.items():
        (tmp_path / "pictures" / name.replace("_", ".")).write_bytes(content)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pictures" / "metadata.jsonl").write_text(lines)
    return tmp_path / "pictures"


GOOD = png(Image.new("RGB", (8, 8)))["image"]["bytes"]


def test_wrong_column_lists_the_columns():
    with pytest.raises(UserError, match="--caption_column words.*Columns: image, text"):
        open_folder(tiny.IMAGES, text="words")
    with pytest.raises(UserError, match="--image_column photo.*Columns: image, text"):
        open_folder(tiny.IMAGES, image="photo")


def test_column_that_holds_no_pictures(tmp_path):
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(
        tmp_path / "numbers"
    )
    with pytest.raises(UserError, match="--image_column image contains .*not images"):
        tiny.rows(dataset_name=str(tmp_path / "numbers"))


@pytest.mark.parametrize("caption", [None, "", "  ", [], ["a", None], 7], ids=str)
def test_bad_caption_names_the_row(caption):
    with pytest.raises(UserError, match="Row 3: bad caption"):
        captions_of({**png(Image.new("RGB", (8, 8))), "text": caption})


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
BROKEN = {
    "empty": b"",
    "text": b"not a picture",
    "truncated": png(Image.fromarray(NOISE))["image"]["bytes"][:1000],
    "truncated JPEG": png(Image.fromarray(NOISE), "JPEG")["image"]["bytes"][:900],
    "overwritten": GOOD[:20] + b"x" * 40,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_unreadable_picture_names_row_and_file(tmp_path, content):
    rows = [{"file_name": "good.png", "text": "a"}, {"file_name": "bad.png", "text": "b"}]
    folder = folder_with(tmp_path, rows, good_png=GOOD, bad_png=content)
    with pytest.raises(UserError, match=r"Row 1 \(.*bad\.png\): can't read the image"):
        check_rows(open_folder(folder))


def test_enormous_picture_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="Row 3: can't read the image.*decompression bomb"):
        open_image(png(Image.new("RGB", (8, 8))))


def test_missing_caption_is_counted(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "a"},
        {"file_name": "b.png"},
        {"file_name": "c.png", "text": ""},
    ]
    folder = folder_with(tmp_path, rows, a_png=GOOD, b_png=GOOD, c_png=GOOD)
    with pytest.raises(UserError, match=r"Row 1 .*b.png.: bad caption None.*1 more rows are bad"):
        check_rows(open_folder(folder))


def test_missing_picture_file(tmp_path):
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "gone.png", "text": "b"}]
    folder = folder_with(tmp_path, rows, a_png=GOOD)
    with pytest.raises(UserError, match=r"Row 1 \(.*gone\.png\): can't read the image"):
        check_rows(open_folder(folder))


def test_empty_and_missing_sources(tmp_path):
    empty = datasets.Dataset.from_dict({"image": [], "text": []})
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(UserError, match="--dataset_name .*or is empty"):
        tiny.rows(dataset_name=str(tmp_path / "empty"))
    some = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a"]})
    datasets.DatasetDict({"test": some}).save_to_disk(tmp_path / "test only")
    with pytest.raises(UserError, match="has no split `train`, only test"):
        tiny.rows(dataset_name=str(tmp_path / "test only"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="--train_data_dir .*is empty"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="--train_data_dir .*no such folder"):
        open_folder(tmp_path / "not there")
    with pytest.raises(UserError, match="--dataset_name no/such.*can't be read"):
        tiny.rows(dataset_name="no/such")


def test_worker_error_is_one_line(tmp_path):
    """An image damaged after the check is reported too, also from a worker process."""
    rows = [{"file_name": "bad.png", "text": "b"}]
    folder = folder_with(tmp_path, rows, bad_png=b"broken")
    pairs = tiny.samples(open_folder(folder), 32, seed=1)
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"\ARow 0 \(.*bad\.png\): can't read the image.*--skip_rows=0\Z"
        ) as raised:
            next(batches(pairs, [range(1)], workers))
        assert raised.value.one_rank  # so that the affected rank reports it


@pytest.mark.slow
@pytest.mark.parametrize("inside", [".", "train"])
def test_names_of_pictures_are_no_splits(tmp_path, inside):
    """File names that contain "train" or "test" do not split the data set."""
    folder = tmp_path / "set" / inside
    folder.mkdir(parents=True, exist_ok=True)
    names = ["high_speed_train.webp", "test_tube.webp", "tram.webp"]
    lines = [f'{{"file_name": "{name}", "text": "{name[:4]}"}}\n' for name in names]
    (folder / "metadata.jsonl").write_text("".join(lines))
    (folder / "README.md").write_text("three pictures")
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    rows = tiny.rows(train_data_dir=str(tmp_path / "set"))
    assert sorted(rows["text"]) == ["high", "test", "tram"]


def test_bad_rows_are_left_out_on_request(tmp_path, capsys):
    """Bad rows are counted, the first ten reported; the rest equals a data set without them."""
    rows = [{"file_name": f"{i}.png", "text": "" if i % 2 else f"text {i}"} for i in range(24)]
    files = {f"{i}_png": b"broken" if i == 4 else GOOD for i in range(24)}
    opened = open_folder(folder_with(tmp_path, rows, **files))
    kept, fingerprint, _ = check_rows(opened, skip_bad=True)
    assert kept["number"] == [0, 2, *range(6, 24, 2)]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].split()[1] for line in said[:10]] == list("13457") + [
        "9", "11", "13", "15", "17"
    ]  # fmt: skip
    assert said[10:] == ["skipped in total: 13 of 24 rows"]
    never_had = opened.select(kept["number"])
    assert check_rows(never_had)[1:] == check_rows(never_had, skip_bad=True)[1:]
    assert check_rows(never_had)[1] == fingerprint
    with pytest.raises(UserError, match=r"Row 1 .*12 more rows are bad.*--skip_bad_samples"):
        check_rows(opened)


ODD = {
    "numbers": (7, datasets.Value("int64")),
    "dates": (datetime.datetime(2020, 1, 1), datasets.Value("timestamp[s]")),
    "bytes": (b"ab", datasets.Value("binary")),
    "structs": ({"a": "x"}, {"a": datasets.Value("string")}),
    "nested lists": ([["a"]], datasets.List(datasets.List(datasets.Value("string")))),
    "empty lists": ([], datasets.List(datasets.Value("string"))),
    "classes": (0, datasets.ClassLabel(names=["cat"])),
}


@pytest.mark.parametrize("kind", ODD)
def test_captions_of_odd_types_give_the_row(tmp_path, kind):
    value, feature = ODD[kind]
    image = {"bytes": GOOD, "path": None}
    features = datasets.Features({"image": datasets.Image(), "text": feature})
    table = datasets.Dataset.from_dict({"image": [image], "text": [value]}, features=features)
    table.save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match="Row 0: bad caption"):
        check_rows(tiny.rows(dataset_name=str(tmp_path / "table")))


def test_images_in_lists_are_no_images(tmp_path):
    images = datasets.List(datasets.Image())
    features = datasets.Features({"image": images, "text": datasets.Value("string")})
    image = {"bytes": GOOD, "path": None}
    table = datasets.Dataset.from_dict({"image": [[image]], "text": ["a"]}, features=features)
    table.save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match="--image_column image contains List.*, not images"):
        tiny.rows(dataset_name=str(tmp_path / "table"))


def test_pixels_that_are_not_finite():
    pixels = np.full((8, 8), 0.5, dtype=np.float32)
    pixels[3, 3] = np.nan
    with pytest.raises(UserError, match="Row 3: its image has pixels that are not finite"):
        open_image(png(Image.fromarray(pixels), "TIFF"))


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    opened = open_folder(folder_with(tmp_path, [{"file_name": "a.png", "text": ""}], a_png=GOOD))
    with pytest.raises(UserError, match="Row 0 .*: bad caption ''"):
        check_rows(opened, skip_bad=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 60000), (60000, 2), (33, 31)], ids=str)
def test_any_shape_becomes_a_square(size):
    picture = open_image(png(Image.new("RGB", size, (255, 0, 0))))
    red = (1 - images.IMAGENET_MEAN[0]) / images.IMAGENET_STD[0]
    found = preprocess(picture, 64)
    assert found.shape == (3, 64, 64) and torch.allclose(found[0], torch.tensor(red))


@pytest.mark.slow
def test_a_decompression_bomb_is_one_line(tmp_path):
    """A small file that would decode to 900 million pixels."""
    bomb = png(Image.new("1", (30000, 30000)))["image"]["bytes"]
    assert len(bomb) < 500_000
    rows = [{"file_name": "bomb.png", "text": "a"}]
    opened = open_folder(folder_with(tmp_path, rows, bomb_png=bomb))
    with pytest.raises(UserError, match=r"\ARow 0 \(.*bomb\.png\): .*decompression bomb.*\Z"):
        check_rows(opened)
