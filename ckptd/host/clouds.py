"""Notices of clouds: this machine will be taken away, and when.

- AWS: the instance metadata service, version 2 (a token first): `spot/instance-action` two minutes
  before, and `events/recommendations/rebalance`, which only says that it may happen.
- Google: `instance/preempted`; some 30 seconds are left.
- Azure: scheduled events, of type Preempt or Terminate; at least 30 seconds before.

Rules:

1. A service that does not answer is no notice. It is asked again.
2. A notice is given once. What it says is not believed blindly: without a time, the shortest that
   the cloud promises is taken.
3. Which cloud this is is read from the firmware's tables, since asking an address that is nobody's
   may hang or, worse, be somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from ckptd.errors import UsageError

NAMES: Final = ("auto", "none", "aws", "gcp", "azure")
_BOUND_S: Final = 2.0
_AZURE_BOUND_S: Final = 180.0  # the first question may take minutes
_TOKEN_S: Final = 21600
_LEAST_S: Final = 30.0
_AWS_LEAST_S: Final = 120.0
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


class Aws:
    """Amazon EC2."""

    name = "aws"

    def __init__(self, environment: Mapping[str, str]) -> None:
        base = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
        self._base = f"{base}/latest"
        self._token = ""
        self._given: set[str] = set()

    def poll(self) -> Notice | None:
        """See `Cloud`."""
        action = self._get("spot/instance-action")
        if action is not None and _once(self._given, "action"):
            left_s = _left(action.get("time"), _AWS_LEAST_S)
            return Notice(f"AWS: this instance is to {action.get('action', 'end')}", left_s)
        advice = self._get("events/recommendations/rebalance")
        if advice is not None and _once(self._given, str(advice.get("noticeTime"))):
            return Notice("AWS: this instance may soon be interrupted (rebalance)", None)
        return None

    def _get(self, what: str) -> dict[str, Any] | None:
        url = f"{self._base}/meta-data/{what}"
        for _ in range(2):  # with the token that we have, then with a new one
            if not self._token:
                header = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                self._token = _ask(f"{self._base}/api/token", header, method="PUT") or ""
            try:
                text = _ask(url, {"X-aws-ec2-metadata-token": self._token})
            except PermissionError:
                self._token = ""
                continue
            return _object(text)
        return None


class Gcp:
    """Google Compute Engine."""

    name = "gcp"

    def __init__(self, environment: Mapping[str, str]) -> None:
        host = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"
        self._given: set[str] = set()

    def poll(self) -> Notice | None:
        """See `Cloud`."""
        text = _ask(self._url, {"Metadata-Flavor": "Google"}) or ""
        if text.strip() == "TRUE" and _once(self._given, "preempted"):
            return Notice("Google Cloud: this machine is being preempted", _LEAST_S)
        return None


class Azure:
    """Microsoft Azure."""

    name = "azure"

    def __init__(self, environment: Mapping[str, str]) -> None:
        base = environment.get("AZURE_POD_IDENTITY_AUTHORITY_HOST", _LINK_LOCAL).rstrip("/")
        self._url = f"{base}/metadata/scheduledevents?api-version=2020-07-01"
        self._bound_s = _AZURE_BOUND_S
        self._given: set[str] = set()

    def poll(self) -> Notice | None:
        """See `Cloud`."""
        text = _ask(self._url, {"Metadata": "true"}, bound_s=self._bound_s)
        events = (_object(text) or {}).get("Events")
        if text is not None:
            self._bound_s = _BOUND_S
        for event in events if isinstance(events, list) else []:
            kind = event.get("EventType") if isinstance(event, dict) else None
            if kind in ("Preempt", "Terminate") and _once(self._given, str(event.get("EventId"))):
                left_s = _left(event.get("NotBefore"), _LEAST_S)
                return Notice(f"Azure: {kind} is scheduled for this machine", left_s)
        return None


_MAKERS: Final[dict[str, Callable[[Mapping[str, str]], Cloud]]] = {
    "aws": Aws,
    "gcp": Gcp,
    "azure": Azure,
}


def recognised(
    environment: Mapping[str, str], named: str = "auto", dmi: Path = _DMI
) -> Cloud | None:
    """The cloud that this machine is of, or that was named; None: none.

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
    return _MAKERS[name](environment)


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
    """What a metadata service answers; None: nothing, or that there is nothing.

    Raises:
        PermissionError: the token is not accepted.
    """
    # HTTP and TLS take time and memory of every launch: only where there is a cloud.
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
        if error.code == 401:  # "unauthorized"
            raise PermissionError(str(error)) from error
        return None
    except (OSError, ValueError):
        return None  # it is asked again


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        return None if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _once(given: set[str], key: str) -> bool:
    """Whether a notice is new."""
    new = key not in given
    given.add(key)
    return new


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
