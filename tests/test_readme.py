"""The READMEs are true: links lead somewhere, tables are what their commands print, code runs."""

import re
import shlex
import sys

import pytest
import torch

from minwurst import cost
from minwurst.base.settings import LoRASettings, parse
from minwurst.edge import export, models
from minwurst.miniature import measure
from minwurst.sample import SampleSettings
from tests.conftest import ROOT, command

pytestmark = pytest.mark.slow

FILES = ["README.md", "minwurst/README.md", "minwurst/miniature/README.md", "tests/README.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


def anchors(text):
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_the_memory_table_is_what_its_command_prints(capsys):
    cost.main()
    assert capsys.readouterr().out in TEXTS["README.md"]


def test_the_table_of_sizes_is_what_its_command_prints(capsys):
    measure.sizes()
    assert capsys.readouterr().out in TEXTS["minwurst/miniature/README.md"]


@pytest.mark.parametrize("name", FILES)
def test_its_commands_parse(name):
    """Every flag of the scripts and of minwurst.sample, in blocks and in running text."""
    text = TEXTS[name].replace("\\\n", " ").replace("=$DATASET_NAME", "=owner/name")
    flag = r" +--[\w=\"./-]+(?: +(?:[\w/.]+|\"[^\"]+\")(?![\w`]))*"
    found = re.findall(rf"(?<!/)(train\.py|lora\.py|minwurst\.sample)((?:{flag})+)", text)
    assert len(found) >= {"README.md": 12}.get(name, 0)
    for program, words in found:
        if "--help" not in words:
            kind = SampleSettings if program == "minwurst.sample" else LoRASettings
            data = [] if kind is SampleSettings else ["--train_data_dir=x"]
            parse(kind, [*data, *shlex.split(words)], demo={})


def test_its_example_of_use_runs(wuerstchen, tmp_path):
    """The Python block as it stands, on a small exported folder, its text encoder in half."""
    folder = tmp_path / "prior_pipeline"
    export.save_pipeline(models.load_prior(wuerstchen), folder, wuerstchen)
    text_encoder = models.load_text(wuerstchen, torch.float16)[1]
    text_encoder.save_pretrained(tmp_path / "prior_pipeline" / "text_encoder")
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    code = code.replace("runs/demo/prior_pipeline", str(tmp_path / "prior_pipeline"))
    _, printed = command(sys.executable, "-c", code)
    assert "torch.Size([1, 16, 3, 3])" in printed
