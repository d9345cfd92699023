import importlib
import pathlib
import sys
import types

import grpc
import grpc_tools
import openai
import pytest
from grpc_tools import protoc

from gloam_process import MODEL, PATIENCE_SECONDS, ROOT, GloamProcess

GOLDEN_PROMPT = "The capital of France is"


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """Generated from proto/: one namespace with every message and every service's Stub."""
    out = tmp_path_factory.mktemp("stubs")
    files = sorted(str(path) for path in (ROOT / "proto").glob("gloam/v1/*.proto"))
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{ROOT / 'proto'}", f"-I{well_known}"]
    arguments += [f"--python_out={out}", f"--grpc_python_out={out}", *files]
    assert protoc.main(["protoc", *arguments]) == 0
    sys.path.insert(0, str(out))
    names = types.SimpleNamespace()
    for path in files:
        for suffix in ("_pb2", "_pb2_grpc"):
            module = importlib.import_module(f"gloam.v1.{pathlib.Path(path).stem}{suffix}")
            for name in dir(module):
                if not name.startswith("_"):
                    setattr(names, name, getattr(module, name))
    return names


@pytest.fixture(scope="session")
def start_gloam(tmp_path_factory):
    """start_gloam(*flags): a server of the test's own, killed at the end if it still runs."""
    started = []

    def start(*flags):
        log_path = tmp_path_factory.mktemp("gloam") / "stderr.log"
        started.append(GloamProcess(*flags, log_path=log_path))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture(scope="session")
def server(start_gloam):
    """The server that most tests share; at the end nothing of them is left in it."""
    process = start_gloam()
    yield process
    assert process.process.poll() is None, "the server died during the tests"
    process.wait_until_idle()
    process.terminate()
    assert process.wait() == 0


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(
        base_url=server.base_url, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS
    )


@pytest.fixture(scope="session")
def channel(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="session")
def golden(client):
    """check(): the server still gives the answer that it gave at first, and nothing is left over."""

    def answer():
        completion = client.completions.create(
            model=MODEL, prompt=GOLDEN_PROMPT, max_tokens=12, temperature=0
        )
        return completion.choices[0].text

    first = answer()
    assert "Paris" in first

    def check(server):
        assert answer() == first
        server.wait_until_idle()

    return check
