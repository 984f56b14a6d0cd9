"""The translation: streaming equals keeping everything, and the cost is what it says."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import nn

import memopt
from examples.hae_v2.diffusion import Diffusion
from examples.hae_v2.model import HAEUNetModelV2
from examples.hae_v2.translation import DYNAMIC, Algorithm, judge, reconstruct, segment, translate
from memopt.errors import InputError, MemoptError

SIZE, MODALITIES = 16, (0, 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = HAEUNetModelV2(SIZE, 4, 32, 4, 1, (2,), channel_mult=(1, 2), num_classes=2, num_heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # the zero-initialised ones, too
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


def slices(n, seed=0):
    return torch.rand(n, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generators(n):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def stacked(model, images, w, algorithm, noise=None):
    """The same by keeping every step, as the definitions read: (map, score, end, M)."""
    alphas = Diffusion(1000).scheduler.alphas_cumprod.tolist()
    n, f = len(images), algorithm.steps
    times = [k * algorithm.until // f for k in range(f)]

    def clip(x0):
        if algorithm.clipping == "dynamic":
            s = torch.stack([torch.quantile(x.detach().abs().flatten(), DYNAMIC) for x in x0]).clamp(min=1)
            s = s[:, None, None, None]
            return x0.clamp(-s, s) / s
        return x0.clamp(-1, 1)

    x, all_s, all_m, all_h, all_0 = images, [], [], [], []
    for k, t in enumerate(times):
        a = alphas[t]
        if noise is not None:
            eps = torch.stack([torch.randn(4, SIZE, SIZE, generator=g) for g in noise])
            x = Diffusion(1000).noise(images, torch.full((n,), t), eps)
        x = x.detach().requires_grad_()
        y = torch.zeros(2 * n, dtype=torch.long)
        both = model(torch.cat([x, x]), torch.full((2 * n,), t), y, null=torch.arange(2 * n) >= n, clf_free=True)
        eps_h, eps_0 = both[:n], both[n:]
        eps = (1 + w) * eps_h - w * eps_0
        guided, plain = ((x - math.sqrt(1 - a) * e) / math.sqrt(a) for e in (eps, eps_0))
        guided, plain = (clip(p)[:, list(MODALITIES)] for p in (guided, plain))
        target = images[:, list(MODALITIES)]
        m = (guided - plain).square().mean(dim=(2, 3))
        s = (guided - target).square()
        all_m.append(m.detach())
        all_h.append(s.mean(dim=(2, 3)).detach())
        all_0.append((plain - target).square().mean(dim=(2, 3)).detach())
        if algorithm.evidence == "gradient":
            s = torch.autograd.grad(m.sum(), x)[0].abs()[:, list(MODALITIES)]
        all_s.append(s.detach())
        if k + 1 < f:
            b, eps_0 = alphas[times[k + 1]], eps_0.detach()
            x = math.sqrt(b) * ((x - math.sqrt(1 - a) * eps_0) / math.sqrt(a)) + math.sqrt(1 - b) * eps_0
    big_m, big_s = torch.stack(all_m), torch.stack(all_s)
    maps = torch.zeros(n, len(MODALITIES), SIZE, SIZE)
    ends = big_m.argmax(dim=0)
    for i, j in itertools.product(range(n), range(len(MODALITIES))):
        last = max(1, round(algorithm.end_ratio * (int(ends[i, j]) + 1))) - 1
        chosen = [last] if algorithm.last_only else range(0, last + 1, algorithm.interval)
        kept = [big_s[k, i, j] for k in chosen]
        maps[i, j] = sum(kept[1:], kept[0]) / len(kept)
    seq_h, seq_0 = (torch.stack(seq).mean(dim=2).double() for seq in (all_h, all_0))
    cosine = torch.nn.functional.cosine_similarity(seq_h, seq_0, dim=0)
    return median_filter(maps.mean(dim=1).numpy(), size=(1, 5, 5)), 1 - cosine.numpy(), ends.numpy(), big_m


VARIANTS = {
    "plain": {},
    "coarse": {"until": 600},
    "noise": {"encoding": "noise"},
    "dynamic": {"clipping": "dynamic"},
    "gradient": {"evidence": "gradient"},
    "last": {"last_only": True},
    "interval": {"interval": 3},
    "half": {"end_ratio": 0.5},
    "most": {"end_ratio": 0.83, "interval": 2},
    "half of last": {"end_ratio": 0.5, "last_only": True},
}


@pytest.mark.parametrize(
    ("variant", "steps"), [(v, s) for v in VARIANTS for s in ((1, 7, 50) if v in ("plain", "half") else (11,))]
)
def test_streaming_equals_stacking_bit_for_bit(model, variant, steps):
    algorithm = Algorithm(**{"steps": steps, "until": steps if variant == "plain" else 900, **VARIANTS[variant]})
    images = slices(3, seed=steps)
    noisy = algorithm.encoding == "noise"
    strengths = (0.5, 2.0)
    found = translate(
        model, images, strengths, algorithm, diffusion=Diffusion(1000), modalities=MODALITIES, generators=generators(3)
    )
    for w, got in zip(strengths, found.by_guidance, strict=True):
        maps, score, end, m = stacked(model, images, w, algorithm, generators(3) if noisy else None)
        assert np.array_equal(got.map, maps)
        assert np.array_equal(got.end, end)
        assert np.array_equal(got.difference, m.transpose(0, 1).numpy())
        found_score = judge(got.difference, got.healthy, got.null, "cosine")
        np.testing.assert_allclose(found_score, score, rtol=1e-4, atol=1e-12)
        called, peak = found_score > np.median(found_score), m.amax(dim=0).mean(dim=1).numpy()
        masks = segment(got.map, called, got.peak, float(got.peak.max()))
        assert np.array_equal(masks, segment(maps, called, peak, float(peak.max())))


def test_ends_differ_so_that_snapshots_matter(model):
    found = translate(model, slices(8), (2.0,), Algorithm(steps=20), diffusion=Diffusion(), modalities=MODALITIES)
    assert len(set(found.by_guidance[0].end.ravel().tolist())) > 2


@pytest.mark.parametrize("strengths", [(2.0,), (0.5, 1.0, 3.0)])
def test_one_call_per_step_on_twice_the_slices(model, strengths):
    calls, progress = [], []
    handle = model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    with handle:
        translate(
            model,
            slices(3),
            strengths,
            Algorithm(steps=9),
            diffusion=Diffusion(),
            modalities=MODALITIES,
            progress=lambda done, steps: progress.append((done, steps)),
        )
    assert calls == [6] * 9
    assert progress == [(k + 1, 9) for k in range(9)]


class Blank(nn.Module):
    """Predicts a part of its input: next to no work, so that many steps take little time."""

    def forward(self, x, timesteps, y=None, null=None, clf_free=False):
        return torch.where(null[:, None, None, None], 0.1 * x, 0.2 * x)


class Whole(nn.Module):
    """A translation as a model, for the profiler."""

    def __init__(self, steps):
        super().__init__()
        self.model, self.steps = Blank(), steps

    def forward(self, images):
        algorithm = Algorithm(steps=self.steps)
        found = translate(self.model, images, (2.0,), algorithm, diffusion=Diffusion(), modalities=MODALITIES)
        return found.encoded


def peak(steps):
    return memopt.profile(Whole(steps), torch.rand(8, 4, 48, 48) * 2 - 1, train=False, real=True).peak


def test_memory_does_not_depend_on_the_number_of_steps():
    few, many = peak(10), peak(600)
    assert few > 8 * 48 * 48 * 4 * 4
    assert many <= 1.01 * few


def test_only_the_batch_a_slice_is_in_matters_not_the_order(model):
    def maps(images):
        found = translate(model, images, (2.0,), Algorithm(steps=5), diffusion=Diffusion(), modalities=MODALITIES)
        return found.by_guidance[0].map

    images = slices(4)
    assert np.allclose(maps(images)[::-1], maps(images.flip(0)), atol=1e-5)


def test_passes_do_not_change_it(model):
    def run():
        found = translate(model, slices(3), (2.0,), Algorithm(steps=6), diffusion=Diffusion(), modalities=MODALITIES)
        return found.by_guidance[0]

    plain = run()
    with memopt.apply(model, passes=["outer_product", "inference_mode", {"grad_accumulation": {"parts": 3}}]):
        ours = run()
    np.testing.assert_allclose(ours.map, plain.map, atol=1e-5)
    with memopt.apply(model, passes=["inference_mode", "offload_skips"]):
        ours = run()
    assert np.array_equal(ours.map, plain.map)


class Perfect(nn.Module):
    """Knows the images: its noise is exactly what separates x_t from them."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, x, timesteps, y=None, null=None, clf_free=False):
        a = Diffusion(1000).scheduler.alphas_cumprod[timesteps][:, None, None, None]
        return (x - a.sqrt() * self.images.repeat(2, 1, 1, 1)) / (1 - a).sqrt()


def test_a_perfect_model_sees_no_anomaly_and_gives_the_images_back():
    images = slices(2).double()
    algorithm, diffusion = Algorithm(steps=30), Diffusion()
    found = translate(Perfect(images), images, (2.0,), algorithm, diffusion=diffusion, modalities=MODALITIES)
    assert found.by_guidance[0].map.max() < 1e-10
    back = reconstruct(Perfect(images), found.encoded, 2.0, algorithm, diffusion=diffusion)
    assert (back - images).abs().max() < 1e-6


def test_a_mask_is_the_quantile_that_validation_scales():
    maps = np.arange(3 * 1000, dtype=np.float32).reshape(3, 20, 50)
    masks = segment(maps, np.array([True, True, False]), np.array([0.0, 9.0, 9.0], np.float32), 3.0)
    assert masks.sum(axis=(1, 2)).tolist() == [20, 100, 0]  # 2% at the least difference, 10% at the largest


def test_scores_are_what_they_say():
    rng = np.random.default_rng(0)
    m, healthy, null = (rng.random((5, 9, 2)).astype(np.float32) + 0.1 for _ in range(3))
    np.testing.assert_allclose(judge(m, healthy, null, "difference"), m.mean(axis=(1, 2)), rtol=1e-5)
    a, b = healthy.astype(np.float64).mean(axis=2), null.astype(np.float64).mean(axis=2)
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b), dim=1).numpy()
    np.testing.assert_allclose(judge(m, healthy, null, "cosine"), 1 - cosine, rtol=1e-5)
    np.testing.assert_allclose(judge(m, healthy, null, "ratio"), (np.log(a) - np.log(b)).mean(axis=1), rtol=1e-5)
    assert np.array_equal(judge(m, null[None], null[None], "ratio"), np.zeros((1, 5)))
    assert np.array_equal(judge(m, 0 * null, null, "cosine"), np.zeros(5))
    assert np.array_equal(judge(m, 0 * null, null, "ratio"), np.zeros(5))


def test_a_score_is_as_exact_as_small_differences_of_the_sequences():
    null = np.linspace(1, 2, 50, dtype=np.float32)[None, :, None]
    healthy = null.copy()
    healthy[0, 3] *= 1.0001
    assert 0 < judge(null, healthy, null, "cosine")[0] < 1e-9


def test_bad_input_is_named(model):
    with pytest.raises(InputError, match=r"until=5 leaves no room for steps=6"):
        Algorithm(steps=6, until=5)
    with pytest.raises(InputError, match=r"end_ratio must be above 0"):
        Algorithm(end_ratio=0.0)
    with pytest.raises(InputError, match=r"until=600 is beyond the 100 steps"):
        translate(model, slices(1), (2.0,), Algorithm(), diffusion=Diffusion(100), modalities=MODALITIES)
    with (
        memopt.apply(model, passes=["inference_mode"]),
        pytest.raises(InputError, match=r"evidence=gradient needs autograd: leave the pass inference_mode out"),
    ):
        translate(
            model, slices(1), (2.0,), Algorithm(steps=2, evidence="gradient"), diffusion=Diffusion(), modalities=(0,)
        )


def test_predictions_that_are_not_finite_end_it():
    class Broken(nn.Module):
        def forward(self, x, timesteps, y=None, null=None, clf_free=False):
            return x * float("nan")

    with pytest.raises(MemoptError, match=r"predictions are not finite"):
        translate(Broken(), slices(1), (2.0,), Algorithm(steps=2), diffusion=Diffusion(), modalities=MODALITIES)
