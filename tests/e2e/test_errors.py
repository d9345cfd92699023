"""Bad input: the table of the server's API, row by row, over HTTP and its gRPC twin. After every
case the server gives its golden answer and holds no block."""

import json
import socket

import grpc
import pytest
from gloam_process import MODEL, PATIENCE_SECONDS

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(autouse=True)
def still_well(server, golden):
    yield
    golden(server)


def check_error(response, status, param=None, code=None):
    assert response.status == status, response.body[:300]
    assert set(response.error) == {"message", "type", "param", "code"}
    assert response.error["message"]
    assert response.error["param"] == param
    assert response.error["code"] == code


def check_grpc_error(call, request, status, param="", code=""):
    with pytest.raises(grpc.RpcError) as raised:
        call(request)
    error = raised.value
    assert error.code() == status, error
    trailers = dict(error.trailing_metadata() or ())
    assert trailers.get("gloam-error-param", "") == param
    assert trailers.get("gloam-error-code", "") == code


def valid(**fields):
    return {"model": MODEL, "prompt": "Hi", "max_tokens": 2, **fields}


BAD_BODIES = {
    "empty": b"",
    "not JSON": b"{model: 1}",
    "bad UTF-8": b'{"model": "\xc3\x28"}',
    "NUL": b'{"prompt": "x"}\x00',
    "trailing bytes": b'{"prompt": "x"} {}',
    "array": b"[]",
    "string": b'"prompt"',
    "too deep": b'{"metadata": ' + b"[" * 100 + b"]" * 100 + b"}",
    "far too deep": b"[" * 100_000,
    "duplicate keys": b'{"prompt": "x", "prompt": "y"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "1e999": b'{"prompt": "x", "temperature": 1e999}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_row_1_bad_json(server, path, name):
    response = server.post(path, BAD_BODIES[name])
    assert response.status == 400, response.body[:300]
    assert response.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["garbage", "bad UTF-8"])
def test_row_1_bad_messages_over_grpc(channel, name):
    data = {"garbage": b"\xff\xff\xff\xff", "bad UTF-8": b"\x0a\x02\xc3\x28"}[name]
    check_grpc_error(channel.unary_unary("/gloam.v1.Completions/Create"), data, INVALID)


def test_row_2_content_type_and_sizes(server, channel, stubs):
    plain = server.request("POST", COMPLETIONS, b"{}", {"Content-Type": "text/plain"})
    assert plain.status == 415
    huge = server.request(
        "POST", COMPLETIONS, None, {"Content-Type": "application/json", "Content-Length": "9" * 12}
    )
    assert huge.status == 413
    assert server.get("/version", **{"x-long": "a" * 100_000}).status == 431
    request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="x" * (33 << 20))])
    check_grpc_error(
        stubs.CompletionsStub(channel).Create, request, grpc.StatusCode.RESOURCE_EXHAUSTED
    )


RAW_REQUESTS = {
    "content-length and chunked": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two content-lengths": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "bad chunk size": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW_REQUESTS)
def test_row_3_malformed_framing(server, name):
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as connection:
        connection.sendall(RAW_REQUESTS[name])
        answer = b""
        while part := connection.recv(65536):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_row_5_control_characters_are_not_echoed(server):
    response = server.post(COMPLETIONS, valid(), **{"x-request-id": "a\tb\x01c"})
    assert "\x01" not in response.headers.get("x-request-id", "")
    weird = "no\x1b[31m such\nmodel"
    response = server.post(COMPLETIONS, valid(model=weird))
    check_error(response, 404, "model", "model_not_found")
    assert b"\x1b" not in response.body


def test_row_6_unknown_routes_and_methods(server, channel):
    assert server.post("/v1/embeddings", {}).status == 404
    response = server.get(COMPLETIONS)
    assert response.status == 405
    assert "POST" in response.headers["Allow"]
    unknown = channel.unary_unary("/gloam.v1.Completions/Nothing")
    check_grpc_error(unknown, b"", grpc.StatusCode.UNIMPLEMENTED)


def test_row_8_unknown_model(server, channel, stubs):
    check_error(server.post(COMPLETIONS, valid(model="x")), 404, "model", "model_not_found")
    check_grpc_error(
        stubs.ModelsStub(channel).Get,
        stubs.GetModelRequest(model="x"),
        grpc.StatusCode.NOT_FOUND,
        "model",
        "model_not_found",
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
    ],
)
def test_row_9_messages(server, messages, param):
    body = {"model": MODEL, "max_completion_tokens": 2}
    if messages is not None:
        body["messages"] = messages
    check_error(server.post(CHAT, body), 400, param)


@pytest.mark.parametrize("prompt", [None, "", [], [-1], [10**9], [1.5], [[1], ["x"]], {}])
def test_row_9_prompts(server, prompt):
    response = server.post(COMPLETIONS, {"model": MODEL, "max_tokens": 2, "prompt": prompt})
    assert response.status == 400
    assert response.error["param"].startswith("prompt")


def test_row_9_over_grpc(channel, stubs):
    chat = stubs.ChatCompletionsStub(channel).Create
    check_grpc_error(chat, stubs.CreateChatCompletionRequest(), INVALID, "messages")
    wizard = stubs.CreateChatCompletionRequest(messages=[stubs.ChatMessage(role="wizard")])
    check_grpc_error(chat, wizard, INVALID, "messages[0].role")
    create = stubs.CompletionsStub(channel).Create
    check_grpc_error(create, stubs.CreateCompletionRequest(), INVALID, "prompt")
    for ids in ([-1], [10**9]):
        prompt = stubs.Prompt(tokens=stubs.TokenIds(ids=ids))
        check_grpc_error(create, stubs.CreateCompletionRequest(prompt=[prompt]), INVALID, "prompt")


def test_row_10_context_length(server, channel, stubs):
    code = "context_length_exceeded"
    check_error(server.post(COMPLETIONS, valid(prompt="word " * 9000)), 400, "prompt", code)
    check_error(server.post(COMPLETIONS, valid(prompt="x" * 3_000_000)), 400, "prompt", code)
    check_error(server.post(COMPLETIONS, valid(max_tokens=8192)), 400, "max_tokens", code)
    request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="Hi")], max_tokens=8192)
    check_grpc_error(stubs.CompletionsStub(channel).Create, request, INVALID, "max_tokens", code)


OUT_OF_RANGE = [
    ("n", [0, 129]),
    ("best_of", [0, 129]),
    ("logprobs", [-1, 21]),
    ("prompt_logprobs", [-2, 10_000]),
    ("temperature", [-0.1, 2.1]),
    ("top_p", [0.0, 1.1]),
    ("min_p", [-0.1, 1.1]),
    ("top_k", [-2]),
    ("repetition_penalty", [0.0, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("max_tokens", [-1, 0]),
    ("min_tokens", [-1, 3]),
]


@pytest.mark.parametrize(("field", "values"), OUT_OF_RANGE)
def test_row_11_ranges(server, channel, stubs, field, values):
    create = stubs.CompletionsStub(channel).Create
    for value in values:
        check_error(server.post(COMPLETIONS, valid(**{field: value})), 400, field)
        fields = {"max_tokens": 2, field: value}
        request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="Hi")], **fields)
        check_grpc_error(create, request, INVALID, field)


@pytest.mark.parametrize("field", [field for field, _ in OUT_OF_RANGE] + ["seed", "stream", "echo"])
def test_row_11_types(server, field):
    for value in ("1", [1], {}):
        check_error(server.post(COMPLETIONS, valid(**{field: value})), 400, field)


def test_row_11_chat_logprobs(server, channel, stubs):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    message = [stubs.ChatMessage(role="user", content="x")]
    create = stubs.ChatCompletionsStub(channel).Create
    for fields in ({"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}):
        check_error(server.post(CHAT, {**body, **fields}), 400, "top_logprobs")
        request = stubs.CreateChatCompletionRequest(messages=message, **fields)
        check_grpc_error(create, request, INVALID, "top_logprobs")


ROW_12 = [
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", [""]),
    ("stop", ["x" * 1_000_000]),
    ("stop_token_ids", list(range(1_000_000))),
    ("stop_token_ids", [-1]),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: -101.0}),
    ("logit_bias", {10**8: 1.0}),
    ("logit_bias", {token: 1.0 for token in range(400_000)}),
]


@pytest.mark.parametrize(("field", "value"), ROW_12, ids=range(len(ROW_12)))
def test_row_12_stops_and_bias(server, channel, stubs, field, value):
    check_error(server.post(COMPLETIONS, valid(**{field: value})), 400, field)
    request = stubs.CreateCompletionRequest(prompt=[stubs.Prompt(text="Hi")], **{field: value})
    check_grpc_error(stubs.CompletionsStub(channel).Create, request, INVALID, field)


@pytest.mark.parametrize("bias", [{"x": 1}, {"1": "1"}, {"1.5": 1}, [], {"": 0}])
def test_row_12_bias_of_wrong_types(server, bias):
    check_error(server.post(COMPLETIONS, valid(logit_bias=bias)), 400, "logit_bias")


def test_row_14_templates_and_images(server):
    user = [{"role": "user", "content": "x"}]
    body = {"model": MODEL, "messages": user, "chat_template": "{{ 1 }}"}
    check_error(server.post(CHAT, body), 400, "chat_template")
    body = {"model": MODEL, "messages": user, "chat_template_kwargs": {"messages": []}}
    response = server.post(CHAT, body)
    assert response.status == 400
    assert response.error["param"].startswith("chat_template_kwargs")
    for url in ("http://127.0.0.1:1/x.png", "file:///etc/passwd"):
        image = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": image}]}
        response = server.post(CHAT, body)
        assert response.status == 400
        assert response.error["param"].startswith("messages[0].content")


def test_row_14_over_grpc(channel, stubs):
    request = stubs.CreateChatCompletionRequest(
        messages=[stubs.ChatMessage(role="user", content="x")], chat_template_kwargs={"messages": 1}
    )
    with pytest.raises(grpc.RpcError) as raised:
        stubs.ChatCompletionsStub(channel).Create(request)
    assert raised.value.code() == INVALID
    trailers = dict(raised.value.trailing_metadata())
    assert trailers["gloam-error-param"].startswith("chat_template_kwargs")


# Fields of a policy's changes, and the key that is wrong.
ROW_15_CHANGES = [
    ({"policy": "magic"}, "policy"),
    ({"policy": ""}, "policy"),
    ({"policy": "ds_twi"}, "selector.config_path"),  # there is no channel file
    ({"policy": "dense", "p": 0.9}, "p"),
    ({"p": 0.9}, "p"),  # dense is the default
    ({"policy": "quest_twi", "p": 0.0}, "p"),
    ({"policy": "quest_twi", "p": 1.5}, "p"),
    ({"policy": "quest_8192", "p": 0.5}, "p"),
    ({"policy": "quest_twi", "token_budget": 0}, "token_budget"),
    ({"policy": "dense", "token_budget": 64}, "token_budget"),
    ({"policy": "dense", "report_true_mass": True}, "report_true_mass"),
]

# Whole policies.
QUEST = {"type": "quest", "token_budget": 64}
DS = {"type": "ds", "r": 16, "token_budget": 64}
ROW_15_POLICIES = [
    ({"selecter": QUEST}, "selecter"),
    ({"selector": "quest"}, "selector"),
    ({"selector": {"type": "magic"}}, "selector.type"),
    ({"selector": {**QUEST, "token_budget": 0}}, "selector.token_budget"),
    ({"selector": {**QUEST, "token_budget": 1e9}}, "selector.token_budget"),
    ({"selector": {**QUEST, "sparsity_rate": 0.5}}, "selector.sparsity_rate"),
    ({"selector": {**QUEST, "chunk_size": 32}}, "selector.chunk_size"),
    ({"selector": {**QUEST, "window": 1}}, "selector.window"),
    ({"selector": {**DS, "config_path": "/etc/passwd"}}, "selector.config_path"),
    ({"selector": {**DS, "config_path": "channels/{model}.json"}}, "selector.config_path"),
    (
        {"selector": {"type": "tidal_decode", "token_budget": 64, "reselection_layers": [99]}},
        "selector.reselection_layers",
    ),
    ({"compressor": {"type": "snap_kv", "kernel_size": 2}}, "compressor.kernel_size"),
    (
        {"weight_estimator": {"type": "block_quant", "quant_bit": 3}},
        "weight_estimator.quant_bit",
    ),
    # The server keeps no such sidecar, and this one at 4 bits.
    ({"weight_estimator": {"type": "max_quant", "quant_bit": 4}}, "weight_estimator.type"),
    (
        {"weight_estimator": {"type": "block_quant", "quant_bit": 8}},
        "weight_estimator.quant_bit",
    ),
    ({"weight_pruner": {"type": "top_p", "threshold": 1.5}}, "weight_pruner.threshold"),
    ({"weight_pruner": {"type": "top_p", "threshold": 0}}, "weight_pruner.threshold"),
    ({"tail": "block_mean"}, "tail"),
    ({"use_estimated_weights_in_attn": True}, "use_estimated_weights_in_attn"),
    ({"sink_tokens": -1}, "sink_tokens"),
]


@pytest.mark.parametrize(("fields", "key"), ROW_15_CHANGES, ids=range(len(ROW_15_CHANGES)))
def test_row_15_changes(server, channel, stubs, fields, key):
    check_error(server.post(COMPLETIONS, valid(sparsity=fields)), 400, f"sparsity.{key}")
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(text="Hi")], sparsity=stubs.SparsityOptions(**fields)
    )
    create = stubs.CompletionsStub(channel).Create
    check_grpc_error(create, request, INVALID, f"sparsity.{key}")


@pytest.mark.parametrize(("policy", "key"), ROW_15_POLICIES, ids=range(len(ROW_15_POLICIES)))
def test_row_15_policies(server, channel, stubs, policy, key):
    check_error(server.post(COMPLETIONS, valid(sparsity=policy)), 400, f"sparsity.{key}")
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(text="Hi")],
        sparsity=stubs.SparsityOptions(policy_json=json.dumps(policy)),
    )
    create = stubs.CompletionsStub(channel).Create
    check_grpc_error(create, request, INVALID, f"sparsity.{key}")


def test_row_15_compressors(server):
    snap_kv = {"type": "snap_kv", "window_size": 4096, "max_capacity_prompt": 8000}
    response = server.post(COMPLETIONS, valid(sparsity={"compressor": snap_kv}))
    check_error(response, 400, "sparsity.compressor.window_size")  # more than a step holds
    body = valid(sparsity={"compressor": {"type": "snap_kv"}}, prompt_logprobs=0)
    check_error(server.post(COMPLETIONS, body), 400, "sparsity.compressor.type")


def test_row_15_types_and_chat(server, channel, stubs):
    check_error(server.post(COMPLETIONS, valid(sparsity="magic")), 400, "sparsity.policy")
    check_error(server.post(COMPLETIONS, valid(sparsity=5)), 400, "sparsity")
    check_error(server.post(COMPLETIONS, valid(sparsity={"policy": 5})), 400, "sparsity.policy")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "sparsity": "magic"}
    check_error(server.post(CHAT, body), 400, "sparsity.policy")
    for tokens in (-1, 1000):
        body = valid(sparsity_decode_prompt_tokens=tokens)
        check_error(server.post(COMPLETIONS, body), 400, "sparsity_decode_prompt_tokens")
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(text="Hi")], sparsity=stubs.SparsityOptions(policy_json="{")
    )
    create = stubs.CompletionsStub(channel).Create
    check_grpc_error(create, request, INVALID, "sparsity.policy_json")


def test_error_messages_hold_no_paths(server):
    for body in (
        valid(model="x"),
        valid(n=0),
        valid(prompt="word " * 9000),
        valid(sparsity="magic"),
    ):
        message = json.dumps(server.post(COMPLETIONS, body).json())
        assert "/" not in message.replace("/v1/", "").replace("api/", "")
