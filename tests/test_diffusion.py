"""The diffusion formulas against DDPMWuerstchenScheduler and against their definitions."""

import functools
import math

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from minwurst.edge import models
from minwurst.step import diffusion
from minwurst.step.encoders import encode_text
from tests import reference
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
    times = reference.DEFAULT_STAGE_C_TIMESTEPS
    assert torch.equal(diffusion.prior_times(), torch.Tensor(times))
    pipeline = reference.prior_pipeline(wuerstchen)
    prompts = ["a bear", "honey pot"]
    expected = pipeline(
        prompts, 128, 128, timesteps=times, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).image_embeddings  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(2, 16, 3, 3, generator=generator) for _ in times])
    text = encode_text(pipeline.tokenizer, pipeline.text_encoder, [*prompts, "", ""])
    prior = models.load_prior(wuerstchen).eval()
    predict_noise = diffusion.guided(prior, {"text": text}, guidance)
    found = diffusion.sample(predict_noise, noise, diffusion.prior_times())
    found = diffusion.unscale_latents(found)
    assert relative(found, expected) < 1e-5


def weight(t, weighting, **options):
    return diffusion.Objective(loss_weighting=weighting, **options).loss_weight(t)


def test_loss_weights_by_their_definitions():
    alpha_bar = diffusion.alpha_bar(TIMES)
    snr = alpha_bar / (1 - alpha_bar)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=0)
    assert weight(TIMES, "none").eq(1).all()
    close(weight(TIMES, "p2"), 1 / (1 + snr))
    for gamma in (1.0, 5.0, 20.0):
        minimum = torch.minimum(snr, torch.full_like(snr, gamma))
        close(weight(TIMES, "min_snr", snr_gamma=gamma), minimum / snr)
        close(weight(TIMES, "soft_min_snr", snr_gamma=gamma), 1 / (1 + snr / gamma))
    close(weight(TIMES, "soft_min_snr", snr_gamma=1.0), weight(TIMES, "p2"))


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("p2", [0.002, 0.028, 0.153, 0.506, 0.856, 0.999]),
        ("min_snr", [0.009, 0.144, 0.903, 1, 1, 1]),
        ("soft_min_snr", [0.009, 0.126, 0.475, 0.837, 0.967, 1]),
    ],
)
def test_loss_weights_at_some_times(weighting, expected):
    t = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.98])
    assert weight(t, weighting).tolist() == pytest.approx(expected, abs=1e-3)


def times(uniform, sampling, **options):
    return diffusion.Objective(timestep_sampling=sampling, **options).timesteps(uniform)


def test_timestep_sampling():
    uniform = torch.tensor([0.0, 0.5, 0.99999])
    assert torch.equal(times(uniform, "uniform"), uniform)
    found = times(uniform, "wuerstchen")
    assert found.tolist() == pytest.approx([1.0, 0.541, 0.001011], abs=1e-5)
    many = times(torch.rand(20000), "wuerstchen")
    assert (many == 1).float().mean().item() == pytest.approx(1 - 0.999 / 1.08, abs=0.01)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_times_have_a_normal_logit(mean, std):
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    t = times(uniform, "logit_normal", logit_mean=mean, logit_std=std)
    logit = t.double().logit()
    assert logit.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logit.std().item() == pytest.approx(std, rel=1e-3)
    cumulative = torch.distributions.Normal(mean, std).cdf(logit)
    torch.testing.assert_close(cumulative, uniform.double(), rtol=0, atol=1e-5)
    edges = times(torch.tensor([0.0, 1 - 2**-24]), "logit_normal")
    assert edges[0] == 0 and 0.99 < edges[1] < 1


def test_scaling_is_inverted():
    encoded = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(diffusion.unscale_latents(diffusion.scale_latents(encoded)), encoded)
    assert diffusion.scale_latents(torch.tensor(41.0)).item() == pytest.approx(1.0)
    assert math.isclose(diffusion.unscale_latents(torch.tensor(0.0)).item(), -1.0)
