import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill.durable import (
    TEMPORARY_PREFIX,
    append_line,
    exclusively,
    staged_folder,
    sweep_temporaries,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX))


def test_written_file_has_the_content_and_nothing_is_left(tmp_path):
    write_atomically(tmp_path / "sub" / "a.bin", lambda file: file.write(b"one"))
    write_atomically(tmp_path / "sub" / "a.bin", lambda file: file.write(b"two"))
    assert (tmp_path / "sub" / "a.bin").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.bin"]


def test_failing_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_file_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noted_replace(*names):
        calls.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["file", "rename", "folder"]


def test_staged_folder_replaces_the_old_one_whole(tmp_path):
    for text in ("one", "two"):
        with staged_folder(tmp_path / "out") as staging:
            (staging / text).write_text(text)
            assert not (tmp_path / "out" / text).exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two"]
    assert leftovers(tmp_path) == []


def test_staged_folder_that_fails_leaves_the_old_one(tmp_path):
    with staged_folder(tmp_path / "out") as staging:
        (staging / "one").write_text("one")

    def fail():
        with staged_folder(tmp_path / "out") as staging:
            (staging / "two").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]
    assert leftovers(tmp_path) == []


def test_sweep_takes_the_dead_and_leaves_the_living(tmp_path):
    code = (
        "import sys, time\n"
        "from distill.durable import staged_folder, write_atomically\n"
        "def hang(file):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "write_atomically(sys.argv[1] + '/slow.bin', hang)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        (tmp_path / f"{TEMPORARY_PREFIX}dead").write_bytes(b"torn")
        (tmp_path / f"{TEMPORARY_PREFIX}dead-folder").mkdir()
        (tmp_path / f"{TEMPORARY_PREFIX}dead-folder" / "a").write_bytes(b"torn")
        (tmp_path / "kept.bin").write_bytes(b"good")
        with staged_folder(tmp_path / "live"):
            assert sweep_temporaries(tmp_path) == 2
            assert len(leftovers(tmp_path)) == 2  # the child's file and this process's folder
        child.send_signal(signal.SIGKILL)
    assert sweep_temporaries(tmp_path) == 1
    assert leftovers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.bin", "live"]


def test_exclusively_lets_one_in_at_a_time(tmp_path):
    inside, most = [0], [0]

    def work():
        for _ in range(20):
            with exclusively(tmp_path / "thing"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                threading.Event().wait(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def test_a_log_s_line_that_a_crash_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n{"step": 4}\n'
