"""The diffusion process of Würstchen's Stage C, forward and backward. Time runs over [0, 1].

    noisy = add_noise(latents, noise, t)          # forward: what the loop trains on
    latents = sample(model, text, empty, noise)   # backward: from noise to a picture's latents

ᾱ(t) is the share of the signal that is left at time t (Nichol, Dhariwal 2021, arXiv 2102.09672,
eq. 17). The network predicts the noise (Ho, Jain, Abbeel 2020, arXiv 2006.11239, eq. 14).
Everything here is computed in fp32: in bf16, t = 0.999 and t = 1 are the same number.
"""

import math

import torch

S = 0.008  # without it the first noise near t = 0 would be too little to matter
LATENT_SCALE, LATENT_SHIFT = 42.0, 1.0


def scale_latents(encoded):
    """The image encoder's output as the prior knows it: z = (x + 1) / 42."""
    return (encoded + LATENT_SHIFT) / LATENT_SCALE


def unscale_latents(latents):
    """The inverse, as the decoder takes it: x = 42·z − 1."""
    return latents * LATENT_SCALE - LATENT_SHIFT


def alpha_bar(t):
    """ᾱ(t) = cos²((t+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2), within [1e-4, 0.9999]. t: (B,) fp32."""
    start = math.cos(S / (1 + S) * math.pi / 2) ** 2
    return (torch.cos((t + S) / (1 + S) * math.pi / 2) ** 2 / start).clamp(1e-4, 0.9999)


def per_sample(values, like):
    """(B,) → (B, 1, 1, 1), to stand beside latents."""
    return values.view(-1, *[1] * (like.dim() - 1))


def timesteps(uniform, sampling):
    """Timesteps (B,) from uniform draws (B,).

    "uniform": t = U. "wuerstchen": the authors' t = 1.08·(1 − U) + 0.001 kept within [0.001, 1]:
    one sample in 13 is pure noise, which is where sampling starts.
    """
    if sampling == "uniform":
        return uniform
    assert sampling == "wuerstchen", sampling
    return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)


def add_noise(latents, noise, t):
    """q(x_t | x_0) in closed form: √ᾱ·x + √(1−ᾱ)·ε (DDPM, eq. 4). Same shapes in and out."""
    signal = per_sample(alpha_bar(t), latents)                                     # (B, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def loss_weight(t, weighting):
    """The weight of a sample's error, (B,). "none": 1. "p2": 1/(1+SNR), which is 1 − ᾱ here.

    p2 (Choi et al. 2022, arXiv 2204.00227, k = γ = 1) takes weight from the nearly clean end, where
    little is left to learn.
    """
    if weighting == "none":
        return torch.ones_like(t)
    assert weighting == "p2", weighting
    return 1 - alpha_bar(t)


def reverse_step(x, predicted_noise, t, t_next, z):
    """From x at time t to a sample at the earlier time t_next (DDPM, eq. 7 and 11, any length).

    x, predicted_noise, z (fresh standard normal noise): (B, 16, H, W). t, t_next: (B,) fp32. The
    last step, to t_next = 0, adds no noise.
    """
    now, after = per_sample(alpha_bar(t), x), per_sample(alpha_bar(t_next), x)
    alpha = now / after                                           # what this one step keeps of x
    mean = (x - (1 - alpha) / (1 - now).sqrt() * predicted_noise) / alpha.sqrt()
    spread = ((1 - alpha) * (1 - after) / (1 - now)).sqrt()
    return mean + spread * z * per_sample((t_next != 0).float(), x)


def sampling_times():
    """The 30 times that sampling visits, (30,): 20 in the noisy third, the rest to 0 in strides.

    Würstchen's composition is settled early, so that is where its authors take small steps. The
    pipelines call these times DEFAULT_STAGE_C_TIMESTEPS.
    """
    noisy = torch.linspace(1, 2 / 3, 20, dtype=torch.float64)
    cleaner = torch.linspace(2 / 3, 0, 11, dtype=torch.float64)
    return torch.cat([noisy, cleaner[1:]]).float()


@torch.no_grad()
def sample(model, text, empty, noise, guidance=4.0):
    """Latents (B, 16, H, W) of new pictures, as the prior knows them, from noise at t = 1.

    model(x, t, text) predicts the noise. text, empty: the encoded prompts and empty captions,
    (B, L, D). noise: (30, B, 16, H, W) fp32, the start and then what each of the 29 steps draws
    (the last draw is not used). guidance: how far to go from what any picture would be towards what
    the prompt asks for, and beyond (Ho, Salimans 2022, arXiv 2207.12598, eq. 6 with w = guidance −
    1); at 1 there is none.
    """
    times = sampling_times().to(noise.device)                                        # (30,)
    captions = torch.cat([text, empty])                                              # (2B, L, D)
    x = noise[0]                                                                # (B, 16, H, W)
    for t, t_next, z in zip(times[:-1], times[1:], noise[1:], strict=True):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))                          # (B,)
        predicted = model(torch.cat([x, x]), torch.cat([t, t]), captions).float()
        with_text, without = predicted.chunk(2)
        x = reverse_step(x, without + guidance * (with_text - without), t, t_next, z)
    return x
