"""Upkeep of a codebook: closed forms, collapse avoided, the same on every rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import iqpir
from iqpir.errors import UsageError
from iqpir.networks.codebook import (
    CodebookStatistics,
    EmaCodebook,
    EmaConfig,
    VectorQuantizer,
    count_codes,
    k_means,
)

PLAIN = EmaConfig(kmeans_iterations=0, revive_every=0, decay=0.9)


def quantizer_of(size: int = 8, width: int = 4) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(size, width)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def clusters(count: int, batch: int = 4, width: int = 4, seed: int = 5) -> Tensor:
    """Latents [batch,width,8,8] around ``count`` well separated centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(count, width, generator=torch.Generator().manual_seed(77))
    chosen = torch.randint(count, (batch * 64,), generator=generator)
    rows = centres[chosen] + 0.05 * torch.randn(batch * 64, width, generator=generator)
    return rows.view(batch, 8, 8, width).movedim(-1, 1)


def error(quantizer: VectorQuantizer, latent: Tensor) -> float:
    return (quantizer.lookup(quantizer.assign(latent)) - latent).square().mean().item()


# --- statistics ---------------------------------------------------------------------------


def test_statistics_of_known_counts() -> None:
    even = CodebookStatistics.of(torch.tensor([5, 5, 5, 5]))
    assert [even.usage.item(), even.perplexity.item(), even.dead.item()] == pytest.approx([1.0, 4.0, 0])
    half = CodebookStatistics.of(torch.tensor([3.0, 0.0, 3.0, 0.0]))
    assert [half.usage.item(), half.perplexity.item(), half.dead.item()] == pytest.approx([0.5, 2.0, 2])
    nothing = CodebookStatistics.of(torch.zeros(4))
    assert [nothing.usage.item(), nothing.perplexity.item(), nothing.dead.item()] == pytest.approx([0.0, 1.0, 4])


def test_codes_are_counted() -> None:
    assert count_codes(torch.tensor([[0, 2], [2, 3]]), 5).tolist() == [1, 0, 2, 1, 0]


# --- moving averages ----------------------------------------------------------------------


def test_one_update_is_the_weighted_mean_of_old_code_and_latents() -> None:
    quantizer = quantizer_of()
    old = quantizer.embedding.weight.detach().clone()
    ema = EmaCodebook(quantizer, PLAIN, seed=0)
    latent = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    codes = quantizer.assign(latent)
    ema.update(latent, codes)
    rows = latent.movedim(1, -1).reshape(-1, 4)
    for code in range(8):
        assigned = rows[codes.flatten() == code]
        expected = (0.9 * old[code] + 0.1 * assigned.sum(0)) / (0.9 + 0.1 * len(assigned))
        torch.testing.assert_close(quantizer.embedding.weight[code], expected)


def test_a_codes_place_is_kept_while_nothing_is_assigned_to_it() -> None:
    quantizer = quantizer_of()
    ema = EmaCodebook(quantizer, PLAIN, seed=0)
    lonely = quantizer.embedding.weight[7].detach().clone()
    for _ in range(300):
        ema.update(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
    assert ema.counts[7] < 1e-9
    torch.testing.assert_close(quantizer.embedding.weight[7], lonely, atol=1e-4, rtol=1e-4)


def test_only_gated_samples_teach() -> None:
    latent = clusters(8)
    gated, subset = quantizer_of(), quantizer_of()
    gate = torch.tensor([True, False, True, False])
    codes = gated.assign(latent)
    EmaCodebook(gated, PLAIN, seed=0).update(latent, codes, gate)
    EmaCodebook(subset, PLAIN, seed=0).update(latent[gate], codes[gate])
    torch.testing.assert_close(gated.embedding.weight, subset.embedding.weight)


def test_a_batch_without_gated_samples_changes_nothing() -> None:
    quantizer = quantizer_of()
    before = quantizer.embedding.weight.detach().clone()
    ema = EmaCodebook(quantizer, EmaConfig(kmeans_iterations=0, revive_every=1), seed=0)
    counts = ema.counts.clone()
    ema.update(clusters(8), quantizer.assign(clusters(8)), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(quantizer.embedding.weight, before)
    assert torch.equal(ema.counts, counts)


def test_averages_find_the_latents() -> None:
    quantizer = quantizer_of(size=32)
    ema = EmaCodebook(quantizer, EmaConfig(decay=0.8, revive_every=5), seed=0)
    before = error(quantizer, clusters(16))
    assert ema.start(clusters(16))
    for seed in range(30):
        latent = clusters(16, seed=seed)
        ema.update(latent, quantizer.assign(latent))
    assert error(quantizer, clusters(16, seed=99)) < 0.01 < before


# --- revival ------------------------------------------------------------------------------


def collapsed() -> VectorQuantizer:
    """All codes but one are far from every latent."""
    quantizer = quantizer_of(size=16)
    with torch.no_grad():
        quantizer.embedding.weight[1:] += 1e4
    return quantizer


def test_dead_codes_move_onto_latents_of_the_batch() -> None:
    quantizer = collapsed()
    config = EmaConfig(kmeans_iterations=0, revive_every=1, decay=0.5, revive_below=0.1)
    ema = EmaCodebook(quantizer, config, seed=3)
    for seed in range(6):
        latent = clusters(16, seed=seed)
        ema.update(latent, quantizer.assign(latent))
    assert quantizer.embedding.weight.abs().max() < 1e3
    assert CodebookStatistics.of(count_codes(quantizer.assign(latent), 16)).dead < 4


def test_without_revival_a_collapsed_codebook_stays_collapsed() -> None:
    quantizer = collapsed()
    ema = EmaCodebook(quantizer, EmaConfig(kmeans_iterations=0, revive_every=0, decay=0.5), seed=3)
    for seed in range(6):
        latent = clusters(16, seed=seed)
        ema.update(latent, quantizer.assign(latent))
    assert CodebookStatistics.of(count_codes(quantizer.assign(latent), 16)).dead == 15


def test_hq_codes_are_revived_from_gated_latents_alone() -> None:
    quantizer = collapsed()
    ema = EmaCodebook(quantizer, EmaConfig(kmeans_iterations=0, revive_every=1, decay=0.01), seed=3)
    latent = torch.cat([torch.full((1, 4, 8, 8), 5.0), torch.full((1, 4, 8, 8), -5.0)])
    ema.update(latent, quantizer.assign(latent), torch.tensor([True, False]))
    assert (quantizer.embedding.weight == 5.0).all(dim=1).any()
    assert not (quantizer.embedding.weight == -5.0).all(dim=1).any()


def test_upkeep_is_a_function_of_the_seed() -> None:
    def kept(seed: int) -> Tensor:
        quantizer = collapsed()
        ema = EmaCodebook(quantizer, EmaConfig(revive_every=1, decay=0.5), seed=seed)
        ema.start(clusters(40))
        ema.update(clusters(40), quantizer.assign(clusters(40)))
        return quantizer.embedding.weight.detach()

    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))


# --- k-means ------------------------------------------------------------------------------


def test_k_means_serves_the_points_better_with_each_round_and_leaves_no_code_empty() -> None:
    points = clusters(30, batch=8).movedim(1, -1).reshape(-1, 4)

    def after(rounds: int) -> tuple[float, Tensor]:
        centroids, counts = k_means(points, 12, rounds, torch.Generator().manual_seed(0))
        return torch.cdist(points, centroids).min(dim=1).values.square().sum().item(), counts

    spreads = [after(rounds)[0] for rounds in (0, 1, 3, 20)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.8 * spreads[0]
    assert after(20)[1].sum() == len(points)
    assert (after(20)[1] > 0).all()


def test_k_means_moves_an_empty_cluster_to_a_badly_served_point() -> None:
    points = torch.cat([torch.zeros(99, 2), torch.full((1, 2), 50.0)])
    centroids, counts = k_means(points, 3, 5, torch.Generator().manual_seed(1))
    assert [50.0, 50.0] in centroids.tolist()
    assert counts.sort().values.tolist()[-2:] == [1.0, 99.0]


def test_k_means_with_fewer_points_than_codes_gives_distinct_codes() -> None:
    points = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    centroids, _ = k_means(points, 12, 3, torch.Generator().manual_seed(0))
    assert len(centroids.unique(dim=0)) == 12
    assert centroids.isfinite().all()


def test_a_start_without_any_vector_is_put_off() -> None:
    quantizer = quantizer_of()
    ema = EmaCodebook(quantizer, EmaConfig(), seed=0)
    assert not ema.start(clusters(8), torch.zeros(4, dtype=torch.bool))
    assert not ema.started
    with pytest.raises(ValueError, match="start"):
        ema.update(clusters(8), quantizer.assign(clusters(8)))
    assert ema.start(clusters(8))
    assert ema.started


# --- state --------------------------------------------------------------------------------


def test_a_resumed_codebook_goes_on_bit_for_bit() -> None:
    config = EmaConfig(decay=0.7, revive_every=2, kmeans_iterations=2)
    whole, first = quantizer_of(), quantizer_of()
    ema = EmaCodebook(whole, config, seed=1)
    ema.start(clusters(6))
    for seed in range(6):
        ema.update(clusters(6, seed=seed), whole.assign(clusters(6, seed=seed)))

    before = EmaCodebook(first, config, seed=1)
    before.start(clusters(6))
    for seed in range(3):
        before.update(clusters(6, seed=seed), first.assign(clusters(6, seed=seed)))
    second = VectorQuantizer(8, 4)
    second.load_state_dict(first.state_dict())
    after = EmaCodebook(second, config, seed=1)
    after.load_state_dict(before.state_dict())
    for seed in range(3, 6):
        after.update(clusters(6, seed=seed), second.assign(clusters(6, seed=seed)))
    assert torch.equal(second.embedding.weight, whole.embedding.weight)
    assert all(torch.equal(value, ema.state_dict()[key]) for key, value in after.state_dict().items())


def test_the_state_is_apart_from_the_networks_and_is_checked() -> None:
    quantizer = quantizer_of()
    keys = list(quantizer.state_dict())
    ema = EmaCodebook(quantizer, PLAIN, seed=0)
    assert list(quantizer.state_dict()) == keys == ["embedding.weight"]
    assert not quantizer.embedding.weight.requires_grad
    with pytest.raises(UsageError, match="codebook with 8 codes"):
        ema.load_state_dict(EmaCodebook(quantizer_of(size=9), PLAIN, seed=0).state_dict())
    with pytest.raises(UsageError, match="decay"):
        EmaConfig(decay=1.0)


# --- ranks --------------------------------------------------------------------------------

RANK = """
import sys
import torch
from torch import distributed
from iqpir.networks.codebook import EmaCodebook, EmaConfig, VectorQuantizer, gather_rows

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
latents = torch.load(f"{folder}/latents.pt", weights_only=True)
quantizer = VectorQuantizer(8, 4)
quantizer.load_state_dict(torch.load(f"{folder}/codes.pt", weights_only=True))
plain = EmaCodebook(quantizer, EmaConfig(kmeans_iterations=0, revive_every=0, decay=0.9), seed=0)
mine = latents[rank::2]
plain.update(mine, quantizer.assign(mine))
updated = quantizer.embedding.weight.clone()

gathered = gather_rows(torch.full((3 * rank, 2), float(rank)))
full = EmaCodebook(quantizer, EmaConfig(revive_every=1, decay=0.5, revive_below=0.9), seed=0)
gate = torch.tensor([rank == 1, False])
full.start(mine[:2], gate)
full.update(mine[:2], quantizer.assign(mine[:2]), gate)
kept = quantizer.embedding.weight.clone()
torch.save({"updated": updated, "gathered": gathered, "kept": kept}, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_keep_one_codebook(tmp_path: Path) -> None:
    latent, quantizer = clusters(6), quantizer_of()
    torch.save(latent, tmp_path / "latents.pt")
    torch.save(quantizer.state_dict(), tmp_path / "codes.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(iqpir.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    alone = EmaCodebook(quantizer, PLAIN, seed=0)
    alone.update(latent, quantizer.assign(latent))
    torch.testing.assert_close(first["updated"], quantizer.embedding.weight)
    assert torch.equal(first["updated"], second["updated"])
    assert torch.equal(first["kept"], second["kept"])
    assert first["gathered"].tolist() == [[1.0, 1.0]] * 3
