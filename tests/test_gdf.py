"""gdf against the reference numbers, and the laws that hold for any numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gdf import loss_weights, noise_conditions, samplers, schedules
from gdf.diffusion import diffuse, pyramid_noise, sample_losses
from gdf.samplers import CfgSettings, Estimate, Step, combine_cfg, denoiser, sample, steps
from gdf.scalers import expand_like, linear_interpolation, variance_preserving
from gdf.targets import EPSILON, V, target_named

REFERENCE = Path(__file__).parent / "reference"
TABLES = json.loads((REFERENCE / "gdf_values.json").read_text())
VALUES = {name: torch.tensor(values) for name, values in TABLES.items()}
TOLERANCE = 2e-6

CURVES = "cosine tan_cosine square_root rectified_flow edm linear stable_diffusion".split()
SCHEDULES = [getattr(schedules, name) for name in CURVES]
SCALERS = [variance_preserving, linear_interpolation]

quick = settings(max_examples=40, deadline=None)
times = st.floats(0, 1, width=32)
seeds = st.integers(0, 2**31)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- reference numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_cosine_agrees_with_the_reference_to_the_last_bits(shift):
    logsnr = schedules.logsnr_at(schedules.cosine, VALUES["t"], shift=float(shift))
    r = noise_conditions.cosine_t(logsnr)
    torch.testing.assert_close(logsnr, VALUES[f"cosine_logsnr_shift{shift}"], rtol=2.5e-7, atol=1e-7)
    torch.testing.assert_close(r, VALUES[f"noise_cond_shift{shift}"], rtol=2.5e-7, atol=1e-7)


TABLED = {
    "schedule_sqrt": schedules.square_root,
    "schedule_rectified": schedules.rectified_flow,
    "schedule_edm_sample": schedules.edm,
    "schedule_linear": schedules.linear,
    "schedule_stable_diffusion": schedules.stable_diffusion,
    "noise_cond_edm": noise_conditions.edm,
    "noise_cond_sigmoid": noise_conditions.sigmoid,
    "noise_cond_logsnr": noise_conditions.raw,
    "noise_cond_edm_sigma": noise_conditions.edm_sigma,
    "noise_cond_rectified": noise_conditions.rectified_flow,
    "loss_weight_adaptive_fresh": loss_weights.AdaptiveLossWeight(),
    "vp_a": lambda logsnr: variance_preserving(logsnr)[0],
    "vp_b": lambda logsnr: variance_preserving(logsnr)[1],
}
WEIGHTS = "p2 constant snr snr_plus_one min_snr min_snr_plus_one truncated_snr sech debiased sigmoid".split()
TABLED |= {f"loss_weight_{name}": getattr(loss_weights, name) for name in WEIGHTS}
INPUTS = {"schedule": "t", "vp": "cosine_logsnr_shift1"}


@pytest.mark.parametrize("table", TABLED)
def test_functions_agree_with_the_reference(table):
    inputs = VALUES[INPUTS.get(table.split("_")[0], "logsnr_grid")]
    expected = VALUES[table]  # Stable Diffusion's leaves t = 0 out
    ours = TABLED[table](inputs[: len(expected)])
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_adaptive_loss_weight_agrees_with_the_reference():
    weight = loss_weights.AdaptiveLossWeight()
    weight.update(torch.tensor([-3.0, 0.0, 5.0]), torch.tensor([0.5, 2.0, 0.1]))
    after = weight(torch.tensor([-3.0, 0.0, 5.0, 7.0]))
    torch.testing.assert_close(after, VALUES["adaptive_after_update"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 1.0), ("ddim_eta_half", 0.5)])
def test_one_step_agrees_with_the_reference(name, eta):
    tensors = load_file(REFERENCE / "ddpm_step.safetensors")
    logsnr = schedules.cosine(torch.tensor([0.6, 0.35]))
    a, b = variance_preserving(logsnr)
    step = Step(0, 2, 0.6, 0.35, logsnr[0], logsnr[1], a[0], b[0], a[1], b[1])
    x0, epsilon, z = (tensors[f"inputs/{part}"] for part in ("x0", "epsilon", "z"))
    ours = samplers.ddim_with(eta)(x0, Estimate(x0, epsilon), step, None, lambda _: z)
    torch.testing.assert_close(ours, tensors[f"outputs/{name}"], rtol=0, atol=TOLERANCE)


# --- schedules, scalers, conditions ----------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@quick
@given(first=times, second=times, shift=st.floats(0.2, 8))
def test_schedules_fall_in_t_and_stay_between_their_ends(schedule, first, second, shift):
    t = torch.tensor([0.0, min(first, second), max(first, second), 1.0])
    plain = schedule(t)
    shifted = schedules.logsnr_at(schedule, t, shift)
    assert plain.dtype == torch.float32 and plain.isfinite().all()
    assert (plain.diff() <= 1e-3).all() and plain[0] > plain[-1]  # the tangent's rounding reaches 4e-4
    assert (shifted >= plain[-1]).all() and (shifted <= plain[0]).all()
    mixed = schedules.interpolate(schedule, schedules.linear)(t)
    assert mixed[0] == 10 and mixed[-1] == plain[-1]


def test_tan_cosine_spans_its_range_in_logsnr():
    ends = schedules.tan_cosine(torch.tensor([0.0, 0.5, 1.0]), logsnr_range=8.0)
    torch.testing.assert_close(ends, torch.tensor([8.0, 0.0, -8.0]), rtol=0, atol=1e-4)


@quick
@given(t=st.floats(0.01, 0.98))
def test_cosine_t_inverts_the_cosine_schedule(t):
    t = torch.tensor(t)
    torch.testing.assert_close(noise_conditions.cosine_t(schedules.cosine(t)), t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaler", SCALERS)
@quick
@given(logsnr=st.floats(-14, 14, width=32))
def test_scalers_have_the_logsnr_they_were_given(scaler, logsnr):
    a, b = scaler(torch.tensor(logsnr))
    assert 2 * (a / b).log().item() == pytest.approx(logsnr, abs=1e-4)


def test_the_linear_scaler_is_the_rectified_condition():
    logsnr = torch.linspace(-9, 9, 200)  # without 0
    a, b = linear_interpolation(logsnr)
    torch.testing.assert_close(a, noise_conditions.rectified_flow(logsnr), rtol=0, atol=1e-5)
    torch.testing.assert_close(a + b, torch.ones(200))
    near_zero = noise_conditions.rectified_flow(torch.linspace(-1e-3, 1e-3, 999))
    assert (near_zero - 0.5).abs().max() < 1e-3


def test_discrete_condition_gives_the_nearest_level():
    levels = noise_conditions.discrete(noise_conditions.raw, 5)(torch.tensor([-0.1, 0.0, 0.13, 0.7, 1.2]))
    assert levels.dtype == torch.int64 and levels.tolist() == [0, 0, 1, 3, 4]


def test_training_times_are_repeatable_and_cover_the_range():
    t = schedules.draw_times(4000, rng(3))
    assert torch.equal(t, schedules.draw_times(4000, rng(3)))
    assert t.min() >= 0.001 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.02
    logsnr = schedules.draw_edm_logsnr(4000, rng(3))
    assert abs(logsnr.mean() + 2.4) < 0.15 and abs(logsnr.std() - 2.4) < 0.1


@pytest.mark.parametrize("name", ["epsilon", "x0", "v", "rectified_flow"])
@pytest.mark.parametrize("scaler", SCALERS)
@quick
@given(seed=seeds, logsnr=st.floats(-5, 5, width=32))
def test_read_outs_recover_what_was_mixed(name, scaler, seed, logsnr):
    x0, epsilon, logsnr = *torch.randn(2, 2, 3, 4, 4, generator=rng(seed)), torch.tensor([logsnr, -logsnr])
    a, b = (expand_like(factor, x0) for factor in scaler(logsnr))
    x = diffuse(x0, epsilon, logsnr, scaler)
    target = target_named(name)
    prediction = target.of(x0, epsilon, a, b)
    torch.testing.assert_close(target.x0(x, prediction, a, b), x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(target.epsilon(x, prediction, a, b), epsilon, rtol=0, atol=1e-4)


# --- the loop and its rules ------------------------------------------------------------------------


def knows_it_all(x0: torch.Tensor) -> samplers.Denoise:
    return lambda x, step: Estimate(x0, (x - step.a * x0) / step.b)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@quick
@given(seed=seeds, count=st.integers(1, 30), shift=st.sampled_from([0.1, 1.0, 2.0, 8.0]))
def test_a_pass_with_a_perfect_denoiser_returns_x0(name, seed, count, shift):
    x0, epsilon, z = torch.randn(3, 1, 2, 4, 4, generator=rng(seed))
    plan = steps(schedules.cosine, count, shift)
    x = plan[0].a * x0 + plan[0].b * epsilon
    drawn: list[torch.Tensor] = []
    sampled = sample(knows_it_all(x0), x, plan, samplers.sampler_named(name), lambda _: drawn.append(z) or z)
    assert torch.equal(sampled.x0, x0)
    if not drawn:  # deterministic rules keep the noise that they were given
        end = plan[-1].a_next * x0 + plan[-1].b_next * epsilon
        torch.testing.assert_close(sampled.x, end, rtol=0, atol=1e-4)
    assert sampled.x.isfinite().all()


@pytest.mark.parametrize("rule", [samplers.ddpm, samplers.lcm])
def test_ddpm_and_lcm_draw_noise_at_every_step(rule):
    x0, start, *noise = torch.randn(9, 1, 2, 4, 4, generator=rng())
    plan, left = steps(schedules.cosine, len(noise)), iter(noise)
    sampled = sample(knows_it_all(x0), start, plan, rule, lambda _: next(left))
    assert next(left, None) is None
    if rule is samplers.lcm:  # the last noise is all that it keeps
        last_noise = (sampled.x - plan[-1].a_next * x0) / plan[-1].b_next
        torch.testing.assert_close(last_noise, noise[-1], rtol=0, atol=2e-3)


def gaussian_error(rule: samplers.Rule, count: int, deviation: float = 0.5) -> float:
    """How far a pass ends from the exact flow of data with this standard deviation."""

    def denoise(x, step):
        x0 = x * step.a * deviation**2 / (step.a**2 * deviation**2 + step.b**2)
        return Estimate(x0, (x - step.a * x0) / step.b)

    plan = steps(lambda t: 4 - 8 * t, count)
    start = torch.hypot(plan[0].a * deviation, plan[0].b).double().view(1, 1)
    exact = torch.hypot(plan[-1].a_next * deviation, plan[-1].b_next)
    return (sample(denoise, start, plan, rule).x / exact - 1).abs().item()


def test_dpmpp_2m_converges_in_second_order_and_ddim_in_first():
    for rule, order in ((samplers.ddim, 1), (samplers.dpmpp_2m, 2)):
        found = math.log2(gaussian_error(rule, 20) / gaussian_error(rule, 40))
        assert found == pytest.approx(order, abs=0.25)
    assert gaussian_error(samplers.dpmpp_2m, 20) < gaussian_error(samplers.ddim, 20) / 5


def test_dpmpp_2m_takes_its_last_step_in_first_order_only_in_short_passes():
    x, now, before = torch.randn(3, 1, 4, generator=rng())
    zero = torch.zeros(1, 4)
    for count, first_order in ((14, True), (15, False)):
        plan = steps(schedules.cosine, count)
        step, previous = plan[-1], (Estimate(before, zero), plan[-2])
        with_history = samplers.dpmpp_2m(x, Estimate(now, zero), step, previous, torch.randn_like)
        without = samplers.dpmpp_2m(x, Estimate(now, zero), step, None, torch.randn_like)
        assert torch.equal(with_history, without) == first_order


def test_heun_converges_in_second_order():
    found = math.log2(gaussian_error(samplers.heun, 20) / gaussian_error(samplers.heun, 40))
    assert found == pytest.approx(2, abs=0.25)
    assert gaussian_error(samplers.heun, 20) < gaussian_error(samplers.ddim, 20) / 5


def curved(x: torch.Tensor, step: Step) -> Estimate:
    """A denoiser that no rule is exact for."""
    x0 = (x / 2).tanh() * (1 + step.b)
    return Estimate(x0, (x - step.a * x0) / step.b)


@pytest.mark.parametrize("spacing", schedules.TIMES.values())
def test_heun_is_that_of_diffusers(spacing):
    plan, noise = steps(schedules.cosine, 7, spacing=spacing), torch.randn(1, 2, 4, 4, generator=rng())
    seen, evaluated = [], []

    def denoise(x, step):
        evaluated.append(step.index)
        return curved(x, step)

    def each(step, _):
        seen.append(step.index)

    ours = sample(denoise, noise, plan, samplers.heun, callback=each)
    assert seen == list(range(7))
    assert evaluated == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    peer = HeunDiscreteScheduler()
    peer.set_timesteps(7)
    sigmas = torch.stack([step.b / step.a for step in plan])
    peer.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), torch.zeros(1)])
    x, by_sigma = noise / plan[0].a, {round(float(step.b / step.a), 6): step for step in plan}
    for time in peer.timesteps:
        if peer.step_index is None:
            peer._init_step_index(time)
        step = by_sigma[round(float(peer.sigmas[peer.step_index]), 6)]
        x = peer.step(curved(step.a * x, step).epsilon, time, x).prev_sample
    torch.testing.assert_close(ours.x0, x, rtol=0, atol=1e-4)  # at a noise level of 0


@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.edm, schedules.linear])
def test_times_by_karras_are_those_of_diffusers(schedule):
    plan = steps(schedule, 12, spacing=schedules.karras)
    sigmas = torch.tensor([(-step.logsnr / 2).exp() for step in plan] + [(-plan[-1].logsnr_next / 2).exp()])
    ends = [(-schedule(torch.tensor(t)) / 2).exp().item() for t in (1.0, 0.0)]
    theirs = EulerDiscreteScheduler()._convert_to_karras(torch.tensor(ends), 13)
    torch.testing.assert_close(sigmas, torch.as_tensor(theirs).to(sigmas), rtol=3e-3, atol=0)
    assert plan[0].t == 1 and plan[-1].t_next == 0
    assert all(step.t_next < step.t for step in plan)


def test_times_by_karras_begin_where_a_pass_does():
    half = steps(schedules.cosine, 5, start=0.5, spacing=schedules.times_named("karras"))
    assert half[0].t == 0.5 and half[-1].t_next == 0 and len(half) == 5
    with pytest.raises(ValueError, match="'exponential' is not one of uniform, karras"):
        schedules.times_named("exponential")


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("count", [1, 6, 500])
def test_ancestral_noise_keeps_the_variance(scaler, count):
    start = torch.randn(1, 20000, generator=rng())
    again, plan = rng(1), steps(lambda t: 4 - 8 * t + (40 * t).sin(), count, scaler=scaler)  # with steps back
    denoise = knows_it_all(torch.zeros(1, 20000))
    sampled = sample(denoise, plan[0].b * start, plan, noise=lambda x: torch.randn(x.shape, generator=again))
    assert (sampled.x / plan[-1].b_next).std().item() == pytest.approx(1, abs=0.03)


def test_steps_run_from_noise_to_clean_and_callbacks_follow_them():
    plan = steps(schedules.cosine, 4, shift=2.0)
    seen = []
    x = torch.ones(1, 4)
    sample(knows_it_all(x), x, plan, callback=lambda step, estimate: seen.append((step, estimate.x0 is x)))
    assert seen == [(step, True) for step in plan]
    assert [step.is_last for step in plan] == [False, False, False, True]
    assert plan[0].t == 1 and plan[-1].t_next == 0
    for step, after in zip(plan, plan[1:], strict=False):
        assert (step.t_next, step.logsnr_next) == (after.t, after.logsnr)
        assert (step.a_next, step.b_next) == (after.a, after.b)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_x_keeps_its_dtype(name):
    x, plan = torch.ones(1, 4, dtype=torch.bfloat16), steps(schedules.cosine, 3)
    assert sample(knows_it_all(torch.zeros(1, 4)), x, plan, samplers.SAMPLERS[name]).x.dtype == torch.bfloat16
    denoise = denoiser(lambda x, *_: torch.zeros(x.shape), EPSILON, CfgSettings(weight=1.0))
    assert denoise(x, plan[0]).x0.dtype == torch.bfloat16


# --- classifier-free guidance ----------------------------------------------------------------------


@quick
@given(seed=seeds, weight=st.floats(0, 10), rho=st.floats(0, 1))
def test_cfg_does_not_depend_on_the_batch(seed, weight, rho):
    conditional, unconditional = torch.randn(2, 2, 3, 4, 5, generator=rng(seed))
    conditional[1] *= 9  # so that the samples' deviations differ
    together = combine_cfg(conditional, unconditional, weight, rho)
    alone = [combine_cfg(conditional[i, None], unconditional[i, None], weight, rho) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_cfg_follows_its_formula():
    conditional, unconditional = torch.randn(2, 1, 3, 4, 5, generator=rng())
    guided = unconditional + 4 * (conditional - unconditional)
    expected = 0.7 * guided * conditional.std() / guided.std() + 0.3 * guided
    torch.testing.assert_close(combine_cfg(conditional, unconditional, 4.0, 0.7), expected)
    torch.testing.assert_close(combine_cfg(conditional, unconditional, 4.0, 0.0), guided)
    torch.testing.assert_close(combine_cfg(conditional, unconditional, 1.0, 0.7), conditional)
    assert torch.equal(combine_cfg(guided * 0, guided * 0, 4.0, 0.7), guided * 0)  # an untrained last layer


def count_halves(cfg: CfgSettings, count: int = 10) -> list[bool]:
    asked = []

    def predict(x, step, both):
        asked.append(both)
        return torch.zeros(len(x) * (2 if both else 1), *x.shape[1:])

    sample(denoiser(predict, EPSILON, cfg), torch.ones(2, 1, 4, 4), steps(schedules.cosine, count))
    return asked


def test_the_unconditional_half_is_computed_only_where_it_counts():
    assert count_halves(CfgSettings()) == [True] * 10
    assert count_halves(CfgSettings(weight=1.0)) == [False] * 10
    assert count_halves(CfgSettings(weight=1.0, weight_end=1.0)) == [False] * 10
    assert count_halves(CfgSettings(weight=1.0, weight_end=3.0)) == [False] + [True] * 9
    assert count_halves(CfgSettings(interval=(0.35, 0.85))) == [False] * 2 + [True] * 5 + [False] * 3


def test_denoiser_reads_out_the_guided_prediction():
    x, conditional, unconditional = torch.randn(3, 2, 1, 4, 4, generator=rng())
    cfg = CfgSettings(weight=3.0, weight_end=1.0, rho=0.4)
    step = steps(schedules.cosine, 4)[1]
    assert [cfg.weight_at(t) for t in (1.0, step.t, 0.0)] == [3.0, 2.5, 1.0]
    estimate = denoiser(lambda *_: torch.cat([conditional, unconditional]), V, cfg)(x, step)
    guided = combine_cfg(conditional, unconditional, 2.5, 0.4)
    torch.testing.assert_close(estimate.x0, step.a * x - step.b * guided)
    torch.testing.assert_close(step.a * estimate.x0 + step.b * estimate.epsilon, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steps(schedules.cosine, 0), "number of sampling steps is 0"),
        (lambda: steps(schedules.cosine, 4, shift=0), "shift is 0"),
        (lambda: samplers.ddim_with(1.5), "eta is 1.5"),
        (lambda: CfgSettings(rho=1.2), "rho is 1.2"),
        (lambda: CfgSettings(interval=(0.8, 0.2)), "interval is 0.8 to 0.2"),
        (lambda: CfgSettings(interval=(0.0, 2.0)), "interval is 0.0 to 2.0"),
        (lambda: target_named("eps"), "'eps': use one of epsilon, x0, v, rectified_flow"),
        (lambda: samplers.sampler_named("none"), f"'none' is not one of {', '.join(samplers.SAMPLERS)}"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- losses and training noise ---------------------------------------------------------------------


def test_a_shifted_weight_undoes_the_shift():
    logsnr, weight = torch.linspace(-5, 5, 11), loss_weights.shifted(loss_weights.p2, 2.0)
    torch.testing.assert_close(weight(logsnr - 2 * math.log(2)), loss_weights.p2(logsnr))


def test_a_weight_is_named_by_its_function_and_shifted():
    logsnr = torch.linspace(-5, 5, 11)
    named = loss_weights.loss_weight_named("p2", math.exp(-1))
    torch.testing.assert_close(named(logsnr), loss_weights.p2(logsnr - 2))
    assert loss_weights.loss_weight_named("sech") is loss_weights.sech


def test_samples_sharing_a_bucket_are_averaged():
    weight = loss_weights.AdaptiveLossWeight()
    weight.update(torch.tensor([0.0, 0.0, 20.0]), torch.tensor([1.0, 5.0, 0.0]))
    torch.testing.assert_close(1 / weight(torch.tensor([0.0, 11.0, -11.0])), torch.tensor([1.02, 0.99, 1.0]))


@quick
@given(seed=seeds, count=st.integers(2, 64))
def test_processes_that_sum_their_tallies_agree_with_one(seed, count):
    logsnr, loss = torch.rand(count, generator=rng(seed)) - 0.5, torch.rand(count, generator=rng(seed + 1))
    alone, shared = loss_weights.AdaptiveLossWeight(), loss_weights.AdaptiveLossWeight()
    alone.update(logsnr, loss)
    half = count // 2
    tallies = [shared.tally(logsnr[part], loss[part]) for part in (slice(half), slice(half, None))]
    shared.apply(*(sum(parts) for parts in zip(*tallies, strict=True)))
    torch.testing.assert_close(shared(logsnr), alone(logsnr))


def test_adaptive_weights_become_one_over_the_loss_and_survive_a_checkpoint():
    weight = loss_weights.AdaptiveLossWeight()
    for _ in range(1500):
        weight.update(torch.tensor([2.0]), torch.tensor([0.25]))
    assert weight(torch.tensor(2.0)).item() == pytest.approx(4, rel=1e-4)
    other = loss_weights.AdaptiveLossWeight()
    other.load_state_dict(weight.state_dict())
    weight.update(torch.tensor([2.0]), torch.tensor([9.0]))  # must not reach what was loaded
    assert other(torch.tensor(2.0)).item() == pytest.approx(4, rel=1e-4)
    with pytest.raises(ValueError, match="100, but 300"):
        other.load_state_dict(schedules.AdaptiveSchedule().state_dict())


def test_the_adaptive_schedule_draws_where_the_loss_is_high():
    schedule = schedules.AdaptiveSchedule()
    even = schedule.draw(4000, rng())
    assert even.abs().max() <= 10 and abs((even > 0).float().mean() - 0.5) < 0.03
    centres = torch.linspace(-9.9, 9.9, 100)
    for _ in range(1000):
        schedule.update(centres, (centres > 0) * 3.0 + 1.0)
    assert (schedule.draw(4000, rng()) > 0).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert torch.equal(schedule.draw(5, rng(4)), schedule.draw(5, rng(4)))


def test_sample_losses_are_means_over_pixels_in_float32():
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]], requires_grad=True)
    losses = sample_losses(prediction.bfloat16(), torch.ones(2, 1, 2))
    assert losses.dtype == torch.float32
    assert losses.tolist() == [2.0, 1.0]
    losses.sum().backward()
    assert prediction.grad.flatten().tolist() == [0.0, 2.0, -1.0, 1.0]


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (512, 20), (5, 3), (1, 9)])
def test_pyramid_noise_has_unit_variance_at_any_size(size):
    noise = pyramid_noise((64, 8, *size), rng())
    assert noise.square().mean().item() == pytest.approx(1, abs=0.12)
    assert torch.equal(noise, pyramid_noise((64, 8, *size), rng()))


def test_pyramid_noise_has_its_levels_where_a_coarse_side_is_1_to_16():
    def correlation(height, width):  # of neighbours, which every level but the finest shares
        noise = pyramid_noise((500, 1, height, width), rng())
        return (noise[..., ::2, ::2] * noise[..., ::2, 1::2]).mean().item()

    powers = [0.75 ** (2 * i) for i in range(10)]
    assert correlation(32, 32) == pytest.approx(sum(powers[1:6]) / sum(powers[:6]), abs=0.06)
    assert correlation(128, 128) == pytest.approx(sum(powers[3:8]) / (1 + sum(powers[3:8])), abs=0.06)
    assert correlation(32, 128) == pytest.approx(sum(powers[1:6]) / sum(powers[:6]), abs=0.06)
