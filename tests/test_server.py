"""The parts of the server: who is let in, limits, uploads, the queue, its worker, and the output folder."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from PIL import Image

from core.commands.pictures import Previewing
from core.config.given_control import GivenControl
from core.config.settings import Job as Wanted
from core.pictures.images import save_image
from core.pipeline import UltraPixelPipeline
from core.pipeline.made import picture_metadata
from core.server import shown, worker
from core.server.accounts import Accounts, Keys, add_user
from core.server.api import add_api
from core.server.form import TEXT, Filled, whole
from core.server.guard import CLIENT, Guard, Hosts
from core.server.jobs import KEPT_GIVEN, Job, Jobs, StageBar, TooMany
from core.server.limits import Limits
from core.server.models import Models
from core.server.orders import Beginning, Order, check_order, going_on
from core.server.outputs import Outputs
from core.server.service import Service
from core.server.stored import from_settings
from core.server.uploads import from_base64, hole_of, read_upload
from core.server.worker import STAGES
from core.weights.lora.merging import load_loras

LIMITS = Limits()
PASSWORD = "a long password"


def png(width: int = 8, height: int = 8, mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, "PNG", **options)
    return content.getvalue()


# --- who is let in --------------------------------------------------------------------------------


@pytest.mark.parametrize("bound, host, own", [
    ("127.0.0.1", "127.0.0.1:7860", True), ("127.0.0.1", "localhost", True), ("127.0.0.1", "[::1]:80", True),
    ("127.0.0.1", "LOCALHOST:1", True), ("127.0.0.1", "evil.example", False),
    ("127.0.0.1", "localhost.evil.example", False), ("127.0.0.1", "evil.example@localhost", False),
    ("127.0.0.1", "localhost:port", False), ("127.0.0.1", "10.0.0.7", False), ("127.0.0.1", "", False),
    ("127.0.0.1", "localhost/evil", False), ("127.0.0.1", "proxy.example", True),
    ("0.0.0.0", "10.0.0.7:7860", True), ("0.0.0.0", "[fe80::1]", True), ("0.0.0.0", "evil.example", False),
    ("10.0.0.7", "10.0.0.7", True), ("10.0.0.7", "10.0.0.8", False),
])  # fmt: skip
def test_only_own_hosts_are_answered(bound: str, host: str, own: bool) -> None:
    assert Hosts(bound, ["proxy.example"]).own(host) is own


def guarded(accounts: Accounts | None = None, keys: Keys | None = None, most_bytes: int = 1000) -> TestClient:
    """A client of an app behind the guard, which tells whose request it is and how long its body."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def answer(path: str, request: Request) -> list:
        return [request.scope[CLIENT], len(await request.body())]

    guard = Guard(app, Hosts("127.0.0.1"), most_bytes, accounts, keys)
    return TestClient(guard, base_url="http://localhost:7860")


@pytest.mark.parametrize("headers, status", [
    ({}, 200), ({"origin": "http://localhost:7860"}, 200), ({"origin": "http://localhost:3000"}, 403),
    ({"origin": "null"}, 403), ({"origin": "http://evil.example"}, 403),
    ({"origin": "file://localhost:7860"}, 403),
    ({"origin": ""}, 403), ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403),
    ({"sec-fetch-site": "same-origin"}, 200), ({"sec-fetch-site": "none"}, 200),
    ({"host": "evil.example"}, 403), ({"host": "evil.example", "origin": "http://evil.example"}, 403),
])  # fmt: skip
@pytest.mark.parametrize("method, path", [("POST", "/v1/jobs"), ("GET", "/")])
def test_other_pages_are_refused(method: str, path: str, headers: dict[str, str], status: int) -> None:
    answer = guarded().request(method, path, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"]


def test_a_link_to_the_page_may_be_followed_but_not_framed() -> None:
    client, follows = guarded(), {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    document = client.get("/", headers={**follows, "sec-fetch-dest": "document"})
    assert document.status_code == 200 and document.headers["x-frame-options"] == "SAMEORIGIN"
    assert client.get("/", headers={**follows, "sec-fetch-dest": "iframe"}).status_code == 403
    assert client.post("/", headers={**follows, "sec-fetch-dest": "document"}).status_code == 403


def test_large_bodies_are_refused_whatever_they_claim() -> None:
    client = guarded()
    assert client.post("/", content=b"x" * 1000).json() == ["testclient", 1000]
    assert client.post("/", content=b"x" * 1001).status_code == 413
    assert client.post("/", content=b"x", headers={"content-length": "-1"}).status_code == 413

    def chunks() -> object:
        yield from itertools.repeat(b"x" * 100, 20)

    assert client.post("/", content=chunks()).status_code == 413


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("users") / "users.txt"
    add_user("anna", "another password", file)
    add_user("ben", PASSWORD, file)
    add_user("anna", PASSWORD, file)
    return file


def test_the_file_of_users_holds_no_password(users: Path) -> None:
    text = users.read_text()
    assert [line.split(":")[0] for line in text.splitlines()] == ["anna", "ben"]
    assert "password" not in text and text.count("scrypt$") == 2
    assert os.name == "nt" or users.stat().st_mode & 0o077 == 0


def test_users_are_asked_for_name_and_password_everywhere(users: Path) -> None:
    client = guarded(Accounts.read(users))
    for path in ("/", "/v1/models", "/gradio_api/info", "/pictures/x.png"):
        assert client.get(path).status_code == 401
        assert client.get(path).headers["www-authenticate"].startswith("Basic")
        assert client.get(path, auth=("anna", PASSWORD)).json() == ["anna", 0]
    for wrong in (("anna", "another password"), ("nobody", PASSWORD), ("", ""), ("anna", "")):
        assert client.get("/", auth=wrong).status_code == 401
    assert client.get("/", headers={"authorization": "Basic @@@"}).status_code == 401
    assert client.get("/", headers={"authorization": "Bearer anna"}).status_code == 401
    assert client.get("/health").status_code == 200


def test_keys_open_the_api_alone(users: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# keys\nsk-one\n\nsk-two\n")
    bearer = {"authorization": "Bearer sk-two"}
    for client in (guarded(Accounts.read(users), Keys(file)), guarded(None, Keys(file))):
        assert client.get("/v1/models", headers=bearer).status_code == 200
        for wrong in (
            {},
            {"authorization": "Bearer sk-three"},
            {"authorization": "Bearer "},
            {"authorization": "sk-two"},
        ):
            assert client.get("/v1/models", headers=wrong).status_code == 401
    assert guarded(Accounts.read(users), Keys(file)).get("/", headers=bearer).status_code == 401


@pytest.mark.parametrize("content, told", [
    ("anna", "line 1: this is no user"), ("anna:plain", "line 1: this is no user"),
    ("anna:scrypt$x$$", "line 1"), ("anna:scrypt$3$AAAA$AAAA", "line 1"), ("", "holds no user"),
    (None, "cannot be read"),
])  # fmt: skip
def test_a_wrong_file_of_users_is_named(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=told):
        Accounts.read(file)


@pytest.mark.parametrize(
    "name, password", [("a:b", PASSWORD), ("", PASSWORD), ("anna\n", PASSWORD), ("anna", "short")]
)
def test_users_with_wrong_names_or_short_passwords_are_refused(
    name: str, password: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError):
        add_user(name, password, tmp_path / "users.txt")


# --- what may be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize("values, told", [
    ({"prompt": " "}, "prompt is empty"), ({"prompt": "x" * 4001}, "more than 4000"),
    ({"negative_prompt": "x" * 4001}, "more than 4000"), ({"preset": "tinny"}, "did you mean tiny"),
    ({"height": 4097}, "at most 4096"), ({"width": 5000}, "at most 4096"), ({"count": 5}, "1 to 4"),
    ({"count": 0}, "1 to 4"), ({"seed": -2}, "seed must be"), ({"seed": 2**63}, "seed must be"),
    ({"changes": {"steps": 51}}, "at most 50"), ({"changes": {"steps_b": 51}}, "at most 50"),
    ({"changes": {"steps_lr": 51}}, "at most 50"), ({"changes": {"cfg": float("nan")}}, "cfg"),
    ({"changes": {"sampler": "/etc/passwd"}}, "sampler"),
    ({"loras": {"../../etc/passwd": 1}}, "not known here"),
    ({"loras": {"cat": "much"}}, "must be a number"),
    ({"controls": (GivenControl("inpainting", Image.new("RGB", (8, 5000))),)}, "at most 4096"),
    ({"begin": Beginning(Image.new("RGB", (64, 64)), region=(60, 0, 5, 5))}, "does not lie within"),
    ({"begin": Beginning(Image.new("RGB", (64, 64)), region=(0, 0, 5, 5)), "height": 96}, "own size"),
    ({"prompts": ((Image.new("RGB", (64, 64)), "much"),)}, "must be a number"),
    ({"begin": Beginning(Image.new("RGB", (64, 2049)), None, True, 2)}, "at most 4096"),
    ({"begin": Beginning(Image.new("RGB", (64, 64)), None, True, 0.5)}, "factor must be"),
    ({"begin": Beginning(Image.new("RGB", (64, 64)), 1.5)}, "strength"),
    ({"begin": Beginning(Image.new("RGB", (64, 64)), None, True), "changes": {"lr_only": True}}, "lr_only"),
])  # fmt: skip
def test_orders_beyond_the_limits_are_refused(values: dict, told: str) -> None:
    order = Order(**{"prompt": "a house", "preset": "tiny", **values})
    with pytest.raises((ValueError, TypeError), match=told):
        check_order(order, LIMITS, ["tiny"], ["cat"])


def test_an_order_within_the_limits_is_taken() -> None:
    order = Order("a house", "tiny", 4096, 64, 4, 0, changes={"steps": 50}, loras={"cat": -0.5})
    check_order(order, LIMITS, ["tiny"], ["cat"])
    assert order.settings.steps == 50 and order.settings.cfg == 2.0


@pytest.mark.parametrize("content, told", [
    (b"", "not a picture"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    (b"x" * 20_000_001, "more than 20 MB"), (png()[:45], "damaged|cannot be read"),
    (png(10000, 5001, "1"), "50 million"),
], ids=["empty", "svg", "long", "cut", "large"])  # fmt: skip
def test_uploads_are_decoded_within_bounds(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_upload(content, "the image", LIMITS)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(7072, 7072, "1")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="50 million"):
        read_upload(bomb, "the image", LIMITS)


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "http://localhost/x.png", "file:///etc/passwd", "ftp://x,y", "§"]
)
def test_a_picture_is_sent_itself_never_a_place(text: str) -> None:
    with pytest.raises(ValueError, match="no URL is fetched|is no base64"):
        from_base64(text, "image")
    assert from_base64("data:image/png;base64," + base64.b64encode(b"abc").decode(), "image") == b"abc"


def test_a_hole_is_white_or_transparent() -> None:
    picture, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert hole_of(picture, white).getextrema() == (255, 255)
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert hole_of(picture, clear).getextrema() == hole_of(clear, None).getextrema() == (255, 255)
    with pytest.raises(ValueError, match="nothing to fill"):
        hole_of(picture, None)
    with pytest.raises(ValueError, match="picture's size"):
        hole_of(picture, white.resize((5, 4)))


# --- the queue, its worker, the folder ------------------------------------------------------------


def job(client: str) -> Job:
    return Job(Order("a house", "tiny"), client, 1)


def test_jobs_come_in_turn_and_each_client_has_a_few() -> None:
    jobs = Jobs(2)
    first, second, third = job("a"), job("a"), job("b")
    for each in (first, second, third):
        jobs.add(each)
    with pytest.raises(TooMany, match="2 of your jobs"):
        jobs.add(job("a"))
    assert [jobs.place(each) for each in (first, second, third)] == [0, 1, 2]
    assert jobs.next() is first and jobs.place(third) == 2
    jobs.cancel(second)
    assert second.status.state == "cancelled" and jobs.place(third) == 1
    jobs.cancel(first)
    assert first.status.state == "running" and first.stop.is_set()
    jobs.add(job("a"))
    jobs.close()
    assert jobs.next() is None and third.status.state == "cancelled"


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(Models({"device": "cpu"}), Outputs(tmp_path), Limits(), "tiny")


def wait(check: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def test_a_job_ends_within_one_step_and_the_next_one_runs(service: Service) -> None:
    quick = {"steps": 1, "steps_b": 1}
    with service.running():
        long = service.submit(Order("a house", "tiny", 64, 64, changes={"steps": 50}), "a")
        wait(lambda: any(bar.done for bar in long.status.stages))
        service.jobs.cancel(long)
        done = sum(bar.done for bar in long.status.stages)
        short = service.submit(Order("a house", "tiny", 64, 64, count=2, changes=quick), "a")
        wait(lambda: short.status.over)
    assert sum(bar.done for bar in long.status.stages) <= done + 1
    assert (long.status.state, long.status.pictures) == ("cancelled", ())
    assert short.status.state == "done", short.status.error
    assert sorted(short.status.pictures, reverse=True) == service.outputs.names()
    assert all(bar.done == bar.steps for bar in short.status.stages)
    assert service.outputs.settings(short.status.pictures[1])["seed"] == short.seed + 1
    assert service.models.seconds("tiny", (64, 64), short.order.settings) > 0


def pixels(service: Service, job: Job) -> list[np.ndarray]:
    wait(lambda: job.status.over)
    assert job.status.state == "done", job.status.error
    return [np.array(Image.open(service.outputs.path(name))) for name in job.status.pictures]


def small(service: Service, **given: object) -> Job:
    changes = {"steps": 2, "steps_b": 1, "cfg": 3.0, "lr_only": True}
    job = service.submit(Order("a house", "tiny", 64, 96, 2, 5, changes=changes, **given), "a")
    assert [shape for one in pixels(service, job) for shape in one.shape[:2]] != [64, 96] * 2
    return job


def high(service: Service, order: Order) -> np.ndarray:
    (made,) = pixels(service, service.submit(order, "a"))
    return made


def test_a_small_picture_is_rendered_high(service: Service) -> None:
    with service.running():
        explored = small(service)
        assert [bar.name for bar in explored.status.stages] == [STAGES[0], *STAGES[2:]]
        assert all(bar.done == bar.steps for bar in explored.status.stages)
        assert service.models.seconds("tiny", (64, 96), explored.order.settings) is None
        earlier = service.earlier(explored.status.pictures[1])
        once = replace(explored.order, count=1, seed=6, changes={"steps": 2, "steps_b": 1, "cfg": 3.0})
        order = going_on(earlier, None, None, {})
        assert order == replace(order, seed=6, height=64, width=96, preset="tiny")
        np.testing.assert_array_equal(high(service, order), high(service, once))
        large = service.submit(going_on(earlier, 128, 192, {}), "a")
        assert pixels(service, large)[0].shape == (128, 192, 3)
        assert service.outputs.settings(large.status.pictures[0])["lr_size"] == [64, 96]
        with pytest.raises(ValueError, match="cannot go on from the low-resolution pass"):
            service.submit(going_on(earlier, 128, 128, {}), "a")


RED, HOLE = Image.new("RGB", (96, 64), "red"), Image.new("L", (96, 64))
HOLE.paste(255, (30, 20, 60, 50))


@pytest.mark.parametrize("given", [
    {"begin": Beginning(RED, 0.9)},
    {"begin": Beginning(RED, region=(8, 8, 40, 40)), "prompts": ((RED, 0.5),)},
    {"controls": (GivenControl("inpainting", RED, HOLE),)}, {"controls": (GivenControl("canny", RED),) * 2},
], ids=["begin", "region", "hole", "controls"])  # fmt: skip
def test_a_small_picture_of_a_picture_is_rendered_high_while_that_is_kept(
    given: dict[str, object], service: Service
) -> None:
    with service.running():
        explored = small(service, **given)
        name = explored.status.pictures[0]
        once = replace(explored.order, count=1, changes={"steps": 2, "steps_b": 1, "cfg": 3.0})
        order = going_on(service.earlier(name), None, None, {})
        np.testing.assert_array_equal(high(service, order), high(service, once))
        for _ in range(KEPT_GIVEN + 1):
            over = Job(explored.order, "b", 1)
            service.jobs.add(over)
            over.update(pictures=("x",))
            service.jobs.cancel(over)
        with pytest.raises(ValueError, match="no longer kept"):
            service.earlier(name)


def test_an_error_is_a_sentence_and_ends_its_job_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = iter([ValueError("the sea is too blue"), RuntimeError("secret"), OSError(28, "No space left")])

    def fail(_: str) -> None:
        raise next(failing)

    monkeypatch.setattr(service.models, "pipeline", fail)
    with service.running():
        jobs = [service.submit(Order("a house", "tiny", 64, 64), "a") for _ in range(3)]
        wait(lambda: all(each.status.over for each in jobs))
    told = [each.status.error for each in jobs]
    assert told[0] == "the sea is too blue" and "secret" not in told[1] and "No space left" in told[2]
    assert "secret" in capsys.readouterr().err


def test_errors_of_the_server_are_told_from_those_of_the_order_and_a_lost_device_makes_it_ill(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    errors = [ValueError("too blue"), torch.OutOfMemoryError("full"), OSError(28, "No space left"),
              KeyError("secret"), lost]  # fmt: skip
    failing = iter(errors)

    def fail(_: str) -> None:
        raise next(failing)

    monkeypatch.setattr(service.models, "pipeline", fail)
    app = FastAPI()
    add_api(app, service)
    client = TestClient(Guard(app, Hosts("127.0.0.1"), 1000, None, None), base_url="http://localhost:7860")
    told = []
    with service.running():
        for _ in errors:
            assert client.get("/health").json() == {"status": "ok"}
            told.append(client.post("/v1/images/generations", json={"prompt": "a house", "size": "64x64"}))
    assert [answer.status_code for answer in told] == [400, 400, 500, 500, 503]
    assert "start the server again" in told[-1].json()["error"]["message"]
    assert client.get("/health").status_code == 503


def test_one_clients_controls_and_failed_previews_touch_no_other_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubts = UltraPixelPipeline.doubts
    failing = [OSError("the previewer is damaged")]

    def sometimes(*given: object) -> list[str]:
        if failing:
            raise failing.pop()
        return doubts(*given)

    def broken(_: object, progress: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(UltraPixelPipeline, "doubts", sometimes)
    monkeypatch.setattr(Previewing, "of", broken)
    with service.running():
        controlled = service.submit(
            Order("a house", "tiny", 64, 64, controls=(GivenControl("canny", RED),)), "a"
        )
        wait(lambda: controlled.status.over)
        assert controlled.status.state == "failed" and "damaged" in controlled.status.error
        assert not service.models.pipeline("tiny").controls.steerings
        with pytest.warns(UserWarning, match="previews failed .CUDA out of memory.; the run goes on without"):
            long = service.submit(Order("a house", "tiny", 64, 64, changes={"steps": 50}), "b")
            wait(lambda: any(bar.done > 2 for bar in long.status.stages))
            service.jobs.cancel(long)
            wait(lambda: long.status.over)
    assert long.status.state == "cancelled"


def test_loras_that_stay_the_same_are_read_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(worker, "load_loras", lambda *given: read.append(given) or load_loras(*given))
    quick = Order("a house", "tiny", 64, 64, changes={"steps": 1, "steps_b": 1})
    with service.running():
        for weight in (0.5, 0.5, 0.8):
            order = replace(quick, loras={"lora_striped_balloon": weight})
            made = service.submit(order, "a")
            wait(lambda made=made: made.status.over)
            assert made.status.state == "done", made.status.error
    assert len(read) == 2


class FakePipeline:
    config_c = SimpleNamespace(previewer_checkpoint_path="somewhere")

    def __init__(self, name: str) -> None:
        self.name = name

    from_preset = classmethod(lambda cls, name: cls(name))


def test_another_preset_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.server.models.UltraPixelPipeline", FakePipeline)
    monkeypatch.setattr("core.server.models.Previewing", lambda pipeline: SimpleNamespace(held=pipeline))
    models = Models()
    first = models.pipeline("tiny")
    assert models.pipeline("tiny") is first and models.held() == "tiny"
    assert models.previews("tiny").held is first
    gone = weakref.ref(first)
    del first
    assert models.pipeline("lite").name == "lite" and models.held() == "lite"
    assert gone() is None


def test_without_downloads_the_embedded_family_is_the_first() -> None:
    models = Models({"models": str(ROOT / "models"), "device": "cpu"})
    assert models.first() == "tiny" or "small-big" in models.available()
    assert models.memory("tiny", (512, 512), Order("a", "tiny").settings) > 0


@pytest.mark.parametrize("name", [
    "../secret.png", "secret.png", "/etc/passwd", "20260101-000000-0123456789abcdef.txt", "", ".",
    "20260101-000000-0123456789abcdef.png/../secret.png", "20260101-000000-0123456789abcde0.png",
    "../20260101-000000-0123456789abcdef.png",
])  # fmt: skip
def test_no_other_file_is_reached_by_a_name(name: str, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out")
    for file in (tmp_path / "secret.png", tmp_path / "out" / "secret.png"):
        save_image(Image.new("RGB", (8, 8)), file, "png", {})
    (tmp_path / "out" / "20260101-000000-0123456789abcde0.png").symlink_to(tmp_path / "secret.png")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "20260101-000000-0123456789abcdef.png", "png", {})
    for reach in (outputs.path, outputs.small, outputs.settings):
        with pytest.raises(FileNotFoundError, match="no such picture"):
            reach(name)
    assert outputs.names() == []


# --- the form, and what is shown ------------------------------------------------------------------


def test_what_clients_write_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    one = job(evil)
    one.update(notes=(evil,), error=evil, state="failed", stages=(StageBar(evil, 2, 1),))
    settings = {"prompt": evil, "sampler": evil, "width": evil}
    texts = [
        shown.progress(one, 0), shown.mistake(evil), shown.results([evil], 1, evil), shown.history([evil]),
        shown.details(evil, settings), shown.note(evil),
    ]  # fmt: skip
    assert not any("<img src=x" in text or "'\"" in text for text in texts)


def filled(**given: object) -> Filled:
    """A form of which the rest is empty."""
    own = {"prompt": "a house", "preset": "tiny", "tab": TEXT, "count": 1, "others": {}, "loras": ()}
    return Filled(**{**dict.fromkeys(field.name for field in fields(Filled)), **own, **given})


def test_a_pictures_settings_make_the_form_that_makes_it_again() -> None:
    made = Order(
        "a house", "tiny", 64, 96, seed=7, changes={"steps": 3, "shift": 2.0, "cfg_interval": (0.1, 1)}
    )
    models = UltraPixelPipeline.from_preset("tiny", device="cpu").flags
    wanted = Wanted("a house", 64, 96, 7, "rain")
    lora = {"lora": ["models/tiny/lora_cat.safetensors:0.5"]}
    stored = json.loads(json.dumps(picture_metadata(wanted, made.settings, {**models, **lora}, {})))
    found = from_settings(stored, ["small-big", "tiny"])
    assert found["preset"] == "tiny" and found["loras"] == [("lora_cat", 0.5)]
    assert found["others"] == {"shift": 2.0, "cfg_interval": (0.1, 1)}
    names = "prompt negative_prompt preset height width count seed steps cfg sampler fast others".split()
    values = {name: found[name] for name in names}
    order = filled(**values).order(SimpleNamespace(limits=LIMITS))
    assert order.settings == made.settings and (order.seed, order.negative_prompt) == (7, "rain")


def test_the_form_of_a_small_picture_makes_the_large_one(service: Service) -> None:
    stored = {
        **vars(Order("a house", "tiny").settings),
        "lr_only": True,
        "seed": 5,
        "height": 64,
        "width": 96,
    }
    others = from_settings(json.loads(json.dumps(stored)), ["tiny"])["others"]
    once = filled(others=others, height=128, width=192, count=3)
    assert (once.order(service).settings.lr_only, once.order(service).settings.lr_size) == (False, (64, 96))
    assert filled(others=others, height=128, width=128).order(service).settings.lr_size is None
    for count, few in ((3, 3), (1, 4)):
        explored = filled(others=others, height=64, width=96, count=count).explored(service)
        assert (explored.count, explored.settings.lr_only) == (few, True)


def test_the_form_takes_a_region_and_a_picture_beside_the_prompt(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(96, 64))
    place = str(tmp_path / "a.png")
    region = {"x": 8, "y": 16, "region_width": 32, "region_height": 24}
    order = filled(start=place, start_strength=1.0, height=512, width=512, **region).order(service)
    assert order.begin.region == (8, 16, 32, 24) and order.size == (64, 96)
    ((picture, weight),) = filled(beside=place, beside_weight=0.5).order(service).prompts
    assert (picture.size, weight) == ((96, 64), 0.5)
    with pytest.raises(ValueError, match="a width and a height"):
        filled(start=place, start_strength=1.0, x=8).order(service)
    with pytest.raises(ValueError, match="add the picture of which a region"):
        filled(**region).order(service)


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_numbers_that_are_not_whole_are_named(value: float) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number"):
        whole("steps", value)


# --- the script -----------------------------------------------------------------------------------


def start(*flags: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "inference/app.py"), *flags]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_a_user_is_added_by_the_script(tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    done = start("--add_user", "anna", str(file), text=f"{PASSWORD}\n")
    assert done.returncode == 0 and f"--auth {file}" in done.stdout
    assert Accounts.read(file).knows("anna", PASSWORD)
    short = start("--add_user", "anna", str(file), text="short\n")
    assert short.returncode == 2 and short.stderr.startswith("error: the password is too short")


def test_a_port_in_use_and_wrong_flags_are_told_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = start("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "use another --port" in done.stderr and "Traceback" not in done.stderr
    for flags in (["--max_side", "0"], ["--port", "99999"], ["--host", "no.such.host.invalid"]):
        done = start(*flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
