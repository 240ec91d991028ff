"""What the page and the API have in common: one queue, one worker, one folder, one set of limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.config.arguments import first_seed
from core.pipeline.resolution import plan_for
from core.server.jobs import Job, Jobs
from core.server.limits import Limits
from core.server.models import Models
from core.server.orders import Order, check_order
from core.server.outputs import Outputs
from core.server.worker import Worker

PATIENCE = 60.0  # seconds that the worker gets to end, and to save what is computed


class Service:
    """Takes orders and makes their pictures."""

    def __init__(self, models: Models, outputs: Outputs, limits: Limits, preset: str) -> None:
        self.models, self.outputs, self.limits = models, outputs, limits
        self.preset = preset  # of an order that names none
        self.jobs = Jobs(limits.jobs)
        self._worker = Worker(self.jobs, models, outputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the worker works; afterwards what it had computed is saved."""
        self._worker.start()
        try:
            yield
        finally:
            self.jobs.close()
            self._worker.join(PATIENCE)

    def submit(self, order: Order, client: str) -> Job:
        """Check an order and queue it; ValueError or TypeError for what is wrong with it."""
        presets = self.models.available()
        loras = self.models.loras(order.preset) if order.preset in presets else {}
        check_order(order, self.limits, presets, loras)
        plan_for(self.models.described(order.preset).config_c, *order.size)
        job = Job(order, client, first_seed(order.seed))
        self.jobs.add(job)
        return job
