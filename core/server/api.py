"""The API: pictures in the shape that OpenAI's clients send and read, and jobs with events."""

from __future__ import annotations

import asyncio
import base64
import difflib
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Form, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException

from core.config.control_types import HOLE, control_type
from core.config.given_control import GivenControl
from core.printable import say
from core.server.bodies import ControlBody, EditForm, Editing, Generation, JobBody
from core.server.guard import CLIENT, error_body
from core.server.jobs import Job, Status, TooMany
from core.server.orders import Beginning, Order
from core.server.service import Service
from core.server.uploads import from_base64, hole_of, read_upload
from core.server.worker import LOST, UNEXPECTED

LOOK = 0.1  # seconds between two looks at a job
KEEP_ALIVE = 15.0  # seconds after which a silent stream says that it is alive
PICTURES = "/pictures/"
SENT = ("image", "mask", "image_prompt")  # keys of pictures


def add_api(app: FastAPI, service: Service) -> None:
    """Add the routes, and how errors are told."""
    app.include_router(_openai_routes(service))
    app.include_router(_job_routes(service))
    app.include_router(_file_routes(service))
    app.add_api_route("/v1/{rest:path}", _unknown, methods=["GET", "POST"], include_in_schema=False)
    app.add_exception_handler(RequestValidationError, _told_invalid)
    app.add_exception_handler(StarletteHTTPException, _told_http)  # of unknown routes too
    app.add_exception_handler(ValueError, _told_mistake)
    app.add_exception_handler(TypeError, _told_mistake)
    app.add_exception_handler(FileNotFoundError, _told_missing)
    app.add_exception_handler(Exception, _told_unexpected)


# --- routes ---------------------------------------------------------------------------------------


def _openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["as OpenAI's"])

    @router.get("/models")
    def models() -> dict[str, Any]:
        """The presets whose weights are here."""
        return {"object": "list", "data": [_model(name) for name in service.models.available()]}

    @router.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in service.models.available():
            raise HTTPException(404, f"the model {name[:80]!r} is not known here")
        return _model(name)

    @router.post("/images/generations")
    async def generations(body: Generation, request: Request) -> dict[str, Any]:
        """Make pictures from text."""
        order = await asyncio.to_thread(_generation_order, body, service)
        return await _made(service, order, request, body.response_format)

    @router.post("/images/edits")
    async def edits(body: Annotated[EditForm, Form()], request: Request) -> dict[str, Any]:
        """Make pictures of a picture: fill its hole, be controlled by it, begin at it, or make it large."""
        sent = [*body.image, *body.images]
        if len(sent) > 1 or (not sent and body.image_prompt is None):
            raise ValueError(f"send one image, not {len(sent)}")
        files = {"image": sent[0] if sent else None, "mask": body.mask, "image_prompt": body.image_prompt}
        contents = {name: await file.read() for name, file in files.items() if file is not None}
        order = await asyncio.to_thread(_edit_order, body, contents, service)
        return await _made(service, order, request, body.response_format)

    return router


def _unknown(rest: str) -> None:
    """What the page's server, which has all other addresses, would tell in a shape of its own."""
    raise HTTPException(404, f"there is no /v1/{rest[:80]}; /docs shows what there is")


def _job_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    def found(name: str) -> Job:
        if (job := service.jobs.find(name)) is None:
            raise HTTPException(404, "there is no such job")
        return job

    @router.post("", status_code=202)
    async def submit(body: JobBody, request: Request) -> dict[str, Any]:
        """Queue pictures, and answer at once."""
        order = await asyncio.to_thread(_job_order, body, service)
        job = await asyncio.to_thread(service.submit, order, request.scope[CLIENT])
        return _told_job(service, job, request)

    @router.get("/{name}")
    def status(name: str, request: Request) -> dict[str, Any]:
        """Where a job stands."""
        return _told_job(service, found(name), request)

    @router.get("/{name}/events", response_class=StreamingResponse)
    async def events(name: str, request: Request) -> StreamingResponse:
        """Where a job stands from now on, as server-sent events; the last one is named after its end."""
        stream = _events(service, found(name), request)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @router.delete("/{name}")
    def cancel(name: str, request: Request) -> dict[str, Any]:
        """End a job within one step."""
        job = found(name)
        service.jobs.cancel(job)
        return _told_job(service, job, request)

    return router


def _file_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["files"])

    @router.get("/health")
    def health() -> dict[str, str]:
        """Whether the server answers, and can make pictures."""
        if service.lost:
            raise HTTPException(503, LOST)
        return {"status": "ok"}

    @router.get(PICTURES + "{name}")
    def picture(name: str) -> FileResponse:
        """A picture as it was saved, with its settings inside."""
        return FileResponse(service.outputs.path(name), media_type="image/png", filename=name,
                            content_disposition_type="inline")  # fmt: skip

    @router.get(PICTURES + "{name}/small")
    def small(name: str) -> FileResponse:
        """A small JPEG of it."""
        return FileResponse(service.outputs.small(name), media_type="image/jpeg")

    return router


# --- orders ---------------------------------------------------------------------------------------


def _generation_order(body: Generation, service: Service) -> Order:
    if body.from_picture is not None:
        return body.further(service.earlier(body.from_picture))
    return body.order(service.preset, loras=body.loras)


def _edit_order(body: Editing, sent: Mapping[str, bytes], service: Service, **given: Any) -> Order:
    """The order with the pictures that were sent, by the keys of `SENT`."""
    pictures = {name: read_upload(content, f"the {name}", service.limits) for name, content in sent.items()}
    image, mask, beside = (pictures.get(name) for name in SENT)
    _check_keys(body, image, mask, beside)
    if beside is not None:
        weight = 1.0 if body.image_prompt_weight is None else body.image_prompt_weight
        given["prompts"] = ((beside, weight),)
    if image is None:
        return body.order(service.preset, **given)
    hole = mask is not None or image.mode == "RGBA"
    if body.upscale or body.region is not None or (body.control is None and not hole):
        begin = Beginning(image, body.strength, body.upscale, body.factor, body.pixels)
        return body.order(service.preset, begin=begin, **given)
    if body.strength is not None:
        raise ValueError("strength is for image to image and upscale, without a mask, a hole or a control")
    control = control_of(body.control, image, mask, body.control_weight, body.ready)
    return body.order(service.preset, **{**given, "controls": (control, *given.get("controls", ()))})


def _check_keys(
    body: Editing, image: Image.Image | None, mask: Image.Image | None, beside: Image.Image | None
) -> None:
    """ValueError for keys that do not go together."""
    of_image = mask, body.control, body.upscale or None, body.strength, body.region
    if image is None and any(value is not None for value in of_image):
        raise ValueError("a mask, a control, a strength, a region and upscale need an image")
    if body.factor is not None and not body.upscale:
        raise ValueError("a factor is for upscale=true")
    if body.image_prompt_weight is not None and beside is None:
        raise ValueError("image_prompt_weight is the weight of an image_prompt: send one")
    if (body.upscale or body.region is not None) and (body.control is not None or mask is not None):
        what = "upscale" if body.upscale else "a region"
        raise ValueError(f"{what} takes neither a mask nor a control")


def _job_order(body: JobBody, service: Service) -> Order:
    if body.from_picture is not None:
        return _generation_order(body, service)
    sent = {name: from_base64(text, name) for name in SENT if (text := getattr(body, name)) is not None}
    controls = tuple(_control_order(control, service) for control in body.controls)
    return _edit_order(body, sent, service, loras=body.loras, controls=controls)


def _control_order(body: ControlBody, service: Service) -> GivenControl:
    image, mask = (
        None if text is None else read_upload(from_base64(text, name), f"the {name}", service.limits)
        for name, text in (("image", body.image), ("mask", body.mask))
    )
    return control_of(body.control, image, mask, body.weight, body.ready)


def control_of(
    kind: str | None, image: Image.Image, mask: Image.Image | None, weight: float | None, ready: bool
) -> GivenControl:
    """The control by a picture; of one with a mask or transparent parts that is inpainting, if none is named.

    ValueError for an unknown kind, and for what does not fit.
    """
    if kind is None:
        kind = HOLE
    control_type(kind)
    if kind == HOLE:
        return GivenControl(kind, image.convert("RGB"), hole_of(image, mask), weight)
    if mask is not None:
        raise ValueError(f"a mask is for inpainting, not for {kind}")
    ready = ready or control_type(kind).inference == "ready"
    return GivenControl(kind, image.convert("RGB"), weight=weight, ready=ready)


# --- answers --------------------------------------------------------------------------------------


async def _made(service: Service, order: Order, request: Request, form: str) -> dict[str, Any]:
    """The pictures of an order, once they are made; where nobody waits any more, it is cancelled."""
    job = await asyncio.to_thread(service.submit, order, request.scope[CLIENT])
    try:
        while not job.status.over and not service.jobs.closed:
            await asyncio.sleep(LOOK)
            if await request.is_disconnected():
                break
    finally:
        if not job.status.over:
            service.jobs.cancel(job)
    if service.jobs.closed and job.status.state != "done":
        raise HTTPException(503, "the server is being stopped")
    if job.status.state == "failed":
        raise HTTPException(job.status.error_status, job.status.error)
    if job.status.state != "done":
        raise HTTPException(409, "the job was cancelled")
    data = [
        _b64(service, name) if form == "b64_json" else {"url": _url(request, name)}
        for name in job.status.pictures
    ]
    return {"created": int(time.time()), "data": data, "seed": job.seed, "notes": list(job.status.notes)}


def _b64(service: Service, name: str) -> dict[str, str]:
    return {"b64_json": base64.b64encode(service.outputs.path(name).read_bytes()).decode()}


def _url(request: Request, name: str) -> str:
    return str(request.base_url).rstrip("/") + PICTURES + name


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ultrapixel"}


def _told_job(service: Service, job: Job, request: Request) -> dict[str, Any]:
    """A job's status as JSON, without its preview."""
    status = job.status
    return {
        "id": job.id,
        "state": status.state,
        "place": service.jobs.place(job),
        "seed": job.seed,
        "doing": status.doing,
        "stages": [vars(bar) for bar in status.stages],
        "pictures": [_url(request, name) for name in status.pictures],
        "error": status.error or None,
        "notes": list(status.notes),
        "seconds": round(status.seconds, 2),
    }


async def _events(service: Service, job: Job, request: Request) -> AsyncIterator[str]:
    """Events: progress, preview, and the state in which the job ends."""
    last: tuple[Status, int] | None = None
    silent = 0.0
    while True:
        now = job.status, service.jobs.place(job)
        if now != last:
            if now[0].preview is not None and (last is None or now[0].preview is not last[0].preview):
                yield _event("preview", {"b64_png": base64.b64encode(now[0].preview).decode()})
            yield _event(now[0].state if now[0].over else "progress", _told_job(service, job, request))
            last, silent = now, 0.0
        if now[0].over or service.jobs.closed:
            return
        if silent >= KEEP_ALIVE:
            yield ": still here\n\n"
            silent = 0.0
        await asyncio.sleep(LOOK)
        silent += LOOK


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


# --- errors ---------------------------------------------------------------------------------------


def _refused(status: int, message: str, key: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(error_body(message, kind, key), status)


def _told_mistake(_: Request, error: Exception) -> JSONResponse:
    return _refused(429 if isinstance(error, TooMany) else 400, str(error))


def _told_missing(_: Request, error: Exception) -> JSONResponse:
    return _refused(404, str(error))


def _told_http(_: Request, error: StarletteHTTPException) -> JSONResponse:
    return _refused(error.status_code, str(error.detail))


def _told_unexpected(_: Request, error: Exception) -> JSONResponse:
    say("".join(traceback.format_exception(error)), sys.stderr)
    return _refused(500, UNEXPECTED)


def _told_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a body, in a sentence."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, JobBody.model_fields, n=1)
        hint = f": did you mean {near[0]}?" if near and near[0] != key else " here; /docs has the known ones"
        return _refused(400, f"the key {key[:80]!r} is not known{hint}", key)
    if not key or first["type"] == "json_invalid":
        return _refused(400, "the body must be JSON with Content-Type: application/json")
    if "UploadFile" in first["msg"]:
        return _refused(400, f"{keys[0]} must be sent as a file", keys[0])
    if first["type"] == "missing":
        return _refused(400, f"{key} is missing", key)
    return _refused(400, f"{key}: {first['msg']}", key)
