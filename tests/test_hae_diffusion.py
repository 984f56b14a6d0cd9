import pytest
import torch

from examples.hae_v2.diffusion import Diffusion
from examples.hae_v2.model import HAEUNetModelV2


class Counting(torch.nn.Module):
    """A model that counts its calls and believes in one image per class, zero without a class."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Dropout(0.5).eval()

    def forward(self, x, timesteps, y=None, null=None, clf_free=False):
        self.calls.append((x.shape[0], timesteps, y, null, clf_free, self.training))
        alpha = Diffusion().scheduler.alphas_cumprod[timesteps][:, None, None, None]
        target = torch.zeros_like(x) if y is None else torch.where(null, 0.0, y * 0.25)[:, None, None, None]
        return (x - alpha.sqrt() * target) / (1 - alpha).sqrt()


def test_noise_and_loss_are_the_textbook_ones():
    diffusion = Diffusion()
    x0, eps = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 500, 999])
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].float()[:, None, None, None]
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    torch.testing.assert_close(diffusion.noise(x0, t, eps), x_t, rtol=1e-4, atol=1e-5)
    loss = diffusion.training_loss(lambda x, t, y: x, x0, t, eps, y=None)
    torch.testing.assert_close(loss, (x_t - eps).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_error_of_the_image_instead_of_the_noise():
    diffusion = Diffusion()
    t = torch.arange(1000)
    weights = diffusion.image_weight(t)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert (weights.diff() >= 0).all()
    # Where it is not limited, the weighted error of the noise is the error of the image, to a factor.
    x0, eps, guess = (torch.rand(300, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    x_t = diffusion.noise(x0, t[:300], eps)
    images = torch.stack([diffusion.image(x, i, e) for i, (x, e) in enumerate(zip(x_t, guess, strict=True))])
    ratio = diffusion.loss(images, x0) / (diffusion.loss(guess, eps) * weights[:300])
    torch.testing.assert_close(ratio, ratio[:1].expand(300), rtol=1e-3, atol=0)
    assert weights[999] / weights[299] > 1


def test_sampling_takes_one_call_for_each_step():
    model, seen = Counting(), []
    weights = [0.0, 1.0, 3.0]
    x0 = Diffusion().sample(
        model,
        torch.tensor([1, 2, 1]),
        weights,
        steps=5,
        shape=(3, 1, 4, 4),
        generator=torch.Generator().manual_seed(0),
        progress=lambda done, steps: seen.append((done, steps)),
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    assert len(model.calls) == 5
    assert [int(call[1][0]) for call in model.calls] == [999, 799, 599, 399, 199]
    n, _, y, null, clf_free, training = model.calls[0]
    assert (n, y.tolist(), clf_free, training) == (6, [1, 2, 1, 1, 2, 1], True, False)
    assert null.tolist() == [False] * 3 + [True] * 3
    # (1 + w) eps_y - w eps_0 aims at (1 + w) * target.
    for sample, target in zip(x0, [0.25, 1.0, 1.0], strict=True):
        torch.testing.assert_close(sample, torch.full_like(sample, target), rtol=1e-3, atol=1e-3)
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_is_deterministic_and_clipped(eta):
    torch.manual_seed(0)
    model = HAEUNetModelV2(16, 2, 32, 2, 1, [2], dropout=0.2, channel_mult=(1, 2), num_heads=4, num_classes=2)
    for parameter in model.parameters():  # a fresh model's last layer is zero
        torch.nn.init.normal_(parameter, std=0.05)
    diffusion = Diffusion()
    images = []
    for _ in range(2):
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(7)
        labels, shape = torch.tensor([0, 1]), (2, 2, 16, 16)
        images.append(diffusion.sample(model, labels, 1.8, 3, eta=eta, shape=shape, generator=generator))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*images)
    assert images[0].abs().max() <= 1
    assert not torch.equal(images[0][0], images[0][1])


def test_sampling_without_classes():
    model = Counting()
    x0 = Diffusion().sample(model, None, steps=4, shape=(2, 1, 4, 4))
    assert [call[0] for call in model.calls] == [2] * 4
    torch.testing.assert_close(x0, torch.zeros_like(x0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
        ({"guidance": [1.0, 2.0, 3.0]}, "guidance must be one number or 2"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must be \[2\]"),
    ],
    ids=["steps", "guidance", "labels"],
)
def test_sampling_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        Diffusion().sample(Counting(), **{"labels": torch.zeros(2, dtype=torch.long), "shape": (2, 1, 4, 4), **call})
