"""Run: the facts of a run. Its folder, seed and steps, what it resumes, what makes it this run.

    run = Run.open(settings, device)        # locks the folder, finds the checkpoint and the seed
    run.identify(parts, data)               # refuses to resume another run
    updates = run.restore(state)
    for step in run.steps:
        ...
        run.save(step, updates, state)

It holds no model and no optimizer, and trains nothing. All ranks must call its methods.
"""

import secrets
import shlex
from pathlib import Path

from minwurst.base import errors
from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.base.ranks import rank, world_size
from minwurst.base.settings import MOST_STEPS, LoRASettings, defaults_of, facts_of, public
from minwurst.edge import files, models, push, run_file
from minwurst.edge.grids import BEFORE_AFTER, STRIPS
from minwurst.run import advice, checkpoint, estimate, trackers
from minwurst.run.saver import Saver
from minwurst.step import randomness
from minwurst.step.distributed import on_main
from minwurst.step.samples import BatchLayout

FORMAT = 1  # of checkpoints; those of the first edition have the same and do not say so
FRESH = {"step": 0, "updates": 0, "seed": None, "settings": {}, "identity": {}}
# The entries of an identity, for the message that refuses a change.
MEANING = {
    "global_batch": "the number of images per step (--train_batch_size × "
    "--gradient_accumulation_steps × processes)",
    "data": "the content of the data set (a fingerprint)",
    "encoders": "the encoders' files (a fingerprint)",
    "shapes": "the shapes of --aspect_buckets and their rows (a fingerprint)",
    "prediction": "what the prior predicts",
    "prior": "the prior (its sizes; for a LoRA, the fingerprint of its files)",
}
IDENTITY = {"global_batch", "data", "encoders", "prior"}  # those that checkpoints always had


class Run:
    """Attributes: settings, rank, device, folder, seed, checkpoint (the folder to resume from, or
    None), step (its step, or 0), layout (how a step's batch is divided), and after `identify` also
    parts, shapes (of the latents), identity, rows (how many are trained on), last_step, epochs,
    steps (those still to run), earlier (run.json so far) and id.
    """

    def __init__(self, settings, device, folder, resumed, progress):
        self.settings, self.device, self.folder, self.rank = settings, device, folder, rank()
        self.checkpoint, self.progress, self.seed = resumed, progress, settings.seed
        self.step, self.saver = progress["step"], Saver()
        batch, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
        self.layout = BatchLayout(batch, accumulation, world_size())

    @classmethod
    def open(cls, settings, device):
        """Claim the output folder and check all that can be checked before data and models.

        Fills in settings.seed and settings.hub_model_id if they were left open.
        """
        folder = on_main(files.make_folder, settings.output_dir)
        on_main(files.lock, folder)
        resumed = on_main(checkpoint.find, settings.resume_from_checkpoint, folder)
        progress = checkpoint.read_progress(resumed) if resumed else FRESH
        if progress.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"--resume_from_checkpoint: {resumed} has format {progress['format']}, and this "
                f"version reads format {FORMAT}. Resume with the version that wrote it."
            )
        if resumed and (wrong := checkpoint.impossible(resumed, progress, IDENTITY)):
            raise UserError(
                f"--resume_from_checkpoint: {resumed}/state.json has no {wrong} that a run can "
                f"have written. Resume from another checkpoint by its path."
            )
        settings.seed = on_main(randomness.choose_seed, settings.seed, progress["seed"])
        errors.completing[:] = [f"--seed={settings.seed}"]  # for commands that errors print
        run = cls(settings, device, folder, resumed, progress)
        where = f"{world_size()} × {device.type}" if world_size() > 1 else device.type
        say(f"minwurst on {where}, precision {settings.mixed_precision}, seed {run.seed}")
        for note in settings.notes:
            say(note)
        if device.type == "cpu":
            say("No GPU found: on a CPU, the published prior can only be tried out.")
        if resumed:
            say(f"resuming from {resumed}")
        on_main(trackers.check, settings.report_to)
        if settings.push_to_hub:  # so that a wrong token fails now
            settings.hub_model_id = on_main(
                push.make_repository, settings.hub_model_id or folder.resolve().name,
                settings.hub_private, settings.hub_token,
            )  # fmt: skip
        keep_skipping(settings, progress)
        run.changes = check_settings(progress, public(settings))
        return run

    def identify(self, parts, data):
        """Record what makes it this run, and the steps that follow; UserError if it is another.

        parts: models.Parts. data: dataset.CaptionedImages.
        """
        text = parts.text
        self.parts, self.shapes = parts, data.shapes
        self.identity = {
            "global_batch": self.layout.global_batch,
            "data": data.fingerprint,
            "encoders": on_main(
                models.fingerprint, parts.image_encoder, text / "text_encoder", text / "tokenizer"
            ),
            # A checkpoint replaces the base's weights, but a LoRA is only an update to them.
            "prior": on_main(models.fingerprint, parts.prior)
            if isinstance(self.settings, LoRASettings)
            else models.prior_sizes(parts.prior),
            "prediction": models.prediction_of(parts.prior),
            "world": world_size(),
        }
        if self.settings.aspect_buckets:
            self.identity["shapes"] = data.describe_shapes()
        for change in self.changes + check_same_run(self.progress["identity"], self.identity):
            say(f"changed since the checkpoint: {change}")
        on_main(checkpoint.set_aside_later, self.folder, self.step)
        on_main(checkpoint.rotate, self.folder, *self.settings.kept_checkpoints())
        self.earlier = on_main(run_file.earlier, self.folder) if self.checkpoint else {}
        self.id = self.earlier.get("id")
        if not isinstance(self.id, str):
            self.id = on_main(secrets.token_hex, 4)

        self.rows, self.last_step = len(data.rows), self.settings.max_train_steps
        if self.last_step is None:
            epochs = self.settings.num_train_epochs
            self.last_step = -(-epochs * self.rows // self.layout.global_batch)
        if self.last_step > MOST_STEPS:
            raise UserError(
                f"--num_train_epochs {self.settings.num_train_epochs} makes {self.last_step:,} "
                f"steps; at most {MOST_STEPS:,} are possible."
            )
        self.epochs = self.last_step * self.layout.global_batch / self.rows
        self.skipped = set(self.settings.skip_steps or ())
        to_come = range(self.step + 1, self.last_step + 1)
        self.steps = to_come  # unless some are skipped, no list, which can be long
        if self.skipped.intersection(to_come):
            self.steps = [step for step in to_come if step not in self.skipped]
        if not self.steps:
            done = f"Step {self.step} is already done: raise --max_train_steps for more."
            if "exported" in self.earlier:
                raise UserError(f"{done} The result stays as minwurst.export wrote it.")
            say(done)

    def restore(self, state):
        """Load the checkpoint, if any, into a State. Returns the number of updates so far."""
        if self.checkpoint:
            state.restore(*checkpoint.load(self.checkpoint))
        return self.progress["updates"]

    def positions(self):
        """This rank's positions in the stream of samples: one range per micro-step to come."""
        return (p for step in self.steps for p in self.layout.positions(step, self.rank))

    def announce(self, prior, source):
        """Report what the run needs, refuse a disk that is too small, and write run.json."""
        estimate.announce(self, prior, source)
        advice.advise(self)
        on_main(run_file.write, self)

    def is_due(self, step, every):
        """Whether what happens every `every` steps, and at the last one, is due at this step.

        What would be due at a skipped step is due at the step before it.
        """
        following = step + 1
        while following in self.skipped:
            following += 1
        return any(n % every == 0 or n == self.last_step for n in range(step, following))

    def is_save_due(self, step):
        return self.is_due(step, self.settings.checkpointing_steps)

    def is_validation_due(self, step):
        """Also at each checkpoint if the best one is kept, or there would be little to compare."""
        every, epochs = self.settings.validation_steps, self.settings.validation_epochs
        return self.settings.keep_best and self.is_save_due(step) or self.is_due(
            step, every or max(1, round(epochs * self.rows / self.layout.global_batch))
        )

    def save(self, step, updates, state, stop=False):
        """Write a checkpoint with everything that a resumed run needs, then rotate.

        stop: whether the run ends here. Then, and at the last step, it is on disk on return;
        otherwise, with --async_checkpointing, it is only copied.
        """
        tensors, numbers = state.collect()
        progress = {
            "format": FORMAT, "step": step, "updates": updates, "seed": self.seed,
            "identity": self.identity, "settings": public(self.settings),
            "defaults": defaults_of(type(self.settings)), **numbers,
        }  # fmt: skip
        kept = self.settings.kept_checkpoints()
        in_step = stop or step == self.steps[-1] or not self.settings.async_checkpointing
        on_main(self.saver.wait)
        save = checkpoint.save if in_step else self.saver.save
        on_main(save, self.folder, step, tensors, progress, *kept)

    def finish_saving(self):
        """Wait for a save in flight; its error is raised on all ranks."""
        if self.settings.async_checkpointing:
            on_main(self.saver.wait)

    def report(self, result):
        """Say where everything is and how to generate more images."""
        settings, images = self.settings, self.folder / "validation" / BEFORE_AFTER
        best, folder = checkpoint.best(self.folder)[0], shlex.quote(str(self.folder))
        say(f"done: {result}")
        if best and checkpoint.step_of(best) < max(self.last_step, self.step):
            say(f"to export the best checkpoint instead: python -m minwurst.export {folder}")
        if images.is_file():
            say(f"images before and after: {images}, step by step: {STRIPS} beside it")
        if settings.report_to in ("tensorboard", "all"):
            say(f"log: tensorboard --logdir {self.folder / settings.logging_dir}")
        kind = "lora" if Path(result).is_file() else "prior"
        prompt = (settings.validation_prompts or ["a bear"])[0]
        words = ["--prompt", prompt, f"--{kind}", str(self.folder)]
        say(f"more images: python -m minwurst.sample {shlex.join(words)}")


def keep_skipping(settings, progress):
    """What a run once skipped stays skipped; UserError for a step that it has already run."""
    for name in ("skip_steps", "skip_rows"):
        before = set(progress["settings"].get(name) or ())
        now = before.union(getattr(settings, name) or ())
        late = [n for n in sorted(now - before) if name == "skip_steps" and n <= progress["step"]]
        if late:
            raise UserError(
                f"--skip_steps {late[0]}: the checkpoint is at step {progress['step']}, which is "
                "later. Resume from an earlier checkpoint by its path."
            )
        setattr(settings, name, sorted(now) or None)


def check_settings(progress, now):
    """`check_same_run` for settings, across versions of this project.

    A setting that the checkpoint lacks counts as its default now. One that this version does not
    know must be at the default that was recorded with it.
    """
    before, defaults = progress["settings"], progress.get("defaults", {})
    for name in before.keys() - now.keys():
        if name in defaults and before[name] != defaults[name]:
            raise UserError(
                f"--resume_from_checkpoint: the checkpoint was written with --{name} "
                f"{before[name]}, which this program does not have. Use the one that wrote it."
            )
    if not before:
        return []
    return check_same_run({**defaults_of(LoRASettings), **before}, now)


def check_same_run(before, now):
    """Lines that list what changed since a checkpoint; UserError for what must not change.

    before, now: settings by name, or a run's identity. Batch size and paths may change as settings;
    the identity makes sure that what they amount to has not changed.
    """
    may_change = {**facts_of(LoRASettings, "may_change"), "world": True}
    changed = [name for name in before if name in now and before[name] != now[name]]
    if refused := [name for name in changed if not may_change.get(name)]:
        told = "; ".join(
            f"{MEANING.get(name, f'--{name}')} was {before[name]} and is now {now[name]}"
            for name in refused
        )
        raise UserError(
            f"--resume_from_checkpoint: {told}, which would be another run. Change it back, or use "
            "another --output_dir."
        )
    listed = [name for name in changed if may_change[name] != "silently"]
    return [f"{name} {before[name]} → {now[name]}" for name in listed]
