import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from lorakeet.base.errors import MachineError
from lorakeet.serve.engine import EngineLimits
from lorakeet.serve.http import run_server, start_background_server
from lorakeet.serve.scheduler import BatchLimits

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=30) as web:
        yield web


def test_models_are_listed_with_their_parent(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny-chat", "law", "med"]
    assert models["law"].parent == "tiny-chat" and models["tiny-chat"].parent is None
    assert client.models.retrieve("med").version == models["med"].version


def test_the_official_client_chats_whole_and_streaming(client):
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    texts = {}
    for model in ("tiny-chat", "law", "med"):
        whole = client.chat.completions.create(model=model, **asked)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(
            client.chat.completions.create(
                model=model, **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        texts[model] = whole.choices[0].message.content
        assert streamed == texts[model]
        assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len(set(texts.values())) == 3


def test_the_official_client_completes_text_whole_and_streaming(client):
    asked = {"model": "law", "prompt": ["one", "two words"], "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in whole.choices]


def test_a_version_prefix_chooses_that_version_only(client):
    version = client.models.retrieve("law").version
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 5}
    named = client.chat.completions.create(model=f"law@{version[:8]}", **asked)
    plain = client.chat.completions.create(model="law", **asked)
    assert named.choices[0].message.content == plain.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="law@00000000", **asked)


def test_errors_are_those_that_the_official_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="tiny-chat, law, med"):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="n is 2"):
        client.chat.completions.create(model="law", messages=HELLO, n=2)
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(openai.BadRequestError, match="window") as caught:
        client.chat.completions.create(model="law", messages=long)
    assert caught.value.code == "context_length_exceeded"


def test_bodies_have_a_limit_and_a_type(web):
    assert web.post("/chat/completions", json={"x": "a" * 3_000_000}).status_code == 413
    body = json.dumps({"model": "law", "messages": HELLO})
    answer = web.post("/chat/completions", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for path, method in (("/nothing", "GET"), ("/completions", "GET")):
        answer = web.request(method, path)
        assert answer.status_code in (404, 405) and "message" in answer.json()["error"]


def test_foreign_host_names_are_not_answered(web):
    assert web.get("/models", headers={"host": "evil.example"}).status_code == 400


def test_adapters_are_loaded_and_unloaded_by_name(web, client, adapter_root):
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 8}
    body = {"lora_name": "fresh", "lora_path": "copy-of-med"}
    assert web.post("/load_lora_adapter", json=body).status_code == 200
    answers = [client.chat.completions.create(model=m, **asked) for m in ("fresh", "med")]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert web.post("/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 200
    assert web.post("/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 404
    for name, path, status in (
        ("../x", "law", 400), ("ok", "../..", 403), ("ok", "/etc", 403), ("ok", "none", 400),
        ("tiny-chat", "law", 400), ("ok", "\0", 400), ("ok", ".", 400),
    ):  # fmt: skip
        answer = web.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert answer.status_code == status, (name, path, answer.text)
    assert "ok" not in [model.id for model in client.models.list()]


def test_health_and_metrics_tell_how_it_goes(web, server):
    root = server.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    text = httpx.get(f"{root}/metrics").text
    assert 'lorakeet_http_responses_total{status="200"}' in text
    assert "lorakeet_adapters 2" in text


def test_a_client_that_leaves_frees_its_place(server):
    engine = server.engine
    for stream in (True, False):
        body = {"model": "law", "messages": HELLO, "max_tokens": 230, "stream": stream,
                "temperature": 0}  # fmt: skip
        before = engine.counts.completion_tokens
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client() as web:
            address = f"{server.url}/chat/completions"
            with web.stream("POST", address, json=body, timeout=0.05) as answer:
                next(answer.iter_bytes())  # the whole answer would take much longer
        deadline = time.monotonic() + 5
        while (engine.num_running or engine.scheduler.num_waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.num_running == 0
        assert engine.counts.completion_tokens - before < 200


def test_a_burst_is_answered_or_turned_away_with_retry_after(base_folder, adapters):
    limits = EngineLimits(batch=BatchLimits(max_waiting=3, max_rows=1))
    with start_background_server(str(base_folder), adapters, limits=limits) as running:
        answers = []

        def ask():
            body = {"model": "law", "messages": HELLO, "max_tokens": 40, "temperature": 0}
            answers.append(httpx.post(f"{running.url}/chat/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        load = httpx.post(
            f"{running.url}/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}
        )
        assert load.status_code == 403


def test_malformed_bodies_never_bring_a_server_error(base_folder, adapters):
    chance = random.Random(7)
    values = [None, True, -1, 0, 1e400, 2**70, 0.5, "", "x", "\ud83d", [], {}, [[]], [None],
              [{"role": "user"}], [{"role": "user", "content": 5}], {"type": "x"}, [1, -5],
              [[1], "a"], "a" * 5000, [{"role": "assistant", "content": "x"}] * 3]  # fmt: skip
    names = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "stop",
             "seed", "n", "stream", "stream_options", "logprobs", "tools", "echo", "odd",
             "lora_name", "lora_path", "max_completion_tokens", "response_format"]  # fmt: skip
    paths = ["/chat/completions", "/completions", "/load_lora_adapter", "/unload_lora_adapter"]
    limits = EngineLimits(max_new_tokens=4)
    with start_background_server(str(base_folder), adapters, limits=limits) as running:
        web = httpx.Client(base_url=running.url, timeout=30)
        seen = set()
        for number in range(300):
            body = {"model": "law", "messages": HELLO, "prompt": "x", "max_tokens": 2}
            for _ in range(chance.randint(1, 4)):
                body[chance.choice(names)] = chance.choice(values)
            raw = json.dumps(body).encode()
            if number % 5 == 0:
                place = chance.randrange(len(raw))
                raw = (
                    raw[:place]
                    + bytes([chance.randrange(256)])
                    + raw[place + chance.randint(0, 3) :]
                )
            body_type = {"content-type": "application/json"}
            answer = web.post(chance.choice(paths), content=raw, headers=body_type)
            assert answer.status_code < 500, (raw, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
            seen.add(answer.status_code)
        assert {200, 400} <= seen
        assert web.get("/models").status_code == 200
        web.close()


def test_a_busy_port_is_told_before_the_model_loads():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"{port}.*--port"):
            run_server("no-such-base", {}, "127.0.0.1", port)


def test_ctrl_c_ends_the_server_in_order(base_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from lorakeet.serve.http import run_server; "
        f"run_server(sys.argv[1], {{}}, port={port}); print('ended in order')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(base_folder)], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert "ended in order" in child.communicate(timeout=20)[0]
    assert child.returncode == 0
