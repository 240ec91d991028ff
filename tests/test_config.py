"""core/config: files and overrides to dataclasses, errors that name what is wrong, published sizes."""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config.schema import (
    ControlTrainConfig,
    LatentGeometry,
    PersonalizedTrainConfig,
    PreviewerTrainConfig,
    RecogniserTrainConfig,
    StageATrainConfig,
    StageBConfig,
    StageBTrainConfig,
    StageCConfig,
    StageCTrainConfig,
    TextTrainConfig,
    TrainConfig,
    effnet_sizes,
    guidance_sizes,
    phases,
    previewer_sizes,
    stage_b_sizes,
    stage_c_sizes,
)
from core.config.sizes import (
    STAGE_B_VERSIONS,
    STAGE_C_VERSIONS,
    GuidanceSizes,
    PreviewerSizes,
    StageASizes,
    StageBSizes,
    StageCSizes,
)
from core.config.yaml import OUTPUT_PATHS, ConfigError, as_yaml, load, load_run, load_stage_b, load_stage_c

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests/reference"
STAGE_C = {"model_version": "3.6B", "generator_checkpoint_path": "c.safetensors"}
STAGE_B = {
    "model_version": "700M", "generator_checkpoint_path": "b.safetensors", "stage_a_checkpoint_path": "a"
}  # fmt: skip
TRAIN = {**STAGE_C, "experiment_id": "x", "checkpoint_path": "c", "webdataset_path": "d"}
EACH = [(StageCConfig, STAGE_C), (StageBConfig, STAGE_B), (TrainConfig, TRAIN)]


def write(folder: Path, values: object) -> Path:
    path = folder / "some.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
    return path


def fail(cls: type, path: Path, *overrides: str) -> str:
    """The message of the error, which is one line and names the file or the override."""
    with pytest.raises(ConfigError) as caught:
        load(cls, path, overrides)
    message = str(caught.value)
    assert "\n" not in message and (str(path) in message or repr(overrides[0]) in message)
    return message


# ------------------------------------------------------------------------------------------- shipped files


def test_the_shipped_files_load() -> None:
    inference = ROOT / "configs/inference"
    assert stage_c_sizes(load(StageCConfig, inference / "stage_c_3b.yaml")) == STAGE_C_VERSIONS["3.6B"]
    assert stage_c_sizes(load(StageCConfig, inference / "stage_c_1b.yaml")) == STAGE_C_VERSIONS["1B"]
    assert stage_b_sizes(load(StageBConfig, inference / "stage_b_3b.yaml")) == STAGE_B_VERSIONS["3B"]
    assert stage_b_sizes(load(StageBConfig, inference / "stage_b_1b.yaml")) == STAGE_B_VERSIONS["700M"]


def test_the_stages_files_load() -> None:
    for name, cls in (("a", StageATrainConfig), ("b", StageBTrainConfig), ("c", StageCTrainConfig)):
        load(cls, ROOT / f"configs/training/stage_{name}.yaml")


def test_the_training_file_is_the_published_recipe_and_an_inference_file_too() -> None:
    path = ROOT / "configs/training/t2i.yaml"
    config = load(TrainConfig, path)
    buckets = json.loads((REFERENCE / "buckets.json").read_text())
    assert list(config.image_size) == buckets["image_size"]
    assert list(config.multi_aspect_ratio) == buckets["ratios"]
    assert (config.lr, config.batch_size, config.grad_accum_steps, config.updates) == (1e-4, 16, None, 40000)
    inference = load_stage_c(path)
    assert type(inference) is StageCConfig
    assert inference == load_stage_c(ROOT / "configs/inference/stage_c_3b.yaml")


def test_the_defaults_of_training_are_those_of_the_shipped_file(tmp_path: Path) -> None:
    shipped = load(TrainConfig, ROOT / "configs/training/t2i.yaml")
    bare = load(TrainConfig, write(tmp_path, TRAIN))
    others = ("effnet_checkpoint_path", "previewer_checkpoint_path", "train_tokens")
    given_by_file = {name: getattr(shipped, name) for name in (*TRAIN, *others)}
    assert replace(bare, **given_by_file) == shipped


# ------------------------------------------------------------------------------------------ published sizes


def read_manifest(name: str) -> dict[str, list[int]]:
    return json.loads((REFERENCE / f"manifests/{name}.json").read_text())["tensors"]


def count_by_level(tensors: dict[str, list[int]], pattern: str) -> tuple[int, ...]:
    """How many names match per level; the pattern's first group is the level."""
    levels = [int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name))]
    return tuple(levels.count(level) for level in sorted(set(levels)))


def levels_of(tensors: dict[str, list[int]]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Widths per level, and the numbers of ResBlocks down and up."""
    convolution = r"{}_blocks\.(\d+)\.\d+\.depthwise\.weight"
    widths = {name.split(".")[1]: shape[0] for name, shape in tensors.items()
              if re.fullmatch(convolution.format("down"), name)}  # fmt: skip
    blocks = tuple(count_by_level(tensors, convolution.format(way)) for way in ("down", "up"))
    return tuple(widths[level] for level in sorted(widths)), blocks


@pytest.mark.parametrize("version", ["3.6B", "1B"])
def test_stage_c_sizes_are_those_of_the_published_file(version: str) -> None:
    tensors, sizes = read_manifest(f"stage_c_{version.lower()}"), STAGE_C_VERSIONS[version]
    assert levels_of(tensors) == (sizes.c_hidden, sizes.blocks)
    assert tensors["clip_txt_mapper.weight"] == [sizes.c_cond, sizes.c_clip_text]
    width = sizes.c_cond * sizes.c_clip_seq
    assert tensors["clip_txt_pooled_mapper.weight"] == [width, sizes.c_clip_text_pooled]
    assert tensors["clip_img_mapper.weight"] == [width, sizes.c_clip_img]
    assert [width // heads for width, heads in zip(sizes.c_hidden, sizes.nhead, strict=True)] == [64, 64]


@pytest.mark.parametrize("version", ["3B", "700M"])
def test_stage_b_sizes_are_those_of_the_published_file(version: str) -> None:
    tensors, sizes = read_manifest(f"stage_b_{version.lower()}"), STAGE_B_VERSIONS[version]
    assert levels_of(tensors) == (sizes.c_hidden, sizes.blocks)
    extra_runs = count_by_level(tensors, r"up_repeat_mappers\.(\d+)\.\d+\.weight")
    assert tuple(runs + 1 for runs in extra_runs) == sizes.block_repeat[1]
    assert tensors["clip_mapper.weight"] == [4 * sizes.c_cond, sizes.c_clip]
    assert sizes.c_hidden[2:] == tuple(64 * heads for heads in sizes.nhead[2:])  # the levels with attention


def test_the_other_sizes_are_those_of_the_published_files(tmp_path: Path) -> None:
    stage_a = read_manifest("stage_a")
    assert stage_a["vquantizer.codebook.weight"][0] == StageASizes().codebook_size
    assert stage_a["up_blocks.3.depthwise.1.weight"][0] == StageASizes().c_hidden
    assert read_manifest("previewer")["blocks.0.weight"][0] == PreviewerSizes().c_hidden
    guidance, sizes = read_manifest("ultrapixel_t2i"), guidance_sizes(StageCConfig(**STAGE_C))
    assert guidance["module.64.0.input_layer.weight"][:2] == [sizes.ch, sizes.ind]
    assert guidance["module.64.0.wtokens"] == [2 * sizes.n_groups, sizes.ch]
    assert guidance["module.64.0.base_params.wb0"][1] == sizes.f_dim == sizes.n_head * sizes.head_dim
    assert guidance_sizes(replace(StageCConfig(**STAGE_C), model_version="1B")) == GuidanceSizes(ind=1536)


# ----------------------------------------------------------------------------------------------- good values


def test_sizes_given_in_the_file_win_over_the_version(tmp_path: Path) -> None:
    reference = {
        "stage_c": {"c_cond": 40, "c_hidden": [32, 32], "nhead": [4, 4], "blocks": [[2, 3], [3, 2]]},
        "guidance": {"ind": 32, "ch": 24, "n_head": 3, "head_dim": 8, "n_groups": 8, "f_dim": 24},
        "geometry": {"compression": 10.67, "stride": 8},
    }
    config = load(StageCConfig, write(tmp_path, {**STAGE_C, "model_version": "tiny", **reference}))
    assert stage_c_sizes(config) == StageCSizes(40, (32, 32), (4, 4), ((2, 3), (3, 2)))
    assert guidance_sizes(config) == GuidanceSizes(32, 24, 3, 8, 8, 24)
    assert config.geometry == LatentGeometry(10.67, 8, 32, 24)
    assert guidance_sizes(replace(config, guidance=None)).ind == 32


def test_the_upsampling_alone_keeps_the_versions_sizes(tmp_path: Path) -> None:
    values = {**STAGE_C, "guidance": {"upsampling": "bilinear"}}
    for version in ("tiny", "1B", "3.6B"):
        config = load(StageCConfig, write(tmp_path, {**values, "model_version": version}))
        plain = replace(config, guidance=None)
        assert guidance_sizes(config) == replace(guidance_sizes(plain), upsampling="bilinear")
    with pytest.raises(ConfigError, match="must be one of implicit, bilinear, not 'cubic'"):
        load(StageCConfig, write(tmp_path, {**STAGE_C, "guidance": {"upsampling": "cubic"}}))


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "0.00005", "'5e-5'"])
def test_every_way_to_write_a_small_number_works(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, TRAIN)
    assert load(TrainConfig, path, [f"lr={text}"]).lr == 5e-5
    assert load(TrainConfig, write(tmp_path, f"{yaml.safe_dump(TRAIN)}lr: {text}\n")).lr == 5e-5


def test_a_whole_number_is_a_number_and_becomes_one(tmp_path: Path) -> None:
    config = load(StageCConfig, write(tmp_path, {**STAGE_C, "geometry": {"compression": 42}}))
    assert type(config.geometry.compression) is float


def test_overrides_reach_nested_keys_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, {**TRAIN, "geometry": {"stride": 8}})
    overrides = ["geometry.compression=10.67", "image_size=[64, 128]", "image_size=96", "stage_c.c_cond=40",
                 "effnet_checkpoint_path=", "output_path=a=b"]  # fmt: skip
    config = load(TrainConfig, path, overrides)
    assert config.geometry == LatentGeometry(compression=10.67, stride=8)
    assert (config.image_size, config.stage_c, config.output_path) == (96, StageCSizes(c_cond=40), "a=b")
    assert config.effnet_checkpoint_path is None


def test_stage_files_may_carry_checked_training_keys(tmp_path: Path) -> None:
    published = {"batch_size": 4, "image_size": 1024, "grad_accum_steps": 1, "webdataset_path": "file:x.tar"}
    path = write(tmp_path, {**STAGE_B, **published})
    assert load_stage_b(path) == StageBConfig(**STAGE_B)
    with pytest.raises(ConfigError, match="'batch_size' must be a whole number, not 'many'"):
        load_stage_b(path, ["batch_size=many"])
    with pytest.raises(ConfigError, match="'batch_sizes' is not a known key; .* 'batch_size'"):
        load_stage_b(path, ["batch_sizes=1"])
    assert "'batch_size' is not a known key" in fail(StageBConfig, path)


widths = st.integers(1, 4096)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        StageCSizes,
        c_cond=widths,
        c_hidden=st.lists(widths, min_size=1, max_size=4).map(tuple),
        blocks=st.tuples(*[st.lists(widths, max_size=4).map(tuple)] * 2),
    ),
    st.floats(1e-12, 1e12),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).filter(
        lambda name: name not in ("", ".", "..")
    ),
)
def test_a_configuration_survives_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: StageCSizes, lr: float, name: str
) -> None:
    values = {**TRAIN, "experiment_id": name, "lr": lr}
    config = TrainConfig(**values, stage_c=sizes, geometry=LatentGeometry(compression=lr))
    text = as_yaml(config)
    assert "!!" not in text or "!!" in name
    path = write(tmp_path_factory.getbasetemp(), text)
    resolved = replace(
        config,
        guidance=guidance_sizes(config),
        previewer=previewer_sizes(config),
        effnet=effnet_sizes(config),
    )
    assert load(TrainConfig, path) == resolved


def test_the_written_configuration_states_the_resolved_sizes(tmp_path: Path) -> None:
    stage_b = load(StageBConfig, write(tmp_path, as_yaml(StageBConfig(**STAGE_B))))
    assert stage_b.stage_b == STAGE_B_VERSIONS["700M"]
    assert isinstance(stage_b.stage_b, StageBSizes)


# ------------------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize(("cls", "values"), EACH)
def test_each_misspelt_key_is_named_with_the_right_one(tmp_path: Path, cls: type, values: dict) -> None:
    for name in (field.name for field in fields(cls)):
        message = fail(cls, write(tmp_path, {**values, f"{name}x": 1}))
        assert f"'{name}x' is not a known key; the nearest known one is '{name}'" in message


@pytest.mark.parametrize(("cls", "values"), EACH)
def test_each_required_key_is_missed_by_name(tmp_path: Path, cls: type, values: dict) -> None:
    for name in (name for name in values if name != "webdataset_path"):
        rest = {key: value for key, value in values.items() if key != name}
        assert f"the required key is missing: '{name}'" in fail(cls, write(tmp_path, rest))
    assert "the required keys are missing: " in fail(cls, write(tmp_path, {"dtype": "float32"}))


def test_training_data_is_named_by_one_of_two_keys(tmp_path: Path) -> None:
    rest = {key: value for key, value in TRAIN.items() if key != "webdataset_path"}
    for values in (rest, {**TRAIN, "scenes": {"count": 3}}):
        assert "one of 'webdataset_path' and 'scenes'" in fail(TrainConfig, write(tmp_path, values))
    assert load(TrainConfig, write(tmp_path, {**rest, "scenes": {"count": 3}})).scenes.count == 3


def test_data_on_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    rest = {key: value for key, value in TRAIN.items() if key != "webdataset_path"}
    drawn = write(tmp_path, {**rest, "scenes": {"count": 3}})
    for overrides in (["webdataset_path=mine"], ["scenes=null", "webdataset_path=mine"]):
        config = load(TrainConfig, drawn, overrides)
        assert (config.webdataset_path, config.scenes) == ("mine", None)
    both = fail(TrainConfig, drawn, "webdataset_path=mine", "scenes.count=5")
    assert "one of 'webdataset_path' and 'scenes'" in both
    assert load(TrainConfig, drawn, ["webdataset_path=null"]).scenes.count == 3
    for override in ("scenes.count=5", "scenes={count: 5}"):
        config = load(TrainConfig, write(tmp_path, TRAIN), [override])
        assert (config.webdataset_path, config.scenes.count) == (None, 5)


def test_what_is_told_in_another_way_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    values = {**TRAIN, "prior_scenes": {"count": 3}, "grad_accum_steps": 2}
    path = write(tmp_path, {**values, "image_size_schedule": [[0, [64]]]})
    config = load(PersonalizedTrainConfig, path, ["prior_path=x", "image_size=96", "pictures_at_once=4"])
    assert (config.prior_path, config.prior_scenes, phases(config)) == ("x", None, ((0, (96,)),))
    assert (config.pictures_at_once, config.grad_accum_steps) == (4, None)
    assert load(PersonalizedTrainConfig, path, ["grad_accum_steps=4"]).pictures_at_once == 1


def test_a_loss_weight_is_a_known_one_and_not_adaptive(tmp_path: Path) -> None:
    values = {**TRAIN, "adaptive_loss_weight": False, "loss_weight": "p2", "loss_weight_shift": 0.5}
    assert load(TrainConfig, write(tmp_path, values)).loss_weight == "p2"
    assert "'p3' is not one of constant, p2" in fail(TrainConfig, write(tmp_path, values), "loss_weight=p3")
    assert "set that to false" in fail(TrainConfig, write(tmp_path, values), "adaptive_loss_weight=true")


@pytest.mark.parametrize(("cls", "values"), EACH)
def test_no_key_takes_a_date(tmp_path: Path, cls: type, values: dict) -> None:
    for name in (field.name for field in fields(cls)):
        message = fail(cls, write(tmp_path, values), f"{name}=2024-05-01")
        assert re.search(rf"'{name}' must be .*, not datetime", message)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=true", "'batch_size' must be a whole number, not True"),
        ("batch_size=4.0", "'batch_size' must be a whole number, not 4.0"),
        ("batch_size=", "'batch_size' must be a whole number, not nothing"),
        ("batch_size=0", "'batch_size' must be above 0, not 0"),
        ("keep=-1", "'keep' must be above 0, not -1"),
        ("ema=1", "'ema' must be at least 0 and below 1, not 1.0"),
        ("lr_end=-1", "'lr_end' must be at least 0, not -1.0"),
        ("seed=-1", "'seed' must be at least 0 and below 9223372036854775808, not -1"),
        ("max_broken=-1", "'max_broken' is a share, 0 to 1, not -1.0"),
        ("experiment_id=..", "'experiment_id' must name a folder, not '..'"),
        ("multi_aspect_ratio=[]", "'multi_aspect_ratio' needs a ratio"),
        ("lr=fast", "'lr' must be a number, not 'fast'"),
        ("lr=.nan", "'lr' must be a number, not nan"),
        ("lr=inf", "'lr' must be a number, not 'inf'"),
        ("lr=true", "'lr' must be a number, not True"),
        ("text_dropout=2.0", "'text_dropout' is a share, 0 to 1, not 2.0"),
        ("use_ddp=1", "'use_ddp' must be true or false, not 1"),
        ("experiment_id=7", "'experiment_id' must be text, not 7"),
        ("image_size=big", "'image_size' must be a whole number or a list whose entries are each a whole"),
        ("image_size=[]", "'image_size' must be above 0, not ()"),
        ("image_size=[64, -64]", "'image_size' must be above 0, not (64, -64)"),
        ("multi_aspect_ratio=[1:2]", "'multi_aspect_ratio[0]' must be text, not 62"),
        ("multi_aspect_ratio=[wide]", "'multi_aspect_ratio' takes ratios such as 2/3, not 'wide'"),
        ("stage_c.blocks=[[1, 2], [2, x]]", "'stage_c.blocks[1][1]' must be a whole number, not 'x'"),
        ("stage_c.blocks=[[1, 2]]", "'stage_c.blocks' must be a list of 2 entries"),
        ("stage_c.n_head=[4]", "'stage_c.n_head' is not a known key; the nearest known one is 'stage_c.nh"),
        ("learning_rate=1", "'learning_rate' is not a known key; the nearest known one is 'lr'"),
        ("Max-Train-Steps=1", "the nearest known one is 'updates'"),
        ("stage_c=4", "'stage_c' must be a mapping with keys such as 'c_cond', not 4"),
        ("geometry.stride=0", "in 'geometry', 'stride' must be above 0, not 0"),
        ("guidance_strength=[[9216, 0.7]]", "'guidance_strength' must list"),
        ("guidance_strength=[[0, 0.3], [9216, 0.7]]", "'guidance_strength' must list"),
        ("guidance_strength=[]", "'guidance_strength' must list"),
        ("target=noise", "'target' must be one of epsilon, x0, v, rectified_flow, not 'noise'"),
        ("dtype=float16", "one of bfloat16, float32, not 'float16' (float16 gives black pictures or NaN"),
        ("model_version=2B", "'model_version' '2B' is not a known one (3.6B, 1B, tiny)"),
        ("lr", "must be written key=value"),
        ("=1", "must be written key=value"),
        ("lr.start=1", "'lr' is a value, not a mapping"),
        ("lr=[1", "this is not YAML"),
        ("lr=2024-13-01", "this is not YAML: month must be in 1..12"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, words: str) -> None:
    assert words in fail(TrainConfig, write(tmp_path, {**TRAIN, "lr": 1e-4}), override)


def test_a_bad_version_of_stage_b_lists_the_known_ones(tmp_path: Path) -> None:
    message = fail(StageBConfig, write(tmp_path, {**STAGE_B, "model_version": "1B"}))
    assert "'model_version' '1B' is not a known one (3B, 700M, tiny)" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "must hold 'key: value' lines, not ['a', 'b']"),
        ("just words", "must hold 'key: value' lines, not 'just words'"),
        ("a: 1\nb: [1, 2\nc: 3\n", "this is not YAML: .* in line 3"),
        ("a: 1\n\tb: 2\n", "this is not YAML: .* in line 2"),
        ("a: !!python/object/apply:os.getcwd []\n", "this is not YAML: could not determine a constructor"),
        ("a: \x00", "this is not YAML: unacceptable character"),
    ],
)
def test_bad_files_are_named_for_what_they_are(tmp_path: Path, text: str, words: str) -> None:
    assert re.search(words.replace("[", r"\[").replace("(", r"\("), fail(StageCConfig, write(tmp_path, text)))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "does not exist" in fail(StageCConfig, tmp_path / "none.yaml")
    assert "cannot be read as text" in fail(StageCConfig, tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x04\xff\xfe")
    assert "cannot be read as text" in fail(StageCConfig, tmp_path / "weights.yaml")


def test_other_dataclasses_load_the_same_way(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Recipe:
        steps: tuple[tuple[int, float], ...]
        train: TrainConfig | None = None

    config = load(Recipe, write(tmp_path, {"steps": [[1, 1], [2, "2e-1"]]}))
    assert config == Recipe(steps=((1, 1.0), (2, 0.2)))
    assert yaml.safe_load(as_yaml(config)) == {"steps": [[1, 1.0], [2, 0.2]], "train": None}
    assert "'train.geometry.stride' must be" in fail(
        Recipe, write(tmp_path, {"steps": [], "train": {**TRAIN, "geometry": {"stride": "x"}}})
    )


# --- paths ----------------------------------------------------------------------------------------


def test_every_key_of_a_file_that_is_written_is_known_as_such() -> None:
    kinds = (TrainConfig, PersonalizedTrainConfig, ControlTrainConfig, StageATrainConfig, StageBTrainConfig,
             StageCTrainConfig, PreviewerTrainConfig, TextTrainConfig, RecogniserTrainConfig)  # fmt: skip
    keys = {field.name for kind in kinds for field in fields(kind) if field.name.endswith("_path")}
    written = {key for key in keys if key.startswith(("export", "output", "cache"))} | {"checkpoint_path"}
    assert written == set(OUTPUT_PATHS)


@pytest.mark.parametrize("mark", [".git", "pyproject.toml", None])
def test_a_path_is_from_the_working_directory_or_from_the_repository_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str | None
) -> None:
    repository, work = tmp_path / "repository", tmp_path / "work"
    for folder in (repository / "configs/own", repository / "models", repository / "data", work):
        folder.mkdir(parents=True)
    for name in ("models/c", "models/effnet", "outputs"):
        (repository / name).touch()
    if mark:
        (repository / mark).touch()
    paths = {"generator_checkpoint_path": "models/c", "effnet_checkpoint_path": "models/effnet",
             "webdataset_path": "data/{000..009}.tar", "clip_text_path": "some/hub_id",
             "checkpoint_path": "outputs", "output_path": "outputs", "cache_path": "data"}  # fmt: skip
    path = write(repository / "configs/own", {**TRAIN, **paths})
    (work / "models").mkdir()
    (work / "models/effnet").touch()
    monkeypatch.chdir(work)
    config = load(TrainConfig, path)
    assert config.generator_checkpoint_path == str(repository / "models/c")
    assert config.effnet_checkpoint_path == "models/effnet"  # it is in the working directory
    assert config.webdataset_path == str(repository / "data/{000..009}.tar")
    assert config.clip_text_path == "some/hub_id"
    assert (config.checkpoint_path, config.output_path, config.cache_path) == ("outputs", "outputs", "data")
    (work / "data").mkdir()
    assert load(TrainConfig, path).webdataset_path == "data/{000..009}.tar"
    monkeypatch.chdir(repository)
    assert load(TrainConfig, "configs/own/some.yaml").generator_checkpoint_path == "models/c"


def test_a_tilde_is_the_home_folder_in_files_and_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(
        tmp_path, {**TRAIN, "checkpoint_path": "~/runs", "webdataset_path": "~/a/{0..9}.tar::~/b.tar"}
    )
    config = load(TrainConfig, "~/some.yaml", ["output_path=~/out", "effnet_checkpoint_path=~"])
    assert (config.checkpoint_path, config.output_path) == (f"{tmp_path}/runs", f"{tmp_path}/out")
    assert config.webdataset_path == f"{tmp_path}/a/{{0..9}}.tar::{tmp_path}/b.tar"
    assert config.effnet_checkpoint_path is None  # a bare ~ is YAML's null
    assert "'output_path', ~no_such_user_/x: no user's home folder" in fail(
        TrainConfig, path, "output_path=~no_such_user_/x"
    )


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "configs/training").glob("*.yaml"), *(ROOT / "configs/tiny").glob("train_*.yaml")],
    ids=lambda path: path.name,
)  # fmt: skip
def test_what_all_trainings_have_in_common_is_read_from_any_file(path: Path) -> None:
    assert load_run(path).experiment_id == yaml.safe_load(path.read_text("utf-8"))["experiment_id"]
    with pytest.raises(ConfigError, match="'lrate' is not a known key"):
        load_run(path, ["lrate=1"])


# ------------------------------------------------------------------------------------------ keys given twice


def test_a_key_that_is_there_twice_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, TRAIN)
    path.write_text(path.read_text("utf-8") + "geometry: {stride: 32, stride: 16}\nlr: 1.0e-4\nlr: 2.0e-4\n")
    config, lines = load(TrainConfig, path), path.read_text("utf-8").count("\n")
    assert (config.lr, config.geometry.stride) == (2e-4, 16)
    assert (
        f"{path}: 'lr' is there twice, in lines {lines - 1} and {lines}: the last counts" in caplog.messages
    )
    assert len(caplog.messages) == 2
