"""What the miniature can do, in numbers beside those of knowing nothing: before and after.

    python -m minwurst.miniature.measure sizes
    python -m minwurst.miniature.measure base
    python -m minwurst.miniature.measure demo                      # before and after, both styles
    python -m minwurst.miniature.measure objectives                # demo with several objectives
    python -m minwurst.miniature.measure race --learning_rate=1e-3     # any flags of train.py
    python -m minwurst.miniature.measure blind FILE --prior RUN    # images without captions

Generated latents of 64 names outside the fine-tuning set are compared with those of the names' real
images in the style that was asked for:

    R²       1 − error / (error of always answering the mean of the fine-tuning images): 1 is
             perfect, 0 is no better than knowing the style alone, below 0 is worse
    own      how often the name's own image is among the five nearest of all 1,015 of the style
    style    how often it is nearer to the name's image in this style than to that in 3D
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from minwurst.base.model_folder import own_parts
from minwurst.base.parser import Parser
from minwurst.edge import lora_file, models, run_file
from minwurst.edge.decoders import FullDecoder
from minwurst.edge.grids import grid
from minwurst.miniature import WEIGHTS, data_of, world
from minwurst.miniature.world import BASE, DEMO, HARD, SHIPPED, caption
from minwurst.run.validation import EvaluationModel
from minwurst.step import diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.optimizer import NoEMA

GENERATED, NEAREST, SECONDS = 64, 5, 60
GUIDANCE = own_parts(WEIGHTS)["guidance_scale"]
COLUMNS = "R² | own | style"
OBJECTIVES = {
    "none": (),
    "p2": ("--loss_weighting=p2",),
    "min-SNR 5": ("--loss_weighting=min_snr",),
    "soft min-SNR 5": ("--loss_weighting=soft_min_snr",),
    "logit-normal": ("--timestep_sampling=logit_normal",),
    "p2, authors' times": ("--loss_weighting=p2", "--timestep_sampling=wuerstchen"),
}
DROPOUT = "--caption_dropout=0.05"


class World:
    """The names, their latents by style, and which names are used for what."""

    def __init__(self):
        self.names, self.latents = world.read_world()
        self.shipped = list(range(len(self.names))[SHIPPED])
        lacking = torch.stack(list(self.latents.values())).isnan().flatten(2).any(dim=2).any(dim=0)
        unused = set(self.shipped) | set(lacking.nonzero()[:, 0].tolist())
        others = [n for n in range(len(self.names)) if n not in unused]
        self.generated = others[:: len(others) // GENERATED][:GENERATED]

    def captions(self, style, rows=None):
        return [caption(self.names[n], style) for n in rows or self.generated]

    def measure(self, latents, style):
        """(R², own, style) of the generated names' latents (N, 16, 6, 6)."""
        real, other = self.latents[style], self.latents[BASE[style == BASE[0]]]
        wanted, mean = real[self.generated], real[self.shipped].nanmean(dim=0)
        error, other_error, mean_error = (
            (one - two).square().sum(dim=(1, 2, 3))                                # (N,)
            for one, two in ((latents, wanted), (latents, other[self.generated]), (wanted, mean))
        )
        distances = torch.cdist(latents.flatten(1), real.nan_to_num(1e3).flatten(1))  # (N, 1015)
        own = distances[range(len(latents)), self.generated][:, None]
        found = ((distances < own).sum(dim=1) < NEAREST).double().mean()
        nearer = (error < other_error).double().mean()
        return 1 - (error.sum() / mean_error.sum()).item(), found.item(), nearer.item()


def load_prior(run=None):
    """The miniature's prior, or that of `run`, an output folder of train.py or lora.py."""
    is_lora = run and (run / lora_file.FILE).is_file()
    prior = models.load_prior(models.locate("prior", WEIGHTS if is_lora or not run else run))
    return (lora_file.load(prior, run) if is_lora else prior).eval()


def generate(prior, captions, seed, guidance=GUIDANCE):
    """One image's latents per caption, (N, 16, 6, 6)."""
    states = encode_text(*models.load_text(WEIGHTS, torch.float32), [*captions, ""])
    empty = states[-1:].expand(len(captions), -1, -1)
    keys = [randomness.image_key(text, 0) for text in captions]
    noise = [randomness.sampling_noise(seed, key, (16, 6, 6)) for key in keys]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
    with EvaluationModel(prior, NoEMA(), autocast).active():
        predict = diffusion.guided(prior, {"text": torch.cat([states[:-1], empty])}, guidance)
        objective = diffusion.objective_of(prior.config)
        return diffusion.sample(
            predict, torch.cat(noise, dim=1), objective.times(), objective.reverse_step
        )


def spread(values):
    """Mean, and lowest and highest if they differ."""
    lowest, highest = min(values), max(values)
    between = f" ({lowest:.3f} to {highest:.3f})" * (lowest != highest)
    return f"{np.mean(values):.3f}{between}"


def row(label, results):
    return f"| {label} | {' | '.join(spread(one) for one in zip(*results, strict=True))} |"


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


def base(known, seeds):
    """Print how well the base generates its styles, and what it makes of those it does not know."""
    print(f"| {GENERATED} names, {len(seeds)} seeds | {COLUMNS} |")
    print("|---|---|---|---|")
    prior, stronger = load_prior(), [(BASE[0], 2.0), (BASE[0], 4.0)]
    for style, guidance in [*((style, GUIDANCE) for style in BASE), *stronger]:
        captions = known.captions(style)
        drawn = [generate(prior, captions, seed, guidance) for seed in seeds]
        results = [known.measure(latents, style) for latents in drawn]
        print(row(f"{style}, guidance {guidance:g}", results), flush=True)


def fine_tune(script, folder, *flags):
    """Run a script's --demo without validation images, and return its output folder."""
    words = ["--demo", "--validation_prompts", "--report_to=none", f"--output_dir={folder}", *flags]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return folder


def tuned(known, style, script, seed, *flags):
    """(R², own, style, held-out loss or nan) after fine-tuning on a style."""
    with tempfile.TemporaryDirectory() as work:
        data = f"--train_data_dir={data_of(style)}", f"--seed={seed}"
        run = fine_tune(script, Path(work), *data, *flags)
        latents = generate(load_prior(run), known.captions(style), seed)
        return *known.measure(latents, style), held_out_loss(run)


def held_out_loss(run):
    """The last of a run's log; nan if it holds out nothing."""
    entries = [json.loads(line) for line in (run / "logs" / "log.jsonl").open()]
    return [math.nan, *(e["validation_loss"] for e in entries if "validation_loss" in e)][-1]


def demo(known, seeds):
    """Print before and after for both scripts and styles, over seeds of fine-tuning."""
    print(f"| {GENERATED} names, seeds {', '.join(map(str, seeds))} | {COLUMNS} |")
    print("|---|---|---|---|")
    for style in (DEMO, HARD):
        captions, before = known.captions(style), load_prior()
        results = [known.measure(generate(before, captions, seed), style) for seed in seeds]
        print(row(f"{style}: before", results))
        for script in ("train.py", "lora.py"):
            results = [tuned(known, style, script, seed)[:3] for seed in seeds]
            print(row(f"{style}: `{script}`", results), flush=True)


def objectives(known, seeds):
    """Print the same for objectives, with and without caption dropout; train.py, in bf16."""
    print(f"| {DEMO}, seeds {', '.join(map(str, seeds))} | {COLUMNS} | held-out loss |")
    print("|---|---|---|---|---|")
    for name, flags in OBJECTIVES.items():
        for label, dropout in (name, ()), (f"{name}, dropout", (DROPOUT,)):
            words = *flags, *dropout, "--validation_split=0.1", "--mixed_precision=bf16"
            results = [tuned(known, DEMO, "train.py", seed, *words) for seed in seeds]
            print(row(label, results), flush=True)


def race(known, flags):
    """Train with the flags for as many steps as fit in SECONDS of CPU time; print one row."""
    with tempfile.TemporaryDirectory() as work:

        def seconds(steps, name):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run = fine_tune("train.py", Path(work) / name, *flags, f"--max_train_steps={steps}",
                            "--validation_split=0.1", f"--cache_dir={work}/cache")  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return run, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        seconds(1, "cache")
        pace = (seconds(21, "long")[1] - seconds(1, "short")[1]) / 20
        run, _ = seconds(max(1, round(SECONDS / pace)), "race")
        commit = run_file.read(run)["starts"][-1]["commit"] or "unknown"
        r2, own, style = known.measure(generate(load_prior(run), known.captions(DEMO), 0), DEMO)
        steps, loss = round(SECONDS / pace), held_out_loss(run)
        print(f"| {r2:.3f} | {own:.2f} | {style:.2f} | {loss:.4f} | {steps} | "
              f"`{' '.join(flags)}` | {commit[:7]} |")  # fmt: skip


def blind(known, file, run, real):
    """Write 16 images of names outside the fine-tuning set without captions, and list them."""
    style, rows = DEMO, known.generated[::4]
    latents = known.latents[style][rows]
    if not real:
        latents = generate(load_prior(run), known.captions(style, rows), 0)
    decode = FullDecoder(WEIGHTS / "decoder", torch.device("cpu"))
    images = [decode(x[None], "", torch.Generator().manual_seed(n)) for n, x in enumerate(latents)]
    grid(images, [""] * len(images)).save(file)
    print("; ".join(known.names[n] for n in rows))


def main():
    parser = Parser(prog="python -m minwurst.miniature.measure")
    known = World()
    commands = {
        "sizes": sizes,
        "base": lambda: base(known, given.seeds),
        "demo": lambda: demo(known, given.seeds),
        "objectives": lambda: objectives(known, given.seeds),
        "race": lambda: race(known, flags),
        "blind": lambda: blind(known, given.file, given.prior, given.real),
    }
    parser.add_argument("what", choices=commands, help="see the top of measure.py")
    parser.add_argument("file", nargs="?", default="blind.png", help="for blind: the file to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prior", type=Path, help="for blind: a run's output folder")
    parser.add_argument("--real", action="store_true", help="for blind: the true latents, decoded")
    given, flags = parser.parse_known_args()
    if flags and given.what != "race":
        parser.error(f"unknown flags: {' '.join(flags)}")
    commands[given.what]()


if __name__ == "__main__":
    main()
