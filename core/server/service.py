"""What the page and the API have in common: one queue, one worker, one folder, one set of limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.config.arguments import first_seed
from core.pipeline.resolution import low_picture, plan_for
from core.server.jobs import Job, Jobs
from core.server.limits import Limits
from core.server.models import Models
from core.server.orders import Order, check_known, check_order
from core.server.outputs import Outputs
from core.server.stored import made_of_pictures, order_from
from core.server.worker import Worker

PATIENCE = 60.0  # seconds that the worker gets to end, and to save what is computed


class Service:
    """Takes orders and makes their pictures."""

    def __init__(self, models: Models, outputs: Outputs, limits: Limits, preset: str) -> None:
        self.models, self.outputs, self.limits = models, outputs, limits
        self.preset = preset  # of an order that names none
        self.jobs = Jobs(limits.jobs)
        self._worker = Worker(self.jobs, models, outputs)
        self.ending: list[Callable[[], None]] = []  # called where the server is about to end

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the worker works; afterwards what it had computed is saved."""
        self._worker.start()
        try:
            yield
        finally:
            self.close()
            self._worker.join(PATIENCE)

    @property
    def lost(self) -> bool:
        """Whether the device failed, so that only a new start helps."""
        return self._worker.lost

    def close(self) -> None:
        """Cancel all jobs and take no more; who waits for something is let go."""
        self.jobs.close()
        for end in self.ending:
            end()

    def submit(self, order: Order, client: str) -> Job:
        """Check an order and queue it; ValueError or TypeError for what is wrong with it."""
        presets = self.models.available()
        loras = self.models.loras(order.preset) if order.preset in presets else {}
        check_order(order, self.limits, presets, loras)
        for control in order.controls:
            check_known("ControlNet", control.control, self.models.controls(order.preset))
        config, settings = self.models.described(order.preset).config_c, order.settings
        sizes = plan_for(config, *order.size, settings.lr_size)
        if settings.lr_only:
            low_picture(sizes, config.geometry)
        job = Job(order, client, first_seed(order.seed))
        self.jobs.add(job)
        return job

    def earlier(self, name: str) -> Order:
        """The order that makes a picture of the output folder again.

        FileNotFoundError where there is none of this name. ValueError where its models are not here, or what
        it was made of is no longer kept.
        """
        stored = self.outputs.settings(name)
        order = order_from(stored, self.models.available())
        if not made_of_pictures(stored):
            return order
        job = self.jobs.made(name)
        if job is None or not job.order.given:
            raise ValueError(
                "the pictures that this one was made of are no longer kept: make small ones of them anew"
            )
        return order.with_pictures_of(job.order)
