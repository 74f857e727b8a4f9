"""What stages 2 and 3 take over from stage 1: the settings that give its codes a meaning, and the codes themselves."""

from typing import Any

import numpy as np
import pytest

from iqpir.config import preset
from iqpir.errors import UsageError
from iqpir.networks.restoration_network import build
from iqpir.training import checkpoint
from pipeline.corpus import Corpus
from pipeline.encode import codes_fingerprint, encode_pictures, read_codes
from pipeline.stage2 import Stage2Training
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.config import network_config
from pipeline.training.feed import FeedConfig, Samples
from pipeline.view import read_view
from tests.chain import Chain


def settings(**network: Any) -> Stage2Training:
    return Stage2Training(corpus="c", view="v", name="n", stage1="s", network=network)


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.5), ("residual_hq", True), ("hq_threshold", 0.9), ("codebooks", "single")]
)
def test_a_later_stage_cannot_change_what_its_codes_mean(name: str, value: Any) -> None:
    base = preset("tiny32")
    with pytest.raises(UsageError, match=f"network.{name}"):
        network_config(settings(**{name: value}), base)
    assert network_config(settings(**{name: getattr(base, name)}), base) == base


def test_a_later_stage_decides_on_its_own_parts() -> None:
    changed = network_config(settings(hq_gate="paper", conditioning="adaln", transformer_layers=1), preset("tiny32"))
    assert (changed.hq_gate, changed.conditioning, changed.transformer_layers) == ("paper", "adaln", 1)


def test_cached_codes_are_those_of_the_picture_as_it_is_mirrored(chain: Chain) -> None:
    """The feed picks original or mirrored codes by the same draw that mirrors the picture."""
    found = checkpoint.load(fetch_checkpoint(chain.stage1.run))
    network = build(found.network_config)
    network.load_state_dict(found.model)
    corpus = Corpus(chain.data.corpus)
    rows = read_view(corpus, chain.data.view).split("train")
    feed = FeedConfig()
    fingerprint = codes_fingerprint(str(found.metadata["stage1_digest"]), feed.fit, feed.pixels)
    side = found.network_config.latent_size
    codes = read_codes(corpus, fingerprint, rows, (network.books, side, side))
    samples = Samples(chain.data.corpus, rows, feed, found.network_config, None, codes, 5)
    items = [samples[position] for position in range(2 * len(samples))]
    assert {item.flipped for item in items} == {True, False}
    expected = encode_pictures(network.eval(), [item.hq for item in items])[:, 0]
    given = np.stack([item.codes for item in items if item.codes is not None])
    # A latent halfway between two codes may fall either way in a batch of another size.
    assert given.shape == expected.shape and (given == expected).mean() > 0.999
    mirrored = np.array([item.flipped for item in items])
    assert (given[mirrored] != codes[[item.index for item in items if item.flipped], 0]).any()
