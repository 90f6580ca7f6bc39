"""A reward behind HTTP, with the real server: `agrpo serve-reward` in a process of its own, on loopback."""

import asyncio
import contextlib
import importlib
import inspect
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agrpo.config import RewardSpec
from reward_models import remote
from reward_models.compose import RewardSet
from reward_models.configured import reward_set
from reward_models.endpoint import EndpointError, is_loopback
from reward_models.loader import RewardError, load_reward
from reward_models.remote import RemoteReward, Reply

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "a-secret-of-the-tests-0123456789"
REWARDS = """
rewards:
  - {target: reward_models.rules.accuracy, weight: 1.0}
  - {target: reward_models.rules.overlong, weight: 0.3, limit: 5, buffer: 4, gate: {reward: accuracy, at_least: 0.5}}
  - {target: reward_models.rules.max_words, weight: 0.7}
  - {target: served_rewards_x7.third, weight: 0.1}
  - {target: served_rewards_x7.moody, weight: 0.2}
  - {target: served_rewards_x7.alone, weight: 0.0}
"""
USERS = """
import threading, time

inside = threading.Lock()

def third(completions, **columns):
    return [len(text) / 3 for text in completions]

def moody(completions, *, mood=None, **columns):
    if mood and "raise" in mood:
        raise ValueError("in no mood\x1b[2J")
    return [float(m) if m is not None else None for m in mood or [None] * len(completions)]

def alone(completions, *, seconds=None, **columns):
    assert inside.acquire(blocking=False), "two batches at once"
    time.sleep(max(seconds or [0]))
    inside.release()
    return [1.0] * len(completions)
"""


class Server:
    """The command in a process. It keeps its port when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.process = folder, 0, None
        (folder / "served_rewards_x7.py").write_text(USERS)
        (folder / "rewards.yaml").write_text(REWARDS)

    def start(self) -> None:
        self.log = self.folder / "stderr.txt"
        arguments = ["--config", "rewards.yaml", "--port", self.port, "--max-batch", 100, "--max-megabytes", 0.5]
        with self.log.open("w") as log:
            self.process = command(self.folder, *arguments, stderr=log)

    def wait(self) -> None:
        until = time.monotonic() + 60
        while not (found := re.search(r"serving at (http://127\.0\.0\.1:(\d+))", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        self.url, self.port = found[1], int(found[2])

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


def command(folder, *arguments, token=SECRET, **streams):
    environment = {k: v for k, v in os.environ.items() if k not in ("AGRPO_REWARD_TOKEN", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    if token:
        environment["AGRPO_REWARD_TOKEN"] = token
    line = [sys.executable, "-m", "agrpo.cli", "serve-reward", *map(str, arguments)]
    return subprocess.Popen(line, cwd=folder, env=environment, text=True, **streams)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The server of these tests, and one without a token: they start together, which takes both of them seconds."""
    folder = tmp_path_factory.mktemp("without-token")
    (folder / "rewards.yaml").write_text("rewards: [{target: reward_models.rules.format}]")
    server = Server(tmp_path_factory.mktemp("served"))
    server.start()
    other = command(folder, "--config", "rewards.yaml", "--port", 0, token=None, stderr=subprocess.PIPE)
    server.wait()
    yield server, other
    for process in (server.process, other):
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def server(servers):
    return servers[0]


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("AGRPO_REWARD_TOKEN", SECRET)


@pytest.fixture
def local(server, monkeypatch):
    """The same rewards in this process."""
    monkeypatch.syspath_prepend(server.folder)
    from reward_models.server import served_rewards

    return reward_set(served_rewards(server.folder / "rewards.yaml"))


def batch(count, conversations=False):
    texts = [f"<answer>{i % 7}</answer> " + "word " * (i % 5) + "ä🙂\u2028\x00"[: i % 4] for i in range(count)]
    prompts = [f"{i} mod 7?" for i in range(count)]
    columns = {
        "solution": [str(i % 3) for i in range(count)],
        "kind": ["max_words" if i % 2 else None for i in range(count)],
        "value": [3] * count,
        "finished": [i % 3 > 0 for i in range(count)],
        "mood": [None if i % 4 == 0 else 0.1 * i for i in range(count)],
        "nested": [{"a": [1, None, 2.5], "b": {"c": True}}] * count,
    }
    if conversations:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [list(range(i % 9)) for i in range(count)]
    return prompts, texts, ids, columns


def remote_set(server, **parameters):
    spec = {"target": "reward_models.remote", "url": server.url, "batch": 7, **parameters}
    return reward_set([RewardSpec(**spec)])


def post(server, body, **headers):
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"} | headers
    return httpx2.post(f"{server.url}/score", content=body, headers=headers, trust_env=False)


ONE = {"prompts": ["p"], "completions": ["<answer>1</answer>"], "completion_ids": [[1]], "columns": {"solution": ["1"]}}


@pytest.mark.parametrize("count", [1, 7, 40])
def test_scores_and_totals_are_the_local_ones_to_the_last_bit(server, local, count):
    given = batch(count)
    expected = local.score(*given)
    for k, name in enumerate(local.names):
        got = remote_set(server, reward=name).score(*given)[:, 0]
        assert torch.equal(got.nan_to_num(-99), expected[:, k].nan_to_num(-99)), name
    total = remote_set(server)
    got = total.total(total.score(*given))
    assert torch.equal(got.nan_to_num(-99), local.total(expected).nan_to_num(-99))
    assert not local.take_errors() and not total.take_errors() and total.metrics() == {
        "remote/retries": 0.0,
        "remote/lost": 0.0,
    }  # fmt: skip


def test_conversations_travel_and_what_is_no_column_stays_here(server):
    prompts, _, ids, _ = batch(3, conversations=True)
    completions = [[{"role": "assistant", "content": f"<answer>{i}</answer>"}] for i in range(3)]
    reward = load_reward("reward_models.remote", {"url": server.url, "reward": "accuracy"})
    scores = reward(
        prompts=prompts, completions=completions, completion_ids=ids, solution=["0", "0", "2"], trainer_state=object()
    )
    assert scores == [1.0, 0.0, 1.0]
    assert reward([], [], [], solution=[]) == []


def test_a_reward_that_fails_there_is_masked_and_counted_here(server):
    prompts, texts, ids, columns = batch(20)
    columns["mood"] = ["raise" if i == 8 else "1" if i > 2 else "inf" for i in range(20)]
    moody = remote_set(server, reward="moody")  # batches of 7: the second raises, the first has three infinities
    scores = moody.score(prompts, texts, ids, columns)[:, 0]
    assert scores.isnan().tolist() == [True] * 3 + [False] * 4 + [True] * 7 + [False] * 6
    assert moody.take_errors() == {"remote": 10} and moody.metrics()["remote/lost"] == 10
    columns["mood"] = ["raise"] * 20
    moody.first_error.clear()  # which keeps the run's first
    assert moody.score(prompts, texts, ids, columns).isnan().all()
    assert moody.take_errors() == {"remote": 20} and "in no mood" in moody.first_error["remote"]
    everything = remote_set(server)  # the others still score
    assert everything.score(prompts, texts, ids, columns).isfinite().all()
    assert everything.metrics()["remote/lost"] == 20


def test_clients_take_turns(server):
    prompts, texts, ids, _ = batch(4)
    with ThreadPoolExecutor(6) as clients:
        calls = [
            clients.submit(remote_set(server, reward="alone").score, prompts, texts, ids, {"seconds": [0.1] * 4})
            for _ in range(6)
        ]
        assert all(call.result().eq(1).all() for call in calls)  # `alone` raises when another is inside


def test_a_slow_reward_ends_at_the_deadline_masked_and_never_zero(server):
    slow = remote_set(server, reward="alone", timeout_s=0.3, retries=50, deadline_s=1.0)
    began = time.monotonic()
    scores = slow.score(["p"] * 3, ["c"] * 3, [[1]] * 3, {"seconds": [1.5] * 3})
    assert time.monotonic() - began < 3
    assert scores.isnan().all() and slow.take_errors() == {"remote": 3}
    assert "no answer before the deadline; last: no whole reply within 0.3 s" in slow.first_error["remote"]
    assert slow.metrics()["remote/retries"] >= 1
    # The attempts that were given up did not queue behind the one that runs: the next client waits for that one alone.
    began = time.monotonic()
    assert remote_set(server, reward="alone").score(["p"], ["c"], [[1]], {}).eq(1).all()
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (ONE, {"Authorization": "Bearer wrong"}, 401, "token is missing or wrong"),
        (ONE, {"Authorization": ""}, 401, "token"),
        (ONE, {"Authorization": f"bearer {SECRET}é"}, 401, "token"),
        (ONE, {"Authorization": SECRET}, 401, "token"),
        (ONE, {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"{", {}, 422, "Invalid JSON"),
        (b"[" * 100_000, {}, 422, "Invalid JSON"),
        (ONE | {"prompts": ["a", "b"]}, {}, 422, "prompts: 2 values for 1 completions"),
        (ONE | {"columns": {"solution": []}}, {}, 422, "solution: 0 values for 1 completions"),
        (ONE | {"prompts": [3]}, {}, 422, "prompts.0"),
        (ONE | {"extra": 3}, {}, 422, "extra: Extra inputs are not permitted"),
        ({"prompts": []}, {}, 422, "completions: Field required; completion_ids: Field required"),
        ({k: v * 101 for k, v in ONE.items() if k != "columns"}, {}, 413, "101 completions; 100 a request at most"),
        (ONE | {"columns": {"solution": ["x" * 2**19]}}, {}, 413, "more than 0.5 MiB"),
        (ONE | {"columns": {"solution": ["x" * 2**24]}}, {}, 413, "more than 0.5 MiB"),
    ],
)
def test_refusals_say_why_and_repeat_nothing(server, body, headers, status, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = post(server, content, **{k: v.encode("latin-1") for k, v in headers.items()})
    assert answer.status_code == status and says in answer.json()["detail"]
    assert SECRET not in answer.text and len(answer.text) < 1000


def test_an_oversized_stream_of_no_announced_length_is_cut_off(server):
    def endless():
        for _ in range(200):
            yield b" " * 2**16

    with contextlib.suppress(httpx2.WriteError, httpx2.ReadError):  # it may hang up before we are done
        assert post(server, endless()).status_code == 413
    assert post(server, json.dumps(ONE).encode()).status_code == 200


def test_health_is_for_everyone_and_nothing_else_is(server):
    assert httpx2.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}
    for path in ("/", "/docs", "/openapi.json", "/score"):
        assert httpx2.get(f"{server.url}{path}", trust_env=False).status_code in (404, 405)


def test_what_the_client_says_of_a_refusal(server, monkeypatch):
    prompts, texts, ids, columns = batch(40)
    with pytest.raises(EndpointError, match=r"413.*more than 0.5 MiB.*smaller batches"):
        remote.build(server.url)(prompts, ["x" * 2**20] * 40, ids, **columns)
    with pytest.raises(EndpointError, match="no reward 'acuracy'; it has accuracy"):
        remote.build(server.url, reward="acuracy")(prompts, texts, ids, **columns)
    with pytest.raises(ValueError, match="column 'when' cannot travel as JSON"):
        remote.build(server.url)(prompts, texts, ids, when=[object()] * 40)
    with pytest.raises(ValueError, match="column 'x' cannot travel as JSON"):
        remote.build(server.url)(prompts, texts, ids, x=[math.nan] * 40)
    monkeypatch.setenv("AGRPO_REWARD_TOKEN", "another-token")
    reward = remote.build(server.url)
    with pytest.raises(EndpointError, match=r"401.*token is missing or wrong") as refused:
        reward(prompts, texts, ids, **columns)
    assert refused.value.status == 401 and "another-token" not in str(refused.value)
    assert reward.metrics["retries"] == 0  # no second attempt at what cannot pass


def test_inside_a_running_event_loop_as_in_a_notebook(server):
    async def cell():
        return remote.build(server.url, reward="accuracy")(
            **{k: v for k, v in ONE.items() if k != "columns"}, solution=["1"]
        )

    assert asyncio.run(cell()) == [1.0]


def test_a_server_that_is_killed_and_started_again_costs_retries_only(server):
    prompts, texts, ids, columns = batch(14)
    rewards = remote_set(server, reward="accuracy", retries=100, deadline_s=60)
    expected = rewards.score(prompts, texts, ids, columns)
    columns |= {"seconds": [0.4] * 14}
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(rewards.score, prompts, texts, ids, columns)
        time.sleep(0.2)  # the first of two batches is being scored
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        server.start()
        scores = call.result()
    server.wait()
    assert torch.equal(scores, expected)
    assert rewards.metrics()["remote/retries"] >= 1 and not rewards.take_errors()


def test_the_server_tells_reasons_and_no_secrets_and_stops_when_asked(server):
    """The last of this server's: it ends it."""
    post(server, json.dumps(ONE | {"columns": {"solution": ["1"], "mood": ["raise"]}}).encode())
    post(server, b"{}", Authorization="Bearer guessed-token-123")
    assert server.end(signal.SIGTERM) == 0
    log = server.log.read_text()
    assert "ValueError: in no mood\n" in log and "the token is in AGRPO_REWARD_TOKEN" in log
    assert SECRET not in log and "guessed-token-123" not in log
    with pytest.raises(EndpointError, match="no answer in 2 attempts; last: ConnectError"):
        remote.build(server.url, retries=1)(["p"], ["c"], [[1]])


def test_without_a_token_the_server_makes_one_in_a_private_file(servers, monkeypatch):
    process = servers[1]
    line = process.stderr.readline()
    url, path = re.fullmatch(r"serving at (\S+): format; the token is in (\S+)\n", line).groups()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    made = Path(path).read_text()
    assert len(made) >= 43 and made not in line
    monkeypatch.setenv("MADE_TOKEN", made)
    assert remote.build(url, token_env="MADE_TOKEN")(["p"], ["no"], [[1]]) == [0.0]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0 and not os.path.exists(path)


@pytest.mark.parametrize(
    ("arguments", "yaml", "environment", "says"),
    [
        (["--host", "0.0.0.0"], REWARDS, SECRET, "say --allow-other-hosts"),
        (["--host", "localhost.example.org"], REWARDS, SECRET, "say --allow-other-hosts"),
        (["--host", "0.0.0.0", "--allow-other-hosts"], REWARDS, "", "set AGRPO_REWARD_TOKEN"),
        (["--host", "::", "--allow-other-hosts"], REWARDS, "short", "16 characters"),
        ([], REWARDS, "two words", "white space"),
        (["--port", "99999"], REWARDS, SECRET, "--port 99999"),
        ([], "rewads: []", SECRET, "did you mean rewards?"),
        ([], "rewards: []", SECRET, "rewards: List should have at least 1 item"),
        ([], "rewards: [{target: no_such_x7.f}]", SECRET, "no module 'no_such_x7'"),
        ([], "rewards: [{target: os.getcwd, normalise: true}]", SECRET, "normalise"),
        ([], "rewards: [{target: reward_models.rules.acuracy}]", SECRET, "did you mean 'accuracy'"),
    ],
)
def test_what_is_wrong_at_the_start_ends_it_with_2(tmp_path, monkeypatch, capsys, arguments, yaml, environment, says):
    from reward_models.server import main

    (tmp_path / "rewards.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "served_rewards_x7.py").write_text(USERS)
    monkeypatch.setenv("AGRPO_REWARD_TOKEN", environment)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is pytest's
    assert main(["--config", str(tmp_path / "rewards.yaml"), "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"url": "http://192.0.2.1:8123"}, "in the open"),
        ({"url": "http://127.0.0.1.example.org"}, "in the open"),
        ({"url": "http://me:hidden@127.0.0.1:1"}, "user or password"),
        ({"url": "127.0.0.1:8123"}, "write http://"),
        ({"url": "ftp://127.0.0.1"}, "write http://"),
        ({"url": "http://127.0.0.1:x"}, "url"),
        ({"url": "http://127.0.0.1:1", "token_env": "NO_SUCH_X7"}, "NO_SUCH_X7 is not set"),
        ({"url": "http://127.0.0.1:1", "batch": 0}, "batch"),
        ({"url": "http://127.0.0.1:1", "timeout_s": 0}, "timeout_s"),
        ({"url": "http://127.0.0.1:1", "retries": -1}, "retries"),
        ({"url": "http://127.0.0.1:1", "deadline_s": math.nan}, "deadline_s"),
        ({"url": "http://127.0.0.1:1", "retrys": 1}, "did you mean 'retries'"),
    ],
)
def test_parameters_that_cannot_be_are_refused_before_anything_is_sent(parameters, says):
    with pytest.raises(RewardError, match=says) as refused:
        load_reward("reward_models.remote", parameters)
    assert "hidden" not in str(refused.value) and SECRET not in str(refused.value)


def test_the_token_travels_to_other_machines_by_https_or_when_told():
    for parameters in ({"url": "https://192.0.2.1"}, {"url": "http://192.0.2.1", "allow_plain_http": True}):
        assert SECRET not in repr(vars(RemoteReward(**parameters)))


def test_what_counts_as_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "localhost")))
    others = ("0.0.0.0", "::", "10.0.0.1", "localhost.", "127.0.0.1.nip.io", "127.1", "", "::ffff:192.0.2.1")
    assert not any(map(is_loopback, others))


@contextlib.contextmanager
def answering(*answers):
    """A server that answers with (status, headers, body), the last one for ever, and keeps what it was asked."""
    waiting, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            status, headers, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                for chunk in [body] if isinstance(body, bytes) else body():
                    self.wfile.write(chunk)
                    self.wfile.flush()

        def log_message(self, *_):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{service.server_port}", asked
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


def reply(*total, **more):
    return 200, {}, json.dumps({"scores": {"r": total}, "total": total, **more}).encode()


def test_numbers_that_are_none_are_masked_and_counted():
    with answering((200, {}, b'{"scores": {}, "total": [NaN, Infinity, -1e999, 0.5, null]}')) as (url, _):
        reward = remote.build(url)
        assert repr(reward(["p"] * 5, ["c"] * 5, [[1]] * 5)) == "[nan, nan, nan, 0.5, None]"
        rewards = RewardSet([("far", reward, 1.0)])
        scores = rewards.score(["p"] * 5, ["c"] * 5, [[1]] * 5, {})[:, 0]
        assert scores.isfinite().tolist() == [False] * 3 + [True, False]
        assert rewards.take_errors() == {"far": 3}  # the null abstained


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(1.0, 2.0), "2 scores for 1 completions"),
        ((200, {}, b'{"scores": {}, "total": ["1"]}'), "total.0: Input should be a valid number"),
        ((200, {}, b'{"scores": {}, "total": [true]}'), "total.0: Input should be a valid number"),
        ((200, {}, b"[]"), "not a reward server's"),
        ((200, {}, b"<html>"), "not JSON"),
        ((200, {}, b"[" * 200_000), "not JSON"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "HTTP 302: without a reason"),
        ((403, {}, f"no, {SECRET}!".encode()), "HTTP 403: no, …!"),
        ((503, {}, b"busy"), "no answer in 1 attempts; last: HTTP 503: busy"),
        ((200, {"Content-Length": "99"}, b"{"), "RemoteProtocolError"),
    ],
)
def test_a_reply_that_is_none_is_an_error_with_its_reason(answer, says):
    with answering(answer) as (url, asked), pytest.raises(EndpointError) as refused:
        remote.build(url, retries=0)(["p"], ["c"], [[1]])
    assert says in str(refused.value) and SECRET not in str(refused.value)
    assert [headers["Authorization"] for headers, _ in asked] == [f"Bearer {SECRET}"]


def test_failures_that_may_pass_are_tried_again_as_late_as_asked():
    with answering((500, {}, b""), (429, {"Retry-After": "1"}, b""), reply(0.25)) as (url, asked):
        reward = remote.build(url)
        began = time.monotonic()
        assert reward(["p"], ["c"], [[1]]) == [0.25]
        assert time.monotonic() - began > 1.2 and len(asked) == 3 and reward.metrics["retries"] == 2
        assert asked[0][1] == asked[2][1]


def test_the_environment_s_proxies_are_not_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # would be handed the token
    with answering(reply(1.0)) as (url, asked):
        assert remote.build(url, retries=0)(["p"], ["c"], [[1]]) == [1.0] and len(asked) == 1


def test_a_reply_that_drips_does_not_outlast_the_attempt():
    def drip():
        for _ in range(100):
            yield b" "
            time.sleep(0.05)

    with answering((200, {}, drip)) as (url, _):
        began = time.monotonic()
        with pytest.raises(EndpointError, match=r"no whole reply within 0\.4 s"):
            remote.build(url, timeout_s=0.4, retries=0)(["p"], ["c"], [[1]])
        assert time.monotonic() - began < 3  # it drips for 5 s


def test_the_run_s_random_streams_do_not_depend_on_the_network():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    with answering((500, {}, b""), reply(1.0)) as (url, _):
        remote.build(url)(["p"], ["c"], [[1]])
    assert random.random() == expected


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_reply_gets_past_the_check_as_something_else(value):
    with contextlib.suppress(ValidationError):
        scores = Reply.model_validate({"scores": {}, "total": value}).total
        assert all(score is None or type(score) is float for score in scores)


def test_every_parameter_is_documented_with_its_default():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    section = page.split("## A reward behind HTTP\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE))
    words = {inspect.Parameter.empty: "required", None: "null", False: "false"}
    build = importlib.import_module("reward_models.remote").build
    expected = {p.name: str(words.get(p.default, p.default)) for p in inspect.signature(build).parameters.values()}
    assert {name: default.strip("` ") for name, default in rows.items()} == expected
