"""The diffusion formulas against DDPMWuerstchenScheduler and against their definitions."""

import math
import sys

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenPriorPipeline

from minwurst.edge import diffusers_pipelines, models
from minwurst.step import diffusion
from minwurst.step.encoders import encode_text
from tests.conftest import relative

TIMES = torch.linspace(0, 1, 101)


def test_alpha_bar_equals_scheduler():
    expected = DDPMWuerstchenScheduler()._alpha_cumprod(TIMES, torch.device("cpu"))
    torch.testing.assert_close(diffusion.alpha_bar(TIMES), expected, rtol=1e-5, atol=1e-7)
    assert diffusion.alpha_bar(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.9999, 1e-4])


def test_add_noise_equals_scheduler():
    latents, noise = torch.randn(101, 16, 3, 3), torch.randn(101, 16, 3, 3)
    expected = DDPMWuerstchenScheduler().add_noise(latents, noise, TIMES)
    assert relative(diffusion.add_noise(latents, noise, TIMES), expected) < 1e-6


@pytest.mark.parametrize(("now", "after"), [(1.0, 0.95), (0.5, 0.45), (0.1, 0.0)])
def test_reverse_step_equals_scheduler(now, after):
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=[now, after])
    x, predicted = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3)
    t = torch.full((2,), now)
    expected = scheduler.step(predicted, t, x, torch.Generator().manual_seed(5)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    found = diffusion.reverse_step(x, predicted, t, torch.full((2,), after), z)
    assert relative(found, expected) < 1e-5


def test_reverse_step_undoes_the_noise():
    """With the true noise, one step to t = 0 recovers the clean latents, up to the limit of ᾱ."""
    latents, noise = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3)
    t = torch.tensor([0.1, 0.3])
    noisy = diffusion.add_noise(latents, noise, t)
    found = diffusion.reverse_step(noisy, noise, t, torch.zeros(2), torch.randn(2, 16, 3, 3))
    assert relative(found, latents) < 0.02


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_sampling_equals_the_pipeline(wuerstchen, guidance):
    """Latents of two prompts from the same noise as the pipeline."""
    times = sys.modules[WuerstchenPriorPipeline.__module__].DEFAULT_STAGE_C_TIMESTEPS
    assert torch.equal(diffusion.sampling_times(), torch.Tensor(times))
    pipeline = diffusers_pipelines.prior_pipeline(wuerstchen, wuerstchen)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a bear", "honey pot"]
    expected = pipeline(
        prompts, 128, 128, timesteps=times, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).image_embeddings  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(2, 16, 3, 3, generator=generator) for _ in times])
    text = encode_text(pipeline.tokenizer, pipeline.text_encoder, [*prompts, "", ""])
    prior = models.load_prior(wuerstchen).eval()
    found = diffusion.unscale_latents(diffusion.sample(prior, {"text": text}, noise, guidance))
    assert relative(found, expected) < 1e-5


def test_p2_is_one_over_one_plus_snr():
    alpha_bar = diffusion.alpha_bar(TIMES)
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(diffusion.loss_weight(TIMES, "p2"), 1 / (1 + snr), rtol=1e-4, atol=0)
    assert diffusion.loss_weight(TIMES, "none").eq(1).all()


def test_timestep_sampling():
    uniform = torch.tensor([0.0, 0.5, 0.99999])
    assert torch.equal(diffusion.timesteps(uniform, "uniform"), uniform)
    found = diffusion.timesteps(uniform, "wuerstchen")
    assert found.tolist() == pytest.approx([1.0, 0.541, 0.001011], abs=1e-5)
    many = diffusion.timesteps(torch.rand(20000), "wuerstchen")
    assert (many == 1).float().mean().item() == pytest.approx(1 - 0.999 / 1.08, abs=0.01)


def test_scaling_is_inverted():
    encoded = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(diffusion.unscale_latents(diffusion.scale_latents(encoded)), encoded)
    assert diffusion.scale_latents(torch.tensor(41.0)).item() == pytest.approx(1.0)
    assert math.isclose(diffusion.unscale_latents(torch.tensor(0.0)).item(), -1.0)
