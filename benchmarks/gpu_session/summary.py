"""What a session found, in Markdown, made from its lines alone."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.gpu_session.session import Row

_CHECKS = ("correct", "graph", "waits", "watched", "time", "tuned")
_SHOWN = 8
_CEILINGS = {
    "read_gb_per_s": "GB/s read",
    "copy_gb_per_s": "GB/s copied",
    "bf16_tflops": "TFLOP/s in BF16",
    "fp8_tflops": "TFLOP/s in FP8",
}


def failures(rows: Sequence[Row]) -> list[Row]:
    """Lines of wrong results, and of stages that did not end well."""
    return [row for row in rows if is_wrong(row)] + [row for row in rows if _is_broken(row)]


def is_wrong(row: Row) -> bool:
    return row["what"] in _CHECKS and row.get("ok") is False


def _is_broken(row: Row) -> bool:
    ended_early = row["what"] == "stage" and row.get("ended") != "when no longer needed" and row.get("status", 0) != 0
    return ended_early or bool(row["what"] == "compiled" and row.get("failure") and row["stage"] != "tune")


def summary(rows: Sequence[Row]) -> str:
    """Tables of times, tiles and stages, after what was wrong."""
    parts = [_card(rows), _checks(rows), _times(rows), _tuned(rows), _stages(rows)]
    return "\n\n".join(part for part in parts if part)


def _of(rows: Iterable[Row], what: str) -> list[Row]:
    return [row for row in rows if row["what"] == what]


def _ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """What the card does at most, as measured, by the names in _CEILINGS."""
    return {name: row[name] for row in _of(rows, "ceilings") for name in _CEILINGS if name in row}


def _card(rows: Sequence[Row]) -> str:
    facts = [f"{row['gpu']['device_name']}, {row['gpu']['num_sms']} multiprocessors" for row in _of(rows, "gpu")]
    for row in _of(rows, "versions"):
        facts.append(", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "cuda", "hip") if row.get(name)))
    facts += [
        ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("at", "stage", "what"))
        for row in _of(rows, "nvidia-smi")[-1:]
    ]
    measured = [f"{_CEILINGS[name]} {value:,.0f}" for name, value in _ceilings(rows).items()]
    facts += [f"Measured ceilings: {', '.join(measured)}."] if measured else []
    facts += [f"A graph of {row['kernels']} launches: {row['us']:.1f} µs." for row in _of(rows, "launches")]
    if any(not row["sorts_by_library"] for row in _of(rows, "peer")):
        facts.append("vLLM's tokens are sorted by torch's kernels, its library not being there: few tokens say little.")
    return "\n".join(f"- {fact}" for fact in facts)


def _checks(rows: Sequence[Row]) -> str:
    lines = []
    for what in _CHECKS:
        checked = [row for row in _of(rows, what) if "ok" in row]
        if checked:
            lines.append(f"- {what}: {sum(row['ok'] for row in checked)} of {len(checked)} right")
    wrong = [row for row in rows if is_wrong(row)]
    for row in wrong[:_SHOWN]:
        lines.append(f"- **WRONG** {', '.join(f'{name} {value}' for name, value in row.items() if name != 'ok')}")
    if len(wrong) > _SHOWN:
        lines.append(f"- **WRONG** {len(wrong) - _SHOWN} more, in session.jsonl")
    lines += [f"- **BROKEN** {row['stage']}: {row['error']}" for row in _of(rows, "broken")]
    return "\n".join(lines)


def _table(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def _times(rows: Sequence[Row]) -> str:
    """A table for each shape: a line for a number of tokens and a routing, a column for an engine."""
    ceilings, parts = _ceilings(rows), []
    times = _of(rows, "time")
    for shape in dict.fromkeys(row["shape"] for row in times):
        here = [row for row in times if row["shape"] == shape]
        engines = list(dict.fromkeys(row["engine"] for row in here))
        calls = dict.fromkeys((row["tokens"], row["routing"]) for row in here)
        cells = []
        for tokens, routing in calls:
            found = {row["engine"]: row for row in here if (row["tokens"], row["routing"]) == (tokens, routing)}
            cells.append([str(tokens), routing, *(_time(found.get(engine), ceilings) for engine in engines)])
        parts.append(f"**{shape}**\n\n{_table(['tokens', 'routing', *engines], cells)}")
    if parts:
        parts.append(
            "Cells are µs of a call, GB/s and TFLOP/s achieved with their share of the measured ceilings, and the "
            "speed-up over vLLM's BF16."
        )
    return "\n\n".join(parts)


def _time(row: Row | None, ceilings: dict[str, float]) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "error"
    share: Callable[[float, str], str] = lambda value, name: (  # noqa: E731
        f" ({value / ceilings[name]:.0%})" if ceilings.get(name) else ""
    )
    most = "fp8_tflops" if "fp8" in row["engine"] or "scaled" in row["engine"] else "bf16_tflops"
    cell = (
        f"{row['us']:,.1f} µs, {row['gb_per_s']:,.0f} GB/s{share(row['gb_per_s'], 'read_gb_per_s')}, "
        f"{row['tflops']:,.0f} TF{share(row['tflops'], most)}"
    )
    ratio = row.get("ratio_vs_vllm_bf16")
    return cell + (f", {ratio:.2f}x" if ratio else "") + ("" if row["ok"] else " **WRONG**")


def _tuned(rows: Sequence[Row]) -> str:
    tuned = _of(rows, "tuned")
    if not tuned:
        return ""
    cells = [
        [
            str(row["tokens"]),
            f"{row['us_before']:.1f}",
            f"{row['us']:.1f}",
            f"{row['measured']} measured, {row['failed']} did not run{'' if row['finished'] else ', out of time'}",
        ]
        for row in tuned
    ]
    return _table(["tokens", "µs, default", "µs, tuned", "configurations"], cells)


def _stages(rows: Sequence[Row]) -> str:
    cells = []
    for row in _of(rows, "stage"):
        if "skipped" in row:
            cells.append([row["stage"], "skipped", row["skipped"]])
            continue
        status = "ended well" if row["status"] == 0 else f"status {row['status']}"
        cells.append([row["stage"], f"{row['seconds']:.0f} s", f"{status}, {row['ended']}"])
    compiled, failed = _of(rows, "compiled"), [row for row in _of(rows, "compiled") if row.get("failure")]
    count = sum(row["count"] for row in _of(rows, "to compile"))
    text = _table(["stage", "time", "end"], cells)
    if count:
        seconds = sum(row["seconds"] for row in compiled)
        text += f"\n\nCompiled: {len(compiled) - len(failed)} of {count} calls, {seconds:.0f} s of a core."
        text += "".join(f"\n- failed, {row['stage']}: {row['failure']}" for row in failed[:_SHOWN])
    return text
