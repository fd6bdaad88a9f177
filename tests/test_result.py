"""The result of a run: in a few lines, run.json, curves and strips; the best checkpoint, kept and
exported.
"""

import io
import json
import math
import shutil
import signal
import sys
import types

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minwurst import export
from minwurst.base import console
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import files, lora_file, run_file
from minwurst.edge.curves import TOP, around, marks, picture
from minwurst.edge.grids import STRIPS, evenly, grid, update_strips
from minwurst.run import checkpoint, result
from minwurst.run.log import Log
from tests.conftest import assert_bitwise_equal, command, flags, train_here
from tests.test_checkpoint import GROUPS

RESULT = "prior_pipeline/prior/diffusion_pytorch_model.safetensors"


# ---- The summary, from a log.


def run_with(folder, entries, skipped=()):
    """What a summary needs of a Run, with a log.jsonl."""
    (folder / "logs").mkdir()
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "logs/log.jsonl").write_text(text + '{"step": 99, "lo')
    layout = types.SimpleNamespace(global_batch=8)
    return types.SimpleNamespace(
        folder=folder, settings=Settings(), layout=layout, skipped=set(skipped)
    )


def trained(step, loss, pace):
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "pictures_per_second": pace}


def test_the_summary_is_of_all_starts(tmp_path):
    entries = [
        {"step": 0, "validation_loss": 0.9},
        trained(10, 0.8, 40.0),
        {"step": 10, "validation_loss": 0.7},
        {"step": 10, "validation_loss": 0.6},  # once more, after a kill
        trained(20, 0.5, 80.0),
        {"step": 20, "validation_loss": 0.65},
    ]
    made = run_with(tmp_path, entries, skipped=[15])
    found = result.summary(made, result.read_log(made), step=22, unlogged=3.0)
    # 10 · 8 / 40 + 9 · 8 / 80 + 3 seconds.
    assert found == {
        "steps": 21, "training_seconds": 5.9, "images_per_second": 28.47, "loss": 0.5,
        "validation_loss": 0.65, "lowest_validation_loss": 0.6, "lowest_at_step": 10,
    }  # fmt: skip
    assert list(result.lines(made, found)) == [
        "trained 21 steps in 0:00:06 (without validation), 28.47 images/s; loss 0.50000 at the end",
        "held-out loss 0.65000 at the end, lowest 0.60000 at step 10",
    ]


def test_a_log_of_nothing(tmp_path, capsys):
    made = run_with(tmp_path, [])
    result.report(made, step=0, unlogged=0.0)
    assert capsys.readouterr().out == "trained 0 steps in 0:00:00 (without validation)\n"
    assert not (tmp_path / "curves.png").exists()


def test_a_result_that_cant_be_written_is_one_line(tmp_path, capsys):
    made = run_with(tmp_path, [trained(1, 0.5, 1.0)])
    (tmp_path / "run.json").mkdir()
    result.report(made, step=1, unlogged=0.0)
    assert "no summary of the run: UserError: " in capsys.readouterr().out


def test_a_run_ends_with_its_result(wuerstchen, tmp_path, capsys):
    settings = {"validation_split": 0.1, "validation_steps": 2, "logging_steps": 2}
    train_here(wuerstchen, tmp_path, **settings)
    printed = capsys.readouterr().out
    assert "In brackets: the loss for t in 0–¼, ¼–½, ½–¾, ¾–1 (0 clean, 1 noise).\n" in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if line.startswith("held out"))
    log = [json.loads(line) for line in (tmp_path / "logs/log.jsonl").read_text().splitlines()]
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    found = json.loads((tmp_path / "run.json").read_text())["result"]
    assert found["steps"] == 4 and found["training_seconds"] > 0
    assert found["loss"] == [entry["loss"] for entry in log if "loss" in entry][-1]
    assert (found["validation_loss"], found["lowest_validation_loss"]) == (losses[-1], min(losses))
    assert found["best_checkpoint"] == "checkpoint-4"
    assert f"curves: {tmp_path / 'curves.png'}\n" in printed
    train_here(wuerstchen, tmp_path, **settings, max_train_steps=6, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "run.json").read_text())["result"]["steps"] == 6


@pytest.mark.slow
def test_a_signal_and_an_error_leave_a_result(warm, wuerstchen, tmp_path):
    settings = {"max_train_steps": 6, "logging_steps": 1}
    words = flags(wuerstchen, tmp_path / "stopped", **settings)
    code, printed = warm.run("train.py", words, faults=[["step", 3, signal.SIGTERM]])
    assert code == 143 and "trained 3 steps in" in printed
    words = flags(wuerstchen, tmp_path / "failed", **settings)
    code, printed = warm.run("train.py", words, faults=[["noise", 3, "nan"]])
    assert code == 2 and "trained 2 steps in" in printed and "Traceback" not in printed
    for name, steps in (("stopped", 3), ("failed", 2)):
        found = json.loads((tmp_path / name / "run.json").read_text())["result"]
        assert found["steps"] == steps
        assert (tmp_path / name / "curves.png").is_file()


# ---- Curves and strips.


def test_curves_draw_their_lines(tmp_path):
    lines = {"one": [(0, 0.5), (10, 0.25)], "other": [(0, 0.3), (10, 0.3)]}
    drawn = picture([("loss", lines), ("rate", {"": [(5, 1e-4)]})], "step")
    colors = {color for _, color in drawn.getcolors(2**24)}
    assert {(0x1F, 0x6F, 0x8B), (0xD1, 0x49, 0x5B)} <= colors
    assert around([0.412, 0.445]) == pytest.approx((0.412, 0.446))
    assert around([0.1, 0.9]) == pytest.approx((0.1, 0.9))
    assert around([0.5, 0.5]) == (0, 1) and around([0.0]) == (0, 1)
    # A first value far above the others leaves the plot, instead of flattening the rest.
    fall = {"one": [(0, 9.0), (5, 0.5), (10, 0.4)]}
    assert [text for *_, text, _ in marks([("", fall)], "", False) if text == "one starts at 9"]
    texts = [what for kind, _, *what in marks([("", fall)], "", from_zero=False) if kind == "text"]
    assert [place[1] for place, text, _ in texts if text == "0.5"] == [TOP + 4]
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    assert len(result.thinned(points)) == 200 and result.thinned(points)[0] == (3.0, 0.6)
    assert result.thinned(points[:200]) == points[:200]


def shades(folder, step, prompts=("a", "b"), shade=None):
    """Write the grid of a step, whose images are of one color, and update the strips."""
    color = (shade or step, 0, 0)
    images = [Image.new("RGB", size, color) for size in ((192, 192), (192, 96))[: len(prompts)]]
    info = PngInfo()
    info.add_itxt("prompts", json.dumps(list(prompts)))
    grid(images, prompts, "step").save(folder / f"step-{step:06}.png", pnginfo=info)
    update_strips(folder, step, images, list(prompts))


def reds(folder):
    """The colors of the columns of the strips."""
    with Image.open(folder / STRIPS) as strips:
        found = [strips.getpixel((x, 60))[0] for x in range(8, strips.width, 200)]
        return found, json.loads(strips.info["steps"])


def test_strips_have_a_column_per_step_but_not_too_many(tmp_path):
    for step in range(0, 200, 20):
        shades(tmp_path, step)
    assert reds(tmp_path) == ([0, 20, 60, 80, 100, 120, 160, 180], list(range(0, 200, 20)))
    shades(tmp_path, 70)  # resumed from step 60 or earlier
    assert reds(tmp_path) == ([0, 20, 40, 60, 70], [0, 20, 40, 60, 70])
    (tmp_path / "step-000020.png").unlink()
    (tmp_path / "step-000040.png").write_bytes(b"damaged")
    shades(tmp_path, 80)
    assert reds(tmp_path)[0] == [0, 60, 70, 80]
    shades(tmp_path, 90, prompts=["another"])  # other prompts begin anew
    assert reds(tmp_path)[0] == [90]
    shades(tmp_path, 0, shade=7)  # and so does another run
    assert reds(tmp_path) == ([7], [0])
    assert evenly([1, 2, 3], 8) == [1, 2, 3]


def test_a_run_draws_strips_and_curves(wuerstchen, tmp_path):
    train_here(
        wuerstchen, tmp_path, validation_prompts="a bear", validation_steps=2,
        validation_decoder="preview",
    )  # fmt: skip
    with Image.open(tmp_path / "validation" / STRIPS) as strips:
        assert json.loads(strips.info["steps"]) == [0, 2, 4]


# ---- Progress bars.


@pytest.mark.parametrize(("options", "shown"), [
    ({"total": 0}, False), ({"total": 4, "initial": 4}, False), ({"total": 2}, True),
    ({"total": 4, "initial": 2}, True),
])  # fmt: skip
def test_a_bar_with_nothing_to_do_is_not_shown(monkeypatch, options, shown):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    count = options["total"] - options.get("initial", 0)
    assert list(console.progress(range(count), "bar", **options)) == list(range(count))
    assert ("bar" in screen.getvalue()) == shown


def test_the_bar_shows_the_last_loss(tmp_path):
    made = run_with(tmp_path, [])
    made.step, made.last_step, made.is_due = 0, 4, lambda step, every: step % every == 0
    made.settings.logging_steps = 2
    log, shown = Log([], made), []
    for step in range(1, 5):
        log.step(step, torch.tensor(1 / step), torch.tensor(1.0), 1e-3)
        shown.append(getattr(log.bar, "postfix", None))
    log.close()
    assert shown == [None, "loss 0.7500", "loss 0.7500", "loss 0.2917"]


# ---- The best checkpoint.


def names(folder):
    return [path.name for path in checkpoint.list_all(folder)]


def test_rotation_spares_the_best(tmp_path):
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: math.nan, 5: 0.35, 6: 0.2, 7: 0.25}
    kept = {}
    for step, loss in losses.items():
        checkpoint.save(tmp_path, step, GROUPS, {"step": step}, 1, True)
        kept[step] = names(tmp_path)
        checkpoint.record_held_out(tmp_path, step, loss)
    assert kept == {
        1: ["checkpoint-1"],
        2: ["checkpoint-1", "checkpoint-2"],
        **{step: ["checkpoint-2", f"checkpoint-{step}"] for step in (3, 4, 5, 6)},
        7: ["checkpoint-6", "checkpoint-7"],
    }
    (tmp_path / "checkpoint-6/held_out.json").write_text("{ cut off")
    assert checkpoint.best(tmp_path)[0].name == "checkpoint-7"
    checkpoint.rotate(tmp_path, 1, keep_best=True)
    assert names(tmp_path) == ["checkpoint-7"]
    assert not checkpoint.damage(tmp_path / "checkpoint-7")
    checkpoint.save(tmp_path, 7, GROUPS, {"step": 7})  # a new one in its place is not validated yet
    assert checkpoint.best(tmp_path) == (None, math.inf)
    checkpoint.record_held_out(tmp_path, 8, 0.1)  # a step that was not saved
    assert names(tmp_path) == ["checkpoint-7"]


def test_the_best_needs_held_out_rows():
    with pytest.raises(UserError, match="--keep_best compares .*: add --validation_split"):
        parse(Settings, ["--train_data_dir=x", "--keep_best"])


@pytest.fixture
def scripted(monkeypatch):
    """Held-out losses by step, instead of the measured ones, for the choice of the best."""
    losses, record = {}, checkpoint.record_held_out

    def write(folder, step, loss):
        record(folder, step, losses.get(step, loss))

    monkeypatch.setattr(checkpoint, "record_held_out", write)
    return losses


KEEPING = {
    "validation_split": 0.1, "validation_steps": 100, "checkpointing_steps": 1,
    "checkpoints_total_limit": 1, "use_ema": True, "ema_decay": 0.5,
}  # fmt: skip


def test_the_best_is_kept_and_exported(wuerstchen, tmp_path, scripted, capsys):
    """Over rotations and a resume, with the same weights as without --keep_best."""
    scripted.update({1: 0.5, 2: 0.3, 3: 0.4, 4: 0.35, 5: 0.6})
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    train_here(wuerstchen, kept, **KEEPING, keep_best=True, max_train_steps=3)
    assert names(kept) == ["checkpoint-2", "checkpoint-3"]
    more = {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    train_here(wuerstchen, kept, **KEEPING, keep_best=True, **more)
    assert names(kept) == ["checkpoint-2", "checkpoint-5"]
    printed = capsys.readouterr().out
    assert f"best checkpoint: checkpoint-2\ncurves: {kept}" in printed
    assert f"to export the best checkpoint instead: python -m minwurst.export {kept}" in printed
    train_here(wuerstchen, plain, **KEEPING, max_train_steps=2)
    two = (plain / RESULT).read_bytes()
    assert_bitwise_equal(kept / "checkpoint-2", plain / "checkpoint-2")
    train_here(wuerstchen, plain, **KEEPING, **more)
    assert names(plain) == ["checkpoint-5"]
    assert_bitwise_equal(kept / "checkpoint-5", plain / "checkpoint-5")

    five = (kept / RESULT).read_bytes()
    assert export.write(kept, "checkpoint-5", tmp_path / "again")[0].parent == tmp_path / "again"
    again = tmp_path / "again/prior_pipeline"
    written = [file.relative_to(again) for file in again.rglob("*") if file.is_file()]
    assert len(written) > 5
    for file in written:
        assert (again / file).read_bytes() == (kept / "prior_pipeline" / file).read_bytes(), file
    assert run_file.read(kept)["steps"] == 5
    assert export.write(kept, None)[1].name == "checkpoint-2"
    assert (kept / RESULT).read_bytes() == two != five
    assert run_file.read(kept)["steps"] == 2
    for step, known in ((2, {"validation_loss": 0.3}), (4, {})):  # what the card says of it
        run_file.add(kept, result={"lowest_validation_loss": 0.3, "lowest_at_step": step})
        assert run_file.read(kept)["result"] == known
    with pytest.raises(UserError, match="Step 5 is already done: .* as minwurst.export wrote it"):
        train_here(wuerstchen, kept, **KEEPING, keep_best=True, **more)
    assert (kept / RESULT).read_bytes() == two and run_file.read(kept)["steps"] == 2
    train_here(wuerstchen, kept, **KEEPING, keep_best=True, **{**more, "max_train_steps": 6})
    assert (kept / RESULT).read_bytes() != two and run_file.read(kept)["steps"] == 6


@pytest.mark.parametrize("changed", [{}, {"use_dora": True, "mixed_precision": "bf16"}])
def test_a_lora_is_exported_from_a_checkpoint(wuerstchen, tmp_path, changed):
    settings = {"max_train_steps": 2, "rank": 2, "lora_alpha": 3.0, **changed}
    train_here(wuerstchen, tmp_path, "lora.py", **settings)
    own = (tmp_path / lora_file.FILE).read_bytes()
    target, found = export.write(tmp_path, "checkpoint-2", tmp_path / "other")
    assert target.read_bytes() == own and found.name == "checkpoint-2"
    assert export.write(tmp_path, None)[1].name == "checkpoint-2"  # the newest, as none is best


def test_a_prior_from_scratch_is_exported_from_a_checkpoint(wuerstchen, tmp_path):
    config = json.loads((wuerstchen / "prior/config.json").read_text())
    config["prediction_type"] = "flow_prediction"
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    train_here(wuerstchen, out, max_train_steps=1, from_scratch=tmp_path / "config.json")
    target = export.write(out, "checkpoint-1", tmp_path / "other")[0]
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        found, expected = target / "prior" / file, out / "prior_pipeline/prior" / file
        assert found.read_bytes() == expected.read_bytes()


def test_a_checkpoint_that_cant_be_exported(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    with pytest.raises(UserError, match="--checkpoint checkpoint-7: no such folder"):
        export.write(tmp_path, "checkpoint-7")
    with open(tmp_path / "checkpoint-1/weights.safetensors", "r+b") as file:
        file.seek(-1, 2), file.write(b"\xff")
    with pytest.raises(UserError, match="checkpoint-1: weights.safetensors has changed"):
        export.write(tmp_path, "checkpoint-1")
    with pytest.raises(UserError, match="is not the --output_dir of a run"):
        export.write(tmp_path / "nowhere", None)
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="there is no checkpoint"):
        export.write(tmp_path, None)


@pytest.mark.slow
def test_it_exports_as_a_program(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    words = sys.executable, "-m", "minwurst.export", tmp_path, "--checkpoint=checkpoint-1"
    code, printed = command(*words, check=False)  # this process still has the folder's lock
    assert code == 1 and "another run is using it" in printed and "Traceback" not in printed
    other = tmp_path / "other"
    assert command(*words, "--output", other)[1] == f"{other / 'prior_pipeline'}: checkpoint-1\n"
    files.make_folder(other)
    files.lock(other)
    assert f"{tmp_path / 'prior_pipeline'}: checkpoint-1\n" in command(*words)[1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [["validate", 3], ["rotate", 4], ["write", 7], ["step", 4]])
def test_kills_do_not_change_which_is_kept(warm, wuerstchen, few, tmp_path, fault):
    """Before a validation, in a rotation, in a save, in a step: the end is the same."""
    settings = {
        **KEEPING, "train_data_dir": None, "dataset_name": few, "validation_split": 0.3,
        "train_batch_size": 1, "max_train_steps": 5, "learning_rate": 0.1, "keep_best": True,
        "resume_from_checkpoint": "latest",
    }  # fmt: skip
    assert warm.run("train.py", flags(wuerstchen, tmp_path / "whole", **settings))[0] == 0
    words = flags(wuerstchen, tmp_path / "killed", **settings)
    code, printed = warm.run("train.py", words, faults=[[*fault, signal.SIGKILL]])
    assert code == -signal.SIGKILL, printed
    code, printed = warm.run("train.py", words)
    assert code == 0, printed
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert names(whole) == names(killed) and len(names(whole)) == 2
    for name in names(whole):
        assert_bitwise_equal(whole / name, killed / name)
        assert checkpoint.held_out(whole / name) == checkpoint.held_out(killed / name) < math.inf
