"""Text to token ids and back, off the event loop when the text is long."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.errors import BadCheckpoint, PromptTooLong
from cabochon.server.chat import ChatTemplate, load_chat_template
from cabochon.server.config import ServerConfig
from cabochon.server.protocol import Message
from cabochon.server.tools import Function

INLINE_CHARS = 2000  # 0.5 ms on a Zen 4 core: shorter texts are encoded on the event loop
MESSAGE_CHARS = 50  # what rendering a message costs, in characters to encode


class Prompts:
    """Tokenizer and chat template of the served model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()  # tokenizer.json may carry those of the training
        self.tokenizer.no_padding()
        self.token_bytes = TokenBytes(tokenizer)
        self._template = template
        # No token stands for more text than its piece has characters (a byte's has six).
        self._max_token_chars = max(map(len, tokenizer.get_vocab()), default=1)

    async def of_messages(
        self,
        messages: Sequence[Message],
        *,
        limit: int,
        functions: Sequence[Function] = (),
        is_parallel: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat. The template writes <bos> and turn tokens itself.

        functions: that the model may call; is_parallel: several at once.
        """
        num_chars = sum(map(_num_chars, messages)) + sum(len(one.model_dump_json()) for one in functions)
        self._check_chars(num_chars, limit, "messages")

        def ids() -> list[int]:
            pieces = self._template.render(
                messages,
                functions=functions,
                is_parallel=is_parallel,
                add_generation_prompt=add_generation_prompt,
            )
            return self._encode(pieces, add_special_tokens=False)

        return await _aside(ids, num_chars + MESSAGE_CHARS * (len(messages) + len(functions)))

    async def encode(self, text: str, *, limit: int, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; control tokens in it are read as such.

        Raises PromptTooLong if they are more than `limit` for certain, before a giant is encoded.
        """
        self._check_chars(len(text), limit, "prompt")
        return await _aside(lambda: self._encode([text], add_special_tokens=add_special_tokens), len(text))

    def _encode(self, pieces: list[str], *, add_special_tokens: bool) -> list[int]:
        # Only the batch methods of `tokenizers` release the GIL: with `encode`, a thread would not help.
        encodings = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)
        return [token_id for encoding in encodings for token_id in encoding.ids]

    def _check_chars(self, num_chars: int, limit: int, param: str) -> None:
        if num_chars > limit * self._max_token_chars:
            raise PromptTooLong(
                f"This model's maximum context length is {limit} tokens. The prompt has {num_chars}"
                f" characters and no token has more than {self._max_token_chars}: the prompt is too long,"
                " shorten it",
                param,
            )


def _num_chars(message: Message) -> int:
    calls = message.tool_calls or ()
    return len(message.text) + sum(len(call.function.name + call.function.arguments) for call in calls)


async def _aside(work: Callable[[], list[int]], num_chars: int) -> list[int]:
    """In a thread, if it takes long enough to hold up streams."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)


def load_prompts(directory: Path, config: ServerConfig) -> Prompts:
    """Reads tokenizer.json (2 s for 256,000 pieces) and the template. Raises BadCheckpoint or ConfigError."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no exception of its own
        raise BadCheckpoint(f"{path} must be a tokenizer, it cannot be read: {error}: get it again") from None
    return make_prompts(tokenizer, directory, config)


def make_prompts(tokenizer: Tokenizer, directory: Path, config: ServerConfig) -> Prompts:
    """The template comes from `directory`. Raises BadCheckpoint or ConfigError."""
    added = tokenizer.get_added_tokens_decoder().values()
    control_strings = [token.content for token in added if token.special]
    template = load_chat_template(directory, config.chat_template, config.system_role, control_strings)
    return Prompts(tokenizer, template)
