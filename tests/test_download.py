"""models/download.py: its table against the documents and configurations, its checks, and real downloads."""

import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from core.config.control_types import CONTROL_TYPES

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "tests/reference/manifests"


def import_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download", ROOT / "models/download.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["download"] = module
    spec.loader.exec_module(module)
    return module


download = import_script()


# ------------------------------------------------------------------------------- the table and the documents


def test_published_types_have_their_files_in_the_list_of_downloads() -> None:
    listed = {f"models/{file.name}" for file in download.FILES if file.name.startswith("controlnet/")}
    assert listed == {kind.file for kind in CONTROL_TYPES.values() if kind.file}


@pytest.mark.parametrize("document", ["README.md", "models_checklist.txt"])
def test_documents_state_the_facts_of_the_table(document: str) -> None:
    lines = (ROOT / "models" / document).read_text("utf-8").splitlines()
    for file in download.FILES:
        row = next((line for line in lines if f"models/{file.name}" in line), None)
        assert row, f"{document} does not name models/{file.name}"
        facts = [file.repository, download.show_size(file.size), *file.sha256]
        assert all(fact in row for fact in facts), f"{document}, {file.name}: {row}"


def test_documents_name_no_other_file() -> None:
    listed = {f"models/{file.name}" for file in download.FILES}
    for line in (ROOT / "models/models_checklist.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            assert line.split()[0] in listed


@pytest.mark.parametrize("preset", download.PRESETS)
def test_readme_states_each_presets_total(preset: str) -> None:
    total = download.show_size(sum(file.size or 0 for file in download.select([], preset)))
    rows = (ROOT / "models/README.md").read_text("utf-8").splitlines()
    assert any(row.startswith(f"| `{preset}`") and f"| {total} |" in row for row in rows)


@pytest.mark.parametrize(
    ("preset", "configs"),
    [
        ("small-big", ["training/t2i", "inference/stage_c_3b", "inference/stage_b_1b"]),
        ("big-big", ["training/t2i", "inference/stage_c_3b", "inference/stage_b_3b"]),
        ("lite", ["inference/stage_c_1b", "inference/stage_b_1b"]),
    ],
)
def test_a_preset_fetches_what_its_configurations_name(preset: str, configs: list[str]) -> None:
    names = {f"models/{file.name}" for file in download.select([], preset)}
    for config in configs:
        values = yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text("utf-8"))
        weights = {value for key, value in values.items() if key.endswith("_checkpoint_path")}
        assert weights and weights <= names
    assert {"models/text_encoder/model.safetensors", "models/tokenizer/vocab.json"} <= names
    assert ("models/ultrapixel_t2i.safetensors" in names) == (preset != "lite")


@pytest.mark.parametrize(
    ("name", "manifest", "bytes_each"),
    [
        ("stage_c_bf16.safetensors", "stage_c_3.6b", 2),
        ("stage_c_lite_bf16.safetensors", "stage_c_1b", 2),
        ("stage_b_bf16.safetensors", "stage_b_3b", 2),
        ("stage_b_lite_bf16.safetensors", "stage_b_700m", 2),
        ("stage_a.safetensors", "stage_a", 4),
        ("effnet_encoder.safetensors", "effnet_encoder", 4),
        ("previewer.safetensors", "previewer", 4),
        ("ultrapixel_t2i.safetensors", "ultrapixel_t2i", 2),
        ("controlnet/canny.safetensors", "controlnet_canny", 4),
        ("controlnet/super_resolution.safetensors", "controlnet_super_resolution", 4),
    ],
)
def test_sizes_agree_with_the_manifests(name: str, manifest: str, bytes_each: int) -> None:
    parameters = json.loads((MANIFESTS / f"{manifest}.json").read_text())["parameters"]
    (file,) = download.select([name], "lite")
    assert file.size == pytest.approx(parameters * bytes_each, rel=download.SIZE_TOLERANCE)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'stage_d.safetensors' is not .* stage_a.safetensors"):
        download.select(["stage_d.safetensors"], "lite")


# ----------------------------------------------------------------------------------------- checks of one file


def make_weights(folder: Path) -> tuple[bytes, "download.ModelFile"]:
    save_file({"weight": np.arange(4000, dtype=np.float32)}, folder / "a.safetensors")
    content = (folder / "a.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return content, download.ModelFile("a.safetensors", "org/repo", len(content), ("lite",), (digest,))


def test_the_right_file_passes_with_and_without_a_known_hash(tmp_path: Path) -> None:
    _, file = make_weights(tmp_path)
    assert download.find_problem(file, tmp_path) is None
    assert download.find_problem(replace(file, sha256=()), tmp_path) is None
    assert download.find_problem(replace(file, sha256=("0" * 64, *file.sha256)), tmp_path) is None


def test_one_changed_byte_shows_in_the_hash(tmp_path: Path) -> None:
    content, file = make_weights(tmp_path)
    (tmp_path / file.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "has the sha256" in download.find_problem(file, tmp_path)


def test_a_file_cut_short_shows_without_a_known_hash(tmp_path: Path) -> None:
    content, file = make_weights(tmp_path)
    (tmp_path / file.name).write_bytes(content[:-4])
    assert "is not a whole safetensors file" in download.find_problem(replace(file, sha256=()), tmp_path)


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1"])
def test_pages_pointers_and_empty_files_are_named(tmp_path: Path, content: bytes) -> None:
    _, file = make_weights(tmp_path)
    for name, size, words in [
        (file.name, file.size, f"has {len(content)} bytes"),
        ("vocab.json", None, "is not a whole json file"),
        ("merges.txt", None, "is not a list of merges"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in download.find_problem(replace(file, name=name, size=size, sha256=()), tmp_path)


def test_a_file_of_other_contents_is_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, file = make_weights(tmp_path)
    (tmp_path / file.name).write_bytes(b"mine")
    (failure,) = download.download([file], tmp_path)
    assert failure.startswith("a.safetensors has 4 bytes") and "move it away" in failure
    assert (tmp_path / file.name).read_bytes() == b"mine"
    assert "0 of 1 files are to be fetched" in capsys.readouterr().out


def test_a_full_disk_is_seen_before_the_download(tmp_path: Path) -> None:
    file = download.ModelFile("a.safetensors", "org/repo", 10**18, ())
    assert "1e+09 GB are to be fetched" in download.download([file], tmp_path)[0]


# -------------------------------------------------------------------------- the script against a local hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and GET (with ranges) of /REPOSITORY/resolve/main/NAME, out of `server.files`."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.reply(send_body=False)

    def do_GET(self) -> None:  # noqa: N802
        self.reply(send_body=True)

    def reply(self, send_body: bool) -> None:
        repository, _, name = self.path[1:].partition("/resolve/main/")
        content = self.server.files.get((repository, name))
        self.server.requests.append((self.command, name, self.headers.get("Range")))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send_body:
            stop = len(content) // 2 if name in self.server.cut else len(content)
            self.server.cut.discard(name)
            self.wfile.write(content[start:stop])
            self.close_connection = stop < len(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(files: dict[tuple[str, str], bytes], cut: set[str]) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub; the connection breaks half way through the first GET of the names in `cut`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cut, server.requests = files, set(cut), []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_script(folder: Path, endpoint: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a copy of the script in `folder`, so that it fetches into that folder."""
    shutil.copy(ROOT / "models/download.py", folder)
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment = {**kept, "HF_HOME": str(folder / "home"), "HF_ENDPOINT": endpoint, **variables}
    command = [sys.executable, str(folder / "download.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


CASCADE = "stabilityai/stable-cascade"
# huggingface_hub resumes at multiples of 10 MiB, so the file is larger than that
VOCABULARY = json.dumps({"a</w>": "x" * 25_000_000}).encode()
MERGES = b"#version: 0.2\ni n\n"


def test_the_script_fetches_resumes_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    names = ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    files = {(CASCADE, names[0]): VOCABULARY, (CASCADE, names[1]): MERGES}
    with serve(files, cut={names[0]}) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = run_script(tmp_path, endpoint, *names)
        assert first.returncode == 0, first.stderr
        assert "2 of 2 files are to be fetched" in first.stdout
        assert (tmp_path / names[0]).read_bytes() == VOCABULARY
        assert (tmp_path / names[1]).read_bytes() == MERGES
        assert ("GET", names[0], f"bytes={10 * 2**20}-") in server.requests
        server.requests.clear()
        again = run_script(tmp_path, endpoint, *names)
        assert again.returncode == 0 and not server.requests
        assert "0 of 2 files are to be fetched" in again.stdout
    checked = run_script(tmp_path, "http://127.0.0.1:9", *names, "--check")
    assert checked.returncode == 0 and checked.stdout.count("ok ") == 2


def test_the_script_names_each_failure_and_fetches_the_rest(tmp_path: Path) -> None:
    names = ["previewer.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    files = {(CASCADE, names[0]): b"a page, not weights", (CASCADE, names[2]): MERGES}
    with serve(files, cut=set()) as server:
        result = run_script(tmp_path, f"http://127.0.0.1:{server.server_port}", *names)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "previewer.safetensors has 19 bytes, not about 16000000" in result.stderr
    assert f"tokenizer/vocab.json could not be fetched from {CASCADE}: 404" in result.stderr
    assert (tmp_path / names[2]).read_bytes() == MERGES


def test_offline_is_honoured(tmp_path: Path) -> None:
    with serve({}, cut=set()) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        result = run_script(tmp_path, endpoint, "--preset", "lite", HF_HUB_OFFLINE="1")
        assert not server.requests
    assert result.returncode == 2 and "HF_HUB_OFFLINE is set" in result.stderr
    assert "stage_c_lite_bf16.safetensors" in result.stderr
