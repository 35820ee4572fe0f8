"""A recipe is validated whole, its errors name the key and what to do, and it survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsmtdf_cache.errors import UsageError
from rsmtdf_cli.bundled import bundled_recipe
from rsmtdf_train.recipe import Recipe, load_recipe, preset_names

BUNDLED = bundled_recipe("sample")


def test_the_bundled_recipe_is_valid_and_comes_back_equal_from_its_own_text(tmp_path: Path) -> None:
    recipe = load_recipe(BUNDLED)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stepz=5", "Did you mean 'steps'"),
        ("optim.lrr=5", "Did you mean 'lr'"),
        ("steps=many", "steps: .*integer"),
        ("steps=0", "steps: .*greater than 0"),
        ("threshold=1.5", "threshold: .*less than or equal to 1"),
        ("method=fixmtch", "method: .*'supervised', 'fixmatch', 'unimatch-v1' or 'unimatch'"),
        ("batch.unlabeled=0", "fixmatch needs batch.unlabeled"),
        ("steps.deep=1", "has no keys to set"),
        ("steps", "write key=value"),
        ("steps=[1", "not YAML"),
        ("distill.keys=[timm-a/s64o0/stage4]", "names an orientation.*write 'timm-a/s64/stage4'"),
        ("distill.keys=['*/s*o?/*']", r"names an orientation.*write '\*/s\*/\*'"),
        ("distill.weights={a/s64o0/b: 2}", "names an orientation.*write 'a/s64/b'"),
    ],
)
def test_a_wrong_override_is_a_usage_error_that_says_what(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe(BUNDLED, [override])


@pytest.mark.parametrize("text", ["- a\n- b\n", "steps: [", "", "\x00"])
def test_a_file_that_is_no_recipe_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


def test_keys_that_are_often_set_take_short_forms() -> None:
    recipe = load_recipe(BUNDLED, ["student=timm:resnet18", "labeled=10", "distill.weight=2", "fuse=true"])
    assert recipe.student.encoder == "timm:resnet18" and recipe.labeled == "10"
    assert recipe.teachers and load_recipe(BUNDLED, ["teachers=efficientnet_lite0,seed=1"]).teachers == (
        "efficientnet_lite0,seed=1",
    )
    short = load_recipe(BUNDLED, ["distill.keys=clip_vitb16/s*/o"]).distill
    assert short is not None and short.keys == ("clip_vitb16/s*/o",)
    assert recipe.distill is not None and recipe.distill.weight == 2 and recipe.fuse is not None


@pytest.mark.parametrize("override", ["distill=false", "targets=none"])
def test_without_distillation_there_is_nothing_to_fuse(override: str) -> None:
    recipe = load_recipe(BUNDLED, [override])
    assert recipe.distill is None and recipe.fuse is None


def test_the_paired_baseline_differs_in_teachers_alone() -> None:
    recipe = load_recipe(BUNDLED)
    plain = recipe.without_distillation()
    changed = {n for n in Recipe.model_fields if getattr(recipe, n) != getattr(plain, n)}
    assert changed == {"distill", "fuse", "probe", "targets"}


def written(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_short_forms_over_a_preset_keep_what_the_preset_says(tmp_path: Path) -> None:
    paper = written(tmp_path, "{preset: paper, data: d}")
    short = written(tmp_path, "{preset: paper, data: d, student: dinov2_vitb14, distill: true}")
    assert short.distill == paper.distill
    assert short.student == paper.student.model_copy(update={"encoder": "dinov2_vitb14"})
    cached = written(tmp_path, "{preset: cached, data: d}", "probe=true")
    assert cached == written(tmp_path, "{preset: cached, data: d}")


def test_ablation_presets_differ_from_the_paper_in_what_they_are_named_for(tmp_path: Path) -> None:
    paper = written(tmp_path, "{preset: paper, data: d}")
    changed = {}
    for name in preset_names():
        if name.startswith("paper-"):
            other = written(tmp_path, f"{{preset: {name}, data: d}}")
            changed[name] = {n for n in Recipe.model_fields if getattr(other, n) != getattr(paper, n)}
    assert changed == {
        "paper-dino-only": {"teachers", "distill"},
        "paper-clip-only": {"teachers"},
        "paper-distill-only": {"fuse"},
        "paper-none": {"teachers", "targets", "distill", "fuse"},
        "paper-supervised": {"teachers", "targets", "distill", "fuse", "method"},
    }


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'paper'.*paper-none"):
        written(tmp_path, "{preset: papr, data: d}")


@pytest.mark.parametrize("override", ["epochs=.inf", "epochs=1e300", "unlabeled_weight=.nan", "optim.lr=.inf",
                                      "distill.weights={'*/*/*': -1}", "distill.passes={'*/*/*': 0}"])  # fmt: skip
def test_numbers_that_cannot_be_are_refused(override: str) -> None:
    with pytest.raises(UsageError):
        load_recipe(BUNDLED, ["steps=null", override] if "epochs" in override else [override])


def test_a_labelled_subset_is_a_name_also_when_it_looks_like_a_number() -> None:
    assert load_recipe(BUNDLED, ["labeled=010"]).labeled == "010"
    assert load_recipe(BUNDLED, ["labeled='5'"]).labeled == "5"
