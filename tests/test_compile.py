"""--compile: the same run up to rounding, the same files, and bit for bit the same when resumed."""

import json
import shutil

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from minwurst.edge import lora_file
from tests import tiny
from tests.conftest import assert_bitwise_equal, difference, saved, train_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
]

RUN = {"aspect_buckets": 2, "resolution": 96, "checkpointing_steps": 2, "adam_epsilon": 1e-4,
       "use_ema": True, "compile": True}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Squares and wide images."""
    folder, lines = tmp_path_factory.mktemp("shapes"), []
    for number, file in enumerate(sorted(tiny.IMAGES.glob("*.webp"))[:24]):
        size = (96, 96) if number % 2 else (128, 64)
        ImageOps.fit(Image.open(file).convert("RGB"), size).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"thing {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def test_it_is_the_same_run(wuerstchen, shapes, tmp_path, capsys):
    """Dropout included. Resumed, and with recomputation, it is the same bit for bit."""
    options = {**RUN, "train_data_dir": shapes}
    plain = train_here(wuerstchen, tmp_path / "plain", **{**options, "compile": False})
    assert "(128×64 for the encoder): 12 images" in capsys.readouterr().out
    out = train_here(wuerstchen, tmp_path / "compiled", **options)
    assert difference(saved(out / "checkpoint-4"), saved(plain / "checkpoint-4")) < 1e-5
    result, expected = ({p.name for p in f.rglob("*") if p.is_file()} for f in (out, plain))
    assert result == expected
    parts = train_here(wuerstchen, tmp_path / "parts", **options, max_train_steps=2)
    torch._dynamo.reset()  # as in a new process
    train_here(wuerstchen, parts, **options, resume_from_checkpoint="latest",
               gradient_checkpointing=True)  # fmt: skip
    assert_bitwise_equal(out / "checkpoint-4", parts / "checkpoint-4")


def test_adapters_are_compiled_too(wuerstchen, tmp_path):
    options = {"script": "lora.py", "max_train_steps": 2, "adam_epsilon": 1e-4, "use_dora": True,
               "lora_targets": "all-linear"}  # fmt: skip
    plain, out = (
        train_here(wuerstchen, tmp_path / name, **options, compile=name == "out")
        for name in ("plain", "out")
    )
    assert difference(load_file(out / lora_file.FILE), load_file(plain / lora_file.FILE)) < 1e-5


def test_too_many_shapes_are_an_error_not_a_fallback(monkeypatch):
    prior = tiny.make_prior()
    prior.compile_blocks()
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for width in (1, 2, 3):
            prior(*prior.example_inputs(1, (2, width))[:2], torch.zeros(1, 1, 32))
