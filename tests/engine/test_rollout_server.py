"""Servers that sample for a run: never from other weights than it asked for, and a failure names the server."""

import copy
import threading

import httpx2
import pytest
import torch
from rollout_servers import TOKEN, server_process, serving
from safetensors.torch import save
from stage_runs import LENGTH_REWARD, rows, run_several, tiny_policy
from tiny import FAMILIES, engine_of, ragged

from agrpo.config import PolicyConfig, RolloutConfig
from agrpo.engine.backends.native import Sampling
from agrpo.engine.backends.remote import LABEL, LAST, TENSORS, RolloutServerError
from agrpo.engine.layout import build_layout
from agrpo.rollout_server import main
from agrpo.types import InputError, Prompt

PROMPTS = [Prompt(text="", ids=tuple(ids), slot=slot, columns={}) for slot, ids in enumerate(ragged(9)[0])]
COUNTS = [4, 1, 3]
SAMPLING = Sampling(12, temperature=1.5)


def model(family="llama-tied"):
    torch.manual_seed(0)
    return FAMILIES[family]()


def connected(*urls, lm=None, **options):
    rollout = RolloutConfig(backend="server", servers={"urls": list(urls), **options})
    return engine_of(lm or model(), rollout=rollout)


def train(engine, rate=0.03):
    engine.backward(-engine.forward(build_layout(*ragged(1)))[0].mean(), True)
    engine.step(rate)


def drawn(rollout):
    return rollout.tokens.tolist(), rollout.lengths.tolist(), rollout.group.tolist(), rollout.finished.tolist()


@pytest.fixture(scope="module")
def two():
    return [serving(model()) for _ in range(2)]


def test_completions_are_those_of_the_native_sampler_whatever_the_servers(two):
    native, remote = engine_of(model()), connected(*(url for url, _ in two))
    for step in range(2):
        mine, theirs = (e.generate(PROMPTS, COUNTS, SAMPLING, (3, step), 2) for e in (native, remote))
        assert drawn(mine) == drawn(theirs) and mine.texts == theirs.texts
        assert theirs.weight_version == step == remote.weight_version
        torch.testing.assert_close(mine.logp, theirs.logp, atol=1e-5, rtol=0)
        train(native)
        train(remote)


def test_a_server_that_another_run_has_taken_refuses_and_is_named(two):
    url = two[0][0]
    first, second = connected(url), connected(url)
    first.generate(PROMPTS, COUNTS, SAMPLING, (0, 0))
    second.generate(PROMPTS, COUNTS, SAMPLING, (0, 0))  # the same version 0, but another run's
    with pytest.raises(RolloutServerError, match=f"{url}: /generate answers 409.*holds weights .*:0, asked for"):
        first.generate(PROMPTS, COUNTS, SAMPLING, (0, 1))
    train(first)
    assert first.generate(PROMPTS, COUNTS, SAMPLING, (0, 1)).weight_version == 1


def test_completions_of_other_weights_are_an_error_even_if_a_server_returns_them(two, monkeypatch):
    (url, served), _ = two
    engine = connected(url)
    engine.generate(PROMPTS, COUNTS, SAMPLING, (0, 0))
    generate = served.generate
    monkeypatch.setattr(served, "generate", lambda label, asked: ("stale:7", generate(label, asked)[1]))
    with pytest.raises(RolloutServerError, match=rf"{url}: sampled from weights stale:7, not from"):
        engine.generate(PROMPTS, COUNTS, SAMPLING, (0, 1))


def test_the_first_rollout_is_checked(two, monkeypatch):
    (url, served), _ = two
    monkeypatch.setattr(served, "take", lambda label, body, last: setattr(served, "label", label))  # weights are lost
    other = connected(url, lm=copy.deepcopy(model()))
    for weight in served._weights.values():
        weight.data.copy_(torch.randn_like(weight) * 0.3)
    with pytest.raises(RuntimeError, match=r"rollout\.backend: server: its log-probabilities are"):
        other.generate(PROMPTS, COUNTS, SAMPLING, (0, 0))


def test_weights_are_whole_or_nothing_is_sampled_from_them(two):
    (url, served), _ = two
    client = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": TENSORS})
    name, weight = next(iter(served._weights.items()))

    def send(part, last, label="mine:0"):
        return client.post("/weights", content=part, headers={LABEL: label, LAST: str(int(last))})

    assert send(save({name: weight.clone()}), False).status_code == 200
    assert served.label is None  # what it held is half overwritten
    reply = send(save({name: weight.clone()}), True)
    assert reply.status_code == 422 and "did not come" in reply.text and served.label is None
    for bad, words in (({name: weight[:1].clone()}, "has no place"), ({"x": torch.zeros(1)}, "has no place")):
        reply = send(save(bad), True)
        assert reply.status_code == 422 and words in reply.text
    assert send(b"no safetensors", True).status_code == 422
    assert client.post("/weights", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/model", headers={"Authorization": ""}).status_code == 401
    assert client.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}


def test_what_cannot_work_is_said_before_anything_is_sent(two, monkeypatch):
    url = two[0][0]
    for family, odd in (("llama-untied", "lm_head"), ("qwen3-tied", "k_norm")):
        with pytest.raises(RolloutServerError, match=rf"{url}: serves another model \(.*{odd}.* differs\)"):
            connected(url, lm=model(family))
    with pytest.raises(RolloutServerError, match=r"http://127.0.0.1:9: .*nothing listens there"):
        connected("http://127.0.0.1:9")
    with pytest.raises(RolloutServerError, match="in the open; use https"):
        connected("http://192.0.2.1:80")
    monkeypatch.setenv("AGRPO_ROLLOUT_TOKEN", "another")
    with pytest.raises(RolloutServerError, match=f"{url}: /model answers 401"):
        connected(url)
    monkeypatch.delenv("AGRPO_ROLLOUT_TOKEN")
    with pytest.raises(RolloutServerError, match="AGRPO_ROLLOUT_TOKEN holds no token"):
        connected(url)
    assert main(["--model", "x", "--host", "0.0.0.0"]) == 2 and main(["--model", "x", "--max-sequences", "0"]) == 2


def test_configurations_of_servers_that_mean_nothing_are_refused():
    for rollout, words in (
        ({"backend": "server"}, "servers.urls"),
        ({"servers": {"urls": ["http://127.0.0.1:1"]}}, "no effect with backend: native"),
    ):
        with pytest.raises(ValueError, match=words):
            RolloutConfig(**rollout)
    values = {
        "data": {"source": "python:agrpo.data.tasks.chains:problems"},
        "rewards": [{"target": "reward_models.rules.accuracy"}],
        "training": {"max_steps": 1},
        "rollout": {"ahead": 1},
    }
    assert PolicyConfig(**values).corrects_sampler
    with pytest.raises(ValueError, match="ahead: dynamic groups"):
        PolicyConfig(**values, grouping={"kind": "dynamic"})
    with pytest.raises(ValueError, match=r"ahead: .*importance weights"):
        PolicyConfig(**values, objective={"sampler_correction": "none"})


def test_a_rollout_that_is_begun_is_sampled_beside_the_update_by_the_weights_of_before(two):
    (url, served), _ = two
    engine, native = connected(url), engine_of(model())
    engine.generate(PROMPTS, COUNTS, SAMPLING, (0, 0))  # the first one is checked, which takes the policy as it is
    generate, go = served.backend.generate, threading.Event()
    served.backend.generate = lambda *arguments: go.wait(60) and generate(*arguments)
    try:
        wait = engine.begin_generating(PROMPTS, COUNTS, SAMPLING, (0, 1))
        train(engine)  # while the server has not even started
        go.set()
        after = engine.generate(PROMPTS, COUNTS, SAMPLING, (0, 1))  # sends weights: behind what was begun
    finally:
        served.backend.generate = generate
    assert (wait().weight_version, after.weight_version) == (0, 1)
    assert drawn(wait()) == drawn(native.generate(PROMPTS, COUNTS, SAMPLING, (0, 1)))
    assert drawn(wait()) != drawn(after)


def test_a_stage_on_a_server_process_is_the_stage_in_one_process_and_a_dead_server_is_named(tmp_path):
    folder = tiny_policy(tmp_path / "model")
    common = [f"model.name_or_path={folder}", "training.max_steps=3", "training.learning_rate=1e-3"]
    common += [
        LENGTH_REWARD,
        "evaluation.test=null",
        "evaluation.every=2",
        "logging.samples_per_step=16",
        "rollout.ahead=1",
    ]
    with server_process(folder) as (url, process):
        server = ["rollout.backend=server", f"rollout.servers={{urls: ['{url}']}}"]
        runs = [("agrpo", tmp_path / "native", common), ("agrpo", tmp_path / "server", [*common, *server])]
        done = run_several(runs)
        assert all((run / "agrpo" / "result.json").exists() for _, run, _ in runs), done.stderr[-4000:]
        process.kill()
        process.wait()
        with pytest.raises(InputError, match=f"rollout server {url}: "):  # which ends a stage with exit code 2
            connected(url)
    native, server = (rows(tmp_path / name / "agrpo" / "samples.jsonl") for name in ("native", "server"))
    assert [row["completion"] for row in native] == [row["completion"] for row in server]
    curves = [rows(tmp_path / name / "agrpo" / "metrics.jsonl") for name in ("native", "server")]
    for mine, theirs in zip(*curves, strict=True):
        for key in ("loss", "grad_norm", "agrpo/kl_symmetric", "agrpo/effective_sample_size", "agrpo/staleness"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    assert [row["agrpo/staleness"] for row in curves[0]] == [0.0, 2.0, 2.0]  # two updates a rollout: one step
    assert curves[0][0]["agrpo/effective_sample_size"] > 1 - 1e-6 > curves[0][1]["agrpo/effective_sample_size"]
