"""A training that something befalls in the middle, once.

injected.py FAULT RESULT: at step 12 it happens, unless it has happened before. Under `ckptd launch`
there is a checkpoint by then, and a newer state in memory.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from interruption import signal_and_see, wait_until
from small import Training
from torch.utils.data import DataLoader, Dataset

import ckptd
from ckptd import wire

DURABLE_AT, HELD_AT, FAULT_AT, STEPS = 4, 8, 12, 24
LAUNCHED = "CKPTD_SOCKET" in os.environ
BOMB_MAX = 300


class Noise(Dataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        if FAULT == "fork bomb" and armed().exists() and happens():
            bomb()
        return indices


def armed():
    return RESULT.parent / "armed"


def happens():
    """Whether it is to happen now: only once over all attempts and processes."""
    try:
        (RESULT.parent / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def has_happened():
    return (RESULT.parent / "happened").exists()


def bomb():
    """A loader worker that fills the machine with processes that go on forking while they are
    killed: some leave two, some are gone again at once, so that whoever looks for them is late."""
    forked = mmap.mmap(-1, 8)  # shared by all of them
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    for hops in (False, False, False, True, True, True):
        if os.fork() == 0:
            spread(forked, hops=hops)
    os.kill(parent, signal.SIGKILL)


def spread(forked, *, hops):
    while True:
        os.setsid() if os.getsid(0) != os.getpid() else None
        time.sleep(0.02)
        (count,) = struct.unpack("q", forked[:])
        if count >= BOMB_MAX:
            break
        forked[:] = struct.pack("q", count + 1)
        if os.fork() > 0 and hops:
            os._exit(0)
    time.sleep(3600)
    os._exit(0)


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


def fill_the_disk(job):
    """The run's, until not a byte is left; then a checkpoint is asked for."""
    with Path(job._link.welcome.run, "filler").open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while filler.write(bytes(size)):
                    pass
    signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))


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
    "a full disk": lambda: None,  # needs the job
    "fork bomb": lambda: None,  # in a loader worker
    "none": lambda: None,
}


def states(job, done):
    """Have a durable state, and then a newer one that is in memory alone."""
    if done == DURABLE_AT:
        signal_and_see(job, lambda: os.kill(job._link.supervisor_pid(), signal.SIGUSR2))
    elif done == HELD_AT:
        checkpoints = Path(job._link.welcome.run, "checkpoints")
        wait_until(lambda: list(checkpoints.glob("0*")), "a checkpoint")
        wait_until(lambda: job.words[wire.WORD_REQUEST] != job.answered, "a request")


def main():
    training = Training()
    bombed = FAULT == "fork bomb"
    loader = DataLoader(Noise(), batch_size=1, shuffle=True, num_workers=2 if bombed else 0)
    for _ in training.job.loop(loader):
        done = len(training.losses)
        if LAUNCHED and not has_happened():
            states(training.job, done)
            if done == FAULT_AT and bombed:
                armed().touch()
            elif done == FAULT_AT and FAULT == "a full disk":
                fill_the_disk(training.job)
            elif done == FAULT_AT + 1 and FAULT == "a full disk":
                wait_until(lambda: training.job._link._receipts, "a receipt")
                happens()
                os.kill(os.getpid(), signal.SIGKILL)
            elif done == FAULT_AT and happens():
                print("it happens", flush=True)
                FAULTS[FAULT]()
        training.step()
    training.write(RESULT)


if __name__ == "__main__":
    FAULT, RESULT = sys.argv[1], Path(sys.argv[2])
    ckptd.seed_everything(5)
    main()
