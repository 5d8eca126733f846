"""`MiniCPMV`: a checkpoint as a Python object that generates text."""

import dataclasses
import difflib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from minicpmv46_jax import checkpoint, model
from minicpmv46_jax.config import GenerationConfig, ModelConfig
from minicpmv46_jax.generation.detokenize import Detokenizer
from minicpmv46_jax.generation.generate import Generator, Token
from minicpmv46_jax.generation.options import GenerationOptions, generation_options
from minicpmv46_jax.model import Params
from minicpmv46_jax.processing import FetchMedia, Inputs, Processor, PromptPlan, fetch

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}

_PROCESS_OPTIONS = frozenset(inspect.signature(Processor.plan).parameters) - {"self", "messages", "max_tokens"} | {
    "enable_thinking"
}
_GENERATION_OPTIONS = frozenset(inspect.signature(generation_options).parameters) - {"defaults"}


@dataclasses.dataclass(frozen=True)
class Delta:
    """One step of an output.

    Attributes:
      text: text that is final after this step; often "" inside a character or a possible stop text.
      tokens: the tokens decoded in this step.
      finish_reason: None until the last step; then "stop" (a stop token or text) or "length".
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None


class MiniCPMV:
    """MiniCPM-V 4.6, loaded.

        model = MiniCPMV.from_pretrained("openbmb/MiniCPM-V-4.6", dtype="bfloat16")
        parts = [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is it?"}]
        text = model.chat([{"role": "user", "content": parts}])

    Attributes:
      config: contents of config.json.
      generation_config: the checkpoint's decoding defaults.
      params: every parameter, a plain tree of arrays (see `minicpmv46_jax.model` for the functions over it).
      processor: messages to model inputs.
      generator: the compiled functions.
      folder: the checkpoint's folder on this machine.
    """

    def __init__(
        self,
        config: ModelConfig,
        generation_config: GenerationConfig,
        params: Params,
        processor: Processor,
        folder: Path,
        backend: str | None = None,
    ):
        self.config, self.generation_config = config, generation_config
        self.params, self.processor, self.folder = params, processor, folder
        self.generator = Generator(config, params, backend)
        self.detokenizer = Detokenizer(processor.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: str | None = None,
        revision: str | None = None,
        fetch: FetchMedia = fetch,
        progress: bool = False,
        backend: str | None = None,
        verify_checksums: bool = True,
    ) -> "MiniCPMV":
        """Loads a Hugging Face or a converted folder, or a model from the hub.

        Args:
          source: a folder, or a hub id such as "openbmb/MiniCPM-V-4.6".
          dtype: "bfloat16", "float32", or None for the checkpoint's own.
          revision: a hub branch, tag or commit.
          fetch: reads images and videos given as URLs or paths; a server passes its own rules.
          progress: show a progress bar on a terminal while parameters are loaded.
          backend: implementation of the kernels: "reference", "hopper", "tpu", or None for the fastest that
            supports this device and model.
          verify_checksums: compare a converted folder with the checksums in its manifest. A Hugging Face
            folder has none, so a changed value in it is not detected.

        Raises:
          ValueError: a file, field or parameter is missing, unknown or broken; the message names it in one
            line.
        """
        with ModelLoader(source, dtype, revision, fetch, progress, verify_checksums) as loading:
            return loading.model(backend)

    def process(self, messages: Sequence[Mapping[str, Any]], enable_thinking: bool | None = None, **options: Any) -> Inputs:
        """Converts a conversation to token ids and views.

        Args:
          messages: role and content, in the format of transformers and OpenAI's API.
          enable_thinking: the template's variable; None leaves it to the template.
          **options: `tools`, `downsample_mode`, `max_slice_nums`, ...: see `processing.Processor.plan`.

        Raises:
          ValueError: an option, message or image is invalid; the message names it.
        """
        return self.processor(messages, **_process_options(enable_thinking, options))

    def plan(
        self,
        messages: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> PromptPlan:
        """Renders and tokenises a conversation and opens none of its images; see `Processor.plan`."""
        return self.processor.plan(messages, max_tokens=max_tokens, **_process_options(enable_thinking, options))

    def options(self, **options: Any) -> GenerationOptions:
        """Returns generation options with the checkpoint's defaults: see `options.generation_options`."""
        _refuse_unknown(options, _GENERATION_OPTIONS)
        return generation_options(self.generation_config, **options)

    def logits(self, inputs: Inputs) -> Float32[np.ndarray, "T V"]:
        """Computes logits at every token of a prompt."""
        return self.generator.logits(inputs)

    def generate(self, inputs: Inputs, options: GenerationOptions) -> Iterator[Delta]:
        """Generates an output step by step; the last step has a `finish_reason`."""
        stream = self.detokenizer.stream(options.stop)
        stops = frozenset(options.stop_token_ids)
        reason = "length"
        for token in self.generator.tokens(inputs, options):
            if token.id in stops:
                reason = "stop"
                break
            yield Delta(stream.push(token.id), (token,))
            if stream.stopped:
                reason = "stop"
                break
        yield Delta(stream.finish(), (), reason)

    def stream(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[str]:
        """Generates the output's text in whole characters; options as in `process` and `options`."""
        inputs, generation = self.prepare(messages, options)
        return (delta.text for delta in self.generate(inputs, generation) if delta.text)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Returns the whole output text; options as in `process` and `options`."""
        return "".join(self.stream(messages, **options))

    def prepare(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> tuple[Inputs, GenerationOptions]:
        """Splits a call's options between `process` and `options`, and calls both."""
        _refuse_unknown(options, _PROCESS_OPTIONS | _GENERATION_OPTIONS)
        generation = self.options(**{name: value for name, value in options.items() if name in _GENERATION_OPTIONS})
        inputs = self.process(messages, **{name: value for name, value in options.items() if name in _PROCESS_OPTIONS})
        return inputs, generation


class ModelLoader:
    """Loads a checkpoint in threads; `config` is known at once. Leaving the context stops the threads.

    Arguments and errors as in `MiniCPMV.from_pretrained`.

    Attributes:
      source, dtype: the arguments.
      config: contents of config.json.
    """

    def __init__(
        self,
        source: str | Path,
        dtype: str | None = None,
        revision: str | None = None,
        fetch: FetchMedia = fetch,
        progress: bool = False,
        verify_checksums: bool = True,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.source, self.dtype = source, dtype
        self._folder = folder = checkpoint.resolve(source, revision)
        self.config = ModelConfig.from_folder(folder)
        self._generation_config = GenerationConfig.from_folder(folder)
        self._stopped = threading.Event()
        threads = ThreadPoolExecutor(2, thread_name_prefix="load")  # the tokenizer loads about as long as the weights
        to_dtype = None if dtype is None else DTYPES[dtype]
        self._processor = threads.submit(Processor.from_folder, folder, fetch=fetch)
        model.parameter_shapes(self.config)  # fills a cache, which two threads must not fill at once
        self._params = threads.submit(
            checkpoint.load_params, folder, self.config, to_dtype, progress, self._stopped, verify_checksums
        )
        threads.shutdown(wait=False)

    def __enter__(self) -> "ModelLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def check(self) -> None:
        """Raises the error of a thread that has failed by now."""
        for part in self._processor, self._params:
            if part.done():
                part.result()

    def model(self, backend: str | None = None) -> MiniCPMV:
        """Waits for the threads and returns the loaded model."""
        wait((self._processor, self._params), return_when=FIRST_EXCEPTION)
        self.check()
        parts = self._params.result(), self._processor.result()
        return MiniCPMV(self.config, self._generation_config, *parts, self._folder, backend)


def _process_options(enable_thinking: bool | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the processor's options; `enable_thinking` becomes a variable of the template."""
    _refuse_unknown(options, _PROCESS_OPTIONS)
    if enable_thinking is None:
        return options
    variables = {**(options.get("chat_template_kwargs") or {}), "enable_thinking": enable_thinking}
    return {**options, "chat_template_kwargs": variables}


def _refuse_unknown(options: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"option {name!r} is unknown{hint}")
