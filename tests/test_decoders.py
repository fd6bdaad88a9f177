"""Latents to images: the decoder against diffusers', the preview on linear data, the grids."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minwurst import pipelines, sample
from minwurst.base.errors import UserError
from minwurst.base.settings import parse
from minwurst.edge import export, grids, lora_file, models, run_file
from minwurst.edge.decoders import FullDecoder, PreviewDecoder
from minwurst.lora import merge
from minwurst.step import adapter, diffusion, images, randomness
from minwurst.step.encoders import encode_text
from tests import reference, tiny
from tests.conftest import ROOT, relative, train_here

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(wuerstchen):
    return FullDecoder(wuerstchen / "decoder", CPU)


def test_cells_are_the_nearest_that_decode(decoder):
    for wanted in range(1, 41):
        found = decoder.latent_size(wanted)
        assert found % 3 == 0 and found > 0 and (abs(found - wanted) <= 1 or wanted == 1)
    for cells in range(1, 10):
        latents, generator = torch.zeros(1, 16, cells, cells), torch.Generator()
        if cells % 3:
            with pytest.raises(RuntimeError):
                decoder(latents, "", generator)
        else:
            side = cells * 128 // 3
            assert decoder(latents, "", generator).size == (side, side)


def levels_apart(one, other):
    """The largest difference between two images, in 8-bit levels."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()


@pytest.mark.parametrize("size", [(3, 3), (12, 18), (21, 27)], ids=str)
def test_it_decodes_what_the_pipeline_does(wuerstchen, decoder, size):
    pipeline = reference.decoder_pipeline(wuerstchen / "decoder")
    latents = torch.randn(1, 16, *size) / 42
    found = decoder(latents, "a bear", torch.Generator().manual_seed(3))
    expected = pipeline(
        latents * 42 - 1, "a bear", num_inference_steps=12, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert found.size == expected.size and levels_apart(found, expected) <= 1
    other = decoder(latents + 0.1, "a bear", torch.Generator().manual_seed(3))
    assert levels_apart(other, found) > 1


@pytest.mark.parametrize("dora", [False, True])
def test_ready_pipelines_draw_what_we_draw(wuerstchen, tmp_path, dora):
    """pipelines.load with a LoRA at scale 0.5 equals our prior with the adapters added."""
    train_here(wuerstchen, tmp_path, "lora.py", learning_rate=0.1, use_dora=dora)
    generate = pipelines.load(
        str(wuerstchen), str(wuerstchen / "decoder"), lora=tmp_path, lora_scale=0.5
    )
    ours = models.load_prior(wuerstchen).eval()
    text = encode_text(*models.load_text(wuerstchen, torch.float32), ["a bear", ""])
    noise = randomness.sampling_noise(5, randomness.image_key("a bear", 0), (16, 3, 3))

    def expected():
        predict_noise = diffusion.guided(ours, {"text": text})
        return diffusion.sample(predict_noise, noise, diffusion.prior_times())

    found = generate.latents("a bear", seed=5, size=3)
    assert relative(found, expected()) > 1e-3
    lora_file.load(ours, tmp_path)
    adapter.set_scale(ours, 0.5)
    assert relative(found, expected()) < 1e-5
    words = ["--prompt=a bear", f"--lora={tmp_path}", "--lora_scale=0.5", "--seed=5"]
    words += [f"--decoder={wuerstchen / 'decoder'}", "--resolution=96"]
    with Image.open(sampled(tmp_path / "sampled", *words)[0]) as drawn:
        assert levels_apart(generate("a bear", seed=5, size=3), drawn) <= 1


def test_the_preview_recovers_a_linear_world():
    """If latents encode colours linearly, the fitted map recovers the pixels."""
    numbers = np.random.default_rng(0)
    world = torch.from_numpy(numbers.random((40, 3, 4, 4), dtype=np.float32))

    def encode(samples):
        encoded = torch.zeros(len(samples["positions"]), 16, 4, 4)
        encoded[:, :3] = world[samples["positions"]] * 5 + 2
        return diffusion.scale_latents(encoded), None

    class Pairs(torch.utils.data.Dataset):
        rows = range(40)

        def __getitem__(self, position):
            plain = world[position].repeat_interleave(32, 1).repeat_interleave(32, 2)
            mean, std = (
                torch.from_numpy(numbers)[:, None, None]
                for numbers in (images.IMAGENET_MEAN, images.IMAGENET_STD)
            )
            return {"pixels": (plain - mean) / std, "captions": "", "positions": position}

    preview = PreviewDecoder(Pairs(), encode)
    latents = encode({"positions": [7]})[0]
    found = np.asarray(preview(latents, "", None), dtype=np.float32) / 255
    expected = world[7].repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0).numpy()
    assert found.shape == (32, 32, 3)
    assert np.abs(found - expected).max() < 0.03  # ridge regularisation and 8-bit rounding


def test_a_grid_holds_every_picture_and_its_words():
    colours = ["red", "green", "blue", "yellow", "black"]
    tiles = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = grids.grid(tiles, colours, "title")
    seen = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)} <= seen
    assert sheet.width > sheet.height  # five images in rows of three
    plain = np.asarray(grids.grid(tiles[:1], [""])).min(axis=2)
    written = np.asarray(grids.grid(tiles[:1], ["what it shows"])).min(axis=2)
    assert (written[200:] < 128).sum() > (plain[200:] < 128).sum()
    two = grids.grid(tiles[:2], ["first", "second one"])
    for place, words in enumerate(["first", "second one"]):  # each under its own image
        one = grids.grid([tiles[place]], [words])
        left = 8 + place * 200
        assert (
            two.crop((left, 8, left + 192, two.height)).tobytes()
            == one.crop((8, 8, 200, one.height)).tobytes()
        )


@pytest.mark.parametrize("text", ["word " * 200, "W" * 400, "", "x", "ёж и медведь", "熊" * 50])
def test_captions_stay_under_their_picture(text):
    tile = Image.new("RGB", (192, 192), "red")
    sheet = np.asarray(grids.grid([tile, tile], [text, ""]))
    assert sheet.shape[1] == 408 and sheet.shape[0] < 300
    assert (sheet[202:, 204:] == 255).all()  # nothing under the second image


def test_sampling_takes_what_it_lacks_from_the_run(wuerstchen, tmp_path, monkeypatch):
    """Missing settings come from the LoRA's folder or file, never from the working directory."""
    run = train_here(
        wuerstchen, tmp_path / "run", "lora.py",
        pretrained_decoder_model_name_or_path=wuerstchen / "decoder", resolution=96,
    )  # fmt: skip
    of_folder = sampled(tmp_path / "a", "--prompt=a bear", f"--lora={run}")
    of_file = sampled(tmp_path / "b", "--prompt=a bear", f"--lora={run / lora_file.FILE}")
    assert pixels(of_folder[0]) == pixels(of_file[0])
    monkeypatch.chdir(run)
    assert run_file.folder_of(None) is None
    with pytest.raises(UserError, match=f"--prior {run}: .*a LoRA: give --lora {run}"):
        sampled(tmp_path / "c", "--prompt=a bear", f"--prior={run}")


def sampled(tmp_path, *words):
    """Run `python -m minwurst.sample` in this process. Returns the image files in order."""
    output = tmp_path / "out" / "x.png"
    sample.main(parse(sample.SampleSettings, [*words, f"--output={output}"]))
    return sorted(output.parent.glob("x-*.png"), key=lambda f: int(f.stem.split("-")[1])) or [
        output
    ]


def pixels(file):
    with Image.open(file) as opened:
        return opened.tobytes()


def test_scales_of_a_lora_side_by_side(wuerstchen, tmp_path):
    run = train_here(
        wuerstchen, tmp_path / "run", "lora.py", learning_rate=0.1,
        pretrained_decoder_model_name_or_path=wuerstchen / "decoder",
    )  # fmt: skip
    words = ["--prompt", "a bear", "a car", f"--lora={run}", "--resolution=96"]
    found = [pixels(file) for file in sampled(tmp_path, *words, "--lora_scale", "0", "1")]
    assert len(found) == 4
    with Image.open(tmp_path / "out/x.png") as sheet:
        assert sheet.width < sheet.height  # one row per prompt, one column per scale
    base = ["--prompt=a car", f"--prior={wuerstchen}", "--seed=7", words[-1]]  # the run's seed
    assert [found[2]] == [pixels(file) for file in sampled(tmp_path / "base", *base)]
    assert found[3] != found[2]
    merge(run / lora_file.FILE, str(wuerstchen), tmp_path / "merged", 1.0)
    words = [*words[:3], f"--prior={tmp_path / 'merged'}", *base[2:]]
    merged = sampled(tmp_path / "m", *words)
    for one, other in zip(found[1::2], map(pixels, merged), strict=True):
        apart = np.frombuffer(one, np.uint8).astype(int) - np.frombuffer(other, np.uint8)
        assert abs(apart).max() <= 2  # B·A is added in a different order


def test_numbers_and_guidance(wuerstchen, tmp_path):
    base = [f"--prior={wuerstchen}", f"--decoder={wuerstchen / 'decoder'}", "--resolution=96"]
    three = sampled(tmp_path / "3", "--prompt=a bear", *base, "--num_images=3")
    one = sampled(tmp_path / "1", "--prompt=a bear", *base)
    assert [pixels(three[0])] == [pixels(file) for file in one]
    assert len({pixels(file) for file in three}) == 3
    other = sampled(tmp_path / "g", "--prompt=a bear", *base, "--guidance_scale=40")
    assert pixels(other[0]) != pixels(one[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--prompt is missing"),
        (["--prompt=x", "--prior=nowhere/at/all"], "--prior nowhere/at/all: no such"),
        (["--prompt=x", "--prior=PRIOR"], "--decoder warp-ai/wuerstchen: no such"),
        (["--prompt=x", "--prior=PRIOR/prior"], "--prior warp-ai/.* text encoder that .* lacks"),
        (["--prompt=x", "--prior=."], "^--prior .: .*: prior/config.json is missing"),
        (["--prompt=x", "--lora=runs/nothing"], "^--lora runs/nothing: no such local folder"),
        (["--prompt=x", "--lora=."], "^--lora .: LoRA pytorch_lora_weights.safetensors: no such"),
        (
            ["--prompt=x", "--prior=WUERSTCHEN", "--decoder=WUERSTCHEN"],
            "^--decoder .*not a complete decoder folder",
        ),
        (["--prompt=x", "--lora_scale=2"], "--lora_scale needs a --lora"),
        (["--prompt=x", "--output=x.jpg"], "must end in .png"),
        (["--prompt=x", "--num_images=0"], "--num_images is 0"),
        (["--prompt=x", "--resolution=8"], "--resolution is 8"),
        (["--prompt=x", "--output=/proc/x/y.png"], "--output /proc/x is not writable"),
        (
            ["--prompt=x", "--prior=WUERSTCHEN", "--decoder=WUERSTCHEN/decoder", "--lora=nowhere"],
            "^--lora nowhere: no such file",
        ),
    ],
)
def test_mistakes_are_one_line(wuerstchen, tmp_path, monkeypatch, words, said):
    prior = tmp_path / "prior"  # without a decoder
    export.save_pipeline(models.load_prior(wuerstchen), prior, wuerstchen, {})
    words = [word.replace("WUERSTCHEN", str(wuerstchen)) for word in words]
    words = [word.replace("PRIOR", str(prior)) for word in words]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        sample.main(parse(sample.SampleSettings, words))


@pytest.mark.parametrize(
    ("part", "flag"),
    [
        ("base/prior/diffusion_pytorch_model.safetensors", "--prior"),
        ("base/text_encoder/model.safetensors", "--prior"),
        ("base/tokenizer/tokenizer.json", "--prior"),
        ("base/decoder/vqgan/diffusion_pytorch_model.safetensors", "--decoder"),
        ("base/decoder/text_encoder/config.json", "--decoder"),
        ("run/pytorch_lora_weights.safetensors", "--lora"),
        ("run/run.json", "run"),
    ],
)
def test_a_broken_part_names_its_flag(wuerstchen, tmp_path, broken_run, monkeypatch, part, flag):
    shutil.copytree(broken_run, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    words = ["--prompt=x", "--prior=base", "--lora=run", "--resolution=96"]
    Path(part).write_bytes(Path(part).read_bytes()[:50])
    with pytest.raises(UserError, match=f"^{flag} "):
        sample.main(parse(sample.SampleSettings, words))


@pytest.fixture(scope="module")
def broken_run(wuerstchen, tmp_path_factory):
    """A base and a LoRA's run, to be damaged."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(wuerstchen, folder / "base")
    train_here(folder / "base", folder / "run", "lora.py", max_train_steps=1)
    return folder


def test_a_lora_for_another_prior_names_its_flag(wuerstchen, tmp_path, broken_run):
    base = shutil.copytree(wuerstchen, tmp_path / "base")
    tiny.make_prior(c=32).save_pretrained(base / "prior")
    with pytest.raises(UserError, match="^--lora .*: blocks.* wide, but 32"):
        sampled(tmp_path, "--prompt=x", f"--prior={base}", f"--lora={broken_run / 'run'}")
    with pytest.raises(UserError, match=f"^--lora {base}: LoRA .*no such file"):
        sampled(tmp_path, "--prompt=x", f"--lora={base}")


def test_images_go_beside_the_run_under_new_names(wuerstchen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def generate(*words):
        capsys.readouterr()
        sample.main(parse(sample.SampleSettings, [*words, "--resolution=96"]))
        printed = capsys.readouterr().out.splitlines()
        return " ".join(line for line in printed if line.endswith(".png"))

    run = train_here(wuerstchen, tmp_path / "run", max_train_steps=1)
    bear = ["--prompt", "A bear, at night!"]
    assert generate(*bear, f"--prior={run}") == f"{run}/samples/a_bear_at_night.png"
    assert generate(*bear, f"--prior={run / 'prior_pipeline'}", "--seed=1") == (
        f"{run}/samples/a_bear_at_night.2.png"
    )
    with_seeds = [
        json.loads(Image.open(f"{run}/samples/a_bear_at_night{n}.png").text["minwurst"])["seed"]
        for n in ("", ".2")
    ]
    assert with_seeds == [7, 1]  # the run's own by default
    prior = f"--prior={wuerstchen}"
    three = "samples/grid.png samples/image.png samples/x.png"
    assert generate("--prompt", "…", "x", prior) == three
    assert generate("--prompt", "x", prior) == "samples/x.2.png"
    assert json.loads(Image.open("samples/x.png").text["minwurst"])["seed"] == 0
    assert generate("--prompt", "x", prior, "--output=mine.png") == "mine.png"
    ignored = subprocess.run(["git", "check-ignore", "samples/x.png"], cwd=ROOT)
    assert ignored.returncode == 0


def test_a_priors_folder_brings_decoder_resolution_and_guidance(wuerstchen, tmp_path, capsys):
    base = shutil.copytree(wuerstchen, tmp_path / "base")
    export.write_index(base, resolution=192, guidance_scale=1.5)
    (file,) = sampled(tmp_path, "--prompt=x", f"--prior={base}")
    assert f"seed 0, guidance 1.5, from {base}" in capsys.readouterr().out
    generate = pipelines.load(base)
    assert (generate.size, generate.guidance) == (6, 1.5)
    assert levels_apart(generate("x"), Image.open(file)) <= 1
    latents = generate.latents("x")
    assert torch.equal(latents, generate.latents("x", guidance=1.5))
    assert not torch.equal(latents, generate.latents("x", guidance=4))
    (small,) = sampled(tmp_path / "small", "--prompt=x", f"--prior={base}", "--resolution=96")
    assert (Image.open(file).size, Image.open(small).size) == ((256, 256), (128, 128))
