"""A language model ready to run: decoder, tokenizer and the settings to run them with."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from cluscomp_formats.architectures import DecoderDescription, check_tensors, describe
from cluscomp_formats.delta import Delta
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_formats.tokens.chat_templates import choose_chat_template, find_chat_templates
from cluscomp_kernels.engine import CACHE_TYPES, CacheType
from cluscomp_runtime.chat import render_chat
from cluscomp_runtime.engine import EngineName, Logits
from cluscomp_runtime.generate import Generation, GenerationStream, check_prompt
from cluscomp_runtime.memory import memory_faults, trim_heap
from cluscomp_runtime.native_engine import NativeEngine, why_not_native
from cluscomp_runtime.sampling import Sampler
from cluscomp_runtime.tokenizer import Tokenizer, end_tokens, token_batch, token_ids

if TYPE_CHECKING:
    import torch

    from cluscomp_runtime.decoder import Decoder
    from cluscomp_runtime.torch_engine import TorchEngine

__all__ = ["DEFAULT_CONTEXT", "LanguageModel"]

DEFAULT_CONTEXT = 2048
"""Default number of positions of the key-value cache; fewer if the model allows fewer."""

Prompt: TypeAlias = "str | Sequence[int] | torch.Tensor | npt.NDArray[np.integer[Any]]"
"""A text, or token ids `[tokens]` or `[1, tokens]`."""


class LanguageModel:
    """A decoder with its tokenizer. Build it with `cluscomp_runtime.load` or `LanguageModel.from_model`.

    `config` is the model's `config.json`, `description` what it says of the decoder, `context` the most positions a generation
    may have, prompt included. `tokenizer` is None for a model that has none; prompts are token ids then.
    """

    def __init__(self, model: Model, engine: NativeEngine | TorchEngine, context: int) -> None:
        self.config = model.config
        self.description = engine.description
        self.context = context
        self.kernels = dict(engine.kernels)
        """The kernel that runs for each matrix, by tensor name."""
        self.tokenizer = Tokenizer.from_files(model.files)
        self.chat_templates = find_chat_templates(model.files)
        """The model's chat templates by name; a single one is `default`."""
        self.end_tokens = end_tokens(model.config, model.files, self.tokenizer)
        # Reading a tokenizer leaves tens of megabytes of free heap behind.
        trim_heap()
        self._base = model
        self._engine = engine
        self._changed: frozenset[str] = frozenset()
        self._delta: Delta | None = None

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        kernel: str = "auto",
        context: int | None = None,
        threads: int | None = None,
        cache_dtype: str | None = None,
    ) -> LanguageModel:
        """Build a runnable model from any `Model`, clustered or not.

        By default the native engine runs it, without torch. On another device, in another dtype, or with another kernel, torch
        does. `dtype` is what activations and dense weights are computed in: by default float32 on a CPU, elsewhere bfloat16
        (float16 if the GPU lacks it). `kernel` is "auto", a path of `cluscomp_kernels.clus_linear`, "dense" (decode every
        matrix once) or "reference" (decode at every call, keep nothing: slow, for models larger than memory). `context` is the
        length of the key-value cache in tokens, by default the least of 2048 and what the model was trained for. `threads` is
        the number of threads of the native engine, by default OMP_NUM_THREADS or all cores; torch has a number of its own.
        `cache_dtype` is how the native engine stores keys and values: "float32" (the default), "float16" or "int8".

        Raises UnsupportedError, also for a model larger than memory, InvalidFileError and InvalidRequestError; warns where the
        slower engine runs though nobody asked for it, and where a clustered matrix has no kernel.
        """
        description = describe(model.config)
        check_tensors(model, description)
        positions = _context(context, description.max_position_embeddings)
        if threads is not None and threads < 1:
            problem = Problem("out_of_range", "threads is out of range", found=str(threads), expected="1 or more")
            raise InvalidRequestError(problem)
        if cache_dtype not in (None, *CACHE_TYPES):
            expected = ", ".join(CACHE_TYPES)
            raise InvalidRequestError(
                Problem("unknown_dtype", "not a dtype of the cache", found=cache_dtype, expected=expected)
            )
        return cls(model, _engine(model, description, device, dtype, kernel, threads, cache_dtype), positions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its tensors: the other process needs no file, prepares its own kernels, and computes the same."""
        return _rebuilt, self._origin

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """An independent model on the same stored tensors: a delta applied to one does not change the other."""
        return _rebuilt(*self._origin)

    def __copy__(self) -> LanguageModel:
        """The same as a deep copy: kernels, and changes of a delta in them, belong to one model."""
        return self.__deepcopy__({})

    @property
    def _origin(self) -> tuple[Model, dict[str, Any], Delta | None]:
        engine = self._engine
        options = {"device": engine.device, "dtype": engine.dtype, "kernel": engine.kernel, "context": self.context}
        return self._base, {**options, "threads": engine.threads, "cache_dtype": engine.cache_dtype}, self._delta

    def apply_delta(self, delta: Delta | None) -> None:
        """Swap in the codebooks, row scales and norms of a delta; None brings back those of the model as it was loaded.

        Deltas do not add up: each takes the place of the one before, and what it does not hold is that of the model. Codes and
        caches stay as they are; a cache filled before is of the model before. Raises InvalidFileError, with nothing changed, if
        the delta belongs to another model.
        """
        model = self._base if delta is None else delta.apply(self._base)
        new = frozenset(() if delta is None else delta.arrays)
        with memory_faults():
            self._engine.update(model, self._changed | new)
        self._changed, self._delta = new, delta

    @property
    def engine(self) -> EngineName:
        """What computes: "native", the engine in C, or "torch"."""
        return self._engine.name

    @property
    def decoder(self) -> Decoder:
        """The decoder of the torch engine. Raises InvalidRequestError if the model runs in the native engine."""
        if self._engine.name == "native":
            remedy = 'load it with kernel="dense" or another kernel of torch'
            raise InvalidRequestError(Problem("no_decoder", "the native engine has no torch decoder", remedy=remedy))
        return self._engine.decoder

    @property
    def device(self) -> torch.device:
        """Where it computes. Imports torch."""
        import torch

        return torch.device(self._engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations. Imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self._engine.dtype)
        return dtype

    @property
    def kernel_summary(self) -> str:
        """Kernels in use and for how many matrices each, most frequent first: `native (210 matrices), dense (1 matrix)`."""
        counts = Counter(self.kernels.values()).most_common()
        return ", ".join(f"{path} ({count} {'matrices' if count > 1 else 'matrix'})" for path, count in counts)

    @overload
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, input_ids: npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]]) -> Logits: ...
    def forward(
        self, input_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]]
    ) -> torch.Tensor | Logits:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` `[batch, tokens]`, each token seeing those before it.

        A tensor gives a tensor, in the model's dtype and on its device. Anything else gives a numpy array, float32 or (in that
        dtype) float64. Without a cache, so only the model's own limit bounds the length. Raises InvalidRequestError for ids
        outside the vocabulary, sequences of different lengths, no tokens at all, or more than `max_position_embeddings`.
        """
        batch = token_batch(input_ids)
        for row in batch:
            check_prompt(row, self.description.vocab_size, self.description.max_position_embeddings)
        ids = np.array(batch, dtype=np.int64)
        # Whoever has a tensor has imported torch.
        loaded = sys.modules.get("torch")
        with memory_faults():
            if loaded is None or not isinstance(input_ids, loaded.Tensor):
                return self._engine.forward(ids)
            if self._engine.name == "torch":
                return self._engine.forward_tensor(loaded.from_numpy(ids))
            logits: torch.Tensor = loaded.from_numpy(self._engine.forward(ids))
            return logits

    __call__ = forward

    @property
    def arithmetic(self) -> str:
        """The name of the precision of products, for the self-test: a dtype, or "int16" (see `selftest`)."""
        return self._engine.arithmetic

    def forward_cached(self, ids: Sequence[int], first: int) -> Logits:
        """Logits `[tokens, vocab_size]` of `ids` through the cache: the first `first` tokens at once, the others one by one.

        Raises what `forward` raises.
        """
        check_prompt(ids, self.description.vocab_size, self.description.max_position_embeddings)
        row = np.array(ids, dtype=np.int32)
        with memory_faults():
            cache = self._engine.cache(len(row))
            parts = [row[:first], *(row[index : index + 1] for index in range(first, len(row)))]
            return np.concatenate([self._engine.logits(part, cache) for part in parts])

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        add_special_tokens: bool = True,
        on_token: Callable[[int], None] | None = None,
    ) -> GenerationStream:
        """Generate piece by piece: iterate over the result to get text, see its `result` afterwards.

        Temperature 0 is greedy and deterministic; otherwise tokens are sampled with `seed` after `top_k` and `top_p`.
        `add_special_tokens` concerns text prompts. `on_token` is called with each new token id. The generation ends with an end
        token, after `max_new_tokens`, or when the context is full. Raises InvalidRequestError, at once, for a prompt that is
        empty, too long or has ids outside the vocabulary, and for settings out of range.
        """
        return GenerationStream(
            self._engine,
            self.tokenizer,
            self._prompt_ids(prompt, add_special_tokens=add_special_tokens),
            Sampler(temperature, top_k, top_p, seed),
            context=self.context,
            max_new_tokens=max_new_tokens,
            end_tokens=self.end_tokens,
            on_token=on_token,
        )

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate to the end; takes the options of `stream` and raises what it raises."""
        return self.stream(prompt, **options).finish()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text for a chat, by the model's own template; messages have `role` and mostly `content`.

        `tools` are JSON schemas of functions, `documents` objects with `title` and `text`; a model that has a template called
        `tool_use` uses it where there are tools. The text ends with an open turn of the assistant, or without
        `add_generation_prompt` with the final message; with `continue_final_message` that is left open. `variables` are those
        of the template, such as `enable_thinking`.

        Pass the result to `generate` with `add_special_tokens=False`: templates write special tokens themselves. Raises
        InvalidRequestError if there is no template or it refuses the messages, InvalidFileError for a broken template,
        UnsupportedError for one that reaches outside its sandbox.
        """
        return render_chat(
            choose_chat_template(self.chat_templates, tools=tools is not None),
            messages,
            special_tokens=self.tokenizer.special_tokens if self.tokenizer else {},
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    def _prompt_ids(self, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                problem = no_tokenizer(self._base)
                raise InvalidRequestError(replace(problem, remedy=f"give token ids instead of text, or {problem.remedy}"))
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return token_ids(prompt)


def _engine(
    model: Model,
    description: DecoderDescription,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    kernel: str,
    threads: int | None,
    cache_dtype: str | None,
) -> NativeEngine | TorchEngine:
    warned = False
    if kernel == "auto" and str(device) == "cpu" and str(dtype).removeprefix("torch.") in ("None", "float32"):
        reason = why_not_native(model)
        if reason is None:
            cache_type: CacheType = cache_dtype or "float32"  # type: ignore[assignment]  # it is one of CACHE_TYPES
            return NativeEngine(model, description, threads=threads, cache_dtype=cache_type)
        message = f"this model runs in torch, which is slower and takes more memory, because {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        warned = True
    if cache_dtype is not None:
        message, remedy = "torch stores keys and values in the dtype of activations", "leave out `cache_dtype`"
        raise InvalidRequestError(Problem("unknown_dtype", message, found=cache_dtype, remedy=remedy))
    # Imports torch.
    from cluscomp_runtime.torch_engine import TorchEngine

    return TorchEngine(model, description, device=device, dtype=dtype, kernel=kernel, warn=not warned)


def _rebuilt(model: Model, options: dict[str, Any], delta: Delta | None) -> LanguageModel:
    with warnings.catch_warnings():
        # Said of the model that this is a copy of.
        warnings.simplefilter("ignore")
        made = LanguageModel.from_model(model, **options)
    if delta is not None:
        made.apply_delta(delta)
    return made


def _context(context: int | None, trained: int) -> int:
    if context is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= context <= trained:
        expected = f"1 to {trained} (max_position_embeddings)"
        raise InvalidRequestError(Problem("out_of_range", "context is out of range", found=str(context), expected=expected))
    return context
