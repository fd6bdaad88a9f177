"""Golden results: record a set of short runs, change the code, check that results are unchanged.

    python -m tests.golden record runs/golden
    python -m tests.golden check runs/golden

A refactoring must not change any number. Results depend on the processor and on torch, so they are
not committed: record before the first change and check on the same machine. Runs are compared by
SHA-256 of the last checkpoint's tensors, the exported result and the validation images.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
COMMON = """--train_data_dir=tests/pictures --resolution=64 --train_batch_size=2 --seed=7
    --learning_rate=1e-3 --report_to=none --checkpointing_steps=3 --max_train_steps=6""".split()
STATEFUL = """--use_ema --gradient_accumulation_steps=2 --caption_dropout=0.3
    --lr_scheduler=cosine --lr_warmup_steps=2 --dataloader_num_workers=2""".split()
AUTHORS = ["--loss_weighting=p2", "--timestep_sampling=wuerstchen"]
LORA = ["--lora_alpha=8", "--lora_dropout=0.2"]
LOOK = ["--validation_prompts", "a bear", "a bell"]
LOOK += ["--validation_split=0.1", "--validation_steps=3"]
# name: (ranks, whether the run stops after step 3 and resumes, script and flags)
RUNS = {
    "train fp32": (1, True, ["train.py", *STATEFUL]),
    "train bf16 cached": (1, False, ["train.py", *STATEFUL, "--mixed_precision=bf16",
                                     "--cache_latents"]),
    "train fp16": (1, False, ["train.py", *AUTHORS, "--mixed_precision=fp16"]),
    "train bf16 on 2 ranks": (2, False, ["train.py", *STATEFUL, "--mixed_precision=bf16"]),
    "train validated": (1, False, ["train.py", *LOOK, "--use_ema", "--gradient_checkpointing"]),
    "train preview": (1, False, ["train.py", *LOOK, "--validation_decoder=preview",
                                 "--cache_latents"]),
    "lora fp32": (1, True, ["lora.py", *STATEFUL, *LORA, "--gradient_checkpointing"]),
    "lora bf16 cached": (1, False, ["lora.py", *STATEFUL, *LORA, "--mixed_precision=bf16",
                                    "--cache_latents", "--lora_targets", "all-linear"]),
    "lora fp16 on 2 ranks": (2, False, ["lora.py", *LORA, "--mixed_precision=fp16",
                                        "--dataloader_num_workers=1"]),
    "lora validated": (1, False, ["lora.py", *LOOK]),
    "demo": (1, False, ["train.py", "--demo"]),
}  # fmt: skip


def execute(ranks, words):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*launcher, *words], cwd=ROOT, env=variables, capture_output=True)
    if done.returncode:
        sys.exit(f"{words} failed:\n{done.stdout.decode()}{done.stderr.decode()}")


def digest(file):
    """The SHA-256 of a file, or of its tensors whatever their order."""
    if file.suffix != ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def results(folder):
    """{file: SHA-256} of a run's tensors, result and images. Other files contain times or paths."""
    wanted = ("checkpoint-6/*.safetensors", "prior_pipeline/prior/*.safetensors", "*.safetensors",
              "validation/step-*.png", "validation/before_after.png")  # fmt: skip
    files = [file for pattern in wanted for file in sorted(folder.glob(pattern))]
    return {str(file.relative_to(folder)): digest(file) for file in files}


def run(name, work):
    """Run one entry of RUNS in a new folder and return its results."""
    ranks, resumed, (script, *flags) = RUNS[name]
    model, folder = work / "wuerstchen", work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    words = [script, *COMMON, f"--output_dir={folder}"]
    if "--demo" in flags:
        words = [script, "--max_train_steps=6", f"--output_dir={folder}"]
    else:
        words += [f"--pretrained_prior_model_name_or_path={model}",
                  f"--image_encoder_name_or_path={model / 'image_encoder'}",
                  f"--pretrained_decoder_model_name_or_path={model / 'decoder'}"]  # fmt: skip
    words += flags
    if resumed:
        execute(ranks, [*words, "--max_train_steps=3"])
        words += ["--resume_from_checkpoint=latest"]
    execute(ranks, words)
    return results(folder)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("work", type=Path, help="folder for the small model and the results")
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS))
    given = parser.parse_args()
    work, file = given.work.resolve(), given.work.resolve() / "results.json"
    if given.what == "record":
        from tests import tiny

        tiny.make(work / "wuerstchen", dropout=0.1)
        found = {name: run(name, work) for name in given.only}
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        sys.exit()
    expected, differing = json.loads(file.read_text(encoding="utf-8")), []
    for name in given.only:
        found = run(name, work)
        different = [f for f in expected[name] | found if expected[name].get(f) != found.get(f)]
        differing += different
        verdict = f"{', '.join(different)} differ" if different else "the same"
        print(f"{name}: {verdict}", flush=True)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
