"""`ckptd show`: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from ckptd.cli.verify import checkpoints_at
from ckptd.errors import DamagedError
from ckptd.host.disk import RealDisk
from ckptd.store import image, store
from ckptd.store import manifest as manifests
from ckptd.store.manifest import File


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="Every tensor, and not only each file's total.")
def command(path: Path, *, tensors: bool) -> int:
    """Show what the checkpoint at PATH holds (of a run: its newest). It is verified first."""
    checkpoint = checkpoints_at(path)[0]
    manifest = store.verify(RealDisk(), checkpoint)
    ranks = manifests.ranks_in(manifest.files)
    of = f", of {ranks} ranks" if ranks > 1 else ""
    click.echo(f"{checkpoint}\nstep {manifest.step}, written by attempt {manifest.attempt}{of}\n")
    for name in manifest.files if tensors else manifests.files_of(0, manifest.files):
        _show_file(checkpoint / name, manifest.files[name].length, tensors=tensors)
    for rank in range(1, ranks):
        _show_rank(rank, manifest.files)
    _show_state(checkpoint / manifests.STATE)
    return 0


def _show_file(path: Path, length: int, *, tensors: bool) -> None:
    if path.suffix != ".safetensors":
        click.echo(f"{path.name}: {length} bytes")
        return
    held = _tensors(path)
    click.echo(f"{path.name}: {len(held)} tensors, {length} bytes")
    if tensors:
        for key, tensor in held.items():
            click.echo(f"  {key}  {tensor['dtype']} {tensor['shape']}")


def _show_rank(rank: int, files: Mapping[str, File]) -> None:
    """How much of it is not what rank 0 has."""
    own = manifests.files_of(rank, files)
    other = [name for name, in_checkpoint in own.items() if files[in_checkpoint] != files.get(name)]
    length = sum(files[own[name]].length for name in other)
    same = len(own) - len(other)
    click.echo(
        f"rank {rank}: {', '.join(other)}: {length} bytes"
        + (f"; {same} more, the same as rank 0's" if same else "")
    )


def _tensors(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(image.LENGTH_BYTES), "little")
        header = msgspec.json.decode(file.read(length), type=dict[str, Any])
    header.pop("__metadata__", None)
    return header


def _show_state(path: Path) -> None:
    try:
        state = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        kinds = {name: part["kind"] for name, part in state["components"].items()}
        levels = state["position"]["levels"]
        loops = [f"{level['where']}: {level['done']} of {level['length']} done" for level in levels]
        lines = {
            "tracked": ", ".join(f"{name} ({kind})" for name, kind in kinds.items()),
            "loops": "; ".join(loops),
            "vars": ", ".join(str(key) for key, _ in state["vars"]["tree"]["items"]),
            "random generators": ", ".join(state["generators"]),
            "output files": ", ".join(f"{k} ({v} bytes)" for k, v in state["outputs"].items()),
            "logged": ", ".join(f"{k}={v}" for k, v in state["values"].items()),
        }
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: not what this version of ckptd writes: {error!r}") from error
    click.echo("")
    for name, text in lines.items():
        click.echo(f"{name}: {text or 'none'}")
