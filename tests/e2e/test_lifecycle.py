"""Servers of their own: API keys, a full queue, and SIGTERM."""

import concurrent.futures
import threading
import time

import grpc
import openai
import pytest
from gloam_process import MODEL, PATIENCE_SECONDS
from grpc_health.v1 import health_pb2, health_pb2_grpc


def test_row_7_api_keys(start_gloam, stubs):
    server = start_gloam("--api-key", "sesame")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/tokenize")):
            response = server.request(method, path, None, headers)
            assert response.status == 401, path
            assert response.error["code"] == "invalid_api_key"
    for path in ("/health", "/live", "/ready"):
        assert server.get(path).status == 200
    client = openai.OpenAI(base_url=server.base_url, api_key="sesame", max_retries=0)
    assert client.models.list().data[0].id == MODEL
    with grpc.insecure_channel(server.grpc_address) as channel:
        listing = stubs.ModelsStub(channel).List
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as raised:
                listing(stubs.ListModelsRequest(), metadata=metadata)
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        right = (("authorization", "Bearer sesame"),)
        assert listing(stubs.ListModelsRequest(), metadata=right).models[0].id == MODEL
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
    server.terminate()
    assert server.wait() == 0


def test_row_16_full_queue(start_gloam, stubs):
    server = start_gloam("--max-num-seqs", "1", "--max-queued-requests", "1")
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 4}
    running = client.completions.create(
        model=MODEL, prompt="Hi", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(running))
    waiting = threading.Thread(target=server.post, args=("/v1/completions", body))
    waiting.start()
    while server.metric("gloam:num_requests_waiting") < 1:
        time.sleep(0.01)
    response = server.post("/v1/completions", body)
    assert response.status == 503
    assert response.error["code"] == "server_is_overloaded"
    assert int(response.headers["Retry-After"]) > 0
    with grpc.insecure_channel(server.grpc_address) as channel:
        request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="Hi")])
        with pytest.raises(grpc.RpcError) as raised:
            stubs.CompletionsStub(channel).Create(request)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    running.close()
    waiting.join()
    server.wait_until_idle()
    server.terminate()
    assert server.wait() == 0


def test_row_20_sigterm_drains(start_gloam, stubs):
    server = start_gloam("--shutdown-timeout", str(PATIENCE_SECONDS))
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    fields = {"model": MODEL, "max_tokens": 150, "temperature": 0, "stream": True}
    fields["extra_body"] = {"ignore_eos": True}
    begun = threading.Barrier(5)

    def over_http(i):
        chunks = client.completions.create(prompt=f"Number {i}", **fields)
        text, reason = "", None
        for count, chunk in enumerate(chunks):
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason
            if count == 0:
                begun.wait(PATIENCE_SECONDS)
        return text, reason

    def over_grpc(channel):
        request = stubs.CreateCompletionRequest(
            prompt=[stubs.Prompt(text="Number 0")], max_tokens=150, temperature=0, ignore_eos=True
        )
        text, reason = "", 0
        for count, chunk in enumerate(stubs.CompletionsStub(channel).CreateStream(request)):
            text += "".join(choice.text for choice in chunk.choices)
            reason = max([reason] + [choice.finish_reason for choice in chunk.choices])
            if count == 0:
                begun.wait(PATIENCE_SECONDS)
        return text, reason

    with (
        grpc.insecure_channel(server.grpc_address) as channel,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        answers = [pool.submit(over_http, i) for i in range(3)]
        grpc_answer = pool.submit(over_grpc, channel)
        begun.wait(PATIENCE_SECONDS)
        server.terminate()
        while server.get("/ready").status == 200:
            time.sleep(0.01)
        assert server.get("/live").status == 200
        refused = server.post("/v1/completions", {"model": MODEL, "prompt": "x"})
        assert refused.status == 503
        with pytest.raises(grpc.RpcError) as raised:
            request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="Hi")])
            stubs.CompletionsStub(channel).Create(request)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        results = [answer.result() for answer in answers]
        assert all(reason == "length" for _, reason in results)
        assert grpc_answer.result() == (results[0][0], stubs.FINISH_REASON_LENGTH)
    assert server.wait() == 0


def test_row_20_timeout_ends_what_still_runs(start_gloam):
    server = start_gloam("--shutdown-timeout", "1")
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.terminate()
    assert server.wait() == 0


def test_row_20_second_signal_exits_at_once(start_gloam):
    server = start_gloam("--shutdown-timeout", "600")
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.terminate()
    while server.get("/ready").status == 200:
        time.sleep(0.01)
    server.terminate()
    assert server.wait() != 0
