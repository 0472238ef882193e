"""Child processes: what they answer, and that nothing they do harms or outlives the process that asked."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers import worker
from helpers.errors import TunebookError
from helpers.worker import Lost, Worker
from tests.conftest import PROJECT


def act(request, event):
    """What the child of these tests does."""
    what, value = request
    if what == "echo":
        print("noise among the answers")
        return value
    if what == "events":
        for number in range(value):
            event(number)
        return "done"
    if what == "sleep":
        time.sleep(value)
    if what == "spin":
        return 9**999999999
    if what == "eat":
        return len(bytearray(value * 2**20))
    if what == "refuse":
        raise TunebookError(value)
    if what == "bug":
        return {}[value]
    if what == "crash":
        print(value, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "pid":
        return os.getpid()


class Counter:
    """A handler with a state, made from what `start` says."""

    def __init__(self, begin):
        if begin < 0:
            raise TunebookError("it begins below zero")
        self.count = begin
        self.started = {"from": begin}

    def __call__(self, request, event):
        self.count += request
        return self.count


ACT, COUNTER = f"{__name__}:act", f"{__name__}:Counter"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The child imports this file by its name."""
    folders = [str(PROJECT), str(PROJECT / "tests")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_answers_events_and_errors_come_back_as_what_they_are():
    events = []
    with Worker(ACT, name="the child") as child:
        assert child.ask(["echo", {"text": "é\ud800\x00"}]) == {"text": "é\ud800\x00"}
        assert child.ask(["events", 3], events.append) == "done" and events == [0, 1, 2]
        with pytest.raises(TunebookError, match=r"^ask otherwise$"):
            child.ask(["refuse", "ask otherwise"])
        with pytest.raises(RuntimeError, match="KeyError: 'nosuch'"):
            child.ask(["bug", "nosuch"])
        assert child.ask(["echo", 1]) == 1
    assert child.process.poll() is not None


def test_a_class_is_made_once_and_keeps_its_state_until_it_is_lost():
    with Worker(COUNTER, start={"begin": 5}) as child:
        assert child.started == {"from": 5}
        assert [child.ask(1), child.ask(1)] == [6, 7]
        child.process.kill()
        child.process.wait()
        assert child.ask(1) == 6
    with pytest.raises(TunebookError, match="below zero"):
        Worker(COUNTER, start={"begin": -1})


def test_a_crash_is_an_error_message_with_the_childs_last_words_and_the_next_request_is_answered():
    with Worker(ACT, name="llama.cpp") as child:
        with pytest.raises(Lost, match=r"llama.cpp ended with status -11: .*GGML_ASSERT failed") as lost:
            child.ask(["crash", "GGML_ASSERT failed\x1b[2J"])
        assert lost.value.why == "ended" and "\x1b" not in str(lost.value)
        assert child.ask(["echo", 1]) == 1


@pytest.mark.parametrize("request_, limits, why", [
    (["sleep", 60], {"wall_s": 1}, "time"),
    (["spin", 0], {"wall_s": 2}, "time"),
    (["eat", 1024], {"wall_s": 60, "memory_gib": 0.5}, "memory"),
])  # fmt: skip
def test_time_and_memory_limits_hold_in_the_child_even_inside_c_code(request_, limits, why):
    started = time.monotonic()
    with pytest.raises(Lost) as lost:
        worker.run(ACT, request_, **limits)
    assert lost.value.why == why and time.monotonic() - started < 30


def test_what_stays_within_the_limits_is_answered_and_the_parents_limits_stay():
    import resource

    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]
    assert worker.run(ACT, ["eat", 100], wall_s=60, memory_gib=0.5) == 100 * 2**20
    assert before == [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]


def test_an_error_while_events_are_read_does_not_shift_the_answers():
    def stop(value):
        raise KeyboardInterrupt

    with Worker(ACT) as child:
        with pytest.raises(KeyboardInterrupt):
            child.ask(["events", 3], stop)
        assert child.ask(["echo", "mine"]) == "mine"


def test_requests_of_several_threads_get_their_own_answers():
    with Worker(ACT) as child:
        found = {}
        threads = [threading.Thread(target=lambda i=i: found.update({i: child.ask(["echo", i])})) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: i for i in range(8)}


@pytest.mark.parametrize("thread", [False, True])
def test_a_busy_child_is_gone_when_its_parent_is_killed(thread):
    code = f"""
import threading
from helpers.worker import Worker
def work():
    child = Worker({ACT!r})
    print(child.ask(["pid", 0]), flush=True)
    child.ask(["sleep", 600])
if {thread}:
    t = threading.Thread(target=work); t.start(); t.join()
else:
    work()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_a_child_whose_thread_has_ended_still_answers():
    made = []
    thread = threading.Thread(target=lambda: made.append(Worker(ACT)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    with made[0] as child:
        assert child.ask(["echo", 1]) == 1 and child.process.pid == child.ask(["pid", 0])
