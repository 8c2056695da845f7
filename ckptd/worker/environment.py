"""What decides about bits besides the state: versions, devices, thread counts, settings.

The first attempt's facts are kept with the job. A later attempt that finds others says so: the job
goes on, but it may differ in the last bits from an uninterrupted run.
"""

from __future__ import annotations

import os
import platform

import numpy as np
import torch


def facts() -> dict[str, str]:
    """The facts of this process, by name."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "random"),
    }
    # Asked only where CUDA is in use anyway: asking would initialise it.
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["CUDA devices"] = ", ".join(names)
        found["CUDA"] = str(torch.version.cuda)
    return found


def differences(first: dict[str, str] | None, now: dict[str, str]) -> list[str]:
    """What to say about facts that changed since the first attempt; thread counts are set back."""
    if first is None:
        return []
    said = []
    for name in sorted(first.keys() | now.keys()):
        before, here = first.get(name, "none"), now.get(name, "none")
        if before == here:
            continue
        if name == "threads":
            torch.set_num_threads(int(before))
            said.append(f"this machine would use {here} threads; set back to the job's {before}")
        else:
            said.append(
                f"{name} was {before} at the job's start and is {here} now: "
                "the run may differ in the last bits from one that was never interrupted"
            )
    return said
