"""Trials of `anything.py` by the thousand: torch is imported once, each attempt is a fork.

    python forked.py            reads one trial a line, writes one verdict a line

A trial is {"program": …, "strikes": …, "path": an empty directory}. It is run plainly and then, in
as many processes as it takes, interrupted. The supervisor's part is played in the process itself:
it asks for what the strikes say at once and publishes with the supervisor's own function. So this
covers the training process's side; the test with `ckptd launch` covers the rest.
"""

import atexit
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import anything
from anything import Strikes

from ckptd import wire
from ckptd.host import memory
from ckptd.host.disk import RealDisk
from ckptd.store import store
from ckptd.worker import job as jobs

_KILLED = 9
_ATTEMPTS_MAX = 12
WARM_UP = [["train"], ["loop", "loader0", 1, [["draw", "numpy"]]]]


class UnsyncedDisk(RealDisk):
    """No power cut is tried here, and waiting for the disk would be most of a trial."""

    def sync(self, path):
        pass

    def sync_directory(self, path):
        pass


class NearLink:
    """What `ckptd.worker.link.Link` is to a job, with the supervisor's part in the same process."""

    run: Path
    attempt = 0

    def __init__(self, address, hello, arenas, on_orphaned):
        self.arenas = arenas
        checkpoints = sorted((self.run / "checkpoints").glob("[0-9]*"))
        newest = str(checkpoints[-1]) if checkpoints else None
        self.welcome = wire.Welcome("job", str(self.run), self.attempt, newest, None, 2)
        self.page = wire.StatusPage(memoryview(bytearray(wire.PAGE_BYTES)))
        self.orphaned = False
        self.durable = 0
        self.held = None
        self.asked = 0

    def ask(self, request):
        self.asked += 1
        self.page.words[wire.WORD_REQUEST] = wire.request_word(self.asked, request)

    def send(self, message, descriptors=()):
        if isinstance(message, wire.Snapshot):
            if self.held is not None:
                os.close(self.held[1])
                self.arenas.released(self.held[0].generation)
            self.held = message, os.dup(descriptors[0])
        elif isinstance(message, wire.Refused):
            print("refused:", message.text, file=sys.stderr)
        return True

    def receipt(self, generation):
        self.publish()
        return wire.Durable(generation)

    def publish(self):
        if self.held is None:
            return
        snapshot, descriptor = self.held
        table = wire.table_in(memory.readable(descriptor), snapshot.table)
        with memory.pieces([(descriptor, wire.places(table.files))]) as files:
            store.publish_attempt(
                UnsyncedDisk(),
                self.run,
                step=snapshot.step,
                attempt=self.attempt,
                files=files,
                outputs=[],
                created=time.time(),
            )

    def forward_signals(self):
        pass

    def drain_output(self):
        pass


class NearStrikes(Strikes):
    """Strikes that need no signal."""

    def send(self, number):
        leave = number == anything.signal.SIGTERM
        self.job._link.ask(wire.Request.LEAVE if leave else wire.Request.FLUSH)

    def kill(self):
        self.job._link.publish()  # what is in memory is saved
        os._exit(_KILLED)


def attempt(program, out, log, run=None, number=0):
    """Run a program in a fork; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with Path(log).open("a") as text:
            os.dup2(text.fileno(), 1)
            os.dup2(text.fileno(), 2)
        if run is not None:
            os.environ[wire.ENV_SOCKET] = "here"
            NearLink.run, NearLink.attempt = run, number
            jobs.Link = NearLink
        code = attempt_here(program, out)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt_here(program, out):
    try:
        anything.run(program, out, NearStrikes)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        sys.last_value = error
        code = 1
    atexit._run_exitfuncs()
    return code


def trial(program, strikes, path):
    """What is wrong; "" when nothing is."""
    run, plain, out, log = path / "run", path / "plain", path / "out", path / "log"
    (run / "checkpoints").mkdir(parents=True)
    (run / "attempts").mkdir()
    if attempt(program, plain, log) != 0:
        return f"the plain run failed\n{log.read_text()[-3000:]}"
    Path(f"{out}.strikes").write_text(json.dumps(strikes))
    for number in range(1, _ATTEMPTS_MAX):
        code = attempt(program, out, log, run, number)
        text = log.read_text()
        if "ended without coming back" in text or code not in (0, 75, _KILLED):
            return f"attempt {number} failed: {code}\n{text[-3000:]}"
        if code == 0:
            return difference(plain, out)
    return "it never finished"


def difference(plain, out):
    """The first line that differs between a plain and an interrupted run; "": none does."""
    expected, got = plain.read_text().splitlines(), out.read_text().splitlines()
    for number, (a, b) in enumerate(zip(expected, got)):
        if a != b:
            return f"line {number + 1} of {len(expected)}\nplain       {a}\ninterrupted {b}"
    if len(expected) != len(got):
        return f"{len(expected)} lines when run plainly, {len(got)} interrupted"
    usual = Path(f"{plain}.seen").read_text().splitlines()
    for line in Path(f"{out}.seen").read_text().splitlines():
        if line not in usual:
            like = [u for u in usual if u.split()[0] == line.split()[0]]
            return f"code that ran again saw something else\nfirst {like}\nagain {line}"
    return ""


def main():
    with tempfile.TemporaryDirectory() as path:  # what torch imports late is imported here, once
        anything.run(WARM_UP, f"{path}/out")
    for line in sys.stdin:
        asked = json.loads(line)
        verdict = trial(asked["program"], asked["strikes"], Path(asked["path"]))
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
