"""Files, flags and environments that no run has made: one line that says what is wrong."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from minwurst.base import errors, ranks
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import files, lora_file, models, run_file
from minwurst.edge.files import read_json, replacing
from minwurst.run import checkpoint, run
from minwurst.sample import SampleSettings
from minwurst.sample import main as sample
from minwurst.step import adapter
from tests import tiny
from tests.conftest import ROOT, flags, train_here

pytestmark = pytest.mark.slow

RESUME = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def finished(wuerstchen, few, tmp_path_factory):
    """The folder of a run of two steps."""
    settings = {"train_data_dir": None, "dataset_name": few, "checkpointing_steps": 1}
    folder = tmp_path_factory.mktemp("hostile") / "finished"
    return train_here(wuerstchen, folder, **settings, train_batch_size=1, max_train_steps=2)


@pytest.fixture
def resume(wuerstchen, few, finished, tmp_path):
    """edit(folder of the last checkpoint) → the UserError of resuming, checksums made to fit."""

    def resumed(edit):
        out = shutil.copytree(finished, tmp_path / "out")
        newest = out / "checkpoint-2"
        edit(newest)
        manifest = {
            file.name: {
                "size": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in newest.iterdir()
            if file.name != checkpoint.MANIFEST
        }
        (newest / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        settings = {"train_data_dir": None, "dataset_name": few, "train_batch_size": 1, **RESUME}
        with pytest.raises(UserError) as raised:
            train_here(wuerstchen, out, **settings)
        return str(raised.value)

    return resumed


# ---- Checkpoints that were edited, with checksums to match.


ENTRIES = {
    "step": (None, "2", 10**30, -1, 1.5, True, [2]),
    "updates": (None, "x", 1.5, -1, 3),
    "seed": (None, "7", -1),
    "settings": (None, [], {}, 7, {"skip_rows": 5}, {"skip_rows": [[1]]}, {"skip_steps": "ab"}),
    "identity": (None, {}, [], [[1]], "x", {"data": "x"}),
    "defaults": (None, ["a"]),
    "scaler": (None, "x", {"scale": "x"}, {"scale": float("nan")}),
}


def test_impossible_entries_are_named(finished):
    folder = finished / "checkpoint-2"
    good = checkpoint.read_progress(folder)
    assert checkpoint.impossible(folder, good, run.IDENTITY) is None
    for name, values in ENTRIES.items():
        for value in values:
            bad = {**good, name: value}
            assert checkpoint.impossible(folder, bad, run.IDENTITY) == name, value
    assert checkpoint.impossible(finished / "checkpoint-9", good, run.IDENTITY) == "step"


def edit_state(**changed):
    def edit(folder):
        file = folder / "state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return edit


def edit_tensors(file, change):
    def edit(folder):
        tensors = {name: change(name, t) for name, t in load_file(folder / file).items()}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / file)

    return edit


EDITS = {
    "no step": (edit_state(step=None), "state.json has no step that a run can have written"),
    "odd optimizer": (edit_state(optimizer=[1]), "its state.json does not fit this model"),
    "an empty file": (
        lambda folder: (folder / "weights.safetensors").write_bytes(b""), "can't be read",
    ),
    "whole numbers": (
        edit_tensors("weights.safetensors", lambda name, t: t.long()), "weights.safetensors does",
    ),
    "short memory": (
        edit_tensors("optimizer.safetensors", lambda name, t: t.flatten()[:1].clone()),
        r"optimizer.safetensors has no .*\.step that fits|does not fit",
    ),
    "no memory": (
        edit_tensors("optimizer.safetensors", lambda name, t: t if "avg" not in name else None),
        "optimizer.safetensors has no .*exp_avg that fits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_checkpoint_is_one_line(resume, name):
    edit, said = EDITS[name]
    assert re.search(said, resume(edit))


# ---- What is in the way.


def test_json_of_anybody(tmp_path):
    file = tmp_path / "x.json"
    for text in ("", "null", "[]", "7", DEEP, '{"a":' * 3000, "1" * 5000):
        file.write_text(text)
        with pytest.raises(ValueError):
            read_json(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match="not a regular file"):
        read_json(file)


@pytest.mark.parametrize("file", [".lock", "run.json", "good_rows.json", ".checkpoint-2.part"])
def test_a_pipe_is_not_waited_for(wuerstchen, few, tmp_path, file, capsys):
    os.mkfifo(tmp_path / file)
    settings = {"train_data_dir": None, "dataset_name": few, "max_train_steps": 1}
    if file == ".lock":
        with pytest.raises(UserError, match="can't open its .lock"):
            train_here(wuerstchen, tmp_path, **settings)
    else:
        train_here(wuerstchen, tmp_path, **settings)
        assert (tmp_path / "prior_pipeline").is_dir()


@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link", "folder"])
def test_a_second_result_replaces_what_has_its_name(wuerstchen, few, tmp_path, kind):
    """A link is replaced, not followed."""
    out, target = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir(), target.mkdir()
    (target / "kept").write_text("kept")
    result = out / "prior_pipeline"
    if kind == "file":
        result.write_text("x")
    elif kind == "folder":
        result.mkdir()
        (result / "old").write_text("old")
    else:
        result.symlink_to(target if kind == "link to a folder" else tmp_path / "nowhere")
    train_here(wuerstchen, out, train_data_dir=None, dataset_name=few, max_train_steps=1)
    assert not result.is_symlink() and (result / "model_index.json").is_file()
    assert not (result / "old").exists() and not (tmp_path / "nowhere").exists()
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert [path.name for path in out.iterdir() if path.name[0] == "."] == [".lock"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_a_second_lora_replaces_a_link_but_no_folder(wuerstchen, tmp_path, kind):
    prior = models.load_prior(wuerstchen)
    adapter.add_adapters(prior, rank=2, alpha=2, targets=["attention"])
    file, target = tmp_path / lora_file.FILE, tmp_path / "target"
    target.write_text("kept")
    if kind == "folder":
        file.mkdir()
        (file / "mine").write_text("mine")
        with pytest.raises(UserError, match="Move this folder away. The last checkpoint is intac"):
            lora_file.save(prior, file)
        assert (file / "mine").read_text() == "mine"
    else:
        file.symlink_to(target if kind == "link" else tmp_path / "nowhere")
        lora_file.save(prior, file)
        assert lora_file.read(file) and not file.is_symlink()
    assert target.read_text() == "kept" and not list(tmp_path.glob(".*"))


def test_a_draft_that_is_a_pipe_or_a_link_is_removed(tmp_path):
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "nowhere")):
        make(tmp_path / ".x.part")
        with replacing(tmp_path / "x") as draft:
            draft.write_text("new")
        assert (tmp_path / "x").read_text() == "new" and not (tmp_path / "nowhere").exists()


# ---- Models.


def tokenizer_config(**changed):
    def edit(folder):
        file = folder / "tokenizer/tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return edit


def text_config(**changed):
    def edit(folder):
        file = folder / "text_encoder/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return edit


def pipe(name):
    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


MODELS = {
    "no padding": tokenizer_config(pad_token=None),
    "length 0": tokenizer_config(model_max_length=0),
    "length 1": tokenizer_config(model_max_length=1),
    "length -5": tokenizer_config(model_max_length=-5),
    "length 3.5": tokenizer_config(model_max_length=3.5),
    "length x": tokenizer_config(model_max_length="x"),
    "no end": text_config(eos_token_id=None),
    "quantized": text_config(quantization_config={"load_in_4bit": True}),
    "pipe as weights": pipe("text_encoder/model.safetensors"),
    "pipe as tokenizer": pipe("tokenizer/tokenizer.json"),
    "pipe beside it": pipe("tokenizer/more.txt"),
}


@pytest.mark.parametrize("name", MODELS)
def test_text_encoders_of_anybody(wuerstchen, tmp_path, name):
    folder = shutil.copytree(wuerstchen, tmp_path / "copy")
    MODELS[name](folder)
    with pytest.raises(UserError, match=str(folder)):
        models.load_text(folder, torch.float32)


def test_a_number_that_is_none_is_refused(wuerstchen, tmp_path):
    folder = shutil.copytree(wuerstchen, tmp_path / "copy")
    file = folder / "decoder/vqgan/config.json"
    for value in ("x", 0, -1, None):
        config = {**json.loads(file.read_text()), "scale_factor": value}
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match="vqgan can't be loaded: config.json: scale_factor is"):
            sample(sample_settings(folder, tmp_path / "x.png"))


def test_layers_inside_the_first_one(wuerstchen):
    with pytest.raises(UserError, match="--lora_targets blocks: not a linear .*blocks.0.channelw"):
        adapter.find_targets(models.load_prior(wuerstchen), ["blocks"])


# ---- minwurst.sample.


def sample_settings(wuerstchen, output, **changed):
    given = {"prompt": "a", "prior": wuerstchen, "decoder": wuerstchen / "decoder"}
    given |= {"resolution": 96, "output": output, **changed}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return parse(SampleSettings, words)


def test_images_that_are_not_finite_are_no_images(wuerstchen, tmp_path):
    with pytest.raises(UserError, match="numbers that are not finite. Lower --guidance_scale"):
        sample(sample_settings(wuerstchen, tmp_path / "x.png", guidance_scale=1e308))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "full disk", "no name"])
def test_an_image_that_can_not_be_written(wuerstchen, tmp_path, kind):
    file = tmp_path / ("x.png" if kind != "no name" else ".png")
    {
        "folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "no name": lambda: None,
        "dangling link": lambda: file.symlink_to(tmp_path / "no/where.png"),
        "full disk": lambda: file.symlink_to("/dev/full"),
    }[kind]()  # fmt: skip
    with pytest.raises(UserError, match="--output"):
        sample(sample_settings(wuerstchen, file))


def test_a_run_file_that_was_edited(wuerstchen, finished, tmp_path):
    good = json.loads((finished / run_file.FILE).read_text())
    for entry in ({"resolution": "768"}, {"validation_prompts": 7}, {"learning_rate": []}):
        edited = {**good, "settings": {**good["settings"], **entry}}
        (tmp_path / run_file.FILE).write_text(json.dumps(edited))
        with pytest.raises(UserError, match=f"can't read its run.json.*{next(iter(entry))}"):
            run_file.read(tmp_path)
    for entry in ({"starts": []}, {"starts": [7]}, {"settings": 7}, {"published": []}):
        (tmp_path / run_file.FILE).write_text(json.dumps({**good, **entry}))
        with pytest.raises(UserError, match="can't read its run.json"):
            run_file.read(tmp_path)
    out = shutil.copytree(finished, tmp_path / "out")
    index = out / "prior_pipeline/model_index.json"  # it also says the resolution
    for text in (DEEP, "[]", '{"resolution": "768"}'):
        index.write_text(text)
        with pytest.raises(UserError, match="model_index.json(: its res| can.t be read)"):
            sample(sample_settings(wuerstchen, tmp_path / "x.png", prior=out, resolution=None))
    index.unlink()
    edited = {**good, "settings": {**good["settings"], "resolution": 10**12}}
    (out / run_file.FILE).write_text(json.dumps(edited))
    with pytest.raises(UserError, match="--resolution is 1000000000000"):
        sample(sample_settings(wuerstchen, tmp_path / "x.png", prior=out, resolution=None))


# ---- Data, flags, the environment.


def images(folder, lines):
    folder.mkdir()
    shutil.copy(tiny.IMAGES / "bank.webp", folder)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


GOOD_LINE = '{"file_name": "bank.webp", "text": "a"}\n'


def test_data_sets_of_anybody(tmp_path):
    for name, lines, said in (
        ("empty", "", "its metadata.jsonl is empty"),
        ("nul", GOOD_LINE.replace("bank", "\\u0000"), "Row 0: the name of its image"),
        ("set [a]", GOOD_LINE, "Rename it"),
    ):
        folder = images(tmp_path / name, lines)
        with pytest.raises(UserError, match=said):
            tiny.rows(train_data_dir=str(folder))


def test_one_column_for_both():
    with pytest.raises(UserError, match="--image_column and --caption_column are both text"):
        parse(Settings, ["--train_data_dir=x", "--image_column=text"])


def test_numbers_beyond_any_use(wuerstchen, tmp_path):
    for name, value in (
        ("max_train_steps", 10**30), ("train_batch_size", 10**9), ("resolution", 32 * 10**8),
        ("gradient_accumulation_steps", 10**9),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name} is {value}"):
            parse(Settings, flags(wuerstchen, tmp_path, **{name: value}))
    settings = {"num_train_epochs": 10**18, "max_train_steps": None}
    with pytest.raises(UserError, match="--num_train_epochs 1000000000000000000 makes .* steps"):
        train_here(wuerstchen, tmp_path, **settings)


@pytest.mark.parametrize("values", [{"RANK": "x"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}])
def test_ranks_of_nobody(monkeypatch, wuerstchen, tmp_path, values):
    assert ranks.look_right()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK, WORLD_SIZE and LOCAL_RANK are not as torchrun"):
        train_here(wuerstchen, tmp_path)


def test_what_the_system_says_is_one_line(capsys):
    for error, said in (
        (FileNotFoundError(2, "No such file", "/nowhere"), "/nowhere: No such file."),
        (MemoryError(), "Out of memory (the system has none left). Lower --train_batch_size"),
        (RuntimeError("[…] can't allocate memory: you tried"), "Out of memory ([…] can't"),
    ):
        with pytest.raises(SystemExit) as left:
            errors.exit_with(error)
        printed = capsys.readouterr().err
        assert left.value.code == 2 and said in printed and printed.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        errors.exit_with(RuntimeError("a bug"))
    assert left.value.code == 1 and "RuntimeError: a bug" in capsys.readouterr().err
    said = "minwurst.x: /nowhere: No such file."
    with pytest.raises(SystemExit, match=said), errors.one_line("minwurst.x"):
        raise FileNotFoundError(2, "No such file", "/nowhere")


def test_closed_streams_receive_no_file():
    """With its output closed, a program continues, and no file of its own gets the number 1."""
    code = "import sys; from minwurst.base.console import outlive; outlive(); "
    code += "print('x', flush=True); sys.exit(open('README.md').fileno() > 2)"
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], cwd=ROOT
    )
    assert done.returncode == 1


def test_a_reader_that_leaves_is_no_error():
    code = "from minwurst.base.errors import one_line\nwith one_line('x'): print('x' * 1000000)"
    line = '"$@" | true; exit ${PIPESTATUS[0]}'
    words = ["bash", "-c", line, "bash", sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_reasons():
    assert files.reason(OSError(28, "full")).endswith("Free some space.")
    assert files.reason(IsADirectoryError(21, "x")).endswith("Move this folder away.")
    assert files.reason(OSError(5, "broken")) == "[Errno 5] broken."
