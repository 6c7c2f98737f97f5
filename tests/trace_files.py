"""Files of event traces: made, read, and held against the format."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import vattn
from tests.engine_cases import greedy
from vattn.outputs import RequestOutput

PREFIX = [(7 * i) % 90 + 3 for i in range(40)]
Entry = dict[str, Any]
PHASES = {"M", "X", "i", "C", "b", "e", "s", "f"}
_TICK_US = 0.0015  # times are rounded to nanoseconds


class TraceFile:
    """A trace that was read; it is checked by then.

    Attributes:
        entries: of ``traceEvents``.
        other: ``otherData``.
    """

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        assert document["displayTimeUnit"] == "ms"
        self.other: Entry = document["otherData"]
        self.entries: list[Entry] = document["traceEvents"]
        self._check()

    def of(self, name: str, phase: str = "X") -> list[Entry]:
        """The entries of a name, in the order of time."""
        found = [e for e in self.entries if e["name"] == name and e["ph"] == phase]
        return sorted(found, key=lambda e: e["ts"])

    def calls(self) -> Counter[str]:
        """Calls of the driver's API by kind."""
        found: Counter[str] = Counter()
        for entry in self.entries:
            if entry.get("cat") == "driver":
                found[entry["name"]] += entry["args"]["calls"]
        return found

    def names(self, what: str) -> dict[tuple[int, int], str]:
        """What processes or threads are called."""
        return {
            (e["pid"], e["tid"]): e["args"]["name"]
            for e in self.entries
            if e["ph"] == "M" and e["name"] == what
        }

    def _check(self) -> None:
        for entry in self.entries:
            assert entry["name"], entry
            assert isinstance(entry["pid"], int), entry
            assert isinstance(entry["tid"], int), entry
            assert entry["ts"] >= 0, entry
            assert entry.get("dur", 0) >= 0, entry
            assert ("dur" in entry) == (entry["ph"] == "X"), entry
        own = [e for e in self.entries if e.get("cat") != "ac2g"]  # arrows of torch's profiler
        assert {e["ph"] for e in own} <= PHASES
        self._check_slices()
        self._check_lives()
        self._check_flows()
        for entry in self.entries:
            if entry["ph"] == "C":
                assert all(isinstance(v, int) and v >= 0 for v in entry["args"].values()), entry
        threads = {(e["pid"], e["tid"]) for e in self.entries if e["ph"] == "X"}
        assert threads <= set(self.names("thread_name"))
        assert {pid for pid, _ in threads} <= {pid for pid, _ in self.names("process_name")}

    def _check_slices(self) -> None:
        """Slices of a thread lie in each other or apart."""
        tracks: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry["ph"] == "X":
                tracks[entry["pid"], entry["tid"]].append(entry)
        for entries in tracks.values():
            outer: list[float] = []  # where those end that are not over
            for entry in sorted(entries, key=lambda e: (e["ts"], -e["dur"])):
                end = entry["ts"] + entry["dur"]
                while outer and outer[-1] <= entry["ts"] + _TICK_US:
                    outer.pop()
                assert not outer or end <= outer[-1] + _TICK_US, entry
                outer.append(end)

    def _check_lives(self) -> None:
        """Begins and ends of what threads share match, and lie in each other."""
        open_names: dict[tuple[str, int], list[str]] = defaultdict(list)
        last: dict[tuple[str, int], float] = {}
        for entry in self.entries:
            if entry["ph"] not in "be":
                continue
            life = entry["cat"], entry["id"]
            assert entry["ts"] >= last.get(life, 0) - _TICK_US, entry
            last[life] = entry["ts"]
            if entry["ph"] == "b":
                open_names[life].append(entry["name"])
            else:
                assert open_names[life].pop() == entry["name"], entry
        assert not any(open_names.values()), open_names

    def _check_flows(self) -> None:
        """Each arrow has a tail and, later, a head."""
        tails = {e["id"]: e for e in self.entries if e["ph"] == "s" and e["cat"] == "flow"}
        heads = {e["id"]: e for e in self.entries if e["ph"] == "f" and e["cat"] == "flow"}
        assert tails.keys() == heads.keys()
        for identity, tail in tails.items():
            assert tail["ts"] <= heads[identity]["ts"]
            assert heads[identity]["bp"] == "e"


def holds(outer: Entry, inner: Entry) -> bool:
    """Whether a slice lies in another, whatever their threads are."""
    end = inner["ts"] + inner.get("dur", 0)
    return bool(
        outer["ts"] - _TICK_US <= inner["ts"] and end <= outer["ts"] + outer["dur"] + _TICK_US
    )


def serve(llm: vattn.LLM, n: int = 4, new_tokens: int = 6) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": [*PREFIX, 3 + i, 9]} for i in range(n)]
    return llm.generate(prompts, greedy(new_tokens), use_tqdm=False)
