"""Answers to exercises.py. Each is a few lines; the comments answer the predictions."""

import math

import torch
from torch import nn

from minwurst.step.diffusion import alpha_bar, per_sample


def ddim(x, noise, t, t_next):
    # With exact noise, no: every step lands on the curve √ᾱ·x₀ + √(1−ᾱ)·ε of the same x₀ and ε.
    now, after = per_sample(alpha_bar(t), x), per_sample(alpha_bar(t_next), x)
    clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
    return after.sqrt() * clean + (1 - after).sqrt() * noise


def noise_in_bf16(prior, noisy, t, text):
    # 128: bf16 has 7 bits after the leading one. The embedding multiplies t by 10,000, so a
    # rounding of 0.002 turns the fastest sine by 20 radians. t stays in fp32.
    prior = prior.bfloat16()
    return prior(noisy.bfloat16(), t, text.bfloat16()).float()


def flags_that_survive():
    # All of them: the checkpoint has weights, optimizer and average, and whatever is random in
    # step 3 follows from the seed and the positions of its samples.
    return ["--checkpointing_steps=2", "--resume_from_checkpoint=latest"]


def noise_from_v(v, x, t):
    # (x, v) is (x₀, ε) rotated, and this rotates back. At t = 1 it is x, and at t = 0 it is v.
    signal = per_sample(alpha_bar(t), x)
    return signal.sqrt() * v + (1 - signal).sqrt() * x


def initialise(adapter):
    # The gradient of A has the factor B and that of B the factor A. With both at zero nothing ever
    # moves; with B alone at zero, A's gradient is zero in the first step and B's is not.
    nn.init.kaiming_uniform_(adapter.lora_A, a=math.sqrt(5))
    nn.init.zeros_(adapter.lora_B)


def lora_parameters(layers, rank):
    # Twice as many, while the model itself gets four times as many.
    return sum(rank * (inputs + outputs) for inputs, outputs in layers)


def guided_noise(prior, x, t, text, empty, guidance):
    # On one thread hardly, as the arithmetic is the same. On a large GPU that one image does not
    # fill, nearly twice.
    both = prior(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, empty]))
    with_text, without = both.chunk(2)
    return without + guidance * (with_text - without)


def p2_weight(snr):
    # At SNR 1, where signal and noise have the same variance: just below t = 0.5.
    return 1 / (1 + snr)
