"""The guard: a non-finite value stops the run, or skips the step in fp16."""

import math

import pytest
import torch

from minwurst.base.errors import UserError
from minwurst.step import signals
from minwurst.step.guard import FiniteGuard

FINE, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)


def test_guard_stops_at_a_bad_loss():
    for fp16 in (False, True):
        with pytest.raises(UserError, match="Step 3: the loss is not finite on rank 0"):
            FiniteGuard(fp16).check(3, NAN, FINE)


def test_guard_stops_at_a_bad_gradient_without_a_scaler():
    assert FiniteGuard(fp16=False).check(1, FINE, FINE) == (True, signals.NOTHING)
    with pytest.raises(UserError, match="Step 3: the gradient is not finite"):
        FiniteGuard(fp16=False).check(3, FINE, INF)


def test_guard_skips_overflows_a_few_times_in_a_row():
    guard = FiniteGuard(fp16=True, patience=2)
    finite = [guard.check(1, FINE, INF)[0], guard.check(2, FINE, NAN)[0]]
    finite += [guard.check(3, FINE, FINE)[0]]  # resets the count
    finite += [guard.check(4, FINE, INF)[0], guard.check(5, FINE, INF)[0]]
    assert finite == [False, False, True, False, False]
    with pytest.raises(UserError, match="Step 6"):
        guard.check(6, FINE, INF)
