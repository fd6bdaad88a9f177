"""Signals: what is asked from outside is done at the end of a step, by all ranks together.

    asked = signals.listen()                                     # nothing yet
    for step in steps:
        ...
        finite, asked = guard.check(step, loss, norm, signals.heard())
        ...                                                      # save where anything is asked
        if asked in signals.ENDS:
            break
    if signals.ended(asked):
        return asked                                             # dist.run's exit code is 128 more

SIGTERM and Ctrl-C finish the step, save and end; a second Ctrl-C ends at once. SIGUSR1 saves and
goes on. One rank that hears it is enough. Before and after the loop signals do what they always do:
the process is gone, and what was saved is intact.
"""

import os
import signal
import threading

from minwurst import dist, report

NOTHING = 0
ENDS = {signal.SIGINT, signal.SIGTERM}
BY_STRENGTH = (NOTHING, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)

received, before = set(), {}  # the signals since `listen`; what each did before it


def listen():
    """From here on signals are only noted."""
    received.clear()
    for number in BY_STRENGTH[1:]:
        before[number] = signal.signal(number, note)
    return NOTHING


def note(number, frame):
    received.add(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        if dist.is_main():  # by the shortest way: what was interrupted may be a print
            os.write(2, b"\nCtrl-C: finishing the step, then saving. Once more ends at once.\n")


def heard():
    """The strongest signal since the last call; one that ends is heard again and again."""
    found = strongest(received)
    received.discard(signal.SIGUSR1)
    return found


def strongest(numbers):
    return max(numbers, key=BY_STRENGTH.index, default=NOTHING)


def ended(asked):
    """Whether a signal ended the loop; each does again what it did before `listen`."""
    for number, handler in before.items():
        signal.signal(number, handler)
    if asked in ENDS:
        name = signal.Signals(asked).name
        report.say(f"{name}: saved and stopped; --resume_from_checkpoint=latest goes on from here")
        return True
    for number in received & ENDS:  # it came after the last step's check, so it acts now
        signal.raise_signal(number)
    return False


def in_worker(number):
    """In a process that reads pictures: signals are its trainer's business, which alone ends it.

    Terminals and schedulers send them to all processes of a job, and the last step still needs its
    pictures. A SIGTERM from the trainer must be obeyed, or the trainer could not leave.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where torch's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey_the_trainer, daemon=True).start()


def obey_the_trainer():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
