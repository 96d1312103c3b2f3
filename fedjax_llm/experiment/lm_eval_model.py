"""A run's model in EleutherAI's Language Model Evaluation Harness (lm-eval), as ``--model fedjax_llm``.

    python -m experiments.lm_eval run --model fedjax_llm --model_args run=runs/mine --tasks pubmedqa

The harness imports this module by the entry point ``lm_eval.models`` where its version has one, and
``experiments.lm_eval`` does in every version. What is scored, and how windows, stop texts and chat templates are cut,
follows the harness's own ``hf`` model, so that figures can be compared.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance  # pyrefly: ignore
from lm_eval.api.model import TemplateLM  # pyrefly: ignore
from lm_eval.api.registry import register_model  # pyrefly: ignore
from lm_eval.models.utils import normalize_gen_kwargs  # pyrefly: ignore
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyrefly: ignore
from tqdm import tqdm

from fedjax_llm.data.records import Message
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.evaluation.continuations import Pair, continued, log_likelihoods, stop_ids, until_stop
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.tuned import TunedModel, open_model, open_run
from fedjax_llm.models.decoding import Greedy, Nucleus, Sampler
from fedjax_llm.models.loading import BaseType
from fedjax_llm.models.quantised import Quantise
from fedjax_llm.models.tokenizer import FALLBACK_TEMPLATE
from fedjax_llm.runs import keys

_BATCH = 8
_IGNORED = ("device", "max_batch_size", "pretrained")
_SAMPLING = ("do_sample", "temperature", "top_p", "until", "max_gen_toks")


@register_model("fedjax_llm")
class FedjaxLM(TemplateLM):
    """The harness's view of a base model, with or without an adapter."""

    def __init__(
        self,
        run: str | None = None,
        base: bool = False,
        model: str | None = None,
        adapter: str | None = None,
        dtype: BaseType = "float32",
        quantise: Quantise = "none",
        batch_size: int | str = _BATCH,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
        key_file: str | None = None,
        **more: Any,
    ):
        """Loads the model; each argument is one of ``--model_args``.

        Args:
          run: folder of a run: its base model with its adapter.
          base: leave the run's adapter out.
          model: without a run, a built-in name, hub id, folder or ``.gguf`` file.
          adapter: with ``model``, the folder of a PEFT adapter.
          dtype: with ``model``, of the weights.
          quantise: with ``model``, how the matrices are stored.
          batch_size: rows at once; ``auto`` takes 8.
          max_length: tokens of context; the model's own by default.
          max_gen_toks: new tokens where a task does not say.
          add_bos_token: whether texts begin with special tokens; ``None``: as the tokenizer has it.
          seed: of sampling.
          key_file: of an encrypted run, if the key is not where the run says.
          more: what the harness passes to every model; ``device`` has no effect, JAX takes what there is.

        Raises:
          UserError: the arguments contradict each other, or the model cannot be loaded.
        """
        super().__init__()
        if unknown := sorted(set(more) - set(_IGNORED)):
            names = ("run", "base", "model", "adapter", "dtype", "quantise", "batch_size", "max_length", "seed")
            raise UserError(f"--model_args has no {unknown[0]!r}{nearest(unknown[0], names)}")
        self.tuned = _opened(run, base, model, adapter, dtype, quantise, key_file)
        self.adapters = self.tuned.scaled
        self.tokenizer = self.tuned.base.tokenizer
        self.batch_size = _BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = min(max_length or self.model.config.context, self.model.config.context)
        self.max_gen_toks, self.add_bos_token, self.seed = max_gen_toks, add_bos_token, seed

    @property
    def model(self):
        """The pure functions of the base model."""
        return self.tuned.base.model

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells cached requests of different tokenizers apart."""
        return f"{self.tuned.base.name}-{self.tuned.base.fingerprint[:12]}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        base, kind = self.tuned.base, self.tuned.kind
        return {
            "model_num_parameters": base.size,
            "model_name": base.name,
            "model_fingerprint": base.fingerprint,
            "adapter_rank": None if kind is None else kind.rank,
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source of the template; the models here have one each."""
        return (self.tokenizer.chat_template or FALLBACK_TEMPLATE) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; without a generation prompt, up to the end of the last message, to be continued there."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        text = self.tokenizer.render(messages, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1].content.strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the tokenizer's own special tokens around them, unless the text begins with one already."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        return self.tokenizer.backend.encode(string, add_special_tokens=special is not False).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The harness's requests, whose texts are only keys of its cache."""
        pairs: list[Pair] = [self._fitting(context, continuation) for _, context, continuation in requests]
        found = self._scored(pairs, disable_tqdm)
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token predicted once, in windows as long as the context."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(pairs, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text; requests with the same settings are generated together."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for places in groups.values():
                texts = self._continued([requests[place].args for place in places], bar)
                found |= dict(zip(places, texts, strict=True))
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[place])
        return [found[place] for place in range(len(requests))]

    def _continued(self, asked: Sequence[tuple[str, dict[str, Any]]], bar: Any) -> list[str]:
        """Texts after prompts that share their settings."""
        settings = normalize_gen_kwargs(asked[0][1], self.max_gen_toks)
        if unknown := sorted(set(settings) - set(_SAMPLING)):
            raise UserError(f"generation with {unknown[0]!r} is not supported; supported: {', '.join(_SAMPLING)}")
        most = settings["max_gen_toks"]
        room = self.max_length - most
        if room < 1:
            raise UserError(f"max_gen_toks is {most}, which leaves no room in a context of {self.max_length}")
        until = settings.get("until") or []
        stops = [*([until] if isinstance(until, str) else until), self.tokenizer.decode([self.eot_token_id])]
        made = continued(
            self.model,
            self.tuned.base.params,
            self.adapters,
            [self.tok_encode(prompt)[-room:] for prompt, _ in asked],
            max_new_tokens=most,
            end_ids=self.tokenizer.end_ids | stop_ids(self.tokenizer, stops),
            pad_id=self.tokenizer.pad_id,
            batch_size=self.batch_size,
            sampler=lambda batch: self._sampler(settings, batch),
            advance=_moving(bar),
        )
        decode = self.tokenizer.backend.decode
        return [until_stop(decode(tokens, skip_special_tokens=True), stops) for tokens in made]

    def _sampler(self, settings: dict[str, Any], batch: int) -> Sampler:
        """Greedy, or sampling with a key of the batch's own."""
        if not settings.get("do_sample") or not settings.get("temperature"):
            return Greedy()
        key = jax.random.fold_in(jax.random.key(self.seed), batch)
        return Nucleus(key, float(settings["temperature"]), float(settings.get("top_p", 1.0)))

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """The pair without the beginning of its context, where it is too long."""
        return list(context)[-max(self.max_length + 1 - len(continuation), 1) :], continuation

    def _scored(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Log-likelihoods under a progress bar."""
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Log-likelihoods") as bar:
            return log_likelihoods(
                self.model,
                self.tuned.base.params,
                self.adapters,
                pairs,
                batch_size=self.batch_size,
                advance=_moving(bar),
            )


def _moving(bar: tqdm) -> Callable[[int], None]:
    """What moves a progress bar on."""

    def advance(count: int) -> None:
        bar.update(count)

    return advance


def _opened(
    run: str | None,
    base: bool,
    model: str | None,
    adapter: str | None,
    dtype: BaseType,
    quantise: Quantise,
    key_file: str | None,
) -> TunedModel:
    """The model that ``--model_args`` names."""
    if (run is None) == (model is None):
        raise UserError("--model_args names the model: either run=FOLDER or model=NAME")
    if run is not None and adapter is not None:
        raise UserError("adapter=FOLDER goes with model=NAME; a run has its own adapter")
    use_compilation_cache()
    with ExitStack() as stack:
        stack.enter_context(keys.using(None if key_file is None else Path(key_file)))
        if run is not None:
            return open_run(Path(run), base)
        return open_model(str(model), None if adapter is None else Path(adapter), dtype, quantise)
