"""The cache of encoded samples: equal to live encoding, reproducible, and never a wrong file."""

import pickle
import re

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from minwurst.base.errors import UserError
from minwurst.edge import cache, models, sharded
from minwurst.run import checkpoint
from minwurst.step.encoders import Encoders
from minwurst.step.images import open_image
from minwurst.step.samples import batches
from tests import tiny
from tests.conftest import assert_bitwise_equal, flags, relative, torchrun, train_here

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CACHED = {"cache_latents": True, "caption_dropout": 0.3, "train_data_dir": None}


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """The test images with one to three captions each, one of them shared."""
    rows = tiny.rows()
    texts = [[t, "a thing", f"{t} on white"][: 1 + n % 3] for n, t in enumerate(rows["text"])]
    table = datasets.Dataset.from_dict(
        {"image": rows["image"], "text": texts},
        features=datasets.Features({"image": datasets.Image(), "text": [datasets.Value("string")]}),
    )
    folder = tmp_path_factory.mktemp("listed")
    table.save_to_disk(folder)
    return folder


@pytest.fixture(autouse=True)
def short_files(monkeypatch):
    monkeypatch.setattr(sharded, "SHARD", 16)


def encoders_of(wuerstchen, compute_type=torch.float32):
    return models.make_encoders(tiny.parts(wuerstchen), compute_type, CPU)


def no_encoders(monkeypatch):
    """Make loading an encoder fail the test."""

    def load(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(models, "load_text", load)
    monkeypatch.setattr(models, "load_image_encoder", load)


@pytest.mark.parametrize(
    ("compute_type", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_it_holds_what_the_encoders_give(wuerstchen, listed, tmp_path, compute_type, bound):
    """Every sample of an epoch, with caption lists, dropped captions, and any number of workers."""
    rows = tiny.rows(dataset_name=str(listed))
    encoders = encoders_of(wuerstchen, compute_type)
    store = cache.encode_all(tmp_path, tiny.data(rows), encoders)
    assert not {"text", "image"} & vars(encoders).keys()  # unloaded
    chosen = rows.select(range(20, 50))  # as with held-out rows
    plain = tiny.samples(chosen, 64, 3, caption_dropout=0.3)
    cached = cache.EncodedSamples(chosen, plain.buckets, 3, 0.3, encoded=store)
    places = [range(start, start + 5) for start in range(0, 30, 5)]
    met = set()
    one, two = (batches(cached, places, workers) for workers in (0, 2))
    for found, again, samples in zip(one, two, batches(plain, places), strict=True):
        assert found["positions"] == samples["positions"] == again["positions"]
        latents, text = found["latents"], found["condition"]["text"]
        assert torch.equal(latents, again["latents"])
        assert torch.equal(text, again["condition"]["text"])
        assert latents.dtype == torch.float32 and text.dtype == compute_type
        assert relative(latents, encoders.latents(samples["pixels"])) < 1e-5
        assert relative(text, encoders.condition(samples["captions"])["text"]) < bound
        met.update(samples["captions"])
    assert "" in met and "a thing" in met
    assert store.text.count < sum(map(len, rows["text"]))  # each text is stored once


@pytest.mark.parametrize("script", ["train.py", "lora.py"])
def test_a_cached_run_is_the_same_run(wuerstchen, listed, tmp_path, script, monkeypatch):
    """New or existing cache, resumed or not: the same weights, bit for bit."""
    settings = {
        **CACHED, "dataset_name": listed, "script": script, "mixed_precision": "bf16",
        "use_ema": True, "gradient_accumulation_steps": 2, "checkpointing_steps": 2,
    }  # fmt: skip
    made = train_here(wuerstchen, tmp_path / "made", **settings)
    shared = {**settings, "cache_dir": tmp_path / "cache"}
    train_here(wuerstchen, tmp_path / "first", **{**shared, "max_train_steps": 1})
    no_encoders(monkeypatch)
    decoded = []
    for module in ("minwurst.step.samples", "minwurst.edge.dataset", "minwurst.edge.cache"):
        monkeypatch.setattr(
            f"{module}.open_image", lambda row: decoded.append(1) or open_image(row)
        )
    parts = train_here(wuerstchen, tmp_path / "parts", **{**shared, "max_train_steps": 2})
    train_here(
        wuerstchen, parts, **shared, dataloader_num_workers=1, resume_from_checkpoint="latest"
    )
    assert not decoded
    assert_bitwise_equal(made / "checkpoint-4", parts / "checkpoint-4")


def test_a_cached_run_trains_as_an_uncached_one(still_wuerstchen, tmp_path):
    """Close weights after training, and a cached run can be resumed without the cache."""
    settings = {"checkpointing_steps": 2, "caption_dropout": 0.3}
    plain = train_here(still_wuerstchen, tmp_path / "plain", **settings)
    cached = train_here(still_wuerstchen, tmp_path / "cached", **settings, cache_latents=True)
    one, two = (load_file(out / "checkpoint-4/weights.safetensors") for out in (plain, cached))
    for name, weight in one.items():
        if not name.endswith("to_k.bias"):
            assert relative(two[name], weight) < 1e-4, name
    checkpoint.delete(cached / "checkpoint-4")
    back = train_here(still_wuerstchen, cached, **settings, resume_from_checkpoint="latest")
    assert (back / "checkpoint-4").is_dir()


@pytest.mark.parametrize("decoder", ["full", "preview"])
def test_validation_works_with_it(wuerstchen, tmp_path, decoder, capsys):
    """Held-out rows come from the cache, prompts are encoded in advance, images are still shown."""
    looks = {
        "pretrained_decoder_model_name_or_path": wuerstchen / "decoder",
        "validation_prompts": "a bear", "validation_split": 0.1, "validation_decoder": decoder,
        "resolution": 96,
    }  # fmt: skip
    said, pictures = [], []
    for cached in (False, True):
        out = train_here(wuerstchen, tmp_path / str(cached), **looks, cache_latents=cached)
        found = [line for line in capsys.readouterr().out.splitlines() if "held out" in line]
        said.append([float(line.split("loss ")[1].split()[0]) for line in found])
        pictures.append((out / "validation/step-000000.png").read_bytes())
    assert len(said[0]) == 2 and said[1] == pytest.approx(said[0], rel=1e-3)
    assert decoder == "preview" or pictures[0] == pictures[1]


def test_ranks_share_it(still_wuerstchen, listed, tmp_path, monkeypatch):
    """Two ranks write the same files as one rank, and train on them to the same weights."""
    monkeypatch.undo()  # the ranks use the default shard size
    settings = {**CACHED, "dataset_name": listed, "cache_dir": tmp_path / "shared"}
    settings["adam_epsilon"] = 1e-4  # Adam would amplify rounding where a gradient is nearly 0
    two = torchrun(2, still_wuerstchen, tmp_path / "two", **settings, train_batch_size=2)
    found = {file.name: file.read_bytes() for file in tmp_path.glob("shared/latents-*/*")}
    assert len(found) == 3  # 56 images; 76 captions
    rows = tiny.rows(dataset_name=str(listed))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in torchrun's processes
    cache.encode_all(tmp_path / "alone", tiny.data(rows), encoders_of(still_wuerstchen))
    torch.set_num_threads(threads)
    assert found == {file.name: file.read_bytes() for file in tmp_path.glob("alone/*")}
    no_encoders(monkeypatch)
    one = train_here(still_wuerstchen, tmp_path / "one", **settings)
    one, two = (load_file(out / "checkpoint-4/weights.safetensors") for out in (one, two))
    for name, weight in one.items():
        if not name.endswith("to_k.bias"):
            assert relative(two[name], weight) < 2e-5, name


def test_two_runs_may_start_on_one_new_folder(warm, wuerstchen, listed, tmp_path):
    settings = {**CACHED, "dataset_name": listed, "cache_dir": tmp_path / "shared" / "new"}
    runs = [
        warm.start("train.py", flags(wuerstchen, tmp_path / name, **settings)) for name in "ab"
    ]
    results = [run.wait() for run in runs]
    assert [code for code, _ in results] == [0, 0], results
    assert_bitwise_equal(tmp_path / "a/checkpoint-4", tmp_path / "b/checkpoint-4")


def test_another_process_opens_the_files_itself(wuerstchen, tmp_path):
    """Pickling sends file names, so no tensor is copied, even when processes are not forked."""
    rows = tiny.rows()
    store = cache.encode_all(tmp_path, tiny.data(rows), encoders_of(wuerstchen))
    text = store.text[5]["text"]
    packed = pickle.dumps(store)
    assert len(packed) < 20_000
    assert torch.equal(pickle.loads(packed).text[5]["text"], text)


# ---- Damaged or outdated files.


@pytest.fixture
def filled(wuerstchen, tmp_path):
    """(folder, rows, content of the files) of a complete cache."""
    rows = tiny.rows()
    cache.encode_all(tmp_path / "cache", tiny.data(rows), encoders_of(wuerstchen))
    files = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 8  # 56 images and 57 captions, 16 per file
    return tmp_path / "cache", rows, files


def flipped(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


DAMAGE = {
    "cut short": lambda content: content[:-1],
    "header flipped": lambda content: content[:3] + b"x" + content[4:],
    "empty": lambda content: b"",
    "gone": None,
    "flipped": flipped,
}


@pytest.mark.parametrize("change", DAMAGE)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_file_alone_is_written_again(wuerstchen, filled, kind, change, monkeypatch):
    """At the start; changed numbers only with --recheck_data."""
    folder, rows, before = filled
    bad = f"{kind}-00000016.safetensors"
    if change == "gone":
        (folder / bad).unlink()
    else:
        (folder / bad).write_bytes(DAMAGE[change](before[bad]))
    written, write = [], sharded.ShardedTensors.write
    monkeypatch.setattr(
        sharded.ShardedTensors, "write",
        lambda self, start, tensors: written.append(self.file(start).name)
        or write(self, start, tensors),
    )  # fmt: skip
    encoders, other = encoders_of(wuerstchen), {"text": "image", "latents": "text"}[kind]
    monkeypatch.delattr(Encoders, other)  # the encoder that is not needed is not loaded
    if change == "flipped":
        cache.encode_all(folder, tiny.data(rows), encoders_of(wuerstchen))
        assert not written
    cache.encode_all(folder, tiny.data(rows), encoders, recheck=change == "flipped")
    assert written == [bad]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("workers", [0, 1])
def test_changed_numbers_are_found_when_they_are_first_read(
    wuerstchen, tmp_path, capsys, workers
):
    """The run stops, and the same command then encodes the file again."""
    settings = {
        "cache_latents": True, "cache_dir": tmp_path / "cache", "train_batch_size": 14,
        "dataloader_num_workers": workers, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    whole = train_here(wuerstchen, tmp_path / "whole", **settings)
    (file,) = tmp_path.glob("cache/latents-*/latents-00000016.safetensors")
    content = file.read_bytes()
    file.write_bytes(flipped(content))
    said = f"{file} has changed since it was written, and is deleted. Resume to encode it again."
    with pytest.raises(UserError, match=re.escape(said)):
        train_here(wuerstchen, tmp_path / "run", **settings)
    assert not file.exists()
    run = train_here(wuerstchen, tmp_path / "run", **settings)
    assert file.read_bytes() == content
    assert_bitwise_equal(whole / "checkpoint-4", run / "checkpoint-4")


def test_a_file_of_another_length_is_written_again(wuerstchen, filled):
    """An intact file with a valid checksum, but with fewer rows."""
    folder, rows, before = filled
    file = folder / "latents-00000048.safetensors"
    tensors = {"latents": load_file(file)["latents"][:3].clone()}
    save_file(tensors, file, metadata={"sha256": sharded.digest(tensors)})
    cache.encode_all(folder, tiny.data(rows), encoders_of(wuerstchen))
    assert file.read_bytes() == before[file.name]


def test_a_stopped_run_goes_on_where_it_was(wuerstchen, tmp_path, monkeypatch, capsys):
    """Interrupted in the middle of a file: complete files are kept, the rest is encoded."""
    rows = tiny.rows()
    latents, calls = Encoders.latents, []

    def stop(self, pixels):
        calls.append(len(pixels))
        if sum(calls) > 40:
            raise KeyboardInterrupt
        return latents(self, pixels)

    monkeypatch.setattr(Encoders, "latents", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.encode_all(tmp_path, tiny.data(rows), encoders_of(wuerstchen))
    assert len(list(tmp_path.glob("latents-*"))) == 2 and len(list(tmp_path.glob("text-*"))) == 4
    calls.clear(), capsys.readouterr()
    monkeypatch.setattr(
        Encoders, "latents", lambda self, pixels: calls.append(1) or latents(self, pixels)
    )
    cache.encode_all(tmp_path, tiny.data(rows), encoders_of(wuerstchen))
    assert "24 images and 0 captions to encode" in capsys.readouterr().out
    assert len(calls) == 3  # 24 images, 8 at a time


def test_other_facts_have_another_folder(tmp_path):
    facts = {"data": "1", "encoders": "2", "resolution": 64, "text_type": "torch.bfloat16"}
    changed = [{**facts, name: "other"} for name in facts]
    folders = {cache.folder_for(tmp_path, **known) for known in [facts, facts, *changed]}
    assert len(folders) == 5


def test_what_changed_is_encoded_anew(wuerstchen, listed, tmp_path, capsys):
    """The same command reuses everything; other images, encoders, sizes or dtypes reuse nothing."""
    rows = datasets.load_from_disk(str(listed))
    rows.select([*range(1, 56), 0]).save_to_disk(tmp_path / "turned")
    other = tiny.make(tmp_path / "other", seed=1)
    changes = [
        {}, {"seed": 8}, {"dataset_name": tmp_path / "turned"}, {"resolution": 96},
        {"mixed_precision": "bf16"}, {"image_encoder_name_or_path": other / "image_encoder"},
    ]  # fmt: skip
    settings = {"dataset_name": listed, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    train_here(wuerstchen, tmp_path / "first", **CACHED, **settings)
    for number, change in enumerate(changes):
        capsys.readouterr()
        train_here(wuerstchen, tmp_path / str(number), **CACHED, **{**settings, **change})
        encoded = 0 if number < 2 else 56
        assert f", {encoded} images and" in capsys.readouterr().out, change


def test_a_disk_too_small_is_refused(wuerstchen, tmp_path, monkeypatch):
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=10000))
    with pytest.raises(UserError, match=r"--cache_latents: .* needs 0\.\d MiB more, and 0.0 MiB"):
        train_here(wuerstchen, tmp_path, cache_latents=True)


def test_a_write_that_fails_leaves_nothing_half(wuerstchen, tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(sharded, "save_file", full)
    with pytest.raises(UserError, match="text-00000000.safetensors was not written: No space") as e:
        train_here(wuerstchen, tmp_path, cache_latents=True)
    assert e.value.one_rank
    (folder,) = tmp_path.glob("latents-*")
    assert not list(folder.iterdir())
