"""Property-based tests: sample streams, manifests, LoRA files, command lines."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from minwurst.base.errors import UserError
from minwurst.base.settings import LoRASettings, parse
from minwurst.edge import lora_file
from minwurst.run import checkpoint
from minwurst.step import randomness
from minwurst.step.samples import BatchLayout

pytestmark = pytest.mark.slow

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
small = st.integers(1, 7)


@few
@given(st.integers(1, 40), small, small, small, st.integers(0, 2**63), st.integers(0, 30))
def test_each_sample_comes_once_an_epoch(rows, batch, accumulation, world, seed, offset):
    """From any step, any number of ranks covers the stream without gap or overlap, so each complete
    epoch contains each row once.
    """
    layout = BatchLayout(batch, accumulation, world)
    size = layout.global_batch
    count = -(-2 * rows // size) + 1
    taken = [
        position
        for step in range(offset + 1, offset + count + 1)
        for rank in range(world)
        for piece in layout.positions(step, rank)
        for position in piece
    ]
    start = offset * size
    assert sorted(taken) == list(range(start, start + count * size))
    epoch = -(-start // rows)
    places = range(epoch * rows, (epoch + 1) * rows)
    assert sorted(randomness.row_at(seed, place, rows) for place in places) == list(range(rows))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """(a checkpoint, a path for damaged copies of it)."""
    folder = tmp_path_factory.mktemp("sealed")
    groups = {"weights": {"a": torch.arange(9.0)}, "ema": {"a": torch.ones(3)}}
    checkpoint.save(folder, 1, groups, {"step": 1})
    return folder / "checkpoint-1", folder / "copy"


FILES = ["manifest.json", "state.json", "weights.safetensors", "ema.safetensors"]


@few
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_any_flipped_or_missing_byte_is_found(sealed, name, place, change, cut):
    """A change of the manifest must be detected only if it changes the parsed content."""
    good, copy = sealed
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    content = bytearray((copy / name).read_bytes())
    place %= len(content)
    content[place] ^= change
    (copy / name).write_bytes(content[:place] if cut else content)
    before = json.loads((good / name).read_text()) if name == "manifest.json" else None
    with contextlib.suppress(ValueError):
        if before and json.loads(bytes(content).decode()) == before and not cut:
            return
    assert checkpoint.damage(copy)


shapes = st.lists(st.integers(0, 5), max_size=3)
FACTORS = [
    f"{of}a.lora_{factor}{end}"
    for of in ("prior.", "base_model.model.", "")
    for factor, end in zip("ABAB", [".weight"] * 2 + [".default.weight"] * 2, strict=True)
]
MAGNITUDES = ["prior.a.lora_magnitude_vector", "base_model.model.a.lora_magnitude_vector"]
keys = st.sampled_from([*FACTORS, *MAGNITUDES, "a.lora.up.weight", "a.alpha", "", "x.y"])
kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool])
numbers = st.floats() | st.integers() | st.sampled_from([10**400, True, None, "1", [1]])
patterns = st.dictionaries(st.sampled_from(["a", "(", "*", "[", "b.a"]), numbers, max_size=2)
options = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": numbers, "prior.lora_alpha": numbers, "use_rslora": numbers,
        "alpha_pattern": patterns | numbers,
    },
)  # fmt: skip


def read_or_user_error(file):
    with contextlib.suppress(UserError):
        for a, b, *magnitude in lora_file.read(file).values():
            assert a.dtype == b.dtype == torch.float32 and len(a) == b.shape[1]
            assert all(m.dtype == a.dtype and m.shape == b.shape[:1] for m in magnitude)


@few
@given(
    st.dictionaries(keys, st.tuples(shapes, kinds), max_size=4),
    st.sampled_from(["", "prior.", "base_model.model."]), options | numbers, st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_a_lora_file_is_read_or_refused(tmp_path, tensors, good, stored, beside, dora):
    """Any tensors and settings give adapters that fit or a UserError, nothing else."""
    made = {key: torch.zeros(shape, dtype=kind) for key, (shape, kind) in tensors.items()}
    if good:  # a complete pair, so that the settings are used
        made = {f"{good}b.a.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
        if dora:
            made[f"{good}b.a.lora_magnitude_vector"] = torch.ones(2)
    metadata = None if beside else {"lora_adapter_metadata": json.dumps(stored)}
    (tmp_path / lora_file.FILE).write_bytes(save(made, metadata))
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    read_or_user_error(tmp_path / lora_file.FILE)


@few
@given(st.binary(max_size=200), st.integers(0, 300), st.booleans())
def test_bytes_are_no_lora_file(tmp_path, noise, place, whole):
    """Random bytes: alone, written over a valid file, or as the settings file."""
    good = {f"prior.a.lora_{factor}.weight": torch.zeros(2, 2) for factor in "AB"}
    content = save(good)
    (tmp_path / lora_file.FILE).write_bytes(
        noise if whole else content[:place] + noise + content[place + len(noise) :]
    )
    read_or_user_error(tmp_path / lora_file.FILE)
    peft = {f"base_model.model.{key.removeprefix('prior.')}": good[key] for key in good}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(peft))
    (tmp_path / "adapter_config.json").write_bytes(noise)
    read_or_user_error(tmp_path / "adapter_model.safetensors")


FLAGS = [f"--{name}" for name in vars(LoRASettings())]
values = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
    st.sampled_from(["", "nan", "inf", "-1", "1e999", "none", "\ud800", "--", "-h"]),
)  # fmt: skip


@few
@given(st.lists(st.tuples(st.sampled_from([*FLAGS, "--", "-x"]), values, st.booleans())))
def test_a_command_line_is_taken_or_refused(words):
    """Any flags with any values give settings that pass their check, an exit, or a UserError."""
    line = []
    for flag, value, joined in words:
        line += [f"{flag}={value}"] if joined else [flag, value]
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with contextlib.suppress(UserError, SystemExit), quiet[0], quiet[1]:
        parse(LoRASettings, ["--train_data_dir=x", *line]).check()
