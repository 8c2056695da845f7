"""The ranks of a job as forks of one process, which imports torch once: a launcher beside torchrun.

    python forked.py RANKS SCRIPT ARGUMENTS...

It waits for all of them, as a shell's `wait` does, and ends with the first status that is not 0.
"""

import atexit
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def become(module, words, rank):
    """In a fork: be that rank, as far as anyone can tell; never returns."""
    code = 1
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    try:
        module.main(*map(Path, words))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        sys.last_value = error
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(ranks, script, *words):
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *words]
    module = importlib.import_module(Path(script).stem)
    importlib.import_module("ckptd.worker.job")
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(port, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    gc.freeze()
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            become(module, words, rank)
        children.append(pid)
    # A launcher that is asked to end asks its ranks.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, _: [os.kill(one, n) for one in children])
    codes = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children]
    sys.exit(next((code if code > 0 else 1 for code in codes if code), 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
