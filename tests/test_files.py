"""Writing files: existing ones keep their kind, mode and content until the new content is complete."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hne import files
from hne.errors import FileError, ResultError, TrainingError
from hne.files import check_writable, lock_folder, remove_leftovers, replacing, write_json, write_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o755])
def test_an_existing_file_keeps_its_mode(before: int, path: Path, umask: None) -> None:
    path.write_text("old")
    path.chmod(before)
    write_text(path, "new")
    assert (path.read_text(), mode(path)) == ("new", before)


def test_a_new_file_has_the_mode_of_the_umask_whatever_its_writer_does(path: Path, umask: None) -> None:
    with replacing(path) as temporary:
        temporary.unlink()
        temporary.touch(0o600)  # as tempfile and safetensors do
    assert mode(path) == 0o640


def test_a_secret_file_is_not_readable_for_others_while_it_is_written(path: Path) -> None:
    path.touch(0o600)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_an_existing_file_keeps_its_owner(path: Path) -> None:
    path.touch()
    os.chown(path, 1234, 2345)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link, second = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "second"
    if exists:
        target.write_text("old")
    link.symlink_to("folder/target")
    second.symlink_to(link)
    write_text(second, "new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["target"]


def test_a_copy_by_hard_links_keeps_the_old_content(path: Path, tmp_path: Path) -> None:
    path.write_text("old")
    os.link(path, tmp_path / "backup")
    write_text(path, "new")
    assert (tmp_path / "backup").read_text() == "old"


def test_a_pipe_receives_the_content(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo", list[bytes]()
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    write_text(fifo, "x" * 300_000)  # more than a pipe holds
    reader.join(20)
    assert got == [b"x" * 300_000]
    assert fifo.is_fifo()
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_device_stays_a_device() -> None:
    write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(FileError, match="/dev/full: cannot be written: the disk is full"):
        write_text("/dev/full", "much")


@pytest.mark.parametrize(
    ("name", "redirected"),
    [("/dev/stdout", "file"), ("/dev/stdout", "pipe"), ("/proc/self/fd/1", "file"), ("LINK", "file")],
)
def test_standard_output(name: str, redirected: str, tmp_path: Path) -> None:
    """The descriptor itself is written, between the lines printed before and after."""
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to("/dev/stdout")
    code = (
        "import sys; from hne.files import write_text\n"
        "print('before'); write_text(sys.argv[1], 'content\\n'); print('after')"
    )
    line = [sys.executable, "-c", code, str(link) if name == "LINK" else name]
    if redirected == "pipe":
        text = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
    else:
        with open(out, "w") as file:
            subprocess.run(line, check=True, stdout=file)
        text = out.read_text()
    assert text == "before\ncontent\nafter\n"
    assert link.is_symlink()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_a_failure_leaves_the_old_file_and_nothing_else(failure: type[BaseException], path: Path) -> None:
    path.write_text("old")
    with pytest.raises(failure), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    path.write_text("old")
    message = rf"^{path}: cannot be written: the disk is full"
    with pytest.raises(FileError, match=message), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_an_error_about_another_file_is_not_renamed(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), replacing(path):
        (path.parent / "missing").read_text()
    assert not path.exists()


@pytest.mark.parametrize("check", [check_writable, lambda path: write_text(path, "")])
def test_impossible_places_are_named(check: object, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("", "is a folder"),
        ("none/file", f"no such folder: create {tmp_path / 'none'} first"),
        ("file/below", "a part of the path is a file"),
        ("x" * 300, "the name is too long"),
        ("loop", "a link that leads back to itself"),
    ):
        place = tmp_path / name
        with pytest.raises(FileError) as error:
            check(place)  # type: ignore[operator]
        assert str(error.value).startswith(f"{place}: cannot be written: {reason}")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "x." + "y" * 253, "ü" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_file_in_a_read_only_folder_is_overwritten(reason: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("old and longer")

    def refuse(temporary: Path, before: object) -> int:
        raise OSError(reason, os.strerror(reason), str(temporary))

    monkeypatch.setattr(files, "_create", refuse)
    inode = path.stat().st_ino
    write_text(path, "new")
    assert (path.read_text(), path.stat().st_ino) == ("new", inode)
    with pytest.raises(FileError, match=rf"^{path.parent}/other: cannot be written"):
        write_text(path.parent / "other", "new")


def test_a_read_only_file_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("precious")
    path.chmod(0o444)
    if os.geteuid() == 0:  # who may write everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError, match="permission denied"):
        write_text(path, "new")
    assert path.read_text() == "precious"


def test_text_is_utf8_in_every_locale(path: Path) -> None:
    code = "import sys; from hne.files import write_text; write_text(sys.argv[1], '\\xfc \\xb1 \\udcff')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    assert path.read_bytes() == "ü ± \\udcff".encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_finite_numbers_only(number: float, path: Path) -> None:
    path.write_text("old")
    with pytest.raises(ResultError, match=rf"results\.json: not written: a\[1\]\.b is {number}"):
        write_json(path, {"fine": 1.0, "a": [0, {"b": number}]})
    assert path.read_text() == "old"


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    code = "import os, signal, sys; from hne.files import replacing\n"
    code += "with replacing(sys.argv[1]) as half: half.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "log.csv")])
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    theirs = [".notes.tmp.txt", ".123.tmp.notes.txt", ".lock", ".hne-tmp-notes.txt", leftover.name + ".bak"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    (tmp_path / leftover.name.replace(leftover.name[-6:], "aaaaaa")).mkdir()
    with replacing(tmp_path / "other.csv") as being_written:
        remove_leftovers(tmp_path)
        assert being_written.exists(), "the process that writes it is alive"
    assert not leftover.exists()
    assert {*theirs, "other.csv"} < set(os.listdir(tmp_path))
    remove_leftovers(tmp_path / "no such folder")


# Locks ----------------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = "import sys; from pathlib import Path; from hne.files import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(TrainingError, match=rf"{folder}: another process trains here"), lock_folder(folder):
            pass
        other.kill()
    with lock_folder(folder):  # death releases it
        pass
    assert os.listdir(folder) == []


def test_threads_and_nested_locks(tmp_path: Path) -> None:
    errors = []

    def train() -> None:
        try:
            with lock_folder(tmp_path, again=True):
                pass
        except TrainingError as error:
            errors.append(error)

    with lock_folder(tmp_path):
        with lock_folder(tmp_path, again=True):
            pass
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        with pytest.raises(TrainingError), lock_folder(tmp_path):
            pass
    assert len(errors) == 1


def test_without_locks_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), lock_folder(tmp_path):
        pass


def test_a_file_of_the_user_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == "mine"
    assert os.listdir(tmp_path) == [".lock"]
