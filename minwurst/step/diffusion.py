"""The diffusion process of Würstchen's Stage C and its objective, forward and backward.

    objective = objective_of(prior.config)
    noisy = objective.add_noise(latents, noise, t)          # what the loop trains on
    error = (prior(noisy, t, **condition) - objective.target(latents, noise, t)).square()
    latents = sample(guided(prior, condition), noise, objective.times(), objective.reverse_step)

Time runs from t = 0, the clean latents, to t = 1, pure noise. ᾱ(t) is the fraction of the signal's
variance that is left at t (Nichol, Dhariwal 2021, arXiv 2102.09672, eq. 17), and ᾱ/(1−ᾱ) is the
signal-to-noise ratio (SNR). Training draws t at random; sampling walks from 1 to 0.

The published network predicts the noise ε, not the clean latents (Ho, Jain, Abbeel 2020, arXiv
2006.11239, eq. 14): ε has unit variance at every t, so one loss fits all times, and predicting zero
costs exactly 1. Everything here is fp32: in bf16, t = 0.999 and t = 1 are the same number.

To train another prediction on the same schedule, change `prediction`, `target` and its inverse
`predicted_noise` in Objective; for another process, write a class like Flow. What was trained is
recorded in the prior's config, and nothing here samples a prior that predicts something else.
"""

import dataclasses
import math

import torch

from minwurst.base.errors import UserError

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


def add_noise(latents, noise, t):
    """q(x_t | x_0) in closed form: √ᾱ·x + √(1−ᾱ)·ε (DDPM, eq. 4). Shapes stay."""
    signal = per_sample(alpha_bar(t), latents)                                     # (B, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


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


# ---- The objective: which times, what is predicted, how much an error counts, and the way back.


@dataclasses.dataclass(frozen=True)
class Objective:
    """The published prior's: it predicts the noise. The fields are the settings of these names.

    minwurst/README.md shows the weights and the densities.
    """

    prediction = "epsilon"  # by the names of diffusers' schedulers

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

    def add_noise(self, latents, noise, t):
        """The noisy latents that the network sees."""
        return add_noise(latents, noise, t)

    def target(self, latents, noise, t):
        """What the network learns to predict."""
        return noise

    def predicted_noise(self, output, noisy, t):
        """The noise that follows from the network's output, in fp32."""
        return output.float()

    def reverse_step(self, x, output, t, t_next, z):
        """One step of sampling, from the network's output for x at t."""
        return reverse_step(x, self.predicted_noise(output, x, t), t, t_next, z)

    def times(self):
        """The times that sampling visits, (30,)."""
        return prior_times()

    def same_snr(self, t):
        """The times of this process with the SNR that Würstchen's schedule has at t."""
        return t


class Flow(Objective):
    """Rectified flow (Liu, Gong, Liu 2022, arXiv 2209.03003), for priors trained from scratch.

    Noise is mixed in along a straight line, x_t = (1−t)·x + t·ε. The network predicts the line's
    direction ε − x, and sampling follows it backward in Euler steps.
    """

    prediction = "flow_prediction"

    def add_noise(self, latents, noise, t):
        t = per_sample(t, latents)
        return (1 - t) * latents + t * noise

    def target(self, latents, noise, t):
        return noise - latents

    def predicted_noise(self, output, noisy, t):
        return noisy + (1 - per_sample(t, noisy)) * output.float()

    def reverse_step(self, x, output, t, t_next, z):
        return x + per_sample(t_next - t, x) * output

    def times(self):
        return torch.linspace(1, 0, 30)

    def same_snr(self, t):
        signal = alpha_bar(t)
        return (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())


OBJECTIVES = {kind.prediction: kind for kind in (Objective, Flow)}


def objective_of(config, **options):
    """The objective of a prior by its config. options: fields of Objective."""
    kind = OBJECTIVES[config.get("prediction_type", Objective.prediction)]
    if kind is Flow and options.get("loss_weighting", "none") != "none":
        raise UserError("--loss_weighting is for priors that predict the noise, not for flows.")
    return kind(**options)


# ---- Sampling: the process backward.


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
def sample(predict, noise, times, step=reverse_step):
    """Walk from noise at t = 1 to a sample at t = 0, in fp32, with Stage C or Stage B.

    predict(x, t): the network's output for x (B, …) at times t (B,). noise: (T, B, …) fp32, the
    start and then the fresh noise of each step (the last is not used). times: (T,) fp32, from 1 to
    0. step: an objective's reverse_step; Stage B, which predicts the noise, has the default.
    """
    x, times = noise[0], times.to(noise.device)
    for t, t_next, z in zip(times[:-1], times[1:], noise[1:], strict=True):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))                          # (B,)
        x = step(x, predict(x, t).float(), t, t_next, z)
    return x


def guided(prior, condition, guidance=4.0):
    """What `sample` takes as `predict` for the prior with classifier-free guidance.

    prior(x, t, **condition). condition: {name: (2B, …)}, the rows of B prompts followed by those of
    B empty captions. guidance: 1 follows the prompt as trained; above 1 exaggerates the difference
    that the prompt makes (Ho, Salimans 2022, arXiv 2207.12598, eq. 6 with w = guidance − 1).
    """

    def predict(x, t):
        if guidance == 1:  # the part without a caption would cancel
            return prior(x, t, **{name: part[: len(x)] for name, part in condition.items()})
        both, twice = torch.cat([x, x]), torch.cat([t, t])                # (2B, 16, H, W), (2B,)
        with_text, without = prior(both, twice, **condition).float().chunk(2)
        return without + guidance * (with_text - without)

    return predict
