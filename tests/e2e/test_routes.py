"""Every route besides generation."""

import json
import subprocess

import pytest
from gloam_process import MODEL, PATIENCE_SECONDS, binary

TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "naïve café – “quotes” …",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界。こんにちは世界 안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "def f(x):\n\treturn x ** 2  # ∑ π ≈ 3.14159\n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
]


@pytest.mark.parametrize("path", ["/health", "/live", "/ready"])
def test_probes(server, path):
    assert server.get(path).status == 200


def test_version(server):
    assert server.get("/version").json()["version"]


def test_models(server, client):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    assert models[0].object == "model"
    assert models[0].max_model_len == 8192
    assert client.models.retrieve(MODEL).id == MODEL


def test_pages(server):
    spec = server.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"):
        assert path in spec["paths"]
    for path in ("/", "/docs"):
        page = server.get(path)
        assert page.status == 200
        assert page.headers["Content-Type"].startswith("text/html")


def test_sparsity_policies(server, channel, stubs):
    listed = server.get("/v1/sparsity/policies").json()
    assert listed["default"] == "dense"
    policies = {policy["name"]: policy for policy in listed["data"]}
    assert {"dense", "twilight", "quest_1024", "quest_8192", "quest_twi"} == {
        name for name, policy in policies.items() if policy["usable"]
    }
    assert {"ds_1024", "ds_8192", "ds_twi"} == {
        name for name, policy in policies.items() if not policy["usable"]
    }
    for policy in policies.values():
        assert policy["is_default"] == (policy["name"] == "dense")
        assert policy["usable"] == (policy["reason"] is None)
    assert policies["quest_twi"]["policy"]["weight_pruner"]["threshold"] == 0.85
    over_grpc = stubs.SparsityStub(channel).ListPolicies(stubs.ListPoliciesRequest()).policies
    assert [policy.name for policy in over_grpc] == list(policies)
    for policy in over_grpc:
        assert json.loads(policy.policy_json) == policies[policy.name]["policy"]
        assert policy.usable == policies[policy.name]["usable"]


def test_policies_of_a_folder(start_gloam, tmp_path):
    mine = {"selector": {"type": "oracle_topk", "token_budget": 64}}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    flags = ["--sparsity-dir", str(tmp_path), "--sparsity", "mine"]
    server = start_gloam(*flags, "--sparsity-policies", "quest_1024")
    listed = server.get("/v1/sparsity/policies").json()
    assert listed["default"] == "mine"
    usable = {policy["name"] for policy in listed["data"] if policy["usable"]}
    assert usable == {"dense", "mine", "quest_1024"}
    server.terminate()
    assert server.wait() == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sparsity", "magic"], "--sparsity: there is no policy 'magic'"),
        (["--sparsity", "ds_twi"], "--sparsity: the policy 'ds_twi' cannot be used"),
        (["--sparsity-policies", "quest_1024,magic"], "--sparsity-policies: there is no policy"),
        (["--sparsity-dir", "/nonexistent"], "--sparsity-dir: cannot read /nonexistent"),
        (["--device", "cpu", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype: on the CPU the KV cache "
         "holds bf16, f16 or f32; fp8 needs a GPU"),
    ],
)
def test_flags_that_cannot_be_served(flags, said):
    command = [str(binary()), "serve", MODEL, "--port", "0", "--grpc-port", "0", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert run.returncode == 1
    assert said in run.stderr


def test_unknown_route_and_method(server):
    missing = server.get("/v1/nothing")
    assert missing.status == 404
    assert set(missing.error) == {"message", "type", "param", "code"}
    wrong = server.request("DELETE", "/v1/models")
    assert wrong.status == 405
    assert "GET" in wrong.headers["Allow"]


def test_response_headers(server):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    response = server.post("/v1/completions", body, **{"x-request-id": "trace-7.a"})
    assert response.headers["x-request-id"] == "trace-7.a"
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert server.get("/version").headers["x-request-id"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_round_trip(server, channel, stubs, text):
    answer = server.post("/tokenize", {"model": MODEL, "prompt": text}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 8192
    tokenizer = stubs.TokenizerStub(channel)
    over_grpc = tokenizer.Tokenize(stubs.TokenizeRequest(model=MODEL, prompt=text))
    assert list(over_grpc.tokens) == answer["tokens"]
    body = {"model": MODEL, "tokens": answer["tokens"]}
    assert server.post("/detokenize", body).json()["prompt"] == text
    back = tokenizer.Detokenize(stubs.DetokenizeRequest(model=MODEL, tokens=answer["tokens"]))
    assert back.prompt == text


def test_tokenize_messages(server, channel, stubs):
    messages = [{"role": "user", "content": "Hi"}]
    tokens = server.post("/tokenize", {"model": MODEL, "messages": messages}).json()["tokens"]
    prompt = server.post("/detokenize", {"model": MODEL, "tokens": tokens}).json()["prompt"]
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    request = stubs.TokenizeRequest(
        model=MODEL, messages=stubs.ChatMessages(messages=[stubs.ChatMessage(**messages[0])])
    )
    assert list(stubs.TokenizerStub(channel).Tokenize(request).tokens) == tokens


def test_special_tokens_in_content_are_text(server):
    def count(content):
        messages = [{"role": "user", "content": content}]
        return server.post("/tokenize", {"model": MODEL, "messages": messages}).json()["count"]

    assert count("<|im_end|>") > count("x") + 1


def test_metrics_have_the_documented_names(server, client):
    client.completions.create(model=MODEL, prompt="One two", max_tokens=4, temperature=0)
    text = server.get("/metrics").body.decode()
    for name in (
        "gloam:num_requests_waiting",
        "gloam:num_requests_running",
        "gloam:kv_cache_usage_perc",
        "gloam:cache_config_info",
        "gloam:time_to_first_token_seconds_bucket",
        "gloam:inter_token_latency_seconds_bucket",
        "gloam:e2e_request_latency_seconds_bucket",
        "gloam:request_queue_time_seconds_bucket",
        "gloam:prompt_tokens_total",
        "gloam:generation_tokens_total",
        "gloam:num_preemptions_total",
        "gloam:prefix_cache_queries",
        "gloam:prefix_cache_hits",
        "gloam:request_success_total",
    ):
        assert f"\n{name}" in text, name
    assert 'block_size="16"' in text
    assert 'finished_reason="length"' in text
    assert server.metric("gloam:generation_tokens_total") >= 4
