"""LoRA and DoRA: start as identity, merging is exact, files work in diffusers and PEFT."""

import json
import re
import shutil
import sys

import diffusers
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minwurst import lora as program
from minwurst import sample
from minwurst.base.errors import UserError
from minwurst.base.settings import LoRASettings, parse
from minwurst.edge import export, lora_file, models
from minwurst.step import adapter
from tests import reference, tiny
from tests.conftest import ROOT, command, relative, train_here

INPUTS = torch.randn(2, 16, 3, 3), torch.tensor([0.3, 0.8]), torch.randn(2, 77, 32)


def make_prior(dtype=torch.float32):
    torch.manual_seed(0)
    prior = tiny.make_prior(dropout=0.0).eval()
    return prior if dtype == torch.float32 else prior.to(dtype)


def make_adapted(rank=4, alpha=8.0, targets=("attention",), dora=False):
    """A prior with non-zero adapters."""
    prior = make_prior()
    adapter.add_adapters(prior, rank, alpha, targets, dora=dora)
    randomize(prior)
    return prior


@torch.no_grad()
def randomize(prior):
    """Make B random, and the magnitudes too, in adapters of ours or PEFT's."""
    for name, weight in prior.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.2)
        if "lora_magnitude_vector" in name:
            weight.mul_(1 + 0.3 * torch.randn_like(weight))


@torch.no_grad()
def predict(prior, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return prior(*INPUTS)


@pytest.mark.parametrize("targets", [("attention",), ("all-linear",)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(targets, half, dora):
    prior = make_prior(torch.bfloat16 if half else torch.float32)
    before = predict(prior, half)
    trainable = adapter.add_adapters(prior, 4, 4, targets, dora=dora)
    assert torch.equal(predict(prior, half), before)
    assert any("magnitude" in name for name in trainable) == dora
    assert {w.dtype for w in trainable.values()} == {torch.float32}
    assert {n for n, w in prior.named_parameters() if w.requires_grad} == trainable.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_without_autocast(tmp_path, dtype, dora):
    """As in sampling: a prior in half precision, adapters in fp32."""
    lora_file.save(make_adapted(dora=dora), tmp_path / lora_file.FILE)
    expected = predict(lora_file.load(make_prior(), tmp_path))
    prior = lora_file.load(make_prior(dtype), tmp_path)
    with torch.no_grad():
        x, t, text = INPUTS
        found = prior(x.to(dtype), t, text.to(dtype))
    assert found.dtype == dtype and relative(found, expected) < 0.05


@pytest.mark.parametrize("dora", [False, True])
def test_scale(dora):
    prior, base = make_adapted(dora=dora), predict(make_prior())
    trained = predict(prior)
    assert relative(trained, base) > 0.001
    adapter.set_scale(prior, 0)
    assert torch.equal(predict(prior), base)
    adapter.set_scale(prior, 0.5)
    halfway = predict(prior)
    assert not torch.equal(halfway, base) and not torch.equal(halfway, trained)
    adapter.set_scale(prior, 1)
    assert torch.equal(predict(prior), trained)


@pytest.mark.parametrize("targets", [("attention",), ("all-linear",)])
@pytest.mark.parametrize("scale", [1.0, -0.5, 2.0])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_wrapped(targets, scale, dora):
    prior = make_adapted(targets=targets, dora=dora)
    adapter.set_scale(prior, scale)
    wrapped = predict(prior)
    merged = adapter.merge(prior)
    assert not adapter.adapters(merged)
    assert merged.state_dict().keys() == make_prior().state_dict().keys()
    assert relative(predict(merged), wrapped) < 1e-6


# ---- DoRA's layer.


def make_dora(dtype=torch.float32):
    torch.manual_seed(0)
    layer = adapter.DoRALinear(torch.nn.Linear(64, 48).to(dtype), 4, 8.0)
    randomize(layer)
    return layer


@torch.no_grad()
def test_the_rows_of_a_dora_have_its_magnitudes():
    layer = make_dora()
    w, magnitude = layer.base.weight.clone(), layer.lora_magnitude_vector
    v = w + 2 * layer.lora_B @ layer.lora_A
    found = layer.merged().weight
    assert relative(found.norm(dim=1), magnitude) < 1e-6
    assert relative(found, magnitude[:, None] * torch.nn.functional.normalize(v)) < 1e-6
    half = make_dora()
    half.scale = 0.5
    assert relative(half.merged().weight, (w + found) / 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", ["half", "fp32"])
def test_a_doras_norm_is_fp32_in_half_precision(dtype, frozen):
    layer, x = make_dora(dtype if frozen == "half" else torch.float32), torch.randn(32, 64)
    with torch.autocast("cpu", dtype):
        found, gain = layer(x), layer.gain()
    assert found.dtype == dtype and torch.equal(gain, layer.gain())
    assert relative(found, layer.float()(x)) < 0.01
    found.float().square().sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32


def test_a_row_of_zeros_stays_finite():
    layer = make_dora()
    with torch.no_grad():
        for weight in (layer.base.weight, layer.lora_B, layer.lora_magnitude_vector):
            weight[5] = 0
    out = layer(torch.randn(3, 64))
    out.sum().backward()
    assert torch.equal(out[:, 5], layer.base.bias[5].expand(3))
    assert all(weight.grad.isfinite().all() for weight in (layer.lora_A, layer.lora_B))


def test_presets_and_names():
    prior = make_prior()
    attention = adapter.find_targets(prior, ["attention"])
    assert len(attention) == 8 and "blocks.2.attention.to_out.0" in attention
    every = adapter.find_targets(prior, ["all-linear"])
    linear = [n for n, m in prior.named_modules() if isinstance(m, torch.nn.Linear)]
    assert every == linear and len(every) == 18
    assert adapter.find_targets(prior, ["channelwise.0", "kv_mapper.1", "to_q"]) == [
        "blocks.0.channelwise.0", "blocks.2.attention.to_q", "blocks.2.kv_mapper.1",
        "blocks.3.channelwise.0", "blocks.5.attention.to_q", "blocks.5.kv_mapper.1",
    ]  # fmt: skip


# ---- Equivalence with diffusers and PEFT.


def reference_prior():
    prior = reference.WuerstchenPrior.from_config(make_prior().config)
    prior.load_state_dict(make_prior().state_dict())
    return prior.eval()


def reference_pipeline(wuerstchen):
    tokenizer, text_encoder = models.load_text(wuerstchen, torch.float32)
    return diffusers.WuerstchenPriorPipeline(
        tokenizer, text_encoder, reference_prior(), diffusers.DDPMWuerstchenScheduler()
    )


@pytest.mark.parametrize("targets", [("attention",), ("all-linear",)])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 16.0), (8, 3.0)])
def test_our_file_in_diffusers(wuerstchen, tmp_path, targets, rank, alpha):
    prior = make_adapted(rank, alpha, targets)
    lora_file.save(prior, tmp_path / lora_file.FILE)
    pipeline = reference_pipeline(wuerstchen)
    before = predict(pipeline.prior)
    pipeline.load_lora_weights(tmp_path, weight_name=lora_file.FILE)
    assert relative(predict(prior), before) > 0.001
    assert relative(predict(pipeline.prior), predict(prior)) < 1e-5
    again = lora_file.load(make_prior(), tmp_path)
    assert relative(predict(again), predict(prior)) < 1e-6


@pytest.mark.parametrize("targets", [("attention",), ("all-linear",)])
def test_a_dora_in_diffusers_and_peft_and_back(wuerstchen, tmp_path, targets):
    prior = make_adapted(targets=targets, dora=True)
    file = lora_file.save(prior, tmp_path / lora_file.FILE)
    pipeline = reference_pipeline(wuerstchen)
    pipeline.load_lora_weights(tmp_path, weight_name=lora_file.FILE)
    assert relative(predict(pipeline.prior), predict(prior)) < 1e-6
    pipeline.prior.save_lora_adapter(tmp_path / "back", pipeline.get_active_adapters()[0])
    again = lora_file.load(make_prior(), tmp_path / "back")
    assert torch.equal(predict(again), predict(prior))
    # PEFT alone. A and B are random there, so that the magnitudes have to come from the file.
    names = [name.removesuffix(".base") for name in adapter.adapters(prior)]
    settings = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=names, use_dora=True, init_lora_weights=False
    )
    theirs = peft.inject_adapter_in_model(settings, reference_prior())
    tensors = {key.removeprefix("prior."): tensor for key, tensor in load_file(file).items()}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    assert relative(predict(theirs), predict(prior)) < 1e-6
    assert get_peft_model_state_dict(theirs).keys() == tensors.keys()


def peft_prior(alpha, targets, dora=False):
    """diffusers' prior with non-zero PEFT adapters."""
    prior = reference_prior()
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, use_dora=dora)
    prior.add_adapter(settings)
    randomize(prior)
    return prior.eval()


ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_the_reference_script(tmp_path, dora):
    """Written with the calls at the end of the reference script."""
    prior = peft_prior(alpha=4, targets=ATTENTION, dora=dora)
    diffusers.WuerstchenPriorPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(prior)
    )
    assert relative(predict(lora_file.load(make_prior(), tmp_path)), predict(prior)) < 1e-5


def test_a_file_with_metadata_of_diffusers(tmp_path):
    """Newer versions of save_lora_adapter store alpha in the file's metadata."""
    prior = peft_prior(alpha=12, targets=ATTENTION)
    prior.save_lora_adapter(tmp_path)
    found = lora_file.load(make_prior(), tmp_path)
    assert relative(predict(found), predict(prior)) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_of_peft(tmp_path, rslora, dora):
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=ATTENTION,
        init_lora_weights=False,
        use_rslora=rslora,
        use_dora=dora,
        alpha_pattern={r"blocks\.\d+\.attention\.to_q": 16, "o_k": 99},
    )
    wrapped = peft.get_peft_model(reference_prior(), settings)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    found = lora_file.load(make_prior(), tmp_path)
    with torch.no_grad():
        assert relative(predict(found), wrapped(*INPUTS)) < 1e-5


@pytest.mark.parametrize("targets", [("attention", ATTENTION), ("all-linear", None)], ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_steps_equal_pefts(targets, dora, dropout):
    """Adapter weights after 5 AdamW steps from the same initial weights, on the same data."""
    preset, names = targets
    ours = make_prior()
    trainable = adapter.add_adapters(ours, 4, 8.0, [preset], dropout, dora)
    names = names or [name.removesuffix(".base") for name in adapter.adapters(ours)]
    theirs = reference_prior()
    settings = {"target_modules": names, "lora_dropout": dropout, "use_dora": dora}
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, **settings))
    pairs = {}
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            mine = trainable[name.replace(".default.weight", "")]
            weight.data.copy_(mine.data)
            pairs[name] = (mine, weight)
    assert len(pairs) == len(trainable)
    optimizers = [
        torch.optim.AdamW([pair[i] for pair in pairs.values()], lr=1e-3, eps=1e-6) for i in (0, 1)
    ]
    for step in range(5):
        for model, optimizer in zip((ours.train(), theirs.train()), optimizers, strict=True):
            torch.manual_seed(step)
            noise = torch.randn(2, 16, 3, 3)
            loss = (model(*INPUTS) - noise).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, (mine, weight) in pairs.items():
        assert relative(mine, weight) < 1e-5, name


# ---- Files and mistakes.


def test_start_from_a_file(tmp_path):
    prior = make_adapted(4, 8.0)
    lora_file.save(prior, tmp_path / lora_file.FILE)
    fresh = make_prior()
    adapter.add_adapters(
        fresh, 4, 2.0, ["attention"]
    )  # a different alpha; the function stays the same
    lora_file.start_from(fresh, tmp_path / lora_file.FILE)
    assert relative(predict(fresh), predict(prior)) < 1e-6
    other = make_prior()
    adapter.add_adapters(other, 2, 2.0, ["attention"])
    with pytest.raises(UserError, match="has rank 4; --rank is 2"):
        lora_file.start_from(other, tmp_path / lora_file.FILE)
    other = make_prior()
    adapter.add_adapters(other, 4, 4.0, ["to_q"])
    with pytest.raises(UserError, match="is in the file or in --lora_targets, but not in both"):
        lora_file.start_from(other, tmp_path / lora_file.FILE)


def test_start_from_a_dora(tmp_path):
    prior = make_adapted(4, 8.0, dora=True)
    file = lora_file.save(prior, tmp_path / lora_file.FILE)
    plain = lora_file.save(make_adapted(), tmp_path / "plain.safetensors")
    fresh = make_prior()
    adapter.add_adapters(fresh, 4, 2.0, ["attention"], dora=True)
    lora_file.start_from(fresh, file)
    assert relative(predict(fresh), predict(prior)) < 1e-6
    with pytest.raises(UserError, match="plain.* is a LoRA, without magnitudes: drop --use_dora"):
        lora_file.start_from(fresh, plain)
    with pytest.raises(UserError, match="is a DoRA: add --use_dora"):
        lora_file.start_from(make_adapted(), file)


def test_mistakes_in_targets_and_rank():
    for rank in (0, 65):
        with pytest.raises(
            UserError, match=f"--rank is {rank}; blocks.2.attention.to_q allows 1 to 64"
        ):
            adapter.add_adapters(make_prior(), rank, 4, ["attention"])
    with pytest.raises(UserError, match="--lora_targets to_qq: matches no layer. Similar: .*to_q"):
        adapter.add_adapters(make_prior(), 4, 4, ["to_qq"])
    with pytest.raises(UserError, match="--lora_targets add_k_proj: matches no layer"):
        adapter.add_adapters(make_prior(), 4, 4, ["to_k", "add_k_proj"])
    with pytest.raises(UserError, match="to_out: not a linear layer. It contains to_out.0"):
        adapter.add_adapters(make_prior(), 4, 4, ["to_out"])
    with pytest.raises(UserError, match="--lora_targets depthwise: not a linear layer"):
        adapter.add_adapters(make_prior(), 4, 4, ["depthwise"])


def broken(tmp_path, change, dora=False):
    """Write a valid file after applying `change` to its tensors."""
    file = tmp_path / lora_file.FILE
    lora_file.save(make_adapted(dora=dora), file)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


KEY = "prior.blocks.2.attention.to_q.lora_A.weight"


def rename(tensors, old, new):
    tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors)})


MISTAKES = {
    "kohya": (
        lambda t: t.update({"lora_unet_2.alpha": torch.ones(1)}),
        "unknown key lora_unet_2.alpha",
    ),
    "alpha": (
        lambda t: t.update({KEY.replace("lora_A.weight", "alpha"): torch.ones(1)}),
        "to_q.alpha",
    ),
    "half a pair": (lambda t: t.pop(KEY), "blocks.2.attention.to_q is not a pair of factors"),
    "another width": (lambda t: t.update({KEY: torch.ones(4, 7)}), "to_q is 7 → 64 wide"),
    "another depth": (
        lambda t: rename(t, "blocks.2.", "blocks.77."),
        "is for another model: the prior has no layer blocks.77.attention",
    ),
    "empty": (lambda t: t.clear(), "contains no adapters"),
    "flat": (
        lambda t: t.update({KEY: torch.ones(4)}),
        "blocks.2.attention.to_q is not a pair",
    ),
    "rank 0": (lambda t: t.update({KEY: torch.ones(0, 64)}), "to_q is not a pair of factors"),
    "twice": (
        lambda t: t.update({KEY.removeprefix("prior."): torch.ones(4, 64)}),
        "occurs twice",
    ),
    "convolution": (
        lambda t: rename(t, "blocks.2.attention.to_q", "projection"),
        "projection is not a linear layer",
    ),
    "PEFT alone": (
        lambda t: rename(t, "prior.", "base_model.model."),
        "config.json with its alpha is missing",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_in_files(tmp_path, kind):
    change, said = MISTAKES[kind]
    with pytest.raises(UserError, match=said):
        lora_file.load(make_prior(), broken(tmp_path, change))


MAGNITUDE = "prior.blocks.2.attention.to_q.lora_magnitude_vector"
DORA_MISTAKES = {
    "some": (lambda t: t.pop(MAGNITUDE), "is a DoRA, but blocks.2.attention.to_q has no lora_mag"),
    "length": (lambda t: t.update({MAGNITUDE: torch.ones(7)}), r"to_q have shape \[7\] .* \[64\]"),
    "matrix": (lambda t: t.update({MAGNITUDE: torch.ones(64, 1)}), r"have shape \[64, 1\]"),
    "alone": (lambda t: t.pop(KEY), "to_q is not a pair of factors"),
    "nan": (lambda t: t[MAGNITUDE].fill_(torch.nan), "to_q.lora_magnitude_vector is not finite"),
    "integers": (lambda t: t.update({MAGNITUDE: torch.ones(64).int()}), "has type torch.int32"),
    "kohya": (
        lambda t: rename(t, "lora_magnitude_vector", "dora_scale"),
        "unknown key prior.blocks.2.attention.to_k.dora_scale",
    ),
    "twice": (lambda t: t.update({MAGNITUDE + ".weight": torch.ones(64)}), "occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DORA_MISTAKES)
def test_mistakes_in_dora_files(tmp_path, kind):
    change, said = DORA_MISTAKES[kind]
    with pytest.raises(UserError, match=said):
        lora_file.load(make_prior(), broken(tmp_path, change, dora=True))


@pytest.mark.parametrize("ending", [".weight", ".default.weight"])
def test_other_names_of_magnitudes(tmp_path, ending):
    """As in PEFT's own state dict, and as diffusers converts other formats."""
    file = broken(tmp_path, lambda t: rename(t, "_vector", "_vector" + ending), dora=True)
    assert {len(factors) for factors in lora_file.read(file).values()} == {3}


@pytest.mark.parametrize("stored", ["{", "[1]", '{"prior.lora_alpha": null}'])
def test_broken_settings_in_files(tmp_path, stored):
    file = tmp_path / lora_file.FILE
    tensors = lora_file.state_dict(make_adapted())
    save_file(tensors, file, metadata={"lora_adapter_metadata": stored})
    with pytest.raises(UserError, match="its settings can't be read"):
        lora_file.read(file)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        lora_file.read(tmp_path)
    file = broken(tmp_path, lambda tensors: None)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="can't be read"):
        lora_file.read(file)


@pytest.mark.parametrize("dora", [False, True])
def test_the_program(wuerstchen, tmp_path, monkeypatch, capsys, dora):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["minwurst.lora", *map(str, words)])
        program.main()
        return capsys.readouterr().out

    prior = models.load_prior(wuerstchen)
    adapter.add_adapters(prior, 4, 8.0, ["attention"], dora=dora)
    randomize(prior)
    lora_file.save(prior, tmp_path / lora_file.FILE)
    printed = run("show", tmp_path)
    what = "DoRA, 8 layers, 4,608 parameters" if dora else "LoRA, 8 layers, 4,096 parameters"
    assert what in printed and "attention.to_q: 2 × rank 4" in printed
    run("merge", tmp_path, wuerstchen, tmp_path / "merged", "--scale", "0.5")
    adapter.set_scale(prior.eval(), 0.5)
    assert relative(predict(models.load_prior(tmp_path / "merged")), predict(prior)) < 1e-5
    with pytest.raises(SystemExit, match="minwurst.lora: prior ./nowhere: no such folder"):
        run("merge", tmp_path, "./nowhere", tmp_path / "other")
    with pytest.raises(SystemExit, match=f"minwurst.lora: prior {tmp_path}: .* not a complete"):
        run("merge", tmp_path, tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit, match="minwurst.lora: .* already exists: choose a new folder"):
        run("merge", tmp_path, wuerstchen, wuerstchen)
    with pytest.raises(SystemExit, match="minwurst.lora: LoRA .*nothing: no such file"):
        run("show", tmp_path / "nothing")


@pytest.mark.slow
def test_a_merged_folder_works_by_itself(wuerstchen, tmp_path, monkeypatch, capsys):
    """With minwurst.sample, with train.py, and with diffusers' parts as in the README."""
    base = shutil.copytree(wuerstchen, tmp_path / "base")
    export.write_index(base, resolution=96, guidance_scale=1.5)
    file, merged = tmp_path / lora_file.FILE, tmp_path / "merged"
    prior = lora_file.load(models.load_prior(base), lora_file.save(make_adapted(), file))
    program.merge(file, base, merged, 0.7)
    shutil.rmtree(base)
    monkeypatch.chdir(tmp_path)
    sample.main(parse(sample.SampleSettings, ["--prompt=a bear", "--prior=merged"]))
    with Image.open("samples/a_bear.png") as image:
        assert image.size == (128, 128)
    nothing = dict.fromkeys(["image_encoder_name_or_path", "resolution"])
    run = train_here(merged, tmp_path / "run", max_train_steps=1, **nothing)
    known = json.loads((run / "run.json").read_text())["settings"]
    assert (known["resolution"], known["guidance_scale"]) == (96, 1.5)
    assert known["image_encoder_name_or_path"] == str(merged / "image_encoder")

    # A LoRA merged into a run's result, which is not what it was trained on.
    trained = train_here(merged, tmp_path / "trained", "lora.py", max_train_steps=1, **nothing)
    capsys.readouterr()
    program.merge(trained, merged, tmp_path / "same", 1.0)
    assert "note" not in capsys.readouterr().out
    program.merge(trained, run, tmp_path / "other", 1.0)
    assert f"note: the LoRA was trained on another prior, {merged}" in capsys.readouterr().out
    assert (tmp_path / "other" / "decoder" / "vqgan").is_dir()

    adapter.set_scale(prior, 0.7)
    pipeline = reference.prior_pipeline(merged)
    with torch.no_grad():
        assert relative(pipeline.prior(*INPUTS), predict(prior)) < 1e-5
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("runs/demo/prior_pipeline", str(merged))
    assert "torch.Size([1, 16, 3, 3])" in command(sys.executable, "-c", code)[1]


def test_a_prior_alone_is_merged_with_the_text_encoder_of_training(
    wuerstchen, tmp_path, monkeypatch
):
    alone = shutil.copytree(wuerstchen / "prior", tmp_path / "alone")
    monkeypatch.setattr(models, "COMPLETE", str(wuerstchen))  # it is a repository otherwise
    file = lora_file.save(make_adapted(), tmp_path / lora_file.FILE)
    program.merge(file, alone, tmp_path / "merged", 1.0)
    for part in ("text_encoder", "tokenizer"):
        copied = models.fingerprint(tmp_path / "merged" / part)
        assert copied == models.fingerprint(wuerstchen / part)
    models.check_parts(tmp_path / "merged", tmp_path / "merged")
    assert not (tmp_path / "merged/decoder").exists()  # the alone prior has none


# ---- Consistency with train.py.


def loop(script):
    rule = "    # ====="
    text = (ROOT / script).read_text(encoding="utf-8")
    assert text.count(rule) == 2
    return text[text.index(rule) : text.rindex(rule)]


def test_the_loops_are_byte_identical():
    assert loop("train.py") == loop("lora.py")


def test_the_seeds_second_command_parses():
    settings = parse(
        LoRASettings,
        [
            "--mixed_precision=fp16", "--dataset_name=lambdalabs/naruto-blip-captions",
            "--caption_column=text", "--resolution=768", "--train_batch_size=8",
            "--num_train_epochs=100", "--checkpointing_steps=5000", "--learning_rate=1e-04",
            "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=42", "--rank=4",
            "--validation_prompt=cute dragon creature", "--report_to=wandb", "--push_to_hub",
            "--output_dir=wuerstchen-prior-naruto-lora",
        ],
    )  # fmt: skip
    assert settings.validation_prompts == ["cute dragon creature"] and settings.rank == 4
    for flag in ("--rank=0", "--lora_alpha=0", "--lora_dropout=1"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            parse(LoRASettings, ["--train_data_dir=x", flag])


def test_metadata_is_not_written(tmp_path):
    """alpha/rank is already folded into B: with metadata, diffusers would scale twice."""
    file = tmp_path / lora_file.FILE
    lora_file.save(make_adapted(4, 8.0), file)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
