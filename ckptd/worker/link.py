"""The worker's end of the wire: the socket, the status page, and the supervisor's death.

Rules:

1. The training loop never waits here and never calls in here while nothing is asked: a thread of
   its own sits in `recv`, and requests come through the status page.
2. A worker on another machine has the same two through a `Bridge`, and no lock and no pipe.
3. When the supervisor dies, the job goes on until its next safe point and saves itself there. Until
   then nothing may break: the worker holds the job's lock and the read end of its own output pipe,
   and writes what comes out of that pipe into the log itself.
4. The connection is this process's alone: that it ends is how the supervisor learns of its death.
5. A signal to this process (to its whole group, or from a host that only signals the tasks) is
   passed on to the supervisor as a notice. The handler sends one packet and returns.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ckptd import wire
from ckptd.errors import CkptdError, ProtocolError, UsageError
from ckptd.host import sockets, stacks, streams
from ckptd.host.streams import Stream
from ckptd.worker.arena import Arenas
from ckptd.worker.bridge import Bridge

_FORWARDED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_TRIES: Final = 2
_PAUSE_S: Final = 0.2
_STDERR: Final = 2


class Link:
    """A connection to the supervisor, from `attach` to the end of the process.

    Args:
        address: the socket's path (`CKPTD_SOCKET`).
        hello: what is said first.
        arenas: told when the supervisor has let go of a snapshot's memory.
        on_orphaned: called when the supervisor is gone, from the link's thread; it asks for what is
            to happen through the page.

    Attributes:
        welcome: what the supervisor answered.
        snapshot: the memfd of the snapshot to restore, if it is to be restored from memory.
        durable: the newest snapshot that was said to be durable; 0: none yet.

    Raises:
        CkptdError: nobody listens there, or the supervisor turns this process away.
    """

    def __init__(
        self,
        address: str,
        hello: wire.Hello,
        arenas: Arenas,
        on_orphaned: Callable[[Link], object],
    ) -> None:
        self._arenas, self._on_orphaned = arenas, on_orphaned
        self._pid = os.getpid()
        self._socket, self._bridge = _connected(address)
        os.register_at_fork(after_in_child=self._let_go)
        self.send(hello)
        self.welcome, (page, *others) = self._expect_welcome()
        if self._bridge is None:
            self._lock, self._pipe, *others = others  # the lock is held, not used
        self.snapshot = others
        arenas.on_short = lambda needed, available: self.send(wire.Short(needed, available))
        self._memory = mmap.mmap(page, wire.PAGE_BYTES)
        os.close(page)
        self.page = wire.StatusPage(memoryview(self._memory))
        self._receipts: dict[int, wire.Durable | wire.NotDurable | wire.Apart] = {}
        self._changed = threading.Condition()
        self._orphaned = self._finished = False
        self.durable = 0
        threading.Thread(target=self._listen, name="ckptd", daemon=True).start()

    @property
    def orphaned(self) -> bool:
        """Whether the supervisor is gone."""
        return self._orphaned

    def send(self, message: wire.ToSupervisor, descriptors: Sequence[int] = ()) -> bool:
        """Send one message; False when the supervisor is gone."""
        if self._bridge is not None and descriptors:
            self._bridge.wait_for_room()
        return sockets.send(self._socket, wire.encode(message), descriptors)

    def supervisor_pid(self) -> int:
        """The process at the other end; not always our parent: a launcher may stand between."""
        return sockets.peer_pid(self._socket)

    def receipt(self, generation: int) -> wire.Durable | wire.NotDurable | wire.Apart | None:
        """Wait for what became of a snapshot; None: the supervisor died before it said."""
        with self._changed:
            self._changed.wait_for(lambda: generation in self._receipts or self._orphaned)
            return self._receipts.get(generation)

    def forward_signals(self) -> None:
        """From now on, pass signals on to the supervisor. A handler that the script set stays."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers, and only it receives signals
        for number in _FORWARDED:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._notice)

        if signal.getsignal(stacks.SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
            # For a supervisor that finds that this process hangs; loader workers inherit it. It is
            # ignored by what a shell has started with "&".
            faulthandler.register(stacks.SIGNAL, file=_STDERR, all_threads=True)

    def drain_output(self) -> None:
        """Bring what is still in the output pipe into the log (when the supervisor is gone)."""
        if self._bridge is not None:
            return
        os.set_blocking(self._pipe, False)
        with Path(self.welcome.run, "log").open("ab") as log:
            while True:
                try:
                    chunk = os.read(self._pipe, 1 << 16)
                except BlockingIOError:
                    return
                if not chunk:
                    return
                log.write(chunk)

    def finish(self) -> None:
        """The process ends: what was said must be over there before."""
        if self._bridge is not None:
            self._finished = True  # its end makes no orphan
            self._bridge.finish()

    def _expect_welcome(self) -> tuple[wire.Welcome, list[int]]:
        packet, descriptors, _, _ = socket.recv_fds(self._socket, wire.MESSAGE_BYTES_MAX, 4)
        if not packet:
            raise CkptdError("the supervisor ended before it answered; start the job again")
        message = wire.decode_for_worker(packet)
        if isinstance(message, wire.TurnedAway):
            raise UsageError(f"the supervisor refused this process: {message.why}")
        expected = 3 if self._bridge is None else 1
        expected += isinstance(message, wire.Welcome) and message.memory is not None
        if not isinstance(message, wire.Welcome) or len(descriptors) != expected:
            raise ProtocolError(
                f"expected a welcome with {expected} descriptors, got {type(message).__name__} "
                f"with {len(descriptors)}"
            )
        return message, descriptors

    def _listen(self) -> None:
        """The thread: receipts, and the end of the supervisor."""
        while True:
            try:
                packet = self._socket.recv(wire.MESSAGE_BYTES_MAX)
            except ConnectionError:
                packet = b""
            if not packet:
                break
            message = wire.decode_for_worker(packet)
            if isinstance(message, wire.Released):
                self._arenas.released(message.generation)
            elif isinstance(message, wire.Durable | wire.NotDurable | wire.Apart):
                with self._changed:
                    self._receipts[message.generation] = message
                    if isinstance(message, wire.Durable):
                        self.durable = message.generation
                    self._changed.notify_all()
        if self._finished:
            return
        with self._changed:
            self._orphaned = True
            self._on_orphaned(self)
            self._changed.notify_all()
        self._keep_output_flowing()

    def _keep_output_flowing(self) -> None:
        if self._bridge is not None:
            return  # its launcher passes its output on
        with Path(self.welcome.run, "log").open("ab", buffering=0) as log:
            while True:
                try:
                    chunk = os.read(self._pipe, 1 << 16)
                except BlockingIOError:
                    return  # `drain_output` took over: the process ends
                if not chunk:
                    return
                log.write(chunk)

    def _let_go(self) -> None:
        """In a fork, a loader's worker, say: the connection ends with the process that made it.

        A loader's workers outlive a process that was killed for seconds. Until then the supervisor
        would take what its death leads to, such as a launcher's signals to the other ranks, for the
        reason of something else.
        """
        self._socket.close()
        self._socket, nobody = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nobody.close()

    def _notice(self, number: int, frame: object) -> None:  # noqa: ARG002  # a handler's signature
        if os.getpid() == self._pid:  # a forked loader worker inherits the handler, not the task
            self.send(wire.Notice(number))


def _connected(address: str) -> tuple[socket.socket, Bridge | None]:
    """A connection to the supervisor: on this machine, or through a bridge."""
    here = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        here.connect(address)
    except OSError as error:
        here.close()
        text = os.environ.get(wire.ENV_REMOTE)
        if text is None:
            raise CkptdError(
                f"the supervisor that started this script is gone ({wire.ENV_SOCKET}={address}: "
                f"{error.strerror}); start the job again with `ckptd launch`. If it is on another "
                "machine: `ckptd launch --listen HOST`, HOST being that machine's name"
            ) from error
        bridge = Bridge(_stream(wire.Invitation.read(text), f"{address}: {error.strerror}"))
        return bridge.near, bridge
    return here, None


def _stream(invitation: wire.Invitation, why_not_here: str) -> Stream:
    """A connection to a supervisor on another machine.

    Raises:
        CkptdError: says what was tried, and what to look at.
    """
    tried = {"a socket of this machine": why_not_here}
    # srun tells its tasks where it runs: beside the supervisor. A node's name may be known to Slurm
    # alone.
    hosts = [invitation.host, os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or invitation.host]
    for host in hosts * _TRIES:
        try:
            return streams.connect(host, invitation.port, invitation.secret)
        except (OSError, ProtocolError) as error:
            tried[f"{host}, TCP port {invitation.port}"] = str(error)
            time.sleep(_PAUSE_S)
    told = "; ".join(f"{where} ({why})" for where, why in tried.items())
    raise CkptdError(
        f"the supervisor can't be reached from {os.uname().nodename}. Tried: {told}. "
        "Is the name that of the supervisor's machine, also here, and does a firewall let the port "
        "through? `ckptd launch --listen HOST:PORT` chooses both"
    )
