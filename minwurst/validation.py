"""Looking at the prior while it trains: pictures of some prompts, and the loss on rows held out.

    validate = Validation(prior, ema, log, [Draw(…), HeldOutLoss(…)], every=500, last_step=15000)
    validate(step)          # at step 0, every 500 steps and at the last one; else it does nothing

All of it is done as the result would be used: with the averaged weights, without dropout. It takes
no number from the streams that training draws from, so training goes on as if nobody had looked.
"""

import contextlib
import json

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minwurst import cost, data, diffusion, dist, draws, pictures, report


@contextlib.contextmanager
def evaluation(model):
    """Within the context the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Validation:
    """Calls each of `looks` with the step when validation is due. All ranks must call it."""

    def __init__(self, prior, ema, log, looks, *, every, last_step):
        self.prior, self.ema, self.log, self.looks = prior, ema, log, looks
        self.every, self.last_step = every, last_step

    def __call__(self, step):
        if not self.looks or step % self.every and step != self.last_step:
            return
        with self.log.paused(), self.ema.in_place(), evaluation(self.prior), torch.no_grad():
            for look in self.looks:
                look(step)


class Draw:
    """Draws one picture a prompt, into `folder`/step-000500.png and the trackers.

    A picture's noise depends on the seed and its prompt alone, so it is the same at every step and
    whatever other prompts there are. Ranks share the drawing of latents; the main one decodes.
    """

    FIRST, BOTH = "step-000000.png", "before_after.png"

    def __init__(self, prior, autocast, log, prompts, *, seed, cells, decoder, folder):
        """prompts: {prompt: states of it and of the empty caption, (2, 77, D)}. cells: side of the
        latents in training. decoder: makes one.
        """
        self.prior, self.autocast, self.log = prior, autocast, log
        self.prompts, self.states = list(prompts), prompts
        self.seed, self.folder = seed, folder
        dist.on_main(self.load, decoder)
        self.cells = dist.on_main(lambda: self.decode.cells(cells))
        if self.cells != cells:
            report.say(
                f"--resolution trains on {cells}×{cells} cells, which the decoder can't take: "
                f"pictures are drawn at {self.cells}×{self.cells}."
            )

    def load(self, decoder):
        self.decode = decoder()
        if self.decode.size:
            report.say(f"decoder: {cost.gib(self.decode.size)}, on the device only while it draws")

    def __call__(self, step):
        mine = range(dist.rank(), len(self.prompts), dist.world_size())
        drawn = {number: self.latents(self.prompts[number]).cpu() for number in mine}
        everyone = {number: x for part in dist.gather(drawn) for number, x in part.items()}
        dist.on_main(self.show, step, [everyone[number] for number in range(len(self.prompts))])

    def latents(self, prompt):
        """One prompt's latents, (1, 16, h, w)."""
        return draw_latents(
            self.prior, self.autocast, self.states[prompt],
            seed=self.seed, place=draws.picture(prompt, 0), cells=self.cells,
        )  # fmt: skip

    def show(self, step, latents):
        """Decode, and write the pictures with their prompts beneath."""
        found = []
        with self.decode.ready():
            for x, prompt in zip(latents, self.prompts, strict=True):
                noise = draws.decoding_generator(self.seed, draws.picture(prompt, 0))
                found.append(self.decode(x, prompt, noise))
        title = f"step {step}" if step else "before training"
        sheet = pictures.grid(found, self.prompts, title)
        self.log.picture(step, "validation", sheet)
        file = self.folder / f"step-{step:06}.png"
        try:
            self.folder.mkdir(exist_ok=True)
            written = PngInfo()
            written.add_itxt("prompts", json.dumps(self.prompts))
            sheet.save(file, pnginfo=written)
            both = self.folder / self.BOTH
            if not step:
                both.unlink(missing_ok=True)  # an earlier run's
            elif (self.folder / self.FIRST).is_file():
                with Image.open(self.folder / self.FIRST) as first:
                    same = first.text.get("prompts") == json.dumps(self.prompts)
                    pictures.stack([first, sheet] if same else [sheet]).save(both)
        except OSError as error:  # a full disk, say: no reason to stop training
            report.say(f"{file} was not written: {error}")
        else:
            report.say(f"pictures: {file}")


def draw_latents(prior, autocast, captions, *, seed, place, cells, guidance=4.0):
    """One picture's latents, (1, 16, cells, cells) fp32, as the prior has them.

    captions: the states of the prompt and of the empty caption, (2, 77, D). place: the picture's,
    from draws.picture.
    """
    noise = draws.sampling_noise(seed, place, (prior.config.c_in, cells, cells)).to(captions.device)

    def model(x, t, text):
        with autocast:
            return prior(x, t, text)

    return diffusion.sample(model, captions[:1], captions[1:], noise, guidance)


class HeldOutLoss:
    """The plain squared error on rows that are not trained on, whatever objective training has.

    Each row meets the same noise at the same four times at every validation, one in each quarter of
    [0, 1]: near 0 the error tells how fine detail is learned, near 1 how well the prompt is read.
    """

    def __init__(self, prior, autocast, log, pairs, encode, *, batch, workers, device):
        """pairs: data.Pairs of the held-out rows. encode: as in the training scripts."""
        self.prior, self.autocast, self.log, self.pairs = prior, autocast, log, pairs
        self.encode, self.batch, self.workers, self.device = encode, batch, workers, device

    def __call__(self, step):
        count, seed = len(self.pairs.rows), self.pairs.seed
        starts = range(dist.rank() * self.batch, count, dist.world_size() * self.batch)
        places = [range(start, min(start + self.batch, count)) for start in starts]
        sums = torch.zeros(4, device=self.device)
        for samples in data.batches(self.pairs, places, self.workers):
            latents, text = self.encode(samples)
            uniform = data.to_device(draws.uniform(seed, samples["positions"]), self.device)
            noise = draws.noise(seed, samples["positions"], latents.shape[1:])
            noise = data.to_device(noise, self.device)
            for quarter in range(4):
                t = (quarter + uniform) / 4                                          # (B,)
                noisy = diffusion.add_noise(latents, noise, t)
                with self.autocast:
                    predicted = self.prior(noisy, t, text)
                error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))     # (B,)
                sums[quarter] += error.sum()
        quarters = [sum(parts) / count for parts in zip(*dist.share(sums), strict=True)]
        values = {"validation_loss": sum(quarters) / 4}
        for quarter, value in enumerate(quarters):
            values[f"validation_loss/t_{quarter / 4:.2f}_{quarter / 4 + 0.25:.2f}"] = value
        self.log.scalars(step, values)
        listed = ", ".join(f"{value:.5f}" for value in quarters)
        report.say(f"held out at step {step}: loss {values['validation_loss']:.5f} ({listed})")
