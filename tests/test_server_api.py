"""The API of a running server: OpenAI's client, gradio's client, curl, and events, on the embedded family."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio_client
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import QUICK, served, started, write_models

from core.pictures.images import read_image_metadata
from core.pipeline import UltraPixelPipeline

PROMPT = "a red house on green hills"
OURS = {"seed": 5, "steps": 1, "steps_b": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = write_models(tmp_path_factory.mktemp("models"))
    flags = "--preset", "tiny", "--device", "cpu", "--models", str(models), "--max_jobs", "2"
    with served(tmp_path_factory.mktemp("out"), *flags) as address:
        yield address


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def web(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


def opened(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def decoded(answer: openai.types.ImagesResponse) -> list[bytes]:
    return [base64.b64decode(one.b64_json) for one in answer.data]


def png(colour: str = "gray", size: tuple[int, int] = (64, 64)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def test_openai_gets_the_pixels_of_the_pipeline(client: openai.OpenAI, web: httpx.Client) -> None:
    asked = {"prompt": PROMPT, "model": "tiny", "size": "96x64", "user": "anna", "extra_body": OURS}
    pictures = decoded(client.images.generate(n=2, response_format="b64_json", **asked))
    pipeline = UltraPixelPipeline.from_preset("tiny", device="cpu")
    expected = pipeline(PROMPT, 64, 96, seed=5, num_images=2, steps=1, steps_b=1, progress=False)
    for content, picture in zip(pictures, expected, strict=True):
        np.testing.assert_allclose(opened(content).astype(int), np.array(picture.image).astype(int), atol=1)
    settings = read_image_metadata(io.BytesIO(pictures[1]))
    assert (settings["prompt"], settings["seed"], settings["width"]) == (PROMPT, 6, 96)
    by_url = client.images.generate(**asked).data[0].url
    np.testing.assert_array_equal(opened(web.get(by_url).content), opened(pictures[0]))
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_edits_a_hole_and_an_outline(client: openai.OpenAI) -> None:
    clear = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    clear.paste((0, 0, 0, 0), (16, 16, 48, 48))
    content = io.BytesIO()
    clear.save(content, "PNG")
    asked = {"prompt": PROMPT, "response_format": "b64_json"}
    (filled,) = decoded(client.images.edit(image=("a.png", content.getvalue()), extra_body=OURS, **asked))
    pixels = opened(filled)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[0, 0].astype(int) - (200, 30, 30)).max() <= 1  # around the hole it stays
    files = {"image": ("a.png", png("red")), "mask": ("m.png", png("white"))}
    assert decoded(client.images.edit(**files, extra_body=OURS, **asked))
    control = {**OURS, "control": "canny", "control_weight": 0.5}
    assert decoded(client.images.edit(image=("a.png", png()), size="64x64", extra_body=control, **asked))


def test_openai_begins_at_a_picture_and_makes_it_large(client: openai.OpenAI) -> None:
    asked = {"image": ("a.png", png("red")), "response_format": "b64_json"}
    begun = client.images.edit(**asked, prompt=PROMPT, size="96x64", extra_body={**OURS, "strength": 0.1})
    assert opened(decoded(begun)[0]).shape == (64, 96, 3)
    more = {**OURS, "upscale": True, "factor": 1.5}
    large = client.images.edit(**asked, prompt="", extra_body=more)
    pixels = opened(decoded(large)[0])
    assert pixels.shape == (96, 96, 3)
    assert np.abs(pixels.mean(axis=(0, 1)) - (255, 0, 0)).max() < 30


def test_a_small_picture_is_gone_on_from_by_its_name(web: httpx.Client) -> None:
    body = {**OURS, "prompt": PROMPT, "size": "96x64", "negative_prompt": "rain"}
    once = web.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    low = web.post("/v1/images/generations", json={**body, "lr_only": True}).json()["data"][0]["url"]
    assert opened(web.get(low).content).shape != (64, 96, 3)
    name = {"from_picture": low.rsplit("/")[-1]}
    high = web.post("/v1/images/generations", json=name).json()["data"][0]["url"]
    np.testing.assert_array_equal(opened(web.get(high).content), opened(web.get(once).content))
    job = web.post("/v1/jobs", json={**name, "size": "192x128", "steps_b": 2}).json()
    assert "event: done" in web.get(f"/v1/jobs/{job['id']}/events").text
    large = web.get(web.get(f"/v1/jobs/{job['id']}").json()["pictures"][0]).content
    stored = read_image_metadata(io.BytesIO(large))
    assert (stored["lr_size"], stored["steps_b"], stored["seed"]) == ([64, 96], 2, 5)
    for more in ({"prompt": PROMPT}, {"seed": 9}, {"steps": 4}, {"loras": {"lora_random": 1}}, {"n": 2}):
        answer = web.post("/v1/images/generations", json={**name, **more})
        assert "has its own " + next(iter(more)) in answer.json()["error"]["message"]
    for other in ("x", "../" + name["from_picture"], "/etc/passwd", low):
        assert web.post("/v1/jobs", json={"from_picture": other}).status_code == 404


def test_openai_mends_a_region_and_shows_a_picture_beside_the_prompt(client: openai.OpenAI) -> None:
    asked = {"image": ("a.png", png("red")), "prompt": PROMPT, "response_format": "b64_json"}
    (mended,) = decoded(client.images.edit(**asked, extra_body={**OURS, "region": "16,16,24,40"}))
    same = (opened(mended) == (255, 0, 0)).all(axis=2)
    assert same[:16].all() and same[:, 40:].all() and not same[16:56, 16:40].all()
    beside = {"image_prompt": ("b.png", png("blue"))}
    more = {**OURS, "image_prompt_weight": 0.5}
    shown = client.post(
        "/images/edits", body={"prompt": PROMPT, "size": "64x64", "response_format": "b64_json", **more},
        files=beside, options={"headers": {"Content-Type": "multipart/form-data"}},
        cast_to=openai.types.ImagesResponse,
    )  # fmt: skip
    pipeline, blue = UltraPixelPipeline.from_preset("tiny", device="cpu"), Image.new("RGB", (64, 64), "blue")
    quick = {"seed": 5, "steps": 1, "steps_b": 1, "progress": False}
    expected = pipeline(PROMPT, 64, 64, image_prompt=(blue, 0.5), **quick)[0].image
    np.testing.assert_allclose(opened(decoded(shown)[0]).astype(int), np.array(expected).astype(int), atol=1)


@pytest.mark.parametrize("body, told", [
    ({"prompt": PROMPT, "stepz": 4}, "'stepz' is not known: did you mean steps?"),
    ({"prompt": PROMPT, "size": "64 x 64"}, "size must be WIDTHxHEIGHT"),
    ({"prompt": PROMPT, "size": "8192x64"}, "at most 4096"), ({"prompt": PROMPT, "n": 99}, "1 to 4"),
    ({"prompt": PROMPT, "model": "dall-e-3"}, "is not known here: there is tiny"),
    ({"prompt": PROMPT, "sampler": "euler"}, "sampler"), ({"size": "64x64"}, "prompt is empty"),
    ({"prompt": 5}, "prompt: "), ({"prompt": PROMPT, "loras": {"/etc/passwd": 1}}, "is not known here"),
    ({"prompt": PROMPT, "size": "16x16"}, "64"), ([], "body must be JSON"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence(web: httpx.Client, body: object, told: str) -> None:
    answer = web.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert told in message and "\n" not in message


@pytest.mark.parametrize(("body", "told"), [
    (b"{", "must be JSON"), (b"", "must be JSON"), (b"[" * 100_000, "body"), (b"\xff\xfe", "body"),
    (b'{"prompt": "a", "size": "0x0"}', "at least one pixel"),
    (b'{"prompt": "a", "loras": {"lora_random": NaN}}', "the weight of lora_random"),
    (b'{"prompt": "a", "loras": {"lora_random": 1e999}}', "the weight of lora_random"),
])  # fmt: skip
def test_bodies_that_are_none_are_told_in_openai_s_shape(web: httpx.Client, body: bytes, told: str) -> None:
    answer = web.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert told in message and "/" not in message.replace("application/json", "")


def test_unknown_routes_and_texts_for_files_are_told_in_openai_s_shape(web: httpx.Client) -> None:
    answer = web.get("/v1/nothing")
    assert answer.status_code == 404 and "no /v1/nothing" in answer.json()["error"]["message"]
    answer = web.post("/v1/images/edits", data={"prompt": "a", "image": "hello"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "image must be sent as a file")


@pytest.mark.parametrize("files, more, told", [
    ({}, {}, "send one image, not 0"), ({"image": b"no picture"}, {}, "not a picture"),
    ({"image": png()}, {"factor": "2"}, "upscale=true"), ({"image": png()}, {"control": "cany"}, "canny"),
    ({"image": png(), "mask": png(size=(8, 8))}, {}, "mask of the picture's size"),
    ({"image": png(), "mask": png()}, {"control": "canny"}, "a mask is for inpainting"),
    ({"image": png()}, {"control": "canny", "stepz": "5"}, "did you mean steps"),
    ({"image": png()}, {"control": "canny", "control_weight": "nan"}, "finite"),
    ({"image": png()}, {"control": "depth"}, "ControlNet 'depth' is not known here"),
    ({"image": png()}, {"upscale": "true", "control": "canny"}, "neither a mask nor a control"),
    ({"image": png()}, {"control": "canny", "strength": "0.5"}, "strength is for"),
    ({"image": png()}, {"strength": "2"}, "strength"),
    ({"image": png()}, {"from_picture": "x"}, "'from_picture' is not known here"),
    ({"image": png()}, {"region": "a"}, "region must be X,Y,WIDTH,HEIGHT"),
    ({"image": png()}, {"region": "1,1,64,64"}, "does not lie within"),
    ({"image": png(size=(64, 96))}, {"region": "1,1,9,9"}, "own size"),
    ({"image": png(), "mask": png()}, {"region": "1,1,9,9"}, "a region takes neither a mask nor a control"),
    ({"image": png(), "image_prompt": png()}, {"upscale": "true", "size": "auto"}, "takes neither a control"),
    ({"image": png()}, {"image_prompt_weight": "0.5"}, "send one"),
    ({"image_prompt": b"no picture"}, {}, "not a picture"),
    ({"image_prompt": png()}, {"strength": "0.5"}, "need an image"),
], ids=str)  # fmt: skip
def test_what_is_wrong_with_an_edit_is_told(
    web: httpx.Client, files: dict[str, bytes], more: dict[str, str], told: str
) -> None:
    named = {name: (f"{name}.png", content) for name, content in files.items()}
    data = {"prompt": PROMPT, "size": "64x64", "steps": "1", **more}
    answer = web.post("/v1/images/edits", data=data, files=named)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_a_job_tells_its_steps_and_a_preview(web: httpx.Client) -> None:
    body = {**QUICK, "prompt": PROMPT, "steps": 4, "loras": {"lora_random": 0.5}}
    job = web.post("/v1/jobs", json=body)
    assert job.status_code == 202
    with web.stream("GET", f"/v1/jobs/{job.json()['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names[-1] == "done" and {*names} == {"progress", "preview", "done"}
    shown = opened(base64.b64decode(data[names.index("preview")]["b64_png"]))
    assert shown.shape[2] == 3
    assert [stage["done"] for stage in data[-1]["stages"]] == [4, 4, 1, 1] and data[-1]["seed"] == 5
    assert web.get(data[-1]["pictures"][0]).headers["content-type"] == "image/png"
    assert web.get(data[-1]["pictures"][0] + "/small").headers["content-type"] == "image/jpeg"
    assert web.get(f"/v1/jobs/{job.json()['id']}").json()["state"] == "done"


def test_jobs_wait_their_turn_and_are_cancelled(web: httpx.Client) -> None:
    long = {"prompt": PROMPT, "size": "64x64", "steps": 50}
    first, second = (web.post("/v1/jobs", json=long).json() for _ in range(2))
    assert second["place"] == 1 and second["state"] == "waiting"
    third = web.post("/v1/jobs", json=long)
    assert third.status_code == 429 and "2 of your jobs" in third.json()["error"]["message"]
    for job in (second, first):
        assert web.delete(f"/v1/jobs/{job['id']}").status_code == 200
    assert "event: cancelled" in web.get(f"/v1/jobs/{first['id']}/events").text
    assert web.get(f"/v1/jobs/{second['id']}").json()["state"] == "cancelled"
    for way in (web.get, web.delete):
        assert way("/v1/jobs/unknown").status_code == 404


def test_a_job_takes_a_picture_as_base64_alone(web: httpx.Client) -> None:
    image = base64.b64encode(png()).decode()
    body = {**QUICK, "prompt": PROMPT, "control": "canny"}
    job = web.post("/v1/jobs", json={**body, "image": f"data:image/png;base64,{image}"}).json()
    assert "event: done" in web.get(f"/v1/jobs/{job['id']}/events").text
    for place in ("/etc/passwd", f"{web.base_url}/health", "file:///etc/passwd"):
        answer = web.post("/v1/jobs", json={**body, "image": place})
        assert answer.status_code == 400, place
    assert "need an image" in web.post("/v1/jobs", json=body).json()["error"]["message"]


def test_a_job_takes_several_controls_and_a_picture_beside_the_prompt(web: httpx.Client) -> None:
    image = base64.b64encode(png()).decode()
    canny = {"control": "canny", "image": image, "weight": 0.5}
    body = {**QUICK, "prompt": PROMPT, "image_prompt": image, "controls": [canny, {**canny, "weight": 0.2}]}
    job = web.post("/v1/jobs", json=body).json()
    assert "event: done" in web.get(f"/v1/jobs/{job['id']}/events").text
    made = web.get(web.get(f"/v1/jobs/{job['id']}").json()["pictures"][0]).content
    stored = read_image_metadata(io.BytesIO(made))
    assert [one["weight"] for one in stored["controls"]] == [0.5, 0.2] and len(stored["image_prompt"]) == 1
    for wrong, told in (
        ([{**canny, "image": "/etc/passwd"}], "no base64"),
        ([{**canny, "heft": 1}], "controls.0.heft"),
        ([{**canny, "control": "cany"}], "canny"),
        ([canny] * 9, "controls"),
    ):
        answer = web.post("/v1/jobs", json={**body, "controls": wrong})
        assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def test_gradios_client(server: str, web: httpx.Client) -> None:
    client = gradio_client.Client(server, verbose=False)
    told = client.predict(PROMPT, width=96, height=64, seed=5, steps=1, api_name="/generate")
    assert told["seed"] == 5
    assert opened(web.get(told["pictures"][0]).content).shape == (64, 96, 3)
    with pytest.raises(gradio_client.exceptions.AppError, match="at most 4096"):
        client.predict(PROMPT, width=9000, api_name="/generate")
    names = {*client.view_api(return_format="dict")["named_endpoints"]}
    client.close()
    assert names == {"/generate"}


@pytest.mark.parametrize("place", [
    "/etc/passwd", "README.md", "http://127.0.0.1:9/x.png", "file:///etc/passwd", ["/etc/passwd"],
    "a\0b", None,
])  # fmt: skip
@pytest.mark.parametrize("way", ["queue/join", "call/generate", "call/v2/generate"])
def test_gradio_opens_no_path_and_fetches_no_url(web: httpx.Client, way: str, place: object) -> None:
    file = {"path": place, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[{"deep": file}]], "fn_index": 0, "session_hash": "x", "prompt": file}
    answer = web.post(f"/gradio_api/{way}", json=body)
    assert answer.status_code == 400 and "must be uploaded" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method, path", [
    ("GET", "file=/etc/passwd"), ("GET", "file=README.md"), ("GET", "file=http://127.0.0.1:9/x"),
    ("GET", "proxy=http://127.0.0.1:9/x"), ("POST", "component_server"), ("POST", "run/generate"),
    ("POST", "api/generate"), ("POST", "vibe-edit/"), ("GET", "token"), ("GET", "file/etc/passwd"),
    ("GET", "../monitoring"), ("GET", "runs"), ("POST", "process_recording"), ("GET", "deep_link"),
])  # fmt: skip
def test_gradios_other_routes_are_closed(server: str, web: httpx.Client, method: str, path: str) -> None:
    answer = web.request(method, f"/gradio_api/{path}", json={} if method == "POST" else None)
    assert answer.status_code in (400, 403, 404) and b"root:" not in answer.content


def test_curl(server: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": PROMPT, **QUICK})
    made = curl(f"{server}/v1/images/generations", "-H", "Content-Type: application/json", "-d", body)
    assert curl(json.loads(made)["data"][0]["url"])[:4] == b"\x89PNG"
    for header in ("Host: evil.example", "Origin: http://evil.example", "Origin: null"):
        assert b"error" in curl(f"{server}/v1/models", "-H", header)
    for path in ("/pictures/../../../etc/passwd", "/pictures/..%2f..%2fetc%2fpasswd", "/v1/nothing"):
        assert b"root:" not in curl(f"{server}{path}", "--path-as-is")


def curl(*words: str) -> bytes:
    return subprocess.run(["curl", "-sS", *words], capture_output=True, check=True, timeout=60).stdout


def test_a_signal_to_end_tells_who_waits_and_leaves_no_uploads(tmp_path: Path) -> None:
    uploads, out = tmp_path / "tmp", tmp_path / "out"
    uploads.mkdir()
    flags = "--preset", "tiny", "--device", "cpu"
    with started(out, *flags, environment={"TMPDIR": str(uploads)}) as (process, address):
        body = {"prompt": PROMPT, "size": "512x512", "steps": 50}
        job = httpx.post(f"{address}/v1/jobs", json=body).json()["id"]
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(httpx.post, f"{address}/v1/images/generations", json=body, timeout=60)
            while httpx.get(f"{address}/v1/jobs/{job}").json()["state"] == "waiting":
                time.sleep(0.1)
            time.sleep(0.5)  # so that the other one waits too
            process.terminate()
            answer = waiting.result()
        process.wait(90)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the server is being stopped")
    assert not list(uploads.glob("ultrapixel-*")) and process.returncode == 128 + signal.SIGTERM
