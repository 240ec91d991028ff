"""Weight files: read by content, loaded strictly and without a second copy in memory, written atomically."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.weights.combined import is_combined
from core.weights.layouts import UNKNOWN, describe_mismatch, identify
from core.weights.mapped import map_safetensors
from core.weights.published import describe_absent, fetching, published_at
from core.weights.quantised import dequantise, is_quantised, split_scales
from core.weights.ring import Ring

PathLike = str | os.PathLike[str]
Content = Literal["safetensors", "zip", "pickle"]
Built = TypeVar("Built", bound=nn.Module)
Translate = Callable[[Iterable[str]], Mapping[str, str]]  # a file's names -> own names of those to keep
Shapes = Mapping[str, tuple[int, ...]]

SNIFFED_BYTES = 512
MAPPED_BYTES = 1 << 25  # of a file that are read before its pages are let go,
MAPPED_SHARE = 1 / 64  # or this share of a large file
NAMED = 3  # tensors that an error names before it counts the rest
COUNTER = "num_batches_tracked"
UNREADABLE = (  # what zipfile and torch raise for files that are not whole
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, zlib.error, AttributeError, EOFError,
    LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A weight file cannot be used; the message names the file, the cause and the way out."""


# --- what a file is -------------------------------------------------------------------------------


def _content(path: Path) -> Content:
    """How the file is written, by its first bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a weight file: name the file in it")
    if not path.exists():
        raise CheckpointError(describe_absent({path: "weights"}))
    with path.open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(f"{path} {_explain_content(head)}{_fetch_again(path)}")


def _explain_content(head: bytes) -> str:
    """What a file is that holds no weights, as the beginning of what helps."""
    if not head:
        return "is empty: "
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype", b"<html")):
        return (
            "is an HTML page, a web page was saved instead of the weights, whose link has /resolve/ in it: "
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: run `git lfs pull` there, or "
    return "is neither a safetensors file nor a torch archive: "


def _fetch_again(path: Path) -> str:
    """What helps where a file is not whole."""
    file = published_at(path)
    return f"delete it and {'get it again' if file is None else f'run {fetching([file])}'}"


def _map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return map_safetensors(path)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}: {_fetch_again(path)}") from None


def _is_mapped(path: Path, content: Content) -> bool:
    """Whether tensors are read from the file at their use; torch.load maps no archive named .safetensors."""
    return content == "safetensors" or (content == "zip" and path.suffix != ".safetensors")


def _load_archive(path: Path, content: Content) -> object:
    """What torch.save wrote, tensors mapped where the format allows it; nothing in the file is executed."""
    if content == "zip" and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short, a torch archive without its end: {_fetch_again(path)}")
    try:
        if _is_mapped(path, content):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} is a pickle with more than tensors in it ({found[1] if found else 'or damaged'}), which "
            "could run code and is not opened: use a safetensors file, or save its tensors alone"
        ) from None
    except (EOFError, LookupError, RuntimeError, ValueError, struct.error) as error:
        cause = str(error).partition("\n")[0] or "it ends too early"
        raise CheckpointError(
            f"{path} is cut short or no torch archive ({cause}): {_fetch_again(path)}"
        ) from None


# --- reading --------------------------------------------------------------------------------------


def check_file(path: PathLike) -> None:
    """Raise CheckpointError unless this is a complete weight file of whatever network; reads little of it."""
    _open_weights(Path(path))


def check_files(files: Mapping[PathLike, str]) -> None:
    """Raise CheckpointError for what is wrong with one of several files; given is what each holds, by path.

    All that do not exist are named at once.
    """
    absent = {path: what for path, what in files.items() if not Path(path).exists()}
    if absent:
        raise CheckpointError(describe_absent(absent))
    for path in files:
        check_file(path)


def read_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, {} for a torch archive; CheckpointError if it is neither.

    What is not a text in the file is JSON.
    """
    path = Path(path)
    return _map_safetensors(path)[1] if _content(path) == "safetensors" else {}


def read_config(path: PathLike, key: str = "config") -> dict | None:
    """The network's sizes as `config_metadata` stored them in the file, None if there are none."""
    text = read_metadata(path).get(key)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata entry {key!r} is not JSON ({error})") from None


def read_shapes(path: PathLike) -> Shapes:
    """Shapes of a file's tensors, none of which is read. Errors as `open_tensors`."""
    return _shapes(_open_weights(Path(path))[0])


def read_tensors(
    path: PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of a file, floating-point ones in `dtype`, if given; quantised ones as they are meant.

    Those whose names begin as in `without` are left out. Errors as `open_tensors`.
    """
    path = Path(path)
    tensors, scales = _open_weights(path)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(without)}
    own = {n: torch.float32 if is_quantised(t, scales.get(n)) else t.dtype for n, t in tensors.items()}
    wanted = {n: dtype if dtype and given.is_floating_point else given for n, given in own.items()}
    copies = _filled(path, tensors, scales, wanted, torch.device(device))
    check_finite(path, copies)
    return copies


def open_tensors(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a file as they stand in it, mapped and not yet read where the format allows it.

    Copy what is kept. Names come without `module.` where all have it.
    Raises CheckpointError for anything that is no complete weight file.
    """
    path = Path(path)
    content = _content(path)
    if content == "safetensors":
        tensors = _map_safetensors(path)[0]
    else:
        tensors = _unwrap(path, _load_archive(path, content))
    prefixed = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if prefixed else name: t.detach() for name, t in tensors.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _open_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of one network's file, and the scales of those that are quantised, in memory."""
    tensors = open_tensors(path)
    if is_combined(tensors):
        raise CheckpointError(
            f"{path} is a combined file of ComfyUI, with several networks in it: take it apart with python "
            f"models/convert.py {shlex.quote(str(path))} --split FOLDER, and use the files in that folder"
        )
    weights, scales = split_scales(tensors)
    return weights, {name: scale.clone() for name, scale in scales.items()}


def _unwrap(path: Path, archive: object) -> Mapping[str, Tensor]:
    """The tensors of a torch archive, which may lie in its entry `state_dict`."""
    if isinstance(archive, Mapping) and isinstance(archive.get("state_dict"), Mapping):
        archive = archive["state_dict"]
    if not isinstance(archive, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(archive).__name__}, not named tensors: give a weight file"
        )
    for name, value in archive.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} as {name!r}, not tensors alone: give a weight file"
            )
    return archive


def _drain(
    path: Path, tensors: dict[str, Tensor], scales: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The tensors of `_open_weights` with their scales, each forgotten after its turn.

    Pages of a mapped file stay in memory until the mapping goes, so the file is mapped anew now and then.
    """
    mapped = _is_mapped(path, _content(path))
    budget = max(MAPPED_BYTES, int(path.stat().st_size * MAPPED_SHARE))
    read = 0
    for name in list(tensors):
        if mapped and read >= budget:
            tensors.clear()
            tensors.update(open_tensors(path))
            read = 0
        tensor = tensors.pop(name)
        read += tensor.nbytes
        yield name, tensor, scales.get(name)


def _copied(
    path: Path,
    name: str,
    tensor: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """A contiguous copy, of what a quantised tensor means."""
    copy = torch.empty(tensor.shape, dtype=dtype, device=device)
    if not is_quantised(tensor, scale):
        return copy.copy_(tensor)
    try:
        dequantise(tensor, scale, copy)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
    return copy


def check_finite(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError, which names a tensor of the file, where one of these holds NaN or infinity."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return
    # Sums are several times cheaper than `isfinite`, and all of them are waited for once, but finite values
    # can overflow them.
    sums = torch.stack([tensor.sum().float() for tensor in floats.values()]).cpu()
    for name, total in zip(floats, sums, strict=True):
        if not total.isfinite() and not floats[name].isfinite().all():
            way_out = f"{_fetch_again(Path(path))}, or use an earlier checkpoint"
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: {way_out}")


# --- loading --------------------------------------------------------------------------------------


class _NoValues(TorchFunctionMode):
    """Leaves initial values out: without memory there are none, and torch would import its compiler."""

    def __torch_function__(
        self, func: Callable, _types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def build_empty(build: Callable[[], Built]) -> Built:
    """The module that `build` constructs, without memory (on the meta device)."""
    with torch.device("meta"), _NoValues():
        return build()


def load_module(
    build: Callable[[], nn.Module],
    path: PathLike,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    translate: Translate | None = None,
    what: str,
    checked: bool = True,
) -> nn.Module:
    """The module that `build` constructs with a file's weights, for inference (eval, no gradients).

    Built without memory, then filled one by one in `dtype` on `device`; integer buffers keep their type.
    `translate` gives the own names of the file's tensors (`core.weights.layouts.guidance_names`); `what`
    names the module in errors. Buffers that are not in the module's state_dict cannot be filled: modules
    have none. Raises CheckpointError if the file is not one, or not exactly this module's. Where it is not
    `checked`, NaN is not looked for: `check_finite` does it later, where the weights compute.
    """
    path = Path(path)
    module = build_empty(build)
    wanted = module.state_dict()
    tensors, scales = _open_weights(path)
    shapes = _shapes(tensors)
    names = translate(shapes) if translate else {name: name for name in shapes}
    _check_fit(path, what, shapes, names, _shapes(wanted))
    wanted_dtypes = {
        n: dtype if (g := wanted[own]).is_floating_point() else g.dtype for n, own in names.items()
    }
    filled = _filled(path, tensors, scales, wanted_dtypes, torch.device(device))
    if checked:
        check_finite(path, filled)
    state = {own: filled[name] for name, own in names.items()}
    for counter in wanted.keys() - state.keys():
        state[counter] = torch.zeros_like(wanted[counter], device=device)
    module.load_state_dict(state, assign=True)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        assert not tensor.is_meta, f"{what}: {name} is in no file: compute it where it is used"
    return module.eval().requires_grad_(False)


def _filled(
    path: Path,
    tensors: dict[str, Tensor],
    scales: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[str, Tensor]:
    """Copies of those tensors of a file that have a number format in `dtypes`, on a device."""
    given = ((n, t, s) for n, t, s in _drain(path, tensors, scales) if n in dtypes)
    if device.type != "cuda":
        return {name: _copied(path, name, t, scale, dtypes[name], device) for name, t, scale in given}
    ring, copies = Ring(device), {}
    with ring.in_use():
        for name, tensor, scale in given:
            if is_quantised(tensor, scale):
                tensor = _copied(path, name, tensor, scale, dtypes[name], "cpu")
            copies[name] = ring.copy(tensor, dtypes[name])
    return copies


def _check_fit(path: Path, what: str, shapes: Shapes, names: Mapping[str, str], wanted: Shapes) -> None:
    """Hold a file's shapes, under own names, against the wanted ones; BatchNorm counters may be absent."""
    given = {own: shapes[name] for name, own in names.items()}
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTER)]
    extra = [name for name, own in names.items() if own not in wanted]
    other = [name for name in wanted if given.get(name, wanted[name]) != wanted[name]]
    if not (missing or extra or other):
        return
    network, asked = identify(shapes), identify(wanted)
    if network not in (UNKNOWN, asked):
        asked = what if asked == UNKNOWN else asked
        raise CheckpointError(f"{path} {describe_mismatch(network, asked)}")
    problems = []
    if missing:
        problems.append(f"{count_tensors(missing)} missing ({name_some(missing)})")
    if extra:
        problems.append(f"{count_tensors(extra)} unknown ({name_some(extra)})")
    if other:
        first = other[0]
        problems.append(
            f"{count_tensors(other)} of another shape ({first} is {given[first]}, not {wanted[first]})"
        )
    raise CheckpointError(
        f"{path} does not fit {what}: {', '.join(problems)}; use the file that the configured sizes belong to"
    )


def count_tensors(names: Collection[str]) -> str:
    """How many there are, as the beginning of a sentence."""
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def name_some(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


# --- writing --------------------------------------------------------------------------------------


def config_metadata(config: Mapping[str, object], key: str = "config") -> dict[str, str]:
    """A network's sizes as an entry for the metadata of `save_tensors`."""
    return {key: json.dumps(config)}


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all: what stood at `path` stays if it fails."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage().data_ptr()
        separate[name] = copy.clone() if storage in seen else copy  # the format has no shared tensors
        seen.add(storage)
    with replacing(Path(path)) as temporary:
        try:
            save_file(separate, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # such as a full disk
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise


def save_archive(path: PathLike, content: object) -> None:
    """Write anything torch.save takes, whole or not at all."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # tells of what it met after the stream's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_text(path: PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: PathLike) -> Any:
    """What a file of figures holds; ValueError if it is damaged."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # also where it is no text
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is made anew") from None


def read_archive(path: PathLike) -> object:
    """What `save_archive` wrote, on the CPU; CheckpointError, which says the cause alone, if it is damaged.

    The whole file is held against its checksums, which torch does not do.
    """
    if not os.path.getsize(path):
        raise CheckpointError("it is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        if whole:
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if isinstance(error, PermissionError) or "memory" in str(error):  # which says nothing about the file
            raise
    raise CheckpointError("it is cut short, or not as it was written")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place once it is safely on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, which names no file
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
