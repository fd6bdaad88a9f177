"""Signals take effect at the end of a step, on all ranks together.

    signal = signals.listen()                             # none yet
    for step in steps:
        ...
        finite, signal = guard.check(step, loss, norm)    # the strongest signal of any rank
        ...                                               # save if there is one
        if signal in signals.ENDING:
            break
    if signals.finish(signal):
        return signal                                     # exit code 128 + signal

SIGTERM, SIGHUP (the terminal is gone) and Ctrl-C finish the step, save and exit; a second Ctrl-C
exits at once. SIGUSR1 saves and continues. SIGHUP is ignored if it was before, as under nohup. One
rank that receives a signal is enough. Outside the loop, signals do what they usually do: the
process ends, and everything saved is intact.
"""

import os
import signal
import threading

from minwurst.base.console import say
from minwurst.base.errors import command_with
from minwurst.base.ranks import is_main

NOTHING, FAILURE = 0, 1000  # FAILURE: something failed in another thread of this rank
ENDING = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM}
BY_STRENGTH = (NOTHING, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, FAILURE)

received, handlers = set(), {}  # signals since `listen`; the handlers from before it


def listen():
    """From now on only record signals."""
    received.clear()
    for number in BY_STRENGTH[1:-1]:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, record)
    return NOTHING


def record(number, frame):
    received.add(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        if is_main():  # a plain write, because the signal may have interrupted a print
            os.write(2, b"\nCtrl-C: finishing the step, then saving. Again to exit at once.\n")


def pending():
    """The strongest signal since the last call. One that ends the run stays pending."""
    strongest = strongest_of(received)
    received.discard(signal.SIGUSR1)
    return strongest


def strongest_of(numbers):
    return max(numbers, key=BY_STRENGTH.index, default=NOTHING)


def finish(number):
    """Restore the handlers from before `listen`, and return whether this signal ended the loop."""
    for restored, handler in handlers.items():
        signal.signal(restored, handler)
    if number in ENDING:
        name = signal.Signals(number).name
        resume = command_with("--resume_from_checkpoint=latest")
        say(f"{name}: saved and stopped. To resume: {resume}")
        return True
    for late in received & ENDING:  # it came after the last step's check
        signal.raise_signal(late)
    return False


def in_worker(number):
    """Set up a data-loading process, which only its trainer may end.

    Terminals and schedulers signal all processes of a job, but the last step still needs its
    images. The trainer's own SIGTERM has to work, or the trainer could not exit.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, which keeps torch's own handler
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=exit_when_trainer_asks, daemon=True).start()


def exit_when_trainer_asks():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
