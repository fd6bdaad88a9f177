"""The READMEs: links resolve, tables match what their commands print, code runs."""

import re
import shlex
import sys

import pytest
import torch

from minwurst import cost, objectives
from minwurst.base.settings import LoRASettings, Settings, parse
from minwurst.edge import export, models
from minwurst.miniature import measure
from minwurst.sample import SampleSettings
from tests.conftest import ROOT, command

pytestmark = pytest.mark.slow

FILES = ["README.md", "minwurst/README.md", "minwurst/miniature/README.md", "tests/README.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def anchors(text):
    """GitHub's anchors for the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_objectives_are_drawn_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minwurst.objectives", str(tmp_path / "drawn.svg")])
    objectives.main()
    texts = [(tmp_path / "drawn.svg").read_text(), (ROOT / "minwurst/objectives.svg").read_text()]
    number = r"-?\d+\.?\d*"
    assert re.sub(number, "", texts[0]) == re.sub(number, "", texts[1])
    drawn, shipped = ([float(found) for found in re.findall(number, text)] for text in texts)
    assert drawn == pytest.approx(shipped, abs=0.11)  # coordinates have one decimal


@pytest.mark.parametrize("name", FILES)
def test_its_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    assert links
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_memory_table_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minwurst.cost"])
    cost.main()
    assert capsys.readouterr().out in TEXTS["minwurst/README.md"]


def test_the_table_of_sizes_is_what_its_command_prints(capsys):
    measure.sizes()
    assert capsys.readouterr().out in TEXTS["minwurst/miniature/README.md"]


def commands(text):
    """All commands in bash blocks and code spans, as lists of words."""
    text = text.replace("\\\n", " ").replace("$DATASET_NAME", "owner/name")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "trap" not in line]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines + spans:
        yield from (shlex.split(part) for part in re.split("&&| &$", line) if "'" not in part)


@pytest.mark.parametrize("name", FILES)
def test_its_commands_parse(name):
    """Every flag used with the scripts and minwurst.sample is valid."""
    kinds = {"train.py": Settings, "lora.py": LoRASettings, "minwurst.sample": SampleSettings}
    count = 0
    for words in commands(TEXTS[name]):
        program = next((word for word in words if word in kinds), None)
        flags = words[words.index(program) + 1 :] if program else []
        if flags and flags not in (["--help"], ["…"]) and flags[0].startswith("--"):
            count += 1
            data = [] if program == "minwurst.sample" else ["--train_data_dir=x"]
            parse(kinds[program], [*data, *flags], demo={})
    least = {"README.md": 8, "minwurst/README.md": 5, "tests/README.md": 2}.get(name, 0)
    assert count >= least, count


def test_its_example_of_use_runs(wuerstchen, tmp_path):
    """The Python block, unmodified, on a small exported folder with an fp16 text encoder."""
    folder = tmp_path / "prior_pipeline"
    export.save_pipeline(models.load_prior(wuerstchen), folder, wuerstchen, {})
    text_encoder = models.load_text(wuerstchen, torch.float16)[1]
    text_encoder.save_pretrained(tmp_path / "prior_pipeline" / "text_encoder")
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    code = code.replace("runs/demo/prior_pipeline", str(tmp_path / "prior_pipeline"))
    _, printed = command(sys.executable, "-c", code)
    assert "torch.Size([1, 16, 3, 3])" in printed
