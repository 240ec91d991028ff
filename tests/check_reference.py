"""Holds the networks and samplers against reference numbers: python tests/check_reference.py DIR

Reads every *.safetensors file in DIR (metadata `config`; tensors `weights/…`, `inputs/…`, `outputs/…`),
takes all sizes from the file, runs ours in float32, and prints one line per output with its relative error,
the largest last. Exits with 1 if any exceeds its bound or an output was not computed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from safetensors import safe_open
from torch import Tensor, nn

from core.config.schema import StageCConfig
from core.pipeline.resolution import guidance_strength
from core.weights.layouts import from_published_guidance
from gdf import noise_conditions, samplers, schedules
from gdf.targets import EPSILON
from modules.blocks import timestep_embedding
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.lora import LoraUpdate, MergedLora
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

NETWORK_BOUND = 5e-6
TRAJECTORY_BOUND = 2e-5
# Some outputs cancel: rounding in float32 alone, ours or the reference's, moves them by more than the
# bound. Only there
# the bound is what two float32 computations may differ by, as measured against ours in float64.
ROUNDINGS = 2
UNCONDITIONAL_CLIP = 0.2  # Stage B's sampled case scales the pooled text by this for its unconditional half
CLIP_INPUTS = ("clip_text", "clip_text_pooled", "clip_img")

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """One file: its configuration and its tensors without their prefixes."""

    path: Path
    config: Mapping
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def read_reference(path: Path) -> Reference:
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():  # noqa: SIM118  a safetensors handle is no mapping
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    return Reference(path, config, **groups)


def loaded(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    dtype = next(w.dtype for w in weights.values() if w.is_floating_point())
    module.to(dtype).load_state_dict(weights, strict=True)
    return module.eval()


def in_float64(ref: Reference) -> Reference:
    """The same in float64, to tell how far float32's own rounding reaches."""

    def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    return Reference(ref.path, ref.config, widened(ref.weights), widened(ref.inputs), ref.outputs)


def guided_networks(ref: Reference) -> tuple[StageC, Guidance]:
    base = {name: w for name, w in ref.weights.items() if not name.startswith("agg_net")}
    added = {name: w for name, w in ref.weights.items() if name.startswith("agg_net")}
    sizes = {k: v for k, v in ref.config["guidance"].items()}
    return loaded(StageC(**ref.config["stage_c"]), base), loaded(
        Guidance(**sizes), from_published_guidance(added)
    )


def default_strength(size: tuple[int, int]) -> float:
    return guidance_strength(size, StageCConfig.__dataclass_fields__["guidance_strength"].default)


# --- Stage C with guidance ---


def check_guided(ref: Reference) -> Outputs:
    stage_c, guidance = guided_networks(ref)
    i = ref.inputs
    conditions = stage_c.prepare(*(i[name] for name in CLIP_INPUTS))
    control = [i.get(f"cnet.{n}") for n in range(ref.config["n_res_blocks"])]
    out = {"base": stage_c.predict(i["x_lr"], i["r"], conditions)}
    out["base_cnet"] = stage_c.predict(i["x_lr"], i["r"], conditions, control=control)
    out["lr_pred"], features = stage_c.predict_with_features(i["x_lr"], i["r_lr"], conditions)
    levels = len(features.maps) // 2
    for n in range(levels):
        out[f"guide_down.{n}"], out[f"guide_up.{n}"] = features.maps[n], features.maps[levels + n]
    for name in ref.outputs:
        if match := re.fullmatch(r"guided_(eval|train|eval_with_cnet)\.(\d+)x(\d+)", name):
            kind, size = match[1], (int(match[2]), int(match[3]))
            x = i[f"x_hr.{match[2]}x{match[3]}"]
            few = stage_c.prepare(*(i[k][: len(x)] for k in CLIP_INPUTS))
            strength = 1.0 if kind == "train" else default_strength(size)
            bound = guidance.prepare(features.first(len(x)), stage_c.site_sizes(size), strength)
            entries = control if kind == "eval_with_cnet" else None
            out[name] = stage_c.predict(x, i["r"][: len(x)], few, control=entries, guidance=bound)
    block, target = guidance.down[0], i["block_target"]
    out["timestep_embedding"] = timestep_embedding(i["r"])
    out["guidance_block"] = block(target, i["block_guide"], timestep_embedding(i["r"]))
    out["scale_norm"] = block.hr_norm(target)
    out["grn"] = stage_c.down_blocks[0][0].channelwise[2](i["grn_x"])
    return out


# --- sampling ---


def noise_free(_: Tensor) -> Tensor:
    raise AssertionError("DDIM with eta 0 draws no noise")


def two_passes(
    stage_c: StageC, guidance: Guidance, ref: Reference, case: Mapping[str, float]
) -> tuple[samplers.Sampled, samplers.Sampled]:
    conditional, unconditional = ([ref.inputs[f"{h}.{k}"] for k in CLIP_INPUTS] for h in ("cond", "uncond"))
    single = stage_c.prepare(*conditional)
    double = stage_c.prepare(*(torch.cat(pair) for pair in zip(conditional, unconditional, strict=True)))
    cfg = samplers.CfgSettings(weight=case["cfg"])
    steps = samplers.steps(schedules.cosine, case["timesteps"], case["shift"])
    taken, bound = [], None

    def predict(x: Tensor, step: samplers.Step, both: bool) -> Tensor:
        batch = torch.cat([x, x]) if both else x
        conditions = double if both else single
        r = noise_conditions.cosine_t(step.logsnr).expand(len(batch))
        if bound is None and step.is_last:
            prediction, features = stage_c.predict_with_features(batch, r, conditions)
            taken.append(features.first(len(x)))
            return prediction
        return stage_c.predict(batch, r, conditions, guidance=bound)

    denoise = samplers.denoiser(predict, EPSILON, cfg)
    low = samplers.sample(denoise, ref.inputs["noise_lr"], steps, samplers.ddim, noise_free)
    size = tuple(ref.inputs["noise_hr"].shape[-2:])
    bound = guidance.prepare(taken[0], stage_c.site_sizes(size), default_strength(size))
    return low, samplers.sample(denoise, ref.inputs["noise_hr"], steps, samplers.ddim, noise_free)


def weights_beside(ref: Reference) -> Reference:
    """The guided Stage C of a sampling file: itself, or one of its sizes that lies beside it."""
    if ref.weights:
        return ref
    names = [ref.path.name.replace("sample_guided_ddim", "stage_c_guided")]
    names += re.findall(r"\S+?\.safetensors", ref.config.get("note", ""))
    names += [path.name for path in sorted(ref.path.parent.glob("*stage_c_guided*.safetensors"))]
    widths = [ref.inputs[f"cond.{name}"].shape[-1] for name in CLIP_INPUTS]
    for path in (ref.path.with_name(name) for name in names if name != ref.path.name):
        if path.is_file():
            found = read_reference(path)
            sizes = found.config["stage_c"]
            if [sizes[f"c_{name}"] for name in CLIP_INPUTS] == widths:
                return found
    raise SystemExit(f"{ref.path}: no stage_c_guided*.safetensors with its weights lies beside it")


def check_sampled(ref: Reference) -> Outputs:
    out: Outputs = {}
    stage_c, guidance = guided_networks(weights_beside(ref))
    for name, case in ref.config["cases"].items():
        low, high = two_passes(stage_c, guidance, ref, case)
        out |= {f"{name}.lr": low.x, f"{name}.hr": high.x, f"{name}.x0": high.x0}
    return out


def check_step(ref: Reference) -> Outputs:
    i, config = ref.inputs, ref.config
    ends = [schedules.logsnr_at(schedules.cosine, torch.tensor(config[k])) for k in ("t", "t_next")]
    (a, b), (a_next, b_next) = map(samplers.variance_preserving, ends)
    step = samplers.Step(0, 2, config["t"], config["t_next"], *ends, a, b, a_next, b_next)
    estimate = samplers.Estimate(i["x0"], i["epsilon"])
    rules = {"ddpm": samplers.ddpm, "ddim_eta_half": samplers.ddim_with(0.5)}
    return {name: rule(i["x"], estimate, step, None, lambda _: i["z"]) for name, rule in rules.items()}


# --- Stage B, Stage A and the small networks ---


def check_stage_b(ref: Reference) -> Outputs:
    stage_b = loaded(StageB(**ref.config["stage_b"]), ref.weights)
    i = ref.inputs
    out = {"out": stage_b(i["x"], i["r"], i["effnet"], i["clip"])}
    out["out_pixels"] = stage_b(i["x"], i["r"], i["effnet"], i["clip"], i["pixels"])
    for name in ref.outputs:
        if match := re.fullmatch(r"sampled_cfg([\d.]+)_t(\d+)_ddim", name):
            out[name] = sample_stage_b(stage_b, ref, float(match[1]), int(match[2]))
    return out


def sample_stage_b(stage_b: StageB, ref: Reference, weight: float, count: int) -> Tensor:
    noise, effnet, clip = ref.inputs["noise"], ref.inputs["effnet"][:1], ref.inputs["clip"][:1]
    size = tuple(noise.shape[-2:])
    both_effnet, both_clip = torch.cat([effnet, 0 * effnet]), torch.cat([clip, UNCONDITIONAL_CLIP * clip])
    single, double = stage_b.prepare(size, effnet, clip), stage_b.prepare(size, both_effnet, both_clip)

    def predict(x: Tensor, step: samplers.Step, both: bool) -> Tensor:
        batch = torch.cat([x, x]) if both else x
        r = noise_conditions.cosine_t(step.logsnr).expand(len(batch))
        return stage_b.predict(batch, r, double if both else single)

    denoise = samplers.denoiser(predict, EPSILON, samplers.CfgSettings(weight=weight))
    return samplers.sample(
        denoise, noise, samplers.steps(schedules.cosine, count), samplers.ddim, noise_free
    ).x


def check_stage_a(ref: Reference) -> Outputs:
    stage_a = loaded(StageA(**ref.config["stage_a"]), ref.weights)
    return {"encoded": stage_a.encode(ref.inputs["image"]), "decoded": stage_a.decode(ref.inputs["latent"])}


def check_previewer(ref: Reference) -> Outputs:
    return {"preview": loaded(Previewer(**ref.config["previewer"]), ref.weights)(ref.inputs["latent"])}


def control_outputs(controlnet: ControlNet, x: Tensor, prefix: str) -> Outputs:
    return {f"{prefix}.{n}": entry for n, entry in enumerate(controlnet(x)) if entry is not None}


def check_controlnet(ref: Reference) -> Outputs:
    return control_outputs(loaded(ControlNet(**ref.config), ref.weights), ref.inputs["x"], "proj")


def formula_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights too large to store: a sine of index and name (float64), scaled by what the tensor is."""
    state = module.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        index = torch.arange(tensor.numel(), dtype=torch.float64)
        v = torch.sin(12.9898 * index + crc32(name.encode()) % 1000).view(tensor.shape)
        if name.endswith("running_var"):
            v = 1 + 0.3 * v
        elif name.endswith("running_mean"):
            v = 0.1 * v
        elif tensor.dim() > 1:
            v = v * (2 / (tensor.numel() / len(tensor))) ** 0.5
        else:
            v = 0.1 * v if name.endswith("bias") else 1 + 0.2 * v
        state[name] = v.float().to(dtype)
    return loaded(module, state)


def check_effnet(ref: Reference) -> Outputs:
    encoder = formula_weights(EfficientNetEncoder(), ref.inputs["image"].dtype)
    controlnet = formula_weights(ControlNet(**ref.config["controlnet"]), ref.inputs["edges"].dtype)
    out = {"effnet": encoder(ref.inputs["image"])}
    return out | control_outputs(controlnet, ref.inputs["edges"], "controlnet")


def check_lora(ref: Reference) -> Outputs:
    base = {name: w for name, w in ref.weights.items() if not name.startswith("lora/")}
    stage_c = loaded(StageC(**ref.config["stage_c"]), base)
    updates = {
        name: LoraUpdate(
            *(ref.weights[f"lora/module.{i}.lora_{way}"] for way in ("down", "up")), ref.config["alpha"]
        )
        for i, name in enumerate(ref.config["order"])
    }
    MergedLora(stage_c, updates)
    return {"out": stage_c(ref.inputs["x"], ref.inputs["r"], *(ref.inputs[k] for k in CLIP_INPUTS))}


# --- all files ---

CHECKS: tuple[
    tuple[str, Callable[[Reference], Outputs]], ...
] = (  # by the first key that a file's config has
    ("cases", check_sampled),
    ("guidance", check_guided),
    ("rank", check_lora),
    ("t_next", check_step),
    ("stage_b", check_stage_b),
    ("stage_a", check_stage_a),
    ("previewer", check_previewer),
    ("controlnet", check_effnet),
    ("bottleneck_mode", check_controlnet),
)


@dataclass(frozen=True)
class Line:
    """The relative error of one output and its bound."""

    file: str
    output: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN too

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"ABOVE {self.bound:.0e}"
        if self.passed and self.bound > TRAJECTORY_BOUND or NETWORK_BOUND < self.bound < TRAJECTORY_BOUND:
            verdict += f" (float32 itself rounds by {self.bound / ROUNDINGS:.1e} here)"
        return f"{self.error:9.2e}  {self.file}  {self.output}  {verdict}"


def relative_error(ours: Tensor | None, reference: Tensor) -> float:
    if ours is None or ours.shape != reference.shape:
        return float("inf")
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def check_file(path: Path) -> Iterator[Line]:
    ref = read_reference(path)
    check = next((check for key, check in CHECKS if key in ref.config), lambda _: {})
    ours, exact = check(ref), None
    for name, reference in ref.outputs.items():
        bound = TRAJECTORY_BOUND if check is check_sampled or name.startswith("sampled") else NETWORK_BOUND
        error = relative_error(ours.get(name), reference)
        if error > bound and name in ours:
            exact = check(in_float64(ref)) if exact is None else exact
            bound = max(bound, ROUNDINGS * relative_error(ours[name], exact[name]))
        yield Line(path.name, name, error, bound)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="with reference *.safetensors files")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        parser.error(f"{folder} is no folder: name one with reference *.safetensors files")
    lines = [line for path in sorted(folder.glob("*.safetensors")) for line in check_file(path)]
    if not lines:
        print(f"no reference outputs in {folder}: it should hold *.safetensors files", file=sys.stderr)
        return 2
    for line in sorted(lines, key=lambda line: line.error):
        print(line)
    return 0 if all(line.passed for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
