"""A whole Würstchen small enough for a laptop, trained on emoji: what `--demo` fine-tunes.

    python train.py --demo
    python lora.py --demo
    python -m minwurst.sample --demo --prompt "bear"

`weights/` has the published model's layout; its prior knows emoji in 3D by their names. `pictures/`
are a third of the same things in black and white, a style its prior never saw. `world.safetensors`
holds the latents of all of them in both styles, for `measure`. `pretrain` made all three.
"""

import json
from pathlib import Path

from safetensors import safe_open

HERE = Path(__file__).parent
WEIGHTS, PICTURES, WORLD = HERE / "weights", HERE / "pictures", HERE / "world.safetensors"
SHIPPED = slice(0, None, 3)  # the names whose pictures in black and white are fine-tuned on


def read_world(file=WORLD):
    """(N names, {"solid", "outlined"}: their scaled latents, (N, 16, 6, 6) fp32)."""
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        return names, {style: opened.get_tensor(style).float() for style in ("solid", "outlined")}


# What --demo sets; a flag that is given goes before it.
SAMPLE = {
    "prior": str(WEIGHTS),
    "decoder": str(WEIGHTS / "decoder"),
    "resolution": 192,
}
TRAIN = {
    "pretrained_prior_model_name_or_path": str(WEIGHTS),
    "pretrained_decoder_model_name_or_path": str(WEIGHTS / "decoder"),
    "image_encoder_name_or_path": str(WEIGHTS / "image_encoder"),
    "train_data_dir": str(PICTURES),
    "resolution": 192,
    "cache_latents": True,
    "train_batch_size": 32,
    "max_train_steps": 120,
    "learning_rate": 3e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "seed": 0,
    # None of them in PICTURES.
    "validation_prompts": ["rocket", "slightly frowning face", "owl", "sport utility vehicle"],
    "validation_steps": 1000,
    "output_dir": "runs/demo",
}
LORA = {
    **TRAIN, "rank": 16, "lora_targets": ["all-linear"], "learning_rate": 7e-4,
    "output_dir": "runs/demo-lora",
}  # fmt: skip
