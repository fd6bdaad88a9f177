"""Lock, numeric and malicious-file faults: nothing is lost, and the cause is reported."""

import errno
import json
import os
import pickle
import shutil
import signal
import time

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from minwurst.base.errors import UserError
from minwurst.edge import dataset, files, lora_file, models
from minwurst.edge.good_rows import GoodRows
from minwurst.step import randomness
from minwurst.step.images import open_image
from tests import tiny
from tests.conftest import assert_bitwise_equal, flags, train_here
from tests.test_signals import SHORT, steps

pytestmark = pytest.mark.slow

RESUME = {"resume_from_checkpoint": "latest"}


# ---- Two runs on one folder.


def test_the_second_run_on_a_folder_is_refused(warm, wuerstchen, few, tmp_path):
    """Refused while the first run lives, not afterwards, even if its workers exit later."""
    settings = {**SHORT, **RESUME, "dataset_name": few, "checkpointing_steps": 2}
    words = flags(wuerstchen, tmp_path, **settings, dataloader_num_workers=2)
    first = warm.start("train.py", [*words, "--max_train_steps=100000"])
    for _ in range(6000):
        if steps(tmp_path):
            break
        time.sleep(0.01)
    code, printed = warm.run("train.py", words)
    assert code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"train.py: --output_dir {tmp_path}: another run is using it.")
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    reached = steps(tmp_path)[-1]
    code, printed = warm.run("train.py", [*words, f"--max_train_steps={reached + 2}"])
    assert code == 0 and f"resuming from {tmp_path}/checkpoint-{reached}" in printed


def test_a_disk_that_knows_no_locks_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", unknown)
    files.lock(tmp_path)
    assert "can't be locked ([Errno 37] No locks available)" in capsys.readouterr().out


# ---- Numbers.


def test_a_bad_loss_on_one_rank_stops_all(warm, wuerstchen, few, tmp_path):
    words = flags(wuerstchen, tmp_path, **SHORT, dataset_name=few, checkpointing_steps=1)
    first, second = warm.start_ranks(2, "train.py", words, [["noise", 4, "nan"]])
    rows = [randomness.row_at(7, 7, 5)]  # step 4 on two ranks ends with position 7
    said = f"train.py: Step 4: the loss is not finite on rank 1, rows {rows}. No weight was"
    code, printed = first.wait()
    assert code == 2 and printed.splitlines()[-1].startswith(said), printed
    assert second.wait()[0] == 2
    assert steps(tmp_path) == [1, 2, 3]


# ---- Malicious files.


class Harmful:
    """Unpickling an instance creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


PARTS = {
    "prior": (models.load_prior, "diffusion_pytorch_model"),
    "image_encoder": (
        lambda folder: models.load_image_encoder(folder / "image_encoder"),
        "diffusion_pytorch_model",
    ),
    "text_encoder": (lambda folder: models.load_text(folder, torch.float32), "model"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["beside", "instead", "under its name"])
def test_no_pickle_is_executed(wuerstchen, tmp_path, part, name):
    """Under any file name that libraries look for, beside good weights or instead of them."""
    load, stem = PARTS[part]
    copy = shutil.copytree(wuerstchen, tmp_path / "copy")
    harm = pickle.dumps(Harmful(tmp_path / "executed"))
    for file in (f"{stem}.bin", f"{stem}.pt", "pytorch_model.bin", "model.pt"):
        (copy / part / file).write_bytes(harm)
    good = copy / part / f"{stem}.safetensors"
    assert good.is_file()
    if name == "beside":
        load(copy)
    else:
        good.write_bytes(harm) if name == "under its name" else good.unlink()
        with pytest.raises(UserError, match=f"{part}.* can't be loaded"):
            load(copy)
    assert not (tmp_path / "executed").exists()
    pickle.loads(harm)  # proves that the pickle works
    assert (tmp_path / "executed").exists()


def test_no_pickle_is_executed_as_a_lora(tmp_path):
    for name in ("pytorch_lora_weights.bin", lora_file.FILE):
        (tmp_path / name).write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
        for file in (tmp_path / name, tmp_path):
            with pytest.raises(UserError, match="LoRA "):
                lora_file.read(file)
    assert not (tmp_path / "executed").exists()


def test_no_code_of_a_data_set_is_executed(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("pictures.py", "train.py", "dataset_infos.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    for source in (folder, folder / "pictures.py"):
        with pytest.raises(UserError, match="--dataset_name .* can't be read"):
            tiny.rows(dataset_name=str(source))
    assert not (tmp_path / "executed").exists()


OUTSIDE = ["../secret.png", "/etc/passwd", "{}/secret.png", "sub/../../secret.png"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_pictures_stay_in_their_data_sets_folder(tmp_path, path):
    """Paths from metadata.jsonl or a table: outside is refused, inside is accepted."""
    path, folder = path.format(tmp_path), tmp_path / "pictures"
    folder.mkdir()
    for file in (tmp_path / "secret.png", folder / "good.png"):
        Image.new("RGB", (8, 8)).save(file)
    rows = [{"file_name": name, "text": "a"} for name in ("good.png", path)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="--train_data_dir .*can't be read"):
        tiny.rows(train_data_dir=str(folder))
    absolute, good = os.path.join(folder, path), str(folder / "good.png")
    for kind, stored in (
        (datasets.Value("string"), [good, absolute]),
        (datasets.Image(), [{"path": place, "bytes": None} for place in (good, absolute)]),
        (datasets.Image(), [{"path": good, "bytes": None}, {"path": absolute, "bytes": b""}]),
    ):
        features = datasets.Features({"image": kind, "text": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": stored, "text": ["a", "b"]}, features)
        for name, length in (("good", 1), ("bad", 2)):
            pq.write_table(table.data.table.slice(length=length), folder / f"{name}.parquet")
        with pytest.raises(UserError, match="Row 1: its image .* is outside the data set's"):
            tiny.rows(dataset_name=str(folder / "bad.parquet"))
        (row,) = tiny.rows(dataset_name=str(folder / "good.parquet"))
        assert open_image(row).size == (8, 8)


def test_a_link_that_leads_outside_is_refused(tmp_path):
    """The data set's own folder may be a link; its images may not lead elsewhere."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (tmp_path / "secret.png", folder / "good.png"):
        Image.new("RGB", (8, 8)).save(file)
    (folder / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "a"}\n')
    (tmp_path / "link").symlink_to(folder)
    assert len(tiny.rows(train_data_dir=str(tmp_path / "link"))) == 1
    (folder / "bad.png").symlink_to(tmp_path / "secret.png")
    with open(folder / "metadata.jsonl", "a") as opened:
        opened.write('{"file_name": "bad.png", "text": "b"}\n')
    with pytest.raises(UserError, match="Row [01]: its image .*bad.png is outside the data set's"):
        tiny.rows(train_data_dir=str(folder))


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    rows = [{"path": str(folder / name), "bytes": None} for name in ("good.png", "pipe.png")]
    os.mkfifo(folder / "pipe.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b"]}, features)
    pq.write_table(table.data.table, folder / "rows.parquet")
    rows = tiny.rows(dataset_name=str(folder / "rows.parquet"))
    with pytest.raises(UserError, match=r"Row 1 .*pipe.png\): can't read the image: there is no"):
        dataset.check_rows(rows, GoodRows(tmp_path / "good_rows.json", rows))


@pytest.mark.parametrize("file", [".lock", "run.json", "good_rows.json"])
def test_files_in_the_way_are_one_line_or_none(wuerstchen, few, tmp_path, file, capsys):
    (tmp_path / file).mkdir()
    settings = {"train_data_dir": None, "dataset_name": few, "max_train_steps": 1}
    if file == "good_rows.json":  # it only saves time
        train_here(wuerstchen, tmp_path, **settings)
        assert "good_rows.json was not written" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=file):
            train_here(wuerstchen, tmp_path, **settings)


def test_a_model_that_has_died_is_neither_saved_nor_exported(wuerstchen, few, tmp_path):
    """Adam with epsilon 0 turns weights whose gradient is 0 into NaN, after the step's check."""
    settings = {"train_data_dir": None, "dataset_name": few, "checkpointing_steps": 1}
    for script in ("train.py", "lora.py"):
        with pytest.raises(UserError, match="is not finite .*training has failed and nothing was"):
            train_here(wuerstchen, tmp_path / script, script, **settings, adam_epsilon=0)
        assert not list((tmp_path / script).glob("*.safetensors"))
        assert not list((tmp_path / script).glob("*checkpoint*"))


def test_a_checkpoint_of_dead_weights_is_named_as_the_cause(wuerstchen, few, tmp_path):
    """Enormous but finite weights are saved; the first step after resuming tells."""
    settings = {"train_data_dir": None, "dataset_name": few, "checkpointing_steps": 1}
    settings |= {"learning_rate": 1e30, "max_train_steps": 1}
    train_here(wuerstchen, tmp_path, **settings)
    settings |= {"max_train_steps": 2, "learning_rate": 1e-4, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="Step 2: .*If the next step fails too.*earlier checkpoint"):
        train_here(wuerstchen, tmp_path, **settings)


def test_ranks_leave_out_the_same_rows(warm, wuerstchen, few, tmp_path):
    """Two ranks skip the same bad rows; the result equals a run on a data set without them."""
    good = tiny.rows(dataset_name=str(few)).remove_columns("number")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    bad = {"image": [{"bytes": b"broken", "path": None}], "text": ["bad"]}
    bad = datasets.Dataset.from_dict(bad, features)
    mixed = datasets.concatenate_datasets([bad, good.cast(features), bad])
    mixed.save_to_disk(tmp_path / "mixed")
    settings = {**SHORT, "checkpointing_steps": 3}
    words = flags(wuerstchen, tmp_path / "two", **settings, dataset_name=tmp_path / "mixed")
    words.append("--skip_bad_samples")
    found = [run.wait() for run in warm.start_ranks(2, "train.py", words)]
    assert [code for code, _ in found] == [0, 0], found
    printed = "".join(printed for _, printed in found)
    assert "skipped: Row 0" in printed and "skipped: Row 6" in printed
    assert printed.count("skipped in total: 2 of 7 rows") == 1
    words = flags(wuerstchen, tmp_path / "never", **settings, dataset_name=few)
    found = [run.wait() for run in warm.start_ranks(2, "train.py", words)]
    assert [code for code, _ in found] == [0, 0], found
    assert_bitwise_equal(tmp_path / "never" / "checkpoint-6", tmp_path / "two" / "checkpoint-6")
    data_of = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("never", "two")]
    assert data_of[0]["identity"]["data"] == data_of[1]["identity"]["data"]
