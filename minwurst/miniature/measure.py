"""What the miniature can do, in numbers beside their chance levels: before and after fine-tuning.

    python -m minwurst.miniature.measure sizes
    python -m minwurst.miniature.measure base
    python -m minwurst.miniature.measure demo --seeds 0 1 2            # before and after
    python -m minwurst.miniature.measure objectives --seeds 0 1 2      # with two objectives
    python -m minwurst.miniature.measure reconstructions [--work WORK]

All prompts are names outside the fine-tuning set. Generated latents are measured by

    style    the fraction that a classifier calls black and white. It is linear, and fitted to the
             two styles of names that are neither fine-tuned on nor generated here
    own      the fraction whose own image, in the style given, is among the five nearest of all
             1,015 images of that style; and of the 64 that were asked for
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minwurst.base.console import progress
from minwurst.base.parser import Parser
from minwurst.base.settings import Settings
from minwurst.edge import dataset, lora_file, models
from minwurst.edge.decoders import FullDecoder
from minwurst.edge.grids import grid
from minwurst.miniature import IMAGES, WEIGHTS
from minwurst.miniature.world import SHIPPED, STYLES, read_world
from minwurst.step import diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.images import open_image, preprocess

GENERATED, NEAREST = 64, 5
OWN = f"own among the {NEAREST} nearest of 1,015 | … of the {GENERATED}"
OBJECTIVES = {
    "diffusers' script": (),
    "the authors'": (
        "--loss_weighting=p2", "--timestep_sampling=wuerstchen", "--caption_dropout=0.05",
    ),
}  # fmt: skip


class World:
    """The names and their latents in both styles, and which names are used for what."""

    def __init__(self):
        self.names, self.latents = read_world()
        others = [n for n in range(len(self.names)) if n not in range(len(self.names))[SHIPPED]]
        every = len(others) // GENERATED
        self.generated = others[::every][:GENERATED]
        self.classifier = self.fit([n for n in others if n not in self.generated])

    def fit(self, rows):
        """Ridge regression of ±1 on the 576 numbers of a latent and a constant."""
        inputs = torch.cat([self.with_constant(self.latents[style][rows]) for style in STYLES])
        labels = torch.cat([-torch.ones(len(rows)), torch.ones(len(rows))]).double()
        squares = inputs.T @ inputs
        ridge = 0.1 * squares.trace() / len(squares) * torch.eye(len(squares)).double()
        return torch.linalg.solve(squares + ridge, inputs.T @ labels)

    @staticmethod
    def with_constant(latents):
        return torch.nn.functional.pad(latents.flatten(1).double(), (0, 1), value=1.0)

    def style(self, latents):
        """The fraction of latents (N, 16, 6, 6) that are black and white rather than 3D."""
        return (self.with_constant(latents) @ self.classifier > 0).double().mean().item()

    def own(self, latents, rows, style):
        """The fractions of latents (N, 16, 6, 6) with their own row among the NEAREST of all rows,
        and of `rows`.
        """
        everyone = self.latents[style].flatten(1)                                  # (1015, 576)
        distances = torch.cdist(latents.flatten(1), everyone)                      # (N, 1015)
        own = distances[range(len(rows)), rows][:, None]
        ranks = ((distances < own).sum(dim=1), (distances[:, rows] < own).sum(dim=1))
        return [(rank < NEAREST).double().mean().item() for rank in ranks]

    def chances(self):
        """What `own` would be for latents unrelated to their names."""
        return [NEAREST / len(self.names), NEAREST / len(self.generated)]


def load_prior(run=None):
    """The miniature's prior, or that of `run`, an output folder of train.py or lora.py."""
    if run is None or (run / lora_file.FILE).is_file():
        prior = models.load_prior(WEIGHTS)
        return (prior if run is None else lora_file.load(prior, run)).eval()
    return models.load_prior(run / "prior_pipeline").eval()


@torch.no_grad()
def generate(prior, names, guidance, seed):
    """One image's latents per name, (N, 16, 6, 6)."""
    states = encode_text(*models.load_text(WEIGHTS, torch.float32), [*names, ""])
    empty = states[-1:].expand(len(names), -1, -1)
    noise = [
        randomness.sampling_noise(seed, randomness.image_key(name, 0), (16, 6, 6)) for name in names
    ]
    predict = diffusion.guided(prior, {"text": torch.cat([states[:-1], empty])}, guidance)
    objective = diffusion.objective_of(prior.config)
    return diffusion.sample(
        predict, torch.cat(noise, dim=1), objective.times(), objective.reverse_step
    )


@torch.no_grad()
def unseen_loss(prior, world):
    """The plain squared error on black-and-white images outside the fine-tuning set.

    For any objective: fixed noise, one time in each quarter of [0, 1].
    """
    clean = world.latents["outlined"][world.generated]
    captions = [world.names[number] for number in world.generated]
    text = encode_text(*models.load_text(WEIGHTS, torch.float32), captions)
    noise = randomness.noise(0, world.generated, clean.shape[1:])
    uniform, errors = randomness.uniform(0, world.generated), []
    objective = diffusion.objective_of(prior.config)
    for quarter in range(4):
        t = objective.same_snr((quarter + uniform) / 4)
        noisy = objective.add_noise(clean, noise, t)
        predicted = objective.predicted_noise(prior(noisy, t, text), noisy, t)
        errors.append((predicted - noise).square().mean().item())
    return sum(errors) / 4


def evaluate(prior, world, style, seed, guidance=4.0):
    """(fraction in black and white, the two fractions of World.own, loss on the unseen)."""
    names = [world.names[number] for number in world.generated]
    latents, loss = generate(prior, names, guidance, seed), unseen_loss(prior, world)
    return world.style(latents), *world.own(latents, world.generated, style), loss


def sizes():
    """Print the parts with their parameters and outputs."""
    decoder = FullDecoder(WEIGHTS / "decoder", torch.device("cpu"))
    tokenizer, text_encoder = models.load_text(WEIGHTS, torch.float32)
    states = f"{tokenizer.model_max_length} × {text_encoder.config.hidden_size}"
    image_encoder = models.load_image_encoder(WEIGHTS / "image_encoder")
    parts = (
        ("text encoder", text_encoder, states),
        ("Stage C, the prior", load_prior(), "16×6×6"),
        ("Stage B", decoder.stage_b, "4×64×64"),
        ("Stage A", decoder.stage_a, "3×256×256"),
        ("image encoder (training only)", image_encoder, "16×6×6"),
    )
    print("| part | parameters | output |")
    print("|---|---|---|")
    for name, part, out in parts:
        print(f"| {name} | {sum(weight.numel() for weight in part.parameters()):,} | {out} |")


def base(world):
    """Print how well the base generates the names of its world."""
    real = [world.style(world.latents[style][world.generated]) for style in STYLES]
    print(
        f"The classifier calls {real[0]:.1%} of {GENERATED} real images in 3D black and white, and "
        f"{real[1]:.1%} of those that are.\n"
    )
    print(f"| the base, {GENERATED} names, 3 seeds | {OWN} |")
    print("|---|---|---|")
    prior = load_prior()
    for label, guidance in (("without guidance", 1.0), ("guidance 4", 4.0)):
        results = [evaluate(prior, world, "solid", seed, guidance)[1:3] for seed in range(3)]
        print(f"| {label} | " + " | ".join(map(spread, zip(*results, strict=True))) + " |")
    print("| chance | " + " | ".join(f"{chance:.1%}" for chance in world.chances()) + " |")


def spread(fractions):
    """Mean, lowest and highest of some fractions."""
    return f"{np.mean(fractions):.1%} ({min(fractions):.1%} to {max(fractions):.1%})"


def fine_tune(script, folder, *flags):
    """Run a script's --demo without validation images, and return its output folder."""
    words = ["--demo", "--validation_prompts", "--report_to=none", f"--output_dir={folder}", *flags]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return folder


def demo(world, seeds, objectives):
    """Print before and after for each script and objective: mean, lowest and highest over seeds."""
    head = f"{GENERATED} names, seeds {', '.join(map(str, seeds))} | objective | black and white"
    print(f"| {head} | {OWN} | loss |")
    print("|---|---|---|---|---|---|")
    before = [evaluate(load_prior(), world, "outlined", seed) for seed in seeds]
    print(row("before", "", before))
    with tempfile.TemporaryDirectory() as work:
        for script in ("train.py", "lora.py"):
            for name, flags in objectives.items():
                after = []
                for seed in seeds:
                    folder = Path(work) / f"{script}-{len(flags)}-{seed}"
                    prior = load_prior(fine_tune(script, folder, f"--seed={seed}", *flags))
                    after.append(evaluate(prior, world, "outlined", seed))
                print(row(f"`{script} --demo`", name, after), flush=True)
    print("| chance | | | " + " | ".join(f"{chance:.1%}" for chance in world.chances()) + " | |")


def row(label, objective, results):
    *fractions, losses = zip(*results, strict=True)
    loss = f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
    return f"| {label} | {objective} | {' | '.join(map(spread, fractions))} | {loss} |"


def reconstructions(world, work):
    """Print how Stages B and A reconstruct real images, and write some side by side."""
    numbers = {"outlined": list(range(len(world.names))[SHIPPED])}
    table = dataset.find(Settings(train_data_dir=str(IMAGES)))
    rows = dict(zip(table["text"], table, strict=True))
    shipped = [open_image(rows[world.names[number]]) for number in numbers["outlined"]]
    originals = {"outlined": shipped}
    if work:
        from minwurst.miniature.emoji import load_images

        solid = load_images(work)[1].permute(0, 2, 3, 1).numpy()
        numbers["solid"] = list(range(len(world.names)))
        originals["solid"] = [Image.fromarray(pixels) for pixels in solid]
    encoder = models.load_image_encoder(WEIGHTS / "image_encoder")
    decode = FullDecoder(WEIGHTS / "decoder", torch.device("cpu"))
    print("| style | images | PSNR | decoded and encoded again, own is nearest | chance |")
    print("|---|---|---|---|---|")
    for style, known in numbers.items():
        some = range(0, len(known), max(1, len(known) // GENERATED))[:GENERATED]
        shown, again, ratios = [], [], []
        for index in progress(some, style):
            original = originals[style][index]
            latents = world.latents[style][known[index]][None]
            decoded = decode(latents, "", torch.Generator().manual_seed(index))
            errors = np.asarray(decoded, dtype=np.float64) - np.asarray(original)
            ratios.append(10 * np.log10(255**2 / np.square(errors).mean()))
            with torch.no_grad():
                again.append(encoder(preprocess(decoded, 192)[None]))
            shown += [original, decoded]
        again = diffusion.scale_latents(torch.cat(again))
        everyone = torch.cat([world.latents[s] for s in STYLES]).flatten(1)
        nearest = torch.cdist(again.flatten(1), everyone).argmin(dim=1)
        offset = STYLES.index(style) * len(world.names)
        hits = (nearest == torch.tensor([offset + known[index] for index in some])).double()
        print(f"| {style} | {len(some)} | {np.mean(ratios):.1f} dB | {hits.mean():.1%} | "
              f"{1 / len(everyone):.2%} |")
        grid(shown[:48], [""] * 48, columns=8).save(f"reconstructions-{style}.png")


def main():
    parser = Parser(prog="python -m minwurst.miniature.measure")
    what = ("sizes", "base", "demo", "objectives", "reconstructions")
    parser.add_argument("what", choices=what, help="see the top of measure.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="pretrain's folder, to include images in 3D")
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
