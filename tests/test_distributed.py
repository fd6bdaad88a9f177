"""Distributed helpers: internals that the other multi-rank tests do not check."""

import pytest
import torch
import torch.distributed

from minwurst.base.errors import UserError
from minwurst.step import distributed
from tests import tiny
from tests.conftest import free_port


@pytest.fixture
def group(monkeypatch):
    """A process group of size 1 that reports size 2, so that `wrap_ddp` uses DDP."""
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_stay_in_ddps_buckets(group):
    """Gradients stay views of the buckets through accumulation; there is no second copy."""
    prior = tiny.make_prior()
    model = distributed.wrap_ddp(prior, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    weights = dict(model.named_parameters())
    places = {name: weight.grad.data_ptr() for name, weight in weights.items()}
    buckets = {weight.grad.untyped_storage().data_ptr() for weight in weights.values()}
    assert len(buckets) < 5 < len(weights)
    assert all(weight.grad.count_nonzero() == 0 for weight in weights.values())
    for _ in range(2):
        for last in (False, True):
            with distributed.sync_gradients(model, last):
                inputs = torch.randn(2, 16, 3, 3), torch.rand(2), torch.randn(2, 7, 32)
                model(*inputs).square().mean().backward()
        assert {name: weight.grad.data_ptr() for name, weight in weights.items()} == places
        model.zero_grad(set_to_none=False)


def test_on_main_hands_on_results_and_mistakes(group):
    assert distributed.on_main(lambda x: x + 1, 1) == 2

    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        distributed.on_main(fail)


def test_alone_the_model_is_itself():
    prior = tiny.make_prior()
    assert distributed.wrap_ddp(prior, torch.device("cpu"), None) is prior
    assert distributed.mean(torch.tensor(3.0)) == 3.0
    assert distributed.gather_objects("x") == ["x"]
