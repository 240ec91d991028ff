"""Weight files: what is read, what is refused and how, what is written, and how much memory loading takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import core.weights.checkpoint
import core.weights.ring
from core.weights.checkpoint import (
    CheckpointError,
    check_file,
    config_metadata,
    load_module,
    open_tensors,
    read_config,
    read_metadata,
    read_tensors,
    save_archive,
    save_tensors,
)
from core.weights.layouts import guidance_names, to_published_guidance
from core.weights.mapped import DTYPES
from core.weights.ring import Ring
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

E8M0 = torch.float8_e8m0fnu  # which safetensors does not write
LEGACY = {"_use_new_zipfile_serialization": False}
BLOCKS = ((1, 1), (1, 1))


def small_guidance() -> Guidance:
    return Guidance(ind=8, ch=8, n_head=2, head_dim=4, n_groups=2, f_dim=8)


def stage_c(width: int = 16) -> StageC:
    return StageC(c_cond=width, c_hidden=(width, width), nhead=(2, 2), blocks=BLOCKS, c_clip_text=8)


def stage_b() -> StageB:
    return StageB(
        c_hidden=(8, 8, 8, 8), nhead=(-1, -1, 2, 2), blocks=((1, 1, 1, 1), (1, 1, 1, 1)), c_cond=8, c_clip=8
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Stage A": partial(StageA, c_hidden=8, bottleneck_blocks=1, codebook_size=8),
    "Stage B": stage_b,
    "Stage C": stage_c,
    "the previewer": partial(Previewer, c_hidden=8),
    "the EfficientNet encoder": EfficientNetEncoder,
    "a ControlNet": partial(ControlNet, c_in=3, c_proj=8, proj_blocks=(0, 1), bottleneck_mode="simple"),
    "guidance": small_guidance,
}


class Small(nn.Module):
    """All that a module can keep in its state: parameters, floating-point and integer buffers."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 2)
        self.register_buffer("table", torch.zeros(3, dtype=torch.int64))


def random_state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = build().state_dict()
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else torch.randint(9, t.shape)
        for name, t in state.items()
    }


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def load_small(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_module(Small, path, dtype=dtype, what="the small one")


def refusal(action: Callable[[], object]) -> str:
    """The message of the error that the action raises: one line that names a file and says what to do."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state(Small)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), path)


def write_archive(path: Path, tensors: Mapping[str, Tensor]) -> None:
    torch.save(dict(tensors), path)


def write_legacy(path: Path, tensors: Mapping[str, Tensor]) -> None:
    torch.save(dict(tensors), path, **LEGACY)


WRITERS = [write_safetensors, write_archive, write_legacy]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_files_are_read_by_content_not_by_suffix(
    tmp_path: Path, state: dict[str, Tensor], write: Callable, name: str
) -> None:
    write(tmp_path / name, state)
    check_file(tmp_path / name)
    assert_same(read_tensors(tmp_path / name), state)
    assert_same(read_tensors(str(tmp_path / name)), state)
    assert_same(load_small(tmp_path / name).state_dict(), state)


@pytest.mark.parametrize("write", WRITERS)
def test_mapping_a_file_anew_loses_nothing(
    tmp_path: Path, state: dict[str, Tensor], write: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.weights.checkpoint, "MAPPED_BYTES", 1)
    monkeypatch.setattr(core.weights.checkpoint, "MAPPED_SHARE", 0)
    write(tmp_path / "w", {f"module.{name}": tensor for name, tensor in state.items()})
    assert_same(read_tensors(tmp_path / "w"), state)


def test_read_tensors_casts_floating_point_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    write_safetensors(tmp_path / "w", state)
    read = read_tensors(tmp_path / "w", dtype=torch.bfloat16)
    assert_same(read, {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()})


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for write in WRITERS:
        write(tmp_path / "w", state)
        read = read_tensors(tmp_path / "w")
        (tmp_path / "w").write_bytes(b"\0" * (tmp_path / "w").stat().st_size)
        assert_same(read, state)


@pytest.mark.parametrize("write", WRITERS)
def test_module_prefix_goes_only_where_all_have_it(
    tmp_path: Path, state: dict[str, Tensor], write: Callable
) -> None:
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    write(tmp_path / "all", prefixed)
    assert_same(read_tensors(tmp_path / "all"), state)
    write(tmp_path / "some", {**prefixed, "other": torch.ones(1)})
    assert read_tensors(tmp_path / "some").keys() == {*prefixed, "other"}


def test_state_dict_wrap_is_undone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "step": 3}
    torch.save(wrapped, tmp_path / "w")
    assert_same(load_small(tmp_path / "w").state_dict(), state)


def test_metadata_and_config(tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = {"c_hidden": (8, 8), "level_config": ["CTA"], "dropout": 0.1}
    save_tensors(tmp_path / "w", state, {**config_metadata(config), "step": "7"})
    assert read_metadata(tmp_path / "w") == {"config": json.dumps(config), "step": "7"}
    assert read_config(tmp_path / "w") == {**config, "c_hidden": [8, 8]}
    assert read_config(tmp_path / "w", "guidance") is None
    write_archive(tmp_path / "archive", state)
    assert read_metadata(tmp_path / "archive") == {} and read_config(tmp_path / "archive") is None
    write_safetensors(tmp_path / "bare", state)
    assert read_metadata(tmp_path / "bare") == {}


def test_a_damaged_config_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_tensors(tmp_path / "w", state, {"config": "{c_hidden"})
    assert "w: its metadata entry 'config' is not JSON" in refusal(lambda: read_config(tmp_path / "w"))


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_loads_from_its_file(tmp_path: Path, name: str) -> None:
    state = random_state(NETWORKS[name])
    save_tensors(tmp_path / "w", state, {})
    module = load_module(NETWORKS[name], tmp_path / "w", dtype=torch.float32, what=name)
    assert_same(module.state_dict(), state)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("write", WRITERS)
def test_float32_file_into_bfloat16_model_equals_the_direct_cast(
    tmp_path: Path, state: dict[str, Tensor], write: Callable
) -> None:
    write(tmp_path / "w", state)
    direct = Small()
    direct.load_state_dict(state)
    assert_same(load_small(tmp_path / "w", torch.bfloat16).state_dict(), direct.bfloat16().state_dict())


def test_bfloat16_file_into_float32_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    write_safetensors(tmp_path / "w", half)
    module = load_small(tmp_path / "w")
    assert module.first.weight.dtype == torch.float32 and module.table.dtype == torch.int64
    assert torch.equal(module.first.weight, half["first.weight"].float())


def test_a_loaded_module_is_for_inference(tmp_path: Path, state: dict[str, Tensor]) -> None:
    write_safetensors(tmp_path / "w", state)
    module = load_small(tmp_path / "w")
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())


def test_absent_batch_norm_counters_become_zero(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["norm.num_batches_tracked"]
    write_safetensors(tmp_path / "w", state)
    module = load_small(tmp_path / "w", torch.bfloat16)
    counter = module.norm.num_batches_tracked
    assert counter.dtype == torch.int64 and counter.item() == 0 and not counter.is_meta
    del state["norm.running_mean"]
    write_safetensors(tmp_path / "w", state)
    assert "1 tensor is missing (norm.running_mean)" in refusal(lambda: load_small(tmp_path / "w"))


def test_transposed_shared_and_trained_tensors_become_plain_ones(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    state["last.weight"] = torch.randn(5, 2).t()
    state["norm.bias"] = state["norm.weight"]
    state["last.bias"] = nn.Parameter(state["last.bias"])
    write_archive(tmp_path / "w", state)
    assert not any(tensor.requires_grad for tensor in read_tensors(tmp_path / "w").values())
    module = load_small(tmp_path / "w")
    assert module.last.bias.is_leaf and not module.last.bias.requires_grad
    assert module.last.weight.is_contiguous() and torch.equal(module.last.weight, state["last.weight"])
    assert module.norm.weight.data_ptr() != module.norm.bias.data_ptr()


def test_a_buffer_that_no_file_holds_is_not_left_empty(tmp_path: Path) -> None:
    class Hidden(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.arange(3), persistent=False)

    save_tensors(tmp_path / "w", random_state(Hidden), {})
    with pytest.raises(AssertionError, match="hidden: grid is in no file"):
        load_module(Hidden, tmp_path / "w", dtype=torch.float32, what="hidden")


@pytest.mark.parametrize("save", [save_archive, write_safetensors])
def test_published_guidance_file_loads(tmp_path: Path, save: Callable) -> None:
    state = random_state(small_guidance)
    save(tmp_path / "w", to_published_guidance(state, 64))
    module = load_module(
        small_guidance, tmp_path / "w", dtype=torch.float32, what="guidance", translate=guidance_names
    )
    assert_same(module.state_dict(), state)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
def test_nothing_is_allocated_twice(tmp_path: Path) -> None:
    """A 200 MB float32 file into a 100 MB model: what is above the model is the mapped share of the file."""
    weights = {f"{i}.weight": torch.ones(1024, 1024) for i in range(50)}
    save_tensors(tmp_path / "safetensors", weights, {})
    save_archive(tmp_path / "archive", weights)
    scales = {f"{i}.scale_weight": torch.ones(()) for i in range(50)}
    float8 = {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}
    save_tensors(tmp_path / "float8", float8 | scales, {})
    script = """
import sys, torch
from torch import nn
from core.weights.checkpoint import load_module
def resident(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) / 1024
def build():
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(50)))
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak from now on
    before = resident("VmRSS")
    module = load_module(build, path, dtype=torch.bfloat16, what="linears")
    print(resident("VmHWM") - before)
    del module
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *(tmp_path / name for name in ("safetensors", "archive", "float8"))],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    growths = [float(line) for line in done.stdout.split()]
    assert len(growths) == 3 and max(growths) < 100 + 32 + 40


# --- files that are refused -----------------------------------------------------------------------


def whole_file(tmp_path: Path, write: Callable, size: int = 5000) -> bytes:
    write(tmp_path / "whole", {"a": torch.ones(size), "b": torch.ones(3)})
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("action", [check_file, read_metadata, read_tensors, load_small])
@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["is empty", "delete it and get it again"]),
        (b"<!DOCTYPE html><html>", ["a web page was saved instead", "/resolve/", "get it again"]),
        (b"\xef\xbb\xbf\n\n <HTML lang=en>", ["a web page was saved instead of the weights"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", ["Git LFS pointer", "git lfs pull"]),
        (b"weights, honestly", ["neither a safetensors file nor a torch archive", "get it again"]),
    ],
)  # fmt: skip
def test_files_that_are_no_weights(
    tmp_path: Path, action: Callable, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(lambda: action(path))
    assert message.startswith(str(path))
    for part in parts:
        assert part in message
    assert "download.py" not in message  # which does not fetch it


def test_missing_files_and_folders(tmp_path: Path) -> None:
    message = refusal(lambda: load_small(tmp_path / "absent.safetensors"))
    assert message.endswith("absent.safetensors does not exist: correct the path")
    assert f"{tmp_path} is a folder, not a weight file" in refusal(lambda: load_small(tmp_path))


@pytest.mark.parametrize("cut", [30, 100, 5000, -1])
def test_truncated_safetensors(tmp_path: Path, cut: int) -> None:
    whole = whole_file(tmp_path, write_safetensors)
    part = whole[:cut]
    (tmp_path / "w").write_bytes(part)
    message = refusal(lambda: read_tensors(tmp_path / "w"))
    found = re.search(r"w is cut short, (\d+) bytes of the (\d+) that its header announces", message)
    assert found and int(found[1]) == len(part) < int(found[2]) <= len(whole)
    if cut in (5000, -1):  # the header is whole
        assert int(found[2]) == len(whole)


@pytest.mark.parametrize("change", [lambda data: data + b"more", lambda data: data[:8] + b"{!" + data[10:]])
def test_damaged_safetensors(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / "w").write_bytes(change(whole_file(tmp_path, write_safetensors)))
    assert "w is damaged" in refusal(lambda: check_file(tmp_path / "w"))


def with_header(whole: bytes, change: Callable[[dict], object]) -> bytes:
    """A safetensors file with its header changed, and as long as that then is."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    text = json.dumps(header if (changed := change(header)) is None else changed).encode()
    return len(text).to_bytes(8, "little") + text + whole[end:]


@pytest.mark.parametrize(
    "metadata",
    [{"step": 3, "nested": {"r": [1]}, "none": None, "text": "x"}, None, [1], 7, "text", {"a": True}],
)
def test_metadata_that_are_no_texts_are_no_damage(tmp_path: Path, metadata: object) -> None:
    whole = whole_file(tmp_path, write_safetensors)
    (tmp_path / "w").write_bytes(with_header(whole, lambda header: {**header, "__metadata__": metadata}))
    assert_same(read_tensors(tmp_path / "w"), read_tensors(tmp_path / "whole"))
    found = read_metadata(tmp_path / "w")
    texts = metadata if isinstance(metadata, dict) else {}
    assert {key: text if key == "text" else json.loads(text) for key, text in found.items()} == texts


def test_a_config_that_is_no_text_is_read(tmp_path: Path) -> None:
    whole = whole_file(tmp_path, write_safetensors)
    (tmp_path / "w").write_bytes(
        with_header(whole, lambda header: {**header, "__metadata__": {"config": {"c_hidden": 3}}})
    )
    assert read_config(tmp_path / "w") == {"c_hidden": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda header: header["a"].pop("shape"), "is damaged"),
        (lambda header: header["a"].update(shape=[-1, 3]), "is damaged"),
        (lambda header: header["a"].update(shape=[4999]), "is damaged"),
        (lambda header: header["a"].update(shape="many"), "is damaged"),
        (lambda header: header["a"].update(dtype="F4"), "number format F4, which is not read"),
        (lambda header: header["a"].update(dtype=["F32"]), "number format ['F32'], which is not read"),
        (lambda header: header["b"].update(data_offsets=[0, 12]), "is damaged"),
        (lambda header: header["b"].update(data_offsets=[0]), "is damaged"),
        (lambda header: header["b"].update(data_offsets=[20012, 20000]), "is damaged"),
        (lambda header: header.update(c=3), "is damaged"),
        (lambda header: header.pop("b"), "is damaged"),
        (lambda header: {**header, "b": [1]}, "is damaged"),
    ],
)
def test_headers_that_do_not_describe_the_file(tmp_path: Path, change: Callable, message: str) -> None:
    whole = whole_file(tmp_path, write_safetensors)

    def changed(header: dict) -> dict:
        result = change(header)
        return result if isinstance(result, dict) and "a" in result else header

    (tmp_path / "w").write_bytes(with_header(whole, changed))
    assert message in refusal(lambda: check_file(tmp_path / "w"))


def test_every_number_format_is_mapped(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.tensor([[1, 0], [1, 1]]).to(dtype) for dtype in DTYPES.values() if dtype != E8M0
    }
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.ones(0, 3),
        "odd": torch.ones(3, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "w")
    found = open_tensors(tmp_path / "w")
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].to(torch.complex64), tensor.to(torch.complex64))


@pytest.mark.parametrize("cut", [40, 1000, -1])
def test_truncated_archives(tmp_path: Path, cut: int) -> None:
    (tmp_path / "w").write_bytes(whole_file(tmp_path, write_archive)[:cut])
    assert "w is cut short, a torch archive without its end" in refusal(lambda: check_file(tmp_path / "w"))


def test_truncated_legacy_archives_at_any_byte(tmp_path: Path) -> None:
    whole = whole_file(tmp_path, write_legacy, size=9)
    for cut in range(1, len(whole)):
        (tmp_path / "w").write_bytes(whole[:cut])
        message = refusal(lambda: check_file(tmp_path / "w"))
        assert "cut short" in message or "is not opened" in message


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "no torch archive" in refusal(lambda: check_file(tmp_path / "w"))


class Malicious:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, options: dict) -> None:
    mark = tmp_path / "was-run"
    torch.save({"first.weight": torch.ones(1), "b": Malicious(mark)}, tmp_path / "w.safetensors", **options)
    message = refusal(lambda: load_small(tmp_path / "w.safetensors"))
    assert (
        "mkdir" in message and "could run code and is not opened" in message and "safetensors file" in message
    )
    assert not mark.exists()
    with (tmp_path / "w.safetensors").open("rb") as stream:
        torch.load(stream, weights_only=False)
    assert mark.exists()  # the trap is a real one


@pytest.mark.parametrize(
    "content, part",
    [([torch.ones(1)], "holds a list, not named tensors"), ({"step": 3}, "holds a int as 'step'")],
)
def test_archives_of_something_else(tmp_path: Path, content: object, part: str) -> None:
    torch.save(content, tmp_path / "w")
    assert part in refusal(lambda: read_tensors(tmp_path / "w"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_named(
    tmp_path: Path, state: dict[str, Tensor], value: float, dtype: torch.dtype
) -> None:
    state["last.weight"] = state["last.weight"].to(dtype)
    state["last.weight"][1, 2] = value
    write_safetensors(tmp_path / "w", state)
    assert "w: last.weight holds NaN or infinity" in refusal(lambda: load_small(tmp_path / "w"))
    assert "w: last.weight holds NaN or infinity" in refusal(lambda: read_tensors(tmp_path / "w"))


def test_large_finite_values_pass(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["last.weight"] = torch.full((2, 5), 3e38)
    write_safetensors(tmp_path / "w", state)
    assert_same(load_small(tmp_path / "w").state_dict(), state)


# --- files that do not fit ------------------------------------------------------------------------


def test_missing_and_unknown_tensors_are_named_and_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    kept = {name: tensor for name, tensor in state.items() if name.startswith("norm")}
    write_safetensors(tmp_path / "w", {**kept, "stray": torch.ones(1)})
    message = refusal(lambda: load_small(tmp_path / "w"))
    assert "w does not fit the small one" in message
    assert "5 tensors are missing (table, first.weight, first.bias and 2 more)" in message
    assert "1 tensor is unknown (stray)" in message


def test_wrong_shapes_are_named_and_counted(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w", random_state(partial(Small, 7)), {})
    message = refusal(lambda: load_small(tmp_path / "w"))
    assert "7 tensors are of another shape (first.weight is (7, 3, 1, 1), not (5, 3, 1, 1))" in message


def test_nothing_is_read_of_a_file_that_does_not_fit(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "w", {**state, "stray": torch.ones(1)})
    monkeypatch.setattr(core.weights.checkpoint, "_copied", lambda *_: pytest.fail("a tensor was read"))
    refusal(lambda: load_small(tmp_path / "w"))


def manifest_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    tensors = json.loads((folder / "manifests" / f"{name}.json").read_text())["tensors"]
    return {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}


@pytest.mark.parametrize(
    "given, build, sentence",
    [
        (
            "stage_c_1b", StageC,
            "is Stage C 1B, but the 3.6B model was asked for: set model_version: 1B or give the 3.6B file",
        ),
        (
            "stage_b_3b", StageB,
            "is Stage B 3B, but the 700M model was asked for: set model_version: 3B or give the 700M file",
        ),
        ("stage_b_700m", StageC, "is Stage B 700M, but Stage C 3.6B was asked for"),
        ("ultrapixel_t2i", StageC, "is guidance for Stage C 3.6B, but Stage C 3.6B was asked for"),
        ("lora_personalized", Guidance, "is a LoRA, but guidance for Stage C 3.6B was asked for"),
        ("previewer", StageA, "is the previewer, but Stage A was asked for"),
        ("stage_a", Previewer, "is Stage A, but the previewer was asked for"),
        ("effnet_encoder", StageA, "is the EfficientNet encoder, but Stage A was asked for"),
        ("controlnet_canny", EfficientNetEncoder, "is the canny ControlNet, but the EfficientNet enc"),
        ("controlnet_inpainting", partial(ControlNet, c_in=1), "is the inpainting ControlNet, but the canny"),
        ("stage_a", Small, "is Stage A, but the wanted one was asked for"),
    ],
)  # fmt: skip
def test_another_networks_file_is_called_by_its_name(
    reference_folder: Path, monkeypatch: pytest.MonkeyPatch, given: str, build: Callable, sentence: str
) -> None:
    monkeypatch.setattr(
        core.weights.checkpoint, "open_tensors", lambda _: manifest_tensors(reference_folder, given)
    )
    message = refusal(lambda: load_module(build, "some/w", dtype=torch.float32, what="the wanted one"))
    assert message.startswith(f"some{os.sep}w {sentence}")


# --- writing --------------------------------------------------------------------------------------


def test_saved_tensors_come_back(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {"a": shared, "b": shared, "c": shared.t(), "d": shared[1:3], "e": nn.Parameter(torch.ones(2))}
    save_tensors(tmp_path / "new" / "w.safetensors", tensors, {})
    with safe_open(tmp_path / "new" / "w.safetensors", framework="pt") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys()}, {  # noqa: SIM118
            name: tensor.detach().contiguous() for name, tensor in tensors.items()
        })  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_saved_archives_come_back(tmp_path: Path) -> None:
    save_archive(tmp_path / "w", {"step": 3, "weights": {"a": torch.ones(2)}})
    loaded = torch.load(tmp_path / "w", weights_only=True)
    assert loaded["step"] == 3 and torch.equal(loaded["weights"]["a"], torch.ones(2))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_written_files_have_the_permissions_of_other_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "w", state, {})
    save_archive(tmp_path / "a", state)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def fail(*_: object, **__: object) -> None:
    raise OSError("no space left on device")


def save_without_metadata(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(path, tensors, {})


@pytest.mark.parametrize(
    "save, target",
    [
        (save_archive, "torch.save"),
        (save_archive, "os.fsync"),
        (save_archive, "os.replace"),
        (save_without_metadata, "core.weights.checkpoint.save_file"),
        (save_without_metadata, "os.fsync"),
        (save_without_metadata, "os.replace"),
    ],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, save: Callable, target: str
) -> None:
    path = tmp_path / "w"
    save(path, state)
    before = path.read_bytes()
    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="no space left"):
        save(path, {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of a process")
@pytest.mark.parametrize("write", ["save_archive(path, tensors)", "save_tensors(path, tensors, {})"])
def test_a_file_that_cannot_grow_is_told_with_its_path(tmp_path: Path, write: str) -> None:
    code = (
        "import resource, torch; from core.weights.checkpoint import save_archive, save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"path, tensors = {str(tmp_path / 'w')!r}, {{'a': torch.ones(100_000)}}\n"
        f"try: {write}\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path / 'w'}'\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    save_archive(path, state)
    before = path.read_bytes()

    def write_half(_: object, stream: BinaryIO) -> None:
        stream.write(before[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", write_half)
    with pytest.raises(KeyboardInterrupt):
        save_archive(path, state)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_disk_has_the_data_before_the_name(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save_tensors(tmp_path / "w", state, {})
    assert calls == ["fsync", "replace"] + ["fsync"] * (os.name == "posix")


# --- to a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64, 1 << 12])
def test_what_goes_through_the_ring_is_what_was_sent(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, size: int
) -> None:
    monkeypatch.setattr(core.weights.ring, "LEAST_SHARE", 16)
    torch.manual_seed(0)
    sources = [torch.randn(shape).to(stored) for shape in ((3, 50), (7,), (1, 2, 3, 4), (0, 3), ())]
    sources.append(torch.randn(6, 9).to(stored).T)
    ring = Ring(torch.device("cpu"), size=size)
    for dtype in (torch.float32, torch.bfloat16):
        with ring.in_use():
            copies = [ring.copy(source, dtype) for source in sources]
        for copy, source in zip(copies, sources, strict=True):
            assert copy.dtype == dtype and copy.is_contiguous() and torch.equal(copy, source.to(dtype))
