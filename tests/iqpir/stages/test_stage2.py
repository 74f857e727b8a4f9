"""Stage 2: where its gradients go, what its targets are, when the generator runs, and that it learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.losses import anchor_loss, to_unit_range
from iqpir.networks.outcomes import Prediction
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.quality_prior import PiecewiseLinear, QualityPrior
from iqpir.stages.code_targets import CodeLossConfig, code_losses
from iqpir.stages.stage2 import Stage2, Stage2Config, discrete_latent
from iqpir.training.state import TrainState

NO_CODES = CodeLossConfig(feature_weight=0.0, code_weight=0.0)


def index(count: int = 4) -> Tensor:
    return torch.arange(1, count + 1)


def started(tiny: ModuleType, config: Stage2Config, **changes: object) -> tuple[Stage2, TrainState]:
    prior = tiny.Sharpness() if config.quality_weight > 0 else None
    stage = Stage2(config, quality_prior=prior, teacher=tiny.network(**changes))
    return stage, stage.initial_state(tiny.network(**changes), seed=3)


def largest_gradients(stage: Stage2, state: TrainState, batch: object) -> dict[str, float]:
    """Largest absolute gradient of each top-level part in one step."""
    found: dict[str, float] = {}

    def keep(part: str, parameter: torch.nn.Parameter) -> None:
        found[part] = max(found.get(part, 0.0), float(parameter.grad.abs().max()))

    for name, parameter in state.network.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            parameter.register_post_accumulate_grad_hook(lambda p, part=part: keep(part, p))
    stage.step(state, batch)
    return found


@contextmanager
def decoded_batches(network: RestorationNetwork) -> Iterator[list[int]]:
    """Batch sizes that went through the generator."""
    sizes: list[int] = []
    handle = network.generator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


PREDICTOR = {"position_emb", "feat_emb", "ft_layers", "idx_pred_layer"}


@pytest.mark.parametrize(
    ("path", "reaches_predictor"), [("straight_through", False), ("logits", True), ("continuous", False)]
)
def test_gradient_path_of_the_quality_loss(tiny: ModuleType, path: str, reaches_predictor: bool) -> None:
    config = Stage2Config(codes=NO_CODES, quality_weight=1.0, quality_grad=path)  # type: ignore[arg-type]
    stage, state = started(tiny, config)
    found = largest_gradients(stage, state, tiny.batch(index()))
    assert found["encoder"] > 0
    assert found["score_embed"] > 0
    assert {part for part in PREDICTOR if found[part] > 0} == (PREDICTOR if reaches_predictor else set())


def test_the_cross_entropy_reaches_everything_that_is_trained(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config(quality_weight=0.0, codes=CodeLossConfig(feature_weight=0.0)))
    found = largest_gradients(stage, state, tiny.batch(index()))
    assert {part for part, value in found.items() if value > 0} == {*PREDICTOR, "encoder", "score_embed"}


def test_l_feat_reaches_the_encoder_and_the_condition_only(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config(quality_weight=0.0, codes=CodeLossConfig(code_weight=0.0)))
    found = largest_gradients(stage, state, tiny.batch(index()))
    assert {part for part, value in found.items() if value > 0} == {"encoder", "score_embed"}


def test_l_feat_on_the_raw_latent_leaves_the_condition_alone(tiny: ModuleType) -> None:
    codes = CodeLossConfig(code_weight=0.0, feature_on="raw")
    stage, state = started(tiny, Stage2Config(quality_weight=0.0, codes=codes))
    found = largest_gradients(stage, state, tiny.batch(index()))
    assert {part for part, value in found.items() if value > 0} == {"encoder"}


def test_codebooks_and_generator_stay_as_stage_1_made_them(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config(optimiser=tiny.RATE))
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    for state.step in range(2):
        stage.step(state, tiny.batch(index()))
    frozen = ("quantize", "generator", "fuse_convs_dict")
    for key, value in state.network.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(frozen), key


def test_decoded_values_are_codebook_rows_whatever_the_gradient_path(tiny: ModuleType) -> None:
    network, batch = tiny.network(), tiny.batch(index())
    predicted = network.predict(batch.lq, batch.quality)
    hard = network.lookup(predicted.codes, batch.quality)
    for path in ("straight_through", "logits"):
        config = Stage2Config(quality_grad=path)  # type: ignore[arg-type]
        torch.testing.assert_close(discrete_latent(network, predicted, batch.quality, config), hard)
    config = Stage2Config(quality_grad="continuous")
    assert discrete_latent(network, predicted, batch.quality, config) is predicted.latent


def certain(codes: Tensor, network: RestorationNetwork, latent: Tensor) -> Prediction:
    """A prediction that is sure of ``codes``."""
    both = 30 * torch.nn.functional.one_hot(codes.flatten(2), network.config.codebook_size).float()
    logits = torch.stack([both[:, 1], both[:, 0]], dim=-1).flatten(-2)
    return Prediction(logits, latent, latent, {}, 2)


@pytest.mark.parametrize("gate", ["code", "paper"])
def test_the_gate_decides_on_target_and_cross_entropy(tiny: ModuleType, gate: str) -> None:
    network = tiny.network(hq_gate=gate)
    codes = network.encode_codes(tiny.batch(index(2)).hq)
    quality = torch.tensor([0.9, 0.5])
    common = network.quantize.lookup(codes[:, 0])
    with_hq = common + 0.8 * network.quantize_aesthetic.lookup(codes[:, 1])
    target = with_hq if gate == "code" else torch.stack([with_hq[0], common[1]])
    config, ones = CodeLossConfig(), torch.ones(2)
    right = code_losses(network, certain(codes, network, target), codes, quality, ones, config)
    assert [round(value.item(), 5) for value in right.values()] == [0, 0, 0]

    wrong = codes.clone()
    wrong[1, 1] = (wrong[1, 1] + 1) % network.config.codebook_size
    losses = code_losses(network, certain(wrong, network, target), codes, quality, ones, config)
    assert losses["common_code_loss"] < 1e-5
    # Half the batch is wrong by 30 nats, weight 0.5; with the gate closed it does not count.
    assert float(losses["hq_code_loss"].detach()) == pytest.approx(7.5 if gate == "code" else 0.0, abs=1e-3)


def test_the_generator_runs_only_where_the_quality_loss_counts(tiny: ModuleType) -> None:
    config = Stage2Config(quality_start=2, quality_every=3, quality_samples=2)
    stage, state = started(tiny, config)
    ran = []
    for state.step in range(6):
        with decoded_batches(state.network) as sizes:
            values = stage.step(state, tiny.batch(index()))
        assert ("quality_loss" in values) == bool(sizes)
        ran.append(sizes)
    assert ran == [[], [], [2], [], [], [2]]


def test_no_weight_needs_no_prior_and_no_generator(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config(quality_weight=0.0))
    with decoded_batches(state.network) as sizes:
        values = stage.step(state, tiny.batch(index()))
    assert sizes == []
    total = values["feature_loss"] + values["common_code_loss"] + values["hq_code_loss"]
    torch.testing.assert_close(values["loss"], total)


def test_the_loss_is_the_papers_sum(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config())
    batch = tiny.batch(index())
    network = tiny.network()
    codes = network.encode_codes(batch.hq)
    predicted = network.predict(batch.lq, batch.quality)
    feature = (network.lookup(codes) - predicted.latent).square().mean()
    entropy = [
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, book].flatten())
        for book, logits in enumerate((predicted.common, predicted.hq))
    ]
    restored = network.decode(network.lookup(predicted.codes))
    quality = tiny.Sharpness()(((restored + 1) / 2).clamp(0, 1)).mean()
    expected = feature + 0.5 * (entropy[0] + entropy[1]) - 0.1 * quality
    torch.testing.assert_close(stage.step(state, batch)["loss"], expected.detach())


def test_the_anchor_adds_the_distance_of_the_judged_picture_to_the_good_one(tiny: ModuleType) -> None:
    """Its weight scales it, its gradient reaches what predicts codes, and a perfect picture costs nothing."""
    batch = tiny.batch(index())
    costs = []
    for weight in (1.0, 3.0):
        config = Stage2Config(codes=NO_CODES, quality_grad="logits", quality_weight=1e-9, quality_anchor=weight)
        stage, state = started(tiny, config)
        costs.append(stage.step(state, batch)["anchor_loss"])
    torch.testing.assert_close(costs[1], 3 * costs[0])
    network = tiny.network()
    restored = network.decode(network.lookup(network.predict(batch.lq, batch.quality).codes))
    torch.testing.assert_close(costs[0], anchor_loss(restored, batch.hq).detach())
    stage, state = started(tiny, config)
    found = largest_gradients(stage, state, batch)
    assert all(found[part] > 1e-6 for part in PREDICTOR), found


def test_the_judged_picture_is_the_one_that_inference_gives(tiny: ModuleType) -> None:
    judged: list[Tensor] = []

    class Remembering(tiny.Sharpness):  # type: ignore[name-defined]
        def forward(self, unit: Tensor) -> Tensor:
            judged.append(unit.detach())
            return super().forward(unit)

    batch = tiny.batch(index())
    network = tiny.network(tones=4)
    config = Stage2Config(quality_grad="logits", quality_restored=True)
    stage = Stage2(config, quality_prior=Remembering(), teacher=network)
    with torch.no_grad():
        wanted = to_unit_range(network(batch.lq, batch.quality))
    stage.step(stage.initial_state(tiny.network(tones=4), seed=3), batch)
    torch.testing.assert_close(judged[-1], wanted, atol=1e-5, rtol=0)


def test_jitter_changes_what_is_judged_and_not_what_is_anchored(tiny: ModuleType) -> None:
    found = []
    for reach in (0, 3):
        config = Stage2Config(quality_weight=1.0, quality_anchor=1.0, quality_jitter=reach)
        stage, state = started(tiny, config)
        found.append(stage.step(state, tiny.batch(index())))
    assert found[0]["quality_loss"] != found[1]["quality_loss"]
    assert found[0]["anchor_loss"] == found[1]["anchor_loss"]


def test_a_bounded_prior_judges_another_part_in_each_step_and_the_same_in_a_repeated_one(tiny: ModuleType) -> None:
    def judged(max_side: int | None, steps: tuple[int, ...]) -> list[Tensor]:
        seen: list[Tensor] = []

        def mean(pictures: Tensor) -> Tensor:
            seen.append(pictures.detach())
            return pictures.mean((1, 2, 3))

        maps = {"mean": PiecewiseLinear([0.0, 1.0], [0.1, 0.9])}
        prior = QualityPrior({"mean": mean}, maps, max_side=max_side, probe_size=8)
        del seen[:]
        for number in steps:
            stage = Stage2(Stage2Config(optimiser=tiny.RATE), quality_prior=prior, teacher=tiny.network())
            state = stage.initial_state(tiny.network(), seed=3)
            state.step = number
            stage.step(state, tiny.batch(index()))
        return seen

    (whole,) = judged(None, (1,))
    first, again, later = judged(8, (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
    parts = whole.unfold(2, 8, 1).unfold(3, 8, 1)  # [B,3,9,9,8,8]
    places = (parts == first[:, :, None, None]).all(dim=(0, 1, 4, 5)).nonzero().tolist()
    assert len(places) == 1 and places != [[4, 4]], "one place for all pictures, and not always the centre"


def test_each_metric_of_the_prior_is_to_match_the_score_that_is_asked_of_it(tiny: ModuleType) -> None:
    def dark(pictures: Tensor) -> Tensor:
        return 1 - pictures.mean((1, 2, 3))

    maps = {name: PiecewiseLinear([0.0, 1.0], [0.1, 0.9]) for name in ("sharp", "dark")}
    prior = QualityPrior({"sharp": tiny.Sharpness(), "dark": dark}, maps, probe_size=16)
    config = Stage2Config(optimiser=tiny.RATE, quality_weight=2.0, quality_target="match", dial_fraction=1.0)
    asked: list[Tensor] = []
    judged: list[Tensor] = []
    losses = []
    for columns in ((2, 0), None):
        stage = Stage2(config, quality_prior=prior, prior_scores=columns, teacher=tiny.network(quality_bins=[4, 4, 4]))
        state = stage.initial_state(tiny.network(quality_bins=[4, 4, 4]), seed=3)
        state.network.score_embed.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
        state.network.generator.register_forward_hook(lambda _, args, out: judged.append(to_unit_range(out.detach())))
        own = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
        losses.append(stage.step(state, replace(tiny.batch(index()), quality=own))["quality_loss"])
    assert torch.equal(asked[0], asked[1]) and asked[0].flatten().unique().numel() == 12, "each score has its own wish"
    apart, together = (
        (prior.scores(judged[0]) - asked[0][:, [2, 0]]).abs().mean(),
        prior(judged[1]) - asked[0].mean(1),
    )
    torch.testing.assert_close(losses[0], 2.0 * apart)
    torch.testing.assert_close(losses[1], 2.0 * together.abs().mean())
    assert abs(losses[0] - losses[1]) > 0.01


def test_the_quality_maps_learn_faster_by_the_dials_rate(tiny: ModuleType) -> None:
    moved = []
    for rate in (1.0, 10.0):
        config = Stage2Config(optimiser=tiny.RATE, quality_grad="logits", dial_rate=rate)
        stage, state = started(tiny, config)
        before = state.network.feat_emb.weight.clone()
        stage.step(state, tiny.batch(index()))
        moved.append((state.network.score_embed.weight.abs().max(), (state.network.feat_emb.weight - before).abs()))
    torch.testing.assert_close(moved[1][0], 10 * moved[0][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[1][1], moved[0][1])


def test_missing_codes_without_a_teacher_are_an_error(tiny: ModuleType) -> None:
    stage = Stage2(Stage2Config(quality_weight=0.0))
    state = stage.initial_state(tiny.network(), seed=3)
    with pytest.raises(UsageError, match="random targets"):
        stage.step(state, tiny.batch(index()))


def test_codes_of_another_network_are_refused(tiny: ModuleType) -> None:
    stage = Stage2(Stage2Config(quality_weight=0.0))
    state = stage.initial_state(tiny.network(), seed=3)
    with pytest.raises(UsageError, match="Codes have shape"):
        stage.step(state, tiny.batch(index(), codes=torch.zeros(4, 1, 8, 8, dtype=torch.long)))


def test_a_teacher_with_other_codebooks_is_refused(tiny: ModuleType) -> None:
    teacher = tiny.network()
    with torch.no_grad():
        teacher.quantize.embedding.weight[3] += 1
    with pytest.raises(UsageError, match="other codebooks"):
        Stage2(Stage2Config(quality_weight=0.0), teacher=teacher).initial_state(tiny.network(), seed=3)


def test_precomputed_codes_train_exactly_like_those_of_the_teacher(tiny: ModuleType) -> None:
    batch = tiny.batch(index())
    codes = tiny.network().encode_codes(batch.hq)
    results = []
    for given in (None, codes):
        stage, state = started(tiny, Stage2Config(quality_weight=0.0))
        results.append(stage.step(state, replace(batch, codes=given)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_missing_prior_is_refused() -> None:
    with pytest.raises(UsageError, match="quality prior"):
        Stage2(Stage2Config())


@pytest.mark.parametrize(
    "values",
    [
        {"dial_fraction": 0.5},
        {"dial_fraction": 1.5, "quality_target": "match"},
        {"dial_range": (0.9, 0.1)},
        {"quality_every": 0},
        {"quality_anchor": -1.0},
        {"dial_rate": 0.0},
        {"quality_anchor": 1.0, "quality_weight": 0.0},
    ],
)
def test_contradicting_configurations_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Stage2Config(**values)  # type: ignore[arg-type]


def test_dialled_samples_get_a_wish_and_their_codes_count_less(tiny: ModuleType) -> None:
    config = Stage2Config(quality_target="match", dial_fraction=1.0, dial_range=(0.25, 0.75), dial_code_weight=0.0)
    stage, state = started(tiny, config)
    wishes: list[Tensor] = []
    handle = state.network.score_embed.register_forward_pre_hook(lambda _, args: wishes.append(args[0]))
    batch = replace(tiny.batch(index()), quality=torch.ones(4))
    first = stage.step(state, batch)
    stage.step(state, batch)
    state.step = 1
    stage.step(state, batch)
    handle.remove()
    assert first["feature_loss"] == first["common_code_loss"] == first["hq_code_loss"] == 0
    assert ((wishes[0] >= 0.25) & (wishes[0] <= 0.75)).all()
    assert torch.equal(wishes[0], wishes[1]), "a function of the step"
    assert not torch.equal(wishes[0], wishes[2])


@pytest.mark.parametrize(
    "changes",
    [
        *({"conditioning": "adaln"}, {"conditioning": "none"}, {"codebooks": "single"}, {"quality_bins": [4, 4]}),
        *({"fusion": "attention"}, {"residual_hq": True}, {"hq_gate": "paper"}),
    ],
)
def test_variants_train(tiny: ModuleType, changes: dict[str, object]) -> None:
    stage, state = started(tiny, Stage2Config(quality_grad="logits"), **changes)
    values = stage.step(state, tiny.batch(index()))
    assert all(value.isfinite() and value.ndim == 0 and not value.requires_grad for value in values.values())
    assert ("hq_code_loss" in values) == (state.network.books == 2)


def test_one_sample_is_a_batch(tiny: ModuleType) -> None:
    stage, state = started(tiny, Stage2Config())
    assert stage.step(state, tiny.batch(index(1)))["loss"].isfinite()


@pytest.mark.slow
def test_stage_2_overfits_four_pictures(tiny: ModuleType) -> None:
    config = Stage2Config(optimiser=replace(tiny.RATE, learning_rate=3e-3), quality_weight=0.0)
    stage, state = started(tiny, config)
    with torch.no_grad():
        # Codes as stage 1 would leave them: spread over the latents of the pictures.
        latents = state.network.encode(tiny.batch(index()).hq).movedim(1, -1).flatten(0, 2)
        for network in (state.network, stage.teacher):
            network.quantize.embedding.weight.copy_(latents[::16])
            network.quantize_aesthetic.embedding.weight.copy_(latents[5::16])
    batch = tiny.batch(index())
    first = stage.step(state, batch)
    for state.step in range(1, 250):
        last = stage.step(state, batch)
    assert first["common_accuracy"] < 0.5
    assert last["common_accuracy"] > 0.97
    assert last["hq_accuracy"] > 0.97
    assert last["loss"] < 0.1 * first["loss"]
