"""The one exchange between ranks per step: is everything finite, and has anyone been signalled?"""

import torch

from minwurst.base.console import say
from minwurst.base.errors import UserError, command_with
from minwurst.step import distributed, signals


class FiniteGuard:
    """Stops a run before a non-finite number reaches the weights.

    A non-finite loss stops all ranks, and so does a non-finite gradient, except in fp16: there it
    means that the loss scale was too large. The step is skipped and the scale halved, up to
    `patience` times in a row.
    """

    def __init__(
        self, fp16, samples=None, layout=None, weights=None, first_after_resuming=None, patience=25
    ):
        """samples, layout: name the rows of a bad step in the error. weights: the trained ones, by
        name, which may be the cause, and so may be those of the checkpoint.
        """
        self.fp16, self.samples, self.layout = fp16, samples, layout
        self.weights, self.first_after_resuming = weights or {}, first_after_resuming
        self.patience, self.skipped = patience, 0

    def check(self, step, loss, norm):
        """(whether the update is made, the strongest signal), the same on all ranks.

        loss, norm: this rank's, scalar tensors. Raises UserError to stop. Here the host waits for
        the device, once per step.
        """
        flags = torch.stack([loss.isfinite(), norm.isfinite()]).float()
        flags = torch.cat([flags, flags.new_tensor([signals.pending()])])              # (3,)
        ranks = distributed.all_gather(flags)
        advice = (
            "No weight was changed. Lower --learning_rate, or use bf16 instead of fp16, or resume "
            "without this step: "
            + command_with("--resume_from_checkpoint=latest", f"--skip_steps={step}")
        )
        bad = [rank for rank, (loss_is_finite, *_) in enumerate(ranks) if not loss_is_finite]
        weights = self.weights.items() if bad else ()
        broken = [name for name, weight in weights if not weight.isfinite().all()]
        if broken:
            raise UserError(
                f"Step {step}: the weight {broken[0]} is not finite since an earlier step. Lower "
                "--learning_rate or raise --adam_epsilon, and resume from an earlier checkpoint by "
                "its path."
            )
        if bad and step == self.first_after_resuming:
            advice += (
                " If the next step fails too, the checkpoint's weights are of no use: resume from "
                "an earlier checkpoint by its path, or start afresh in another --output_dir."
            )
        if bad:
            rows = self.rows(step, bad[0])
            raise UserError(
                f"Step {step}: the loss is not finite on rank {bad[0]}, rows {rows}. {advice}"
            )
        finite = all(norm_is_finite for _, norm_is_finite, _ in ranks)
        self.skipped = 0 if finite else self.skipped + 1
        if not finite and (not self.fp16 or self.skipped > self.patience):
            raise UserError(f"Step {step}: the gradient is not finite. {advice}")
        if not finite:
            say(f"step {step} skipped: gradient overflow in fp16, {self.skipped} in a row")
        return finite, signals.strongest_of(int(number) for *_, number in ranks)

    def rows(self, step, rank):
        """The numbers of the rows that a rank used in a step."""
        positions = self.layout.positions(step, rank) if self.layout else []
        return [self.samples.row(p)["number"] for micro_batch in positions for p in micro_batch]
