"""Checkpoints: complete or absent, verified, rotated last; resuming reproduces the same run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minwurst.base.errors import UserError
from minwurst.edge import files
from minwurst.run import checkpoint, run
from tests.conftest import assert_bitwise_equal, train_here

GROUPS = {"weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}, "ema": {}}


def save(folder, step, keep=None):
    checkpoint.save(folder, step, GROUPS, {"step": step}, keep)
    return folder / f"checkpoint-{step}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_goes_round(tmp_path):
    groups, state = checkpoint.load(save(tmp_path, 5))
    assert state == {"step": 5, "groups": ["weights"]}
    assert groups.keys() == {"weights"}  # an empty group needs no file
    assert all(torch.equal(groups["weights"][name], GROUPS["weights"][name]) for name in "ab")
    assert names(tmp_path / "checkpoint-5") == [
        "manifest.json",
        "state.json",
        "weights.safetensors",
    ]
    assert names(tmp_path) == ["checkpoint-5"]


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = save(tmp_path, 5)
    (folder / "weights.safetensors").write_bytes(b"broken")
    assert checkpoint.damage(save(tmp_path, 5)) is None
    assert names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [2, 4, 10]), (1, [10]), (2, [4, 10]), (5, [2, 4, 10])]
)
def test_rotation_counts_numbers_not_letters(tmp_path, keep, left):
    for step in (2, 4, 10):
        save(tmp_path, step, keep)
    assert [path.name for path in checkpoint.list_all(tmp_path)] == [
        f"checkpoint-{n}" for n in left
    ]


def test_strangers_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-3.bak", "my pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    save(tmp_path, 1, keep=1), save(tmp_path, 2, keep=1)
    assert checkpoint.find("latest", tmp_path).name == "checkpoint-2"
    assert names(tmp_path) == [
        "checkpoint-", "checkpoint-2", "checkpoint-3.bak", "checkpoint-99", "checkpoint-best",
        "my pictures",
    ]  # fmt: skip


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda f: flip(f / "weights.safetensors"), "weights.safetensors has changed"),
    "truncated": (
        lambda f: (f / "state.json").write_text("{"),
        "state.json has 1 bytes instead of",
    ),
    "missing file": (
        lambda f: (f / "weights.safetensors").unlink(),
        "weights.safetensors is missing",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    "broken manifest": (
        lambda f: (f / "manifest.json").write_text("["),
        "its manifest.json can't be",
    ),
    "odd manifest": (
        lambda f: (f / "manifest.json").write_text("[1]"),
        "its manifest.json can't be",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, kind, capsys):
    harm, said = DAMAGE[kind]
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    harm(bad)
    assert said in checkpoint.damage(bad)
    assert checkpoint.find("latest", tmp_path) == good
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume_from_checkpoint .*checkpoint-2"):
        checkpoint.find(str(bad), tmp_path)
    shutil.rmtree(good)
    with pytest.raises(UserError, match="none of its 1 checkpoints is intact"):
        checkpoint.find("latest", tmp_path)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path, monkeypatch):
    """Stop a save at each of its steps: a complete checkpoint remains, and the next save works."""
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def stop(*_):
        raise Killed

    for module, name in (
        (checkpoint, "write_tensors"), (checkpoint, "describe"), (files, "flush"),
        (checkpoint, "delete"),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(module, name, stop)
            with pytest.raises(Killed):
                save(tmp_path, 2, keep=1)
        assert checkpoint.damage(checkpoint.find("latest", tmp_path)) is None
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match="checkpoint-2 was not written: .*No space left.* 32 bytes"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path, number):
    """Nothing is written, renamed or rotated."""
    save(tmp_path, 1), save(tmp_path, 2)
    groups = {**GROUPS, "ema": {"c": torch.tensor([1.0, number])}}
    with pytest.raises(UserError, match=r"c is not finite \(ema\), .* nothing was saved"):
        checkpoint.save(tmp_path, 3, groups, {}, keep=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def drop_from_manifest(folder, name):
    file = folder / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    del manifest[name]
    file.write_text(json.dumps(manifest))


def test_only_what_the_manifest_names_is_read(tmp_path):
    """A file manager's leftovers and other files are no part of a checkpoint."""
    folder = save(tmp_path, 5)
    (folder / "._weights.safetensors").write_bytes(b"resource fork")
    (folder / "notes.safetensors").write_bytes(b"garbage")
    assert checkpoint.find("latest", tmp_path) == folder
    assert checkpoint.load(folder)[0].keys() == {"weights"}


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/passwd", "a/b.json", ".x.json"])
def test_names_stay_in_the_folder(tmp_path, name):
    folder = save(tmp_path, 5)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest[name] = manifest["weights.safetensors"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.damage(folder) == f"its manifest.json lists {name}"


def test_a_file_that_the_manifest_lacks_is_missed(tmp_path):
    checkpoint.save(tmp_path, 5, {**GROUPS, "optimizer": {"a.step": torch.ones(1)}}, {})
    folder = tmp_path / "checkpoint-5"
    drop_from_manifest(folder, "optimizer.safetensors")
    assert checkpoint.damage(folder) == "its manifest.json lacks optimizer.safetensors"


def test_files_are_safetensors(tmp_path):
    """Written by hand, read by the library, with any type, shape and memory layout."""
    base = torch.randn(6, 5)
    tensors = {
        "transposed": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(3.5), "same": base,
        "empty": torch.zeros(0, 3), "half": base.to(torch.bfloat16),
        "large": torch.randn(5_000_000),
        "ints": torch.arange(7), "bytes": torch.arange(9, dtype=torch.uint8),
        "ünï": torch.tensor([True, False]),
    }  # fmt: skip
    name, description = checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    assert name == "x.safetensors" and description == files.describe(tmp_path / name)
    found = load_file(tmp_path / name)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype, key


def test_find(tmp_path):
    assert checkpoint.find(None, tmp_path) is None
    assert checkpoint.find("latest", tmp_path) is None  # for restarted jobs
    folder = save(tmp_path, 3)
    for wanted in ("latest", str(folder), f"{folder}/", "checkpoint-3"):
        assert checkpoint.find(wanted, tmp_path) == folder
    with pytest.raises(UserError, match="contains checkpoint-3: name another folder, or add --re"):
        checkpoint.find(None, tmp_path)
    with pytest.raises(UserError, match="--resume_from_checkpoint checkpoint-9: no such"):
        checkpoint.find("checkpoint-9", tmp_path)


def test_changes_are_listed_or_refused():
    before = {"learning_rate": 1e-4, "resolution": 768, "cache_dir": None}
    assert run.check_same_run({}, before) == []
    assert run.check_same_run(before, {**before, "cache_dir": "x"}) == []
    assert run.check_same_run(before, {**before, "learning_rate": 1e-5}) == [
        "learning_rate 0.0001 → 1e-05"
    ]
    with pytest.raises(UserError, match="resolution was 768 and is now 512"):
        run.check_same_run(before, {**before, "resolution": 512})
    with pytest.raises(UserError, match="and is now 5; --resolution was 768 and is now 512, which"):
        run.check_same_run({"rank": 4, **before}, {**before, "rank": 5, "resolution": 512})


def test_settings_across_versions():
    """What a checkpoint lacks counts as its default; what is unknown must be at its default."""
    now = {"learning_rate": 1e-4, "resolution": 768, "loss_weighting": "none"}
    older = {"settings": {"learning_rate": 1e-4, "resolution": 768}}
    assert run.check_settings(older, now) == []
    with pytest.raises(UserError, match="--loss_weighting was none and is now p2"):
        run.check_settings(older, {**now, "loss_weighting": "p2"})
    newer = {"settings": {**now, "use_magic": False}, "defaults": {"use_magic": False}}
    assert run.check_settings(newer, now) == []
    newer["settings"]["use_magic"] = True
    with pytest.raises(UserError, match="written with --use_magic True, which this program does"):
        run.check_settings(newer, now)
    assert run.check_settings(run.FRESH, now) == []


def edit_state(folder, change):
    """Change a checkpoint's state.json, and its manifest accordingly."""
    file = folder / "state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["state.json"] = files.describe(file)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_of_the_first_edition_resumes(wuerstchen, tmp_path):
    """It has the same files, no format, no defaults, and none of the later settings."""
    stateful = {"use_ema": True, "mixed_precision": "fp16", "checkpointing_steps": 2}
    whole = train_here(wuerstchen, tmp_path / "whole", **stateful)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    new = "snr_gamma", "logit_mean", "logit_std", "skip_steps", "skip_rows", "recheck_data"

    def as_before(state):
        del state["format"], state["defaults"], state["identity"]["prediction"]
        for name in new:
            del state["settings"][name]

    edit_state(tmp_path / "old" / "checkpoint-2", as_before)
    train_here(wuerstchen, tmp_path / "old", **stateful, resume_from_checkpoint="latest")
    assert_bitwise_equal(whole / "checkpoint-4", tmp_path / "old" / "checkpoint-4")


def test_a_later_format_is_refused(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    edit_state(tmp_path / "checkpoint-1", lambda state: state.update(format=2))
    with pytest.raises(UserError, match="has format 2, and this version reads format 1"):
        train_here(wuerstchen, tmp_path, resume_from_checkpoint="latest")


def test_output_folder_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--output_dir .*is not writable"):
        files.make_folder(tmp_path / "file" / "out")


def test_no_pickle_anywhere(tmp_path):
    folder = save(tmp_path, 1)
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds == {".json", ".safetensors"}
    json.loads((folder / "manifest.json").read_text())
