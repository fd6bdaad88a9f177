"""A complete Würstchen small enough for a laptop, trained on emoji: what --demo fine-tunes.

    python train.py --demo
    python lora.py --demo
    python -m minwurst.sample --demo --prompt "bear, fluent"

See README.md in this folder. TRAIN, LORA and SAMPLE are what --demo sets; flags on the command line
override them.
"""

from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS, DATA, WORLD = HERE / "weights", HERE / "pictures", HERE / "world.safetensors"


def data_of(style):
    """The folder of the images of a style that are fine-tuned on."""
    return DATA / style.replace(" ", "_")


IMAGES = data_of("fluent sunset")

# The folder is complete: it also has the encoders and the decoder, and says its resolution and its
# guidance: 1, of 1, 2 and 4 the best for this small prior. The published one has 4.
SAMPLE = {"prior": str(WEIGHTS)}
TRAIN = {
    "pretrained_prior_model_name_or_path": str(WEIGHTS),
    "train_data_dir": str(IMAGES),
    "cache_latents": True,
    "train_batch_size": 32,
    "max_train_steps": 150,
    "learning_rate": 7e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "seed": 0,
    # None of them is among the images.
    "validation_prompts": [
        "rocket, fluent sunset", "slightly frowning face, fluent sunset", "owl, fluent sunset",
        "sport utility vehicle, fluent sunset",
    ],
    "validation_steps": 1000,
    "output_dir": "runs/demo",
}
LORA = {
    **TRAIN, "rank": 16, "lora_targets": ["all-linear"], "learning_rate": 1.5e-3,
    "output_dir": "runs/demo-lora",
}  # fmt: skip
