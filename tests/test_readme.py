"""The README's map is true: every file with its lines, every table as its command prints it."""

import re
import shlex
import sys

import torch

from minwurst.base.settings import LoRASettings, parse
from minwurst.edge import export
from minwurst.run import estimate
from minwurst.sample import SampleSettings
from tests.conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines(name):
    return (ROOT / name).read_text(encoding="utf-8").count("\n")


def test_every_file_stands_in_the_table_with_its_lines():
    listed = dict(re.findall(r"^\| \[([\w/.]+)\].*\| (\d+) \|$", README, re.MULTILINE))
    package = [str(path.relative_to(ROOT)) for path in (ROOT / "minwurst").rglob("*.py")]
    files = ["train.py", "lora.py", *(name for name in package if "__init__" not in name)]
    assert {name: int(count) for name, count in listed.items()} == {f: lines(f) for f in files}


def test_the_loop_is_as_long_as_it_says():
    text = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    rules = [number for number, line in enumerate(text) if line.startswith("    # =====")]
    assert f"({rules[1] - rules[0] - 1} lines between two" in README
    assert rules[1] - rules[0] < 60


def test_the_memory_table_is_what_its_command_prints(capsys):
    estimate.main()
    printed = capsys.readouterr().out
    assert printed in README


def test_its_commands_parse():
    text = README.replace("\\\n", " ").replace("=$DATASET_NAME", "=owner/name")
    flag = r" +--[\w=\"./-]+(?: +(?:[\w/.]+|\"[^\"]+\")(?![\w`]))*"
    found = re.findall(rf"(?<!/)(train\.py|lora\.py|minwurst\.sample)((?:{flag})+)", text)
    assert len(found) >= 12
    for program, words in found:
        if "--help" not in words:
            kind = SampleSettings if program == "minwurst.sample" else LoRASettings
            data = [] if kind is SampleSettings else ["--train_data_dir=x"]
            parse(kind, [*data, *shlex.split(words)])


def test_its_example_of_use_runs(wuerstchen, tmp_path):
    """The Python block as it stands, on a small exported folder, its text encoder in half."""
    from minwurst import models

    export.save_pipeline(tmp_path / "prior_pipeline", models.load_prior(wuerstchen), wuerstchen)
    text_encoder = models.load_text(wuerstchen, torch.float16)[1]
    text_encoder.save_pretrained(tmp_path / "prior_pipeline" / "text_encoder")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("runs/demo/prior_pipeline", str(tmp_path / "prior_pipeline"))
    _, printed = command(sys.executable, "-c", code)
    assert "torch.Size([1, 16, 3, 3])" in printed


def test_what_survives_what_names_tests_that_are_there():
    (table,) = re.findall(r"## What survives what\n(.*?)\n## ", README, re.DOTALL)
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 20
    for line in lines:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
