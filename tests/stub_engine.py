"""An engine process that computes nothing: each token follows the one before; for owners' tests.

What it does wrong is the model of Start; a file with that name counts its starts.
"""

import argparse
import sys
import time
from pathlib import Path

import msgspec
import zmq

from vattn.engine_process.messages import (
    VERSION,
    Abort,
    Add,
    Answer,
    Ask,
    BudgetReport,
    End,
    Facts,
    Progress,
    Ready,
    Refused,
    Start,
    StartFailed,
    Steps,
    Stop,
    Trouble,
    decode_command,
    encode,
)
from vattn.outputs import Timings

FACTS = Facts(
    model="stub",
    dtype="float32",
    device="cpu",
    vocab_size=1000,
    max_model_len=100,
    max_num_seqs=4,
    max_num_batched_tokens=100,
    eos_token_ids=[2],
    generation_defaults={},
    generation_ignored=[],
    page_bytes=4096,
    slots=4,
    slot_pages=4,
    budget_bytes=1 << 20,
    enable_prefix_caching=True,
    scheduling_policy="fcfs",
    max_logprobs=20,
    attention_backend="none",
)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--commands", "--news", "--directory"):
        parser.add_argument(name)
    asked = parser.parse_args()
    with zmq.Context() as context:
        commands, news = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with commands, news:
            commands.connect(asked.commands)
            news.connect(asked.news)
            return _serve(commands, news)


def _serve(commands: "zmq.Socket[bytes]", news: "zmq.Socket[bytes]") -> int:
    start = decode_command(commands.recv())
    assert isinstance(start, Start)
    assert start.version == VERSION
    count = Path(start.model)
    starts = len(count.read_bytes()) if count.exists() else 0
    count.write_bytes(b"." * (starts + 1))
    what = start.settings["what"]
    if what == "silent":
        time.sleep(600)
    fails = {"bad": True, "worse": starts > 0, "gone for once": starts == 1}
    if fails.get(what):
        news.send(encode(StartFailed(f"bad {what}", what != "worse")))
        return 2
    budget = FACTS.budget_bytes if start.budget_bytes is None else start.budget_bytes
    news.send(encode(Ready(msgspec.structs.replace(FACTS, budget_bytes=budget))))
    while True:
        command = decode_command(commands.recv())
        if isinstance(command, Stop):
            return 0
        if isinstance(command, Add):
            _add(command, what, news)
        elif isinstance(command, Abort):
            ends = [Progress(handle, 0, [], end=_end("abort")) for handle in command.handles]
            news.send(encode(Steps(ends)))
        elif isinstance(command, Ask):
            if command.what == "exit":
                return 7
            news.send(encode(_answer(command)))


def _answer(ask: Ask) -> Answer | Trouble:
    if ask.what == "set_budget":
        return Answer(ask.number, BudgetReport(0, ask.argument, 0, 0, 0))
    if ask.what == "check":
        return Answer(ask.number)
    return Trouble(ask.number, "no such question", True)


def _add(add: Add, what: str, news: "zmq.Socket[bytes]") -> None:
    if what == "hangs":
        time.sleep(600)
    if what == "garbage":
        news.send(b"garbage")
        return
    if add.prompt_ids in ([], [999]):
        news.send(encode(Refused(add.handle, "999 is refused")))
        return
    token = add.prompt_ids[-1]
    for _ in range(add.params.get("max_tokens", 16)):
        token += 1
        news.send(encode(Steps([Progress(add.handle, 0, [token])])))
    if not add.params.get("ignore_eos"):  # which stands for one that never ends
        news.send(encode(Steps([Progress(add.handle, 0, [], end=_end("length"))])))


def _end(reason: str) -> End:
    return End(reason, None, None, Timings(), None)


if __name__ == "__main__":
    sys.exit(main())
