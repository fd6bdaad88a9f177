"""The panels that train, with train.py and lora.py themselves. `--full` repeats them.

A panel is as in sampling.py. What it printed and yielded is kept in results/, so that the page has
it without training; a test checks that results/ was made by the code that stands here.
"""

from minwurst.edge.curves import curves
from minwurst.step.metrics import QUARTERS

HELD = (
    "--train_batch_size=16", "--validation_split=0.1", "--validation_steps=20", "--logging_steps=5",
)  # fmt: skip


def loss_per_quarter(m):
    """Loss per quarter of t while it trains

    The same network is good at some times and poor at others. Late in t nearly everything is noise
    and noise is easy to predict; early in t the noise is a small part of what the network sees, and
    its error is largest there. One mean over all times hides this, so the log has all four.
    """
    run = m.train("train.py", *HELD)
    trained = {quarter[2:]: run.curve(f"loss/{quarter}") for quarter in QUARTERS}
    held_out = {quarter[2:]: run.curve(f"validation_loss/{quarter}") for quarter in QUARTERS}
    for quarter, line in held_out.items():
        print(f"held-out loss, t in {quarter}: {line[0][1]:.3f} before, {line[-1][1]:.3f} after")
    yield curves([("training loss", trained)], "step"), "while training, mean of five steps"
    yield curves([("held-out loss", held_out)], "step"), "on held-out rows"


def lora_scale(m):
    """LoRA: scale −1 to 2

    An adapter is a difference of weights, so it can be multiplied. 0 is the base bit for bit, 1 is
    as trained; between them the style comes gradually. Above 1 it is exaggerated, and below 0 the
    model moves away from the style.
    """
    run = m.train("lora.py", "--rank=16", "--max_train_steps=60", *HELD)
    for scale in (-1, 0, 0.5, 1, 1.5, 2):
        yield m.image(m.prompts[0], run, scale), f"scale {scale}"


def lora_rank(m):
    """LoRA: rank 1 to 32

    The rank bounds what an adapter can say: each unit adds one direction per layer. The same number
    of steps and the same learning rate; each doubling of the parameters helps less.
    """
    for rank in (1, 4, 16, 32):
        run = m.train("lora.py", f"--rank={rank}", "--max_train_steps=60", *HELD)
        count = next(line for line in run.console.splitlines() if line.startswith("trains "))
        print(f"  {count}; held-out loss {run.curve('validation_loss')[-1][1]:.3f}")
        yield m.image(m.prompts[0], run), f"rank {rank}"


def average_of_weights(m):
    """EMA off and on

    At a constant learning rate, the weights jump around a good place instead of settling in it. A
    moving average removes the jitter, and lags behind: in a run as short as this one, it gains
    little. Both runs take the same steps; only what is evaluated differs.
    """
    flags = "--learning_rate=2e-3", "--lr_scheduler=constant", "--max_train_steps=60", *HELD
    runs = {
        "the weights": m.train("train.py", *flags),
        "their average": m.train("train.py", *flags, "--use_ema", "--ema_decay=0.95"),
    }
    lines = {name: run.curve("validation_loss") for name, run in runs.items()}
    for name, line in lines.items():
        print(f"held-out loss of {name}, per check: " + ", ".join(f"{y:.3f}" for _, y in line))
    yield curves([("held-out loss", lines)], "step"), "the same run, evaluated in two ways"
    for prompt in m.prompts[:2]:
        for name, run in runs.items():
            yield m.image(prompt, run), f"{prompt}: {name}"


def caption_dropout(m):
    """Caption dropout and its price

    Guidance needs a prediction without a caption. If the captions are always there, fine-tuning
    changes that prediction only by accident, and guidance exaggerates the difference between the
    new style and an old memory. Replacing some captions by the empty one keeps both in step. The
    price: these samples teach nothing about captions.
    """
    for dropout in (0, 0.25):
        run = m.train("train.py", *HELD, *[f"--caption_dropout={dropout}"] * (dropout > 0))
        print(f"  held-out loss, with captions: {run.curve('validation_loss')[-1][1]:.3f}")
        for guidance in (1, 2, 4):
            yield m.image(m.prompts[0], run, guidance=guidance), f"{dropout:.0%}, {guidance=}"


def overfitting(m):
    """Over-fitting

    Nine tenths of the images are held out, so the run sees the same few again and again. The
    training loss keeps falling while the held-out loss turns and rises. The prompts below are not
    among the images.
    """
    run = m.train(
        "train.py", "--validation_split=0.9", "--max_train_steps=120", "--validation_steps=20",
        "--logging_steps=10", "--learning_rate=1e-3", "--train_batch_size=16",
    )  # fmt: skip
    lines = {"training": run.curve("loss"), "held out": run.curve("validation_loss")}
    step, least = min(lines["held out"], key=lambda point: point[1])
    last = lines["held out"][-1]
    print(f"held-out loss: lowest {least:.3f} at step {step}, {last[1]:.3f} at step {last[0]}")
    yield curves([("loss", lines)], "step"), "one run on a tenth of the images"
    for prompt in m.prompts[:3]:
        yield m.image(prompt), f"{prompt}: before"
        yield m.image(prompt, run), "after"


def rate_too_high(m):
    """A learning rate that is too high

    Watch the gradient's norm beside the loss: both explode, and clipping bounds a step's length but
    not its harm. Then the loss settles at 1, which is the loss of predicting zero noise: all that
    the network knew is gone. If a number is no longer finite, the run stops before it touches a
    weight and prints how to continue.
    """
    run = m.train(
        "train.py", "--learning_rate=0.3", "--lr_scheduler=constant", "--lr_warmup_steps=0",
        "--max_train_steps=30", "--logging_steps=1", "--train_batch_size=8",
    )  # fmt: skip
    lines = [line for line in run.console.splitlines() if line.startswith("step ")]
    print("\n".join(line.split("  lr ")[0] + "  gradient" + line.split("gradient")[-1]
                    for line in lines))  # fmt: skip


def overflow(m):
    """fp16: the gradient overflows

    fp16 ends at 65,504. The scaler multiplies the loss so that small gradients don't vanish, and
    starts too high on purpose: an overflow costs one skipped step and halves the factor. A few
    skips at the start are normal; skips that never end are not, and then the run stops.
    """
    run = m.train(
        "train.py", "--mixed_precision=fp16", "--max_train_steps=12", "--lr_warmup_steps=0",
        "--logging_steps=1", "--train_batch_size=4",
    )  # fmt: skip
    print("\n".join(line for line in run.console.splitlines() if line.startswith("step ")))


PANELS = (
    loss_per_quarter, lora_scale, lora_rank, average_of_weights, caption_dropout, overfitting,
    rate_too_high, overflow,
)  # fmt: skip
