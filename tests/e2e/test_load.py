"""Many clients at once: cancelling at random moments, and slow readers. Run alone with -m load."""

import asyncio
import json
import random
import time

import grpc
import pytest
from gloam_process import MODEL, PATIENCE_SECONDS

pytestmark = pytest.mark.load

SEED = 20261122
NUM_CANCELS = 500
CANCELS_AT_ONCE = 24
NUM_SLOW_READERS = 500
SLOW_READER_TOKENS = 24


def http_request(body):
    payload = json.dumps({"model": MODEL, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: gloam\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload


async def disconnect_http(port, body, seconds):
    """Sends the request, reads for a while, and is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http_request(body))
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(4096):
                pass
    except TimeoutError:
        pass
    writer.transport.abort()


async def cancel_grpc(channel, stubs, fields, stream, seconds):
    prompt = [stubs.Prompt(text=fields.pop("prompt"))]
    request = stubs.CreateCompletionRequest(prompt=prompt, **fields)
    service = stubs.CompletionsStub(channel)
    if stream:
        call = service.CreateStream(request)

        async def read():
            async for _ in call:
                pass

        task = asyncio.ensure_future(read())
    else:
        call = service.Create(request)
        task = asyncio.ensure_future(call)
    await asyncio.wait([task], timeout=seconds)
    call.cancel()
    # Either it was cancelled in time, or it had ended well.
    await asyncio.gather(task, return_exceptions=True)


def test_cancelling_at_random_moments(server, stubs, golden):
    print(f"seed {SEED}")
    random_source = random.Random(SEED)

    async def run():
        limit = asyncio.Semaphore(CANCELS_AT_ONCE)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:

            async def one(i):
                prompt = f"Story {i}: " + "and then they went on " * random_source.randrange(40)
                fields = {
                    "prompt": prompt,
                    "max_tokens": random_source.choice([1, 5, 40, 400]),
                    "n": random_source.choice([1, 1, 2, 5]),
                    "ignore_eos": True,
                }
                seconds = random_source.choice([0, 0.003, 0.05, 0.3]) * random_source.random()
                async with limit:
                    match i % 4:
                        case 0:
                            await disconnect_http(server.port, {**fields, "stream": True}, seconds)
                        case 1:
                            await disconnect_http(server.port, fields, seconds)
                        case 2:
                            await cancel_grpc(channel, stubs, fields, True, seconds)
                        case 3:
                            await cancel_grpc(channel, stubs, fields, False, seconds)

            await asyncio.gather(*(one(i) for i in range(NUM_CANCELS)))

    asyncio.run(run())
    server.wait_until_idle()
    golden(server)


async def read_slowly(port, i, results):
    """An SSE client that takes a few bytes now and then; its text, or an exception."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    body = {
        "prompt": f"Item {i % 50} of the list:",
        "max_tokens": SLOW_READER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    writer.write(http_request(body))
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = await reader.read(512)
        assert part, f"stream {i} was cut"
        data += part
        results.setdefault(i, None)  # it has begun
        await asyncio.sleep(0.01)
    writer.close()
    assert data.startswith(b"HTTP/1.1 200")
    events = [json.loads(line[6:]) for line in lines(data) if line.startswith(b"data: {")]
    results[i] = "".join(event["choices"][0]["text"] for event in events)


def lines(data):
    """The body's lines, without the chunked framing."""
    body = data.split(b"\r\n\r\n", 1)[1]
    text = b""
    while body:
        size, rest = body.split(b"\r\n", 1)
        text += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return text.splitlines()


def test_slow_readers(server, golden):
    before = server.rss_bytes()
    peak = before
    results = {}

    async def run():
        nonlocal peak
        readers = [
            asyncio.ensure_future(read_slowly(server.port, i, results))
            for i in range(NUM_SLOW_READERS)
        ]
        while not all(reader.done() for reader in readers):
            peak = max(peak, server.rss_bytes())
            await asyncio.sleep(0.2)
        await asyncio.gather(*readers)

    started = time.monotonic()
    asyncio.run(asyncio.wait_for(run(), 4 * PATIENCE_SECONDS))
    print(f"{NUM_SLOW_READERS} streams: {time.monotonic() - started:.1f} s")
    print(f"resident memory: {before >> 20} MB before, {peak >> 20} MB at most")
    assert len(results) == NUM_SLOW_READERS
    assert all(results.values())
    # The same prompt gives the same answer, whoever reads it.
    assert len({(i % 50, text) for i, text in results.items()}) == 50
    # KV memory is touched as it is used (1 GiB at most); connections cost little beside it.
    assert peak - before < (1 << 30) + (256 << 20)
    golden(server)
