"""The diffusion process of Würstchen's Stage C and its objective, forward and backward.

    noisy = add_noise(latents, noise, t)                    # what the loop trains on
    error = (prior(noisy, t, **condition) - target(latents, noise, t)).square()
    latents = sample(guided(prior, condition), noise, prior_times())      # from noise to latents

Time runs from t = 0, the clean latents, to t = 1, pure noise. ᾱ(t) is the fraction of the signal's
variance that is left at t (Nichol, Dhariwal 2021, arXiv 2102.09672, eq. 17), and ᾱ/(1−ᾱ) is the
signal-to-noise ratio (SNR). Training draws t at random; sampling walks from 1 to 0.

The network predicts the noise ε, not the clean latents (Ho, Jain, Abbeel 2020, arXiv 2006.11239,
eq. 14): ε has unit variance at every t, so one loss fits all times, and predicting zero costs
exactly 1. Everything here is fp32: in bf16, t = 0.999 and t = 1 are the same number.

To train another prediction, change PREDICTION, `target`, which the loop uses, and its inverse
`predicted_noise`, which the held-out loss and the sampler use. What was trained is recorded in the
result, and nothing here samples a prior that was trained for something else.
"""

import dataclasses
import math

import torch

S = 0.008  # offset of the schedule; without it the noise near t = 0 would be too small to matter
# The image encoder's outputs have a standard deviation of about 42 (measured: 53), and diffusion
# wants about 1, because the noise has 1.
LATENT_SCALE, LATENT_SHIFT = 42.0, 1.0


def scale_latents(encoded):
    """From the image encoder's output to what the prior works on: z = (x + 1) / 42."""
    return (encoded + LATENT_SHIFT) / LATENT_SCALE


def unscale_latents(latents):
    """The inverse, which the decoder takes: x = 42·z − 1."""
    return latents * LATENT_SCALE - LATENT_SHIFT


def alpha_bar(t):
    """ᾱ(t) = cos²((t+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2), within [1e-4, 0.9999]. t: (B,) fp32."""
    start = math.cos(S / (1 + S) * math.pi / 2) ** 2
    return (torch.cos((t + S) / (1 + S) * math.pi / 2) ** 2 / start).clamp(1e-4, 0.9999)


def per_sample(values, like):
    """(B,) → (B, 1, 1, 1), to broadcast against latents."""
    return values.view(-1, *[1] * (like.dim() - 1))


# ---- The objective: which times, what is predicted, how much an error counts.

PREDICTION = "epsilon"  # by the names of diffusers' schedulers: "v_prediction", "sample", …


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which times are trained, and how much a sample's error counts. The settings of these names.

    minwurst/README.md shows the weights and the densities.
    """

    loss_weighting: str = "none"
    snr_gamma: float = 5.0
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def timesteps(self, uniform):
        """Timesteps (B,) from uniform numbers (B,).

        "uniform": t = U. "wuerstchen": the authors' t = 1.08·(1 − U) + 0.001, within [0.001, 1],
        which makes one sample in 13 pure noise, where sampling starts. "logit_normal": the logit of
        t is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1), which favors the middle.
        """
        if self.timestep_sampling == "wuerstchen":
            return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)
        if self.timestep_sampling == "logit_normal":
            normal = torch.special.ndtri(uniform)  # the inverse of its cumulative distribution
            return (self.logit_mean + self.logit_std * normal).sigmoid()
        assert self.timestep_sampling == "uniform", self.timestep_sampling
        return uniform

    def loss_weight(self, t):
        """The weight of a sample's squared error, (B,), at most 1.

        All but "none" lower the weight of nearly clean latents, where little is left to learn.
        "p2": 1/(1+SNR), here 1 − ᾱ (Choi et al. 2022, arXiv 2204.00227, with k = γ = 1).
        "min_snr": min(SNR, γ)/SNR (Hang et al. 2023, arXiv 2303.09556). "soft_min_snr":
        1/(1+SNR/γ), the same without a corner (Crowson et al. 2024, arXiv 2401.11605).
        """
        signal = alpha_bar(t)
        snr = signal / (1 - signal)
        if self.loss_weighting == "p2":
            return 1 - signal
        if self.loss_weighting == "min_snr":
            return (self.snr_gamma / snr).clamp(max=1)
        if self.loss_weighting == "soft_min_snr":
            return 1 / (1 + snr / self.snr_gamma)
        assert self.loss_weighting == "none", self.loss_weighting
        return torch.ones_like(t)


def add_noise(latents, noise, t):
    """q(x_t | x_0) in closed form: √ᾱ·x + √(1−ᾱ)·ε (DDPM, eq. 4). Shapes stay."""
    signal = per_sample(alpha_bar(t), latents)                                     # (B, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def target(latents, noise, t):
    """What the network learns to predict."""
    return noise


def predicted_noise(output, noisy, t):
    """The noise that follows from the network's output, in fp32."""
    return output.float()


# ---- Sampling: the process backward.


def reverse_step(x, noise, t, t_next, z):
    """From x at time t to a sample at the earlier time t_next (DDPM, eq. 7 and 11, any distance).

    x, noise (predicted), z (fresh standard normal noise): (B, 16, H, W). t, t_next: (B,) fp32. The
    last step, to t_next = 0, adds no noise.
    """
    now, after = per_sample(alpha_bar(t), x), per_sample(alpha_bar(t_next), x)
    alpha = now / after                                           # what this one step keeps of x
    mean = (x - (1 - alpha) / (1 - now).sqrt() * noise) / alpha.sqrt()
    spread = ((1 - alpha) * (1 - after) / (1 - now)).sqrt()
    return mean + spread * z * per_sample((t_next != 0).float(), x)


def prior_times():
    """The 30 times that sampling Stage C visits, (30,): 20 in the noisiest third, 10 more to 0.

    An image's composition is settled early, which is why the authors take small steps there. The
    published pipelines call these times DEFAULT_STAGE_C_TIMESTEPS.
    """
    noisiest = torch.linspace(1, 2 / 3, 20, dtype=torch.float64)
    rest = torch.linspace(2 / 3, 0, 11, dtype=torch.float64)
    return torch.cat([noisiest, rest[1:]]).float()


def stage_b_times():
    """The 13 times that sampling Stage B visits, evenly spaced."""
    return torch.linspace(1, 0, 13)


@torch.no_grad()
def sample(predict_noise, noise, times):
    """Walk from noise at t = 1 to a sample at t = 0, in fp32, with Stage C or Stage B.

    predict_noise(x, t): x (B, …) at times t (B,) → the noise in x. noise: (T, B, …) fp32, the start
    and then the fresh noise of each step (the last is not used). times: (T,) fp32, from 1 to 0.
    """
    x, times = noise[0], times.to(noise.device)
    for t, t_next, z in zip(times[:-1], times[1:], noise[1:], strict=True):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))                          # (B,)
        x = reverse_step(x, predict_noise(x, t).float(), t, t_next, z)
    return x


def guided(prior, condition, guidance=4.0):
    """What `sample` takes as predict_noise for the prior with classifier-free guidance.

    prior(x, t, **condition). condition: {name: (2B, …)}, the rows of B prompts followed by those of
    B empty captions. guidance: 1 follows the prompt as trained; above 1 exaggerates the difference
    that the prompt makes (Ho, Salimans 2022, arXiv 2207.12598, eq. 6 with w = guidance − 1).
    """

    def predict_noise(x, t):
        both, twice = torch.cat([x, x]), torch.cat([t, t])                # (2B, 16, H, W), (2B,)
        with_text, without = predicted_noise(prior(both, twice, **condition), both, twice).chunk(2)
        return without + guidance * (with_text - without)

    return predict_noise
