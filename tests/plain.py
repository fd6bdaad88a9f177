"""The training loop written once more, from diffusers' and torch's own parts, to compare with."""


import diffusers
import torch
from diffusers.training_utils import EMAModel

from minwurst.edge import models
from minwurst.step import randomness
from minwurst.step.images import open_image, preprocess
from tests import tiny

# The flags of the same run: four steps of four images.
FLAGS = {
    "lr_scheduler": "cosine", "lr_warmup_steps": 2, "adam_weight_decay": 0.01,
    "max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "train_batch_size": 2,
    "use_ema": True, "seed": 7, "learning_rate": 1e-3,
}  # fmt: skip
AUTHORS = {"loss_weighting": "p2", "timestep_sampling": "wuerstchen", "caption_dropout": 0.5}


def train(prior, trained, wuerstchen, objective, flow=False):
    """Train the parameters `trained` of diffusers' prior; returns their averages, in order."""
    rows = tiny.rows()
    encoder = models.load_image_encoder(wuerstchen / "image_encoder")
    tokenizer, text_encoder = models.load_text(wuerstchen, torch.float32)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, fused=False)
    schedule = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 2, 4)
    scheduler, ema = diffusers.DDPMWuerstchenScheduler(), EMAModel(trained)
    for step in range(4):
        positions = range(4 * step, 4 * step + 4)
        samples = [rows[randomness.row_at(7, position, len(rows))] for position in positions]
        share = objective.get("caption_dropout", 0.0)
        captions = [
            randomness.caption(7, position, [row["text"]], share)
            for position, row in zip(positions, samples, strict=True)
        ]
        pixels = torch.stack([preprocess(open_image(row), 64) for row in samples])
        tokens = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            text = text_encoder(**tokens).last_hidden_state
            latents = encoder(pixels).add(1.0).div(42.0)
        t = randomness.uniform(7, positions)
        noise = randomness.noise(7, positions, latents.shape[1:])
        weight = torch.ones(4)
        if objective:
            t = ((1 - t) * 1.08 + 0.001).clamp(0.001, 1.0)
            weight = 1 - scheduler._alpha_cumprod(t, t.device)
        noisy, target = scheduler.add_noise(latents, noise, t), noise
        if flow:
            noisy, target = torch.lerp(latents, noise, t[:, None, None, None]), noise - latents
        predicted = prior(noisy, t, text)
        squares = torch.nn.functional.mse_loss(predicted, target, reduction="none")
        (squares.mean(dim=(1, 2, 3)) * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(trained)
    return ema.shadow_params
