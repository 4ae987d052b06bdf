"""The turns in which vLLM's engine compiles grammars."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rift.engines.vllm import GrammarTurns


class Request:
    def __init__(self, account: str, name: str) -> None:
        self.cache_salt, self.name, self.finished = account, name, False

    def is_finished(self) -> bool:
        return self.finished


class Compiler:
    """Compiles one grammar for each permit."""

    def __init__(self, threads: int) -> None:
        self.permits = threading.Semaphore(0)
        self.order: list[str] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.executor = ThreadPoolExecutor(threads)
        self.turns = GrammarTurns(self.executor.submit)

    def __call__(self, request: Any) -> str:
        self.running[request.cache_salt] += 1
        self.most |= self.running
        self.order.append(request.name)
        assert self.permits.acquire(timeout=10)
        self.running[request.cache_salt] -= 1
        if request.name == "bad":
            raise ValueError(request.name)
        return str(request.name)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_grammar_waits_for_one_of_each_other_account(threads: int) -> None:
    compiler = Compiler(threads)
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
    futures = [compiler.turns.submit(compiler, Request(name[0], name)) for name in names]
    compiler.permits.release(len(names))
    assert [future.result(10) for future in futures] == names
    assert set(compiler.most.values()) == {1}
    if threads == 1:
        assert compiler.order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    compiler.executor.shutdown()
    assert not compiler.turns._queues


def test_a_grammar_whose_request_has_ended_is_not_compiled_and_an_error_ends_one_turn() -> None:
    compiler = Compiler(1)
    requests = [Request("a", name) for name in ("bad", "gone", "next")]
    bad, gone, after = [compiler.turns.submit(compiler, request) for request in requests]
    requests[1].finished = True
    compiler.permits.release(2)
    with pytest.raises(ValueError, match="bad"):
        bad.result(10)
    assert after.result(10) == "next"
    assert gone.cancelled()
    assert compiler.order == ["bad", "next"]
    compiler.executor.shutdown()
    assert not compiler.turns._queues
