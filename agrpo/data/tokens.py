"""From text to tokens: where a prompt ends, where its completion begins and which token ends that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from agrpo.data.records import DataError
from agrpo.types import Conversation, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# The role stands on a line of its own, so that a completion begins without a space that rewards would have to strip.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


_SAID = "what-the-assistant-said"  # stands for a turn whose tokens are there already


@dataclass(frozen=True)
class Turns:
    """A completion of several turns: the assistant's tokens, and what is read between them.

    `gaps` says of each of `ids` how many of `heard` stand directly before it; both are empty where nothing is heard.
    """

    ids: tuple[int, ...]
    heard: tuple[int, ...] = ()
    gaps: tuple[int, ...] = ()

    @classmethod
    def of(cls, said: Sequence[Sequence[int]], heard: Sequence[Sequence[int]]) -> Turns:
        """Turns that are not empty, and what is heard before each but the first."""
        gaps: list[int] = []
        for before, own in zip([(), *heard], said, strict=True):
            gaps += [len(before), *[0] * (len(own) - 1)]
        return cls(tuple(t for own in said for t in own), tuple(t for part in heard for t in part), tuple(gaps))


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """Give the tokenizer what training and sampling need of it, in place; the vocabulary stays as it is.

    Args:
        chat_template: replaces the tokenizer's own. With neither, it gets `DEFAULT_CHAT_TEMPLATE`.

    Returns:
        What was changed, in words for the log.

    Raises:
        DataError: there is no end-of-sequence token, without which no completion could end.
    """
    notes = []
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no pad token: {tokenizer.eos_token} stands in")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        notes.append("chat template: the one given in the configuration")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        notes.append("the tokenizer has no chat template: conversations are written as User:/Assistant: turns")
    return notes


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """The tokens that a completion continues.

    A string is taken as it is, after the beginning-of-sequence token where the tokenizer adds one. A conversation goes
    through the chat template, which opens the assistant's turn. An empty string becomes that token, or the end token.
    """
    if not isinstance(text, str):
        return _plain(tokenizer, _render(tokenizer, text, opened=True))
    ids, bos = _plain(tokenizer, text), tokenizer.bos_token_id
    if bos is not None and tokenizer.encode(text)[:1] == [bos] != ids[:1]:
        ids = [bos, *ids]
    return ids or [tokenizer.eos_token_id if bos is None else bos]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, prompt: Text) -> list[int]:
    """The completion's tokens and the token that ends it, to follow `encode_prompt(tokenizer, prompt)`."""
    end = end_token_id(tokenizer, prompt)
    if not isinstance(prompt, str):
        opening = _render(tokenizer, prompt, opened=True)
        whole = _render(tokenizer, [*prompt, {"role": "assistant", "content": text}])
        # Some templates drop the reasoning of a finished turn. Sampling does not: then the text itself is to be learnt.
        if whole.startswith(opening) and text in whole[len(opening) :]:
            ids = _plain(tokenizer, whole[len(opening) :])
            if end in ids:
                return ids[: len(ids) - ids[::-1].index(end)]
    return [*_plain(tokenizer, text), end]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, turns: Conversation
) -> list[tuple[list[int], Turns]]:
    """A prompt and the turns behind it, of which the assistant's are to be learnt: tokens of both.

    Each turn of the assistant ends with its end token. All other tokens behind the prompt, the template's own among
    them, are heard. Some templates rewrite earlier turns once a conversation goes on: they drop their reasoning, or
    date them. No single text then holds every turn as the model will have to say it, and there is one result for each
    turn, behind its own prompt; for all other templates there is one.

    Args:
        prompt: what comes before the assistant's first turn.
        turns: begin and end with the assistant's.
    """
    whole = [*prompt, *turns]
    spoken = [number for number in range(len(prompt), len(whole)) if whole[number]["role"] == "assistant"]
    end = end_token_id(tokenizer, prompt)
    text, parts = _render(tokenizer, whole), []
    for number in spoken:
        opening = _render(tokenizer, whole[:number], opened=True)
        own = _words(tokenizer, opening, whole[: number + 1], end)
        if own is None or not text.startswith(opening + own) or (parts and len(opening) < sum(parts[-1][:2])):
            before = [encode_prompt(tokenizer, whole[:n]) for n in spoken]
            said = [encode_completion(tokenizer, whole[n]["content"], whole[:n]) for n in spoken]
            return [(ids, Turns(tuple(tokens))) for ids, tokens in zip(before, said, strict=True)]
        tokens = _plain(tokenizer, own)
        parts.append((len(opening), len(own), tokens if end in tokens else [*tokens, end]))
    said = [tokens for _, _, tokens in parts]
    heard = [_plain(tokenizer, text[a + n : b]) for (a, n, _), (b, _, _) in pairwise(parts)]
    return [(encode_prompt(tokenizer, prompt), Turns.of(said, heard))]


def _words(tokenizer: PreTrainedTokenizerBase, opening: str, turns: Conversation, end: int) -> str | None:
    """The last turn, the assistant's, as it is sampled: up to its end token, where the template writes one.

    None if the template does not write it word for word behind the opening.
    """
    text, content = _render(tokenizer, turns), turns[-1]["content"]
    own, token = text[len(opening) :], str(tokenizer.convert_ids_to_tokens(end))
    if not text.startswith(opening):
        return None
    if token in own:
        own = own[: own.rfind(token) + len(token)]
        return own if content in own else None
    return content if own.startswith(content) else None


def rewrites_earlier_turns(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> bool:
    """Does the chat template leave the reasoning out of a turn once the user speaks again, as Qwen3's does?"""
    said: Message = {"role": "assistant", "content": f"<think>{_SAID}</think>{_SAID}"}
    text = _render(tokenizer, [*prompt, said, {"role": "user", "content": "And then?"}], opened=True)
    return text.count(_SAID) < 2


def encode_heard(tokenizer: PreTrainedTokenizerBase, prompt: Text, observation: Text, last: int) -> list[int]:
    """The tokens between two turns of the assistant: what an environment says, and what the template writes around it.

    A plain prompt goes on with the observation as it is. In a conversation a string is a user's turn.

    Args:
        last: the last token of the turn before; what the template writes up to the end token is there already if it is
            that token.

    Raises:
        DataError: messages behind a plain prompt, or a template that does not write what the assistant says.
    """
    if isinstance(prompt, str):
        if not isinstance(observation, str):
            raise DataError("answers a plain prompt with messages: give a string, or make the prompt a conversation")
        return _plain(tokenizer, observation)
    if isinstance(observation, str):
        observation = [{"role": "user", "content": observation}]
    said: Message = {"role": "assistant", "content": _SAID}
    _, found, behind = _render(tokenizer, [*prompt, said, *observation], opened=True).partition(_SAID)
    if not found:
        raise DataError("the chat template does not write the assistant's words as they are: give model.chat_template")
    ids, end = _plain(tokenizer, behind), end_token_id(tokenizer, prompt)
    return ids[ids.index(end) + 1 :] if last == end and end in ids else ids


def end_token_id(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> int:
    """The token after which sampling stops.

    It is the first special token that the chat template writes after the assistant's words (<|im_end|>, <|eot_id|>, …);
    for strings, or where the template writes none, the tokenizer's end of sequence.
    """
    if not isinstance(prompt, str):
        words = "words"
        whole = _render(tokenizer, [*prompt, {"role": "assistant", "content": words}])
        added = tokenizer.added_tokens_decoder
        for token in _plain(tokenizer, whole[whole.rfind(words) + len(words) :]):
            if token == tokenizer.eos_token_id or (token in added and added[token].special):
                return token
    return tokenizer.eos_token_id


def drop_long(items: Sequence[T], lengths: Sequence[int], limit: int, what: str) -> tuple[list[T], str]:
    """The items of at most `limit` tokens, and a sentence for the log on those left out.

    Args:
        what: names the items in the plural, such as "prompts".

    Raises:
        DataError: none is short enough.
    """
    kept = [item for item, length in zip(items, lengths, strict=True) if length <= limit]
    dropped = len(items) - len(kept)
    if not dropped:
        return kept, f"all {len(items)} {what} have at most {limit} tokens"
    if not kept:
        raise DataError(
            f"all {len(items)} {what} are longer than {limit} tokens (the shortest: {min(lengths)}); raise the limit"
        )
    report = f"left out {dropped} of {len(items)} {what}: longer than {limit} tokens (the longest: {max(lengths)})"
    return kept, report


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _render(tokenizer: PreTrainedTokenizerBase, turns: Conversation, opened: bool = False) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=opened
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"the chat template refuses turns of {roles}: {error}; change the data or model.chat_template"
        ) from None
    return str(rendered)
