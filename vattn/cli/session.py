"""Shows a run: texts in the order of the prompts, progress, reports, and what went wrong."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.rule import Rule

import vattn
from vattn.cli import report
from vattn.cli.console import CliError, Page, Words, one_line
from vattn.cli.decoding import with_option_names
from vattn.cli.generate import Request
from vattn.cli.progress import Bar, Lines
from vattn.cli.run import Output, Run, settings
from vattn.config import format_bytes


class Session:
    """One run over all prompts, with its progress and its reports."""

    def __init__(self, request: Request, console: Console, run: Run, name: str) -> None:
        self._request = request
        self._console = console
        self._run = run
        self._name = name
        self._page = Page(console.width)
        self._words = Words()
        self._printed = 0  # outputs, in their order
        self._is_streamed = len(request.prompts) == 1 and not request.is_search

    def run(self) -> None:
        """Generates, prints and reports.

        Raises:
            CliError: out of pages, a driver's error, or anything else that ended a text early.
            typer.Exit: with code 130 after Ctrl-C.
        """
        timing, ended = self._run.timing, False
        try:
            self._generate()
            ended = True
            self._report()
        except KeyboardInterrupt:
            self._print_rest()
            self._console.print(f"\ninterrupted after {timing.tokens} tokens", style="yellow")
            raise typer.Exit(130) from None
        except vattn.DriverError as error:
            self._print_rest()
            raise CliError(f"the driver failed: {one_line(error)}; see vattn doctor") from error
        finally:
            if self._request.json_file is not None:
                self._write_json(with_stats=ended)
        if failed := [output for output in self._run.outputs if output.error is not None]:
            raise CliError(self._explain(failed))

    # Texts ----------------------------------------------------------------------------------------

    def _generate(self) -> None:
        """Streams the first sample of a single prompt, and prints every prompt that is done."""
        run, prompts = self._run, len(self._request.prompts)
        done: set[int] = set()
        unused = 0  # tokens that prompts which are done might have got, too
        most = sum(run.most_tokens(index) for index in range(prompts)) * run.samples
        if self._is_streamed:
            self._head(0)
        with self._progress() as progress:
            for news in run:
                if self._is_streamed:
                    self._page.text(self._words.add(news.text))
                if news.is_done:
                    done.add(news.prompt_index)
                    unused += self._unused(news.prompt_index)
                speed = run.timing.tokens_per_s
                progress.update(len(done), (run.timing.tokens + unused) / most, speed)
                if self._next_prompt in done:
                    progress.hide()
                    while self._next_prompt in done:
                        self._print_prompt()

    @property
    def _next_prompt(self) -> int:
        return self._printed // self._run.samples

    def _unused(self, index: int) -> int:
        outputs = self._run.of_prompt(index)
        most = self._run.most_tokens(index) * len(outputs)
        return most - sum(len(output.token_ids) for output in outputs)

    def _progress(self) -> Bar | Lines:
        prompts = len(self._request.prompts)
        if self._console.is_terminal and not self._is_streamed:
            return Bar(self._console, prompts)
        return Lines(self._console, prompts, is_silent=self._is_streamed)

    def _print_prompt(self) -> None:
        for output in self._run.of_prompt(self._next_prompt):
            self._print(output)

    def _print_rest(self) -> None:
        """Prints what there is of the texts that have not been printed."""
        for number in range(self._printed, len(self._run.outputs)):
            output = self._run.outputs[number]
            if output.token_ids or (number == 0 and self._is_streamed):
                self._print(output)

    def _print(self, output: Output) -> None:
        """Prints an output, without what has been streamed already."""
        number = output.prompt_index * self._run.samples + output.sample
        self._printed = number + 1
        if number == 0 and self._is_streamed:
            self._page.text(self._words.rest())
        else:
            self._head(number)
            self._page.text(output.text)
        self._page.end()

    def _head(self, number: int) -> None:
        """What stands before output ``number``: its title, where there are several, and prompt."""
        prompts, samples = self._request.prompts, self._request.samples
        index, sample = divmod(number, samples)
        titles = [f"prompt {index + 1} of {len(prompts)}"] if len(prompts) > 1 else []
        kind = "beam" if self._request.is_search else "sample"
        titles += [f"{kind} {sample + 1} of {samples}"] if samples > 1 else []
        if titles:
            self._console.print(Rule(", ".join(titles), align="left", style="dim"))
        self._page.begin()
        self._page.prompt("..." if sample else prompts[index])

    # Reports --------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Draws the map and prints the figures."""
        run, peak = self._run, self._run.peak
        layout = run.llm.engine.cache.layout
        if self._request.memory_map and peak.memory is not None:
            report.print_map(self._console, peak.memory, layout)
        if self._request.stats:
            if self._request.is_search or run.has_logprobs:
                report.print_results(self._console, run.outputs, is_search=self._request.is_search)
            speculates = self._request.decoding.speculative is not None
            report.print_figures(
                self._console, peak.stats, run.stats(), run.timing, speculates=speculates
            )

    def _explain(self, failed: list[Output]) -> str:
        """One line on why texts ended early, and what to do."""
        first = failed[0]
        reason = with_option_names(re.sub(r"^prompt \d+: ", "", one_line(first.error)))
        if re.search(r"tokens need \d+ pages", reason):
            needs = reason.split(";")[0].removeprefix("out of pages: ")
            budget = format_bytes(self._run.stats().cache.budget_bytes)
            reason = (
                f"out of pages: {needs}; raise --budget (it is {budget}), or lower --max-tokens"
            )
        elif "DriverError" in reason:
            reason += "; see vattn doctor"
        if len(self._request.prompts) > 1:
            reason = f"prompt {first.prompt_index + 1}: {reason}"
        prompts = len({output.prompt_index for output in failed})
        return reason if prompts == 1 else f"{reason} (and so {prompts - 1} more of the prompts)"

    def _write_json(self, *, with_stats: bool) -> None:
        run = self._run
        outputs = [output for output in run.outputs if output.token_ids or output.finish_reason]
        engine = run.stats() if with_stats else None
        path = self._request.json_file
        assert path is not None
        peak = run.peak.stats if with_stats else None
        report.write_json(path, self._record(), outputs, peak, engine, run.timing)

    def _record(self) -> dict[str, Any]:
        request, engine = self._request, self._run.llm.engine
        return {
            "model": self._name,
            "device": str(engine.loaded.device),
            "dtype": str(engine.loaded.model.dtype).removeprefix("torch."),
            "max_tokens": request.max_tokens,
            "n": 1 if request.is_search else request.samples,
            "speculative_config": request.decoding.speculative,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.scheduler.max_num_seqs,
            "max_num_batched_tokens": engine.scheduler.max_num_batched_tokens,
            "seed": request.seed,
            "sampling": settings(self._run.params),
            "versions": {
                "vattn": vattn.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
