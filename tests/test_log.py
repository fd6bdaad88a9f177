"""Trackers record the run, run.json describes it, and a failing tracker does not stop it."""

import importlib.util
import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from minwurst.base import console
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import run_file
from minwurst.run import trackers
from minwurst.run.log import Log
from minwurst.step import diffusion, metrics
from minwurst.step.metrics import QUARTERS
from minwurst.step.prior import WuerstchenPrior
from minwurst.step.samples import BatchLayout
from tests.conftest import ROOT, command, flags, train_here

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def all_trackers(wuerstchen, tmp_path_factory):
    """(output folder, output) of a run that reports to TensorBoard and W&B."""
    folder = tmp_path_factory.mktemp("all") / "run"
    words = flags(
        wuerstchen, folder, report_to="all", logging_steps=2, validation_split=0.1,
        validation_prompt="a bear", validation_steps=2, hub_token=TOKEN,
        pretrained_decoder_model_name_or_path=wuerstchen / "decoder",
    )  # fmt: skip
    _, printed = command(sys.executable, "train.py", *words, WANDB_MODE="offline")
    return folder, printed


def test_tensorboard_holds_numbers_and_pictures(all_trackers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(all_trackers[0] / "logs"), size_guidance={"images": 0})
    log.Reload()
    others = "learning_rate", "gradient_norm", "pictures_per_second", "memory_gib"
    assert set(log.Tags()["scalars"]) == {
        "loss", "validation_loss", *(f"training/{name}" for name in others),
        *(f"{name}/{quarter}" for name in ("loss", "validation_loss") for quarter in QUARTERS),
    }  # fmt: skip
    assert [event.step for event in log.Scalars("loss")] == [2, 4]
    assert [event.step for event in log.Scalars("validation_loss")] == [0, 2, 4]
    assert min(log.Tags()["scalars"]) == "loss"  # the first card
    assert 0.1 < log.Scalars("training/memory_gib")[0].value < 20
    (told,) = log.Tensors("settings/text_summary")
    (table,) = told.tensor_proto.string_val
    assert b"| learning_rate | `0.001` |" in table and b"hub_token" not in table
    shown = log.Images("validation")
    assert [event.step for event in shown] == [0, 2, 4]
    assert shown[-1].width >= 192 and shown[-1].encoded_image_string.startswith(b"\x89PNG")


def wandb_records(file):
    """Parse W&B's file, a LevelDB log: 7 bytes, then 32 KiB blocks with fragmented records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or its last fragment
            yield Record.FromString(record)
            record = b""


def test_wandb_holds_the_run_offline(all_trackers):
    folder, _ = all_trackers
    run = json.loads((folder / "run.json").read_text())
    (file,) = (folder / "logs/wandb").glob("offline-run-*/*.wandb")
    assert file.name == f"run-{run['id']}.wandb"
    records = list(wandb_records(file))
    (told,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert told.project == "text2image-fine-tune"
    configured = {item.key: json.loads(item.value_json) for item in told.config.update}
    assert configured["learning_rate"] == 1e-3 and "hub_token" not in configured
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "validation/path" in row] == [0, 2, 4]
    assert len(list(file.parent.glob("files/media/images/*.png"))) == 4  # and of the data


def test_the_token_is_nowhere(all_trackers):
    folder, printed = all_trackers
    assert TOKEN not in printed
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_the_token_is_in_no_traceback_and_no_listing(wuerstchen, tmp_path, capsys):
    words = [*flags(wuerstchen, tmp_path), f"--hub_token={TOKEN}"]
    code = (
        "import sys, train\nfrom minwurst.base.settings import Settings, from_command_line\n"
        "from minwurst.edge import dataset, push\nfrom minwurst.step import distributed\n"
        "def fail(*_):\n    raise RuntimeError(f'{settings} {sys.argv}')\n"
        "dataset.find = fail\ninner = train.main\n"
        "def main(given):\n    global settings\n    settings = given\n    inner(given)\n"
        "distributed.launch(main, from_command_line(Settings), push.push_result)"
    )
    status, printed = command(sys.executable, "-c", code, *words, check=False)
    assert status == 1 and "RuntimeError: Settings(" in printed and "--hub_token=***" in printed
    assert TOKEN not in printed
    words[-1] = f"--hub_tokn={TOKEN}"
    status, printed = command(sys.executable, "train.py", *words, check=False)
    assert status == 2 and "unknown flag --hub_tokn; did you mean --hub_token?" in printed
    assert TOKEN not in printed
    words[-1:] = ["--push_to_hub", TOKEN]
    with pytest.raises(SystemExit):
        parse(Settings, words)
    printed = capsys.readouterr().err
    assert "found a value without a flag" in printed and TOKEN not in printed


def test_run_json_describes_the_run(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    first = json.loads((tmp_path / "run.json").read_text())
    train_here(wuerstchen, tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["id"] == first["id"] and (first["steps"], run["steps"]) == (1, 2)
    assert [start["resumed_from"] for start in run["starts"]] == [None, "checkpoint-1"]
    assert run["starts"][0] == first["starts"][0]
    assert run["starts"][0]["torch"] == torch.__version__
    assert run["settings"]["seed"] == 7 and len(run["identity"]["data"]) == 16
    (tmp_path / "run.json").write_text("{ cut off")  # a damaged run.json does not stop a run
    train_here(wuerstchen, tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 2  # the furthest step so far
    # Its settings are enough to repeat it.
    words = [f"--{name}={run['settings'][name]}" for name in ("seed", "resolution")]
    assert parse(Settings, ["--train_data_dir=x", *words]).resolution == 64


def test_the_commit_of_the_code_is_known(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.com"]
    assert run_file.git_commit(tmp_path / "nowhere") is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = run_file.git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "new").touch()
    assert run_file.git_commit(tmp_path) == f"{commit} with changes"
    if (ROOT / ".git").exists():
        assert len(run_file.git_commit(ROOT / "minwurst").split()[0]) == 40


def two_steps(folder=Path("nowhere")):
    """What a log needs of a Run."""
    return types.SimpleNamespace(
        step=0, last_step=2, is_due=lambda step, every: True, folder=folder, skipped=set(),
        settings=Settings(), layout=BatchLayout(1, 1, 1),
    )  # fmt: skip


def test_a_tracker_that_fails_is_left_out(tmp_path, capsys):
    class Broken(trackers.TensorBoard):
        def __init__(self):
            pass

        def scalars(self, step, values):
            raise OSError("No space left on device")

    class Whole(Broken):
        got = []

        def scalars(self, step, values):
            self.got.append((step, sorted(values)))

        def close(self):
            self.got.append("closed")

    log = Log([Broken(), Whole()], two_steps(tmp_path))
    for step in (1, 2):
        log.step(step, torch.tensor(1.0), torch.tensor(1.0), 0.1)
    log.close()
    printed = capsys.readouterr().out
    assert printed.count("Broken failed and is dropped: No space left") == 1
    assert [got[0] for got in Whole.got[:2]] == [1, 2] and Whole.got[2] == "closed"


def test_time_spent_on_validation_is_no_training_time():
    log = Log([], two_steps())
    before = log.start
    with log.paused():
        start = time.perf_counter()
        time.sleep(0.05)
    assert log.start - before >= 0.05 <= time.perf_counter() - start


def test_wandb_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb needs a package: pip install wandb"):
        parse(Settings, ["--train_data_dir=x", "--report_to=wandb"])
    parse(Settings, ["--train_data_dir=x", "--report_to=all"])  # of those installed
    trackers.check("all")


def test_wandb_without_a_login_is_said_before_anything_is_loaded(wuerstchen, tmp_path):
    words = flags(wuerstchen, tmp_path / "out", report_to="wandb", train_data_dir="nowhere")
    quiet = {"WANDB_MODE": "online", "WANDB_API_KEY": "no key at all", "HOME": str(tmp_path)}
    code, printed = command(sys.executable, "train.py", *words, check=False, **quiet)
    assert code == 2 and "Traceback" not in printed
    assert "train.py: --report_to wandb: no valid wandb login found." in printed


def test_a_tracker_that_does_not_start_is_left_out(tmp_path, monkeypatch, capsys):
    def down(*_):
        raise RuntimeError("the server is down")

    monkeypatch.setattr(trackers.WandB, "__init__", down)
    run = two_steps()
    run.settings.report_to, run.folder, run.checkpoint, run.id = "all", tmp_path, None, "0"
    opened = trackers.open_trackers(run)
    assert [type(tracker) for tracker in opened] == [trackers.JsonLines, trackers.TensorBoard]
    assert "WandB did not start and is dropped: the server is down" in capsys.readouterr().out


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    trackers.TensorBoard(str(tmp_path), first_step=5).close()
    (file,) = tmp_path.iterdir()
    told = [event for event in EventFileLoader(str(file)).Load() if event.HasField("session_log")]
    assert [event.step for event in told] == [5]


def entries(folder):
    return [json.loads(line) for line in (folder / "logs/log.jsonl").read_text().splitlines()]


def test_log_jsonl_is_always_written_and_follows_a_resumed_run(wuerstchen, tmp_path):
    settings = {"checkpointing_steps": 1, "logging_steps": 1, "validation_split": 0.1}
    train_here(wuerstchen, tmp_path, **settings, validation_steps=2)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["log.jsonl"]
    whole = entries(tmp_path)
    assert [entry["step"] for entry in whole] == [0, 1, 2, 2, 3, 4, 4]
    assert ["validation_loss" in entry for entry in whole] == [1, 0, 0, 1, 0, 0, 1]
    with open(tmp_path / "logs/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    back = {"resume_from_checkpoint": "checkpoint-2"}
    train_here(wuerstchen, tmp_path, **settings, validation_steps=2, **back)
    again = entries(tmp_path)
    assert [entry["step"] for entry in again] == [0, 1, 2, 2, 2, 3, 4, 4]
    losses = [[e["loss"] for e in found if "loss" in e] for found in (whole, again)]
    assert losses[0] == losses[1]


def test_any_place_may_report_a_metric(wuerstchen, tmp_path, monkeypatch, capsys):
    """One line in a fork, here in the network. What is reported in validation is not counted."""
    forward, norms = WuerstchenPrior.forward, []

    def fork(self, x, t, text):
        norm = text.norm(dim=-1)
        metrics.report("text_norm", norm)
        if self.training:
            norms.append(norm)
        return forward(self, x, t, text)

    monkeypatch.setattr(WuerstchenPrior, "forward", fork)
    train_here(
        wuerstchen, tmp_path, logging_steps=3, gradient_accumulation_steps=2,
        validation_split=0.1, validation_steps=1,
    )  # fmt: skip
    norms = [norm.mean().item() for norm in norms[-8:]]  # without the memory estimate's
    found = [entry["text_norm"] for entry in entries(tmp_path) if "text_norm" in entry]
    assert found == pytest.approx([sum(norms[:6]) / 6, sum(norms[6:]) / 2], rel=1e-6)
    assert f"  text_norm {found[-1]:.4g}\n" in capsys.readouterr().out


def test_loss_by_quarter_of_the_times(wuerstchen, tmp_path, monkeypatch):
    """Against the plain errors, collected where they are reported, weighted or not."""
    seen, by_time = [], metrics.by_time

    def keep(name, error, t):
        seen.append((error.detach(), t))
        by_time(name, error, t)

    monkeypatch.setattr(metrics, "by_time", keep)
    train_here(wuerstchen, tmp_path, train_batch_size=16, loss_weighting="p2", logging_steps=4)
    error, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    (entry,) = entries(tmp_path)
    for quarter, name in enumerate(QUARTERS):
        inside = (t >= quarter / 4) & (t < (quarter + 1) / 4)
        assert entry[f"loss/{name}"] == pytest.approx(error[inside].mean().item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(
        (error * diffusion.Objective("p2").loss_weight(t)).mean().item(), rel=1e-5
    )


def test_metrics_are_joined_over_ranks(warm, still_wuerstchen, tmp_path):
    """Two ranks of two images each log what one rank of four logs."""
    settings = {"logging_steps": 2, "train_batch_size": 4}
    train_here(still_wuerstchen, tmp_path / "one", **settings)
    words = flags(still_wuerstchen, tmp_path / "two", **{**settings, "train_batch_size": 2})
    results = [run.wait() for run in warm.start_ranks(2, "train.py", words)]
    assert [code for code, _ in results] == [0, 0], results
    for one, two in zip(*(entries(tmp_path / name) for name in ("one", "two")), strict=True):
        names = [name for name in one if name.startswith("loss")]
        assert one.keys() == two.keys() and len(names) > 3
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], 1e-4)


def test_a_console_that_lacks_characters_shows_the_rest():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    console.Outlived(stream).write("x → y, “z”")
    stream.flush()
    assert stream.buffer.getvalue() == rb"x \u2192 y, \u201cz\u201d"
