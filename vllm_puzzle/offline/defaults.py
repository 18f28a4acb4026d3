"""What the command line shows of defaults; imports nothing, so that `--help` need not wait for torch."""

# PuzzleMoE, section 4: 128 sequences of 2048 tokens.
SEQUENCE_LENGTH = 2048
DEFAULT_SEQUENCES = 128

# Bytes of the tensors of one file.
DEFAULT_SHARD_SIZE = 5 * 10**9
