"""Jobs of all clients in the order in which they came, for the one worker."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from core.server.orders import Order

KEPT = 200  # jobs that are over and can still be asked for
KEPT_GIVEN = 8  # of those that made small pictures, with what they were given, to go on from
MOST_WAITING = 100  # jobs of all clients

State = Literal["waiting", "running", "done", "cancelled", "failed"]
OVER = ("done", "cancelled", "failed")


class TooMany(ValueError):
    """A client, or all of them together, have as many jobs as they may."""


@dataclass(frozen=True)
class StageBar:
    """How far one stage is, over all pictures of a job."""

    name: str
    steps: int
    done: int = 0


@dataclass(frozen=True)
class Status:
    """Where a job stands."""

    state: State = "waiting"
    doing: str = ""  # beside the bars, in words
    stages: tuple[StageBar, ...] = ()
    preview: bytes | None = None  # PNG
    pictures: tuple[str, ...] = ()  # names in the output folder
    error: str = ""  # a sentence
    error_status: int = 400  # the HTTP status of it
    notes: tuple[str, ...] = ()  # sentences on what may not do what it is meant to do
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER


class Job:
    """An order on its way; its status is replaced as a whole, so that all threads may read it."""

    def __init__(self, order: Order, client: str, seed: int) -> None:
        self.id = secrets.token_urlsafe(12)
        self.order, self.client, self.seed = order, client, seed
        self.status = Status()
        self.stop = threading.Event()

    def update(self, **values: object) -> None:
        """Change parts of the status; for the one who has the job in hand."""
        self.status = replace(self.status, **values)

    def finish(self, state: State, error: str = "", error_status: int = 400) -> None:
        """End it, and let go of the pictures that it was given, unless there is something to go on from."""
        if not (self.order.changes.get("lr_only") and self.status.pictures):
            self.let_go()
        self.update(state=state, error=error, error_status=error_status, preview=None, doing="")

    def let_go(self) -> None:
        """Let go of the pictures that it was given."""
        self.order = self.order.without_pictures()


class Jobs:
    """The queue, and what is over."""

    def __init__(self, most_of_client: int) -> None:
        self._most_of_client = most_of_client
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition(threading.RLock())
        self._closed = False

    def add(self, job: Job) -> None:
        """Take a job in; TooMany where its client, or all together, have too many."""
        with self._changed:
            if self._closed:
                raise TooMany("the server is being stopped")
            if sum(other.client == job.client for other in self._open()) >= self._most_of_client:
                raise TooMany(
                    f"{self._most_of_client} of your jobs are waiting or running, the most that are taken: "
                    "wait for one of them, or cancel it"
                )
            if len(self._waiting) >= MOST_WAITING:
                raise TooMany(f"{MOST_WAITING} jobs are waiting, the most that are taken: try again later")
            self._waiting.append(job)
            self._known[job.id] = job
            for old in [j.id for j in self._known.values() if j.status.over][:-KEPT]:
                del self._known[old]
            for old in [j for j in self._known.values() if j.status.over and j.order.given][:-KEPT_GIVEN]:
                old.let_go()
            self._changed.notify()

    def _open(self) -> Sequence[Job]:
        return [*([] if self._running is None else [self._running]), *self._waiting]

    def find(self, name: str) -> Job | None:
        """The job of an id, unless it is long over."""
        return self._known.get(name)

    def made(self, picture: str) -> Job | None:
        """The job that made the picture of a name, unless it is long over."""
        with self._changed:
            return next((job for job in self._known.values() if picture in job.status.pictures), None)

    def place(self, job: Job) -> int:
        """How many jobs are before it; 0 once it runs, or is over."""
        with self._changed:
            jobs = self._open()
            return jobs.index(job) if job in jobs else 0

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, else after the step that is being computed."""
        with self._changed:
            job.stop.set()
            if job in self._waiting:
                self._waiting.remove(job)
                job.finish("cancelled")

    def next(self) -> Job | None:
        """Wait for the next job and take it; None once the queue is closed. For the worker."""
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            self._running.update(state="running")
            return self._running

    @property
    def closed(self) -> bool:
        """Whether the server is being stopped."""
        return self._closed

    def close(self) -> None:
        """Cancel all jobs, and let the worker end."""
        with self._changed:
            for job in self._open():
                self.cancel(job)
            self._closed = True
            self._changed.notify_all()
