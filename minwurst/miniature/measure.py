"""What the miniature can do, in numbers beside their chance levels: before and after fine-tuning.

    python -m minwurst.miniature.measure sizes
    python -m minwurst.miniature.measure base
    python -m minwurst.miniature.measure demo --seeds 0 1 2            # before and after
    python -m minwurst.miniature.measure objectives --seeds 0 1 2      # two objectives
    python -m minwurst.miniature.measure reconstructions [--work WORK]

All prompts are names outside the fine-tuning set. What is drawn is judged as latents:

    style    the share that a classifier calls black and white. It is a linear one, fitted to the
             two styles of names that are neither fine-tuned on nor drawn here
    own      the share whose own picture, in the style named, is among the five nearest of all
             1,015 pictures of the style; and of those 64 that were asked for
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minwurst import data, diffusion, draws, lora, models, pictures, pipelines, report
from minwurst.miniature import PICTURES, SHIPPED, WEIGHTS, read_world

DRAWN, NEAREST = 64, 5
OWN = f"own among the {NEAREST} nearest of 1,015 | … of the {DRAWN}"
OBJECTIVES = {
    "diffusers' script": (),
    "the authors'": (
        "--loss_weighting=p2", "--timestep_sampling=wuerstchen", "--caption_dropout=0.05",
    ),
}  # fmt: skip


class World:
    """The names and their latents in both styles, and which names serve what."""

    def __init__(self):
        self.names, self.latents = read_world()
        others = [n for n in range(len(self.names)) if n not in range(len(self.names))[SHIPPED]]
        every = len(others) // DRAWN
        self.drawn = others[::every][:DRAWN]
        self.weights = self.fit([n for n in others if n not in self.drawn])

    def fit(self, rows):
        """The classifier: ridge regression of ±1 on the 576 numbers of a latent and a constant."""
        inputs = torch.cat([self.with_one(self.latents[s][rows]) for s in ("solid", "outlined")])
        sides = torch.cat([-torch.ones(len(rows)), torch.ones(len(rows))]).double()
        squares = inputs.T @ inputs
        ridge = 0.1 * squares.trace() / len(squares) * torch.eye(len(squares)).double()
        return torch.linalg.solve(squares + ridge, inputs.T @ sides)

    @staticmethod
    def with_one(latents):
        return torch.nn.functional.pad(latents.flatten(1).double(), (0, 1), value=1.0)

    def style(self, latents):
        """The share of latents (N, 16, 6, 6) that are black and white rather than 3D."""
        return (self.with_one(latents) @ self.weights > 0).double().mean().item()

    def own(self, latents, rows, style):
        """Of latents (N, 16, 6, 6), the shares that have their own row's among the NEAREST of all
        rows, and of `rows`.
        """
        everyone = self.latents[style].flatten(1)                                  # (1015, 576)
        away = torch.cdist(latents.flatten(1), everyone)                           # (N, 1015)
        own = away[range(len(rows)), rows][:, None]
        places = ((away < own).sum(dim=1), (away[:, rows] < own).sum(dim=1))
        return [(place < NEAREST).double().mean().item() for place in places]

    def chances(self):
        """What `own` would be for latents that have nothing to do with their names."""
        return [NEAREST / len(self.names), NEAREST / len(self.drawn)]


def load_prior(run=None):
    """The miniature's prior, or with `run`, an output folder of train.py or lora.py, that one's."""
    if run is None or (run / lora.FILE).is_file():
        prior = models.load_prior(WEIGHTS)
        return (prior if run is None else lora.load(prior, run)).eval()
    return models.load_prior(run / "prior_pipeline").eval()


@torch.no_grad()
def draw(prior, names, guidance, seed):
    """One picture's latents a name, (N, 16, 6, 6)."""
    tokenizer, text_encoder = models.load_text(WEIGHTS, torch.float32)
    text = models.encode_text(tokenizer, text_encoder, [*names, ""])
    noises = [
        draws.sampling_noise(seed, draws.picture(name, 0), (16, 6, 6)) for name in names
    ]
    empty = text[-1:].expand(len(names), -1, -1)
    return diffusion.sample(prior, text[:-1], empty, torch.cat(noises, dim=1), guidance)


@torch.no_grad()
def unseen_loss(prior, world):
    """The plain squared error on black and white pictures outside the fine-tuning set.

    Whatever the objective was: fixed noise, one time in each quarter of [0, 1].
    """
    tokenizer, text_encoder = models.load_text(WEIGHTS, torch.float32)
    clean = world.latents["outlined"][world.drawn]
    text = models.encode_text(tokenizer, text_encoder, [world.names[n] for n in world.drawn])
    noise, uniform = draws.noise(0, world.drawn, clean.shape[1:]), draws.uniform(0, world.drawn)
    errors = []
    for quarter in range(4):
        t = (quarter + uniform) / 4
        predicted = prior(diffusion.add_noise(clean, noise, t), t, text)
        errors.append((predicted - noise).square().mean().item())
    return sum(errors) / 4


def judge(prior, world, style, seed, guidance=4.0):
    """(share in the new style, the two shares of World.own, loss on the unseen)."""
    latents = draw(prior, [world.names[n] for n in world.drawn], guidance, seed)
    return world.style(latents), *world.own(latents, world.drawn, style), unseen_loss(prior, world)


def sizes():
    """Print the parts with their parameters and what comes out of them."""
    decoder = pipelines.decoder_pipeline(WEIGHTS / "decoder", torch.float32)
    tokenizer, text_encoder = models.load_text(WEIGHTS, torch.float32)
    states = f"{tokenizer.model_max_length} × {text_encoder.config.hidden_size}"
    parts = (
        ("text encoder", text_encoder, states),
        ("Stage C, the prior", load_prior(), "16×6×6"),
        ("Stage B", decoder.decoder, "4×64×64"),
        ("Stage A", decoder.vqgan, "3×256×256"),
        ("image encoder (training only)", models.load_image_encoder(WEIGHTS / "image_encoder"),
         "16×6×6"),
    )  # fmt: skip
    print("| part | parameters | what comes out |")
    print("|---|---|---|")
    for name, part, out in parts:
        print(f"| {name} | {sum(weight.numel() for weight in part.parameters()):,} | {out} |")


def base(world):
    """Print what the base draws when asked for names of its world."""
    real = [world.style(world.latents[style][world.drawn]) for style in world.latents]
    print(
        f"The classifier calls {real[0]:.1%} of {DRAWN} real pictures in 3D black and white, and "
        f"{real[1]:.1%} of those that are.\n"
    )
    print(f"| the base, {DRAWN} names, 3 seeds | {OWN} |")
    print("|---|---|---|")
    prior = load_prior()
    for words, guidance in (("without guidance", 1.0), ("guidance 4", 4.0)):
        found = [judge(prior, world, "solid", seed, guidance)[1:3] for seed in range(3)]
        print(f"| {words} | " + " | ".join(map(spread, zip(*found, strict=True))) + " |")
    print("| chance | " + " | ".join(f"{chance:.1%}" for chance in world.chances()) + " |")


def spread(shares):
    """The mean of some shares, and between which they lie."""
    return f"{np.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def fine_tune(script, folder, *words):
    """Run a script's --demo without pictures; returns its output folder."""
    words = ["--demo", "--validation_prompts", "--report_to=none", f"--output_dir={folder}", *words]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return folder


def demo(world, seeds, objectives):
    """Print before and after, for each script and objective: mean over seeds, least and most."""
    head = f"{DRAWN} names, seeds {', '.join(map(str, seeds))} | objective | black and white"
    print(f"| {head} | {OWN} | loss |")
    print("|---|---|---|---|---|---|")
    before = [judge(load_prior(), world, "outlined", seed) for seed in seeds]
    print(row("before", "", before))
    with tempfile.TemporaryDirectory() as place:
        for script in ("train.py", "lora.py"):
            for name, flags in objectives.items():
                after = []
                for seed in seeds:
                    folder = Path(place) / f"{script}-{len(flags)}-{seed}"
                    prior = load_prior(fine_tune(script, folder, f"--seed={seed}", *flags))
                    after.append(judge(prior, world, "outlined", seed))
                print(row(f"`{script} --demo`", name, after), flush=True)
    print("| chance | | | " + " | ".join(f"{chance:.1%}" for chance in world.chances()) + " | |")


def row(label, objective, found):
    *shares, losses = zip(*found, strict=True)
    loss = f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
    return f"| {label} | {objective} | {' | '.join(map(spread, shares))} | {loss} |"


def reconstructions(world, work):
    """Print what Stages B and A make of real pictures' latents, and write some side by side."""
    rows = {"outlined": list(range(len(world.names))[SHIPPED])}
    found = data.open_rows(None, None, str(PICTURES), "image", "text")
    files = dict(zip(found["text"], found, strict=True))
    shipped = [data.open_picture(files[world.names[number]]) for number in rows["outlined"]]
    originals = {"outlined": shipped}
    if work:
        from minwurst.miniature import pretrain

        solid = pretrain.load_pictures(work)[1].permute(0, 2, 3, 1).numpy()
        rows["solid"] = list(range(len(world.names)))
        originals["solid"] = [Image.fromarray(pixels) for pixels in solid]
    encoder = models.load_image_encoder(WEIGHTS / "image_encoder")
    decode = pictures.FullDecoder(WEIGHTS / "decoder", torch.device("cpu"))
    print("| style | pictures | PSNR | decoded and encoded again, own is nearest | chance |")
    print("|---|---|---|---|---|")
    for style, numbers in rows.items():
        some = range(0, len(numbers), max(1, len(numbers) // DRAWN))[:DRAWN]
        shown, again, ratios = [], [], []
        for place in report.progress(some, style):
            original = originals[style][place]
            latents = world.latents[style][numbers[place]][None]
            decoded = decode(latents, "", torch.Generator().manual_seed(place))
            errors = np.asarray(decoded, dtype=np.float64) - np.asarray(original)
            ratios.append(10 * np.log10(255**2 / np.square(errors).mean()))
            with torch.no_grad():
                again.append(encoder(data.preprocess(decoded, 192)[None]))
            shown += [original, decoded]
        again = diffusion.scale_latents(torch.cat(again))
        everyone = torch.cat(list(world.latents.values())).flatten(1)
        nearest = torch.cdist(again.flatten(1), everyone).argmin(dim=1)
        offset = list(world.latents).index(style) * len(world.names)
        hits = (nearest == torch.tensor([offset + numbers[place] for place in some])).double()
        print(f"| {style} | {len(some)} | {np.mean(ratios):.1f} dB | {hits.mean():.1%} | "
              f"{1 / len(everyone):.2%} |")
        pictures.grid(shown[:48], [""] * 48, columns=8).save(f"reconstructions-{style}.png")


def main():
    """`python -m minwurst.miniature.measure`: see the top of this page."""
    parser = argparse.ArgumentParser(prog="python -m minwurst.miniature.measure")
    what = ("sizes", "base", "demo", "objectives", "reconstructions")
    parser.add_argument("what", choices=what, help="see the top of the module")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="pretrain's folder, for the pictures in 3D too")
    given = parser.parse_args()
    world = World()
    if given.what == "sizes":
        sizes()
    elif given.what == "base":
        base(world)
    elif given.what == "reconstructions":
        reconstructions(world, given.work)
    else:
        first = dict(list(OBJECTIVES.items())[:1])
        demo(world, given.seeds, OBJECTIVES if given.what == "objectives" else first)


if __name__ == "__main__":
    main()
