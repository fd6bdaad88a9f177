"""Rows of a source of one's own: selected like a table's, read when needed, bad ones reported."""

import pytest

import train
from minwurst.base.errors import UserError
from minwurst.edge.rows import Rows
from tests import tiny
from tests.conftest import assert_bitwise_equal, train_here


class Source:
    """The test images, of which one may be lost."""

    fingerprint = "the test images"

    def __init__(self, lost=None):
        self.rows, self.lost = tiny.rows().remove_columns("number"), lost

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        if number == self.lost:
            raise OSError("the shard is gone")
        return self.rows[number]


def test_selected_rows():
    rows = Rows(Source(lost=7))
    some = rows.select([9, 7, 3]).select([0, 2])
    assert some["number"] == [9, 3] and [row["number"] for row in some] == [9, 3]
    assert some["text"] == [tiny.rows()[number]["text"] for number in (9, 3)]
    assert len(rows.select([])) == 0 and len(rows.select([])["number"]) == 0
    with pytest.raises(UserError, match="Row 7: can't be read: the shard is gone"):
        rows[7]
    prints = [part.fingerprint() for part in (rows, some, rows.select([9, 3]), rows.select([3, 9]))]
    assert prints[1] == prints[2] and len(set(prints)) == 3
    other = Source()
    other.fingerprint = "others"
    assert Rows(other).fingerprint() != prints[0]


def use(monkeypatch, **options):
    rows = Rows(Source(**options))
    monkeypatch.setattr(train.dataset, "find", lambda _: rows)


def test_all_options_that_choose_rows_equal_a_tables(wuerstchen, tmp_path, monkeypatch):
    options = {"max_train_samples": 30, "validation_split": 0.2, "checkpointing_steps": 4}
    one = train_here(wuerstchen, tmp_path / "one", **options)
    use(monkeypatch)
    two = train_here(wuerstchen, tmp_path / "two", **options)
    assert_bitwise_equal(one / "checkpoint-4", two / "checkpoint-4")


@pytest.mark.slow
def test_a_row_that_is_lost(wuerstchen, tmp_path, monkeypatch, capsys):
    """In training, it is found when it is needed; a run that reads all rows says so first."""
    use(monkeypatch, lost=7)
    with pytest.raises(UserError, match="Row 7: can't be read: .*the shard is gone.*--skip_rows=7"):
        train_here(wuerstchen, tmp_path / "one", train_batch_size=56, max_train_steps=1)
    train_here(wuerstchen, tmp_path / "one", train_batch_size=56, max_train_steps=1, skip_rows=7)
    with pytest.raises(UserError, match="Row 7: .*Skip bad rows with --skip_bad_samples"):
        train_here(wuerstchen, tmp_path / "two", recheck_data=True)
    train_here(wuerstchen, tmp_path / "two", skip_bad_samples=True, max_train_steps=1)
    assert "skipped in total: 1 of 56 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="--skip_rows 56: there is no such row, of 56"):
        train_here(wuerstchen, tmp_path / "three", skip_rows=56)
