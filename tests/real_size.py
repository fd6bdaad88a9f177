"""Measure one optimizer step at the published size: 993,636,896 parameters, random weights.

    python -m tests.real_size runs/real          # train.py: 24 GB of memory, 25 GB of disk
    python -m tests.real_size runs/real lora.py  # 24 GB of memory, 6 GB of disk

The script runs unmodified with the published sizes of prior and image encoder, AdamW, fp32 weights,
bf16 autocast, gradient checkpointing and 768 pixels, including checkpoint and export. The text
encoder has the real width but only two layers; the others would take 1.3 GB more in bf16.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers

from minwurst.base.console import gib
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.prior import PUBLISHED
from tests import tiny


def make(folder):
    """Write a model folder with random weights of the published sizes, in the Hub's layout."""
    rows = tiny.rows()
    tokenizer = tiny.make_tokenizer(rows["text"], size=700, length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder = tiny.make_text_encoder(tokenizer, 1280, layers=2, heads=20)
    text_encoder.save_pretrained(folder / "text_encoder")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    EfficientNetEncoder().save_pretrained(folder / "image_encoder")
    tiny.make_prior(**PUBLISHED).save_pretrained(folder / "prior")


def main(folder, script="train.py", *flags):
    if not (folder / "prior").is_dir():
        # A separate process, so that its memory is freed before training starts.
        code = "import sys, pathlib, tests.real_size as r; r.make(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable, script, f"--pretrained_prior_model_name_or_path={folder}",
            f"--image_encoder_name_or_path={folder / 'image_encoder'}",
            f"--train_data_dir={tiny.IMAGES}", f"--output_dir={tempfile.mkdtemp(dir=folder)}",
            "--max_train_steps=1", "--mixed_precision=bf16", "--gradient_checkpointing",
            "--report_to=none", *flags,
        ],
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)  # excludes the process that made the weights
    assert status == 0, f"{script} ended with status {status}"
    seconds = time.perf_counter() - start
    print(f"peak memory {gib(usage.ru_maxrss * 1024)}, {seconds:.0f} s in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
