"""What two mates' elements become, one element at a time: shared by both, or kept by one.

Everywhere `magnitudes` is float32 (2, rows, columns), without sign, of the matrices of members 0 and 1.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Merged:
    """One magnitude for each pair of elements, float32 (rows, columns), and which of the two have it, bool the same."""

    magnitude: torch.Tensor
    held: tuple[torch.Tensor, torch.Tensor]

    def signed(self, weights: torch.Tensor) -> torch.Tensor:
        """Both members' new weights, float32 (2, rows, columns), with the signs of their old ones, `weights`."""
        return torch.copysign(self.magnitude, weights).mul_(torch.stack(self.held))


def paper_rule(magnitudes: torch.Tensor, norms: torch.Tensor, tau: float) -> Merged:
    """The rule of PuzzleMoE, section 3 (arXiv 2511.04805).

    Elements whose magnitudes differ relatively by at most `tau` are shared as their mean; of any other pair the
    element with the larger saliency `|W| * ||X||` stays, member 0's on a tie.

    Args:
        norms: L2 norm of each input channel over the member's calibration tokens, float32 (2, 1, columns).
        tau: the largest relative difference that counts as similar.
    """
    first, second = magnitudes
    total = first + second
    # Two zeros give NaN, which is not similar; the magnitude that is then kept is zero all the same.
    similar = (first - second).abs_().div_(total) <= tau
    salient = first * norms[0] >= second * norms[1]
    magnitude = _choose(similar, total.div_(2), _choose(salient, first, second))
    return Merged(magnitude, (salient | similar, ~salient | similar))


def cheapest(magnitudes: torch.Tensor, costs: torch.Tensor) -> Merged:
    """Of sharing and of leaving out one member, whatever costs least.

    Sharing takes the mean weighted by the costs, which is the best shared magnitude, and costs
    `c0 c1 / (c0 + c1) (|w0| - |w1|)^2`; leaving out member m costs `c_m w_m^2`.

    Args:
        costs: of a unit of squared error in each element, float32, of a shape that broadcasts to that of `magnitudes`.
    """
    first, second = magnitudes
    c0, c1 = costs
    total = (c0 + c1).clamp_(min=torch.finfo(torch.float32).tiny)
    share = c0 * (c1 / total) * (first - second).square_()
    without_second, without_first = c1 * second.square(), c0 * first.square()
    shared = (share <= without_first) & (share <= without_second)
    keeps_first = without_second <= without_first
    mean = first + (c1 / total) * (second - first)
    magnitude = _choose(shared, mean, _choose(keeps_first, first, second))
    return Merged(magnitude, (shared | keeps_first, shared | ~keeps_first))


def cheapest_loss(first: torch.Tensor, second: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor) -> torch.Tensor:
    """What `cheapest` costs, element by element; `first` and `second` are magnitudes, all four broadcast."""
    total = (c0 + c1).clamp(min=torch.finfo(torch.float32).tiny)
    share = c0 * (c1 / total) * (first - second).square()
    return torch.minimum(share, torch.minimum(c0 * first.square(), c1 * second.square()))


def _choose(condition: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`torch.where` of float32. On a CPU that takes a branch for every element, which no processor foresees here."""
    if condition.device.type != "cpu":
        return torch.where(condition, first, second)
    mask = condition.to(torch.int32).neg_()
    a, b = first.view(torch.int32), second.view(torch.int32)
    return (a ^ b).bitwise_and_(mask).bitwise_xor_(b).view(torch.float32)
