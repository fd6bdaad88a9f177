"""Eight exercises that check themselves: predict, run, compare.

    python -m minwurst.tour.exercises               # the list
    python -m minwurst.tour.exercises 3             # check your answer to number 3
    python -m minwurst.tour.exercises 3 --solution  # check the one in solutions.py

Edit the functions here. A check's first line, in checks.py, says what it compares.
"""

import argparse
import importlib
import inspect
import sys


def ddim(x, noise, t, t_next):
    """Write DDIM: one deterministic step back.

    reverse_step adds fresh noise. DDIM (arXiv 2010.02502, η = 0) goes to the clean latents that
    `noise` implies, and adds the same noise again, as much as t_next needs. All are tensors;
    diffusion.alpha_bar and per_sample help.
    Predict: does the result depend on how many steps lie between, if the noise is exact?
    """
    raise NotImplementedError


def noise_in_bf16(prior, noisy, t, text):
    """t in bf16: find the bug.

    The prior runs in bf16. Near t = 1, where sampling starts, it can't tell the times apart.
    Predict: how many numbers does bf16 have between 0.5 and 1?
    """
    prior = prior.bfloat16()
    return prior(noisy.bfloat16(), t.bfloat16(), text.bfloat16()).float()


def flags_that_survive():
    """kill -9 a run: is the next loss the same?

    Which flags make `train.py --demo --max_train_steps=4` resume when it is killed in step 3 and
    the same command is given again? Return them as a list; checkpoint every second step.
    Predict: which digits of the loss of step 3 will be the same in both runs?
    """
    return []


def noise_from_v(v, x, t):
    """Derive ε from v.

    x = √ᾱ·x₀ + √(1−ᾱ)·ε and v = √ᾱ·ε − √(1−ᾱ)·x₀ (arXiv 2202.00512). Return ε.
    Predict: what is it at t = 1, and which of x and v does it come from?
    """
    raise NotImplementedError


def initialise(adapter):
    """Why B starts at zero, and A does not.

    A new LoRALinear must not change its layer, but must be able to learn. This version manages the
    first. Change it in place: adapter.lora_A and adapter.lora_B are parameters.
    Predict: what are the gradients of A and of B in the very first step?
    """
    adapter.lora_A.data.zero_()
    adapter.lora_B.data.zero_()


def lora_parameters(layers, rank):
    """Count LoRA's parameters.

    layers: [(in_features, out_features), …] of the wrapped layers. Return how many are trained.
    Predict: how does the number change when the model gets twice as wide, and that of the model?
    """
    raise NotImplementedError


def guided_noise(prior, x, t, text, empty, guidance):
    """Fold guidance into one batch.

    Return the guided prediction with a single call of prior(x, t, text). text and empty: the
    states of B captions and of B empty ones, (B, L, D). This version calls it twice.
    Predict: is it faster on one CPU thread? On a large GPU?
    """
    with_text, without = prior(x, t, text), prior(x, t, empty)
    return without + guidance * (with_text - without)


def p2_weight(snr):
    """Write p2 from the SNR.

    The code has 1 − ᾱ. Write the same from the signal-to-noise ratio alone.
    Predict: at which SNR is the weight one half, and at about which t?
    """
    raise NotImplementedError


EXERCISES = (
    ddim, noise_in_bf16, flags_that_survive, noise_from_v, initialise, lora_parameters,
    guided_noise, p2_weight,
)  # fmt: skip


def run(number, answers):
    """(whether an answer is right, a line about it). answers: a module."""
    name = EXERCISES[number - 1].__name__
    from minwurst.tour import checks

    try:
        return True, f"right: {getattr(checks, name)(getattr(answers, name))}"
    except NotImplementedError:
        return False, f"{name} in minwurst/tour/exercises.py is not written yet"
    except AssertionError as error:
        return False, f"not yet: {error}"


def main():
    parser = argparse.ArgumentParser(prog="python -m minwurst.tour.exercises")
    numbers = range(1, len(EXERCISES) + 1)
    parser.add_argument("number", type=int, nargs="?", choices=numbers, help="which exercise")
    parser.add_argument("--solution", action="store_true", help="check the given solution")
    given = parser.parse_args()
    if given.number is None:
        for number in numbers:
            print(f"{number}. {inspect.getdoc(EXERCISES[number - 1]).splitlines()[0]}")
        return
    print(inspect.getdoc(EXERCISES[given.number - 1]), end="\n\n")
    answers = importlib.import_module(
        f"minwurst.tour.{'solutions' if given.solution else 'exercises'}"
    )
    is_right, line = run(given.number, answers)
    print(line)
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
