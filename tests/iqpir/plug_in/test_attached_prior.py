"""A quality prior is attached and taken off without a trace, and asked by one caller at a time."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import iqpir
from iqpir.errors import UsageError, VerificationError
from iqpir.plug_in.attached_prior import AttachedPrior, attach_quality_prior, attached_priors, load_quality_prior


class Host(nn.Module):
    """Convolutions with batch statistics and dropout, tokens in two orders, features with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.tokens = nn.Linear(8, 8)
        self.turned = nn.Linear(8, 8)
        self.last_axis = nn.LayerNorm(8)
        self.pair = Pair()
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.drop(self.norm(functional.relu(self.first(pictures))))
        tokens = self.tokens(features.flatten(2).transpose(1, 2))
        turned = self.turned(tokens.transpose(0, 1)).permute(1, 2, 0).reshape(features.shape)
        features, _ = self.pair(self.last_axis(turned.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return pictures + self.last(features)


class Pair(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, str]:
        return torch.tanh(features), "beside"


PLACES = ["first", "tokens", "turned", "last_axis", "pair"]


@pytest.fixture
def host() -> nn.Module:
    torch.manual_seed(1)
    return Host().eval()


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def taught(prior: AttachedPrior) -> AttachedPrior:
    """Another vector for each quality, without a training."""
    generator = torch.Generator().manual_seed(3)
    for table in prior.tables:
        with torch.no_grad():
            table.copy_(torch.randn(table.shape, generator=generator))
    return prior


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("mode", ["add", "modulate"])
def test_before_training_every_bit_is_the_hosts(host: nn.Module, pictures: Tensor, mode: str) -> None:
    expected = host(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        expected_16 = host(pictures)
    prior = attach_quality_prior(host, PLACES, mode=mode)  # type: ignore[arg-type]
    for quality in (0.0, 0.37, 1.0, [0.2, 0.9]):
        assert torch.equal(bits(prior(pictures, quality)), bits(expected))
    with prior.asking(0.5), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bits(host(pictures)), bits(expected_16))
    identity = nn.Sequential(nn.Identity())
    signed = torch.tensor([-0.0, 0.0, -1.0, 1.0]).reshape(1, 1, 2, 2)
    kept = attach_quality_prior(identity, "0", mode=mode, layout="channels_first", example=signed)  # type: ignore[arg-type]
    assert torch.equal(bits(kept(signed, 0.5)), bits(signed))


@pytest.mark.parametrize("mode", ["add", "modulate"])
@pytest.mark.parametrize("path", PLACES)
def test_each_layout_is_conditioned_sample_by_sample(host: nn.Module, pictures: Tensor, path: str, mode: str) -> None:
    expected = host(pictures)
    prior = taught(attach_quality_prior(host, path, mode=mode))  # type: ignore[arg-type]
    assert torch.equal(host(pictures), expected), "nothing is asked"
    low, high, mixed = prior(pictures, 0.1), prior(pictures, 0.8), prior(pictures, [0.1, 0.8])
    assert not torch.allclose(low, high, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1]]))
    mixed.sum().backward()
    table = prior.tables[0]
    # Knots 1 and 8 of 0..10 were asked, and no other.
    assert table.grad is not None
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 8]


def test_a_gradient_reaches_every_parameter_of_the_plug_in(host: nn.Module) -> None:
    prior = attach_quality_prior(host, PLACES, mode="modulate")
    pictures = torch.rand(11, 3, 8, 8)
    prior(pictures, torch.linspace(0, 1, 11)).square().sum().backward()
    for path, table in zip(prior.paths, prior.tables, strict=True):
        assert table.grad is not None and bool((table.grad.abs().sum(1) > 0).all()), path


def test_a_quality_between_two_knots_lies_between_their_pictures() -> None:
    host = nn.Sequential(nn.Identity())
    prior = taught(attach_quality_prior(host, "0", knots=3))
    zero = torch.zeros(1, 3, 4, 4)
    left, middle, right = (prior(zero, quality) for quality in (0.5, 0.625, 1.0))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right)


def test_the_host_keeps_its_keys_modes_statistics_and_random_state(host: nn.Module, pictures: Tensor) -> None:
    host.train()
    host.get_submodule("drop").eval()
    keys, state = list(host.state_dict()), copy.deepcopy(host.state_dict())
    random = torch.get_rng_state()
    prior = attach_quality_prior(host, PLACES)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(host.state_dict()) == keys
    assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())
    assert host.training and not host.get_submodule("drop").training
    assert not [name for name, _ in host.named_parameters() if "tables" in name]
    assert [name for name, _ in prior.named_parameters()] == [f"tables.{number}" for number in range(5)]
    Host().load_state_dict(host.state_dict())


def test_taken_off_the_host_is_what_it_was(host: nn.Module, pictures: Tensor) -> None:
    expected = host(pictures)
    prior = taught(attach_quality_prior(host, ["first", "pair"]))
    other = taught(attach_quality_prior(host, "first"))
    assert attached_priors(host) == [prior, other]
    prior.detach()
    with prior.asking(0.9):
        assert torch.equal(host(pictures), expected)
    assert not torch.equal(other(pictures, 0.9), expected)
    other.detach()
    assert not any(module._forward_hooks for module in host.modules())


def test_two_priors_on_one_host_are_asked_apart(host: nn.Module, pictures: Tensor) -> None:
    one, two = taught(attach_quality_prior(host, "first")), taught(attach_quality_prior(host, "first", knots=5))
    with one.asking(0.2):
        alone = host(pictures)
        with two.asking(0.2):
            both = host(pictures)
        assert torch.equal(host(pictures), alone)
    assert torch.equal(one(pictures, 0.2), alone)
    assert not torch.equal(both, alone)


def test_what_is_asked_ends_with_its_block_and_stays_in_its_thread(host: nn.Module, pictures: Tensor) -> None:
    prior = taught(attach_quality_prior(host, "first"))
    untouched, expected = host(pictures), {q: prior(pictures, q) for q in (0.1, 0.9)}
    with pytest.raises(ZeroDivisionError), prior.asking(0.1):
        raise ZeroDivisionError
    assert torch.equal(host(pictures), untouched)
    found: dict[float | None, Tensor] = {}
    together = threading.Barrier(3)

    def ask(quality: float | None) -> None:
        together.wait()
        if quality is None:
            found[quality] = host(pictures)
            together.wait()
            return
        with prior.asking(quality):
            together.wait()
            found[quality] = host(pictures)

    with prior.asking(0.5):
        threads = [threading.Thread(target=ask, args=(quality,)) for quality in (0.1, 0.9, None)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(found[None], untouched)
    for quality, result in expected.items():
        assert torch.equal(found[quality], result)


def test_a_deep_copy_has_a_prior_of_its_own(host: nn.Module, pictures: Tensor) -> None:
    prior = taught(attach_quality_prior(host, ["first", "tokens"]))
    twin = copy.deepcopy(host)
    (theirs,) = attached_priors(twin)
    assert theirs is not prior and theirs.host is twin
    assert torch.equal(theirs(pictures, 0.3), prior(pictures, 0.3))
    with torch.no_grad():
        theirs.tables[0].zero_()
    assert not torch.equal(theirs(pictures, 0.3), prior(pictures, 0.3))
    theirs.detach()
    assert attached_priors(twin) == [] and attached_priors(host) == [prior]
    assert copy.deepcopy(prior).host is not host


def test_saved_and_loaded_it_answers_alike(host: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    prior = taught(attach_quality_prior(host, ["first", "tokens"], mode="modulate", knots=5))
    expected, file = prior(pictures, 0.7), tmp_path / "prior.safetensors"
    prior.save(file)
    torch.manual_seed(1)
    fresh = Host().eval()
    loaded = load_quality_prior(fresh, file)
    assert torch.equal(loaded(pictures, 0.7), expected)
    with pytest.raises(VerificationError, match="belongs to weights"):
        load_quality_prior(Host(), file)
    assert load_quality_prior(Host(), file, any_host=True).paths == ("first", "tokens")
    with pytest.raises(UsageError, match="no module 'first'"):
        load_quality_prior(nn.Sequential(nn.Conv2d(3, 8, 3)), file, any_host=True)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(VerificationError, match="damaged"):
        load_quality_prior(host, file)
    with pytest.raises(UsageError, match="does not exist"):
        load_quality_prior(host, tmp_path / "absent")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("frist", r"no module 'frist'. Near are .*first"),
        ("", "no module ''"),
        ("unused", "does not call its module 'unused'. Attach to another"),
        ("held", r"does not call its module 'held'. Attach inside it: held.0"),
        ("text", r"puts out a str.*Attach to another module"),
        ("windows", "no axis is that of the pictures"),
        ("cube", "which axis holds the channels cannot be seen"),
    ],
)
def test_a_wrong_place_is_named_with_what_to_do(path: str, message: str) -> None:
    class Odd(Host):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.ModuleList([nn.Identity()])
            self.text, self.windows, self.cube = Speaks(), nn.Identity(), nn.Identity()

        def forward(self, pictures: Tensor) -> Tensor:
            self.text(pictures)
            self.windows(pictures.reshape(4, -1, 3))
            self.cube(pictures[:, :, :3, :3])
            return super().forward(pictures)

    class Speaks(nn.Module):
        def forward(self, pictures: Tensor) -> str:
            return str(pictures.shape)

    with pytest.raises(UsageError, match=message):
        attach_quality_prior(Odd(), path)


def test_a_host_with_wishes_of_its_own_takes_an_example(host: nn.Module) -> None:
    picky = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(UsageError, match=r"does not take an example of shape \(1, 3, 64, 64\).*`example`"):
        attach_quality_prior(picky, "1")
    prior = taught(attach_quality_prior(picky, "1", example=torch.zeros(3, 3, 4, 4)))
    assert prior(torch.zeros(2, 3, 4, 4), [0.1, 0.2]).shape == (2, 5)
    with pytest.raises(UsageError, match="given twice"):
        attach_quality_prior(host, ["first", "first"])
    with pytest.raises(UsageError, match="No module is named"):
        attach_quality_prior(host, [])


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan"), [], [[0.5]]])
def test_a_quality_that_is_none_is_refused(host: nn.Module, quality: object) -> None:
    prior = attach_quality_prior(host, "first")
    with pytest.raises(UsageError, match=r"is not in \[0, 1\]"), prior.asking(quality):  # type: ignore[arg-type]
        pass


def test_as_many_qualities_as_pictures_or_one(host: nn.Module, pictures: Tensor) -> None:
    prior = attach_quality_prior(host, "first")
    with pytest.raises(UsageError, match=r"'first' gave \(2, 8, 16, 16\) for 3 qualities"):
        prior(pictures, [0.1, 0.2, 0.3])


def test_the_package_has_it_at_its_root() -> None:
    assert iqpir.attach_quality_prior is attach_quality_prior
    assert iqpir.load_quality_prior is load_quality_prior
