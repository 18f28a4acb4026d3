"""How much time and memory coding experts takes."""

from ..merging.layer import TOKENS_AT_ONCE
from .estimate import Estimate, Speed
from .work import Work

# Beside two rounds for the scales: passes that decide every code, each over all columns.
_CALIBRATED_PASSES, _BLIND_PASSES = 4, 1
_SCALE_ROUNDS = 2
# Values that points are fitted to, for each point, and how often; each costs as much as so many codes.
_SAMPLES_PER_POINT, _FIT_ROUNDS, _FIT_COST = 256, 11, 3
# A column takes about 15 operations, each 5 to 10 microseconds where it is launched for itself.
_SECONDS_PER_COLUMN = 1.5e-4
# Temporaries that are bounded whatever the model's size.
_BLOCKS = 1 << 28


def estimate_coding(work: Work, speed: Speed, bits: float, calibrated: bool, surveys: bool) -> Estimate:
    """What coding costs; see `Method.estimate`. `bits` are those of codes a weight."""
    shape, num_tokens = work.shape, work.num_tokens
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, len(shape.moe_layers)
    expert, num_experts = 3 * hidden * inner, shape.num_experts * layers
    weights = num_experts * expert
    routed = num_tokens * work.top_k * layers
    through = 2 * routed * expert + 2 * num_tokens * work.dense_weights
    products = 2.0 * through
    # Losses of element pairs that finding the nearest of the points takes as long as.
    nearest = 0.3 + 2 ** (2 * bits) / 100
    passes = _CALIBRATED_PASSES if calibrated else _BLIND_PASSES
    elements = (_SCALE_ROUNDS + passes) * nearest * weights / 2
    samples = min(expert / 4, _SAMPLES_PER_POINT * 2 ** (2 * bits))
    elements += 2 * num_experts * _FIT_ROUNDS * _FIT_COST * nearest * samples
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
    seconds = products / speed.products + elements / speed.elements + columns * _SECONDS_PER_COLUMN
    return Estimate(seconds, _memory(work, calibrated, surveys), weights)


def _memory(work: Work, calibrated: bool, surveys: bool) -> int:
    hidden, inner, num_tokens = work.shape.hidden_size, work.shape.intermediate_size, work.num_tokens
    expert = 3 * hidden * inner
    # The hidden states, what enters the experts and their output in float32; where tokens go.
    paths = 2 if calibrated else 1
    tokens = num_tokens * hidden * (2 * paths + 2 + 4 * paths) + num_tokens * work.top_k * 12
    tokens += min(num_tokens, TOKENS_AT_ONCE) * (6 * hidden + 8 * inner) * 4
    whole = work.layer_bytes if surveys else 0
    # An expert as it is read, and gate and up in float32 with what they should become, several times.
    coding = expert * 2 + expert * 4 * 6 + _BLOCKS
    if calibrated:
        # The coded layer; an expert's moments in several states; what its output loses, for which all tokens may have
        # been routed to it.
        coding += work.layer_bytes + 4 * (hidden**2 + inner**2) * 6 + num_tokens * hidden * 2
    return tokens + whole + work.jobs * coding
