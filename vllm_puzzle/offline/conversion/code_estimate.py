"""How much time and memory coding experts takes."""

from .estimate import BOUNDED_TEMPORARIES, SECONDS_PER_COLUMN, Estimate, Speed
from .work import Work

# Beside two rounds for the scales: passes that decide every code, each over all columns.
_CALIBRATED_PASSES, _BLIND_PASSES = 4, 1
_SCALE_ROUNDS = 2
# Codes that points are fitted to, of each matrix, and how often: as they start, and once more to what was wanted.
_FITTED_CODES, _FITS, _REFITS = 1 << 18, 8, 3


def estimate_coding(work: Work, speed: Speed, bits: float, calibrated: bool, surveys: bool) -> Estimate:
    """What coding costs; see `Method.estimate`. `bits` are those of codes a weight."""
    shape = work.shape
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, len(shape.moe_layers)
    expert, num_experts = work.expert_weights, shape.num_experts * layers
    weights = num_experts * expert
    routed, through = work.routed, work.through
    products = 2.0 * through
    # Losses of element pairs that finding the nearest of the points takes as long as.
    nearest = 0.18 + 2 ** (2 * bits) / 380
    passes = _CALIBRATED_PASSES if calibrated else _BLIND_PASSES
    elements = (_SCALE_ROUNDS + passes) * nearest * weights / 2
    fitted = min(hidden * inner, _FITTED_CODES) + min(hidden * inner / 2, _FITTED_CODES)
    elements += num_experts * (_FITS + _REFITS * calibrated) * nearest * fitted
    columns = 0
    if surveys:
        # Statistics of every expert, and a sample of its rows at every width.
        products += through + 2 * 2 * routed * expert / 3
        elements += weights / 2
    if calibrated:
        products += 2 * through + 4 * 2 * routed * expert + 2 * routed * (hidden**2 + 2 * inner**2)
        # Two factorizations and an inverse per moment; then every column's error into those that follow, twice, and
        # twice into all columns.
        products += num_experts * (2 * hidden**3 + 3 * inner**3)
        products += num_experts * 6 * (2 * inner * hidden**2 + hidden * inner**2)
        if work.on_gpu:
            columns = passes * num_experts * (hidden + inner)
    seconds = products / speed.products + elements / speed.elements + columns * SECONDS_PER_COLUMN
    return Estimate(seconds, _memory(work, calibrated, surveys), weights)


def _memory(work: Work, calibrated: bool, surveys: bool) -> int:
    hidden, inner, num_tokens = work.shape.hidden_size, work.shape.intermediate_size, work.num_tokens
    expert = work.expert_weights
    tokens = work.token_bytes(paths=2 if calibrated else 1)
    whole = work.layer_bytes if surveys else 0
    # An expert as it is read, and gate and up in float32 with what they should become, several times.
    coding = expert * 2 + expert * 4 * 6 + BOUNDED_TEMPORARIES
    if calibrated:
        # The coded layer; an expert's moments in several states; what its output loses, for which all tokens may have
        # been routed to it.
        coding += work.layer_bytes + 4 * (hidden**2 + inner**2) * 6 + num_tokens * hidden * 2
    return tokens + whole + work.jobs * coding
