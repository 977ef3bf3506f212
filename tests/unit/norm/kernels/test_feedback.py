"""The correction that each image gets from those before it (float64)."""

import pytest
import torch
from helpers import largest_difference, tiny_recipe
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import ImageSet
from bln_train.errors import UsageError
from bln_train.norm import BatchlessNorm2d, BatchlessStatistics
from bln_train.norm.kernels.feedback import begin_feedback, no_feedback, regression
from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE, StateRow
from bln_train.norm.update import update_layers
from bln_train.train.batches import EffectiveBatch
from bln_train.train.distributed import World


def drawn(num_images=40, std=1.0, dtype=torch.float64):
    """A norm of true mean whose deviation may lag behind, an input, and a gradient of its output with parts along 1 and xhat."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images, 3, 5, 5, generator=generator, dtype=dtype)
    g = torch.randn(x.shape, generator=generator, dtype=dtype) + 0.5 * x + 0.3
    norm = BatchlessNorm2d(3, dtype=dtype)
    norm.set_statistics(x.mean((0, 2, 3)), std * x.std((0, 2, 3), correction=0))
    return norm, x, g


def corrected(norm, x, g, sizes, announced):
    """(g - A - B * xhat) of each image, as the input's gradient shows it, of a summed loss."""
    statistics, inputs = BatchlessStatistics(norm), x.clone().requires_grad_()
    statistics.begin(announced)
    for part, of_part in zip(inputs.split(sizes), g.split(sizes), strict=True):
        ((norm(part) * of_part).sum() + statistics.nll()).backward()
    return inputs.grad * norm.std.detach().view(-1, 1, 1)


@pytest.mark.parametrize("std", [1.0, 0.4])  # with the second xhat^2 is 6 on average
def test_what_is_left_over_is_spread_over_the_images_to_come(std):
    """Each image loses d * (running + left / (N - k + HORIZON)); what is left over at last is in the state, and small."""
    norm, x, g = drawn(std=std)
    norm.correction.copy_(torch.tensor([[0.2], [-0.1]], dtype=x.dtype).expand(2, 3))
    found = corrected(norm, x, g, 1, len(x))
    xhat = ((x - norm.mean.view(-1, 1, 1)) / norm.std.view(-1, 1, 1)).detach()
    left, constant = torch.zeros(2, 2, 3, dtype=x.dtype).unbind(0)
    for k, image in enumerate(found):
        d = (LARGEST_SQUARE / (1 + xhat[k].square().mean((1, 2)))).clamp(max=1).sqrt()
        (a, b) = (d * (norm.correction + left / (len(x) - k + HORIZON)))[..., None, None]
        torch.testing.assert_close(image, g[k] - a - b * xhat[k], rtol=1e-10, atol=1e-12)
        left += d * torch.stack((image.mean((1, 2)), (image * xhat[k]).mean((1, 2))))
        rest = g[k] - norm.correction[0].view(-1, 1, 1) - norm.correction[1].view(-1, 1, 1) * xhat[k]
        constant += torch.stack((rest.mean((1, 2)), (rest * xhat[k]).mean((1, 2))))
    torch.testing.assert_close(norm.feedback[: StateRow.TO_COME], left, rtol=1e-10, atol=1e-10)
    assert left.norm() < 0.85 * constant.norm()


def test_no_split_changes_it():
    """Micro-batches of any size, also where more images come than were announced, or nobody knows how many."""
    for announced in (40, 7, None):
        found = []
        for sizes in (1, 7, 40):
            norm, x, g = drawn(std=0.7)
            found.append(
                {"g": corrected(norm, x, g, sizes, announced), "state": norm.feedback[: StateRow.TO_COME].clone()}
            )
        assert largest_difference(found[0], found[1]) < 1e-12
        assert largest_difference(found[0], found[2]) < 1e-12


def test_without_a_number_the_running_correction_is_taken():
    """As where `begin` was never called, or the batch is over."""
    norm, x, g = drawn()
    norm.correction.fill_(0.1)
    xhat = ((x - norm.mean.view(-1, 1, 1)) / norm.std.view(-1, 1, 1)).detach()
    torch.testing.assert_close(corrected(norm, x, g, 4, None), g - 0.1 - 0.1 * xhat, rtol=1e-10, atol=1e-12)
    assert bool(norm.feedback[StateRow.TO_COME].isinf().all())
    for over in (lambda: update_layers([norm], 40), norm.discard):
        corrected(norm, x, g, 4, 40)
        assert bool(norm.feedback[: StateRow.TO_COME].any())
        over()
        assert bool(norm.feedback[StateRow.TO_COME].isinf().all())
        assert not norm.feedback[: StateRow.TO_COME].any()


def test_a_layer_used_twice_has_no_feedback():
    """Its images come in another order with each split: it keeps to the running correction, and law 1."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.conv = BatchlessNorm2d(3, dtype=torch.float64), nn.Conv2d(3, 3, 3, dtype=torch.float64)

        def forward(self, x):
            return self.norm(self.conv(self.norm(x)))

    found = []
    for sizes in (1, 3, 8):
        net, (_, x, _) = Twice(), drawn(8)
        statistics = BatchlessStatistics(net)
        net.norm.correction.fill_(0.3)
        statistics.begin(8)
        for part in x.split(sizes):
            (net(part).square().sum() + statistics.nll()).backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
        assert net.norm.is_reused
    assert largest_difference(found[0], found[1]) < 1e-12
    assert largest_difference(found[0], found[2]) < 1e-12


def test_an_image_of_weight_0_leaves_nothing_over():
    """Nothing was taken out of its gradient, which is 0; the images around it get what they get without it."""
    found = []
    for inside in (False, True):
        norm, x, g = drawn(8)
        norm.correction.fill_(0.2)
        statistics = BatchlessStatistics(norm)
        statistics.begin(8)
        for n, (part, of_part) in enumerate(zip(x.split(2), g.split(2), strict=True)):
            if inside and n == 2:
                (0.0 * ((norm(3 * part) * of_part).sum() + statistics.nll())).backward()
            inputs = part.clone().requires_grad_()
            ((norm(inputs) * of_part).sum() + statistics.nll()).backward()
        found.append({"last": inputs.grad, "state": norm.feedback.clone()})
    assert largest_difference(*found) < 1e-12


def test_batches_begin_with_nothing_left_over():
    """In place, and of several layers at once; without a number, as without feedback, nothing is to be spread."""
    states = [torch.ones(3, 4), torch.ones(3, 2)]
    begin_feedback([], 5)
    begin_feedback(states, 5)
    for state in states:
        assert not state[: StateRow.TO_COME].any()
        assert bool((state[StateRow.TO_COME] == 5 + HORIZON).all())
    begin_feedback(states, None)
    assert torch.equal(states[0], no_feedback(torch.ones(2, 4)))
    assert bool(states[0][StateRow.TO_COME].isinf().all())


def test_regression_leaves_nothing_over():
    """Also of values that are not standardised; of values that hardly vary it takes little."""
    x, g = torch.randn(2, 1000, 4, dtype=torch.float64) * 1.7 + 0.4

    def regressed(x):
        return regression((g.mean(0), (g * x).mean(0)), (x.mean(0), (x * x).mean(0)))

    shift, slope = regressed(x)
    rest = g - shift - slope * x
    assert rest.mean(0).abs().max() < 1e-12
    assert (rest * x).mean(0).abs().max() < 1e-12
    assert bool((regressed(1e-3 * x)[1].abs() < 0.1 * slope.abs()).all())


def test_the_running_correction_follows_the_regression():
    """update averages the batch's own coefficients, whatever the deviation in force."""
    norm, x, g = drawn(std=0.5)
    statistics = BatchlessStatistics(norm)
    statistics.begin(None)
    xhat = ((x - norm.mean.view(-1, 1, 1)) / norm.std.view(-1, 1, 1)).detach()
    ((norm(x) * g).sum() + statistics.nll()).div(40).backward()
    statistics.update(40)
    variance, first = torch.var_mean(xhat, (0, 2, 3), correction=0)
    slope = ((g * xhat).mean((0, 2, 3)) - g.mean((0, 2, 3)) * first) / variance
    expected = torch.stack((g.mean((0, 2, 3)) - slope * first, slope))
    torch.testing.assert_close(norm.correction, 0.1 * expected, rtol=1e-9, atol=1e-12)


def test_parts_have_a_feedback_each():
    """`norm.correction_parts`: each part begins anew, with its own number of images, whatever the micro-batch."""
    for micro in (1, 4):
        norm = {"name": "batchless", "correction_parts": 3}
        step = build_experiment(tiny_recipe(norm=norm, train__micro_batch_size=micro)).trainer.accumulation
        begin, lengths = step.statistics.begin_part, []
        step.statistics.begin_part = lambda num, begin=begin, lengths=lengths: (lengths.append(num), begin(num))
        list(step._share_of(EffectiveBatch(step_images(), torch.arange(16), 0, 0)))
        assert lengths == [6, 5, 5]
        assert all(
            float(layer.feedback[StateRow.TO_COME, 0]) == 5 + HORIZON for layer in step.statistics.layers.values()
        )


def step_images():
    """16 images of no meaning."""
    return ImageSet(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64))


def test_parts_that_processes_cannot_share_are_refused():
    """With what would do."""
    recipe = tiny_recipe(norm={"name": "batchless", "correction_parts": 4})
    with pytest.raises(UsageError, match="3 processes cannot share equally") as error:
        build_experiment(recipe, world=World(0, 3))
    assert "norm.correction_parts=6" in str(error.value)
