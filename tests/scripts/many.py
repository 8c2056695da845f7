"""More files and more tracked objects than any packet could name.

python many.py OUT DIRECTORY    writes OUT, and an output of its own for each step to DIRECTORY

STRIKE=N: after N steps it is struck once, by SIGNAL: TERM (a stop) or KILL (of the worker, one step
after a checkpoint was asked for); STRIKE_ONCE names the file that remembers it.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from interruption import signal_and_see

import ckptd

STEPS = 2600
OBJECTS = 900

out, directory = Path(sys.argv[1]), Path(sys.argv[2])
directory.mkdir(exist_ok=True)
torch.manual_seed(1)
tensors = {f"tensor_{'x' * 90}_{number}": torch.zeros(2) for number in range(OBJECTS)}
strike, once = int(os.environ.get("STRIKE", "0")), Path(os.environ.get("STRIKE_ONCE", "once"))
job = ckptd.attach(**tensors)
names = [*tensors]
for step in job.loop(range(STEPS)):
    tensor = tensors[names[step % OBJECTS]]
    tensor += torch.rand(2)
    with job.open(directory / f"{step:06d}_{'y' * 100}.txt") as file:
        file.write(f"{tensor.tolist()}\n")
    if strike and step + 1 == strike and not once.exists():
        once.touch()
        number = signal.SIGTERM if os.environ["SIGNAL"] == "TERM" else signal.SIGUSR2
        signal_and_see(job, lambda number=number: os.kill(os.getppid(), number))
    elif strike and step == strike and os.environ["SIGNAL"] == "KILL" and not job.resumed:
        os.kill(os.getpid(), signal.SIGKILL)
out.write_text("\n".join(str(tensor.view(torch.int32).tolist()) for tensor in tensors.values()))
