"""Sparse attention by request: what the answers and the statistics say of it."""

import concurrent.futures

import pytest
from gloam_process import MODEL

COMPLETIONS = "/v1/completions"
LONG_PROMPT = "".join(
    f"On day {i} the keeper of the lighthouse counted {i * 7 % 31} ships and wrote it down. "
    for i in range(90)
)
KEEP_ALL = {"selector": {"type": "none"}}
POLICIES = ["twilight", "quest_1024", "quest_twi", {"policy": "quest_twi", "p": 0.5}]


def complete(server, prompt=LONG_PROMPT, **fields):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    response = server.post(COMPLETIONS, {"ignore_eos": True, **body})
    assert response.status == 200, response.body
    return response.json()


def text_of(answer):
    return answer["choices"][0]["text"]


def test_dense_has_no_sparsity_in_its_usage(server):
    assert "sparsity" not in complete(server)["usage"]


def test_keeping_every_token_is_dense_attention(server):
    dense = complete(server, logprobs=2)
    sparse = complete(server, logprobs=2, sparsity=KEEP_ALL)
    assert sparse["choices"] == dense["choices"]
    usage = sparse["usage"]["sparsity"]
    assert usage["policy"] == "custom"
    assert usage["mean_loaded_share"] == 1
    assert usage["true_mass"] is None
    assert usage["bypassed_steps"] == 0
    # The first token comes from the last step of prefill, which is dense.
    assert usage["sparse_steps"] in (11, 12)


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_named_policies_read_less(server, policy):
    answer = complete(server, sparsity=policy)
    usage = answer["usage"]["sparsity"]
    assert usage["policy"] == (policy if isinstance(policy, str) else policy["policy"])
    assert usage["sparse_steps"] in (11, 12)
    assert 0 < usage["mean_loaded_share"] < 0.9
    kept = usage["mean_kept_tokens_per_head"]
    loaded = usage["mean_loaded_tokens_per_kv_head"]
    assert 1 <= kept <= loaded <= answer["usage"]["total_tokens"]
    if policy == "quest_1024":
        assert kept == pytest.approx(1024, abs=16)


def test_true_mass_where_it_is_asked_for(server):
    fields = {"policy": "quest_twi", "report_true_mass": True}

    def usage(p):  # one step in 16 is measured
        answer = complete(server, sparsity={**fields, "p": p}, max_tokens=32)
        return answer["usage"]["sparsity"]

    high, low = usage(0.99), usage(0.5)
    assert 0 < low["true_mass"] < high["true_mass"] <= 1
    assert low["mean_loaded_share"] < high["mean_loaded_share"]


def test_short_contexts_are_bypassed(server):
    answer = complete(server, prompt="The capital of France is", sparsity="twilight")
    usage = answer["usage"]["sparsity"]
    assert usage["sparse_steps"] == 0
    assert usage["bypassed_steps"] in (11, 12)
    assert text_of(answer) == text_of(complete(server, prompt="The capital of France is"))


def test_usage_in_the_stream_and_over_grpc(client, channel, stubs):
    chunks = client.completions.create(
        model=MODEL,
        prompt=LONG_PROMPT,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"sparsity": "twilight", "ignore_eos": True},
    )
    over_http = list(chunks)[-1].usage.sparsity
    request = stubs.CreateCompletionRequest(
        prompt=[stubs.Prompt(text=LONG_PROMPT)],
        max_tokens=8,
        temperature=0,
        ignore_eos=True,
        sparsity=stubs.SparsityOptions(policy="twilight"),
    )
    over_grpc = stubs.CompletionsStub(channel).Create(request).usage.sparsity
    assert over_grpc.policy == over_http["policy"] == "twilight"
    assert over_grpc.sparse_steps == over_http["sparse_steps"] > 0
    assert over_grpc.mean_loaded_share == pytest.approx(over_http["mean_loaded_share"])
    assert not over_grpc.HasField("true_mass")


def test_neighbours_with_other_policies_change_nothing(server):
    policies = ["dense", *POLICIES, KEEP_ALL]
    alone = [text_of(complete(server, sparsity=policy)) for policy in policies]
    with concurrent.futures.ThreadPoolExecutor(len(policies)) as pool:
        together = list(pool.map(lambda policy: text_of(complete(server, sparsity=policy)), policies))
    assert together == alone


def test_decoded_prompt_tokens_run_under_the_policy(server):
    fields = {"max_tokens": 1, "prompt_logprobs": 0, "sparsity_decode_prompt_tokens": 24}

    def logprobs(**more):
        answer = complete(server, **fields, **more)
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        return answer, [next(iter(entry.values()))["logprob"] for entry in entries]

    dense_answer, dense = logprobs()
    assert "sparsity" not in dense_answer["usage"]
    assert logprobs(sparsity=KEEP_ALL)[1] == dense
    answer, sparse = logprobs(sparsity={"policy": "quest_twi", "p": 0.5, "token_budget": 128})
    assert answer["usage"]["sparsity"]["sparse_steps"] >= 24
    assert sparse[:-24] == dense[:-24]
    assert sparse[-24:] != dense[-24:]


def test_metrics_by_policy(server):
    complete(server, sparsity="quest_1024")
    text = server.get("/metrics").body.decode()
    for name in ("sparse_steps_total", "bypassed_steps_total", "loaded_share_count"):
        assert f"gloam:sparsity_{name}{{" in text
    steps = [
        line
        for line in text.splitlines()
        if line.startswith("gloam:sparsity_sparse_steps_total") and 'policy="quest_1024"' in line
    ]
    assert len(steps) == 1
    assert float(steps[0].rsplit(" ", 1)[1]) >= 11
