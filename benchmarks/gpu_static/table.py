"""The rows as a table for people."""

from collections.abc import Sequence

from benchmarks.gpu_static.rows import Row


def table(rows: Sequence[Row]) -> str:
    """The rows of unsplit sums in bfloat16 as a table in Markdown, member 0 and 1 as the larger of the two."""
    heads = ["target", "tokens per expert", "product", "tile", "decoded", "integer", "half", "all", "bytes", "loads"]
    heads += ["stores", "tensor", "registers", "shared KB", "programs (stated)", "occupancy"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row.dtype != "bfloat16" or row.config["split_k"] > 1 or row.member == "0":
            continue
        config = row.config
        cells = [
            row.target,
            f"to {row.tokens_per_expert}",
            row.kernel.removesuffix("_kernel"),
            f"{config['block_rows']} x {config['block_tokens']} x {config['block_k']}, {config['num_warps']} warps, "
            f"{config['num_stages']} stages",
            {"1": "one", "both": "both"}[row.member],
            f"{row.alu_per_element:.2f}",
            f"{row.half_per_element:.2f}",
            f"{row.issued_per_element:.2f}",
            f"{row.bytes_per_element:.2f} + {row.activation_bytes_per_element:.2f}",
            f"{row.load_bytes} B",
            str(row.operand_stores),
            row.tensor_instruction.split(".")[0],
            str(row.registers),
            f"{row.shared_bytes / 1024:.0f}",
            f"{row.programs_per_sm} ({row.stated_programs_per_sm})",
            f"{row.occupancy:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
