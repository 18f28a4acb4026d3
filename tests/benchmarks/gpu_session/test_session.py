"""The parent of a session: stages that fail in every way, a time that is kept, and lines that are kept."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.summary import failures, summary
from tests.benchmarks.gpu_session.stages import lines, say, stage


def test_a_stage_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # Its child keeps the pipe open, and ignores what can be ignored.
    hanging = (
        say(what="begun")
        + "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        + f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    with Session(tmp_path, 60) as session:
        assert not session.run(stage("hang", hanging, 6))
        assert session.run(stage("next", say(what="here")))
    rows = lines(tmp_path)
    assert [row["what"] for row in rows] == ["begun", "stage", "here", "stage"]
    assert (rows[1]["status"], rows[1]["ended"]) == (-9, "at its limit")
    child = Path(f"/proc/{pid_file.read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert len(failures(rows)) == 1
    assert "| hang | 6 s | status -9, at its limit |" in summary(rows)


def test_a_stage_that_crashes_keeps_its_lines_and_its_last_words(tmp_path: Path) -> None:
    with Session(tmp_path, 60) as session:
        crash = say(what="begun") + "import os, sys; print('illegal', 'access', file=sys.stderr); os.abort()"
        assert not session.run(stage("crash", crash))
        assert session.run(stage("next", say(what="here")))
    rows = lines(tmp_path)
    assert [row["what"] for row in rows] == ["begun", "stage", "here", "stage"]
    assert rows[1]["status"] == -6
    assert "illegal access" in rows[1]["output"]
    assert rows[0]["stage"] == "crash"


def test_nobody_waits_for_a_stage_that_is_over(tmp_path: Path) -> None:
    with Session(tmp_path, 3600) as session:
        crash = session.start(stage("beside", say(what="begun") + "import os; os.abort()"))
        assert crash is not None
        # Were nobody told that it is over, this would wait for an hour.
        assert session.wait(lambda rows: crash.over or any(row["what"] == "never" for row in rows), 3600)
    assert [row["what"] for row in lines(tmp_path)] == ["begun", "stage"]


def test_the_time_is_kept_whatever_runs(tmp_path: Path) -> None:
    with Session(tmp_path, 12) as session:
        beside = session.start(stage("beside", "import time; time.sleep(600)"))
        assert beside is not None
        session.run(stage("long", "import time; time.sleep(600)"))
        assert not session.run(stage("late", say(what="here")))
    rows = {row["stage"]: row for row in lines(tmp_path)}
    assert rows["long"]["ended"] == "at its limit"
    assert "seconds are left" in rows["late"]["skipped"]
    assert rows["beside"]["ended"] == "when no longer needed"


def test_a_line_is_on_the_disk_when_it_is_printed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from benchmarks.gpu_session.session import Session, Stage\n"
        "with Session(Path(sys.argv[1]), 60) as session:\n"
        "    session.run(Stage('one', [sys.executable, '-c', sys.argv[2]], 50))\n"
    )
    slow = say(what="first") + "import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), slow], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = json.loads(process.stdout.readline())
    assert lines(tmp_path) == [printed]
    # Ended from outside, it ends its stage.
    process.terminate()
    process.wait(30)
    assert lines(tmp_path)[-1]["stage"] == "one"
    process.stdout.close()
