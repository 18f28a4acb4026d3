"""Everything to be known of a card, in a time that is kept.

    python -m benchmarks.gpu_session --out DIR --seconds 480 --peer PEER

What is found goes to DIR/session.jsonl line by line as it is found, tuned tiles to DIR/tiles, and a summary to standard
output and DIR/summary.md. Exit status 1 if a result was wrong or a stage failed.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.gpu_session.plan import STAGES, Options, compile_only, whole
from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.summary import failures, summary


def main() -> int:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--seconds", type=float, default=480, metavar="N", help="never longer (default: %(default)s)")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="what benchmarks.gpu_session.peer gathered, unpacked")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="NAME", help=f"only these: {', '.join(STAGES)}")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one a core, save one)")
    parser.add_argument("--fake", action="store_true", help="without a card: Triton's interpreter and tiny shapes")
    parser.add_argument(
        "--compile-only", action="store_true", help="without a card: compile for an H100 what the stages would launch"
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = Options(
        out=arguments.out.resolve(),
        peer=arguments.peer.resolve() if arguments.peer else None,
        fake=arguments.fake,
        jobs=arguments.jobs,
        stages=tuple(arguments.stages or STAGES),
    )
    if arguments.stage:
        from benchmarks.gpu_session.stages import run_stage

        return run_stage(arguments.stage, options, arguments.gpu, arguments.limit)
    if options.peer and not (options.peer / "vllm").is_dir():
        parser.error(f"--peer {arguments.peer} has no folder vllm; give one that peer.zip was unpacked to")
    interrupted = False
    try:
        with Session(options.out, arguments.seconds) as session:
            try:
                (compile_only if arguments.compile_only else whole)(session, options)
            except KeyboardInterrupt:
                interrupted = True
        text = summary(session.rows)
        (options.out / "summary.md").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {arguments.out} cannot be written: {error.strerror}; give another --out\n")
    print(f"\n{text}", flush=True)
    if interrupted:
        return 130
    return 1 if failures(session.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
