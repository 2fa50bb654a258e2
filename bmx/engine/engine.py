"""The engine: requests in, results out, as they finish. Down: schedule, run, update. Knows no files and no terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from bmx.compress.budgets import Budget
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.arguments import chat_requests, checked_requests, gather_settings, sampling_params, text_requests
from bmx.engine.backend import Backend
from bmx.engine.grammar import Grammars
from bmx.engine.memory_meter import is_out_of_memory, release
from bmx.engine.open import check_cache, open_model
from bmx.engine.planning import RunPlanner
from bmx.engine.prefix_cache import Reuse
from bmx.engine.prompt_lengths import EncodedPrompt, PromptMeasurer, max_length
from bmx.engine.run import Run, RunContext
from bmx.engine.sequence import Sequence
from bmx.errors import MemoryLimitError, UsageError
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.spec_settings import under_settings
from bmx.plan.planner import Length, Plan
from bmx.prompt_config import PromptConfig
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

if TYPE_CHECKING:
    from bmx.engine.runner import Watch


class Engine:
    """A model with its tokenizer, its cache policy and its limits.

    ``open`` makes one; ``generate`` and ``chat`` answer plain texts and messages, ``stream`` requests as they finish,
    and ``run`` is what all of them, and the command line, do their work by.

    Args:
        config: settings of the model, the cache and the memory.
        prompt: settings of prompts.
        tokenizer: turns text into token ids and back.
        backend: computes the steps.

    Attributes:
        config: as given.
        tokenizer: as given.
        spec: the model's sizes, with the layers that share their KV pairs.
        policy: which KV pairs stay in a slot.
        probe: token ids that are asked after each chunk.
        stats: counters of the newest run.
    """

    def __init__(self, config: EngineConfig, prompt: PromptConfig, tokenizer: Any, backend: Backend) -> None:
        self.config = config
        self._prompt = prompt
        self._backend: Backend | None = backend
        self.spec = under_settings(backend.spec, config)
        self.tokenizer = tokenizer
        self.policy = CompressionPolicy.from_config(config, self.spec)
        backend.try_kernels(self.spec, self.policy)
        self.stats = Stats()
        reuse = None
        if config.prefix_reuse and backend.shares_prefixes:
            reuse = Reuse(spec=self.spec, policy=self.policy, chunk_size=config.eviction_chunk_size)
        encoder = PromptEncoder(tokenizer, prompt)
        self._measurer = PromptMeasurer(encoder, self.policy, max_length(config, self.spec), reuse, self.spec.vocab)
        stand_in = backend.model is None
        self._grammars = Grammars(None if stand_in else tokenizer, self.spec.vocab, backend.end_token_ids)
        self.probe = encoder.probe(config.kv_probe)
        if max(self.probe, default=0) >= self.spec.vocab:
            raise UsageError("kv_probe has a word that the model has no token for; its tokenizer knows more tokens")
        self._running = False

    @classmethod
    def open(
        cls, model: str | PathLike[str] | EngineConfig = "demo", prompt: PromptConfig | None = None, **settings: Any
    ) -> Engine:
        """Load a model.

        Args:
            model: hub id, local folder or .gguf file, ``demo`` or ``fake``; or the settings as an ``EngineConfig``.
            prompt: settings of prompts.
            settings: settings by their names, as the fields of ``EngineConfig`` and ``PromptConfig`` and with values
                as on the command line: ``kv_budget=512``, ``memory_limit="8G"``. They replace those given before.
                ``prompt_template`` fills no prompts here: it only names the words that ``kv_protect="instructions"``
                and ``kv_probe="instructions"`` look for.

        Raises:
            ModelError: the model cannot be found, loaded, or run correctly.
            MemoryLimitError: not even one short sequence would fit beside it.
            UsageError: an unknown setting, a wrong value, or settings that this model cannot follow.
        """
        config, prompt = gather_settings(model, prompt, settings)
        check_cache(config, prompt)
        return cls(config, prompt, *open_model(config))

    def close(self) -> None:
        """Free the model. Whatever is called on this engine afterwards raises a ``UsageError``.

        An engine with the same model keeps it. So does a stream that has begun: it can still be read to its end, and
        the model is freed when it ends or is closed itself.
        """
        self._backend = None
        release()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def budget(self) -> Budget | None:
        """How many KV pairs a sequence may keep; None for all."""
        return self.policy.budget if self.policy.scorer else None

    @property
    def backend(self) -> Backend:
        """What computes the steps.

        Raises:
            UsageError: the engine was closed.
        """
        if self._backend is None:
            raise UsageError("this engine is closed", hint="open another one with Engine.open")
        return self._backend

    def with_config(self, config: EngineConfig) -> Engine:
        """An engine with the same model and other settings of its cache and memory; one of the two runs at a time."""
        return Engine(config, self._prompt, self.tokenizer, self.backend)

    def with_backend(self, backend: Backend) -> Engine:
        """An engine with the same settings whose steps another backend computes."""
        return Engine(self.config, self._prompt, self.tokenizer, backend)

    def generate(self, prompts: Iterable[str], **sampling: Any) -> list[Result]:
        """Answer texts; each is a whole prompt, put into the model's chat template if it has one.

        Args:
            prompts: the texts.
            sampling: sampling parameters by name: ``max_tokens=64``.

        Returns:
            The results in the order of the texts. A text that cannot be answered has its ``error`` set.

        Raises:
            UsageError: not a list of texts, an unknown parameter, or a value out of range.
            MemoryLimitError: not even one text fits.
        """
        return self._in_order(text_requests(prompts, sampling_params(sampling)))

    def chat(
        self,
        conversations: Iterable[Iterable[Mapping[str, Any]]],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Iterable[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> list[Result]:
        """Answer conversations. Where the last message is an assistant's, the answer continues it.

        Args:
            conversations: lists of messages, each a dict with its ``role`` and its ``content``.
            chat_template_kwargs: values for variables of the chat template: ``{"enable_thinking": False}``.
            tools: functions that the model may call, in OpenAI's form. Its calls are in the text, as it writes them.
            sampling: sampling parameters by name: ``temperature=0.7``.

        Returns:
            The results in the order of the conversations. One that cannot be answered has its ``error`` set.

        Raises:
            UsageError: not a list of lists of messages, an unknown parameter, or a value out of range.
            MemoryLimitError: not even one conversation fits.
        """
        return self._in_order(chat_requests(conversations, sampling_params(sampling), chat_template_kwargs, tools))

    def _in_order(self, requests: list[Request]) -> list[Result]:
        self._check_open()
        results = {result.id: result for result in self.stream(requests)} if requests else {}
        return [results[request.id] for request in requests]

    def stream(self, requests: Iterable[Request]) -> Generator[Result]:
        """Answer requests; results come as they finish, not in order. All requests are read first, to make a plan.

        Args:
            requests: each with its own id and sampling parameters.

        Raises:
            UsageError: an item that is not a request, or another stream of this engine has not ended.
            MemoryLimitError: not even one request fits.
            DeviceError: the GPU failed; no results follow those that were handed out.
        """
        self._check_open()
        return self.run(list(checked_requests(requests)))

    def encode(self, request: Request) -> list[int]:
        """The token ids that the model reads for a request.

        Raises:
            RowError: there is no text, or the chat template refuses it.
        """
        self._check_open()
        return self._measurer.encoder.encode(request)

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The length of each request that can be answered at all; nothing else is kept."""
        self._check_open()
        return self._measurer.measure(self._grammars.foreseen(requests))

    def prompt_warnings(self) -> list[str]:
        """What a person should know of the prompts that were measured or encoded: each in a line."""
        return self._measurer.encoder.warnings()

    def plan(self, lengths: Iterable[Length]) -> Plan:
        """The slots and sizes of steps that suit these lengths, within the memory that may be used.

        Raises:
            MemoryLimitError: not even one slot fits.
        """
        return self._planner.plan(lengths)

    @property
    def _planner(self) -> RunPlanner:
        on_host = self.backend.device_type == "cpu"
        return RunPlanner(
            config=self.config,
            spec=self.spec,
            policy=self.policy,
            backend=self.backend,
            probe=self.probe,
            formats_bytes=self._grammars.host_bytes if on_host else 0,
        )

    def _check_open(self) -> None:
        _ = self.backend

    def run(
        self,
        requests: Iterable[Request | Result],
        plan: Plan | None = None,
        *,
        stats: Stats | None = None,
        stop: Stop | None = None,
        row_timeout: float | None = None,
        watch: Watch | None = None,
        forced: Mapping[str | int, tuple[int, ...]] | None = None,
        paused: Callable[[], bool] | None = None,
    ) -> Generator[Result]:
        """Answer requests under a plan; results come as they finish, not in order. One run at a time.

        When memory runs out, unfinished requests begin again under a smaller plan; a request that finds too little
        memory even alone is an error. An answer does not depend on how often it was begun.

        Args:
            requests: read lazily when a plan is given; otherwise all are read first, to make one. A Result among them
                (a row that could not be read) is handed on as it is.
            plan: from ``plan``; it must have been made from the lengths of these requests.
            stats: counts what the run does; new counters if left out.
            stop: looked at between steps; when it is requested, nothing is begun any more.
            row_timeout: seconds that a sequence may have its slot; one that takes longer is an error.
            watch: is shown the logits of every token that is to be sampled.
            forced: by request id, the token ids of its answer: the model reads them instead of choosing its own.
            paused: called before each request is read; while it returns True, no request is read.

        Raises:
            DeviceError: the GPU failed; no results follow those that were handed out.
        """
        self._check_open()
        if self._running:
            raise UsageError("this engine is answering other requests", hint="finish or close that generator first")
        self._running = True
        self.stats = stats or Stats()
        try:
            if plan is None:
                requests = list(requests)
                plan = self.plan(self.measure(r for r in requests if isinstance(r, Request)))
            context = self._context(stop or Stop(), row_timeout, watch, forced or {})
            yield from Run(context, requests, paused).results(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            hint = "Finished answers are saved. Close other programs, or lower --memory-limit"
            raise MemoryLimitError("memory ran out, and not only for a step", hint=hint) from error
        finally:
            self._running = False

    def _context(
        self,
        stop: Stop,
        row_timeout: float | None,
        watch: Watch | None,
        forced: Mapping[str | int, tuple[int, ...]],
    ) -> RunContext:
        backend, refused = self.backend, None if self.config.enforce_eager else self.stats.note_eager
        return RunContext(
            spec=self.spec,
            policy=self.policy,
            meter=backend.meter,
            stats=self.stats,
            runner=lambda plan: backend.runner(plan, self.policy, probe=self.probe, watch=watch, refused=refused),
            read=self._measurer.read,
            begin=lambda request, read: self._sequence(request, read, forced.get(request.id, ())),
            shrunk=self._planner.shrunk,
            chunk_size=None if self.config.chunking_is_free else self.config.eviction_chunk_size,
            stop=stop,
            row_timeout=row_timeout,
        )

    def describe(self) -> dict[str, Any]:
        """What computes the answers, for the record."""
        return self.backend.describe()

    def _sequence(self, request: Request, encoded: EncodedPrompt, forced: tuple[int, ...]) -> Sequence:
        """A request as a sequence.

        Raises:
            RowError: its format cannot be compiled.
        """
        grammar = None if forced else self._grammars.of(request.params)
        return Sequence(
            request=request,
            prompt=encoded.prompt,
            max_tokens=encoded.length.max_tokens,
            rows_needed=encoded.length.rows_needed,
            truncated=encoded.truncated,
            spans=encoded.spans,
            reading_rows=encoded.length.reading_rows,
            end_token_ids=self.backend.end_token_ids,
            tokenizer=self.tokenizer,
            forced_answer=forced,
            grammar=grammar,
            reasoning=self._measurer.encoder.reasoning(request, encoded.prompt),
        )
