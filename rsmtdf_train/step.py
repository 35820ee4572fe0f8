"""One step of FixMatch with distillation (RS-MTDF section III; FixMatch, Sohn et al. 2020; CutMix, Yun et al. 2019)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rsmtdf_train.fused_student import FusedStudent
from rsmtdf_train.losses import pseudo_label_loss
from rsmtdf_train.objective import TermWeights, combine, distill_term, term_weights
from rsmtdf_train.prepare import PERTURBED, Part, Prepared, StepTools, prepare
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.seeds import step_seed
from rsmtdf_train.state import TrainState, set_learning_rates, update_ema

__all__ = ["channel_dropout", "complementary_masks", "train_step"]

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

#: UniMatch (Yang et al. 2023): share of the weak view's channels that are dropped.
_DROPPED_CHANNELS = 0.5

#: UniMatch V2 (Yang et al. 2025): half of the channels go to each strong view, in half of the crops.
_DROPPED_CROPS = 0.5


def train_step(
    state: TrainState,
    parts: Sequence[Part],
    recipe: Recipe,
    tools: StepTools,
    processes: Processes | None = None,
) -> dict[str, Tensor | float]:
    """Advance ``state`` by one step and return what the log shows; tensors are scalars still on the device.

    ``parts`` are this process's share of the step's batch, in pieces that fit its memory: neither their number and
    sizes nor the number of processes change the loss (a sum over all of them), up to rounding and to what looks at its
    own piece alone: batch norm, OHEM and Dice, complementary dropout, ``fuse.drop``. Raises ``ValueError`` for a batch
    of another step.
    """
    if any(part.step != state.step for part in parts):
        raise ValueError(f"batch of step {parts[0].step} at step {state.step}")
    world = processes or Processes()
    torch.manual_seed(step_seed(recipe.seed, state.step, world.rank))
    lr = set_learning_rates(state.optimizer, recipe.optim, state.step, recipe.total_steps)
    weights = term_weights(recipe, state.step)
    device = parts[0].labeled.image.device
    autocast = _AUTOCAST.get(recipe.precision)

    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        prepared = [prepare(state, part, recipe, weights, tools) for part in parts]
    divisors = _divisors(prepared, world)

    state.optimizer.zero_grad(set_to_none=True)
    logs: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    crops = recipe.batch.labeled if world.count > 1 else sum(len(part.labeled.image) for part in parts)
    for one in prepared:
        share = world.count * len(one.labeled.image) / crops
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            terms, cosines = _terms(state.student, one, recipe, weights, tools, divisors, share)
            loss = combine(weights, terms)
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for name, value in {"loss": loss, **{f"loss_{k}": v for k, v in terms.items()}, **cosines}.items():
            logs[name] = logs[name] + value.detach()

    world.average_gradients(state.student.parameters())
    state.scaler.unscale_(state.optimizer)
    if recipe.optim.clip_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(state.student.parameters(), recipe.optim.clip_norm)
        logs["grad_norm"] = norm.detach()  # of the averaged gradients, so the same everywhere
    state.scaler.step(state.optimizer)
    state.scaler.update()
    world.average_buffers(state.student)
    update_ema(state.ema, state.student, state.step, recipe.ema.decay)
    state.step += 1
    return _logged(logs, prepared, state.student, lr, world)


def channel_dropout(channels: Sequence[int], crops: int, device: torch.device) -> list[Tensor]:
    """Return a factor ``[crops, S, 1, 1]`` for each map: 0 or 2 by chance (UniMatch, section 3.2).

    Drawn from torch's global generator, which the step has seeded.
    """
    kept = 1 - _DROPPED_CHANNELS
    return [torch.bernoulli(torch.full((crops, n, 1, 1), kept, device=device)) / kept for n in channels]


def complementary_masks(channels: Sequence[int], crops: int, device: torch.device) -> list[Tensor]:
    """Return a factor ``[2 * crops, S, 1, 1]`` for each map: crop i keeps in its second view what the first one drops.

    Kept channels count double; the other half of the crops keeps all (UniMatch V2, section III-C). Drawn from torch's
    global generator, which the step has seeded.
    """
    untouched = torch.randperm(crops, device=device)[: crops - int(crops * _DROPPED_CROPS)]
    masks = []
    for count in channels:
        first = torch.bernoulli(torch.full((crops, count), 0.5, device=device)) * 2
        second = 2 - first
        first[untouched] = 1
        second[untouched] = 1
        masks.append(torch.cat([first, second])[:, :, None, None])
    return masks


def _terms(
    student: FusedStudent,
    prepared: Prepared,
    recipe: Recipe,
    weights: TermWeights,
    tools: StepTools,
    divisors: Mapping[str, Tensor],
    share: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of one part by the names of ``TermWeights``, and the cosines of the log.

    One pass of the student over [labelled; strong; perturbed views]; one more of its encoder over what is distilled
    and was not among them.
    """
    terms: dict[str, Tensor] = {}
    distilled: list[Tensor] = []  # what translators see of what is distilled, target by target
    labeled, count = prepared.labeled, len(prepared.labeled.image)
    side = labeled.image.shape[-2]
    size = (side, labeled.image.shape[-1])
    if weights.segments:
        images = torch.cat([labeled.image, *(view.image for view in prepared.views.values())])
        encoded = student.encode(images)
        # the first strong view is distilled, unless the weak one is
        shown = count + (len(prepared.mixed[0].image) if prepared.extra is None and prepared.mixed else 0)
        hidden = student.hidden(encoded if student.fuses else encoded.first(shown))
        distilled = [h[:shown] for h in hidden]
        masks = _channel_masks(recipe.method, encoded.maps, count, prepared)
        logits = student.decode(encoded, hidden, size, masks)
        terms["labeled"] = tools.supervised(logits[:count], labeled.label, divisors["labeled"], share)
        if prepared.views:
            terms["unlabeled"] = _unlabeled_term(logits[count:], prepared, recipe.threshold, divisors)
        if prepared.privileged is not None and student.fusion is not None:
            known = encoded.first(count)
            mine = student.translations([h[:count] for h in hidden])
            true = student.fusion.true_translations(prepared.privileged, mine, side)
            terms["privileged"] = tools.supervised(
                student.decode(known, true, size), labeled.label, divisors["labeled"], share
            )
    if prepared.targets is None or recipe.distill is None or student.fusion is None:
        return terms, {}
    if prepared.extra is not None:
        more = student.hidden(student.encode(prepared.extra))
        distilled = [torch.cat(pair) for pair in zip(distilled, more, strict=True)] if distilled else more
    translated = student.translations(distilled)  # of nothing else: fusion needs no teacher's channels
    by_key = {key: divisors[f"distill/{key}"] for key in translated}
    terms["distill"], cosines = distill_term(recipe.distill, student.align(translated, side), prepared.targets, by_key)
    return terms, cosines


def _unlabeled_term(logits: Tensor, prepared: Prepared, threshold: float, divisors: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of the strong views; the perturbed one is half of the term (UniMatch, equation 5)."""
    views = prepared.views
    losses = {
        name: pseudo_label_loss(chunk, v.pseudo, v.confidence, v.valid, threshold, denominator=divisors[name])
        for (name, v), chunk in zip(views.items(), logits.chunk(len(views)), strict=True)
    }
    perturbed = losses.pop(PERTURBED, None)
    strong = torch.stack(list(losses.values())).mean()
    return strong if perturbed is None else (strong + perturbed) / 2


def _channel_masks(method: str, maps: Sequence[Tensor], labeled: int, prepared: Prepared) -> list[Tensor] | None:
    """Return factors ``[B, S, 1, 1]`` of the encoder's maps for the main pass; None: no channel is dropped."""
    if not prepared.mixed or (method != "unimatch" and prepared.perturbed is None):
        return None
    channels, device = [m.shape[1] for m in maps], maps[0].device
    crops = len(prepared.mixed[0].image)
    if method == "unimatch":
        whole, drawn = labeled, complementary_masks(channels, crops, device)
    else:
        whole, drawn = labeled + crops * len(prepared.mixed), channel_dropout(channels, crops, device)
    return [torch.cat([mask.new_ones(whole, *mask.shape[1:]), mask]) for mask in drawn]


def _divisors(prepared: Sequence[Prepared], world: Processes) -> dict[str, Tensor]:
    """Return what each sum is divided by: the count over all parts and processes, over the number of processes.

    Gradients are averaged over processes, so that their losses add up to the loss of the whole batch.
    """
    names = sorted(prepared[0].counts)
    mine = [torch.stack([one.counts[name].double() for one in prepared]).sum() for name in names]
    return {
        name: torch.where(total > 0, total / world.count, 1.0).float()  # nothing counts: 0 of 1
        for name, total in zip(names, world.add_up(mine), strict=True)
    }


def _logged(
    logs: Mapping[str, Tensor], prepared: Sequence[Prepared], student: FusedStudent, lr: float, world: Processes
) -> dict[str, Tensor | float]:
    """Return the numbers of the step, over all parts and processes."""
    zero = torch.zeros_like(logs["loss"])
    terms = ("loss", "loss_labeled", "loss_unlabeled", "loss_distill")
    means = {**{name: logs.get(name, zero) for name in terms}, **logs}
    sums = {
        name: tuple(torch.stack([one.sums[name][i].double() for one in prepared]).sum() for i in (0, 1))
        for name in prepared[0].sums
    }
    if world.count > 1:
        flat = world.add_up([*means.values(), *(value for pair in sums.values() for value in pair)])
        means = {name: flat[i] / world.count for i, name in enumerate(means)}
        rest = flat[len(means) :]
        sums = {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(sums)}
    result: dict[str, Tensor | float] = {**means, "lr": lr}
    if "mask_ratio" in sums:
        used, valid = sums["mask_ratio"]
        result["mask_ratio"] = used / valid.clamp(min=1)
    if "pseudo_accuracy" in sums:
        right, known = sums["pseudo_accuracy"]
        result["pseudo_accuracy"] = right / known  # NaN: nothing to judge
    if student.fusion is not None:
        result |= {f"gate/{key}": gate for key, gate in student.fusion.gates().items()}
    return result
