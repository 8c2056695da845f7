"""Which outputs are synced before a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ckptd.worker.outputs import Outputs


def written(outputs: Outputs, path: Path, text: str, mode: str = "w") -> None:
    """Open a file, write to it, close it."""
    with outputs.open(path, mode) as file:
        file.write(text)


def test_a_closed_file_is_synced_once(tmp_path: Path) -> None:
    """Not again when a durable checkpoint counts on it; its length is recorded all the same."""
    outputs = Outputs()
    names = [str(tmp_path / str(number)) for number in range(4)]
    for name in names[:2]:
        written(outputs, Path(name), "line\n")
    still_open = outputs.open(names[2], "w")
    outputs.flush()
    assert outputs.unsynced() == names[:3]
    outputs.sent(7)
    outputs.flush()
    assert outputs.unsynced() == names[:3], "no receipt came"
    outputs.durable(6)
    assert outputs.unsynced() == names[:3], "a receipt for another one"
    outputs.durable(7)
    still_open.write("more\n")
    written(outputs, Path(names[3]), "new\n")
    lengths = outputs.flush()
    assert outputs.unsynced() == names[2:]
    assert lengths == {names[0]: 5, names[1]: 5, names[2]: 5, names[3]: 4}


def test_a_closed_file_that_changed(tmp_path: Path) -> None:
    """Written to again, by whomever, or replaced, it is synced again."""
    outputs = Outputs()
    names = [str(tmp_path / str(number)) for number in range(3)]
    for name in names:
        written(outputs, Path(name), "line\n")
    outputs.flush()
    outputs.sent(1)
    outputs.durable(1)
    with Path(names[0]).open("a") as file:
        file.write("behind its back\n")
    written(outputs, Path(names[1]), "again\n", "a")
    (tmp_path / "other").write_text("line\n")
    (tmp_path / "other").replace(names[2])
    outputs.flush()
    assert outputs.unsynced() == names


def test_files_of_the_checkpoint(tmp_path: Path) -> None:
    """In a resumed process the checkpoint's files are synced once again, and then no more; they
    are still rolled back."""
    path = tmp_path / "file"
    path.write_text("line\nmore\n")
    outputs = Outputs()
    outputs.expect({str(path): 5})
    outputs.roll_back()
    outputs.flush()
    assert outputs.unsynced() == [str(path)]
    outputs.sent(1)
    outputs.durable(1)
    assert outputs.flush() == {str(path): 5}
    assert outputs.unsynced() == []
