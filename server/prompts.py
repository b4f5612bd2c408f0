"""Text to token ids and back, off the event loop when the text is long."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.server.chat import ChatTemplate, load_chat_template
from cabochon.server.config import ServerConfig
from cabochon.server.protocol import Message

INLINE_CHARS = 4096  # about 1 ms: shorter texts are encoded on the event loop


class Prompts:
    """Tokenizer and chat template of the served model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self._template = template

    async def of_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat. The template writes <bos> and turn tokens itself.

        Control tokens inside a message's text are read as such, as every server of open models does: whoever may
        write messages may write turns.
        """
        return await self.encode(self._template.render(messages), add_special_tokens=False)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        encoding = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return encoding.ids


def load_prompts(directory: Path, config: ServerConfig) -> Prompts:
    """Reads tokenizer.json (a second for 256,000 pieces) and the template."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Prompts(tokenizer, load_chat_template(directory, config.chat_template, config.system_role))
