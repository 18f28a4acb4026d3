"""What two mates' elements become, one element at a time: shared by both, or kept by one.

Everywhere `weights` is float32 (2, rows, columns), the matrices of members 0 and 1, and so is what a rule answers:
both members' new weights, of which each pair of elements has one magnitude or a zero.
"""

import torch


def paper_rule(weights: torch.Tensor, norms: torch.Tensor, tau: float) -> torch.Tensor:
    """The rule of PuzzleMoE, section 3 (arXiv 2511.04805).

    Elements whose magnitudes differ relatively by at most `tau` are shared as their mean; of any other pair the
    element with the larger saliency `|W| * ||X||` stays, member 0's on a tie.

    Args:
        norms: L2 norm of each input channel over the member's calibration tokens, float32 (2, columns).
        tau: the largest relative difference that counts as similar.
    """
    first, second = weights.abs()
    total = first + second
    # Two zeros give NaN, which is not similar; the magnitude that is then kept is zero all the same.
    similar = (first - second).abs() / total <= tau
    salient = first * norms[0] >= second * norms[1]
    magnitude = torch.where(similar, total / 2, torch.where(salient, first, second))
    return _signed(magnitude, torch.stack([salient | similar, ~salient | similar]), weights)


def cheapest(weights: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Of sharing and of leaving out one member, whatever costs least.

    Sharing takes the mean weighted by the costs, which is the best shared magnitude, and costs
    `c0 c1 / (c0 + c1) (|w0| - |w1|)^2`; leaving out member m costs `c_m w_m^2`.

    Args:
        costs: of a unit of squared error in each element, float32, of a shape that broadcasts to that of `weights`.
    """
    first, second = weights.abs()
    c0, c1 = costs
    total = (c0 + c1).clamp(min=torch.finfo(torch.float32).tiny)
    share = c0 * (c1 / total) * (first - second).square()
    without_second, without_first = c1 * second.square(), c0 * first.square()
    shared = (share <= without_first) & (share <= without_second)
    keeps_first = without_second <= without_first
    mean = first + (c1 / total) * (second - first)
    magnitude = torch.where(shared, mean, torch.where(keeps_first, first, second))
    return _signed(magnitude, torch.stack([shared | keeps_first, shared | ~keeps_first]), weights)


def cheapest_loss(first: torch.Tensor, second: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor) -> torch.Tensor:
    """What `cheapest` costs, element by element; `first` and `second` are magnitudes, all four broadcast."""
    total = (c0 + c1).clamp(min=torch.finfo(torch.float32).tiny)
    share = c0 * (c1 / total) * (first - second).square()
    return torch.minimum(share, torch.minimum(c0 * first.square(), c1 * second.square()))


def _signed(magnitude: torch.Tensor, held: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.where(held, torch.copysign(magnitude, weights), 0.0)
