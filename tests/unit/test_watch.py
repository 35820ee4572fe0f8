"""Signs of a run that goes wrong."""

from __future__ import annotations

from rsmtdf_train.recipe import Recipe
from rsmtdf_train.watch import Watch


def watch(steps: int) -> Watch:
    return Watch(Recipe.model_validate({"data": "d", "steps": steps, "threshold": 0.9}))


def test_a_long_time_without_a_confident_pixel_is_said_once_with_what_to_do() -> None:
    one = watch(700)
    said = [one.see(step, {"mask_ratio": 0.0}) for step in range(300)]
    [text] = [t for t in said if t is not None]
    assert said[69] == text, "a tenth of the run"
    assert "threshold of 0.9 in the last 70 steps" in text and "Lower threshold" in text


def test_a_confident_pixel_now_and_then_is_enough_and_other_steps_do_not_count() -> None:
    one = watch(100)
    assert one.patience == 50, "not sooner"
    ratios: list[dict[str, float]] = [{"mask_ratio": float(step % 40 == 0)} for step in range(120)]
    assert not any(one.see(step, values) for step, values in enumerate(ratios))
    assert not any(one.see(step, {"loss": 1.0}) for step in range(200)), "distillation alone has no pseudo-labels"
    assert watch(10**6).patience == 1000
