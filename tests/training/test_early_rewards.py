"""Rewards that score completions while others are still sampled: the same scores, begun earlier."""

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import waiting_reward
from stage_runs import rows, run_several, tiny_policy
from tiny import FAMILIES, engine_of, ragged

from agrpo.config import PolicyConfig
from agrpo.data.streams import Stream
from agrpo.training.grouping import Sampler
from agrpo.types import Prompt
from reward_models import rules
from reward_models.compose import RewardSet
from reward_models.early import Early, units
from reward_models.loader import load_reward
from reward_models.rules.procedural import reasoning_gym

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "a-secret-of-the-tests-0123456789"
SOON = 120  # seconds after which what must happen has not


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    return engine_of(FAMILIES["llama-tied"](), max_sequences=5)  # the others wait for a place


def data(count):
    """Every third prompt's text is that of another, and half of them are conversations."""
    ids = ragged(2, prompts=[3 + n % 5 for n in range(count)], groups=((1,),))[0]
    texts = [f"p{n % 3}" if n % 2 else [{"role": "user", "content": f"p{n % 3}"}] for n in range(count)]
    solutions = [f"\\frac{{x}}{{{n + 2}}}" for n in range(count)]
    return [
        Prompt(text, tuple(i), n, {"solution": solution, "n": n})
        for n, (text, i, solution) in enumerate(zip(texts, ids, solutions, strict=True))
    ]


class Watched:
    """An engine that lets sampling go on only once scoring has begun, and says when sampling is over."""

    def __init__(self, engine, scoring, over=lambda: None):
        self.engine, self.scoring, self.over = engine, scoring, over

    def generate(self, *arguments, ended=None):
        def told(*what):
            ended(*what)
            seen.extend(what[0])
            if len(seen) >= 12:  # of 24 and more: two groups of the first five that decode have ended
                assert self.scoring.wait(SOON)

        seen = []
        rollout = self.engine.generate(*arguments, **({"ended": told} if ended else {}))
        self.over()
        return rollout


class Seen:
    """A reward, and an event that says that it has been called."""

    def __init__(self, reward, while_sampling=None):
        self.reward, self.called, self.calls = reward, threading.Event(), []
        self.while_sampling = while_sampling or reward.while_sampling

    def __call__(self, **given):
        self.calls.append(len(given["completions"]))
        try:
            return self.reward(**given)
        finally:
            self.metrics = dict(getattr(self.reward, "metrics", {}))
            self.called.set()


def of_group(prompts, completions, completion_ids, **columns):
    """Each completion's rank among those of the same prompt."""
    keys = [(json.dumps(prompt), len(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]
    return [sum(other[0] == key[0] and other[1] < key[1] for other in keys) for key in keys]


def what_it_was_given(prompts, completions, completion_ids, *, finished, n, **columns):
    """A number that depends on every argument."""
    digests = zip(prompts, completions, completion_ids, finished, n, strict=True)
    return [float(int.from_bytes(json.dumps(row).encode()[-6:], "big") % 99991) for row in digests]


def step(engine, rewards, count=6, **sections):
    config = PolicyConfig(
        seed=3,
        data={"source": "python:agrpo.data.tasks.chains:problems"},
        rewards=[{"target": "reward_models.rules.accuracy"}],
        training={"max_steps": 1},
        sampling={
            "prompts_per_step": count,
            "num_generations": 4,
            "max_completion_length": 24,
            "temperature": 3.0,
        },
        **sections,
    )
    prompts = data(2 * count)
    return Sampler(config, prompts, Stream(len(prompts), config.prompts_per_rollout, 3), rewards)(engine, 11)


def told(rewards):
    return rewards.take_errors(), rewards.metrics(), rewards.first_error


def same(one, other):
    return torch.equal(one.nan_to_num(nan=-1e9), other.nan_to_num(nan=-1e9))


@pytest.mark.parametrize(
    "grouping",
    [{"kind": "fixed"}, {"kind": "adaptive", "least": 3, "most": 8}, {"kind": "dynamic", "max_rounds": 2}],
    ids=lambda grouping: grouping["kind"],
)
def test_a_step_has_the_scores_that_it_has_without_and_scoring_begins_before_sampling_ends(engine, grouping):
    events = []
    pooled = Seen(waiting_reward.meanwhile)
    early = [("pooled", pooled), ("math", rules.accuracy), ("of_group", Seen(of_group, "prompt"))]
    early += [("given", Seen(what_it_was_given, 3)), ("short", lambda completion_ids, **_: map(len, completion_ids))]
    plain = [waiting_reward.after, lambda **given: rules.accuracy(**given), of_group, what_it_was_given, early[-1][1]]
    early, late = RewardSet(early), RewardSet([(name, p) for (name, _), p in zip(early, plain, strict=True)])
    assert late.begin(["p"], {}) is None

    def over():
        events.append(len(pooled.calls))

    rollout, scores, metrics = step(Watched(engine, pooled.called, over), early, grouping=grouping)
    wanted_rollout, wanted, wanted_metrics = step(engine, late, grouping=grouping)
    assert events[0] >= 1 and metrics["time/reward_overlap_s"] > 0
    assert rollout.tokens.tolist() == wanted_rollout.tokens.tolist() and rollout.texts == wanted_rollout.texts
    assert same(scores, wanted) and told(early) == told(late)
    assert scores[:, 0].isnan().any() and len(scores[:, 0].unique()) > 4 and len(scores[:, 2].unique()) > 2
    times = {"time/generate_s", "time/reward_s"}
    assert metrics.keys() - wanted_metrics.keys() == {"time/reward_overlap_s"} and times <= wanted_metrics.keys()


def test_no_thread_is_left_of_a_step(engine):
    step(engine, RewardSet([("pooled", waiting_reward.meanwhile)]))
    assert not [thread for thread in threading.enumerate() if thread.name == "early-reward"]


def score(rewards, given, order=None, first=None):
    """Scores of made-up completions that end in this order, in two parts: the second once the first is being scored.

    Args:
        given: prompts, completions, completion_ids, columns.
        first: those of the first part; None hands over nothing early.
    """
    prompts, completions, ids, columns = given
    early = None
    if first is not None:
        early = rewards.begin(prompts, {name: values for name, values in columns.items() if name != "finished"})
        for part in (order[:first], order[first:]):
            texts = [c if isinstance(c, str) else c[0]["content"] for c in (completions[n] for n in part)]
            early.ended(part, [ids[n] for n in part], texts, [columns["finished"][n] for n in part])
            assert all(reward.called.wait(SOON) for reward in rewards.rewards)
        early.stop()
    scores = rewards.score(prompts, completions, ids, columns, early)
    if early is not None:
        early.close()
    return scores


def made(kind):
    """12 completions of 4 prompts, two of which are the same, with what the kind of reward reads."""
    prompts = [f"q{n // 3 % 3}" for n in range(12)]
    completions, columns = [f"<answer>{n}</answer>" for n in range(12)], {}
    if kind == "math":
        solutions = ["x+1", "2", "(3, 4)", "\\sqrt{2}"]
        answers = ["1+x", "x", "\\frac{4}{2}", "two", "(3,4)", "\\sqrt{2}", "(4,3)", "2", "?", "\\sqrt{2}", "1.41", "x"]
        columns = {"solution": [s for s in solutions for _ in range(3)]}
        completions = [f"<answer>{a}</answer>" for a in answers]
    if kind == "code":
        programs = ["def f(x): return x", "def f(x): return -x", "def f(x):"]
        completions = [f"```python\n{program}\n```" for program in programs * 4]
        columns = {"tests": [["assert f(0) == 0", f"assert f(1) == {n % 2}", "assert f(-1) == 1"] for n in range(12)]}
    if kind == "tasks":
        entry = {"question": "1+1", "answer": "2", "metadata": {"source_dataset": "basic_arithmetic"}}
        unknown = {"metadata": {"source_dataset": "no_such_task"}}
        columns = {"entry": [json.dumps(entry if n // 3 != 2 else unknown) for n in range(12)]}
    return prompts, completions, [[n] * (1 + n % 4) for n in range(12)], {**columns, "finished": [True] * 12}


KINDS = {"math": rules.accuracy, "tasks": reasoning_gym}


@pytest.mark.parametrize("kind", ["math", "code", "tasks"])
def test_the_pool_and_the_sandbox_give_what_one_call_gives(kind):
    reward = KINDS[kind] if kind in KINDS else load_reward("reward_models.rules.code", {"enabled": True})
    given = made(kind)
    wanted = RewardSet([("one", lambda **given: reward(**given))])
    expected = score(wanted, given)
    assert len(expected.nan_to_num(nan=-1).unique()) > 1
    order = random.Random(kind).sample(range(12), 12)
    seen = Seen(reward)
    rewards = RewardSet([("one", seen)])
    assert same(score(rewards, given, order, 10), expected) and told(rewards) == told(wanted)
    assert len(seen.calls) > 1 and sum(seen.calls) == 12  # each was scored once


def test_parameters_in_the_configuration_keep_what_a_reward_says_of_itself():
    bound = load_reward("reward_models.rules.cosine", {"limit": 8})
    assert bound.while_sampling == "prompt"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """`agrpo serve-reward` with a reward that sees which completions are in its request, and one that fails on some."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served_early.py").write_text(
        "def batch(completion_ids, **columns):\n"
        "    return [float(sum(map(len, completion_ids))) for _ in completion_ids]\n"
        "def moody(completion_ids, **columns):\n"
        "    if any(ids[0] == 4 for ids in completion_ids): raise ValueError('in no mood')\n"
        "    return [None if len(ids) == 2 else float(ids[0]) for ids in completion_ids]\n"
    )
    (folder / "rewards.yaml").write_text(
        "rewards: [{target: served_early.batch}, {target: served_early.moody, weight: 0.5}]"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "AGRPO_REWARD_TOKEN": SECRET}
    line = [sys.executable, "-m", "agrpo.cli", "serve-reward", "--config", "rewards.yaml", "--port", "0"]
    process = subprocess.Popen(line, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)
    for told in process.stderr:
        if found := re.search(r"serving at (http://127\.0\.0\.1:\d+)", told):
            break
    yield found[1]
    process.kill()
    process.communicate()


@pytest.mark.parametrize("reward", [None, "batch", "moody"])
def test_a_server_is_asked_the_same_requests(url, reward, monkeypatch):
    monkeypatch.setenv("AGRPO_REWARD_TOKEN", SECRET)
    given = made("other")

    def remote():
        return load_reward("reward_models.remote", {"url": url, "batch": 5, "reward": reward, "retries": 0})

    wanted = RewardSet([("one", lambda **given: late(**given))])
    late = remote()
    expected = score(wanted, given)
    seen = Seen(remote())
    rewards = RewardSet([("one", seen)])
    assert same(score(rewards, given, list(range(12)), 11), expected)
    assert seen.calls == [10, 2]  # whole requests alone, while others are sampled
    assert rewards.take_errors() == wanted.take_errors() and rewards.first_error == wanted.first_error
    assert rewards.metrics() == {f"one/{name}": value for name, value in late.metrics.items()}
    if reward == "moody":
        assert late.metrics["lost"] == 5 and expected.isnan().sum() > 5


def test_where_a_call_fails_the_column_is_lost_as_it_is_without():
    def fails(completion_ids, **columns):
        if [4] in completion_ids:
            raise ValueError("on the fourth")
        return [10.0**40 if len(ids) == 2 else len(ids) for ids in completion_ids]

    prompts, completions, _, columns = made("other")
    for ids in ([[n] for n in range(12)], [[n + 5] * (1 + n % 4) for n in range(12)]):
        given = prompts, completions, ids, columns
        wanted = RewardSet([("one", fails)])
        expected = score(wanted, given)
        for first in (6, 11):
            for while_sampling in ("prompt", 1, 4):
                rewards = RewardSet([("one", Seen(fails, while_sampling))])
                assert same(score(rewards, given, list(range(12)), first), expected)
                assert rewards.take_errors() == {"one": 12 if [4] in ids else 3}
                told = rewards.first_error["one"]
                assert ("on the fourth" in told) == ([4] in ids) and told.splitlines()[-1] == (
                    wanted.first_error["one"].splitlines()[-1]
                )
        wanted.take_errors()


def test_another_number_of_values_and_a_reward_that_ends_the_process_are_told_as_without():
    given = made("other")
    rewards = RewardSet([("one", Seen(lambda completions, **_: [1.0], 1))])
    assert score(rewards, given, list(range(12)), 6).isnan().all() and rewards.take_errors() == {"one": 12}
    assert "1 scores for 12 completions" in rewards.first_error["one"]

    def leaves(completions, **_):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        score(RewardSet([("one", Seen(leaves, 1))]), given, list(range(12)), 6)


def test_completions_that_came_out_otherwise_are_scored_as_they_came_out():
    """As after a lack of memory, when all are sampled again in smaller batches."""
    prompts, completions, ids, columns = made("other")
    seen = Seen(of_group, "prompt")
    rewards = RewardSet([("one", seen)])
    early = rewards.begin(prompts, {})
    early.ended(list(range(9)), [[7]] * 9, completions[:9], [True] * 9)
    assert seen.called.wait(SOON)
    early.ended([1, 0, 2, 3], [ids[1], *ids[:1], *ids[2:4]], completions[:4], [True] * 4)
    early.stop()
    scores = rewards.score(prompts, completions, ids, columns, early)
    assert same(scores, score(RewardSet([("one", of_group)]), (prompts, completions, ids, columns)))


def test_metrics_of_several_calls_are_added_up():
    class Counts:
        while_sampling = 1

        def __call__(self, completions, **columns):
            self.metrics = {"asked": float(len(completions))}
            return [0.0] * len(completions)

    rewards = RewardSet([("one", Seen(Counts()))])
    score(rewards, made("other"), list(range(12)), 6)
    assert rewards.metrics() == {"one/asked": 12.0}
    score(rewards, made("other"))
    assert rewards.metrics() == {"one/asked": 12.0}


def test_a_judge_takes_part_where_prompts_tell_its_questions_apart():
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    assert load_reward("reward_models.judge", judge).while_sampling == "prompt"
    assert load_reward("reward_models.judge", {**judge, "mode": "pairwise"}).while_sampling == "prompt"
    assert not load_reward("reward_models.judge", {**judge, "prompt": "Is {completion} polite?"}).while_sampling


def test_units():
    chat = [{"role": "user", "content": "a"}]
    assert units("prompt", ["a", "b", "a", chat, list(chat)]) == [[0, 2], [1], [3, 4]]
    assert units(2, ["a"] * 5) == [[0, 1], [2, 3], [4]]
    for wrong in ("group", -1, 1.5):
        with pytest.raises(ValueError, match="while_sampling"):
            RewardSet([("one", Seen(of_group, wrong))])


def test_completions_that_all_end_at_once_are_one_call():
    seen = Seen(of_group, 1)
    early = Early({0: seen}, ["p"] * 4, {})
    early.ended([0, 1, 2, 3], [[1]] * 4, ["t"] * 4, [True] * 4)
    assert early.stop() == 0 and not seen.calls


HANGS = """
import sys, threading, time
from reward_models.compose import RewardSet
from reward_models.loader import load_reward

begun = threading.Event()

class Sleeps:
    while_sampling = 1
    def __call__(self, completions, **columns):
        begun.set()
        time.sleep(600)

class Runs:
    while_sampling = 1
    def __init__(self):
        self.code = load_reward("reward_models.rules.code", {"enabled": True, "deadline_s": 600.0, "workers": 1})
        self.cancel = self.code.cancel
        self.room = self.code._sandbox._under_way
    def __call__(self, **given):
        threading.Thread(target=lambda: (time.sleep(1), begun.set())).start()
        return self.code(**given)

rewards = RewardSet([("one", Sleeps() if sys.argv[1] == "sleeps" else Runs())])
early = rewards.begin(["p"] * 3, {"tests": ["assert f()"] * 3})
try:
    early.ended([0, 1], [[1], [1]], ["while True: pass", "while 1: pass"], [True, True])
    assert begun.wait(120)
    raise KeyboardInterrupt
finally:
    early.close()
"""


@pytest.mark.parametrize("kind", ["sleeps", "runs"])
def test_an_interrupted_run_waits_for_no_reward(kind, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HANGS, kind], env=environment, capture_output=True, text=True, timeout=SOON
    )
    assert done.returncode != 0 and done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr
    assert not list(tmp_path.iterdir())  # no sandbox leaves its folder


def test_ranks_that_gather_weights_in_step_have_the_same_run_with_and_without(tmp_path):
    model = tiny_policy(tmp_path / "model")
    shared = [
        *(f"model.name_or_path={model}", "engine.zero_stage=3", "engine.sample_from=layers"),
        *("engine.param_persistence_threshold=0", "rollout.max_sequences=3", "training.max_steps=2"),
        *("evaluation.data=null", "evaluation.test=null", "logging.samples_per_step=99"),
    ]
    kinds = ("meanwhile", "after")
    runs = [("agrpo", tmp_path / kind, [*shared, f"rewards=[{{target: waiting_reward.{kind}}}]"]) for kind in kinds]
    done = run_several(runs, nproc=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    early, late = (rows(tmp_path / kind / "agrpo" / "metrics.jsonl") for kind in kinds)
    for one, other in zip(early, late, strict=True):
        assert one.keys() - other.keys() >= {"time/reward_overlap_s"}
        for key in ("reward", "reward_std", "reward/errors", "loss", "grad_norm", "kl"):
            assert one[key] == other[key], key
        assert one["reward/errors"] > 0 and math.isfinite(one["reward"])
    samples = [rows(tmp_path / kind / "agrpo" / "samples.jsonl") for kind in kinds]
    names = [{json.dumps(row).replace(kind, "reward") for row in own} for kind, own in zip(kinds, samples, strict=True)]
    assert names[0] == names[1]
