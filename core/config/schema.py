"""What the scripts need to know, as frozen dataclasses; `core.config.yaml` reads them from YAML."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from core.config.control_types import control_type, training_of
from core.config.sizes import (
    PUBLISHED,
    STAGE_B_VERSIONS,
    STAGE_C_VERSIONS,
    TINY,
    TINY_VERSION,
    ControlNetSizes,
    EffnetSizes,
    GuidanceSizes,
    PreviewerSizes,
    RecogniserSizes,
    Sizes,
    StageASizes,
    StageBSizes,
    StageCSizes,
    TextSizes,
)
from gdf.names import LOSS_WEIGHT_NAMES, check_name

MIN_CONTROL_SIZE, MAX_CONTROL_SIZE = 16, 4096  # px
SHARES = ("pictures_at_once", "grad_accum_steps")  # of a batch, either of which may be left open

T = TypeVar("T")
Dtype = Literal["bfloat16", "float32"]
Target = Literal["epsilon", "x0", "v", "rectified_flow"]


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value == () or min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise ValueError(f"'{name}' must be above 0, not {value}")


def _require_from_zero(config: object, *names: str, below: float = math.inf) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < below:
            most = "" if below == math.inf else f" and below {below}"
            raise ValueError(f"{name!r} must be at least 0{most}, not {value}")


def _require_share(config: object, name: str) -> None:
    if not 0 <= (value := getattr(config, name)) <= 1:
        raise ValueError(f"'{name}' is a share, 0 to 1, not {value}")


@dataclass(frozen=True)
class LatentGeometry:
    """How pixels relate to Stage C latents, and how large the low-resolution picture is."""

    compression: float = 42.67  # pixels per side of one Stage C latent pixel
    stride: int = 32  # pixels per side of one cell of the encoder
    lr_cells: int = 32  # the LR picture has about this many cells, squared
    lr_train_cells: int = 24  # the same in training

    def __post_init__(self) -> None:
        _require_positive(self, "compression", "stride", "lr_cells", "lr_train_cells")


@dataclass(frozen=True)
class StageCConfig:
    """Everything needed to run Stage C with its guidance; `core.config.yaml.load` tells where paths lead.

    Sizes left out follow from `model_version`.
    """

    model_version: str  # 3.6B, 1B or tiny; another name where stage_c gives the sizes
    generator_checkpoint_path: str  # Stage C's weights
    effnet_checkpoint_path: str | None = None  # the encoder, for training and given pictures
    previewer_checkpoint_path: str | None = None  # the previewer's weights, for quick looks at latents
    # a local folder or a hub id; a folder holds the text model and its tokenizer together, or in
    # text_encoder/ and tokenizer/
    clip_text_path: str = "models"
    clip_image_path: str | None = None  # CLIP for pictures, likewise; none: the image embedding is zero
    dtype: Dtype = "bfloat16"  # number format of frozen weights
    target: Target = "epsilon"  # what the network predicts; the published ones: epsilon
    stage_c: StageCSizes | None = None  # Stage C's sizes
    guidance: GuidanceSizes | None = None  # the guidance's sizes
    previewer: PreviewerSizes | None = None  # the previewer's sizes
    effnet: EffnetSizes | None = None  # the encoder's sizes
    geometry: LatentGeometry = LatentGeometry()  # how pixels relate to latents
    # [from this many latent pixels on, strength of the guidance on the way up], large to small
    guidance_strength: tuple[tuple[int, float], ...] = ((9216, 0.7), (5184, 0.5), (0, 0.3))
    # [new token, expression of the vocabulary entries whose mean it starts from], for each
    # token that is trained, and for those of a LoRA whose file does not tell, such as
    # ["[roubaobao]", "^cat</w>"] of the published one
    train_tokens: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self) -> None:
        stage_c_sizes(self)
        starts = [pixels for pixels, _ in self.guidance_strength]
        if not starts or starts[-1] != 0 or starts != sorted(set(starts), reverse=True):
            raise ValueError(
                "'guidance_strength' must list [latent pixels, strength] from large to small pixel counts, "
                f"the last of them 0, not {self.guidance_strength}"
            )


@dataclass(frozen=True)
class StageBConfig:
    """Everything needed to run Stage B and Stage A; paths as in Stage C's."""

    model_version: str  # 3B, 700M or tiny; another name where stage_b gives the sizes
    generator_checkpoint_path: str  # Stage B's weights
    stage_a_checkpoint_path: str  # Stage A's weights
    effnet_checkpoint_path: str | None = None  # the encoder's weights, which only training reads
    dtype: Dtype = "bfloat16"  # number format of Stage B; Stage A is always in float32
    target: Target = "epsilon"  # what the network predicts; the published ones: epsilon
    stage_b: StageBSizes | None = None  # Stage B's sizes
    stage_a: StageASizes | None = None  # Stage A's sizes

    def __post_init__(self) -> None:
        stage_b_sizes(self)


@dataclass(frozen=True)
class SceneData:
    """Training pictures that are drawn as they are needed (`core.scenes`)."""

    count: int = 60000  # different scenes in an epoch
    split: Literal["train", "held_out"] = "train"  # held_out: scenes that no training shows
    scales: tuple[int, ...] = (1,)  # scenes are drawn this many times as large, then cut out; equal chances
    without_colour: float = 0.0  # share of the pictures whose caption leaves out the subject's colour
    # one that is listed twice comes twice as often; none: all of them
    subjects: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "count", "scales")
        _require_share(self, "without_colour")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training needs to know: the keys of the published trainer, and ours."""

    experiment_id: str  # name of the run's folder
    checkpoint_path: str  # folder for checkpoints
    output_path: str | None = None  # folder for sample pictures; none: samples in the run's folder
    webdataset_path: str | None = None  # folder or shards of training pictures
    scenes: SceneData | None = None  # drawn scenes as training pictures
    tmp_prompt: str | None = None  # the caption of all pictures, instead of their own
    empty_captions: bool = False  # pictures without a caption are trained on with none, else they are broken
    pretrained_path: str | None = None  # trained weights to start from
    export_path: str | None = None  # where the trained weights go; none: into the run's folder
    overwrite_export: bool = False  # replaces what stands at export_path, if this run did not write it
    # number format of the matrices in the file of trained weights
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lr: float = 1e-4  # learning rate, once it is warm
    lr_end: float | None = None  # learning rate at the last update, along a cosine; none: lr stays
    batch_size: int = 16  # pictures per update, over all processes; rounded up where it does not divide
    pictures_at_once: int | None = 1  # pictures of a process in one forward pass; none: all its pictures
    # instead of pictures_at_once, where it fits: parts in which a process works through its pictures
    grad_accum_steps: int | None = None
    # px; a training picture gets about the area of a square with the nearest of these sides
    image_size: int | tuple[int, ...] = (1024, 2048, 2560, 3072, 3584, 3840, 4096, 4608)
    multi_aspect_ratio: tuple[str, ...] = (  # shapes as width/height, each also inverted
        "1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16",
    )  # fmt: skip
    updates: int = 40000  # updates of the weights in all
    backup_every: int = 5000  # updates between checkpoints that are kept
    save_every: int = 500  # updates between checkpoints to resume from, and samples
    warmup_updates: int = 500  # first updates, in which the learning rate rises from 0
    # adamw_fused: faster on a GPU; adamw_8bit: less memory, needs bitsandbytes
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    use_ddp: bool = True  # changes nothing (published files have it): processes always share the work
    use_fsdp: bool = False  # shard the trained weights over the processes instead of copying them
    adaptive_loss_weight: bool = True  # weighs noise levels by the loss that was seen at them
    loss_weight: str = "constant"  # a function of gdf/loss_weights.py, where the weight is not adaptive
    loss_weight_shift: float = 1.0  # loss_weight is read at logSNR + 2 ln(shift)
    seed: int = 0  # of new weights, noise and the order of pictures
    ema: float = 0.0  # decay of the running mean of the weights (EMA) that is exported; 0: no mean
    keep: int = 2  # latest checkpoints that are kept beside those of backup_every
    num_workers: int = 4  # helper processes that decode pictures
    max_broken: float = 0.1  # share of broken pictures that stops the run
    gradient_checkpointing: bool = True  # less memory, but slower: maps are computed twice
    compile: bool = False  # compiles the blocks (torch.compile): a minute at the start, faster steps after
    # where curves are shown, beside log.jsonl; auto: TensorBoard if it is installed
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = "auto"

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "batch_size", "image_size", "updates")
        _require_positive(self, *(n for n in SHARES if getattr(self, n) is not None))
        _require_positive(self, "backup_every", "save_every", "keep", "loss_weight_shift")
        _require_from_zero(self, "warmup_updates", "num_workers", "lr_end")
        _require_from_zero(self, "ema", below=1)
        _require_from_zero(self, "seed", below=2**63)
        _require_share(self, "max_broken")
        if self.experiment_id in ("", ".", ".."):
            raise ValueError(f"'experiment_id' must name a folder, not {self.experiment_id!r}")
        if not self.multi_aspect_ratio:
            raise ValueError("'multi_aspect_ratio' needs a ratio: 1/1 is the square")
        check_name("loss weight", self.loss_weight, LOSS_WEIGHT_NAMES)
        if self.adaptive_loss_weight and self.loss_weight != "constant":
            raise ValueError("'loss_weight' is used without 'adaptive_loss_weight': set that to false")
        if (self.webdataset_path is None) == (self.scenes is None):
            raise ValueError("the training data is named by one of 'webdataset_path' and 'scenes'")
        for ratio in self.multi_aspect_ratio:
            if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", ratio):
                raise ValueError(f"'multi_aspect_ratio' takes ratios such as 2/3, not {ratio!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, StageCConfig):
    """Training of the guidance parameters: Stage C's configuration and a run."""

    cache_path: str | None = None  # folder where latents and text embeddings are kept between epochs
    # tensor names in the file of trained weights: our own, or the published ones
    export_layout: Literal["own", "published"] = "own"
    text_dropout: float = 0.05  # share of captions left out of training

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        StageCConfig.__post_init__(self)
        _require_share(self, "text_dropout")


@dataclass(frozen=True, kw_only=True)
class PersonalizedTrainConfig(RunConfig, StageCConfig):
    """Training of LoRA and of the new tokens in `train_tokens`: Stage C's configuration and a run."""

    ultrapixel_path: str | None = None  # the guidance, which is not trained; none: no guidance
    lora_rank: int = 4  # width of the added matrices
    module_filters: tuple[str, ...] = (".attn",)  # modules of Stage C whose names contain one of them
    lora_layout: Literal["own", "published", "kohya", "peft"] = "own"  # layout of the LoRA that is written
    # [from this update on, image sizes], instead of image_size; every picture is shown at each of the sizes
    image_size_schedule: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    prior_path: str | None = None  # folder or shards of pictures of what should stay as it is
    prior_scenes: SceneData | None = None  # drawn scenes, instead of prior_path
    prior_prompt: str | None = None  # the caption of all pictures of prior_path, instead of their own
    prior_weight: float = 1.0  # how much such a picture counts beside one of the subject

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        StageCConfig.__post_init__(self)
        _require_positive(self, "lora_rank", "prior_weight")
        starts = [start for start, _ in phases(self)]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"'image_size_schedule' must go up from update 0, not {starts}")
        if any(min(sizes, default=0) <= 0 for _, sizes in phases(self)):
            raise ValueError(f"'image_size_schedule' needs sizes above 0, not {self.image_size_schedule}")
        if self.prior_path is not None and self.prior_scenes is not None:
            raise ValueError("what should stay is shown by one of 'prior_path' and 'prior_scenes', not both")
        if self.prior_prompt is not None and self.prior_path is None:
            raise ValueError("'prior_prompt' is the caption of pictures of 'prior_path', which is not given")


@dataclass(frozen=True, kw_only=True)
class StageATrainConfig(RunConfig):
    """Training of Stage A from nothing."""

    model_version: str  # a name, or tiny for the sizes of that family
    empty_captions: bool = True  # captions are not read
    stage_a: StageASizes | None = None  # Stage A's sizes
    statistics_updates: int = 500  # first updates, in which the mean and deviation of the latents are found
    quantised_share: float = 0.5  # share of the pictures that are decoded from quantised latents
    adversarial_weight: float = 0.1  # weight of the patch discriminator's judgement; 0: no discriminator
    adversarial_start: int = 1000  # update from which the discriminator counts
    decoder_only: bool = False  # trains the decoder alone, from pretrained_path; latents stay as they are

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_only and (self.pretrained_path is None or self.statistics_updates):
            raise ValueError("'decoder_only' needs 'pretrained_path' and 'statistics_updates' of 0")


@dataclass(frozen=True, kw_only=True)
class StageBTrainConfig(RunConfig, StageBConfig):
    """Training of Stage B from nothing, with the encoder of Stage C's latents along, if it has no file."""

    generator_checkpoint_path: str | None = None  # not read: training starts from pretrained_path or nothing
    clip_text_path: str = "models"  # folder or hub id of the text encoder, as for Stage C
    effnet: EffnetSizes | None = None  # the encoder's sizes
    geometry: LatentGeometry = LatentGeometry()  # how pixels relate to latents
    pyramid_noise: bool = True  # adds coarse noise, as in the published training; false: white noise alone
    latent_noise: float = 0.0  # deviation of the noise added to the encoder's latents, whose own is 1
    cache_path: str | None = None  # folder where latents and text embeddings are kept, for a finished encoder
    effnet_pretrained_path: str | None = None  # weights from which an encoder starts that is trained along
    export_effnet_path: str | None = None  # where the trained encoder goes; none: into the run's folder

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        StageBConfig.__post_init__(self)
        if self.cache_path is not None and self.effnet_checkpoint_path is None:
            raise ValueError("'cache_path' is for a finished encoder: name it as 'effnet_checkpoint_path'")


@dataclass(frozen=True, kw_only=True)
class PreviewerTrainConfig(RunConfig):
    """Training of the previewer from nothing, with the encoder along, if it has no file."""

    model_version: str  # a name, or tiny for the sizes of that family
    empty_captions: bool = True  # captions are not read
    previewer: PreviewerSizes | None = None  # the previewer's sizes
    effnet: EffnetSizes | None = None  # the encoder's sizes
    effnet_checkpoint_path: str | None = None  # a finished encoder; none: it is trained along
    latent_noise: float = 0.0  # deviation of the noise added to the encoder's latents, whose own is 1
    export_effnet_path: str | None = None  # where the trained encoder goes; none: into the run's folder


@dataclass(frozen=True, kw_only=True)
class StageCTrainConfig(TrainConfig):
    """Training of Stage C from nothing."""

    generator_checkpoint_path: str | None = None  # not read: training starts from pretrained_path or nothing


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig(RunConfig):
    """Training of a small text encoder on captions of scenes; `export_path` is a folder."""

    text_encoder: TextSizes = TextSizes()  # its sizes
    loosened_share: float = 0.5  # share of the captions that are changed towards what people type
    scale_weight: float = 0.1  # weight of the loss that keeps tokens and pooled embeddings near unit variance


@dataclass(frozen=True, kw_only=True)
class RecogniserTrainConfig(RunConfig):
    """Training of the recogniser of scenes; `scenes.scales` are how many times as large some are drawn,
    and then reduced.
    """

    recogniser: RecogniserSizes = RecogniserSizes()  # its sizes
    degraded_share: float = 0.7  # share of the pictures that are blurred, made noisy or pale


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """The ControlNet that a configuration of Stage C names beside it; what it leaves out, the file tells."""

    controlnet_filter: str = "canny"  # what the ControlNet sees
    controlnet_checkpoint_path: str | None = None  # none: models/controlnet/NAME.safetensors
    control_size: int | None = None  # side (px) at which edges are found; none: the file's, or 224
    controlnet: ControlNetSizes | None = None  # the ControlNet's sizes; none: as the file says

    def __post_init__(self) -> None:
        size = MIN_CONTROL_SIZE if self.control_size is None else self.control_size
        if not MIN_CONTROL_SIZE <= size <= MAX_CONTROL_SIZE:
            raise ValueError(
                f"'control_size' must be from {MIN_CONTROL_SIZE} to {MAX_CONTROL_SIZE} pixels, not {size}"
            )
        seen = control_type(self.controlnet_filter).sizes.c_in
        if self.controlnet is not None and self.controlnet.c_in != seen:
            raise ValueError(
                f"'controlnet.c_in' must be {seen} for the filter {self.controlnet_filter}, "
                f"not {self.controlnet.c_in}"
            )


@dataclass(frozen=True, kw_only=True)
class ControlTrainConfig(ControlConfig, RunConfig, StageCConfig):
    """Training of a ControlNet: Stage C's configuration, what the ControlNet sees, and a run."""

    train_encoder: bool = True  # trains the ControlNet's backbone too; false: its projections alone

    def __post_init__(self) -> None:
        training_of(self.controlnet_filter)  # raises where there is no way
        ControlConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        StageCConfig.__post_init__(self)
        check_proj_blocks(controlnet_sizes(self), stage_c_sizes(self))


def phases(config: PersonalizedTrainConfig) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The schedule of image sizes: (from this update on, sizes)."""
    if config.image_size_schedule is not None:
        return config.image_size_schedule
    return ((0, (config.image_size,) if isinstance(config.image_size, int) else config.image_size),)


def stage_c_sizes(config: StageCConfig) -> StageCSizes:
    """Stage C's sizes: those given, else those of the model version (ValueError if that is unknown)."""
    return config.stage_c or _published(STAGE_C_VERSIONS, config.model_version, "stage_c")


def guidance_sizes(config: StageCConfig) -> GuidanceSizes:
    """The guidance's sizes: those given, else the version's, else the published ones at Stage C's width.

    A value that is given as published counts as left out, so `{upsampling: bilinear}` fits every version.
    """
    family = _family(config).guidance if config.stage_c is None else None
    base = family or GuidanceSizes(ind=stage_c_sizes(config).c_hidden[0])
    given, published = asdict(config.guidance or GuidanceSizes()), asdict(GuidanceSizes())
    return replace(base, **{name: value for name, value in given.items() if value != published[name]})


def stage_b_sizes(config: StageBConfig) -> StageBSizes:
    """Stage B's sizes: those given, else those of the model version (ValueError if that is unknown)."""
    return config.stage_b or _published(STAGE_B_VERSIONS, config.model_version, "stage_b")


def stage_a_sizes(config: StageBConfig) -> StageASizes:
    """Stage A's sizes: those given, else the version's."""
    return config.stage_a or _family(config).stage_a


def effnet_sizes(config: StageCConfig) -> EffnetSizes:
    """The encoder's sizes, likewise."""
    return config.effnet or _family(config).effnet


def previewer_sizes(config: StageCConfig) -> PreviewerSizes:
    """The previewer's sizes, likewise."""
    return config.previewer or _family(config).previewer


def controlnet_sizes(config: ControlTrainConfig) -> ControlNetSizes:
    """The ControlNet's sizes: those given, else the family's or the published ones at Stage C's width."""
    if config.controlnet is not None:
        return config.controlnet
    published = control_type(config.controlnet_filter).sizes
    if _family(config) is TINY:
        mode = "effnet" if published.bottleneck_mode == "effnet" else "simple"  # the large one is too large
        return replace(TINY.controlnet, c_in=published.c_in, bottleneck_mode=mode)
    return replace(published, c_proj=stage_c_sizes(config).c_hidden[0])


def check_proj_blocks(controlnet: ControlNetSizes, stage_c: StageCSizes) -> None:
    """ValueError if the ControlNet acts on ResBlocks or at a width that Stage C does not have."""
    count, width = sum(map(sum, stage_c.blocks)), stage_c.c_hidden[0]
    if controlnet.c_proj != width:
        raise ValueError(
            f"the ControlNet is for a Stage C of width {controlnet.c_proj}, but the configured one has "
            f"{width}: use one that was trained for this Stage C"
        )
    if not set(controlnet.proj_blocks) <= set(range(count)):
        raise ValueError(
            f"the ControlNet acts before the ResBlocks {list(controlnet.proj_blocks)}, but the configured "
            f"Stage C has 0 to {count - 1} alone: use one that was trained for this Stage C"
        )


def _family(config: StageBConfig | StageCConfig) -> Sizes:
    return TINY if config.model_version == TINY_VERSION else PUBLISHED


def _published(versions: Mapping[str, T], version: str, key: str) -> T:
    if version not in versions:
        raise ValueError(
            f"'model_version' {version!r} is not a known one ({', '.join(versions)}) "
            f"and the sizes are not given as '{key}'"
        )
    return versions[version]
