"""Every selector, on both models, over HTTP and gRPC: an answer among 64 is what it is alone."""

import concurrent.futures
import json
import subprocess

import grpc
import openai
import pytest
from gloam_process import PATIENCE_SECONDS, ROOT, GloamProcess, binary

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
BUDGET = {"token_budget": 96}
# Beside them dense: eight in all. Double Sparsity's comes with Twilight's estimator and pruner.
POLICIES = {
    "twilight": "twilight",
    "quest": {"selector": {"type": "quest", **BUDGET}},
    "ds": "ds_top_p",
    "streaming": {"selector": {"type": "streaming", "num_sinks": 4, **BUDGET}},
    "sparq": {"selector": {"type": "sparq", "r": 16, **BUDGET}},
    "tidal_decode": {
        "selector": {"type": "tidal_decode", "reselection_layers": [2, 9, 18], **BUDGET}
    },
    "oracle_topk": {"selector": {"type": "oracle_topk", **BUDGET}},
}
NUM_PROMPTS = 8
DS_TOP_P = {
    "selector": {
        "type": "ds",
        "r": 16,
        "quant_bit": 4,
        "token_budget": 256,
        "config_path": "channels/{model}.json",
    },
    "weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
    "weight_pruner": {"type": "top_p", "threshold": 0.85},
}


@pytest.fixture(scope="module", params=MODELS)
def sparse_server(request, tmp_path_factory):
    """A server whose sparsity folder has calibrated channels and a policy that names them."""
    folder = tmp_path_factory.mktemp("sparsity")
    (folder / "channels").mkdir()
    channels = folder / "channels" / f"{request.param}.json"
    texts = [str(ROOT / name) for name in ("ARCHITECTURE.md", "docs/results.md")]
    command = [str(binary()), "calibrate", request.param, "--context", "1024", "--text", *texts]
    subprocess.run([*command, "--out", str(channels)], check=True, capture_output=True)
    (folder / "ds_top_p.json").write_text(json.dumps(DS_TOP_P))
    process = GloamProcess(
        "--sparsity-dir", str(folder), model=request.param, log_path=folder / "stderr.log"
    )
    yield process
    process.wait_until_idle()
    process.terminate()
    assert process.wait() == 0
    process.close()


def prompt(number):
    """Some 1,300 to 1,500 tokens, long enough for `twilight` to be sparse; all begin alike."""
    return "".join(
        f"On day {day} the keeper counted {day * 7 % 31} ships and wrote it down. "
        for day in range(80 + number)
    )


def test_each_selector_among_64_answers_as_it_does_alone(sparse_server, stubs):
    client = openai.OpenAI(  # 64 at a time: each waits for all
        base_url=sparse_server.base_url, api_key="none", max_retries=0, timeout=8 * PATIENCE_SECONDS
    )
    policies = {"dense": "dense", **POLICIES}
    assert len(policies) * NUM_PROMPTS == 64

    def over_http(name, number):
        answer = client.completions.create(
            model=sparse_server.model,
            prompt=prompt(number),
            max_tokens=8,
            temperature=0,
            extra_body={"sparsity": policies[name], "ignore_eos": True},
        )
        return answer.choices[0].text, getattr(answer.usage, "sparsity", None)

    def over_grpc(channel, name, number):
        policy = policies[name]
        named = isinstance(policy, str)
        fields = {"policy": policy} if named else {"policy_json": json.dumps(policy)}
        answer = stubs.CompletionsStub(channel).Create(
            stubs.CreateCompletionRequest(
                prompt=[stubs.Prompt(text=prompt(number))],
                max_tokens=8,
                temperature=0,
                ignore_eos=True,
                sparsity=stubs.SparsityOptions(**fields),
            )
        )
        return answer.choices[0].text

    requests = [(name, number) for number in range(NUM_PROMPTS) for name in policies]
    with grpc.insecure_channel(sparse_server.grpc_address) as channel:
        alone = {}
        for name, number in requests:
            alone[name, number], usage = over_http(name, number)
            if name == "dense":
                assert usage is None
            else:
                assert usage["sparse_steps"] in (7, 8)
                assert 0 < usage["mean_loaded_share"] < 0.9
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            together = [
                pool.submit(over_grpc, channel, name, number)
                if (i + number) % 2
                else pool.submit(lambda *request: over_http(*request)[0], name, number)
                for i, (name, number) in enumerate(requests)
            ]
            assert {
                request: answer.result() for request, answer in zip(requests, together)
            } == alone
    # Policies are not all one: on some prompt they answer differently.
    assert any(
        len({alone[name, number] for name in policies}) > 1 for number in range(NUM_PROMPTS)
    )
