"""A language model ready to run: decoder, tokenizer and the settings to run them with."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.delta import Delta
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_formats.tokens.chat_templates import choose_chat_template, find_chat_templates
from cluscomp_kernels.threads import warn_of_polling
from cluscomp_runtime.chat import render_chat
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.generate import Generation, GenerationStream, check_prompt
from cluscomp_runtime.linear import MatrixBuilder, check_kernel
from cluscomp_runtime.memory import check_memory, memory_faults
from cluscomp_runtime.sampling import Sampler
from cluscomp_runtime.tokenizer import Tokenizer, end_tokens, token_batch, token_ids

__all__ = ["DEFAULT_CONTEXT", "LanguageModel", "check_device", "compute_dtype", "observe_inputs"]

DEFAULT_CONTEXT = 2048
"""Default number of positions of the key-value cache; fewer if the model allows fewer."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | Sequence[int] | torch.Tensor | npt.NDArray[np.integer[Any]]
"""A text, or token ids `[tokens]` or `[1, tokens]`."""


class LanguageModel:
    """A decoder with its tokenizer. Build it with `cluscomp_runtime.load` or `LanguageModel.from_model`.

    `config` is the model's `config.json`, `description` what it says of the decoder, `context` the most positions a generation
    may have, prompt included. `tokenizer` is None for a model that has none; prompts are token ids then.
    """

    def __init__(self, model: Model, decoder: Decoder, context: int, builder: MatrixBuilder) -> None:
        self.config = model.config
        self.description = decoder.description
        self.decoder = decoder
        self.context = context
        self.kernels = dict(builder.paths)
        """The kernel that runs for each matrix, by tensor name."""
        self.tokenizer = Tokenizer.from_files(model.files)
        self.chat_templates = find_chat_templates(model.files)
        """The model's chat templates by name; a single one is `default`."""
        self.end_tokens = end_tokens(model.config, model.files, self.tokenizer)
        self._base = model
        self._builder = builder
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
    ) -> LanguageModel:
        """Build a runnable model from any `Model`, clustered or not.

        `dtype` is what activations and dense weights are computed in: float32 on a CPU, bfloat16 (float16 where the GPU lacks
        it) elsewhere unless given. `kernel` is "auto", a path of `cluscomp_kernels.clus_linear`, "dense" (decode every matrix
        once) or "reference" (decode at every call, keep nothing: slow, for models larger than memory). `context` is the length
        of the key-value cache in tokens, by default the least of 2048 and what the model was trained for.

        Raises UnsupportedError, also for a model larger than memory, InvalidFileError and InvalidRequestError; warns where a
        clustered matrix has no kernel, and once where torch's threads are in the kernels' way.
        """
        description = describe(model.config)
        check_tensors(model, description)
        target = check_device(device)
        builder = MatrixBuilder(check_kernel(kernel, target), compute_dtype(dtype, target), target)
        positions = _context(context, description.max_position_embeddings)
        check_memory(model, builder.kernel, builder.dtype, target)
        with memory_faults():
            decoder = Decoder(model, description, builder)
        builder.warn_without_kernel()
        if "native" in builder.paths.values():
            warn_of_polling()
        return cls(model, decoder, positions, builder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its tensors: the other process needs no file, prepares its own kernels, and computes the same."""
        return _rebuilt, (self._base, self.device, self.dtype, self._builder.kernel, self.context, self._delta)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """An independent model on the same stored tensors: a delta applied to one does not change the other."""
        return _rebuilt(self._base, self.device, self.dtype, self._builder.kernel, self.context, self._delta)

    def __copy__(self) -> LanguageModel:
        """The same as a deep copy: kernels, and changes of a delta in them, belong to one model."""
        return self.__deepcopy__({})

    def apply_delta(self, delta: Delta | None) -> None:
        """Swap in the codebooks, row scales and norms of a delta; None brings back those of the model as it was loaded.

        Deltas do not add up: each takes the place of the one before, and what it does not hold is that of the model. Codes and
        caches stay as they are; a cache filled before is of the model before. Raises InvalidFileError, with nothing changed, if
        the delta belongs to another model.
        """
        model = self._base if delta is None else delta.apply(self._base)
        new = frozenset(() if delta is None else delta.arrays)
        with memory_faults():
            self._builder.update(model, self._changed | new)
        self._changed, self._delta = new, delta

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def kernel_summary(self) -> str:
        """Kernels in use and for how many matrices each, most frequent first: `native (210 matrices), dense (1 matrix)`."""
        counts = Counter(self.kernels.values()).most_common()
        return ", ".join(f"{path} ({count} {'matrices' if count > 1 else 'matrix'})" for path, count in counts)

    def forward(self, input_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` `[batch, tokens]`, each token seeing those before it.

        Without a cache, so only the model's own limit bounds the length. Raises InvalidRequestError for ids outside the
        vocabulary, sequences of different lengths, no tokens at all, or more than `max_position_embeddings`.
        """
        batch = token_batch(input_ids)
        for row in batch:
            check_prompt(row, self.description.vocab_size, self.description.max_position_embeddings)
        with torch.inference_mode(), memory_faults():
            return self.decoder(torch.tensor(batch, dtype=torch.int64, device=self.device))

    __call__ = forward

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
            self.decoder,
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


def _rebuilt(
    model: Model, device: torch.device, dtype: torch.dtype, kernel: str, context: int, delta: Delta | None
) -> LanguageModel:
    with warnings.catch_warnings():
        # Said of the model that this is a copy of.
        warnings.simplefilter("ignore")
        made = LanguageModel.from_model(model, device=device, dtype=dtype, kernel=kernel, context=context)
    if delta is not None:
        made.apply_delta(delta)
    return made


def observe_inputs(model: Model, input_ids: torch.Tensor, observe: Callable[[str, torch.Tensor], None]) -> None:
    """Run a model once on `input_ids` `[batch, tokens]` and show `observe` each matrix's name and input.

    Inputs are `[batch, tokens, in_features]`; the head, if there is one, does not multiply. In float64 reference mode: nothing
    is kept, so memory is bounded by the largest matrix and the activations. Raises UnsupportedError, InvalidFileError,
    InvalidRequestError.
    """
    description = describe(model.config)
    check_tensors(model, description, head=False)
    for row in input_ids.tolist():
        check_prompt(row, description.vocab_size, description.max_position_embeddings)
    builder = MatrixBuilder("reference", torch.float64, torch.device("cpu"), observe)
    with torch.inference_mode():
        decoder = Decoder(model, description, builder)
        last = decoder.norm(decoder.stream(input_ids))
        if description.head.weight in model.tensors:
            observe(description.head.weight, last)
        elif description.tied:
            observe(description.embedding.weight, last)


def check_device(device: str | torch.device) -> torch.device:
    """The device, if torch can use it here. Raises InvalidRequestError."""
    try:
        target = torch.device(device)
        # A meta tensor has no values.
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = Problem("no_device", f"this device cannot be used: {reason}", found=str(device), remedy='use device="cpu"')
        raise InvalidRequestError(problem) from error
    return target


def compute_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """What to compute in, None for the device's default. Raises InvalidRequestError for a dtype that none computes in."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InvalidRequestError(Problem("unknown_dtype", "not a compute dtype", found=str(dtype), expected=", ".join(DTYPES)))
    return chosen


def _context(context: int | None, trained: int) -> int:
    if context is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= context <= trained:
        expected = f"1 to {trained} (max_position_embeddings)"
        raise InvalidRequestError(Problem("out_of_range", "context is out of range", found=str(context), expected=expected))
    return context
