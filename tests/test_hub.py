"""The README's commands against a loopback Hub: download, train, push, load again."""

import json
import re
import shlex
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minwurst.base.errors import UserError
from minwurst.edge import card, lora_file, push, run_file
from tests import tiny
from tests.conftest import command, flags, train_here
from tests.hub import LoopbackHub

pytestmark = pytest.mark.slow

DATASET = "lambdalabs/naruto-blip-captions"
ROOT = Path(__file__).parent.parent


def readmes_command(name):
    """The command under <!-- name --> in the README, without its launcher."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
    command = block.replace("\\\n", " ").split("--nproc_per_node=gpu ")[1]
    return command.replace("$DATASET_NAME", DATASET).strip()


# Diffusers' commands as given in the README, with fewer steps.
FULL = readmes_command("full") + " --max_train_steps=2"
LORA = readmes_command("lora") + " --num_train_epochs=1"


@pytest.fixture(scope="module")
def loopback(wuerstchen, tmp_path_factory):
    """A Hub with small models under the published names, and a data set of eight images."""
    pictures = tmp_path_factory.mktemp("pictures")
    for line in (tiny.IMAGES / "metadata.jsonl").read_text().splitlines()[:8]:
        with open(pictures / "metadata.jsonl", "a") as metadata:
            metadata.write(line + "\n")
        name = json.loads(line)["file_name"]
        (pictures / name).write_bytes((tiny.IMAGES / name).read_bytes())
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as opened:
        opened.add("warp-ai/wuerstchen-prior", wuerstchen)
        opened.add("warp-ai/wuerstchen", wuerstchen / "decoder")
        opened.add("warp-ai/EfficientNetEncoder", wuerstchen / "image_encoder")
        opened.add(DATASET, pictures, kind="datasets")
        yield opened


def run(words, folder, loopback, **more):
    """Run a script of the repository in `folder`; returns (exit code, output)."""
    script, *words = shlex.split(words) if isinstance(words, str) else words
    variables = {**loopback.variables, "WANDB_MODE": "offline", **more}
    code = f"import os, runpy; os.chdir({str(folder)!r}); runpy.run_path({str(ROOT / script)!r}, "
    code += "run_name='__main__')"
    return command(sys.executable, "-c", code, *words, check=False, **variables)


@pytest.fixture(scope="module")
def pushed(loopback, tmp_path_factory):
    """Complete runs of both commands: {script: (working folder, output)}."""
    done = {}
    for words in (FULL, LORA):
        folder = tmp_path_factory.mktemp("seed")
        code, printed = run(words, folder, loopback)
        assert code == 0, printed
        done[words.split()[0]] = (folder, printed)
    return done


NAMES = {"train.py": "wuerstchen-prior-naruto-model", "lora.py": "wuerstchen-prior-naruto-lora"}


@pytest.mark.parametrize("script", NAMES)
def test_one_commit_of_the_result_and_nothing_else(loopback, pushed, script):
    name = NAMES[script]
    (paths,) = (set(paths) for repo, _, paths in loopback.commits if repo == f"me/{name}")
    if script == "lora.py":
        assert paths == {"README.md", "before_after.png", lora_file.FILE}
    else:
        assert {"README.md", "before_after.png", "model_index.json"} < paths
        inside = {path.split("/")[0] for path in paths if "/" in path}
        assert inside == {"prior", "text_encoder", "tokenizer", "scheduler"}
    folder, printed = pushed[script]
    result = folder / name / ("prior_pipeline" if script == "train.py" else "")
    for path in paths - {"README.md", "before_after.png"}:
        assert (loopback.files(f"me/{name}") / path).read_bytes() == (result / path).read_bytes()
    assert f"pushed: {loopback.url}/me/{name}" in printed
    with Image.open(loopback.files(f"me/{name}") / "before_after.png") as both:
        assert both.height > both.width


@pytest.mark.parametrize("script", NAMES)
def test_the_token_is_nowhere(loopback, pushed, script):
    folder, printed = pushed[script]
    token = loopback.token.encode()
    assert loopback.token not in printed
    for place in (folder, loopback.files(f"me/{NAMES[script]}")):
        files = [file for file in place.rglob("*") if file.is_file()]
        assert files and not [file for file in files if token in file.read_bytes()]


@pytest.mark.parametrize("script", NAMES)
def test_the_card(loopback, pushed, script, tmp_path):
    """The metadata is valid, the settings are the run's, and the snippet generates an image."""
    file = loopback.files(f"me/{NAMES[script]}") / "README.md"
    text = file.read_text(encoding="utf-8")
    facts = huggingface_hub.ModelCard(text).data
    assert facts.base_model == "warp-ai/wuerstchen-prior" and facts.license == "mit"
    assert facts.datasets == [DATASET] and facts.pipeline_tag == "text-to-image"
    assert ("lora" in facts.tags) == (script == "lora.py")
    rate = "1e-05" if script == "train.py" else "0.0001"
    assert f"| learning_rate | {rate} |" in text and "| mixed_precision | fp16 |" in text
    assert str(Path(pushed[script][0])) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.startswith("# It loads part by part: ") and "not on the Hub" not in text
    code = f"import os; os.chdir({str(tmp_path)!r})\n{code}"
    variables = {**loopback.variables, "HF_HOME": str(tmp_path)}
    command(sys.executable, "-c", code, **variables)
    with Image.open(tmp_path / "picture.png") as drawn:
        assert drawn.size == (1024, 1024) and len(set(drawn.getdata())) > 1000


def test_what_was_pushed_gives_the_same_latents(loopback, pushed, tmp_path):
    """Loaded from the Hub in a new process, compared with the local files."""
    code = """
import sys, torch
from safetensors.torch import save_file
from minwurst import pipelines
def latents(prior, lora=None):
    return pipelines.load(prior, lora=lora).latents("a bear", seed=3, size=3)
full, adapter = sys.argv[1:3]
base = "warp-ai/wuerstchen-prior"
there = "me/wuerstchen-prior-naruto-lora"
save_file({
    "pushed": latents("me/wuerstchen-prior-naruto-model"), "local": latents(full),
    "pushed lora": latents(base, there), "local lora": latents(base, adapter),
    "base": latents(base),
}, sys.argv[3])
"""
    full = pushed["train.py"][0] / NAMES["train.py"] / "prior_pipeline"
    adapter = pushed["lora.py"][0] / NAMES["lora.py"]
    file = tmp_path / "latents.safetensors"
    command(sys.executable, "-c", code, full, adapter, file, **loopback.variables)
    found = load_file(file)
    assert torch.equal(found["pushed"], found["local"])
    assert torch.equal(found["pushed lora"], found["local lora"])
    for name in ("pushed", "pushed lora"):
        assert not torch.equal(found[name], found["base"])


@pytest.fixture(scope="module")
def finished(wuerstchen, tmp_path_factory):
    """The output folder of a run without --push_to_hub."""
    return train_here(wuerstchen, tmp_path_factory.mktemp("finished") / "a run", "lora.py")


def again(loopback, folder, repository, *words, **more):
    """Run `python -m minwurst.hub` without waiting between retries."""
    code = "from minwurst import hub as program; from minwurst.edge import push; "
    code += "push.WAITS = (0, 0, 0); program.main()"
    variables = {**loopback.variables, **more}
    words = [folder, repository, *words]
    return command(sys.executable, "-c", code, *words, check=False, **variables)


def test_a_busy_hub_is_asked_again(loopback, finished):
    for status in (429, 503, 0):
        loopback.answer(status, path="/commit/")
    code, printed = again(loopback, finished, "retried")
    assert code == 0, printed
    assert printed.count("Trying again in 0 s") == 3
    assert (loopback.files("me/retried") / lora_file.FILE).is_file()


def test_a_push_that_fails_can_be_made_again(loopback, finished):
    loopback.answer(500, times=4, path="/commit/")
    code, printed = again(loopback, finished, "me/later", "--private")
    assert code == 1 and "Traceback" not in printed
    said = printed.splitlines()[-1]
    assert "Not pushed to me/later" in said and f"The result is safe in {finished}." in said
    assert not (loopback.files("me/later") / lora_file.FILE).exists()
    assert "me/later" in loopback.private
    words = shlex.split(said.split("python -m minwurst.hub ")[1])
    code, printed = again(loopback, *words)
    assert code == 0 and "pushed: " in printed
    assert (loopback.files("me/later") / lora_file.FILE).is_file()


def test_a_login_that_is_gone_at_the_end(finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(
        UserError, match="No login to the Hub found.* The result is safe in .*minwurst.hub"
    ):
        push.push(finished, "me/late")


def test_no_result_no_push(finished, tmp_path):
    with pytest.raises(UserError, match="is not the --output_dir of a run: can't read its"):
        push.push(tmp_path, "me/empty", "hf_any")
    (tmp_path / "run.json").write_bytes((finished / "run.json").read_bytes())
    with pytest.raises(UserError, match="contains no result"):
        push.push(tmp_path, "me/empty", "hf_any")


def test_a_card_names_no_folder_of_ours(finished, monkeypatch, tmp_path):
    """A local folder never appears as a repository, wherever the card is written."""
    monkeypatch.chdir(tmp_path)
    run = run_file.read(finished)
    run["settings"] |= {"dataset_name": "secret/client", "validation_prompts": ["a | 'b'\n{c} `"]}
    assert run["published"] == {
        "base": None, "decoder": None, "data": None, "prior_alone": False,
    }  # fmt: skip
    text = card.card(run, "me/x", push.results(finished, run))
    assert "secret" not in text and str(finished.parent) not in text
    assert "Replace THE/BASE" in text and "lora_targets" not in text
    assert "It started from a base that is not on the Hub. Its decoder is not on the Hub." in text
    assert "# Replace THE/DECODER by the decoder's repository or folder.\ndecoder = " in text
    assert "warp-ai/wuerstchen\"" not in text and f"out of {len(tiny.rows())}, on 1 × cpu" in text
    assert "held-out" not in text.split("## Training")[1]
    run["result"] = {"validation_loss": 0.51236, "lowest_validation_loss": 0.41}
    measured = card.card(run, "me/x", push.results(finished, run))
    assert "Loss on held-out images: 0.5124 (lowest: 0.4100); predicting zero" in measured
    older = card.card({**run, "images": None}, "me/x", push.results(finished, run))
    assert "out of" not in older
    run["settings"].pop("use_dora")  # as in an older run's file
    assert "A LoRA of rank 4 for" in card.card(run, "me/x", push.results(finished, run))
    run["settings"]["use_dora"] = True
    dora = card.card(run, "me/x", push.results(finished, run))
    assert "A DoRA of rank 4 for" in dora and "| use_dora | True |" in dora
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "snippet", "exec")
    settings = {
        "pretrained_prior_model_name_or_path": "/data",
        "pretrained_decoder_model_name_or_path": "owner/name", "dataset_name": "here/it_is",
    }  # fmt: skip
    (tmp_path / "here/it_is").mkdir(parents=True)
    told = run_file.publishable_names(settings, finished)
    assert (told["base"], told["decoder"], told["data"]) == (None, "owner/name", None)


@pytest.fixture
def asked_here(loopback, monkeypatch):
    """Point this process at the loopback Hub, without waiting between retries."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", loopback.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push, "WAITS", (0,))
    monkeypatch.setenv("HF_TOKEN", loopback.token)
    return loopback


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("someone/else", "TOKEN", "Can't push to someone/else: The repository is somebody else's,"),
        ("me/x", "hf_wrong", "Can't push to me/x: The Hub rejects this token. Run `hf auth"),
        ("me/x", "", "No login to the Hub found. Run `hf auth login`"),
        ("me/x", "hf_tökén", "The Hub token contains characters that no token has"),
        ("me/x y", "TOKEN", "me/x y is not a valid repository name"),
    ],
)
def test_repositories_that_can_not_be_pushed_to(asked_here, monkeypatch, capsys, name, token, said):
    monkeypatch.setenv("HF_TOKEN", "")
    token = token.replace("TOKEN", asked_here.token)
    with pytest.raises(UserError, match=re.escape(said)):
        push.make_repository(name, token=token)
    assert "Trying again" not in capsys.readouterr().out


def test_a_token_may_end_in_a_blank(asked_here):
    assert push.make_repository("blank", token=f" {asked_here.token}\r\n") == "me/blank"


def test_an_existing_repository_one_may_not_write_to(asked_here):
    """Creating it returns "exists"; only the write-access check detects the problem."""
    push.make_repository("me/there")
    asked_here.answer(403, path="/auth-check/write")
    with pytest.raises(UserError, match="Can't push to me/there: .* is somebody else's, or"):
        push.make_repository("me/there")


def test_private_is_not_made_public_in_silence(asked_here):
    push.make_repository("me/open")
    with pytest.raises(UserError, match="me/open already exists and is public"):
        push.make_repository("me/open", private=True)
    assert push.make_repository("me/shut", private=True) == "me/shut"
    assert push.make_repository("me/shut", private=True) == "me/shut"


def test_without_the_hub_no_push_is_begun(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with pytest.raises(UserError, match="Can't push to me/x: OfflineModeIsEnabled"):
        push.make_repository("me/x")


def test_a_dropped_connection_is_told_without_the_request(asked_here):
    asked_here.answer(0, times=2, path="/api/repos/create")
    with pytest.raises(UserError, match=r"Can't push to me/x: \w+ while talking to the Hub\.$"):
        push.make_repository("me/x")


def test_a_wrong_token_is_said_first(loopback, tmp_path):
    """Reported before data or models are loaded; neither exists here."""
    words = flags("nowhere", tmp_path / "out", train_data_dir="nowhere", push_to_hub=True)
    code, printed = run(["train.py", *words], tmp_path, loopback, HF_TOKEN="hf_wrong")
    assert code == 2 and "Traceback" not in printed
    assert "The Hub rejects this token. Run `hf auth login`" in printed


def test_two_ranks_push_once(loopback, wuerstchen, tmp_path):
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    words = flags(wuerstchen, tmp_path / "both", push_to_hub=True, train_batch_size=2)
    words += ["--max_train_steps=1", f"--hub_token={loopback.token}", "--hub_private"]
    variables = {**loopback.variables, "HF_TOKEN": ""}
    _, printed = command(sys.executable, *agent, *words, **variables)
    assert [repo for repo, _, _ in loopback.commits].count("me/both") == 1
    assert "me/both" in loopback.private and loopback.token not in printed
    files = [file for file in (tmp_path / "both").rglob("*") if file.is_file()]
    assert not [file for file in files if loopback.token.encode() in file.read_bytes()]
