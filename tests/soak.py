"""Thousands of random requests on a stub model, with everything that can go wrong going wrong.

Requests come, share prefixes, are cancelled and expire; the budget moves; steps and driver calls
fail. Every request must be answered with exactly the right tokens, or fail with a reason, and at
the end nothing may be left. `make soak` runs the long version; tests/test_soak.py a short one.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import vattn
from tests.drivers import fake_library_path, make_driver
from tests.fake_cuda.fake import FakeCuda
from tests.helpers import torch_device
from tests.stub_model import VOCABULARY, StubModel, StubRunner, expected_tokens
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.request import Request
from vattn.sampling_params import SamplingParams

PAGES = 160  # of the budget at its largest; a full sequence needs a tenth of it
MAX_LEN = 96
FAULTS = (
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuEventRecord",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoDAsync",
)
FAULT_CODES = (2, 1)  # out of memory, invalid value


class StepFault(RuntimeError):
    """A step that was made to fail."""


@dataclass
class Soak:
    """One run.

    Args:
        kind: of the driver, see tests/drivers.py.
        seed: of everything random.
        window: the second layer has a sliding window.
        policy: of the scheduler.
        check_every: steps between full checks of all invariants.
        ahead: asynchronous scheduling.
    """

    kind: str
    seed: int
    window: bool = False
    policy: str = "fcfs"
    check_every: int = 7
    step_faults: float = 0.002
    ahead: bool = False
    fake: FakeCuda | None = None
    sent: dict[str, Request] = field(default_factory=dict)
    ended: dict[str, Request] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        if self.kind == "cuda_fake":
            gc.collect()  # a driver that outlived its test would give back the next one's context
            self.fake = FakeCuda(fake_library_path())
            self.fake.reset()
            self.fake.configure(granularity=65536)
        driver = make_driver(self.kind)
        page = driver.granularity()
        pool = vattn.PagePool(
            torch_device(driver), driver=driver, page_bytes=page, budget_bytes=PAGES * page
        )
        self.page = page
        model: Any = StubModel(max_positions=MAX_LEN, window=self.window)
        model.specs, model.layer_specs = _scaled(model, page)
        config = EngineConfig(
            max_num_seqs=12,
            max_num_batched_tokens=64,
            swap_space=self.rng.choice([0.0, 0.0001, 0.01]),
            order="token",
            scheduling_policy=self.policy,  # type: ignore[arg-type]
            seed=self.seed,
            async_scheduling=self.ahead,
        )
        self.engine = Engine(model, config, pool=pool)
        self.engine.runner = StubRunner(self.engine.cache, self._maybe_fail)  # type: ignore[assignment]
        self.prefixes = [self._ids(self.rng.randrange(4, 60)) for _ in range(6)]

    def _ids(self, n: int) -> list[int]:
        return [self.rng.randrange(VOCABULARY) for _ in range(n)]

    def _maybe_fail(self) -> None:
        if self.rng.random() < self.step_faults:
            raise StepFault("a step was made to fail")

    # Running --------------------------------------------------------------------------------------

    def run(self, requests: int) -> None:
        """Sends so many requests and answers all of them; then nothing may be left."""
        steps = 0
        while len(self.ended) < requests or self.engine.has_unfinished:
            if len(self.sent) < requests and self.rng.random() < 0.35:
                self._send(min(self.rng.choice([1, 1, 2, 5, 20]), requests - len(self.sent)))
            self._disturb()
            for request in self.engine.step():
                if request.finished:
                    assert request.id not in self.ended, f"{request.id} was answered twice"
                    self.ended[request.id] = request
                    self._judge(request)
            steps += 1
            if steps % self.check_every == 0:
                self.engine.check()
            assert steps < 200 * requests + 10_000, "no progress"
        self._finish()

    def _send(self, n: int) -> None:
        for _ in range(n):
            if len(self.sent) and self.rng.random() < 0.15:
                # A follow-up turn of somebody else's conversation, finished or not.
                base = list(self.rng.choice(list(self.sent.values())[-30:]).tokens)
            else:
                base = list(self.rng.choice(self.prefixes)) if self.rng.random() < 0.7 else []
            prompt = (base + self._ids(self.rng.randrange(1, 24)))[: MAX_LEN - 1]
            samples = self.rng.choice([1, 1, 1, 1, 3])
            made = self.engine.make_requests(
                f"r{len(self.sent)}",
                prompt,
                SamplingParams(
                    n=samples,
                    temperature=0,
                    max_tokens=self.rng.randrange(1, 40),
                    ignore_eos=True,
                    detokenize=False,
                ),
                priority=self.rng.randrange(3) if self.policy == "priority" else 0,
                cache_salt=self.rng.choice(["", "", "other"]),
                timeout_s=0.02 if self.rng.random() < 0.02 else None,
            )
            for request in made:
                self.sent[request.id] = request
                self.engine.add(request)

    def _disturb(self) -> None:
        try:
            self._disturb_once(self.rng.random())
        except vattn.DriverError as error:
            # Who moves a budget or trims is told; the engine goes on.
            assert self.fake is not None, error
            assert not error.fatal, error

    def _disturb_once(self, roll: float) -> None:
        if roll < 0.04 and self.sent:
            self.engine.abort(self.rng.choice(list(self.sent)))
        elif roll < 0.06:
            pages = self.rng.choice([PAGES, PAGES, PAGES // 2, PAGES // 5, 8])
            self.engine.memory.set_budget(pages * self.page)
        elif roll < 0.07:
            self.engine.cache.trim()
        elif roll < 0.08:
            self.engine.memory.reset_prefix_cache()
        elif roll < 0.12 and self.fake is not None:
            # A second fault might hit the undoing of the first.
            self.engine.cache.pool.mapper.drain()
            self.fake.clear_failures()
            self.fake.fail(
                self.rng.choice(FAULTS),
                nth=self.rng.randrange(1, 30),
                code=self.rng.choice(FAULT_CODES),
            )

    def _judge(self, request: Request) -> None:
        """The output is right as far as it goes, and a failure has its reason."""
        assert request.finish_reason is not None
        reason = request.finish_reason.value
        self.outcomes[reason] += 1
        wanted = expected_tokens(request.prompt_ids, len(request.output_ids), self.window)
        assert request.output_ids == wanted, f"{request.id}: {request.output_ids} != {wanted}"
        if reason == "length":
            assert len(request.tokens) == request.limit
        elif reason == "error":
            assert request.error
        else:
            assert reason in ("abort", "deadline"), reason
        assert (request.slot, request.saved) == (-1, None)

    def _finish(self) -> None:
        assert set(self.ended) == set(self.sent)
        if self.fake is not None:
            self.fake.clear_failures()
        engine = self.engine
        engine.memory.set_budget(PAGES * self.page)
        engine.check()
        engine.memory.reset_prefix_cache()
        pool = engine.cache.pool
        engine.cache.trim()
        engine.check()
        assert engine.memory.swap.used_bytes == 0
        assert pool.stats().created_bytes == 0, pool.stats()
        self.stats = engine.stats()
        engine.close()
        assert pool.driver.physical_bytes() == 0
        if self.fake is not None:
            assert self.fake.violations() == []
        # A driver that outlives its test gives back the context of the next one's.
        del self.engine, engine, pool
        gc.collect()
        if self.fake is not None:
            assert self.fake.leaks() == []


def _scaled(model: StubModel, page: int) -> tuple[Any, Any]:
    """Heads as wide against large pages as against small ones, so that tokens cross pages."""
    from dataclasses import replace

    scale = page // 4096
    specs = [replace(spec, head_dim=spec.head_dim * scale) for spec in model.specs]
    layers = [replace(spec, head_dim=spec.head_dim * scale) for spec in model.layer_specs()]
    return specs, lambda: layers


def main() -> None:
    """Runs every configuration and prints what became of the requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="in all, over configurations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    configurations: list[dict[str, Any]] = [
        {"kind": "host_strict", "window": window, "policy": policy, "ahead": ahead}
        for window in (False, True)
        for policy in ("fcfs", "priority")
        for ahead in (False, True)
    ]
    configurations += [
        {"kind": "cuda_fake", "window": window, "ahead": ahead}
        for window in (False, True)
        for ahead in (False, True)
    ]
    each = -(-arguments.requests // len(configurations))
    total: Counter[str] = Counter()
    for i, configuration in enumerate(configurations):
        started = time.perf_counter()
        soak = Soak(seed=arguments.seed + i, **configuration)
        soak.run(each)
        total += soak.outcomes
        seconds = time.perf_counter() - started
        print(
            f"{configuration}: {dict(soak.outcomes)}, {soak.stats.num_preemptions} preemptions, "
            f"{soak.stats.requests_swapped_in} swapped in, {soak.stats.requests_forked} forked, "
            f"{soak.stats.requests_reopened} reopened, {seconds:.0f} s"
        )
    print(f"all {sum(total.values())} requests answered: {dict(total)}")


if __name__ == "__main__":
    main()
