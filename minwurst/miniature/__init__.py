"""A complete Würstchen small enough for a laptop, trained on emoji: what --demo fine-tunes.

    python train.py --demo
    python lora.py --demo
    python -m minwurst.sample --demo --prompt "bear"

See README.md in this folder. TRAIN, LORA and SAMPLE are what --demo sets; flags on the command line
override them.
"""

from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS, IMAGES, WORLD = HERE / "weights", HERE / "pictures", HERE / "world.safetensors"

SAMPLE = {"prior": str(WEIGHTS)}  # a complete folder: it also has a decoder and says a resolution
TRAIN = {
    "pretrained_prior_model_name_or_path": str(WEIGHTS),
    "train_data_dir": str(IMAGES),
    "cache_latents": True,
    "train_batch_size": 32,
    "max_train_steps": 120,
    "learning_rate": 3e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "seed": 0,
    # None of them is among the images.
    "validation_prompts": ["rocket", "slightly frowning face", "owl", "sport utility vehicle"],
    "validation_steps": 1000,
    "output_dir": "runs/demo",
}
LORA = {
    **TRAIN, "rank": 16, "lora_targets": ["all-linear"], "learning_rate": 7e-4,
    "output_dir": "runs/demo-lora",
}  # fmt: skip
