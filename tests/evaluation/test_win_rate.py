"""Win rates counted by hand, by rules and by a judge that prefers what stands first."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from stage_runs import ROOT, environment

from agrpo.evaluation.intervals import bootstrap_interval, wilson_interval
from agrpo.evaluation.win_rate import win_rate
from agrpo.types import InputError
from reward_models.loader import load_reward


def rows(*answers, columns=None):
    """One prompt each; several answers to a prompt in a tuple."""
    listed = [one if isinstance(one, tuple) else (one,) for one in answers]
    return [
        {"slot": n, "prompt": f"p{n}", "columns": columns or {}, "samples": [{"text": text} for text in texts]}
        for n, texts in enumerate(listed)
    ]


def longer(prompts, completions, completion_ids=None, **columns):
    return [None if "?" in text else float(len(text)) for text in completions]


def test_wins_ties_and_losses_are_counted():
    found = win_rate(rows("aa", "b", "cc", "same"), rows("a", "bb", "dd", "same"), longer)
    assert (found.wins, found.ties, found.losses, found.undecided, found.n) == (1, 2, 1, 0, 4)
    assert found.rate == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert found.interval == bootstrap_interval([1, 0, 0.5, 0.5])


def test_the_other_way_round_is_the_rest():
    a, b = rows("aa", "b", "cc", "ddd"), rows("a", "bb", "dd", "e")
    assert win_rate(a, b, longer).rate + win_rate(b, a, longer).rate == 1
    assert win_rate(a, a, longer).rate == 0.5


def test_several_answers_of_a_prompt_count_as_one_prompt():
    found = win_rate(rows(("aa", "a", "aaa"), "b"), rows(("a", "aa", "a"), "bb"), longer)
    assert (found.wins, found.losses, found.n) == (2, 2, 2)
    assert found.rate == pytest.approx((2 / 3 + 0) / 2)
    sure = win_rate(rows(*["aa"] * 9), rows(*["a"] * 9), longer)
    assert sure.interval == wilson_interval(9, 9) and "better" in sure.in_words("A", "B")


def test_what_the_reward_cannot_score_is_left_out_and_told():
    found = win_rate(rows("aa", "b?", "c?"), rows("a", "bb", "c?"), longer)
    assert (found.wins, found.ties, found.undecided, found.n) == (1, 1, 1, 2)  # equal texts tie, scored or not
    with pytest.raises(InputError, match="decided no pair"):
        win_rate(rows("a?"), rows("b"), longer)


def test_other_prompts_are_refused():
    with pytest.raises(InputError, match="same prompts"):
        win_rate(rows("a", "b"), rows("a"), longer)
    with pytest.raises(InputError, match="no greedy"):
        win_rate(rows("a"), rows("b"), longer, "greedy")


@pytest.fixture
def judge_at():
    """A judge's address for what it decides of a question; it speaks the chat protocol."""
    servers = []

    def serve(decide):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
                message = {"role": "assistant", "content": decide(question)}
                body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/v1"
        return load_reward("reward_models.judge", {"url": url, "model": "judge", "mode": "pairwise"})

    yield serve
    for server in servers:
        server.shutdown()


def test_a_judge_that_prefers_what_stands_first_decides_nothing(judge_at):
    judge = judge_at(lambda question: "Winner: A")
    found = win_rate(rows("aa", "b"), rows("a", "bb"), judge)
    assert (found.wins, found.ties, found.losses) == (0, 2, 0) and found.rate == 0.5


def test_a_judge_is_asked_in_both_orders_and_its_verdict_follows_the_answer(judge_at):
    asked = []

    def decide(question):
        asked.append(question)
        good, bad = question.find("good"), question.find("bad")
        return "Winner: tie" if min(good, bad) < 0 else f"Winner: {'A' if good < bad else 'B'}"

    found = win_rate(
        rows("good", "bad", "meh", ("good", "bad")), rows("bad", "good", "so", ("bad", "bad")), judge_at(decide)
    )
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert len(asked) == 8  # four different pairs in both orders; equal answers are not asked about


def test_the_command_compares_two_runs_own_results(tmp_path):
    for name, answers in (("a", ["7", "8", "9"]), ("b", ["7", "1", "1"])):
        rows = [
            {"slot": n, "text": f"{n}?", "columns": {"solution": gold}, "greedy": text, "sample": text}
            for n, (text, gold) in enumerate(zip(answers, ["7", "8", "0"], strict=True))
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name / "evaluation-test.jsonl") for name in "ab"]
    command = [sys.executable, "-m", "agrpo.cli", "compare", *files, "--reward", "reward_models.rules.accuracy"]
    done = subprocess.run(
        [*command, "--answers", "greedy", "--json", "-"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["win_rate"] == pytest.approx(2 / 3) and (told["wins"], told["ties"], told["losses"]) == (1, 2, 0)
