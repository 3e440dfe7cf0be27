"""Whatever a reward function does costs its own sample, and only that."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from unittest.mock import ANY

import psutil
import pytest

from siirl.errors import RequestError
from siirl.rewards import RewardPool

REWARDS = """
    import os, signal, subprocess, sys, time
    CALLS = 0

    def act(prompt, response, sample, scale=1.0):
        global CALLS
        CALLS += 1
        if response == "raise":
            return int("x")
        if response == "hang":
            time.sleep(3600)
        if response == "spin":
            while True:
                pass
        if response == "leave":
            sys.exit("bye")
        if response == "exit":
            os._exit(3)
        if response == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if response == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if response == "nan":
            return float("nan")
        if response == "inf":
            return -float("inf")
        if response == "none":
            return None
        if response == "text":
            return "1.0"
        if response == "huge":
            return 10 ** 400
        if response == "flood":
            for _ in range(200):
                sys.stdout.write("x" * 1_000_000)
        if response == "fork":
            if os.fork() == 0:
                time.sleep(3600)
            os._exit(4)
        if response == "spawn":
            print("child", subprocess.Popen(["sleep", "3600"]).pid, flush=True)
        if response == "close":
            os.close(1), os.close(2)
            return 1
        if response == "pid":
            return os.getpid()
        if response == "calls":
            return CALLS
        sample.clear()
        return scale * float(response)
"""


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(textwrap.dedent(REWARDS))
    return f"{file}:act"


def scores(pool, *responses):
    return pool.score(["p"] * len(responses), list(responses), [{"answer": "a"} for _ in responses])


def children():
    """The reward processes of this process; other tests may have left helpers of multiprocessing's."""
    known = psutil.Process().children(recursive=True)
    return [child for child in known if child.status() == psutil.STATUS_ZOMBIE or not _is_tracker(child)]


def _is_tracker(process):
    return any("multiprocessing" in word for word in process.cmdline())


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_samples(spec, workers):
    with RewardPool(spec, {"scale": 2.0}, workers=workers) as pool:
        for count in (0, 1, 300):
            results = scores(pool, *map(str, range(count)))
            assert [r.reward for r in results] == [2.0 * i for i in range(count)]
            assert not any(r.error for r in results)


def test_text_and_rows_arrive_as_they_are(tmp_path):
    (tmp_path / "r.py").write_text(
        "def same(prompt, response, sample):\n"
        "    return prompt == 'é\\n\\0\\ud800' and response == 'x' * 3_000_000 and sample == {'a': [1.5, None, 'ü']}\n"
    )
    with RewardPool(f"{tmp_path}/r.py:same") as pool:
        results = pool.score(["é\n\0\ud800"] * 4, ["x" * 3_000_000] * 4, [{"a": [1.5, None, "ü"]}] * 4)
    assert [r.reward for r in results] == [1.0] * 4


@pytest.mark.parametrize(
    ("response", "sentence"),
    [
        ("raise", r"^reward '.*:act' raised ValueError at .*rewards\.py:9: invalid literal for int.*'x'$"),
        ("leave", r"raised SystemExit at .*rewards\.py:16: bye$"),
        ("nan", r"rewards\.py:5\) returned nan, not a finite number$"),
        ("inf", r"rewards\.py:5\) returned -inf, not a finite number$"),
        ("none", r"rewards\.py:5\) returned None, not a number$"),
        ("text", r"rewards\.py:5\) returned '1\.0', not a number$"),
        ("huge", r"raised OverflowError at "),
    ],
)
def test_an_error_costs_its_sample_and_no_process(spec, response, sentence):
    with RewardPool(spec) as pool:
        before, failed, after, calls = scores(pool, "1", response, "2", "calls")
        assert (before.reward, after.reward, calls.reward) == (1.0, 2.0, 4.0)
        assert failed.reward is None
        assert re.search(sentence, failed.error)
        assert pool.respawns == 0


@pytest.mark.parametrize(
    ("response", "sentence"),
    [
        ("exit", r"rewards\.py:5\): it ended its process with exit status 3$"),
        ("kill", r"rewards\.py:5\): its process was ended by SIGKILL$"),
        ("segfault", r"rewards\.py:5\): its process was ended by SIGSEGV$"),
        ("hang", r"rewards\.py:5\): it took longer than reward\.timeout_s=0\.5$"),
        ("spin", r"rewards\.py:5\): it took longer than reward\.timeout_s=0\.5$"),
        ("fork", r"rewards\.py:5\): it ended its process with exit status 4$"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_end_or_a_hang_costs_its_sample_and_a_process(spec, response, sentence, workers):
    responses = ["1", "2", response, "3", "4", response, *["5"] * 60]
    with RewardPool(spec, timeout_s=0.5, workers=workers) as pool:
        results = scores(pool, *responses)
        assert [i for i, result in enumerate(results) if result.reward is None] == [2, 5]
        assert all(results[i].reward == float(responses[i]) for i in range(len(responses)) if i not in (2, 5))
        assert re.search(sentence, results[2].error)
        assert re.search(sentence, results[5].error)
        assert pool.respawns == 2
    assert children() == []


def test_the_time_lost_to_hangs_is_bounded_by_their_number(spec):
    with RewardPool(spec, timeout_s=0.3) as pool:
        pool.start()
        start = time.monotonic()
        results = scores(pool, *(["1"] * 20 + ["hang"]) * 3)
        elapsed = time.monotonic() - start
    assert sum(result.reward is None for result in results) == pool.respawns == 3
    assert 0.9 <= elapsed < 0.9 + 3 * 2.0  # 2 s for each new process on a busy machine


def test_the_time_allowed_is_that_of_one_call_and_not_of_the_batch(tmp_path):
    (tmp_path / "r.py").write_text("import time\ndef slow(p, r, s):\n    time.sleep(0.05)\n    return 1\n")
    with RewardPool(f"{tmp_path}/r.py:slow", timeout_s=0.5) as pool:
        assert [result.reward for result in scores(pool, *["r"] * 20)] == [1.0] * 20
        assert pool.respawns == 0


def test_loading_the_function_does_not_count_as_a_call(tmp_path):
    (tmp_path / "r.py").write_text("import time\ntime.sleep(0.6)\ndef quick(p, r, s):\n    return 1\n")
    with RewardPool(f"{tmp_path}/r.py:quick", timeout_s=0.2) as pool:
        assert scores(pool, "r") == [(1.0, None)]


def test_processes_score_side_by_side(tmp_path):
    (tmp_path / "r.py").write_text("import os, time\ndef who(p, r, s):\n    time.sleep(0.02)\n    return os.getpid()\n")
    with RewardPool(f"{tmp_path}/r.py:who", workers=3) as pool:
        pool.start()
        assert len({result.reward for result in scores(pool, *["r"] * 30)}) == 3


def test_what_a_reward_prints_reaches_the_log_and_a_flood_of_it_does_not(spec, capsys):
    with RewardPool(spec, timeout_s=60) as pool:
        results = scores(pool, "1", "flood", "2")
        assert [result.reward for result in results] == [1.0, None, 2.0]
        assert "raised ValueError" in results[1].error  # float("flood"), after the text was printed
        shown = capsys.readouterr().err
        assert len(shown) < 100_000
        assert "the rest of this step's output is dropped" in shown
        scores(pool, "raise", "1")
    with RewardPool(spec) as pool:
        scores(pool, "spawn")
    assert "child " in capsys.readouterr().err


def test_control_characters_of_printed_text_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def p(p, r, s):\n    print('a\\x1b[31mb')\n    return 1\n")
    with RewardPool(f"{tmp_path}/r.py:p") as pool:
        scores(pool, "r")
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "[31mb" in shown


def test_a_reward_that_closes_its_output_is_scored_on_and_costs_the_worker_no_time(spec):
    with RewardPool(spec, timeout_s=1) as pool:
        scores(pool, "close")
        before = time.process_time()
        assert scores(pool, "1", "hang", "2") == [(1.0, None), (None, ANY), (2.0, None)]
        assert time.process_time() - before < 0.5  # waiting, not polling


def test_a_process_serves_many_calls_and_samples_do_not_share_state(spec):
    with RewardPool(spec) as pool:
        row = {"answer": "a"}
        [first] = pool.score(["p"], ["pid"], [row])
        pool.score(["p"] * 8, ["1"] * 8, [row] * 8)  # the function empties the row it is given
        [second] = pool.score(["p"], ["pid"], [row])
        assert first == second
        assert row == {"answer": "a"}
        assert scores(pool, "calls")[0].reward == 11.0


def test_a_process_that_ended_between_two_calls_costs_no_sample(spec):
    with RewardPool(spec) as pool:
        process = psutil.Process(int(scores(pool, "pid")[0].reward))
        process.kill()
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert scores(pool, "1", "2") == [(1.0, None), (2.0, None)]
        assert pool.respawns == 1
        assert not process.is_running()


def test_closing_leaves_nothing_behind_and_the_pool_can_start_again(spec, capsys):
    descriptors = psutil.Process().num_fds()
    with RewardPool(spec, workers=2) as pool:
        scores(pool, *["1"] * 8, "spawn")
        assert len(children()) == 3
        pool.close()
        assert not [child for child in children() if child.status() != psutil.STATUS_ZOMBIE]
        [grandchild] = re.findall(r"child (\d+)", capsys.readouterr().err)
        wait_until(lambda: not psutil.pid_exists(int(grandchild)) or is_zombie(int(grandchild)))
        assert scores(pool, "3") == [(3.0, None)]
    assert children() == []
    pool = None
    assert psutil.Process().num_fds() <= descriptors + 1  # the selector's own


def test_an_interrupted_call_leaves_no_results_for_the_next(spec):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    with RewardPool(spec) as pool:
        pool.start()
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                scores(pool, "1", "hang", "2")
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert children() == []
        assert scores(pool, "7", "8") == [(7.0, None), (8.0, None)]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a process with its parent on Linux only")
def test_a_reward_process_ends_with_a_killed_parent_even_while_it_hangs(spec, tmp_path):
    code = f"""
from siirl.rewards import RewardPool
pool = RewardPool({spec!r}, timeout_s=3600)
print(int(pool.score(["p"], ["pid"], [{{}}])[0].reward), flush=True)
pool.score(["p"], ["spin"], [{{}}])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def other(p, r, s): return 1", "has no 'score'"),
        ("def score(p, r): return 1", "cannot be called as"),
        ("raise RuntimeError('no key')", r"cannot be imported: RuntimeError at .*r\.py:1: no key"),
        ("import os; os._exit(7)", "cannot be loaded: it ended its process with exit status 7"),
        ("import os; os.kill(os.getpid(), 9)", "cannot be loaded: its process was ended by SIGKILL"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_wrong_request(tmp_path, source, sentence):
    (tmp_path / "r.py").write_text(source)
    with RewardPool(f"{tmp_path}/r.py:score") as pool:
        with pytest.raises(RequestError, match=sentence):
            pool.start()
        with pytest.raises(RequestError, match=sentence):
            scores(pool, "1")
    assert children() == []


def test_unequal_columns_are_refused(spec):
    with RewardPool(spec) as pool, pytest.raises(ValueError, match="1 prompts, 2 responses"):
        pool.score(["p"], ["1", "2"], [{}])


@pytest.mark.alone
def test_samples_are_streamed_and_not_sent_one_after_another():
    rows = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i:04d}"} for i in range(512)]
    prompts, responses = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    with RewardPool("exact_match") as pool:
        pool.start()
        streamed = min(seconds(lambda: pool.score(prompts, responses, rows)) for _ in range(10))
        alone = min(seconds(lambda: pool.score(prompts[:1], responses[:1], rows[:1])) for _ in range(100))
        assert [result.reward for result in pool.score(prompts, responses, rows)] == [1.0] * 512
    assert streamed < 512 * alone / 2


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_zombie(pid):
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
