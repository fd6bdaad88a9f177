"""The prior: numerically equal to diffusers' class, with and without recomputation."""


import pytest
import torch

from minwurst.run import estimate
from minwurst.step.prior import PUBLISHED, WuerstchenPrior, embed_timestep
from tests import reference, tiny
from tests.conftest import relative

# In every version, the module of the public pipeline exports the prior's class.


@pytest.fixture(scope="module")
def pair():
    """(ours, diffusers') at the published width, depth 2, same weights, head scaled down."""
    torch.manual_seed(0)
    config = {**PUBLISHED, "depth": 2, "dropout": 0.0}
    theirs = reference.WuerstchenPrior(**config)
    with torch.no_grad():
        theirs.out[1].weight.mul_(0.1), theirs.out[1].bias.mul_(0.1)
        for name, weight in theirs.named_parameters():
            if name.endswith(("gamma", "beta")):  # initialised to zero, which would hide errors
                weight.normal_(std=0.5)
    ours = WuerstchenPrior(**config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(batch=2, cells=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, cells, cells, generator=generator)
    t = torch.rand(batch, generator=generator)
    text = torch.randn(batch, 77, 1280, generator=generator)
    return x, t, text


def test_forward_equals_diffusers(pair):
    ours, theirs = pair
    with torch.no_grad():
        assert relative(ours(*inputs()), theirs(*inputs())) < 1e-5


def test_gradients_equal_diffusers(pair):
    ours, theirs = pair
    for model in pair:
        model.zero_grad()
        model(*inputs()).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if name.endswith("to_k.bias"):
            # A shift of all keys shifts all scores equally: the gradient is zero up to rounding.
            scale = expected[name.replace("to_k", "to_q")].grad.abs().max()
            assert weight.grad.abs().max() < 1e-4 * scale
        else:
            assert relative(weight.grad, expected[name].grad) < 1e-5, name


def test_the_picture_stays_channels_last():
    """Each block returns a tensor in channels-last memory format."""
    prior = tiny.make_prior(c=64, dropout=0.0)
    strides = []
    for block in prior.blocks:
        block.register_forward_hook(lambda block, taken, given: strides.append(given.stride()))
    prior(torch.randn(2, 16, 5, 3), torch.rand(2), torch.randn(2, 7, 32))
    assert strides == [(5 * 3 * 64, 3 * 64, 64, 1)] * 6


def test_published_size():
    with torch.device("meta"):
        weights = WuerstchenPrior(**PUBLISHED).state_dict()
    assert sum(weight.numel() for weight in weights.values()) == 993_636_896
    assert len(weights) == 648


def test_odd_embedding_is_padded_as_in_diffusers():
    config = {"c_in": 4, "c": 16, "c_cond": 8, "c_r": 7, "depth": 1, "nhead": 2}
    t = torch.tensor([0.0, 0.3, 1.0])
    expected = reference.WuerstchenPrior(**config).gen_r_embedding(t)
    torch.testing.assert_close(embed_timestep(t, 7), expected, atol=1e-6, rtol=0)


def test_timestep_embedding_keeps_fp32():
    """Near t = 1, half precision would reduce the highest-frequency sine to noise."""
    t = torch.tensor([0.99731], dtype=torch.float32)
    exact = torch.sin(t.double() * 10000)
    assert (embed_timestep(t, 64)[0, 0] - exact).abs() < 1e-2


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputing_changes_nothing(precision):
    """Same loss and gradients with gradient checkpointing, including the dropout masks."""
    torch.manual_seed(3)
    prior = tiny.make_prior(dropout=0.3).train()
    x, t, text = torch.randn(2, 16, 6, 6), torch.rand(2), torch.randn(2, 77, 32)
    results = []
    for switch in (prior.disable_gradient_checkpointing, prior.enable_gradient_checkpointing):
        switch()
        prior.zero_grad()
        torch.manual_seed(4)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = prior(x, t, text).square().mean()
        loss.backward()
        results.append([loss.detach(), *(weight.grad.clone() for weight in prior.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputing_keeps_less():
    config = {**PUBLISHED, "depth": 32}
    kept = {
        recompute: estimate.activations(
            config, batch=1, shape=(24, 24), compute_type=torch.float32,
            gradient_checkpointing=recompute,
        )
        for recompute in (False, True)
    }
    assert kept[True] < 0.2 * kept[False]


def test_saves_what_diffusers_loads(tmp_path):
    ours = tiny.make_prior(dropout=0.0).eval()
    ours.save_pretrained(tmp_path)
    theirs = reference.WuerstchenPrior.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    x, t, text = torch.randn(1, 16, 3, 3), torch.rand(1), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert relative(theirs(x, t, text), ours(x, t, text)) < 1e-5
