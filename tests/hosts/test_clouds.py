"""Notices of clouds, from servers of the test's own that speak the documented protocols."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, wait_until
from launched import Launched, checkpoints, fake

from ckptd.errors import UsageError
from ckptd.host import clouds
from ckptd.host.clouds import Cloud
from ckptd.supervisor.errands import Errands
from ckptd.supervisor.policy import Policy


class Metadata:
    """A metadata service: what it answers, by path; it refuses what the real ones refuse."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.token = "first"
        self.garbage = False  # answers what is no HTTP
        self.refuses = 0  # an HTTP status for whatever is asked
        self.asked: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                service.asked.append("PUT " + self.path)
                right = self.path == "/latest/api/token" and int(
                    self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                )
                self.say(200 if right else 400, service.token)

            def do_GET(self) -> None:
                service.asked.append("GET " + self.path)
                if self.path.startswith("/latest/"):
                    allowed = self.headers["X-aws-ec2-metadata-token"] == service.token
                elif self.path.startswith("/computeMetadata/"):
                    allowed = self.headers["Metadata-Flavor"] == "Google"
                else:
                    allowed = self.headers["Metadata"] == "true"
                text = service.answers.get(self.path)
                self.say(401 if not allowed else 404 if text is None else 200, text or "")

            def say(self, code: int, text: str) -> None:
                if service.garbage:
                    self.wfile.write(b"\xff is no HTTP\r\n\r\n")
                    return
                self.send_response(service.refuses or code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                """Quietly."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{self.host}/",
            "GCE_METADATA_HOST": self.host,
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": f"http://{self.host}",
        }


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    one = Metadata()
    yield one
    one.server.shutdown()
    one.server.server_close()


AWS_ACTION = "/latest/meta-data/spot/instance-action"
AWS_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_COMPUTE = "/metadata/instance/compute?api-version=2021-02-01"


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def cloud(name: str, environment: dict[str, str], said: list[str]) -> Cloud:
    found = clouds.recognised(environment, said.append, name)
    assert found is not None
    return found


def test_aws(metadata: Metadata) -> None:
    """Advice, then the end with its time, each once. A token that ran out is renewed."""
    aws = cloud("aws", metadata.environment(), [])
    assert aws.poll() is None
    metadata.answers[AWS_REBALANCE] = json.dumps({"noticeTime": "2026-11-05T08:22:00Z"})
    advice = aws.poll()
    assert advice is not None
    assert advice.left_s is None
    assert aws.poll() is None
    assert metadata.asked.count("PUT /latest/api/token") == 1
    metadata.token = "second"
    at = soon(110).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata.answers[AWS_ACTION] = json.dumps({"action": "terminate", "time": at})
    notice = aws.poll()
    assert notice is not None
    assert "terminate" in notice.text
    assert notice.left_s is not None
    assert 0 < notice.left_s <= 110
    assert aws.poll() is None


def test_gcp(metadata: Metadata) -> None:
    """Of the 30 seconds, those are over in which it was not asked."""
    gcp = cloud("gcp", metadata.environment(), [])
    assert gcp.poll() is None
    metadata.answers[GCP_PREEMPTED] = "FALSE"
    assert gcp.poll() is None
    metadata.answers[GCP_PREEMPTED] = "TRUE\n"
    notice = gcp.poll()
    assert notice is not None
    assert notice.left_s == 30 - clouds.POLL_S
    assert gcp.poll() is None


def test_azure(metadata: Metadata) -> None:
    """Other events are none of ours."""
    azure = cloud("azure", metadata.environment(), [])
    assert azure.poll() is None
    event = {"EventId": "1", "EventType": "Reboot", "NotBefore": ""}
    metadata.answers[AZURE_EVENTS] = json.dumps({"DocumentIncarnation": 1, "Events": [event]})
    assert azure.poll() is None
    at = format_datetime(soon(50), usegmt=True)
    event = {"EventId": "2", "EventType": "Preempt", "NotBefore": at}
    metadata.answers[AZURE_EVENTS] = json.dumps({"DocumentIncarnation": 2, "Events": [event]})
    notice = azure.poll()
    assert notice is not None
    assert notice.left_s is not None
    assert 0 < notice.left_s <= 50
    assert azure.poll() is None


def azure_event(number: int, *names: str) -> str:
    at = format_datetime(soon(50), usegmt=True)
    event = {"EventId": str(number), "EventType": "Preempt", "NotBefore": at, "Resources": names}
    return json.dumps({"DocumentIncarnation": number, "Events": [event]})


def test_azure_tells_of_others_too(metadata: Metadata) -> None:
    """Those of the same scale set: their end is not ours. Who we are is asked once."""
    metadata.answers[AZURE_COMPUTE] = json.dumps({"name": "Set_7", "vmId": "x"})
    azure = cloud("azure", metadata.environment(), [])
    metadata.answers[AZURE_EVENTS] = azure_event(1, "set_1", "set_77")
    assert azure.poll() is None
    metadata.answers[AZURE_EVENTS] = azure_event(2, "set_1", "set_7")
    notice = azure.poll()
    assert notice is not None
    assert "this machine" in notice.text
    assert metadata.asked.count(f"GET {AZURE_COMPUTE}") == 1


def test_azure_does_not_know_its_name(metadata: Metadata) -> None:
    """Better saved for nothing than not saved; it is said."""
    azure = cloud("azure", metadata.environment(), [])
    metadata.answers[AZURE_EVENTS] = azure_event(1, "set_1")
    notice = azure.poll()
    assert notice is not None
    assert "set_1, which may be this machine" in notice.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"Events": 3}', '{"Events": [3]}', "\xff"])
def test_nonsense_is_no_notice(metadata: Metadata, text: str) -> None:
    for path in (AWS_REBALANCE, GCP_PREEMPTED, AZURE_EVENTS):
        metadata.answers[path] = text
    for name in ("gcp", "azure"):
        assert cloud(name, metadata.environment(), []).poll() is None


def test_a_time_that_cannot_be_read() -> None:
    """The shortest that the cloud promises; one that is over is none."""
    assert clouds._left("soon", 30.0) == 30.0
    assert clouds._left(None, 120.0) == 120.0
    assert clouds._left(datetime.fromtimestamp(time.time() - 9, UTC).isoformat(), 30.0) == 0.0


def refuse_all(metadata: Metadata) -> None:
    metadata.refuses = 401


def unavailable(metadata: Metadata) -> None:
    metadata.refuses = 503


def garbage(metadata: Metadata) -> None:
    metadata.garbage = True


@pytest.mark.parametrize("trouble", [refuse_all, unavailable, garbage])
@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_what_is_not_heard_is_asked_again(
    metadata: Metadata, name: str, trouble: Callable[[Metadata], None]
) -> None:
    """No answer in the protocol silences a cloud: the next one counts."""
    asked = cloud(name, metadata.environment(), [])
    trouble(metadata)
    assert asked.poll() is None
    assert asked.poll() is None
    metadata.refuses, metadata.garbage = 0, False
    metadata.answers[AWS_ACTION] = '{"action": "stop"}'
    metadata.answers[GCP_PREEMPTED] = "TRUE"
    metadata.answers[AZURE_EVENTS] = azure_event(1)
    assert asked.poll() is not None


NOBODY = {
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9",
    "GCE_METADATA_HOST": "[",
    "AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://127.0.0.1:9",
}


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No notice, no error; when that lasts, it is said once, and how to mend it."""
    said: list[str] = []
    asked = cloud(name, NOBODY, said)
    assert asked.poll() is None
    assert not said, "it may be no more than a moment"
    monkeypatch.setattr(clouds, "_SILENT_S", 0.0)
    assert asked.poll() is None
    assert asked.poll() is None
    assert len(said) == 1
    assert f"no notices of {name} can be heard" in said[0]
    assert ("hop limit" in said[0]) == (name == "aws")


@pytest.mark.parametrize(
    ("key", "text", "name"),
    [
        ("sys_vendor", "Amazon EC2", "aws"),
        ("product_name", "Google Compute Engine", "gcp"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77", "azure"),
        ("sys_vendor", "QEMU", None),
    ],
)
def test_recognised(tmp_path: Path, key: str, text: str, name: str | None) -> None:
    """By the firmware's tables; nothing is asked of a network."""
    (tmp_path / key).write_text(text + "\n")
    found = clouds.recognised({}, print, dmi=tmp_path)
    assert (None if found is None else found.name) == name
    assert clouds.recognised({}, print, "none", tmp_path) is None
    with pytest.raises(UsageError, match="aws, gcp, azure"):
        clouds.recognised({}, print, "moon", tmp_path)


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_a_job_is_saved(
    workshop: Workshop, metadata: Metadata, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the notice to a durable checkpoint and exit code 75; the job is one that goes on."""
    for key, value in metadata.environment().items():
        monkeypatch.setenv(key, value)
    launched = Launched(workshop, *fake(), options=("--cloud", name))
    launched.wait_for("step 5")
    at = soon(100)
    event = {"EventId": "2", "EventType": "Preempt", "NotBefore": format_datetime(at, usegmt=True)}
    metadata.answers[AZURE_EVENTS] = json.dumps({"Events": [event]})
    metadata.answers[GCP_PREEMPTED] = "TRUE"
    metadata.answers[AWS_ACTION] = json.dumps({"action": "stop", "time": at.isoformat()})
    assert launched.ends() == 75
    assert checkpoints(workshop) == [launched.steps()[-1]]
    events = workshop.journal()
    assert [e for e in events if e["event"] == "notice"]
    assert "this" in str([e["by"] for e in events if e["event"] == "asked to stop"])


def test_advice_is_a_checkpoint(
    workshop: Workshop, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that may be taken some time: the job is saved, and goes on."""
    for key, value in metadata.environment().items():
        monkeypatch.setenv(key, value)
    launched = Launched(workshop, *fake(), options=("--cloud", "aws"))
    launched.wait_for("step 5")
    metadata.answers[AWS_REBALANCE] = json.dumps({"noticeTime": "2026-11-05T08:22:00Z"})
    launched.wait_for("may soon be interrupted")
    wait_until((workshop.path / "runs/job/checkpoints").is_dir)
    assert launched.process.poll() is None
    assert launched.signal(15).ends() == 75


def test_advice_waits_for_a_worker(
    workshop: Workshop, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the job is still starting: a checkpoint is made as soon as one can be."""
    for key, value in metadata.environment().items():
        monkeypatch.setenv(key, value)
    metadata.answers[AWS_REBALANCE] = json.dumps({"noticeTime": "2026-11-05T08:22:00Z"})
    starts = workshop.path / "starts"
    late = ("sh", "-c", f'until [ -e {starts} ]; do sleep 0.1; done; exec "$@"', "sh")
    launched = Launched(workshop, *late, *fake(), options=("--cloud", "aws"))
    launched.wait_for("may soon be interrupted")
    starts.touch()
    wait_until((workshop.path / "runs/job/checkpoints").is_dir)
    assert launched.process.poll() is None
    assert launched.signal(15).ends() == 75


def test_the_notice_is_the_deadline(
    workshop: Workshop, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that reaches no safe point any more is ended while there is still time to make what
    is in memory durable: within what the notice leaves, not within the grace."""
    for key, value in metadata.environment().items():
        monkeypatch.setenv(key, value)
    launched = Launched(workshop, *fake("--held", "--deaf", "7"), options=("--cloud", "aws"))
    launched.wait_for("step 7")
    metadata.answers[AWS_ACTION] = json.dumps({"action": "stop", "time": soon(12).isoformat()})
    assert launched.ends() == 75
    assert checkpoints(workshop) == [7]
    assert "the host leaves" in launched.told()
    noticed, ended = (
        next(e["t"] for e in workshop.journal() if e["event"] == name)
        for name in ("notice", "stopped")
    )
    assert ended - noticed < 12 < Policy().grace_s


def test_a_question_that_fails(workshop: Workshop) -> None:
    """It is said, and the next one of its name is asked."""
    said: list[str] = []
    errands, answers = Errands(said.append), []
    for question in (lambda: 1 // 0, lambda: 7):
        errands.ask("cloud", question, answers.append)
        errands.deliver()
    assert answers == [7]
    assert "ZeroDivisionError" in said[0]
