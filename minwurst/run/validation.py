"""Validation before, during and after training: images of prompts, and the loss on held-out rows.

    validate = Validation(run, data, source, EvaluationModel(prior, ema, autocast), log)
    validate(step)                           # if it is due at this step

The model is evaluated as its result will be used: averaged weights, no dropout. Validation has its
own random streams, so the trained weights are bit-identical with and without it. It comes after
saving, and what goes wrong in it (memory, disk, a decoder) is reported and costs no training.
"""

import contextlib
import json

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minwurst.base.console import gib, say
from minwurst.base.errors import UserError
from minwurst.base.ranks import is_main, rank, world_size
from minwurst.edge.decoders import FullDecoder, PreviewDecoder, announce_sizes, latent_shape
from minwurst.edge.files import replacing
from minwurst.edge.grids import BEFORE_AFTER, STRIPS, grid, stack, update_strips
from minwurst.run import checkpoint, result
from minwurst.run.sheet import write_sheet
from minwurst.step import diffusion, distributed, metrics, randomness
from minwurst.step.samples import batches

SHEET = "data.png"  # in a run's folder


class EvaluationModel:
    """The prior as its result will be used.

    with model.active():
        predicted = model(noisy, t, **condition)
    """

    def __init__(self, prior, ema, autocast):
        self.prior, self.ema, self.autocast = prior, ema, autocast

    @contextlib.contextmanager
    def active(self):
        """Use as a context manager: averaged weights, evaluation mode, no gradients."""
        training = self.prior.training
        with self.ema.in_place(), torch.no_grad():
            self.prior.eval()
            try:
                yield
            finally:
                self.prior.train(training)

    def __call__(self, x, t, **condition):
        with self.autocast:
            return self.prior(x, t, **condition)


class Validation:
    """Calls its validators when validation is due. All ranks must call it.

    A validator has two methods. measure(model) is this rank's part of the work, without waiting for
    other ranks; show(step, parts) is the main rank's, with the results of all. A file records the
    last step validated, so that a run killed between saving and validation catches up on it.
    """

    def __init__(self, run, data, source, model, log):
        self.run, self.model, self.log, self.validators = run, model, log, []
        self.source, self.training = source, source.samples(data, run)
        self.record = run.folder / "validation" / "last_step"
        if source.prompts:
            self.validators.append(GenerateImages(run, source, self.training, log))
        if len(data.held_out):
            self.validators.append(HeldOutLoss(run, source, source.held_out(data, run), log))

    def __call__(self, step):
        if not self.validators or not self.run.is_validation_due(step):
            return
        with self.log.paused():
            self.run.finish_saving()  # validators may fork
            done = [self.validate(validator, step) for validator in self.validators]
            if is_main():
                attempt(result.draw, self.run)
        if all(done) and is_main():
            attempt(self.write_record, step)

    def catch_up(self):
        """Before the first step: show the data, and validate the step the run starts from.

        Neither is repeated if it was done.
        """
        file = self.run.folder / SHEET
        if is_main() and not (self.run.checkpoint and file.is_file()):
            with self.log.paused():
                error = attempt(self.show_data, file)[1]
            reason = "" if self.decoder() else " (not decoded, without --validation_prompts)"
            say(f"{file} was not written: {error}" if error else f"data: {file}{reason}")
        if distributed.on_main(self.last_step) != self.run.step:
            self(self.run.step)

    def show_data(self, file):
        sheet = write_sheet(self.training, self.source, self.decoder(), file)
        self.log.image(self.run.step, "data", sheet)

    def decoder(self):
        """That of the validation images, or None."""
        return next((v.decode for v in self.validators if isinstance(v, GenerateImages)), None)

    def validate(self, validator, step):
        """Returns whether it succeeded; False is reported. Only the exchange waits for others."""
        with self.model.active():
            mine = attempt(validator.measure, self.model)
        parts = distributed.gather_objects(mine)
        errors = [error for _, error in parts if error]
        if not errors and is_main():
            errors = [attempt(validator.show, step, [part for part, _ in parts])[1]]
        if errors and errors[0]:
            say(f"validation at step {step} failed, training continues: {errors[0]}")
        return not any(errors)

    def last_step(self):
        """The last step validated; -1 in a fresh run."""
        try:
            if not self.run.checkpoint:
                self.record.unlink(missing_ok=True)  # of an earlier run
            return int(self.record.read_text())
        except (OSError, ValueError):
            return -1

    def write_record(self, step):
        self.record.parent.mkdir(exist_ok=True)
        with replacing(self.record) as draft:
            draft.write_text(f"{step}\n")


def attempt(function, *arguments):
    """(result, None), or (None, what went wrong in one line)."""
    try:
        return function(*arguments), None
    except Exception as error:  # anything may fail here, and none of it may stop training
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return None, " ".join(f"{kind}{error}".split())[:300]


class GenerateImages:
    """Generates one image per prompt, for `validation/step-000500.png` and the trackers.

    An image's noise depends only on the seed and its prompt, so it is the same at every step and
    whatever other prompts there are. Ranks share the generation of latents; the main rank decodes.
    """

    FIRST = "step-000000.png"

    def __init__(self, run, source, training, log):
        """training: Samples, to fit the preview decoder to."""
        self.log, self.seed, self.folder = log, run.seed, run.folder / "validation"
        self.prompts, self.conditions = run.settings.prompts(), source.prompts
        self.guidance = run.settings.guidance_scale
        distributed.on_main(self.load_decoder, run, source, training)
        self.shapes = distributed.on_main(self.find_shapes, run.settings.resolution // 32)

    def find_shapes(self, side):
        """(h, w) of each prompt's latents."""
        used = self.decode.latent_size(side)
        if used != side:
            say(
                f"--resolution trains on {side}×{side} latents, which can't be decoded: images are "
                f"generated at {used}×{used}."
            )
        announce_sizes(self.decode, [prompt for prompt in self.prompts if prompt.width], side)
        return [latent_shape(self.decode, prompt, side) for prompt in self.prompts]

    def load_decoder(self, run, source, training):
        if run.settings.validation_decoder == "preview":
            self.decode = PreviewDecoder(training, source.encode)
        else:
            half = run.settings.mixed_precision != "no"
            self.decode = FullDecoder(run.parts.decoder, run.device, half)
        if self.decode.nbytes:
            say(f"decoder: {gib(self.decode.nbytes)}, on the device only while it is used")

    def measure(self, model):
        """{number of a prompt: its latents}, for every world_size-th prompt."""
        mine = range(rank(), len(self.prompts), world_size())
        return {n: self.latents(model, n).cpu() for n in mine}

    def latents(self, model, number):
        """One prompt's latents, (1, 16, h, w)."""
        prompt, shape = self.prompts[number], (model.prior.config.c_in, *self.shapes[number])
        condition, (seed, key) = self.conditions[prompt.text], self.seed_and_key(prompt)
        return generate_latents(
            model, condition, shape, seed=seed, key=key, guidance=self.guidance
        )

    def seed_and_key(self, prompt):
        seed = self.seed if prompt.seed is None else prompt.seed
        return seed, randomness.image_key(prompt.text, 0)

    def show(self, step, parts):
        """Decode, and write the grid of images with their prompts."""
        latents, images = {n: x for part in parts for n, x in part.items()}, []
        with self.decode.on_device():
            for n, prompt in enumerate(self.prompts):
                generator = randomness.decoding_generator(*self.seed_and_key(prompt))
                images.append(self.decode(latents[n], prompt.text, generator))
        title = f"step {step}" if step else "before training"
        lines = [prompt.line for prompt in self.prompts]
        sheet = grid(images, lines, title)
        self.log.image(step, "validation", sheet)
        file = self.folder / f"step-{step:06}.png"
        self.folder.mkdir(exist_ok=True)
        info = PngInfo()
        info.add_itxt("prompts", json.dumps(lines))
        sheet.save(file, pnginfo=info)
        both = self.folder / BEFORE_AFTER
        if not step:
            both.unlink(missing_ok=True)  # of an earlier run
        elif (self.folder / self.FIRST).is_file():
            with Image.open(self.folder / self.FIRST) as first:
                same = first.text.get("prompts") == json.dumps(lines)
                stack([first, sheet] if same else [sheet]).save(both)
        _, error = attempt(update_strips, self.folder, step, images, lines)
        if error:
            say(f"{STRIPS} was not written: {error}")
        say(f"images: {file}")


def generate_latents(model, condition, shape, *, seed, key, guidance=4.0):
    """One image's latents, (1, *shape) fp32, scaled as the prior's.

    condition: {name: (2, …)}, of the prompt and the empty caption. key: from `image_key`.
    """
    device = next(iter(condition.values())).device
    noise = randomness.sampling_noise(seed, key, shape).to(device)
    objective = diffusion.objective_of(model.prior.config)
    predict = diffusion.guided(model, condition, guidance)
    return diffusion.sample(predict, noise, objective.times(), objective.reverse_step)


class HeldOutLoss:
    """The plain squared error of the predicted noise on held-out rows, in each quarter of t.

    Noise and times are fixed, and the objective of training does not matter: every sample is
    measured at one time in each quarter of [0, 1]. The loss of runs on the same rows can be
    compared; when it rises while the training loss falls, the prior overfits.
    """

    def __init__(self, run, source, samples, log):
        self.source, self.samples, self.log, self.device = source, samples, log, run.device
        self.folder = run.folder
        self.batch, self.workers = run.layout.batch, run.settings.dataloader_num_workers
        self.losses = []  # of this start, by step

    def measure(self, model):
        """The sums of the error in each quarter, over every world_size-th batch."""
        parts = self.samples.buckets.batches(self.batch)[rank() :: world_size()]
        sums = torch.zeros(4, device=self.device)
        seed, objective = self.samples.seed, diffusion.objective_of(model.prior.config)
        for batch in batches(self.samples, parts, self.workers):
            latents, condition = self.source.encode(batch)
            uniform = randomness.uniform(seed, batch["positions"], latents.device)
            noise = randomness.noise_like(latents, seed, batch["positions"])
            for quarter in range(4):
                t = objective.same_snr((quarter + uniform) / 4)                      # (B,)
                noisy = objective.add_noise(latents, noise, t)
                predicted = objective.predicted_noise(model(noisy, t, **condition), noisy, t)
                error = (predicted - noise).square().mean(dim=(1, 2, 3))             # (B,)
                sums[quarter] += error.sum()
        return sums.tolist()

    def show(self, step, parts):
        quarters = [sum(of_ranks) / len(self.samples.rows) for of_ranks in zip(*parts, strict=True)]
        values = {"validation_loss": sum(quarters) / 4}
        for quarter, value in zip(metrics.QUARTERS, quarters, strict=True):
            values[f"validation_loss/{quarter}"] = value
        self.log.scalars(step, values)
        checkpoint.record_held_out(self.folder, step, values["validation_loss"])
        listed = zip(metrics.SHORT, quarters, strict=True)
        listed = ", ".join(f"{name}: {value:.5f}" for name, value in listed)
        say(f"held out at step {step}: loss {values['validation_loss']:.5f} (t {listed})")
        self.losses.append((values["validation_loss"], step))
        last = [loss for loss, _ in self.losses[-4:]]
        if len(last) == 4 and last == sorted(set(last)):
            lowest, where = min(self.losses)
            say(
                "note: the held-out loss has risen three times in a row: the prior overfits. Its "
                f"lowest was {lowest:.5f} at step {where}."
            )
