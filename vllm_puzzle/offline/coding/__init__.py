"""What one expert becomes as codes that change its output least, and which expert gets how many bits.

A code stands for two weights, see `vllm_puzzle.format`. Gate and up are one *coded matrix*, the even and odd rows of
down another; both are (2, rows, columns) here, the two *halves* of their codes.
"""
