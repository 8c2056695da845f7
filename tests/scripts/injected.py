"""A training that something befalls in the middle, once.

injected.py FAULT RESULT: at step 12 it happens, unless it has happened before.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from small import Training
from torch.utils.data import DataLoader, Dataset

import ckptd

FAULT_AT, STEPS = 12, 24


class Noise(Dataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        if FAULT == "fork bomb" and FAULT_AT + 3 in indices and happens():
            bomb()
        return indices


def happens():
    """Whether it is to happen now: only once over all attempts and processes."""
    try:
        (RESULT.parent / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def bomb():
    """A loader worker that fills the machine with processes, each on its own."""
    for _ in range(30):
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(3600)
            os._exit(0)
    os.kill(os.getppid(), signal.SIGKILL)


def deadlock_with_interpreter():
    """A native call that never returns and never lets go of the interpreter's lock."""
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def ignore_everything():
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def fail():
    raise RuntimeError("as if a loss were not a number")


def out_of_memory():
    kept = []
    while True:
        kept.append(b"\1" * (64 << 20))


FAULTS = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exception": fail,
    "exit": lambda: os._exit(3),
    "out of memory": out_of_memory,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "deadlock with the interpreter's lock": deadlock_with_interpreter,
    "deadlock": deadlock,
    "ignores everything": ignore_everything,
    "fork bomb": lambda: None,  # in a loader worker
    "none": lambda: None,
}


def main():
    training = Training()
    bombed = FAULT == "fork bomb"
    loader = DataLoader(Noise(), batch_size=1, shuffle=True, num_workers=2 if bombed else 0)
    for _ in training.job.loop(loader):
        if len(training.losses) == FAULT_AT and not bombed and happens():
            print("it happens", flush=True)
            FAULTS[FAULT]()
        training.step()
    training.write(RESULT)


if __name__ == "__main__":
    FAULT, RESULT = sys.argv[1], Path(sys.argv[2])
    ckptd.seed_everything(5)
    main()
