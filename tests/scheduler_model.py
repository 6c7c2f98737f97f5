"""A memory for the scheduler that counts pages, and a model that reads what is in the slots.

The model's next token depends on every token in the slot, so a request that was preempted, swapped,
forked or cut into chunks in a wrong way ends with other tokens than :func:`expected_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings

from tests.beam_model import beam_candidates
from vattn.engine.beams import BeamGroup, Candidates
from vattn.engine.gangs import absent, mates
from vattn.engine.scheduler import NeverFits, Plan, Scheduler
from vattn.outputs import KVUsage, Logprob
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

VOCABULARY = 50


def next_token(content: Sequence[int], seed: int) -> int:
    """What the model says after ``content``."""
    value = seed
    for token in content:
        value = (value * 31 + token + 7) % 10_007
    return value % VOCABULARY


def expected_tokens(request: Request) -> list[int]:
    """Prompt and output of a request that nobody disturbs."""
    tokens = list(request.prompt_ids)
    while len(tokens) < request.limit:
        token = next_token(tokens, request.seed)
        tokens.append(token)
        if token in request.stop_ids:
            break
    return tokens


def make_request(
    name: str,
    prompt: int | Sequence[int] = 4,
    new: int = 4,
    *,
    params: SamplingParams | None = None,
    **options: object,
) -> Request:
    """A request of ``prompt`` tokens, or these, that ends after ``new`` more."""
    ids = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    settings = params or SamplingParams(max_tokens=new)
    return Request(name, ids, settings, len(ids) + new, **options)  # type: ignore[arg-type]


@dataclass
class SlotState:
    """One open slot."""

    request: Request
    pages: list[int]
    promised: int  # pages for all tokens it had when it was admitted
    content: list[int]


@dataclass
class FakeMemory:
    """Pages are numbers with reference counts; prefixes are kept as token lists that cost nothing.

    ``fail_grows`` makes so many calls of ``grow`` fail, and ``fail_reorders`` of ``reorder``;
    ``swap_pages`` is the room for what is preempted, the rest is dropped.
    """

    budget: int
    page_tokens: int = 4
    slots: int = 64
    swap_pages: int = 0
    prefixes: bool = True
    fail_grows: int = 0
    fail_reorders: int = 0
    open: dict[int, SlotState] = field(default_factory=dict)
    references: dict[int, int] = field(default_factory=dict)
    kept: list[list[int]] = field(default_factory=list)
    prepared: dict[int, int] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    swapped: int = 0
    forks: int = 0
    _next_page: int = 0

    # What the scheduler calls ---------------------------------------------------------------------

    def admit(self, request: Request) -> bool:
        assert request.slot == -1
        assert request.computed == 0
        needed = self.pages_for(len(request.tokens))
        if needed > self.budget:
            raise NeverFits(f"needs {needed} pages, and the budget is {self.budget} pages")
        prefix, shared = self._prefix(request)
        if needed - len(shared) > self.available() or len(self.open) == self.slots:
            return False
        slot = min(set(range(self.slots)) - set(self.open))
        for page in shared:
            self.references[page] += 1
        own = [self._take() for _ in range(self.pages_for(len(prefix)) - len(shared))]
        self.open[slot] = SlotState(request, [*shared, *own], needed, prefix)
        request.slot, request.computed = slot, len(prefix)
        if request.saved is not None:
            self.swapped -= self.pages_for(len(request.saved))
            request.saved = None
        elif not request.preemptions:
            request.cached = len(prefix)
        self.log.append(("admit", request.id))
        return True

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        assert len(set(slots)) == len(slots)
        if self.fail_grows:
            self.fail_grows -= 1
            return False
        extra = beyond = 0
        for slot, n in zip(slots, tokens, strict=True):
            state = self.open[slot]
            assert len(state.content) < n <= state.request.length + len(state.request.drafts)
            more = max(0, self.pages_for(n) - len(state.pages))
            extra += more
            beyond += max(0, min(more, self.pages_for(n) - state.promised))
        if extra and (beyond > self.available() or extra > self.budget - len(self.references)):
            return False
        for slot, n in zip(slots, tokens, strict=True):
            pages = self.open[slot].pages
            pages += [self._take() for _ in range(self.pages_for(n) - len(pages))]
        return True

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        assert not spoiled
        state = self.open[request.slot]
        state.content = state.content[: request.computed]
        needed = self.pages_for(request.computed)
        for page in state.pages[needed:]:
            self._drop(page)
        state.pages = state.pages[:needed]

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        assert len(set(slots)) == len(slots)
        if self.fail_reorders:
            self.fail_reorders -= 1
            return False
        before = dict(self.references), {slot: self.open[slot].pages for slot in slots}
        contents = {slot: self.open[slot].content for slot in sources}
        shared = {
            slot: self.open[slot].pages[: len(contents[slot]) // self.page_tokens]
            for slot in sources
        }
        for source in sources:
            for page in shared[source]:
                self.references[page] += 1
        for slot, source in zip(slots, sources, strict=True):
            state = self.open[slot]
            assert len(state.content) == len(contents[source])
            for page in state.pages:
                self._drop(page)
            tail = self.pages_for(len(contents[source])) - len(shared[source])
            state.pages = shared[source] + [self._take() for _ in range(tail)]
        if len(self.references) > max(self.budget, len(before[0])):
            self.references = before[0]
            for slot, pages in before[1].items():
                self.open[slot].pages = pages
            return False
        for slot, source in zip(slots, sources, strict=True):
            self.open[slot].content = list(contents[source])
        return True

    def usage(self, request: Request) -> KVUsage:
        return KVUsage(pages=len(self.open[request.slot].pages) if request.slot >= 0 else 0)

    def preempt(self, request: Request) -> None:
        state = self._close(request)
        pages = self.pages_for(len(state.content))
        if request.group is None and state.content and self.swapped + pages <= self.swap_pages:
            self.swapped += pages
            request.saved = state.content
        self.log.append(("preempt", request.id))

    def release(self, request: Request) -> None:
        if request.slot >= 0:
            self._close(request)
        if request.saved is not None:
            self.swapped -= self.pages_for(len(request.saved))
            request.saved = None
        self.log.append(("release", request.id))

    def over_budget(self) -> bool:
        return len(self.references) > self.budget

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        assert len(set(slots)) == len(slots)
        for slot, n in zip(slots, tokens, strict=True):
            state = self.open[slot]
            assert state.request.computed < n < state.request.limit
        self.prepared = dict(zip(slots, tokens, strict=True))

    def shortage(self, request: Request) -> str:
        needed = self.pages_for(request.computed + 1)
        return f"needs {needed} pages or more, and the budget is {self.budget} pages"

    # Pages ----------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def available(self) -> int:
        """Pages that are neither live nor promised."""
        promised = sum(max(0, s.promised - len(s.pages)) for s in self.open.values())
        return self.budget - len(self.references) - promised

    def _take(self) -> int:
        self._next_page += 1
        self.references[self._next_page] = 1
        return self._next_page

    def _drop(self, page: int) -> None:
        self.references[page] -= 1
        if not self.references[page]:
            del self.references[page]

    def _close(self, request: Request) -> SlotState:
        state = self.open.pop(request.slot)
        assert state.request is request
        for page in state.pages:
            self._drop(page)
        state.content = state.content[: request.computed]  # no draft that may be wrong
        if state.content and self.prefixes:
            self.kept = [*self.kept[-7:], state.content[: len(request.tokens)]]
        request.slot, request.computed = -1, 0
        return state

    def _prefix(self, request: Request) -> tuple[list[int], list[int]]:
        """The tokens that can be had without computing them, and the live pages that hold some."""
        most = len(request.tokens) - 1
        if request.prompt_logprobs is not None:  # what is not computed has no scores
            most = min(most, len(request.prompt_logprobs) - 1)
        if request.saved is not None:
            assert request.saved == request.tokens[: len(request.saved)]
            return request.saved[:most], []
        best, pages = 0, []
        for known in self.kept if self.prefixes else []:
            best = max(best, min(_common(known, request.tokens), most))
        source = request.source
        if source is not None and source.slot >= 0:
            state = self.open[source.slot]
            common = min(_common(state.content, request.tokens), most)
            if common and common >= best:
                self.forks += 1
                best, pages = common, state.pages[: common // self.page_tokens]
        return request.tokens[:best], pages

    def check(self) -> None:
        counted: dict[int, int] = {}
        for slot, state in self.open.items():
            assert state.request.slot == slot
            assert len(state.content) <= len(state.pages) * self.page_tokens
            known = state.request.tokens
            drafts = len(state.content) - state.request.computed
            assert drafts == 0 or (state.request.in_flight and drafts <= len(state.request.drafts))
            computed = state.content[: state.request.computed]
            assert computed[: len(known)] == known[: len(computed)]
            for page in state.pages:
                counted[page] = counted.get(page, 0) + 1
        assert counted == self.references
        assert 0 <= self.swapped <= self.swap_pages


def record_scores(plan: Plan) -> None:
    """Each position's own token, unless it was known before."""
    for request, first, count in plan.scored:
        known = request.prompt_logprobs
        assert known is not None
        for position in range(first, first + count):
            if len(known) == position + 1:
                known.append({request.prompt_ids[position + 1]: Logprob(-1.0, 1)})


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class FakeEngine:
    """Steps of an engine, checked at every point.

    With ``steps_in_flight=1`` tokens are appended after the next step was launched, and what the
    model needs of them meanwhile is taken from the device's memory, as a real engine does.
    """

    steps_in_flight = 0  # unless told otherwise

    def __init__(
        self,
        memory: FakeMemory | None = None,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        **options: object,
    ) -> None:
        self.memory = memory or FakeMemory(budget=1000)
        self.now = 0.0
        options = {"steps_in_flight": self.steps_in_flight, **options}
        self.ahead = bool(options["steps_in_flight"])
        self.flying: tuple[Plan, list[int]] | None = None
        self.last_token: dict[int, int] = {}  # by slot
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            clock=lambda: self.now,
            **options,  # type: ignore[arg-type]
        )
        self.found: dict[Plan, list[tuple[BeamGroup, Candidates]]] = {}  # until they arrive
        self.ended: list[Request] = []
        self.steps = 0
        self.propose: Callable[[Request], list[int]] | None = None
        self.waits_for_tokens = False  # as requests must that are to have drafts

    def add(self, *requests: Request) -> None:
        for request in requests:
            request.waits_for_tokens |= self.waits_for_tokens
            self.scheduler.add(request)

    def step(
        self,
        before_launch: Callable[[], object] | None = None,
        in_flight: Callable[[], object] | None = None,
    ) -> Plan:
        """One step; the callbacks run where a user may interfere. Returns what was launched."""
        if self.propose is not None:
            for request in self.scheduler.may_draft():
                request.drafts = self.propose(request)
        plan = self.scheduler.schedule()
        self.check()
        self._check_progress(plan)
        if before_launch is not None:
            before_launch()
            self.check()
        tokens = self._launch(plan)
        self.scheduler.computed(plan)
        self.scheduler.sampled(plan)
        self.check()
        self.scheduler.stage()
        self.check()
        if in_flight is not None:
            in_flight()
            self.check()
        arrived = (plan, tokens) if plan.is_told else None
        if self.ahead:
            arrived, self.flying = self.flying, arrived
        if arrived is not None:
            record_scores(arrived[0])
            self.scheduler.append_tokens(*arrived)
            self.scheduler.advance_beams(self.found.pop(arrived[0], ()))
        self.check()
        self.ended += self.scheduler.take_finished()
        self.steps += 1
        return plan

    def run(self, most_steps: int = 1000) -> list[Request]:
        """Steps until nothing is left; the requests in the order in which they ended."""
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished and self.flying is None:
                return self.ended
            self.step()
        raise AssertionError(f"not done after {most_steps} steps: {self.scheduler.stats()}")

    def check(self) -> None:
        self.scheduler.check()
        self.memory.check()

    def assert_empty(self) -> None:
        """Nothing is left, anywhere."""
        self.check()
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert self.memory.open == {}
        assert self.memory.references == {}
        assert self.memory.swapped == 0
        assert self.scheduler.take_finished() == []

    def _check_progress(self, plan: Plan) -> None:
        """The first in order of those that run is in every plan."""
        running = [s.request for s in self.memory.open.values()]
        running = [r for r in running if r.status is Status.RUNNING]
        running = [r for r in running if r.length < r.limit]  # the others wait for their last token
        running = [r for r in running if not (r.waits_for_tokens and r.in_flight)]
        if self.flying is not None and not plan.requests:
            return  # pages are short, and what is in flight may end somebody
        if running:
            first = min(running, key=self.scheduler._order)
            restarted = first.group is not None and absent(first.group)  # they come in the next
            assert restarted or not set(mates(first)).isdisjoint(plan.requests)
        else:
            assert plan.requests == []

    def _launch(self, plan: Plan) -> list[int]:
        """Writes the step's tokens into the slots, and samples."""
        drafts = dict(plan.verifies)
        for request, slot, length in zip(plan.requests, plan.slots, plan.kv_lens, strict=True):
            state = self.memory.open[slot]
            assert state.request is request
            assert self.memory.pages_for(length) <= len(state.pages)
            assert request.computed == len(state.content)
            new = request.tokens[request.computed : length]
            if request.in_flight:
                assert new == []
                new = [self.last_token[slot]]
            state.content = state.content + new
            state.content += request.drafts[: drafts.get(request, 0)]
            assert len(state.content) == length
        offsets = plan.offsets or [0] * len(plan.sampling)
        tokens = []
        for request, offset in zip(plan.sampling, offsets, strict=True):
            content = self.memory.open[request.slot].content
            seen = len(content) - drafts.get(request, 0) + offset
            tokens.append(next_token(content[:seen], request.seed))
        self.last_token |= {r.slot: t for r, t in zip(plan.sampling, tokens, strict=True)}
        contents = {r: self.memory.open[r.slot].content for r in plan.sampling if r.group}
        self.found[plan] = beam_candidates(contents)
        return tokens


def assert_answered(request: Request, *, smallest_budget: int, page_tokens: int) -> None:
    """What a request ended with is right for its reason."""
    whole = expected_tokens(request)
    if request.finish_reason in (FinishReason.LENGTH, FinishReason.STOP):
        assert request.tokens == whole
    else:
        assert request.tokens == whole[: len(request.tokens)]
        assert len(request.tokens) < len(whole)
    if request.finish_reason is FinishReason.ERROR:
        assert request.error is not None
        assert "budget" in request.error
        assert -(-request.limit // page_tokens) > smallest_budget
    assert (request.finish_reason is FinishReason.ERROR) == (request.error is not None)


def machine_settings(max_examples: int) -> settings:
    """How state machines run: the same examples each time, whatever the clock says."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
