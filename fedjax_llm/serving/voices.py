"""Base and tuned model answering the same question at the same time, within bounds."""

import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedjax_llm.data.chat import encode_prompt
from fedjax_llm.data.records import Message
from fedjax_llm.errors import UserError
from fedjax_llm.models.decoding import pieces
from fedjax_llm.models.loading import BaseModel
from fedjax_llm.models.streaming import Tempered, stream_in_chunks
from fedjax_llm.types import Adapters

HOTTEST = 2.0
"""The highest temperature that may be asked for: beyond it answers are noise."""
_SEEDS = 2**31
Events: TypeAlias = Generator[dict[str, Any], None, None]
"""What :meth:`Voices.answer` gives; closing it ends the answers."""


@dataclass(frozen=True)
class Limits:
    """What a question may cost.

    Attributes:
      prompt_tokens: of the question with template and system message.
      new_tokens: of each model's answer.

    Raises:
      UserError: there is no room for a question or an answer.
    """

    prompt_tokens: int = 512
    new_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuses bounds that leave nothing."""
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least one token must fit")


class Question(NamedTuple):
    """What is asked: a pure function of it is answered.

    Attributes:
      text: of the user.
      max_new_tokens: of each answer.
      temperature: 0 takes the most likely token each time.
      seed: of sampling.
    """

    text: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Voices:
    """The two models that are asked.

    Attributes:
      base: the frozen model.
      adapters: scaled factors of the tuned one.
      system: the system message that it was trained with, or ``None``.
      limits: what a question may cost.
    """

    base: BaseModel
    adapters: Adapters
    system: str | None
    limits: Limits = Limits()

    def prompt(self, question: Question) -> list[int]:
        """The tokens that both models are given.

        Raises:
          UserError: the question is empty, is no text, or is beyond the limits.
        """
        if not question.text.strip():
            raise UserError("the question is empty")
        try:
            question.text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("the question holds half of a character (a lone surrogate); type it again") from None
        if not 1 <= question.max_new_tokens <= self.limits.new_tokens:
            raise UserError(
                f"an answer of {question.max_new_tokens} tokens was asked for; 1 to {self.limits.new_tokens} can be"
            )
        if not 0 <= question.temperature <= HOTTEST:
            raise UserError(f"the temperature is {question.temperature:g}; it must be from 0 (greedy) to {HOTTEST:g}")
        if not 0 <= question.seed < _SEEDS:
            raise UserError(f"the seed is {question.seed}; it must be from 0 to {_SEEDS - 1}")
        system = [Message("system", self.system)] if self.system is not None else []
        tokens = encode_prompt([*system, Message("user", question.text)], self.base.tokenizer)
        if len(tokens) > self.longest_prompt:
            raise UserError(
                f"the question has {len(tokens)} tokens with what the model is told around it; at most "
                f"{self.longest_prompt} can be read: shorten it"
            )
        return tokens

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, at most: of the limits, or what leaves one token of the model's context."""
        return min(self.limits.prompt_tokens, self.base.model.config.context - 1)

    def answer(self, question: Question) -> Events:
        """Both answers as they grow, a piece of each in turn.

        Returns:
          Events: ``{"voice", "text"}`` for a piece; at the end of an answer ``{"voice", "tokens", "first_seconds",
          "seconds", "full"}``: how many tokens, after what time of its own the first came, its time in all, and
          whether it was cut at the bound. ``voice`` is ``base`` or ``tuned``.

        Raises:
          UserError: as for :meth:`prompt`, at the call.
        """
        prompt = self.prompt(question)
        return _in_turn(
            {
                "base": _Answer(self, {}, prompt, question),
                "tuned": _Answer(self, self.adapters, prompt, question),
            }
        )

    def warm_up(self) -> None:
        """Compiles everything that a question will need."""
        longest = Question("?", min(2, self.limits.new_tokens))
        for adapters in ({}, self.adapters):
            for _ in self._tokens(adapters, [0], longest, end_ids=()):
                pass

    def _tokens(
        self, adapters: Adapters, prompt: list[int], question: Question, end_ids: Collection[int]
    ) -> Iterator[int]:
        """The tokens of one model."""
        return stream_in_chunks(
            self.base.model,
            self.base.params,
            adapters,
            prompt,
            longest_prompt=self.longest_prompt,
            most_new_tokens=self.limits.new_tokens,
            max_new_tokens=question.max_new_tokens,
            end_ids=end_ids,
            sampler=Tempered(jax.random.key(question.seed), jnp.float32(question.temperature)),
        )


class _Answer:
    """One model's answer, with a count of its tokens and of the time spent on it alone."""

    def __init__(self, voices: Voices, adapters: Adapters, prompt: list[int], question: Question) -> None:
        tokenizer = voices.base.tokenizer
        tokens = voices._tokens(adapters, prompt, question, tokenizer.end_ids)
        self.most = min(question.max_new_tokens, voices.base.model.config.context - len(prompt))
        self.tokens, self.seconds, self.first_seconds = 0, 0.0, 0.0
        self._started = 0.0
        self._pieces = pieces(self._counted(tokens), tokenizer.decode)

    def next(self) -> str | None:
        """The next piece; ``None`` at the end."""
        self._started = time.perf_counter()
        piece = next(self._pieces, None)
        self.seconds += time.perf_counter() - self._started
        return piece

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        """The tokens, counted as they come."""
        for token in tokens:
            if not self.tokens:
                self.first_seconds = time.perf_counter() - self._started
            self.tokens += 1
            yield token


def _in_turn(answers: dict[str, _Answer]) -> Events:
    """Events of answers that take turns."""
    unfinished = dict(answers)
    while unfinished:
        for voice, answer in list(unfinished.items()):
            piece = answer.next()
            if piece is not None:
                yield {"voice": voice, "text": piece}
                continue
            del unfinished[voice]
            yield {
                "voice": voice,
                "tokens": answer.tokens,
                "first_seconds": answer.first_seconds,
                "seconds": answer.seconds,
                "full": answer.tokens >= answer.most,
            }
