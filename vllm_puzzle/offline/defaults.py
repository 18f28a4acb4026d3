"""What a conversion takes where an option is left open; imports nothing, so that `--help` need not wait for torch."""

# PuzzleMoE (arXiv 2511.04805), section 4: 128 sequences of 2048 tokens.
SEQUENCE_LENGTH = 2048
DEFAULT_SEQUENCES = 128

# The paper's for every model: the largest relative difference of two magnitudes that become one.
DEFAULT_TAU = 0.4

DEFAULT_PAIRING = "random"

# Percent of the routed experts' bytes that packing saves.
DEFAULT_COMPRESSION = 50.0

# How codes are made, which `--bits` asks for; the rules for pairs are in `merging.rules`.
CODE_RULE = "codebook"

DEFAULT_SEED = 0
DEFAULT_DEVICE = "cpu"

# Layers that are merged at once.
DEFAULT_JOBS = 1

# Bytes of the tensors of one file.
DEFAULT_SHARD_SIZE = 5 * 10**9
