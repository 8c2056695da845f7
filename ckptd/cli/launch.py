"""`ckptd launch`: supervise a command until it has finished."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.core import ParameterSource

from ckptd import __version__
from ckptd.cli import options
from ckptd.errors import CkptdError, UsageError
from ckptd.host import children, clouds, hosts
from ckptd.host.clock import RealClock
from ckptd.host.disk import RealDisk
from ckptd.host.host import Host
from ckptd.host.signals import Signals
from ckptd.supervisor import journal, registry, requeues
from ckptd.supervisor import run as runs
from ckptd.supervisor.loop import Loop
from ckptd.supervisor.policy import Exit, Policy
from ckptd.supervisor.registry import Registry
from ckptd.supervisor.run import JobFile, Run
from ckptd.supervisor.terminal import Terminal

_DEFAULTS = Policy()
_FOR_THIS_START: Final = ("name", "directory", "fresh", "accept_changes", "detach", "if_wanted")
#: The journal's events after which a supervisor ends.
_ENDS: Final = ("finished", "fenced", "gave up", "stopped")
_STARTS_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.05
_PORT_MAX: Final = 65535


@click.command(context_settings={"ignore_unknown_options": False})
@click.option("--name", help="The run's name.  [default: the script's, or the Slurm job's]")
@options.directory
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.0, min_open=True),
    default=_DEFAULTS.every_s,
    show_default=True,
    help="Seconds between two durable checkpoints at most.",
)
@click.option(
    "--overhead",
    "overhead_percent",
    type=click.FloatRange(min=0.0, max=100.0),
    default=100 * _DEFAULTS.overhead,
    show_default=True,
    help="Percent of the run time that snapshots into memory may cost: they are taken as often as "
    "that allows. 0: none between checkpoints.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=_DEFAULTS.keep,
    show_default=True,
    help="Checkpoints to keep.",
)
@click.option(
    "--memory-tier",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Whether the newest snapshot stays in memory, so that a job that crashed starts again "
    "from there; auto: if there is memory for it.",
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Seconds from a stop signal until the job must have saved itself and ended.  "
    f"[default: what the host leaves, else {_DEFAULTS.grace_s:g}]",
)
@click.option(
    "--max-restarts",
    "restarts_max",
    type=click.IntRange(min=0),
    default=_DEFAULTS.restarts_max,
    show_default=True,
    help="Failures without progress between them before giving up.",
)
@click.option(
    "--hang-after",
    "hang_after_s",
    type=click.FloatRange(min=0.0),
    help="Seconds without progress after which the job is taken to hang: its stacks are logged, it "
    "is killed and started again. 0: never.  [default: twenty times the longest that it took, at "
    "least 1800]",
)
@click.option(
    "--host",
    "host_name",
    type=click.Choice(hosts.NAMES),
    default="auto",
    show_default=True,
    help="What starts the job again after an interruption; auto: as the environment shows.",
)
@click.option(
    "--cloud",
    "cloud_name",
    type=click.Choice(clouds.NAMES),
    default="auto",
    show_default=True,
    help="Whose notices that the machine will be taken away are listened to; auto: as its firmware "
    "shows.",
)
@click.option(
    "--listen",
    metavar="auto|off|HOST[:PORT]",
    default="auto",
    show_default=True,
    help="Under which name of this machine, and on which TCP port, ranks on other machines join "
    "(any free port, if none is given); auto: where the host says that the job has several.",
)
@click.option(
    "--max-requeues",
    "requeues_max",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Interruptions without progress between them before the job is not put back into the "
    "queue any more.",
)
@click.option(
    "--detach",
    is_flag=True,
    help="Start it in the background: under this user's service if that runs (`ckptd "
    "install-service`), else by itself.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Whether it goes on after a reboot, where this user's service runs.",
)
@click.option(registry.IF_WANTED, "if_wanted", is_flag=True, hidden=True)
@click.option("--fresh", is_flag=True, help="Start over; the old run is renamed and kept.")
@click.option(
    "--accept-changes", is_flag=True, help="Go on although the command or directory changed."
)
@click.option(
    "--fixed-addresses",
    is_flag=True,
    help="The same memory addresses in every attempt, for scripts that iterate over sets of "
    "objects.",
)
@click.option(
    "--flush-signal",
    metavar="NAME",
    help="For commands without ckptd.attach: the signal by which they save and leave (USR1).",
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def command(
    argv: tuple[str, ...],
    name: str | None,
    directory: Path,
    flush_signal: str | None,
    grace_s: float | None,
    hang_after_s: float | None,
    cloud_name: str,
    host_name: str,
    listen: str,
    requeues_max: int,
    *,
    detach: bool,
    fresh: bool,
    if_wanted: bool,
    resume: bool,
    accept_changes: bool,
    fixed_addresses: bool,
    memory_tier: str,
    overhead_percent: float,
    **settings: Any,
) -> int:
    """Start COMMAND, save it when it is interrupted, and start it again until it has finished.

    The same line again continues the run. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: save and leave (exit
    code 75). SIGUSR2: save and go on.

    \b
    Exit codes: 0 finished · 64 bad usage · 69 it runs already · 70 gave up, a person must look
    74 could not save the newest state, an older checkpoint stands · 75 interrupted, start me again
    """  # noqa: D301  # \b is click's mark for a paragraph that is not rewrapped
    # Before all that takes its time, scontrol and the lock: a stop may come meanwhile.
    signals = None if detach else Signals()
    backoff_s = float(os.environ.get("CKPTD_BACKOFF", _DEFAULTS.backoff_s))
    policy = Policy(
        **settings,
        overhead=overhead_percent / 100,
        grace_s=grace_s or _DEFAULTS.grace_s,
        grace_given=grace_s is not None,
        hang_after_s=hang_after_s if hang_after_s != 0 else math.inf,
        backoff_s=backoff_s,
        flush_signal=_signal_number(flush_signal),
        memory_tier=memory_tier == "auto",
    )
    check_command(argv[0])
    terminal = Terminal()
    click.get_current_context().call_on_close(terminal.drain)
    host = hosts.recognised(os.environ, host_name)
    if described := host.described():
        terminal.say(described)
    if fresh and host.restart:
        # The batch script says the same each time; only the first time was it meant.
        terminal.say(f"--fresh was for the first start, this is restart {host.restart}: going on")
        fresh = False
    run = Run(directory / runs.check_name(name or runs.default_name(argv, os.environ)))
    sleep = _interruptible(signals)
    if fresh and (run.path / "lock").exists():
        # Never rename a directory under a supervisor that works in it.
        held = runs.lock(run, host, grace_s=policy.grace_s, say=terminal.say, sleep=sleep)
        old = runs.set_old_aside(run, RealDisk())
        os.close(held)
        terminal.say(f"starting over; the old run is kept as {old}")
    runs.create(run, RealDisk())
    lock = runs.lock(run, host, grace_s=policy.grace_s, say=terminal.say, sleep=sleep)
    jobs = Registry(os.environ)
    if if_wanted and not jobs.has(run):
        raise UsageError(f"the run {run.path.name!r} was stopped by its owner meanwhile")
    now = runs.describe_job(run.path.name, argv, Path.cwd(), os.environ, __version__)
    now = msgspec.structs.replace(now, fixed_addresses=fixed_addresses)
    _record(run, now, accept_changes=accept_changes)
    job = run.job()
    if job is not None and job.fixed_addresses:
        _fix_addresses()
    if _finished(run):
        jobs.remove(run)
        terminal.say(f"the run {run.path.name!r} has finished; start over with --fresh")
        return 0
    if not if_wanted:
        _register(jobs, run, terminal, goes_on=resume and not host.returns)
    if signals is None:
        os.close(lock)
        return _detach(jobs, run)
    cloud = clouds.recognised(os.environ, terminal.say, cloud_name)
    if cloud is not None:
        terminal.say(f"listening to notices of {cloud.name}")
    loop = Loop(
        run, policy, lock, RealClock(), terminal, host, signals, cloud, _listens(listen, host)
    )
    code = loop.run()
    os.close(lock)
    if code in (Exit.FINISHED, Exit.GAVE_UP) or loop.stopped_by_owner:
        jobs.remove(run)
    return requeues.settle(
        run,
        host,
        code,
        progressed=loop.progressed,
        by_owner=loop.stopped_by_owner,
        requeues_max=requeues_max,
        say=terminal.say,
    )


def _listens(option: str, host: Host) -> tuple[str, int] | None:
    """Where ranks on other machines join: this machine's name, and a port; None: there are none.

    Raises:
        UsageError: the option is neither.
    """
    if option == "auto":
        return (host.address, 0) if host.nodes > 1 else None
    if option == "off":
        return None
    name, _, port = option.partition(":") if option.count(":") == 1 else (option, "", "")
    if not name or "," in name or not (port or "0").isdecimal() or int(port or 0) > _PORT_MAX:
        raise UsageError(f"--listen {option}: it is auto, off, HOST or HOST:PORT")
    return name, int(port or 0)


def _register(jobs: Registry, run: Run, terminal: Terminal, *, goes_on: bool) -> None:
    """Note how it is started, and whether it goes on after a reboot.

    Where that can't be written it runs all the same.
    """
    try:
        registry.note(run, _options_given(), os.environ)
        if goes_on:
            jobs.add(run)
        else:
            jobs.remove(run)
    except OSError as error:
        terminal.say(
            f"after a reboot this run must be started by hand, {error.filename or jobs.path} can't "
            f"be written: {error.strerror}"
        )


def _interruptible(signals: Signals | None) -> Callable[[float], None]:
    """A pause that Ctrl-C ends, and with it the start; other signals are heard by the loop."""

    def sleep(seconds: float) -> None:
        if signals is not None and signals.came(signal.SIGINT):
            raise KeyboardInterrupt
        time.sleep(seconds)

    return sleep


def _options_given() -> list[str]:
    """The options of this command line that are for every start of the run, as words."""
    context, words = click.get_current_context(), []
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if isinstance(option, click.Option) and given and name not in _FOR_THIS_START:
            value = context.params[name]
            name = option.opts[0] if value else (option.secondary_opts or option.opts)[0]
            words += [name] if option.is_flag else [option.opts[0], str(value)]
    return words


def _detach(jobs: Registry, run: Run) -> int:
    """Have the service start the run, or a process of its own; wait until it runs, or has ended."""
    # The service keeps what goes on after a reboot, and nothing else.
    name, service = run.path.name, jobs.service() if jobs.has(run) else None
    said = run.path / "supervisor.log"
    before = run.journal.stat().st_size if run.journal.exists() else 0
    process = None
    if service is not None:
        os.kill(service.pid, signal.SIGUSR2)
    else:
        with said.open("wb") as messages:
            process = registry.start(run, messages)
    until_s = time.monotonic() + _STARTS_WITHIN_S
    while (holder := run.supervisor()) is None or not (holder.alive() and holder.child):
        if process is not None and process.poll() is not None:
            text = said.read_text(encoding="utf-8", errors="replace").strip()
            click.echo(text, err=True)
            return process.returncode
        end = _end(run, before)
        if end is not None and process is None:
            click.echo(f"the run {name!r} has ended already: {end['text']}", err=True)
            return int(end["code"])
        if time.monotonic() > until_s:
            raise CkptdError(
                f"{name!r} does not run after {_STARTS_WITHIN_S:g} s; look at "
                + (f"{said}" if service is None else f"what process {service.pid} says")
            )
        time.sleep(_POLL_S)
    under = "" if service is None else f", kept by process {service.pid}"
    click.echo(
        f"the run {name!r} is in the background (process {holder.pid}{under})\n"
        f"its output: ckptd logs -f {name}   how far: ckptd status {name}   end: ckptd stop {name}"
    )
    return 0


def _end(run: Run, from_byte: int) -> dict[str, Any] | None:
    """How it ended since the journal was so long; None: it did not."""
    events = journal.read(run.journal, from_byte)
    return next((event for event in reversed(events) if event["event"] in _ENDS), None)


def _record(run: Run, now: JobFile, *, accept_changes: bool) -> None:
    """Write what a first launch says; hold a later one against it."""
    before = run.job()
    if before is None:
        run.write(now)
        return
    if not accept_changes:
        runs.check_unchanged(before, now)
    fixed = before.fixed_addresses or now.fixed_addresses
    run.write(msgspec.structs.replace(before, argv=now.argv, cwd=now.cwd, fixed_addresses=fixed))


def _fix_addresses() -> None:
    try:
        children.fix_addresses()
    except OSError as error:
        raise UsageError(
            f"--fixed-addresses: {error.strerror}. This system does not let a process choose it "
            "(containers need `--security-opt seccomp=unconfined`). Start without it, and sort "
            "what is iterated over"
        ) from error


def _finished(run: Run) -> bool:
    return any(event["event"] == "finished" for event in journal.read(run.journal))


def check_command(word: str) -> None:
    """Refuse a command that can't be started.

    Raises:
        UsageError: it is in no directory of PATH, or not executable.
    """
    if shutil.which(word) is None:
        raise UsageError(
            f"command not found or not executable: {word!r} (looked in PATH and in {Path.cwd()})"
        )


def _signal_number(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return int(signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"])
    except KeyError:
        raise UsageError(f"--flush-signal {name}: there is no such signal") from None
