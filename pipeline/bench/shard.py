"""Row ``shard``: pictures proved whole and written to tars, images a second."""

import itertools
import tarfile
from pathlib import Path

from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.peers import peer
from pipeline.bench.pictures import write_pictures
from pipeline.shard import ShardConfig, shard


def run(options: Options) -> Measured:
    """The whole verb, plan to sealed manifest, in one process of ``threads`` threads; the peer decodes and writes."""
    source = options.folder / "pictures"
    paths = write_pictures(source, options.count, options.size, options.source)
    size = sum(path.stat().st_size for path in paths)
    unit_bytes = size // 2 + 1  # two units: one tar alone would not show what happens between them
    number = itertools.count()
    classic = peer("shard")

    def ours() -> Path:
        corpus = options.folder / f"ours-{next(number)}"
        shard(
            ShardConfig(
                input=str(source), corpus=str(corpus), unit_bytes=unit_bytes, threads=options.threads, workers=0
            )
        )
        return corpus

    def theirs() -> Path:
        folder = options.folder / f"peer-{next(number)}"
        classic.write(paths, folder, unit_bytes)
        return Path(folder)

    checked: dict[str, float] = {}
    mine, other = _pictures(ours()), _pictures(theirs())
    missing = len(set(mine) ^ set(other)) + abs(len(mine) - len(other))
    require_equal(checked, "pictures that are not byte for byte in both", missing, 0)
    rates = alternate(ours, theirs, options.count, options.runs)
    return Measured(ours=rates[0], peer=rates[1], unit="images/s", checked=checked, facts={"MB": round(size / 1e6, 1)})


def _pictures(folder: Path) -> list[bytes]:
    """Content of every member that is a picture, in all tars below ``folder``."""
    found = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and not member.name.endswith(".json"):
                    found.append(file.read())
    return found
