"""Which host this is: shown by the environment, or named by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ckptd.errors import UsageError
from ckptd.host import kubernetes, slurm, systemd
from ckptd.host.host import Host, Plain

_MAKERS: Final[dict[str, Callable[[Mapping[str, str]], Host]]] = {
    "slurm": slurm.Slurm,
    "systemd": systemd.Systemd,
    "kubernetes": kubernetes.Pod,
}
_VARIABLES: Final = {
    "slurm": slurm.JOB_VARIABLE,
    "systemd": systemd.SOCKET_VARIABLE,
    "kubernetes": kubernetes.SERVICE_VARIABLE,
}
_HOW: Final = {
    "slurm": "Submit it with sbatch",
    "systemd": "Start it as a service (Type=notify)",
    "kubernetes": "Start it in a pod",
}
#: What `--host` may name; "auto" looks at the environment.
NAMES: Final = ("auto", "none", *_MAKERS)


def recognised(environment: Mapping[str, str], named: str = "auto") -> Host:
    """The host that the environment shows, or the one that was named.

    Raises:
        UsageError: the environment has nothing of the host that was named.
    """
    for name, variable in _VARIABLES.items():
        if named not in ("auto", name) or variable not in environment:
            continue
        if name == "systemd" and named == "auto" and not systemd.is_main(environment):
            continue
        return _MAKERS[name](environment)
    if named in _MAKERS:
        raise UsageError(
            f"--host {named}: ${_VARIABLES[named]} is not set, so {named} has not started this. "
            f"{_HOW[named]}, or leave the option out"
        )
    return Plain()
