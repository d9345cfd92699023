"""The gRPC services through grpcio, and that they answer what HTTP answers."""

import grpc
import pytest
from gloam_process import MODEL
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Es war einmal ein König,",
    "Water boils at",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions_equal_http(channel, stubs, client, prompt):
    over_http = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
    request = stubs.CreateCompletionRequest(
        model=MODEL, prompt=[stubs.Prompt(text=prompt)], max_tokens=24, temperature=0
    )
    service = stubs.CompletionsStub(channel)
    answer = service.Create(request)
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == over_http.choices[0].text
    assert answer.usage.completion_tokens == over_http.usage.completion_tokens
    assert answer.usage.prompt_tokens == over_http.usage.prompt_tokens
    request.stream_options.include_usage = True
    chunks = list(service.CreateStream(request))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == over_http.choices[0].text
    assert chunks[-1].usage.completion_tokens == over_http.usage.completion_tokens
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert stubs.FinishReason.Name(finish[-1]) in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert not any(finish[:-1])


def test_greedy_chat_equals_http(channel, stubs, client):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    over_http = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=24, temperature=0
    )
    request = stubs.CreateChatCompletionRequest(
        model=MODEL,
        messages=[stubs.ChatMessage(**message) for message in messages],
        max_completion_tokens=24,
        temperature=0,
    )
    service = stubs.ChatCompletionsStub(channel)
    answer = service.Create(request)
    assert answer.choices[0].message.content == over_http.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    chunks = [chunk for chunk in service.CreateStream(request) if chunk.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == over_http.choices[0].message.content


def test_sampled_answers_with_a_seed_equal_http(channel, stubs, client):
    over_http = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=12, temperature=1, top_p=0.9, seed=5, n=3
    )
    request = stubs.CreateCompletionRequest(
        model=MODEL,
        prompt=[stubs.Prompt(text=PROMPTS[0])],
        max_tokens=12,
        temperature=1,
        top_p=0.9,
        seed=5,
        n=3,
    )
    answer = stubs.CompletionsStub(channel).Create(request)
    assert [c.text for c in answer.choices] == [c.text for c in over_http.choices]


def test_logprobs_equal_http(channel, stubs, client):
    over_http = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=6, temperature=0, logprobs=2, echo=True
    )
    expected = over_http.choices[0].logprobs
    request = stubs.CreateCompletionRequest(
        model=MODEL,
        prompt=[stubs.Prompt(text=PROMPTS[0])],
        max_tokens=6,
        temperature=0,
        logprobs=2,
        echo=True,
    )
    got = stubs.CompletionsStub(channel).Create(request).choices[0].logprobs
    assert list(got.tokens) == expected.tokens
    assert list(got.text_offset) == expected.text_offset
    assert list(got.token_logprobs)[1:] == pytest.approx(expected.token_logprobs[1:], abs=1e-4)
    for ours, theirs in zip(got.top_logprobs[1:], expected.top_logprobs[1:], strict=True):
        assert dict(ours.logprobs) == pytest.approx(theirs, abs=1e-4)


def test_token_prompts_and_stop(channel, stubs, server):
    tokens = server.post("/tokenize", {"model": MODEL, "prompt": PROMPTS[0]}).json()["tokens"]
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(tokens=stubs.TokenIds(ids=tokens))],
        max_tokens=24,
        temperature=0,
        stop=["."],
    )
    choice = stubs.CompletionsStub(channel).Create(request).choices[0]
    assert "Paris" in choice.text and "." not in choice.text
    assert choice.stop_reason == "."
    assert choice.finish_reason == stubs.FINISH_REASON_STOP


def test_models_and_policies(channel, stubs):
    models = stubs.ModelsStub(channel)
    listed = models.List(stubs.ListModelsRequest()).models
    assert [model.id for model in listed] == [MODEL]
    assert models.Get(stubs.GetModelRequest(model=MODEL)) == listed[0]
    assert listed[0].max_model_len == 8192
    policies = stubs.SparsityStub(channel).ListPolicies(stubs.ListPoliciesRequest()).policies
    assert "dense" in [policy.name for policy in policies]


def test_health(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "gloam.v1.ChatCompletions"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_reflection_gives_the_services_and_their_files(channel):
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="gloam.v1.ChatCompletions"),
    ]
    listed, file = reflection.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert {"gloam.v1.Completions", "gloam.v1.Sparsity", "grpc.health.v1.Health"} <= names
    assert file.file_descriptor_response.file_descriptor_proto


def test_deadline(channel, stubs, server):
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(text="x")], max_tokens=4000, ignore_eos=True
    )
    with pytest.raises(grpc.RpcError) as raised:
        stubs.CompletionsStub(channel).Create(request, timeout=0.5)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_until_idle()
