"""Finding the Triton engine's fastest tiles for one layer's shape on the card at hand: `vllm-puzzle tune`.

Candidates are compiled by processes that never see the card and measured by one that does. Importing this package
imports neither torch nor Triton.
"""
