"""Files that only one process uses: right or an error that names them, and gone in the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memopt import InputError, MemoptError
from memopt.scratch import Scratch

ROOT = Path(__file__).resolve().parent.parent
DATA = bytes(range(256)) * 40


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path)


def read(scratch, file, size=256 * 40):
    data = bytearray(size)
    scratch.read(file, data)
    return bytes(data)


def test_what_was_written_is_read(scratch, tmp_path):
    files = [scratch.new() for _ in range(3)]
    for i, file in enumerate(files):
        scratch.write(file, DATA[i:])
    assert [read(scratch, file, len(DATA) - i) for i, file in enumerate(files)] == [DATA, DATA[1:], DATA[2:]]
    scratch.drop(files[0])
    assert sorted(os.listdir(scratch.folder)) == ["1", "2", "memopt.lock"]
    scratch.remove()
    assert os.listdir(tmp_path) == []
    scratch.remove()


def test_empty(scratch):
    file = scratch.new()
    scratch.write(file, b"")
    assert read(scratch, file, 0) == b""


@pytest.mark.parametrize("how", ["deleted", "cut", "longer", "altered"])
def test_a_file_that_somebody_touched_is_named(scratch, how):
    file = scratch.new()
    scratch.write(file, DATA)
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes({"cut": DATA[:-1], "longer": DATA + b"x", "altered": b"x" + DATA[1:]}[how])
    message = "No such file" if how == "deleted" else "is not what this process wrote: somebody else changed it"
    with pytest.raises(MemoptError, match=message) as caught:
        read(scratch, file)
    assert str(file) in str(caught.value)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "missing", "No such file"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(InputError, match=f"cannot keep files in {folder}: {why}"):
            Scratch(folder)


def start(code, folder):
    """Another process with a scratch folder, which prints its path and waits for input."""
    code = f"from memopt.scratch import Scratch\ns = Scratch({str(folder)!r})\ns.write(s.new(), b'x')\n{code}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    return process, Path(process.stdout.readline().strip())


def test_nothing_is_left_at_exit(tmp_path):
    process, folder = start("print(s.folder, flush=True); input()", tmp_path)
    assert sorted(os.listdir(folder)) == ["0", "memopt.lock"]
    process.communicate("\n", timeout=60)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path):
    killed, left = start("print(s.folder, flush=True); input()", tmp_path)
    living, kept = start("print(s.folder, flush=True); input()", tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert left.is_dir()
    (tmp_path / "memopt-somebody").mkdir()
    mine = Scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([kept, mine.folder, tmp_path / "memopt-somebody"])
    assert (kept / "0").read_bytes() == b"x"
    living.communicate("\n", timeout=60)
    assert not kept.exists()


def test_folders_of_others_stay(tmp_path):
    for name, lock in (("memopt-results0", "lock"), ("memopt-abcdefgh", "memopt.lock"), ("memopt-ijklmnop", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0").write_text("mine")
        if lock is not None:
            (tmp_path / name / lock).write_text("of another machine")
    Scratch(tmp_path).remove()
    assert len(list(tmp_path.glob("*/0"))) == 3


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
print(s.folder, flush=True)
file = s.new()
try:
    s.write(file, bytes(6000))
except Exception as error:
    print(type(error).__name__, error)
print(file.exists())
"""
    code = f"from memopt.scratch import Scratch\ns = Scratch({str(tmp_path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    folder, error, exists = done.stdout.splitlines()
    assert error == f"MemoptError cannot write 6,000 bytes to {folder}/0: File too large."
    assert exists == "False"
