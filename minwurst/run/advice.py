"""What a run's settings silently do, in one line each, before the first step."""

from minwurst.base.console import say
from minwurst.base.settings import Settings


def advise(run):
    """Print what applies. run: a Run, identified."""
    before = run.progress["settings"].get("max_train_steps", run.settings.max_train_steps)
    done = run.step / run.last_step if before != run.settings.max_train_steps else 0
    for line in lines(run.settings, run.last_step, run.epochs, done):
        say(f"note: {line}")


def lines(settings, steps, epochs, done=0):
    """steps, epochs: of the whole run. done: the fraction of the steps, if their number changed."""
    warmup, schedule = settings.lr_warmup_steps, settings.lr_scheduler
    if schedule == "constant" and warmup not in (0, Settings.lr_warmup_steps):
        yield (
            f"--lr_warmup_steps {warmup} has no effect with --lr_scheduler=constant; "
            "constant_with_warmup has a warm-up."
        )
    elif schedule != "constant" and warmup >= steps:
        yield (
            f"the warm-up of {warmup} steps is not shorter than the run's {steps}: the learning "
            f"rate never reaches {settings.learning_rate:g}. Lower --lr_warmup_steps."
        )
    if done > 0.7 and not schedule.startswith("constant"):
        yield (
            f"--lr_scheduler={schedule} over {steps} steps, of which {done:.0%} are done, leaves a "
            "low learning rate; --lr_scheduler=constant keeps it up."
        )
    memory = 1 / (1 - settings.ema_decay) if settings.ema_decay < 1 else float("inf")
    if settings.use_ema and memory > steps:
        yield (
            f"--ema_decay {settings.ema_decay:g} remembers {memory:,.0f} steps, more than the "
            f"run's {steps}: the average will cover about the last {max(1, steps // 9)}."
        )
    saved = -(-steps // settings.checkpointing_steps)
    if settings.keep_best and saved < 4:
        yield (
            f"--keep_best will choose among {saved} checkpoint{'s' * (saved != 1)}: for more, "
            "lower --checkpointing_steps."
        )
    if not settings.caption_dropout and epochs >= 20 and settings.guidance_scale != 1:
        yield (
            f"{epochs:.0f} epochs without --caption_dropout: the prior may forget the empty "
            "caption, which guidance compares with. The authors used 0.05."
        )
