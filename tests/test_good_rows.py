"""Rows that were good at an earlier start are neither read nor decoded again; --skip_rows."""

import os
import shutil

import datasets
import pytest

from minwurst.base.errors import UserError
from minwurst.edge import dataset
from minwurst.edge.good_rows import GoodRows
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    """A data set of images and a metadata.jsonl that a test may change."""
    return shutil.copytree(tiny.IMAGES, tmp_path / "images")


@pytest.fixture
def read(monkeypatch):
    """The numbers of the rows that are read."""
    numbers, open_image = [], dataset.open_image

    def keep(row):
        numbers.append(row["number"])
        return open_image(row)

    monkeypatch.setattr(dataset, "open_image", keep)
    return numbers


def check(source, known, **options):
    """(rows, fingerprint) of a fresh start on a folder or a table."""
    flag = "dataset_name" if (source / "state.json").exists() else "train_data_dir"
    rows = tiny.rows(**{flag: str(source)})
    return dataset.check_rows(rows, GoodRows(known / "good_rows.json", rows), **options)


def test_images_are_read_once(folder, tmp_path, read):
    first, again = (check(folder, tmp_path)[1] for _ in range(2))
    assert sorted(read) == list(range(56)) and first == again
    assert check(folder, tmp_path, recheck=True)[1] == first and len(read) == 112


def test_tables_are_read_once(tmp_path, read):
    tiny.rows().select(range(9)).save_to_disk(tmp_path / "table")
    first, again = (check(tmp_path / "table", tmp_path)[1] for _ in range(2))
    assert sorted(read) == list(range(9)) and first == again
    shutil.rmtree(tmp_path / "table")
    tiny.rows().select(range(1, 10)).save_to_disk(tmp_path / "table")
    assert check(tmp_path / "table", tmp_path)[1] != first and len(read) == 18


def test_what_changed_is_read_again(folder, tmp_path, read):
    rows, first, _ = check(folder, tmp_path)
    read.clear()
    shutil.copyfile(rows[3]["image"]["path"], rows[5]["image"]["path"])
    metadata = folder / "metadata.jsonl"
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(text.replace(f'"{rows[8]["text"]}"', '"something else"'), encoding="utf-8")
    assert check(folder, tmp_path)[1] != first
    assert sorted(read) == [5, 8]
    with open(rows[5]["image"]["path"], "r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match=r"Row 5 \(.*\): can't read the image"):
        check(folder, tmp_path)


def test_an_unreadable_list_only_costs_time(folder, tmp_path, read):
    (tmp_path / "good_rows.json").write_text("{ cut off")
    check(folder, tmp_path), check(folder, tmp_path)
    assert len(read) == 56


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_a_skipped_row_keeps_its_digest(folder, tmp_path, loss):
    rows, first, _ = check(folder, tmp_path)
    path = rows[7]["image"]["path"]
    if loss == "gone":
        os.unlink(path)
    else:
        with open(path, "r+b") as file:
            file.truncate(300)
    with pytest.raises(UserError, match="Row 7 "):
        check(folder, tmp_path)
    for _ in range(2):
        assert check(folder, tmp_path, skipped={7})[1] == first
    with pytest.raises(UserError, match="Row 7 "):  # it is not taken for good now
        check(folder, tmp_path)
    with pytest.raises(UserError, match="--skip_rows 56: there is no such row, of 56"):
        check(folder, tmp_path, skipped={7, 56})


def test_rows_in_memory_are_never_taken_for_known(tmp_path, read):
    table = {"image": [{"bytes": (tiny.IMAGES / "bear.webp").read_bytes(), "path": None}]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    for _ in range(2):
        rows = datasets.Dataset.from_dict(table, features=features)
        rows = rows.add_column("text", ["bear"]).add_column("number", [0])
        dataset.check_rows(rows, GoodRows(tmp_path / "good_rows.json", rows))
    assert read == [0, 0] and not (tmp_path / "good_rows.json").exists()


def test_another_column_has_other_images(tmp_path):
    """Two columns of images in one table: the one is not taken for the other."""
    images = [{"bytes": (tiny.IMAGES / f"{n}.webp").read_bytes(), "path": None}
              for n in ("bear", "bank")]  # fmt: skip
    features = {"a": datasets.Image(), "b": datasets.Image(), "text": datasets.Value("string")}
    table = {"a": images[:1], "b": images[1:], "text": ["bear"]}
    table = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "table")
    prints = []
    for column in "abab":
        rows = tiny.rows(dataset_name=str(tmp_path / "table"), image_column=column)
        good = GoodRows(tmp_path / "good_rows.json", rows, column)
        prints.append(dataset.check_rows(rows, good)[1])
    assert prints[0] == prints[2] != prints[1] == prints[3]
