"""The panels that only sample: what happens to one image, in Würstchen's own order.

`m` is a Bench. The lines of a panel stand on the page above what they printed and yielded.
"""

import torch

from minwurst.edge.curves import curves
from minwurst.objectives import densities, weights
from minwurst.step import diffusion
from minwurst.step.encoders import encode_text
from minwurst.step.images import unnormalise
from minwurst.tour.figures import gray, maps, pair, picture


def three_stages(m):
    """One emoji through all three stages

    The image encoder turns pixels into the prior's latents, which is what training sees. Stage B, a
    diffusion model of its own, turns those into the latents of Stage A, and Stage A into pixels.
    Stage C, the prior, takes the image encoder's place when there is only a caption.
    """
    x = diffusion.scale_latents(m.image_encoder(m.pixels))
    decode = m.generate.decode
    effnet, text = diffusion.unscale_latents(x), encode_text(*m.decoder_text, [""])
    side, times = int(m.side * decode.scale), diffusion.stage_b_times()
    noise = torch.randn(len(times), 1, 4, side, side, generator=torch.Generator().manual_seed(0))
    y = diffusion.sample(lambda y, t: decode.stage_b(y, t, effnet, text), noise, times)
    decoded = decode.stage_a.decode(y * decode.stage_a.config.scale_factor)
    parts = {"pixels": m.pixels, "prior's latents": x, "Stage B": y, "Stage A": decoded}
    for name, part in parts.items():
        print(f"{name}: {tuple(part.shape[1:])}, {part.numel():,} numbers")
    yield picture(unnormalise(m.pixels)), f"“{m.row['text']}”, as the encoder sees it"
    yield maps(x, columns=4), "the prior's latents, 16 channels"
    yield maps(y, columns=2), "Stage B's latents, 4 channels"
    yield picture(decoded), "decoded by Stage A"


def sixteen_channels(m):
    """The 16 channels

    A latent is a grid of 16 numbers per cell. Each channel is shown beside the image decoded
    without it, that is, with the channel's mean in every cell. Few channels have a meaning that a
    person would name; colors and outlines are spread over many.
    """
    for number in range(m.latents.shape[1]):
        without = m.latents.clone()
        without[:, number] = without[:, number].mean()
        difference = (without - m.latents).square().mean()
        shown = gray(m.latents[0, number], bound=m.latents.abs().max())
        yield pair(shown, m.decode(without)), f"{number}, and without it"
        print(f"channel {number}: {difference / m.latents.square().mean():.1%} of the squares")


def noise_added(m):
    """Noise, a little and a lot

    Training adds noise in one step, whatever t: √ᾱ of the latents and √(1−ᾱ) of normal noise. The
    decoder gets what the prior gets. At t = 1 nothing of the image is left, and its variance is 1.
    """
    for t in (0, 0.25, 0.5, 0.75, 1):
        time = torch.tensor([float(t)])
        noisy = diffusion.add_noise(m.latents, m.noise(m.prompts[0])[0], time)
        signal, deviation = diffusion.alpha_bar(time).item(), noisy.std().item()
        print(f"t = {t:g}: ᾱ = {signal:.4f}, standard deviation {deviation:.2f}")
        yield m.decode(noisy), f"t = {t:g}"


def way_back(m):
    """The way back, and what the network believes

    Sampling visits 30 times from 1 to 0. At each, the network's noise ε implies a clean image,
    x̂ = (x − √(1−ᾱ)·ε)/√ᾱ. The first belief is an average over what the caption allows; layout comes
    early, details late. Left: the latents on their way; right: the belief at the same time.
    """
    visited, predict = [], m.guided(m.prompts[0])

    def step(x, noise, t, t_next, z):
        signal = diffusion.per_sample(diffusion.alpha_bar(t), x)
        visited.append((t.item(), x, (x - (1 - signal).sqrt() * noise) / signal.sqrt()))
        return m.objective.reverse_step(x, noise, t, t_next, z)

    x = diffusion.sample(predict, m.noise(m.prompts[0]), m.objective.times(), step)
    visited.append((0.0, x, x))
    for number in (1, 5, 10, 20, 30):
        t, x, belief = visited[number - 1]
        distance = (belief - visited[-1][1]).square().mean().sqrt()
        print(f"{number}: t = {t:.2f}, belief {distance:.3f} from the result")
        yield pair(m.decode(x), m.decode(belief)), f"{number}: t = {t:.2f}"


def schedule(m):
    """ᾱ, SNR, weights and densities

    All of it is a function of t alone, computed by step/diffusion.py. The SNR leaves the chart on
    the left, where it reaches thousands. p2 and min-SNR count nearly clean latents less;
    the authors' density visits pure noise often, since sampling starts there.
    """
    t = torch.linspace(0, 1, 101)
    signal = diffusion.alpha_bar(t)
    snr = signal / (1 - signal)
    lines = {"ᾱ": zip(t.tolist(), signal.tolist(), strict=True)}
    lines["SNR"] = zip(t.tolist(), snr.clamp(max=10).tolist(), strict=True)
    for name, line in lines.items():
        yield curves([(name, {name: list(line)})]), name + (", cut off at 10" * (name == "SNR"))
    yield curves([("weight of an error, γ = 5", weights())]), "loss weights"
    yield curves([("density of t", densities())]), "densities of t"
    equal = t[(snr - 1).abs().argmin()].item()
    print(f"SNR at t = 0: {snr[0]:,.0f}; at t = 1: {snr[-1]:.4f}; equal to 1 near t = {equal:.2f}")


def guidance(m):
    """Guidance 1 to 8

    Guidance 1 follows the caption as trained. Above it, the difference that the caption makes is
    multiplied: more typical images with stronger contrast, and finally latents that no image has.
    """
    for prompt in m.prompts[:2]:
        for strength in (1, 2, 4, 8):
            x = m.generate.latents(prompt, size=m.side, guidance=strength)
            print(f"{prompt}, guidance {strength}: standard deviation {x.std().item():.2f}")
            yield m.decode(x), f"{prompt}: {strength}"


def caption_swapped(m):
    """A caption swapped midway

    The first caption is used while t is above a limit, and the second one below it. How late can
    the second still replace what the first began? A model that knows its few images well finds the
    way to one of them from far away.
    """
    first, second = m.guided(m.prompts[0]), m.guided(m.prompts[2])
    for limit in (1, 0.5, 0.4, 0.3, 0.2, 0):

        def predict(x, t, limit=limit):
            return first(x, t) if t[0] > limit else second(x, t)

        noise, times = m.noise(m.prompts[0]), m.objective.times()
        x = diffusion.sample(predict, noise, times, m.objective.reverse_step)
        print(f"limit {limit:g}: {(times > limit).sum()} of {len(times)} times with the first")
        yield m.decode(x), f"{m.prompts[0]} → {m.prompts[2]}, at t = {limit:g}"


PANELS = (
    three_stages, sixteen_channels, noise_added, way_back, schedule, guidance, caption_swapped,
)  # fmt: skip
