"""The README's way onto a cluster: ``ray start --head``, then ``ray job submit``, with a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.chain import Chain

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A Ray cluster that no test process started a job on, and the shell it was started in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    # Ray puts sockets into its folder, whose names may have 107 bytes.
    session = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    environment |= {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "IQPIR_WORKSPACE": str(home / "workspace"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard, client, agent = free_ports(4)
    command = f"ray start --head --port {port} --dashboard-host 127.0.0.1 --dashboard-port {dashboard} --num-cpus 3"
    options = f"--ray-client-server-port {client} --dashboard-agent-listen-port {agent} --temp-dir {session} --block"
    with (session / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command.split(), *options.split()], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, process, session / "head.log")
        yield Head(address, environment)
    finally:
        end_session(process)
        shutil.rmtree(session, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports below those that Ray's workers choose from (10002 to 19999)."""
    found = []
    for port in range(8300 + os.getpid() % 1000, 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            requests.get(f"{address}/api/version", timeout=2)
        except requests.RequestException:
            time.sleep(0.3)
        else:
            return
    raise AssertionError(log.read_text())


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End what this head started, and no other Ray of this machine (``ray stop`` would)."""
    process.kill()
    process.wait()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.slow
def test_nobody_gets_in_without_the_token(head: Head) -> None:
    assert requests.get(f"{head.address}/api/jobs/", timeout=10).status_code == 401


@pytest.mark.slow
def test_a_submitted_stage2_trains_on_the_cluster_and_ends_in_one_json_line(head: Head, chain: Chain) -> None:
    job = "python jobs/stage2.py --config jobs/recipes/tiny32.yaml --name submitted --steps 4 --batch_size 4"
    data = f"--corpus {chain.data.corpus} --view {chain.data.view} --stage1 {chain.stage1.run} --runs {chain.data.runs}"
    tracking = f"--tracking_uri {chain.data.tracking_uri}"
    done = subprocess.run(
        [
            "ray",
            "job",
            "submit",
            "--address",
            head.address,
            "--working-dir",
            ".",
            "--",
            *f"{job} {data} {tracking}".split(),
        ],
        cwd=REPOSITORY,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    result = json.loads(line)
    assert (result["status"], result["step"]) == ("done", 4)
    assert result["run"] == f"{chain.data.runs}/submitted"
    config = json.loads((Path(result["checkpoint"]) / "config.json").read_text())
    assert config["metadata"]["lineage"]["stage1"] == chain.stage1_digest
