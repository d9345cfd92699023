"""Completions and chat completions through the unmodified openai client."""

import concurrent.futures

import openai
import pytest
from gloam_process import MODEL

PROMPT = "Once upon a time, in a small village by the sea,"
MESSAGES = [{"role": "user", "content": "Name three primary colours."}]


def complete(client, **fields):
    fields = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, **fields}
    extra = {key: fields.pop(key) for key in list(fields) if key in EXTRA_FIELDS}
    return client.completions.create(model=MODEL, extra_body=extra, **fields)


def chat(client, **fields):
    fields = {"messages": MESSAGES, "max_completion_tokens": 16, "temperature": 0, **fields}
    extra = {key: fields.pop(key) for key in list(fields) if key in EXTRA_FIELDS}
    return client.chat.completions.create(model=MODEL, extra_body=extra, **fields)


# Beyond OpenAI's own fields.
EXTRA_FIELDS = {
    "add_generation_prompt",
    "continue_final_message",
    "ignore_eos",
    "include_stop_str_in_output",
    "min_p",
    "min_tokens",
    "prompt_logprobs",
    "repetition_penalty",
    "sparsity",
    "sparsity_decode_prompt_tokens",
    "stop_token_ids",
    "top_k",
}


def tokens_of(server, text):
    return server.post("/tokenize", {"model": MODEL, "prompt": text}).json()["tokens"]


def test_completion_shape(client):
    completion = complete(client)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == MODEL
    assert len(completion.choices) == 1
    choice = completion.choices[0]
    assert choice.index == 0
    assert choice.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    usage = completion.usage
    assert usage.completion_tokens == 16
    assert usage.total_tokens == usage.prompt_tokens + 16


def test_completion_default_is_16_tokens(client):
    completion = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage.completion_tokens == 16


def test_chat_shape(client):
    completion = chat(client, ignore_eos=True)
    assert completion.id.startswith("chatcmpl-")
    assert completion.object == "chat.completion"
    assert completion.system_fingerprint
    choice = completion.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.refusal is None
    assert choice.finish_reason == "length"


def test_chat_ends_by_itself(client):
    messages = [{"role": "user", "content": "Say only: yes"}]
    completion = chat(client, messages=messages, max_completion_tokens=200)
    assert completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in completion.choices[0].message.content


def test_completion_stream_equals_answer(client):
    whole = complete(client, max_tokens=40)
    chunks = list(
        complete(client, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in parts[:-1])
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_stream_equals_answer(client):
    whole = chat(client, max_completion_tokens=40)
    chunks = list(chat(client, max_completion_tokens=40, stream=True))
    first, *rest = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in rest)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_stream_of_many_scripts_is_whole_characters(client):
    prompt = "日本語、한국어, русский, عربى, emoji 🙂🎉: 日本"
    fields = {"prompt": prompt, "max_tokens": 48, "ignore_eos": True}
    whole = complete(client, **fields).choices[0].text
    parts = [chunk.choices[0].text for chunk in complete(client, stream=True, **fields)]
    assert "".join(parts) == whole


def test_prompts_as_tokens_and_batches(client, server):
    tokens = tokens_of(server, PROMPT)
    text = complete(client).choices[0].text
    assert complete(client, prompt=tokens).choices[0].text == text
    other = "The three laws of motion are"
    both = complete(client, prompt=[PROMPT, other], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = complete(client, prompt=other).choices[0].text
    assert [choice.text for choice in both.choices] == [text, text, alone, alone]


def test_stop_strings(client):
    free = complete(client, max_tokens=40).choices[0].text
    stop = free[10:14]
    choice = complete(client, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert choice.text == free[: free.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    kept = complete(client, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert kept.choices[0].text == free[: free.index(stop)] + stop
    streamed = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_stop_token_ids(client, server):
    logprobs = complete(client, logprobs=0).choices[0].logprobs
    first = tokens_of(server, logprobs.tokens[3])
    assert len(first) == 1
    choice = complete(client, stop_token_ids=first).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == first[0]
    assert choice.text == "".join(logprobs.tokens[: logprobs.tokens.index(logprobs.tokens[3])])


def test_n_and_seed(client):
    fields = {"n": 4, "temperature": 1.0, "seed": 11, "max_tokens": 12}
    first = [choice.text for choice in complete(client, **fields).choices]
    again = [choice.text for choice in complete(client, **fields).choices]
    other = [choice.text for choice in complete(client, **{**fields, "seed": 12}).choices]
    assert first == again
    assert first != other
    assert len(set(first)) > 1
    streamed = [""] * 4
    for chunk in complete(client, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == first


def test_best_of_returns_the_likeliest(client):
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "logprobs": 0}

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = sorted((mean(c) for c in complete(client, n=6, **fields).choices), reverse=True)
    best = complete(client, n=2, best_of=6, **fields)
    assert [mean(choice) for choice in best.choices] == pytest.approx(every[:2], abs=1e-5)
    assert best.usage.completion_tokens >= 6


def test_completion_logprobs(client):
    choice = complete(client, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 16
    assert "".join(logprobs.tokens) == choice.text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value <= 0
        assert len(top) == 3
        assert top[token] == pytest.approx(max(top.values()))  # greedy
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_echo_and_prompt_scores(client, server):
    choice = complete(client, echo=True, logprobs=1, max_tokens=4).choices[0]
    assert choice.text.startswith(PROMPT)
    count = len(tokens_of(server, PROMPT))
    assert len(choice.logprobs.tokens) == count + 4
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    scored = complete(client, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(
        choice.logprobs.token_logprobs[1:count], abs=1e-4
    )


def test_prompt_logprobs(client, server):
    choice = complete(client, prompt_logprobs=2, max_tokens=1).choices[0]
    tokens = tokens_of(server, PROMPT)
    assert len(choice.prompt_logprobs) == len(tokens)
    assert choice.prompt_logprobs[0] is None
    for token, entry in zip(tokens[1:], choice.prompt_logprobs[1:], strict=True):
        assert entry[str(token)]["logprob"] <= 0
        assert {1, 2} <= {value["rank"] for value in entry.values()}


def test_chat_logprobs(client):
    fields = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 8}
    choice = chat(client, **fields).choices[0]
    content = choice.logprobs.content
    assert len(content) == 8
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    streamed = []
    for chunk in chat(client, stream=True, **fields):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_logit_bias_forces_and_forbids(client, server):
    (token,) = tokens_of(server, " sea")
    forced = complete(client, max_tokens=3, logit_bias={str(token): 100})
    assert forced.choices[0].text == " sea sea sea"
    free = complete(client, logprobs=0, max_tokens=1).choices[0]
    (first,) = tokens_of(server, free.text)
    assert complete(client, max_tokens=1, logit_bias={str(first): -100}).choices[0].text != free.text


def test_min_tokens_and_ignore_eos(client):
    messages = [{"role": "user", "content": "Say only: yes"}]
    free = chat(client, messages=messages, max_completion_tokens=100)
    assert free.choices[0].finish_reason == "stop"
    count = free.usage.completion_tokens
    longer = chat(client, messages=messages, max_completion_tokens=100, min_tokens=count + 5)
    assert longer.usage.completion_tokens >= count + 5
    full = chat(client, messages=messages, max_completion_tokens=count + 20, ignore_eos=True)
    assert full.usage.completion_tokens == count + 20
    assert full.choices[0].finish_reason == "length"


def test_sampling_fields_are_taken(client):
    greedy = complete(client).choices[0].text
    assert complete(client, temperature=1.0, top_k=1).choices[0].text == greedy
    assert complete(client, temperature=1.0, top_p=1e-6).choices[0].text == greedy
    assert complete(client, temperature=1.0, min_p=1.0).choices[0].text == greedy
    fields = {"prompt": "a a a a a a a a", "max_tokens": 8}
    free = complete(client, **fields).choices[0].text
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        complete(client, **fields, **penalty)
    assert complete(client, repetition_penalty=2.0, **fields).choices[0].text != free


def test_continue_final_message(client):
    messages = MESSAGES + [{"role": "assistant", "content": "The three primary colours are"}]
    answer = chat(
        client, messages=messages, add_generation_prompt=False, continue_final_message=True
    )
    text = answer.choices[0].message.content
    assert not text.startswith("The three")
    assert any(colour in text.lower() for colour in ("red", "blue", "yellow"))


def test_roles_and_text_parts(client):
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"}]
    parts = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}],
        },
    ]
    assert (
        chat(client, messages=plain).choices[0].message.content
        == chat(client, messages=parts).choices[0].message.content
    )


def test_dense_policy_is_the_default(client):
    text = complete(client).choices[0].text
    for dense in ("dense", {"policy": "dense"}):
        assert complete(client, sparsity=dense).choices[0].text == text


def test_prefix_cache_is_reported_and_changes_nothing(client):
    prompt = "A list of words that nobody asked for: " + " ".join(f"word{i}" for i in range(60))
    first = complete(client, prompt=prompt)
    again = complete(client, prompt=prompt)
    assert first.choices[0].text == again.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_concurrent_streams_equal_their_answers_alone(client):
    prompts = [f"Fact number {i} about the number {i * 37}: it" for i in range(32)]
    fields = {"max_tokens": 24, "ignore_eos": True}

    def stream(prompt):
        chunks = complete(client, prompt=prompt, stream=True, **fields)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(stream, prompts))
    alone = [complete(client, prompt=prompt, **fields).choices[0].text for prompt in prompts]
    assert together == alone


def test_long_prompt_beside_decodes(client):
    """Chunked prefill of a long prompt must not change what decodes beside it, nor itself."""
    long_prompt = "The quick brown fox jumps over the lazy dog. " * 250
    short = complete(client, max_tokens=32).choices[0].text
    alone = complete(client, prompt="Again: " + long_prompt, max_tokens=8).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        shorts = [pool.submit(complete, client, max_tokens=32) for _ in range(3)]
        long_answer = pool.submit(complete, client, prompt="Again: " + long_prompt, max_tokens=8)
        assert [answer.result().choices[0].text for answer in shorts] == [short] * 3
        assert long_answer.result().choices[0].text == alone


def test_closing_a_stream_frees_its_blocks(client, server):
    stream = complete(client, stream=True, max_tokens=2000, ignore_eos=True)
    next(iter(stream))
    stream.close()
    server.wait_until_idle()


def test_errors_are_openai_exceptions(client):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, temperature=5)
    assert raised.value.param == "temperature"
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="nobody", prompt="x")
    assert raised.value.code == "model_not_found"
