"""Notices of clouds: this machine will be taken away, and when.

- AWS: the instance metadata service, version 2 (a token first): `spot/instance-action` two minutes
  before, and `events/recommendations/rebalance`, which only says that it may happen.
- Google: `instance/preempted`; some 30 seconds are left.
- Azure: scheduled events, of type Preempt or Terminate; at least 30 seconds before. They list those
  of all machines in the same scale set or availability set.

Rules:

1. A service that does not answer, or not in its protocol, is no notice. It is asked again; when
   that lasts, it is said once, since then the end would come without a warning.
2. A notice is given once. What it says is not believed blindly: without a time, the shortest that
   the cloud promises is taken, less the time in which nobody looked.
3. Which cloud this is is read from the firmware's tables, since asking an address that is nobody's
   may hang or, worse, be somebody else's.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from ckptd.errors import UsageError

NAMES: Final = ("auto", "none", "aws", "gcp", "azure")
#: How often to ask.
POLL_S: Final = 5.0
_BOUND_S: Final = 2.0
_AZURE_BOUND_S: Final = 180.0  # the first question may take minutes
_SILENT_S: Final = 10.0
_TOKEN_S: Final = 21600
# What a cloud promises at least. A notice may have been given right after it was last asked.
_LEAST_S: Final = 30.0 - POLL_S
_AWS_LEAST_S: Final = 120.0 - POLL_S
_LINK_LOCAL: Final = "http://169.254.169.254"
_DMI: Final = Path("/sys/class/dmi/id")
_AZURE_TAG: Final = "7783-7084-3265-9085-8269-3286-77"


@dataclass(frozen=True)
class Notice:
    """What a cloud said.

    Attributes:
        text: for a person.
        left_s: seconds until the machine is taken; None: it may be, some time.
    """

    text: str
    left_s: float | None


class Cloud(Protocol):
    """A cloud that gives notice."""

    name: str

    def poll(self) -> Notice | None:
        """Ask; None: nothing new. Takes as long as its time-out at most."""


class _UnheardError(Exception):
    """A metadata service gave no answer that means anything.

    Attributes:
        refused: it does not accept the token.
    """

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class _Service(ABC):
    """What is the same for all: one that is not heard is asked again, and that is said once."""

    name: str
    hint = ""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._given: set[str] = set()
        self._silent_since_s: float | None = None
        self._said = False

    def poll(self) -> Notice | None:
        """See `Cloud`."""
        began_s = time.monotonic()
        try:
            notice = self._look()
        except _UnheardError as error:
            self._silent_since_s = self._silent_since_s or began_s
            if not self._said and time.monotonic() - self._silent_since_s >= _SILENT_S:
                self._said = True
                self._say(
                    f"no notices of {self.name} can be heard, the end of this machine would come "
                    f"without a warning: {error}{self.hint}. It is asked again"
                )
            return None
        self._silent_since_s = None
        return notice

    @abstractmethod
    def _look(self) -> Notice | None:
        """Ask.

        Raises:
            _UnheardError: nobody answered, or nothing that means anything.
        """

    def _new(self, key: str) -> bool:
        """Whether a notice is new."""
        new = key not in self._given
        self._given.add(key)
        return new


class Aws(_Service):
    """Amazon EC2."""

    name = "aws"
    hint = " (in a container: the hop limit of the instance's metadata must be 2 at least)"

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], object]) -> None:
        super().__init__(say)
        base = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
        self._base = f"{base}/latest"
        self._token = ""

    def _look(self) -> Notice | None:
        action = self._get("spot/instance-action")
        if action is not None and self._new("action"):
            left_s = _left(action.get("time"), _AWS_LEAST_S)
            return Notice(f"AWS: this instance is to {action.get('action', 'end')}", left_s)
        advice = self._get("events/recommendations/rebalance")
        if advice is not None and self._new(str(advice.get("noticeTime"))):
            return Notice("AWS: this instance may soon be interrupted (rebalance)", None)
        return None

    def _get(self, what: str) -> dict[str, Any] | None:
        url = f"{self._base}/meta-data/{what}"
        fresh = not self._token
        if fresh:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            self._token = _ask(f"{self._base}/api/token", header, method="PUT") or ""
        try:
            return _object(_ask(url, {"X-aws-ec2-metadata-token": self._token}))
        except _UnheardError as error:
            if not error.refused:
                raise
            self._token = ""
            if fresh:
                raise
        return self._get(what)  # the token had run out


class Gcp(_Service):
    """Google Compute Engine."""

    name = "gcp"

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], object]) -> None:
        super().__init__(say)
        host = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"

    def _look(self) -> Notice | None:
        text = _ask(self._url, {"Metadata-Flavor": "Google"}) or ""
        if text.strip() == "TRUE" and self._new("preempted"):
            return Notice("Google Cloud: this machine is being preempted", _LEAST_S)
        return None


class Azure(_Service):
    """Microsoft Azure."""

    name = "azure"

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], object]) -> None:
        super().__init__(say)
        base = environment.get("AZURE_POD_IDENTITY_AUTHORITY_HOST", _LINK_LOCAL).rstrip("/")
        self._events = f"{base}/metadata/scheduledevents?api-version=2020-07-01"
        self._compute = f"{base}/metadata/instance/compute?api-version=2021-02-01"
        self._bound_s = _AZURE_BOUND_S
        self._own = ""

    def _look(self) -> Notice | None:
        text = _ask(self._events, {"Metadata": "true"}, bound_s=self._bound_s)
        self._bound_s = _BOUND_S
        events = (_object(text) or {}).get("Events")
        for event in events if isinstance(events, list) else []:
            if isinstance(event, dict) and event.get("EventType") in ("Preempt", "Terminate"):
                notice = self._notice(event)
                if notice is not None:
                    return notice
        return None

    def _notice(self, event: dict[str, Any]) -> Notice | None:
        """What an event means for this machine; None: nothing, or nothing new."""
        names = event.get("Resources")
        others = [str(one).lower() for one in names] if isinstance(names, list) else []
        own = self._name() if others else ""
        if (own and own not in others) or not self._new(str(event.get("EventId"))):
            return None
        whose = "this machine"
        if others and not own:
            whose = (
                f"{', '.join(others)}, which may be this machine: its own name can't be found out"
            )
        left_s = _left(event.get("NotBefore"), _LEAST_S)
        return Notice(f"Azure: {event['EventType']} is scheduled for {whose}", left_s)

    def _name(self) -> str:
        """This machine's own; "": it can't be found out."""
        if not self._own:
            try:
                compute = _object(_ask(self._compute, {"Metadata": "true"})) or {}
            except _UnheardError:
                return ""
            self._own = str(compute.get("name", "")).lower()
        return self._own


_MAKERS: Final[dict[str, Callable[[Mapping[str, str], Callable[[str], object]], Cloud]]] = {
    "aws": Aws,
    "gcp": Gcp,
    "azure": Azure,
}


def recognised(
    environment: Mapping[str, str],
    say: Callable[[str], object],
    named: str = "auto",
    dmi: Path = _DMI,
) -> Cloud | None:
    """The cloud that this machine is of, or that was named; None: none.

    Args:
        environment: of this process.
        say: told when the cloud can't be heard; called where it is polled.
        named: one of NAMES.
        dmi: the firmware's tables.

    Raises:
        UsageError: there is none of this name.
    """
    if named == "none":
        return None
    name = _found(dmi) if named == "auto" else named
    if name is None:
        return None
    if name not in _MAKERS:
        raise UsageError(f"{name!r} is no cloud that is known; there are: {', '.join(_MAKERS)}")
    return _MAKERS[name](environment, say)


def _found(dmi: Path) -> str | None:
    tables = {}
    for key in ("sys_vendor", "product_name", "chassis_asset_tag"):
        try:
            tables[key] = (dmi / key).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            tables[key] = ""  # a container, or a machine without such tables
    if tables["sys_vendor"] == "Amazon EC2":
        return "aws"
    if tables["product_name"] == "Google Compute Engine":
        return "gcp"
    return "azure" if tables["chassis_asset_tag"] == _AZURE_TAG else None


def _ask(
    url: str, headers: Mapping[str, str], *, method: str = "GET", bound_s: float = _BOUND_S
) -> str | None:
    """What a metadata service answers; None: that there is nothing.

    Raises:
        _UnheardError: nobody answers, or nothing that means anything.
    """
    # HTTP and TLS take time and memory of every launch: only where there is a cloud.
    import http.client
    import urllib.error
    import urllib.request

    # Never through a proxy: it would answer for a machine of its own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310
        with opener.open(request, timeout=bound_s) as answer:
            text: str = answer.read(1 << 20).decode("utf-8", "replace")
            return text
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:  # "not found"
            return None
        raise _UnheardError(f"{url} says {error}", refused=error.code == 401) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _UnheardError(f"nobody answers at {url} as it should ({error!r})") from error


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        return None if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _left(at: object, least_s: float) -> float:
    """Seconds until a time of the form of ISO 8601 or of RFC 1123."""
    from email.utils import parsedate_to_datetime  # the same

    try:
        text = str(at)
        when = datetime.fromisoformat(text) if text[:1].isdigit() else parsedate_to_datetime(text)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return max(0.0, when.timestamp() - time.time())
    except ValueError:
        return least_s
