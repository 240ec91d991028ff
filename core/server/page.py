"""The page: a form, the tabs with what each task needs besides, and what comes of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from core.config.arguments import SEEDS
from core.config.control_types import control_type
from core.config.presets import DEFAULT, EMBEDDED, PRESETS
from core.config.settings import Settings
from core.pictures.images import NamedBytes, read_image_metadata, to_image
from core.pipeline.control import CONTROL_SIZE, Source, edge_control
from core.pipeline.origins import STRENGTH
from core.pipeline.steering import CONTROLLED
from core.server import shown
from core.server.form import (
    CONTROL,
    HISTORY,
    LARGE,
    LORA,
    LORAS,
    TEXT,
    Filled,
    opened,
    sizes,
    told_size,
    whole,
)
from core.server.guard import CLIENT
from core.server.jobs import Job
from core.server.limits import MEGA
from core.server.orders import Order, going_on
from core.server.service import Service
from core.server.stored import from_settings
from core.server.uploads_only import UploadsOnly
from core.server.worker import sentence
from gdf.names import SAMPLER_NAMES

LOOK = 0.2  # seconds between two looks at a job
KEPT_OPEN = 10  # seconds between two signs of life to a window
PICKED_FROM = 60  # newest pictures that the history shows
UPLOADS_KEPT = (600, 24 * 3600)  # seconds: how often is looked, and after how long an upload goes
HERE = Path(__file__).parent
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
PICK = """element.addEventListener('click', (event) => {
  const picked = event.target.closest('[data-name]');
  const busy = picked?.matches('.up-high') && document.querySelector('#up-make').disabled;
  if (picked && !busy) trigger('pick', { name: picked.dataset.name });
});"""
MASK = """<div class="up-mask" hidden>
<canvas tabindex="0" role="application" aria-label="Mask: draw what is to be filled. Arrow keys
move the brush, and paint with shift; space paints; plus and minus change the brush."></canvas>
<p>Draw over what is to be filled. <button type="button" class="up-clear">Clear the mask</button></p></div>"""


def upload(label: str, **options: Any) -> gr.Image:
    """A field for a picture that stays the file that was sent: it is decoded within the server's own bounds.

    (A class of its own would have gradio write a .pyi file beside this one.)
    """
    field = gr.Image(label=label, type="filepath", buttons=[], **options)
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def add_page(app: FastAPI, service: Service) -> ASGIApp:
    """Mount the page at /, and return the app with what stands before it."""
    page = Page(service).build()
    gr.mount_gradio_app(
        app, page, path="/", footer_links=[], run_history=False, show_error=True, mcp_server=False,
        ssr_mode=False, enable_monitoring=False, pwa=False, theme=gr.themes.Default(**FONTS),
        max_file_size=service.limits.upload_mb * MEGA, css=(HERE / "page.css").read_text("utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text('utf-8')}</script>",
    )  # fmt: skip
    apps = (getattr(route, "app", None) for route in app.routes)
    mounted = next(one for one in apps if isinstance(one, gr.routes.App))
    service.ending.append(mounted.stop_event.set)  # ends the stream by which a window sees that it lives
    page.has_launched = True  # gradio looks at paths only then
    return UploadsOnly(app, Path(gr.utils.get_upload_folder()))


@dataclass
class Outcome:
    """What a job's course is shown in."""

    job: gr.Textbox
    progress: gr.HTML
    results: gr.HTML
    low: gr.HTML  # small pictures, which stay while one of them is rendered high
    make: gr.Button
    explore: gr.Button
    cancel: gr.Button

    @property
    def all(self) -> list[Any]:
        return [self.job, self.progress, self.results, self.low, self.make, self.explore, self.cancel]

    @property
    def makers(self) -> list[gr.Button]:
        """The buttons that start a job."""
        return [self.make, self.explore]


class Page:
    """The page of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._presets = service.models.available()

    # --- what is seen ---------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The whole page."""
        with gr.Blocks(
            title="UltraPixel", analytics_enabled=False, delete_cache=UPLOADS_KEPT, fill_width=True
        ) as page:
            gr.Markdown("# UltraPixel")
            if EMBEDDED in self._presets and len(self._presets) == 1:
                gr.Markdown(_only_the_embedded())
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self._tab = gr.State(TEXT)
                    tabs = self._tabs()
                    with gr.Column() as form:
                        self._form()
                with gr.Column(scale=1, min_width=300) as outcome:
                    self._outcome = self._course()
            self._events(page)
            for name, tab in tabs.items():
                tab.select(
                    partial(self._opened, name), self._preset,
                    [self._tab, form, outcome, self._cfg, self._outcome.explore, self._sizes],
                    api_visibility="private", show_progress="hidden",
                )  # fmt: skip
            tabs[HISTORY].select(self._listed, None, self._history, api_visibility="private")
            gr.api(self._generate, api_name="generate")
        page.queue(default_concurrency_limit=None, api_open=False)
        return page

    def _tabs(self) -> dict[str, gr.Tab]:
        tabs = {}
        with gr.Tabs():
            with gr.Tab(TEXT) as tabs[TEXT]:
                self._start_fields()
            with gr.Tab(LARGE) as tabs[LARGE]:
                self._large_fields()
            with gr.Tab(CONTROL) as tabs[CONTROL]:
                self._control_fields()
            with gr.Tab(LORA) as tabs[LORA]:
                self._lora_fields()
            with gr.Tab(HISTORY) as tabs[HISTORY]:
                self._history_fields()
        return tabs

    def _start_fields(self) -> None:
        with gr.Accordion("Start from a picture", open=False):
            self._start = upload(
                "Picture to start from", elem_id="up-start", sources=["upload", "clipboard"], height=200
            )
            label = "How much is made anew: 0 nothing, 1 everything"
            self._start_strength = gr.Slider(0.05, 1, STRENGTH, step=0.05, label=label)
            gr.Markdown(
                "Make only a region anew, in the picture's pixels from its upper left corner (0: all of it). "
                "The picture then keeps its size."
            )
            with gr.Row():
                self._region = [
                    gr.Number(0, label=label, precision=0, min_width=110)
                    for label in ("x", "y", "Region's width", "Region's height")
                ]
        with gr.Accordion("Show a picture beside the prompt", open=False):
            label = "Picture that says what to show: its content and mood, not its places"
            self._beside = upload(label, elem_id="up-beside", sources=["upload", "clipboard"], height=200)
            self._beside_weight = gr.Slider(0, 1, 1, step=0.05, label="How much it counts")

    def _large_fields(self) -> None:
        self._small = upload("Picture to make large", elem_id="up-small", sources=["upload", "clipboard"])
        self._factor = gr.Slider(1, 8, 2, step=0.25, label="So many times as wide and as high")
        label = "How much is made anew: 1 all details, less keeps more"
        own = PRESETS[self._service.preset].upscale_strength
        self._large_strength = gr.Slider(0.05, 1, own, step=0.05, label=label)
        gr.Markdown("The prompt may stay empty.")

    def _control_fields(self) -> None:
        own = PRESETS[self._service.preset]
        kinds = self._service.models.controls(self._service.preset)
        if not kinds:
            gr.Markdown("No ControlNet is here. `models/README.md` in the repository says how to fetch them.")
        self._kind = gr.Dropdown(
            kinds, value=next(iter(kinds), None), label="Controlled by",
            info="canny: edges; inpainting: what lies around a hole; super_resolution: a small picture",
        )  # fmt: skip
        self._picture = upload("Picture that controls", elem_id="up-picture", sources=["upload", "clipboard"])
        self._ready = gr.Checkbox(False, label="The picture shows edges already")
        self._edges = gr.Button("See the edges", size="sm")
        self._seen = gr.Image(
            label="Edges", elem_id="up-edges", format="png", visible=False, interactive=False, buttons=[]
        )
        with gr.Column(visible=False) as self._holes:
            gr.HTML(html_template=MASK, js_on_load="window.upMask.start(element)", elem_id="up-mask")
            self._mask_file = upload(
                "Or a mask as a picture: white is filled", sources=["upload"], height=120
            )
        self._mask = gr.Textbox("", elem_classes="up-hidden")
        self._weight = gr.Slider(0, 3, own.control_weight, step=0.05, label="Weight of the control")

    def _lora_fields(self) -> None:
        names = sorted({name for preset in self._presets for name in self._service.models.loras(preset)})
        if not names:
            gr.Markdown("No LoRA is here. Start the server with `--lora_dir FOLDER`.")
        self._loras = []
        for number in range(1, LORAS + 1):
            with gr.Row(visible=bool(names)):
                name = gr.Dropdown(["", *names], value="", label=f"LoRA {number}", scale=2, min_width=140)
                weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight", scale=2, min_width=140)
            self._loras += [name, weight]

    def _history_fields(self) -> None:
        self._history = gr.HTML(js_on_load=PICK, elem_id="up-history")
        self._picked = gr.State("")
        self._details = gr.HTML()
        self._again = gr.Button("Use its settings", visible=False)

    def _form(self) -> None:
        first, limits = self._service.preset, self._service.limits
        own = PRESETS[first]
        self._prompt = gr.Textbox("", label="Prompt", lines=3, elem_id="up-prompt", autofocus=True)
        self._preset = gr.Dropdown(self._presets, value=first, label="Models", visible=len(self._presets) > 1)
        with gr.Column() as self._sizes:
            self._size = gr.Dropdown(
                self._size_choices(first), value=None, label="Usual sizes (width × height)",
                info="choose one, or write any size below",
            )  # fmt: skip
            with gr.Row():
                self._width = gr.Number(own.width, label="Width", precision=0, min_width=110)
                self._height = gr.Number(own.height, label="Height", precision=0, min_width=110)
            self._takes = gr.HTML(self._told(first, own.height, own.width, None))
        with gr.Row():
            self._seed = gr.Number(-1, label="Seed", info="-1 draws one", precision=0, min_width=140)
            self._dice = gr.Button("Roll", min_width=90, scale=0)
        with gr.Accordion("More", open=False):
            self._count = gr.Slider(1, limits.pictures, 1, step=1, label="Pictures")
            self._negative = gr.Textbox("", label="What it should not show")
            self._steps = gr.Slider(1, limits.steps, min(20, limits.steps), step=1, label="Steps")
            self._cfg = gr.Slider(
                0, 20, own.cfg, step=0.1, label="cfg", info="how strongly the prompt counts"
            )
            self._sampler = gr.Dropdown(list(SAMPLER_NAMES), value="ddpm", label="Sampler")
            self._fast = gr.Checkbox(False, label="Faster, a little worse (its own steps and sampler)")
            self._dropped = gr.File(label="Settings of a picture: drop it here", type="filepath", height=110)
            self._others = gr.State({})
            self._others_told = gr.HTML()

    def _course(self) -> Outcome:
        with gr.Row():
            make = gr.Button("Make", variant="primary", elem_id="up-make", scale=2, min_width=90)
            explore = gr.Button("Small pictures first", elem_id="up-explore", scale=3, min_width=200)
            cancel = gr.Button("Cancel", interactive=False, elem_id="up-cancel", scale=2, min_width=90)
        progress, results = gr.HTML(elem_id="up-progress"), gr.HTML(elem_id="up-results")
        low, job = gr.HTML(js_on_load=PICK, elem_id="up-low"), gr.Textbox("", elem_classes="up-hidden")
        return Outcome(job, progress, results, low, make, explore, cancel)

    @property
    def _fields(self) -> list[Any]:
        """In the order of `Filled`."""
        return [
            self._prompt, self._negative, self._preset, self._height, self._width, self._count, self._seed,
            self._steps, self._cfg, self._sampler, self._fast, self._others, self._tab, self._kind,
            self._picture, self._mask, self._mask_file, self._ready, self._weight,
            self._start, self._start_strength, *self._region, self._beside, self._beside_weight,
            self._small, self._factor, self._large_strength, *self._loras,
        ]  # fmt: skip

    # --- what happens ---------------------------------------------------------------------------------

    def _events(self, page: gr.Blocks) -> None:
        out, quiet = self._outcome, {"api_visibility": "private", "show_progress": "hidden"}
        sides = [self._height, self._width]
        sized = [self._preset, *sides, self._steps]
        mask = self._fields.index(self._mask)
        drawn = f"(...values) => {{ values[{mask}] = window.upMask.data(); return values; }}"
        fields = {"inputs": self._fields, "outputs": out.all, "js": drawn}
        for done in (
            out.make.click(self._make, **fields, **quiet),
            self._prompt.submit(self._make, **fields, **quiet),
            out.explore.click(self._explore, **fields, **quiet),
            out.low.pick(self._render_high, sides, out.all, **quiet),
        ):
            done.then(self._told, sized, self._takes, **quiet)
            done.then(_usable, None, out.makers, **quiet)
        out.cancel.click(self._cancel, out.job, None, **quiet)
        page.load(self._kept_open, None, None, **quiet)
        went_on = page.load(
            self._resume, out.job, [*out.all, self._prompt], js="() => [window.upJob.kept()]", **quiet
        )
        went_on.then(_usable, None, out.makers, **quiet)
        self._dice.click(lambda: secrets.randbelow(SEEDS), None, self._seed, **quiet)
        self._size.input(lambda size: size or (gr.skip(), gr.skip()), self._size, sides, **quiet)
        for part in sized:
            part.change(self._told, sized, self._takes, **quiet)
        changed = [*sides, self._size, self._cfg, self._kind, self._weight, self._large_strength]
        self._preset.input(self._with_preset, self._preset, changed, **quiet)
        whole_region = f"(strength) => strength === {STRENGTH} ? 1 : strength"
        for side in self._region:
            side.input(None, self._start_strength, self._start_strength, js=whole_region, **quiet)
        self._control_events(quiet)
        filled = [
            self._prompt, self._negative, self._preset, *sides, self._count, self._seed, self._steps,
            self._cfg, self._sampler, self._fast, self._others, self._others_told, *self._loras,
        ]  # fmt: skip
        self._dropped.upload(self._from_file, self._dropped, filled, **quiet)
        self._history.pick(self._pick, None, [self._picked, self._details, self._again], **quiet)
        self._again.click(self._from_picked, self._picked, filled, **quiet)

    def _control_events(self, quiet: Mapping[str, Any]) -> None:
        shows = "(picture) => { window.upMask.show(picture && picture.url); }"
        self._picture.change(None, self._picture, None, js=shows, **quiet)
        parts = [self._holes, self._edges, self._ready, self._seen]
        self._kind.change(_fields_of, self._kind, parts, **quiet)
        given = [self._picture, self._height, self._width]
        self._edges.click(self._edges_of, given, self._seen, **quiet)

    @staticmethod
    def _opened(tab: str, preset: str) -> tuple[Any, ...]:
        """What changes with the tab: the history needs no form, control another cfg, and what is made large
        has its own size, and no small picture before it."""
        seen = gr.update(visible=tab != HISTORY)
        cfg = CONTROLLED.cfg if tab == CONTROL else PRESETS[preset].cfg
        others = gr.update(visible=tab != LARGE)
        return tab, seen, seen, gr.skip() if tab == HISTORY else cfg, others, others

    async def _make(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for seen in self._ordered(Filled.of(values).order, request):
            yield seen

    async def _explore(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for seen in self._ordered(Filled.of(values).explored, request):
            yield seen

    async def _render_high(
        self, event: gr.EventData, request: gr.Request, height: float | None, width: float | None
    ) -> AsyncIterator[Any]:
        name = str(event._data.get("name", ""))

        def order(service: Service) -> Order:
            earlier = service.earlier(name)
            own = (None, None) if earlier.mends else (whole("height", height), whole("width", width))
            return going_on(earlier, *own, {})

        async for seen in self._ordered(order, request):
            yield seen

    async def _ordered(self, order: Callable[[Service], Order], request: gr.Request) -> AsyncIterator[Any]:
        """Submit an order, and show how its job gets on."""
        try:
            wanted = await asyncio.to_thread(order, self._service)
            job = await asyncio.to_thread(self._service.submit, wanted, _client(request))
        except Exception as error:
            told = {self._outcome.progress: shown.mistake(sentence(error))}
            yield tuple(told.get(part, gr.skip()) for part in self._outcome.all)
            return
        async for seen in self._followed(job):
            yield seen

    async def _followed(self, job: Job) -> AsyncIterator[Any]:
        last, first, low = None, True, job.order.settings.lr_only
        busy = gr.update(interactive=False)  # until gradio hears clicks again, which is after the end
        while True:
            now = job.status, self._service.jobs.place(job)
            if now != last:
                status, place = last = now
                made = gr.skip()
                if status.pictures:
                    show = shown.small_ones if low else shown.results
                    made = show(status.pictures, job.seed, job.order.prompt)
                empty = "" if first else gr.skip()
                yield (
                    job.id if first else gr.skip(),
                    shown.progress(job, place),
                    empty if low or not status.pictures else made,
                    made if low else gr.skip(),
                    busy,
                    busy,
                    gr.update(interactive=not status.over),
                )
                first = False
            if now[0].over or self._service.jobs.closed:
                return
            await asyncio.sleep(LOOK)

    async def _kept_open(self) -> AsyncIterator[None]:
        """Have something to tell a window as long as it is there.

        Gradio closes a window's stream when nothing is left to tell, and what is asked before the window has
        heard of that gets no answer.
        """
        while not self._service.jobs.closed:
            yield
            for _ in range(KEPT_OPEN):
                if not self._service.jobs.closed:
                    await asyncio.sleep(1)

    def _cancel(self, name: str) -> None:
        if (job := self._service.jobs.find(name)) is not None:
            self._service.jobs.cancel(job)

    async def _resume(self, name: str) -> AsyncIterator[Any]:
        """Show the job that this window had before it was loaded again."""
        job = self._service.jobs.find(name)
        if job is None:
            yield tuple(gr.skip() for _ in (*self._outcome.all, self._prompt))
            return
        prompt = job.order.prompt
        async for seen in self._followed(job):
            yield *seen, prompt
            prompt = gr.skip()

    def _told(self, preset: str, height: float | None, width: float | None, steps: float | None) -> str:
        """What a size takes, or why it cannot be."""
        try:
            settings = Settings(steps=int(steps or 20))
            told = told_size(self._service, preset, (int(height or 0), int(width or 0)), settings)
        except (ValueError, TypeError, OverflowError) as error:
            return shown.mistake(str(error))
        return f'<p class="up-note">{told}</p>'

    def _size_choices(self, preset: str) -> list[tuple[str, tuple[int, int]]]:
        most = self._service.limits.side
        return [(told_size(self._service, preset, size, Settings()), size) for size in sizes(preset, most)]

    def _with_preset(self, preset: str) -> tuple[Any, ...]:
        own = PRESETS[preset]
        choices = gr.update(choices=self._size_choices(preset), value=None)
        kinds = self._service.models.controls(preset)
        kind = gr.update(choices=kinds, value=next(iter(kinds), None))
        return own.height, own.width, choices, own.cfg, kind, own.control_weight, own.upscale_strength

    def _edges_of(self, path: str | None, height: float | None, width: float | None) -> Any:
        """What a ControlNet would see of the edges."""
        try:
            if path is None:
                raise ValueError("add the picture that controls")
            picture = opened(path, "the picture", self._service).convert("RGB")
            geometry = self._service.models.geometry(self._service.preset)
            shape = int(height or picture.height), int(width or picture.width)
            seen = edge_control(Source(picture), shape, geometry, CONTROL_SIZE).shown
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        return gr.update(value=to_image(seen.expand(3, -1, -1)), visible=True)

    # --- history and settings -------------------------------------------------------------------------

    def _listed(self) -> str:
        return shown.history(self._service.outputs.names()[:PICKED_FROM])

    def _pick(self, event: gr.EventData) -> tuple[Any, ...]:
        name = str(event._data.get("name", ""))
        try:
            return name, shown.details(name, self._service.outputs.settings(name)), gr.update(visible=True)
        except (ValueError, OSError) as error:
            return "", shown.mistake(str(error)), gr.update(visible=False)

    def _from_picked(self, name: str) -> list[Any]:
        return self._refilled(lambda: self._service.outputs.settings(name))

    def _from_file(self, path: str) -> list[Any]:
        content = Path(path).read_bytes()
        return self._refilled(lambda: read_image_metadata(NamedBytes(content, "this picture")))

    def _refilled(self, read: Any) -> list[Any]:
        """The form's fields as a picture's settings have them; the picture's own tab is not opened."""
        try:
            found = from_settings(read(), self._presets)
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        names = ("prompt", "negative_prompt", "preset", "height", "width", "count", "seed", "steps", "cfg",
                 "sampler", "fast", "others")  # fmt: skip
        told = ", ".join(f"{name} {value}" for name, value in found["others"].items())
        note = shown.note(f"From the picture, besides what is shown: {told}") if told else ""
        loras = [*found["loras"], *[("", 1.0)] * LORAS][:LORAS]
        known = set(self._service.models.loras(found.get("preset", self._service.preset)))
        rows = [part for name, weight in loras for part in (name if name in known else "", weight)]
        return [*(found.get(name, gr.skip()) for name in names), note, *rows]

    # --- for gradio's own client ----------------------------------------------------------------------

    async def _generate(
        self,
        request: gr.Request,
        prompt: str,
        width: int = 0,
        height: int = 0,
        seed: int = -1,
        steps: int = 20,
    ) -> dict:
        """Make a picture of a prompt; its address comes back, and the seed."""
        try:
            order = Order(
                prompt, self._service.preset, height or None, width or None, 1, seed, changes={"steps": steps}
            )
            job = await asyncio.to_thread(self._service.submit, order, _client(request))
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        while not job.status.over:
            await asyncio.sleep(LOOK)
        if job.status.error:
            raise gr.Error(job.status.error, print_exception=False)
        return {"seed": job.seed, "pictures": [f"/pictures/{name}" for name in job.status.pictures]}


def _client(request: gr.Request) -> str:
    return request.request.scope[CLIENT]


def _usable() -> tuple[Any, Any]:
    """Buttons that work again."""
    return gr.update(interactive=True), gr.update(interactive=True)


def _fields_of(kind: str | None) -> tuple[Any, ...]:
    """Which fields a kind of control has: the hole, the edges, ready ones, and the edges that were seen."""
    way = "" if kind is None else control_type(kind).inference
    edges = way == "edges"
    return (gr.update(visible=way == "hole"), gr.update(visible=edges), gr.update(visible=edges),
            gr.update(visible=False))  # fmt: skip


def _only_the_embedded() -> str:
    name = next(name for name, preset in PRESETS.items() if preset is DEFAULT)
    return (
        "The published weights are not here, so the **embedded family** makes the pictures. It knows only "
        f"drawn landscapes. For everything else: `python models/download.py --preset {name}` (10.4 GB), then "
        "start anew."
    )
