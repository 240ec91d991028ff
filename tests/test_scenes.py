"""The procedural world: what scenes can be, splits, captions, and the same pictures at any size."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from core.config.schema import RunConfig, SceneData
from core.data.sources import open_data
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.drawn import DrawnScenes
from core.scenes.scene import ATTRIBUTES, EXTRA_SUBJECTS, LIGHTS, Scene, is_held_out, labels, sample_scene

SCENE = Scene("day", "sun", "hills", "house", "red", "right", "large", 3)
WORDS = {  # attribute value -> what a caption can say for it
    "day": ("day",),
    "dusk": ("dusk", "evening"),
    "night": ("night",),
    "overcast": ("overcast", "grey"),
    "sun": ("sun", "sunny"),
    "moon": ("moon", "moonlit"),
    "stars": ("stars", "starry"),
    "clouds": ("clouds", "cloudy"),
    "clear": ("clear", "plain", "even"),
    "mountains": ("mountains",),
    "hills": ("hills",),
    "sea": ("sea",),
    "field": ("field",),
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "boat": ("boat",),
    "lighthouse": ("lighthouse",),
    "windmill": ("windmill",),
    "balloon": ("balloon",),
    **{colour: (colour,) for colour in ATTRIBUTES["colour"]},
    "left": ("left",),
    "centre": ("centre", "middle"),
    "right": ("right",),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
DRAWN = [  # every value of every attribute, on a few pictures
    SCENE,
    Scene("night", "moon", "sea", "lighthouse", "blue", "left", "large", 5),
    Scene("dusk", "clouds", "field", "tree", "pink", "centre", "large", 7),
    Scene("night", "stars", "mountains", "windmill", "yellow", "right", "small", 8),
    Scene("overcast", "clear", "sea", "boat", "white", "left", "small", 9),
    Scene("day", "clouds", "hills", "balloon", "purple", "centre", "small", 10),
    Scene("dusk", "moon", "mountains", "striped balloon", "red", "left", "large", 11),
    Scene("overcast", "clouds", "field", "house", "blue", "right", "small", 12),
]


def words(text: str) -> list[str]:
    return text.replace(",", " ").replace(":", " ").split()


def shrunk(picture: np.ndarray, factor: int) -> np.ndarray:
    """The mean over boxes of factor x factor pixels."""
    height, width, _ = picture.shape
    return picture.reshape(height // factor, factor, width // factor, factor, 3).mean((1, 3))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def pairs(scenes: list[Scene]) -> set[tuple[str, str]]:
    rows = [[f"{name} {getattr(scene, name)}" for name in ATTRIBUTES] for scene in scenes]
    return {pair for row in rows for pair in itertools.combinations(row, 2)}


def possible_scenes() -> list[Scene]:
    """One scene of every possible combination of values."""
    scenes = []
    for sky, light, land, subject, *rest in itertools.product(*ATTRIBUTES.values()):
        if light in LIGHTS[sky] and (subject != "boat" or land == "sea"):
            scenes.append(Scene(sky, light, land, subject, *rest, seed=0))
    return scenes


# ---- descriptions and splits --------------------------------------------------------------------------


def test_sampling_is_deterministic_and_the_splits_are_disjoint() -> None:
    train = [sample_scene(seed) for seed in range(2000)]
    held_out = [sample_scene(seed, "held_out") for seed in range(500)]
    assert train == [sample_scene(seed, "train") for seed in range(2000)]
    assert len({scene.seed for scene in train}) == 2000
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))

    def combination(scene: Scene) -> tuple[str, ...]:
        return scene.subject, scene.colour, scene.land, scene.sky

    assert not set(map(combination, train)) & set(map(combination, held_out))


def test_subjects_come_as_often_as_they_are_listed() -> None:
    often = Counter(
        sample_scene(n, subjects=["tree", "balloon", "balloon", "balloon"]).subject for n in range(400)
    )
    assert set(often) == {"tree", "balloon"} and 260 < often["balloon"] < 340
    data = DrawnScenes(SceneData(subjects=("boat",)), ((16, 16),))
    assert all("boat" in data.read(n, (16, 16), (n,)).caption for n in range(20))
    for wrong in (("castle",), ()):
        with pytest.raises(ValueError, match="'subjects' of scenes are some of house, .*, balloon, not"):
            DrawnScenes(SceneData(subjects=wrong), ((16, 16),))


def test_about_a_tenth_is_held_out_and_training_shows_every_pair_of_values() -> None:
    every = possible_scenes()
    train = [scene for scene in every if not is_held_out(scene)]
    held_out = [scene for scene in every if is_held_out(scene)]
    assert 0.07 < len(held_out) / len(every) < 0.13
    assert pairs(train) == pairs(every)
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in held_out} == set(values)


def test_the_sampler_shows_every_pair_and_no_value_is_rare() -> None:
    scenes = [sample_scene(seed) for seed in range(4000)]
    assert pairs(scenes) == pairs(possible_scenes())
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.4 * 4000 / len(values)


def test_labels_are_positions_in_the_attributes() -> None:
    assert labels(SCENE) == (0, 0, 1, 0, 0, 2, 1)
    striped = replace(SCENE, subject=EXTRA_SUBJECTS[0])
    assert labels(striped)[3] == len(ATTRIBUTES["subject"])
    assert not is_held_out(striped)


def test_scenes_and_functions_can_be_sent_to_a_worker() -> None:
    assert pickle.loads(pickle.dumps(SCENE)) == SCENE
    assert pickle.loads(pickle.dumps(render)) is render


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "green"}, "colour 'green' is not one of red, yellow, blue"),
        ({"subject": "castle"}, "subject 'castle' is not one of house, .*, balloon, striped balloon"),
        ({"light": "moon"}, "light of a day sky 'moon' is not one of sun, clouds, clear"),
        ({"subject": "boat"}, "land of a boat 'hills' is not one of sea"),
        ({"seed": -1}, "seed -1 is not a whole number of at least 0"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_the_allowed_ones(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SCENE, **change)


def test_other_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="split 'test' is not one of train, held_out"):
        sample_scene(0, "test")
    with pytest.raises(ValueError, match="8 x 64 pixels are too few"):
        render(SCENE, 8, 64)


def test_what_scenes_are_drawn_with_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("drawn", "drawing", "subjects", "pen"):
        monkeypatch.delitem(sys.modules, f"core.scenes.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "skia", None)
    config = RunConfig(experiment_id="x", checkpoint_path="c", scenes=SceneData())
    with pytest.raises(ImportError, match="pip install skia-python"):
        open_data(config)


# ---- captions -----------------------------------------------------------------------------------------


def test_captions_state_every_attribute_and_no_other_value() -> None:
    by_attribute = {name: {v: WORDS[v] for v in values} for name, values in ATTRIBUTES.items()}
    for seed in range(4000):
        scene = sample_scene(seed)
        said = set(words(caption(scene, seed)))
        for name, values in by_attribute.items():
            found = {value for value, synonyms in values.items() if said & set(synonyms)}
            if scene.sky == "overcast":
                found.discard("day")  # an overcast day
            assert found == {getattr(scene, name)}, caption(scene, seed)


def test_captions_are_short_plain_and_varied() -> None:
    texts = [caption(sample_scene(seed), seed) for seed in range(4000)]
    assert max(len(words(text)) for text in texts) <= 40
    assert len({word for text in texts for word in words(text)}) <= 300
    assert all(text == text.lower() and "{" not in text for text in texts)
    assert len({caption(SCENE, seed) for seed in range(200)}) > 150
    assert caption(SCENE, 5) == caption(SCENE, 5)


def test_a_caption_of_an_extra_subject_names_it_without_a_colour() -> None:
    striped = replace(SCENE, subject="striped balloon", colour="purple")
    for seed in range(50):
        said = words(caption(striped, seed))
        assert {"striped", "balloon", "hills", "right"} <= set(said)
        assert "purple" not in said


def test_a_caption_can_leave_out_the_colour_alone() -> None:
    for seed in range(200):
        scene = sample_scene(seed)
        said = [word for word in words(caption(scene, seed)) if word != scene.colour]
        assert words(caption(scene, seed, with_colour=False)) == said


def test_a_share_of_drawn_pictures_is_captioned_without_colour() -> None:
    data = DrawnScenes(SceneData(without_colour=0.5), ((16, 16),))
    told = [sample_scene(n).colour in words(data.read(n, (16, 16), (n,)).caption) for n in range(200)]
    assert 70 < sum(told) < 130
    with pytest.raises(ValueError, match=r"'without_colour' is a share, 0 to 1, not 1\.5"):
        SceneData(without_colour=1.5)


# ---- pictures -----------------------------------------------------------------------------------------


def test_pictures_are_deterministic_and_depend_on_every_attribute() -> None:
    picture = render(SCENE, 96, 96)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous
    assert (picture == render(SCENE, 96, 96)).all()
    for change in (
        {"sky": "dusk"},
        {"light": "clear"},
        {"land": "field"},
        {"subject": "windmill"},
        {"colour": "blue"},
        {"place": "left"},
        {"size": "small"},
        {"seed": 4},
    ):
        assert psnr(picture, render(replace(SCENE, **change), 96, 96)) < 30


@pytest.mark.parametrize("scene", DRAWN, ids=lambda scene: f"{scene.sky}-{scene.land}-{scene.subject}")
def test_every_size_shows_the_same_picture(scene: Scene) -> None:
    small = render(scene, 128, 128)
    assert psnr(shrunk(render(scene, 1024, 1024), 8), small) > 26
    assert psnr(shrunk(render(scene, 256, 256), 2), small) > 26
    wide, tall = render(scene, 128, 256), render(scene, 192, 96)
    assert psnr(shrunk(render(scene, 512, 1024), 4), wide) > 26
    assert psnr(shrunk(render(scene, 768, 384), 4), tall) > 26


def test_large_pictures_have_detail_that_small_ones_cannot_hold() -> None:
    for scene in DRAWN:
        large = render(scene, 512, 512).astype(float)
        enlarged = shrunk(large, 4).repeat(4, 0).repeat(4, 1)
        assert np.abs(large - enlarged).mean() > 1.0


@pytest.mark.parametrize("subject", ATTRIBUTES["subject"])
def test_the_subject_is_where_and_as_large_as_described(subject: str) -> None:
    """The coloured part of the subject is what a change of the colour changes."""
    heights = {"small": [], "large": []}
    for seed, (size, (place, middle)) in enumerate(
        itertools.product(heights, {"left": 32, "centre": 64, "right": 96}.items())
    ):
        scene = Scene("day", "clear", "sea", subject, "red", place, size, seed)
        change = np.abs(render(scene, 128, 128).astype(int) - render(replace(scene, colour="blue"), 128, 128))
        rows, columns = np.nonzero(change.sum(2) > 60)
        assert abs(np.median(columns) - middle) < 12
        heights[size].append(np.ptp(rows) + 1)
    assert min(heights["small"]) >= 14  # a house's walls, without its roof
    assert min(heights["large"]) > 1.6 * max(heights["small"])


@pytest.mark.parametrize("sky", ATTRIBUTES["sky"])
@pytest.mark.parametrize("colour", ATTRIBUTES["colour"])
def test_the_colour_of_the_subject_can_be_told_under_every_sky(colour: str, sky: str) -> None:
    """The mean colour of a small subject is nearer to its own than to the other five."""
    from core.scenes.subjects import COLOURS

    scene = Scene(sky, LIGHTS[sky][-1], "hills", "balloon", colour, "centre", "small", 2)
    other = "blue" if colour == "red" else "red"
    picture = render(scene, 128, 128).astype(int)
    changed = np.abs(picture - render(replace(scene, colour=other), 128, 128)).sum(2) > 100
    seen = picture[changed].mean(0)
    nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - seen).sum())
    assert nearest == colour


def test_a_window_is_cut_out_of_the_whole_picture() -> None:
    scene = sample_scene(3)
    whole, part = render(scene, 256, 256), render(scene, 256, 256, (60, 100, 64, 32))
    assert part.shape == (64, 32, 3)
    assert np.abs(whole[60:124, 100:132].astype(int) - part).max() <= 24  # antialiasing rounds otherwise
