"""Runs the batches of a request and shows them: texts, progress, reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule

import vattn
from vattn.cli import report
from vattn.cli.console import BadInput, CliError, Page, one_line
from vattn.cli.generate import Request
from vattn.cli.run import Generator, Output
from vattn.config import format_bytes


class Session:
    """One run over all prompts, batch by batch, with its progress and its reports."""

    def __init__(
        self, request: Request, console: Console, generator: Generator, name: str, new_tokens: int
    ) -> None:
        self._request = request
        self._console = console
        self._generator = generator
        self._name = name
        self._new_tokens = new_tokens
        self._page = Page(console.width)
        self._outputs: list[Output] = []
        self._is_streamed = len(request.prompts) == 1

    def run(self) -> None:
        """Generates, prints and reports.

        Raises:
            BadInput: sizes that no layout of the cache can have.
            CliError: out of pages, or a driver's error.
            typer.Exit: with code 130 after Ctrl-C.
        """
        stats = None
        timing = self._generator.timing
        try:
            self._generate()
            stats = self._report()
        except KeyboardInterrupt:
            self._console.print(f"\ninterrupted after {timing.tokens} tokens", style="yellow")
            raise typer.Exit(130) from None
        except vattn.OutOfPages as error:
            stats = self._report()
            raise CliError(self._explain(error)) from error
        except vattn.DriverError as error:
            raise CliError(f"the driver failed: {one_line(error)}; see vattn doctor") from error
        except ValueError as error:
            if timing.tokens:
                raise
            raise BadInput(one_line(error)) from error
        finally:
            if self._request.json_file is not None:
                report.write_json(
                    self._request.json_file, self._record(), self._outputs, stats, timing
                )

    def _generate(self) -> None:
        prompts, step = self._request.prompts, self._request.batch_size
        with self._progress() as advance:
            for first in range(0, len(prompts), step):
                self._generator.cache.reset()
                batch = prompts[first : first + step]
                if self._is_streamed:
                    self._head(0)
                try:
                    outputs = self._generator.run(
                        batch,
                        first_index=first,
                        new_tokens=self._new_tokens,
                        on_step=lambda tokens: advance(tokens, None),
                        write=self._page.text if self._is_streamed else None,
                    )
                except (KeyboardInterrupt, vattn.OutOfPages) as error:
                    advance(0, first)
                    outputs = getattr(error, "outputs", [])
                    self._print([o for i, o in enumerate(outputs) if o.token_ids or i == 0])
                    raise
                advance(0, first + len(batch))
                self._print(outputs)

    def _print(self, outputs: Sequence[Output]) -> None:
        """Prints a batch, without what has been streamed already."""
        total = len(self._request.prompts) * self._request.samples
        for i, output in enumerate(outputs):
            if not (self._is_streamed and i == 0):
                self._head(len(self._outputs))
                self._page.text(output.text)
            self._outputs.append(output)
            self._page.end(is_last=len(self._outputs) == total)

    def _head(self, number: int) -> None:
        """What stands before output ``number``: its title, where there are several, and prompt."""
        prompts, samples = self._request.prompts, self._request.samples
        index, sample = divmod(number, samples)
        titles = [f"prompt {index + 1} of {len(prompts)}"] if len(prompts) > 1 else []
        titles += [f"sample {sample + 1} of {samples}"] if samples > 1 else []
        if titles:
            self._console.print(Rule(", ".join(titles), align="left", style="dim"))
        self._page.prompt("..." if sample else prompts[index])

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int, int | None], None]]:
        """A bar on a terminal, a line per batch elsewhere, nothing when text is streamed.

        Yields:
            ``advance(tokens, prompts)``: new tokens, and how many prompts are done after a batch.
        """
        timing, total = self._generator.timing, len(self._request.prompts)
        if self._is_streamed:
            yield lambda tokens, done: None
            return
        if not self._console.is_terminal:

            def log(tokens: int, done: int | None) -> None:
                if done:
                    line = f"{done} of {total} prompts, {timing.tokens_per_s:.0f} tokens/s"
                    self._console.print(line, style="dim")

            yield log
            return
        progress = Progress(
            TextColumn("generating"),
            BarColumn(),
            TextColumn("{task.fields[prompts]} of {task.fields[all_prompts]} prompts"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        per_prompt = self._request.samples * self._new_tokens
        task = progress.add_task(
            "", total=total * per_prompt, prompts=0, all_prompts=total, speed=0
        )

        def advance(tokens: int, done: int | None) -> None:
            speed = timing.tokens_per_s
            if done is None:
                progress.start()
                progress.update(task, advance=tokens, speed=speed)
            else:  # texts are printed next, where the bar was
                progress.update(task, completed=done * per_prompt, prompts=done, speed=speed)
                progress.stop()

        try:
            yield advance
        finally:
            progress.stop()

    def _report(self) -> vattn.CacheStats:
        """Draws the map and the figures while the sequences are still in the cache."""
        cache = self._generator.cache
        stats: vattn.CacheStats = cache.stats()
        if self._request.memory_map:
            report.print_map(self._console, cache.memory_map(), cache.kv.layout)
        if self._request.stats:
            reserved = cache.kv.layout.reserved_bytes
            report.print_figures(self._console, stats, self._generator.timing, reserved)
        return stats

    def _explain(self, error: vattn.OutOfPages) -> str:
        pool = self._generator.cache.kv.pool.stats()
        return (
            f"out of pages: {one_line(error).split(';')[0]}; raise --budget (it is "
            f"{format_bytes(pool.budget_bytes)}), or lower --batch-size, --n or --max-tokens"
        )

    def _record(self) -> dict[str, Any]:
        request, model = self._request, self._generator.model
        return {
            "model": self._name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_tokens": self._new_tokens,
            "n": request.samples,
            "batch_size": request.batch_size,
            "seed": request.seed,
            "sampling": {
                k: v
                for k, v in self._generator.sampling.items()
                if k in ("do_sample", "temperature", "top_p", "top_k")
            },
            "versions": {
                "vattn": vattn.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
